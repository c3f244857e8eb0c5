// Checks of planner, validator, copy pipeline and plan runner together: what plan() makes of small training steps gives
// the plain results whatever the speeds of the streams, and proof and results agree on plans that were spoilt.
#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "memory/errors.h"
#include "memory/native/graphs.h"
#include "memory/pipeline/plan_runner.h"
#include "memory/pipeline/threaded_streams.h"
#include "memory/planner.h"
#include "memory/validator.h"
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
    for (const int64_t percent : {75, 50}) {
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

// Waits for a copy only after the last instance.
Plan with_late_wait(Plan plan, int32_t copy) {
  for (Boundary& boundary : plan.boundaries) std::erase(boundary.waits, copy);
  plan.boundaries.back().waits.push_back(copy);
  return plan;
}

}  // namespace

CHECK_NAMED(pipeline_late_waits, "pipeline: validator and results agree on waits that come too late") {
  int64_t accepted = 0;
  int64_t caught = 0;
  for (const Graph& graph : graphs::small_training_steps()) {
    const StorageValues initial = initial_values(graph, 1);
    const StorageValues expected = run_graph(graph, initial, hash_operations());
    for (const Case& made : plans_of(graph)) {
      // A few copies of each plan, spread over it.
      const auto copies = static_cast<int32_t>(made.plan.copies.size());
      for (int32_t copy = 0; copy < copies; copy += std::max(1, copies / 3)) {
        const Plan late = with_late_wait(made.plan, copy);
        Plan judged = late;
        judged.copies[static_cast<size_t>(copy)].wait = static_cast<int32_t>(judged.instances.size());
        const std::vector<Violation> violations = find_violations(graph, judged, 100);
        const bool early = std::ranges::any_of(
            violations, [](const Violation& found) { return found.reason == Reason::kBeforeArrival; });
        if (!violations.empty() && !early) continue;  // it may be wrong without any schedule that shows it
        bool differs = false;
        for (const auto& priority : kSchedules) {
          ThreadedStreams streams({.priority = priority});
          PlanRunner runner(streams, graph, late, {.max_in_flight = 1 << 10, .poison = true});
          differs |= !first_difference(graph, expected, runner.run(initial, hash_operations())).empty();
          if (differs) break;
        }
        check::equal(differs, early,
                     graph.name + ", " + made.name + ", copy " + std::to_string(copy) + ": whether the results differ");
        ++(early ? caught : accepted);
      }
    }
  }
  check::require(accepted >= 5 && caught >= 5,
                 std::to_string(accepted) + " accepted, " + std::to_string(caught) + " caught");
}

CHECK_NAMED(pipeline_planned, "pipeline: plans of the planner give the plain results") {
  int64_t copies = 0;
  int64_t recomputations = 0;
  uint64_t seed = 0;
  for (const Graph& graph : graphs::small_training_steps()) {
    for (const Case& made : plans_of(graph)) {
      ++seed;
      copies += std::ssize(made.plan.copies);
      for (const Instance& instance : made.plan.instances) recomputations += instance.is_recomputation;
      CopyPipelineOptions options{.chunk_bytes = 2000 + static_cast<int64_t>(seed) % 1000,
                                  .max_in_flight = 1 + static_cast<int32_t>(seed) % 4,
                                  .checksums = true,
                                  .poison = true};
      // Alternately with delays and few chunks in flight, and where the priority alone decides.
      const bool delays = seed % 2 == 0;
      if (!delays) options.max_in_flight = 1 << 10;
      ThreadedStreams streams(delays ? ThreadedStreamOptions{.seed = seed, .max_delay_us = 2, .piece_bytes = 512}
                                     : ThreadedStreamOptions{.priority = kSchedules[seed / 2 % kSchedules.size()]});
      const std::string found = difference(streams, graph, made, options);
      check::require(found.empty(), graph.name + ", " + made.name + ": " + found);
    }
  }
  check::require(copies >= 100 && recomputations >= 50, "the plans hold " + std::to_string(copies) + " copies and " +
                                                            std::to_string(recomputations) + " recomputations");
}
