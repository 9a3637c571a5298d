// What losses over rows of student logits share on the device: how a row is cut, whether it counts,
// its hard-label part, and writing the gradient.
#pragma once

#include <cstdint>
#include <limits>

#include "cells/kl_div.h"
#include "cuda/kernel_launch.h"
#include "cuda/row_group.h"
#include "cuda/row_launch.h"
#include "cuda/row_logits.h"

namespace xlstm {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// What becomes of a row's gradient.
enum class Fate : int { kComputed, kZero, kNaN };

// The factor of the reduction: the number, or what was counted on the device.
struct RowScale {
  double number;
  const double* counted;
};
RowScale row_scale(const RowLoss& args, double* counted, void* stream);
// Into args.loss, if there is one.
void sum_rows(const RowLoss& args, RowScale scale, void* stream);

// A row of one call.
struct RowTask {
  std::int64_t n, label;
  double weight, scale;
  bool skipped, wrong;  // wrong: a label out of range, or a weight that is no finite number

  template <class C>
  __device__ __forceinline__ RowTask(const RowLoss& args, const RowScale& by, std::int64_t n, C one)
      : n(n), label(args.labels ? args.labels[n] : 0) {
    weight = args.row_weight ? static_cast<const C*>(args.row_weight)[n] : one;
    scale = weight * (by.counted ? *by.counted : by.number);
    const bool ignored = args.labels && label == args.ignore_index;
    skipped = ignored || weight == 0;
    if (skipped) weight = 0;  // whatever it was: a loss of 0 times NaN would be none
    // A negative one of a split row is another process's.
    const bool outside = label >= args.V_student || (label < 0 && args.phase == Phase::kWhole);
    if (outside) label = 0;
    wrong = outside || !(::fabs(scale) < XLSTM_ISA::kInfinity);
  }
};

// The sums of a row at temperature 1 that the hard-label part asks for, relative to the largest logit.
template <class C>
class HardLabel {
 public:
  static constexpr int kSums = 3;

  __device__ __forceinline__ explicit HardLabel(const RowLoss& args)
      : own_(args.ce_weight != 0 && args.temperature != 1),
        smooth_(args.ce_weight != 0 && args.label_smoothing != 0) {}

  // x: a logit less the largest.
  __device__ __forceinline__ void add(C x) {
    if (own_) sum_ += e(x);
    if (smooth_ && x != XLSTM_ISA::kMasked<C>) total_ += x, words_ += 1;
  }
  __device__ __forceinline__ void get(double* sums) const {
    sums[0] = sum_, sums[1] = total_, sums[2] = words_;
  }
  // All threads' into the row's; `most` is its largest logit, as it is where all are masked.
  static __device__ __forceinline__ void put(const double* sums, double most, double z_label,
                                             RowSums& row) {
    row.shift_hard = most * static_cast<double>(static_cast<C>(XLSTM_ISA::kLog2E));
    row.sum_hard = sums[0], row.words = sums[2], row.z_label = z_label;
    if (row.words > 0) row.z_all = sums[1] + row.words * most;
  }
  static __device__ __forceinline__ C e(C x) {
    return XLSTM_ISA::exp2(x * static_cast<C>(XLSTM_ISA::kLog2E));
  }
  __device__ __forceinline__ bool own() const { return own_; }
  __device__ __forceinline__ bool smooth() const { return smooth_; }

 private:
  const bool own_, smooth_;
  C sum_ = 0, total_ = 0, words_ = 0;
};

// What the hard label adds to the loss and to the gradient.
template <class C>
struct HardPart {
  double loss = 0, soft = 0;       // soft: weight of the divergence's own softmax
  C own = 0, label = 0, word = 0;  // of its own softmax; what comes off the label, off every word

  HardPart() = default;
  // `sum` at the divergence's temperature, for use where that is 1; `most` is the largest logit.
  __device__ __forceinline__ HardPart(const RowLoss& args, const RowSums& row, double sum,
                                      double most, double scale) {
    if (args.ce_weight == 0) return;
    const bool own_softmax = args.temperature != 1, smooth = args.label_smoothing != 0;
    if (own_softmax) sum = row.sum_hard;
    const double log_sum = ::log(sum), x = row.z_label - most;
    const double log_q = x * (XLSTM_ISA::kLn2 * static_cast<C>(XLSTM_ISA::kLog2E)) - log_sum;
    const double mean = smooth ? row.z_all / row.words - most : 0;
    loss = args.ce_weight * XLSTM_ISA::hard_loss(args, log_q, x - mean, log_sum + most);
    const double slope = scale * XLSTM_ISA::hard_slope(args, log_sum + most);
    if (own_softmax) {
      own = static_cast<C>(slope / sum);
    } else {
      soft = slope;
    }
    label = static_cast<C>(scale * XLSTM_ISA::hard_label(args));
    if (smooth) word = static_cast<C>(scale * XLSTM_ISA::hard_word(args, row.words));
  }

  // The gradient by one logit, from the divergence's: z as it counts, x less the largest.
  __device__ __forceinline__ C finish(C g, C z, C x, const HardLabel<C>& row, bool is_label,
                                      C cap) const {
    if (row.own()) g += HardLabel<C>::e(x) * own;
    if (is_label) g -= label;
    if (!row.smooth() && cap == 0) return g;
    const C t = cap == 0 ? C(0) : z / cap;
    return z == XLSTM_ISA::kMasked<C> ? C(0) : (g - word) * (1 - t * t);
  }
};

// Of a split row, whether its sums are known, or are only asked for.
__device__ __forceinline__ bool sums_given(const RowLoss& args) {
  return args.phase == Phase::kMixed || args.phase == Phase::kLoss;
}
__device__ __forceinline__ bool sums_asked(const RowLoss& args) {
  return args.phase == Phase::kSums;
}

// One number in all of a gradient's slice.
template <class E>
__device__ __forceinline__ void fill_slice(const Gradient<E>& grad, Fate fate,
                                           const RowGroup& group, int begin, int vectors) {
  constexpr int kN = Row<E>::kN;
  typename Row<E>::C g[kN];
#pragma unroll
  for (int k = 0; k < kN; ++k) g[k] = fate == Fate::kNaN ? kNaN : 0.0;
  for (int v = group.thread(); v < vectors; v += group.threads()) grad.write(begin + v * kN, g);
}

// Threads of a kernel's blocks, at most: float64 takes twice the registers.
template <class E>
constexpr int kMaxThreads = RowGroup::kMaxWarps * kWarpThreads / (sizeof(kept_t<E>) == 8 ? 2 : 1);

// Calls f(E{}) for the elements that rows of logits of this dtype are read as.
template <class F>
void dispatch_rows(DType dtype, F&& f) {
  if (dtype == DType::kFloat64) return f(Any<double>{});
  if (dtype == DType::kFloat32) return f(float{});
  if (dtype == DType::kBFloat16) return f(bf16{});
  f(f16{});
}

// Runs `kernel` over the rows, cut as `shape` says.
template <class Args, class Kernel>
void launch_rows(const char* what, const Args& args, const RowShape& shape, RowScale scale,
                 void* stream, Kernel kernel) {
  const std::int64_t N = args.rows[0] * args.rows[1];
  if (N == 0) return;
  const std::int64_t most = 0x7fffffff / shape.blocks, rows = N < most ? N : most;
  LaunchShape launch_shape;
  launch_shape.grid = dim3(static_cast<unsigned>(rows * shape.blocks));
  launch_shape.block = dim3(static_cast<unsigned>(shape.threads));
  launch_shape.shared_bytes = static_cast<std::size_t>(shape.shared_bytes);
  launch_shape.cluster = static_cast<unsigned>(shape.blocks);
  launch(what, launch_shape, stream, kernel, args, shape, scale);
}

// What the kernel's code and the current device allow.
template <class... Params>
RowLimits row_limits(const char* what, void (*kernel)(Params...)) {
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, kernel), what);
  int device = 0, shared_bytes = 0;
  check(cudaGetDevice(&device), what);
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        what);
  return {shared_bytes, code.maxThreadsPerBlock, code.ptxVersion >= 90};
}

}  // namespace xlstm
