// One step of the mLSTM on CPU cores: the equations in xlstm_kernels/cells/mlstm.py, c read once and
// written once.
// Source: xLSTM, arXiv 2405.04517, section 2.3; the sigmoid input gate: arXiv 2503.14376.
// Tensors: launch.h. A head's gates, n, m and divisor come first; the memory follows in tasks of one
// block of columns of c each: a whole head, or less of it where heads are too few for the cores.
#include <algorithm>
#include <cstdint>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/stream.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/mlstm.h"
#include "cpu/task.h"

namespace xlstm::XLSTM_ISA {
namespace {

// Rows of c that one pass over a block's sums of h takes in.
constexpr int kRows = 4;
// Waking the thread pool takes as long as this many elements of c take on one core.
constexpr std::int64_t kSerialElements = 1 << 15;
// Columns of a block are a multiple of this: whole cache lines of any type.
constexpr std::int64_t kColumns = 64;
// A new state this large leaves the caches before it is read again.
constexpr std::int64_t kStreamBytes = std::int64_t{16} << 20;

template <class Element>
struct StepTask {
  const MLSTMForward& args;
  std::int64_t columns;  // of a block
  bool stream;

  using T = compute_t<Element>;
  using V = Vec<T>;
  static constexpr int kW = kLanes<T>;

  static int lanes(std::int64_t left) { return static_cast<int>(left < kW ? left : kW); }

  // What a row k of c needs: c' = keep c + take_k[k] v, h += q[k] c', all h times `h_scale`.
  struct Head {
    T *q, *take_k;
    T keep, h_scale;
  };

  // Everything of `head` but its divisor, and m after the step.
  void gates(const Track& track, Head& head, T& m) const {
    const bool sigmoid_gate = args.input_gate == InputGate::kSigmoid;
    const T i = static_cast<const T*>(args.i)[track.at(args.i_stride, 0)];
    V pair = broadcast<V>(i);
    pair[0] = static_cast<const T*>(args.f)[track.at(args.f_stride, 0)];
    const V logs = log_sigmoid<T>(pair);
    const T kept = logs[0] + m, taken = sigmoid_gate ? logs[1] : i;
    m = sigmoid_gate ? T{0} : taken > kept ? taken : kept;
    pair = broadcast<V>(taken - m);
    pair[0] = kept - m;
    const V factors = exp_factor(pair);
    head.keep = factors[0];
    const T take = factors[1], scale = static_cast<T>(args.scale);
    const Element* q = static_cast<const Element*>(args.q) + track.at(args.q_stride, 0);
    const Element* k = static_cast<const Element*>(args.k) + track.at(args.k_stride, 0);
    for (std::int64_t c = 0; c < args.K; c += kW) {
      const int count = lanes(args.K - c);
      store(head.q + c, load(q + c, count) * scale);
      store(head.take_k + c, load(k + c, count) * take);
    }
  }

  // Writes n and m.
  Head begin(std::int64_t task, Scratch& scratch) const {
    const Track track(args, task);
    const std::int64_t padded = round_up(args.K, kW);
    Head head;
    head.q = scratch.take<T>(padded);
    head.take_k = scratch.take<T>(padded);
    T m = static_cast<const T*>(args.m)[task];
    gates(track, head, m);
    const T* n = static_cast<const T*>(args.n) + task * args.K;
    T* n_last = static_cast<T*>(args.n_last) + task * args.K;
    V den{};
    for (std::int64_t c = 0; c < args.K; c += kW) {
      const int count = lanes(args.K - c);
      const V n_c = head.keep * load(n + c, count) + load(static_cast<const T*>(head.take_k + c));
      store(n_last + c, n_c, count);
      den += n_c * load(static_cast<const T*>(head.q + c));
    }
    static_cast<T*>(args.m_last)[task] = m;
    head.h_scale = row_scale(args, horizontal_sum(den), m).h;
    return head;
  }

  // Rows [row, row + kH) of c, and their part of sums: `count` columns.
  template <int kH, bool kStream>
  void rows(const T* c, T* c_last, std::int64_t count, const Head& head, std::int64_t row,
            const T* v, T* sums) const {
    const T* from[kH];
    T* to[kH];
    V q[kH], k[kH];
    for (int r = 0; r < kH; ++r) {
      from[r] = c + (row + r) * args.V;
      to[r] = c_last + (row + r) * args.V;
      q[r] = broadcast<V>(head.q[row + r]);
      k[r] = broadcast<V>(head.take_k[row + r]);
    }
    const V keep = broadcast<V>(head.keep);
    std::int64_t at = 0;
    for (; at + kW <= count; at += kW) {
      const V v_at = load(v + at);
      V sum = load(static_cast<const T*>(sums + at));
#pragma GCC unroll 8
      for (int r = 0; r < kH; ++r) {
        const V new_c = keep * load(from[r] + at) + k[r] * v_at;
        if (kStream) {
          store_streaming(to[r] + at, new_c);
        } else {
          store(to[r] + at, new_c);
        }
        sum += q[r] * new_c;
      }
      store(sums + at, sum);
    }
    if (at == count) return;
    const int left = lanes(count - at);
    V sum = load(static_cast<const T*>(sums + at));
    for (int r = 0; r < kH; ++r) {
      const V new_c = keep * load(from[r] + at, left) + k[r] * load(v + at);
      store(to[r] + at, new_c, left);
      sum += q[r] * new_c;
    }
    store(sums + at, sum);
  }

  // Columns [first, first + count) of a head's c, and of h.
  void memory(std::int64_t task, const Head& head, std::int64_t first, std::int64_t count) const {
    const Track track(args, task);
    Scratch scratch(static_cast<std::size_t>(2 * round_up(count, kW)) * sizeof(T), 2);
    T* v = scratch.take<T>(round_up(count, kW));
    T* sums = scratch.take<T>(round_up(count, kW));
    const Element* from = static_cast<const Element*>(args.v) + track.at(args.v_stride, 0) + first;
    for (std::int64_t at = 0; at < count; at += kW) {
      store(v + at, load(from + at, lanes(count - at)));
      store(sums + at, V{});
    }
    const T* c = static_cast<const T*>(args.c) + task * args.K * args.V + first;
    T* c_last = static_cast<T*>(args.c_last) + task * args.K * args.V + first;
    for (std::int64_t row = 0; row < args.K; row += kRows) {
      const int height = static_cast<int>(std::min<std::int64_t>(kRows, args.K - row));
      with_constant<kRows>(height, [&](auto h) {
        if (stream) {
          rows<h(), true>(c, c_last, count, head, row, v, sums);
        } else {
          rows<h(), false>(c, c_last, count, head, row, v, sums);
        }
      });
    }
    Element* h = static_cast<Element*>(args.h) + task * args.V + first;
    for (std::int64_t at = 0; at < count; at += kW) {
      store(h + at, load(static_cast<const T*>(sums + at)) * head.h_scale, lanes(count - at));
    }
  }

  std::int64_t head_bytes() const {
    return 2 * round_up(args.K, kW) * static_cast<std::int64_t>(sizeof(T));
  }

  void whole_head(std::int64_t task) const {
    const TaskScope scope;
    Scratch scratch(static_cast<std::size_t>(head_bytes()), 2);
    const Head head = begin(task, scratch);
    memory(task, head, 0, args.V);
  }

  // Few heads: every core takes columns of each in turn.
  void by_columns(std::int64_t heads) const {
    Scratch scratch(static_cast<std::size_t>(heads * (head_bytes() + sizeof(Head))),
                    static_cast<int>(2 * heads + 1));
    Head* ready = scratch.take<Head>(heads);
    {
      const TaskScope scope;
      for (std::int64_t task = 0; task < heads; ++task) ready[task] = begin(task, scratch);
    }
    const std::int64_t blocks = (args.V + columns - 1) / columns;
    parallel_for(heads * blocks, [&](std::int64_t part) {
      const TaskScope scope;
      const std::int64_t task = part / blocks, first = part % blocks * columns;
      memory(task, ready[task], first, std::min(columns, args.V - first));
    });
  }
};

}  // namespace

void mlstm_step(const MLSTMForward& args) {
  const std::int64_t heads = args.B * args.H, elements = heads * args.K * args.V;
  if (heads == 0) return;
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = compute_t<decltype(element)>;
    const std::int64_t wanted = (2 * num_threads() + heads - 1) / heads;  // blocks of a head
    const std::int64_t columns = round_up((args.V + wanted - 1) / wanted, kColumns);
    const bool large = elements * static_cast<std::int64_t>(sizeof(T)) >= kStreamBytes;
    const StepTask<decltype(element)> step{args, columns, large && args.c != args.c_last};
    if (elements < kSerialElements || num_threads() == 1) {
      for (std::int64_t task = 0; task < heads; ++task) step.whole_head(task);
    } else if (columns >= args.V) {
      parallel_for(heads, [&](std::int64_t task) { step.whole_head(task); });
    } else {
      step.by_columns(heads);
    }
  });
}

}  // namespace xlstm::XLSTM_ISA
