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
