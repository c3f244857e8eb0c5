// The scheduler of host execution: blocks of cooperative threads on one CPU core. Used by the host
// primitives (host.h and its siblings), implemented in ../machine/scheduler.cpp. Everything here belongs to the
// operating-system thread that called launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace splitkern::kernels {

struct Dim3 {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
};

}  // namespace splitkern::kernels

namespace splitkern::host {

using kernels::Dim3;

inline constexpr uint32_t kWarpThreads = 32;
inline constexpr uint32_t kNamedBarriers = 16;
// Where a block's shared memory begins in its own 32-bit address space; not 0, so that offsets and addresses differ.
inline constexpr uint32_t kSharedBase = 1024;

struct Block;
struct Fiber;
struct ThreadExtension;
struct BlockExtension;

// What a thread waits for, for the report of a deadlock.
struct WaitReason {
  std::string (*describe)(const WaitReason&) = nullptr;
  const void* object = nullptr;
  uint32_t detail = 0;

  bool operator==(const WaitReason&) const = default;
};

struct Thread {
  uint32_t index;  // within the block
  Block* block;
  Fiber* fiber;  // null until it has run
  enum class State : uint8_t { kUnstarted, kRunning, kReady, kWaiting, kFinished } state;
  WaitReason reason;
  void* payload;               // of the collective under way
  ThreadExtension* extension;  // its asynchronous work (extension.h); null until there is any
  void* race_context;
  uint32_t quiet;  // see machine/race.h
};

// A meeting of the lanes of a warp or of the threads at a barrier.
struct Meeting {
  const char* what = nullptr;
  uint32_t arrived = 0;
  uint32_t expected = 0;
  uint32_t generation = 0;
  std::vector<Thread*> waiters;
  char race_addresses[2] = {};  // happens-before goes through the one of the generation's parity
};

struct Block {
  Dim3 index;
  uint32_t rank;  // in its cluster
  uint32_t threads;
  uint32_t finished;
  unsigned char* shared;  // aligned to 1024 bytes
  size_t shared_bytes;
  std::vector<Meeting> warps;
  Meeting barriers[kNamedBarriers];
  Thread* thread;             // [threads]
  BlockExtension* extension;  // its asynchronous work (extension.h); null until there is any
};

struct Launch {
  const char* operation;
  Dim3 grid;
  Dim3 block;
  uint32_t cluster_blocks;
  size_t shared_bytes;
  void (*run)(const void* closure);  // one thread of the kernel
  const void* closure;
};

extern constinit thread_local Thread* current;
extern constinit thread_local const Launch* current_launch;

// Runs every block (the blocks of a cluster together), throws what a thread threw, or a report of a deadlock.
void execute(const Launch& launch);

inline Thread& current_thread() {
  if (current == nullptr) [[unlikely]] {
    throw std::logic_error("splitkern host execution: a device primitive was called outside a kernel");
  }
  return *current;
}

// std::runtime_error with operator, block and thread in front.
[[noreturn]] void fail(const std::string& text);

// Waits until wake. Returns only then.
void wait(const WaitReason& reason);
void wake(Thread& thread);
// Lets a thread of higher priority, or asynchronous work, go first.
void preemption_point();

// The calling thread meets the others at `meeting`; whoever completes it runs `action(context)` first.
// `orders_memory`: what was written before is visible after.
void meet(Meeting& meeting, const char* what, uint32_t expected, void* payload, bool orders_memory,
          void (*action)(Block& block, uint32_t warp));
// The same for the 32 lanes of the calling thread's warp.
void meet_warp(const char* what, void* payload, bool orders_memory, void (*action)(Block& block, uint32_t warp));
void meet_block(uint32_t barrier, uint32_t threads, const char* what);
void meet_cluster();

uint64_t random_bits();

// Work that completes by itself at a time of the scheduler's choosing.
struct AsyncWork {
  virtual ~AsyncWork() = default;
  virtual void run() = 0;
  // What a block must not end with, or null where nobody has to wait for it.
  virtual const char* unfinished() const { return nullptr; }
};
void add_async(std::unique_ptr<AsyncWork> work);

// Copies without the interceptors of ThreadSanitizer: the emulated hardware's own traffic.
void copy_bytes(void* to, const void* from, size_t bytes);
void fill_bytes(void* to, unsigned char value, size_t bytes);

unsigned char* dynamic_shared(size_t bytes, const char* type);
// The address of a pointer into the calling thread's shared memory; throws where [pointer, pointer + bytes) leaves it.
uint32_t shared_address(const void* pointer, size_t bytes, const char* what);

// Lanes exchange up to 8 bytes: lane i receives what lane sources[i] gave.
void exchange(void* value, size_t bytes, uint32_t source_lane, const char* what);
uint32_t vote(bool predicate);

// Throws unless the address is a multiple of the access's size.
[[noreturn]] void fail_alignment(const void* address, size_t bytes, const char* what);
inline void check_alignment(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) [[unlikely]] {
    fail_alignment(address, bytes, what);
  }
}

}  // namespace splitkern::host
