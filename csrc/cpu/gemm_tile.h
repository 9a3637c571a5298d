// The register-blocked inner product of every matrix loop here:
//   c[i][j] (+)= sum_k a[i * a_row + k * a_k] * b[k * b_k + j],  i < kRows, j < kVectors * lanes
#pragma once

#include "common/simd.h"

namespace xlstm::XLSTM_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <int kRows, int kVectors, class T>
XLSTM_HD void multiply(std::int64_t depth, const T* a, std::int64_t a_row, std::int64_t a_k,
                       const T* b, std::int64_t b_k, Vec<T> (&c)[kRows][kVectors]) {
  for (std::int64_t k = 0; k < depth; ++k, a += a_k, b += b_k) {
    Vec<T> b_J[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) b_J[j] = load(b + j * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> a_i = broadcast<Vec<T>>(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) c[i][j] += a_i * b_J[j];
    }
  }
}

template <int kRows, int kVectors, class T>
void gemm_tile(std::int64_t depth, const T* a, std::int64_t a_row, std::int64_t a_k, const T* b,
               std::int64_t b_k, T* c, std::int64_t c_row, bool accumulate) {
  // The new terms are summed on their own first: one running sum over all of time would round each
  // of them at the size of the total.
  Vec<T> sum[kRows][kVectors]{};
  multiply<kRows, kVectors>(depth, a, a_row, a_k, b, b_k, sum);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      T* to = c + i * c_row + j * kLanes<T>;
      store(to, accumulate ? load(static_cast<const T*>(to)) + sum[i][j] : sum[i][j]);
    }
  }
}

// Calls f(std::integral_constant<int, n>) for n = count, 1 <= count <= kMax.
template <int kMax, class F>
XLSTM_HD void with_constant(int count, F&& f) {
  if constexpr (kMax > 1) {
    if (count < kMax) return with_constant<kMax - 1>(count, f);
  }
  f(std::integral_constant<int, kMax>{});
}

// c (rows x vectors*lanes) in tiles of at most kMaxRows x kMaxVectors. b holds each column block of
// kMaxVectors vectors (the last may be narrower) `b_block` elements apart.
template <int kMaxRows, int kMaxVectors, class T>
void gemm(std::int64_t rows, std::int64_t vectors, std::int64_t depth, const T* a,
          std::int64_t a_row, std::int64_t a_k, const T* b, std::int64_t b_k, std::int64_t b_block,
          T* c, std::int64_t c_row, bool accumulate) {
  for (std::int64_t j = 0; j < vectors; j += kMaxVectors, b += b_block) {
    const int width = static_cast<int>(vectors - j < kMaxVectors ? vectors - j : kMaxVectors);
    for (std::int64_t i = 0; i < rows; i += kMaxRows) {
      const int height = static_cast<int>(rows - i < kMaxRows ? rows - i : kMaxRows);
      with_constant<kMaxRows>(height, [&](auto h) {
        with_constant<kMaxVectors>(width, [&](auto w) {
          gemm_tile<h(), w()>(depth, a + i * a_row, a_row, a_k, b, b_k,
                              c + i * c_row + j * kLanes<T>, c_row, accumulate);
        });
      });
    }
  }
}

}  // namespace xlstm::XLSTM_ISA
