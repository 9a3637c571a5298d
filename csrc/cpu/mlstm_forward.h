// mLSTM forward, chunk by chunk, on CPU cores.
//   P = (scale Q K^T) o D                 den = P 1 + inter (scale Q n)
//   h = (P V + inter scale Q C) / (max(|den|, exp(-m)) + eps)
//   C' = decay C + (out K)^T V            n' = decay n + (out K)^T 1
// Source: xLSTM, arXiv 2405.04517, section 2.3; chunkwise form: arXiv 2503.14376, section 3.
// Tensors: launch.h; symbols of the gates: mlstm.h; tasks: mlstm_forward.cpp.
// Accumulators: compute type.
// Saved: m and den of each token, and the states before every kStateInterval-th.
// On tiles, operands of h are rounded to bfloat16, as h is; den, C and n are exact to float32.
#pragma once

#include "common/simd.h"
// The vector overloads of simd.h come before the templates that call them.
#include "cpu/kernels.h"
#include "cpu/mlstm.h"
#include "cpu/task.h"
#include "cpu/tile_product.h"

namespace xlstm::XLSTM_ISA {

template <class Element, class Products>
struct Forward {
  using T = compute_t<Element>;
  using Stored = typename Products::Stored;
  using Room = typename Products::Room;
  using V = Vec<T>;
  static constexpr int kW = kLanes<T>;

  const MLSTMForward& args;
  std::int64_t columns;  // of V that a task takes

  std::int64_t parts() const { return std::max<std::int64_t>(ceil_div(args.V, columns), 1); }

  struct Buffers {
    Matrix<T> C, totals;
    Matrix<Stored> q, k, v, P, inter_q;
    Room kt_room, v_room, C_room, out_k_room;
    T *n, *den, *row_h, *inter_scale;
    Gates<T> gates;

    // V: the columns of a task.
    Buffers(const MLSTM& args, std::int64_t V, Scratch& scratch)
        : Buffers(args, V, scratch, round_up(args.chunk, kPad<T>)) {}

   private:
    Buffers(const MLSTM& args, std::int64_t V, Scratch& scratch, std::int64_t L)
        : C(take_matrix<T>(scratch, args.K, V)),
          totals(take_matrix<T>(scratch, L, kW)),
          q(take_matrix<Stored>(scratch, L, args.K)),
          k(take_matrix<Stored>(scratch, L, args.K)),
          v(take_matrix<Stored>(scratch, L, V)),
          P(take_matrix<Stored>(scratch, L, L)),
          inter_q(take_matrix<Stored>(scratch, L, args.K)),
          kt_room(Products::room(scratch, L, args.K)),
          v_room(Products::tile_room(scratch, L, V)),
          C_room(Products::tile_room(scratch, args.K, V)),
          out_k_room(Products::room(scratch, L, args.K)),
          n(scratch.take<T>(k.padded())),
          den(scratch.take<T>(L)),
          row_h(scratch.take<T>(L)),
          inter_scale(scratch.take<T>(L)),
          gates(scratch, L) {}
  };

  // A task's columns of one state, and all of n; those of others are theirs to store.
  struct Part {
    std::int64_t first = 0;  // column
    bool stores_rows() const { return first == 0; }
  };
  T first_m(const Track& track) const {
    return args.m ? static_cast<const T*>(args.m)[track.sequence * args.H + track.head] : T{};
  }
  void load_state(const Track& track, Part part, const Buffers& b, T& m) const {
    const std::int64_t at = track.sequence * args.H + track.head;
    b.C.zero();
    padded_in(args.n ? static_cast<const T*>(args.n) + at * args.K : nullptr, args.K, b.k.padded(),
              b.n);
    m = first_m(track);
    if (!args.c) return;
    const T* c = static_cast<const T*>(args.c) + at * args.K * args.V + part.first;
    for (std::int64_t k = 0; k < args.K; ++k, c += args.V) {
      std::copy(c, c + b.C.width, b.C.row(k));
    }
  }
  void store_state(std::int64_t at, void* c, void* n, void* m, Part part, const Buffers& b,
                   T m_now) const {
    T* to = static_cast<T*>(c) + at * args.K * args.V + part.first;
    for (std::int64_t k = 0; k < args.K; ++k, to += args.V) {
      std::copy(b.C.row(k), b.C.row(k) + b.C.width, to);
    }
    if (!part.stores_rows()) return;
    std::copy(b.n, b.n + args.K, static_cast<T*>(n) + at * args.K);
    static_cast<T*>(m)[at] = m_now;
  }

  // P, den and what follows of each row.
  void scores(const Track& track, Part part, std::int64_t t, std::int64_t rows, Buffers& b) const {
    const T scale = static_cast<T>(args.scale);
    b.totals.zero();
    Products::product(
        rows, rows, Span::kUpTo,
        [&](std::int64_t i, std::int64_t j, V S) {
          const V p = S * (scale * load(b.gates.D.at(i, j)));
          put(b.P.row(i) + j, p);
          T* total = b.totals.row(i);
          store(total, load(static_cast<const T*>(total)) + p);
        },
        Term{Products::left(b.q), Products::right_turned(b.k, rows, b.kt_room), args.K});
    for (std::int64_t r = 0; r < rows; ++r) {
      b.inter_scale[r] = b.gates.inter[r] * scale;
      const T old =
          dot(static_cast<const Stored*>(b.q.row(r)), static_cast<const T*>(b.n), b.q.padded());
      b.den[r] = horizontal_sum(load(b.totals.at(r, 0))) + b.inter_scale[r] * old;
      b.row_h[r] = row_scale(args, b.den[r], b.gates.m[r]).h;
      if (!args.row_m || !part.stores_rows()) continue;
      const std::int64_t at = track.token(args, t + r);
      static_cast<T*>(args.row_m)[at] = b.gates.m[r];
      static_cast<T*>(args.row_den)[at] = b.den[r];
    }
  }

  void load_columns(const Track& track, Part part, std::int64_t t, std::int64_t rows,
                    Buffers& b) const {
    load_rows<Element>(args.k, track.at(args.k_stride, t), args.k_stride[1], rows, b.k);
    load_rows<Element>(args.v, track.at(args.v_stride, t) + part.first, args.v_stride[1], rows,
                       b.v);
  }

  // C and n after the chunk.
  template <class Right>
  void next_state(std::int64_t rows, const Right& v, Buffers& b) const {
    const T* out = b.gates.out;
    const T decay = b.gates.decay;
    Products::product(
        args.K, b.v.width, Span::kAll,
        [&](std::int64_t i, std::int64_t j, V sum) {
          T* c = b.C.row(i) + j;
          store(c, decay * load(static_cast<const T*>(c)) + sum);
        },
        Term{Products::exact_left_turned(b.k, rows, out, b.out_k_room), v, rows});
    add_rows(b.n, decay, b.k, out, rows);
  }

  void chunk(const Track& track, Part part, std::int64_t t, std::int64_t rows, Buffers& b,
             T& m) const {
    b.gates.compute(args, track, t, rows, m);
    load_rows<Element>(args.q, track.at(args.q_stride, t), args.q_stride[1], rows, b.q);
    load_columns(track, part, t, rows, b);
    scores(track, part, t, rows, b);
    scale_rows_into(b.q, rows, static_cast<const T*>(b.inter_scale), b.inter_q);
    const auto v = Products::right(b.v, rows, b.v_room);
    Element* h = static_cast<Element*>(args.h) + part.first;
    Products::product(
        rows, b.v.width, Span::kAll,
        [&](std::int64_t i, std::int64_t j, V sum) {
          put(h + track.token(args, t + i) * args.V + j, b.row_h[i] * sum, b.v.width - j);
        },
        Term{Products::left(b.P), v, rows, Span::kUpTo},
        Term{Products::left(b.inter_q), Products::right(b.C, args.K, b.C_room), args.K});
    next_state(rows, v, b);
    m = b.gates.m_end;
  }

  // All that [begin, end) gives, from the state in b and m.
  void interval(const Track& track, Part part, std::int64_t begin, std::int64_t end, Buffers& b,
                T& m) const {
    for (std::int64_t t = begin; t < end;) {
      if (args.c_saved && t % kStateInterval == 0) {
        const std::int64_t at = (track.checkpoint + t / kStateInterval) * args.H + track.head;
        store_state(at, args.c_saved, args.n_saved, args.m_saved, part, b, m);
      }
      const std::int64_t rows = chunk_rows(args, t, end);
      chunk(track, part, t, rows, b, m);
      t += rows;
    }
  }

  // What [begin, end) adds to C and n, from zero, where m is the one before it. Returns what it
  // leaves of those before it.
  T own_state(const Track& track, Part part, std::int64_t begin, std::int64_t end, Buffers& b,
              T m) const {
    T decay{1};
    b.C.zero();
    padded_in<T>(nullptr, 0, b.k.padded(), b.n);
    for (std::int64_t t = begin; t < end;) {
      const std::int64_t rows = chunk_rows(args, t, end);
      b.gates.compute(args, track, t, rows, m);
      load_columns(track, part, t, rows, b);
      next_state(rows, Products::right(b.v, rows, b.v_room), b);
      decay *= b.gates.decay;
      m = b.gates.m_end;
      t += rows;
    }
    return decay;
  }

  // m after [begin, end), from that before.
  T m_after(const Track& track, std::int64_t begin, std::int64_t end, Buffers& b, T m) const {
    for (std::int64_t t = begin; t < end;) {
      const std::int64_t rows = chunk_rows(args, t, end);
      m = b.gates.stabilise(args, track, t, rows, m);
      t += rows;
    }
    return m;
  }

  // Calls f(buffers) with the scratch of one task.
  template <class F>
  void with_buffers(Part part, const F& f) const {
    const TaskScope scope;
    const typename Products::Scope tiles;
    const std::int64_t V = std::min(columns, args.V - part.first);
    Scratch sizes;
    Buffers(args, V, sizes);
    Scratch scratch(sizes.used_bytes(), 0);
    Buffers b(args, V, scratch);
    f(b);
  }

  void store_last(const Track& track, Part part, const Buffers& b, T m) const {
    const std::int64_t at = track.sequence * args.H + track.head;
    store_state(at, args.c_last, args.n_last, args.m_last, part, b, m);
  }
};

}  // namespace xlstm::XLSTM_ISA
