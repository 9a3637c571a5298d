// cuda/sync.h on the emulator.
#pragma once

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

}  // namespace xlstm
