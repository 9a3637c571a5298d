// Asks for memory that is read later.
#pragma once

namespace xlstm {

// The line at `address`, into the L2 cache. Nobody waits for it.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

}  // namespace xlstm
