// The machine that kernels run on: blocks of threads, warps, clusters, shared memory, barriers. Every
// CUDA thread is a fiber; all of them take turns on the thread that launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator/fiber.h"

namespace xlstm::emulator {

constexpr int kWarpThreads = 32;
constexpr unsigned kMaxBlockThreads = 1024;
constexpr int kMultiprocessors = 16;
constexpr std::size_t kDefaultSharedBytes = std::size_t{48} << 10;

// What a kernel may ask of: an H100, unless a test says otherwise.
struct Chip {
  int capability = 90;
  std::size_t shared_bytes = std::size_t{227} << 10;  // of a block
};
inline Chip g_chip;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  std::uint64_t size() const { return std::uint64_t{x} * y * z; }
};

// Opens when as many have come as it expects, and closes again behind them.
struct Barrier {
  int expected = 0;
  int arrived = 0;
  std::uint64_t phase = 0;
  std::uint64_t tokens[2]{};  // of this phase and the next: nobody is two phases ahead
  const char* name = "";
};

struct Warp {
  Barrier barrier{0, 0, 0, {}, "a warp's"};
  void* lanes[kWarpThreads]{};  // what each lane has handed in
};

struct Block {
  Dim3 index;
  unsigned rank = 0;  // in its cluster
  Barrier barrier{0, 0, 0, {}, "a block's"};
  std::vector<Warp> warps;
  struct Array {
    std::unique_ptr<char[]> bytes;
    std::size_t size;
  };
  std::vector<Array> shared;  // one heap block each, so that AddressSanitizer sees its ends
  std::size_t shared_bytes = 0;
  std::uint64_t shared_token = 0;
};

// Blocks that are alive together: a cluster, a cooperative grid, or one block.
struct Group {
  std::vector<Block> blocks;
  Barrier barrier{0, 0, 0, {}, "a cluster's or grid's"};
};

struct Launch {
  Dim3 grid, block;
  unsigned cluster = 1;  // blocks, along x
  bool cooperative = false;
  std::size_t shared_bytes = 0;
  std::function<void()> kernel;
};

struct Thread {
  Fiber fiber;
  Dim3 index;
  const Launch* launch = nullptr;
  Group* group = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  Barrier* waits_at = nullptr;
  std::uint64_t waits_for_phase = 0;
  bool spins = false;
  std::exception_ptr error;
};

// The CUDA thread in hand. Throws where there is none: device code called from the host.
Thread& current();

// Runs all blocks. Rethrows what a thread threw; throws std::runtime_error where no thread can go on.
void run(const Launch& launch);

// Waits until all whom `barrier` expects have come.
void wait(Barrier& barrier);
// Each lane of the warp hands in a pointer. The last to come calls together(lanes), an array of 32 with
// null for lanes that are not there; then all go on.
void collective(void* mine, void (*together)(void* const* lanes));
// Lets the others run: for loops that wait until another thread writes.
void spin();

// The `order`-th array that the block takes from its shared memory: zero for the first. Filled with
// NaN. Throws when the launch asked for less.
void* take_shared(int order, std::size_t bytes);
// Where the block of `rank` in the cluster has what `address` is in this block's shared memory.
void* map_shared(void* address, unsigned rank);

}  // namespace xlstm::emulator
