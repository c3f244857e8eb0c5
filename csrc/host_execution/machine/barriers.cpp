// Barriers with arrivals and transaction bytes of host execution (../primitives/host_hopper.h).
#include "extension.h"
#include "race.h"

namespace splitkern::host {

namespace {

constexpr uint64_t kMark = 0x6261727269657200u;  // "barrier"; the low byte is free for the number's high bits
constexpr int64_t kMaxBytes = (1 << 20) - 1;

uint64_t state_of(size_t number) {
  return kMark ^ (static_cast<uint64_t>(number) * 0x9e3779b97f4a7c15u);
}

PhaseBarrier& find(Block& block, const kernels::Barrier& barrier, const char* what) {
  race::reads(&barrier, sizeof(barrier));
  BlockExtension& extension = block_extension(block);
  for (size_t number = 0; number < extension.barriers.size(); ++number) {
    PhaseBarrier& found = extension.barriers[number];
    if (found.barrier != &barrier) continue;
    if (barrier.state != state_of(number)) break;
    return found;
  }
  fail(std::string(what) + ": the barrier at byte " +
       std::to_string(reinterpret_cast<const unsigned char*>(&barrier) - block.shared) +
       " of shared memory was never initialised, or has been overwritten");
}

PhaseBarrier& find_here(const kernels::Barrier& barrier, const char* what) {
  static_cast<void>(shared_address(&barrier, sizeof(barrier), what));
  return find(*current_thread().block, barrier, what);
}

void complete_if_due(PhaseBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  for (Thread* waiter : barrier.waiters) wake(*waiter);
  barrier.waiters.clear();
}

std::string describe_wait(const WaitReason& reason) {
  const PhaseBarrier& barrier = *static_cast<const PhaseBarrier*>(reason.object);
  std::string text = "barrier_wait of parity " + std::to_string(reason.detail);
  text += " at byte " + std::to_string(barrier.offset_bytes) + " of shared memory";
  return text + " (phase " + std::to_string(barrier.phase) + ": " + std::to_string(barrier.arrivals - barrier.pending) +
         " of " + std::to_string(barrier.arrivals) + " arrivals, " + std::to_string(barrier.bytes) + " bytes to come)";
}

void arrive(PhaseBarrier& barrier, uint32_t bytes, const char* what) {
  if (barrier.pending == 0) fail(std::string(what) + ": more arrivals in a phase than the barrier was made for");
  if (barrier.bytes + bytes > kMaxBytes) fail(std::string(what) + ": more than 2^20 - 1 bytes announced");
  race::release(&barrier.race_addresses[barrier.phase % 2]);
  barrier.bytes += bytes;
  --barrier.pending;
  complete_if_due(barrier);
  preemption_point();
}

}  // namespace

void barrier_init(kernels::Barrier& barrier, uint32_t arrivals) {
  const race::Quiet quiet;
  check_alignment(&barrier, 8, "barrier_init");
  Thread& self = current_thread();
  BlockExtension& extension = block_extension(*self.block);
  if (arrivals == 0 || arrivals > kMaxBytes) fail("barrier_init: arrivals must be 1 to 2^20 - 1");
  for (const PhaseBarrier& other : extension.barriers) {
    if (other.barrier == &barrier) fail("barrier_init: the barrier was initialised before");
  }
  const uint32_t offset_bytes = shared_address(&barrier, sizeof(barrier), "barrier_init") - kSharedBase;
  race::writes(&barrier, sizeof(barrier));
  barrier.state = state_of(extension.barriers.size());
  PhaseBarrier& made = extension.barriers.emplace_back();
  made.barrier = &barrier;
  made.offset_bytes = offset_bytes;
  made.arrivals = made.pending = arrivals;
  made.initializer = self.index;
}

void barrier_init_fence() {
  const race::Quiet quiet;
  const Thread& self = current_thread();
  for (PhaseBarrier& barrier : block_extension(*self.block).barriers) {
    if (barrier.initializer == self.index) barrier.fenced = true;
  }
}

void barrier_arrive(kernels::Barrier& barrier, uint32_t bytes) {
  const race::Quiet quiet;
  const char* what = bytes == 0 ? "barrier_arrive" : "barrier_arrive_expect";
  arrive(find_here(barrier, what), bytes, what);
}

void barrier_arrive_cluster(kernels::Barrier& barrier, uint32_t rank) {
  const race::Quiet quiet;
  constexpr const char* kWhat = "barrier_arrive_cluster";
  const uint32_t offset = shared_address(&barrier, sizeof(barrier), kWhat) - kSharedBase;
  Block& block = block_of_cluster(rank, kWhat);
  PhaseBarrier& found = find(block, *reinterpret_cast<const kernels::Barrier*>(block.shared + offset), kWhat);
  if (!found.fenced) fail("barrier_arrive_cluster: barrier_init was not followed by barrier_init_fence");
  arrive(found, 0, kWhat);
}

void barrier_wait(kernels::Barrier& barrier, uint32_t parity) {
  const race::Quiet quiet;
  if (parity > 1) fail("barrier_wait: the parity must be 0 or 1, got " + std::to_string(parity));
  PhaseBarrier& found = find_here(barrier, "barrier_wait");
  preemption_point();
  // Tested again after waking: as on the device, a thread that comes back late may have missed the phase.
  while (found.phase % 2 == parity) {
    found.waiters.push_back(&current_thread());
    wait({&describe_wait, &found, parity});
  }
  race::acquire(&found.race_addresses[parity]);
}

uint32_t barrier_for_load(const kernels::Barrier& barrier) {
  const PhaseBarrier& found = find_here(barrier, "TMA load");
  if (!found.fenced) fail("TMA load: barrier_init of its barrier was not followed by barrier_init_fence");
  return shared_address(&barrier, sizeof(barrier), "TMA load") - kSharedBase;
}

void complete_bytes(Block& block, uint32_t offset_bytes, uint32_t bytes) {
  PhaseBarrier& barrier =
      find(block, *reinterpret_cast<const kernels::Barrier*>(block.shared + offset_bytes), "TMA load");
  race::release(&barrier.race_addresses[barrier.phase % 2]);
  barrier.bytes -= bytes;
  complete_if_due(barrier);
}

}  // namespace splitkern::host
