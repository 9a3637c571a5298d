// Reading ahead of a stream, and writing one past the caches.
#pragma once

#include "common/simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace xlstm::XLSTM_ISA {

XLSTM_HD void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Two vectors side by side. kStream passes the caches by, for a fresh buffer that is not read soon: p
// is then aligned to 64 bytes, and stream_fence() comes before another thread may look. Finite values
// only: rounding to bfloat16 here turns a NaN of full payload into zero.
template <bool kStream, class T>
XLSTM_HD void store_finite(T* p, Vec<compute_t<T>> a, Vec<compute_t<T>> b) {
  store(p, a);
  store(p + kLanes<compute_t<T>>, b);
}

XLSTM_HD void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

#if defined(__AVX512F__)
template <bool kStream>
XLSTM_HD void store_bits(void* p, __m512i bits) {
  if (kStream) {
    _mm512_stream_si512(static_cast<__m512i*>(p), bits);
  } else {
    _mm512_storeu_si512(p, bits);
  }
}
template <bool kStream>
XLSTM_HD void store_finite(float* p, VecF a, VecF b) {
  store_bits<kStream>(p, (__m512i)a);
  store_bits<kStream>(p + 16, (__m512i)b);
}
// In the upper half of each lane, to nearest even.
XLSTM_HD __m512i round_to_bf16(VecF x) {
  const __m512i bits = (__m512i)x;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
}
template <bool kStream>
XLSTM_HD void store_finite(bf16* p, VecF a, VecF b) {
  const __m512i packed = _mm512_packus_epi32(_mm512_srli_epi32(round_to_bf16(a), 16),
                                             _mm512_srli_epi32(round_to_bf16(b), 16));
  // Packing takes 8 bytes of a and of b in turn.
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  store_bits<kStream>(p, _mm512_permutexvar_epi64(order, packed));
}
template <bool kStream>
XLSTM_HD void store_finite(f16* p, VecF a, VecF b) {
  const __m512i low = _mm512_castsi256_si512((__m256i)narrow(f16{}, a));
  store_bits<kStream>(p, _mm512_inserti64x4(low, (__m256i)narrow(f16{}, b), 1));
}
#endif

// Past the caches where p is aligned for it; otherwise a plain store.
template <class T>
XLSTM_HD void store_streaming(T* p, Vec<compute_t<T>> v) {
#if defined(__AVX512F__)
  if (sizeof(T) == sizeof(float) && reinterpret_cast<std::uintptr_t>(p) % kVectorBytes == 0) {
    _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
    return;
  }
#elif defined(__AVX2__)
  if (sizeof(T) == sizeof(float) && reinterpret_cast<std::uintptr_t>(p) % kVectorBytes == 0) {
    _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
    return;
  }
#endif
  store(p, v);
}

}  // namespace xlstm::XLSTM_ISA
