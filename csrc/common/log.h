// Logarithm of a ratio that may be close to 1, to full relative precision there.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/math.h"
#ifndef __CUDACC__  // which has no vectors
#include "common/simd.h"
#endif

namespace xlstm::XLSTM_ISA {

template <class V>
struct LogOfRatio {
  V log;   // ln r
  V cost;  // r ln r - r + 1, which is (r - 1)^2 / 2 near 1
};

// A float's bits; a whole number as a float, and in the place of a float's exponent.
XLSTM_HD std::int32_t bits_of(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
XLSTM_HD float of_bits(std::int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
XLSTM_HD float to_float(std::int32_t n) { return static_cast<float>(n); }
XLSTM_HD std::int32_t in_exponent(std::int32_t n) { return n * (1 << 23); }

XLSTM_HD LogOfRatio<double> log_of_ratio(double r, double less_one) {
  const double log = abs(less_one) < 0.25 ? ::log1p(less_one) : ::log(r);
  return {log, r * log - less_one};
}

#ifndef __CUDACC__
XLSTM_HD VecI bits_of(VecF x) { return (VecI)x; }
XLSTM_HD VecF of_bits(VecI bits) { return (VecF)bits; }
XLSTM_HD VecF to_float(VecI n) { return __builtin_convertvector(n, VecF); }
XLSTM_HD VecI in_exponent(VecI n) { return n << 23; }

XLSTM_HD LogOfRatio<VecD> log_of_ratio(VecD r, VecD less_one) {
  LogOfRatio<VecD> all;
  for (int lane = 0; lane < kLanes<double>; ++lane) {
    const LogOfRatio<double> one = log_of_ratio(r[lane], less_one[lane]);
    all.log[lane] = one.log, all.cost[lane] = one.cost;
  }
  return all;
}
#endif

// Of r > 0, normal, given r and r - 1, each rounded once; float32.
//   r = 2^k (1 + s), sqrt(1/2) <= 1 + s < sqrt(2)      ln r = k ln 2 + s + s^2 P(s)
// P: least-maximum-error fit of (log1p(s) - s) / s^2, 5e-9.
template <class V>
XLSTM_HD LogOfRatio<V> log_of_ratio(V r, V less_one) {
  constexpr float kLn2 = 6.931471806e-01f;
  const auto octave = (bits_of(r) - 0x3f3504f3) >> 23;  // 0x3f3504f3: sqrt(1/2)
  const V reduced = of_bits(bits_of(r) - in_exponent(octave)) - 1.0f;
  const auto close = octave == 0;
  const V s = select(close, less_one, reduced);
  V P = broadcast<V>(7.119417936e-02f);
  P = P * s + -1.175348386e-01f;
  P = P * s + 1.176252067e-01f;
  P = P * s + -1.238488108e-01f;
  P = P * s + 1.423413604e-01f;
  P = P * s + -1.666962951e-01f;
  P = P * s + 2.000143975e-01f;
  P = P * s + -2.499997169e-01f;
  P = P * s + 3.333332241e-01f;
  P = P * s + -0.5f;
  const V square = s * s;
  const V log = to_float(octave) * kLn2 + (square * P + s);
  const V near = square * ((P * s + P) + 1.0f), far = r * log - less_one;
  return {log, select(close, near, far)};
}

}  // namespace xlstm::XLSTM_ISA
