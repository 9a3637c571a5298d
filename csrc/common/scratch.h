// One aligned block of working memory per task, carved up front to back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "common/host_device.h"

namespace xlstm::XLSTM_ISA {

class Scratch {
 public:
  // Counts what is taken from it, and has nothing to give.
  Scratch() = default;
  // `count` is the number of take() calls, each of which may lose one alignment gap.
  Scratch(std::size_t size_bytes, int count)
      : block_(static_cast<char*>(std::aligned_alloc(
            kAlign, align(size_bytes + static_cast<std::size_t>(count) * kAlign)))) {
    if (block_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(std::int64_t count) {
    T* taken = block_ ? reinterpret_cast<T*>(block_ + used_bytes_) : nullptr;
    used_bytes_ += align(static_cast<std::size_t>(count) * sizeof(T));
    return taken;
  }
  std::size_t used_bytes() const { return used_bytes_; }

 private:
  static constexpr std::size_t kAlign = 64;
  static std::size_t align(std::size_t size) { return (size + kAlign - 1) / kAlign * kAlign; }

  char* block_ = nullptr;
  std::size_t used_bytes_ = 0;
};

}  // namespace xlstm::XLSTM_ISA
