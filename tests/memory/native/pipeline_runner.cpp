// Checks of whole plans executed with real bytes: valid ones give what plain execution gives, whatever the streams'
// speeds; a missing wait does not.
#include "memory/pipeline/plan_runner.h"

#include <array>
#include <string>

#include "memory/native/pipeline_plans.h"
#include "memory/pipeline/threaded_streams.h"
#include "native/check.h"

using namespace splitkern::memory;
using namespace pipeline_plans;

namespace {

constexpr std::array kSchedules = {
    std::array{StreamId::kCompute, StreamId::kOffload, StreamId::kPrefetch},
    std::array{StreamId::kCompute, StreamId::kPrefetch, StreamId::kOffload},
    std::array{StreamId::kOffload, StreamId::kCompute, StreamId::kPrefetch},
    std::array{StreamId::kOffload, StreamId::kPrefetch, StreamId::kCompute},
    std::array{StreamId::kPrefetch, StreamId::kCompute, StreamId::kOffload},
    std::array{StreamId::kPrefetch, StreamId::kOffload, StreamId::kCompute},
};
// No feeder waits for room, so that the priority alone decides. With poison, as a slot may still hold the right bytes.
const CopyPipelineOptions kUnbounded{.max_in_flight = 64, .poison = true};

std::string seeded(uint64_t seed) {
  return "seed " + std::to_string(seed);
}

StorageValues plain(const Graph& graph, const StorageValues& initial) {
  return run_graph(graph, initial, hash_operations());
}

// Empty if the plan gives the plain results.
std::string difference(ThreadedStreams& streams, const Graph& graph, const Plan& plan,
                       const CopyPipelineOptions& options, uint64_t seed) {
  const StorageValues initial = initial_values(graph, seed);
  PlanRunner runner(streams, graph, plan, options);
  return first_difference(graph, plain(graph, initial), runner.run(initial, hash_operations()));
}

// Whether any of the extreme schedules shows that a plan is broken.
bool is_caught(const Graph& graph, const Plan& plan) {
  for (const auto& priority : kSchedules) {
    ThreadedStreams streams({.priority = priority});
    if (!difference(streams, graph, plan, kUnbounded, 1).empty()) return true;
  }
  return false;
}

}  // namespace

CHECK_NAMED(pipeline_hash_operation, "pipeline: what the hash operation tells apart") {
  // x, noise: whole storages of 16 bytes; a sum of them, a random operation, one that could work in place.
  Graph graph;
  for (const char* name : {"x", "y", "sum", "noise", "relu"}) {
    graph.storages.push_back({.name = name, .size_bytes = 16, .kind = StorageKind::kActivation});
    graph.tensors.push_back(
        {.name = name, .storage = static_cast<int32_t>(graph.tensors.size()), .sizes = {16}, .strides_bytes = {1}});
  }
  const auto add = [&](std::vector<int32_t> reads, int32_t write) -> Operation& {
    Operation operation;
    operation.reads = std::move(reads);
    operation.writes = {write};
    graph.operations.push_back(operation);
    return graph.operations.back();
  };
  add({0, 1}, 2).is_sum = true;
  add({0}, 3).is_random = true;
  add({0}, 4).inplace = {{.read = 0, .write = 0}};
  add({0}, 4);

  using Slot = std::vector<unsigned char>;
  // The bytes that a lone call writes; `reads` may lie in `slot`.
  const auto run = [&](const OperationFunction& operation, int32_t index, std::vector<const unsigned char*> reads,
                       Slot& slot, int32_t accumulated = -1) {
    OperationCall call;
    call.operation = index;
    call.reads = std::move(reads);
    call.writes = {slot.data()};
    call.accumulated = accumulated;
    operation(graph, call);
    return slot;
  };
  const Slot x(16, 3);
  const Slot y(16, 255);
  Slot slot(16, 9);
  check::require(run(hash_operations(), 0, {x.data(), y.data()}, slot) == Slot(16, 2), "3 + 255 modulo 256");

  const OperationFunction random = hash_operations();
  const Slot first = run(random, 1, {x.data()}, slot);
  check::require(run(random, 1, {x.data()}, slot) != first, "a random operation ran twice unnoticed");
  check::require(run(hash_operations(), 1, {x.data()}, slot) == first, "another execution gives other numbers");

  const Slot relu = run(hash_operations(), 2, {x.data()}, slot);
  const Slot other = run(hash_operations(), 3, {x.data()}, slot);
  check::require(relu != other, "two operations give the same");
  check::require(run(hash_operations(), 2, {y.data()}, slot) != relu, "the bytes read do not matter");
  slot = x;
  check::require(run(hash_operations(), 2, {slot.data()}, slot) == relu, "in place as allowed");
  slot = x;
  check::require(run(hash_operations(), 3, {slot.data()}, slot) != other, "in place against the rules, unnoticed");

  slot = Slot(16, 200);
  const Slot accumulated = run(hash_operations(), 3, {x.data()}, slot, 0);
  for (size_t byte = 0; byte < 16; ++byte)
    check::equal(accumulated[byte], static_cast<unsigned char>(other[byte] + 200), "accumulated byte");
}

CHECK_NAMED(pipeline_random_plans, "pipeline: random plans with random delays give the plain results") {
  int64_t copies = 0;
  int64_t recomputations = 0;
  int64_t fused = 0;
  for (uint64_t seed = 0; seed < 24; ++seed) {
    const Graph graph = random_graph(seed);
    const Plan plan = random_plan(graph, seed);
    copies += std::ssize(plan.copies);
    fused += std::ssize(plan.fused);
    for (const Instance& instance : plan.instances) recomputations += instance.is_recomputation;
    ThreadedStreams streams({.seed = seed, .max_delay_us = 20, .piece_bytes = 16});
    const CopyPipelineOptions options{.chunk_bytes = 5 + static_cast<int64_t>(seed) % 40,
                                      .max_in_flight = 1 + static_cast<int32_t>(seed) % 4,
                                      .checksums = seed % 2 == 0,
                                      .poison = seed % 3 != 0};
    const std::string found = difference(streams, graph, plan, options, seed);
    check::require(found.empty(), seeded(seed) + ": " + found);
  }
  check::require(copies >= 100 && recomputations >= 8 && fused >= 8,
                 "the plans hold " + std::to_string(copies) + " copies, " + std::to_string(recomputations) +
                     " recomputations and " + std::to_string(fused) + " fused sums");
}

CHECK_NAMED(pipeline_extreme_schedules, "pipeline: random plans on extreme schedules give the plain results") {
  for (uint64_t seed = 100; seed < 116; ++seed) {
    const Graph graph = random_graph(seed);
    const Plan plan = random_plan(graph, seed);
    for (const auto& priority : kSchedules) {
      ThreadedStreams streams({.priority = priority});
      const CopyPipelineOptions options{
          .chunk_bytes = 16, .max_in_flight = 1 + static_cast<int32_t>(seed) % 4, .checksums = true, .poison = true};
      const std::string found = difference(streams, graph, plan, options, seed);
      check::require(found.empty(), seeded(seed) + ": " + found);
    }
  }
}

CHECK_NAMED(pipeline_missing_waits, "pipeline: a plan without one of its waits is caught") {
  int64_t waits = 0;
  int64_t afters = 0;
  for (uint64_t seed = 200; seed < 210; ++seed) {
    const Graph graph = random_graph(seed);
    const Plan plan = random_plan(graph, seed);
    for (const int32_t copy : needed_waits(plan)) {
      ++waits;
      check::require(is_caught(graph, without_wait(plan, copy)),
                     seeded(seed) + ": nobody noticed that the wait for copy " + std::to_string(copy) + " is missing");
    }
    for (const int32_t copy : needed_afters(plan)) {
      ++afters;
      check::require(is_caught(graph, without_after(plan, copy)),
                     seeded(seed) + ": nobody noticed that copy " + std::to_string(copy) + " comes after nothing");
    }
  }
  check::require(waits >= 20 && afters >= 10,
                 "only " + std::to_string(waits) + " waits and " + std::to_string(afters) + " afters were dropped");
}
