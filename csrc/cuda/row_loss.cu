// Around the rows of a loss: how many count, and the sum of their losses.
//   mean: 1 / (rows whose label is not ignored), 0 where there are none
// Tensors: launch.h, RowLoss. Grid: one block; sums float64, in an order that never changes.
#include "cuda/row_loss.h"

#include "common/integers.h"

namespace xlstm {
namespace {

constexpr int kThreads = 512;
constexpr int kVectorBytes = 16;
// A row's share of shared memory leaves room for others on the same multiprocessor: while one waits
// for memory, another computes.
constexpr int kRowsAtOnce = 3;
constexpr int kReservedBytes = 1 << 10;  // of each block, for CUDA itself
constexpr int kVectorsPerThread = 8;     // where a slice is wide enough

__global__ void __launch_bounds__(kThreads)
    count_rows_kernel(const std::int64_t* labels, std::int64_t N, std::int64_t ignore_index,
                      double* scale) {
  Shared shared;
  RowGroup group(shared, 1);
  double valid[1] = {0};
  for (std::int64_t n = group.thread(); n < N; n += kThreads) valid[0] += labels[n] != ignore_index;
  group.reduce(valid, Sum{}, [&](const double (&sum)[1]) {
    *scale = sum[0] > 0 ? 1 / sum[0] : 0;
    return 0;
  });
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const C* row_loss, std::int64_t N, RowScale scale, C* loss) {
  Shared shared;
  RowGroup group(shared, 1);
  double total[1] = {0};
  for (std::int64_t n = group.thread(); n < N; n += kThreads) total[0] += row_loss[n];
  group.reduce(total, Sum{}, [&](const double (&sum)[1]) {
    *loss = static_cast<C>(N > 0 ? sum[0] * (scale.counted ? *scale.counted : scale.number) : 0.0);
    return 0;
  });
}

constexpr LaunchShape one_block() { return {1, kThreads, RowGroup::kSharedBytes}; }

}  // namespace

RowScale row_scale(const RowLoss& args, double* counted, void* stream) {
  const std::int64_t N = args.rows[0] * args.rows[1];
  const bool mean = args.reduction == Reduction::kMean;
  if (N > 0 && mean && args.labels) {
    launch("count_rows", one_block(), stream, count_rows_kernel, args.labels, N, args.ignore_index,
           counted);
    return {0, counted};
  }
  const bool divided = mean || args.reduction == Reduction::kBatchMean;
  return {divided && N > 0 ? 1.0 / static_cast<double>(N) : 1.0, nullptr};
}

void sum_rows(const RowLoss& args, RowScale scale, void* stream) {
  if (args.loss == nullptr) return;
  const std::int64_t N = args.rows[0] * args.rows[1];
  const auto run = [&](auto one) {
    using C = decltype(one);
    launch("sum_rows", one_block(), stream, sum_rows_kernel<C>,
           static_cast<const C*>(args.row_loss), N, scale, static_cast<C*>(args.loss));
  };
  args.student_dtype == DType::kFloat64 ? run(double{}) : run(float{});
}

RowShape row_shape(const RowLimits& limits, std::int64_t columns, int per_vector, RowBytes bytes) {
  const std::int64_t vectors = ceil_div(columns, per_vector);
  const std::int64_t kept_bytes = bytes.rows * kVectorBytes;
  RowShape shape{};
  shape.blocks = 1;
  const auto slice = [&] { return ceil_div(vectors, shape.blocks); };
  const std::int64_t share = limits.shared_bytes / kRowsAtOnce - kReservedBytes - bytes.other;
  while (limits.clusters && shape.blocks < RowGroup::kMaxBlocks &&
         slice() * (kept_bytes + bytes.beside) > share) {
    shape.blocks *= 2;
  }
  shape.slice = static_cast<int>(slice());
  const std::int64_t fixed = bytes.other + slice() * bytes.beside;
  const std::int64_t room = (limits.shared_bytes - fixed) / kept_bytes;
  shape.kept = static_cast<int>(room < 0 ? 0 : room < slice() ? room : slice());
  shape.threads = kWarpThreads;
  const int most = kWarpThreads * RowGroup::kMaxWarps;
  const int allowed = limits.threads < most ? limits.threads : most;
  while (shape.threads * 2 <= allowed && shape.threads * kVectorsPerThread < shape.slice) {
    shape.threads *= 2;
  }
  shape.shared_bytes = static_cast<int>(fixed + shape.kept * kept_bytes);
  return shape;
}

}  // namespace xlstm
