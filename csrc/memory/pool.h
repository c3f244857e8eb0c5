// Memory for planned steps and for everything beside them, from one upstream and under one hard limit: arenas, whose
// slots a plan laid out, and dynamic allocations in stream order from what is left. Used by executors, the Python
// bindings and the CuPy adapter; one pool per device or kind of memory.
//
// Streams. Memory that was freed on a stream is at once free on that stream: what the stream was given before comes
// before what it is given next. Another stream gets it only once the event of the free has passed, or after it was made
// to wait for that event; the pool does either, and prefers growing within the limit to making streams wait. The caller
// sees to it that a stream that touches an allocation comes after the stream it was allocated on, and that the stream
// it is freed on comes after all that touched it on third streams. Of a free on another stream than the one of the
// allocation, the pool itself makes the freeing stream wait for the other. Streams are known to the pool from
// add_stream to remove_stream, 0 from the start. No call while a stream is being captured into a CUDA graph.
//
// Threads. Every method may be called from any thread at any time, also from the failure callback and from inside an
// upstream, except for the end of a pool or arena. No lock is held while an upstream, a callback or a wait for the
// device runs. One call is one step: others see all of it or nothing.
//
// Errors. InvalidArgument, OutOfMemory, and what an event throws: the pool is as before, and usable.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "memory/limits.h"
#include "memory/pool/streams.h"
#include "memory/upstream.h"

namespace splitkern::memory {

namespace pool {
class Heap;
struct Chunk;
struct Stream;
enum class Use : uint8_t;
}  // namespace pool

class MemoryPool;

// What could not be given. In bytes.
class OutOfMemory : public std::runtime_error {
 public:
  OutOfMemory(const std::string& text, int64_t asked_bytes, int64_t current_bytes, int64_t upstream_bytes,
              int64_t limit_bytes, int64_t largest_free_bytes)
      : std::runtime_error(text),
        asked_bytes(asked_bytes),
        current_bytes(current_bytes),
        upstream_bytes(upstream_bytes),
        limit_bytes(limit_bytes),
        largest_free_bytes(largest_free_bytes) {}
  int64_t asked_bytes;         // rounded up to the alignment
  int64_t current_bytes;       // in use, arenas and dynamic
  int64_t upstream_bytes;      // held from the upstream
  int64_t limit_bytes;         // of upstream_bytes
  int64_t largest_free_bytes;  // longest run of free bytes
};

struct PoolOptions {
  int64_t limit_bytes = kUnlimited;  // of what is held from the upstream at any time
  // Least size of a new block for dynamic allocations, if the limit allows it. An arena gets a block of its own size
  // where no free run is long enough: reserve arenas first, before dynamic allocations break the room up.
  int64_t block_bytes = int64_t{32} << 20;
  int64_t alignment_bytes = 512;  // of every address and size; a power of two
  // How streams are ordered. None: the CPU alone uses the memory, what is freed is free.
  std::shared_ptr<StreamEvents> events = nullptr;
  // Keeps the tags of allocations, and makes the end of the pool report what was never freed.
  bool tracks = false;
  int32_t max_retries = 8;  // calls of the failure callback for one allocation
};

// Of arenas, of dynamic allocations, or of both together. Bytes are what is occupied: rounded up to the alignment.
struct Usage {
  int64_t current_bytes = 0;
  int64_t peak_bytes = 0;
  int64_t total_bytes = 0;  // of all allocations ever
  int64_t asked_bytes = 0;  // current, before rounding
  int64_t current_count = 0;
  int64_t peak_count = 0;
  int64_t total_count = 0;

  bool operator==(const Usage&) const = default;
};

struct PoolStatistics {
  Usage planned;
  Usage dynamic;
  Usage all;  // its peaks are those of the sum
  int64_t limit_bytes = 0;
  int64_t upstream_bytes = 0;  // held now
  int64_t upstream_peak_bytes = 0;
  int64_t upstream_allocations = 0;  // calls that gave memory
  int64_t upstream_failures = 0;     // calls that did not
  int64_t upstream_frees = 0;
  int64_t block_count = 0;
  int64_t free_bytes = 0;          // held and not in use
  int64_t largest_free_bytes = 0;  // longest run of free bytes
  int64_t stream_waits = 0;        // times that a stream was made to wait for another
  int64_t failure_calls = 0;       // of the failure callback
  int64_t refused = 0;             // allocations that ended in OutOfMemory

  bool operator==(const PoolStatistics&) const = default;
};

// An allocation or arena that has not been freed.
struct PoolAllocation {
  uintptr_t address = 0;
  int64_t size_bytes = 0;  // as asked for
  bool is_planned = false;
  int64_t stream = 0;  // it was allocated on
  int64_t number = 0;  // counts the pool's allocations
  std::string tag;     // kept by a pool that tracks

  bool operator==(const PoolAllocation&) const = default;
};

// One line each, in order of allocation, and their sum.
std::string leak_report(const std::vector<PoolAllocation>& allocations);

// A region of the pool for the slots of one plan. Its end gives it back on the stream that it was reserved on, and
// never throws; a region that cannot be given back (an event fails) stays in use until the pool ends. It keeps the pool
// alive.
//
// Thread contract: slot, touch and the figures from any thread; release and the end when nobody else uses the arena.
class Arena {
 public:
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;
  ~Arena();

  void* base() const;
  int64_t size_bytes() const { return size_bytes_; }
  int64_t stream() const { return stream_; }
  bool is_released() const { return chunk_ == nullptr; }

  // The address of a slot. Throws InvalidArgument where it does not lie in the arena.
  void* slot(int64_t offset_bytes, int64_t size_bytes) const;

  // Accounts for a slot that a step really uses: a load and a compare once the mark is reached. Checks as slot does.
  void touch(int64_t offset_bytes, int64_t size_bytes);
  // The highest end of a touched slot since the beginning or reset_touched.
  int64_t touched_bytes() const;
  void reset_touched();

  // Gives the region back, on the arena's stream or another. Throws where the stream is not known; released twice is
  // one.
  void release();
  void release(int64_t stream);

 private:
  friend class MemoryPool;
  Arena(std::shared_ptr<MemoryPool> pool, pool::Chunk* chunk, uintptr_t address, int64_t size_bytes, int64_t stream);
  void check(const char* method, int64_t offset_bytes, int64_t size_bytes) const;
  void end() noexcept;

  std::shared_ptr<MemoryPool> pool_;
  pool::Chunk* chunk_ = nullptr;
  uintptr_t address_ = 0;
  int64_t size_bytes_ = 0;
  int64_t stream_ = 0;
  std::atomic<int64_t> touched_bytes_ = 0;
};

class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  // Called without a lock with the bytes that are missing (the size, rounded up) after everything else failed: frees
  // something (of this pool or of the upstream) and returns true to try again, or returns false. What it throws, the
  // allocation throws.
  using FailureCallback = std::function<bool(int64_t needed_bytes)>;
  // Called by the end of a pool that tracks, if something was never freed. What it throws is swallowed.
  using LeakCallback = std::function<void(const std::vector<PoolAllocation>&)>;

  // Throws InvalidArgument: no upstream, a negative limit, a block size that is not positive, an alignment that is no
  // power of two, negative retries. Takes nothing from the upstream yet.
  static std::shared_ptr<MemoryPool> create(std::shared_ptr<Upstream> upstream, PoolOptions options = {});

  // Waits until all frees have passed on their streams, then gives everything back to the upstream, allocations that
  // were never freed too. Their users must have finished. Does not throw.
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // A stream must be added before it is named in another call, and removed before it is destroyed. Returns false where
  // it was known already. From the second stream on, every free records an event.
  bool add_stream(int64_t stream);
  // What was freed on it stays in order. Throws InvalidArgument where it is not known, or an arena is bound to it.
  void remove_stream(int64_t stream);
  // Makes `stream` wait for every free so far on `earlier`, so that it gets that memory without a further wait.
  void order_after(int64_t stream, int64_t earlier);

  // Memory for the work that `stream` is given from now on; null for size 0. Throws OutOfMemory.
  void* allocate(int64_t size_bytes, int64_t stream = 0, std::string tag = {});
  // Frees what allocate returned (null: nothing), behind all that `stream` was given so far. Throws InvalidArgument for
  // an address that was freed already, lies inside an allocation, is an arena's, or is not the pool's.
  void free(void* address, int64_t stream = 0);

  // A region for a plan's peak, contiguous. What is left under the limit is for dynamic allocations. Throws
  // OutOfMemory, and InvalidArgument where size_bytes is not positive.
  Arena reserve(int64_t size_bytes, int64_t stream = 0, std::string tag = {});

  // Gives blocks back to the upstream that nothing uses and whose frees have passed; with `wait` it first waits until
  // they have. Returns the bytes.
  int64_t trim(bool wait = false);

  PoolStatistics statistics() const;
  void reset_peaks();  // peaks become what is current
  // What is in use, in order of allocation.
  std::vector<PoolAllocation> outstanding() const;

  void set_failure_callback(FailureCallback callback);
  void set_leak_callback(LeakCallback callback);

  const PoolOptions& options() const { return options_; }

  // For tests: throws std::logic_error where the bookkeeping is broken.
  void verify() const;

 private:
  friend class Arena;
  struct Outcome;
  struct Allotment {
    pool::Chunk* chunk;
    uintptr_t address;
  };

  MemoryPool(std::shared_ptr<Upstream> upstream, PoolOptions options);

  Allotment obtain(const char* method, int64_t size_bytes, int64_t stream, pool::Use use, std::string tag);
  pool::Chunk* try_obtain(std::unique_lock<std::mutex>& lock, const char* method, int64_t size_bytes, int64_t stream,
                          pool::Use use, Outcome& outcome);
  bool grow(std::unique_lock<std::mutex>& lock, int64_t size_bytes, pool::Use use, Outcome& outcome);
  bool grow_by(std::unique_lock<std::mutex>& lock, int64_t block_bytes, Outcome& outcome);
  int64_t shrink(std::unique_lock<std::mutex>& lock, int64_t enough_bytes);
  void end_change();
  void synchronize(std::unique_lock<std::mutex>& lock);
  bool wait_for_others(std::unique_lock<std::mutex>& lock);
  OutOfMemory refusal(const char* method, int64_t asked_bytes, int64_t rounded_bytes, int64_t stream, int32_t calls,
                      const Outcome& outcome) const;
  void give(pool::Chunk* chunk, pool::Stream& stream);
  void release_arena(pool::Chunk* chunk, int64_t bound_stream, int64_t stream);
  pool::Stream& known_stream(const char* method, int64_t stream) const;
  void account(pool::Use use, int64_t size_bytes, int64_t asked_bytes, int64_t sign);

  const std::shared_ptr<Upstream> upstream_;
  const PoolOptions options_;
  const std::unique_ptr<pool::Heap> heap_;

  mutable std::mutex mutex_;
  std::vector<std::thread::id> changing_;  // threads that are inside the upstream
  int64_t changes_ = 0;                    // finished calls of the upstream
  std::condition_variable changed_;
  int64_t held_bytes_ = 0;  // from the upstream; blocks on their way from or to it count
  PoolStatistics statistics_;
  FailureCallback on_failure_;
  LeakCallback on_leak_;
};

}  // namespace splitkern::memory
