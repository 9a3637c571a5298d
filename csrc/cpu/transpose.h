// Matrices in scratch, turned block by block in registers.
#pragma once

#include <utility>

#include "common/simd.h"

namespace xlstm::XLSTM_ISA {

// Lane `lane` of the lower (upper) row of a pair kStep rows apart, after their off-diagonal blocks of
// kStep lanes changed places; lanes of the second operand count from kCount.
template <int kCount, int kStep>
constexpr int lower_lane(int lane) {
  return lane & kStep ? kCount + lane - kStep : lane;
}
template <int kCount, int kStep>
constexpr int upper_lane(int lane) {
  return lane & kStep ? kCount + lane : lane + kStep;
}

template <int kStep, class V, int... kLane>
XLSTM_HD void exchange(V& lower, V& upper, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const V a = lower, b = upper;
#if defined(__clang__)
  lower = __builtin_shufflevector(a, b, lower_lane<kCount, kStep>(kLane)...);
  upper = __builtin_shufflevector(a, b, upper_lane<kCount, kStep>(kLane)...);
#else
  using Mask = decltype(a < b);
  lower = __builtin_shuffle(a, b, Mask{lower_lane<kCount, kStep>(kLane)...});
  upper = __builtin_shuffle(a, b, Mask{upper_lane<kCount, kStep>(kLane)...});
#endif
}

template <int kStep, class V, int kCount>
XLSTM_HD void exchange_all(V (&rows)[kCount]) {
  if constexpr (kStep < kCount) {
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      if ((row & kStep) == 0) {
        exchange<kStep>(rows[row], rows[row + kStep], std::make_integer_sequence<int, kCount>{});
      }
    }
    exchange_all<2 * kStep>(rows);
  }
}

// out[column][row] = in[row][column]; rows and columns are whole vectors.
template <class T>
void transpose(const T* in, std::int64_t in_row, std::int64_t rows, std::int64_t columns, T* out,
               std::int64_t out_row) {
  constexpr int kW = kLanes<T>;
  for (std::int64_t row = 0; row < rows; row += kW) {
    for (std::int64_t column = 0; column < columns; column += kW) {
      Vec<T> block[kW];
#pragma GCC unroll 16
      for (int r = 0; r < kW; ++r) block[r] = load(in + (row + r) * in_row + column);
      exchange_all<1>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kW; ++r) store(out + (column + r) * out_row + row, block[r]);
    }
  }
}

}  // namespace xlstm::XLSTM_ISA
