// Locking, growth under the limit, errors and figures of a MemoryPool; what lies where is the Heap's. See pool.h.
#include "memory/pool.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <exception>
#include <utility>

#include "memory/errors.h"
#include "memory/pool/heap.h"

namespace splitkern::memory {

using pool::Chunk;
using pool::Heap;
using pool::Stream;
using pool::Use;

namespace {

std::string hex(uintptr_t address) {
  char text[2 + 16 + 1];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

std::string bytes(int64_t size_bytes) {
  return std::to_string(size_bytes) + " bytes";
}

int64_t add_saturated(int64_t left, int64_t right) {
  int64_t sum = 0;
  return __builtin_add_overflow(left, right, &sum) ? kUnlimited : sum;
}

std::string text_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& known) {
    return known.what();
  } catch (...) {
    return "an exception of unknown type";
  }
}

}  // namespace

// What stood in the way of an allocation, for its error.
struct MemoryPool::Outcome {
  std::string upstream_failure;  // empty: it was not asked, or gave
};

std::string leak_report(const std::vector<PoolAllocation>& allocations) {
  std::string text;
  int64_t sum = 0;
  for (const PoolAllocation& allocation : allocations) {
    sum += allocation.size_bytes;
    text += (allocation.is_planned ? "arena " : "allocation ") + std::to_string(allocation.number) + ": " +
            bytes(allocation.size_bytes) + " at " + hex(allocation.address) + ", allocated on stream " +
            std::to_string(allocation.stream) + (allocation.tag.empty() ? "" : ", \"" + allocation.tag + "\"") + "\n";
  }
  return text + std::to_string(allocations.size()) + " not freed, " + bytes(sum) + "\n";
}

// --- Making and ending -----------------------------------------------------------------------------------------------

std::shared_ptr<MemoryPool> MemoryPool::create(std::shared_ptr<Upstream> upstream, PoolOptions options) {
  if (upstream == nullptr) throw InvalidArgument("MemoryPool: upstream must be one, got none");
  const auto demand = [](bool holds, const char* name, const char* rule, int64_t came) {
    if (!holds) {
      throw InvalidArgument(std::string("MemoryPool: ") + name + " must " + rule + ", got " + std::to_string(came));
    }
  };
  demand(options.limit_bytes >= 0, "limit_bytes", "not be negative", options.limit_bytes);
  demand(options.block_bytes > 0, "block_bytes", "be positive", options.block_bytes);
  demand(options.alignment_bytes > 0 && std::has_single_bit(static_cast<uint64_t>(options.alignment_bytes)),
         "alignment_bytes", "be a power of two", options.alignment_bytes);
  demand(options.max_retries >= 0, "max_retries", "not be negative", options.max_retries);
  return std::shared_ptr<MemoryPool>(new MemoryPool(std::move(upstream), std::move(options)));
}

MemoryPool::MemoryPool(std::shared_ptr<Upstream> upstream, PoolOptions options)
    : upstream_(std::move(upstream)), options_(std::move(options)), heap_(std::make_unique<Heap>(options_.events)) {
  heap_->add_stream(0);
  if (const std::optional<int64_t> stream = upstream_->ordered_on()) heap_->add_stream(*stream);
}

MemoryPool::~MemoryPool() {
  // Nobody else knows the pool any more: arenas keep it alive. There is also nobody left to tell of an error.
  const auto quietly = [](const auto& action) {
    try {
      action();
    } catch (...) {
    }
  };
  quietly([&] {
    const std::vector<PoolAllocation> leaks =
        options_.tracks && on_leak_ ? outstanding() : std::vector<PoolAllocation>();
    if (!leaks.empty()) on_leak_(leaks);
  });
  quietly([&] { heap_->record(); });
  quietly([&] {
    for (const std::shared_ptr<StreamEvent>& event : heap_->last_events()) quietly([&] { event->synchronize(); });
  });
  heap_->for_each_block([&](const pool::Block& block) {
    quietly([&] { upstream_->free(reinterpret_cast<void*>(block.address), block.size_bytes); });
  });
}

// --- Streams ---------------------------------------------------------------------------------------------------------

Stream& MemoryPool::known_stream(const char* method, int64_t stream) const {
  Stream* const found = heap_->find_stream(stream);
  if (found != nullptr) return *found;
  throw InvalidArgument(std::string(method) + ": stream must be one that add_stream made known (" +
                        heap_->known_streams() + "), got " + std::to_string(stream));
}

bool MemoryPool::add_stream(int64_t stream) {
  const std::lock_guard lock(mutex_);
  return heap_->add_stream(stream);
}

void MemoryPool::remove_stream(int64_t stream) {
  const std::lock_guard lock(mutex_);
  Stream& found = known_stream("MemoryPool::remove_stream", stream);
  if (found.arenas > 0) {
    throw InvalidArgument("MemoryPool::remove_stream: stream must be bound to no arena, but " +
                          std::to_string(found.arenas) + " will be released on stream " + std::to_string(stream));
  }
  if (upstream_->ordered_on() == stream) {
    throw InvalidArgument(
        "MemoryPool::remove_stream: stream must not be the one that the upstream is ordered on, got " +
        std::to_string(stream));
  }
  heap_->remove_stream(found);
}

void MemoryPool::order_after(int64_t stream, int64_t earlier) {
  const std::lock_guard lock(mutex_);
  Stream& later = known_stream("MemoryPool::order_after", stream);
  heap_->order_after(later, known_stream("MemoryPool::order_after", earlier));
}

// --- Allocation ------------------------------------------------------------------------------------------------------

void* MemoryPool::allocate(int64_t size_bytes, int64_t stream, std::string tag) {
  if (size_bytes < 0) {
    throw InvalidArgument("MemoryPool::allocate: size_bytes must not be negative, got " + std::to_string(size_bytes));
  }
  if (size_bytes == 0) return nullptr;
  const Allotment given = obtain("MemoryPool::allocate", size_bytes, stream, Use::kDynamic, std::move(tag));
  return reinterpret_cast<void*>(given.address);
}

Arena MemoryPool::reserve(int64_t size_bytes, int64_t stream, std::string tag) {
  if (size_bytes <= 0) {
    throw InvalidArgument("MemoryPool::reserve: size_bytes must be positive, got " + std::to_string(size_bytes));
  }
  std::shared_ptr<MemoryPool> self = shared_from_this();
  const Allotment given = obtain("MemoryPool::reserve", size_bytes, stream, Use::kPlanned, std::move(tag));
  return Arena(std::move(self), given.chunk, given.address, size_bytes, stream);
}

MemoryPool::Allotment MemoryPool::obtain(const char* method, int64_t size_bytes, int64_t stream, Use use,
                                         std::string tag) {
  const int64_t mask = options_.alignment_bytes - 1;
  if (size_bytes > kUnlimited - mask) {
    throw InvalidArgument(std::string(method) + ": size_bytes must be at most " + std::to_string(kUnlimited - mask) +
                          ", got " + std::to_string(size_bytes));
  }
  const int64_t rounded_bytes = (size_bytes + mask) & ~mask;
  for (int32_t attempt = 0;; ++attempt) {
    FailureCallback callback;
    Outcome outcome;
    {
      std::unique_lock lock(mutex_);
      if (Chunk* const chunk = try_obtain(lock, method, rounded_bytes, stream, use, outcome)) {
        chunk->asked_bytes = size_bytes;
        if (options_.tracks) chunk->tag = std::move(tag);
        if (use == Use::kPlanned) ++heap_->find_stream(stream)->arenas;
        account(use, rounded_bytes, size_bytes, 1);
        return {chunk, chunk->address()};
      }
      callback = on_failure_;
      if (!callback || attempt == options_.max_retries) {
        ++statistics_.refused;
        throw refusal(method, size_bytes, rounded_bytes, stream, attempt, outcome);
      }
      ++statistics_.failure_calls;
    }
    if (callback(rounded_bytes)) continue;
    const std::lock_guard lock(mutex_);
    ++statistics_.refused;
    throw refusal(method, size_bytes, rounded_bytes, stream, attempt + 1, outcome);
  }
}

// One round through everything that may yield memory, the cheapest first. The lock is given up while the upstream or an
// event is asked, so whatever was seen before that is looked up again.
Chunk* MemoryPool::try_obtain(std::unique_lock<std::mutex>& lock, const char* method, int64_t size_bytes,
                              int64_t stream, Use use, Outcome& outcome) {
  const auto take = [&](bool may_wait) { return heap_->take(known_stream(method, stream), size_bytes, use, may_wait); };
  for (bool synchronized = false;;) {
    if (Chunk* const chunk = take(false)) return chunk;

    // More from the upstream. A new block is there in the same step of the lock, so nobody else takes it. It may have
    // to be waited for, if the upstream is ordered on another stream.
    const bool fits = size_bytes <= options_.limit_bytes - held_bytes_;
    const bool grown = fits && grow(lock, size_bytes, use, outcome);
    if (Chunk* const chunk = take(true)) return chunk;
    if (grown) continue;  // not reached: the new block is large enough

    // Blocks that nobody uses stand in the way: in smaller pieces than this allocation needs, or the upstream is empty.
    heap_->record();
    heap_->poll();
    const int64_t room_bytes = options_.limit_bytes - held_bytes_;
    if (!fits && room_bytes >= size_bytes) continue;  // others have given something back meanwhile
    const int64_t missing_bytes = room_bytes >= size_bytes ? kUnlimited : size_bytes - room_bytes;
    const auto helps = [&](bool ready_only) {
      const int64_t idle_bytes = heap_->idle_bytes(ready_only);
      return idle_bytes > 0 && (missing_bytes == kUnlimited || idle_bytes >= missing_bytes);
    };
    if (helps(true)) {
      shrink(lock, missing_bytes);
      continue;  // each round has given back a block, so this ends
    }
    if (!synchronized && helps(false)) {
      synchronized = true;
      synchronize(lock);
      continue;
    }
    if (!wait_for_others(lock)) return nullptr;
  }
}

// Asks the upstream for a block that holds size_bytes, if the limit allows it. Dynamic allocations get a larger block.
bool MemoryPool::grow(std::unique_lock<std::mutex>& lock, int64_t size_bytes, Use use, Outcome& outcome) {
  int64_t block_bytes = size_bytes;
  if (use == Use::kDynamic) {
    const int64_t room_bytes = options_.limit_bytes - held_bytes_;
    block_bytes = std::max(size_bytes, std::min(options_.block_bytes, room_bytes) & ~(options_.alignment_bytes - 1));
  }
  if (grow_by(lock, block_bytes, outcome)) return true;
  return block_bytes > size_bytes && size_bytes <= options_.limit_bytes - held_bytes_ &&
         grow_by(lock, size_bytes, outcome);
}

bool MemoryPool::grow_by(std::unique_lock<std::mutex>& lock, int64_t block_bytes, Outcome& outcome) {
  changing_.push_back(std::this_thread::get_id());
  held_bytes_ += block_bytes;  // first, so that all threads together keep to the limit
  lock.unlock();

  void* block = nullptr;
  std::exception_ptr failure;
  try {
    block = upstream_->allocate(block_bytes, options_.alignment_bytes);
    const auto address = reinterpret_cast<uintptr_t>(block);
    if (block == nullptr) throw UpstreamFailure("the upstream returned null");
    if ((address & static_cast<uintptr_t>(options_.alignment_bytes - 1)) != 0) {
      throw UpstreamFailure("the upstream returned " + hex(address) + ", which is no multiple of the alignment, " +
                            bytes(options_.alignment_bytes));
    }
  } catch (...) {
    failure = std::current_exception();
  }

  lock.lock();
  if (failure == nullptr && heap_->overlaps(reinterpret_cast<uintptr_t>(block), block_bytes)) {
    failure = std::make_exception_ptr(UpstreamFailure("the upstream returned memory that the pool holds already"));
    block = nullptr;  // to give it back would take it from whoever uses it
  }
  std::exception_ptr error;  // not the upstream's fault: for the caller
  if (failure == nullptr) {
    try {
      const std::optional<int64_t> ordered_on = upstream_->ordered_on();
      heap_->add_block(reinterpret_cast<uintptr_t>(block), block_bytes,
                       ordered_on ? heap_->find_stream(*ordered_on) : nullptr);
    } catch (...) {
      error = std::current_exception();
    }
  }
  if ((failure != nullptr || error != nullptr) && block != nullptr) {
    lock.unlock();
    try {
      upstream_->free(block, block_bytes);
    } catch (...) {  // the first error says more
    }
    lock.lock();
  }
  if (failure == nullptr && error == nullptr) {
    ++statistics_.upstream_allocations;
    statistics_.upstream_peak_bytes = std::max(statistics_.upstream_peak_bytes, held_bytes_);
  } else {
    held_bytes_ -= block_bytes;
    ++statistics_.upstream_failures;
  }
  end_change();
  if (error != nullptr) std::rethrow_exception(error);
  if (failure != nullptr) outcome.upstream_failure = text_of(failure);
  return failure == nullptr;
}

// Gives idle blocks back to the upstream. An error of the upstream is thrown on after all of them are gone.
int64_t MemoryPool::shrink(std::unique_lock<std::mutex>& lock, int64_t enough_bytes) {
  changing_.push_back(std::this_thread::get_id());
  std::vector<pool::Block> blocks;
  try {
    blocks = heap_->take_idle_blocks(enough_bytes);
  } catch (...) {
    end_change();
    throw;
  }
  lock.unlock();
  int64_t sum = 0;
  std::exception_ptr error;
  for (const pool::Block& block : blocks) {
    sum += block.size_bytes;
    try {
      upstream_->free(reinterpret_cast<void*>(block.address), block.size_bytes);
    } catch (...) {
      if (error == nullptr) error = std::current_exception();
    }
  }
  lock.lock();
  held_bytes_ -= sum;
  statistics_.upstream_frees += static_cast<int64_t>(blocks.size());
  end_change();
  if (error != nullptr) std::rethrow_exception(error);
  return sum;
}

void MemoryPool::end_change() {
  changing_.erase(std::find(changing_.begin(), changing_.end(), std::this_thread::get_id()));
  ++changes_;
  changed_.notify_all();
}

// Waits until every free so far has passed on its stream.
void MemoryPool::synchronize(std::unique_lock<std::mutex>& lock) {
  heap_->record();
  const std::vector<std::shared_ptr<StreamEvent>> events = heap_->last_events();
  lock.unlock();
  for (const std::shared_ptr<StreamEvent>& event : events) event->synchronize();
  lock.lock();
  heap_->poll();
}

// Other threads may be just about to bring memory, or to fail and leave room under the limit. A thread that is itself
// inside the upstream never waits: two of them would wait for each other.
bool MemoryPool::wait_for_others(std::unique_lock<std::mutex>& lock) {
  if (changing_.empty()) return false;
  if (std::find(changing_.begin(), changing_.end(), std::this_thread::get_id()) != changing_.end()) return false;
  changed_.wait(lock, [&, seen = changes_] { return changes_ != seen; });
  return true;
}

OutOfMemory MemoryPool::refusal(const char* method, int64_t asked_bytes, int64_t rounded_bytes, int64_t stream,
                                int32_t calls, const Outcome& outcome) const {
  const int64_t largest_bytes = heap_->largest_free_run();
  std::string text = std::string(method) + ": no " + bytes(asked_bytes) + " (" + std::to_string(rounded_bytes) +
                     " with alignment) for stream " + std::to_string(stream) + ": in use are " +
                     bytes(statistics_.all.current_bytes) + " (" + std::to_string(statistics_.planned.current_bytes) +
                     " planned, " + std::to_string(statistics_.dynamic.current_bytes) +
                     " dynamic), held from the upstream " + std::to_string(held_bytes_) + " of the limit of " +
                     (options_.limit_bytes == kUnlimited ? "unlimited" : std::to_string(options_.limit_bytes)) +
                     ", and the largest free run is " + bytes(largest_bytes);
  if (calls > 0) text += "; the failure callback was called " + std::to_string(calls) + " times";
  if (!outcome.upstream_failure.empty()) text += "; the upstream failed: " + outcome.upstream_failure;
  return OutOfMemory(text, rounded_bytes, statistics_.all.current_bytes, held_bytes_, options_.limit_bytes,
                     largest_bytes);
}

// --- Freeing ---------------------------------------------------------------------------------------------------------

void MemoryPool::free(void* address, int64_t stream) {
  if (address == nullptr) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  const std::lock_guard lock(mutex_);
  Stream& found = known_stream("MemoryPool::free", stream);
  Chunk* const chunk = heap_->find(at);
  if (chunk == nullptr) throw InvalidArgument("MemoryPool::free: " + hex(at) + " " + heap_->describe(at));
  if (chunk->use == Use::kPlanned) {
    throw InvalidArgument("MemoryPool::free: " + hex(at) + " is the base of an arena of " + bytes(chunk->asked_bytes) +
                          ": that is given back by its release");
  }
  give(chunk, found);
}

void MemoryPool::release_arena(Chunk* chunk, int64_t bound_stream, int64_t stream) {
  const std::lock_guard lock(mutex_);
  give(chunk, known_stream("Arena::release", stream));
  --heap_->find_stream(bound_stream)->arenas;  // known: remove_stream refuses as long as it has arenas
}

void MemoryPool::give(Chunk* chunk, Stream& stream) {
  const Use use = chunk->use;
  const int64_t size_bytes = chunk->size_bytes, asked_bytes = chunk->asked_bytes;
  heap_->give(chunk, stream);
  account(use, size_bytes, asked_bytes, -1);
}

int64_t MemoryPool::trim(bool wait) {
  std::unique_lock lock(mutex_);
  if (wait) {
    synchronize(lock);
  } else {
    heap_->record();
    heap_->poll();
  }
  return shrink(lock, kUnlimited);
}

// --- Figures ---------------------------------------------------------------------------------------------------------

void MemoryPool::account(Use use, int64_t size_bytes, int64_t asked_bytes, int64_t sign) {
  for (Usage* const usage : {use == Use::kPlanned ? &statistics_.planned : &statistics_.dynamic, &statistics_.all}) {
    usage->current_bytes += sign * size_bytes;
    usage->asked_bytes += sign * asked_bytes;
    usage->current_count += sign;
    usage->peak_bytes = std::max(usage->peak_bytes, usage->current_bytes);
    usage->peak_count = std::max(usage->peak_count, usage->current_count);
    if (sign < 0) continue;
    usage->total_bytes = add_saturated(usage->total_bytes, size_bytes);
    ++usage->total_count;
  }
}

PoolStatistics MemoryPool::statistics() const {
  const std::lock_guard lock(mutex_);
  PoolStatistics statistics = statistics_;
  statistics.limit_bytes = options_.limit_bytes;
  statistics.upstream_bytes = held_bytes_;
  statistics.block_count = heap_->block_count();
  statistics.free_bytes = heap_->free_bytes();
  statistics.largest_free_bytes = heap_->largest_free_run();
  statistics.stream_waits = heap_->waits();
  return statistics;
}

void MemoryPool::reset_peaks() {
  const std::lock_guard lock(mutex_);
  for (Usage* const usage : {&statistics_.planned, &statistics_.dynamic, &statistics_.all}) {
    usage->peak_bytes = usage->current_bytes;
    usage->peak_count = usage->current_count;
  }
  statistics_.upstream_peak_bytes = held_bytes_;
}

std::vector<PoolAllocation> MemoryPool::outstanding() const {
  const std::lock_guard lock(mutex_);
  std::vector<PoolAllocation> allocations;
  for (const Chunk* const chunk : heap_->used()) {
    allocations.push_back({chunk->address(), chunk->asked_bytes, chunk->use == Use::kPlanned, chunk->stream_handle,
                           chunk->number, chunk->tag});
  }
  return allocations;
}

void MemoryPool::set_failure_callback(FailureCallback callback) {
  const std::lock_guard lock(mutex_);
  on_failure_.swap(callback);  // the old one ends without the lock
}

void MemoryPool::set_leak_callback(LeakCallback callback) {
  const std::lock_guard lock(mutex_);
  on_leak_.swap(callback);
}

void MemoryPool::verify() const {
  const std::lock_guard lock(mutex_);
  heap_->verify();
}

// --- Arenas ----------------------------------------------------------------------------------------------------------

Arena::Arena(std::shared_ptr<MemoryPool> pool, Chunk* chunk, uintptr_t address, int64_t size_bytes, int64_t stream)
    : pool_(std::move(pool)), chunk_(chunk), address_(address), size_bytes_(size_bytes), stream_(stream) {}

Arena::Arena(Arena&& other) noexcept
    : pool_(std::move(other.pool_)),
      chunk_(std::exchange(other.chunk_, nullptr)),
      address_(other.address_),
      size_bytes_(other.size_bytes_),
      stream_(other.stream_),
      touched_bytes_(other.touched_bytes_.load()) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  if (this == &other) return *this;
  end();
  pool_ = std::move(other.pool_);
  chunk_ = std::exchange(other.chunk_, nullptr);
  address_ = other.address_;
  size_bytes_ = other.size_bytes_;
  stream_ = other.stream_;
  touched_bytes_ = other.touched_bytes_.load();
  return *this;
}

Arena::~Arena() {
  end();
}

void Arena::end() noexcept {
  try {
    release();
  } catch (...) {  // it stays in use: without an event nobody else may have it
  }
  chunk_ = nullptr;
  pool_.reset();
}

void Arena::release() {
  release(stream_);
}

void Arena::release(int64_t stream) {
  if (chunk_ == nullptr) return;
  pool_->release_arena(chunk_, stream_, stream);
  chunk_ = nullptr;
  pool_.reset();
}

void Arena::check(const char* method, int64_t offset_bytes, int64_t size_bytes) const {
  if (chunk_ == nullptr) throw InvalidArgument(std::string(method) + ": the arena has been released");
  if (offset_bytes < 0 || size_bytes < 0 || offset_bytes > size_bytes_ || size_bytes > size_bytes_ - offset_bytes) {
    throw InvalidArgument(std::string(method) + ": the slot must lie in the arena of " + bytes(size_bytes_) + ", got " +
                          bytes(size_bytes) + " at offset " + std::to_string(offset_bytes));
  }
}

void* Arena::base() const {
  check("Arena::base", 0, 0);
  return reinterpret_cast<void*>(address_);
}

void* Arena::slot(int64_t offset_bytes, int64_t size_bytes) const {
  check("Arena::slot", offset_bytes, size_bytes);
  return reinterpret_cast<void*>(address_ + static_cast<uintptr_t>(offset_bytes));
}

void Arena::touch(int64_t offset_bytes, int64_t size_bytes) {
  check("Arena::touch", offset_bytes, size_bytes);
  const int64_t end_bytes = size_bytes == 0 ? 0 : offset_bytes + size_bytes;
  int64_t seen = touched_bytes_.load(std::memory_order_relaxed);
  while (seen < end_bytes && !touched_bytes_.compare_exchange_weak(seen, end_bytes, std::memory_order_relaxed)) {
  }
}

int64_t Arena::touched_bytes() const {
  return touched_bytes_.load(std::memory_order_relaxed);
}

void Arena::reset_touched() {
  touched_bytes_.store(0, std::memory_order_relaxed);
}

}  // namespace splitkern::memory
