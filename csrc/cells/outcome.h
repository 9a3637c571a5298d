// Divergences over few outcomes, in float64, one outcome at a time; host and device.
#pragma once

#include <cmath>

#include "cells/kl_div.h"

namespace xlstm::XLSTM_ISA {

// Probabilities and their logarithms; q h, as cells/mixture.h has it.
struct Outcome {
  double log_p, log_q, p, q, slope;
};

XLSTM_HD double product(double x, double log) { return x == 0 ? 0 : x * log; }

// The outcome's part of the loss; sets its slope.
XLSTM_HD double add_terms(Outcome& o, Divergence divergence, double mix) {
  const double p = o.p, q = o.q, rest = 1 - mix, m = mix * p + rest * q;
  switch (divergence) {
    case Divergence::kForward:
      o.slope = q - p;
      return product(p, o.log_p - o.log_q) + (q - p);
    case Divergence::kReverse:
      o.slope = product(q, o.log_q - o.log_p);
      return o.slope + (p - q);
    case Divergence::kTv:
      o.slope = p == q ? 0 : q > p ? q / 2 : q < p ? -q / 2 : p - q;  // NaN
      return ::fabs(p - q) / 2;
    default:
      break;
  }
  if (m == 0) return o.slope = 0;
  const double of_p = product(p, ::log(p / m)), of_q = product(q, ::log(q / m));
  if (divergence == Divergence::kSkew) {
    o.slope = -rest * p * (q / m);
    return of_p + (m - p);
  }
  if (divergence == Divergence::kSkewReverse) {
    o.slope = of_q + mix * p * (q / m);
    return of_q + (m - q);
  }
  o.slope = rest * of_q;
  return mix * of_p + rest * of_q;
}

// ln(e^a + e^b)
XLSTM_HD double log_add(double a, double b) {
  const double most = a > b ? a : b, least = a > b ? b : a;
  return ::fabs(most) == kInfinity ? most : most + ::log1p(::exp(least - most));
}

// ln(1 - mass), nothing left where mass is rounded beyond 1.
XLSTM_HD double log_left(double mass) { return mass >= 1 ? -kInfinity : ::log(1 - mass); }

// What a teacher of a mass outside says of `words` words there, at temperature T: ln(n (r / n)^(1/T)).
XLSTM_HD double log_tail(double log_mass, double words, double T) {
  if (words == 0) return -kInfinity;
  return T == 1 ? log_mass : ::log(words) + (log_mass - ::log(words)) / T;
}

}  // namespace xlstm::XLSTM_ISA
