// XLSTM_HD marks what compiles for the host and, under nvcc, for the device.
#pragma once

#ifdef __CUDACC__
#define XLSTM_HD __host__ __device__ __forceinline__
#else
#define XLSTM_HD inline __attribute__((always_inline))
#endif

// Every template below bind.cpp lives in a namespace named after the instruction set it is compiled
// for, so that the linker never merges an AVX-512 instance into a baseline caller.
#ifndef XLSTM_ISA
#define XLSTM_ISA generic
#endif
