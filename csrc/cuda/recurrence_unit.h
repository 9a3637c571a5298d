// One unit of one sequence, in the registers of a thread: what a step reads, computes and writes beside
// the product with R.
#pragma once

#include "cells/options.h"
#include "cuda/prefetch.h"
#include "cuda/recurrence.h"
#include "cuda/recurrence_launch.h"

namespace xlstm {

using XLSTM_ISA::CellOptions;

constexpr int kAhead = 4;  // so many steps take longer than memory does

// Asks for what the units of a warp from `unit` on will read: a lane for one gate of one sequence.
struct AskForward {
  __device__ __forceinline__ AskForward(const RecurrenceForward& args, const Work& work, int unit,
                                        const Lane& lane) {
    const Sequence sequence(args, work.first + lane.group);
    end = unit < args.D ? sequence.length : 0;
    const std::int64_t first = sequence.offset(args, args.x_stride[0], args.x_stride[1]) +
                               lane.part * args.x_stride[2] + work.head * args.x_stride[3] + unit;
    x = static_cast<const char*>(args.x) + first * size_of(args.dtype);
    for (int t = 0; t < kAhead; ++t) ask(args, t);
  }
  __device__ __forceinline__ void ask(const RecurrenceForward& args, int t) const {
    if (t < end) prefetch(x + t * args.x_stride[1] * size_of(args.dtype));
  }

  int end;
  const char* x;
};

// In the forward pass; `at` is the unit's place among H x D.
template <class Cell>
struct Unit {
  static constexpr int kStates = Cell::kStates;

  __device__ __forceinline__ Unit(const RecurrenceForward& args, const Work& work, int column,
                                  int unit)
      : column(args, work.first + column), end(unit < args.D ? this->column.length : 0) {
    const Sequence sequence(args, this->column.b);
    x_at = sequence.offset(args, args.x_stride[0], args.x_stride[1]) +
           work.head * args.x_stride[3] + unit;
    const bool given = args.state && unit < args.D && this->column.b < args.B;
    const std::int64_t at = state_offset(args, work.head * args.D + unit);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      state[s] =
          given ? static_cast<const float*>(args.state)[at + s * args.B * args.H * args.D] : 0.0f;
    }
  }

  __device__ __forceinline__ std::int64_t state_offset(const Recurrence& args,
                                                       std::int64_t at) const {
    return column.b * args.H * args.D + at;
  }

  __device__ __forceinline__ void fetch(const RecurrenceForward& args, int t) {
    if (t >= end) return;
    const std::int64_t from = x_at + t * args.x_stride[1];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      x[g] = load_element(args.x, from + g * args.x_stride[2], args.dtype);
    }
  }

  // From R h, and this step's x.
  __device__ __forceinline__ void step(const RecurrenceForward& args, int t, std::int64_t at,
                                       const float (&product)[kGates], const float (&x_t)[kGates],
                                       const float (&b)[kGates], const CellOptions& options) {
    if (t >= end) return;
    const std::int64_t width = args.H * args.D, token = column.token + t;
    if (args.checkpoints && t % kCheckpointInterval == 0) {
      const std::int64_t row = Sequence(args, column.b).checkpoint(args, t);
      float* to = static_cast<float*>(args.checkpoints) + row * kStates * width + at;
#pragma unroll
      for (int s = 0; s < kStates; ++s) to[s * width] = state[s];
    }
    float raw[kGates], next[kStates], aux[Cell::kAux];
#pragma unroll
    for (int g = 0; g < kGates; ++g) raw[g] = product[g] + x_t[g] + b[g];
    if (args.raw) {
      float* to = static_cast<float*>(args.raw) + token * kGates * width + at;
#pragma unroll
      for (int g = 0; g < kGates; ++g) to[g * width] = raw[g];
    }
    Cell::template step<false>(raw, state, next, aux, options);
#pragma unroll
    for (int s = 0; s < kStates; ++s) state[s] = next[s];
    store_element(args.h, token * width + at, args.dtype, next[0]);
  }

  __device__ __forceinline__ void finish(const RecurrenceForward& args, std::int64_t at) const {
    if (column.b >= args.B) return;
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      const std::int64_t plane = s * args.B * args.H * args.D;
      static_cast<float*>(args.last)[plane + state_offset(args, at)] = state[s];
    }
  }

  Column column;
  int end;            // steps of this unit: none where it only fills up the shape
  std::int64_t x_at;  // of gate i at time 0
  float state[kStates];
  float x[kGates]{};  // fetched last
};

// The same in the backward pass, which walks down: raw of the chunk before this one, whose states are
// recomputed from it one by one, and dh.
struct AskBackward {
  __device__ __forceinline__ AskBackward(const RecurrenceBackward& args, const Work& work, int unit,
                                         const Lane& lane) {
    const Column column(args, work.first + lane.group);
    end = unit < args.D ? column.length : 0;
    const std::int64_t at = work.head * args.D + unit, width = args.H * args.D;
    raw = static_cast<const float*>(args.raw) + (column.token * kGates + lane.part) * width + at;
    const int last = (work.longest - 1) / kCheckpointInterval * kCheckpointInterval;
    for (int t = last; t < work.longest; ++t) ask_raw(args, t);
    if (!args.dh || lane.part != 0) return;  // the lanes of one gate are enough
    const std::int64_t first =
        Sequence(args, column.b).offset(args, args.dh_stride[0], args.dh_stride[1]) +
        work.head * args.dh_stride[2] + unit;
    dh = static_cast<const char*>(args.dh) + first * size_of(args.dtype);
  }
  // Before step t.
  __device__ __forceinline__ void ask(const RecurrenceBackward& args, int t) const {
    ask_raw(args, t - kCheckpointInterval);
    t -= kAhead;
    if (dh && t >= 0 && t < end) prefetch(dh + t * args.dh_stride[1] * size_of(args.dtype));
  }
  __device__ __forceinline__ void ask_raw(const RecurrenceBackward& args, int t) const {
    if (t >= 0 && t < end) prefetch(raw + t * kGates * args.H * args.D);
  }

  int end;
  const float* raw;
  const char* dh = nullptr;
};

// In the backward pass; `at` is the unit's place among H x D. States come from scratch that the
// kPerThread units of each of a block's threads share.
template <class Cell, int kPerThread>
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
      for (int s = 1; s < kStates; ++s, to += kPerThread * blockDim.x) *to = state[s];
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
    for (int s = 1; s < kStates; ++s) prev[s] = from[(s - 1) * kPerThread * blockDim.x];
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

// Sums db of a unit over its columns, which are in the lanes that differ in bits kColumnLanes, and writes
// that as part `part` of db.
template <int kColumnLanes>
__device__ __forceinline__ void store_db(const RecurrenceBackward& args,
                                         const RecurrenceScratch& scratch, int part, int head,
                                         int unit, float (&db)[kGates]) {
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) {
      if (kColumnLanes & bit) db[g] += __shfl_xor_sync(0xffffffffu, db[g], bit);
    }
    if (!scratch.db_parts || threadIdx.x & kColumnLanes || unit >= args.D) continue;
    const std::int64_t row = static_cast<std::int64_t>(part * kGates + g) * args.H + head;
    static_cast<float*>(scratch.db_parts)[row * args.D + unit] = db[g];
  }
}

}  // namespace xlstm
