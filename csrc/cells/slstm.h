// sLSTM: scalar memory, exponential input gate, stabilised in log space; one unit, one step.
//
//   lf = log_sigmoid(f) + m          (exponential forget gate: lf = f + m)
//   m' = i  if n == 0 or i > lf,  else lf
//   i' = exp(i - m')    f' = exp(lf - m')    z' = tanh(z)    o' = sigmoid(o)
//   c' = f' c + i' z'   n' = max(f' n + i', n_floor)         h' = o' c' / n'
//
// Source: xLSTM, arXiv 2405.04517, section 2.2 and appendix A.2. One of i', f' is exp(0) = 1, so one
// exponential serves both. Where n == 0 the exponent lf - i has no upper bound; it saturates at 80.
// The gradient is that of the equations as they stand, through the stabiliser m as well; the peers
// treat m as a constant, which is right only for losses on h.
// Order of gates: i f z o; of states: h c n m.
#pragma once

#include "cells/options.h"
#include "common/math.h"

namespace xlstm::XLSTM_ISA {

template <bool kExpForget>
struct SLSTM {
  static constexpr int kStates = 4;
  static constexpr int kAux = 7;  // i' f' z' o' df(lf by f) i_wins n_free
  enum State { H, C, N, M };
  enum Gate { I, F, Z, O };
  enum Aux { AI, AF, AZ, AO, ADF, AIWins, ANFree };

  // kWantAux: also leave in aux what step_grad needs.
  template <bool kWantAux, class V>
  static XLSTM_HD void step(const V (&raw)[4], const V (&prev)[4], V (&next)[4], V (&aux)[kAux],
                            const CellOptions& options) {
    const V zero{}, one = zero + 1;
    const V gap = exp(-abs(raw[F]));  // exp(-|f|), shared by log_sigmoid and its derivative
    const V lf = prev[M] + (kExpForget ? raw[F] : clamp_max(raw[F], 0) - log1p_unit(gap));
    const auto i_wins = (prev[N] == zero) | (raw[I] > lf);
    next[M] = select(i_wins, raw[I], lf);
    const V lower = exp(clamp_max(select(i_wins, lf - raw[I], raw[I] - lf), 80));
    const V i = select(i_wins, one, lower), f = select(i_wins, lower, one);
    const V z = tanh(raw[Z]);
    const V n_sum = multiply_add(f, prev[N], i);
    next[C] = multiply_add(f, prev[C], i * z);
    const element_t<V> n_floor = static_cast<element_t<V>>(options.n_floor);
    next[N] = clamp_min(n_sum, n_floor);
    // o' c' / n' with one division.
    const V o_inverse = sigmoid_inverse(raw[O]);
    next[H] = next[C] / (next[N] * o_inverse);
    if constexpr (kWantAux) {
      const V o = reciprocal(o_inverse);
      aux[AI] = i, aux[AF] = f, aux[AZ] = z, aux[AO] = o;
      aux[ADF] = kExpForget ? one : select(raw[F] < zero, one, gap) * reciprocal(gap + 1);
      aux[AIWins] = select(i_wins, one, zero);
      aux[ANFree] = select(n_sum < n_floor, zero, one);
    }
  }

  // d holds dLoss/d(h' c' n' m') on entry and dLoss/d(c n m) on exit (d[H] is left alone: the
  // recurrent product gives it). draw receives dLoss/d(i f z o).
  template <class V>
  static XLSTM_HD void step_grad(const V (&prev)[4], const V (&next)[4], const V (&aux)[kAux],
                                 V (&d)[4], V (&draw)[4]) {
    const V i = aux[AI], f = aux[AF], z = aux[AZ], o = aux[AO];
    // z dc + dn cancels where z is near c'/n': both must come from the same rounded factors.
    const V n_inverse = 1 / next[N];
    const V weight = d[H] * o * n_inverse;
    const V dc = d[C] + weight;
    const V dn = (d[N] - weight * (next[C] * n_inverse)) * aux[ANFree];
    const V di = i * (z * dc + dn);  // by log i', at fixed m'
    // By log f', at fixed m'. Beyond 1 f' is at n == 0 only, and 5.54e34 is where it saturates.
    const V dlf = select(f < V{} + 5.54e34f, f * multiply_add(prev[C], dc, prev[N] * dn), V{});
    // m' = log i' or log f' takes dm = dm' - di - dlf on top of its own di or dlf.
    const V dlf_total = select(aux[AIWins] != V{}, dlf, d[M] - di);
    draw[I] = select(aux[AIWins] != V{}, d[M] - dlf, di);
    draw[F] = dlf_total * aux[ADF];
    draw[Z] = i * dc * (1 - z * z);
    draw[O] = d[H] * next[H] * (1 - o);
    d[C] = f * dc;
    d[N] = f * dn;
    d[M] = dlf_total;
  }
};

}  // namespace xlstm::XLSTM_ISA
