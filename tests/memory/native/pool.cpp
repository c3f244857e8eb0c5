// Checks of the pool: what it gives, what it refuses, what it costs the upstream. One thread; streams step by step.
#include "memory/pool.h"

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "memory/errors.h"
#include "memory/pool/host_streams.h"
#include "memory/upstream.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

constexpr int64_t kKiB = 1024;

// A pool over a counting upstream.
struct Fixture {
  explicit Fixture(PoolOptions options = {}, TestUpstream::Faults faults = {},
                   std::optional<int64_t> ordered_on = std::nullopt)
      : upstream(std::make_shared<TestUpstream>(std::make_shared<HostUpstream>(), faults, ordered_on)),
        pool(MemoryPool::create(upstream, std::move(options))) {}

  std::shared_ptr<TestUpstream> upstream;
  std::shared_ptr<MemoryPool> pool;
};

struct StreamFixture : Fixture {
  explicit StreamFixture(PoolOptions options = {}, TestUpstream::Faults faults = {},
                         std::optional<int64_t> ordered_on = std::nullopt)
      : StreamFixture(std::make_shared<HostStreams>(HostStreams::Mode::kStepped), std::move(options), faults,
                      ordered_on) {}

  std::shared_ptr<HostStreams> streams;
  int64_t other = 0;

 private:
  static PoolOptions with(PoolOptions options, std::shared_ptr<HostStreams> streams) {
    options.events = std::move(streams);
    return options;
  }
  StreamFixture(const std::shared_ptr<HostStreams>& made, PoolOptions options, TestUpstream::Faults faults,
                std::optional<int64_t> ordered_on)
      : Fixture(with(std::move(options), made), faults, ordered_on), streams(made), other(made->create()) {
    pool->add_stream(other);
  }
};

int64_t address(const void* pointer) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer));
}

void same(const void* actual, const void* expected, const std::string& what) {
  check::require(actual == expected, what + " lies elsewhere");
}

}  // namespace

CHECK_NAMED(pool_gives, "pool: sizes, alignment and figures of allocations") {
  Fixture f({.limit_bytes = 64 * kKiB, .block_bytes = 16 * kKiB, .alignment_bytes = 256});
  check::equal(f.upstream->counts().allocations, 0, "calls of the upstream before the first allocation");
  same(f.pool->allocate(0), nullptr, "an allocation of nothing");
  f.pool->free(nullptr);

  void* const one = f.pool->allocate(1);
  void* const two = f.pool->allocate(257);
  check::equal(address(one) % 256, 0, "alignment");
  check::equal(address(two) - address(one), 256, "distance");
  std::memset(one, 1, 256);
  std::memset(two, 2, 512);
  PoolStatistics statistics = f.pool->statistics();
  check::equal(statistics.dynamic.current_bytes, 768, "current bytes");
  check::equal(statistics.dynamic.asked_bytes, 258, "asked bytes");
  check::equal(statistics.dynamic.current_count, 2, "current count");
  check::equal(statistics.upstream_bytes, 16 * kKiB, "bytes of the upstream");
  check::equal(statistics.free_bytes, 16 * kKiB - 768, "free bytes");
  check::equal(statistics.planned.total_count, 0, "arenas");
  check::require(statistics.all == statistics.dynamic, "the sum is not its parts'");

  f.pool->free(one);
  f.pool->free(two);
  void* const three = f.pool->allocate(16 * kKiB);
  same(three, one, "what was freed and merged");
  check::equal(f.upstream->counts().allocations, 1, "calls of the upstream");
  statistics = f.pool->statistics();
  check::equal(statistics.dynamic.peak_bytes, 16 * kKiB, "peak bytes");
  check::equal(statistics.dynamic.total_bytes, 16 * kKiB + 768, "total bytes");
  check::equal(statistics.dynamic.peak_count, 2, "peak count");
  check::equal(statistics.dynamic.total_count, 3, "total count");
  check::equal(statistics.free_bytes, 0, "free bytes");
  f.pool->free(three);
  f.pool->reset_peaks();
  check::equal(f.pool->statistics().all.peak_bytes, 0, "peak after its reset");
  f.pool->verify();

  check::equal(f.pool->trim(), 16 * kKiB, "trimmed bytes");
  check::equal(f.upstream->counts().held_bytes, 0, "bytes of the upstream after trimming");
  check::equal(f.pool->statistics().upstream_bytes, 0, "bytes that the pool thinks it holds");
}

CHECK_NAMED(pool_best_fit, "pool: the smallest free run that is large enough, and neighbours merge on both sides") {
  Fixture f({.block_bytes = 64 * kKiB, .alignment_bytes = 512});
  std::vector<void*> runs;
  for (const int64_t size : {4, 1, 2, 1, 8, 1}) runs.push_back(f.pool->allocate(size * kKiB));
  for (const int index : {0, 2, 4}) f.pool->free(runs[index]);
  same(f.pool->allocate(2 * kKiB), runs[2], "2 KiB");
  same(f.pool->allocate(3 * kKiB), runs[0], "3 KiB");
  same(f.pool->allocate(1 * kKiB), static_cast<char*>(runs[0]) + 3 * kKiB, "1 KiB, what was left of 4");
  check::equal(f.pool->statistics().largest_free_bytes, (64 - 17) * kKiB, "the untouched end of the block");
  f.pool->free(runs[2]);
  f.pool->free(runs[1]);
  f.pool->free(runs[3]);  // 1 + 2 + 1 + 8
  f.pool->verify();
  same(f.pool->allocate(12 * kKiB), runs[1], "12 KiB, the merged run");
  f.pool->verify();
}

CHECK_NAMED(pool_limit, "pool: what exceeds the limit is refused with sizes, and the rest can still be had") {
  Fixture f({.limit_bytes = 8 * kKiB, .block_bytes = 1 * kKiB, .alignment_bytes = 256});
  std::vector<void*> parts;
  for (int index = 0; index < 8; ++index) parts.push_back(f.pool->allocate(kKiB));
  try {
    f.pool->allocate(kKiB - 1);
    check::require(false, "more than the limit was given");
  } catch (const OutOfMemory& error) {
    check::equal(error.asked_bytes, kKiB, "asked");
    check::equal(error.current_bytes, 8 * kKiB, "current");
    check::equal(error.upstream_bytes, 8 * kKiB, "upstream");
    check::equal(error.limit_bytes, 8 * kKiB, "limit");
    check::equal(error.largest_free_bytes, 0, "largest free run");
    for (const std::string part : {"MemoryPool::allocate", "1023 bytes", "8192", "limit"}) {
      check::require(std::string(error.what()).find(part) != std::string::npos, "\"" + part + "\" in " + error.what());
    }
  }
  f.pool->free(parts[0]);
  f.pool->free(parts[4]);
  check::refuses([&] { f.pool->allocate(3 * kKiB); }, {"largest free run is 1024 bytes", "in use are 6144 bytes"});
  check::equal(f.upstream->counts().frees, 0, "blocks given back although that would not have been enough");
  // Two blocks of 1 KiB that nothing uses are worth one of 2 KiB.
  f.pool->free(f.pool->allocate(2 * kKiB));
  check::equal(f.upstream->counts().frees, 2, "blocks that had to go");
  check::equal(f.pool->statistics().refused, 2, "refused");
  check::equal(f.upstream->counts().peak_bytes, 8 * kKiB, "peak of the upstream");
  check::refuses([&] { f.pool->allocate(kUnlimited); }, {"size_bytes", "at most", std::to_string(kUnlimited)});
  check::refuses([&] { f.pool->allocate(kUnlimited - 512); }, {"limit"});
  f.pool->verify();
}

CHECK_NAMED(pool_growth, "pool: blocks as large as the limit leaves room for, and exact ones for arenas") {
  Fixture f({.limit_bytes = 100 * 512, .block_bytes = 64 * 512});
  Arena arena = f.pool->reserve(30 * 512 + 1);
  check::equal(f.upstream->counts().held_bytes, 31 * 512, "bytes of the upstream after the arena");
  f.pool->allocate(1);
  check::equal(f.upstream->counts().held_bytes, 95 * 512, "a block for dynamic allocations");
  f.pool->allocate(63 * 512);
  f.pool->allocate(512);
  check::equal(f.upstream->counts().held_bytes, 100 * 512, "what the limit leaves");
}

CHECK_NAMED(pool_wrong_frees,
            "pool: double, interior, foreign and unknown frees are refused, and nothing has changed") {
  StreamFixture f({.limit_bytes = 64 * kKiB, .block_bytes = 64 * kKiB});
  char* const first = static_cast<char*>(f.pool->allocate(2000, 0));
  char* const second = static_cast<char*>(f.pool->allocate(kKiB, 0));
  Arena arena = f.pool->reserve(4 * kKiB);
  f.pool->free(second, 0);
  const PoolStatistics before = f.pool->statistics();
  int here = 0;
  check::refuses([&] { f.pool->free(second, 0); }, {"MemoryPool::free", "0x", "freed already"});
  check::refuses([&] { f.pool->free(first + 512, 0); }, {"512 bytes inside an allocation of 2000 bytes"});
  check::refuses([&] { f.pool->free(&here, 0); }, {"no block of this pool"});
  check::refuses([&] { f.pool->free(static_cast<char*>(nullptr) + 8, 0); }, {"0x8", "no block of this pool"});
  check::refuses([&] { f.pool->free(first + 64 * kKiB, 0); }, {"no block of this pool"});
  check::refuses([&] { f.pool->free(arena.base(), 0); }, {"base of an arena of 4096 bytes", "release"});
  check::refuses([&] { f.pool->free(arena.slot(512, 1), 0); }, {"512 bytes inside an arena"});
  check::refuses([&] { f.pool->free(first, 77); }, {"MemoryPool::free", "add_stream", "(0, 1)", "got 77"});
  check::refuses([&] { f.pool->allocate(1, 77); }, {"MemoryPool::allocate", "got 77"});
  check::refuses([&] { f.pool->allocate(-1, 0); }, {"size_bytes", "-1"});
  check::refuses([&] { f.pool->reserve(0, 0); }, {"MemoryPool::reserve", "positive", "got 0"});
  check::refuses([&] { f.pool->reserve(1, 77); }, {"MemoryPool::reserve", "got 77"});
  check::refuses([&] { f.pool->order_after(0, 77); }, {"MemoryPool::order_after", "got 77"});
  check::refuses([&] { f.pool->remove_stream(77); }, {"MemoryPool::remove_stream", "got 77"});
  check::refuses([&] { arena.release(77); }, {"Arena::release", "got 77"});
  check::require(f.pool->statistics() == before, "a refused call has changed something");
  f.pool->free(first, 0);
  f.pool->verify();
}

CHECK_NAMED(pool_wrong_options, "pool: options that are refused") {
  const auto upstream = std::make_shared<HostUpstream>();
  check::refuses([&] { MemoryPool::create(nullptr); }, {"upstream"});
  check::refuses([&] { MemoryPool::create(upstream, {.limit_bytes = -1}); }, {"limit_bytes", "-1"});
  check::refuses([&] { MemoryPool::create(upstream, {.block_bytes = 0}); }, {"block_bytes", "got 0"});
  check::refuses([&] { MemoryPool::create(upstream, {.alignment_bytes = 48}); }, {"alignment_bytes", "48"});
  check::refuses([&] { MemoryPool::create(upstream, {.max_retries = -1}); }, {"max_retries", "-1"});
  check::refuses([&] { CallbackUpstream({}, [](uintptr_t, int64_t) {}); }, {"CallbackUpstream", "functions"});
  check::refuses([&] { TestUpstream(nullptr); }, {"TestUpstream", "none"});
  Fixture f({.limit_bytes = 0});
  check::refuses([&] { f.pool->allocate(1); }, {"limit of 0"});
}

// --- Streams ---------------------------------------------------------------------------------------------------------

CHECK_NAMED(pool_stream_order,
            "pool: freed memory is free on its stream at once, elsewhere after the free has passed") {
  StreamFixture f({.limit_bytes = 3 * kKiB, .block_bytes = 1 * kKiB});
  void* const one = f.pool->allocate(kKiB, 0);
  f.pool->free(one, 0);
  same(f.pool->allocate(kKiB, 0), one, "on the same stream");
  f.pool->free(one, 0);
  void* const two = f.pool->allocate(kKiB, f.other);
  check::require(two != one, "memory was reused on another stream before the free had passed");
  check::equal(f.pool->statistics().stream_waits, 0, "waits");
  f.streams->finish(0);
  same(f.pool->allocate(kKiB, f.other), one, "after the free has passed");
  check::equal(f.pool->statistics().stream_waits, 0, "waits");
  f.pool->verify();
}

CHECK_NAMED(pool_stream_wait, "pool: at the limit another stream is made to wait for the free, and really does") {
  std::vector<std::string> ran;
  StreamFixture f({.limit_bytes = 1 * kKiB, .block_bytes = 1 * kKiB});
  void* const one = f.pool->allocate(kKiB, 0);
  f.streams->put(0, [&] { ran.push_back("before the free"); });
  f.pool->free(one, 0);
  f.streams->put(0, [&] { ran.push_back("after the free"); });
  same(f.pool->allocate(kKiB, f.other), one, "the only memory");
  check::equal(f.pool->statistics().stream_waits, 1, "waits");
  f.streams->put(f.other, [&] { ran.push_back("other"); });
  check::require(!f.streams->step(f.other), "the other stream did not wait");
  check::require(f.streams->step(0), "the first stream stands still");
  check::require(!f.streams->step(f.other), "the other stream did not wait for the free");
  check::require(f.streams->step(0), "the first stream stands still");  // the event
  f.streams->finish(f.other);
  check::require(ran == std::vector<std::string>{"before the free", "other"}, "it waited for more than the free");
  f.pool->verify();
}

CHECK_NAMED(pool_wait_covers_earlier, "pool: one wait covers all earlier frees of a stream, and later ones not") {
  StreamFixture f({.limit_bytes = 4 * kKiB, .block_bytes = 4 * kKiB});
  std::vector<void*> parts;
  for (int index = 0; index < 4; ++index) parts.push_back(f.pool->allocate(kKiB, 0));
  f.pool->free(parts[0], 0);
  f.pool->free(parts[2], 0);
  f.pool->order_after(f.other, 0);
  check::equal(f.pool->statistics().stream_waits, 1, "waits");
  f.pool->order_after(f.other, 0);
  f.pool->order_after(f.other, f.other);
  check::equal(f.pool->statistics().stream_waits, 1, "waits for what was waited for");
  same(f.pool->allocate(kKiB, f.other), parts[0], "freed before the wait");
  same(f.pool->allocate(kKiB, f.other), parts[2], "freed before the wait");
  check::equal(f.pool->statistics().stream_waits, 1, "waits");
  f.pool->free(parts[1], 0);
  same(f.pool->allocate(kKiB, f.other), parts[1], "freed after the wait");
  check::equal(f.pool->statistics().stream_waits, 2, "waits");
  f.pool->verify();
}

CHECK_NAMED(pool_foreign_free, "pool: a free on another stream comes after the stream of the allocation too") {
  StreamFixture f({.limit_bytes = 1 * kKiB, .block_bytes = 1 * kKiB});
  bool used = false;
  void* const one = f.pool->allocate(kKiB, 0);
  f.streams->put(0, [&] { used = true; });
  f.pool->free(one, f.other);
  same(f.pool->allocate(kKiB, f.other), one, "on the stream of the free");
  f.streams->put(f.other, [&] { check::require(used, "memory is reused while its first stream uses it"); });
  check::require(!f.streams->step(f.other), "the freeing stream did not wait");
  f.streams->finish(f.other);
}

CHECK_NAMED(pool_runs_across_streams, "pool: neighbours that several streams freed serve one allocation together") {
  StreamFixture f({.limit_bytes = 4 * kKiB, .block_bytes = 4 * kKiB});
  const int64_t third = f.streams->create();
  f.pool->add_stream(third);
  std::vector<void*> parts;
  for (const int64_t stream : {int64_t{0}, f.other, third, int64_t{0}}) parts.push_back(f.pool->allocate(kKiB, stream));
  for (const int index : {0, 2, 1}) f.pool->free(parts[index], std::vector<int64_t>{0, f.other, third}[index]);
  f.pool->verify();
  // The first two need one wait, the last two would need two.
  same(f.pool->allocate(3 * kKiB / 2, 0), parts[0], "a part of two");
  check::equal(f.pool->statistics().stream_waits, 1, "waits");
  f.pool->verify();
  same(f.pool->allocate(3 * kKiB / 2, 0), static_cast<char*>(parts[0]) + 3 * kKiB / 2, "what was left, and the third");
  check::equal(f.pool->statistics().stream_waits, 2, "waits");
  f.pool->verify();
}

CHECK_NAMED(pool_one_stream, "pool: with one stream no events are recorded until there is another") {
  struct Counting : StreamEvents {
    explicit Counting(std::shared_ptr<StreamEvents> events) : events(std::move(events)) {}
    std::unique_ptr<StreamEvent> make() override {
      ++made;
      return events->make();
    }
    std::shared_ptr<StreamEvents> events;
    int64_t made = 0;
  };
  const auto streams = std::make_shared<HostStreams>(HostStreams::Mode::kStepped);
  const auto counting = std::make_shared<Counting>(streams);
  Fixture f({.limit_bytes = 4 * kKiB, .block_bytes = 4 * kKiB, .events = counting});
  void* one = nullptr;
  for (int round = 0; round < 100; ++round) {
    one = f.pool->allocate((1 + round % 4) * kKiB);
    f.pool->free(one);
    f.pool->verify();
  }
  check::equal(counting->made, 0, "events");
  bool passed = false;
  streams->put(0, [&] { passed = true; });
  one = f.pool->allocate(4 * kKiB);
  f.pool->free(one);
  const int64_t other = streams->create();
  f.pool->add_stream(other);
  check::equal(counting->made, 1, "events when a second stream comes");
  same(f.pool->allocate(4 * kKiB, other), one, "all there is");
  streams->put(other, [&] { check::require(passed, "what was freed without an event is reused too early"); });
  check::require(!streams->step(other), "no wait for what was freed without an event");
  streams->finish(other);
  for (int round = 0; round < 1000; ++round) {
    f.pool->free(one, other);
    streams->finish(other);
    same(f.pool->allocate(4 * kKiB, other), one, "all there is");
  }
  check::require(counting->made <= 100, "events are not used again");
}

CHECK_NAMED(pool_removed_stream, "pool: what a removed stream freed stays in order") {
  StreamFixture f({.limit_bytes = 2 * kKiB, .block_bytes = 2 * kKiB});
  bool passed = false;
  void* const one = f.pool->allocate(2 * kKiB, f.other);
  void* survivor = nullptr;
  f.streams->put(f.other, [&] { passed = true; });
  f.pool->free(one, f.other);
  {
    const Arena arena = f.pool->reserve(kKiB, f.other);
    check::refuses([&] { f.pool->remove_stream(f.other); }, {"bound to no arena", "1"});
    survivor = f.pool->allocate(kKiB, f.other);
  }
  f.pool->remove_stream(f.other);
  check::refuses([&] { f.pool->free(survivor, f.other); }, {"add_stream", "(0)"});
  f.pool->verify();
  same(f.pool->allocate(kKiB, 0), one, "what the removed stream freed");
  f.streams->put(0, [&] { check::require(passed, "the removed stream's work has not run"); });
  check::require(!f.streams->step(0), "no wait for the removed stream");
  f.streams->finish(0);
  f.pool->free(survivor, 0);
  check::require(f.pool->add_stream(f.other), "a removed stream was still known");
  check::require(!f.pool->add_stream(f.other), "an added stream was not known");
  f.pool->verify();
  f.pool->remove_stream(0);
  check::refuses([&] { f.pool->allocate(1, 0); }, {"(1)", "got 0"});
  f.pool->trim(true);
  f.pool->verify();
}

CHECK_NAMED(pool_removed_only_stream, "pool: what the only stream freed without an event stays in order when it goes") {
  const auto streams = std::make_shared<HostStreams>(HostStreams::Mode::kStepped);
  Fixture f({.limit_bytes = kKiB, .block_bytes = kKiB, .events = streams});
  bool passed = false;
  void* const one = f.pool->allocate(kKiB);
  streams->put(0, [&] { passed = true; });
  f.pool->free(one);
  f.pool->remove_stream(0);
  const int64_t other = streams->create();
  f.pool->add_stream(other);
  same(f.pool->allocate(kKiB, other), one, "all there is");
  streams->put(other, [&] { check::require(passed, "what was freed without an event is reused too early"); });
  check::require(!streams->step(other), "no wait for the stream that went");
  streams->finish(other);
}

CHECK_NAMED(pool_untouched, "pool: memory beside what a stream freed is still everybody's") {
  StreamFixture f({.limit_bytes = 4 * kKiB, .block_bytes = 4 * kKiB});
  void* const one = f.pool->allocate(kKiB, 0);
  f.pool->free(one, 0);
  same(f.pool->allocate(3 * kKiB, f.other), static_cast<char*>(one) + kKiB, "what nobody had");
  check::equal(f.pool->statistics().stream_waits, 0, "waits");
  f.pool->verify();
}

CHECK_NAMED(pool_trim, "pool: blocks go back to the upstream when nothing uses them and their frees have passed") {
  StreamFixture f({.block_bytes = 1 * kKiB});
  void* const one = f.pool->allocate(kKiB, 0);
  void* const two = f.pool->allocate(kKiB, 0);
  f.pool->free(one, 0);
  check::equal(f.pool->trim(), 0, "trimmed before the free has passed");
  f.streams->finish(0);
  check::equal(f.pool->trim(), kKiB, "trimmed");
  f.pool->free(two, f.other);
  check::equal(f.pool->trim(true), kKiB, "trimmed after waiting");
  check::equal(f.upstream->counts().held_bytes, 0, "bytes of the upstream");
  f.pool->verify();

  // At the limit the pool waits by itself for blocks that are in the way.
  StreamFixture g({.limit_bytes = 2 * kKiB, .block_bytes = 1 * kKiB});
  for (void* const part : {g.pool->allocate(kKiB, 0), g.pool->allocate(kKiB, 0)}) g.pool->free(part, 0);
  g.pool->allocate(2 * kKiB, g.other);
  check::equal(g.upstream->counts().frees, 2, "blocks that had to go");
}

CHECK_NAMED(pool_ordered_upstream, "pool: a new block of an upstream with a stream is ordered after that stream") {
  StreamFixture f({.block_bytes = 1 * kKiB}, {}, 0);
  bool passed = false;
  f.streams->put(0, [&] { passed = true; });
  f.pool->allocate(kKiB, f.other);
  check::equal(f.pool->statistics().stream_waits, 1, "waits");
  f.streams->put(f.other, [&] { check::require(passed, "a new block is used before the upstream's stream allows"); });
  check::require(!f.streams->step(f.other), "no wait for the upstream's stream");
  f.streams->finish(f.other);
  f.pool->allocate(kKiB, 0);
  check::equal(f.pool->statistics().stream_waits, 1, "waits, the upstream's stream itself needs none");
  check::refuses([&] { f.pool->remove_stream(0); }, {"upstream", "got 0"});
  f.pool->verify();
}

// --- Arenas ----------------------------------------------------------------------------------------------------------

CHECK_NAMED(pool_arena, "pool: an arena's slots, its mark of what was touched, and its end") {
  Fixture f({.limit_bytes = 16 * kKiB, .block_bytes = 1 * kKiB, .tracks = true});
  void* base = nullptr;
  {
    Arena arena = f.pool->reserve(10 * kKiB + 1, 0, "step");
    base = arena.base();
    check::equal(arena.size_bytes(), 10 * kKiB + 1, "size");
    same(arena.slot(512, 1024), static_cast<char*>(base) + 512, "a slot");
    arena.slot(10 * kKiB, 1);
    arena.slot(10 * kKiB + 1, 0);
    check::refuses([&] { arena.slot(10 * kKiB, 2); }, {"Arena::slot", "10241 bytes", "2 bytes at offset 10240"});
    check::refuses([&] { arena.slot(-1, 2); }, {"offset -1"});
    check::refuses([&] { arena.slot(1, -2); }, {"-2 bytes"});
    check::refuses([&] { arena.slot(kUnlimited, kUnlimited); }, {"offset"});
    check::refuses([&] { arena.touch(10 * kKiB, 2); }, {"Arena::touch"});
    check::equal(arena.touched_bytes(), 0, "mark before");
    arena.touch(1024, 512);
    arena.touch(0, 512);
    arena.touch(4096, 0);
    check::equal(arena.touched_bytes(), 1536, "mark");
    arena.reset_touched();
    arena.touch(0, 100);
    check::equal(arena.touched_bytes(), 100, "mark after a reset");

    PoolStatistics statistics = f.pool->statistics();
    check::equal(statistics.planned.current_bytes, 10 * kKiB + 512, "planned bytes");
    check::equal(statistics.planned.current_count, 1, "arenas");
    check::equal(statistics.dynamic.current_bytes, 0, "dynamic bytes");
    void* const beside = f.pool->allocate(5 * kKiB);
    check::refuses([&] { f.pool->allocate(kKiB); }, {"planned", "10752"});
    f.pool->free(beside);
    check::require(f.pool->outstanding() == std::vector<PoolAllocation>{{reinterpret_cast<uintptr_t>(base),
                                                                         10 * kKiB + 1, true, 0, 0, "step"}},
                   "what is in use");

    Arena moved = std::move(arena);
    check::require(arena.is_released() && !moved.is_released(), "a moved arena is in two places");
    check::equal(moved.touched_bytes(), 100, "mark of a moved arena");
    check::refuses([&] { arena.slot(0, 1); }, {"released"});
    arena = std::move(moved);
    same(arena.base(), base, "an arena moved back");
  }
  check::equal(f.pool->statistics().planned.current_bytes, 0, "planned bytes after the end");
  Arena again = f.pool->reserve(10 * kKiB);
  same(again.base(), base, "the region of the first arena");
  again.release();
  again.release();
  check::refuses([&] { again.base(); }, {"released"});
  // An assignment ends what was there.
  again = f.pool->reserve(kKiB);
  again = f.pool->reserve(2 * kKiB);
  check::equal(f.pool->statistics().planned.current_bytes, 2 * kKiB, "planned bytes after an assignment");
}

CHECK_NAMED(pool_arena_streams, "pool: an arena ends on its stream") {
  StreamFixture f({.limit_bytes = 1 * kKiB, .block_bytes = 1 * kKiB});
  bool used = false;
  {
    const Arena arena = f.pool->reserve(kKiB, f.other);
    check::equal(arena.stream(), f.other, "stream");
    f.streams->put(f.other, [&] { used = true; });
  }
  f.pool->allocate(kKiB, 0);
  f.streams->put(0, [&] { check::require(used, "the arena is reused while its stream uses it"); });
  check::require(!f.streams->step(0), "no wait for the arena's stream");
  f.streams->finish(0);
}

CHECK_NAMED(pool_arena_outlives, "pool: an arena keeps its pool alive") {
  const auto upstream = std::make_shared<TestUpstream>(std::make_shared<HostUpstream>());
  {
    auto pool = MemoryPool::create(upstream);
    const Arena arena = pool->reserve(kKiB);
    pool.reset();
    std::memset(arena.base(), 1, kKiB);
    check::equal(upstream->counts().frees, 0, "blocks given back");
  }
  check::equal(upstream->counts().held_bytes, 0, "bytes of the upstream");
}

// --- Failures --------------------------------------------------------------------------------------------------------

CHECK_NAMED(pool_upstream_fails,
            "pool: an upstream that fails at the n-th call, for every n: nothing leaks, all goes on") {
  const auto work = [](MemoryPool& pool, int64_t other, int64_t& failures) {
    std::vector<std::pair<void*, int64_t>> held;
    std::vector<Arena> arenas;
    const std::vector<int64_t> sizes = {1, 5, 2, 9, 3, 7, 30, 1, 12, 4};
    for (size_t index = 0; index < sizes.size(); ++index) {
      const int64_t stream = index % 2 == 0 ? 0 : other;
      try {
        if (index % 5 == 3) {
          arenas.push_back(pool.reserve(sizes[index] * kKiB, stream));
        } else {
          held.emplace_back(pool.allocate(sizes[index] * kKiB, stream), stream);
          std::memset(held.back().first, 1, static_cast<size_t>(sizes[index] * kKiB));
        }
      } catch (const OutOfMemory& error) {
        check::require(std::string(error.what()).find("fails as told") != std::string::npos, "the upstream's text");
        ++failures;
      }
      pool.verify();
      if (index % 3 == 2 && !held.empty()) {
        pool.free(held.back().first, held.back().second);
        held.pop_back();
      }
    }
    for (const auto& [pointer, stream] : held) pool.free(pointer, stream);
  };
  int64_t calls = 1000000;
  int64_t seen = 0;
  for (int64_t n = 0; n <= calls; ++n) {
    StreamFixture f({.limit_bytes = 128 * kKiB, .block_bytes = 2 * kKiB}, {.fail_at = n, .fail_count = 3});
    int64_t failures = 0;
    work(*f.pool, f.other, failures);
    seen += failures;
    if (n == 0) calls = f.upstream->counts().allocations;
    check::equal(f.pool->statistics().all.current_bytes, 0, "bytes in use after all was freed");
    check::equal(f.pool->statistics().upstream_bytes, f.upstream->counts().held_bytes, "bytes held");
    failures = 0;
    f.upstream->set_faults({});
    work(*f.pool, f.other, failures);
    check::equal(failures, 0, "failures after the upstream has recovered");
    f.pool->trim(true);
    check::equal(f.upstream->counts().held_bytes, 0, "bytes of the upstream after trimming");
  }
  check::require(calls >= 5 && seen >= calls, "hardly anything failed");
}

CHECK_NAMED(pool_upstream_small,
            "pool: an upstream that cannot give a block gives the size alone, or takes idle blocks back") {
  Fixture f({.block_bytes = 64 * kKiB}, {.capacity_bytes = 10 * kKiB});
  void* const one = f.pool->allocate(4 * kKiB);
  check::equal(f.upstream->counts().held_bytes, 4 * kKiB, "bytes of the upstream");
  f.pool->free(one);
  void* const two = f.pool->allocate(8 * kKiB);
  check::equal(f.upstream->counts().held_bytes, 8 * kKiB, "bytes of the upstream after the idle block had to go");
  f.pool->free(two);
}

CHECK_NAMED(pool_upstream_wrong, "pool: an upstream that returns null, odd or overlapping memory counts as failing") {
  const auto memory = std::make_unique<char[]>(16 * kKiB);
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(memory.get()) + 511) / 512 * 512;
  uintptr_t next = 0;
  int64_t freed = 0;
  const auto upstream =
      std::make_shared<CallbackUpstream>([&](int64_t, int64_t) { return next; }, [&](uintptr_t, int64_t) { ++freed; });
  {
    const auto pool = MemoryPool::create(upstream, {.block_bytes = 512});
    check::refuses([&] { pool->allocate(512); }, {"null"});
    check::equal(freed, 0, "frees of null");
    next = aligned + 8;
    check::refuses([&] { pool->allocate(512); }, {"alignment", "512"});
    check::equal(freed, 1, "odd memory given back");
    next = aligned;
    pool->allocate(2048);
    for (const int64_t offset : {0, 512, 1536}) {
      next = aligned + static_cast<uintptr_t>(offset);
      check::refuses([&] { pool->allocate(512); }, {"holds already"});
    }
    check::equal(freed, 1, "frees");
    next = aligned + 2048;
    pool->allocate(512);
    check::equal(pool->statistics().upstream_bytes, 2560, "bytes held");
    check::equal(pool->statistics().upstream_failures, 5, "failures");
    pool->verify();
  }
  check::equal(freed, 3, "blocks given back at the end");
}

CHECK_NAMED(pool_upstream_free_fails,
            "pool: an upstream that fails to take a block back: the rest still goes, no end throws") {
  Fixture f({.block_bytes = 1 * kKiB}, {.fail_free_at = 1});
  std::vector<void*> parts;
  for (int index = 0; index < 3; ++index) parts.push_back(f.pool->allocate(kKiB));
  for (void* const part : parts) f.pool->free(part);
  check::refuses([&] { f.pool->trim(); }, {"a free fails as told"});
  check::equal(f.upstream->counts().held_bytes, 0, "bytes of the upstream");
  check::equal(f.pool->statistics().upstream_bytes, 0, "bytes held");
  f.pool->allocate(kKiB);
  f.upstream->set_faults({.fail_free_at = 4});
  f.pool.reset();
  check::equal(f.upstream->counts().frees, 4, "frees");
}

CHECK_NAMED(pool_failure_callback, "pool: the failure callback frees and tries again, a bounded number of times") {
  Fixture f({.limit_bytes = 4 * kKiB, .block_bytes = 4 * kKiB, .max_retries = 3});
  std::vector<void*> cached;
  for (int index = 0; index < 4; ++index) cached.push_back(f.pool->allocate(kKiB));
  std::vector<int64_t> needed;
  int64_t calls = 0;
  f.pool->set_failure_callback([&](int64_t bytes) {
    needed.push_back(bytes);
    ++calls;
    if (cached.empty()) return false;
    f.pool->free(cached.back());  // the pool can be used in here
    cached.pop_back();
    f.pool->free(f.pool->allocate(512));
    check::equal(f.pool->statistics().failure_calls, calls, "calls as counted");
    return true;
  });
  void* const two = f.pool->allocate(2 * kKiB - 100);
  check::require(needed == std::vector<int64_t>{2 * kKiB, 2 * kKiB}, "called with the size that is missing, twice");
  f.pool->free(two);
  needed.clear();
  check::refuses([&] { f.pool->allocate(5 * kKiB); }, {"failure callback was called 3 times"});
  check::equal(cached.size(), 0, "what the callback had left");
  needed.clear();
  check::refuses([&] { f.pool->allocate(5 * kKiB); }, {"failure callback was called 1 times"});
  check::equal(needed.size(), 1, "calls after it gave up");

  f.pool->set_failure_callback([&](int64_t) { return true; });
  check::refuses([&] { f.pool->allocate(5 * kKiB); }, {"failure callback was called 3 times"});
  f.pool->set_failure_callback([](int64_t) -> bool { throw std::runtime_error("from inside"); });
  check::refuses([&] { f.pool->allocate(5 * kKiB); }, {"from inside"});
  f.pool->set_failure_callback({});
  check::refuses([&] { f.pool->allocate(5 * kKiB); }, {"limit"});
  f.pool->free(f.pool->allocate(4 * kKiB));
  f.pool->verify();
}

CHECK_NAMED(pool_leaks, "pool: what was never freed is reported with its tag, at request and at the end") {
  std::vector<PoolAllocation> reported;
  int64_t calls = 0;
  const auto run = [&](bool tracks, bool leaks) {
    Fixture f({.block_bytes = 1 * kKiB, .tracks = tracks});
    reported.clear();
    calls = 0;
    f.pool->set_leak_callback([&](const std::vector<PoolAllocation>& leaked) {
      ++calls;
      reported = leaked;
      throw std::runtime_error("swallowed");
    });
    void* const one = f.pool->allocate(100, 0, "one");
    void* const two = f.pool->allocate(2000, 0, "two");
    void* const three = f.pool->allocate(300, 0, "three");
    f.pool->free(two);
    if (!leaks) f.pool->free(one);
    const std::string report = leak_report(f.pool->outstanding());
    check::require((report.find("\"one\"") != std::string::npos) == (tracks && leaks),
                   "the tag of the leak:\n" + report);
    check::require(report.find("two") == std::string::npos, "what was freed is reported:\n" + report);
    check::require(report.find(leaks ? "2 not freed, 400 bytes" : "1 not freed, 300 bytes") != std::string::npos,
                   report);
    if (!leaks) f.pool->free(three);
    f.pool.reset();
    check::equal(f.upstream->counts().held_bytes, 0, "bytes of the upstream after the end");
  };
  run(true, true);
  check::equal(calls, 1, "calls");
  check::equal(reported.size(), 2, "leaks");
  check::equal(reported[1].size_bytes, 300, "size");
  check::equal(reported[1].number, 2, "number");
  check::require(reported[0].tag == "one" && !reported[0].is_planned, "the leak itself");
  run(true, false);
  check::equal(calls, 0, "calls without a leak");
  run(false, true);
  check::equal(calls, 0, "calls without tracking");
}

CHECK_NAMED(pool_event_fails,
            "pool: an event that fails leaves the pool as it was, an arena that cannot end stays in use") {
  struct Failing : StreamEvents {
    struct Event : StreamEvent {
      explicit Event(Failing& owner) : owner(owner), event(owner.events->make()) {}
      void record(int64_t stream) override { owner.count(), event->record(stream); }
      bool query() override { return event->query(); }
      void wait(int64_t stream) override { owner.count(), event->wait(stream); }
      void synchronize() override { event->synchronize(); }
      Failing& owner;
      std::unique_ptr<StreamEvent> event;
    };
    std::unique_ptr<StreamEvent> make() override { return std::make_unique<Event>(*this); }
    void count() {
      if (fails) throw std::runtime_error("no event");
    }
    std::shared_ptr<HostStreams> events = std::make_shared<HostStreams>(HostStreams::Mode::kStepped);
    bool fails = false;
  };
  const auto events = std::make_shared<Failing>();
  const int64_t other = events->events->create();
  Fixture f({.limit_bytes = 4 * kKiB, .block_bytes = 4 * kKiB, .events = events});
  f.pool->add_stream(other);
  void* const one = f.pool->allocate(kKiB, 0);
  void* const two = f.pool->allocate(2 * kKiB, 0);
  f.pool->free(two, 0);
  PoolStatistics before = f.pool->statistics();
  events->fails = true;
  check::refuses([&] { f.pool->free(one, 0); }, {"no event"});
  check::refuses([&] { f.pool->free(one, other); }, {"no event"});
  check::refuses([&] { f.pool->allocate(3 * kKiB, other); }, {"no event"});
  check::require(f.pool->statistics() == before, "a failed event has changed something");
  f.pool->verify();
  events->fails = false;
  f.pool->free(one, 0);
  {
    const Arena arena = f.pool->reserve(kKiB, 0);
    events->fails = true;
  }
  check::equal(f.pool->statistics().planned.current_bytes, kKiB, "planned bytes: the arena could not end");
  events->fails = false;
  f.pool->allocate(3 * kKiB, other);
  check::equal(f.pool->outstanding().size(), 2, "in use");
  f.pool->verify();
  events->fails = true;  // and the end of the pool does not throw
}

CHECK_NAMED(pool_upstream_reenters, "pool: an upstream may use the pool while it is asked") {
  std::shared_ptr<MemoryPool> pool;
  HostUpstream host;
  void* cached = nullptr;
  const auto upstream = std::make_shared<CallbackUpstream>(
      [&](int64_t size_bytes, int64_t alignment_bytes) {
        pool->free(std::exchange(cached, nullptr));  // as a garbage collector may
        check::refuses([&] { pool->allocate(3 * kKiB); }, {"limit"});
        return reinterpret_cast<uintptr_t>(host.allocate(size_bytes, alignment_bytes));
      },
      [&](uintptr_t block, int64_t size_bytes) {
        if (pool != nullptr) pool->statistics();
        host.free(reinterpret_cast<void*>(block), size_bytes);
      });
  pool = MemoryPool::create(upstream, {.limit_bytes = 4 * kKiB, .block_bytes = 2 * kKiB});
  cached = pool->allocate(2 * kKiB);
  void* const one = pool->allocate(2 * kKiB);
  check::require(cached == nullptr, "the upstream was not asked");
  pool->free(one);
  pool->trim();
  pool->verify();
  pool.reset();
}
