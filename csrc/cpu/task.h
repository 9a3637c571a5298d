// What every CPU task sets up on its thread, and takes down again.
#pragma once

#include "common/host_device.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace xlstm::XLSTM_ISA {

// Denormals count as zero while it lives: a decayed state would otherwise slow every step several
// times for values below 1e-38. Streaming stores are complete when it ends.
class TaskScope {
 public:
#if defined(__SSE2__)
  TaskScope() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushToZero | kDenormalsAreZero); }
  ~TaskScope() {
    _mm_sfence();
    _mm_setcsr(saved_);
  }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned saved_;
#else
  TaskScope() {}
  ~TaskScope() {}
#endif
  TaskScope(const TaskScope&) = delete;
  TaskScope& operator=(const TaskScope&) = delete;
};

}  // namespace xlstm::XLSTM_ISA
