// Gradient of the recurrence over time, a head shared by the blocks of a team.
//   draw_t = Cell::step_grad        dh_{t-1} += R^T draw_t        dR = sum_t draw_t h_{t-1}^T
// Source: derived in cells/*.h from the forward equations.
// Tensors: launch.h. Parts of R^T draw between the two: the exchange of recurrence_team.h.
// Grid: (team, block of it), a cluster or cooperative; a block multiplies the gates' gradients of its
//   units, a warp for 32 units of the head at a time. Sums and states float32, the blocks' parts added
//   in their order. States are recomputed as in recurrence_backward.cu; dR is left to a matrix product
//   over draw and h_{t-1}, both written here; db is one partial sum a tile of sequences.
#include "cuda/recurrence_team.h"
#include "cuda/recurrence_unit.h"

namespace xlstm {
namespace {

constexpr int kTileUnits = 16;
constexpr int kColumnLanes = 1 | 4 | 8;  // bits of a lane that tell the columns of a unit apart

// Unit of 16 that row `row` of a product is: a chunk of 32 of its sums, [lane][row, row + 8][column],
// then holds four neighbours.
__device__ __forceinline__ int unit_of_row(int row) {
  return row % 8 / 2 * 4 + row / 8 * 2 + row % 2;
}

// The products of a warp: for each 32 units of the head that it has, those of the block's gates.
struct Turns {
  __device__ Turns(const Lane& lane, int units, int depth)
      : products(units * kGates / depth), warp(lane.warp) {}
  // Of one row of them: where `product` is.
  __device__ __forceinline__ int in_row(int product) const { return product & (products - 1); }
  // Of the warp, where there are D units.
  __device__ __forceinline__ int count(int D) const {
    const int rows = (D - 1) / (2 * kTileUnits) - warp;  // of 32 units, after the warp's first
    return rows < 0 ? 0 : (rows / kTeamWarps + 1) * products;
  }
  // The first unit of row tile `m` of those that `product` is for.
  __device__ __forceinline__ int first_unit(int product, int m) const {
    return ((product / products * kTeamWarps + warp) * 2 + m) * kTileUnits;
  }
  int products, warp;  // a power of two
};

// R of the block's units for this warp.
template <int kPerWord, class Shape>
__device__ __forceinline__ void fill(TeamMatrix<Shape>& matrix, const RecurrenceBackward& args,
                                     const Member<Shape>& member, const Turns& turns,
                                     const Lane& lane, int head) {
  matrix.template fill<kPerWord>([&](int product, int m, int w, int at) {
    const int in = turns.first_unit(product, m) + unit_of_row(lane.group + w % 2 * 8);
    const int k = place_in_sum<Shape, kPerWord>(turns.in_row(product), lane.part, w, at);
    const int out = member.part * member.units + k / kGates;
    const std::int64_t row = (k % kGates * args.H + head) * args.D + out;
    return in < args.D && out < args.D ? static_cast<const float*>(args.r)[row * args.D + in]
                                       : 0.0f;
  });
}

// Gives away R^T draw, of the draw of this block's units.
template <int kPerWord, class Shape>
__device__ __forceinline__ void give_products(const TeamMatrix<Shape>& matrix,
                                              const Member<Shape>& member, const Turns& turns,
                                              const std::uint32_t* draws, int products) {
  const int lane = static_cast<int>(threadIdx.x) % 32, D = member.parts * member.units;
  const std::uint32_t* operand = draws + lane * Shape::kLaneWords;
  ProductSum<kPerWord> sums[Shape::kRowTiles];
  matrix.template multiply<kPerWord>(
      [&](int product) { return operand + turns.in_row(product) * Shape::kOperandWords; }, products,
      sums,
      [&](int product) {
        if (turns.in_row(product + kFetched) != 0) return;
#pragma unroll
        for (int m = 0; m < Shape::kRowTiles; ++m) {
          const int first = turns.first_unit(product, m);
          FragmentWords words;
#pragma unroll
          for (int at = 0; at < 4; ++at) words.w[at] = __float_as_uint(sums[m][at]);
          if (first < D) member.give_sums(first, lane, words);
          sums[m] = {};
        }
      });
}

template <class Cell, int kPerWord, bool kCluster>
__global__ void __launch_bounds__(kTeamThreads, 1)
    recurrence_team_backward_kernel(RecurrenceBackward args, RecurrenceScratch scratch,
                                    RecurrenceTeams teams, int products) {
  if constexpr (kCluster && !kHasClusters) return;
  using Shape = TeamShape<false, kPerWord, kCluster>;
  Shared shared;
  const Lane lane;
  Member<Shape> member(shared, args, teams);
  const Turns turns(lane, member.units, Shape::kDepth);
  std::uint32_t* draws_of_block = shared.take<std::uint32_t>(Shape::own_words(member.units));
  TeamMatrix<Shape> matrix(shared, teams, turns.count(member.parts * member.units));
  const float bound = static_cast<float>(args.clip_grad);
  CellOptions options;
  options.n_floor = args.n_floor;
  // This thread's unit of the block and column of the tile, if any: those of its place in a share.
  const int thread = static_cast<int>(threadIdx.x), place = thread % (kTileUnits * kColumns);
  const int of_block =
      thread / (kTileUnits * kColumns) * kTileUnits + unit_of_row(place / 16 + place % 4 / 2 * 8);
  const int column = place / 4 % 4 * 2 + place % 2;
  const bool owner = of_block < member.units;
  const int D = static_cast<int>(args.D), first = member.part * member.units;
  const int unit = owner ? first + of_block : D;
  // Of the warps that have kTileUnits units the first asks for all that they read.
  const bool asks = owner && thread % (kTileUnits * kColumns) < 32;
  const int asked = asks ? first + thread / (kTileUnits * kColumns) * kTileUnits : D;
  const int tiles = static_cast<int>(ceil_div(args.B, kColumns));
  // Scratch: [block][slot][state][thread].
  const auto states_at = [&](int slot) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kCheckpointInterval + slot;
    return static_cast<float*>(scratch.states) + row * (Cell::kStates - 1) * kTeamThreads + thread;
  };

  int head = -1;
  for (int item = member.team; item < tiles * static_cast<int>(args.H); item += teams.teams) {
    const Work work(args, item / tiles, item % tiles);
    if (work.head != head) {
      head = work.head;
      fill<kPerWord>(matrix, args, member, turns, lane, head);
    }
    const Column mine(args, work.first + column);
    const std::int64_t at = static_cast<std::int64_t>(head) * D + unit;
    UnitGrad<Cell, 1> grad;
    grad.start(args, mine, head, unit);
    float db[kGates]{};
    const AskBackward ahead(args, work, asked, lane);
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
      for (int g = 0; g < kGates; ++g) db[g] += draw[g];
      // Other warps may still read those of the turn before.
      std::uint32_t* draws = draws_of_block + member.turn % 2 * member.units * kGates * kColumns;
      if (owner) store_gates<Shape, kPerWord>(draws, of_block, column, draw);
      __syncthreads();
      if (slot > 0) grad.fetch(args, mine, head, unit, t - 1, states_at(slot - 1));
      ahead.ask(args, t);
      give_products<kPerWord>(matrix, member, turns, draws, products);
      member.publish_sums();
      member.await(0, member.parts);
      if (unit >= D) continue;
      const float* parts = reinterpret_cast<const float*>(member.given()) + thread;
      if (!kCluster) parts += member.part * member.parts * member.units * kColumns;
      float sum = 0.0f;
#pragma unroll 8
      for (int from = 0; from < member.parts; ++from) sum += parts[from * member.units * kColumns];
      grad.receive(t, sum, bound);
    }
    grad.finish(args, mine, head, unit);
    store_db<kColumnLanes>(args, scratch, item % tiles, head, unit, db);
  }
  member.finish();
}

}  // namespace

void recurrence_team_backward_cuda(const RecurrenceBackward& args, const RecurrenceScratch& scratch,
                                   const RecurrenceTeams& teams, Digits digits, void* stream) {
  dispatch_team(args.cell, digits, teams, [&](auto cell, auto per_word, auto cluster) {
    launch("recurrence_team_backward",
           team_launch<TeamShape<false, per_word(), cluster()>>(args, teams), stream,
           recurrence_team_backward_kernel<decltype(cell), per_word(), cluster()>, args, scratch,
           teams, digits.products());
  });
}

}  // namespace xlstm
