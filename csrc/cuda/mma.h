// Matrix products of one warp on tensor cores: d (16, 8) += a (16, K) b (K, 8), float32 sums. Lane l
// holds, with group = l / 4 and part = l % 4:
//   d      rows group and group + 8, columns 2 part and 2 part + 1: d[0], d[1], d[2], d[3]
//   bf16   K = 16, two neighbours along K in a word, the first in its low half
//   tf32   K = 8, the upper 19 bits of a float; the lower 13 are not looked at
//   a      rows group, group + 8 and again; columns words part, then (a[2], a[3]) 4 words on
//   b      rows words part and 4 words on; column group
// Source: PTX ISA, warp-level matrix instructions, mma.m16n8k16 and mma.m16n8k8. sm_80 and later.
#pragma once

#ifdef XLSTM_EMULATED
#include "emulator/mma.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace xlstm {

#define XLSTM_MMA(name, shape)                                                     \
  __device__ __forceinline__ void name(float (&d)[4], const std::uint32_t (&a)[4], \
                                       const std::uint32_t (&b)[2]) {              \
    asm("mma.sync.aligned." shape                                                  \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"                           \
        " {%0, %1, %2, %3};"                                                       \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));       \
  }
XLSTM_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
XLSTM_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef XLSTM_MMA

// What is computed from x afterwards cannot be computed before, outside of a loop.
__device__ __forceinline__ void opaque(std::uint32_t& x) { asm volatile("" : "+r"(x)); }

}  // namespace xlstm

#endif  // XLSTM_EMULATED
