// Recurrence over time of a cell with a block-diagonal recurrent matrix, on CPU cores.
//   raw_t = x_t + R h_{t-1} + b        state_t = Cell::step(raw_t, state_{t-1})
//   draw_t = Cell::step_grad           dh_{t-1} += R^T draw_t        dR = sum_t draw_t h_{t-1}^T
// Source: arXiv 2405.04517, section 2.2; gradients in cells/*.h.
// Tensors: launch.h. R is packed once per call, per head: [unit block][in][gate][lane] for raw,
//   [in block][gate, unit][lane] for R^T.
// Tasks: (head, tile of sequences); a tile keeps its states in cache and walks all of time on one
//   core, so nothing is synchronised between steps. Accumulators: compute type. Backward recomputes
//   states from a checkpoint every kCheckpointInterval steps, without a matrix product, and adds that
//   chunk's dR while its operands are in cache. One partial dR per tile, summed in the order of tiles.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/pack.h"
#include "common/simd.h"
// The vector overloads of simd.h come before the templates that call them.
#include "cells/cells.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/task.h"

namespace xlstm::XLSTM_ISA {
namespace {

constexpr int kGates = 4;
// Accumulators of the forward tile: rows x 4 gates; of the others: rows x 2 or rows x 4 vectors.
constexpr int kStepRows = kRegisters == 32 ? 6 : 3;
constexpr int kForwardRows = 4 * kStepRows;  // sequences of a forward tile, at most
constexpr int kGradRows = kRegisters == 32 ? 8 : 6;
constexpr int kGradVectors = 2;
constexpr int kOuterRows = kRegisters == 32 ? 6 : 3;
constexpr int kOuterVectors = kRegisters == 32 ? 4 : 3;
constexpr int kChunk = kCheckpointInterval;
// Gate-sized tensors above this leave the cache before they are read again; writing them past it saves
// reading each line first, and R and the states keep their place.
constexpr std::int64_t kStreamBytes = std::int64_t{24} << 20;
// Products of one call up to which one thread does it sooner than several: about 10 us of them.
constexpr std::int64_t kSerialProducts = std::int64_t{1} << 19;
// Up to here the columns of R are read in place: packing costs more than it saves.
constexpr std::int64_t kUnpackedSteps = 4;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Sequences per tile: the fewest rounds over the threads, where a tile costs its rows plus about two
// rows' worth of streaming R. Outputs do not depend on it; the grouping of dR's sum does.
std::int64_t tile_rows(std::int64_t B, std::int64_t H, std::int64_t most) {
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

// Rows [first, first + count) of one head.
struct Tile {
  std::int64_t head, first, count;
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
        stream(args.B * args.T * args.H * args.D * kGates * std::int64_t{sizeof(T)} >
                   kStreamBytes &&
               args.D % kLanes<T> == 0) {}

  Tile tile(std::int64_t task) const {
    const std::int64_t first = task % tiles * rows;
    return {task / tiles, first, first + rows < args.B ? rows : args.B - first};
  }
  std::int64_t tasks() const { return tiles * args.H; }
  // Calls f(task) for each task; on this thread alone where waking the others takes longer.
  template <class F>
  void run(std::int64_t count, const F& f) const {
    if (args.B * args.T * args.H * args.D * args.D * kGates > kSerialProducts) {
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

  const Recurrence& args;
  Sequences sequences;
  std::int64_t units, padded, rows, tiles;
  bool stream;  // write gate-sized tensors past the caches
};

// One row of a state, (S, B, H, D) to or from padded scratch.
template <class T>
void load_padded(T* padded, const T* row, std::int64_t D, std::int64_t padded_size) {
  for (std::int64_t d = 0; d < D; ++d) padded[d] = row ? row[d] : T{};
  for (std::int64_t d = D; d < padded_size; ++d) padded[d] = T{};
}

// ------------------------------------------------------------------ forward

// [head][unit block][in][gate][lane], zero beyond D.
template <class T>
void pack_forward(const Plan<T>& plan, T* packed) {
  constexpr int kW = kLanes<T>;
  const std::int64_t D = plan.args.D, H = plan.args.H;
  const T* r = static_cast<const T*>(plan.args.r);
  auto pack = [&](std::int64_t task) {
    const std::int64_t head = task / plan.units, unit = task % plan.units;
    const int lanes = plan.lanes(unit);
    T* out = packed + task * D * kGates * kW;
    for (int g = 0; g < kGates; ++g) {
      const T* in = r + ((g * H + head) * D + unit * kW) * D;
      for (std::int64_t k = 0; k < D; ++k) {
        for (int lane = 0; lane < kW; ++lane) {
          out[(k * kGates + g) * kW + lane] = lane < lanes ? in[lane * D + k] : T{};
        }
      }
    }
  };
  plan.run(H * plan.units, pack);
}

template <class Cell, class Element>
struct ForwardTask {
  using T = compute_t<Element>;
  using V = Vec<T>;
  static constexpr int kW = kLanes<T>;
  static constexpr int kStates = Cell::kStates;

  const RecurrenceForward& args;
  const Plan<T>& plan;
  const T* packed;  // or null: read R in place
  CellOptions options;

  // Pointers of one row of the tile at time 0, for its head; null where a tensor is not wanted.
  struct Row {
    const Element* x;
    Element* h;
    T* raw;
  };

  // Where the next block's x is, for prefetching.
  struct Ahead {
    const Row* rows;
    std::int64_t offset;
  };

  Row row_at(const Tile& tile, std::int64_t row) const {
    const std::int64_t at = tile.first + row;
    const Element* x = static_cast<const Element*>(args.x) +
                       plan.sequences.batch(at) * args.x_stride[0] +
                       plan.sequences.start(at) * args.x_stride[1] + tile.head * args.x_stride[3];
    return {x, static_cast<Element*>(args.h) + plan.hidden_offset(at, 0, tile.head),
            args.raw ? static_cast<T*>(args.raw) + plan.gates_offset(at, 0, tile.head) : nullptr};
  }

  // raw of kRows rows and one unit block, gates x lanes each. Asks for the next step's x on the way.
  template <int kRows>
  XLSTM_HD void product(const T* h, std::int64_t head, std::int64_t unit, const Ahead& ahead,
                        V (&raw)[kRows][kGates]) const {
    const std::int64_t D = args.D;
    if (packed) {
      const T* b = packed + (head * plan.units + unit) * D * kGates * kW;
      const std::int64_t part = D / kRows;
#pragma GCC unroll 1
      for (int i = 0; i < kRows; ++i) {
        const Element* x = ahead.rows[i].x + ahead.offset;
#pragma GCC unroll 4
        for (int g = 0; g < kGates; ++g) __builtin_prefetch(x + g * args.x_stride[2]);
        const std::int64_t depth = i + 1 < kRows ? part : D - i * part;
        multiply<kRows, kGates>(depth, h, plan.padded, 1, b, kGates * kW, raw);
        h += depth;
        b += depth * kGates * kW;
      }
      return;
    }
    const T* r = static_cast<const T*>(args.r);
    for (int g = 0; g < kGates; ++g) {
      for (int lane = 0; lane < plan.lanes(unit); ++lane) {
        const T* row = r + ((g * args.H + head) * D + unit * kW + lane) * D;
        V sum[kRows]{};
        std::int64_t k = 0;
        for (; k + kW <= D; k += kW) {
          for (int i = 0; i < kRows; ++i) sum[i] += load(row + k) * load(h + i * plan.padded + k);
        }
        for (int i = 0; i < kRows; ++i) {
          T total = horizontal_sum(sum[i]);
          for (std::int64_t rest = k; rest < D; ++rest)
            total += row[rest] * h[i * plan.padded + rest];
          raw[i][g][lane] += total;
        }
      }
    }
  }

  // One step of kRows rows and one unit block; kFull: the block has no lanes beyond D. state is
  // [S][rows][padded]; h apart, since every unit block of the step reads it.
  template <int kRows, bool kFull>
  void step(const Row* rows, std::int64_t t, std::int64_t head, std::int64_t unit,
            const Ahead& ahead, const T* h, T* h_next, T* state) const {
    const int lanes = kFull ? kW : plan.lanes(unit);
    const std::int64_t column = unit * kW, gate = args.H * args.D, plane = plan.rows * plan.padded;
    // x comes last: a sum that starts at a large x would round every product to its last bit.
    V raw[kRows][kGates]{};
    product<kRows>(h, head, unit, ahead, raw);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Element* x = rows[i].x + t * args.x_stride[1] + column;
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g, x += args.x_stride[2]) {
        raw[i][g] += load(x, lanes);
      }
    }
    if (args.b) {
      const T* b = static_cast<const T*>(args.b) + head * args.D + column;
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g, b += gate) {
        const V b_g = load(b, lanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) raw[i][g] += b_g;
      }
    }
    if (args.raw) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        T* out = rows[i].raw + t * kGates * gate + column;
#pragma GCC unroll 4
        for (int g = 0; g < kGates; ++g, out += gate) {
          if (kFull && plan.stream) {
            store_streaming(out, raw[i][g]);
          } else {
            store(out, raw[i][g], lanes);
          }
        }
      }
    }
    using P = Pack<V, kRows>;
    P gates[kGates], prev[kStates], next[kStates], aux[Cell::kAux];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = i * plan.padded + column;
      for (int g = 0; g < kGates; ++g) gates[g].v[i] = raw[i][g];
      prev[0].v[i] = load(h + at);
      for (int s = 1; s < kStates; ++s)
        prev[s].v[i] = load(static_cast<const T*>(state + s * plane + at));
    }
    Cell::template step<false>(gates, prev, next, aux, options);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t at = i * plan.padded + column;
      store(h_next + at, next[0].v[i]);
      for (int s = 1; s < kStates; ++s) store(state + s * plane + at, next[s].v[i]);
      store(rows[i].h + t * gate + column, next[0].v[i], lanes);
    }
  }

  void save_checkpoint(const Tile& tile, std::int64_t active, std::int64_t chunk, const T* h,
                       const T* state) const {
    const std::int64_t plane = plan.rows * plan.padded;
    for (std::int64_t row = 0; row < active; ++row) {
      const std::int64_t n = plan.sequences.checkpoint(tile.first + row, chunk);
      for (int s = 0; s < kStates; ++s) {
        const T* from = (s == 0 ? h : state + s * plane) + row * plan.padded;
        T* to =
            static_cast<T*>(args.checkpoints) + plan.checkpoint_offset(n, kStates, s, tile.head);
        for (std::int64_t d = 0; d < args.D; ++d) to[d] = from[d];
      }
    }
  }

  void operator()(std::int64_t task) const {
    const TaskScope scope;
    const Tile tile = plan.tile(task);
    const std::int64_t plane = plan.rows * plan.padded;
    Scratch scratch(static_cast<std::size_t>((kStates + 2) * plane) * sizeof(T), 3);
    T* h = scratch.take<T>(plane);
    T* h_next = scratch.take<T>(plane);
    T* state = scratch.take<T>(kStates * plane);
    Row rows[kForwardRows];
    const T* given = static_cast<const T*>(args.state);
    for (std::int64_t row = 0; row < tile.count; ++row) {
      rows[row] = row_at(tile, row);
      const std::int64_t sequence = plan.sequences.sequence(tile.first + row);
      for (int s = 0; s < kStates; ++s) {
        T* to = (s == 0 ? h : state + s * plane) + row * plan.padded;
        load_padded(to, given ? given + plan.state_offset(s, sequence, tile.head) : nullptr, args.D,
                    plan.padded);
      }
    }
    std::int64_t active = tile.count;
    for (std::int64_t t = 0;; ++t) {
      // Sequences that end here hand over their state.
      while (active > 0 && plan.sequences.length(tile.first + active - 1) == t) {
        --active;
        const std::int64_t sequence = plan.sequences.sequence(tile.first + active);
        for (int s = 0; s < kStates; ++s) {
          const T* from = (s == 0 ? h : state + s * plane) + active * plan.padded;
          T* to = static_cast<T*>(args.last) + plan.state_offset(s, sequence, tile.head);
          for (std::int64_t d = 0; d < args.D; ++d) to[d] = from[d];
        }
      }
      if (active == 0) return;
      if (args.checkpoints && t % kChunk == 0) {
        save_checkpoint(tile, active, t / kChunk, h, state);
      }
      const std::int64_t block = ceil_div(active, ceil_div(active, kStepRows));
      for (std::int64_t unit = 0; unit < plan.units; ++unit) {
        for (std::int64_t row = 0; row < active; row += block) {
          const int count = static_cast<int>(active - row < block ? active - row : block);
          with_constant<kStepRows>(count, [&](auto n) {
            const std::int64_t at = row * plan.padded;
            const bool last_rows = row + block >= active;
            const bool last = last_rows && unit + 1 == plan.units;
            const Ahead ahead{last_rows ? rows : rows + row + block,
                              (last ? t + 1 : t) * args.x_stride[1] + (last        ? 0
                                                                       : last_rows ? unit + 1
                                                                                   : unit) *
                                                                          kW};
            if (plan.lanes(unit) == kW) {
              step<n(), true>(rows + row, t, tile.head, unit, ahead, h + at, h_next + at,
                              state + at);
            } else {
              step<n(), false>(rows + row, t, tile.head, unit, ahead, h + at, h_next + at,
                               state + at);
            }
          });
        }
      }
      T* swap = h;
      h = h_next;
      h_next = swap;
    }
  }
};

template <class Cell, class Element>
void run_forward(const RecurrenceForward& args) {
  using T = compute_t<Element>;
  const Plan<T> plan(args, kForwardRows);
  const bool pack = args.T > kUnpackedSteps;
  Scratch scratch(
      pack ? static_cast<std::size_t>(args.H * plan.padded * args.D) * kGates * sizeof(T) : 0, 1);
  T* packed = pack ? scratch.take<T>(args.H * plan.padded * args.D * kGates) : nullptr;
  if (pack) pack_forward(plan, packed);
  CellOptions options;
  options.n_floor = args.n_floor;
  const ForwardTask<Cell, Element> task{args, plan, packed, options};
  plan.run(plan.tasks(), task);
}

// ------------------------------------------------------------------ backward

// Elements of one head's packed R^T.
template <class T>
std::int64_t packed_size(const Plan<T>& plan) {
  return ceil_div(plan.units, kGradVectors) * kGradVectors * kLanes<T> * kGates * plan.padded;
}

// [head][in block of kGradVectors vectors][gate, unit (padded)][lane], zero beyond D.
template <class T>
void pack_backward(const Plan<T>& plan, T* packed) {
  constexpr int kW = kLanes<T>;
  const std::int64_t D = plan.args.D, H = plan.args.H;
  const T* r = static_cast<const T*>(plan.args.r);
  const std::int64_t depth = kGates * plan.padded;
  const std::int64_t blocks = ceil_div(plan.units, kGradVectors);
  auto pack = [&](std::int64_t task) {
    const std::int64_t head = task / blocks, first = task % blocks * kGradVectors;
    T* out = packed + task * depth * kGradVectors * kW;
    for (int g = 0; g < kGates; ++g) {
      for (std::int64_t d = 0; d < plan.padded; ++d) {
        const T* in = r + ((g * H + head) * D + d) * D;
        for (std::int64_t e = 0; e < kGradVectors * kW; ++e) {
          const std::int64_t column = first * kW + e;
          *out++ = d < D && column < D ? in[column] : T{};
        }
      }
    }
  };
  plan.run(H * blocks, pack);
}

template <class Cell, class Element>
struct BackwardTask {
  using T = compute_t<Element>;
  using V = Vec<T>;
  static constexpr int kW = kLanes<T>;
  static constexpr int kStates = Cell::kStates;

  const RecurrenceBackward& args;
  const Plan<T>& plan;
  const T* packed;
  T* dr_parts;  // [task][gate, unit (padded)][in (padded)] or null
  T* db_parts;  // [task][gate][unit (padded)] or null
  CellOptions options;

  // A row of draw is kGates * padded long and one line longer in memory: rows a power of two apart
  // would all fall into the same few sets of the L1 cache.
  std::int64_t draw_row() const { return kGates * plan.padded + kW; }
  std::int64_t plane() const { return plan.rows * plan.padded; }

  struct Buffers {
    T* state;  // [S][kChunk + 1][rows][padded]
    T* aux;    // [kChunk][rows][unit][kAux][lane]
    T* draw;   // [kChunk][rows][draw_row]
    T* d;      // [S][rows][padded]: gradient of the state after the step in hand
  };

  std::int64_t active_rows(const Tile& tile, std::int64_t t) const {
    std::int64_t active = tile.count;
    while (active > 0 && plan.sequences.length(tile.first + active - 1) <= t) --active;
    return active;
  }

  // States and activations of steps [begin, end), from the checkpoint before begin.
  void recompute(const Tile& tile, std::int64_t begin, std::int64_t end,
                 const Buffers& buffers) const {
    const std::int64_t slots = (kChunk + 1) * plane();
    for (std::int64_t row = 0; row < active_rows(tile, begin); ++row) {
      const std::int64_t at = tile.first + row;
      const std::int64_t n = plan.sequences.checkpoint(at, begin / kChunk);
      for (int s = 0; s < kStates; ++s) {
        const T* from = static_cast<const T*>(args.checkpoints) +
                        plan.checkpoint_offset(n, kStates, s, tile.head);
        load_padded(buffers.state + s * slots + row * plan.padded, from, args.D, plan.padded);
      }
      const std::int64_t stop = plan.sequences.length(at) < end ? plan.sequences.length(at) : end;
      const T* raw_at = static_cast<const T*>(args.raw) + plan.gates_offset(at, begin, tile.head);
      T* state = buffers.state + row * plan.padded;
      T* aux_at = buffers.aux + row * plan.units * Cell::kAux * kW;
      for (std::int64_t t = begin; t < stop; ++t) {
        // Blocks are independent of one another, so their chains overlap; steps are not.
        for (std::int64_t unit = 0; unit < plan.units; ++unit) {
          const int lanes = plan.lanes(unit);
          V prev[kStates], next[kStates], aux[Cell::kAux], raw[kGates];
          for (int s = 0; s < kStates; ++s) {
            prev[s] = load(static_cast<const T*>(state + s * slots + unit * kW));
          }
          for (int g = 0; g < kGates; ++g) {
            const T* raw_g = raw_at + g * args.H * args.D + unit * kW;
            raw[g] = load(raw_g, lanes);
            __builtin_prefetch(raw_g + kGates * args.H * args.D);
          }
          Cell::template step<true>(raw, prev, next, aux, options);
          for (int s = 0; s < kStates; ++s) store(state + plane() + s * slots + unit * kW, next[s]);
          for (int a = 0; a < Cell::kAux; ++a) store(aux_at + (unit * Cell::kAux + a) * kW, aux[a]);
        }
        raw_at += kGates * args.H * args.D;
        state += plane();
        aux_at += plan.rows * plan.units * Cell::kAux * kW;
      }
    }
  }

  // draw and the states' gradients of step t, `slot` steps into its chunk.
  void point_grads(const Tile& tile, std::int64_t t, std::int64_t slot, std::int64_t active,
                   const Buffers& buffers, T* db) const {
    const std::int64_t slots = (kChunk + 1) * plane();
    for (std::int64_t unit = 0; unit < plan.units; ++unit) {
      const int lanes = plan.lanes(unit);
      V db_G[kGates]{};
      for (std::int64_t row = 0; row < active; ++row) {
        const std::int64_t at = row * plan.padded + unit * kW;
        V prev[kStates], next[kStates], aux[Cell::kAux], draw[kGates];
        V d_state[kStates];
        for (int s = 0; s < kStates; ++s) {
          const T* state = buffers.state + s * slots + slot * plane() + at;
          prev[s] = load(state);
          next[s] = load(state + plane());
          d_state[s] = load(static_cast<const T*>(buffers.d + s * plane() + at));
        }
        const T* aux_at =
            buffers.aux + ((slot * plan.rows + row) * plan.units + unit) * Cell::kAux * kW;
        for (int a = 0; a < Cell::kAux; ++a) aux[a] = load(aux_at + a * kW);
        if (args.dh) {
          const std::int64_t r = tile.first + row;
          const Element* dh = static_cast<const Element*>(args.dh) +
                              plan.sequences.batch(r) * args.dh_stride[0] +
                              (plan.sequences.start(r) + t) * args.dh_stride[1] +
                              tile.head * args.dh_stride[2] + unit * kW;
          d_state[0] += load(dh, lanes);
        }
        Cell::step_grad(prev, next, aux, d_state, draw);
        for (int s = 1; s < kStates; ++s) store(buffers.d + s * plane() + at, d_state[s]);
        T* draw_at = buffers.draw + (slot * plan.rows + row) * draw_row() + unit * kW;
        Element* dx = static_cast<Element*>(args.dx) +
                      plan.gates_offset(tile.first + row, t, tile.head) + unit * kW;
        for (int g = 0; g < kGates; ++g) {
          store(draw_at + g * plan.padded, draw[g]);
          if (plan.stream) {
            store_streaming(dx + g * args.H * args.D, draw[g]);
          } else {
            store(dx + g * args.H * args.D, draw[g], lanes);
          }
          db_G[g] += draw[g];
        }
      }
      if (db) {
        for (int g = 0; g < kGates; ++g) {
          T* sum = db + g * plan.padded + unit * kW;
          store(sum, load(static_cast<const T*>(sum)) + db_G[g]);
        }
      }
    }
  }

  void clip(T* dh, std::int64_t active) const {
    if (!std::isfinite(args.clip_grad)) return;
    const T bound = static_cast<T>(args.clip_grad);
    for (std::int64_t at = 0; at < active * plan.padded; at += kW) {
      store(dh + at, clamp_min(clamp_max(load(static_cast<const T*>(dh + at)), bound), -bound));
    }
  }

  void operator()(std::int64_t task) const {
    const TaskScope scope;
    const Tile tile = plan.tile(task);
    const std::int64_t depth = kGates * plan.padded;
    const std::int64_t state_size = kStates * (kChunk + 1) * plane();
    const std::int64_t aux_size = kChunk * plane() * Cell::kAux;
    const std::int64_t draw_size = kChunk * plan.rows * draw_row();
    Scratch scratch(
        static_cast<std::size_t>(state_size + aux_size + draw_size + kStates * plane()) * sizeof(T),
        4);
    const Buffers buffers{scratch.take<T>(state_size), scratch.take<T>(aux_size),
                          scratch.take<T>(draw_size), scratch.take<T>(kStates * plane())};
    T* dr = dr_parts ? dr_parts + task * depth * plan.padded : nullptr;
    T* db = db_parts ? db_parts + task * depth : nullptr;
    if (db) load_padded<T>(db, nullptr, 0, depth);
    const T* dlast = static_cast<const T*>(args.dlast);
    for (std::int64_t row = 0; row < tile.count; ++row) {
      const std::int64_t sequence = plan.sequences.sequence(tile.first + row);
      for (int s = 0; s < kStates; ++s) {
        load_padded(buffers.d + s * plane() + row * plan.padded,
                    dlast ? dlast + plan.state_offset(s, sequence, tile.head) : nullptr, args.D,
                    plan.padded);
      }
    }
    // The longest sequence comes first.
    const std::int64_t longest = plan.sequences.length(tile.first);
    bool first_chunk = true;
    for (std::int64_t begin = (ceil_div(longest, kChunk) - 1) * kChunk; begin >= 0;
         begin -= kChunk) {
      const std::int64_t end = begin + kChunk < longest ? begin + kChunk : longest;
      zero_idle_rows(tile, begin, end, buffers);
      recompute(tile, begin, end, buffers);
      for (std::int64_t t = end - 1; t >= begin; --t) {
        const std::int64_t active = active_rows(tile, t);
        point_grads(tile, t, t - begin, active, buffers, db);
        gemm<kGradRows, kGradVectors>(
            active, plan.units, depth, buffers.draw + (t - begin) * plan.rows * draw_row(),
            draw_row(), 1, packed + tile.head * packed_size(plan), kGradVectors * kW,
            kGradVectors * kW * depth, buffers.d, plan.padded, false);
        clip(buffers.d, active);
      }
      if (dr) {
        gemm<kOuterRows, kOuterVectors>(depth, plan.units, (end - begin) * plan.rows, buffers.draw,
                                        1, draw_row(), buffers.state, plan.padded,
                                        kOuterVectors * kW, dr, plan.padded, !first_chunk);
      }
      first_chunk = false;
    }
    if (dr && first_chunk) load_padded<T>(dr, nullptr, 0, depth * plan.padded);
    if (!args.dstate) return;
    for (std::int64_t row = 0; row < tile.count; ++row) {
      const std::int64_t sequence = plan.sequences.sequence(tile.first + row);
      for (int s = 0; s < kStates; ++s) {
        const T* from = buffers.d + s * plane() + row * plan.padded;
        T* to = static_cast<T*>(args.dstate) + plan.state_offset(s, sequence, tile.head);
        for (std::int64_t d = 0; d < args.D; ++d) to[d] = from[d];
      }
    }
  }

  // Rows of the chunk that no step writes (ended sequences, the tile's unused rows) enter dR as zeros.
  void zero_idle_rows(const Tile& tile, std::int64_t begin, std::int64_t end,
                      const Buffers& buffers) const {
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t row = active_rows(tile, t); row < plan.rows; ++row) {
        const std::int64_t at = (t - begin) * plan.rows + row;
        load_padded<T>(buffers.draw + at * draw_row(), nullptr, 0, draw_row());
        load_padded<T>(buffers.state + at * plan.padded, nullptr, 0, plan.padded);
      }
    }
  }
};

// out[g][head][d][e] = sum over tiles, in their order.
template <class T>
void sum_parts(const Plan<T>& plan, const T* parts, std::int64_t columns,
               std::int64_t padded_columns, T* out) {
  const std::int64_t D = plan.args.D, H = plan.args.H;
  auto sum = [&](std::int64_t task) {
    const std::int64_t g = task / H, head = task % H;
    for (std::int64_t d = 0; d < D; ++d) {
      for (std::int64_t e = 0; e < columns; ++e) {
        T total{};
        for (std::int64_t tile = 0; tile < plan.tiles; ++tile) {
          total +=
              parts[(((head * plan.tiles + tile) * kGates + g) * plan.padded + d) * padded_columns +
                    e];
        }
        out[((g * H + head) * D + d) * columns + e] = total;
      }
    }
  };
  plan.run(kGates * H, sum);
}

template <class Cell, class Element>
void run_backward(const RecurrenceBackward& args) {
  using T = compute_t<Element>;
  const Plan<T> plan(args, args.D > 128 ? kGradRows : 2 * kGradRows);
  const std::int64_t depth = kGates * plan.padded, matrix = depth * plan.padded;
  const std::int64_t dr_size = args.dr ? plan.tasks() * matrix : 0;
  const std::int64_t db_size = args.db ? plan.tasks() * depth : 0;
  Scratch scratch(
      static_cast<std::size_t>(args.H * packed_size(plan) + dr_size + db_size) * sizeof(T), 3);
  T* packed = scratch.take<T>(args.H * packed_size(plan));
  pack_backward(plan, packed);
  T* dr_parts = args.dr ? scratch.take<T>(dr_size) : nullptr;
  T* db_parts = args.db ? scratch.take<T>(db_size) : nullptr;
  CellOptions options;
  options.n_floor = args.n_floor;
  const BackwardTask<Cell, Element> task{args, plan, packed, dr_parts, db_parts, options};
  plan.run(plan.tasks(), task);
  if (args.dr) sum_parts(plan, dr_parts, args.D, plan.padded, static_cast<T*>(args.dr));
  if (args.db) sum_parts(plan, db_parts, 1, 1, static_cast<T*>(args.db));
}

}  // namespace

void recurrence_forward(const RecurrenceForward& args) {
  dispatch_cell(args.cell, [&](auto cell) {
    dispatch_dtype(args.dtype,
                   [&](auto element) { run_forward<decltype(cell), decltype(element)>(args); });
  });
}

void recurrence_backward(const RecurrenceBackward& args) {
  dispatch_cell(args.cell, [&](auto cell) {
    dispatch_dtype(args.dtype,
                   [&](auto element) { run_backward<decltype(cell), decltype(element)>(args); });
  });
}

}  // namespace xlstm::XLSTM_ISA
