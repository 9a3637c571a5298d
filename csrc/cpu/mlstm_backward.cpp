// Gradient of the mLSTM, chunk by chunk in reverse, on CPU cores.
//   dnum = dh / (N + eps)          dden = -sign(den) [|den| > exp(-m)] <dh, h> / (N + eps)
//   S = scale Q K^T                dS = (dnum V^T + dden 1^T) o D
//   dQ = scale (dS K + inter (dnum C^T + dden n^T))
//   dK = dS^T scale Q + out (V dC'^T + 1 dn'^T)
//   dV = (S o D)^T dnum + out K dC'
//   dC = decay dC' + (inter scale Q)^T dnum            dn = decay dn' + (inter scale Q)^T dden
// Of the gates, with W = S o dS, r_i = <q_i, dq_i> and u_j = <k_j, dk_j> of the terms with C and dC':
//   dli_j = sum_i W_ij + u_j
//   dlf_t = sum_{i >= t > j} W_ij + sum_{i >= t} r_i + sum_{j < t} u_j + decay (<C, dC'> + <n, dn'>)
// and of m, which cancels in h up to eps and does not in the state: mlstm/README.md.
// Source: derived from the forward equations; no sums of log gates, nor of <q, dq> - <k, dk>, are
// subtracted from one another.
// Tensors: launch.h. Scratch holds C and dC transposed, (V, K).
// Tasks: (sequence, head). Accumulators: compute type. States within kStateInterval steps are recomputed
//   from the saved one before them.
#include "common/simd.h"
// The vector overloads of simd.h come before the templates that call them.
#include "cpu/kernels.h"
#include "cpu/mlstm.h"
#include "cpu/task.h"
#include "cpu/transpose.h"

namespace xlstm::XLSTM_ISA {
namespace {

template <class Element>
struct BackwardTask {
  using T = compute_t<Element>;
  using V = Vec<T>;
  static constexpr int kW = kLanes<T>;

  const MLSTMBackward& args;

  struct Buffers {
    Matrix<T> C, dC, dc, q, k, kt, v, vt, dnum, P, dS, dq, inter_q, out_k;
    T *n, *dn, *dden, *dm, *dh_h, *r, *u, *dlf, *dli, *column;
    T* m;  // before each chunk of the interval
  };
  // Of an interval, or of the longest sequence where that is shorter.
  std::int64_t chunks() const {
    const std::int64_t longest = std::min<std::int64_t>(kStateInterval, args.T);
    return std::max<std::int64_t>((longest + args.chunk - 1) / args.chunk, 1);
  }
  // State before chunk c of the interval.
  Matrix<T> state(const Buffers& b, std::int64_t c) const {
    Matrix<T> at = b.C;
    at.rows = args.V;
    at.data += c * at.size();
    return at;
  }
  T* norm(const Buffers& b, std::int64_t c) const { return b.n + c * b.k.padded(); }

  // States before each chunk of the interval [begin, end).
  void recompute(const Track& track, std::int64_t begin, std::int64_t end, const Buffers& b,
                 Gates<T>& gates) const {
    const std::int64_t at = (track.checkpoint + begin / kStateInterval) * args.H + track.head;
    transposed_in(static_cast<const T*>(args.c_saved) + at * args.K * args.V, args.K, args.V,
                  state(b, 0));
    padded_in(static_cast<const T*>(args.n_saved) + at * args.K, args.K, b.k.padded(), b.n);
    b.m[0] = static_cast<const T*>(args.m_saved)[at];
    std::int64_t c = 0;
    for (std::int64_t t = begin;; ++c) {
      const std::int64_t rows = chunk_rows(args, t, track.length);
      if (t + rows == end) return;
      gates.compute(args, track, t, rows, b.m[c]);
      load_rows<Element>(args.k, track.at(args.k_stride, t), args.k_stride[1], rows, T{1},
                         static_cast<const T*>(gates.out), b.out_k);
      load_rows<Element>(args.v, track.at(args.v_stride, t), args.v_stride[1], rows, T{1},
                         static_cast<const T*>(nullptr), b.v);
      const Matrix<T> from = state(b, c), to = state(b, c + 1);
      std::copy(from.data, from.data + from.size(), to.data);
      rank_update(to, gates.decay, b.v, b.out_k, rows);
      std::copy(norm(b, c), norm(b, c) + b.k.padded(), norm(b, c + 1));
      add_rows(norm(b, c + 1), gates.decay, b.out_k, static_cast<const T*>(nullptr), rows);
      b.m[c + 1] = gates.m_end;
      t += rows;
    }
  }

  // dnum, and in dden and dm what <dh, h> of a row will be multiplied by.
  void load_dh(const Track& track, std::int64_t t, std::int64_t rows, const Buffers& b,
               const Gates<T>& gates) const {
    for (std::int64_t r = 0; r < rows; ++r) {
      const T den = static_cast<const T*>(args.row_den)[track.token(args, t + r)];
      const RowScale<T> by = row_scale(args, den, gates.m[r]);
      b.dh_h[r] = by.h, b.dden[r] = by.dden, b.dm[r] = by.dm;
    }
    if (!args.dh) return b.dnum.zero();
    load_rows<Element>(args.dh, track.at(args.dh_stride, t), args.dh_stride[1], rows, T{1},
                       static_cast<const T*>(b.dh_h), b.dnum);
  }

  // P = S o D and, without den's part, dS / D = dnum V^T, causal; dh_h = <dnum, P V>.
  void scores(const Buffers& b, const Gates<T>& gates, std::int64_t rows) const {
    for_row_tiles(rows, [&](auto h, std::int64_t row) {
      constexpr int kH = h();
      V total[kH]{};
      for_column_blocks((row + kH + kW - 1) / kW, [&](auto w, std::int64_t column) {
        constexpr int kV = w();
        V S[kH][kV]{}, dS[kH][kV]{};
        multiply<kH, kV>(args.K, b.q.row(row), b.q.stride(), 1, b.kt.data + column * kW,
                         b.kt.stride(), S);
        for (int i = 0; i < kH; ++i) {
          for (int j = 0; j < kV; ++j) {
            const std::int64_t at = (column + j) * kW;
            store(b.P.row(row + i) + at,
                  S[i][j] * load(static_cast<const T*>(gates.D.row(row + i) + at)));
          }
        }
        multiply<kH, kV>(args.V, b.dnum.row(row), b.dnum.stride(), 1, b.vt.data + column * kW,
                         b.vt.stride(), dS);
        for (int i = 0; i < kH; ++i) {
          for (int j = 0; j < kV; ++j) {
            const std::int64_t at = (column + j) * kW;
            store(b.dS.row(row + i) + at, dS[i][j]);
            total[i] += dS[i][j] * load(static_cast<const T*>(b.P.row(row + i) + at));
          }
        }
      });
      for (int i = 0; i < kH; ++i) b.dh_h[row + i] = horizontal_sum(total[i]);
    });
  }

  // dq's part through C, still without den's, and r; <dnum, inter scale Q C> joins dh_h.
  void through_state(const Buffers& b, std::int64_t rows, const Matrix<T>& C) const {
    for (std::int64_t row = 0; row < rows; ++row) b.r[row] = T{};
    for_column_blocks(b.k.vectors(), [&](auto w, std::int64_t column) {
      for_row_tiles(rows, [&](auto h, std::int64_t row) {
        constexpr int kH = h(), kV = w();
        V sum[kH][kV]{};
        multiply<kH, kV>(args.V, b.dnum.row(row), b.dnum.stride(), 1, C.data + column * kW,
                         C.stride(), sum);
        for (int i = 0; i < kH; ++i) {
          V r{};
          for (int j = 0; j < kV; ++j) {
            const std::int64_t at = (column + j) * kW;
            store(b.dq.row(row + i) + at, sum[i][j]);
            r += sum[i][j] * load(static_cast<const T*>(b.inter_q.row(row + i) + at));
          }
          b.r[row + i] += horizontal_sum(r);
        }
      });
    });
    for (std::int64_t row = 0; row < rows; ++row) b.dh_h[row] += b.r[row];
  }

  // dden and dm; dS in full, and W where D was.
  void finish_scores(const Buffers& b, const Gates<T>& gates, std::int64_t rows, const T* n) const {
    for (std::int64_t row = 0; row < rows; ++row) {
      const T dden = b.dden[row] *= b.dh_h[row];
      b.dm[row] *= b.dh_h[row];
      b.r[row] += dden * dot(static_cast<const T*>(b.inter_q.row(row)), n, b.k.padded());
      for (std::int64_t c = 0; c <= row; c += kW) {
        T *dS = b.dS.row(row) + c, *D = gates.D.row(row) + c;
        const V grad = load(static_cast<const T*>(dS)) + dden;
        store(dS, grad * load(static_cast<const T*>(D)));
        store(D, grad * load(static_cast<const T*>(b.P.row(row) + c)));
      }
      // Tiles of dk read whole tiles of rows: up to the last one's diagonal.
      for (std::int64_t c = round_up(row + 1, kW); c < round_up(row + kTileRows, kW); c += kW) {
        if (c < b.dS.padded()) store(b.dS.row(row) + c, V{});
      }
    }
  }

  void query_grads(const Track& track, std::int64_t t, std::int64_t rows, const Buffers& b,
                   const Gates<T>& gates, const T* n) const {
    Element* dq = static_cast<Element*>(args.dq);
    for_column_blocks(b.k.vectors(), [&](auto w, std::int64_t column) {
      for_row_tiles(rows, [&](auto h, std::int64_t row) {
        constexpr int kH = h(), kV = w();
        V sum[kH][kV];
        for (int i = 0; i < kH; ++i) {
          for (int j = 0; j < kV; ++j) {
            const std::int64_t at = (column + j) * kW;
            const V old = load(static_cast<const T*>(b.dq.row(row + i) + at));
            sum[i][j] = gates.inter[row + i] * (old + b.dden[row + i] * load(n + at));
          }
        }
        multiply<kH, kV>(row + kH, b.dS.row(row), b.dS.stride(), 1, b.k.data + column * kW,
                         b.k.stride(), sum);
        store_rows(dq, track, t + row, args.K, column, static_cast<T>(args.scale), sum);
      });
    });
  }

  template <int kH, int kV>
  void store_rows(Element* tensor, const Track& track, std::int64_t t, std::int64_t width,
                  std::int64_t column, T factor, V (&sum)[kH][kV]) const {
#pragma GCC unroll 8
    for (int i = 0; i < kH; ++i) {
      Element* to = tensor + track.token(args, t + i) * width + column * kW;
#pragma GCC unroll 8
      for (int j = 0; j < kV; ++j) {
        const std::int64_t left = width - (column + j) * kW;
        store(to + j * kW, factor * sum[i][j], static_cast<int>(left < kW ? left : kW));
      }
    }
  }

  // dk of the rows, and u.
  void key_grads(const Track& track, std::int64_t t, std::int64_t rows, const Buffers& b,
                 const Gates<T>& gates) const {
    Element* dk = static_cast<Element*>(args.dk);
    for (std::int64_t row = 0; row < rows; ++row) b.u[row] = T{};
    for_column_blocks(b.k.vectors(), [&](auto w, std::int64_t column) {
      for_row_tiles(rows, [&](auto h, std::int64_t row) {
        constexpr int kH = h(), kV = w();
        V sum[kH][kV]{};
        multiply<kH, kV>(args.V, b.v.row(row), b.v.stride(), 1, b.dC.data + column * kW,
                         b.dC.stride(), sum);
        for (int i = 0; i < kH; ++i) {
          V u{};
          for (int j = 0; j < kV; ++j) {
            const std::int64_t at = (column + j) * kW;
            sum[i][j] = gates.out[row + i] * (sum[i][j] + load(static_cast<const T*>(b.dn + at)));
            u += sum[i][j] * load(static_cast<const T*>(b.k.row(row + i) + at));
          }
          b.u[row + i] += horizontal_sum(u);
        }
        multiply<kH, kV>(rows - row, b.dS.row(row) + row, 1, b.dS.stride(),
                         b.q.row(row) + column * kW, b.q.stride(), sum);
        store_rows(dk, track, t + row, args.K, column, T{1}, sum);
      });
    });
  }

  void value_grads(const Track& track, std::int64_t t, std::int64_t rows, const Buffers& b) const {
    Element* dv = static_cast<Element*>(args.dv);
    for_column_blocks(b.v.vectors(), [&](auto w, std::int64_t column) {
      for_row_tiles(rows, [&](auto h, std::int64_t row) {
        constexpr int kH = h(), kV = w();
        V sum[kH][kV]{};
        multiply<kH, kV>(args.K, b.out_k.row(row), b.out_k.stride(), 1, b.dc.data + column * kW,
                         b.dc.stride(), sum);
        multiply<kH, kV>(rows - row, b.P.row(row) + row, 1, b.P.stride(),
                         b.dnum.row(row) + column * kW, b.dnum.stride(), sum);
        store_rows(dv, track, t + row, args.V, column, T{1}, sum);
      });
    });
  }

  // Adds what arrives through m, dm of which is `through` after the chunk, and writes di and df.
  void gate_grads(const Track& track, std::int64_t t, std::int64_t rows, const Buffers& b,
                  const Gates<T>& gates, T m_before, T& through) const {
    const bool sigmoid_gate = args.input_gate == InputGate::kSigmoid;
    for (std::int64_t r = rows - 1; r >= 0 && !sigmoid_gate; --r) {
      through += b.dm[r];
      if (gates.log_i[r] > (r > 0 ? gates.m[r - 1] : m_before) + gates.log_f[r]) {
        b.dli[r] += through;
        through = T{};
      } else {
        b.dlf[r] += through;
      }
    }
    for (std::int64_t r = 0; r < rows; r += kW) {
      const V f = load(static_cast<const T*>(gates.f + r));
      const V i = load(static_cast<const T*>(gates.i + r));
      store(b.dlf + r, load(static_cast<const T*>(b.dlf + r)) * sigmoid(-f));
      if (sigmoid_gate) store(b.dli + r, load(static_cast<const T*>(b.dli + r)) * sigmoid(-i));
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = track.token(args, t + r);
      static_cast<T*>(args.di)[at] = b.dli[r];
      static_cast<T*>(args.df)[at] = b.dlf[r];
    }
  }

  // dm: dLoss/dm after the chunk on entry, before it on exit; less, in either place, <c, dc> + <n, dn>,
  // by which c and n, being sums times exp(-m), depend on m. Returns that of the state before.
  T chunk(const Track& track, std::int64_t t, std::int64_t rows, std::int64_t c, const Buffers& b,
          Gates<T>& gates, T& dm) const {
    const T* const no_factor = nullptr;
    const std::int64_t padded = round_up(rows, kW);
    const Matrix<T> C = state(b, c);
    const T* n = norm(b, c);
    gates.compute(args, track, t, rows, b.m[c]);
    load_rows<Element>(args.q, track.at(args.q_stride, t), args.q_stride[1], rows,
                       static_cast<T>(args.scale), no_factor, b.q);
    load_rows<Element>(args.k, track.at(args.k_stride, t), args.k_stride[1], rows, T{1}, no_factor,
                       b.k);
    load_rows<Element>(args.v, track.at(args.v_stride, t), args.v_stride[1], rows, T{1}, no_factor,
                       b.v);
    load_dh(track, t, rows, b, gates);
    transpose(static_cast<const T*>(b.k.data), b.k.stride(), padded, b.k.padded(), b.kt.data,
              b.kt.stride());
    transpose(static_cast<const T*>(b.v.data), b.v.stride(), padded, b.v.padded(), b.vt.data,
              b.vt.stride());
    transpose(static_cast<const T*>(b.dC.data), b.dC.stride(), b.dC.rows, b.dC.padded(), b.dc.data,
              b.dc.stride());
    scale_rows_into(b.q, rows, gates.inter, b.inter_q);
    scale_rows_into(b.k, rows, gates.out, b.out_k);
    scores(b, gates, rows);
    through_state(b, rows, C);
    finish_scores(b, gates, rows, n);
    query_grads(track, t, rows, b, gates, n);
    key_grads(track, t, rows, b, gates);
    value_grads(track, t, rows, b);
    const T carry = gates.decay * inner(b, C, n);
    log_gate_grads(rows, carry, b.r, b.u, gates.D, b.column, b.dlf, b.dli);
    if (t + rows == track.length) {
      // The same rounded terms as in dli, from which they cancel.
      dm -= carry;
      for (std::int64_t r = 0; r < rows; ++r) dm -= b.u[r];
    }
    gate_grads(track, t, rows, b, gates, b.m[c], dm);
    rank_update(b.dC, gates.decay, b.dnum, b.inter_q, rows);
    add_rows(b.dn, gates.decay, b.inter_q, static_cast<const T*>(b.dden), rows);
    T before = carry;
    for (std::int64_t r = 0; r < rows; ++r) before += b.r[r];
    return before;
  }

  // <C, dC> + <n, dn>
  T inner(const Buffers& b, const Matrix<T>& C, const T* n) const {
    T sum = dot(n, static_cast<const T*>(b.dn), b.k.padded());
    for (std::int64_t row = 0; row < args.V; ++row) {
      sum += dot(static_cast<const T*>(C.row(row)), static_cast<const T*>(b.dC.row(row)),
                 b.k.padded());
    }
    return sum;
  }

  void load_last(const Track& track, const Buffers& b, T& dm) const {
    const std::int64_t at = track.sequence * args.H + track.head;
    const std::int64_t size = args.K * args.V;
    const T* dc = args.dc_last ? static_cast<const T*>(args.dc_last) + at * size : nullptr;
    const T* dn = args.dn_last ? static_cast<const T*>(args.dn_last) + at * args.K : nullptr;
    transposed_in(dc, args.K, args.V, b.dC);
    padded_in(dn, args.K, b.k.padded(), b.dn);
    dm = args.dm_last ? static_cast<const T*>(args.dm_last)[at] : T{};
  }

  void store_first(const Track& track, const Buffers& b, T dm) const {
    if (!args.dc) return;
    const std::int64_t at = track.sequence * args.H + track.head;
    T* dc = static_cast<T*>(args.dc) + at * args.K * args.V;
    for (std::int64_t k = 0; k < args.K; ++k) {
      for (std::int64_t e = 0; e < args.V; ++e) dc[k * args.V + e] = b.dC.row(e)[k];
    }
    std::copy(b.dn, b.dn + args.K, static_cast<T*>(args.dn) + at * args.K);
    static_cast<T*>(args.dm)[at] = dm;
  }

  void operator()(std::int64_t task) const {
    const TaskScope scope;
    const Track track(args, task);
    const std::int64_t L = round_up(args.chunk, kW), K = round_up(args.K, kW);
    const std::int64_t V_rows = round_up(args.V, kW);
    Buffers b;
    b.C = {nullptr, args.V * chunks(), args.K};
    b.dC = {nullptr, V_rows, args.K};
    b.dc = {nullptr, K, args.V};
    b.q = b.k = b.dq = b.inter_q = b.out_k = {nullptr, L, args.K};
    b.v = b.dnum = {nullptr, L, args.V};
    b.kt = {nullptr, K, L};
    b.vt = {nullptr, V_rows, L};
    b.P = b.dS = {nullptr, L, L};
    Matrix<T>* const matrices[] = {&b.C,     &b.dC, &b.dc, &b.q,    &b.k,  &b.dq, &b.inter_q,
                                   &b.out_k, &b.kt, &b.v,  &b.dnum, &b.vt, &b.P,  &b.dS};
    T** const rows[] = {&b.dden, &b.dm, &b.dh_h, &b.r, &b.u, &b.dlf, &b.dli, &b.column};
    std::int64_t size = (chunks() + 1) * K + chunks() + (8 + Gates<T>::kArrays) * L + b.P.size();
    for (const Matrix<T>* matrix : matrices) size += matrix->size();
    Scratch scratch(static_cast<std::size_t>(size) * sizeof(T), 26 + Gates<T>::kArrays);
    for (Matrix<T>* matrix : matrices) matrix->data = scratch.take<T>(matrix->size());
    for (T** row : rows) *row = scratch.take<T>(L);
    b.n = scratch.take<T>(chunks() * K);
    b.dn = scratch.take<T>(K);
    b.m = scratch.take<T>(chunks());
    Gates<T> gates(scratch, L, L);
    T dm, before{};
    load_last(track, b, dm);
    for (std::int64_t end = track.length; end > 0;) {
      const std::int64_t begin = (end - 1) / kStateInterval * kStateInterval;
      recompute(track, begin, end, b, gates);
      for (std::int64_t c = (end - begin + args.chunk - 1) / args.chunk - 1; c >= 0; --c) {
        const std::int64_t t = begin + c * args.chunk;
        before = chunk(track, t, std::min(args.chunk, end - t), c, b, gates, dm);
      }
      end = begin;
    }
    const bool no_m = track.length > 0 && args.input_gate == InputGate::kSigmoid;
    store_first(track, b, (no_m ? T{} : dm) + before);
  }
};

}  // namespace

void mlstm_backward(const MLSTMBackward& args) {
  dispatch_dtype(args.dtype, [&](auto element) {
    parallel_for(args.B * args.H, BackwardTask<decltype(element)>{args});
  });
}

}  // namespace xlstm::XLSTM_ISA
