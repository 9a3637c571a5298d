// One chunk of an mLSTM sequence in scratch: its tokens, its gates, the products that forward and
// backward share. The derivation stands in xlstm_kernels/ops/mlstm/README.md.
//
// Within a chunk that starts after the state (C, n, m_0), for its tokens i and j <= i:
//   m_i     = max(lf_i + m_{i-1}, li_i)               (0 with the sigmoid input gate)
//   keep_i  = exp(lf_i + m_{i-1} - m_i)               take_i = exp(li_i - m_i)
//   inter_i = keep_1 ... keep_i                       what is left at token i of the old state
//   D_ij    = take_j keep_{j+1} ... keep_i            and of token j
//   out_j   = D_Lj, decay = inter_L                   what the next state keeps of them
// D grows row by row. Nothing is subtracted: differences of sums of log gates would cancel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/matrix.h"
#include "launch.h"

namespace xlstm::XLSTM_ISA {

// exp(-m) saturates here; h is below 1e-34 times its numerator then, in every backend.
constexpr double kLargestExponent = 80.0;

// Where a (sequence, head) finds its tokens and states.
struct Track {
  Track(const MLSTM& args, std::int64_t task)
      : sequence(task / args.H),
        head(task % args.H),
        batch(args.starts ? 0 : sequence),
        start(args.starts ? args.starts[sequence] : 0),
        length(args.starts ? args.starts[sequence + 1] - start : args.T),
        // Row of the first of its checkpoints.
        checkpoint(args.starts ? start / kStateInterval + sequence
                               : sequence * ceil_div(args.T, kStateInterval)) {}
  // Element of a (B, T, H, ...) tensor with strides `by`.
  std::int64_t at(const std::int64_t (&by)[3], std::int64_t t) const {
    return batch * by[0] + (start + t) * by[1] + head * by[2];
  }
  // Row of a contiguous (B, T, H) tensor.
  std::int64_t token(const MLSTM& args, std::int64_t t) const {
    return (batch * args.T + start + t) * args.H + head;
  }

  std::int64_t sequence, head, batch, start, length, checkpoint;
};

// Tokens of the chunk at t: chunks end with the sequence, and where a state is saved.
inline std::int64_t chunk_rows(const MLSTM& args, std::int64_t t, std::int64_t length) {
  const std::int64_t end = std::min(length, (t / kStateInterval + 1) * kStateInterval);
  return std::min(args.chunk, end - t);
}

template <class T>
Vec<T> log_sigmoid(Vec<T> x) {
  return clamp_max(x, T{0}) - log1p_unit(exp(-abs(x)));
}

template <class V>
XLSTM_HD V lane_index() {
  V index{};
  for (int lane = 0; lane < kLanes<element_t<V>>; ++lane) {
    index[lane] = static_cast<element_t<V>>(lane);
  }
  return index;
}

// What exponents are taken from: m, or 0 where a state that holds nothing takes nothing, as -inf - -inf
// is NaN.
template <class T>
T finite_base(T m) {
  return m == -std::numeric_limits<T>::infinity() ? T{0} : m;
}

// The gates of one chunk; arrays of L, matrices L x L.
template <class T>
struct Gates {
  T *log_f, *log_i, *f, *i, *m, *keep, *take, *inter, *out;
  Matrix<T> D;
  T decay, m_end;

  Gates(Scratch& scratch, std::int64_t L) {  // L padded
    for (T** array : {&log_f, &log_i, &f, &i, &m, &keep, &take, &inter, &out}) {
      *array = scratch.take<T>(L);
    }
    D = take_matrix<T>(scratch, L, L);
  }

  // log_f, log_i and m, and the logarithms of keep and take in their places, from the pre-activations
  // of tokens [t, t + rows) and m before them. Returns m after them.
  T stabilise(const MLSTM& args, const Track& track, std::int64_t t, std::int64_t rows, T m_prev) {
    constexpr int kW = kLanes<T>;
    using V = Vec<T>;
    const bool sigmoid_gate = args.input_gate == InputGate::kSigmoid;
    for (std::int64_t r = 0; r < round_up(rows, kW); ++r) {
      const bool inside = r < rows;
      f[r] = inside ? static_cast<const T*>(args.f)[track.at(args.f_stride, t + r)] : T{};
      i[r] = inside ? static_cast<const T*>(args.i)[track.at(args.i_stride, t + r)] : T{};
    }
    for (std::int64_t r = 0; r < rows; r += kW) {
      const V i_r = load(static_cast<const T*>(i + r));
      store(log_f + r, log_sigmoid<T>(load(static_cast<const T*>(f + r))));
      store(log_i + r, sigmoid_gate ? log_sigmoid<T>(i_r) : i_r);
    }
    T m_r = m_prev;
    for (std::int64_t r = 0; r < rows; ++r) {
      const T kept = log_f[r] + m_r;
      m_r = sigmoid_gate ? T{0} : log_i[r] > kept ? log_i[r] : kept;
      m[r] = m_r;
      const T base = finite_base(m_r);
      keep[r] = kept - base;
      take[r] = log_i[r] - base;
    }
    return m_r;
  }

  // Everything, from the same.
  void compute(const MLSTM& args, const Track& track, std::int64_t t, std::int64_t rows, T m_prev) {
    constexpr int kW = kLanes<T>;
    using V = Vec<T>;
    m_end = stabilise(args, track, t, rows, m_prev);
    for (std::int64_t r = 0; r < rows; r += kW) {
      store(keep + r, exp_factor(load(static_cast<const T*>(keep + r))));
      store(take + r, exp_factor(load(static_cast<const T*>(take + r))));
    }
    const V lanes = lane_index<V>();
    T inter_r{1};
    for (std::int64_t r = 0; r < rows; ++r) {
      inter[r] = inter_r *= keep[r];
      const T *before = D.row(r > 0 ? r - 1 : 0), f_r = keep[r];
      for (std::int64_t c = 0; c < D.padded(); c += kW) {
        V D_r{};
        if (c <= r) {
          const V place = lanes + static_cast<T>(c - r);  // 0 at token r
          const V older = r > 0 ? load(before + c) * f_r : V{};
          D_r = select(place < V{}, older, select(place > V{}, V{}, broadcast<V>(take[r])));
        }
        store(D.row(r) + c, D_r);
      }
    }
    for (std::int64_t r = 0; r < rows; r += kW) {
      store(out + r, load(static_cast<const T*>(D.row(rows - 1) + r)));
    }
    decay = inter[rows - 1];
  }
};

// dLoss/d(log f) and d(log i) of the rows at fixed m, as mlstm_backward.cpp has them; `column` is scratch.
template <class T>
void log_gate_grads(std::int64_t rows, T carry, const T* r, const T* u, const Matrix<T>& W,
                    T* column, T* dlf, T* dli) {
  using V = Vec<T>;
  constexpr int kW = kLanes<T>;
  const std::int64_t padded = round_up(rows, kW);
  const V lanes = lane_index<V>();
  T u_before{}, r_after = carry;
  for (std::int64_t c = 0; c < padded; c += kW) {
    store(column + c, V{});
    store(dli + c, V{});
  }
  for (std::int64_t t = rows - 1; t >= 0; --t) {
    V crossing{};
    for (std::int64_t c = 0; c <= t; c += kW) {
      const V w = load(static_cast<const T*>(W.row(t) + c));
      store(dli + c, load(static_cast<const T*>(dli + c)) + w);
      // Pairs (i, j) with i >= t; from here on only those with j < t count.
      const V sum = select(lanes + static_cast<T>(c - t) < V{},
                           load(static_cast<const T*>(column + c)) + w, V{});
      store(column + c, sum);
      crossing += sum;
    }
    r_after += r[t];
    dlf[t] = horizontal_sum(crossing) + r_after;
  }
  for (std::int64_t t = 0; t < rows; ++t) {
    dlf[t] += u_before;
    dli[t] += u[t];
    u_before += u[t];
  }
}

// 1 / (N + eps) by which a row's sums are multiplied to give h, and the gradients' factors.
template <class T>
struct RowScale {
  T h;     // h = this * sums
  T dden;  // dLoss/dden = this * <dh, h>
  T dm;    // dLoss/dm = this * <dh, h>
};
template <class T>
RowScale<T> row_scale(const MLSTM& args, T den, T m) {
  const T eps = static_cast<T>(args.eps);
  if (args.normalizer == Normalizer::kNone) return {std::exp(m), T{0}, T{0}};
  if (args.normalizer == Normalizer::kPlain) {
    const T inverse = 1 / (den + eps);
    return {inverse, -inverse, -eps * inverse};
  }
  const bool saturated = -m > static_cast<T>(kLargestExponent);
  const T bound = std::exp(saturated ? static_cast<T>(kLargestExponent) : -m);
  const T size = std::fabs(den);
  if (!(size <= bound)) {  // NaN too
    const T inverse = 1 / (size + eps);
    return {inverse, den > 0 ? -inverse : inverse, -eps * inverse};
  }
  const T inverse = 1 / (bound + eps);
  return {inverse, T{0}, saturated ? T{-1} : -eps * inverse};
}

}  // namespace xlstm::XLSTM_ISA
