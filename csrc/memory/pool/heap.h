// The bookkeeping of a MemoryPool: blocks cut into chunks, which chunks are free, and after which point of which stream
// each free one may be used. Called by MemoryPool alone, under its lock: not thread-safe. It never calls an upstream,
// and never touches the memory itself.
//
// A freed chunk is pending: its stream may use it at once, another stream only after the event recorded at the free.
// Pending chunks whose event has passed become ready for all. Neighbours merge if the same stream freed them (the later
// free counts) or if both are ready. While there is one stream only, nothing is recorded: nobody else could ask.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "memory/pool/streams.h"

namespace splitkern::memory::pool {

enum class Use : uint8_t { kFree, kDynamic, kPlanned };

struct Chunk;
struct Stream;

// By size, then by where it lies: blocks by number, not by address, so that equal runs choose equally.
struct BySize {
  using is_transparent = void;
  bool operator()(const Chunk* left, const Chunk* right) const;
  bool operator()(const Chunk* chunk, int64_t size_bytes) const;
  bool operator()(int64_t size_bytes, const Chunk* chunk) const;
};
using FreeSet = std::set<Chunk*, BySize>;

struct Block {
  int64_t number = 0;
  uintptr_t address = 0;
  int64_t size_bytes = 0;
  Chunk* first = nullptr;
  int64_t used_chunks = 0;
};

struct Chunk {
  Block* block = nullptr;
  int64_t offset_bytes = 0;
  int64_t size_bytes = 0;
  Chunk* previous = nullptr;  // neighbours in the block
  Chunk* next = nullptr;
  Use use = Use::kFree;

  // While it is free.
  Stream* stream = nullptr;  // that freed it; none: ready for every stream
  int64_t sequence = 0;      // which free of that stream
  Chunk* older = nullptr;    // neighbours in the stream's list of pending chunks, which is sorted by sequence
  Chunk* newer = nullptr;
  FreeSet::node_type node;  // its node while it is in no free set: putting it back never allocates

  // While it is used.
  int64_t asked_bytes = 0;
  int64_t number = 0;          // counts allocations
  int64_t stream_ordinal = 0;  // stream that it was allocated on; may be gone
  int64_t stream_handle = 0;
  std::string tag;

  uintptr_t address() const { return block->address + static_cast<uintptr_t>(offset_bytes); }
};

struct Stream {
  struct Recorded {
    int64_t sequence;  // covers the frees up to this one
    std::shared_ptr<StreamEvent> event;
  };

  int64_t ordinal = 0;  // never used again, unlike the handle
  int64_t handle = 0;
  bool is_active = true;        // false: removed, with frees still pending
  int64_t frees = 0;            // sequence of the last free
  int64_t recorded = 0;         // sequence of the last recorded event
  int64_t completed = 0;        // frees up to this one are known to have passed
  int64_t arenas = 0;           // bound to it
  std::deque<Recorded> events;  // not known to have passed, in order
  FreeSet free;
  Chunk* oldest = nullptr;
  Chunk* newest = nullptr;
  std::map<int64_t, int64_t> ordered_after;  // ordinal of another stream: sequence up to which this one waited for it
};

class Heap {
 public:
  // Without events the memory is used by the CPU alone: what is freed is ready.
  explicit Heap(std::shared_ptr<StreamEvents> events);
  ~Heap();
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;

  // Streams. add does nothing where it is known. find returns null where it is not.
  bool add_stream(int64_t handle);
  Stream* find_stream(int64_t handle);
  void remove_stream(Stream& stream);
  std::string known_streams() const;  // "0, 7"
  int64_t stream_count() const;       // active ones
  // `stream` waits for every free so far on `earlier`.
  void order_after(Stream& stream, Stream& earlier);

  // Returns a used chunk of that size (a multiple of the alignment), or null. Only with may_wait does it take chunks
  // that the stream must first be made to wait for. Nothing is changed when it throws.
  Chunk* take(Stream& stream, int64_t size_bytes, Use use, bool may_wait);
  // Frees a used chunk on a stream. On another than it was allocated on, the stream is first made to wait for that one.
  // Nothing is changed when it throws.
  void give(Chunk* chunk, Stream& stream);
  // The used chunk that begins at an address, or null.
  Chunk* find(uintptr_t address) const;
  // For errors: where an address lies that no used chunk begins at.
  std::string describe(uintptr_t address) const;

  // Whether a block would share bytes with one that is here.
  bool overlaps(uintptr_t address, int64_t size_bytes) const;
  // A new block: one free chunk, pending on `ordered_on` or ready. Nothing is changed when it throws.
  void add_block(uintptr_t address, int64_t size_bytes, Stream* ordered_on);
  // Takes out blocks that are wholly ready, the last first, until they sum to enough_bytes.
  std::vector<Block> take_idle_blocks(int64_t enough_bytes);
  // Bytes of blocks that no chunk of is used: ready ones, or all.
  int64_t idle_bytes(bool ready_only) const;

  // Asks the events which pending chunks are ready.
  void poll();
  // Records an event on every stream that has frees without one.
  void record();
  // The last event of each stream with pending chunks, for waiting without the lock.
  std::vector<std::shared_ptr<StreamEvent>> last_events() const;

  int64_t free_bytes() const { return free_bytes_; }
  int64_t waits() const { return waits_; }
  int64_t largest_free_run() const;
  int64_t block_count() const { return static_cast<int64_t>(blocks_.size()); }
  // Used chunks in order of allocation.
  std::vector<const Chunk*> used() const;
  // All blocks, used or not.
  template <class Action>
  void for_each_block(const Action& action) const {
    for (const auto& [number, block] : blocks_) action(block);
  }
  // Throws std::logic_error with the first inconsistency. Visits everything.
  void verify() const;

 private:
  struct Window {
    Chunk* first = nullptr;
    Chunk* last = nullptr;
    int64_t size_bytes = 0;
    int64_t foreign = 0;  // chunks that the stream must wait for
  };

  std::unique_ptr<Chunk> new_chunk();
  void recycle(std::unique_ptr<Chunk> chunk) noexcept;
  bool is_usable(const Stream& stream, const Chunk& chunk) const;
  Window find_fit(const Stream& stream, int64_t size_bytes) const;
  Window find_run(const Stream& stream, int64_t size_bytes, bool may_wait) const;
  Chunk* cut(const Window& window, Stream& stream, int64_t size_bytes, Use use);
  void wait_for(Stream& stream, Stream& earlier, int64_t sequence);
  void record(Stream& stream, int64_t sequence);
  void mark(Stream& stream);
  void insert_free(Chunk* chunk, Chunk* older) noexcept;
  void remove_free(Chunk* chunk) noexcept;
  Chunk* merge(Chunk* chunk) noexcept;
  bool can_merge(const Chunk& chunk, const Chunk* neighbour) const;
  void drop_retired() noexcept;

  const std::shared_ptr<StreamEvents> events_;
  std::vector<std::unique_ptr<Stream>> streams_;  // by ordinal; removed ones until nothing of theirs is pending
  std::map<int64_t, Stream*> by_handle_;          // active
  std::map<int64_t, Block> blocks_;               // by number
  std::map<uintptr_t, Block*> by_address_;
  std::unordered_map<uintptr_t, Chunk*> used_;
  FreeSet ready_;
  std::vector<std::unique_ptr<Chunk>> spare_chunks_;
  std::vector<std::shared_ptr<StreamEvent>> spare_events_;
  int64_t next_ordinal_ = 0;
  int64_t next_block_ = 0;
  int64_t next_allocation_ = 0;
  int64_t free_bytes_ = 0;
  int64_t waits_ = 0;
};

}  // namespace splitkern::memory::pool
