// Gradient of the recurrence over time, on CPU cores.
//   draw_t = Cell::step_grad        dh_{t-1} += R^T draw_t        dR = sum_t draw_t h_{t-1}^T
// Source: derived in cells/*.h from the forward equations.
// Tensors: launch.h. R is packed once per call, per head: [in block][gate, unit][lane].
// Tasks: recurrence.h. Accumulators: compute type. States are recomputed from a checkpoint every
//   kCheckpointInterval steps, without a matrix product, and that chunk's dR is added while its
//   operands are in cache; one partial dR per tile, summed in the order of tiles.
#include <cmath>

#include "common/simd.h"
#include "common/stream.h"
// The vector overloads of simd.h come before the templates that call them.
#include "cells/cells.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/recurrence.h"
#include "cpu/task.h"

namespace xlstm::XLSTM_ISA {
namespace {

// Accumulators of the two products, in rows and vectors: dh = R^T draw, and the outer product dR.
constexpr int kGradRows = kRegisters == 32 ? 8 : 6, kGradVectors = 2;
constexpr int kOuterRows = kRegisters == 32 ? 6 : 3, kOuterVectors = kRegisters == 32 ? 4 : 3;

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
  T* dr_parts;  // [tile][gate, unit (padded)][in (padded)] or null
  T* db_parts;  // [tile][gate][unit (padded)] or null
  CellOptions options;

  // A row of draw is kGates * padded long and one line longer in memory: rows a power of two apart
  // would all fall into the same few sets of the L1 cache.
  std::int64_t draw_row() const { return kGates * plan.padded + kW; }
  std::int64_t plane() const { return plan.plane(); }

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
          __builtin_prefetch(dh - args.dh_stride[1]);  // the step that comes next is the one before
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

  void load_last(const Tile& tile, T* d) const {
    const T* dlast = static_cast<const T*>(args.dlast);
    for (std::int64_t row = 0; row < tile.count; ++row) {
      const std::int64_t sequence = plan.sequences.sequence(tile.first + row);
      for (int s = 0; s < kStates; ++s) {
        load_padded(d + s * plane() + row * plan.padded,
                    dlast ? dlast + plan.state_offset(s, sequence, tile.head) : nullptr, args.D,
                    plan.padded);
      }
    }
  }

  void store_first(const Tile& tile, const T* d) const {
    for (std::int64_t row = 0; row < tile.count; ++row) {
      const std::int64_t sequence = plan.sequences.sequence(tile.first + row);
      for (int s = 0; s < kStates; ++s) {
        const T* from = d + s * plane() + row * plan.padded;
        T* to = static_cast<T*>(args.dstate) + plan.state_offset(s, sequence, tile.head);
        for (std::int64_t e = 0; e < args.D; ++e) to[e] = from[e];
      }
    }
  }

  // Steps [begin, end), a chunk or what there is of one, from the last to the first. `last`: no later
  // chunk has begun the tile's sums.
  void chunk(const Tile& tile, std::int64_t begin, std::int64_t end, bool last,
             const Buffers& buffers) const {
    const std::int64_t depth = kGates * plan.padded;
    T* db = db_parts ? db_parts + tile.index * depth : nullptr;
    zero_idle_rows(tile, begin, end, buffers);
    recompute(tile, begin, end, buffers);
    for (std::int64_t t = end - 1; t >= begin; --t) {
      const std::int64_t active = active_rows(tile, t);
      point_grads(tile, t, t - begin, active, buffers, db);
      gemm<kGradRows, kGradVectors>(active, plan.units, depth,
                                    buffers.draw + (t - begin) * plan.rows * draw_row(), draw_row(),
                                    1, packed + tile.head * packed_size(plan), kGradVectors * kW,
                                    kGradVectors * kW * depth, buffers.d, plan.padded, false);
      clip(buffers.d, active);
    }
    if (!dr_parts) return;
    gemm<kOuterRows, kOuterVectors>(depth, plan.units, (end - begin) * plan.rows, buffers.draw, 1,
                                    draw_row(), buffers.state, plan.padded, kOuterVectors * kW,
                                    dr_parts + tile.index * depth * plan.padded, plan.padded,
                                    !last);
  }

  void operator()(std::int64_t task) const {
    const TaskScope scope;
    const std::int64_t heads = plan.heads_of(task), depth = kGates * plan.padded;
    const std::int64_t state_size = kStates * (kChunk + 1) * plane();
    const std::int64_t aux_size = kChunk * plane() * Cell::kAux;
    const std::int64_t draw_size = kChunk * plan.rows * draw_row();
    const std::int64_t d_size = kStates * plane();
    Scratch scratch(
        static_cast<std::size_t>(state_size + aux_size + draw_size + heads * d_size) * sizeof(T),
        4);
    Buffers buffers{scratch.take<T>(state_size), scratch.take<T>(aux_size),
                    scratch.take<T>(draw_size), nullptr};
    T* d = scratch.take<T>(heads * d_size);
    // The longest sequence comes first.
    const std::int64_t longest = plan.sequences.length(plan.tile(task, 0).first);
    const std::int64_t chunks = ceil_div(longest, kChunk);
    for (std::int64_t n = 0; n < heads; ++n) {
      const Tile tile = plan.tile(task, n);
      load_last(tile, d + n * d_size);
      if (db_parts) load_padded<T>(db_parts + tile.index * depth, nullptr, 0, depth);
      if (dr_parts && chunks == 0) {
        load_padded<T>(dr_parts + tile.index * depth * plan.padded, nullptr, 0,
                       depth * plan.padded);
      }
    }
    for (std::int64_t c = chunks - 1; c >= 0; --c) {
      for (std::int64_t n = 0; n < heads; ++n) {
        buffers.d = d + n * d_size;
        chunk(plan.tile(task, n), c * kChunk, std::min((c + 1) * kChunk, longest), c + 1 == chunks,
              buffers);
      }
    }
    for (std::int64_t n = 0; args.dstate && n < heads; ++n) {
      store_first(plan.tile(task, n), d + n * d_size);
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
  const std::int64_t tiles = args.H * plan.tiles;
  const std::int64_t dr_size = args.dr ? tiles * matrix : 0;
  const std::int64_t db_size = args.db ? tiles * depth : 0;
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

void recurrence_backward(const RecurrenceBackward& args) {
  dispatch_cell(args.cell, [&](auto cell) {
    dispatch_dtype(args.dtype,
                   [&](auto element) { run_backward<decltype(cell), decltype(element)>(args); });
  });
}

}  // namespace xlstm::XLSTM_ISA
