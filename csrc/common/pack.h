// N vectors that move through the same arithmetic side by side: the chains of dependent operations of
// one cell step are long, and N independent ones fill the pipeline.
#pragma once

#include "common/simd.h"

namespace xlstm::XLSTM_ISA {

template <class V, int N>
struct Pack {
  V v[N];
};

template <class V, int N>
struct ElementOf<Pack<V, N>> {
  using type = element_t<V>;
};

// f applied member by member; operands that are not packs are shared.
template <class P>
XLSTM_HD P member(P scalar, int) {
  return scalar;
}
template <class V, int N>
XLSTM_HD V member(const Pack<V, N>& pack, int n) {
  return pack.v[n];
}
template <int N, class F, class... Operands>
XLSTM_HD auto each_member(F f, const Operands&... operands) {
  Pack<decltype(f(member(operands, 0)...)), N> result;
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) result.v[n] = f(member(operands, n)...);
  return result;
}

#define XLSTM_PACK_BINARY(op)                                                  \
  template <class V, int N>                                                    \
  XLSTM_HD auto operator op(const Pack<V, N>& a, const Pack<V, N>& b) {        \
    return each_member<N>([](V x, V y) XLSTM_INLINE { return x op y; }, a, b); \
  }                                                                            \
  template <class V, int N>                                                    \
  XLSTM_HD auto operator op(const Pack<V, N>& a, element_t<V> b) {             \
    return each_member<N>([b](V x) XLSTM_INLINE { return x op b; }, a);        \
  }                                                                            \
  template <class V, int N>                                                    \
  XLSTM_HD auto operator op(element_t<V> a, const Pack<V, N>& b) {             \
    return each_member<N>([a](V y) XLSTM_INLINE { return a op y; }, b);        \
  }
#define XLSTM_INLINE __attribute__((always_inline))
XLSTM_PACK_BINARY(+)
XLSTM_PACK_BINARY(-)
XLSTM_PACK_BINARY(*)
XLSTM_PACK_BINARY(/)
XLSTM_PACK_BINARY(<)
XLSTM_PACK_BINARY(>)
XLSTM_PACK_BINARY(==)
XLSTM_PACK_BINARY(!=)
XLSTM_PACK_BINARY(|)
#undef XLSTM_PACK_BINARY

#define XLSTM_PACK_UNARY(f)                                          \
  template <class V, int N>                                          \
  XLSTM_HD auto f(const Pack<V, N>& a) {                             \
    return each_member<N>([](V x) XLSTM_INLINE { return f(x); }, a); \
  }
XLSTM_PACK_UNARY(abs)
XLSTM_PACK_UNARY(exp)
XLSTM_PACK_UNARY(tanh)
XLSTM_PACK_UNARY(sigmoid)
XLSTM_PACK_UNARY(sigmoid_inverse)
XLSTM_PACK_UNARY(reciprocal)
XLSTM_PACK_UNARY(log1p_unit)
#undef XLSTM_PACK_UNARY

template <class V, int N>
XLSTM_HD auto operator-(const Pack<V, N>& a) {
  return each_member<N>([](V x) XLSTM_INLINE { return -x; }, a);
}
template <class M, class V, int N>
XLSTM_HD Pack<V, N> select(const Pack<M, N>& mask, const Pack<V, N>& a, const Pack<V, N>& b) {
  return each_member<N>([](M m, V x, V y) XLSTM_INLINE { return select(m, x, y); }, mask, a, b);
}
template <class V, int N>
XLSTM_HD Pack<V, N> multiply_add(const Pack<V, N>& a, const Pack<V, N>& b, const Pack<V, N>& c) {
  return each_member<N>([](V x, V y, V z) XLSTM_INLINE { return multiply_add(x, y, z); }, a, b, c);
}
template <class V, int N>
XLSTM_HD auto sigmoid_times_tanh(const Pack<V, N>& a, const Pack<V, N>& b) {
  return each_member<N>([](V x, V y) XLSTM_INLINE { return sigmoid_times_tanh(x, y); }, a, b);
}
template <class V, int N>
XLSTM_HD Pack<V, N> clamp_max(const Pack<V, N>& a, element_t<V> bound) {
  return each_member<N>([bound](V x) XLSTM_INLINE { return clamp_max(x, bound); }, a);
}
template <class V, int N>
XLSTM_HD Pack<V, N> clamp_min(const Pack<V, N>& a, element_t<V> bound) {
  return each_member<N>([bound](V x) XLSTM_INLINE { return clamp_min(x, bound); }, a);
}
#undef XLSTM_INLINE

}  // namespace xlstm::XLSTM_ISA
