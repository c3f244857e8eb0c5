// The upstreams that need no GPU. See upstream.h.
#include "memory/upstream.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <thread>
#include <utility>

#include "memory/errors.h"

namespace splitkern::memory {

void* HostUpstream::allocate(int64_t size_bytes, int64_t alignment_bytes) {
  void* block = nullptr;
  const auto alignment = std::max(static_cast<size_t>(alignment_bytes), sizeof(void*));
  if (posix_memalign(&block, alignment, static_cast<size_t>(size_bytes)) != 0) {
    throw UpstreamFailure("HostUpstream: the system has no " + std::to_string(size_bytes) + " bytes");
  }
  return block;
}

void HostUpstream::free(void* block, int64_t) {
  std::free(block);
}

CallbackUpstream::CallbackUpstream(Allocate allocate, Free free, std::optional<int64_t> ordered_on)
    : allocate_(std::move(allocate)), free_(std::move(free)), ordered_on_(ordered_on) {
  if (!allocate_ || !free_)
    throw InvalidArgument("CallbackUpstream: allocate and free must both be functions, got none");
}

void* CallbackUpstream::allocate(int64_t size_bytes, int64_t alignment_bytes) {
  return reinterpret_cast<void*>(allocate_(size_bytes, alignment_bytes));
}

void CallbackUpstream::free(void* block, int64_t size_bytes) {
  free_(reinterpret_cast<uintptr_t>(block), size_bytes);
}

TestUpstream::TestUpstream(std::shared_ptr<Upstream> upstream) : TestUpstream(std::move(upstream), Faults{}) {}

TestUpstream::TestUpstream(std::shared_ptr<Upstream> upstream, Faults faults, std::optional<int64_t> ordered_on)
    : upstream_(std::move(upstream)), ordered_on_(ordered_on), faults_(faults) {
  if (upstream_ == nullptr) throw InvalidArgument("TestUpstream: upstream must be one, got none");
}

void* TestUpstream::allocate(int64_t size_bytes, int64_t alignment_bytes) {
  std::chrono::microseconds delay;
  {
    const std::lock_guard lock(mutex_);
    delay = faults_.delay;
    const int64_t call = ++counts_.allocations;
    const bool planted = faults_.fail_at > 0 && call >= faults_.fail_at && call - faults_.fail_at < faults_.fail_count;
    if (planted || size_bytes > faults_.capacity_bytes - counts_.held_bytes) {
      ++counts_.failures;
      throw UpstreamFailure("TestUpstream: call " + std::to_string(call) + ", for " + std::to_string(size_bytes) +
                            " bytes, fails as told");
    }
    counts_.held_bytes += size_bytes;  // before the call, so that the capacity holds with several threads
  }
  if (delay.count() > 0) std::this_thread::sleep_for(delay);
  void* block = nullptr;
  try {
    block = upstream_->allocate(size_bytes, alignment_bytes);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    counts_.held_bytes -= size_bytes;
    ++counts_.failures;
    throw;
  }
  const std::lock_guard lock(mutex_);
  counts_.peak_bytes = std::max(counts_.peak_bytes, counts_.held_bytes);
  blocks_.emplace(reinterpret_cast<uintptr_t>(block), size_bytes);
  return block;
}

void TestUpstream::free(void* block, int64_t size_bytes) {
  std::chrono::microseconds delay;
  bool fails = false;
  {
    const std::lock_guard lock(mutex_);
    delay = faults_.delay;
    const auto found = blocks_.find(reinterpret_cast<uintptr_t>(block));
    if (found == blocks_.end()) throw InvalidArgument("TestUpstream: a block is freed that was not given, or twice");
    if (found->second != size_bytes) {
      throw InvalidArgument("TestUpstream: a block of " + std::to_string(found->second) + " bytes is freed as one of " +
                            std::to_string(size_bytes));
    }
    blocks_.erase(found);
    counts_.held_bytes -= size_bytes;
    fails = ++counts_.frees == faults_.fail_free_at;
  }
  if (delay.count() > 0) std::this_thread::sleep_for(delay);
  upstream_->free(block, size_bytes);
  if (fails) throw UpstreamFailure("TestUpstream: a free fails as told");
}

void TestUpstream::set_faults(Faults faults) {
  const std::lock_guard lock(mutex_);
  faults_ = faults;
}

TestUpstream::Counts TestUpstream::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

std::map<uintptr_t, int64_t> TestUpstream::blocks() const {
  const std::lock_guard lock(mutex_);
  return blocks_;
}

}  // namespace splitkern::memory
