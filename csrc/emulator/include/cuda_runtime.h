// The part of CUDA's run-time API and language that the project's sources use, on the emulator.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "emulator/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define CUDART_VERSION 13000
#define XLSTM_CUDA_ARCHS "emulated"

using dim3 = xlstm::emulator::Dim3;

// An index or size of the CUDA thread in hand. Objects, not macros: a launch's configuration has
// members of the same names.
template <class Of>
struct XlstmIndex {
  template <unsigned dim3::* kAxis>
  struct Axis {
    operator unsigned() const { return Of()(xlstm::emulator::current()).*kAxis; }
  };
  Axis<&dim3::x> x;
  Axis<&dim3::y> y;
  Axis<&dim3::z> z;
};
#define XLSTM_INDEX(name, member)                                                       \
  struct Xlstm_##name {                                                                 \
    const dim3& operator()(const xlstm::emulator::Thread& self) { return self.member; } \
  };                                                                                    \
  inline const XlstmIndex<Xlstm_##name> name{};
XLSTM_INDEX(threadIdx, index)
XLSTM_INDEX(blockIdx, block->index)
XLSTM_INDEX(blockDim, launch->block)
XLSTM_INDEX(gridDim, launch->grid)
#undef XLSTM_INDEX

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                          ? "no error"
         : error == cudaErrorInvalidConfiguration      ? "invalid configuration argument"
         : error == cudaErrorCooperativeLaunchTooLarge ? "too many blocks in cooperative launch"
                                                       : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct cudaDeviceProp {
  char name[256] = "emulator";
  int major = 9, minor = 0;
  std::size_t totalGlobalMem = std::size_t{1} << 30;
  int multiProcessorCount = xlstm::emulator::kMultiprocessors;
  std::size_t sharedMemPerBlockOptin = xlstm::emulator::g_chip.shared_bytes;
};
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  return *properties = cudaDeviceProp{}, cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = static_cast<int>(xlstm::emulator::g_chip.shared_bytes), cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion = xlstm::emulator::g_chip.capability;
  int maxThreadsPerBlock = xlstm::emulator::kMaxBlockThreads;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return *attributes = cudaFuncAttributes{}, cudaSuccess;
}

// Shared memory above 48 KiB must be asked for by kernel; the bytes each one may have.
// So must clusters of more than eight blocks.
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
struct XlstmMayHave {
  std::size_t shared_bytes = xlstm::emulator::kDefaultSharedBytes;
  unsigned cluster = 8;
};
template <class... Params>
XlstmMayHave& may_have(void (*kernel)(Params...)) {
  static thread_local std::vector<std::pair<void (*)(Params...), XlstmMayHave>> known;
  for (auto& [of, has] : known) {
    if (of == kernel) return has;
  }
  return known.emplace_back(kernel, XlstmMayHave{}).second;
}
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute,
                                 int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    return may_have(kernel).cluster = value ? 16 : 8, cudaSuccess;
  }
  if (value < 0 || static_cast<std::size_t>(value) > xlstm::emulator::g_chip.shared_bytes) {
    return cudaErrorInvalidValue;
  }
  return may_have(kernel).shared_bytes = static_cast<std::size_t>(value), cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeClusterDimension,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// Returns when the kernel has run.
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  xlstm::emulator::Launch launch;
  launch.grid = config->gridDim, launch.block = config->blockDim;
  launch.shared_bytes = config->dynamicSmemBytes;
  unsigned cluster_rows = 1;
  for (unsigned at = 0; at < config->numAttrs; ++at) {
    const cudaLaunchAttribute& attribute = config->attrs[at];
    if (attribute.id == cudaLaunchAttributeCooperative) {
      launch.cooperative = attribute.val.cooperative != 0;
    } else {
      launch.cluster = attribute.val.clusterDim.x;
      cluster_rows = attribute.val.clusterDim.y * attribute.val.clusterDim.z;
    }
  }
  if (launch.grid.size() == 0 || launch.grid.y > 65535 || launch.grid.z > 65535 ||
      launch.block.size() == 0 || launch.block.size() > xlstm::emulator::kMaxBlockThreads ||
      launch.cluster == 0 || launch.cluster > may_have(kernel).cluster || cluster_rows != 1 ||
      launch.grid.x % launch.cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (launch.shared_bytes > may_have(kernel).shared_bytes) return cudaErrorInvalidValue;
  // One block at a time on each multiprocessor: what more it could take depends on registers.
  if (launch.cooperative && launch.grid.size() > xlstm::emulator::kMultiprocessors) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  launch.kernel = [kernel, params = std::tuple<Params...>(std::forward<Args>(args)...)] {
    std::apply(kernel, params);
  };
  xlstm::emulator::run(launch);
  return cudaSuccess;
}

inline void __syncthreads() { xlstm::emulator::wait(xlstm::emulator::current().block->barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) {
  xlstm::emulator::wait(xlstm::emulator::current().warp->barrier);
}

// Every lane of the warp calls it: the masks in use are full.
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  struct Slot {
    T value, result;
    int from;
  } slot{value, value, from};
  xlstm::emulator::collective(&slot, [](void* const* lanes) {
    for (int lane = 0; lane < xlstm::emulator::kWarpThreads; ++lane) {
      if (!lanes[lane]) continue;
      Slot& mine = *static_cast<Slot*>(lanes[lane]);
      if (void* other = lanes[mine.from & 31]) mine.result = static_cast<Slot*>(other)->value;
    }
  });
  return slot.result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, xlstm::emulator::current().lane ^ bits);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int lane = xlstm::emulator::current().lane, from = lane + static_cast<int>(delta);
  return __shfl_sync(mask, value, from < xlstm::emulator::kWarpThreads ? from : lane);
}

inline unsigned atomicAdd(unsigned* at, unsigned by) {
  return __atomic_fetch_add(at, by, __ATOMIC_RELAXED);
}
inline int atomicAdd(int* at, int by) { return __atomic_fetch_add(at, by, __ATOMIC_RELAXED); }
inline unsigned atomicOr(unsigned* at, unsigned bits) {
  return __atomic_fetch_or(at, bits, __ATOMIC_RELAXED);
}
inline unsigned atomicCAS(unsigned* at, unsigned expected, unsigned wanted) {
  __atomic_compare_exchange_n(at, &expected, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
