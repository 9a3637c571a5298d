// Sums over a block of a divergence that looks at p and q together.
#pragma once

#include "cells/mixture.h"
#include "cpu/kl_div_block.h"

namespace xlstm::XLSTM_ISA {

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
      const Terms<Vec<C>> term = terms<kDivergence>(t * w_t, s * w_s, d, by);
      losses[i] += term.loss;
      slopes[i] += term.slope;
      if constexpr (kKeep) store(e_t + k, term.slope);
    }
  }
  loss += sum_in_double(losses[0], losses[1]);
  slope += sum_in_double(slopes[0], slopes[1]);
}

}  // namespace xlstm::XLSTM_ISA
