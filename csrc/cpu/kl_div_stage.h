// Rows of logits of any element type, and blocks of them in the compute type.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/simd.h"
#include "common/reduce.h"
#include "cells/kl_div.h"

namespace xlstm::XLSTM_ISA {

constexpr int kBlock = 2048;
// One unrolled step: this many elements are a block's granularity.
template <class C>
constexpr int kStep = 4 * kLanes<C>;

inline int size_of_block(std::int64_t left) {
  return left < kBlock ? static_cast<int>(left) : kBlock;
}
template <class C>
int padded(int count) {
  return (count + kStep<C> - 1) / kStep<C> * kStep<C>;
}

// A row of `V` logits; where cap is not 0, z counts as cap tanh(z / cap), a masked one as masked.
struct Logits {
  DType dtype;
  std::int64_t V;
  const char* data;
  double cap;

  template <class C>
  C at(std::int64_t index) const {
    C value = 0;
    dispatch_dtype(dtype, [&](auto element) {
      using T = decltype(element);
      value = static_cast<C>(load(reinterpret_cast<const T*>(data) + index, 1, T{})[0]);
    });
    return cap == 0 ? value : softcapped(broadcast<Vec<C>>(value), static_cast<C>(cap))[0];
  }
};

// A block of a row in the compute type, padded with -inf; the row itself where it is that already.
template <class C>
struct Staged {
  const C* z;
  C most, least;  // NaN is passed over, it shows in the sums
};

template <class C>
struct Extremes {
  Vec<C> most[2] = {broadcast<Vec<C>>(kMasked<C>), broadcast<Vec<C>>(kMasked<C>)};
  Vec<C> least[2] = {-most[0], -most[1]};
  XLSTM_HD void add(int i, Vec<C> z) {
    most[i % 2] = maximum(z, most[i % 2]);
    least[i % 2] = minimum(z, least[i % 2]);
  }
  Staged<C> of(const C* z) const {
    return {z, horizontal_max(maximum(most[0], most[1])),
            horizontal_min(minimum(least[0], least[1]))};
  }
};

template <class T, class C>
Staged<C> stage_as(const T* row, int count, int padded, C* buffer) {
  constexpr bool kPlain = std::is_same_v<T, C>, kVector = std::is_same_v<compute_t<T>, C>;
  Extremes<C> extremes;
  int whole = 0;
  if constexpr (kVector) {
    for (; whole + kStep<C> <= count; whole += kStep<C>) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec<C> z = load(row + whole + i * kLanes<C>);
        if (!kPlain) store(buffer + whole + i * kLanes<C>, z);
        extremes.add(i, z);
      }
    }
    if constexpr (kPlain) {
      if (whole == padded) return extremes.of(row);
      std::memcpy(buffer, row, whole * sizeof(C));
    }
  }
  Staged<C> staged = extremes.of(buffer);
  for (int j = whole; j < padded; ++j) {
    buffer[j] = j < count ? static_cast<C>(load(row + j, 1, T{})[0]) : kMasked<C>;
    if (buffer[j] > staged.most) staged.most = buffer[j];
    if (buffer[j] < staged.least) staged.least = buffer[j];
  }
  return staged;
}

// A block again after `change` of its elements, in `buffer`.
template <class C, class Change>
Staged<C> restage(const C* z, int padded, C* buffer, Change&& change) {
  Extremes<C> extremes;
  for (int j = 0; j < padded; j += 2 * kLanes<C>) {
    for (int i = 0; i < 2; ++i) {
      const Vec<C> changed = change(load(z + j + i * kLanes<C>));
      store(buffer + j + i * kLanes<C>, changed);
      extremes.add(i, changed);
    }
  }
  return extremes.of(buffer);
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
  if (row.cap == 0) return staged;
  const C cap = static_cast<C>(row.cap);
  return restage(staged.z, padded, buffer, [cap](Vec<C> z) { return softcapped(z, cap); });
}

inline void fill(DType dtype, std::int64_t V, char* row, double value) {
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    T* out = reinterpret_cast<T*>(row);
    const auto values = broadcast<Vec<compute_t<T>>>(static_cast<compute_t<T>>(value));
    for (std::int64_t j = 0; j < V; j += kLanes<compute_t<T>>) {
      const std::int64_t left = V - j;
      store(out + j, values,
            left < kLanes<compute_t<T>> ? static_cast<int>(left) : kLanes<compute_t<T>>);
    }
  });
}

}  // namespace xlstm::XLSTM_ISA
