// A head that is too wide for one block is dealt to the blocks of a team, each with some of its units and
// the rows of R that give their gates. At every step the blocks tell each other what the product with R
// makes of that: in the forward pass each needs the h of all units, in the backward the gradient of its
// own h, of which every block has a part.
//
// Where a team is a cluster that goes from shared memory to shared memory: a thread writes to another
// block, and the words count themselves in at a barrier there. Elsewhere it goes through global memory:
// a block writes its share, then raises its flag, and who reads waits for the flags of the blocks that
// it reads from; the blocks of all teams are then alive together, as those of a cooperative grid are.
//
// A team takes one head and tile of sequences after the other. Two slots of the exchange are enough: a
// block that writes to the slot of its last share but one has seen all shares of the last, which the
// others gave after they had read the one before.
#pragma once

#include "cells/cells.h"
#include "cuda/kernel_launch.h"
#include "cuda/recurrence.h"
#include "cuda/recurrence_launch.h"
#include "cuda/sync.h"

namespace xlstm {

constexpr int kTeamWarps = 8;
constexpr int kTeamThreads = 32 * kTeamWarps;
constexpr int kFetched = 4;  // right operands that a warp asks for at a time

// In the forward pass the warps of a block are rows of units times slices of the product's sum. In the
// backward the sum is over the block's own gates, and the warps share out the units of the head.
template <bool kIsForward, int kPerWord, bool kIsCluster>
struct TeamShape {
  static constexpr bool kForward = kIsForward, kCluster = kIsCluster;
  static constexpr int kUnits = kForward ? 8 : 32;      // of a warp's rows
  static constexpr int kRowTiles = 2;                   // products of 16 rows
  static constexpr int kOwners = 2;                     // slices that have states, a unit a thread
  static constexpr int kDepth = kPerWord * kTileWords;  // of a product
  // Fragments of R in registers. Found by compiling: with more, registers spill.
  static constexpr int kHeld = !kCluster ? 16 : kPerWord == 2 ? 32 : 24;
  static constexpr int kSums = 4 * kRowTiles;      // of a thread
  static constexpr int kLaneWords = 2 * kPerWord;  // of a right operand
  static constexpr int kOperandWords = 32 * kLaneWords;
  static_assert(kHeld % (kRowTiles * kFetched) == 0, "what is fetched meets fragments of one kind");

  // Words that a block has for itself: the sums of its slices, or its gates' gradients
  // of this turn and the next.
  XLSTM_HD static int own_words(int units) {
    return kForward ? kSums * kTeamThreads : 2 * units * kGates * kColumns;
  }
  // Of a slot of the exchange: h of all units as operands, and what fills them up to the slices' ends;
  // or for each block that gives, and outside of clusters for each that gets, sums of the units.
  XLSTM_HD static int slot_words(int units, int parts, int tiles) {
    return kForward ? kTeamWarps * kUnits / units * tiles * kOperandWords
                    : (kCluster ? 1 : parts) * parts * units * kColumns;
  }
};

// Right operands in memory: along a product's sum, a lane's words, [part][half], lie side by side, and
// so do the gates of a unit.
template <class Shape, int kPerWord>
__device__ __forceinline__ std::uint32_t* operand_at(std::uint32_t* to, int k, int column) {
  const int lane = column * 4 + k / Shape::kLaneWords % 4;
  return to + (k / Shape::kDepth * 32 + lane) * Shape::kLaneWords;
}
// Element `k` of a column.
template <class Shape, int kPerWord>
__device__ __forceinline__ void store_exchanged(std::uint32_t* to, int k, int column, float x) {
  std::uint32_t* words = operand_at<Shape, kPerWord>(to, k, column);
  if constexpr (kPerWord == 1) {
    words[k % 2] = __float_as_uint(x);
  } else {
    bf16* const high = reinterpret_cast<bf16*>(words) + k % 4;
    store_parts(high, high + 4, x);
  }
}
// All gates of a unit: elements unit * kGates and on.
template <class Shape, int kPerWord>
__device__ __forceinline__ void store_gates(std::uint32_t* to, int unit, int column,
                                            const float (&x)[kGates]) {
  FragmentWords words;
#pragma unroll
  for (int w = 0; w < kGates / kPerWord; ++w) {
    if constexpr (kPerWord == 1) {
      words.w[w] = __float_as_uint(x[w]);
    } else {
      float high[2], low[2];
#pragma unroll
      for (int at = 0; at < 2; ++at) {
        bf16 parts[2];
        store_parts(&parts[0], &parts[1], x[2 * w + at]);
        high[at] = load(&parts[0]), low[at] = load(&parts[1]);
      }
      words.w[w] = pack_word(high), words.w[w + 2] = pack_word(low);
    }
  }
  *reinterpret_cast<FragmentWords*>(operand_at<Shape, kPerWord>(to, unit * kGates, column)) = words;
}
// Where element `at` of word `w` of a left operand's fragment is along the sum, to agree with that.
template <class Shape, int kPerWord>
__device__ __forceinline__ int place_in_sum(int tile, int part, int w, int at) {
  return (tile * 4 + part) * Shape::kLaneWords + w / 2 * kPerWord + at;
}

// What one block is in its team, and the exchange with the others.
template <class Shape>
struct Member {
  __device__ Member(Shared& shared, const Recurrence& args, const RecurrenceTeams& teams)
      : units(teams.units),
        parts(static_cast<int>(ceil_div(args.D, units))),
        team(static_cast<int>(blockIdx.x) / parts),
        part(static_cast<int>(blockIdx.x) % parts),
        slot_words(Shape::slot_words(units, parts, teams.tiles)) {
    if constexpr (Shape::kCluster) {
      slots = shared.take<std::uint32_t>(2 * slot_words);
      arrivals = shared.take<ByteBarrier>(2);
      // What fills operands up stays zero.
      for (int at = threadIdx.x; at < 2 * slot_words; at += kTeamThreads) slots[at] = 0;
      if (threadIdx.x < 2) init_barrier(arrivals + threadIdx.x);
      cluster_sync();
    } else {
      slots = static_cast<std::uint32_t*>(teams.exchange) + std::int64_t{2} * team * slot_words;
      flags = teams.flags + team * parts;
    }
  }
  // Another block may still write here.
  __device__ __forceinline__ void finish() const {
    if constexpr (Shape::kCluster) cluster_sync();
  }

  // Of this turn until publish(), of the one before after it.
  __device__ __forceinline__ std::uint32_t* slot() const {
    return slots + static_cast<std::int64_t>(turn % 2) * slot_words;
  }

  // Forward: what the threads of this block have put into its share of slot() goes to all.
  __device__ __forceinline__ void publish_share() {
    __syncthreads();
    if constexpr (Shape::kCluster) {
      const int words = units * kColumns, vectors = words / 4;
      std::uint32_t* const from = slot() + part * words + threadIdx.x % vectors * 4;
      expect(4 * (parts - 1) * words);
      for (int away = 1 + threadIdx.x / vectors; away < parts; away += kTeamThreads / vectors) {
        const int peer = part + away < parts ? part + away : part + away - parts;
        store_async(from, *reinterpret_cast<const FragmentWords*>(from), barrier(), peer);
      }
    } else if (threadIdx.x == 0) {
      store_release(flags + part, turn + 1);
    }
    ++turn;
  }

  // Backward: sums of units [first, first + 16), in the order of a product's lanes.
  __device__ __forceinline__ void give_sums(int first, int lane, const FragmentWords& sums) const {
    const int owner = units == kTeamUnits ? first / kTeamUnits : first / (2 * kTeamUnits);
    const int words = units * kColumns;
    const int from = Shape::kCluster ? part : owner * parts + part;
    std::uint32_t* to = slot() + from * words + (first - owner * units) * kColumns + lane * 4;
    if constexpr (Shape::kCluster) {
      store_async(to, sums, barrier(), owner);
    } else {
      *reinterpret_cast<FragmentWords*>(to) = sums;
    }
  }
  // All of this block's sums are given.
  __device__ __forceinline__ void publish_sums() {
    if constexpr (Shape::kCluster) {
      expect(4 * slot_words);
    } else {
      __syncthreads();
      if (threadIdx.x == 0) store_release(flags + part, turn + 1);
    }
    ++turn;
  }

  // Until blocks [first, end) have published; those of a cluster, all.
  __device__ __forceinline__ void await(int first, int end) const {
    if constexpr (Shape::kCluster) {
      await_bytes(arrivals + (turn - 1) % 2, (turn - 1) / 2 % 2);
    } else {
      for (int source = first + threadIdx.x % 32; source < end; source += 32) {
        while (load_acquire(flags + source) < turn) {
        }
      }
      __syncwarp();
    }
  }
  // Where the slot lies that all have given to, once they have.
  __device__ __forceinline__ const std::uint32_t* given() const {
    return slots + static_cast<std::int64_t>((turn - 1) % 2) * slot_words;
  }

  int units, parts, team, part, slot_words;
  unsigned turn = 0;  // how often the team has published
  unsigned* flags = nullptr;
  std::uint32_t* slots;

 private:
  __device__ __forceinline__ ByteBarrier* barrier() const { return arrivals + turn % 2; }
  __device__ __forceinline__ void expect(int bytes) const {
    if (threadIdx.x == 0) expect_bytes(barrier(), bytes);
  }

  ByteBarrier* arrivals = nullptr;  // of each slot
};

// R's fragments of one thread: the first in registers, the next in shared memory, the last in global.
template <class Shape>
struct TeamMatrix {
  FragmentWords held[Shape::kHeld];
  FragmentWords *near, *far = nullptr;  // [fragment][thread]
  int tiles, near_end;                  // products; fragments before those in global memory

  // `tiles`: of those of the launch, the first, which are this warp's.
  __device__ TeamMatrix(Shared& shared, const RecurrenceTeams& teams, int tiles)
      : tiles(tiles), near_end(Shape::kHeld + teams.near) {
    near = shared.take<FragmentWords>(teams.near * kTeamThreads) + threadIdx.x;
    const int far_fragments = teams.tiles * Shape::kRowTiles - near_end;
    if (Shape::kCluster || far_fragments <= 0) return;
    far = static_cast<FragmentWords*>(teams.far) + threadIdx.x +
          static_cast<std::int64_t>(blockIdx.x) * far_fragments * kTeamThreads;
  }

  __device__ __forceinline__ FragmentWords* spare(int fragment) const {
    return Shape::kCluster || fragment < near_end
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

  // sums[m] += row tile m of each product of R times this lane's words at operand_of(product), which
  // are in a row for kFetched of them; done(product) after those.
  template <int kPerWord, class F, class Done>
  __device__ __forceinline__ void multiply(F operand_of, int products,
                                           ProductSum<kPerWord> (&sums)[Shape::kRowTiles],
                                           Done done) const {
    const auto multiply_fetched = [&](int first, auto fragment_of) {
      struct alignas(4 * Shape::kLaneWords) Operand {
        std::uint32_t w[kPerWord][2];
      } b[kFetched];
      const std::uint32_t* operand = operand_of(first);
#pragma unroll
      for (int at = 0; at < kFetched; ++at) {
        b[at] = *reinterpret_cast<const Operand*>(operand + at * Shape::kOperandWords);
      }
#pragma unroll
      for (int at = 0; at < kFetched; ++at) {
#pragma unroll
        for (int m = 0; m < Shape::kRowTiles; ++m) {
          sums[m].add(fragment_of((first + at) * Shape::kRowTiles + m).w, b[at].w, products);
        }
      }
      done(first);
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

template <class Shape>
LaunchShape team_launch(const Recurrence& args, const RecurrenceTeams& teams) {
  const int parts = static_cast<int>(ceil_div(args.D, teams.units));
  LaunchShape shape{static_cast<unsigned>(teams.teams * parts), kTeamThreads};
  shape.shared_bytes =
      4 * Shape::own_words(teams.units) + sizeof(FragmentWords) * kTeamThreads * teams.near;
  if (Shape::kCluster) {
    shape.shared_bytes +=
        8 * Shape::slot_words(teams.units, parts, teams.tiles) + 2 * sizeof(ByteBarrier);
    shape.cluster = static_cast<unsigned>(parts);
  } else {
    shape.cooperative = true;
  }
  return shape;
}

// f(cell, elements a word, whether teams are clusters), as types and constants.
template <class F>
void dispatch_team(Cell cell, Digits digits, const RecurrenceTeams& teams, F&& f) {
  const auto with_word = [&](auto type, auto per_word) {
    if (teams.cluster) {
      f(type, per_word, std::true_type{});
    } else {
      f(type, per_word, std::false_type{});
    }
  };
  XLSTM_ISA::dispatch_cell(cell, [&](auto type) {
    if (digits.r == DType::kBFloat16) {
      with_word(type, std::integral_constant<int, 2>{});
    } else {
      with_word(type, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace xlstm
