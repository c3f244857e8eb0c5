// Checks of planner, copy pipeline and plan runner together: what plan() makes of small training steps gives the plain
// results whatever the speeds of the streams.
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "memory/errors.h"
#include "memory/native/graphs.h"
#include "memory/pipeline/plan_runner.h"
#include "memory/pipeline/threaded_streams.h"
#include "memory/planner.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

constexpr std::array kSchedules = {
    std::array{StreamId::kCompute, StreamId::kOffload, StreamId::kPrefetch},
    std::array{StreamId::kCompute, StreamId::kPrefetch, StreamId::kOffload},
    std::array{StreamId::kOffload, StreamId::kPrefetch, StreamId::kCompute},
    std::array{StreamId::kPrefetch, StreamId::kOffload, StreamId::kCompute},
};

struct Case {
  std::string name;
  Plan plan;
};

// Every strategy at several budgets between what it needs without and what it can do at least, where it finds a plan.
std::vector<Case> plans_of(const Graph& graph) {
  Limits limits{.offload_gbps = 20, .prefetch_gbps = 20, .copy_latency_us = 0.1};
  const Plan kept = plan(graph, limits, {.strategy = "none"});
  const int64_t most_bytes = kept.predicted.device_peak_bytes + kept.predicted.parameters_peak_bytes;
  std::vector<Case> cases = {{"none", kept}};
  for (const std::string& strategy : strategy_names()) {
    for (const int64_t percent : {90, 70, 50}) {
      limits.device_bytes = kept.predicted.parameters_peak_bytes + kept.predicted.device_peak_bytes * percent / 100;
      try {
        cases.push_back({strategy + " within " + std::to_string(limits.device_bytes) + " of " +
                             std::to_string(most_bytes) + " bytes",
                         plan(graph, limits, {.strategy = strategy, .search_effort = 20})});
      } catch (const Infeasible&) {
        continue;
      }
    }
  }
  return cases;
}

std::string difference(ThreadedStreams& streams, const Graph& graph, const Case& made,
                       const CopyPipelineOptions& options) {
  const StorageValues initial = initial_values(graph, 1);
  PlanRunner runner(streams, graph, made.plan, options);
  return first_difference(graph, run_graph(graph, initial, hash_operations()), runner.run(initial, hash_operations()));
}

}  // namespace

CHECK_NAMED(pipeline_planned, "pipeline: plans of the planner give the plain results") {
  int64_t copies = 0;
  int64_t recomputations = 0;
  uint64_t seed = 0;
  for (const Graph& graph : graphs::small_training_steps()) {
    for (const Case& made : plans_of(graph)) {
      ++seed;
      copies += std::ssize(made.plan.copies);
      for (const Instance& instance : made.plan.instances) recomputations += instance.is_recomputation;
      CopyPipelineOptions options{.chunk_bytes = 300 + static_cast<int64_t>(seed) % 1000,
                                  .max_in_flight = 1 + static_cast<int32_t>(seed) % 4,
                                  .checksums = true,
                                  .poison = true};
      {
        ThreadedStreams streams({.seed = seed, .max_delay_us = 5, .piece_bytes = 128});
        const std::string found = difference(streams, graph, made, options);
        check::require(found.empty(), graph.name + ", " + made.name + ", with delays: " + found);
      }
      options.max_in_flight = 1 << 10;  // the priority alone decides
      options.chunk_bytes = int64_t{1} << 20;
      ThreadedStreams streams({.priority = kSchedules[seed % kSchedules.size()]});
      const std::string found = difference(streams, graph, made, options);
      check::require(found.empty(), graph.name + ", " + made.name + ", by priority: " + found);
    }
  }
  check::require(copies >= 100 && recomputations >= 100, "the plans hold " + std::to_string(copies) + " copies and " +
                                                             std::to_string(recomputations) + " recomputations");
}
