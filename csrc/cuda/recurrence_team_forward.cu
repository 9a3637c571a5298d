// Forward recurrence over time, a head shared by the blocks of a team.
//   raw_t = x_t + R h_{t-1} + b        state_t = Cell::step(raw_t, state_{t-1})
// Source: arXiv 2405.04517, section 2.2; cells/*.h.
// Tensors: launch.h. h between steps: the exchange of recurrence_team.h.
// Grid: (team, block of it), cooperative; a warp has the four gates of 8 units, of a slice of the
//   product's sum. Sums, gates and states float32, the slices' sums added in their order. Saved: raw,
//   and the states before every kCheckpointInterval-th step.
#include "cells/cells.h"
#include "cuda/recurrence_team.h"
#include "cuda/recurrence_unit.h"

namespace xlstm {
namespace {

// A head's rows of R for this warp.
template <int kPerWord, class Shape>
__device__ __forceinline__ void fill(TeamMatrix<Shape>& matrix, const RecurrenceForward& args,
                                     const Member<Shape>& member, const Lane& lane, int head) {
  matrix.template fill<kPerWord>([&](int product, int m, int w, int at) {
    const std::int64_t gate = m * 2 + w % 2;
    const int in = place_in_sum<Shape, kPerWord>(member.first_tile + product, lane.part, w, at);
    const std::int64_t row = (gate * args.H + head) * args.D + member.unit;
    return member.unit < args.D && in < args.D
               ? static_cast<const float*>(args.r)[row * args.D + in]
               : 0.0f;
  });
}

template <class Cell, int kPerWord>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrence_team_forward_kernel(RecurrenceForward args, RecurrenceTeams teams, bool short_r) {
  using Shape = TeamShape<true, kPerWord>;
  Shared shared;
  const Lane lane;
  Member<Shape> member(args, teams, lane);
  float* sums_of_block = shared.take<float>(Shape::kSumFloats);
  TeamMatrix<Shape> matrix(shared, teams);
  CellOptions options;
  options.n_floor = args.n_floor;
  // This thread's unit and column of the tile: one of the two of a product's, if any.
  const int D = static_cast<int>(args.D);
  const int unit = member.slice < Shape::kOwners ? member.unit : D;
  const int column = lane.part * 2 + member.slice % Shape::kOwners;
  const int tiles = static_cast<int>(ceil_div(args.B, kColumns));

  int head = -1;
  float b[kGates]{};
  for (int item = member.team; item < tiles * static_cast<int>(args.H); item += teams.teams) {
    const Work work(args, item / tiles, item % tiles);
    if (work.head != head) {
      head = work.head;
      fill<kPerWord>(matrix, args, member, lane, head);
      for (int g = 0; g < kGates && args.b && unit < D; ++g) {
        b[g] = static_cast<const float*>(args.b)[(g * args.H + head) * args.D + unit];
      }
    }
    Unit<Cell> mine(args, work, column, unit);
    const std::int64_t at = static_cast<std::int64_t>(head) * D + unit;
    mine.fetch(args, 0);
#pragma unroll 1
    for (int t = 0; t < work.longest; ++t) {
      if (unit < D) store_exchanged<Shape, kPerWord>(member.share(), unit, column, mine.state[0]);
      member.publish();
      float x[kGates], product[kGates];
      for (int g = 0; g < kGates; ++g) x[g] = mine.x[g];
      mine.fetch(args, t + 1);
      ProductSum<kPerWord> sums[Shape::kRowTiles];
      matrix.multiply(member.receive(threadIdx.x % 32), short_r, sums);
      store_sums<Shape>(sums_of_block, lane, sums);
      __syncthreads();
      if (unit >= D) continue;
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        product[g] = sum_slices(sums_of_block, member, lane, g * 2 + member.slice);
      }
      mine.step(args, t, at, product, x, b, options);
    }
    if (unit < D) mine.finish(args, at);
  }
}

template <class Cell, int kPerWord>
void run(const RecurrenceForward& args, const RecurrenceTeams& teams, DType r_digits,
         void* stream) {
  launch("recurrence_team_forward", team_launch<TeamShape<true, kPerWord>>(args, teams), stream,
         recurrence_team_forward_kernel<Cell, kPerWord>, args, teams, r_digits != DType::kFloat32);
}

}  // namespace

std::vector<RecurrenceLaunchShape> recurrence_team_shapes() {
  std::vector<RecurrenceLaunchShape> shapes;
  const auto add = [&](auto shape, bool forward, DType operand) {
    using Shape = decltype(shape);
    shapes.push_back(
        {forward, operand, Shape::kUnits, kTeamThreads, 0, Shape::kHeld, 4 * Shape::kSumFloats});
  };
  add(TeamShape<true, 1>{}, true, DType::kFloat32);
  add(TeamShape<true, 2>{}, true, DType::kBFloat16);
  add(TeamShape<false, 1>{}, false, DType::kFloat32);
  add(TeamShape<false, 2>{}, false, DType::kBFloat16);
  return shapes;
}

void recurrence_team_forward_cuda(const RecurrenceForward& args, const RecurrenceTeams& teams,
                                  DType r_digits, void* stream) {
  XLSTM_ISA::dispatch_cell(args.cell, [&](auto cell) {
    if (r_digits == DType::kBFloat16) {
      run<decltype(cell), 2>(args, teams, r_digits, stream);
    } else {
      run<decltype(cell), 1>(args, teams, r_digits, stream);
    }
  });
}

}  // namespace xlstm
