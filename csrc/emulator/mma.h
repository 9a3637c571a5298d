// cuda/mma.h on the emulator: the last lane to come multiplies for the whole warp.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

namespace xlstm {
namespace emulator {

// Tensor cores cut the bits of a sum that do not fit; to round would be more accurate than they are.
inline float truncate(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f)
                                                                : nearest;
}

struct Fragments {
  float* d;
  const std::uint32_t *a, *b;
};

// d (16, 8) += a (16, K) b (K, 8), K = 8 * words per register. Registers of a lane, by the PTX ISA's
// "matrix fragments for mma.m16n8k16" and "...m16n8k8": word w of a is row group + 8 (w % 2), columns
// from `first` of its half w / 2; word w of b is rows from `first` of half w, column group.
template <int kPerWord, class ToFloat>
void multiply(void* const* lanes, ToFloat element) {
  constexpr int kHalf = 4 * kPerWord;
  double a[16][2 * kHalf], b[2 * kHalf][8];
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const Fragments& mine = *static_cast<const Fragments*>(lanes[lane]);
    const int group = lane / 4, first = lane % 4 * kPerWord;
    for (int at = 0; at < kPerWord; ++at) {
      for (int w = 0; w < 4; ++w) {
        a[group + w % 2 * 8][w / 2 * kHalf + first + at] = element(mine.a[w], at);
      }
      for (int w = 0; w < 2; ++w) b[w * kHalf + first + at][group] = element(mine.b[w], at);
    }
  }
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    float* d = static_cast<const Fragments*>(lanes[lane])->d;
    for (int at = 0; at < 4; ++at) {
      double sum = d[at];
      for (int k = 0; k < 2 * kHalf; ++k) {
        sum += a[lane / 4 + at / 2 * 8][k] * b[k][lane % 4 * 2 + at % 2];
      }
      d[at] = truncate(sum);
    }
  }
}

}  // namespace emulator

inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  emulator::Fragments mine{d, a, b};
  emulator::collective(&mine, [](void* const* lanes) {
    emulator::multiply<2>(lanes, [](std::uint32_t word, int at) {
      return __uint_as_float(at ? word & 0xffff0000u : word << 16);
    });
  });
}

inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  emulator::Fragments mine{d, a, b};
  emulator::collective(&mine, [](void* const* lanes) {
    emulator::multiply<1>(
        lanes, [](std::uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); });
  });
}

inline void opaque(std::uint32_t&) {}

}  // namespace xlstm
