// The scheduler of host execution (../primitives/machine.h): each CUDA thread is a fiber, a cluster of blocks
// runs at a time, and always the ready thread of highest priority goes on. Priorities are drawn per warp and
// change now and then, so that some warps starve while others run far ahead: the order in which a missing
// barrier shows. Threads that never wait share one fiber and cost little more than a function call.
#include "../primitives/machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <exception>
#include <utility>

#include "extension.h"
#include "race.h"

#ifndef __x86_64__
#error "host execution switches stacks in x86-64 assembly"
#endif

// Saves the callee-saved registers and the stack pointer in *save, and continues where `load` was saved.
extern "C" __attribute__((visibility("hidden"))) void splitkern_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden splitkern_switch_stack
.globl splitkern_switch_stack
.type splitkern_switch_stack, @function
splitkern_switch_stack:
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
.size splitkern_switch_stack, .-splitkern_switch_stack
)");

namespace splitkern::host {

constinit thread_local Thread* current = nullptr;
constinit thread_local const Launch* current_launch = nullptr;

struct Fiber {
  unsigned char* mapping;
  void* stack_pointer;
  Thread* thread;
  void* race_context;
};

namespace {

constexpr size_t kStackBytes = 256 * 1024;  // kernel parameters alone take up to 32 KiB
constexpr size_t kGuardBytes = 4096;
constexpr size_t kCanaryBytes = 1024;
constexpr uint32_t kDemotionInterval = 64;
#ifdef SPLITKERN_RACE_CHECK
// New contexts are dear, so those of a cluster serve again for the cluster so many later, which then counts as ordered
// after it: races between blocks are seen among neighbours in time.
constexpr uint32_t kConcurrentClusters = 4;
#else
constexpr uint32_t kConcurrentClusters = 1;
#endif

std::atomic<uint64_t> schedule_seed{1};
std::atomic<uint64_t> launch_number{0};

uint64_t mix(uint64_t value) {  // splitmix64
  value += 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

void fiber_main(Fiber* fiber);

void* map_pages(size_t bytes) {
  void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::runtime_error("splitkern host execution: no memory");
  return mapping;
}

struct FiberPool {
  std::vector<Fiber*> all;
  std::vector<Fiber*> idle;
  std::vector<Fiber*> of_place[kConcurrentClusters];  // under the race check instead, by thread of the cluster

  ~FiberPool() {
    for (Fiber* fiber : all) {
      munmap(fiber->mapping, kStackBytes);
      delete fiber;
    }
  }
  static void prepare(Fiber& fiber);
  Fiber* make() {
    void* mapping = map_pages(kStackBytes);
    mprotect(mapping, kGuardBytes, PROT_NONE);
    Fiber* fiber = new Fiber{static_cast<unsigned char*>(mapping), nullptr, nullptr, race::create_context()};
    prepare(*fiber);
    all.push_back(fiber);
    return fiber;
  }
#ifdef SPLITKERN_RACE_CHECK
  Fiber* take(uint32_t place, size_t thread) {
    std::vector<Fiber*>& fibers = of_place[place];
    if (thread >= fibers.size()) fibers.resize(thread + 1);
    if (fibers[thread] == nullptr) fibers[thread] = make();
    return fibers[thread];
  }
#else
  Fiber* take(uint32_t, size_t) {
    if (idle.empty()) return make();
    Fiber* fiber = idle.back();
    idle.pop_back();
    return fiber;
  }
#endif
  // After a failed launch: the frames of threads that never finished are forgotten.
  void abandon_all() {
    idle = all;
    for (Fiber* fiber : all) {
      prepare(*fiber);
#ifdef SPLITKERN_RACE_CHECK
      fiber->race_context = race::create_context();
#endif
    }
  }
};

extern "C" void splitkern_fiber_entry();

// The first switch to a fiber "returns" into this, with the fiber in a callee-saved register.
extern "C" __attribute__((visibility("hidden"), used)) void splitkern_fiber_start(void* fiber) {
  fiber_main(static_cast<Fiber*>(fiber));
}

}  // namespace
}  // namespace splitkern::host

asm(R"(
.text
.hidden splitkern_fiber_entry
.globl splitkern_fiber_entry
.type splitkern_fiber_entry, @function
splitkern_fiber_entry:
  .cfi_startproc
  .cfi_undefined rip
  movq %rbx, %rdi
  call splitkern_fiber_start
  hlt
  .cfi_endproc
.size splitkern_fiber_entry, .-splitkern_fiber_entry
)");

namespace splitkern::host {
namespace {

void FiberPool::prepare(Fiber& fiber) {
  void** top = reinterpret_cast<void**>(fiber.mapping + kStackBytes);
  void** frame = top - 9;  // r15 r14 r13 r12 rbx rbp, return address; the stack is aligned once those are popped
  std::fill(frame, top, nullptr);
  frame[4] = &fiber;
  frame[6] = reinterpret_cast<void*>(&splitkern_fiber_entry);
  fiber.stack_pointer = frame;
}

struct Machine {
  const Launch* launch = nullptr;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  uint32_t warps_per_block = 0;
  uint32_t finished = 0;
  Meeting cluster_meeting;
  std::vector<std::unique_ptr<ThreadExtension>> thread_extensions;
  std::vector<std::unique_ptr<BlockExtension>> block_extensions;
  std::vector<std::unique_ptr<AsyncWork>> async;
  unsigned char* shared_mapping = nullptr;
  size_t shared_mapping_bytes = 0;

  // Warps of the cluster, most urgent first, and the lanes of each that could run.
  std::vector<uint32_t> order;
  std::vector<uint32_t> ready;
  bool last_lane_first = false;
  uint32_t eagerness = 0;  // asynchronous work goes first in this many of 8 decisions
  uint64_t random_state = 0;

  FiberPool fibers;
  void* main_stack_pointer = nullptr;
  std::exception_ptr error;
  void* main_race_context = nullptr;
  char launch_race_address = 0;
  char end_race_address = 0;
  // The cluster's place among the concurrent ones, and whether it is an odd or even one there; through its address it
  // comes after the cluster that had the place before.
  uint32_t place = 0;
  uint32_t turn = 0;
  char place_race_addresses[kConcurrentClusters][2] = {};

  ~Machine() {
    if (shared_mapping != nullptr) munmap(shared_mapping, shared_mapping_bytes);
  }

  uint64_t random() {
    random_state += 0x9e3779b97f4a7c15u;
    return mix(random_state);
  }
  uint32_t random_below(uint32_t limit) { return static_cast<uint32_t>((random() >> 32) * limit >> 32); }

  void allocate(const Launch& next);
  void start_cluster(uint64_t first_block);
  void run_cluster(uint64_t first_block);
  void finish_cluster();
  Thread* pick();
  void run_async();
  void resume(Thread& thread, void** save);
  void switch_to_main(void** save);
  std::string deadlock() const;
  void drop_extensions() {
    thread_extensions.clear();
    block_extensions.clear();
  }

  uint32_t warp_of(const Thread& thread) const {
    return thread.block->rank * warps_per_block + thread.index / kWarpThreads;
  }
  void set_ready(Thread& thread) { ready[warp_of(thread)] |= 1u << (thread.index % kWarpThreads); }
  void begin(Thread& thread);
  void end(Thread& thread);
};

thread_local Machine machine;

std::string to_text(const Dim3& index) {
  std::string text = "(";
  text += std::to_string(index.x) + ", ";
  text += std::to_string(index.y) + ", ";
  text += std::to_string(index.z) + ")";
  return text;
}

void complete(Meeting& meeting) {
  for (Thread* waiter : meeting.waiters) wake(*waiter);
  meeting.waiters.clear();
  meeting.arrived = 0;
  ++meeting.generation;
}

// Exited threads no longer count at the barrier of the whole block or cluster.
void complete_without(Meeting& meeting, uint32_t threads) {
  if (meeting.arrived != 0 && meeting.arrived == threads) complete(meeting);
}

void Machine::allocate(const Launch& next) {
  launch = &next;
  const uint32_t count = next.cluster_blocks;
  warps_per_block = (next.block.x + kWarpThreads - 1) / kWarpThreads;
  const size_t block_bytes = (next.shared_bytes + kCanaryBytes + 1023) / 1024 * 1024;
  const size_t needed_bytes = block_bytes * count * kConcurrentClusters;
  if (needed_bytes > shared_mapping_bytes) {
    if (shared_mapping != nullptr) munmap(shared_mapping, shared_mapping_bytes);
    shared_mapping = nullptr;
    shared_mapping_bytes = 0;
    shared_mapping = static_cast<unsigned char*>(map_pages(needed_bytes));
    shared_mapping_bytes = needed_bytes;
  }
  blocks.assign(count, Block{});
  threads.assign(static_cast<size_t>(count) * next.block.x, Thread{});
  order.assign(static_cast<size_t>(count) * warps_per_block, 0);
  ready.assign(order.size(), 0);
  for (uint32_t rank = 0; rank < count; ++rank) {
    Block& block = blocks[rank];
    block.rank = rank;
    block.threads = next.block.x;
    block.shared_bytes = next.shared_bytes;
    block.warps.resize(warps_per_block);
    block.thread = threads.data() + static_cast<size_t>(rank) * next.block.x;
    for (uint32_t i = 0; i < block.threads; ++i) {
      block.thread[i].index = i;
      block.thread[i].block = &block;
    }
  }
}

void Machine::start_cluster(uint64_t first_block) {
  finished = 0;
  error = nullptr;
  place = (place + 1) % kConcurrentClusters;
  if (place == 0) turn ^= 1;
  const size_t block_bytes = (launch->shared_bytes + kCanaryBytes + 1023) / 1024 * 1024;
  const Dim3& grid = launch->grid;
  for (Block& block : blocks) {
    block.shared = shared_mapping + (place * blocks.size() + block.rank) * block_bytes;
    const uint64_t linear = first_block + block.rank;
    block.index = {static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
                   static_cast<unsigned>(linear / grid.x / grid.y)};
    block.finished = 0;
    block.extension = nullptr;
    if (block.shared_bytes != 0) fill_bytes(block.shared, kPoison, block.shared_bytes + kCanaryBytes);
    for (uint32_t warp = 0; warp < warps_per_block; ++warp) {
      const uint32_t lanes = std::min(kWarpThreads, block.threads - warp * kWarpThreads);
      ready[block.rank * warps_per_block + warp] = lanes == kWarpThreads ? ~0u : (1u << lanes) - 1;
    }
  }
  for (Thread& thread : threads) {
    thread.fiber = nullptr;
    thread.state = Thread::State::kUnstarted;
    thread.extension = nullptr;
    thread.race_context = nullptr;
    thread.quiet = 0;
  }
  const uint64_t draw = random();
  last_lane_first = (draw & 1) != 0;
  constexpr uint32_t kEagerness[] = {0, 1, 4, 8};
  eagerness = kEagerness[(draw >> 1) % 4];
  for (uint32_t i = 0; i < order.size(); ++i) {  // a random permutation
    const uint32_t j = random_below(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
}

void Machine::run_async() {
  const uint32_t index = random_below(static_cast<uint32_t>(async.size()));
  const std::unique_ptr<AsyncWork> work = std::move(async[index]);
  async[index] = std::move(async.back());
  async.pop_back();
  work->run();
}

// The next thread to run, or null where none can. Runs asynchronous work on the way.
Thread* Machine::pick() {
  for (;;) {
    if (!async.empty() && random_below(8) < eagerness) run_async();
    for (size_t i = 0; i < order.size(); ++i) {
      const uint32_t warp = order[i];
      const uint32_t lanes = ready[warp];
      if (lanes == 0) continue;
      const uint32_t lane = last_lane_first ? 31 - std::countl_zero(lanes) : std::countr_zero(lanes);
      Block& block = blocks[warp / warps_per_block];
      Thread& thread = block.thread[warp % warps_per_block * kWarpThreads + lane];
      if (thread.state != Thread::State::kUnstarted && random_below(kDemotionInterval) == 0) {
        std::rotate(order.begin() + i, order.begin() + i + 1, order.end());
      }
      ready[warp] = lanes & ~(1u << lane);
      return &thread;
    }
    if (async.empty()) return nullptr;
    run_async();
  }
}

void Machine::begin(Thread& thread) {
  thread.state = Thread::State::kRunning;
  current = &thread;
#ifdef SPLITKERN_RACE_CHECK
  thread.race_context = thread.fiber->race_context;
  race::enter(thread.race_context);
  race::acquire(&launch_race_address);
  race::acquire(&place_race_addresses[place][turn ^ 1]);
#endif
}

void Machine::end(Thread& thread) {
#ifdef SPLITKERN_RACE_CHECK
  race::release(&end_race_address);
  race::release(&place_race_addresses[place][turn]);
  race::enter(main_race_context);
  thread.race_context = nullptr;
#endif
  if (thread.extension != nullptr) check_end_of_thread(thread);
  thread.state = Thread::State::kFinished;
  thread.fiber = nullptr;
  ++finished;
  Block& block = *thread.block;
  ++block.finished;
  if (block.barriers[0].arrived != 0) complete_without(block.barriers[0], block.threads - block.finished);
  if (cluster_meeting.arrived != 0) complete_without(cluster_meeting, static_cast<uint32_t>(threads.size()) - finished);
}

// Goes on with `thread`, which is not the current one, and returns when somebody comes back to `save`.
void Machine::resume(Thread& thread, void** save) {
  if (thread.state == Thread::State::kUnstarted) {
    race::enter(main_race_context);
    thread.fiber = fibers.take(place, thread.block->rank * thread.block->threads + thread.index);
    thread.fiber->thread = &thread;
  } else {
    thread.state = Thread::State::kRunning;
    current = &thread;
    race::enter(thread.race_context);
  }
  splitkern_switch_stack(save, thread.fiber->stack_pointer);
}

void Machine::switch_to_main(void** save) {
  race::enter(main_race_context);
  splitkern_switch_stack(save, main_stack_pointer);
}

void fiber_main(Fiber* fiber) {
  Machine& here = machine;
  for (;;) {
    Thread& thread = *fiber->thread;
    Thread* next = nullptr;
    try {
      here.begin(thread);
      here.launch->run(here.launch->closure);
      here.end(thread);
      next = here.pick();
    } catch (...) {
      here.error = std::current_exception();
    }
#ifdef SPLITKERN_RACE_CHECK
    if (here.error != nullptr && race::current_context() != here.main_race_context) {
      race::release(&here.end_race_address);
      race::enter(here.main_race_context);
    }
#else
    if (next != nullptr && next->state == Thread::State::kUnstarted) {
      fiber->thread = next;
      next->fiber = fiber;
      continue;
    }
    here.fibers.idle.push_back(fiber);
#endif
    if (next == nullptr) {
      here.switch_to_main(&fiber->stack_pointer);
    } else {
      here.resume(*next, &fiber->stack_pointer);
    }
  }
}

std::string describe_meeting(const WaitReason& reason) {
  const Meeting& meeting = *static_cast<const Meeting*>(reason.object);
  return std::string(meeting.what) + " (" + std::to_string(meeting.arrived) + " of " +
         std::to_string(meeting.expected) + " threads have come)";
}

std::string Machine::deadlock() const {
  std::string text = std::string(launch->operation) + ": deadlock";
  for (const Block& block : blocks) {
    for (uint32_t first = 0; first < block.threads;) {
      const Thread& thread = block.thread[first];
      uint32_t end = first + 1;
      while (end < block.threads && block.thread[end].state == thread.state &&
             block.thread[end].reason == thread.reason) {
        ++end;
      }
      if (thread.state == Thread::State::kWaiting) {
        text += "; block " + to_text(block.index) + " threads " + std::to_string(first) + " to " +
                std::to_string(end - 1) + " wait for " + thread.reason.describe(thread.reason);
      }
      first = end;
    }
  }
  return text;
}

void Machine::finish_cluster() {
  for (Block& block : blocks) {
    if (block.extension != nullptr) check_end_of_block(block);
    if (block.shared_bytes == 0) continue;
    const unsigned char* canary = block.shared + block.shared_bytes;
    if (!std::all_of(canary, canary + kCanaryBytes, [](unsigned char byte) { return byte == kPoison; })) {
      throw std::runtime_error(std::string(launch->operation) + ": block " + to_text(block.index) +
                               " wrote past the end of its " + std::to_string(block.shared_bytes) +
                               " bytes of shared memory");
    }
  }
}

void Machine::run_cluster(uint64_t first_block) {
  start_cluster(first_block);
  Thread* first = pick();
  resume(*first, &main_stack_pointer);
  current = nullptr;
  const bool complete = error == nullptr && finished == threads.size();
  std::string report;
  if (complete) {
    std::string unfinished;
    for (const auto& work : async) {
      if (const char* what = work->unfinished()) unfinished = what;
    }
    if (!unfinished.empty()) {
      async.clear();
      drop_extensions();
      throw std::runtime_error(std::string(launch->operation) + ": a block ended with " + unfinished + " under way");
    }
    while (!async.empty()) run_async();
  } else if (error == nullptr) {
    report = deadlock();
  }
  if (complete) {
    finish_cluster();
    drop_extensions();
    return;
  }
#ifdef SPLITKERN_RACE_CHECK
  for (const Thread& thread : threads) {
    if (thread.race_context == nullptr) continue;
    race::enter(thread.race_context);
    race::release(&end_race_address);
    race::enter(main_race_context);
  }
  race::acquire(&end_race_address);
#endif
  fibers.abandon_all();
  async.clear();
  drop_extensions();
  if (error != nullptr) std::rethrow_exception(std::exchange(error, nullptr));
  throw std::runtime_error(report);
}

}  // namespace

void execute(const Launch& launch) {
  const auto refuse = [&](const std::string& text) {
    throw std::runtime_error(std::string(launch.operation) + ": host execution: " + text);
  };
  if (current_launch != nullptr) refuse("a kernel launched a kernel");
  if (launch.block.y != 1 || launch.block.z != 1 || launch.block.x == 0 || launch.block.x > 1024) {
    refuse("a block must have 1 to 1024 threads in one dimension, got " + to_text(launch.block));
  }
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0 || launch.grid.x > 0x7fffffffu ||
      launch.grid.y > 65535 || launch.grid.z > 65535) {
    refuse("a grid must have extents within (2^31 - 1, 65535, 65535), got " + to_text(launch.grid));
  }
  if (launch.cluster_blocks == 0 || launch.cluster_blocks > 8 || launch.grid.x % launch.cluster_blocks != 0) {
    refuse("a cluster must have 1 to 8 blocks and divide the grid, got " + std::to_string(launch.cluster_blocks));
  }
  Machine& here = machine;
  here.random_state = mix(schedule_seed.load() ^ mix(launch_number++));
  here.main_race_context = race::current_context();
  race::release(&here.launch_race_address);

  struct Scope {  // also when a thread throws
    explicit Scope(const Launch& launch) {
      current_launch = &launch;
      race::ignore();
    }
    ~Scope() {
      current_launch = nullptr;
      current = nullptr;
      race::acquire(race::end_of_launch());
      race::heed();
    }
  } const scope(launch);
  here.allocate(launch);
  const uint64_t clusters =
      static_cast<uint64_t>(launch.grid.x) / launch.cluster_blocks * launch.grid.y * launch.grid.z;
  const bool last_first = (here.random() & 1) != 0;
  for (uint64_t i = 0; i < clusters; ++i) {
    here.run_cluster((last_first ? clusters - 1 - i : i) * launch.cluster_blocks);
  }
}

void fail(const std::string& text) {
  if (current == nullptr) throw std::runtime_error(std::string(current_launch->operation) + ": " + text);
  const Thread& thread = *current;
  throw std::runtime_error(std::string(current_launch->operation) + ": block " + to_text(thread.block->index) +
                           " thread " + std::to_string(thread.index) + ": " + text);
}

void fail_alignment(const void* address, size_t bytes, const char* what) {
  fail(std::string(what) + " of " + std::to_string(bytes) + " bytes at address ..." +
       std::to_string(reinterpret_cast<uintptr_t>(address) % 1024) + " (modulo 1024), which is not a multiple of them");
}

void wait(const WaitReason& reason) {
  Machine& here = machine;
  Thread& self = current_thread();
  self.state = Thread::State::kWaiting;
  self.reason = reason;
  Thread* next = here.pick();
  if (next == &self) {
    self.state = Thread::State::kRunning;
    return;
  }
  Fiber* fiber = self.fiber;
  if (next == nullptr) {
    here.switch_to_main(&fiber->stack_pointer);
  } else {
    here.resume(*next, &fiber->stack_pointer);
  }
}

void wake(Thread& thread) {
  thread.state = Thread::State::kReady;
  machine.set_ready(thread);
}

void preemption_point() {
  Machine& here = machine;
  Thread& self = current_thread();
  wake(self);
  Thread* next = here.pick();
  if (next == &self) {
    self.state = Thread::State::kRunning;
    return;
  }
  here.resume(*next, &self.fiber->stack_pointer);
}

void meet(Meeting& meeting, const char* what, uint32_t expected, void* payload, bool orders_memory,
          void (*action)(Block& block, uint32_t warp)) {
  const race::Quiet quiet;
  Thread& self = current_thread();
  if (meeting.arrived != 0 && (std::strcmp(meeting.what, what) != 0 || meeting.expected != expected)) {
    fail(std::string("calls ") + what + " for " + std::to_string(expected) + " threads where others wait in " +
         meeting.what + " for " + std::to_string(meeting.expected));
  }
  meeting.what = what;
  meeting.expected = expected;
  self.payload = payload;
  const void* race_address = &meeting.race_addresses[meeting.generation % 2];
  if (orders_memory) race::release(race_address);
  if (++meeting.arrived < expected) {
    meeting.waiters.push_back(&self);
    wait({&describe_meeting, &meeting, 0});
  } else {
    if (action != nullptr) action(*self.block, self.index / kWarpThreads);
    complete(meeting);
    preemption_point();
  }
  if (orders_memory) race::acquire(race_address);
}

void meet_warp(const char* what, void* payload, bool orders_memory, void (*action)(Block& block, uint32_t warp)) {
  Thread& self = current_thread();
  const uint32_t warp = self.index / kWarpThreads;
  if ((warp + 1) * kWarpThreads > self.block->threads) {
    fail(std::string(what) + ": the block's " + std::to_string(self.block->threads) + " threads are not whole warps");
  }
  meet(self.block->warps[warp], what, kWarpThreads, payload, orders_memory, action);
}

void meet_block(uint32_t barrier, uint32_t threads, const char* what) {
  Block& block = *current_thread().block;
  if (barrier >= kNamedBarriers) fail(std::string(what) + ": barrier " + std::to_string(barrier) + " is not below 16");
  if (barrier == 0) {
    threads = block.threads - block.finished;
    block.barriers[0].expected = threads;  // some may have left since the first came
  } else if (threads == 0 || threads % kWarpThreads != 0 || threads > block.threads) {
    fail(std::string(what) + ": " + std::to_string(threads) + " threads are not whole warps of the block");
  }
  meet(block.barriers[barrier], what, threads, nullptr, true, nullptr);
}

void meet_cluster() {
  const uint32_t threads = static_cast<uint32_t>(machine.threads.size()) - machine.finished;
  machine.cluster_meeting.expected = threads;
  meet(machine.cluster_meeting, "cluster_barrier", threads, nullptr, true, nullptr);
}

void* race::launching_context() {
  return machine.main_race_context;
}
const void* race::end_of_launch() {
  return &machine.end_race_address;
}

uint64_t random_bits() {
  return machine.random();
}

void add_async(std::unique_ptr<AsyncWork> work) {
  machine.async.push_back(std::move(work));
}

ThreadExtension& extension() {
  Thread& self = current_thread();
  if (self.extension == nullptr) {
    machine.thread_extensions.push_back(std::make_unique<ThreadExtension>());
    self.extension = machine.thread_extensions.back().get();
  }
  return *self.extension;
}

BlockExtension& block_extension(Block& block) {
  if (block.extension == nullptr) {
    machine.block_extensions.push_back(std::make_unique<BlockExtension>(block));
    block.extension = machine.block_extensions.back().get();
  }
  return *block.extension;
}

BlockExtension::BlockExtension(const Block& block)
    : shadow(block.shared_bytes, kPoison),
      writers((block.shared_bytes + 15) / 16),
      warpgroups(block.threads / kWarpgroupThreads) {}

Block& block_of_cluster(uint32_t rank, const char* what) {
  if (rank >= machine.blocks.size()) {
    fail(std::string(what) + ": the cluster has no block " + std::to_string(rank));
  }
  Block& block = machine.blocks[rank];
  if (block.finished == block.threads) {
    fail(std::string(what) + ": block " + std::to_string(rank) + " of the cluster has ended");
  }
  return block;
}

#ifdef SPLITKERN_RACE_CHECK  // memcpy would be seen by ThreadSanitizer; the build keeps these loops loops
void copy_bytes(void* to, const void* from, size_t bytes) {
  auto* target = static_cast<unsigned char*>(to);
  const auto* source = static_cast<const unsigned char*>(from);
  for (size_t i = 0; i < bytes; ++i) target[i] = source[i];
}
void fill_bytes(void* to, unsigned char value, size_t bytes) {
  auto* target = static_cast<unsigned char*>(to);
  for (size_t i = 0; i < bytes; ++i) target[i] = value;
}
#else
void copy_bytes(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}
void fill_bytes(void* to, unsigned char value, size_t bytes) {
  std::memset(to, value, bytes);
}
#endif

unsigned char* dynamic_shared(size_t bytes, const char* type) {
  const race::Quiet quiet;
  const Block& block = *current_thread().block;
  if (bytes > block.shared_bytes) {
    fail(std::string("dynamic_shared<") + type + "> needs " + std::to_string(bytes) +
         " bytes, and the launch asked for " + std::to_string(block.shared_bytes));
  }
  return block.shared;
}

uint32_t shared_address(const void* pointer, size_t bytes, const char* what) {
  const Block& block = *current_thread().block;
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(pointer) - block.shared);
  if (static_cast<const unsigned char*>(pointer) < block.shared || offset + bytes > block.shared_bytes) {
    fail(std::string(what) + " takes " + std::to_string(bytes) + " bytes that do not lie in the block's shared memory");
  }
  return kSharedBase + static_cast<uint32_t>(offset);
}

namespace {

struct Exchange {
  uint64_t value;
  uint32_t source_lane;
  uint64_t received;
};

void exchange_lanes(Block& block, uint32_t warp) {
  Thread* lanes = block.thread + warp * kWarpThreads;
  for (uint32_t lane = 0; lane < kWarpThreads; ++lane) {
    Exchange& mine = *static_cast<Exchange*>(lanes[lane].payload);
    mine.received = static_cast<const Exchange*>(lanes[mine.source_lane].payload)->value;
  }
}

void vote_lanes(Block& block, uint32_t warp) {
  Thread* lanes = block.thread + warp * kWarpThreads;
  uint64_t votes = 0;
  for (uint32_t lane = 0; lane < kWarpThreads; ++lane) {
    votes |= static_cast<const Exchange*>(lanes[lane].payload)->value << lane;
  }
  for (uint32_t lane = 0; lane < kWarpThreads; ++lane) static_cast<Exchange*>(lanes[lane].payload)->received = votes;
}

}  // namespace

void exchange(void* value, size_t bytes, uint32_t source_lane, const char* what) {
  Exchange mine{0, source_lane % kWarpThreads, 0};  // the hardware, too, takes lanes modulo 32
  copy_bytes(&mine.value, value, bytes);
  meet_warp(what, &mine, false, &exchange_lanes);
  copy_bytes(value, &mine.received, bytes);
}

uint32_t vote(bool predicate) {
  Exchange mine{predicate ? 1u : 0u, 0, 0};
  meet_warp("ballot", &mine, false, &vote_lanes);
  return static_cast<uint32_t>(mine.received);
}

}  // namespace splitkern::host

// For the tests: the schedules of all later launches follow from the seed.
extern "C" __attribute__((visibility("default"))) void splitkern_host_set_schedule(uint64_t seed) {
  splitkern::host::schedule_seed = seed;
  splitkern::host::launch_number = 0;
}
