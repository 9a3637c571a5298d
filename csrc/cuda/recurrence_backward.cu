// Gradient of the recurrence over time, R^T in registers.
//   draw_t = Cell::step_grad        dh_{t-1} += R^T draw_t        dR = sum_t draw_t h_{t-1}^T
// Source: derived in cells/*.h from the forward equations.
// Tensors: launch.h. draw between the two: [column][gate, unit] in shared memory, twice.
// Grid: (tile of sequences, head); a warp has 16 units, a thread two of them for two sequences. Sums and
//   states float32; one barrier a step. States are recomputed from a checkpoint every
//   kCheckpointInterval steps, without a matrix product, into scratch that only their thread reads.
//   dR is left to a matrix product over draw and h_{t-1}, both written here; db is one partial sum per
//   block. Nothing is added in an order that depends on timing.
#include "cells/cells.h"
#include "cuda/kernel_launch.h"
#include "cuda/recurrence_launch.h"
#include "cuda/recurrence_unit.h"

namespace xlstm {
namespace {

template <class Cell, int kPerWord, int kWidth>
__global__ void __launch_bounds__(RecurrenceShape<false, kPerWord, kWidth>::kThreads, 1)
    recurrence_backward_kernel(RecurrenceBackward args, RecurrenceScratch scratch, int products) {
  using Shape = RecurrenceShape<false, kPerWord, kWidth>;
  Shared shared;
  const int heads = static_cast<int>(args.H), at_work = static_cast<int>(blockIdx.x);
  const Work work(args, at_work % heads, at_work / heads);
  const Lane lane;
  const int first_unit = lane.warp * Shape::kUnits + lane.group;
  const float bound = static_cast<float>(args.clip_grad);
  CellOptions options;
  options.n_floor = args.n_floor;

  std::uint32_t* rows = shared.take<std::uint32_t>(Shape::kOperandWords);
  Matrix<Shape> matrix;
  matrix.template fill<kPerWord>(shared, [&](int tile, int w, int at) {
    const int in = first_unit + w % 2 * 8;
    const int k = (tile * kTileWords + lane.part + w / 2 * 4) * kPerWord + at;
    const std::int64_t row = (k / kWidth * args.H + work.head) * args.D + k % kWidth;
    return in < args.D && k % kWidth < args.D ? static_cast<const float*>(args.r)[row * args.D + in]
                                              : 0.0f;
  });

  const int column = lane.part * 2;
  const Column columns[2] = {{args, work.first + column}, {args, work.first + column + 1}};
  // Unit e is of row e / 2 and column e % 2.
  const auto unit_of = [&](int e) { return first_unit + e / 2 * 8; };
  const auto place_of = [&](int e) { return work.head * args.D + unit_of(e); };
  // Scratch: [block][slot][state][unit of the thread][thread].
  const auto states_at = [&](int e, int slot) {
    const std::int64_t step = (Cell::kStates - 1) * 4 * Shape::kThreads;
    return static_cast<float*>(scratch.states) + (blockIdx.x * kCheckpointInterval + slot) * step +
           e * Shape::kThreads + threadIdx.x;
  };
  UnitGrad<Cell, 4> units[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) units[e].start(args, columns[e % 2], work.head, unit_of(e));
  float db[2][kGates]{};
  int turn = 0;
  const AskBackward ahead(args, work, lane.warp * Shape::kUnits, lane);
#pragma unroll 1
  for (int begin = (work.longest - 1) / kCheckpointInterval * kCheckpointInterval;
       begin >= 0 && work.longest > 0; begin -= kCheckpointInterval) {
    const int stop =
        begin + kCheckpointInterval < work.longest ? begin + kCheckpointInterval : work.longest;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      units[e].recompute(args, scratch.h_prev, columns[e % 2], place_of(e), begin, stop,
                         states_at(e, 0), options);
      units[e].fetch(args, columns[e % 2], work.head, unit_of(e), stop - 1,
                     states_at(e, stop - 1 - begin));
    }
#pragma unroll 1
    for (int t = stop - 1; t >= begin; --t, turn ^= 1) {
      std::uint32_t* const now = rows + turn * Shape::kStepWords;
      ahead.ask(args, t);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float draw[kGates];
        units[e].step(args, columns[e % 2], place_of(e), t, options, draw);
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          db[e / 2][g] += draw[g];
          store_operand<Shape, kPerWord>(now + (column + e % 2) * Shape::kRowWords,
                                         g * kWidth + unit_of(e), draw[g]);
        }
        if (t > begin) {
          units[e].fetch(args, columns[e % 2], work.head, unit_of(e), t - 1,
                         states_at(e, t - 1 - begin));
        }
      }
      __syncthreads();
      ProductSum<kPerWord> sums[1];
      matrix.multiply(now, lane, products, sums);
#pragma unroll
      for (int e = 0; e < 4; ++e) units[e].receive(t, sums[0][e], bound);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) units[e].finish(args, columns[e % 2], work.head, unit_of(e));
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    store_db<3>(args, scratch, work.first / kColumns, work.head, unit_of(2 * row), db[row]);
  }
}

template <class Cell, int kPerWord>
void run_backward(const RecurrenceBackward& args, const RecurrenceScratch& scratch, Digits digits,
                  void* stream) {
  dispatch_width<kPerWord>(args.D, [&](auto width) {
    using Shape = RecurrenceShape<false, kPerWord, width()>;
    const auto blocks = static_cast<unsigned>(ceil_div(args.B, kColumns) * args.H);
    launch("recurrence_backward", {blocks, Shape::kThreads, Shape::kSharedBytes}, stream,
           recurrence_backward_kernel<Cell, kPerWord, width()>, args, scratch, digits.products());
  });
}

}  // namespace

void recurrence_backward_cuda(const RecurrenceBackward& args, const RecurrenceScratch& scratch,
                              const RecurrenceTeams& teams, Digits digits, void* stream) {
  if (teams.units > 0) return recurrence_team_backward_cuda(args, scratch, teams, digits, stream);
  XLSTM_ISA::dispatch_cell(args.cell, [&](auto cell) {
    if (digits.r == DType::kBFloat16) {
      run_backward<decltype(cell), 2>(args, scratch, digits, stream);
    } else {
      run_backward<decltype(cell), 1>(args, scratch, digits, stream);
    }
  });
}

}  // namespace xlstm
