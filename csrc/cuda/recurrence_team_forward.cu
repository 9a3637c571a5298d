// Forward recurrence over time, a head shared by the blocks of a team.
//   raw_t = x_t + R h_{t-1} + b        state_t = Cell::step(raw_t, state_{t-1})
// Source: arXiv 2405.04517, section 2.2; cells/*.h.
// Tensors: launch.h. h between steps: the exchange of recurrence_team.h.
// Grid: (team, block of it), a cluster or cooperative; a warp has the four gates of 8 units, of a slice
//   of the product's sum. Sums, gates and states float32, the slices' sums added in their order. Saved:
//   raw, and the states before every kCheckpointInterval-th step.
#include "cells/cells.h"
#include "cuda/recurrence_team.h"
#include "cuda/recurrence_unit.h"

namespace xlstm {
namespace {

// What a warp is in its block.
struct Slice {
  __device__ Slice(const RecurrenceTeams& teams, int part, int parts, int depth, const Lane& lane)
      : rows(teams.units / kUnits),
        slice(lane.warp / rows),
        unit(part * teams.units + lane.warp % rows * kUnits + lane.group),
        first_tile(slice * teams.tiles),
        first_source(first_tile * depth / teams.units),
        end_source(((first_tile + teams.tiles) * depth - 1) / teams.units + 1) {
    if (end_source > parts) end_source = parts;
  }

  static constexpr int kUnits = 8;
  int rows, slice;               // rows of warps in the block; slice of the sum that is this warp's
  int unit;                      // of the head, that this lane's first row is
  int first_tile;                // product of the slice
  int first_source, end_source;  // blocks that h of the slice comes from
};

// A head's rows of R for this warp.
template <int kPerWord, class Shape>
__device__ __forceinline__ void fill(TeamMatrix<Shape>& matrix, const RecurrenceForward& args,
                                     const Slice& mine, const Lane& lane, int head) {
  matrix.template fill<kPerWord>([&](int product, int m, int w, int at) {
    const std::int64_t gate = m * 2 + w % 2;
    const int in = place_in_sum<Shape, kPerWord>(mine.first_tile + product, lane.part, w, at);
    const std::int64_t row = (gate * args.H + head) * args.D + mine.unit;
    return mine.unit < args.D && in < args.D ? static_cast<const float*>(args.r)[row * args.D + in]
                                             : 0.0f;
  });
}

// Hands over the products of this warp's slice; after a barrier, sum_slices gives their sums.
template <class Shape, int kPerWord>
__device__ __forceinline__ void store_sums(float* sums_of_block, const Lane& lane,
                                           const ProductSum<kPerWord> (&sums)[Shape::kRowTiles]) {
  float* to = sums_of_block + lane.warp * Shape::kSums * 32 + threadIdx.x % 32;
#pragma unroll
  for (int at = 0; at < Shape::kSums; ++at) to[at * 32] = sums[at / 4][at % 4];
}
// Sum `at` of this lane's place, over the slices of its row of warps.
template <class Shape>
__device__ __forceinline__ float sum_slices(const float* sums_of_block, const Slice& mine,
                                            const Lane& lane, int at) {
  float sum = 0.0f;
  for (int warp = lane.warp % mine.rows; warp < kTeamWarps; warp += mine.rows) {
    sum += sums_of_block[(warp * Shape::kSums + at) * 32 + threadIdx.x % 32];
  }
  return sum;
}

template <class Cell, int kPerWord, bool kCluster>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrence_team_forward_kernel(RecurrenceForward args, RecurrenceTeams teams, int products) {
  if constexpr (kCluster && !kHasClusters) return;
  using Shape = TeamShape<true, kPerWord, kCluster>;
  static_assert(Shape::kUnits == Slice::kUnits);
  Shared shared;
  const Lane lane;
  Member<Shape> member(shared, args, teams);
  const Slice slice(teams, member.part, member.parts, Shape::kDepth, lane);
  float* sums_of_block = shared.take<float>(Shape::own_words(member.units));
  TeamMatrix<Shape> matrix(shared, teams, teams.tiles);
  CellOptions options;
  options.n_floor = args.n_floor;
  // This thread's unit and column of the tile: one of the two of a product's, if any.
  const int D = static_cast<int>(args.D);
  const int unit = slice.slice < Shape::kOwners ? slice.unit : D;
  const int column = lane.part * 2 + slice.slice % Shape::kOwners;
  const int tiles = static_cast<int>(ceil_div(args.B, kColumns));

  int head = -1;
  float b[kGates]{};
  for (int item = member.team; item < tiles * static_cast<int>(args.H); item += teams.teams) {
    const Work work(args, item / tiles, item % tiles);
    if (work.head != head) {
      head = work.head;
      fill<kPerWord>(matrix, args, slice, lane, head);
      for (int g = 0; g < kGates && args.b && unit < D; ++g) {
        b[g] = static_cast<const float*>(args.b)[(g * args.H + head) * args.D + unit];
      }
    }
    Unit<Cell> mine(args, work, column, unit);
    const std::int64_t at = static_cast<std::int64_t>(head) * D + unit;
    mine.fetch(args, 0);
    const AskForward ahead(args, work, slice.slice == 0 ? slice.unit - lane.group : D, lane);
#pragma unroll 1
    for (int t = 0; t < work.longest; ++t) {
      if (unit < D) store_exchanged<Shape, kPerWord>(member.slot(), unit, column, mine.state[0]);
      member.publish_share();
      float x[kGates], product[kGates];
      for (int g = 0; g < kGates; ++g) x[g] = mine.x[g];
      mine.fetch(args, t + 1);
      ahead.ask(args, t + kAhead);
      ProductSum<kPerWord> sums[Shape::kRowTiles];
      member.await(slice.first_source, slice.end_source);
      const std::uint32_t* operand = member.given() + slice.first_tile * Shape::kOperandWords +
                                     threadIdx.x % 32 * Shape::kLaneWords;
      const auto operand_of = [&](int tile) { return operand + tile * Shape::kOperandWords; };
      matrix.template multiply<kPerWord>(operand_of, products, sums, [](int) {});
      store_sums<Shape>(sums_of_block, lane, sums);
      __syncthreads();
      if (unit >= D) continue;
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        product[g] = sum_slices<Shape>(sums_of_block, slice, lane, g * 2 + slice.slice);
      }
      mine.step(args, t, at, product, x, b, options);
    }
    if (unit < D) mine.finish(args, at);
  }
  member.finish();
}

}  // namespace

std::vector<RecurrenceLaunchShape> recurrence_team_shapes() {
  std::vector<RecurrenceLaunchShape> shapes;
  const auto add = [&](auto shape, DType operand) {
    using Shape = decltype(shape);
    shapes.push_back({Shape::kForward, operand, Shape::kUnits, kTeamThreads, 0, Shape::kHeld,
                      4 * Shape::own_words(kTeamUnits), Shape::kCluster});
  };
  const auto add_all = [&](auto forward, auto cluster) {
    add(TeamShape<forward(), 1, cluster()>{}, DType::kFloat32);
    add(TeamShape<forward(), 2, cluster()>{}, DType::kBFloat16);
  };
  add_all(std::true_type{}, std::false_type{});
  add_all(std::true_type{}, std::true_type{});
  add_all(std::false_type{}, std::false_type{});
  add_all(std::false_type{}, std::true_type{});
  return shapes;
}

void recurrence_team_forward_cuda(const RecurrenceForward& args, const RecurrenceTeams& teams,
                                  Digits digits, void* stream) {
  dispatch_team(args.cell, digits, teams, [&](auto cell, auto per_word, auto cluster) {
    launch("recurrence_team_forward",
           team_launch<TeamShape<true, per_word(), cluster()>>(args, teams), stream,
           recurrence_team_forward_kernel<decltype(cell), per_word(), cluster()>, args, teams,
           digits.products());
  });
}

}  // namespace xlstm
