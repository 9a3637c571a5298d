// parallel_for over torch's own thread pool, without linking torch: Python hands over the addresses
// of two C symbols of libtorch_cpu once, at import. Without it (torch < 2.10) work runs serially.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>

#include "common/host_device.h"

namespace xlstm {

using ParallelBody = void (*)(std::int64_t begin, std::int64_t end, void* context);
// int (begin, end, grain_size, body, context); 0 means success.
using ParallelFor = int (*)(std::int64_t, std::int64_t, std::int64_t, ParallelBody, void*);

// int (threads*); 0 means success.
using GetNumThreads = int (*)(std::uint32_t*);

// Defined in cpu/dispatch.cpp.
extern ParallelFor g_parallel_for;
extern GetNumThreads g_get_num_threads;

namespace XLSTM_ISA {

inline std::int64_t num_threads() {
  std::uint32_t threads = 1;
  const bool known = g_parallel_for && g_get_num_threads && g_get_num_threads(&threads) == 0;
  return known && threads > 0 ? threads : 1;
}

// Calls f(task) for every task in [0, count), each exactly once, in any order. Threads draw tasks
// from one counter, so unequal tasks balance. The first exception stops the drawing and is rethrown
// here.
template <class F>
void parallel_for(std::int64_t count, const F& f) {
  struct Shared {
    const F& call;
    std::int64_t count;
    std::int64_t next;
    int failed;
    std::exception_ptr error;
  } shared{f, count, 0, 0, nullptr};
  const ParallelBody body = [](std::int64_t, std::int64_t, void* context) {
    Shared& s = *static_cast<Shared*>(context);
    try {
      for (;;) {
        const std::int64_t task = __atomic_fetch_add(&s.next, 1, __ATOMIC_RELAXED);
        if (task >= s.count) return;
        s.call(task);
      }
    } catch (...) {
      if (__atomic_exchange_n(&s.failed, 1, __ATOMIC_ACQ_REL) == 0)
        s.error = std::current_exception();
      __atomic_store_n(&s.next, s.count, __ATOMIC_RELAXED);
    }
  };
  if (count <= 1 || g_parallel_for == nullptr) {
    body(0, count, &shared);
  } else if (g_parallel_for(0, count, 1, body, &shared) != 0) {
    throw std::runtime_error("xlstm_kernels: torch's thread pool reported an error");
  }
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace XLSTM_ISA
}  // namespace xlstm
