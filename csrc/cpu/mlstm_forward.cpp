// mLSTM forward, chunk by chunk, on CPU cores.
//   P = (scale Q K^T) o D                 den = P 1 + inter (scale Q n)
//   h = (P V + inter scale Q C) / (max(|den|, exp(-m)) + eps)
//   C' = decay C + (out K)^T V            n' = decay n + (out K)^T 1
// Source: xLSTM, arXiv 2405.04517, section 2.3; chunkwise form: arXiv 2503.14376, section 3.
// Tensors: launch.h; symbols of the gates: mlstm.h.
// Tasks: (sequence, head), each walking its chunks with C in cache. Accumulators: compute type. Saved:
//   m and den of each token, and the states before every kStateInterval-th.
#include "common/simd.h"
// The vector overloads of simd.h come before the templates that call them.
#include "cpu/kernels.h"
#include "cpu/mlstm.h"
#include "cpu/task.h"
#include "cpu/transpose.h"

namespace xlstm::XLSTM_ISA {
namespace {

template <class Element>
struct ForwardTask {
  using T = compute_t<Element>;
  static constexpr int kW = kLanes<T>;

  const MLSTMForward& args;

  struct Buffers {
    Matrix<T> C, q, k, kt, v, P, inter_q, out_k;
    T *n, *den, *row_h;
  };

  void load_state(const Track& track, const Buffers& b, T& m) const {
    const std::int64_t at = track.sequence * args.H + track.head;
    b.C.zero();
    for (std::int64_t k = 0; k < b.k.padded(); ++k) b.n[k] = T{};
    m = args.m ? static_cast<const T*>(args.m)[at] : T{};
    if (!args.c) return;
    copy_in(static_cast<const T*>(args.c) + at * args.K * args.V, b);
    const T* n = static_cast<const T*>(args.n) + at * args.K;
    std::copy(n, n + args.K, b.n);
  }
  void copy_in(const T* c, const Buffers& b) const {
    for (std::int64_t k = 0; k < args.K; ++k)
      std::copy(c + k * args.V, c + (k + 1) * args.V, b.C.row(k));
  }
  void store_state(std::int64_t at, void* c, void* n, void* m, const Buffers& b, T m_now) const {
    T* to = static_cast<T*>(c) + at * args.K * args.V;
    for (std::int64_t k = 0; k < args.K; ++k)
      std::copy(b.C.row(k), b.C.row(k) + args.V, to + k * args.V);
    std::copy(b.n, b.n + args.K, static_cast<T*>(n) + at * args.K);
    static_cast<T*>(m)[at] = m_now;
  }

  // P and the rows' sums of it, from q, k transposed and the gates.
  void scores(const Buffers& b, const Gates<T>& gates, std::int64_t rows) const {
    for_row_tiles(rows, [&](auto h, std::int64_t row) {
      constexpr int kH = h();
      Vec<T> total[kH]{};
      const std::int64_t vectors = ceil_vectors(row + kH);
      for_column_blocks(vectors, [&](auto w, std::int64_t column) {
        constexpr int kV = w();
        Vec<T> S[kH][kV]{};
        multiply<kH, kV>(args.K, b.q.row(row), b.q.stride(), 1, b.kt.data + column * kW,
                         b.kt.stride(), S);
        for (int i = 0; i < kH; ++i) {
          for (int j = 0; j < kV; ++j) {
            const std::int64_t at = (column + j) * kW;
            const Vec<T> p = S[i][j] * load(static_cast<const T*>(gates.D.row(row + i) + at));
            store(b.P.row(row + i) + at, p);
            total[i] += p;
          }
        }
      });
      for (int i = 0; i < kH; ++i) {
        const T old =
            dot(static_cast<const T*>(b.q.row(row + i)), static_cast<const T*>(b.n), b.q.padded());
        b.den[row + i] = horizontal_sum(total[i]) + gates.inter[row + i] * old;
      }
    });
  }
  static std::int64_t ceil_vectors(std::int64_t count) { return (count + kW - 1) / kW; }

  void outputs(const Track& track, std::int64_t t, std::int64_t rows, const Buffers& b) const {
    Element* h = static_cast<Element*>(args.h);
    for_column_blocks(b.v.vectors(), [&](auto w, std::int64_t column) {
      for_row_tiles(rows, [&](auto height, std::int64_t row) {
        constexpr int kH = height(), kV = w();
        Vec<T> sum[kH][kV]{};
        multiply<kH, kV>(row + kH, b.P.row(row), b.P.stride(), 1, b.v.data + column * kW,
                         b.v.stride(), sum);
        multiply<kH, kV>(args.K, b.inter_q.row(row), b.inter_q.stride(), 1, b.C.data + column * kW,
                         b.C.stride(), sum);
#pragma GCC unroll 8
        for (int i = 0; i < kH; ++i) {
          Element* to = h + track.token(args, t + row + i) * args.V + column * kW;
#pragma GCC unroll 8
          for (int j = 0; j < kV; ++j) {
            const std::int64_t left = args.V - (column + j) * kW;
            store(to + j * kW, b.row_h[row + i] * sum[i][j],
                  static_cast<int>(left < kW ? left : kW));
          }
        }
      });
    });
  }

  void chunk(const Track& track, std::int64_t t, std::int64_t rows, const Buffers& b,
             Gates<T>& gates, T& m) const {
    const T one{1}, scale = static_cast<T>(args.scale);
    gates.compute(args, track, t, rows, m);
    load_rows<Element>(args.q, track.at(args.q_stride, t), args.q_stride[1], rows, scale,
                       static_cast<const T*>(nullptr), b.q);
    load_rows<Element>(args.k, track.at(args.k_stride, t), args.k_stride[1], rows, one,
                       static_cast<const T*>(nullptr), b.k);
    load_rows<Element>(args.v, track.at(args.v_stride, t), args.v_stride[1], rows, one,
                       static_cast<const T*>(nullptr), b.v);
    transpose(static_cast<const T*>(b.k.data), b.k.stride(), round_up(rows, kW), b.k.padded(),
              b.kt.data, b.kt.stride());
    scores(b, gates, rows);
    for (std::int64_t r = 0; r < rows; ++r) {
      b.row_h[r] = row_scale(args, b.den[r], gates.m[r]).h;
      if (!args.row_m) continue;
      const std::int64_t at = track.token(args, t + r);
      static_cast<T*>(args.row_m)[at] = gates.m[r];
      static_cast<T*>(args.row_den)[at] = b.den[r];
    }
    scale_rows_into(b.q, rows, gates.inter, b.inter_q);
    scale_rows_into(b.k, rows, gates.out, b.out_k);
    outputs(track, t, rows, b);
    rank_update(b.C, gates.decay, b.out_k, b.v, rows);
    add_rows(b.n, gates.decay, b.out_k, static_cast<const T*>(nullptr), rows);
    m = gates.m_end;
  }

  void operator()(std::int64_t task) const {
    const TaskScope scope;
    const Track track(args, task);
    const std::int64_t L = args.chunk, padded_L = round_up(L, kW);
    Buffers b;
    b.C = {nullptr, args.K, args.V};
    b.q = b.k = b.inter_q = b.out_k = {nullptr, padded_L, args.K};
    b.kt = {nullptr, round_up(args.K, kW), padded_L};
    b.v = {nullptr, padded_L, args.V};
    b.P = {nullptr, padded_L, padded_L};
    Matrix<T>* const matrices[] = {&b.C, &b.q, &b.k, &b.kt, &b.v, &b.P, &b.inter_q, &b.out_k};
    std::int64_t size = b.k.padded() + (2 + Gates<T>::kArrays) * padded_L + b.P.size();
    for (const Matrix<T>* matrix : matrices) size += matrix->size();
    Scratch scratch(static_cast<std::size_t>(size) * sizeof(T), 12 + Gates<T>::kArrays);
    for (Matrix<T>* matrix : matrices) matrix->data = scratch.take<T>(matrix->size());
    b.n = scratch.take<T>(b.k.padded());
    b.den = scratch.take<T>(padded_L);
    b.row_h = scratch.take<T>(padded_L);
    Gates<T> gates(scratch, L, padded_L);
    T m;
    load_state(track, b, m);
    for (std::int64_t t = 0; t < track.length;) {
      if (args.c_saved && t % kStateInterval == 0) {
        const std::int64_t at = (track.checkpoint + t / kStateInterval) * args.H + track.head;
        store_state(at, args.c_saved, args.n_saved, args.m_saved, b, m);
      }
      const std::int64_t rows = chunk_rows(args, t, track.length);
      chunk(track, t, rows, b, gates, m);
      t += rows;
    }
    store_state(track.sequence * args.H + track.head, args.c_last, args.n_last, args.m_last, b, m);
  }
};

}  // namespace

void mlstm_forward(const MLSTMForward& args) {
  dispatch_dtype(args.dtype, [&](auto element) {
    parallel_for(args.B * args.H, ForwardTask<decltype(element)>{args});
  });
}

}  // namespace xlstm::XLSTM_ISA
