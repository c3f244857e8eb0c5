// Warpgroup products of host execution (../primitives/host_hopper.h). A product is complete when all 128 threads have
// issued it, runs later, after the warpgroup's earlier ones, and reads what the asynchronous proxy sees of shared
// memory. Its sums lie with the machine until a wait returns them; the threads' own registers hold poison.
#include <algorithm>

#include "extension.h"
#include "race.h"

namespace splitkern::host {

namespace {

// A 16-bit operand in shared memory, as a descriptor gives it (matrix_descriptor).
struct OperandTile {
  uint32_t start;
  uint32_t leading_bytes;
  uint32_t stride_bytes;
  kernels::Swizzle swizzle;
  bool transposed;

  OperandTile(uint64_t descriptor, bool row_contiguous) : transposed(row_contiguous) {
    constexpr kernels::Swizzle kModes[] = {kernels::Swizzle::kNone, kernels::Swizzle::k128Bytes,
                                           kernels::Swizzle::k64Bytes, kernels::Swizzle::k32Bytes};
    start = static_cast<uint32_t>(descriptor & 0x3fffu) << 4;
    leading_bytes = static_cast<uint32_t>(descriptor >> 16 & 0x3fffu) << 4;
    stride_bytes = static_cast<uint32_t>(descriptor >> 32 & 0x3fffu) << 4;
    swizzle = kModes[descriptor >> 62];
    constexpr uint64_t kKnown = 0xc000000000000000u | uint64_t{0x3fff} << 32 | 0x3fffu << 16 | 0x3fffu;
    if ((descriptor & ~kKnown) != 0) fail("wgmma: a descriptor has bits set that no field here has");
    if (swizzle == kernels::Swizzle::kNone && transposed) {
      fail("wgmma: a row-contiguous operand without swizzle is not known to host execution");
    }
  }

  // The shared address of (row, reduction index).
  uint32_t at(uint32_t row, uint32_t k) const {
    if (swizzle == kernels::Swizzle::kNone) {  // 8 x 8 elements to a run of 128 bytes
      return start + row / 8 * stride_bytes + k / 8 * leading_bytes + row % 8 * 16 + k % 8 * 2;
    }
    const uint32_t span = 16u << static_cast<uint32_t>(swizzle);
    if (!transposed) return swizzled(start + row / 8 * stride_bytes + row % 8 * span + k * 2, swizzle);
    const uint32_t rows = span / 2;
    return swizzled(start + row / rows * leading_bytes + k / 8 * stride_bytes + k % 8 * span + row % rows * 2, swizzle);
  }
};

float widen(uint16_t bits, Operand operand) {
  return operand == Operand::kHalf ? kernels::to_accumulator(kernels::Half{bits})
                                   : kernels::to_accumulator(kernels::BFloat16{bits});
}

constexpr uint32_t kRows = 64;
constexpr uint32_t kReduction = 16;

void gather(Block& block, const OperandTile& tile, uint32_t rows, Operand operand, float* values) {
  const BlockExtension& extension = block_extension(block);
  for (uint32_t k = 0; k < kReduction; ++k) {
    for (uint32_t row = 0; row < rows; ++row) {
      const uint32_t offset = tile.at(row, k) - kSharedBase;
      if (offset + 2 > block.shared_bytes) fail("wgmma: an operand lies outside the block's shared memory");
      race::reads(block.shared + offset, 2);
      uint16_t bits;
      copy_bytes(&bits, extension.shadow.data() + offset, 2);
      values[k * rows + row] = widen(bits, operand);
    }
  }
}

void multiply(Block& block, const QueuedProduct& queued) {
  const WarpgroupProduct& product = queued.product;
  static thread_local float a[kReduction][kRows];
  static thread_local float b[kReduction][256];
  static thread_local float d[kRows][256];
  gather(block, OperandTile(product.a, product.transposed_a), kRows, product.operand, &a[0][0]);
  gather(block, OperandTile(product.b, product.transposed_b), product.columns, product.operand, &b[0][0]);
  const float* b_values = &b[0][0];
  Accumulator& sums = *queued.sums;
  const auto each_sum = [&](auto&& body) {
    for (uint32_t thread = 0; thread < kWarpgroupThreads; ++thread) {
      for (uint32_t i = 0; i < sums.per_thread; ++i) {
        const uint32_t row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2);
        const uint32_t column = 8 * (i / 4) + 2 * (thread % 4) + i % 2;
        body(sums.values[thread * sums.per_thread + i], d[row][column]);
      }
    }
  };
  each_sum([&](const float& sum, float& element) { element = product.accumulate ? sum : 0.0f; });
  for (uint32_t row = 0; row < kRows; ++row) {
    for (uint32_t k = 0; k < kReduction; ++k) {
      const float factor = a[k][row];
      for (uint32_t column = 0; column < product.columns; ++column) {
        d[row][column] += factor * b_values[k * product.columns + column];  // each product is exact
      }
    }
  }
  each_sum([](float& sum, const float& element) { sum = element; });
}

struct RunFront final : AsyncWork {
  RunFront(Block& its_block, Warpgroup& its_warpgroup) : block(its_block), warpgroup(its_warpgroup) {}
  Block& block;
  Warpgroup& warpgroup;

  void run() override;
  const char* unfinished() const override { return "a warpgroup product"; }
};

void schedule(Block& block, Warpgroup& warpgroup) {
  if (warpgroup.scheduled || warpgroup.queue.empty()) return;
  if (warpgroup.queue.front()->issued != kWarpgroupThreads) return;
  warpgroup.scheduled = true;
  add_async(std::make_unique<RunFront>(block, warpgroup));
}

void RunFront::run() {
  {
    const race::Engine engine;
    race::acquire(&warpgroup.race_issued);
    multiply(block, *warpgroup.queue.front());
    race::release(&warpgroup.race_done);
  }
  warpgroup.queue.pop_front();
  ++warpgroup.done;
  warpgroup.scheduled = false;
  for (Thread* waiter : warpgroup.waiters) wake(*waiter);
  warpgroup.waiters.clear();
  schedule(block, warpgroup);
}

Warpgroup& warpgroup_of(const Thread& thread, const char* what) {
  const uint32_t number = thread.index / kWarpgroupThreads;
  BlockExtension& extension = block_extension(*thread.block);
  if (number >= extension.warpgroups.size()) {
    fail(std::string(what) + ": the thread is not one of a whole warpgroup of 128");
  }
  return extension.warpgroups[number];
}

std::string describe_wait(const WaitReason& reason) {
  const Warpgroup& warpgroup = *static_cast<const Warpgroup*>(reason.object);
  std::string text = "wgmma_wait for product " + std::to_string(reason.detail);
  text += " (" + std::to_string(warpgroup.done) + " are done";
  if (!warpgroup.queue.empty()) {
    text += ", the next was issued by " + std::to_string(warpgroup.queue.front()->issued) + " of 128 threads";
  }
  return text + ")";
}

}  // namespace

void warpgroup_fence() {
  const race::Quiet quiet;
  extension().registers_fenced = true;
}

void warpgroup_multiply(float* d, const WarpgroupProduct& product) {
  const race::Quiet quiet;
  Thread& self = current_thread();
  Warpgroup& warpgroup = warpgroup_of(self, "wgmma");
  ThreadExtension& mine = extension();
  const uint64_t number = mine.products++;
  if (number < warpgroup.done) fail("wgmma: more products than the other threads of the warpgroup");
  const size_t place = number - warpgroup.done;
  if (place == warpgroup.queue.size()) {
    warpgroup.queue.push_back(std::make_unique<QueuedProduct>());
    warpgroup.queue.back()->product = product;
  }
  QueuedProduct& queued = *warpgroup.queue[place];
  if (queued.product != product) fail("wgmma: descriptors or types differ among the threads of the warpgroup");

  const uint32_t per_thread = product.columns / 2;
  auto live = std::find_if(mine.accumulators.begin(), mine.accumulators.end(),
                           [&](const LiveAccumulator& each) { return each.registers == d; });
  if (live == mine.accumulators.end()) {
    if (!mine.registers_fenced) fail("wgmma: no wgmma_fence since the registers were last touched");
    if (queued.sums == nullptr) {
      queued.sums = std::make_shared<Accumulator>();
      queued.sums->per_thread = per_thread;
      queued.sums->values.resize(kWarpgroupThreads * per_thread);
    }
    live = mine.accumulators.insert(live, LiveAccumulator{d, queued.sums, number});
    copy_bytes(queued.sums->values.data() + self.index % kWarpgroupThreads * per_thread, d, per_thread * sizeof(float));
    fill_bytes(d, kPoison, per_thread * sizeof(float));
  } else if (queued.sums == nullptr) {
    queued.sums = live->values;
  }
  if (queued.sums != live->values) fail("wgmma: accumulators differ among the threads of the warpgroup");
  if (queued.sums->per_thread != per_thread) fail("wgmma: the width changed on accumulators under way");
  live->last_product = number;
  race::release(&warpgroup.race_issued);
  ++queued.issued;
  schedule(*self.block, warpgroup);
}

void warpgroup_commit() {
  const race::Quiet quiet;
  ThreadExtension& mine = extension();
  mine.product_groups.push_back(mine.products);
}

void warpgroup_wait(uint32_t pending) {
  const race::Quiet quiet;
  Thread& self = current_thread();
  Warpgroup& warpgroup = warpgroup_of(self, "wgmma_wait");
  ThreadExtension& mine = extension();
  uint64_t target = 0;
  while (mine.product_groups.size() > pending) {
    target = mine.product_groups.front();
    mine.product_groups.pop_front();
  }
  preemption_point();
  while (warpgroup.done < target) {
    warpgroup.waiters.push_back(&self);
    wait({&describe_wait, &warpgroup, static_cast<uint32_t>(target)});
  }
  race::acquire(&warpgroup.race_done);
  std::erase_if(mine.accumulators, [&](const LiveAccumulator& live) {
    if (live.last_product >= target) return false;
    const uint32_t per_thread = live.values->per_thread;
    copy_bytes(live.registers, live.values->values.data() + self.index % kWarpgroupThreads * per_thread,
               per_thread * sizeof(float));
    mine.registers_fenced = false;
    return true;
  });
}

void set_registers(uint32_t registers) {
  const race::Quiet quiet;
  const Thread& self = current_thread();
  static_cast<void>(warpgroup_of(self, "claim_registers"));
  extension().registers = registers;
}

void check_end_of_thread(const Thread& thread) {
  const ThreadExtension& mine = *thread.extension;
  if (!mine.accumulators.empty()) fail("the thread ends before wgmma_wait has returned its sums");
  if (!mine.open_stores.empty()) fail("the thread ends with TMA stores that were never committed");
  for (const auto& group : mine.store_groups) {
    for (const auto& store : group) {
      if (store->stage == TensorStore::Stage::kIssued) {
        fail("the thread ends while its TMA stores may still read shared memory");
      }
    }
  }
}

void check_end_of_block(const Block& block) {
  const BlockExtension& extension = *block.extension;
  const auto refuse = [&](const std::string& text) {
    throw std::runtime_error(std::string(current_launch->operation) + ": a block ends with " + text);
  };
  for (const PhaseBarrier& barrier : extension.barriers) {
    if (barrier.bytes != 0) {
      refuse("a barrier at byte " + std::to_string(barrier.offset_bytes) + " of shared memory for which " +
             std::to_string(barrier.bytes) + " bytes were announced that did not come");
    }
  }
  for (uint32_t first = 0; first + kWarpgroupThreads <= block.threads; first += kWarpgroupThreads) {
    const auto registers = [&](uint32_t thread) {
      const ThreadExtension* its = block.thread[thread].extension;
      return its == nullptr ? 0 : its->registers;
    };
    for (uint32_t i = 1; i < kWarpgroupThreads; ++i) {
      if (registers(first + i) != registers(first)) {
        refuse("a warpgroup whose threads do not agree on claim_registers or release_registers");
      }
    }
  }
}

}  // namespace splitkern::host
