// cuda/sync.h on the emulator.
#pragma once

#include <cstdint>

#include "emulator/machine.h"

namespace xlstm {

inline unsigned cluster_rank() { return emulator::current().block->rank; }
inline void cluster_sync() { emulator::wait(emulator::current().group->barrier); }
inline void grid_sync() { emulator::wait(emulator::current().group->barrier); }
template <class T>
T* map_shared(T* address, unsigned rank) {
  return static_cast<T*>(emulator::map_shared(address, rank));
}

inline void store_release(unsigned* flag, unsigned value) {
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}
inline unsigned load_acquire(const unsigned* flag) {
  const unsigned value = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
  emulator::spin();
  return value;
}

constexpr bool kHasClusters = true;

// What is still to come, from kNoBytes on in its lower half; above, whether expect_bytes is, and the
// turns that are over.
using ByteBarrier = std::uint64_t;
constexpr ByteBarrier kNoBytes = ByteBarrier{1} << 31, kExpects = ByteBarrier{1} << 32,
                      kTurn = ByteBarrier{2} << 32;

inline void init_barrier(ByteBarrier* barrier) {
  __atomic_store_n(barrier, kNoBytes | kExpects, __ATOMIC_RELAXED);
}
// Fibers do not interrupt one another: two atomic changes are one.
inline void change_barrier(ByteBarrier* barrier, ByteBarrier by) {
  const ByteBarrier is = __atomic_add_fetch(barrier, by, __ATOMIC_RELEASE);
  if (is % kTurn == kNoBytes) __atomic_fetch_add(barrier, kTurn + kExpects, __ATOMIC_RELAXED);
}
inline void expect_bytes(ByteBarrier* barrier, int bytes) {
  change_barrier(barrier, static_cast<ByteBarrier>(bytes) - kExpects);
}
inline void await_bytes(ByteBarrier* barrier, unsigned turn) {
  while (__atomic_load_n(barrier, __ATOMIC_ACQUIRE) / kTurn % 2 == turn % 2) emulator::spin();
}
template <class Words>
void store_async(std::uint32_t* to, const Words& words, ByteBarrier* barrier, int rank) {
  const auto there = static_cast<unsigned>(rank);
  *reinterpret_cast<Words*>(map_shared(to, there)) = words;
  change_barrier(map_shared(barrier, there), -ByteBarrier{sizeof(Words)});
}

}  // namespace xlstm
