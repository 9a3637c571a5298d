// Element types that tensors may hold, and the switch from a run-time dtype to a template argument.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace xlstm {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr XLSTM_HD int size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

// Gates, states and accumulators: float32, except for float64 tensors (design: numerics, rule 2).
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

namespace XLSTM_ISA {

// Calls f(T{}) with the element type that `dtype` names.
template <class F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat16:
      return f(f16{});
  }
}

}  // namespace XLSTM_ISA
}  // namespace xlstm
