// Divergences that look at p and q together, of one block: sums, and the slope of each element.
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

#include "common/log.h"
#include "cpu/kl_div_block.h"

namespace xlstm::XLSTM_ISA {

template <class C>
struct Mixture {
  C mix, rest, log_rest;
  bool far;
};

// An element's part of the loss, and its slope q h.
template <class C>
struct Terms {
  Vec<C> loss, slope;
};

template <class C, Divergence kDivergence>
XLSTM_HD Terms<C> terms(Vec<C> p, Vec<C> q, Vec<C> d, Mixture<C> by) {
  if constexpr (kDivergence == Divergence::kTv) {
    const Vec<C> zero = {}, half = q * C(0.5);
    return {abs(d) * C(0.5), select(d > zero, -half, select(d < zero, half, zero))};
  } else {
    // Below these there is no mass that counts; ln() takes no denormal numbers.
    constexpr bool kFloat = std::is_same_v<C, float>;
    constexpr C kLeastMass = kFloat ? 1e-30 : 1e-290, kLeastRatio = kFloat ? 1e-37 : 1e-300;
    const Vec<C> m = p * by.mix + q * by.rest;
    const Vec<C> inverse = reciprocal(clamp_min(m, kLeastMass));
    const Vec<C> y = d * inverse;
    const auto of_p = [&] {
      return log_of_ratio(clamp_min(p * inverse, kLeastRatio), y * by.rest);
    };
    if constexpr (kDivergence == Divergence::kSkew) {
      const C of_mass = by.far ? -by.rest : C(0), of_gap = by.far ? C(0) : -by.rest * by.rest;
      return {m * of_p().cost, q * inverse * (p * of_mass + d * of_gap)};
    } else {
      const C of_mass = by.far ? -by.mix : C(0), of_gap = by.far ? C(0) : -by.mix;
      const Vec<C> less_one = inverse * (p * of_mass + d * of_gap);
      const Vec<C> ratio = q * inverse * (by.far ? by.rest : C(1));
      const LogOfRatio<C> of_q = log_of_ratio(clamp_min(ratio, kLeastRatio), less_one);
      const Vec<C> kl_q = by.far ? q * (of_q.log - by.log_rest) + (m - q) : m * of_q.cost;
      if constexpr (kDivergence == Divergence::kJs) {
        return {m * of_p().cost * by.mix + kl_q * by.rest, q * of_q.log * by.rest};
      } else {
        return {kl_q, q * (of_q.log - less_one * (by.far ? C(1) : by.rest))};
      }
    }
  }
}

// Over a block of p = e_t w_t and q = e_s w_s, where w_s - w_t is given as `apart`. With kKeep, slopes
// take the place of e_t.
template <class C, Divergence kDivergence, bool kKeep>
void mix_block(const C* e_s, C* e_t, int count, C w_s, C w_t, C apart, Mixture<C> by, double& loss,
               double& slope) {
  Vec<C> losses[2] = {}, slopes[2] = {};
  for (int j = 0; j < count; j += 2 * kLanes<C>) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int k = j + i * kLanes<C>;
      const Vec<C> s = load(e_s + k), t = load(static_cast<const C*>(e_t + k));
      const Vec<C> d = (t - s) * w_t - s * apart;
      const Terms<C> term = terms<C, kDivergence>(t * w_t, s * w_s, d, by);
      losses[i] += term.loss;
      slopes[i] += term.slope;
      if constexpr (kKeep) store(e_t + k, term.slope);
    }
  }
  loss += sum_in_double(losses[0], losses[1]);
  slope += sum_in_double(slopes[0], slopes[1]);
}

}  // namespace xlstm::XLSTM_ISA
