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
// Accumulators: compute type. States within kStateInterval steps are recomputed from the saved one
//   before them.
// On tiles, operands of dq, dk and dv are rounded to bfloat16, as those are; what the gates' gradients
//   and the states are made of is exact to float32.
#pragma once

#include "common/simd.h"
// The vector overloads of simd.h come before the templates that call them.
#include "cpu/kernels.h"
#include "cpu/mlstm_backward_buffers.h"
#include "cpu/task.h"
#include "cpu/tile_product.h"

namespace xlstm::XLSTM_ISA {

template <class Element, class Products>
struct Backward {
  using T = compute_t<Element>;
  using Stored = typename Products::Stored;
  using Room = typename Products::Room;
  using V = Vec<T>;
  static constexpr int kW = kLanes<T>;
  static constexpr int kSums = 8;  // side by side: one would wait for itself

  const MLSTMBackward& args;

  using Buffers = BackwardBuffers<Element, Products>;

  // State before chunk c of the interval.
  Matrix<T> state(const Buffers& b, std::int64_t c) const {
    Matrix<T> at = b.C;
    at.rows = args.V;
    at.data += c * at.size();
    return at;
  }
  T* norm(const Buffers& b, std::int64_t c) const { return b.n + c * b.k.padded(); }

  void load_tokens(const Track& track, std::int64_t t, std::int64_t rows, const Buffers& b) const {
    load_rows<Element>(args.k, track.at(args.k_stride, t), args.k_stride[1], rows, b.k);
    load_rows<Element>(args.v, track.at(args.v_stride, t), args.v_stride[1], rows, b.v);
  }

  // States before each chunk of the interval [begin, end).
  void recompute(const Track& track, std::int64_t begin, std::int64_t end, Buffers& b) const {
    const std::int64_t at = (track.checkpoint + begin / kStateInterval) * args.H + track.head;
    transposed_in(static_cast<const T*>(args.c_saved) + at * args.K * args.V, args.K, args.V,
                  state(b, 0));
    padded_in(static_cast<const T*>(args.n_saved) + at * args.K, args.K, b.k.padded(), b.n);
    b.m[0] = static_cast<const T*>(args.m_saved)[at];
    std::int64_t c = 0;
    for (std::int64_t t = begin;; ++c) {
      const std::int64_t rows = chunk_rows(args, t, track.length);
      if (t + rows == end) return;
      b.gates.compute(args, track, t, rows, b.m[c]);
      load_tokens(track, t, rows, b);
      const T *out = b.gates.out, decay = b.gates.decay;
      const Matrix<T> from = state(b, c), to = state(b, c + 1);
      Products::product(
          args.V, args.K, Span::kAll,
          [&](std::int64_t i, std::int64_t j, V sum) {
            store(to.row(i) + j, decay * load(from.at(i, j)) + sum);
          },
          Term{Products::left_turned(b.v, rows, b.vt_room),
               Products::exact_right(b.k, rows, out, b.k_room), rows});
      std::copy(norm(b, c), norm(b, c) + b.k.padded(), norm(b, c + 1));
      add_rows(norm(b, c + 1), decay, b.k, out, rows);
      b.m[c + 1] = b.gates.m_end;
      t += rows;
    }
  }

  // The chunk's tokens, and in dden and dm what <dh, h> of a row will be multiplied by.
  void load_chunk(const Track& track, std::int64_t t, std::int64_t rows, T m, Buffers& b) const {
    b.gates.compute(args, track, t, rows, m);
    load_tokens(track, t, rows, b);
    load_rows<Element>(args.q, track.at(args.q_stride, t), args.q_stride[1], rows, b.q);
    if (args.dh) {
      load_rows<Element>(args.dh, track.at(args.dh_stride, t), args.dh_stride[1], rows, b.dh);
    } else {
      b.dh.zero();
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const T den = static_cast<const T*>(args.row_den)[track.token(args, t + r)];
      const RowScale<T> by = row_scale(args, den, b.gates.m[r]);
      b.row_h[r] = by.h, b.dden[r] = by.dden, b.dm[r] = by.dm;
      b.by_q[r] = static_cast<T>(args.scale) * b.gates.inter[r];
    }
    scale_rows_into(b.k, rows, static_cast<const T*>(b.gates.out), b.out_k);
  }

  // sums[r] = the sum of what was added to row r of totals, which is then zero.
  void take_totals(const Buffers& b, std::int64_t rows, T* sums) const {
    for (std::int64_t r = 0; r < rows; ++r) {
      sums[r] = horizontal_sum(load(b.totals.at(r, 0)));
      store(b.totals.row(r), V{});
    }
  }

  static void add_to(T* p, V x) { store(p, load(p) + x); }

  // P, dS and, by rows, <dnum, P V>.
  void scores(std::int64_t rows, Buffers& b) const {
    const T scale = static_cast<T>(args.scale);
    Products::product(
        rows, rows, Span::kUpTo,
        [&](std::int64_t i, std::int64_t j, V S) {
          const V p = S * (scale * load(b.gates.D.at(i, j)));
          store(b.P.row(i) + j, p);
          put(b.row_P.row(i) + j, b.row_h[i] * p);
        },
        Term{Products::left(b.q), Products::right_turned(b.k, rows, b.kt_room), args.K});
    Products::product(
        rows, rows, Span::kUpTo,
        [&](std::int64_t i, std::int64_t j, V dS) {
          dS *= broadcast<V>(b.row_h[i]);
          store(b.dS.row(i) + j, dS);
          add_to(b.totals.row(i), dS * load(b.P.at(i, j)));
        },
        Term{Products::left(b.dh), Products::right_turned(b.v, rows, b.vt_room), args.V});
    take_totals(b, rows, b.dh_h);
  }

  // dq's part through C, without n's; <dnum, inter scale Q C> joins dh_h.
  void queries_through_state(std::int64_t rows, const Matrix<T>& C, Buffers& b) const {
    Products::product(
        rows, args.K, Span::kAll,
        [&](std::int64_t i, std::int64_t j, V sum) {
          const V dq = (b.by_q[i] * b.row_h[i]) * sum;
          store(b.dq.row(i) + j, dq);
          add_to(b.totals.row(i), dq * load(b.q.at(i, j)));
        },
        Term{Products::left(b.dh), Products::exact_right(C, args.V, b.C_room), args.V});
    take_totals(b, rows, b.r);
    for (std::int64_t row = 0; row < rows; ++row) b.dh_h[row] += b.r[row];
  }

  // dk's part through dC', without n's, and all of dv.
  void keys_through_state(const Track& track, std::int64_t t, std::int64_t rows, Buffers& b) const {
    Products::product(
        rows, args.K, Span::kAll,
        [&](std::int64_t i, std::int64_t j, V sum) { store(b.dk.row(i) + j, sum); },
        Term{Products::left(b.v), Products::exact_right(b.dC, args.V, b.dC_room), args.V});
    Products::product(
        rows, args.V, Span::kAll,
        [&](std::int64_t i, std::int64_t j, V sum) {
          put_token(args.dv, track, t + i, args.V, j, sum);
        },
        Term{Products::left_turned(b.row_P, rows, b.P_room), Products::right(b.dh, rows, b.dh_room),
             rows, Span::kFrom},
        Term{Products::left(b.out_k), Products::right_turned(b.dC, args.V, b.dc_room), args.K});
  }

  // dden and dm.
  static void row_grads(std::int64_t rows, Buffers& b) {
    for (std::int64_t row = 0; row < rows; ++row) {
      b.dden[row] *= b.dh_h[row];
      b.dm[row] *= b.dh_h[row];
    }
  }

  // dS in full, and W where D was.
  void finish_scores(std::int64_t rows, const T* n, Buffers& b) const {
    const T scale = static_cast<T>(args.scale);
    for (std::int64_t row = 0; row < rows; ++row) {
      const T dden = b.dden[row];
      b.r[row] += dden * b.by_q[row] * dot(b.q.at(row, 0), n, b.q.padded());
      for (std::int64_t c = 0; c <= row; c += kW) {
        T* D = b.gates.D.row(row) + c;
        const V grad = load(b.dS.at(row, c)) + dden;
        put(b.row_dS.row(row) + c, scale * grad * load(D));
        store(D, grad * load(b.P.at(row, c)));
      }
      // Tiles of dk read whole tiles of rows: up to the last one's diagonal.
      const std::int64_t end = round_up(row + Products::kTileRows, kW);
      for (std::int64_t c = round_up(row + 1, kW); c < end && c < b.row_dS.padded(); c += kW) {
        store(b.row_dS.row(row) + c, V{});
      }
    }
  }

  // dq and dk of the rows, and u.
  void token_grads(const Track& track, std::int64_t t, std::int64_t rows, const T* n,
                   Buffers& b) const {
    Products::product(
        rows, args.K, Span::kAll,
        [&](std::int64_t i, std::int64_t j, V sum) {
          const V old = (b.by_q[i] * b.dden[i]) * load(n + j);
          put_token(args.dq, track, t + i, args.K, j, sum + load(b.dq.at(i, j)) + old);
        },
        Term{Products::left(b.row_dS), Products::right(b.k, rows, b.k_room), rows, Span::kUpTo});
    Products::product(
        rows, args.K, Span::kAll,
        [&](std::int64_t i, std::int64_t j, V sum) {
          const V next = b.gates.out[i] * (load(b.dk.at(i, j)) + load(b.dn + j));
          add_to(b.totals.row(i), next * load(b.k.at(i, j)));
          put_token(args.dk, track, t + i, args.K, j, sum + next);
        },
        Term{Products::left_turned(b.row_dS, rows, b.dS_room), Products::right(b.q, rows, b.q_room),
             rows, Span::kFrom});
    take_totals(b, rows, b.u);
  }
  // Of a token's row of `width` elements, those from `column` on.
  void put_token(void* tensor, const Track& track, std::int64_t t, std::int64_t width,
                 std::int64_t column, V x) const {
    put(static_cast<Element*>(tensor) + track.token(args, t) * width + column, x, width - column);
  }

  // Whether m of token r is its li.
  static bool input_gate_won(const Buffers& b, std::int64_t r, T m_before) {
    return b.gates.log_i[r] > (r > 0 ? b.gates.m[r - 1] : m_before) + b.gates.log_f[r];
  }

  // Adds what arrives through m, dm of which is `through` after the chunk, and writes di and df.
  void gate_grads(const Track& track, std::int64_t t, std::int64_t rows, const Buffers& b,
                  T m_before, T& through) const {
    const bool sigmoid_gate = args.input_gate == InputGate::kSigmoid;
    for (std::int64_t r = rows - 1; r >= 0 && !sigmoid_gate; --r) {
      through += b.dm[r];
      if (input_gate_won(b, r, m_before)) {
        b.dli[r] += through;
        through = T{};
      } else {
        b.dlf[r] += through;
      }
    }
    for (std::int64_t r = 0; r < rows; r += kW) {
      const V f = load(static_cast<const T*>(b.gates.f + r));
      const V i = load(static_cast<const T*>(b.gates.i + r));
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
  T chunk(const Track& track, std::int64_t t, std::int64_t rows, std::int64_t c, Buffers& b,
          T& dm) const {
    const Matrix<T> C = state(b, c);
    const T* n = norm(b, c);
    load_chunk(track, t, rows, b.m[c], b);
    scores(rows, b);
    queries_through_state(rows, C, b);
    row_grads(rows, b);
    keys_through_state(track, t, rows, b);
    finish_scores(rows, n, b);
    token_grads(track, t, rows, n, b);
    const T carry = b.gates.decay * (dot(n, b.dn, b.k.padded()) + previous_states(rows, C, b));
    log_gate_grads(rows, carry, b.r, b.u, b.gates.D, b.column, b.dlf, b.dli);
    if (t + rows == track.length) {
      // The same rounded terms as in dli, from which they cancel.
      dm -= carry;
      for (std::int64_t r = 0; r < rows; ++r) dm -= b.u[r];
    }
    gate_grads(track, t, rows, b, b.m[c], dm);
    T before = carry;
    for (std::int64_t r = 0; r < rows; ++r) before += b.r[r];
    return before;
  }

  // dC and dn before the chunk. Returns <C, dC'>, while dC' is at hand.
  T previous_states(std::int64_t rows, const Matrix<T>& C, Buffers& b) const {
    for (std::int64_t r = 0; r < rows; ++r) b.row_h[r] *= b.by_q[r], b.dden[r] *= b.by_q[r];
    const T decay = b.gates.decay;
    V inner[kSums]{};
    Products::product(
        args.V, args.K, Span::kAll,
        [&](std::int64_t i, std::int64_t j, V sum) {
          const V dC = load(b.dC.at(i, j));
          inner[i % kSums] += dC * load(C.at(i, j));
          store(b.dC.row(i) + j, decay * dC + sum);
        },
        Term{Products::left_turned(b.dh, rows, b.dht_room),
             Products::exact_right(b.q, rows, b.row_h, b.q_room), rows});
    add_rows(b.dn, decay, b.q, static_cast<const T*>(b.dden), rows);
    for (int at = 1; at < kSums; ++at) inner[0] += inner[at];
    return horizontal_sum(inner[0]);
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

  // States before each chunk of [begin, end), an interval or what there is of one; then its chunks from
  // the last to the first, f(chunk, its first token, its tokens).
  template <class F>
  void walk_back(const Track& track, std::int64_t begin, std::int64_t end, Buffers& b,
                 const F& f) const {
    recompute(track, begin, end, b);
    for (std::int64_t c = ceil_div(end - begin, args.chunk) - 1; c >= 0; --c) {
      const std::int64_t t = begin + c * args.chunk;
      f(c, t, std::min(args.chunk, end - t));
    }
  }

  // All gradients of the tokens. dm and what is returned: as in chunk().
  T interval(const Track& track, std::int64_t begin, std::int64_t end, Buffers& b, T& dm) const {
    T before{};
    walk_back(track, begin, end, b, [&](std::int64_t c, std::int64_t t, std::int64_t rows) {
      before = chunk(track, t, rows, c, b, dm);
    });
    return before;
  }

  // What the tokens add to the gradient of the state before them, in dC, dn and `through.dm`, from
  // zero; and how much of that of the state after them passes.
  struct Through {
    T decay, dm;
    bool passes_dm;
  };
  Through own_gradient(const Track& track, std::int64_t begin, std::int64_t end, Buffers& b) const {
    Through through{T{1}, T{0}, true};
    b.dC.zero();
    padded_in<T>(nullptr, 0, b.k.padded(), b.dn);
    walk_back(track, begin, end, b, [&](std::int64_t c, std::int64_t t, std::int64_t rows) {
      const Matrix<T> C = state(b, c);
      load_chunk(track, t, rows, b.m[c], b);
      scores(rows, b);
      queries_through_state(rows, C, b);
      row_grads(rows, b);
      previous_states(rows, C, b);
      through.decay *= b.gates.decay;
      if (args.input_gate == InputGate::kSigmoid) return;
      for (std::int64_t r = rows - 1; r >= 0; --r) {
        through.dm += b.dm[r];
        if (!input_gate_won(b, r, b.m[c])) continue;
        through.dm = T{};
        through.passes_dm = false;
      }
    });
    return through;
  }
};

}  // namespace xlstm::XLSTM_ISA
