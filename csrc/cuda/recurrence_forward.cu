// Forward recurrence over time of a cell with a block-diagonal recurrent matrix, R in registers.
//   raw_t = x_t + R h_{t-1} + b        state_t = Cell::step(raw_t, state_{t-1})
// Source: arXiv 2405.04517, section 2.2; cells/*.h.
// Tensors: launch.h. h between steps: [column][unit] in shared memory, twice.
// Grid: (tile of sequences, head); a warp has the four gates of 8 units, so that a thread holds all of
//   a unit's, for two sequences. Sums, gates and states float32; one barrier a step. Saved: raw, and
//   the states before every kCheckpointInterval-th step.
#include "cells/cells.h"
#include "cuda/kernel_launch.h"
#include "cuda/recurrence.h"
#include "cuda/recurrence_launch.h"

namespace xlstm {
namespace {

using XLSTM_ISA::CellOptions;

// One unit of one sequence; `at` is the unit's place among H x D.
template <class Cell>
struct Unit {
  static constexpr int kStates = Cell::kStates;

  __device__ __forceinline__ Unit(const RecurrenceForward& args, const BlockOfWork& work,
                                  int column, int unit)
      : column(args, work.first + column), end(unit < args.D ? this->column.length : 0) {
    const Sequence sequence(args, this->column.b);
    x_at = sequence.offset(args, args.x_stride[0], args.x_stride[1]) +
           work.head * args.x_stride[3] + unit;
    const bool given = args.state && unit < args.D && this->column.b < args.B;
    const std::int64_t at = state_offset(args, work.head * args.D + unit);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      state[s] =
          given ? static_cast<const float*>(args.state)[at + s * args.B * args.H * args.D] : 0.0f;
    }
  }

  __device__ __forceinline__ std::int64_t state_offset(const Recurrence& args,
                                                       std::int64_t at) const {
    return column.b * args.H * args.D + at;
  }

  __device__ __forceinline__ void fetch(const RecurrenceForward& args, int t) {
    if (t >= end) return;
    const std::int64_t from = x_at + t * args.x_stride[1];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      x[g] = load_element(args.x, from + g * args.x_stride[2], args.dtype);
    }
  }

  // From R h, and this step's x.
  __device__ __forceinline__ void step(const RecurrenceForward& args, int t, std::int64_t at,
                                       const float (&product)[kGates], const float (&x_t)[kGates],
                                       const float (&b)[kGates], const CellOptions& options) {
    if (t >= end) return;
    const std::int64_t width = args.H * args.D, token = column.token + t;
    if (args.checkpoints && t % kCheckpointInterval == 0) {
      const std::int64_t row = Sequence(args, column.b).checkpoint(args, t);
      float* to = static_cast<float*>(args.checkpoints) + row * kStates * width + at;
#pragma unroll
      for (int s = 0; s < kStates; ++s) to[s * width] = state[s];
    }
    float raw[kGates], next[kStates], aux[Cell::kAux];
#pragma unroll
    for (int g = 0; g < kGates; ++g) raw[g] = product[g] + x_t[g] + b[g];
    if (args.raw) {
      float* to = static_cast<float*>(args.raw) + token * kGates * width + at;
#pragma unroll
      for (int g = 0; g < kGates; ++g) to[g * width] = raw[g];
    }
    Cell::template step<false>(raw, state, next, aux, options);
#pragma unroll
    for (int s = 0; s < kStates; ++s) state[s] = next[s];
    store_element(args.h, token * width + at, args.dtype, next[0]);
  }

  __device__ __forceinline__ void finish(const RecurrenceForward& args, std::int64_t at) const {
    if (column.b >= args.B) return;
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      const std::int64_t plane = s * args.B * args.H * args.D;
      static_cast<float*>(args.last)[plane + state_offset(args, at)] = state[s];
    }
  }

  Column column;
  int end;            // steps of this unit: none where it only fills up the shape
  std::int64_t x_at;  // of gate i at time 0
  float state[kStates];
  float x[kGates]{};  // fetched last
};

template <class Cell, int kPerWord, int kWidth>
__global__ void __launch_bounds__(RecurrenceShape<true, kPerWord, kWidth>::kThreads, 1)
    recurrence_forward_kernel(RecurrenceForward args, bool short_r) {
  using Shape = RecurrenceShape<true, kPerWord, kWidth>;
  Shared shared;
  const BlockOfWork work(args);
  const Lane lane;
  const int unit = lane.warp * Shape::kUnits + lane.group;
  CellOptions options;
  options.n_floor = args.n_floor;

  std::uint32_t* rows = shared.take<std::uint32_t>(Shape::kOperandWords);
  Matrix<Shape> matrix;
  matrix.template fill<kPerWord>(shared, [&](int tile, int w, int at) {
    const std::int64_t gate = tile % 2 * 2 + w % 2;
    const int in = (tile / 2 * kTileWords + lane.part + w / 2 * 4) * kPerWord + at;
    const std::int64_t row = (gate * args.H + work.head) * args.D + unit;
    return unit < args.D && in < args.D ? static_cast<const float*>(args.r)[row * args.D + in]
                                        : 0.0f;
  });
  float b[kGates]{};
  if (args.b && unit < args.D) {
    for (int g = 0; g < kGates; ++g) {
      b[g] = static_cast<const float*>(args.b)[(g * args.H + work.head) * args.D + unit];
    }
  }

  using U = Unit<Cell>;
  U units[2] = {{args, work, lane.part * 2, unit}, {args, work, lane.part * 2 + 1, unit}};
  const std::int64_t at = work.head * args.D + unit;
  const auto put = [&](std::uint32_t* to) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      store_operand<Shape, kPerWord>(to + (lane.part * 2 + j) * Shape::kRowWords, unit,
                                     units[j].state[0]);
    }
  };
  put(rows);
  if (Shape::kFetchAhead) {
#pragma unroll
    for (int j = 0; j < 2; ++j) units[j].fetch(args, 0);
  }
  __syncthreads();

#pragma unroll 1
  for (int t = 0; t < work.longest; ++t) {
    float x[2][kGates];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!Shape::kFetchAhead) units[j].fetch(args, t);
      for (int g = 0; g < kGates; ++g) x[j][g] = units[j].x[g];
      if (Shape::kFetchAhead) units[j].fetch(args, t + 1);
    }
    ProductSum<kPerWord> sums[2];
    matrix.multiply(rows + t % 2 * Shape::kStepWords, lane, short_r, sums);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float product[kGates] = {sums[0][j], sums[0][2 + j], sums[1][j], sums[1][2 + j]};
      units[j].step(args, t, at, product, x[j], b, options);
    }
    put(rows + (t + 1) % 2 * Shape::kStepWords);
    __syncthreads();
  }
  if (unit >= args.D) return;
#pragma unroll
  for (int j = 0; j < 2; ++j) units[j].finish(args, at);
}

template <class Cell, int kPerWord>
void run_forward(const RecurrenceForward& args, DType r_digits, void* stream) {
  dispatch_width<kPerWord>(args.D, [&](auto width) {
    using Shape = RecurrenceShape<true, kPerWord, width()>;
    const auto blocks = static_cast<unsigned>(ceil_div(args.B, kColumns) * args.H);
    launch("recurrence_forward", {blocks, Shape::kThreads, Shape::kSharedBytes}, stream,
           recurrence_forward_kernel<Cell, kPerWord, width()>, args, r_digits != DType::kFloat32);
  });
}

}  // namespace

std::vector<RecurrenceLaunchShape> recurrence_launch_shapes() {
  std::vector<RecurrenceLaunchShape> shapes;
  const auto add = [&](auto shape, bool forward, int per_word, int width) {
    using Shape = decltype(shape);
    shapes.push_back({forward, per_word == 1 ? DType::kFloat32 : DType::kBFloat16, width,
                      Shape::kThreads, Shape::kTiles, Shape::kHeld, Shape::kSharedBytes});
  };
#define XLSTM_RECURRENCE_ADD(per_word, width)                           \
  add(RecurrenceShape<true, per_word, width>{}, true, per_word, width); \
  add(RecurrenceShape<false, per_word, width>{}, false, per_word, width);
  XLSTM_RECURRENCE_SHAPES(XLSTM_RECURRENCE_ADD)
#undef XLSTM_RECURRENCE_ADD
  return shapes;
}

void recurrence_forward_cuda(const RecurrenceForward& args, DType r_digits, void* stream) {
  XLSTM_ISA::dispatch_cell(args.cell, [&](auto cell) {
    if (r_digits == DType::kBFloat16) {
      run_forward<decltype(cell), 2>(args, r_digits, stream);
    } else {
      run_forward<decltype(cell), 1>(args, r_digits, stream);
    }
  });
}

}  // namespace xlstm
