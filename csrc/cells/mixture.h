// Divergences that look at p and q together: an element's part of the loss, and its slope. Host and
// device; V is a scalar or a vector.
//   d = p - q      m = mix p + rest q      y = d / m      a / m = 1 + (a - m) / m
//   phi(r) = r ln r - r + 1, so that KL(a|m) = sum m phi(a / m), every summand >= 0
//                     loss                                    h
//   js                m (mix phi(p/m) + rest phi(q/m))        rest ln(q/m)
//   skew              m phi(p/m)                              -rest^2 y
//   skew reverse      m phi(q/m)                              ln(q/m) + mix rest y
//   tv                |d| / 2                                 -sign(d) / 2
// h is the loss's derivative by q, less what it is at p = q, and dloss/dz = (q h - q sum q h) / T. From d
// everything is exact to its own order where student and teacher nearly agree. Where they are far apart,
// h is nearly the same wherever p << q, and less what it is there:
//   js  rest ln(rest q/m)      skew  -rest p/m      skew reverse  ln(rest q/m) + mix p/m
#pragma once

#include <type_traits>

#include "common/log.h"
#include "launch.h"

namespace xlstm::XLSTM_ISA {

template <class C>
struct Mixture {
  C mix, rest, log_rest;
  bool far;
};

// An element's part of the loss, and its slope q h.
template <class V>
struct Terms {
  V loss, slope;
};

template <Divergence kDivergence, class V>
XLSTM_HD Terms<V> terms(V p, V q, V d, Mixture<element_t<V>> by) {
  using C = element_t<V>;
  if constexpr (kDivergence == Divergence::kTv) {
    const V zero = {}, half = q * C(0.5);
    return {abs(d) * C(0.5), select(d > zero, -half, select(d < zero, half, zero))};
  } else {
    // Below these there is no mass that counts; ln() takes no denormal numbers.
    constexpr bool kFloat = std::is_same_v<C, float>;
    constexpr C kLeastMass = kFloat ? 1e-30 : 1e-290, kLeastRatio = kFloat ? 1e-37 : 1e-300;
    const V m = p * by.mix + q * by.rest;
    const V inverse = reciprocal(clamp_min(m, kLeastMass));
    const V y = d * inverse;
    const auto of_p = [&] {
      return log_of_ratio(clamp_min(p * inverse, kLeastRatio), y * by.rest);
    };
    if constexpr (kDivergence == Divergence::kSkew) {
      const C of_mass = by.far ? -by.rest : C(0), of_gap = by.far ? C(0) : -by.rest * by.rest;
      return {m * of_p().cost, q * inverse * (p * of_mass + d * of_gap)};
    } else {
      const C of_mass = by.far ? -by.mix : C(0), of_gap = by.far ? C(0) : -by.mix;
      const V less_one = inverse * (p * of_mass + d * of_gap);
      const V ratio = q * inverse * (by.far ? by.rest : C(1));
      const LogOfRatio<V> of_q = log_of_ratio(clamp_min(ratio, kLeastRatio), less_one);
      const V kl_q = by.far ? q * (of_q.log - by.log_rest) + (m - q) : m * of_q.cost;
      if constexpr (kDivergence == Divergence::kJs) {
        return {m * of_p().cost * by.mix + kl_q * by.rest, q * of_q.log * by.rest};
      } else {
        return {kl_q, q * (of_q.log - less_one * (by.far ? C(1) : by.rest))};
      }
    }
  }
}

}  // namespace xlstm::XLSTM_ISA
