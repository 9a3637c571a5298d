// Scales each row of a matrix by its own factor, in place.
//   x[n, v] = x[n, v] * scale[n]
// Source: chain rule of a loss whose forward has computed the gradient of each row.
// Tensors: launch.h, ScaleRows. A row whose factor is 1 is neither read nor written.
// Grid: (rows, column blocks); product in the compute type; nothing saved.
#include "common/integers.h"
#include "cuda/element.h"
#include "cuda/kernel_launch.h"
#include "launch.h"

namespace xlstm {
namespace {

constexpr int kThreads = 256;
constexpr int kColumnsPerThread = 8;
constexpr std::int64_t kMaxRowBlocks = 0x7fffffff;
constexpr std::int64_t kMaxColumnBlocks = 65535;

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(std::int64_t N, std::int64_t V, T* x, std::int64_t x_stride,
                      const compute_t<T>* scale) {
  for (std::int64_t n = blockIdx.x; n < N; n += gridDim.x) {
    const compute_t<T> factor = scale[n];
    if (factor == 1) continue;
    T* row = x + n * x_stride;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.y) * kThreads;
    std::int64_t v = static_cast<std::int64_t>(blockIdx.y) * kThreads + threadIdx.x;
    for (; v < V; v += step) store(row + v, load(row + v) * factor);
  }
}

}  // namespace

void scale_rows_cuda(const ScaleRows& args, void* stream) {
  if (args.N == 0 || args.V == 0) return;
  const std::int64_t columns = ceil_div(args.V, kThreads * kColumnsPerThread);
  const dim3 grid(static_cast<unsigned>(args.N < kMaxRowBlocks ? args.N : kMaxRowBlocks),
                  static_cast<unsigned>(columns < kMaxColumnBlocks ? columns : kMaxColumnBlocks));
  XLSTM_ISA::dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    launch("scale_rows", {grid, kThreads}, stream, scale_rows_kernel<T>, args.N, args.V,
           static_cast<T*>(args.x), args.x_stride, static_cast<const compute_t<T>*>(args.scale));
  });
}

}  // namespace xlstm
