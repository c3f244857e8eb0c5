// Where a MemoryPool's blocks come from. Plain host memory, a pair of functions (a framework's allocator), and a
// wrapper that counts, delays and fails on purpose; memory of the GPU and pinned memory are in cuda/upstream.h. A pool
// calls its upstream from whichever thread allocates, from several at once, and never with a lock held.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

namespace splitkern::memory {

// An upstream that has no memory left, or gave what it must not give.
class UpstreamFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Thread contract: every method may be called from several threads at once.
class Upstream {
 public:
  virtual ~Upstream() = default;

  // Returns size_bytes (positive) at a multiple of alignment_bytes (a power of two), or throws; nothing is held then.
  virtual void* allocate(int64_t size_bytes, int64_t alignment_bytes) = 0;

  // Takes back what allocate returned for this size. All work that uses the block has finished.
  virtual void free(void* block, int64_t size_bytes) = 0;

  // The stream in whose order new blocks are free to use; nothing: they are free for every stream at once. A
  // framework's stream-ordered allocator hands out memory that earlier work of its stream may still be using.
  virtual std::optional<int64_t> ordered_on() const { return std::nullopt; }
};

// Pageable memory of the process.
class HostUpstream : public Upstream {
 public:
  void* allocate(int64_t size_bytes, int64_t alignment_bytes) override;
  void free(void* block, int64_t size_bytes) override;
};

// Two functions, for callers that are not C++: PyTorch's allocator through Python. Addresses as integers. What a
// function throws counts as a failure of the upstream.
class CallbackUpstream : public Upstream {
 public:
  using Allocate = std::function<uintptr_t(int64_t size_bytes, int64_t alignment_bytes)>;
  using Free = std::function<void(uintptr_t block, int64_t size_bytes)>;

  // Throws InvalidArgument where a function is empty.
  CallbackUpstream(Allocate allocate, Free free, std::optional<int64_t> ordered_on = std::nullopt);

  void* allocate(int64_t size_bytes, int64_t alignment_bytes) override;
  void free(void* block, int64_t size_bytes) override;
  std::optional<int64_t> ordered_on() const override { return ordered_on_; }

 private:
  Allocate allocate_;
  Free free_;
  std::optional<int64_t> ordered_on_;
};

// For tests: passes on to another upstream, counts, refuses to take back what it did not give, and on demand fails
// certain calls and delays all of them.
class TestUpstream : public Upstream {
 public:
  struct Faults {
    int64_t fail_at = 0;                 // the n-th call of allocate fails, counted from 1; 0: none
    int64_t fail_count = 1;              // and so many in all, one after the other
    int64_t fail_free_at = 0;            // the n-th call of free throws after it has freed
    int64_t capacity_bytes = INT64_MAX;  // what would exceed it fails
    std::chrono::microseconds delay{0};  // before every call
  };
  struct Counts {
    int64_t allocations = 0;  // calls, failed ones too
    int64_t failures = 0;
    int64_t frees = 0;
    int64_t held_bytes = 0;
    int64_t peak_bytes = 0;
  };

  // Throws InvalidArgument where there is no upstream.
  explicit TestUpstream(std::shared_ptr<Upstream> upstream);
  TestUpstream(std::shared_ptr<Upstream> upstream, Faults faults, std::optional<int64_t> ordered_on = std::nullopt);

  void* allocate(int64_t size_bytes, int64_t alignment_bytes) override;
  void free(void* block, int64_t size_bytes) override;
  std::optional<int64_t> ordered_on() const override { return ordered_on_; }

  void set_faults(Faults faults);  // the calls are counted on, not anew
  Counts counts() const;
  std::map<uintptr_t, int64_t> blocks() const;  // held: address to size

 private:
  const std::shared_ptr<Upstream> upstream_;
  const std::optional<int64_t> ordered_on_;
  mutable std::mutex mutex_;
  Faults faults_;
  Counts counts_;
  std::map<uintptr_t, int64_t> blocks_;
};

}  // namespace splitkern::memory
