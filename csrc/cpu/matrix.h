// Matrices and rows of one chunk in scratch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/integers.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "launch.h"

namespace xlstm::XLSTM_ISA {

// Rows and columns of scratch come in multiples of this: whole vectors, or whole tiles.
#if defined(__AMX_TILE__)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
template <class T>
constexpr int kPad = kHasTiles ? 32 : kLanes<compute_t<T>>;

// store() in the one instruction that some CPUs have for it.
template <class T>
XLSTM_HD void put(T* p, Vec<compute_t<T>> x) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
    return;
  }
#endif
  store(p, x);
}
// The first `count` lanes, which may be none or more than there are.
template <class T>
XLSTM_HD void put(T* p, Vec<compute_t<T>> x, std::int64_t count) {
  if (count >= kLanes<compute_t<T>>) return put(p, x);
  store(p, x, static_cast<int>(count));
}

// A matrix in scratch: rows of whole vectors, one cache line apart, since rows a power of two apart
// would fall into the same few sets of the L1 cache. Lanes beyond the width are zero.
template <class T>
struct Matrix {
  T* data = nullptr;
  std::int64_t rows = 0, width = 0;

  static constexpr int kW = kLanes<compute_t<T>>;
  std::int64_t padded() const { return round_up(width, kPad<T>); }
  std::int64_t stride() const { return padded() + kVectorBytes / static_cast<int>(sizeof(T)); }
  std::int64_t size() const { return rows * stride(); }
  T* row(std::int64_t r) const { return data + r * stride(); }
  const T* at(std::int64_t r, std::int64_t c) const { return row(r) + c; }
  void zero(std::int64_t first = 0) const {
    std::memset(row(first), 0, static_cast<std::size_t>((rows - first) * stride()) * sizeof(T));
  }
};

template <class T>
Matrix<T> take_matrix(Scratch& scratch, std::int64_t rows, std::int64_t width) {
  Matrix<T> matrix{nullptr, rows, width};
  matrix.data = scratch.take<T>(matrix.size());
  return matrix;
}

// `rows` token rows into scratch; the matrix's rows beyond are zeroed, since products read them.
template <class Element, class T>
void load_rows(const void* tensor, std::int64_t first, std::int64_t row_stride, std::int64_t rows,
               const Matrix<T>& to) {
  constexpr int kW = Matrix<T>::kW;
  const Element* from = static_cast<const Element*>(tensor) + first;
  for (std::int64_t r = 0; r < rows; ++r, from += row_stride) {
    T* row = to.row(r);
    for (std::int64_t c = to.width / kW * kW; c < to.padded(); c += kW) {
      store(row + c, Vec<compute_t<T>>{});
    }
    if constexpr (std::is_same_v<Element, T>) {
      std::memcpy(row, from, static_cast<std::size_t>(to.width) * sizeof(T));
    } else {
      for (std::int64_t c = 0; c < to.width; c += kW) {
        const std::int64_t left = to.width - c;
        store(row + c, load(from + c, static_cast<int>(left < kW ? left : kW)));
      }
    }
  }
  to.zero(rows);
}

// to = from, row r times factor[r].
template <class From, class To>
void scale_rows_into(const Matrix<From>& from, std::int64_t rows, const compute_t<To>* factor,
                     const Matrix<To>& to) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto f = broadcast<Vec<compute_t<To>>>(factor[r]);
    for (std::int64_t c = 0; c < from.padded(); c += Matrix<To>::kW) {
      put(to.row(r) + c, f * load(from.at(r, c)));
    }
  }
}

// `from` (rows, columns), null for zeros, turned.
template <class T>
void transposed_in(const T* from, std::int64_t rows, std::int64_t columns, const Matrix<T>& to) {
  to.zero();
  for (std::int64_t r = 0; from && r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) to.row(c)[r] = from[r * columns + c];
  }
}

// The first `count` of `padded`, null for zeros; the rest zero.
template <class T>
void padded_in(const T* from, std::int64_t count, std::int64_t padded, T* to) {
  for (std::int64_t c = 0; c < padded; ++c) to[c] = from && c < count ? from[c] : T{};
}

template <class A, class B>
compute_t<B> dot(const A* a, const B* b, std::int64_t count) {  // whole vectors
  Vec<compute_t<B>> sum{};
  for (std::int64_t c = 0; c < count; c += kLanes<compute_t<B>>) sum += load(a + c) * load(b + c);
  return horizontal_sum(sum);
}

// vector = decay * vector + sum_j factor[j] * rows[j]
template <class T, class Row>
void add_rows(T* vector, T decay, const Matrix<Row>& matrix, const T* factor, std::int64_t rows) {
  for (std::int64_t c = 0; c < matrix.padded(); c += kLanes<T>) {
    Vec<T> sum{};
    for (std::int64_t r = 0; r < rows; ++r) {
      sum += factor[r] * load(matrix.at(r, c));
    }
    store(vector + c, decay * load(static_cast<const T*>(vector + c)) + sum);
  }
}

}  // namespace xlstm::XLSTM_ISA
