// Asynchronous work in flight: of one thread, and of one block. Used by the files of host execution that implement
// asynchronous primitives; scheduler.cpp owns the objects, makes them where they are first asked for and drops them
// with the cluster.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "../primitives/host_hopper.h"

namespace splitkern::host {

inline constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point type
inline constexpr uint32_t kWarpgroupThreads = 128;

struct AsyncCopy {  // copy_async
  void* shared;
  const void* global;
  uint32_t bytes;
  bool valid;
};

// A store of the tensor memory accelerator, which first reads shared memory and later writes.
struct TensorStore {
  kernels::TensorMap map;
  int32_t at[5];
  Block* block;
  uint32_t offset_bytes;
  std::vector<unsigned char> data;
  enum class Stage { kIssued, kRead, kWritten } stage = Stage::kIssued;
  char race_address = 0;

  void read();
  void write();  // and read, where that is still to be done
};

// The sums of one warpgroup product in flight, as its threads hold them.
struct Accumulator {
  uint32_t per_thread;
  std::vector<float> values;  // [thread][per_thread]
};
struct LiveAccumulator {
  float* registers;
  std::shared_ptr<Accumulator> values;
  uint64_t last_product;  // number of the thread's last product on it
};

struct ThreadExtension {
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;

  std::vector<std::shared_ptr<TensorStore>> open_stores;
  std::deque<std::vector<std::shared_ptr<TensorStore>>> store_groups;

  uint64_t products = 0;  // that the thread has issued
  std::deque<uint64_t> product_groups;
  std::vector<LiveAccumulator> accumulators;
  bool registers_fenced = false;
  uint32_t registers = 0;  // 0: never set
};

struct PhaseBarrier {
  const kernels::Barrier* barrier;
  uint32_t offset_bytes;  // in shared memory
  uint32_t arrivals;      // of a phase
  uint32_t pending;
  int64_t bytes = 0;  // announced and not come, or come and not announced
  uint32_t phase = 0;
  uint32_t initializer;  // the thread
  bool fenced = false;
  std::vector<Thread*> waiters;
  char race_addresses[2] = {};
};

struct QueuedProduct {
  WarpgroupProduct product;
  std::shared_ptr<Accumulator> sums;
  uint32_t issued = 0;  // threads that have come
};
struct Warpgroup {
  std::deque<std::unique_ptr<QueuedProduct>> queue;
  uint64_t done = 0;  // products before the front of the queue
  bool scheduled = false;
  std::vector<Thread*> waiters;
  char race_issued = 0;
  char race_done = 0;
};

struct BlockExtension {
  explicit BlockExtension(const Block& block);

  // What the asynchronous proxy (the tensor memory accelerator and wgmma) sees of shared memory.
  std::vector<unsigned char> shadow;
  // For each 16 bytes the thread, plus 1, whose ordinary write to them no fence_async_shared has published; 0: none.
  std::vector<uint16_t> writers;
  std::deque<PhaseBarrier> barriers;
  std::vector<Warpgroup> warpgroups;
};

// Of the calling thread, its block, or another block of the cluster; made where there is none.
ThreadExtension& extension();
BlockExtension& block_extension(Block& block);
Block& block_of_cluster(uint32_t rank, const char* what);

// Throw where a thread or a block ends with work that somebody had to wait for.
void check_end_of_thread(const Thread& thread);
void check_end_of_block(const Block& block);

// The calling thread wrote 16 bytes at a shared address the ordinary way.
void note_ordinary_write(uint32_t address);

// Bytes of a load have come: called outside any thread.
void complete_bytes(Block& block, uint32_t offset_bytes, uint32_t bytes);
// Throws unless a load may complete on the calling thread's barrier; returns its offset in shared memory.
uint32_t barrier_for_load(const kernels::Barrier& barrier);

// The address where the byte lies whose unswizzled address is given.
constexpr uint32_t swizzled(uint32_t address, kernels::Swizzle swizzle) {
  switch (swizzle) {
    case kernels::Swizzle::kNone:
      return address;
    case kernels::Swizzle::k32Bytes:
      return address ^ ((address >> 7 & 1) << 4);
    case kernels::Swizzle::k64Bytes:
      return address ^ ((address >> 7 & 3) << 4);
    case kernels::Swizzle::k128Bytes:
      return address ^ ((address >> 7 & 7) << 4);
  }
  return address;
}

}  // namespace splitkern::host
