// One step of the recurrence, for decoding: no loop, so nothing of R is worth keeping.
//   raw = x + R h + b        state' = Cell::step(raw, state)
// Source: arXiv 2405.04517, section 2.2; cells/*.h.
// Tensors: launch.h, but R as it came: float32, bfloat16 or float16. T = 1.
// Grid: (tile of sequences, kWarps units of H x D, over two axes); a warp reads the four rows of R of
//   one unit, once, for all sequences of its tile. Sums, gates and states float32. Saved: nothing.
#include <algorithm>

#include "cells/cells.h"
#include "cuda/kernel_launch.h"
#include "cuda/recurrence_launch.h"
#include "cuda/recurrence_unit.h"

namespace xlstm {
namespace {

constexpr int kWarps = 4;
constexpr int kAtOnce = 4;  // neighbours along the sum that a lane reads of each row
constexpr int kSums = kGates * kColumns;
constexpr std::int64_t kMostBlocksAcross = 65535;  // along a grid's second and third axis
static_assert(kSums == 32, "a lane ends up with one");

template <class T>
struct alignas(kAtOnce * sizeof(T)) Neighbours {
  T x[kAtOnce];
};

// Sums of a warp: lane l gets that of element l over all lanes.
template <int kCount>
__device__ __forceinline__ float sum_lanes(const float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = threadIdx.x & kHalf;
    float half[kHalf];
#pragma unroll
    for (int at = 0; at < kHalf; ++at) {
      const float given = upper ? x[at] : x[at + kHalf];
      half[at] = (upper ? x[at + kHalf] : x[at]) + __shfl_xor_sync(0xffffffffu, given, kHalf);
    }
    return sum_lanes(half);
  }
}

// sums[column, gate] += the lane's part of R h. Rows of R and of h are `r_stride`, `h_stride` apart.
template <int kWide, class T>
__device__ __forceinline__ void multiply(const T* r, std::int64_t r_stride, const float* h,
                                         std::int64_t h_stride, int columns, int D, int lane,
                                         float (&sums)[kSums]) {
  const auto load_all = [](const auto* from, float (&to)[kWide]) {
    if constexpr (kWide == kAtOnce) {
      const auto words = *reinterpret_cast<const Neighbours<std::decay_t<decltype(*from)>>*>(from);
#pragma unroll
      for (int at = 0; at < kWide; ++at) to[at] = load(&words.x[at]);
    } else {
      to[0] = load(from);
    }
  };
#pragma unroll 2
  for (int k = lane * kWide; k < D; k += 32 * kWide) {
    float rows[kGates][kWide];
#pragma unroll
    for (int g = 0; g < kGates; ++g) load_all(r + g * r_stride + k, rows[g]);
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (column >= columns) continue;  // break would leave a loop, and sums in memory
      float x[kWide];
      load_all(h + column * h_stride + k, x);
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
#pragma unroll
        for (int at = 0; at < kWide; ++at) sums[column * kGates + g] += rows[g][at] * x[at];
      }
    }
  }
}

template <class Cell, class T>
__global__ void __launch_bounds__(32 * kWarps)
    recurrence_step_kernel(RecurrenceForward args, bool wide) {
  const Lane lane;
  const int D = static_cast<int>(args.D), lane_id = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t block = static_cast<std::int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  const std::int64_t at = block * kWarps + lane.warp;
  if (at >= args.H * args.D) return;
  const int head = static_cast<int>(at / D), unit = static_cast<int>(at % D);
  const Work work(args, head, static_cast<int>(blockIdx.x));
  CellOptions options;
  options.n_floor = args.n_floor;
  // Four lanes have the gates of a sequence; the first of them has its states.
  const int gate = lane_id % kGates;
  Unit<Cell> mine(args, work, lane_id / kGates, gate == 0 ? unit : D);
  mine.fetch(args, 0);
  float bias[kGates]{};
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    if (args.b) bias[g] = static_cast<const float*>(args.b)[g * args.H * args.D + at];
  }

  float sums[kSums]{};
  if (args.state) {
    const T* r = static_cast<const T*>(args.r) + at * D;
    const std::int64_t r_stride = args.H * args.D * args.D, h_stride = args.H * args.D;
    const float* h = static_cast<const float*>(args.state) + work.first * h_stride + head * D;
    const std::int64_t left = args.B - work.first;
    const int columns = left < kColumns ? static_cast<int>(left) : kColumns;
    if (wide) {
      multiply<kAtOnce>(r, r_stride, h, h_stride, columns, D, lane_id, sums);
    } else {
      multiply<1>(r, r_stride, h, h_stride, columns, D, lane_id, sums);
    }
  }
  const float sum = sum_lanes(sums);
  float product[kGates];
#pragma unroll
  for (int g = 0; g < kGates; ++g) product[g] = __shfl_sync(0xffffffffu, sum, lane_id - gate + g);
  if (gate != 0) return;
  mine.step(args, 0, at, product, mine.x, bias, options);
  mine.finish(args, at);
}

template <class Cell, class T>
void run(const RecurrenceForward& args, void* stream) {
  LaunchShape shape;
  const std::int64_t blocks = ceil_div(args.H * args.D, kWarps);
  const std::int64_t across = std::min(blocks, kMostBlocksAcross);
  shape.grid = dim3(static_cast<unsigned>(ceil_div(args.B, kColumns)),
                    static_cast<unsigned>(across), static_cast<unsigned>(ceil_div(blocks, across)));
  shape.block = 32 * kWarps;
  const auto aligned = [](const void* at, std::size_t bytes) {
    return reinterpret_cast<std::uintptr_t>(at) % bytes == 0;
  };
  const bool wide = args.D % kAtOnce == 0 && aligned(args.r, sizeof(Neighbours<T>)) &&
                    aligned(args.state, sizeof(Neighbours<float>));
  launch("recurrence_step", shape, stream, recurrence_step_kernel<Cell, T>, args, wide);
}

}  // namespace

void recurrence_step_cuda(const RecurrenceForward& args, DType r_dtype, void* stream) {
  XLSTM_ISA::dispatch_cell(args.cell, [&](auto cell) {
    using Cell = decltype(cell);
    if (r_dtype == DType::kBFloat16) return run<Cell, bf16>(args, stream);
    if (r_dtype == DType::kFloat16) return run<Cell, f16>(args, stream);
    run<Cell, float>(args, stream);
  });
}

}  // namespace xlstm
