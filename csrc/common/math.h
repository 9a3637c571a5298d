// Scalar mathematics of the cells, host and device. common/simd.h overloads the same names for vectors.
//   sigmoid(x)     = 1 / (1 + exp(-x))
//   log_sigmoid(x) = min(x, 0) - log1p(exp(-|x|))
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace xlstm::XLSTM_ISA {

XLSTM_HD float exp(float x) { return ::expf(x); }
XLSTM_HD double exp(double x) { return ::exp(x); }
XLSTM_HD float tanh(float x) { return ::tanhf(x); }
XLSTM_HD double tanh(double x) { return ::tanh(x); }
// y in [0, 1]
XLSTM_HD float log1p_unit(float y) { return ::log1pf(y); }
XLSTM_HD double log1p_unit(double y) { return ::log1p(y); }
XLSTM_HD float reciprocal(float x) { return 1.0f / x; }
XLSTM_HD double reciprocal(double x) { return 1.0 / x; }
XLSTM_HD float sigmoid_inverse(float x) { return 1.0f + exp(-x); }
XLSTM_HD double sigmoid_inverse(double x) { return 1.0 + exp(-x); }
XLSTM_HD float sigmoid(float x) { return 1.0f / sigmoid_inverse(x); }
XLSTM_HD double sigmoid(double x) { return 1.0 / sigmoid_inverse(x); }
XLSTM_HD float sigmoid_times_tanh(float a, float b) { return sigmoid(a) * tanh(b); }
XLSTM_HD double sigmoid_times_tanh(double a, double b) { return sigmoid(a) * tanh(b); }

// a b + c, where the compiler could fuse either product of a b + x y: which one it takes may differ
// between two rows of one tile, and a row's bits would depend on its place.
XLSTM_HD float multiply_add(float a, float b, float c) { return a * b + c; }
XLSTM_HD double multiply_add(double a, double b, double c) { return a * b + c; }

// Lane by lane where mask is the result of comparing vectors.
template <class Mask, class V>
XLSTM_HD V select(Mask mask, V a, V b) {
  return mask ? a : b;
}

XLSTM_HD float abs(float x) { return ::fabsf(x); }
XLSTM_HD double abs(double x) { return ::fabs(x); }

// The element type of a scalar or, in common/simd.h, of a vector.
template <class V>
struct ElementOf {
  using type = V;
};
template <class V>
using element_t = typename ElementOf<V>::type;

// x - 0 is x for every x, -0 and NaN too; compilers turn it into one broadcast.
template <class V>
XLSTM_HD V broadcast(element_t<V> x) {
  return x - V{};
}

// NaN in x comes out as NaN: both comparisons are false for it.
template <class V>
XLSTM_HD V clamp_max(V x, element_t<V> bound) {
  const V limit = broadcast<V>(bound);
  return select(x > limit, limit, x);
}
template <class V>
XLSTM_HD V clamp_min(V x, element_t<V> bound) {
  const V limit = broadcast<V>(bound);
  return select(x < limit, limit, x);
}

}  // namespace xlstm::XLSTM_ISA
