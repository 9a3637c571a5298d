// Launches in plain C++, which the emulator compiles too.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <mutex>
#include <utility>

#include "cuda/check.h"

namespace xlstm {

constexpr unsigned kPortableCluster = 8;  // blocks, on every chip that has clusters

struct LaunchShape {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  unsigned cluster = 1;      // blocks of a cluster, along x
  bool cooperative = false;  // all blocks are alive together: grid_sync()
};

// Throws CUDA's message in the name of `what`.
template <class... Params, class... Args>
void launch(const char* what, const LaunchShape& shape, void* stream, void (*kernel)(Params...),
            Args&&... args) {
  // What is set is the kernel's: another thread's launch may ask for less in between.
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.shared_bytes)),
        what);
  if (shape.cluster > kPortableCluster) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what);
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid, config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), what);
}

}  // namespace xlstm
