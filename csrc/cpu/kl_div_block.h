// One block of a row of kl_div: from logits to sums, and from what these leave to the gradient. The
// mathematics is at the head of cpu/kl_div.cpp.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/simd.h"
#include "common/reduce.h"
#include "common/stream.h"
#include "launch.h"

namespace xlstm::XLSTM_ISA {

constexpr int kBlock = 2048;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
// One unrolled step: this many elements are a block's granularity.
template <class C>
constexpr int kStep = 4 * kLanes<C>;
// x = z - most of one block, exactly 0 at its largest logit; u = x * scale. `octaves` is what that takes
// off the logits' own z * scale.
template <class C>
struct Shift {
  C most, scale, floor;
  double octaves;
  Shift() = default;
  Shift(C scale, C largest)
      : most(largest == -std::numeric_limits<C>::infinity() ? C(0) : largest),
        scale(scale),
        floor(std::numeric_limits<C>::lowest() / 2),
        octaves(static_cast<double>(most) * scale) {}
  // With kFloor, -inf becomes a most negative number; NaN stays.
  template <bool kFloor>
  XLSTM_HD Vec<C> x(Vec<C> z) const {
    return kFloor ? maximum(broadcast<Vec<C>>(floor), z - most) : z - most;
  }
  template <bool kFloor>
  XLSTM_HD Vec<C> exp(Vec<C> x) const {
    const Vec<C> u = x * scale;
    return exp2_nonpositive(kFloor ? maximum(broadcast<Vec<C>>(kZeroPower), u) : u);
  }
  bool needs_floor(C least) const { return !((least - most) * scale > kZeroPower); }

  // Far below what has a power of two, and still well within what exp2_nonpositive reduces.
  static constexpr C kZeroPower = -(1 << 16);
};

template <class C>
struct Block {
  Shift<C> student, teacher, hard;
  bool student_masked, teacher_masked;         // all of it
  double sum_s, sum_t, excess, gap, sum_hard;  // excess: sum_s - sum_t, without their rounding
  double stray;  // largest z * scale of the first distribution where the second is masked
};

// A row of logits of any element type, `V` wide.
struct Logits {
  DType dtype;
  std::int64_t V;
  const char* data;

  template <class C>
  C at(std::int64_t index) const {
    C value = 0;
    dispatch_dtype(dtype, [&](auto element) {
      using T = decltype(element);
      value = static_cast<C>(load(reinterpret_cast<const T*>(data) + index, 1, T{})[0]);
    });
    return value;
  }
};

// A block of a row in the compute type, padded with -inf; the row itself where it is that already.
template <class C>
struct Staged {
  const C* z;
  C most, least;  // NaN is passed over, it shows in the sums
};

template <class T, class C>
Staged<C> stage_as(const T* row, int count, int padded, C* buffer) {
  constexpr C kMasked = -std::numeric_limits<C>::infinity();
  constexpr bool kPlain = std::is_same_v<T, C>, kVector = std::is_same_v<compute_t<T>, C>;
  const Vec<C> masked = broadcast<Vec<C>>(kMasked);
  Vec<C> most[2] = {masked, masked}, least[2] = {-masked, -masked};
  int whole = 0;
  if constexpr (kVector) {
    for (; whole + kStep<C> <= count; whole += kStep<C>) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec<C> z = load(row + whole + i * kLanes<C>);
        if (!kPlain) store(buffer + whole + i * kLanes<C>, z);
        most[i % 2] = maximum(z, most[i % 2]);
        least[i % 2] = minimum(z, least[i % 2]);
      }
    }
    if constexpr (kPlain) {
      if (whole == padded) {
        return {row, horizontal_max(maximum(most[0], most[1])),
                horizontal_min(minimum(least[0], least[1]))};
      }
      std::memcpy(buffer, row, whole * sizeof(C));
    }
  }
  Staged<C> staged{buffer, horizontal_max(maximum(most[0], most[1])),
                   horizontal_min(minimum(least[0], least[1]))};
  for (int j = whole; j < padded; ++j) {
    buffer[j] = j < count ? static_cast<C>(load(row + j, 1, T{})[0]) : kMasked;
    if (buffer[j] > staged.most) staged.most = buffer[j];
    if (buffer[j] < staged.least) staged.least = buffer[j];
  }
  return staged;
}

// Elements [begin, begin + padded) of a row.
template <class C>
Staged<C> stage(const Logits& row, std::int64_t begin, int padded, C* buffer) {
  const std::int64_t left = row.V - begin;
  const int count = left < 0 ? 0 : left < padded ? static_cast<int>(left) : padded;
  Staged<C> staged;
  dispatch_dtype(row.dtype, [&](auto element) {
    using T = decltype(element);
    staged = stage_as(reinterpret_cast<const T*>(row.data) + begin, count, padded, buffer);
  });
  return staged;
}

// What a block's arithmetic asks memory for meanwhile: the logits it comes to next.
struct Ahead {
  const char *student, *teacher;
  int student_step, teacher_step;  // bytes per vector
};

// Adds the block's sums; keeps e_s and e_t, or e_s and x_s - x_t for the reverse divergence.
template <class C, Divergence kDivergence, bool kKeep, bool kFloor>
void add_block(const C* s, const C* t, int count, Block<C>& block, C* keep_s, C* keep_t,
               Ahead ahead) {
  const Shift<C> student = block.student, teacher = block.teacher;
  constexpr int kUnroll = 2;
  Vec<C> sum_s[kUnroll] = {}, sum_t[kUnroll] = {}, excess[kUnroll] = {}, gap[kUnroll] = {};
  for (int j = 0; j < count; j += kUnroll * kLanes<C>) {
#pragma GCC unroll 4
    for (int i = 0; i < kUnroll; ++i) {
      const int k = j + i * kLanes<C>;
      prefetch(ahead.student += ahead.student_step);
      prefetch(ahead.teacher += ahead.teacher_step);
      const Vec<C> x_s = student.template x<kFloor>(load(s + k));
      const Vec<C> x_t = teacher.template x<kFloor>(load(t + k));
      const Vec<C> e_s = student.template exp<kFloor>(x_s), e_t = teacher.template exp<kFloor>(x_t);
      sum_s[i] += e_s;
      sum_t[i] += e_t;
      excess[i] += e_s - e_t;
      if constexpr (kDivergence == Divergence::kForward) {
        gap[i] += e_t * (x_t - x_s);
        if constexpr (kKeep) store(keep_t + k, e_t);
      } else {
        const Vec<C> difference = x_s - x_t;
        gap[i] += e_s * difference;
        if constexpr (kKeep) store(keep_t + k, difference);
      }
      if constexpr (kKeep) store(keep_s + k, e_s);
    }
  }
  block.sum_s = sum_in_double(sum_s[0], sum_s[1]);
  block.sum_t = sum_in_double(sum_t[0], sum_t[1]);
  block.excess = sum_in_double(excess[0], excess[1]);
  block.gap = sum_in_double(gap[0], gap[1]);
}

// KL(a|b) is infinite where a has mass and b is masked; how much a has is known when its row is.
template <class C>
double largest_stray(const Staged<C>& a, C scale, const Staged<C>& b, int count) {
  double stray = -kInfinity;
  for (int j = 0; j < count; ++j) {
    if (b.z[j] == -kInfinity) stray = std::fmax(stray, static_cast<double>(a.z[j]) * scale);
  }
  return stray;
}

// The student's softmax at temperature 1, when the divergence has another one.
template <class C, bool kKeep>
void add_hard_block(const C* s, int count, Block<C>& block, C* keep) {
  const Shift<C> hard = block.hard;
  Vec<C> sum[2] = {};
  for (int j = 0; j < count; j += 2 * kLanes<C>) {
    for (int i = 0; i < 2; ++i) {
      const Vec<C> e = hard.template exp<true>(hard.template x<true>(load(s + j + i * kLanes<C>)));
      sum[i] += e;
      if constexpr (kKeep) store(keep + j + i * kLanes<C>, e);
    }
  }
  block.sum_hard = sum_in_double(sum[0], sum[1]);
}

// Gradient of one block from what add_block kept.
//   forward  g = (e_s - e_t) a + e_s b      reverse  g = e_s (gap a + b)
template <class C, Divergence kDivergence>
XLSTM_HD Vec<C> gradient(Vec<C> e_s, Vec<C> kept, C a, C b) {
  if constexpr (kDivergence == Divergence::kForward) {
    return (e_s - kept) * a + e_s * b;  // exactly 0 where student and teacher agree: then b is 0
  } else {
    return e_s * (kept * a + b);
  }
}

template <class T, Divergence kDivergence, bool kStream, class C>
void write_block(const C* keep_s, const C* keep_t, int count, C a, C b, T* g) {
  constexpr int kPair = 2 * kLanes<C>;
  for (int j = 0; j < count; j += kPair) {
    Vec<C> part[2];
    for (int i = 0; i < 2; ++i) {
      const int k = j + i * kLanes<C>;
      part[i] = gradient<C, kDivergence>(load(keep_s + k), load(keep_t + k), a, b);
    }
    store_finite<kStream>(g + j, part[0], part[1]);
  }
}

template <class C>
void fill(const Logits& like, char* row, C value) {
  dispatch_dtype(like.dtype, [&](auto element) {
    using T = decltype(element);
    T* out = reinterpret_cast<T*>(row);
    const auto values = broadcast<Vec<compute_t<T>>>(static_cast<compute_t<T>>(value));
    for (std::int64_t j = 0; j < like.V; j += kLanes<compute_t<T>>) {
      const std::int64_t left = like.V - j;
      store(out + j, values,
            left < kLanes<compute_t<T>> ? static_cast<int>(left) : kLanes<compute_t<T>>);
    }
  });
}

}  // namespace xlstm::XLSTM_ISA
