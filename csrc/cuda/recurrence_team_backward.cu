// Gradient of the recurrence over time, a head shared by the blocks of a team.
//   draw_t = Cell::step_grad        dh_{t-1} += R^T draw_t        dR = sum_t draw_t h_{t-1}^T
// Source: derived in cells/*.h from the forward equations.
// Tensors: launch.h. draw between the two: the exchange of recurrence_team.h.
// Grid: (team, block of it), cooperative; a warp has 16 units, of a slice of the product's sum. Sums and
//   states float32, the slices' sums added in their order. States are recomputed as in
//   recurrence_backward.cu; dR is left to a matrix product over draw and h_{t-1}, both written here; db
//   is two partial sums a tile of sequences, of its even and its odd ones.
#include "cells/cells.h"
#include "cuda/recurrence_team.h"
#include "cuda/recurrence_unit.h"

namespace xlstm {
namespace {

template <int kPerWord, class Shape>
__device__ __forceinline__ void fill(TeamMatrix<Shape>& matrix, const RecurrenceBackward& args,
                                     const Member<Shape>& member, const Lane& lane, int head) {
  matrix.template fill<kPerWord>([&](int product, int, int w, int at) {
    const int in = member.unit + w % 2 * 8;
    const int k = place_in_sum<Shape, kPerWord>(member.first_tile + product, lane.part, w, at);
    const int out = k / kGates;
    const std::int64_t row = (k % kGates * args.H + head) * args.D + out;
    return in < args.D && out < args.D ? static_cast<const float*>(args.r)[row * args.D + in]
                                       : 0.0f;
  });
}

template <class Cell, int kPerWord>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrence_team_backward_kernel(RecurrenceBackward args, RecurrenceScratch scratch,
                                    RecurrenceTeams teams, bool short_r) {
  using Shape = TeamShape<false, kPerWord>;
  Shared shared;
  const Lane lane;
  Member<Shape> member(args, teams, lane);
  float* sums_of_block = shared.take<float>(Shape::kSumFloats);
  TeamMatrix<Shape> matrix(shared, teams);
  const float bound = static_cast<float>(args.clip_grad);
  CellOptions options;
  options.n_floor = args.n_floor;
  // This thread's unit and column of the tile: those of one of a product's four sums, if any.
  const int D = static_cast<int>(args.D), sum = member.slice % Shape::kOwners;
  const int unit = member.slice < Shape::kOwners ? member.unit + sum / 2 * 8 : D;
  const int column = lane.part * 2 + sum % 2;
  const int tiles = static_cast<int>(ceil_div(args.B, kColumns));
  // Scratch: [block][slot][state][thread].
  const auto states_at = [&](int slot) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kCheckpointInterval + slot;
    return static_cast<float*>(scratch.states) + row * (Cell::kStates - 1) * kTeamThreads +
           threadIdx.x;
  };

  int head = -1;
  for (int item = member.team; item < tiles * static_cast<int>(args.H); item += teams.teams) {
    const Work work(args, item / tiles, item % tiles);
    if (work.head != head) {
      head = work.head;
      fill<kPerWord>(matrix, args, member, lane, head);
    }
    const Column mine(args, work.first + column);
    const std::int64_t at = static_cast<std::int64_t>(head) * D + unit;
    UnitGrad<Cell, 1> grad;
    grad.start(args, mine, head, unit);
    float db[kGates]{};
#pragma unroll 1
    for (int t = work.longest - 1; t >= 0; --t) {
      const int slot = t % kCheckpointInterval;
      if (t == work.longest - 1 || slot == kCheckpointInterval - 1) {
        grad.recompute(args, scratch.h_prev, mine, at, t - slot, t + 1, states_at(0), options);
        grad.fetch(args, mine, head, unit, t, states_at(slot));
      }
      float draw[kGates];
      grad.step(args, mine, at, t, options, draw);
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        db[g] += draw[g];
        if (unit >= D) continue;
        store_exchanged<Shape, kPerWord>(member.share(), unit * kGates + g, column, draw[g]);
      }
      member.publish();
      if (slot > 0) grad.fetch(args, mine, head, unit, t - 1, states_at(slot - 1));
      ProductSum<kPerWord> sums[Shape::kRowTiles];
      matrix.multiply(member.receive(threadIdx.x % 32), short_r, sums);
      store_sums<Shape>(sums_of_block, lane, sums);
      __syncthreads();
      if (unit < D) grad.receive(t, sum_slices(sums_of_block, member, lane, sum), bound);
    }
    grad.finish(args, mine, head, unit);
    const int part = item % tiles * 2 + sum % 2;
    if (member.slice < Shape::kOwners) store_db(args, scratch, part, head, lane, unit, db);
  }
}

template <class Cell, int kPerWord>
void run(const RecurrenceBackward& args, const RecurrenceScratch& scratch,
         const RecurrenceTeams& teams, DType r_digits, void* stream) {
  launch("recurrence_team_backward", team_launch<TeamShape<false, kPerWord>>(args, teams), stream,
         recurrence_team_backward_kernel<Cell, kPerWord>, args, scratch, teams,
         r_digits != DType::kFloat32);
}

}  // namespace

void recurrence_team_backward_cuda(const RecurrenceBackward& args, const RecurrenceScratch& scratch,
                                   const RecurrenceTeams& teams, DType r_digits, void* stream) {
  XLSTM_ISA::dispatch_cell(args.cell, [&](auto cell) {
    if (r_digits == DType::kBFloat16) {
      run<decltype(cell), 2>(args, scratch, teams, r_digits, stream);
    } else {
      run<decltype(cell), 1>(args, scratch, teams, r_digits, stream);
    }
  });
}

}  // namespace xlstm
