// Vectors of the instruction set this file is compiled for, on the compilers' vector extension.
//
// Vec<T> holds kLanes<T> values; + - * / and comparisons come with the extension, and a comparison
// gives a lane mask for select(). float32 exp, tanh and log1p are polynomials (error below 2 ulp, NaN
// stays NaN, exp saturates to 0 and inf); float64 calls libm lane by lane, since it serves gradcheck.
// Coefficients: least-maximum-error fits of (2^f - 1) / f on |f| <= 1/2 and of (log1p(y) - y) / y^2 on [0, 1].
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/math.h"

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace xlstm::XLSTM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

using VecF = Vec<float>;
using VecD = Vec<double>;
using VecI = Vec<std::int32_t>;
using VecU = Vec<std::uint32_t>;
typedef std::uint16_t VecHalfBits __attribute__((vector_size(kVectorBytes / 2)));

template <>
struct ElementOf<VecF> {
  using type = float;
};
template <>
struct ElementOf<VecD> {
  using type = double;
};

// The larger; b where either is NaN.
XLSTM_HD VecF maximum(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
XLSTM_HD VecD maximum(VecD a, VecD b) { return select(a > b, a, b); }

XLSTM_HD VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
XLSTM_HD VecD multiply_add(VecD a, VecD b, VecD c) {
#if defined(__AVX512F__)
  return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (VecD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

XLSTM_HD VecF abs(VecF x) { return (VecF)((VecI)x & 0x7fffffff); }
XLSTM_HD VecD abs(VecD x) { return select(x < VecD{}, -x, x); }

// min and max instructions return their second operand when one is NaN: x goes there.
#if defined(__AVX512F__)
XLSTM_HD VecF clamp_max(VecF x, float bound) {
  return (VecF)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x);
}
XLSTM_HD VecF clamp_min(VecF x, float bound) {
  return (VecF)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
}
#elif defined(__AVX2__)
XLSTM_HD VecF clamp_max(VecF x, float bound) {
  return (VecF)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
}
XLSTM_HD VecF clamp_min(VecF x, float bound) {
  return (VecF)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
}
#endif

// exp(x) = 2^n 2^f with n a whole number and |f| <= 1/2, for |x| < 2^20.
struct Power {
  VecF n, f;
};
XLSTM_HD Power split_power(VecF x) {
  constexpr float kLog2e = 1.44269502f, kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds
  const VecF n = (x * kLog2e + kMagic) - kMagic;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  // log2(e) in two parts: the first alone is off by 1.3e-8 of x, the same way in every step.
  constexpr float kLog2eRest = 1.92596299e-08f;
  const VecF first = multiply_add(x, broadcast<VecF>(kLog2e), -n);  // exact: fused
  return {n, multiply_add(x, broadcast<VecF>(kLog2eRest), first)};
#else
  return {n, ((x - n * 0.693359375f) - n * -2.12194440e-4f) * kLog2e};
#endif
}
// 2^f - 1
XLSTM_HD VecF exp2m1(VecF f) {
  VecF p = broadcast<VecF>(1.540349497e-04f);
  p = p * f + 1.339073541e-03f;
  p = p * f + 9.618237549e-03f;
  p = p * f + 5.550357434e-02f;
  p = p * f + 2.402264979e-01f;
  p = p * f + 6.931471879e-01f;
  return p * f;
}
// For n a whole number in [-252, 254].
XLSTM_HD VecF scale_by_power_of_two(VecF x, VecF n) {
#if defined(__AVX512F__)
  return (VecF)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  // Two factors reach denormal results, which one exponent field cannot hold.
  const VecI whole = __builtin_convertvector(n, VecI);
  const VecI half = whole >> 1;
  const VecF first = (VecF)((half + 127) << 23);
  const VecF second = (VecF)((whole - half + 127) << 23);
  return x * first * second;
#endif
}
#if defined(__AVX512F__)
// 2^x in two steps: whole 32nds of an octave n from a table, the rest |r| <= 1/64 by a cubic; below
// one ulp. `sum` is x + 1.5 * 2^18, which rounds x to 32nds: its low five bits index the table.
alignas(64) constexpr float kOctave32[32] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f,
    1.1637249f,  1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f,
    1.35425556f, 1.38390994f, 1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f,
    1.5759809f,  1.61049032f, 1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
    1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f,
};
XLSTM_HD VecF exp2_by_table(VecF sum, VecF n, VecF r) {
  const VecF octave = (VecF)_mm512_permutex2var_ps(_mm512_load_ps(kOctave32), (__m512i)sum,
                                                   _mm512_load_ps(kOctave32 + 16));
  // 2^r - 1, less the mean relative error of the table's rounded entries.
  const VecF p = ((r * 5.550411e-02f + 2.402265e-01f) * r + 6.931471806e-01f) * r - 1.004e-08f;
  return (VecF)_mm512_scalef_ps((__m512)(octave * p + octave), (__m512)n);
}
#endif
XLSTM_HD VecF exp_by_polynomial(VecF x) {  // |x| <= 104
  const Power power = split_power(x);
  return scale_by_power_of_two(exp2m1(power.f) + 1.0f, power.n);
}
XLSTM_HD VecF exp_bounded(VecF x) {  // |x| <= 104
#if defined(__AVX512F__)
  // log2(e) in two parts: the first alone is off by 1.3e-8 of x, the same way in every step.
  constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596299e-08f, kMagic = 393216.0f;
  const VecF sum = x * kLog2e + kMagic;
  const VecF n = sum - kMagic;
  const VecF first = multiply_add(x, broadcast<VecF>(kLog2e), -n);  // exact: fused
  return exp2_by_table(sum, n, multiply_add(x, broadcast<VecF>(kLog2eRest), first));
#else
  return exp_by_polynomial(x);
#endif
}
XLSTM_HD VecF expm1_bounded(VecF x) {  // |x| <= 80
  const Power power = split_power(x);
  const VecF scale = scale_by_power_of_two(broadcast<VecF>(1.0f), power.n);
  return scale * exp2m1(power.f) + (scale - 1.0f);
}
XLSTM_HD VecF exp(VecF x) { return exp_bounded(clamp_min(clamp_max(x, 89.0f), -104.0f)); }
// For factors multiplied over many steps, where errors of the table's entries would add up.
XLSTM_HD VecF exp_factor(VecF x) {
  return exp_by_polynomial(clamp_min(clamp_max(x, 89.0f), -104.0f));
}

// For x <= 1, NaN kept, everything below -150 (down to the most negative number) giving 0.
XLSTM_HD VecF exp2_nonpositive(VecF x) {
#if defined(__AVX512F__)
  const VecF magic = broadcast<VecF>(393216.0f);
  const VecF sum = x + magic;
  const VecF n = sum - magic;
  return exp2_by_table(sum, n, x - n);
#else
  x = clamp_min(x, -150.0f);
  const VecF magic = broadcast<VecF>(12582912.0f);
  const VecF n = (x + magic) - magic;
  return scale_by_power_of_two(exp2m1(x - n) + 1.0f, n);
#endif
}

// For 2^-126 <= |x| <= 2^126; below one ulp.
XLSTM_HD VecF reciprocal(VecF x) {
#if defined(__AVX512F__)
  const VecF y = (VecF)_mm512_rcp14_ps((__m512)x);
  const VecF off = multiply_add(-x, y, broadcast<VecF>(1.0f));
  return multiply_add(off, y, y);  // y (2 - x y) would round twice
#else
  return 1.0f / x;
#endif
}
// a / (b + rest), where rest is what b lost when it was rounded and b is as in reciprocal(). Division by
// b alone would pass its rounding on.
XLSTM_HD VecF divide(VecF a, VecF b, VecF rest) {
#if defined(__AVX512F__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#if defined(__AVX512F__)
  const VecF y = (VecF)_mm512_rcp14_ps((__m512)b);
#else
  const VecF y = 1.0f / b;
#endif
  const VecF q = a * y;
  return multiply_add(multiply_add(-rest, q, multiply_add(-b, q, a)), y, q);
#else
  const VecF q = a / b;
  return q - rest * q / b;
#endif
}

// 1 + exp(-x); x saturates at +-60.
XLSTM_HD VecF sigmoid_inverse(VecF x) {
  return exp_bounded(-clamp_min(clamp_max(x, 60.0f), -60.0f)) + 1.0f;
}
XLSTM_HD VecF sigmoid(VecF x) { return reciprocal(sigmoid_inverse(x)); }

// tanh(x) = e / (e + 2), e = expm1(2x): no cancellation near 0, and +-1 to the last bit beyond 9.02.
// Its roundings count: 1 - tanh(x)^2 magnifies them, once in every step of a gradient.
struct TanhParts {
  VecF e, sum, rest;  // e + 2 = sum + rest
};
XLSTM_HD TanhParts tanh_parts(VecF x) {
  x = clamp_min(clamp_max(x, 9.02f), -9.02f);
  const VecF e = expm1_bounded(x + x), sum = e + 2.0f;
  return {e, sum, (2.0f - sum) + e};
}
XLSTM_HD VecF tanh(VecF x) {
  const TanhParts parts = tanh_parts(x);
  return divide(parts.e, parts.sum, parts.rest);
}
// One division for both.
XLSTM_HD VecF sigmoid_times_tanh(VecF a, VecF b) {
  const TanhParts parts = tanh_parts(b);
  const VecF inverse = sigmoid_inverse(a), product = parts.sum * inverse;
  const VecF rest = multiply_add(parts.sum, inverse, -product);
  return divide(parts.e, product, multiply_add(parts.rest, inverse, rest));
}

// y in [0, 1]
XLSTM_HD VecF log1p_unit(VecF y) {
  VecF p = broadcast<VecF>(-3.318463557e-03f);
  p = p * y + 2.020454450e-02f;
  p = p * y + -5.766436856e-02f;
  p = p * y + 1.068054789e-01f;
  p = p * y + -1.535539185e-01f;
  p = p * y + 1.969539903e-01f;
  p = p * y + -2.495858714e-01f;
  p = p * y + 3.333051130e-01f;
  p = p * y + -4.999993276e-01f;
  return multiply_add(p * y, y, y);
}

template <double (*f)(double)>
XLSTM_HD VecD each_lane(VecD x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = f(x[lane]);
  return x;
}
XLSTM_HD VecD exp(VecD x) { return each_lane<::exp>(x); }
XLSTM_HD VecD exp_factor(VecD x) { return exp(x); }
XLSTM_HD VecD exp2_nonpositive(VecD x) { return each_lane<::exp2>(x); }
XLSTM_HD VecD tanh(VecD x) { return each_lane<::tanh>(x); }
XLSTM_HD VecD log1p_unit(VecD x) { return each_lane<::log1p>(x); }
XLSTM_HD VecD reciprocal(VecD x) { return 1.0 / x; }
XLSTM_HD VecD sigmoid_inverse(VecD x) { return exp(-x) + 1.0; }
XLSTM_HD VecD sigmoid(VecD x) { return 1.0 / sigmoid_inverse(x); }
XLSTM_HD VecD sigmoid_times_tanh(VecD a, VecD b) { return tanh(b) / sigmoid_inverse(a); }

#if defined(__AVX512F__)
XLSTM_HD float horizontal_sum(VecF x) { return _mm512_reduce_add_ps((__m512)x); }
XLSTM_HD double horizontal_sum(VecD x) { return _mm512_reduce_add_pd((__m512d)x); }
#else
template <class V>
XLSTM_HD element_t<V> horizontal_sum(V x) {
  element_t<V> sum = 0;
  for (int lane = 0; lane < kLanes<element_t<V>>; ++lane) sum += x[lane];
  return sum;
}
#endif

// ---- loads and stores, converting to and from the compute type ----

XLSTM_HD VecF widen(bf16, VecHalfBits bits) {
  return (VecF)(__builtin_convertvector(bits, VecU) << 16);
}
XLSTM_HD VecF widen(f16, VecHalfBits bits) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps((__m128i)bits);
#else
  // The exponent's bias changes by 112; denormals are integers, since tasks count float's as zero.
  const VecU wide = __builtin_convertvector(bits, VecU);
  const VecU sign = (wide & 0x8000u) << 16;
  const VecU magnitude = (wide & 0x7fffu) << 13;
  const VecU small = (VecU)(__builtin_convertvector((VecI)(wide & 0x7fffu), VecF) * 0x1p-24f);
  const VecU normal = magnitude < 0x00800000u ? small : magnitude + 0x38000000u;
  const VecU value = (magnitude >= 0x0f800000u) ? magnitude | 0x7f800000u : normal;
  return (VecF)(value | sign);
#endif
}
// Round to nearest even; NaN stays NaN.
XLSTM_HD VecHalfBits narrow(bf16, VecF x) {
  const VecU bits = (VecU)x;
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU value = (x != x) ? (bits >> 16) | 0x40u : rounded;
  return __builtin_convertvector(value, VecHalfBits);
}
XLSTM_HD VecHalfBits narrow(f16, VecF x) {
#if defined(__AVX512F__)
  return (VecHalfBits)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (VecHalfBits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VecU bits = (VecU)x;
  const VecU magnitude = bits & 0x7fffffffu;
  const VecU sign = (bits >> 16) & 0x8000u;
  const VecU normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the result is denormal: adding 0.5 lets the FPU round at its last bit, 2^-24.
  const VecU denormal = (VecU)((VecF)magnitude + 0.5f) - 0x3f000000u;
  VecU value = (magnitude < 0x38800000u) ? denormal : normal;
  value = (magnitude >= 0x477ff000u) ? VecU{} + 0x7c00u : value;
  value = (magnitude > 0x7f800000u) ? VecU{} + 0x7e00u : value;
  return __builtin_convertvector(value | sign, VecHalfBits);
#endif
}

template <class T>
XLSTM_HD Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
XLSTM_HD VecF load(const bf16* p) {
  VecHalfBits bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen(bf16{}, bits);
}
XLSTM_HD VecF load(const f16* p) {
  VecHalfBits bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen(f16{}, bits);
}
template <class T>
XLSTM_HD void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
XLSTM_HD void store(bf16* p, VecF v) {
  const VecHalfBits bits = narrow(bf16{}, v);
  std::memcpy(p, &bits, sizeof bits);
}
XLSTM_HD void store(f16* p, VecF v) {
  const VecHalfBits bits = narrow(f16{}, v);
  std::memcpy(p, &bits, sizeof bits);
}

// The first `count` lanes only; lanes beyond are `fill` on load and untouched in memory on store.
template <class T>
XLSTM_HD Vec<compute_t<T>> load(const T* p, int count, T fill = T{}) {
  constexpr int kCount = kLanes<compute_t<T>>;
  if (count >= kCount) return load(p);
  T buffer[kCount];
  for (int lane = 0; lane < kCount; ++lane) buffer[lane] = lane < count ? p[lane] : fill;
  return load(static_cast<const T*>(buffer));
}
template <class T>
XLSTM_HD void store(T* p, Vec<compute_t<T>> v, int count) {
  constexpr int kCount = kLanes<compute_t<T>>;
  if (count >= kCount) return store(p, v);
  T buffer[kCount];
  store(static_cast<T*>(buffer), v);
  for (int lane = 0; lane < count; ++lane) p[lane] = buffer[lane];
}

}  // namespace xlstm::XLSTM_ISA
