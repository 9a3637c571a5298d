// Arrays carved front to back from a block's dynamic shared memory, each on 16 bytes. All threads of a
// block take the same arrays in the same order.
#pragma once

#ifdef XLSTM_EMULATED
#include "emulator/shared.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace xlstm {

class Shared {
 public:
  template <class T>
  __device__ __forceinline__ T* take(std::int64_t count) {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    T* taken = reinterpret_cast<T*>(shared_bytes + next_);
    next_ += (static_cast<int>(count * sizeof(T)) + 15) / 16 * 16;
    return taken;
  }

 private:
  int next_ = 0;
};

}  // namespace xlstm

#endif  // XLSTM_EMULATED
