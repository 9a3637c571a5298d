// Waiting, reading and writing across the blocks of a cluster or of a cooperative grid.
#pragma once

#ifdef XLSTM_EMULATED
#include "emulator/sync.h"
#else

#include <cooperative_groups.h>

#include <cstdint>

namespace xlstm {

// Clusters are there from sm_90 on; elsewhere a block is its own.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif
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

// Opens, turn by turn, when the bytes have come that one thread of its block said to expect. It lies in
// shared memory; what a block writes to another counts itself in there.
using ByteBarrier = std::uint64_t;

// One thread; cluster_sync() before others write.
__device__ __forceinline__ void init_barrier([[maybe_unused]] ByteBarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  const auto at = static_cast<std::uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// One thread, once a turn: they may have come already.
__device__ __forceinline__ void expect_bytes([[maybe_unused]] ByteBarrier* barrier,
                                             [[maybe_unused]] int bytes) {
#if __CUDA_ARCH__ >= 900
  const auto at = static_cast<std::uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
#endif
}
// Until turn `turn` is over; nobody is two turns ahead. What was counted in is then seen.
__device__ __forceinline__ void await_bytes([[maybe_unused]] ByteBarrier* barrier,
                                            [[maybe_unused]] unsigned turn) {
#if __CUDA_ARCH__ >= 900
  const auto at = static_cast<std::uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(at),
      "r"(turn % 2)
      : "memory");
#endif
}
// Writes 16 bytes to where the block of `rank` has what `to` is here, and counts them in at its
// `barrier`. Nobody waits for it.
template <class Words>
__device__ __forceinline__ void store_async([[maybe_unused]] std::uint32_t* to,
                                            [[maybe_unused]] const Words& words,
                                            [[maybe_unused]] ByteBarrier* barrier,
                                            [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 to, barrier;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, "
      "[barrier];\n"
      "}" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(to))),
      "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(barrier))), "r"(rank),
      "r"(words.w[0]), "r"(words.w[1]), "r"(words.w[2]), "r"(words.w[3])
      : "memory");
#endif
}

}  // namespace xlstm

#endif  // XLSTM_EMULATED
