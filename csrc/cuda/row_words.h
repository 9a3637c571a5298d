// The words of a teacher that is known by few, as a block of threads keeps them.
#pragma once

#include <cstdint>

#include "cuda/shared.h"

namespace xlstm {

// The words inside a row, in shared memory; a word that comes several times is at its first place.
struct Words {
  static constexpr int kBytes = 2 * 4 + 3 * 8, kArrays = 6;  // of a word; each on 16 bytes

  __device__ __forceinline__ Words(Shared& shared, std::int64_t K, int bit_words)
      : K(static_cast<int>(K)),
        bit_words(bit_words),
        given(shared.take<std::int32_t>(K)),
        ids(shared.take<std::int32_t>(K)),
        z(shared.take<double>(K)),
        log_p(shared.take<double>(K)),
        q(shared.take<double>(K)),
        bits(shared.take<unsigned>(bit_words)) {}

  const int K, bit_words;
  std::int32_t *given, *ids;  // -1: none; of ids, also where a word has come before
  double *z, *log_p, *q;      // then log_p gives way to the slope
  unsigned* const bits;       // of a block's slice: whether a logit's word is inside
};

}  // namespace xlstm
