// How the recurrence is cut into blocks, warps and fragments; forward and backward share it.
//
// One block runs one head of kColumns sequences over all of time, so nothing is synchronised between
// blocks. R is the left operand of a matrix product on tensor cores: it stays in registers, in the
// layout of its fragments, and what does not fit lies in shared memory in the same layout. The right
// operand has a column for each sequence: h in the forward pass, the gates' gradients in the backward.
// States live in the registers of the thread that holds their gates.
//
// Operands are 32-bit words. Where R is bfloat16 a word is two of them, and the right operand is a sum
// of two: 16 bits, of which x and h keep 8. Otherwise a word is a float32, of which tensor cores read 11
// bits (tf32); both operands are sums of two such parts, and three products leave an error of float32's
// size, two where R is float16 and has no second part. One product of the first parts is what is left
// where tf32 is enough.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/host_device.h"
#include "common/integers.h"
#include "cuda/element.h"
#include "cuda/mma.h"
#include "cuda/shared.h"
#include "launch.h"

namespace xlstm {

constexpr int kGates = 4;
constexpr int kColumns = 8;    // sequences of a block
constexpr int kTileWords = 8;  // of a row of a product's operands
constexpr int kPadWords = 4;   // rows of shared memory start four banks apart

// The launch shapes: for operands of kPerWord elements a word, and heads of up to kWidth units.
template <bool kForward, int kPerWord, int kWidth>
struct RecurrenceShape {
  // A warp has 8 units with all their gates, or 16 units that gradients flow to.
  static constexpr int kUnits = kForward ? 8 : 16;
  static constexpr int kThreads = kWidth / kUnits * 32;
  static constexpr int kRowTiles = kForward ? 2 : 1;  // products of 16 rows
  static constexpr int kDepth = (kForward ? kWidth : kGates * kWidth) / (kPerWord * kTileWords);
  static constexpr int kTiles = kRowTiles * kDepth;  // fragments of R in a warp
  // Those in registers. Found by compiling: with more, registers spill.
  static constexpr int kHeld = kWidth < 128
                                   ? kTiles - (!kForward && kPerWord == 1 ? kWidth / 16 : 0)
                               : kForward ? (kPerWord == 1 ? 6 : 8)
                                          : (kPerWord == 1 ? 18 : 24);
  // Splitting R again at each step takes less room than both parts, which the compiler would keep.
  static constexpr bool kSplitEachStep = kPerWord == 1 && (!kForward || kWidth >= 128);
  // Fetching x a step ahead; where a product takes long, it hides the latency of L2 as well.
  static constexpr bool kFetchAhead = kWidth < (kPerWord == 1 ? 64 : 128);
  static constexpr int kRowWords = kDepth * kTileWords + kPadWords;
  static constexpr int kPlaneWords = kColumns * kRowWords;
  static constexpr int kStepWords = kPerWord * kPlaneWords;  // bfloat16 is in two parts
  static constexpr int kOperandWords = 2 * kStepWords;       // of this step and the next
  static constexpr int kSharedBytes = 4 * (kOperandWords + 4 * (kTiles - kHeld) * kThreads);
};

// X(elements a word, width) of every shape.
#define XLSTM_RECURRENCE_SHAPES(X) X(1, 32) X(1, 64) X(1, 128) X(2, 32) X(2, 64) X(2, 128)

// Calls f(constant) with the narrowest width that holds D.
template <int kPerWord, class F>
void dispatch_width(std::int64_t D, F&& f) {
  bool done = false;
  const auto run_if = [&](auto per_word, auto width) {
    if constexpr (per_word() == kPerWord) {
      if (!done && D <= width()) f(width), done = true;
    }
  };
#define XLSTM_RECURRENCE_RUN(per_word, width) \
  run_if(std::integral_constant<int, per_word>{}, std::integral_constant<int, width>{});
  XLSTM_RECURRENCE_SHAPES(XLSTM_RECURRENCE_RUN)
#undef XLSTM_RECURRENCE_RUN
}

// Where a lane stands in the fragments of mma.h.
struct Lane {
  __device__ Lane()
      : warp(static_cast<int>(threadIdx.x) / 32),
        group(static_cast<int>(threadIdx.x) % 32 / 4),
        part(static_cast<int>(threadIdx.x) % 4) {}
  int warp, group, part;
};

template <int kPerWord>
__device__ __forceinline__ std::uint32_t pack_word(const float (&x)[kPerWord]) {
  if constexpr (kPerWord == 1) {
    return __float_as_uint(x[0]);
  } else {
    bf16 parts[2];
    store(&parts[0], x[0]), store(&parts[1], x[1]);
    return parts[0].bits | static_cast<std::uint32_t>(parts[1].bits) << 16;
  }
}

// x as a sum of two.
__device__ __forceinline__ void store_parts(bf16* high, bf16* low, float x) {
  bf16 nearest;
  store(&nearest, x);
  *high = nearest;
  store(low, x - load(&nearest));
}

// Element `at` of a row of right operands.
template <class Shape, int kPerWord>
__device__ __forceinline__ void store_operand(std::uint32_t* row, int at, float x) {
  if constexpr (kPerWord == 1) {
    row[at] = __float_as_uint(x);
  } else {
    bf16* const high = reinterpret_cast<bf16*>(row) + at;
    store_parts(high, high + 2 * Shape::kPlaneWords, x);
  }
}

// Of x, h or a gradient.
__device__ __forceinline__ float load_element(const void* base, std::int64_t at, DType dtype) {
  return dtype == DType::kFloat32   ? load(static_cast<const float*>(base) + at)
         : dtype == DType::kFloat16 ? load(static_cast<const f16*>(base) + at)
                                    : load(static_cast<const bf16*>(base) + at);
}
__device__ __forceinline__ void store_element(void* base, std::int64_t at, DType dtype, float x) {
  if (dtype == DType::kFloat32) return store(static_cast<float*>(base) + at, x);
  if (dtype == DType::kFloat16) return store(static_cast<f16*>(base) + at, x);
  store(static_cast<bf16*>(base) + at, x);
}

// A sum of products. Tensor cores cut what does not fit off a sum: where float32's accuracy is asked
// for, a product starts from zero and is added with rounding, and the errors stay as many and as small
// as those of plain float32.
template <int kPerWord>
struct ProductSum {
  float parts[kPerWord][4]{};
  __device__ __forceinline__ float operator[](int at) const {
    return kPerWord == 1 ? parts[0][at] : parts[0][at] + parts[1][at];
  }

  // Adds a b; where b is in two parts, b[1] is the second. `products`: how many float32 words take.
  __device__ __forceinline__ void add(const std::uint32_t (&a)[4],
                                      const std::uint32_t (&b)[kPerWord][2], int products) {
    if constexpr (kPerWord == 2) {
      mma_bf16(parts[0], a, b[0]);
      mma_bf16(parts[1], a, b[1]);
    } else {
      std::uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
      for (int w = 0; w < 4; ++w) split(a[w], a_high[w], a_low[w]);
#pragma unroll
      for (int w = 0; w < 2; ++w) split(b[0][w], b_high[w], b_low[w]);
      float product[4]{};
      if (products > 2) mma_tf32(product, a_low, b_high);
      if (products > 1) mma_tf32(product, a_high, b_low);
      mma_tf32(product, a_high, b_high);
#pragma unroll
      for (int at = 0; at < 4; ++at) parts[0][at] += product[at];
    }
  }

  // high is x to 11 bits, rounded; low the rest, exact.
  static __device__ __forceinline__ void split(std::uint32_t x, std::uint32_t& high,
                                               std::uint32_t& low) {
    high = (x + 0x1000u) & 0xffffe000u;
    low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
  }
};

struct alignas(16) FragmentWords {
  std::uint32_t w[4];
};

// element(word, at): element `at` of a word.
template <int kPerWord, class F>
__device__ __forceinline__ FragmentWords make_fragment(F element) {
  FragmentWords words;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float x[kPerWord];
#pragma unroll
    for (int at = 0; at < kPerWord; ++at) x[at] = element(w, at);
    words.w[w] = pack_word<kPerWord>(x);
  }
  return words;
}

// A fragment in registers. kSplitEachStep: what is computed of it is not kept there as well.
template <bool kSplitEachStep>
__device__ __forceinline__ FragmentWords kept(FragmentWords words) {
  if (kSplitEachStep) {
#pragma unroll
    for (int w = 0; w < 4; ++w) opaque(words.w[w]);
  }
  return words;
}

// held[i] = fragment(i). A loop over a few at a time: nvcc would otherwise find the places of all
// elements before it fetches the first, and keep more than registers hold.
template <int kHeld, class F>
__device__ __forceinline__ void fill_held(FragmentWords (&held)[kHeld], F fragment) {
  constexpr int kAtOnce = kHeld % 4 == 0 ? 4 : 2;
  static_assert(kHeld % kAtOnce == 0, "an odd number of fragments");
#pragma unroll 1
  for (int first = 0; first < kHeld; first += kAtOnce) {
    FragmentWords words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) words[i] = fragment(first + i);
#pragma unroll
    for (int at = 0; at < kHeld; ++at) {
      if (at / kAtOnce * kAtOnce == first) held[at] = words[at % kAtOnce];
    }
  }
}

// R's fragments of one thread: the first in registers, the others in shared memory.
template <class Shape>
struct Matrix {
  static constexpr int kSpilled = Shape::kTiles - Shape::kHeld;
  FragmentWords held[Shape::kHeld];
  FragmentWords* spare;  // [tile][thread]

  // element(tile, word, at): element `at` of a word of the tile's fragment.
  template <int kPerWord, class F>
  __device__ __forceinline__ void fill(Shared& shared, F element) {
    spare = kSpilled ? shared.take<FragmentWords>(kSpilled * Shape::kThreads) : nullptr;
    const auto fragment = [&](int tile) {
      return make_fragment<kPerWord>([&](int w, int at) { return element(tile, w, at); });
    };
    fill_held(held, fragment);
#pragma unroll 1
    for (int tile = 0; tile < kSpilled; ++tile) {
      spare[tile * Shape::kThreads + threadIdx.x] = fragment(Shape::kHeld + tile);
    }
  }

  // sums[m] += row tile m of R times the operand rows.
  template <int kPerWord>
  __device__ __forceinline__ void multiply(const std::uint32_t* rows, const Lane& lane,
                                           int products,
                                           ProductSum<kPerWord> (&sums)[Shape::kRowTiles]) const {
    const std::uint32_t* row = rows + lane.group * Shape::kRowWords + lane.part;
    const auto multiply_column = [&](int k, auto fragment_of) {
      std::uint32_t b[kPerWord][2];
#pragma unroll
      for (int part = 0; part < kPerWord; ++part) {
        const std::uint32_t* from = row + k * kTileWords + part * Shape::kPlaneWords;
        b[part][0] = from[0], b[part][1] = from[4];
      }
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
        sums[m].add(fragment_of(k * Shape::kRowTiles + m).w, b, products);
      }
    };
    constexpr int kInRegisters = Shape::kHeld / Shape::kRowTiles;
#pragma unroll
    for (int k = 0; k < kInRegisters; ++k) {
      multiply_column(k, [&](int tile) { return kept<Shape::kSplitEachStep>(held[tile]); });
    }
    // Not unrolled to the end: nvcc would fetch more ahead than registers hold.
#pragma unroll 2
    for (int k = kInRegisters; k < Shape::kDepth; ++k) {
      multiply_column(k, [&](int tile) {
        return spare[(tile - Shape::kHeld) * Shape::kThreads + threadIdx.x];
      });
    }
  }
};

// Where one sequence of a block lies in the tensors. Offsets out of order give nonsense, but stay
// inside: they are on the device, and looking at them first would stop it.
struct Sequence {
  __device__ Sequence(const Recurrence& args, std::int64_t b)
      : b(b), start(0), length(b < args.B ? static_cast<int>(args.T) : 0) {
    if (!args.starts || b >= args.B) return;
    const int T = static_cast<int>(args.T);
    const auto inside = [T](int at) { return at < 0 ? 0 : at < T ? at : T; };
    start = inside(args.starts[b]);
    const int end = inside(args.starts[b + 1]);
    length = end > start ? end - start : 0;
  }
  // Of a (B, T, ...) tensor with strides of B and T.
  __device__ __forceinline__ std::int64_t offset(const Recurrence& args, std::int64_t stride_b,
                                                 std::int64_t stride_t) const {
    return args.starts ? start * stride_t : b * stride_b;
  }
  // The row before step `t` among the checkpoints.
  __device__ __forceinline__ std::int64_t checkpoint(const Recurrence& args, int t) const {
    const std::int64_t chunks = ceil_div(args.T, kCheckpointInterval);
    return (args.starts ? start / kCheckpointInterval + b : b * chunks) + t / kCheckpointInterval;
  }

  std::int64_t b;
  int start, length;
};

// One of the two sequences whose units a thread has.
struct Column {
  __device__ Column(const Recurrence& args, std::int64_t b)
      : length(Sequence(args, b).length),
        b(static_cast<int>(b)),
        token(Sequence(args, b).offset(args, args.T, 1)) {}
  int length, b;
  std::int64_t token;  // the first, in (B, T, ...)
};

// A head and tile `tile` of the sequences.
struct Work {
  __device__ Work(const Recurrence& args, int head, int tile)
      : head(head), first(tile * kColumns), longest(0) {
    for (int column = 0; column < kColumns; ++column) {
      const int length = Sequence(args, first + column).length;
      longest = length > longest ? length : longest;
    }
  }
  int head, first, longest;
};

}  // namespace xlstm
