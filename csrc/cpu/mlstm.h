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

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/gemm_tile.h"
#include "launch.h"

namespace xlstm::XLSTM_ISA {

// Accumulators of every product: rows x vectors.
constexpr int kTileRows = kRegisters == 32 ? 6 : 3, kTileVectors = kRegisters == 32 ? 4 : 3;
// exp(-m) saturates here; h is below 1e-34 times its numerator then, in every backend.
constexpr double kLargestExponent = 80.0;

inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b * b; }

// Calls f(height, first) for tiles of at most kTileRows of `rows`, height a constant.
template <class F>
XLSTM_HD void for_row_tiles(std::int64_t rows, const F& f) {
  for (std::int64_t first = 0; first < rows; first += kTileRows) {
    const int height = static_cast<int>(rows - first < kTileRows ? rows - first : kTileRows);
    with_constant<kTileRows>(height, [&](auto h) { f(h, first); });
  }
}
// Calls f(width, first) for blocks of at most kTileVectors of `vectors`, width a constant.
template <class F>
XLSTM_HD void for_column_blocks(std::int64_t vectors, const F& f) {
  for (std::int64_t first = 0; first < vectors; first += kTileVectors) {
    const int width =
        static_cast<int>(vectors - first < kTileVectors ? vectors - first : kTileVectors);
    with_constant<kTileVectors>(width, [&](auto w) { f(w, first); });
  }
}

// A matrix in scratch: rows of whole vectors, one vector apart, since rows a power of two apart would
// fall into the same few sets of the L1 cache. Lanes beyond the width are zero.
template <class T>
struct Matrix {
  T* data = nullptr;
  std::int64_t rows = 0, width = 0;

  static constexpr int kW = kLanes<T>;
  std::int64_t padded() const { return round_up(width, kW); }
  std::int64_t vectors() const { return padded() / kW; }
  std::int64_t stride() const { return padded() + kW; }
  std::int64_t size() const { return rows * stride(); }
  T* row(std::int64_t r) const { return data + r * stride(); }
  void zero() const {
    for (std::int64_t at = 0; at < size(); at += kW) store(data + at, Vec<T>{});
  }
};

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
                               : sequence * ((args.T + kStateInterval - 1) / kStateInterval)) {}
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

// `rows` token rows into scratch, times `scale` and, where given, a factor per row; rows up to a whole
// vector of them are zeroed, since transposes read them.
template <class Element, class T>
void load_rows(const void* tensor, std::int64_t first, std::int64_t row_stride, std::int64_t rows,
               T scale, const T* row_scale, const Matrix<T>& to) {
  constexpr int kW = kLanes<T>;
  const Element* from = static_cast<const Element*>(tensor) + first;
  for (std::int64_t r = 0; r < rows; ++r, from += row_stride) {
    const Vec<T> factor = broadcast<Vec<T>>(row_scale ? scale * row_scale[r] : scale);
    T* row = to.row(r);
    for (std::int64_t c = 0; c < to.width; c += kW) {
      const std::int64_t left = to.width - c;
      store(row + c, factor * load(from + c, static_cast<int>(left < kW ? left : kW)));
    }
  }
  for (std::int64_t r = rows; r < round_up(rows, kW); ++r) {
    for (std::int64_t c = 0; c < to.padded(); c += kW) store(to.row(r) + c, Vec<T>{});
  }
}

// to = from, row r times factor[r].
template <class T>
void scale_rows_into(const Matrix<T>& from, std::int64_t rows, const T* factor,
                     const Matrix<T>& to) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const Vec<T> f = broadcast<Vec<T>>(factor[r]);
    for (std::int64_t c = 0; c < from.padded(); c += kLanes<T>) {
      store(to.row(r) + c, f * load(static_cast<const T*>(from.row(r) + c)));
    }
  }
}

// `from` (rows, columns), null for zeros, turned.
template <class T>
void transposed_in(const T* from, std::int64_t rows, std::int64_t columns, const Matrix<T>& to) {
  to.zero();
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) to.row(c)[r] = from ? from[r * columns + c] : T{};
  }
}

// The first `count` of `padded`, null for zeros; the rest zero.
template <class T>
void padded_in(const T* from, std::int64_t count, std::int64_t padded, T* to) {
  for (std::int64_t c = 0; c < padded; ++c) to[c] = from && c < count ? from[c] : T{};
}

template <class T>
T dot(const T* a, const T* b, std::int64_t count) {  // whole vectors
  Vec<T> sum{};
  for (std::int64_t c = 0; c < count; c += kLanes<T>) sum += load(a + c) * load(b + c);
  return horizontal_sum(sum);
}

// state = decay * state + sum_j left[j]^T right[j], over `rows` rows j of both.
template <class T>
void rank_update(const Matrix<T>& state, T decay, const Matrix<T>& left, const Matrix<T>& right,
                 std::int64_t rows) {
  constexpr int kW = kLanes<T>;
  for_column_blocks(state.vectors(), [&](auto w, std::int64_t column) {
    for_row_tiles(state.rows, [&](auto h, std::int64_t row) {
      constexpr int kH = h(), kV = w();
      Vec<T> sum[kH][kV]{};
      multiply<kH, kV>(rows, left.data + row, 1, left.stride(), right.data + column * kW,
                       right.stride(), sum);
#pragma GCC unroll 8
      for (int i = 0; i < kH; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kV; ++j) {
          T* to = state.row(row + i) + (column + j) * kW;
          store(to, decay * load(static_cast<const T*>(to)) + sum[i][j]);
        }
      }
    });
  });
}

// vector = decay * vector + sum_j factor[j] * rows[j]; factor null: 1.
template <class T>
void add_rows(T* vector, T decay, const Matrix<T>& matrix, const T* factor, std::int64_t rows) {
  for (std::int64_t c = 0; c < matrix.padded(); c += kLanes<T>) {
    Vec<T> sum{};
    for (std::int64_t r = 0; r < rows; ++r) {
      const Vec<T> row = load(static_cast<const T*>(matrix.row(r) + c));
      sum += factor ? factor[r] * row : row;
    }
    store(vector + c, decay * load(static_cast<const T*>(vector + c)) + sum);
  }
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

// The gates of one chunk; arrays of L, matrices L x L.
template <class T>
struct Gates {
  T *log_f, *log_i, *f, *i, *m, *keep, *take, *inter, *out;
  Matrix<T> D;
  T decay, m_end;
  static constexpr int kArrays = 9;

  Gates(Scratch& scratch, std::int64_t L, std::int64_t padded_L) {
    for (T** array : {&log_f, &log_i, &f, &i, &m, &keep, &take, &inter, &out}) {
      *array = scratch.take<T>(padded_L);
    }
    D = {nullptr, L, L};
    D.data = scratch.take<T>(D.size());
  }

  // From the pre-activations of tokens [t, t + rows) and m before them.
  void compute(const MLSTM& args, const Track& track, std::int64_t t, std::int64_t rows, T m_prev) {
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
      keep[r] = kept - m_r;
      take[r] = log_i[r] - m_r;
    }
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
    m_end = m[rows - 1];
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
