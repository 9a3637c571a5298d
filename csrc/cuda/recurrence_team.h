// A head that is too wide for one block is dealt to the blocks of a team, each with some of its units and
// their rows of R. What every unit gives to the next step's product (h, or the gates' gradients in the
// backward) goes through global memory: a block writes its share, then raises its flag; a warp waits for
// the flags of the blocks that its slice of the product comes from, and for nobody else.
//
// The blocks of all teams are alive together, as those of a cooperative grid are. A team takes one head
// and tile of sequences after the other. Two slots of the exchange are enough: a block that writes to
// the slot of its last share but one has seen all flags of the last, which the others raised after they
// had read the one before.
#pragma once

#include "cuda/kernel_launch.h"
#include "cuda/recurrence.h"
#include "cuda/recurrence_launch.h"
#include "cuda/sync.h"

namespace xlstm {

constexpr int kTeamWarps = 8;
constexpr int kTeamThreads = 32 * kTeamWarps;
constexpr int kFetched = 4;  // right operands that a warp asks for at a time

// The warps of a block are rows of units times slices of the product's sum.
template <bool kForward, int kPerWord>
struct TeamShape {
  static constexpr int kUnits = kForward ? 8 : 16;        // of a warp's rows
  static constexpr int kRowTiles = kForward ? 2 : 1;      // products of 16 rows
  static constexpr int kPerUnit = kForward ? 1 : kGates;  // what a unit gives to the product
  static constexpr int kOwners = kForward ? 2 : 4;      // slices that have states, a unit a thread
  static constexpr int kDepth = kPerWord * kTileWords;  // of a product
  static constexpr int kHeld = 16;                      // fragments of R in registers
  static constexpr int kSums = 4 * kRowTiles;           // of a thread
  static constexpr int kSumFloats = kSums * kTeamThreads;  // of a block
  static constexpr int kLaneWords = 2 * kPerWord;          // of a right operand
  static constexpr int kOperandWords = 32 * kLaneWords;
  static_assert(kHeld % (kRowTiles * kFetched) == 0, "what is fetched meets fragments of one kind");
};

// Element `k` of a column of the exchange. Its order along the sum is that of memory, so that a lane's
// words of a product, [part][half], lie side by side, and so do the elements that a unit gives.
template <class Shape, int kPerWord>
__device__ __forceinline__ void store_exchanged(std::uint32_t* to, int k, int column, float x) {
  const int lane = column * 4 + k / Shape::kLaneWords % 4;
  std::uint32_t* words = to + (k / Shape::kDepth * 32 + lane) * Shape::kLaneWords;
  if constexpr (kPerWord == 1) {
    words[k % 2] = __float_as_uint(x);
  } else {
    bf16* const high = reinterpret_cast<bf16*>(words) + k % 4;
    store_parts(high, high + 4, x);
  }
}
// Where element `at` of word `w` of a left operand's fragment is along the sum, to agree with that.
template <class Shape, int kPerWord>
__device__ __forceinline__ int place_in_sum(int tile, int part, int w, int at) {
  return (tile * 4 + part) * Shape::kLaneWords + w / 2 * kPerWord + at;
}

// What one warp is in its team.
template <class Shape>
struct Member {
  __device__ Member(const Recurrence& args, const RecurrenceTeams& teams, const Lane& lane)
      : parts(static_cast<int>(ceil_div(args.D, teams.units))),
        team(static_cast<int>(blockIdx.x) / parts),
        part(static_cast<int>(blockIdx.x) % parts),
        rows(teams.units / Shape::kUnits),
        slice(lane.warp / rows),
        unit(part * teams.units + lane.warp % rows * Shape::kUnits + lane.group),
        tiles(teams.tiles),
        first_tile(slice * tiles),
        flags(teams.flags + team * parts) {
    const int slices = kTeamWarps / rows, per_block = teams.units * Shape::kPerUnit;
    slot_words = slices * tiles * Shape::kOperandWords;
    slots = static_cast<std::uint32_t*>(teams.exchange) + std::int64_t{2} * team * slot_words;
    first_source = min_of(parts, first_tile * Shape::kDepth / per_block);
    end_source = min_of(parts, ((first_tile + tiles) * Shape::kDepth + per_block - 1) / per_block);
  }

  static __device__ int min_of(int a, int b) { return a < b ? a : b; }

  // Where this block's share goes before publish().
  __device__ __forceinline__ std::uint32_t* share() const {
    return slots + static_cast<std::int64_t>(turn % 2) * slot_words;
  }
  __device__ __forceinline__ void publish() {
    __syncthreads();
    ++turn;
    if (threadIdx.x == 0) store_release(flags + part, turn);
  }
  // This lane's words of the slice that all have published, once they have.
  __device__ __forceinline__ const std::uint32_t* receive(int lane) const {
    for (int source = first_source + lane; source < end_source; source += 32) {
      while (load_acquire(flags + source) < turn) {
      }
    }
    __syncwarp();
    return slots + static_cast<std::int64_t>((turn - 1) % 2) * slot_words +
           first_tile * Shape::kOperandWords + lane * Shape::kLaneWords;
  }

  int parts, team, part;
  int rows, slice;        // rows of warps in a block; slice of the sum that is this warp's
  int unit;               // of the head, that this lane's first row is
  int tiles, first_tile;  // products of the slice
  int first_source, end_source, slot_words;
  unsigned turn = 0;  // how often the team has published
  unsigned* flags;
  std::uint32_t* slots;
};

// R's fragments of one thread: the first in registers, the next in shared memory, the last in global.
template <class Shape>
struct TeamMatrix {
  FragmentWords held[Shape::kHeld];
  FragmentWords *near, *far = nullptr;  // [fragment][thread]
  int tiles, near_end;                  // products; fragments before those in global memory

  __device__ TeamMatrix(Shared& shared, const RecurrenceTeams& teams)
      : tiles(teams.tiles), near_end(Shape::kHeld + teams.near) {
    near = shared.take<FragmentWords>(teams.near * kTeamThreads) + threadIdx.x;
    const int far_fragments = tiles * Shape::kRowTiles - near_end;
    if (far_fragments <= 0) return;
    far = static_cast<FragmentWords*>(teams.far) + threadIdx.x +
          static_cast<std::int64_t>(blockIdx.x) * far_fragments * kTeamThreads;
  }

  __device__ __forceinline__ FragmentWords* spare(int fragment) const {
    return fragment < near_end
               ? near + (fragment - Shape::kHeld) * kTeamThreads
               : far + static_cast<std::int64_t>(fragment - near_end) * kTeamThreads;
  }

  // element(product, row tile, word, at): element `at` of a word of the fragment.
  template <int kPerWord, class F>
  __device__ __forceinline__ void fill(F element) {
    const auto make = [&](int fragment) {
      return make_fragment<kPerWord>([&](int w, int at) {
        return element(fragment / Shape::kRowTiles, fragment % Shape::kRowTiles, w, at);
      });
    };
    fill_held(held, make);
#pragma unroll 1
    for (int fragment = Shape::kHeld; fragment < tiles * Shape::kRowTiles; ++fragment) {
      *spare(fragment) = make(fragment);
    }
  }

  // sums[m] += row tile m of R times this warp's slice of the operand.
  template <int kPerWord>
  __device__ __forceinline__ void multiply(const std::uint32_t* operand, bool short_r,
                                           ProductSum<kPerWord> (&sums)[Shape::kRowTiles]) const {
    const auto multiply_fetched = [&](int first, auto fragment_of) {
      struct alignas(4 * Shape::kLaneWords) Operand {
        std::uint32_t w[kPerWord][2];
      } b[kFetched];
#pragma unroll
      for (int at = 0; at < kFetched; ++at) {
        b[at] = *reinterpret_cast<const Operand*>(operand + (first + at) * Shape::kOperandWords);
      }
#pragma unroll
      for (int at = 0; at < kFetched; ++at) {
#pragma unroll
        for (int m = 0; m < Shape::kRowTiles; ++m) {
          sums[m].add(fragment_of((first + at) * Shape::kRowTiles + m).w, b[at].w, short_r);
        }
      }
    };
#pragma unroll
    for (int k = 0; k < Shape::kHeld / Shape::kRowTiles; k += kFetched) {
      if (k >= tiles) return;
      // Else both parts of every word would be kept.
      multiply_fetched(k, [&](int fragment) { return kept<kPerWord == 1>(held[fragment]); });
    }
#pragma unroll 1
    for (int k = Shape::kHeld / Shape::kRowTiles; k < tiles; k += kFetched) {
      multiply_fetched(k, [&](int fragment) { return *spare(fragment); });
    }
  }
};

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
__device__ __forceinline__ float sum_slices(const float* sums_of_block, const Member<Shape>& member,
                                            const Lane& lane, int at) {
  float sum = 0.0f;
  for (int warp = lane.warp % member.rows; warp < kTeamWarps; warp += member.rows) {
    sum += sums_of_block[(warp * Shape::kSums + at) * 32 + threadIdx.x % 32];
  }
  return sum;
}

template <class Shape>
LaunchShape team_launch(const Recurrence& args, const RecurrenceTeams& teams) {
  const auto blocks = static_cast<unsigned>(teams.teams * ceil_div(args.D, teams.units));
  LaunchShape shape{blocks, kTeamThreads};
  shape.shared_bytes = 4 * Shape::kSumFloats + sizeof(FragmentWords) * kTeamThreads * teams.near;
  shape.cooperative = true;
  return shape;
}

}  // namespace xlstm
