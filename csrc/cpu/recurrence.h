// How the recurrence is cut into tasks, and where a task finds its elements; forward and backward share
// it. Tasks: (some heads, tile of sequences). A tile keeps its states in cache and walks all of time on
// one core, so nothing is synchronised between steps. Heads of a task walk side by side: their gates of
// a token lie on the same pages, and every walk over time looks each page up again.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/integers.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "launch.h"

namespace xlstm::XLSTM_ISA {

constexpr int kGates = 4;
constexpr int kChunk = kCheckpointInterval;
// Gate-sized tensors above this leave the cache before they are read again; writing them past it saves
// reading each line first, and R and the states keep their place.
constexpr std::int64_t kStreamBytes = std::int64_t{24} << 20;
// Products of one call up to which one thread does it sooner than several: about 10 us of them.
constexpr std::int64_t kSerialProducts = std::int64_t{1} << 19;
// Heads of a task, at most, and bytes of their R: half of a second cache of 2 MiB.
constexpr std::int64_t kHeadsAtOnce = 8, kCachedBytes = std::int64_t{1} << 20;

// Sequences per tile: the fewest rounds over the threads, where a tile costs its rows plus about two
// rows' worth of streaming R. Outputs do not depend on it; the grouping of dR's sum does.
inline std::int64_t tile_rows(std::int64_t B, std::int64_t H, std::int64_t most) {
  const std::int64_t threads = num_threads();
  std::int64_t best_rows = 1, best_cost = INT64_MAX;
  for (std::int64_t tiles = ceil_div(B, most); tiles <= B; ++tiles) {
    const std::int64_t rows = ceil_div(B, tiles);
    const std::int64_t cost = ceil_div(H * ceil_div(B, rows), threads) * (rows + 2);
    if (cost < best_cost) best_cost = cost, best_rows = rows;
  }
  return best_rows;
}

// Sequences as rows of the tensors, and packed sequences in order of falling length, so that the
// running ones of a tile are always its first rows.
struct Sequences {
  explicit Sequences(const Recurrence& args)
      : args(args), order_block(args.starts ? static_cast<std::size_t>(args.B) * 8 : 0, 1) {
    if (!args.starts) return;
    order = order_block.take<std::int64_t>(args.B);
    for (std::int64_t row = 0; row < args.B; ++row) order[row] = row;
    std::sort(order, order + args.B, [this](std::int64_t a, std::int64_t b) {
      const std::int64_t difference = length_of(a) - length_of(b);
      return difference ? difference > 0 : a < b;
    });
  }
  std::int64_t length_of(std::int64_t sequence) const {
    return args.starts ? args.starts[sequence + 1] - args.starts[sequence] : args.T;
  }
  std::int64_t sequence(std::int64_t row) const { return order ? order[row] : row; }
  std::int64_t length(std::int64_t row) const { return length_of(sequence(row)); }
  // Batch index and first token in the (B, T, ...) tensors.
  std::int64_t batch(std::int64_t row) const { return args.starts ? 0 : sequence(row); }
  std::int64_t start(std::int64_t row) const {
    return args.starts ? args.starts[sequence(row)] : 0;
  }
  std::int64_t checkpoint(std::int64_t row, std::int64_t chunk) const {
    const std::int64_t b = sequence(row);
    return chunk + (args.starts ? args.starts[b] / kChunk + b : b * ceil_div(args.T, kChunk));
  }

  const Recurrence& args;
  Scratch order_block;
  std::int64_t* order = nullptr;
};

// As many heads of a task as keep their R in cache and give no thread more of them.
inline std::int64_t heads_at_once(std::int64_t H, std::int64_t tiles, std::int64_t r_bytes) {
  const std::int64_t threads = num_threads();
  // Of the thread with most; what is left of H is drawn last, first by threads that have one task less.
  const auto most = [&](std::int64_t heads) {
    const std::int64_t whole = H / heads * tiles, left = H % heads;
    const std::int64_t idle = whole % threads > 0 ? threads - whole % threads : 0;
    const std::int64_t later = left > 0 ? std::max<std::int64_t>(tiles - idle, 0) : 0;
    return ceil_div(whole, threads) * heads + ceil_div(later, threads) * left;
  };
  std::int64_t best = 1;
  for (std::int64_t heads = 2; heads <= std::min(H, kHeadsAtOnce); ++heads) {
    if (heads * r_bytes <= kCachedBytes && most(heads) <= most(1)) best = heads;
  }
  return best;
}

// Rows [first, first + count) of one head, the index-th of all tiles.
struct Tile {
  std::int64_t head, first, count, index;
};

// What every loop below needs to find an element; T is the compute type.
template <class T>
struct Plan {
  explicit Plan(const Recurrence& args, std::int64_t most_rows)
      : args(args),
        sequences(args),
        units(ceil_div(args.D, kLanes<T>)),
        padded(units * kLanes<T>),
        rows(tile_rows(args.B, args.H, most_rows)),
        tiles(ceil_div(args.B, rows)),
        heads(heads_at_once(args.H, tiles, kGates * padded * args.D * std::int64_t{sizeof(T)})),
        tokens(args.starts ? args.T : args.B * args.T),
        stream(tokens * args.H * args.D * kGates * std::int64_t{sizeof(T)} > kStreamBytes &&
               args.D % kLanes<T> == 0) {}

  std::int64_t tasks() const { return ceil_div(args.H, heads) * tiles; }
  std::int64_t heads_of(std::int64_t task) const {
    return std::min(heads, args.H - task / tiles * heads);
  }
  // Of the n-th head of a task.
  Tile tile(std::int64_t task, std::int64_t n) const {
    const std::int64_t head = task / tiles * heads + n, first = task % tiles * rows;
    return {head, first, std::min(rows, args.B - first), head * tiles + task % tiles};
  }
  // Calls f(task) for each task; on this thread alone where waking the others takes longer.
  template <class F>
  void run(std::int64_t count, const F& f) const {
    if (tokens * args.H * args.D * args.D * kGates > kSerialProducts) {
      parallel_for(count, f);
    } else {
      for (std::int64_t task = 0; task < count; ++task) f(task);
    }
  }
  int lanes(std::int64_t unit) const {
    const std::int64_t left = args.D - unit * kLanes<T>;
    return static_cast<int>(left < kLanes<T> ? left : kLanes<T>);
  }
  // (S, B, H, D) and (N, S, H, D)
  std::int64_t state_offset(int s, std::int64_t sequence, std::int64_t head) const {
    return ((s * args.B + sequence) * args.H + head) * args.D;
  }
  std::int64_t checkpoint_offset(std::int64_t n, int states, int s, std::int64_t head) const {
    return ((n * states + s) * args.H + head) * args.D;
  }
  // First gate of one token in (B, T, G, H, D); gates are H * D apart.
  std::int64_t gates_offset(std::int64_t row, std::int64_t t, std::int64_t head) const {
    const std::int64_t token = sequences.batch(row) * args.T + sequences.start(row) + t;
    return (token * kGates * args.H + head) * args.D;
  }
  std::int64_t hidden_offset(std::int64_t row, std::int64_t t, std::int64_t head) const {
    const std::int64_t token = sequences.batch(row) * args.T + sequences.start(row) + t;
    return (token * args.H + head) * args.D;
  }

  // Elements of a tile's state.
  std::int64_t plane() const { return rows * padded; }

  const Recurrence& args;
  Sequences sequences;
  std::int64_t units, padded, rows, tiles, heads, tokens;
  bool stream;  // write gate-sized tensors past the caches
};

// One row of a state, (S, B, H, D) to or from padded scratch.
template <class T>
void load_padded(T* padded, const T* row, std::int64_t D, std::int64_t padded_size) {
  for (std::int64_t d = 0; d < D; ++d) padded[d] = row ? row[d] : T{};
  for (std::int64_t d = D; d < padded_size; ++d) padded[d] = T{};
}

}  // namespace xlstm::XLSTM_ISA
