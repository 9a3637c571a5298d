// Rows of logits as a block of threads reads and keeps them: vectors of 16 bytes, each always by the
// same thread, so that nobody waits for what is kept in shared memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cells/kl_div.h"
#include "cuda/element.h"
#include "cuda/row_group.h"
#include "launch.h"

namespace xlstm {

// Stands for elements whose dtype is known when the kernel runs; they are kept as C.
template <class C>
struct Any {};

template <class E>
struct Kept {
  using type = E;
};
template <class C>
struct Kept<Any<C>> {
  using type = C;
};
template <class E>
using kept_t = typename Kept<E>::type;

struct alignas(16) Vector {
  std::uint32_t words[4];
};
// Elements of a vector.
template <class E>
constexpr int kCount = 16 / static_cast<int>(sizeof(kept_t<E>));

// The first element of row n.
__device__ __forceinline__ std::int64_t row_at(const RowLoss& args, const std::int64_t (&stride)[2],
                                               std::int64_t n) {
  return n / args.rows[1] * stride[0] + n % args.rows[1] * stride[1];
}
__device__ __forceinline__ bool aligned(const void* p, int bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

// A row in device memory; `V` elements, and -inf beyond.
template <class E>
class Row {
 public:
  using T = kept_t<E>;
  using C = compute_t<T>;
  static constexpr int kN = kCount<E>;

  __device__ __forceinline__ Row(const void* data, DType dtype, std::int64_t V,
                                 const std::int64_t (&stride)[2], const RowLoss& args,
                                 std::int64_t n)
      : V_(static_cast<int>(V)), dtype_(dtype) {
    data_ = static_cast<const char*>(data) + row_at(args, stride, n) * size_of(dtype);
    whole_ = std::is_same_v<E, T> && aligned(data_, 16) ? V_ / kN * kN : 0;
  }

  __device__ __forceinline__ int V() const { return V_; }
  // Vectors that begin below are there as a whole, on 16 bytes.
  __device__ __forceinline__ int whole() const { return whole_; }

  __device__ __forceinline__ C operator[](int at) const {
    if constexpr (std::is_same_v<E, T>) {
      return load(reinterpret_cast<const T*>(data_) + at);
    } else {
      return load_any(at);
    }
  }

  __device__ __forceinline__ Vector read_whole(int at) const {
    return *reinterpret_cast<const Vector*>(data_ + static_cast<std::int64_t>(at) * sizeof(T));
  }
  __device__ __forceinline__ Vector read(int at) const {
    if (at < whole_) return read_whole(at);
    C z[kN];
#pragma unroll
    for (int k = 0; k < kN; ++k) z[k] = at + k < V_ ? (*this)[at + k] : XLSTM_ISA::kMasked<C>;
    return pack(z);
  }

  static __device__ __forceinline__ Vector pack(const C (&z)[kN]) {
    T parts[kN];
#pragma unroll
    for (int k = 0; k < kN; ++k) store(&parts[k], z[k]);
    Vector vector;
    std::memcpy(&vector, parts, sizeof vector);
    return vector;
  }
  static __device__ __forceinline__ void unpack(const Vector& vector, C (&z)[kN]) {
    T parts[kN];
    std::memcpy(parts, &vector, sizeof vector);
#pragma unroll
    for (int k = 0; k < kN; ++k) z[k] = load(&parts[k]);
  }

 private:
  template <class S>
  __device__ __forceinline__ const S* as() const {
    return reinterpret_cast<const S*>(data_);
  }
  __device__ __forceinline__ C load_any(int at) const {
    switch (dtype_) {
      case DType::kFloat64:
        return static_cast<C>(load(as<double>() + at));
      case DType::kFloat32:
        return load(as<float>() + at);
      case DType::kBFloat16:
        return load(as<bf16>() + at);
      default:
        return load(as<f16>() + at);
    }
  }

  int V_, whole_;
  DType dtype_;
  const char* data_;
};

// The gradient of a row, of as many elements as the student's, in their dtype or another.
template <class E>
class Gradient {
 public:
  using C = typename Row<E>::C;
  static constexpr int kN = Row<E>::kN;

  __device__ __forceinline__ Gradient(const RowLoss& args, std::int64_t n)
      : V_(static_cast<int>(args.V_student)),
        dtype_(args.grad_dtype),
        data_(static_cast<char*>(args.grad) + row_at(args, args.grad_stride, n) * size_of(dtype_)) {
    const bool packs = !std::is_same_v<E, Any<C>> && dtype_ == args.student_dtype;
    if (packs || narrow()) whole_ = aligned(data_, kN * size_of(dtype_)) ? V_ / kN * kN : 0;
  }

  __device__ __forceinline__ int V() const { return V_; }

  __device__ __forceinline__ void write(int at, const C (&g)[kN]) const {
    if (at < whole_) {
      char* const to = data_ + static_cast<std::int64_t>(at) * size_of(dtype_);
      if constexpr (kNarrows) {
        if (narrow()) return write_bf16(to, g);
      }
      *reinterpret_cast<Vector*>(to) = Row<E>::pack(g);
      return;
    }
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      if (at + k < V_) write_one(at + k, g[k]);
    }
  }
  __device__ __forceinline__ void write_one(int at, C g) const {
    switch (dtype_) {
      case DType::kFloat64:
        return store(as<double>() + at, static_cast<double>(g));
      case DType::kFloat32:
        return store(as<float>() + at, static_cast<float>(g));
      case DType::kBFloat16:
        return store(as<bf16>() + at, static_cast<float>(g));
      default:
        return store(as<f16>() + at, static_cast<float>(g));
    }
  }

 private:
  // Of float32 logits a linear loss wants it in bfloat16.
  static constexpr bool kNarrows = std::is_same_v<E, float>;
  struct alignas(8) Half {
    std::uint32_t words[2];
  };

  __device__ __forceinline__ bool narrow() const { return kNarrows && dtype_ == DType::kBFloat16; }
  static __device__ __forceinline__ void write_bf16(char* to, const C (&g)[kN]) {
    bf16 parts[kN];
#pragma unroll
    for (int k = 0; k < kN; ++k) store(&parts[k], g[k]);
    Half packed;
    std::memcpy(&packed, parts, sizeof packed);
    *reinterpret_cast<Half*>(to) = packed;
  }
  template <class S>
  __device__ __forceinline__ S* as() const {
    return reinterpret_cast<S*>(data_);
  }

  int V_, whole_ = 0;
  DType dtype_;
  char* data_;
};

// A block's slice of a row, the first vectors of it kept in shared memory once they are read.
template <class E>
class Slice {
 public:
  using C = typename Row<E>::C;
  static constexpr int kN = Row<E>::kN;

  // Where cap is not 0, z counts as cap tanh(z / cap), a masked one as masked.
  __device__ __forceinline__ Slice(const Row<E>& row, int begin, double cap, Vector* kept,
                                   int kept_vectors)
      : row_(row),
        begin_(begin),
        kept_vectors_(kept_vectors),
        kept_(kept),
        cap_(static_cast<C>(cap)) {}

  // Vectors [0, this) are whole in memory.
  __device__ __forceinline__ int whole() const {
    return row_.whole() > begin_ ? (row_.whole() - begin_) / kN : 0;
  }
  __device__ __forceinline__ Vector read_whole(int v) const {
    return row_.read_whole(begin_ + v * kN);
  }
  __device__ __forceinline__ Vector read(int v) const { return row_.read(begin_ + v * kN); }
  __device__ __forceinline__ void keep(int v, const Vector& vector) const {
    if (v < kept_vectors_) kept_[v] = vector;
  }

  // What was read and kept, or is read again.
  __device__ __forceinline__ void fetch(int v, C (&z)[kN]) const {
    widen(v < kept_vectors_ ? kept_[v] : read(v), z);
  }
  __device__ __forceinline__ void widen(const Vector& vector, C (&z)[kN]) const {
    Row<E>::unpack(vector, z);
    if (cap_ == 0) return;
#pragma unroll
    for (int k = 0; k < kN; ++k) z[k] = capped(z[k]);
  }
  // One element of the row, of any slice.
  __device__ __forceinline__ C operator[](int at) const { return capped(row_[at]); }
  __device__ __forceinline__ C cap() const { return cap_; }

 private:
  __device__ __forceinline__ C capped(C z) const {
    return cap_ == 0 ? z : XLSTM_ISA::softcapped(z, cap_);
  }

  Row<E> row_;
  int begin_, kept_vectors_;
  Vector* kept_;
  C cap_;
};

// Vectors of a slice that begins at a column, in a row of `columns`.
__device__ __forceinline__ int slice_vectors(std::int64_t columns, int begin, int per_vector,
                                             int slice) {
  const std::int64_t left = (columns - begin + per_vector - 1) / per_vector;
  return static_cast<int>(left < 0 ? 0 : left < slice ? left : slice);
}

// Reads the slices of rows side by side, keeps what there is room for, and calls take(v, z): the
// logits of vector v of each.
template <class E, int kRows, class Take>
__device__ __forceinline__ void read_slices(const RowGroup& group, int vectors,
                                            const Slice<E>* const (&rows)[kRows], Take take) {
  constexpr int kBatch = 4;  // vectors of a row that are asked of memory at once
  int whole = vectors;
#pragma unroll
  for (int r = 0; r < kRows; ++r) whole = rows[r]->whole() < whole ? rows[r]->whole() : whole;
  const auto taken = [&](int v, const Vector(&bits)[kRows]) {
    typename Row<E>::C z[kRows][Row<E>::kN];
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r]->keep(v, bits[r]), rows[r]->widen(bits[r], z[r]);
    take(v, z);
  };
  const int step = group.threads();
  int v = group.thread();
  for (; v - group.thread() + kBatch * step <= whole; v += kBatch * step) {
    Vector bits[kBatch][kRows];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) bits[i][r] = rows[r]->read_whole(v + i * step);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) taken(v + i * step, bits[i]);
  }
  for (; v < vectors; v += step) {
    Vector bits[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) bits[r] = rows[r]->read(v);
    taken(v, bits);
  }
}

}  // namespace xlstm
