// Rows of one call of a loss over student logits, drawn by CPU threads.
#pragma once

#include <stdexcept>
#include <string>

#include "common/integers.h"
#include "common/parallel.h"
#include "common/stream.h"
#include "cpu/kl_div_stage.h"
#include "launch.h"

namespace xlstm::XLSTM_ISA {

// Rows of one draw: enough elements that short rows do not contend for the counter, and a run of rows
// where there are plenty, since a row asks memory for the one after it.
constexpr std::int64_t kDrawElements = 1 << 15, kDrawRows = 8, kDrawsPerThread = 8;

inline const char* row_at(const void* data, const std::int64_t (&stride)[2], DType dtype,
                          const RowLoss& args, std::int64_t n) {
  const std::int64_t offset = n / args.rows[1] * stride[0] + n % args.rows[1] * stride[1];
  return static_cast<const char*>(data) + offset * size_of(dtype);
}
inline Logits student_at(const RowLoss& args, std::int64_t n) {
  return {args.student_dtype, args.V_student,
          row_at(args.student, args.student_stride, args.student_dtype, args, n), args.softcap};
}

inline bool ignored(const RowLoss& args, std::int64_t n) {
  return args.labels && args.labels[n] == args.ignore_index;
}

// Factor of the reduction, and a check of the labels on the way.
inline double reduction_scale(const RowLoss& args, const char* function) {
  const std::int64_t N = args.rows[0] * args.rows[1];
  std::int64_t valid = 0;
  for (std::int64_t n = 0; n < N; ++n) {
    if (ignored(args, n)) continue;
    ++valid;
    if (args.phase == Phase::kWhole && args.labels &&
        (args.labels[n] < 0 || args.labels[n] >= args.V_student)) {
      throw std::invalid_argument(
          std::string(function) + ": labels must be in [0, " + std::to_string(args.V_student) +
          ") or ignore_index = " + std::to_string(args.ignore_index) + ", got " +
          std::to_string(args.labels[n]) + " at row " + std::to_string(n));
    }
  }
  if (args.reduction == Reduction::kMean) return valid > 0 ? 1.0 / valid : 0.0;
  if (args.reduction == Reduction::kBatchMean) return N > 0 ? 1.0 / N : 0.0;
  return 1.0;
}

// Row(args, blocks) is a thread's; run(n, next, g, scale) returns the unweighted loss of row n and,
// where g is given, leaves `scale` times its gradient there. Workers draw rows from one counter;
// nothing but row_loss and grad is shared.
template <class C, class Row, class Args>
class Rows {
 public:
  Rows(const Args& args, std::int64_t widest, const char* function)
      : args_(args),
        N_(args.rows[0] * args.rows[1]),
        widest_(widest),
        draw_(rows_per_draw()),
        scale_(reduction_scale(args, function)) {}

  void run() {
    const std::int64_t draws = ceil_div(N_, draw_), threads = num_threads();
    parallel_for(threads < draws ? threads : draws, [this](std::int64_t) { work(); });
    if (args_.loss == nullptr) return;
    double sum = 0;  // in the order of rows, whatever the threads did
    for (std::int64_t n = 0; n < N_; ++n) sum += static_cast<const C*>(args_.row_loss)[n];
    *static_cast<C*>(args_.loss) = static_cast<C>(N_ > 0 ? sum * scale_ : 0.0);
  }

 private:
  std::int64_t rows_per_draw() const {
    const std::int64_t share = N_ / (kDrawsPerThread * num_threads());
    const std::int64_t rows = share < kDrawRows ? share : kDrawRows;
    const std::int64_t shortest = ceil_div(kDrawElements, widest_);
    return rows > shortest ? rows : shortest;
  }

  void work() {
    Row row(args_, ceil_div(widest_, kBlock));
    for (;;) {
      const std::int64_t begin = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED) * draw_;
      if (begin >= N_) break;
      const std::int64_t end = begin + draw_ < N_ ? begin + draw_ : N_;
      for (std::int64_t n = begin; n < end; ++n) {
        static_cast<C*>(args_.row_loss)[n] = static_cast<C>(loss(row, n));
      }
    }
    stream_fence();
  }

  double loss(Row& row, std::int64_t n) const {
    const C weight = args_.row_weight ? static_cast<const C*>(args_.row_weight)[n] : C(1);
    char* g =
        args_.grad
            ? const_cast<char*>(row_at(args_.grad, args_.grad_stride, args_.grad_dtype, args_, n))
            : nullptr;
    if (weight == 0 || ignored(args_, n)) {
      if (g) fill(args_.grad_dtype, args_.V_student, g, 0.0);
      return 0;
    }
    return weight * row.run(n, n + 1 < N_ ? n + 1 : n, g, weight * scale_);
  }

  const Args& args_;
  const std::int64_t N_, widest_, draw_;
  const double scale_;
  std::int64_t next_ = 0;
};

}  // namespace xlstm::XLSTM_ISA
