#include "emulator/machine.h"

#include <cstring>
#include <stdexcept>

namespace xlstm::emulator {
namespace {

constexpr int kMostIdleRounds = 100000;  // of spinning, before it counts as waiting for ever

thread_local Thread* g_current = nullptr;
std::uint64_t g_start_token, g_end_token;

void thread_main(void* argument) {
  Thread& thread = *static_cast<Thread*>(argument);
  acquire(&g_start_token);
  try {
    thread.launch->kernel();
  } catch (...) {
    thread.error = std::current_exception();
  }
  release(&g_end_token);
}

std::string name_of(const Thread& thread) {
  const auto list = [](const Dim3& at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
           ")";
  };
  return "thread " + list(thread.index) + " of block " + list(thread.block->index);
}

[[noreturn]] void report_deadlock(const std::vector<std::unique_ptr<Thread>>& threads) {
  int waiting = 0, ended = 0;
  std::string first;
  for (const auto& thread : threads) {
    if (thread->fiber.ended()) {
      ++ended;
      continue;
    }
    ++waiting;
    if (!first.empty()) continue;
    first = name_of(*thread);
    first += thread->waits_at ? std::string(" at ") + thread->waits_at->name + " barrier"
                              : std::string(" in a loop");
  }
  throw std::runtime_error("emulator: deadlock: " + std::to_string(waiting) + " threads wait, " +
                           std::to_string(ended) + " have ended; the first that waits is " + first);
}

// Turns for all threads until every one has ended.
void schedule(const std::vector<std::unique_ptr<Thread>>& threads) {
  std::size_t left = threads.size();
  int idle_rounds = 0;
  while (left > 0) {
    bool advanced = false, spun = false;
    for (const auto& thread : threads) {
      if (thread->fiber.ended()) continue;
      if (thread->waits_at) {
        if (thread->waits_at->phase == thread->waits_for_phase) continue;
        thread->waits_at = nullptr;
      }
      g_current = thread.get();
      thread->spins = false;
      thread->fiber.resume();
      g_current = nullptr;
      if (thread->error) std::rethrow_exception(thread->error);
      left -= thread->fiber.ended();
      (thread->spins ? spun : advanced) = true;
    }
    idle_rounds = advanced ? 0 : idle_rounds + 1;
    if (!advanced && (!spun || idle_rounds > kMostIdleRounds)) report_deadlock(threads);
  }
}

// A group of `count` blocks from the `first`-th on; threads are reused from one group to the next.
void run_group(const Launch& launch, std::uint64_t first, std::uint64_t count, Group& group,
               std::vector<std::unique_ptr<Thread>>& threads) {
  const auto block_threads = static_cast<int>(launch.block.size());
  group.blocks = std::vector<Block>(count);
  group.barrier.expected = static_cast<int>(count) * block_threads;
  std::size_t next = 0;
  for (std::uint64_t rank = 0; rank < count; ++rank) {
    Block& block = group.blocks[rank];
    const std::uint64_t at = first + rank;
    block.index = Dim3(static_cast<unsigned>(at % launch.grid.x),
                       static_cast<unsigned>(at / launch.grid.x % launch.grid.y),
                       static_cast<unsigned>(at / launch.grid.x / launch.grid.y));
    block.rank = static_cast<unsigned>(rank);
    block.barrier.expected = block_threads;
    block.warps = std::vector<Warp>((block_threads + kWarpThreads - 1) / kWarpThreads);
    for (int id = 0; id < block_threads; ++id, ++next) {
      if (next == threads.size()) threads.push_back(std::make_unique<Thread>());
      Thread& thread = *threads[next];
      const unsigned x = static_cast<unsigned>(id) % launch.block.x;
      const unsigned rest = static_cast<unsigned>(id) / launch.block.x;
      thread.index = Dim3(x, rest % launch.block.y, rest / launch.block.y);
      thread.launch = &launch, thread.group = &group, thread.block = &block;
      thread.warp = &block.warps[id / kWarpThreads];
      thread.lane = id % kWarpThreads;
      thread.warp->barrier.expected = thread.lane + 1;
      thread.waits_at = nullptr, thread.error = nullptr;
      thread.fiber.start(thread_main, &thread);
    }
  }
  schedule(threads);
}

void nobody(void* const*) {}

// `together` runs once, when all have come and before any goes on.
void meet(Barrier& barrier, void (*together)(void* const*), void* const* lanes) {
  const std::uint64_t phase = barrier.phase;
  void* token = &barrier.tokens[phase % 2];
  release(token);
  if (++barrier.arrived == barrier.expected) {
    acquire(token);
    together(lanes);
    release(token);
    barrier.arrived = 0;
    ++barrier.phase;
  } else {
    Thread& self = current();
    self.waits_at = &barrier, self.waits_for_phase = phase;
    Fiber::yield();
  }
  acquire(token);
}

}  // namespace

Thread& current() {
  if (!g_current) throw std::logic_error("emulator: device code called outside of a kernel");
  return *g_current;
}

void run(const Launch& launch) {
  const std::uint64_t blocks = launch.grid.size();
  const std::uint64_t together = launch.cooperative ? blocks : launch.cluster;
  std::vector<std::unique_ptr<Thread>> threads;
  // All are kept to the end: freeing one would order its blocks before the next, and a race between
  // the two would not show.
  std::vector<std::unique_ptr<Group>> groups;
  release(&g_start_token);
  for (std::uint64_t first = 0; first < blocks; first += together) {
    groups.push_back(std::make_unique<Group>());
    run_group(launch, first, together, *groups.back(), threads);
  }
  acquire(&g_end_token);
}

void wait(Barrier& barrier) { meet(barrier, nobody, nullptr); }

void collective(void* mine, void (*together)(void* const* lanes)) {
  Warp& warp = *current().warp;
  warp.lanes[current().lane] = mine;
  meet(warp.barrier, together, warp.lanes);
}

void spin() {
  current().spins = true;
  Fiber::yield();
}

void* take_shared(int order, std::size_t bytes) {
  Block& block = *current().block;
  if (static_cast<std::size_t>(order) == block.shared.size()) {
    block.shared_bytes += (bytes + 15) / 16 * 16;
    if (block.shared_bytes > current().launch->shared_bytes) {
      throw std::runtime_error("emulator: the kernel takes " + std::to_string(block.shared_bytes) +
                               " bytes of shared memory, the launch asked for " +
                               std::to_string(current().launch->shared_bytes));
    }
    block.shared.push_back({std::make_unique<char[]>(bytes), bytes});
    std::memset(block.shared.back().bytes.get(), 0xff, bytes);
    release(&block.shared_token);
  }
  acquire(&block.shared_token);
  const Block::Array& array = block.shared.at(static_cast<std::size_t>(order));
  if (array.size != bytes) {
    throw std::runtime_error("emulator: the threads of a block disagree about shared memory");
  }
  return array.bytes.get();
}

void* map_shared(void* address, unsigned rank) {
  const Thread& self = current();
  char* const at = static_cast<char*>(address);
  for (std::size_t order = 0; order < self.block->shared.size(); ++order) {
    const Block::Array& array = self.block->shared[order];
    char* const begin = array.bytes.get();
    if (at < begin || at >= begin + array.size) continue;
    return self.group->blocks.at(rank).shared.at(order).bytes.get() + (at - begin);
  }
  throw std::runtime_error("emulator: the address is not in this block's shared memory");
}

}  // namespace xlstm::emulator
