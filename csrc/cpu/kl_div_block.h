// One block of a row of kl_div: from logits to sums, and from what these leave to the gradient. The
// mathematics is at the head of cpu/kl_div.cpp.
#pragma once

#include <cmath>

#include "common/reduce.h"
#include "common/stream.h"
#include "cpu/kl_div_stage.h"

namespace xlstm::XLSTM_ISA {

// x = z - most of one block, exactly 0 at its largest logit; u = x * scale. `octaves` is what that takes
// off the logits' own z * scale.
template <class C>
struct Shift {
  C most, scale;
  double octaves;
  Shift() = default;
  Shift(C scale, C largest)
      : most(largest == -std::numeric_limits<C>::infinity() ? C(0) : largest),
        scale(scale),
        octaves(static_cast<double>(most) * scale) {}
  // With kFloored, -inf becomes a most negative number; NaN stays.
  template <bool kFloored>
  XLSTM_HD Vec<C> x(Vec<C> z) const {
    return kFloored ? maximum(broadcast<Vec<C>>(kFloor<C>), z - most) : z - most;
  }
  template <bool kFloored>
  XLSTM_HD Vec<C> exp(Vec<C> x) const {
    const Vec<C> u = x * scale;
    return exp2_nonpositive(kFloored ? maximum(broadcast<Vec<C>>(kZeroPower), u) : u);
  }
  bool needs_floor(C least) const { return !((least - most) * scale > kZeroPower); }

  // Far below what has a power of two, and still well within what exp2_nonpositive reduces.
  static constexpr C kZeroPower = -(1 << 16);
};

template <class C>
struct Block {
  Shift<C> student, teacher;
  bool student_masked, teacher_masked;  // all of it
  double sum_s, sum_t, excess, gap;     // excess: sum_s - sum_t, without their rounding
  double stray;  // largest z * scale of the first distribution where the second is masked
};

// What a block's arithmetic asks memory for meanwhile: the logits it comes to next.
struct Ahead {
  const char *student, *teacher;
  int student_step, teacher_step;  // bytes per vector
};

// Adds the block's sums; keeps e_s, and e_t or what the form says.
template <class C, Form kForm, bool kKeep, bool kFloored>
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
      const Vec<C> x_s = student.template x<kFloored>(load(s + k));
      const Vec<C> x_t = teacher.template x<kFloored>(load(t + k));
      const Vec<C> e_s = student.template exp<kFloored>(x_s),
                   e_t = teacher.template exp<kFloored>(x_t);
      sum_s[i] += e_s;
      sum_t[i] += e_t;
      excess[i] += e_s - e_t;
      if constexpr (kForm == Form::kGap) {
        const Vec<C> difference = x_s - x_t;
        gap[i] += e_s * difference;
        if constexpr (kKeep) store(keep_t + k, difference);
      } else {
        gap[i] += e_t * (x_t - x_s);
        if constexpr (kKeep) store(keep_t + k, e_t);
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

template <class T, Form kForm, bool kStream, class C>
void write_block(const C* e_s, const C* kept, int count, C a, C b, T* g) {
  constexpr int kPair = 2 * kLanes<C>;
  for (int j = 0; j < count; j += kPair) {
    Vec<C> part[2];
    for (int i = 0; i < 2; ++i) {
      const int k = j + i * kLanes<C>;
      const Vec<C> second = kForm == Form::kAlone ? Vec<C>{} : load(kept + k);
      part[i] = gradient<kForm>(load(e_s + k), second, a, b);
    }
    store_finite<kStream>(g + j, part[0], part[1]);
  }
}

}  // namespace xlstm::XLSTM_ISA
