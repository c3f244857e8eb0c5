// The pool against a simple model: random operations on several streams, checked byte by byte. Addresses are made up
// and never touched; streams are vector clocks, so that each reuse is judged by what really orders it.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "memory/errors.h"
#include "memory/pool.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

// Streams as the model knows them. A position counts what a stream was given.
struct Clocks {
  struct Stream {
    int64_t given = 0;
    int64_t done = 0;
    std::map<int64_t, int64_t> after;  // other streams' positions that all later work comes after
  };
  std::map<int64_t, Stream> streams;

  // Whether what `stream` is given from now on comes after a position of another one.
  bool ordered(int64_t stream, int64_t other, int64_t position) {
    if (stream == other || streams[other].done >= position) return true;
    const auto found = streams[stream].after.find(other);
    return found != streams[stream].after.end() && found->second >= position;
  }
};

struct ClockEvents : StreamEvents {
  struct Event : StreamEvent {
    explicit Event(Clocks& clocks) : clocks(clocks) {}
    void record(int64_t recorded_on) override {
      stream = recorded_on;
      position = clocks.streams.at(stream).given;
      after = clocks.streams.at(stream).after;
    }
    bool query() override { return clocks.streams.at(stream).done >= position; }
    void wait(int64_t waiting) override {
      Clocks::Stream& waits = clocks.streams.at(waiting);
      const auto raise = [&](int64_t other, int64_t to) { waits.after[other] = std::max(waits.after[other], to); };
      for (const auto& [other, to] : after) raise(other, to);
      raise(stream, position);
    }
    void synchronize() override {
      Clocks::Stream& passed = clocks.streams.at(stream);
      passed.done = std::max(passed.done, position);
    }
    Clocks& clocks;
    int64_t stream = -1;
    int64_t position = 0;
    std::map<int64_t, int64_t> after;
  };
  explicit ClockEvents(Clocks& clocks) : clocks(clocks) {}
  std::unique_ptr<StreamEvent> make() override { return std::make_unique<Event>(clocks); }
  Clocks& clocks;
};

struct Setting {
  std::string name;
  uint32_t seed = 0;
  int64_t operations = 0;
  int64_t streams = 1;
  bool has_events = true;
  bool is_ordered_upstream = false;
  int64_t failures_in_1000 = 0;
  int64_t limit_bytes = 1 << 20;
  int64_t block_bytes = 1 << 16;
  int64_t alignment_bytes = 512;
  int64_t largest_bytes = 1 << 17;
};

class Model {
 public:
  explicit Model(const Setting& setting) : setting_(setting), random_(setting.seed) {
    clocks_.streams[0];
    const auto upstream = std::make_shared<CallbackUpstream>(
        [this](int64_t size, int64_t alignment) { return upstream_allocate(size, alignment); },
        [this](uintptr_t block, int64_t size) { upstream_free(static_cast<int64_t>(block), size); },
        setting.is_ordered_upstream ? std::optional<int64_t>(0) : std::nullopt);
    pool_ =
        MemoryPool::create(upstream, {.limit_bytes = setting.limit_bytes,
                                      .block_bytes = setting.block_bytes,
                                      .alignment_bytes = setting.alignment_bytes,
                                      .events = setting.has_events ? std::make_shared<ClockEvents>(clocks_) : nullptr});
  }

  void run() {
    for (int64_t operation = 0; operation < setting_.operations; ++operation) {
      const int64_t choice = below(1000);
      if (choice < 420) {
        allocate();
      } else if (choice < 450) {
        reserve();
      } else if (choice < 830) {
        free_one();
      } else if (choice < 840) {
        if (!arenas_.empty()) end_arena(below(std::ssize(arenas_)));
      } else if (choice < 950) {
        Clocks::Stream& stream = clocks_.streams.at(any_stream());
        stream.done += below(stream.given - stream.done + 1);
      } else if (choice < 960) {
        order();
      } else if (choice < 980) {
        refuse_wrong_frees();
      } else if (choice < 982) {
        pool_->trim(below(2) == 0);
      } else if (choice < 984) {
        change_streams();
      }
      require(held_bytes_ <= setting_.limit_bytes, "the limit is exceeded");
      if (operation % 64 == 0) compare_figures();
    }
    while (!arenas_.empty()) end_arena(0);
    while (!live_.empty()) free_at(live_.begin()->first);
    compare_figures();
    pool_->trim(true);
    require(held_bytes_ == 0, "not everything went back to the upstream");
    require(given_ > setting_.operations / 4, "hardly anything was given");
    require(refused_ > 0, "nothing was refused");
    pool_.reset();
  }

  int64_t waits() const { return waits_; }

 private:
  struct Live {
    int64_t size = 0;
    int64_t asked = 0;
    int64_t stream = 0;
    bool is_planned = false;
  };
  struct Freed {
    int64_t end = 0;
    int64_t stream = 0;
    int64_t position = 0;
  };

  int64_t below(int64_t bound) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(bound)); }
  void require(bool holds, const std::string& text) const { check::require(holds, setting_.name + ": " + text); }

  int64_t any_stream() { return known_[static_cast<size_t>(below(std::ssize(known_)))]; }

  int64_t any_size() {
    int64_t size = 1 + below(16);
    while (size < setting_.largest_bytes && below(4) != 0) size *= 2;
    return std::min(size * (1 + below(64)), setting_.largest_bytes);
  }

  int64_t rounded(int64_t size) const {
    return (size + setting_.alignment_bytes - 1) / setting_.alignment_bytes * setting_.alignment_bytes;
  }

  // --- What the upstream sees ---

  uintptr_t upstream_allocate(int64_t size, int64_t alignment) {
    upstream_failed_ = false;
    if (below(1000) < setting_.failures_in_1000) {
      upstream_failed_ = true;
      throw UpstreamFailure("the model's upstream fails");
    }
    next_block_ += below(3) * alignment;  // sometimes right behind the last one
    const int64_t block = next_block_;
    next_block_ += (size + alignment - 1) / alignment * alignment;
    blocks_[block] = size;
    held_bytes_ += size;
    require(held_bytes_ <= setting_.limit_bytes, "the limit is exceeded");
    // In stream order: earlier work of the upstream's own stream may still use it.
    if (setting_.is_ordered_upstream) {
      ++clocks_.streams.at(0).given;
      freed_[block] = {block + size, 0, clocks_.streams.at(0).given};
    }
    return static_cast<uintptr_t>(block);
  }

  void upstream_free(int64_t block, int64_t size) {
    const auto found = blocks_.find(block);
    require(found != blocks_.end() && found->second == size, "a block goes back that was not given");
    const auto live = live_.lower_bound(block);
    require(live == live_.end() || live->first >= block + size, "a block in use goes back");
    for (auto at = freed_.lower_bound(block); at != freed_.end() && at->first < block + size; at = freed_.erase(at)) {
      require(!setting_.has_events || clocks_.streams.at(at->second.stream).done >= at->second.position,
              "a block goes back before its frees have passed");
    }
    blocks_.erase(found);
    held_bytes_ -= size;
  }

  // --- Operations ---

  void given(int64_t address, int64_t asked, int64_t stream, bool is_planned) {
    const int64_t size = rounded(asked), end = address + size;
    require(address % setting_.alignment_bytes == 0, "an address is not aligned");
    auto block = blocks_.upper_bound(address);
    require(block != blocks_.begin(), "an address lies before every block");
    --block;
    require(end <= block->first + block->second, "an allocation ends behind its block");
    auto next = live_.lower_bound(address);
    require(next == live_.end() || next->first >= end, "an allocation overlaps a later one");
    require(next == live_.begin() || std::prev(next)->first + std::prev(next)->second.size <= address,
            "an allocation overlaps an earlier one");
    // Whoever freed a part of it must come before.
    auto at = freed_.upper_bound(address);
    if (at != freed_.begin() && std::prev(at)->second.end > address) --at;
    while (at != freed_.end() && at->first < end) {
      const int64_t begin = at->first;
      const Freed piece = at->second;
      require(!setting_.has_events || clocks_.ordered(stream, piece.stream, piece.position),
              "memory that stream " + std::to_string(piece.stream) + " freed is given to stream " +
                  std::to_string(stream) + ", which may run before");
      at = freed_.erase(at);
      if (begin < address) freed_[begin] = {address, piece.stream, piece.position};
      if (piece.end > end) at = std::next(freed_.insert_or_assign(end, piece).first);
    }
    live_[address] = {size, asked, stream, is_planned};
    ++clocks_.streams.at(stream).given;
    ++given_;
    total_ += size;
  }

  // An allocation may be refused only if nothing could have been done.
  void refused(int64_t asked, const OutOfMemory& error) {
    const int64_t size = rounded(asked);
    int64_t idle = 0, largest = 0;
    for (const auto& [block, block_size] : blocks_) {
      int64_t from = block;
      const int64_t end = block + block_size;
      for (auto at = live_.lower_bound(block); at != live_.end() && at->first < end; ++at) {
        largest = std::max(largest, at->first - from);
        from = at->first + at->second.size;
      }
      largest = std::max(largest, end - from);
      if (from == block) idle += block_size;
    }
    require(largest < size, "refused although " + std::to_string(largest) + " bytes in a row are free");
    require(error.largest_free_bytes == largest, "the error's largest free run");
    require(error.asked_bytes == size && error.upstream_bytes == held_bytes_, "the error's sizes");
    if (upstream_failed_) {
      require(idle == 0, "refused although idle blocks could have gone back");
    } else {
      require(setting_.limit_bytes - held_bytes_ + idle < size, "refused although the limit leaves room");
    }
    ++refused_;
  }

  void allocate() {
    const int64_t stream = any_stream(), asked = any_size();
    upstream_failed_ = false;
    try {
      given(static_cast<int64_t>(reinterpret_cast<uintptr_t>(pool_->allocate(asked, stream))), asked, stream, false);
    } catch (const OutOfMemory& error) {
      refused(asked, error);
    }
  }

  void reserve() {
    const int64_t stream = any_stream(), asked = any_size();
    upstream_failed_ = false;
    try {
      arenas_.push_back(pool_->reserve(asked, stream));
      given(static_cast<int64_t>(reinterpret_cast<uintptr_t>(arenas_.back().base())), asked, stream, true);
    } catch (const OutOfMemory& error) {
      refused(asked, error);
    }
  }

  void freed(int64_t address, int64_t stream) {
    const Live gone = live_.at(address);
    Clocks::Stream& origin = clocks_.streams.at(gone.stream);
    // A stream that is gone is the caller's to order.
    require(!setting_.has_events || !knows(gone.stream) || clocks_.ordered(stream, gone.stream, origin.given),
            "a free on another stream may come before the work of the first one");
    live_.erase(address);
    freed_[address] = {address + gone.size, stream, clocks_.streams.at(stream).given};
    ++clocks_.streams.at(stream).given;
  }

  void free_at(int64_t address) {
    const Live& live = live_.at(address);
    const int64_t stream = knows(live.stream) && below(8) != 0 ? live.stream : any_stream();
    pool_->free(reinterpret_cast<void*>(address), stream);
    freed(address, stream);
  }

  void free_one() {
    auto at = live_.begin();
    if (at == live_.end()) return;
    std::advance(at, below(std::ssize(live_)));
    if (!at->second.is_planned) free_at(at->first);
  }

  void end_arena(int64_t index) {
    Arena arena = std::move(arenas_[static_cast<size_t>(index)]);
    arenas_.erase(arenas_.begin() + index);
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(arena.base()));
    const int64_t stream = below(2) == 0 ? arena.stream() : any_stream();
    if (stream != arena.stream()) arena.release(stream);
    {
      const Arena last = std::move(arena);
    }  // its end gives it back where that has not been done
    freed(address, stream);
  }

  void order() {
    const int64_t stream = any_stream(), earlier = any_stream();
    pool_->order_after(stream, earlier);
    if (!setting_.has_events) return;
    for (const auto& [begin, piece] : freed_) {
      require(piece.stream != earlier || clocks_.ordered(stream, earlier, piece.position),
              "order_after orders nothing");
    }
  }

  void refuse_wrong_frees() {
    const PoolStatistics before = pool_->statistics();
    const auto refuses = [&](int64_t address) {
      check::refuses([&] { pool_->free(reinterpret_cast<void*>(address), known_.front()); }, {"MemoryPool::free"});
    };
    if (!live_.empty()) {
      auto at = live_.begin();
      std::advance(at, below(std::ssize(live_)));
      if (at->second.is_planned) refuses(at->first);
      refuses(at->first + 1 + below(at->second.size - 1));
    }
    if (!freed_.empty()) {
      auto at = freed_.begin();
      std::advance(at, below(std::ssize(freed_)));
      refuses(at->first);
    }
    refuses(next_block_ + below(1 << 20));
    require(pool_->statistics() == before, "a refused free has changed something");
  }

  bool knows(int64_t stream) const { return std::find(known_.begin(), known_.end(), stream) != known_.end(); }

  void change_streams() {
    if (std::ssize(known_) < setting_.streams) {
      const int64_t stream = next_stream_++;
      clocks_.streams[stream];
      require(pool_->add_stream(stream), "a new stream was known");
      known_.push_back(stream);
      return;
    }
    if (std::ssize(known_) < 2) return;
    const int64_t stream = any_stream();
    const bool bound =
        std::any_of(arenas_.begin(), arenas_.end(), [&](const Arena& arena) { return arena.stream() == stream; });
    if (bound || (setting_.is_ordered_upstream && stream == 0)) {
      check::refuses([&] { pool_->remove_stream(stream); }, {"MemoryPool::remove_stream"});
      return;
    }
    pool_->remove_stream(stream);
    known_.erase(std::find(known_.begin(), known_.end(), stream));
  }

  void compare_figures() {
    pool_->verify();
    const PoolStatistics statistics = pool_->statistics();
    int64_t bytes = 0, asked = 0, planned = 0, planned_count = 0;
    for (const auto& [address, live] : live_) {
      bytes += live.size;
      asked += live.asked;
      planned += live.is_planned ? live.size : 0;
      planned_count += live.is_planned ? 1 : 0;
    }
    require(statistics.all.current_bytes == bytes && statistics.all.asked_bytes == asked, "bytes in use");
    require(statistics.all.current_count == std::ssize(live_), "count in use");
    require(statistics.planned.current_bytes == planned && statistics.planned.current_count == planned_count,
            "planned");
    require(statistics.all.total_count == given_ && statistics.all.total_bytes == total_, "totals");
    require(statistics.upstream_bytes == held_bytes_ && statistics.block_count == std::ssize(blocks_), "blocks");
    require(statistics.free_bytes == held_bytes_ - bytes, "free bytes");
    require(statistics.refused == refused_, "refusals");
    waits_ = statistics.stream_waits;
  }

  const Setting setting_;
  std::mt19937_64 random_;
  Clocks clocks_;
  std::vector<int64_t> known_ = {0};
  int64_t next_stream_ = 1;
  std::map<int64_t, int64_t> blocks_;  // address to size
  std::map<int64_t, Live> live_;
  std::map<int64_t, Freed> freed_;  // begin to the rest: who freed these bytes last
  int64_t next_block_ = 1 << 20;
  int64_t held_bytes_ = 0;
  bool upstream_failed_ = false;
  int64_t given_ = 0;
  int64_t total_ = 0;
  int64_t refused_ = 0;
  int64_t waits_ = 0;
  // Last, so first to end: their end calls the upstream.
  std::shared_ptr<MemoryPool> pool_;
  std::vector<Arena> arenas_;
};

}  // namespace

CHECK_NAMED(pool_model_host, "pool: random operations against a model, without events") {
  Model({.name = "host", .seed = 1, .operations = 20000, .streams = 3, .has_events = false}).run();
}

CHECK_NAMED(pool_model_one_stream, "pool: random operations against a model, one stream") {
  Model({.name = "one stream", .seed = 2, .operations = 20000}).run();
}

CHECK_NAMED(pool_model_streams, "pool: random operations against a model, streams that come and go") {
  for (uint32_t seed = 3; seed < 6; ++seed) {
    Model model({.name = "streams, seed " + std::to_string(seed), .seed = seed, .operations = 10000, .streams = 4});
    model.run();
    check::require(model.waits() > 100, "hardly any stream had to wait");
  }
}

CHECK_NAMED(pool_model_blocks, "pool: random operations against a model, blocks as small as allocations") {
  Model({.name = "small blocks",
         .seed = 6,
         .operations = 20000,
         .streams = 3,
         .block_bytes = 1,
         .alignment_bytes = 256,
         .largest_bytes = 1 << 19})
      .run();
}

CHECK_NAMED(pool_model_failing_upstream, "pool: random operations against a model, an ordered upstream that fails") {
  Model({.name = "failing upstream",
         .seed = 7,
         .operations = 20000,
         .streams = 3,
         .is_ordered_upstream = true,
         .failures_in_1000 = 300})
      .run();
}
