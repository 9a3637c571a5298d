// cuda/shared.h on the emulator: each array is a heap block with ends of its own.
#pragma once

#include "emulator/machine.h"

namespace xlstm {

class Shared {
 public:
  template <class T>
  T* take(std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    return static_cast<T*>(emulator::take_shared(order_++, bytes));
  }

 private:
  int order_ = 0;
};

}  // namespace xlstm
