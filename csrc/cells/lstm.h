// LSTM; one unit, one step.
//
//   i' = sigmoid(i)   f' = sigmoid(f)   z' = tanh(z)   o' = sigmoid(o)
//   c' = f' c + i' z'                   h' = o' tanh(c')
//
// Source: Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; torch.nn.LSTM's
// gates are in the same order. Order of gates: i f z o; of states: h c.
#pragma once

#include "cells/options.h"
#include "common/math.h"

namespace xlstm::XLSTM_ISA {

struct LSTM {
  static constexpr int kStates = 2;
  static constexpr int kAux = 5;  // i' f' z' o' tanh(c')
  enum State { H, C };
  enum Gate { I, F, Z, O };
  enum Aux { AI, AF, AZ, AO, ATanhC };

  template <bool kWantAux, class V>
  static XLSTM_HD void step(const V (&raw)[4], const V (&prev)[2], V (&next)[2], V (&aux)[kAux],
                            const CellOptions&) {
    const V f = sigmoid(raw[F]);
    next[C] = multiply_add(f, prev[C], sigmoid_times_tanh(raw[I], raw[Z]));
    next[H] = sigmoid_times_tanh(raw[O], next[C]);
    if constexpr (kWantAux) {
      aux[AI] = sigmoid(raw[I]), aux[AF] = f, aux[AZ] = tanh(raw[Z]), aux[AO] = sigmoid(raw[O]);
      aux[ATanhC] = tanh(next[C]);
    }
  }

  template <class V>
  static XLSTM_HD void step_grad(const V (&prev)[2], const V (&)[2], const V (&aux)[kAux],
                                 V (&d)[2], V (&draw)[4]) {
    const V i = aux[AI], f = aux[AF], z = aux[AZ], o = aux[AO], tanh_c = aux[ATanhC];
    const V dc = d[C] + d[H] * o * (1 - tanh_c * tanh_c);
    draw[I] = dc * z * i * (1 - i);
    draw[F] = dc * prev[C] * f * (1 - f);
    draw[Z] = dc * i * (1 - z * z);
    draw[O] = d[H] * tanh_c * o * (1 - o);
    d[C] = dc * f;
  }
};

}  // namespace xlstm::XLSTM_ISA
