#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Null where the sanitizer is not there.
extern "C" {
#define XLSTM_WEAK __attribute__((weak))
XLSTM_WEAK void* __tsan_get_current_fiber();
XLSTM_WEAK void* __tsan_create_fiber(unsigned flags);
XLSTM_WEAK void __tsan_destroy_fiber(void* fiber);
XLSTM_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
XLSTM_WEAK void __tsan_acquire(void* address);
XLSTM_WEAK void __tsan_release(void* address);
XLSTM_WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, std::size_t size);
XLSTM_WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, std::size_t* size);
XLSTM_WEAK void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
#undef XLSTM_WEAK
}

namespace xlstm::emulator {
namespace {

constexpr unsigned kNoSync = 1;  // a switch orders nothing: only barriers and atomics do
thread_local Fiber* g_running = nullptr;

}  // namespace

#if defined(__x86_64__)
// Pushes what a call must preserve, swaps stacks, pops. ucontext would enter the kernel twice.
extern "C" void xlstm_switch_stack(void** from, void* to);
asm(R"(
  .text
  .type xlstm_switch_stack, @function
xlstm_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size xlstm_switch_stack, .-xlstm_switch_stack
)");

static void* first_frame(char* stack, std::size_t size, void (*run)()) {
  // Registers to pop, the address to return to, and a null return address that aligns the stack as
  // a call would.
  void** top = reinterpret_cast<void**>(stack + size) - 8;
  for (int slot = 0; slot < 8; ++slot) top[slot] = nullptr;
  top[6] = reinterpret_cast<void*>(run);
  return top;
}
#else
static void xlstm_switch_stack(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

static void* first_frame(char* stack, std::size_t size, void (*run)()) {
  ucontext_t* context = new (stack) ucontext_t;  // the stack grows down towards it
  getcontext(context);
  context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
  context->uc_stack.ss_size = size - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, run, 0);
  return context;
}
#endif

// `at`: a mapping to replace, or null.
static char* map_stack(void* at, std::size_t size) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void* memory = ::mmap(at, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

Fiber::Fiber() : stack_(map_stack(nullptr, kStackBytes)) {}

Fiber::~Fiber() {
  if (tsan_inside_) __tsan_destroy_fiber(tsan_inside_);
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack_, kStackBytes);
  ::munmap(stack_, kStackBytes);
}

void Fiber::start(void (*entry)(void*), void* argument) {
  entry_ = entry, argument_ = argument, ended_ = false;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack_, kStackBytes);
  if (__tsan_create_fiber) {
    // A thread of its own each time, on memory that nobody has touched.
    if (tsan_inside_) __tsan_destroy_fiber(tsan_inside_);
    map_stack(stack_, kStackBytes);
    tsan_inside_ = __tsan_create_fiber(0);
  }
  inside_ = first_frame(stack_, kStackBytes, &Fiber::run);
  asan_inside_ = nullptr;
}

void Fiber::switch_to(void** from, void* to, bool into_fiber) {
  if (__tsan_switch_to_fiber) {
    if (into_fiber) tsan_outside_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(into_fiber ? tsan_inside_ : tsan_outside_, kNoSync);
  }
  void** save = into_fiber ? &asan_outside_ : ended_ ? nullptr : &asan_inside_;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(save, into_fiber ? stack_ : outer_stack_,
                                   into_fiber ? kStackBytes : outer_bytes_);
  }
  xlstm_switch_stack(from, to);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(save ? *save : nullptr, into_fiber ? nullptr : &outer_stack_,
                                    into_fiber ? nullptr : &outer_bytes_);
  }
}

void Fiber::resume() {
  g_running = this;
  switch_to(&outside_, inside_, true);
  g_running = nullptr;
}

void Fiber::yield() { g_running->switch_to(&g_running->inside_, g_running->outside_, false); }

void Fiber::run() {
  Fiber& self = *g_running;
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &self.outer_stack_, &self.outer_bytes_);
  }
  self.entry_(self.argument_);
  self.ended_ = true;
  self.switch_to(&self.inside_, self.outside_, false);
}

void release(void* token) {
  if (__tsan_release) __tsan_release(token);
}
void acquire(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}

}  // namespace xlstm::emulator
