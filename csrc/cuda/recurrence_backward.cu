// Gradient of the recurrence over time, R^T in registers.
//   draw_t = Cell::step_grad        dh_{t-1} += R^T draw_t        dR = sum_t draw_t h_{t-1}^T
// Source: derived in cells/*.h from the forward equations.
// Tensors: launch.h. draw between the two: [column][gate, unit] in shared memory, twice.
// Grid: (tile of sequences, head); a warp has 16 units, a thread two of them for two sequences. Sums and
//   states float32; one barrier a step. States are recomputed from a checkpoint every
//   kCheckpointInterval steps, without a matrix product, into scratch that only their thread reads.
//   dR is left to a matrix product over draw and h_{t-1}, both written here; db is one partial sum per
//   block. Nothing is added in an order that depends on timing.
#include "cells/cells.h"
#include "cuda/kernel_launch.h"
#include "cuda/recurrence.h"
#include "cuda/recurrence_launch.h"

namespace xlstm {
namespace {

using XLSTM_ISA::CellOptions;

// One unit of one sequence; `at` is the unit's place among H x D.
template <class Cell>
struct UnitGrad {
  static constexpr int kStates = Cell::kStates;

  __device__ __forceinline__ void start(const RecurrenceBackward& args, const Column& column,
                                        int head, int unit) {
    end = unit < args.D ? column.length : 0;
    const std::int64_t at = (column.b * args.H + head) * args.D + unit;
    const bool given = args.dlast && unit < args.D && column.b < args.B;
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      d[s] =
          given ? static_cast<const float*>(args.dlast)[s * args.B * args.H * args.D + at] : 0.0f;
    }
  }

  __device__ __forceinline__ void load_raw(const RecurrenceBackward& args, const Column& column,
                                           std::int64_t at, int t, float (&to)[kGates]) const {
    const std::int64_t width = args.H * args.D;
    const float* from =
        static_cast<const float*>(args.raw) + (column.token + t) * kGates * width + at;
#pragma unroll
    for (int g = 0; g < kGates; ++g) to[g] = from[g * width];
  }

  // Writes the states before each step of [begin, stop) to `to`, and h before it to h_prev.
  __device__ __forceinline__ void recompute(const RecurrenceBackward& args, void* h_prev,
                                            const Column& column, std::int64_t at, int begin,
                                            int stop, float* to, const CellOptions& options) const {
    if (begin >= end) return;
    const std::int64_t width = args.H * args.D;
    float state[kStates], next[kStates], gates[kGates], aux[Cell::kAux];
    const std::int64_t row = Sequence(args, column.b).checkpoint(args, begin);
    const float* from = static_cast<const float*>(args.checkpoints) + row * kStates * width + at;
#pragma unroll
    for (int s = 0; s < kStates; ++s) state[s] = from[s * width];
#pragma unroll 1
    for (int t = begin; t < stop && t < end; ++t) {
      if (h_prev) {
        store_element(h_prev, (column.token + t) * width + at, args.dtype, state[0]);
      }
      load_raw(args, column, at, t, gates);
#pragma unroll
      for (int s = 1; s < kStates; ++s, to += 4 * blockDim.x) *to = state[s];
      Cell::template step<false>(gates, state, next, aux, options);
#pragma unroll
      for (int s = 0; s < kStates; ++s) state[s] = next[s];
    }
  }

  // What step t will need from memory; the states before it from `from`.
  __device__ __forceinline__ void fetch(const RecurrenceBackward& args, const Column& column,
                                        int head, int unit, int t, const float* from) {
    if (t >= end) return;
    load_raw(args, column, head * args.D + unit, t, raw);
    prev[0] = 0.0f;  // step reads h through R alone
#pragma unroll
    for (int s = 1; s < kStates; ++s) prev[s] = from[(s - 1) * 4 * blockDim.x];
    dh = 0.0f;
    if (!args.dh) return;
    const std::int64_t first =
        Sequence(args, column.b).offset(args, args.dh_stride[0], args.dh_stride[1]);
    dh = load_element(args.dh, first + t * args.dh_stride[1] + head * args.dh_stride[2] + unit,
                      args.dtype);
  }

  // draw of step t, from d of the states after it; d becomes that of the states before, but for R^T draw.
  __device__ __forceinline__ void step(const RecurrenceBackward& args, const Column& column,
                                       std::int64_t at, int t, const CellOptions& options,
                                       float (&draw)[kGates]) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) draw[g] = 0.0f;
    if (t >= end) return;
    float next[kStates], aux[Cell::kAux];
    Cell::template step<true>(raw, prev, next, aux, options);
    d[0] += dh;
    Cell::step_grad(prev, next, aux, d, draw);
    const std::int64_t width = args.H * args.D;
    const std::int64_t to = (column.token + t) * kGates * width + at;
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      store_element(args.dx, to + g * width, args.dtype, draw[g]);
    }
  }

  // R^T draw of step t, as the gradient of the h before it.
  __device__ __forceinline__ void receive(int t, float product, float bound) {
    if (t >= end) return;
    d[0] = product > bound ? bound : product < -bound ? -bound : product;
  }

  __device__ __forceinline__ void finish(const RecurrenceBackward& args, const Column& column,
                                         int head, int unit) const {
    if (!args.dstate || unit >= args.D || column.b >= args.B) return;
    const std::int64_t at = (column.b * args.H + head) * args.D + unit;
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      static_cast<float*>(args.dstate)[s * args.B * args.H * args.D + at] = d[s];
    }
  }

  int end;           // steps of this unit: none where it only fills up the shape
  float d[kStates];  // gradient of the states after the step in hand
  float raw[kGates], prev[kStates], dh;
};

// Sums over the columns, and writes this block's part of db.
__device__ __forceinline__ void store_db(const RecurrenceBackward& args,
                                         const RecurrenceScratch& scratch, const BlockOfWork& work,
                                         const Lane& lane, int unit, float (&db)[kGates]) {
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    db[g] += __shfl_xor_sync(0xffffffffu, db[g], 1);
    db[g] += __shfl_xor_sync(0xffffffffu, db[g], 2);
    if (!scratch.db_parts || lane.part != 0 || unit >= args.D) continue;
    const std::int64_t row =
        static_cast<std::int64_t>(work.first / kColumns * kGates + g) * args.H + work.head;
    static_cast<float*>(scratch.db_parts)[row * args.D + unit] = db[g];
  }
}

template <class Cell, int kPerWord, int kWidth>
__global__ void __launch_bounds__(RecurrenceShape<false, kPerWord, kWidth>::kThreads, 1)
    recurrence_backward_kernel(RecurrenceBackward args, RecurrenceScratch scratch, bool short_r) {
  using Shape = RecurrenceShape<false, kPerWord, kWidth>;
  Shared shared;
  const BlockOfWork work(args);
  const Lane lane;
  const int first_unit = lane.warp * Shape::kUnits + lane.group;
  const float bound = static_cast<float>(args.clip_grad);
  CellOptions options;
  options.n_floor = args.n_floor;

  std::uint32_t* rows = shared.take<std::uint32_t>(Shape::kOperandWords);
  Matrix<Shape> matrix;
  matrix.template fill<kPerWord>(shared, [&](int tile, int w, int at) {
    const int in = first_unit + w % 2 * 8;
    const int k = (tile * kTileWords + lane.part + w / 2 * 4) * kPerWord + at;
    const std::int64_t row = (k / kWidth * args.H + work.head) * args.D + k % kWidth;
    return in < args.D && k % kWidth < args.D ? static_cast<const float*>(args.r)[row * args.D + in]
                                              : 0.0f;
  });

  const int column = lane.part * 2;
  const Column columns[2] = {{args, work.first + column}, {args, work.first + column + 1}};
  // Unit e is of row e / 2 and column e % 2.
  const auto unit_of = [&](int e) { return first_unit + e / 2 * 8; };
  const auto place_of = [&](int e) { return work.head * args.D + unit_of(e); };
  // Scratch: [block][slot][state][unit of the thread][thread].
  const auto states_at = [&](int e, int slot) {
    const std::int64_t step = (Cell::kStates - 1) * 4 * Shape::kThreads;
    return static_cast<float*>(scratch.states) + (blockIdx.x * kCheckpointInterval + slot) * step +
           e * Shape::kThreads + threadIdx.x;
  };
  UnitGrad<Cell> units[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) units[e].start(args, columns[e % 2], work.head, unit_of(e));
  float db[2][kGates]{};
  int turn = 0;
#pragma unroll 1
  for (int begin = (work.longest - 1) / kCheckpointInterval * kCheckpointInterval;
       begin >= 0 && work.longest > 0; begin -= kCheckpointInterval) {
    const int stop =
        begin + kCheckpointInterval < work.longest ? begin + kCheckpointInterval : work.longest;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      units[e].recompute(args, scratch.h_prev, columns[e % 2], place_of(e), begin, stop,
                         states_at(e, 0), options);
      units[e].fetch(args, columns[e % 2], work.head, unit_of(e), stop - 1,
                     states_at(e, stop - 1 - begin));
    }
#pragma unroll 1
    for (int t = stop - 1; t >= begin; --t, turn ^= 1) {
      std::uint32_t* const now = rows + turn * Shape::kStepWords;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float draw[kGates];
        units[e].step(args, columns[e % 2], place_of(e), t, options, draw);
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          db[e / 2][g] += draw[g];
          store_operand<Shape, kPerWord>(now + (column + e % 2) * Shape::kRowWords,
                                         g * kWidth + unit_of(e), draw[g]);
        }
        if (t > begin) {
          units[e].fetch(args, columns[e % 2], work.head, unit_of(e), t - 1,
                         states_at(e, t - 1 - begin));
        }
      }
      __syncthreads();
      ProductSum<kPerWord> sums[1];
      matrix.multiply(now, lane, short_r, sums);
#pragma unroll
      for (int e = 0; e < 4; ++e) units[e].receive(t, sums[0][e], bound);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) units[e].finish(args, columns[e % 2], work.head, unit_of(e));
  store_db(args, scratch, work, lane, unit_of(0), db[0]);
  store_db(args, scratch, work, lane, unit_of(2), db[1]);
}

template <class Cell, int kPerWord>
void run_backward(const RecurrenceBackward& args, const RecurrenceScratch& scratch, DType r_digits,
                  void* stream) {
  dispatch_width<kPerWord>(args.D, [&](auto width) {
    using Shape = RecurrenceShape<false, kPerWord, width()>;
    const auto blocks = static_cast<unsigned>(ceil_div(args.B, kColumns) * args.H);
    launch("recurrence_backward", {blocks, Shape::kThreads, Shape::kSharedBytes}, stream,
           recurrence_backward_kernel<Cell, kPerWord, width()>, args, scratch,
           r_digits != DType::kFloat32);
  });
}

}  // namespace

void recurrence_backward_cuda(const RecurrenceBackward& args, const RecurrenceScratch& scratch,
                              DType r_digits, void* stream) {
  XLSTM_ISA::dispatch_cell(args.cell, [&](auto cell) {
    if (r_digits == DType::kBFloat16) {
      run_backward<decltype(cell), 2>(args, scratch, r_digits, stream);
    } else {
      run_backward<decltype(cell), 1>(args, scratch, r_digits, stream);
    }
  });
}

}  // namespace xlstm
