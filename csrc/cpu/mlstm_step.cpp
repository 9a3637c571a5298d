// A few steps of the mLSTM on CPU cores: the equations in xlstm_kernels/cells/mlstm.py, c read once and
// written once, however many tokens go by in between.
// Source: xLSTM, arXiv 2405.04517, section 2.3; the sigmoid input gate: arXiv 2503.14376.
// Tensors: launch.h. A head's gates, n, m and divisors come first; the memory follows in tasks of one
// block of columns of c each: a whole head, or less of it where heads are too few for the cores.
#include <algorithm>
#include <cstdint>
#include <type_traits>

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

// What a row k of c needs of a token: c' = keep c + take_k[k] v, h += q[k] c', all h times `h_scale`.
template <class T>
struct StepToken {
  T *q, *take_k;
  T keep, h_scale;
};
constexpr int kTokenArrays = 2;

// Columns [first, first + count) of a head's c, and of v and h in scratch, in the compute type.
// Stored is the type of c's elements.
template <class T, class Stored>
struct StepBlock {
  std::int64_t first, count, padded;
  const Stored* c;
  Stored** c_last;  // after each token, or null
  T *v, *sums;      // (tokens, padded)
};

struct Sizes {
  std::int64_t T, K, V;
};

// Rows [row, row + kH) of a block past all tokens, and their part of the sums.
template <int kH, bool kStream, bool kOneToken, class T, class Stored>
void row_group(const StepBlock<T, Stored>& block, const StepToken<T>* tokens, Sizes sizes,
               std::int64_t row) {
  using V = Vec<T>;
  constexpr int kW = kLanes<T>;
  // A copy: the compiler takes every store for one into what `block` points to.
  Stored* to = block.c_last[0];
  const Stored* from = block.c + row * sizes.V;
  V q[kH], k[kH], keep;
  const auto take = [&](const StepToken<T>& token) {
    keep = broadcast<V>(token.keep);
#pragma GCC unroll 8
    for (int r = 0; r < kH; ++r) {
      q[r] = broadcast<V>(token.q[row + r]);
      k[r] = broadcast<V>(token.take_k[row + r]);
    }
  };
  if (kOneToken) take(tokens[0]);
  const auto columns_at = [&](std::int64_t at, int count) {
    V c[kH];
#pragma GCC unroll 8
    for (int r = 0; r < kH; ++r) c[r] = load(from + r * sizes.V + at, count);
    for (std::int64_t t = 0; t < (kOneToken ? 1 : sizes.T); ++t) {
      if (!kOneToken) {
        take(tokens[t]);
        to = block.c_last[t];
      }
      T* sums = block.sums + t * block.padded + at;
      const V v = load(static_cast<const T*>(block.v + t * block.padded + at));
      V sum = load(static_cast<const T*>(sums));
#pragma GCC unroll 8
      for (int r = 0; r < kH; ++r) {
        c[r] = multiply_add(keep, c[r], k[r] * v);
        sum += q[r] * c[r];
      }
      store(sums, sum);
      if (to == nullptr) continue;
#pragma GCC unroll 8
      for (int r = 0; r < kH; ++r) {
        Stored* row_to = to + (row + r) * sizes.V + at;
        if (kStream && count == kW) {
          store_streaming(row_to, c[r]);
        } else {
          store(row_to, c[r], count);
        }
      }
    }
  };
  std::int64_t at = 0;
  for (; at + kW <= block.count; at += kW) columns_at(at, kW);
  if (at < block.count) columns_at(at, static_cast<int>(block.count - at));
}

template <bool kStream, bool kOneToken, class T, class Stored>
void all_rows(const StepBlock<T, Stored>& block, const StepToken<T>* tokens, Sizes sizes) {
  std::int64_t row = 0;
  for (; row + kRows <= sizes.K; row += kRows) {
    row_group<kRows, kStream, kOneToken>(block, tokens, sizes, row);
  }
  for (; row < sizes.K; ++row) row_group<1, kStream, kOneToken>(block, tokens, sizes, row);
}

template <class T, class Stored>
void past_tokens(const StepBlock<T, Stored>& block, const StepToken<T>* tokens, Sizes sizes,
                 bool stream) {
  constexpr bool kCanStream = std::is_same_v<T, Stored>;
  if (sizes.T == 1) {
    stream ? all_rows<kCanStream, true>(block, tokens, sizes)
           : all_rows<false, true>(block, tokens, sizes);
  } else {
    stream ? all_rows<kCanStream, false>(block, tokens, sizes)
           : all_rows<false, false>(block, tokens, sizes);
  }
}

template <class Element, class Stored>
struct StepTask {
  const MLSTMStep& args;
  std::int64_t columns;  // of a block
  bool stream;

  using T = compute_t<Element>;
  using V = Vec<T>;
  using Token = StepToken<T>;
  using Block = StepBlock<T, Stored>;
  static constexpr int kW = kLanes<T>;

  static int lanes(std::int64_t left) { return static_cast<int>(left < kW ? left : kW); }

  // Rows of a pool, negative for none.
  std::int64_t from_row(const Track& track) const {
    return args.from ? args.from[track.sequence] : track.sequence;
  }
  std::int64_t to_row(const Track& track, std::int64_t t) const {
    if (args.to) return args.to[track.sequence * args.T + t];
    return t == args.T - 1 ? track.sequence : -1;
  }

  static T gate(const void* tensor, DType dtype, std::int64_t at) {
    T value{};
    dispatch_dtype(dtype, [&](auto element) {
      using Gate = decltype(element);
      const Gate* from = static_cast<const Gate*>(tensor) + at;
      if constexpr (std::is_floating_point_v<Gate>) {
        value = static_cast<T>(*from);
      } else {
        value = load(from, 1)[0];
      }
    });
    return value;
  }

  // Everything of `token` but its divisor, and m after it.
  void gates(const Track& track, std::int64_t t, Token& token, T& m) const {
    const bool sigmoid_gate = args.input_gate == InputGate::kSigmoid;
    const T i = gate(args.i, args.i_dtype, track.at(args.i_stride, t));
    V pair = broadcast<V>(i);
    pair[0] = gate(args.f, args.f_dtype, track.at(args.f_stride, t));
    const V logs = log_sigmoid<T>(pair);
    const T kept = logs[0] + m, taken = sigmoid_gate ? logs[1] : i;
    m = sigmoid_gate ? T{0} : taken > kept ? taken : kept;
    const T base = finite_base(m);
    pair = broadcast<V>(taken - base);
    pair[0] = kept - base;
    const V factors = exp_factor(pair);
    token.keep = factors[0];
    const T take = factors[1], scale = static_cast<T>(args.scale);
    const Element* q = static_cast<const Element*>(args.q) + track.at(args.q_stride, t);
    const Element* k = static_cast<const Element*>(args.k) + track.at(args.k_stride, t);
    for (std::int64_t c = 0; c < args.K; c += kW) {
      const int count = lanes(args.K - c);
      store(token.q + c, load(q + c, count) * scale);
      store(token.take_k + c, load(k + c, count) * take);
    }
  }

  // Fills `tokens`, unless the head has no state; writes each n and m that is kept.
  void begin(std::int64_t task, Token* tokens, Scratch& scratch) const {
    const Track track(args, task);
    const std::int64_t padded = round_up(args.K, kW), row = from_row(track);
    T* n = scratch.take<T>(padded);
    for (std::int64_t t = 0; t < args.T; ++t) {
      tokens[t] = {scratch.take<T>(padded), scratch.take<T>(padded), T{}, T{}};
    }
    T m{};
    for (std::int64_t c = 0; c < padded; c += kW) store(n + c, V{});
    if (row >= 0) {
      const T* from = static_cast<const T*>(args.n) + row * args.from_stride[1];
      std::copy_n(from + track.head * args.K, args.K, n);
      m = static_cast<const T*>(args.m)[row * args.from_stride[2] + track.head];
    }
    for (std::int64_t t = 0; t < args.T; ++t) {
      if (row >= 0) add_token(track, t, tokens[t], n, m);
      const std::int64_t to = to_row(track, t);
      if (to < 0) continue;
      T* n_last = static_cast<T*>(args.n_last) + to * args.to_stride[1] + track.head * args.K;
      std::copy_n(n, args.K, n_last);
      static_cast<T*>(args.m_last)[to * args.to_stride[2] + track.head] = m;
    }
  }

  // n and m after token t, and what the memory needs of it.
  void add_token(const Track& track, std::int64_t t, Token& token, T* n, T& m) const {
    gates(track, t, token, m);
    V den{};
    for (std::int64_t c = 0; c < args.K; c += kW) {
      const V n_c = token.keep * load(static_cast<const T*>(n + c)) +
                    load(static_cast<const T*>(token.take_k + c));
      store(n + c, n_c);
      den += n_c * load(static_cast<const T*>(token.q + c));
    }
    token.h_scale = row_scale(args, horizontal_sum(den), m).h;
  }

  void memory(std::int64_t task, const Token* tokens, std::int64_t first,
              std::int64_t count) const {
    const Track track(args, task);
    const std::int64_t padded = round_up(count, kW), row = from_row(track);
    Scratch scratch(static_cast<std::size_t>(args.T * (2 * padded * std::int64_t{sizeof(T)} +
                                                       std::int64_t{sizeof(Stored*)})),
                    3);
    const std::int64_t corner = track.head * args.K * args.V + first;
    const Block block{
        first,
        count,
        padded,
        row < 0 ? nullptr : static_cast<const Stored*>(args.c) + row * args.from_stride[0] + corner,
        scratch.take<Stored*>(args.T),
        scratch.take<T>(args.T * padded),
        scratch.take<T>(args.T * padded)};
    for (std::int64_t t = 0; t < args.T; ++t) {
      const std::int64_t to = to_row(track, t);
      block.c_last[t] =
          to < 0 ? nullptr : static_cast<Stored*>(args.c_last) + to * args.to_stride[0] + corner;
      const Element* v = static_cast<const Element*>(args.v) + track.at(args.v_stride, t) + first;
      for (std::int64_t at = 0; at < count; at += kW) {
        store(block.v + t * padded + at, load(v + at, lanes(count - at)));
        store(block.sums + t * padded + at, V{});
      }
    }
    if (row < 0) return zero(block, track);
    past_tokens<T, Stored>(block, tokens, {args.T, args.K, args.V}, stream);
    for (std::int64_t t = 0; t < args.T; ++t) write_h(block, track, t, tokens[t].h_scale);
  }

  void write_h(const Block& block, const Track& track, std::int64_t t, T scale) const {
    Element* h = static_cast<Element*>(args.h) + track.token(args, t) * args.V + block.first;
    const T* sums = block.sums + t * block.padded;
    for (std::int64_t at = 0; at < block.count; at += kW) {
      store(h + at, load(sums + at) * scale, lanes(block.count - at));
    }
  }

  // Of a sequence without a state.
  void zero(const Block& block, const Track& track) const {
    for (std::int64_t t = 0; t < args.T; ++t) {
      write_h(block, track, t, T{0});
      if (block.c_last[t] == nullptr) continue;
      for (std::int64_t row = 0; row < args.K; ++row) {
        std::fill_n(block.c_last[t] + row * args.V, block.count, Stored{});
      }
    }
  }

  std::int64_t head_bytes() const {
    return (1 + kTokenArrays * args.T) * round_up(args.K, kW) * std::int64_t{sizeof(T)} +
           args.T * std::int64_t{sizeof(Token)};
  }
  int head_arrays() const { return static_cast<int>(2 + kTokenArrays * args.T); }

  void whole_head(std::int64_t task) const {
    const TaskScope scope;
    Scratch scratch(static_cast<std::size_t>(head_bytes()), head_arrays());
    Token* tokens = scratch.take<Token>(args.T);
    begin(task, tokens, scratch);
    memory(task, tokens, 0, args.V);
  }

  // Few heads: every core takes columns of each in turn.
  void by_columns(std::int64_t heads) const {
    Scratch scratch(static_cast<std::size_t>(heads * head_bytes()),
                    static_cast<int>(heads) * head_arrays());
    Token* tokens = scratch.take<Token>(heads * args.T);
    {
      const TaskScope scope;
      for (std::int64_t task = 0; task < heads; ++task) {
        begin(task, tokens + task * args.T, scratch);
      }
    }
    const std::int64_t blocks = (args.V + columns - 1) / columns;
    parallel_for(heads * blocks, [&](std::int64_t part) {
      const TaskScope scope;
      const std::int64_t task = part / blocks, first = part % blocks * columns;
      memory(task, tokens + task * args.T, first, std::min(columns, args.V - first));
    });
  }
};

template <class Element, class Stored>
void run(const MLSTMStep& args) {
  const std::int64_t heads = args.B * args.H, elements = heads * args.K * args.V;
  const std::int64_t wanted = (2 * num_threads() + heads - 1) / heads;  // blocks of a head
  const std::int64_t columns = round_up((args.V + wanted - 1) / wanted, kColumns);
  const bool large = elements * std::int64_t{sizeof(Stored)} >= kStreamBytes;
  const StepTask<Element, Stored> step{args, columns, large && args.c != args.c_last};
  if (elements * args.T < kSerialElements || num_threads() == 1) {
    for (std::int64_t task = 0; task < heads; ++task) step.whole_head(task);
  } else if (columns >= args.V) {
    parallel_for(heads, [&](std::int64_t task) { step.whole_head(task); });
  } else {
    step.by_columns(heads);
  }
}

}  // namespace

void mlstm_step(const MLSTMStep& args) {
  if (args.B * args.H * args.T == 0) return;
  dispatch_dtype(args.dtype, [&](auto element) {
    using Element = decltype(element);
    using T = compute_t<Element>;
    if constexpr (std::is_same_v<T, float>) {
      if (args.c_dtype == DType::kBFloat16) return run<Element, bf16>(args);
    }
    run<Element, T>(args);
  });
}

}  // namespace xlstm::XLSTM_ISA
