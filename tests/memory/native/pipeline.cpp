// Checks of the copy pipeline by itself: back-pressure, failures, aborting, debugging aids, refusals.
#include "memory/copy_pipeline.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "memory/errors.h"
#include "memory/native/pipeline_plans.h"
#include "memory/pipeline/plan_runner.h"
#include "memory/pipeline/threaded_streams.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

// Holds up the stream it is enqueued on until it is opened; opened at the latest when it dies.
class Gate {
 public:
  ~Gate() { open(); }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    opened_.notify_all();
  }
  void pass() {
    std::unique_lock lock(mutex_);
    opened_.wait(lock, [this] { return open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  bool open_ = false;
};

// Counts the chunks of each stream that are enqueued and not done, and tells when the pipeline does something.
class CountingStreams final : public StreamBackend {
 public:
  explicit CountingStreams(ThreadedStreams& streams) : streams_(streams) {}
  void copy(StreamId stream, void* destination, const void* source, int64_t size_bytes) override {
    count(stream);
    streams_.copy(stream, destination, source, size_bytes);
    uncount(stream);
  }
  void compress(StreamId stream, void* buffer, const void* source, const CompressedSlots& slots,
                LinkCount* counted) override {
    count(stream);
    streams_.compress(stream, buffer, source, slots, counted);
    uncount(stream);
  }
  void decompress(StreamId stream, void* destination, const void* buffer, const CompressedSlots& slots) override {
    count(stream);
    streams_.decompress(stream, destination, buffer, slots);
    uncount(stream);
  }
  void fill(StreamId stream, void* destination, unsigned char value, int64_t size_bytes) override {
    streams_.fill(stream, destination, value, size_bytes);
  }
  void checksum(StreamId stream, const void* source, int64_t size_bytes, std::atomic<uint64_t>* result) override {
    streams_.checksum(stream, source, size_bytes, result);
  }
  void call(StreamId stream, std::function<void()> function) override { streams_.call(stream, std::move(function)); }
  EventId create_event() override {
    if (events_until_failure > 0 && --events_until_failure == 0) throw StreamFailed("no more events");
    return streams_.create_event();
  }
  void destroy_event(EventId event) noexcept override { streams_.destroy_event(event); }
  void record(EventId event, StreamId stream) override {
    streams_.record(event, stream);
    if (stream == StreamId::kCompute && on_compute_record) on_compute_record();
  }
  void wait(StreamId stream, EventId event) override {
    streams_.wait(stream, event);
    if (stream == StreamId::kCompute && on_compute_wait) on_compute_wait();
  }
  bool query(EventId event) override { return streams_.query(event); }
  void synchronize(EventId event) override {
    if (on_synchronize) on_synchronize();
    streams_.synchronize(event);
  }
  void require_ok(StreamId stream) override { streams_.require_ok(stream); }
  void drain() noexcept override {
    ++drains;
    streams_.drain();
  }
  void reset() noexcept override { streams_.reset(); }

  std::atomic<int32_t> most_waiting = 0;
  std::atomic<int64_t> copies = 0;
  int64_t drains = 0;
  int64_t events_until_failure = 0;
  std::function<void()> on_compute_record;
  std::function<void()> on_compute_wait;
  std::function<void()> on_synchronize;  // also by feeders

 private:
  void count(StreamId stream) {
    ++copies;
    const int32_t now = ++waiting_[static_cast<size_t>(stream)];
    int32_t most = most_waiting.load();
    while (most < now && !most_waiting.compare_exchange_weak(most, now)) {
    }
  }
  void uncount(StreamId stream) {
    streams_.call(stream, [this, stream] { --waiting_[static_cast<size_t>(stream)]; });
  }

  ThreadedStreams& streams_;
  std::array<std::atomic<int32_t>, kStreams> waiting_ = {};
};

// One storage of `bytes` that leaves after instance 0 and is back before instance 3; its device slot is free in
// between. 4 instances; what they do is the check's.
struct RoundTrip {
  explicit RoundTrip(int64_t bytes) : device(static_cast<size_t>(2 * bytes)), host(static_cast<size_t>(bytes)) {
    plan.storages = {{.size_bytes = bytes, .members = {0}}};
    plan.instances.resize(4);
    plan.boundaries.resize(5);
    plan.residencies = {
        {.storage = 0, .pool = Pool::kDevice, .size_bytes = bytes, .begin = 0, .end = 2},
        {.storage = 0, .pool = Pool::kHost, .size_bytes = bytes, .begin = 1, .end = 3},
        {.storage = 0, .pool = Pool::kDevice, .offset_bytes = bytes, .size_bytes = bytes, .begin = 2, .end = 4}};
    plan.copies = {{.kind = CopyKind::kOffload, .source = 0, .destination = 1, .issue = 1, .wait = 2, .after = {}},
                   {.kind = CopyKind::kPrefetch, .source = 1, .destination = 2, .issue = 2, .wait = 3, .after = {}}};
    plan.boundaries[1].issues = {0};
    plan.boundaries[2] = {.waits = {0}, .issues = {1}};
    plan.boundaries[3].waits = {1};
  }
  Arenas arenas() {
    return {.device = device.data(),
            .device_bytes = std::ssize(device),
            .host = host.data(),
            .host_bytes = std::ssize(host)};
  }
  int64_t bytes() const { return plan.storages[0].size_bytes; }
  // Instance 0 writes `value` everywhere, instance 3 counts the bytes that hold it.
  void launch(ThreadedStreams& streams, int32_t instance, unsigned char value) {
    if (instance == 0) streams.fill(StreamId::kCompute, device.data(), value, bytes());
    if (instance == 3)
      streams.call(StreamId::kCompute,
                   [this, value] { counts.push_back(std::count(device.begin() + bytes(), device.end(), value)); });
  }
  void step(CopyPipeline& pipeline, ThreadedStreams& streams, unsigned char value) {
    for (int32_t boundary = 0; boundary < pipeline.boundary_count(); ++boundary) {
      pipeline.at_boundary(boundary);
      launch(streams, boundary, value);
    }
  }

  Plan plan;
  std::vector<unsigned char> device;
  std::vector<unsigned char> host;
  std::vector<int64_t> counts;
};

}  // namespace

CHECK_NAMED(pipeline_threaded_streams, "pipeline: streams on host memory keep their order and follow events") {
  std::vector<int32_t> seen;
  {
    ThreadedStreams streams({.seed = 3, .max_delay_us = 50});
    const EventId ready = streams.create_event();
    check::require(streams.query(ready), "an event that was never recorded holds nobody up");
    streams.wait(StreamId::kPrefetch, ready);
    for (int32_t round = 0; round < 20; ++round) {
      // One stream after the other adds to the same list; only events keep them apart.
      const StreamId from = round % 2 == 0 ? StreamId::kCompute : StreamId::kOffload;
      const StreamId to = round % 2 == 0 ? StreamId::kOffload : StreamId::kCompute;
      streams.call(from, [&seen, round] { seen.push_back(round); });
      streams.record(ready, from);
      streams.wait(to, ready);
    }
    streams.synchronize(ready);
    check::require(streams.query(ready), "a synchronized event has passed");
    check::equal(std::ssize(seen), 20, "calls before the last record");
    streams.destroy_event(ready);
    check::equal(streams.live_events(), 0, "live events");
    streams.call(StreamId::kPrefetch, [&seen] { seen.push_back(20); });
  }
  check::equal(std::ssize(seen), 21, "calls after the destructor");
  check::require(std::ranges::is_sorted(seen), "calls in order");

  ThreadedStreams streams;
  {
    // The latest record counts, whichever passes last.
    const EventId twice = streams.create_event();
    Gate gate;
    streams.call(StreamId::kCompute, [&gate] { gate.pass(); });
    streams.record(twice, StreamId::kCompute);
    check::require(!streams.query(twice), "an event has passed before its stream came there");
    streams.record(twice, StreamId::kPrefetch);
    streams.synchronize(twice);
    gate.open();
    streams.drain();
    check::require(streams.query(twice), "an earlier record has undone a later one");
  }

  check::refuses([] { ThreadedStreams({.max_delay_us = -1}); }, {"max_delay_us", "-1"});
  check::refuses([] { ThreadedStreams({.piece_bytes = 0}); }, {"piece_bytes", "0"});
  check::refuses(
      [] { ThreadedStreams({.priority = std::array{StreamId::kCompute, StreamId::kCompute, StreamId::kOffload}}); },
      {"priority", "compute 2 times"});
  check::refuses([&] { streams.record(7, StreamId::kCompute); }, {"event 7"});
}

CHECK_NAMED(pipeline_streams_fail, "pipeline: a failed stream moves nothing until it is reset") {
  ThreadedStreams streams;
  const std::vector<unsigned char> from(100, 7);
  std::vector<unsigned char> to(100, 0);
  const EventId before = streams.create_event();
  const EventId after = streams.create_event();
  const EventId elsewhere = streams.create_event();
  streams.fail_copy(2);
  streams.copy(StreamId::kOffload, to.data(), from.data(), 10);
  streams.record(before, StreamId::kOffload);
  streams.synchronize(before);
  streams.copy(StreamId::kOffload, to.data() + 10, from.data(), 40);
  streams.record(after, StreamId::kOffload);
  check::refuses([&] { streams.synchronize(after); }, {"injected failure", "40 bytes"});
  check::refuses([&] { streams.query(after); }, {"injected failure"});
  check::refuses([&] { streams.require_ok(StreamId::kOffload); }, {"injected failure"});
  streams.require_ok(StreamId::kPrefetch);
  streams.copy(StreamId::kPrefetch, to.data() + 50, from.data(), 50);
  streams.record(elsewhere, StreamId::kPrefetch);
  streams.synchronize(elsewhere);
  check::equal(std::ranges::count(to, 7), 30, "bytes moved: 10, half of 40, none");
  streams.drain();
  streams.reset();
  streams.copy(StreamId::kOffload, to.data(), from.data(), 100);
  streams.record(after, StreamId::kOffload);
  streams.synchronize(after);
  check::equal(std::ranges::count(to, 7), 100, "bytes moved after the reset");

  streams.call(StreamId::kCompute, [] { throw std::runtime_error("no such kernel"); });
  streams.drain();
  check::refuses([&] { streams.require_ok(StreamId::kCompute); }, {"no such kernel"});
  streams.reset();
  streams.require_ok(StreamId::kCompute);
}

CHECK_NAMED(pipeline_priority, "pipeline: with a priority the less urgent stream moves last") {
  ThreadedStreams streams({.priority = std::array{StreamId::kPrefetch, StreamId::kCompute, StreamId::kOffload}});
  std::string seen;
  const EventId event = streams.create_event();
  streams.call(StreamId::kOffload, [&] { seen += 'o'; });
  streams.record(event, StreamId::kOffload);
  streams.wait(StreamId::kCompute, event);  // compute needs offload first
  streams.call(StreamId::kCompute, [&] { seen += 'c'; });
  streams.call(StreamId::kOffload, [&] { seen += 'o'; });
  streams.call(StreamId::kPrefetch, [&] { seen += 'p'; });
  streams.call(StreamId::kPrefetch, [&] { seen += 'p'; });
  streams.drain();
  check::require(seen == "ppoco", "order of actions: " + seen);
}

CHECK_NAMED(pipeline_back_pressure, "pipeline: chunks in flight are bounded, and compute is launched meanwhile") {
  for (int32_t max_in_flight = 1; max_in_flight <= 4; ++max_in_flight) {
    RoundTrip trip(1000);
    ThreadedStreams streams;
    CountingStreams counting(streams);
    CopyPipeline pipeline(counting, trip.plan, trip.arenas(), {.chunk_bytes = 90, .max_in_flight = max_in_flight});
    Gate gate;
    pipeline.at_boundary(0);
    trip.launch(streams, 0, 1);
    streams.call(StreamId::kCompute, [&gate] { gate.pass(); });
    pipeline.at_boundary(1);  // returns though the offload cannot begin
    trip.launch(streams, 1, 1);
    gate.open();
    for (int32_t boundary = 2; boundary < 5; ++boundary) {
      pipeline.at_boundary(boundary);
      trip.launch(streams, boundary, 1);
    }
    pipeline.synchronize();
    streams.drain();
    check::equal(trip.counts.at(0), 1000, "bytes that came back");
    check::equal(counting.copies.load(), 24, "chunks both ways");
    check::require(
        counting.most_waiting <= max_in_flight,
        "at most " + std::to_string(max_in_flight) + " chunks in flight, got " + std::to_string(counting.most_waiting));
    const CopyStatistics statistics = pipeline.statistics();
    check::equal(statistics.steps, 1, "steps");
    check::equal(statistics.offloads, 1, "offloads");
    check::equal(statistics.offload_chunks, 12, "offload_chunks");
    check::equal(statistics.offloaded_bytes, 1000, "offloaded_bytes");
    check::equal(statistics.prefetches, 1, "prefetches");
    check::equal(statistics.prefetch_chunks, 12, "prefetch_chunks");
    check::equal(statistics.prefetched_bytes, 1000, "prefetched_bytes");
    check::require(statistics.host_wait_us >= 0, "host_wait_us is negative");
  }
}

CHECK_NAMED(pipeline_in_flight_is_used, "pipeline: as many chunks are in flight as allowed") {
  RoundTrip trip(1000);
  ThreadedStreams streams;
  CountingStreams counting(streams);
  CopyPipeline pipeline(counting, trip.plan, trip.arenas(), {.chunk_bytes = 100, .max_in_flight = 3});
  Gate gate;
  pipeline.at_boundary(0);
  streams.call(StreamId::kCompute, [&gate] { gate.pass(); });
  pipeline.at_boundary(1);
  while (counting.copies < 3) std::this_thread::yield();  // ends only if three are enqueued before one is done
  gate.open();
  pipeline.abort();
}

CHECK_NAMED(pipeline_steps, "pipeline: steps follow each other without a wait of the host") {
  RoundTrip trip(500);
  ThreadedStreams streams({.seed = 5, .max_delay_us = 30});
  CopyPipeline pipeline(streams, trip.plan, trip.arenas(),
                        {.chunk_bytes = 64, .max_in_flight = 2, .checksums = true, .poison = true});
  for (unsigned char step = 0; step < 10; ++step) trip.step(pipeline, streams, step);
  pipeline.synchronize();
  streams.drain();
  check::equal(std::ssize(trip.counts), 10, "steps");
  for (const int64_t count : trip.counts) check::equal(count, 500, "bytes that came back");
  check::equal(pipeline.statistics().steps, 10, "steps of the statistics");
}

CHECK_NAMED(pipeline_unwaited, "pipeline: a copy that nobody waits for is done before the next step begins") {
  // The last instance's offload, issued at the end; the next step's first instance overwrites its source.
  Plan plan;
  plan.storages = {{.size_bytes = 400, .members = {0}}};
  plan.instances.resize(1);
  plan.boundaries.resize(2);
  plan.residencies = {{.storage = 0, .pool = Pool::kDevice, .size_bytes = 400, .begin = 0, .end = 2},
                      {.storage = 0, .pool = Pool::kHost, .size_bytes = 400, .begin = 1, .end = 2}};
  plan.copies = {{.kind = CopyKind::kOffload, .source = 0, .destination = 1, .issue = 1, .wait = 1, .after = {}}};
  plan.boundaries[1].issues = {0};
  std::vector<unsigned char> device(400);
  std::vector<unsigned char> host(400);
  ThreadedStreams streams({.priority = std::array{StreamId::kCompute, StreamId::kPrefetch, StreamId::kOffload}});
  CopyPipeline pipeline(streams, plan,
                        {.device = device.data(), .device_bytes = 400, .host = host.data(), .host_bytes = 400},
                        {.max_in_flight = 8});
  std::vector<int64_t> arrived;
  for (unsigned char step = 1; step <= 3; ++step) {
    pipeline.at_boundary(0);
    streams.call(StreamId::kCompute, [&, step] {
      arrived.push_back(std::ranges::count(host, static_cast<unsigned char>(step - 1)));
      std::ranges::fill(device, step);
    });
    pipeline.at_boundary(1);
  }
  pipeline.synchronize();
  for (const int64_t count : arrived) check::equal(count, 400, "bytes of the step before");
  check::equal(std::ranges::count(host, 3), 400, "bytes of the last step");
}

CHECK_NAMED(pipeline_failures, "pipeline: every copy that fails is named, and the next step is as ever") {
  const Graph graph = pipeline_plans::random_graph(4);
  const Plan plan = pipeline_plans::random_plan(graph, 4);
  const StorageValues initial = initial_values(graph, 4);
  const StorageValues expected = run_graph(graph, initial, hash_operations());
  ThreadedStreams streams;
  PlanRunner runner(streams, graph, plan, {.chunk_bytes = 50, .max_in_flight = 2, .checksums = true});
  check::require(first_difference(graph, expected, runner.run(initial, hash_operations())).empty(), "results");
  const CopyStatistics statistics = runner.pipeline().statistics();
  const int64_t chunks = statistics.offload_chunks + statistics.prefetch_chunks;
  check::require(chunks >= 8 && plan.copies.size() >= 4, "the plan has " + std::to_string(chunks) + " chunks");
  for (int64_t failing = 1; failing <= chunks; ++failing) {
    streams.fail_copy(failing);
    try {
      runner.run(initial, hash_operations());
      check::require(false, "nothing was thrown for chunk " + std::to_string(failing));
    } catch (const CopyFailed& error) {
      const Copy& copy = plan.copies.at(static_cast<size_t>(error.copy));
      const std::string text = error.what();
      check::equal(error.storage, copy.storage, "storage");
      check::require(error.kind == copy.kind, "direction");
      check::equal(error.size_bytes, plan.storages[static_cast<size_t>(copy.storage)].size_bytes, "size_bytes");
      for (const std::string& part : {std::string(copy.kind == CopyKind::kOffload ? "offload" : "prefetch"),
                                      "storage " + std::to_string(copy.storage), "copy " + std::to_string(error.copy),
                                      std::to_string(error.size_bytes) + " bytes", std::string("injected failure")})
        check::require(text.find(part) != std::string::npos, "\"" + text + "\" lacks \"" + part + "\"");
    }
    check::require(first_difference(graph, expected, runner.run(initial, hash_operations())).empty(),
                   "results after chunk " + std::to_string(failing) + " had failed");
  }
}

CHECK_NAMED(pipeline_compute_fails, "pipeline: a failing operation is named, and the next step is as ever") {
  const Graph graph = pipeline_plans::random_graph(6);
  const Plan plan = pipeline_plans::random_plan(graph, 6);
  const StorageValues initial = initial_values(graph, 6);
  const StorageValues expected = run_graph(graph, initial, hash_operations());
  ThreadedStreams streams({.seed = 6, .max_delay_us = 10});
  PlanRunner runner(streams, graph, plan, {.chunk_bytes = 64, .max_in_flight = 1, .checksums = true, .poison = true});
  for (size_t failing = 0; failing < plan.instances.size(); ++failing) {
    size_t calls = 0;
    OperationFunction hashes = hash_operations();
    const OperationFunction fails = [&](const Graph& of, const OperationCall& call) {
      if (calls++ == failing) throw std::runtime_error("out of luck");
      hashes(of, call);
    };
    const std::string& name = graph.operations[static_cast<size_t>(plan.instances[failing].operation)].name;
    check::refuses([&] { runner.run(initial, fails); }, {"instance " + std::to_string(failing), name, "out of luck"});
    check::equal(calls, failing + 1, "calls");
    check::require(first_difference(graph, expected, runner.run(initial, hash_operations())).empty(),
                   "results after operation " + name + " had failed");
  }
}

CHECK_NAMED(pipeline_compute_failure_is_seen, "pipeline: a failure of the compute stream ends the step at once") {
  RoundTrip trip(100);
  ThreadedStreams streams;
  CopyPipeline pipeline(streams, trip.plan, trip.arenas());
  pipeline.at_boundary(0);
  streams.call(StreamId::kCompute, [] { throw std::runtime_error("out of luck"); });
  streams.drain();
  check::refuses([&] { pipeline.at_boundary(1); }, {"out of luck"});
  trip.step(pipeline, streams, 6);
  pipeline.synchronize();
  streams.drain();
  check::equal(trip.counts.at(0), 100, "bytes that came back in the next step");
  streams.call(StreamId::kCompute, [] { throw std::runtime_error("out of luck again"); });
  streams.drain();
  check::refuses([&] { pipeline.synchronize(); }, {"out of luck again"});
}

CHECK_NAMED(pipeline_checksums, "pipeline: a storage that comes back changed is named") {
  for (const int32_t corrupted : {0, 499, 3}) {
    RoundTrip trip(500);
    ThreadedStreams streams;
    CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.chunk_bytes = 100, .checksums = true});
    trip.step(pipeline, streams, 9);
    pipeline.synchronize();
    streams.drain();
    pipeline.at_boundary(0);
    trip.launch(streams, 0, 9);
    pipeline.at_boundary(1);
    pipeline.synchronize();  // it has left
    trip.host[static_cast<size_t>(corrupted)] ^= 1;
    check::refuses(
        [&] {
          pipeline.at_boundary(2);
          pipeline.at_boundary(3);
          pipeline.at_boundary(4);
          pipeline.synchronize();
        },
        {"prefetch of storage 0", "500 bytes", "not those that copy 0 read"});
    trip.step(pipeline, streams, 8);
    pipeline.synchronize();
    streams.drain();
    check::equal(trip.counts.back(), 500, "bytes that came back in the next step");
  }
}

CHECK_NAMED(pipeline_failure_of_an_earlier_copy, "pipeline: a chunk that fails while the next copy is fed is named") {
  // Two storages leave at boundary 1, the first in one chunk.
  Plan plan;
  plan.storages = {{.size_bytes = 10, .members = {0}}, {.size_bytes = 90, .members = {1}}};
  plan.instances.resize(2);
  plan.boundaries.resize(3);
  plan.residencies = {{.storage = 0, .pool = Pool::kDevice, .size_bytes = 10, .begin = 0, .end = 2},
                      {.storage = 0, .pool = Pool::kHost, .size_bytes = 10, .begin = 1, .end = 2},
                      {.storage = 1, .pool = Pool::kDevice, .offset_bytes = 10, .size_bytes = 90, .begin = 0, .end = 2},
                      {.storage = 1, .pool = Pool::kHost, .offset_bytes = 10, .size_bytes = 90, .begin = 1, .end = 2}};
  plan.copies = {
      {.kind = CopyKind::kOffload, .storage = 0, .source = 0, .destination = 1, .issue = 1, .wait = 2, .after = {}},
      {.kind = CopyKind::kOffload, .storage = 1, .source = 2, .destination = 3, .issue = 1, .wait = 2, .after = {}}};
  plan.boundaries[1].issues = {0, 1};
  plan.boundaries[2].waits = {0, 1};
  std::vector<unsigned char> device(100);
  std::vector<unsigned char> host(100);
  ThreadedStreams streams;
  CountingStreams counting(streams);
  Gate gate;
  CopyPipeline pipeline(counting, plan,
                        {.device = device.data(), .device_bytes = 100, .host = host.data(), .host_bytes = 100},
                        {.chunk_bytes = 10, .max_in_flight = 1});
  pipeline.at_boundary(0);
  streams.call(StreamId::kCompute, [&gate] { gate.pass(); });
  pipeline.at_boundary(1);
  streams.fail_copy(1);
  counting.on_compute_wait = [&gate] { gate.open(); };  // the calling thread has looked for failures, in vain
  try {
    pipeline.at_boundary(2);
    check::require(false, "nothing was thrown");
  } catch (const CopyFailed& error) {
    check::equal(error.copy, 0, "failed copy");
  }
}

CHECK_NAMED(pipeline_failure_of_the_last_step, "pipeline: what went wrong is seen before the copy is issued again") {
  // As a round trip, but the prefetch is issued one instance later: instance 2 spoils the host's bytes.
  RoundTrip trip(100);
  trip.plan.instances.resize(5);
  trip.plan.boundaries.resize(6);
  trip.plan.boundaries[2].issues.clear();
  trip.plan.boundaries[3] = {.waits = {}, .issues = {1}};
  trip.plan.boundaries[4].waits = {1};
  trip.plan.copies[1].issue = 3;
  trip.plan.copies[1].wait = 4;
  trip.plan.residencies[1].end = 4;
  trip.plan.residencies[2] = {
      .storage = 0, .pool = Pool::kDevice, .offset_bytes = 100, .size_bytes = 100, .begin = 3, .end = 5};
  ThreadedStreams streams;
  CountingStreams counting(streams);
  Gate gate;
  CopyPipeline pipeline(counting, trip.plan, trip.arenas(), {.checksums = true});
  for (int32_t boundary = 0; boundary < 6; ++boundary) {
    // The prefetch does not come through before the next step wants to issue it.
    if (boundary == 3) streams.call(StreamId::kPrefetch, [&gate] { gate.pass(); });
    pipeline.at_boundary(boundary);
    if (boundary == 2) streams.call(StreamId::kCompute, [&trip] { trip.host[50] ^= 1; });
  }
  for (int32_t boundary = 0; boundary < 3; ++boundary) pipeline.at_boundary(boundary);
  counting.on_synchronize = [&gate] { gate.open(); };
  counting.on_compute_record = [&] {
    gate.open();
    streams.drain();
  };
  check::refuses(
      [&] {
        pipeline.at_boundary(3);
        counting.on_compute_record = nullptr;
        pipeline.at_boundary(4);
        pipeline.at_boundary(5);
        pipeline.synchronize();
      },
      {"prefetch of storage 0", "not those that copy 0 read"});
}

CHECK_NAMED(pipeline_poison, "pipeline: bytes whose residency has ended are poisoned") {
  RoundTrip trip(100);
  ThreadedStreams streams;
  CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.poison = true});
  std::vector<int64_t> device_poison;
  std::vector<int64_t> host_poison;
  for (int32_t boundary = 0; boundary < 5; ++boundary) {
    pipeline.at_boundary(boundary);
    trip.launch(streams, boundary, 7);
    // The copies of these boundaries are on their way only in 1 and 2, and touch other bytes than those counted.
    streams.call(StreamId::kCompute, [&, boundary] {
      device_poison.push_back(std::count(trip.device.begin(), trip.device.begin() + 100, 0xFF));
      if (boundary >= 3) host_poison.push_back(std::ranges::count(trip.host, 0xFF));
    });
  }
  pipeline.synchronize();
  streams.drain();
  check::require(device_poison == std::vector<int64_t>{0, 0, 100, 100, 100}, "poison of the device slot");
  check::require(host_poison == std::vector<int64_t>{100, 100}, "poison of the host slot");
  check::equal(trip.counts.at(0), 100, "bytes that came back");
  check::equal(std::count(trip.device.begin() + 100, trip.device.end(), 7), 100, "bytes that are there at the end");
}

CHECK_NAMED(pipeline_abort, "pipeline: aborted while the host waits for a copy") {
  RoundTrip trip(1000);
  ThreadedStreams streams;
  CountingStreams counting(streams);
  CopyPipeline pipeline(counting, trip.plan, trip.arenas(), {.chunk_bytes = 100, .max_in_flight = 2});
  Gate gate;
  pipeline.at_boundary(0);
  trip.launch(streams, 0, 1);
  streams.call(StreamId::kCompute, [&gate] { gate.pass(); });
  pipeline.at_boundary(1);
  std::string text;
  std::thread waiting([&] {
    try {
      pipeline.at_boundary(2);
    } catch (const StepAborted& error) {
      text = error.what();
    }
  });
  std::thread aborting([&] { pipeline.abort(); });
  // Launched work runs to its end, so the gate must open; but first the abort must have begun.
  for (bool begun = false; !begun;) {
    try {
      pipeline.at_boundary(0);
    } catch (const StepAborted&) {
      begun = true;
    } catch (const InvalidArgument&) {  // not yet: boundary 2 is next
      std::this_thread::yield();
    }
  }
  gate.open();
  waiting.join();
  aborting.join();
  check::require(text.find("aborted") != std::string::npos, "at_boundary() was not aborted");
  check::require(counting.copies <= 2, "chunks were enqueued after the abort");
  // Nothing touches the arenas now.
  std::ranges::fill(trip.device, static_cast<unsigned char>(0));
  std::ranges::fill(trip.host, static_cast<unsigned char>(0));
  check::refuses([&] { pipeline.at_boundary(2); }, {"aborted", "0", "2"});
  trip.step(pipeline, streams, 5);
  pipeline.synchronize();
  streams.drain();
  check::equal(trip.counts.at(0), 1000, "bytes that came back in the next step");
}

CHECK_NAMED(pipeline_abort_anywhere, "pipeline: aborted at every boundary, from this and from another thread") {
  const Graph graph = pipeline_plans::random_graph(9);
  const Plan plan = pipeline_plans::random_plan(graph, 9);
  RoundTrip trip(300);
  ThreadedStreams streams({.seed = 9, .max_delay_us = 20});
  {
    CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.chunk_bytes = 50, .max_in_flight = 1});
    for (const bool elsewhere : {false, true}) {
      for (int32_t last = 0; last < 4; ++last) {
        for (int32_t boundary = 0; boundary <= last; ++boundary) {
          pipeline.at_boundary(boundary);
          trip.launch(streams, boundary, 3);
        }
        if (elsewhere)
          std::thread([&] { pipeline.abort(); }).join();
        else
          pipeline.abort();
        std::ranges::fill(trip.device, static_cast<unsigned char>(0));
        std::ranges::fill(trip.host, static_cast<unsigned char>(0));
        check::refuses([&] { pipeline.at_boundary(last + 1); }, {"aborted"});
      }
    }
    trip.counts.clear();
    trip.step(pipeline, streams, 4);
    pipeline.synchronize();
    streams.drain();
    check::equal(trip.counts.at(0), 300, "bytes that came back in the next step");
    check::equal(pipeline.statistics().steps, 1, "completed steps");
    pipeline.abort();  // between steps: nothing to abort
    trip.step(pipeline, streams, 4);
    pipeline.at_boundary(0);
    trip.launch(streams, 0, 3);
    pipeline.at_boundary(1);
  }  // in the middle of a step
  std::ranges::fill(trip.device, static_cast<unsigned char>(0));
  std::ranges::fill(trip.host, static_cast<unsigned char>(0));
  check::equal(streams.live_events(), 0, "events that the pipeline left behind");
}

CHECK_NAMED(pipeline_ends, "pipeline: its end waits for the streams in the middle of a step, and not between steps") {
  for (const int32_t boundaries : {0, 3, 5}) {
    RoundTrip trip(100);
    ThreadedStreams threads;
    CountingStreams streams(threads);
    {
      CopyPipeline pipeline(streams, trip.plan, trip.arenas());
      for (int32_t boundary = 0; boundary < boundaries; ++boundary) pipeline.at_boundary(boundary);
      if (boundaries == 5) pipeline.synchronize();
    }
    check::equal(streams.drains, boundaries == 3 ? 1 : 0, "drains after " + std::to_string(boundaries) + " boundaries");
  }
}

CHECK_NAMED(pipeline_construction_fails, "pipeline: a backend that runs out of events leaves nothing behind") {
  RoundTrip trip(10);
  ThreadedStreams streams;
  CountingStreams counting(streams);
  // Two boundaries that issue, two copies, two chunks per stream.
  for (int64_t failing = 1; failing <= 8; ++failing) {
    counting.events_until_failure = failing;
    check::refuses([&] { CopyPipeline pipeline(counting, trip.plan, trip.arenas()); }, {"no more events"});
    check::equal(streams.live_events(), 0, "events left behind");
  }
  counting.events_until_failure = 9;
  const CopyPipeline pipeline(counting, trip.plan, trip.arenas());
}

CHECK_NAMED(pipeline_refusals, "pipeline: what is refused") {
  ThreadedStreams streams;
  RoundTrip trip(100);
  const auto refused = [&](const std::function<void(Plan&)>& change, const std::vector<std::string>& parts) {
    Plan plan = trip.plan;
    change(plan);
    check::refuses([&] { CopyPipeline pipeline(streams, plan, trip.arenas()); }, parts);
  };
  check::refuses([&] { CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.chunk_bytes = 0}); },
                 {"chunk_bytes", "0"});
  check::refuses([&] { CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.max_in_flight = 0}); },
                 {"max_in_flight", "0"});
  refused([](Plan& plan) { plan.boundaries.pop_back(); }, {"4 instances", "one boundary more", "4"});
  refused([](Plan& plan) { plan.residencies[0].offset_bytes = 101; }, {"residency 0", "100 bytes", "101", "200"});
  refused([](Plan& plan) { plan.residencies[1].offset_bytes = -1; }, {"residency 1", "-1"});
  refused([](Plan& plan) { plan.residencies[0].size_bytes = kUnlimited; }, {"residency 0", "200"});
  refused([](Plan& plan) { plan.residencies[0].storage = 1; }, {"residency 0", "storage", "1"});
  refused([](Plan& plan) { plan.residencies[2].end = 2; }, {"residency 2", "begin and end"});
  refused([](Plan& plan) { plan.residencies[2].end = 6; }, {"residency 2", "begin and end", "6"});
  refused([](Plan& plan) { plan.copies[0].storage = -1; }, {"copy 0", "storage", "-1"});
  refused([](Plan& plan) { plan.copies[0].source = 3; }, {"copy 0", "source", "3"});
  refused([](Plan& plan) { std::swap(plan.copies[0].source, plan.copies[0].destination); },
          {"copy 0", "source", "device pool", "residency 1"});
  refused([](Plan& plan) { plan.residencies[2].pool = Pool::kParameters; }, {"residency 2", "arena of 0 bytes"});
  refused([](Plan& plan) { plan.storages[0].size_bytes = 101; }, {"copy 0", "source", "101 bytes", "100 bytes"});
  refused([](Plan& plan) { plan.boundaries[1].issues.clear(); }, {"boundary 2", "copy 0", "issued at an earlier"});
  refused([](Plan& plan) { plan.boundaries[1].waits = {0}; }, {"boundary 1", "copy 0", "issued at an earlier"});
  refused([](Plan& plan) { plan.boundaries[3].issues = {0}; }, {"boundary 3", "copy 0", "second time"});
  refused([](Plan& plan) { plan.boundaries[3].issues = {2}; }, {"boundary 3", "issue", "2"});
  refused([](Plan& plan) { plan.boundaries[3].waits = {2}; }, {"boundary 3", "wait", "2"});
  refused([](Plan& plan) { plan.copies[0].after = {1}; }, {"copy 0", "after copy 1", "issued earlier"});
  refused([](Plan& plan) { plan.copies[1].after = {5}; }, {"copy 1", "after", "5"});
  refused(
      [](Plan& plan) {
        plan.boundaries[2].issues.clear();
        plan.boundaries[3].waits.clear();
      },
      {"copy 1", "no boundary lists it"});

  CopyPipeline pipeline(streams, trip.plan, trip.arenas());
  check::refuses([&] { pipeline.at_boundary(1); }, {"boundary must be 0", "1"});
  check::refuses([&] { pipeline.at_boundary(5); }, {"boundary", "5"});
  pipeline.at_boundary(0);
  check::refuses([&] { pipeline.at_boundary(0); }, {"boundary must be 1", "0"});
  pipeline.at_boundary(1);  // nothing was changed by what was refused
  check::equal(streams.live_events() > 0, true, "events in use");
}
