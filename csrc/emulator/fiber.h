// A function on a stack of its own: it runs until it yields, and later goes on from there.
#pragma once

#include <cstddef>

namespace xlstm::emulator {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(argument), on a fresh stack. A fiber that has not ended is given up.
  void start(void (*entry)(void*), void* argument);
  // Runs the fiber until it yields or ends.
  void resume();
  bool ended() const { return ended_; }

  // From inside a fiber: back to whoever resumed it.
  static void yield();

 private:
  static void run();
  void switch_to(void** from, void* to, bool into_fiber);

  static constexpr std::size_t kStackBytes = std::size_t{256} << 10;
  char* stack_;
  void* inside_ = nullptr;   // stack pointer of the fiber while it waits
  void* outside_ = nullptr;  // stack pointer of the resumer while the fiber runs
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool ended_ = true;

  // What ThreadSanitizer and AddressSanitizer need to know of a switch.
  void *tsan_inside_ = nullptr, *tsan_outside_ = nullptr;
  void *asan_inside_ = nullptr, *asan_outside_ = nullptr;
  const void* outer_stack_ = nullptr;
  std::size_t outer_bytes_ = 0;
};

// What one thread did before release(token), another sees after acquire(token). They tell
// ThreadSanitizer alone: fibers take turns on one thread, so nothing else needs telling.
void release(void* token);
void acquire(void* token);

}  // namespace xlstm::emulator
