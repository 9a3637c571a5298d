// The threads that share a row of logits: those of a block, or of a cluster of blocks that each have a
// slice of it.
#pragma once

#include <cstdint>
#include <limits>

#include "cuda/shared.h"
#include "cuda/sync.h"

namespace xlstm {

constexpr int kWarpThreads = 32;

struct Sum {
  static constexpr double kNothing = 0;
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};
struct Largest {  // NaN is passed over
  static constexpr double kNothing = -std::numeric_limits<double>::infinity();
  __device__ __forceinline__ double operator()(double a, double b) const { return a > b ? a : b; }
};

class RowGroup {
 public:
  static constexpr int kMaxWarps = 16, kMaxBlocks = 8;
  static constexpr int kMost = 8;  // values of one reduction
  static constexpr int kAnswerBytes = 128;
  static constexpr int kSharedBytes = 8 * kMost * (kMaxWarps + 2 * kMaxBlocks) + kAnswerBytes;

  __device__ __forceinline__ RowGroup(Shared& shared, int blocks)
      : blocks_(blocks),
        thread_(static_cast<int>(threadIdx.x)),
        threads_(static_cast<int>(blockDim.x)),
        block_(blocks > 1 ? static_cast<int>(cluster_rank()) : 0),
        of_warps_(shared.take<double>(kMost * kMaxWarps)),
        of_blocks_(shared.take<double>(2 * kMost * kMaxBlocks)),
        answer_(shared.take<double>(kAnswerBytes / 8)) {
    if (blocks_ > 1) cluster_sync();  // another block's shared memory is there once it runs
  }

  __device__ __forceinline__ int thread() const { return thread_; }
  __device__ __forceinline__ int threads() const { return threads_; }
  __device__ __forceinline__ int block() const { return block_; }
  // One thread of the row.
  __device__ __forceinline__ bool leads() const { return thread_ == 0 && block_ == 0; }

  // The values of all threads of the row, combined in an order that never changes. One thread of each
  // block calls answer(values); every thread gets what it returns. All of the row wait here.
  template <int kCount, class Op, class Answer>
  __device__ __forceinline__ auto reduce(double (&values)[kCount], Op op, Answer answer) {
    static_assert(kCount <= kMost);
    using Result = decltype(answer(values));
    static_assert(sizeof(Result) <= kAnswerBytes);
    const int warp = thread_ / kWarpThreads, lane = thread_ % kWarpThreads;
    over_lanes(values, op);
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) of_warps_[warp * kMost + k] = values[k];
    }
    __syncthreads();
    if (warp == 0) {
      const bool filled = lane < threads_ / kWarpThreads;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        values[k] = filled ? of_warps_[lane * kMost + k] : Op::kNothing;
      }
      over_lanes(values, op);
    }
    if (blocks_ > 1) over_blocks(values, op);
    if (thread_ == 0) *reinterpret_cast<Result*>(answer_) = answer(values);
    __syncthreads();
    return *reinterpret_cast<const Result*>(answer_);
  }

 private:
  template <int kCount, class Op>
  static __device__ __forceinline__ void over_lanes(double (&values)[kCount], Op op) {
#pragma unroll
    for (int apart = kWarpThreads / 2; apart > 0; apart /= 2) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        values[k] = op(values[k], __shfl_xor_sync(0xffffffffu, values[k], apart));
      }
    }
  }

  // Every block writes to all of them, to one of two places by turns: a slow thread may still read
  // what came before.
  template <int kCount, class Op>
  __device__ __forceinline__ void over_blocks(double (&values)[kCount], Op op) {
    double* const here = of_blocks_ + turn_ * kMost * kMaxBlocks;
    turn_ ^= 1;
    if (thread_ < blocks_) {
      double* const there = map_shared(here, static_cast<unsigned>(thread_)) + block_ * kMost;
#pragma unroll
      for (int k = 0; k < kCount; ++k) there[k] = values[k];
    }
    cluster_sync();
    if (thread_ != 0) return;
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] = here[k];
    for (int other = 1; other < blocks_; ++other) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) values[k] = op(values[k], here[other * kMost + k]);
    }
  }

  const int blocks_, thread_, threads_, block_;
  double *of_warps_, *of_blocks_, *answer_;
  int turn_ = 0;
};

}  // namespace xlstm
