// Small kernels that use all that the emulator has, and three with a bug planted. A program: its one
// argument names what to run; it exits with 1 and a line on stderr where a result is wrong.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "cuda/kernel_launch.h"
#include "cuda/mma.h"
#include "cuda/shared.h"
#include "cuda/sync.h"

using xlstm::Shared;

namespace {

constexpr int kThreads = 96, kBlocks = 5;

// Where nvcc compiles it, memory must be the device's.
template <class T>
T* zeros(std::size_t count) {
#ifdef XLSTM_EMULATED
  return static_cast<T*>(std::calloc(count, sizeof(T)));
#else
  T* memory = nullptr;
  xlstm::check(cudaMallocManaged(&memory, count * sizeof(T)), "cudaMallocManaged");
  std::memset(memory, 0, count * sizeof(T));
  return memory;
#endif
}

void finish() {
#ifndef XLSTM_EMULATED
  xlstm::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
#endif
}

void expect(const char* what, double got, double want) {
  if (got == want) return;
  std::fprintf(stderr, "%s: %g, not %g\n", what, got, want);
  std::exit(1);
}

__device__ float warp_sum(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
  return x;
}

// Sums kThreads values a block: shuffles, then one value a warp through shared memory. kSync: the
// barrier between the two; kExtra: an index that far beyond the array.
template <bool kSync, int kExtra>
__global__ void block_sum_kernel(const float* in, float* out) {
  Shared shared;
  float* part = shared.take<float>(kThreads / 32);
  const int thread = static_cast<int>(threadIdx.x);
  const float sum = warp_sum(in[blockIdx.x * kThreads + threadIdx.x]);
  if (thread % 32 == 0) part[thread / 32 + kExtra] = sum;
  if (kSync) __syncthreads();
  if (thread == 0) {
    float total = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) total += part[warp];
    out[blockIdx.x] = total;
  }
}

template <bool kSync, int kExtra>
void block_sum() {
  float *in = zeros<float>(kBlocks * kThreads), *out = zeros<float>(kBlocks);
  for (int at = 0; at < kBlocks * kThreads; ++at) in[at] = static_cast<float>(at % 7);
  xlstm::launch("block_sum", {kBlocks, kThreads, 64}, nullptr, block_sum_kernel<kSync, kExtra>, in,
                out);
  finish();
  for (int block = 0; block < kBlocks; ++block) {
    float total = 0;
    for (int at = 0; at < kThreads; ++at) total += in[block * kThreads + at];
    expect("block_sum", out[block], total);
  }
}

// Every block of a cluster reads what its neighbour has in shared memory.
__global__ void cluster_kernel(int blocks, int* out) {
  Shared shared;
  int* mine = shared.take<int>(kThreads);
  mine[threadIdx.x] = static_cast<int>(blockIdx.x * 1000 + threadIdx.x);
  xlstm::cluster_sync();
  const unsigned next = (xlstm::cluster_rank() + 1) % static_cast<unsigned>(blocks);
  out[blockIdx.x * kThreads + threadIdx.x] = xlstm::map_shared(mine, next)[threadIdx.x];
  xlstm::cluster_sync();  // nobody leaves while its memory is read
}

void cluster() {
  constexpr int kCluster = 4;
  int* out = zeros<int>(2 * kCluster * kThreads);
  xlstm::LaunchShape shape{2 * kCluster, kThreads, 1024};
  shape.cluster = kCluster;
  xlstm::launch("cluster", shape, nullptr, cluster_kernel, kCluster, out);
  finish();
  for (int block = 0; block < 2 * kCluster; ++block) {
    const int next = block / kCluster * kCluster + (block + 1) % kCluster;
    expect("cluster", out[block * kThreads + 5], next * 1000 + 5);
  }
}

struct alignas(16) Words {
  std::uint32_t w[4];
};

// Two blocks write to each other's shared memory, turn by turn, and read what they got: to write to a
// slot again is to know that the other has read it, as it has answered since.
template <bool kAwait>
__global__ void handed_round_kernel(int blocks, int* out) {
  constexpr int kTurns = 5;
  Shared shared;
  std::uint32_t* inbox = shared.take<std::uint32_t>(2 * 4 * kThreads);
  xlstm::ByteBarrier* arrivals = shared.take<xlstm::ByteBarrier>(2);
  if (threadIdx.x < 2) xlstm::init_barrier(arrivals + threadIdx.x);
  xlstm::cluster_sync();
  const int next = static_cast<int>(xlstm::cluster_rank() + 1) % blocks;
  std::uint32_t value = blockIdx.x * 1000 + threadIdx.x;
  for (unsigned turn = 0; turn < kTurns; ++turn) {
    const unsigned slot = turn % 2;
    std::uint32_t* mine = inbox + (slot * kThreads + threadIdx.x) * 4;
    if (threadIdx.x == 0) xlstm::expect_bytes(arrivals + slot, kThreads * sizeof(Words));
    xlstm::store_async(mine, Words{{value, 0, 0, value + 1}}, arrivals + slot, next);
    if (kAwait) xlstm::await_bytes(arrivals + slot, turn / 2);
    value = mine[3];
    __syncthreads();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = static_cast<int>(value);
  xlstm::cluster_sync();
}

template <bool kAwait>
void handed_round() {
  constexpr int kCluster = 2;
  int* out = zeros<int>(2 * kCluster * kThreads);
  xlstm::LaunchShape shape{2 * kCluster, kThreads, 4096};
  shape.cluster = kCluster;
  xlstm::launch("handed_round", shape, nullptr, handed_round_kernel<kAwait>, kCluster, out);
  finish();
  for (int block = 0; block < 2 * kCluster; ++block) {
    expect("handed_round", out[block * kThreads + 5], (block ^ 1) * 1000 + 5 + 5);
  }
}

// Blocks hand a value on from one to the next by release and acquire, and meet at the grid's barrier.
__global__ void chain_kernel(unsigned* flag, int* value, int* out, unsigned* count) {
  if (threadIdx.x == 0) {
    while (xlstm::load_acquire(flag) != blockIdx.x) {
    }
    *value += static_cast<int>(blockIdx.x) + 1;
    xlstm::store_release(flag, blockIdx.x + 1);
  }
  atomicAdd(count, 1u);
  xlstm::grid_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = *value * 1000 + static_cast<int>(*count);
}

void chain() {
  unsigned *flag = zeros<unsigned>(1), *count = zeros<unsigned>(1);
  int *value = zeros<int>(1), *out = zeros<int>(kBlocks);
  xlstm::LaunchShape shape{kBlocks, kThreads};
  shape.cooperative = true;
  xlstm::launch("chain", shape, nullptr, chain_kernel, flag, value, out, count);
  finish();
  for (int block = 0; block < kBlocks; ++block) {
    expect("chain", out[block], kBlocks * (kBlocks + 1) / 2 * 1000 + kBlocks * kThreads);
  }
}

// d = a b of whole numbers, exact in every operand type: a[m][k] = m + k % 3, b[k][n] = n - k % 2.
template <bool kBf16>
__global__ void mma_kernel(float* out) {
  const unsigned lane = threadIdx.x, group = lane / 4, part = lane % 4;
  const auto word = [](auto value, unsigned k) {
    if (!kBf16) return __float_as_uint(value(k));
    return (__float_as_uint(value(2 * k)) >> 16) |
           (__float_as_uint(value(2 * k + 1)) & 0xffff0000u);
  };
  std::uint32_t a[4], b[2];
  for (unsigned w = 0; w < 4; ++w) {
    const unsigned m = group + w % 2 * 8;
    a[w] = word([m](unsigned k) { return static_cast<float>(m + k % 3); }, part + w / 2 * 4);
  }
  for (unsigned w = 0; w < 2; ++w) {
    b[w] = word([group](unsigned k) { return float(group) - float(k % 2); }, part + w * 4);
  }
  float d[4] = {0.5f, 0.5f, 0.5f, 0.5f};
  if constexpr (kBf16) {
    xlstm::mma_bf16(d, a, b);
  } else {
    xlstm::mma_tf32(d, a, b);
  }
  for (unsigned at = 0; at < 4; ++at) {
    out[(group + at / 2 * 8) * 8 + part * 2 + at % 2] = d[at];
  }
}

template <bool kBf16>
void mma() {
  float* out = zeros<float>(16 * 8);
  xlstm::launch("mma", {1, 32}, nullptr, mma_kernel<kBf16>, out);
  finish();
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      int sum = 0;
      for (int k = 0; k < (kBf16 ? 16 : 8); ++k) sum += (m + k % 3) * (n - k % 2);
      expect("mma", out[m * 8 + n], sum + 0.5);
    }
  }
}

// Half of the threads never come to the barrier.
__global__ void deadlock_kernel() {
  if (threadIdx.x < kThreads / 2) __syncthreads();
}
void deadlock() { xlstm::launch("deadlock", {1, kThreads}, nullptr, deadlock_kernel); }

// Two blocks write one place; nothing orders them.
__global__ void two_writers_kernel(int* out) {
  if (threadIdx.x == 7) *out = static_cast<int>(blockIdx.x);
}
void two_writers() {
  xlstm::launch("two_writers", {2, kThreads}, nullptr, two_writers_kernel, zeros<int>(1));
}

void too_much_shared() {
  xlstm::launch("too_much_shared", {1, kThreads, 4}, nullptr, block_sum_kernel<true, 0>,
                zeros<float>(kThreads), zeros<float>(1));
}

struct Fixture {
  const char* name;
  void (*run)();
};
constexpr Fixture kFixtures[] = {
    {"block_sum", block_sum<true, 0>},
    {"cluster", cluster},
    {"handed_round", handed_round<true>},
    {"chain", chain},
    {"mma_bf16", mma<true>},
    {"mma_tf32", mma<false>},
    {"missing_barrier", block_sum<false, 0>},
    {"missing_await", handed_round<false>},
    {"index_past_the_end", block_sum<true, 1>},
    {"deadlock", deadlock},
    {"two_writers", two_writers},
    {"too_much_shared", too_much_shared},
};

}  // namespace

int main(int count, char** arguments) {
  for (const Fixture& fixture : kFixtures) {
    if (count != 2 || std::strcmp(arguments[1], fixture.name) != 0) continue;
    try {
      fixture.run();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return 1;
    }
    return 0;
  }
  std::fprintf(stderr, "no fixture of that name\n");
  return 2;
}
