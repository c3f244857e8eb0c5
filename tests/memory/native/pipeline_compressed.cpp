// Checks of compressed copies in the pipeline: values come back to the bit whatever they are, in chunks, under delays,
// within plans of the planner; bytes on the link are counted; a coder that is wrong is caught; refusals.
#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "memory/copy_pipeline.h"
#include "memory/errors.h"
#include "memory/native/graphs.h"
#include "memory/pipeline/plan_runner.h"
#include "memory/pipeline/threaded_streams.h"
#include "memory/planner.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

using Bytes = std::vector<unsigned char>;

constexpr int64_t kSlot = 4096;
constexpr int64_t kHeader = 128;

// Of random bits; about `zeros` percent of the elements are 0, and some are 0 but for one bit.
Bytes values_of(int64_t elements, int32_t element_bytes, int32_t zeros, uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes bytes(static_cast<size_t>(elements * element_bytes), 0);
  for (int64_t element = 0; element < elements; ++element) {
    unsigned char* const place = bytes.data() + element * element_bytes;
    if (static_cast<int32_t>(random() % 100) < zeros) continue;
    const uint64_t bits =
        random() % 4 == 0 ? uint64_t{1} << random() % (8 * static_cast<uint64_t>(element_bytes)) : random() | 1;
    std::memcpy(place, &bits, static_cast<size_t>(element_bytes));
  }
  return bytes;
}

// Counted from the layout's description alone: header, masks, values padded to 16 bytes per slot.
int64_t expected_link_bytes(const Bytes& values, int32_t element_bytes) {
  int64_t total = kHeader;
  for (int64_t begin = 0; begin < std::ssize(values); begin += kSlot) {
    int64_t kept = 0;
    const int64_t end = std::min(begin + kSlot, std::ssize(values));
    for (int64_t place = begin; place < end; place += element_bytes)
      kept +=
          std::any_of(values.begin() + place, values.begin() + place + element_bytes, [](auto b) { return b != 0; });
    total += kSlot / element_bytes / 8 + (kept * element_bytes + 15) / 16 * 16;
  }
  return total;
}

int64_t room_of(int64_t size_bytes, int32_t element_bytes) {
  return kHeader + (size_bytes + kSlot - 1) / kSlot * (kSlot / element_bytes / 8) + (size_bytes + 15) / 16 * 16;
}

// One storage that leaves compressed after instance 0 and is back, elsewhere, before instance 3. 4 instances.
struct CompressedTrip {
  CompressedTrip(int64_t elements, int32_t element_bytes)
      : bytes(elements * element_bytes),
        device(static_cast<size_t>(2 * padded()), 0xEE),
        host(static_cast<size_t>(room_of(bytes, element_bytes) + kGuard), kGuardByte) {
    plan.storages = {{.size_bytes = bytes, .members = {0}, .compression = Compression{2, element_bytes}}};
    plan.instances.resize(4);
    plan.boundaries.resize(5);
    const int64_t room = room_of(bytes, element_bytes);
    plan.residencies = {
        {.storage = 0, .pool = Pool::kDevice, .size_bytes = bytes, .begin = 0, .end = 2},
        {.storage = 0, .pool = Pool::kHost, .size_bytes = room, .begin = 1, .end = 3},
        {.storage = 0, .pool = Pool::kDevice, .offset_bytes = padded(), .size_bytes = bytes, .begin = 2, .end = 4}};
    plan.copies = {{.kind = CopyKind::kOffload,
                    .source = 0,
                    .destination = 1,
                    .issue = 1,
                    .wait = 2,
                    .after = {},
                    .compressed = true},
                   {.kind = CopyKind::kPrefetch,
                    .source = 1,
                    .destination = 2,
                    .issue = 2,
                    .wait = 3,
                    .after = {},
                    .compressed = true}};
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
  int64_t padded() const { return (bytes + 15) / 16 * 16; }
  void step(CopyPipeline& pipeline, StreamBackend& streams, const Bytes& values) {
    for (int32_t boundary = 0; boundary < pipeline.boundary_count(); ++boundary) {
      pipeline.at_boundary(boundary);
      if (boundary == 0)
        streams.call(StreamId::kCompute, [this, &values] { std::ranges::copy(values, device.begin()); });
      if (boundary == 3)
        streams.call(StreamId::kCompute,
                     [this] { back.assign(device.begin() + padded(), device.begin() + padded() + bytes); });
    }
    pipeline.synchronize();
    streams.drain();
  }
  bool guard_is_whole() const {
    return std::all_of(host.end() - kGuard, host.end(), [](unsigned char byte) { return byte == kGuardByte; });
  }

  static constexpr int64_t kGuard = 64;
  static constexpr unsigned char kGuardByte = 0xA5;
  const int64_t bytes;
  Plan plan;
  Bytes device;
  Bytes host;
  Bytes back;
};

// Passes everything on, but one bit of what it decompresses is wrong.
class WrongCoder final : public StreamBackend {
 public:
  explicit WrongCoder(ThreadedStreams& streams) : streams_(streams) {}
  void copy(StreamId stream, void* destination, const void* source, int64_t size_bytes) override {
    streams_.copy(stream, destination, source, size_bytes);
  }
  void compress(StreamId stream, void* buffer, const void* source, const CompressedSlots& slots,
                LinkCount* count) override {
    streams_.compress(stream, buffer, source, slots, count);
  }
  void decompress(StreamId stream, void* destination, const void* buffer, const CompressedSlots& slots) override {
    streams_.decompress(stream, destination, buffer, slots);
    if (is_wrong)
      streams_.call(stream,
                    [destination, slots] { static_cast<unsigned char*>(destination)[slots.begin * kSlot + 1] ^= 64; });
  }
  void fill(StreamId stream, void* destination, unsigned char value, int64_t size_bytes) override {
    streams_.fill(stream, destination, value, size_bytes);
  }
  void checksum(StreamId stream, const void* source, int64_t size_bytes, std::atomic<uint64_t>* result) override {
    streams_.checksum(stream, source, size_bytes, result);
  }
  void call(StreamId stream, std::function<void()> function) override { streams_.call(stream, std::move(function)); }
  EventId create_event() override { return streams_.create_event(); }
  void destroy_event(EventId event) noexcept override { streams_.destroy_event(event); }
  void record(EventId event, StreamId stream) override { streams_.record(event, stream); }
  void wait(StreamId stream, EventId event) override { streams_.wait(stream, event); }
  bool query(EventId event) override { return streams_.query(event); }
  void synchronize(EventId event) override { streams_.synchronize(event); }
  void require_ok(StreamId stream) override { streams_.require_ok(stream); }
  void drain() noexcept override { streams_.drain(); }
  void reset() noexcept override { streams_.reset(); }

  bool is_wrong = true;

 private:
  ThreadedStreams& streams_;
};

// The same graph, as if each of its activations had been measured.
Graph measured(Graph graph, double ratio) {
  for (Storage& storage : graph.storages) {
    if (storage.kind == StorageKind::kActivation)
      storage.compression = Compression{ratio, storage.size_bytes % 4 == 0 ? 4 : 1};
  }
  return graph;
}

}  // namespace

CHECK_NAMED(pipeline_compressed_round_trip, "pipeline: compressed storages come back to the bit, in chunks") {
  uint64_t seed = 0;
  for (const int32_t element_bytes : {1, 2, 4, 8}) {
    for (const int64_t elements : {int64_t{1}, kSlot / element_bytes, 5 * kSlot / element_bytes + 37}) {
      CompressedTrip trip(elements, element_bytes);
      for (const int64_t chunk_bytes : {int64_t{1}, 2 * kSlot + 5, int64_t{1} << 20}) {
        ++seed;
        ThreadedStreams streams(
            {.seed = seed, .max_delay_us = 5, .piece_bytes = static_cast<int64_t>(seed % 3) * 3000 + 1});
        CopyPipeline pipeline(streams, trip.plan, trip.arenas(),
                              {.chunk_bytes = chunk_bytes,
                               .max_in_flight = 1 + static_cast<int32_t>(seed % 4),
                               .count_every = 1,
                               .checksums = true,
                               .poison = true});
        int64_t counted = 0;
        const std::string name = std::to_string(elements) + " elements of " + std::to_string(element_bytes) +
                                 " bytes in chunks of " + std::to_string(chunk_bytes) + ", zeros ";
        for (const int32_t zeros : {0, 50, 100}) {
          const Bytes values = values_of(elements, element_bytes, zeros, seed * 3 + static_cast<uint64_t>(zeros));
          trip.step(pipeline, streams, values);
          check::require(trip.back == values, name + std::to_string(zeros) + " %: what came back");
          check::require(trip.guard_is_whole(), name + std::to_string(zeros) + " %: bytes behind the slot");
          counted += expected_link_bytes(values, element_bytes);
        }
        const CopyStatistics found = pipeline.statistics();
        check::equal(found.counted_bytes, 3 * trip.bytes, name + "0, 50, 100: plain bytes");
        check::equal(found.counted_link_bytes, counted, name + "0, 50, 100: bytes on the link");
        const int64_t whole = std::max(kSlot, chunk_bytes / kSlot * kSlot);
        check::equal(found.prefetch_chunks, 3 * ((trip.bytes + whole - 1) / whole), name + "chunks");
      }
    }
  }
}

CHECK_NAMED(pipeline_compressed_counting, "pipeline: bytes on the link are counted in the first of so many steps") {
  CompressedTrip trip(3000, 4);
  ThreadedStreams streams;
  CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.count_every = 3});
  const Bytes values = values_of(3000, 4, 50, 1);
  for (int32_t step = 0; step < 7; ++step) trip.step(pipeline, streams, values);
  check::equal(pipeline.statistics().counted_bytes, 3 * trip.bytes, "steps 0, 3 and 6");
  check::equal(pipeline.statistics().counted_link_bytes, 3 * expected_link_bytes(values, 4), "on the link");
}

CHECK_NAMED(pipeline_compressed_wrong_coder, "pipeline: a coder that is wrong is caught by the checksums") {
  CompressedTrip trip(5000, 2);
  ThreadedStreams threads;
  WrongCoder streams(threads);
  CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.chunk_bytes = 2 * kSlot, .checksums = true});
  const Bytes values = values_of(5000, 2, 40, 2);
  check::refuses([&] { trip.step(pipeline, streams, values); },
                 {"prefetch of storage 0", "not those that copy 0 read"});
  streams.is_wrong = false;
  trip.step(pipeline, streams, values);
  check::require(trip.back == values, "what came back in the next step");
}

CHECK_NAMED(pipeline_compressed_failures, "pipeline: compressed copies fail and are recovered from like others") {
  CompressedTrip trip(5000, 4);
  const Bytes values = values_of(5000, 4, 40, 3);
  ThreadedStreams streams;
  CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.chunk_bytes = kSlot, .max_in_flight = 2});
  streams.fail_copy(3);
  check::refuses([&] { trip.step(pipeline, streams, values); }, {"offload of storage 0", "injected failure"});
  trip.step(pipeline, streams, values);
  check::require(trip.back == values, "after a failure");

  // The slot is overwritten between the copies, by a header that is none of this block.
  for (int32_t boundary = 0; boundary < 2; ++boundary) pipeline.at_boundary(boundary);
  pipeline.synchronize();
  trip.host[12] = 3;
  check::refuses(
      [&] {
        for (int32_t boundary = 2; boundary < 5; ++boundary) pipeline.at_boundary(boundary);
        pipeline.synchronize();
      },
      {"prefetch of storage 0", "header"});
  trip.step(pipeline, streams, values);
  check::require(trip.back == values, "after a foreign header");
}

CHECK_NAMED(pipeline_compressed_refusals,
            "pipeline: compressed copies without room, elements or alignment are refused") {
  const auto refused = [](auto&& change, const std::vector<std::string>& parts) {
    CompressedTrip trip(100, 4);
    ThreadedStreams streams;
    change(trip.plan);
    check::refuses([&] { CopyPipeline pipeline(streams, trip.plan, trip.arenas()); }, parts);
  };
  refused([](Plan& plan) { plan.storages[0].compression.reset(); }, {"copy 0", "storage 0", "no compression"});
  refused([](Plan& plan) { plan.storages[0].compression->element_bytes = 3; }, {"copy 0", "storage 0", "400 bytes"});
  refused([](Plan& plan) { plan.residencies[1].size_bytes -= 1; }, {"copy 0", "residency 1", "656 bytes", "655"});
  refused([](Plan& plan) { plan.residencies[1].offset_bytes = 8; }, {"copy 0", "residency 1", "multiple of 16"});
  refused([](Plan& plan) { plan.residencies[0].offset_bytes = 2; }, {"copy 0", "residency 0", "multiple of 4"});
  CompressedTrip trip(100, 4);
  ThreadedStreams streams;
  check::refuses([&] { CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.count_every = 0}); },
                 {"count_every", "0"});
}

CHECK_NAMED(pipeline_compressed_planned, "pipeline: plans with compressed copies give the plain results") {
  int64_t compressed = 0;
  uint64_t seed = 0;
  for (const Graph& step : graphs::small_training_steps()) {
    const Graph graph = measured(step, 2);
    const StorageValues initial = initial_values(graph, 1);
    const StorageValues expected = run_graph(graph, initial, hash_operations());
    Limits limits{.offload_gbps = 20, .prefetch_gbps = 20, .copy_latency_us = 0.1};
    const Plan kept = plan(graph, limits, {.strategy = "none"});
    for (const int64_t percent : {75, 50}) {
      limits.device_bytes = kept.predicted.parameters_peak_bytes + kept.predicted.device_peak_bytes * percent / 100;
      Plan made;
      try {
        made = plan(graph, limits, {.strategy = "default", .search_effort = 20});
      } catch (const Infeasible&) {
        continue;
      }
      compressed += std::ranges::count_if(made.copies, &Copy::compressed);
      ++seed;
      ThreadedStreams streams({.seed = seed, .max_delay_us = 2, .piece_bytes = 512});
      PlanRunner runner(streams, graph, made,
                        {.chunk_bytes = 5000,
                         .max_in_flight = 1 + static_cast<int32_t>(seed % 4),
                         .checksums = true,
                         .poison = true});
      const std::string found = first_difference(graph, expected, runner.run(initial, hash_operations()));
      check::require(found.empty(), graph.name + ": " + found);
    }
  }
  check::require(compressed >= 20, std::to_string(compressed) + " compressed copies");
}
