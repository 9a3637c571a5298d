// Forward recurrence over time of a cell with a block-diagonal recurrent matrix, on CPU cores.
//   raw_t = x_t + R h_{t-1} + b        state_t = Cell::step(raw_t, state_{t-1})
// Source: arXiv 2405.04517, section 2.2; cells/*.h.
// Tensors: launch.h. R is packed once per call, per head: [unit block][in][gate][lane].
// Tasks: recurrence.h. Accumulators: compute type. Saved: raw, and the states before every
//   kCheckpointInterval-th step.
// Measured and left: R h on AMX tiles, both in three bfloat16 parts, takes 0.6 of the product's time, and
//   a step as long as here, since its sums pass through memory and wait for each other.
#include "common/pack.h"
#include "common/simd.h"
#include "common/stream.h"
// The vector overloads of simd.h and pack.h come before the templates that call them.
#include "cells/cells.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/recurrence.h"
#include "cpu/task.h"

namespace xlstm::XLSTM_ISA {
namespace {

// Accumulators of a tile: rows x 4 gates.
constexpr int kStepRows = kRegisters == 32 ? 6 : 3;
constexpr int kForwardRows = 4 * kStepRows;  // sequences of a task, at most
// Up to here the columns of R are read in place: packing costs more than it saves.
constexpr std::int64_t kUnpackedSteps = 4;

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

  // A tile, and its states: [rows][padded], [S][rows][padded].
  struct Walk {
    Tile tile;
    T *h, *h_next, *state;
    // A block prefetches for as many rows as its own, and the next may have fewer: spare ones follow.
    Row rows[kForwardRows + kStepRows];
  };

  Row row_at(const Tile& tile, std::int64_t row) const {
    const std::int64_t at = tile.first + row;
    const Element* x = static_cast<const Element*>(args.x) +
                       plan.sequences.batch(at) * args.x_stride[0] +
                       plan.sequences.start(at) * args.x_stride[1] + tile.head * args.x_stride[3];
    return {x, static_cast<Element*>(args.h) + plan.hidden_offset(at, 0, tile.head),
            args.raw ? static_cast<T*>(args.raw) + plan.gates_offset(at, 0, tile.head) : nullptr};
  }

  // R h from packed R. Asks for the next block's x on the way.
  template <int kRows>
  XLSTM_HD void product_packed(const T* h, std::int64_t head, std::int64_t unit, const Ahead& ahead,
                               V (&raw)[kRows][kGates]) const {
    const std::int64_t D = args.D, part = D / kRows;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) raw[i][g] = V{};
    }
    const T* b = packed + (head * plan.units + unit) * D * kGates * kW;
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
  }

  // R h from R in place; to memory, since lane by lane it would keep vectors out of registers.
  template <int kRows>
  void product_in_place(const T* h, std::int64_t head, std::int64_t unit,
                        T (&raw)[kRows][kGates][kW]) const {
    const std::int64_t D = args.D;
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
          raw[i][g][lane] = horizontal_sum(sum[i]);
          for (std::int64_t rest = k; rest < D; ++rest)
            raw[i][g][lane] += row[rest] * h[i * plan.padded + rest];
        }
      }
    }
  }

  // R h of kRows rows and one unit block, gates x lanes each.
  template <int kRows>
  XLSTM_HD void product(const T* h, std::int64_t head, std::int64_t unit, const Ahead& ahead,
                        V (&raw)[kRows][kGates]) const {
    if (packed) return product_packed<kRows>(h, head, unit, ahead, raw);
    T sums[kRows][kGates][kW]{};
    product_in_place<kRows>(h, head, unit, sums);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) raw[i][g] = load(static_cast<const T*>(sums[i][g]));
    }
  }

  // One step of kRows rows and one unit block; kFull: the block has no lanes beyond D. state is
  // [S][rows][padded]; h apart, since every unit block of the step reads it.
  template <int kRows, bool kFull>
  void step(const Row* rows, std::int64_t t, std::int64_t head, std::int64_t unit,
            const Ahead& ahead, const T* h, T* h_next, T* state) const {
    const int lanes = kFull ? kW : plan.lanes(unit);
    const std::int64_t column = unit * kW, gate = args.H * args.D, plane = plan.plane();
    // x comes last: a sum that starts at a large x would round every product to its last bit.
    V raw[kRows][kGates];
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

  void save_checkpoint(const Walk& walk, std::int64_t active, std::int64_t chunk) const {
    const std::int64_t plane = plan.plane();
    for (std::int64_t row = 0; row < active; ++row) {
      const std::int64_t n = plan.sequences.checkpoint(walk.tile.first + row, chunk);
      for (int s = 0; s < kStates; ++s) {
        const T* from = (s == 0 ? walk.h : walk.state + s * plane) + row * plan.padded;
        T* to = static_cast<T*>(args.checkpoints) +
                plan.checkpoint_offset(n, kStates, s, walk.tile.head);
        for (std::int64_t d = 0; d < args.D; ++d) to[d] = from[d];
      }
    }
  }

  // One step of the tile's first `active` rows; `after`: the x that is read next.
  void step_all(Walk& walk, std::int64_t active, std::int64_t t, const Ahead& after) const {
    const std::int64_t block = ceil_div(active, ceil_div(active, kStepRows));
    for (std::int64_t unit = 0; unit < plan.units; ++unit) {
      for (std::int64_t row = 0; row < active; row += block) {
        const std::int64_t at = row * plan.padded;
        const Row* rows = walk.rows + row;
        Ahead ahead{rows + block, t * args.x_stride[1] + unit * kW};
        if (row + block >= active) {
          ahead = unit + 1 == plan.units ? after
                                         : Ahead{walk.rows, t * args.x_stride[1] + (unit + 1) * kW};
        }
        const int count = static_cast<int>(active - row < block ? active - row : block);
        with_constant<kStepRows>(count, [&](auto n) {
          const T* h = walk.h + at;
          T *h_next = walk.h_next + at, *state = walk.state + at;
          if (plan.lanes(unit) == kW) {
            step<n(), true>(rows, t, walk.tile.head, unit, ahead, h, h_next, state);
          } else {
            step<n(), false>(rows, t, walk.tile.head, unit, ahead, h, h_next, state);
          }
        });
      }
    }
    std::swap(walk.h, walk.h_next);
  }

  // The last state of a row.
  void save_last(const Walk& walk, std::int64_t row) const {
    const std::int64_t sequence = plan.sequences.sequence(walk.tile.first + row);
    const std::int64_t plane = plan.plane();
    for (int s = 0; s < kStates; ++s) {
      const T* from = (s == 0 ? walk.h : walk.state + s * plane) + row * plan.padded;
      T* to = static_cast<T*>(args.last) + plan.state_offset(s, sequence, walk.tile.head);
      for (std::int64_t d = 0; d < args.D; ++d) to[d] = from[d];
    }
  }

  void start(const Tile& tile, Scratch& scratch, Walk& walk) const {
    const std::int64_t plane = plan.plane();
    walk.tile = tile;
    walk.h = scratch.take<T>(plane);
    walk.h_next = scratch.take<T>(plane);
    walk.state = scratch.take<T>(kStates * plane);
    const T* given = static_cast<const T*>(args.state);
    for (std::int64_t row = 0; row < tile.count; ++row) {
      const std::int64_t sequence = plan.sequences.sequence(tile.first + row);
      for (int s = 0; s < kStates; ++s) {
        T* to = (s == 0 ? walk.h : walk.state + s * plane) + row * plan.padded;
        load_padded(to, given ? given + plan.state_offset(s, sequence, tile.head) : nullptr, args.D,
                    plan.padded);
      }
    }
    for (std::int64_t row = 0; row < kForwardRows + kStepRows; ++row) {
      walk.rows[row] = row_at(tile, row < tile.count ? row : 0);
    }
  }

  void operator()(std::int64_t task) const {
    const TaskScope scope;
    const std::int64_t count = plan.heads_of(task);
    Scratch scratch(static_cast<std::size_t>(count * (kStates + 2) * plan.plane()) * sizeof(T),
                    3 * static_cast<int>(count));
    Walk walks[kHeadsAtOnce];
    for (std::int64_t n = 0; n < count; ++n) {
      start(plan.tile(task, n), scratch, walks[n]);
    }
    const Tile& tile = walks[0].tile;
    std::int64_t active = tile.count;
    for (std::int64_t t = 0;; ++t) {
      while (active > 0 && plan.sequences.length(tile.first + active - 1) == t) {
        --active;
        for (std::int64_t n = 0; n < count; ++n) save_last(walks[n], active);
      }
      if (active == 0) return;
      for (std::int64_t n = 0; n < count; ++n) {
        if (args.checkpoints && t % kChunk == 0) save_checkpoint(walks[n], active, t / kChunk);
        const bool last = n + 1 == count;
        step_all(walks[n], active, t,
                 {walks[last ? 0 : n + 1].rows, (last ? t + 1 : t) * args.x_stride[1]});
      }
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

}  // namespace

void recurrence_forward(const RecurrenceForward& args) {
  dispatch_cell(args.cell, [&](auto cell) {
    dispatch_dtype(args.dtype,
                   [&](auto element) { run_forward<decltype(cell), decltype(element)>(args); });
  });
}

}  // namespace xlstm::XLSTM_ISA
