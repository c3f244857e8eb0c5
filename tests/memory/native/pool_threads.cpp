// The pool from many threads, and under streams that are threads: meant to run under ThreadSanitizer too. What threads
// do differs from run to run; what is checked does not.
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <latch>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "memory/pool.h"
#include "memory/pool/host_streams.h"
#include "memory/upstream.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

constexpr int64_t kKiB = 1024;

// Runs the body in every thread at once and throws the first error of any.
void in_threads(int count, const std::function<void(int)>& body) {
  std::latch start(count);
  std::mutex mutex;
  std::exception_ptr error;
  std::vector<std::thread> threads;
  for (int index = 0; index < count; ++index) {
    threads.emplace_back([&, index] {
      start.arrive_and_wait();
      try {
        body(index);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (error == nullptr) error = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (error != nullptr) std::rethrow_exception(error);
}

void fill(void* memory, int64_t size_bytes, int value) {
  std::memset(memory, value, static_cast<size_t>(size_bytes));
}

void expect_filled(const void* memory, int64_t size_bytes, int value) {
  const auto* const bytes = static_cast<const unsigned char*>(memory);
  for (int64_t at = 0; at < size_bytes; ++at) {
    if (bytes[at] != (value & 255)) throw std::runtime_error("somebody's memory was overwritten");
  }
}

void expect_empty(MemoryPool& pool, TestUpstream& upstream) {
  pool.verify();
  const PoolStatistics statistics = pool.statistics();
  check::equal(statistics.all.current_bytes, 0, "bytes in use");
  check::equal(statistics.upstream_bytes, upstream.counts().held_bytes, "bytes held");
  check::require(upstream.counts().peak_bytes <= statistics.limit_bytes, "the limit was exceeded");
  pool.trim(true);
  check::equal(upstream.counts().held_bytes, 0, "bytes of the upstream after trimming");
}

}  // namespace

CHECK_NAMED(pool_exhausted_by_threads, "pool: many threads exhaust it, each keeps what it has, and all comes back") {
  const auto upstream = std::make_shared<TestUpstream>(std::make_shared<HostUpstream>());
  const auto pool = MemoryPool::create(upstream, {.limit_bytes = 64 * kKiB, .block_bytes = 4 * kKiB});
  std::atomic<int64_t> refused = 0;
  in_threads(8, [&](int index) {
    std::mt19937 random(static_cast<uint32_t>(index));
    for (int round = 0; round < 20; ++round) {
      std::vector<std::pair<void*, int64_t>> held;
      try {
        for (;;) {
          const int64_t size = 1 + random() % (8 * kKiB);
          held.emplace_back(pool->allocate(size), size);
          fill(held.back().first, size, index + 1);
        }
      } catch (const OutOfMemory&) {
        ++refused;
      }
      for (const auto& [memory, size] : held) {
        expect_filled(memory, size, index + 1);
        pool->free(memory);
      }
    }
  });
  check::equal(refused.load(), 160, "refusals");
  check::equal(pool->statistics().refused, 160, "refusals as counted");
  expect_empty(*pool, *upstream);
}

CHECK_NAMED(pool_threads_and_faults,
            "pool: threads, an upstream that fails and is slow, trimming, arenas, a callback") {
  const auto upstream = std::make_shared<TestUpstream>(std::make_shared<HostUpstream>());
  const auto pool = MemoryPool::create(
      upstream, {.limit_bytes = 256 * kKiB, .block_bytes = 8 * kKiB, .tracks = true, .max_retries = 2});
  std::atomic<int64_t> calls = 0;
  pool->set_failure_callback([&](int64_t) {
    pool->trim();
    return ++calls % 2 == 0;
  });
  in_threads(6, [&](int index) {
    std::mt19937 random(static_cast<uint32_t>(100 + index));
    std::vector<std::pair<void*, int64_t>> held;
    for (int round = 0; round < 300; ++round) {
      try {
        if (round % 10 == index) {
          upstream->set_faults({.fail_at = upstream->counts().allocations + 1,
                                .fail_count = 3,
                                .delay = std::chrono::microseconds(random() % 100)});
        }
        if (round % 16 == 5) {
          Arena arena = pool->reserve(1 + random() % (64 * kKiB), 0, "arena");
          fill(arena.base(), arena.size_bytes(), index + 1);
          arena.touch(0, arena.size_bytes());
          expect_filled(arena.slot(0, arena.size_bytes()), arena.size_bytes(), index + 1);
        } else if (held.empty() || random() % 2 == 0) {
          const int64_t size = 1 + random() % (32 * kKiB);
          held.emplace_back(pool->allocate(size, 0, "thread"), size);
          fill(held.back().first, size, index + 1);
        } else {
          expect_filled(held.back().first, held.back().second, index + 1);
          pool->free(held.back().first);
          held.pop_back();
        }
      } catch (const OutOfMemory&) {
      }
      if (round % 32 == 7) pool->trim();
      if (round % 32 == 9) check::require(pool->statistics().upstream_bytes <= 256 * kKiB, "the limit is exceeded");
      if (round % 32 == 11) leak_report(pool->outstanding());
    }
    for (const auto& [memory, size] : held) pool->free(memory);
  });
  upstream->set_faults({});
  check::require(upstream->counts().failures > 0, "the upstream never failed");
  expect_empty(*pool, *upstream);
}

CHECK_NAMED(pool_threaded_streams,
            "pool: streams that are threads write what they were given, and never each other's") {
  // The writes themselves are what ThreadSanitizer watches: without the pool's events they race.
  const auto streams = std::make_shared<HostStreams>(HostStreams::Mode::kThreaded);
  const auto upstream = std::make_shared<TestUpstream>(std::make_shared<HostUpstream>());
  std::vector<int64_t> handles;
  std::atomic<int64_t> wrong = 0;
  {
    const auto pool =
        MemoryPool::create(upstream, {.limit_bytes = 32 * kKiB, .block_bytes = 8 * kKiB, .events = streams});
    for (int index = 0; index < 4; ++index) {
      handles.push_back(streams->create());
      pool->add_stream(handles.back());
    }
    std::atomic<int64_t> given = 0;
    in_threads(4, [&](int index) {
      const int64_t stream = handles[static_cast<size_t>(index)];
      std::mt19937 random(static_cast<uint32_t>(200 + index));
      for (int round = 0; round < 300; ++round) {
        const int64_t size = 1 + random() % (6 * kKiB);
        void* memory = nullptr;
        try {
          memory = pool->allocate(size, stream);
        } catch (const OutOfMemory&) {
          continue;
        }
        ++given;
        const int value = index * 60 + round % 50 + 1;
        streams->put(stream, [=] { fill(memory, size, value); });
        streams->put(stream, [=, &wrong] {
          const auto* const bytes = static_cast<const unsigned char*>(memory);
          for (int64_t at = 0; at < size; ++at) wrong += bytes[at] == value ? 0 : 1;
        });
        // Sometimes another stream frees it; the pool orders that.
        pool->free(memory, random() % 4 == 0 ? handles[random() % 4] : stream);
        if (round % 64 == 63) pool->trim(true);
      }
    });
    check::require(given.load() > 600, "hardly anything was given");
    check::require(pool->statistics().stream_waits > 0, "no stream ever had to wait");
    expect_empty(*pool, *upstream);
  }
  for (const int64_t stream : handles) streams->finish(stream);
  check::equal(wrong.load(), 0, "bytes that another stream has overwritten");
}

CHECK_NAMED(pool_end_waits, "pool: its end waits for the streams before the memory goes back") {
  const auto streams = std::make_shared<HostStreams>(HostStreams::Mode::kThreaded);
  const auto upstream = std::make_shared<TestUpstream>(std::make_shared<HostUpstream>());
  for (int round = 0; round < 50; ++round) {
    const auto pool = MemoryPool::create(upstream, {.block_bytes = 1, .events = streams});
    void* const memory = pool->allocate(4 * kKiB);
    streams->put(0, [=] { fill(memory, 4 * kKiB, 1); });  // a use after free, if the end does not wait
    pool->free(memory);
  }
  check::equal(upstream->counts().held_bytes, 0, "bytes of the upstream");
}

CHECK_NAMED(pool_waits_for_growth,
            "pool: whoever would be refused waits for another thread's growth that may yet fail") {
  // The first thread is inside the upstream with all that the limit leaves; its call fails. The second, which came
  // meanwhile, must get the room instead of an error.
  std::latch inside(1), open(1);
  HostUpstream host;
  std::atomic<int> call = 0;
  const auto upstream = std::make_shared<CallbackUpstream>(
      [&](int64_t size_bytes, int64_t alignment_bytes) {
        if (++call == 1) {
          inside.count_down();
          open.wait();
          throw UpstreamFailure("the first call fails");
        }
        return reinterpret_cast<uintptr_t>(host.allocate(size_bytes, alignment_bytes));
      },
      [&](uintptr_t block, int64_t size_bytes) { host.free(reinterpret_cast<void*>(block), size_bytes); });
  const auto pool = MemoryPool::create(upstream, {.limit_bytes = 4 * kKiB, .block_bytes = 4 * kKiB});
  std::thread first([&] { check::refuses([&] { pool->reserve(4 * kKiB); }, {"the first call fails"}); });
  inside.wait();
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));  // time for a wrong pool to refuse; a right one waits
    open.count_down();
  });
  std::string error;
  try {
    pool->free(pool->allocate(2 * kKiB));
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  opener.join();
  first.join();
  check::require(error.empty(), "the second thread was refused: " + error);
  pool->verify();
}

CHECK_NAMED(pool_touch_from_threads, "pool: the mark of an arena is the highest end that any thread touched") {
  const auto pool = MemoryPool::create(std::make_shared<HostUpstream>());
  Arena arena = pool->reserve(1000000);
  in_threads(4, [&](int index) {
    for (int64_t at = index; at < 200000; at += 4) arena.touch(at, 1);
  });
  check::equal(arena.touched_bytes(), 200000, "mark");
}
