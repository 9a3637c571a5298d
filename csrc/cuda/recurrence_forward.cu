// Forward recurrence over time of a cell with a block-diagonal recurrent matrix, R in registers.
//   raw_t = x_t + R h_{t-1} + b        state_t = Cell::step(raw_t, state_{t-1})
// Source: arXiv 2405.04517, section 2.2; cells/*.h.
// Tensors: launch.h. h between steps: [column][unit] in shared memory, twice.
// Grid: (tile of sequences, head); a warp has the four gates of 8 units, so that a thread holds all of
//   a unit's, for two sequences. Sums, gates and states float32; one barrier a step. Saved: raw, and
//   the states before every kCheckpointInterval-th step.
#include "cells/cells.h"
#include "cuda/kernel_launch.h"
#include "cuda/recurrence_launch.h"
#include "cuda/recurrence_unit.h"

namespace xlstm {
namespace {

template <class Cell, int kPerWord, int kWidth>
__global__ void __launch_bounds__(RecurrenceShape<true, kPerWord, kWidth>::kThreads, 1)
    recurrence_forward_kernel(RecurrenceForward args, int products) {
  using Shape = RecurrenceShape<true, kPerWord, kWidth>;
  Shared shared;
  const int heads = static_cast<int>(args.H), at_work = static_cast<int>(blockIdx.x);
  const Work work(args, at_work % heads, at_work / heads);
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
  const AskForward ahead(args, work, lane.warp * Shape::kUnits, lane);

#pragma unroll 1
  for (int t = 0; t < work.longest; ++t) {
    ahead.ask(args, t + kAhead);
    float x[2][kGates];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!Shape::kFetchAhead) units[j].fetch(args, t);
      for (int g = 0; g < kGates; ++g) x[j][g] = units[j].x[g];
      if (Shape::kFetchAhead) units[j].fetch(args, t + 1);
    }
    ProductSum<kPerWord> sums[2];
    matrix.multiply(rows + t % 2 * Shape::kStepWords, lane, products, sums);
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
void run_forward(const RecurrenceForward& args, Digits digits, void* stream) {
  dispatch_width<kPerWord>(args.D, [&](auto width) {
    using Shape = RecurrenceShape<true, kPerWord, width()>;
    const auto blocks = static_cast<unsigned>(ceil_div(args.B, kColumns) * args.H);
    launch("recurrence_forward", {blocks, Shape::kThreads, Shape::kSharedBytes}, stream,
           recurrence_forward_kernel<Cell, kPerWord, width()>, args, digits.products());
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

void recurrence_forward_cuda(const RecurrenceForward& args, const RecurrenceTeams& teams,
                             Digits digits, void* stream) {
  if (args.T == 1 && !args.raw && !args.starts) {
    return recurrence_step_cuda(args, digits.r, stream);
  }
  if (teams.units > 0) return recurrence_team_forward_cuda(args, teams, digits, stream);
  XLSTM_ISA::dispatch_cell(args.cell, [&](auto cell) {
    if (digits.r == DType::kBFloat16) {
      run_forward<decltype(cell), 2>(args, digits, stream);
    } else {
      run_forward<decltype(cell), 1>(args, digits, stream);
    }
  });
}

}  // namespace xlstm
