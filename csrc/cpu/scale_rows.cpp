// Rows times one factor each, in place, on CPU cores: x[n, v] *= scale[n].
// Tensors: launch.h. One task is a run of rows; a row whose factor is 1 is neither read nor written.
// The product is rounded once, from the compute type.
#include "common/simd.h"
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace xlstm::XLSTM_ISA {
namespace {

constexpr std::int64_t kTaskElements = 1 << 15;

template <class T>
void scale_row(T* x, std::int64_t V, compute_t<T> factor) {
  constexpr int kCount = kLanes<compute_t<T>>;
  std::int64_t v = 0;
  for (; v + kCount <= V; v += kCount) store(x + v, load(static_cast<const T*>(x + v)) * factor);
  if (v == V) return;
  const int left = static_cast<int>(V - v);
  store(x + v, load(static_cast<const T*>(x + v), left) * factor, left);
}

}  // namespace

void scale_rows(const ScaleRows& args) {
  if (args.N == 0 || args.V == 0) return;
  const std::int64_t rows = args.V < kTaskElements ? kTaskElements / args.V : 1;
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const auto* scale = static_cast<const compute_t<T>*>(args.scale);
    parallel_for((args.N + rows - 1) / rows, [&](std::int64_t task) {
      const std::int64_t end = (task + 1) * rows < args.N ? (task + 1) * rows : args.N;
      for (std::int64_t n = task * rows; n < end; ++n) {
        if (scale[n] == 1) continue;
        scale_row(static_cast<T*>(args.x) + n * args.x_stride, args.V, scale[n]);
      }
    });
  });
}

}  // namespace xlstm::XLSTM_ISA
