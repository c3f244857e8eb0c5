// Chunks, their free lists and the order of streams. See heap.h.
#include "memory/pool/heap.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace splitkern::memory::pool {

namespace {

// Spare chunks and events kept for reuse; room for them is there from the start, so that keeping one cannot fail.
constexpr size_t kSpares = 1024;
constexpr size_t kEventsBetweenPolls = 64;

std::tuple<int64_t, int64_t, int64_t> key(const Chunk& chunk) {
  return {chunk.size_bytes, chunk.block->number, chunk.offset_bytes};
}

}  // namespace

bool BySize::operator()(const Chunk* left, const Chunk* right) const {
  return key(*left) < key(*right);
}
bool BySize::operator()(const Chunk* chunk, int64_t size_bytes) const {
  return chunk->size_bytes < size_bytes;
}
bool BySize::operator()(int64_t size_bytes, const Chunk* chunk) const {
  return size_bytes < chunk->size_bytes;
}

Heap::Heap(std::shared_ptr<StreamEvents> events) : events_(std::move(events)) {
  spare_chunks_.reserve(kSpares);
  spare_events_.reserve(kSpares);
}

Heap::~Heap() {
  for (auto& [number, block] : blocks_) {
    for (Chunk* chunk = block.first; chunk != nullptr;) delete std::exchange(chunk, chunk->next);
  }
}

// --- Streams ---------------------------------------------------------------------------------------------------------

bool Heap::add_stream(int64_t handle) {
  if (by_handle_.contains(handle)) return false;
  record();  // from now on somebody else can ask for what the others freed
  auto stream = std::make_unique<Stream>();
  stream->ordinal = next_ordinal_;
  stream->handle = handle;
  streams_.reserve(streams_.size() + 1);
  by_handle_.emplace(handle, stream.get());
  streams_.push_back(std::move(stream));
  ++next_ordinal_;
  return true;
}

Stream* Heap::find_stream(int64_t handle) {
  const auto found = by_handle_.find(handle);
  return found == by_handle_.end() ? nullptr : found->second;
}

void Heap::remove_stream(Stream& stream) {
  // The handle is not to be used after this, so its last event is recorded now.
  if (events_ != nullptr && stream.frees > stream.recorded) record(stream, stream.frees);
  by_handle_.erase(stream.handle);
  stream.is_active = false;
  drop_retired();
}

void Heap::drop_retired() noexcept {
  for (auto at = streams_.begin(); at != streams_.end();) {
    Stream& stream = **at;
    if (stream.is_active || stream.oldest != nullptr) {
      ++at;
      continue;
    }
    for (const std::unique_ptr<Stream>& other : streams_) other->ordered_after.erase(stream.ordinal);
    at = streams_.erase(at);
  }
}

std::string Heap::known_streams() const {
  std::string text;
  for (const auto& [handle, stream] : by_handle_) text += (text.empty() ? "" : ", ") + std::to_string(handle);
  return text.empty() ? "none" : text;
}

int64_t Heap::stream_count() const {
  return static_cast<int64_t>(by_handle_.size());
}

void Heap::order_after(Stream& stream, Stream& earlier) {
  if (events_ == nullptr || &stream == &earlier) return;
  wait_for(stream, earlier, earlier.frees);
}

void Heap::wait_for(Stream& stream, Stream& earlier, int64_t sequence) {
  if (sequence <= earlier.completed) return;
  int64_t& ordered = stream.ordered_after[earlier.ordinal];
  if (sequence <= ordered) return;
  const auto event =
      std::lower_bound(earlier.events.begin(), earlier.events.end(), sequence,
                       [](const Stream::Recorded& recorded, int64_t wanted) { return recorded.sequence < wanted; });
  if (event == earlier.events.end()) throw std::logic_error("MemoryPool: a free without an event; this is a bug");
  event->event->wait(stream.handle);
  ordered = event->sequence;
  ++waits_;
}

void Heap::record(Stream& stream, int64_t sequence) {
  std::shared_ptr<StreamEvent> event;
  if (spare_events_.empty()) {
    event = events_->make();
  } else {
    event = std::move(spare_events_.back());
    spare_events_.pop_back();
  }
  event->record(stream.handle);
  stream.events.push_back({sequence, std::move(event)});
  stream.recorded = sequence;
}

// Sequence numbers are used up even where nothing is freed in the end: an event never covers a later free.
void Heap::mark(Stream& stream) {
  // A stream that lives on what it frees itself never asks, so its events are collected here now and then.
  if (stream.events.size() % kEventsBetweenPolls == kEventsBetweenPolls - 1) poll();
  record(stream, stream.frees + 1);
  ++stream.frees;
}

void Heap::record() {
  if (events_ == nullptr) return;
  for (const auto& [handle, stream] : by_handle_) {
    if (stream->frees > stream->recorded) record(*stream, stream->frees);
  }
}

void Heap::poll() {
  for (const std::unique_ptr<Stream>& stream : streams_) {
    while (!stream->events.empty() && stream->events.front().event->query()) {
      stream->completed = stream->events.front().sequence;
      std::shared_ptr<StreamEvent> event = std::move(stream->events.front().event);
      stream->events.pop_front();
      // Not one that somebody is waiting for without the lock.
      if (event.use_count() == 1 && spare_events_.size() < kSpares) spare_events_.push_back(std::move(event));
    }
    while (stream->oldest != nullptr && stream->oldest->sequence <= stream->completed) {
      Chunk* const chunk = stream->oldest;
      remove_free(chunk);
      chunk->stream = nullptr;
      insert_free(merge(chunk), nullptr);
    }
  }
  drop_retired();
}

std::vector<std::shared_ptr<StreamEvent>> Heap::last_events() const {
  std::vector<std::shared_ptr<StreamEvent>> events;
  for (const std::unique_ptr<Stream>& stream : streams_) {
    if (!stream->events.empty()) events.push_back(stream->events.back().event);
  }
  return events;
}

// --- Free chunks -----------------------------------------------------------------------------------------------------

std::unique_ptr<Chunk> Heap::new_chunk() {
  if (!spare_chunks_.empty()) {
    std::unique_ptr<Chunk> chunk = std::move(spare_chunks_.back());
    spare_chunks_.pop_back();
    return chunk;
  }
  auto chunk = std::make_unique<Chunk>();
  Block nowhere;
  chunk->block = &nowhere;
  FreeSet maker;
  maker.insert(chunk.get());
  chunk->node = maker.extract(maker.begin());
  return chunk;
}

void Heap::recycle(std::unique_ptr<Chunk> chunk) noexcept {
  if (spare_chunks_.size() == kSpares) return;
  chunk->tag.clear();
  spare_chunks_.push_back(std::move(chunk));
}

// `older`: its place in the stream's list is behind this one. Every other caller's chunk is the stream's newest.
void Heap::insert_free(Chunk* chunk, Chunk* older) noexcept {
  Stream* const stream = chunk->stream;
  (stream == nullptr ? ready_ : stream->free).insert(std::move(chunk->node));
  free_bytes_ += chunk->size_bytes;
  if (stream == nullptr) return;
  chunk->older = older;
  chunk->newer = older == nullptr ? stream->oldest : older->newer;
  (chunk->older == nullptr ? stream->oldest : chunk->older->newer) = chunk;
  (chunk->newer == nullptr ? stream->newest : chunk->newer->older) = chunk;
}

void Heap::remove_free(Chunk* chunk) noexcept {
  Stream* const stream = chunk->stream;
  FreeSet& set = stream == nullptr ? ready_ : stream->free;
  chunk->node = set.extract(set.find(chunk));
  free_bytes_ -= chunk->size_bytes;
  if (stream == nullptr) return;
  (chunk->older == nullptr ? stream->oldest : chunk->older->newer) = chunk->newer;
  (chunk->newer == nullptr ? stream->newest : chunk->newer->older) = chunk->older;
  chunk->older = chunk->newer = nullptr;
}

// Whether a chunk that is in no list may swallow a free neighbour. With one stream alone, ready memory may become its.
bool Heap::can_merge(const Chunk& chunk, const Chunk* neighbour) const {
  if (neighbour == nullptr || neighbour->use != Use::kFree) return false;
  return neighbour->stream == chunk.stream || (neighbour->stream == nullptr && streams_.size() == 1);
}

Chunk* Heap::merge(Chunk* chunk) noexcept {
  const auto swallow = [this](Chunk* left, Chunk* right) {
    left->size_bytes += right->size_bytes;
    left->next = right->next;
    if (left->next != nullptr) left->next->previous = left;
    recycle(std::unique_ptr<Chunk>(right));
  };
  while (can_merge(*chunk, chunk->next)) {
    remove_free(chunk->next);
    swallow(chunk, chunk->next);
  }
  while (can_merge(*chunk, chunk->previous)) {
    Chunk* const left = chunk->previous;
    remove_free(left);
    left->stream = chunk->stream;
    left->sequence = chunk->sequence;
    swallow(left, chunk);
    chunk = left;
  }
  return chunk;
}

bool Heap::is_usable(const Stream& stream, const Chunk& chunk) const {
  if (chunk.stream == nullptr || chunk.stream == &stream || chunk.sequence <= chunk.stream->completed) return true;
  const auto ordered = stream.ordered_after.find(chunk.stream->ordinal);
  return ordered != stream.ordered_after.end() && chunk.sequence <= ordered->second;
}

// Best fit among what the stream freed itself and what is ready; its own first, which leaves the rest to the others.
Heap::Window Heap::find_fit(const Stream& stream, int64_t size_bytes) const {
  const auto own = stream.free.lower_bound(size_bytes);
  const auto ready = ready_.lower_bound(size_bytes);
  Chunk* best = own == stream.free.end() ? nullptr : *own;
  if (ready != ready_.end() && (best == nullptr || (*ready)->size_bytes < best->size_bytes)) best = *ready;
  if (best == nullptr) return {};
  return {best, best, best->size_bytes, 0};
}

// The run of neighbouring free chunks with the fewest to wait for, then the smallest, then the first. Visits
// everything.
Heap::Window Heap::find_run(const Stream& stream, int64_t size_bytes, bool may_wait) const {
  Window best;
  for (const auto& [number, block] : blocks_) {
    Window window;
    for (Chunk* chunk = block.first; chunk != nullptr; chunk = chunk->next) {
      const bool usable = chunk->use == Use::kFree && is_usable(stream, *chunk);
      if (chunk->use != Use::kFree || (!usable && !may_wait)) {
        window = {};
        continue;
      }
      if (window.first == nullptr) window.first = chunk;
      window.last = chunk;
      window.size_bytes += chunk->size_bytes;
      window.foreign += usable ? 0 : 1;
      while (window.size_bytes - window.first->size_bytes >= size_bytes) {
        window.size_bytes -= window.first->size_bytes;
        window.foreign -= is_usable(stream, *window.first) ? 0 : 1;
        window.first = window.first->next;
      }
      if (window.size_bytes < size_bytes) continue;
      if (best.first == nullptr ||
          std::tie(window.foreign, window.size_bytes) < std::tie(best.foreign, best.size_bytes)) {
        best = window;
      }
    }
  }
  return best;
}

Chunk* Heap::take(Stream& stream, int64_t size_bytes, Use use, bool may_wait) {
  Window window = find_fit(stream, size_bytes);
  if (window.first == nullptr) {
    poll();
    window = find_fit(stream, size_bytes);
  }
  if (window.first == nullptr) window = find_run(stream, size_bytes, may_wait);
  return window.first == nullptr ? nullptr : cut(window, stream, size_bytes, use);
}

// Makes one used chunk of a window. What is left over is the end of its last chunk, and stays as that one was.
Chunk* Heap::cut(const Window& window, Stream& stream, int64_t size_bytes, Use use) {
  // First all that may throw.
  for (Chunk* chunk = window.first;; chunk = chunk->next) {
    if (!is_usable(stream, *chunk)) wait_for(stream, *chunk->stream, chunk->sequence);
    if (chunk == window.last) break;
  }
  const int64_t rest_bytes = window.size_bytes - size_bytes;
  std::unique_ptr<Chunk> rest = rest_bytes > 0 ? new_chunk() : nullptr;
  used_.emplace(window.first->address(), window.first);

  Chunk* const first = window.first;
  Chunk* const last = window.last;
  for (Chunk* chunk = first; chunk != last; chunk = chunk->next) remove_free(chunk);
  Chunk* const older = last->older;
  remove_free(last);
  Chunk* const behind = last->next;
  Chunk* next = behind;
  if (rest != nullptr) {
    rest->block = last->block;
    rest->offset_bytes = last->offset_bytes + last->size_bytes - rest_bytes;
    rest->size_bytes = rest_bytes;
    rest->use = Use::kFree;
    rest->stream = last->stream;
    rest->sequence = last->sequence;
    rest->previous = first;
    rest->next = behind;
    next = rest.release();
    insert_free(next, older);
  }
  if (behind != nullptr) behind->previous = next == behind ? first : next;
  for (Chunk* chunk = first == last ? nullptr : first->next; chunk != nullptr;) {
    Chunk* const swallowed = chunk;
    chunk = chunk == last ? nullptr : chunk->next;
    recycle(std::unique_ptr<Chunk>(swallowed));
  }
  first->size_bytes = size_bytes;
  first->next = next;
  first->use = use;
  first->stream = nullptr;
  first->number = next_allocation_++;
  first->stream_ordinal = stream.ordinal;
  first->stream_handle = stream.handle;
  ++first->block->used_chunks;
  return first;
}

void Heap::give(Chunk* chunk, Stream& stream) {
  if (events_ != nullptr && streams_.size() > 1) {
    if (chunk->stream_ordinal != stream.ordinal) {
      Stream* const origin = find_stream(chunk->stream_handle);
      if (origin != nullptr && origin->ordinal == chunk->stream_ordinal) {
        mark(*origin);
        wait_for(stream, *origin, origin->frees);
      }
    }
    mark(stream);
  } else {
    ++stream.frees;
  }
  used_.erase(chunk->address());
  --chunk->block->used_chunks;
  chunk->use = Use::kFree;
  chunk->tag.clear();
  chunk->stream = events_ == nullptr ? nullptr : &stream;
  chunk->sequence = stream.frees;
  chunk = merge(chunk);
  insert_free(chunk, chunk->stream == nullptr ? nullptr : chunk->stream->newest);
}

Chunk* Heap::find(uintptr_t address) const {
  const auto found = used_.find(address);
  return found == used_.end() ? nullptr : found->second;
}

std::string Heap::describe(uintptr_t address) const {
  auto above = by_address_.upper_bound(address);
  if (above == by_address_.begin()) return "lies in no block of this pool";
  const Block& block = *std::prev(above)->second;
  const uintptr_t within = address - block.address;
  if (within >= static_cast<uintptr_t>(block.size_bytes)) return "lies in no block of this pool";
  const Chunk* chunk = block.first;
  while (within >= static_cast<uintptr_t>(chunk->offset_bytes + chunk->size_bytes)) chunk = chunk->next;
  if (chunk->use == Use::kFree) return "lies in free memory of this pool: it was freed already, or never given out";
  return "lies " + std::to_string(within - static_cast<uintptr_t>(chunk->offset_bytes)) + " bytes inside " +
         (chunk->use == Use::kPlanned ? "an arena" : "an allocation") + " of " + std::to_string(chunk->asked_bytes) +
         " bytes: only the address where that begins can be freed";
}

// --- Blocks ----------------------------------------------------------------------------------------------------------

bool Heap::overlaps(uintptr_t address, int64_t size_bytes) const {
  const auto above = by_address_.lower_bound(address);
  if (above != by_address_.end() && above->first - address < static_cast<uintptr_t>(size_bytes)) return true;
  if (above == by_address_.begin()) return false;
  const Block& below = *std::prev(above)->second;
  return address - below.address < static_cast<uintptr_t>(below.size_bytes);
}

void Heap::add_block(uintptr_t address, int64_t size_bytes, Stream* ordered_on) {
  std::unique_ptr<Chunk> chunk = new_chunk();
  if (events_ == nullptr) ordered_on = nullptr;
  if (ordered_on != nullptr && streams_.size() > 1) mark(*ordered_on);
  Block& block = blocks_[next_block_];
  try {
    by_address_.emplace(address, &block);
  } catch (...) {
    blocks_.erase(next_block_);
    throw;
  }
  block = {next_block_++, address, size_bytes, chunk.get(), 0};
  chunk->block = &block;
  chunk->offset_bytes = 0;
  chunk->size_bytes = size_bytes;
  chunk->previous = chunk->next = nullptr;
  chunk->use = Use::kFree;
  chunk->stream = ordered_on;
  if (ordered_on != nullptr) chunk->sequence = streams_.size() > 1 ? ordered_on->frees : ++ordered_on->frees;
  Chunk* const inserted = chunk.release();
  insert_free(inserted, ordered_on == nullptr ? nullptr : ordered_on->newest);
}

std::vector<Block> Heap::take_idle_blocks(int64_t enough_bytes) {
  std::vector<Block> taken;
  taken.reserve(blocks_.size());
  int64_t sum = 0;
  for (auto at = blocks_.end(); at != blocks_.begin() && sum < enough_bytes;) {
    --at;
    Block& block = at->second;
    if (block.used_chunks > 0 || block.first->next != nullptr || block.first->stream != nullptr) continue;
    remove_free(block.first);
    recycle(std::unique_ptr<Chunk>(block.first));
    sum += block.size_bytes;
    by_address_.erase(block.address);
    taken.push_back(block);
    at = blocks_.erase(at);
  }
  return taken;
}

int64_t Heap::idle_bytes(bool ready_only) const {
  int64_t sum = 0;
  for (const auto& [number, block] : blocks_) {
    const bool is_ready = block.first->next == nullptr && block.first->stream == nullptr;
    if (block.used_chunks == 0 && (is_ready || !ready_only)) sum += block.size_bytes;
  }
  return sum;
}

int64_t Heap::largest_free_run() const {
  int64_t largest = 0;
  for (const auto& [number, block] : blocks_) {
    int64_t run = 0;
    for (const Chunk* chunk = block.first; chunk != nullptr; chunk = chunk->next) {
      run = chunk->use == Use::kFree ? run + chunk->size_bytes : 0;
      largest = std::max(largest, run);
    }
  }
  return largest;
}

std::vector<const Chunk*> Heap::used() const {
  std::vector<const Chunk*> chunks;
  chunks.reserve(used_.size());
  for (const auto& [address, chunk] : used_) chunks.push_back(chunk);
  std::sort(chunks.begin(), chunks.end(),
            [](const Chunk* left, const Chunk* right) { return left->number < right->number; });
  return chunks;
}

void Heap::verify() const {
  const auto demand = [](bool holds, const char* rule) {
    if (!holds) throw std::logic_error(std::string("MemoryPool: broken inside: ") + rule);
  };
  int64_t free = 0;
  size_t used = 0, ready = 0, pending = 0;
  for (const auto& [number, block] : blocks_) {
    demand(by_address_.at(block.address) == &block && block.number == number, "a block is not where it says");
    int64_t offset = 0, used_here = 0;
    const Chunk* previous = nullptr;
    for (const Chunk* chunk = block.first; chunk != nullptr; previous = chunk, chunk = chunk->next) {
      demand(chunk->block == &block && chunk->offset_bytes == offset, "chunks overlap or leave a gap");
      demand(chunk->previous == previous && chunk->size_bytes > 0, "neighbours do not know each other");
      offset += chunk->size_bytes;
      if (chunk->use != Use::kFree) {
        ++used_here;
        demand(find(chunk->address()) == chunk, "a used chunk is not found by its address");
        continue;
      }
      free += chunk->size_bytes;
      ++(chunk->stream == nullptr ? ready : pending);
      const FreeSet& set = chunk->stream == nullptr ? ready_ : chunk->stream->free;
      const auto found = set.find(const_cast<Chunk*>(chunk));
      demand(found != set.end() && *found == chunk, "a free chunk is in no list");
      demand(previous == nullptr || previous->use != Use::kFree || previous->stream != chunk->stream,
             "free neighbours of one kind are not merged");
    }
    demand(offset == block.size_bytes, "chunks do not fill their block");
    demand(used_here == block.used_chunks, "the used chunks of a block are miscounted");
    used += static_cast<size_t>(used_here);
  }
  demand(by_address_.size() == blocks_.size(), "a block is listed twice");
  demand(used == used_.size(), "used chunks are miscounted");
  demand(free == free_bytes_, "free bytes are miscounted");
  demand(ready == ready_.size(), "ready chunks are miscounted");
  size_t listed = 0;
  for (const std::unique_ptr<Stream>& stream : streams_) {
    size_t count = 0;
    const Chunk* older = nullptr;
    for (const Chunk* chunk = stream->oldest; chunk != nullptr; older = chunk, chunk = chunk->newer, ++count) {
      demand(chunk->stream == stream.get() && chunk->older == older, "pending chunks do not know each other");
      demand(older == nullptr || older->sequence <= chunk->sequence, "pending chunks are out of order");
      demand(chunk->sequence <= stream->frees, "a pending chunk is of a free to come");
    }
    demand(stream->newest == older && count == stream->free.size(), "pending chunks of a stream are miscounted");
    demand(stream->is_active || stream->recorded >= stream->frees, "a removed stream has a free without an event");
    listed += count;
  }
  demand(pending == listed, "pending chunks are miscounted");
}

}  // namespace splitkern::memory::pool
