// Waiting and reading across the blocks of a cluster or of a cooperative grid.
#pragma once

#ifdef XLSTM_EMULATED
#include "emulator/sync.h"
#else

#include <cooperative_groups.h>

namespace xlstm {

// Clusters are there from sm_90 on; elsewhere a block is its own.
__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
// Where the block of `rank` in the cluster has what `address` is in this block's shared memory.
template <class T>
__device__ __forceinline__ T* map_shared(T* address, [[maybe_unused]] unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(address, rank);
#else
  return address;
#endif
}
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// What was written before the store is seen after a load that reads the stored value.
__device__ __forceinline__ void store_release(unsigned* flag, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

}  // namespace xlstm

#endif  // XLSTM_EMULATED
