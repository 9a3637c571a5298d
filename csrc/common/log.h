// Logarithm of a ratio that may be close to 1, to full relative precision there.
#pragma once

#include "common/simd.h"

namespace xlstm::XLSTM_ISA {

template <class C>
struct LogOfRatio {
  Vec<C> log;   // ln r
  Vec<C> cost;  // r ln r - r + 1, which is (r - 1)^2 / 2 near 1
};

// Of r > 0, normal, given r and r - 1, each rounded once.
//   r = 2^k (1 + s), sqrt(1/2) <= 1 + s < sqrt(2)      ln r = k ln 2 + s + s^2 P(s)
// P: least-maximum-error fit of (log1p(s) - s) / s^2, 5e-9.
XLSTM_HD LogOfRatio<float> log_of_ratio(VecF r, VecF less_one) {
  constexpr float kLn2 = 6.931471806e-01f;
  const VecI octave = ((VecI)r - 0x3f3504f3) >> 23;  // 0x3f3504f3: sqrt(1/2)
  const VecF reduced = (VecF)((VecI)r - (octave << 23)) - 1.0f;
  const auto close = octave == 0;
  const VecF s = select(close, less_one, reduced);
  VecF P = broadcast<VecF>(7.119417936e-02f);
  P = P * s + -1.175348386e-01f;
  P = P * s + 1.176252067e-01f;
  P = P * s + -1.238488108e-01f;
  P = P * s + 1.423413604e-01f;
  P = P * s + -1.666962951e-01f;
  P = P * s + 2.000143975e-01f;
  P = P * s + -2.499997169e-01f;
  P = P * s + 3.333332241e-01f;
  P = P * s + -0.5f;
  const VecF square = s * s;
  const VecF log = __builtin_convertvector(octave, VecF) * kLn2 + (square * P + s);
  const VecF near = square * ((P * s + P) + 1.0f), far = r * log - less_one;
  return {log, select(close, near, far)};
}
XLSTM_HD LogOfRatio<double> log_of_ratio(VecD r, VecD less_one) {
  VecD log;
  for (int lane = 0; lane < kLanes<double>; ++lane) {
    log[lane] = abs(less_one[lane]) < 0.25 ? ::log1p(less_one[lane]) : ::log(r[lane]);
  }
  return {log, r * log - less_one};
}

}  // namespace xlstm::XLSTM_ISA
