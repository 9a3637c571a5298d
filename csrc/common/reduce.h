// Sums and extremes over the lanes of vectors.
#pragma once

#include "common/simd.h"

namespace xlstm::XLSTM_ISA {

// The smaller; b where either is NaN.
XLSTM_HD VecF minimum(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}
XLSTM_HD VecD minimum(VecD a, VecD b) { return select(a < b, a, b); }

// For vectors without NaN.
template <class V>
XLSTM_HD element_t<V> horizontal_max(V x) {
  element_t<V> most = x[0];
  for (int lane = 1; lane < kLanes<element_t<V>>; ++lane) most = x[lane] > most ? x[lane] : most;
  return most;
}
template <class V>
XLSTM_HD element_t<V> horizontal_min(V x) {
  return -horizontal_max(-x);
}

// Of the lanes of both, in float64.
template <class V>
XLSTM_HD double sum_in_double(V a, V b) {
  double sum = 0;
  for (int lane = 0; lane < kLanes<element_t<V>>; ++lane) {
    sum += static_cast<double>(a[lane]) + static_cast<double>(b[lane]);
  }
  return sum;
}

#if defined(__AVX512F__)
XLSTM_HD float horizontal_max(VecF x) { return _mm512_reduce_max_ps((__m512)x); }
XLSTM_HD double sum_in_double(VecF a, VecF b) {
  const auto halves = [](VecF x) {
    return _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)),
                         _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)));
  };
  return _mm512_reduce_add_pd(_mm512_add_pd(halves(a), halves(b)));
}
#endif

}  // namespace xlstm::XLSTM_ISA
