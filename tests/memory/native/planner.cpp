// Checks of plan() as a whole: every plan goes through the validator and the simulator.
#include "memory/planner.h"

#include <algorithm>
#include <cmath>

#include "graphs.h"
#include "memory/errors.h"
#include "memory/liveness.h"
#include "memory/simulator.h"
#include "memory/validator.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

Plan proven(const Graph& graph, const Limits& limits, const std::string& strategy) {
  Plan plan = splitkern::memory::plan(graph, limits, {.strategy = strategy});
  const std::vector<Violation> violations = find_violations(graph, plan);
  check::require(violations.empty(),
                 graph.name + ", " + strategy + ": " + (violations.empty() ? "" : violations[0].text));
  check::require(plan.predicted.device_peak_bytes + plan.predicted.parameters_peak_bytes <= limits.device_bytes,
                 graph.name + ", " + strategy + ": the device budget is kept");
  check::require(plan.predicted.host_peak_bytes <= limits.host_bytes,
                 graph.name + ", " + strategy + ": the host budget is kept");
  check::require(plan.strategy == strategy, "the plan names its strategy");
  const Timeline timeline = simulate(graph, plan);
  check::require(timeline.step_us == plan.predicted.step_us, "the predicted time is the simulator's");
  return plan;
}

int64_t device_bytes_of(const Plan& plan) {
  return plan.predicted.device_peak_bytes + plan.predicted.parameters_peak_bytes;
}

// All strategies on one step at one set of limits; returns how many found a plan.
int compare(const Graph& graph, const Limits& limits) {
  double best_us = std::numeric_limits<double>::infinity();
  double default_us = std::numeric_limits<double>::infinity();
  int found = 0;
  for (const std::string& strategy : strategy_names()) {
    try {
      const double step_us = proven(graph, limits, strategy).predicted.step_us;
      (strategy == "default" ? default_us : best_us) = strategy == "default" ? step_us : std::min(best_us, step_us);
      ++found;
    } catch (const Infeasible& error) {
      const int64_t budget = error.pool == "host" ? limits.host_bytes : limits.device_bytes;
      check::equal(error.budget_bytes, budget, "budget in the error");
      check::require(error.smallest_feasible_bytes > budget, "the smallest budget is larger than what came");
      Limits larger = limits;
      (error.pool == "host" ? larger.host_bytes : larger.device_bytes) = error.smallest_feasible_bytes;
      proven(graph, larger, strategy);
    }
  }
  check::require(default_us <= best_us, graph.name + ": default takes " + std::to_string(default_us) +
                                            " us, another strategy " + std::to_string(best_us));
  return found;
}

}  // namespace

CHECK_NAMED(planner_all_strategies, "planner: all strategies, proven right, default the best of them") {
  int found = 0;
  for (const Graph& graph : graphs::small_training_steps()) {
    const int64_t all = device_bytes_of(proven(graph, {}, "none"));
    for (double gbps : {0.0, 1.0}) {
      for (int percent : {85, 60}) {
        found += compare(
            graph,
            {.device_bytes = all / 100 * percent, .offload_gbps = gbps, .prefetch_gbps = gbps, .copy_latency_us = 0.5});
      }
    }
  }
  check::require(found > 40, "plans were found: " + std::to_string(found));
}

CHECK_NAMED(planner_host_budget, "planner: the host budget is kept, and named where it is too small") {
  const Graph graph = graphs::small_training_steps()[0];
  Limits limits{.offload_gbps = 5, .prefetch_gbps = 5};
  const Plan free = proven(graph, limits, "layerwise");
  limits.device_bytes = device_bytes_of(free);
  limits.host_bytes = free.predicted.host_peak_bytes;
  proven(graph, limits, "layerwise");
  limits.host_bytes -= 512;
  check::refuses([&] { plan(graph, limits, {.strategy = "layerwise"}); },
                 {"layerwise", "host budget", std::to_string(limits.host_bytes), "512 bytes are missing"});
  for (int64_t host_bytes : {0, 512, 4096, 16384}) {
    limits.host_bytes = host_bytes;
    limits.device_bytes = kUnlimited;
    compare(graph, limits);
    limits.device_bytes = device_bytes_of(free);
    compare(graph, limits);
  }
}

CHECK_NAMED(planner_unlimited, "planner: without limits everything is kept, and the time is the captured operations'") {
  for (const Graph& graph : graphs::small_training_steps()) {
    const Plan plan = proven(graph, {.offload_gbps = 10, .prefetch_gbps = 10}, "default");
    check::require(plan.copies.empty() && plan.predicted.recompute_us == 0 && plan.predicted.stall_us == 0,
                   graph.name + ": nothing is copied or computed again");
    check::require(plan.predicted.step_us == plan.predicted.compute_us, "no time beside the operations'");
  }
}

CHECK_NAMED(planner_deterministic, "planner: the same arguments give the same plan") {
  const Graph graph = graphs::small_training_steps()[3];
  const int64_t all = device_bytes_of(plan(graph, {}));
  const Limits limits{.device_bytes = all / 10 * 7, .offload_gbps = 1, .prefetch_gbps = 1};
  check::require(plan(graph, limits) == plan(graph, limits), "two plans are equal");
}

CHECK_NAMED(planner_patches, "planner: patches computed again one by one need a fraction of the memory") {
  graphs::Net net;
  net.batch = 4;
  net.rows = net.columns = 64;
  net.layers = {{.channels = 16}, {.channels = 16}, {.channels = 16, .pool = true}, {.channels = 16}};
  const Plan whole = proven(graphs::training_step(net), {}, "none");
  net.split_layers = 3;
  net.grid_rows = net.grid_columns = 4;
  const Graph graph = graphs::training_step(net);
  const int64_t resident = whole.predicted.parameters_peak_bytes;
  const int64_t budget = (device_bytes_of(whole) - resident) / 3 + resident;
  check::refuses([&] { plan(graph, {.device_bytes = budget}, {.strategy = "none"}); }, {"none", "device budget"});
  const Plan plan = proven(graph, {.device_bytes = budget}, "recompute");
  check::require(plan.predicted.recompute_us < 0.5 * plan.predicted.compute_us, "at most the forward pass again");
}

CHECK_NAMED(planner_degenerate, "planner: steps with nothing to decide") {
  proven({}, {}, "default");
  graphs::Builder only_parameters;
  only_parameters.value("weight", 4096, StorageKind::kParameter);
  proven(only_parameters.graph, {}, "default");
  check::refuses([&] { plan(only_parameters.graph, {.device_bytes = 4000}); },
                 {"device budget of 4000", "96 bytes are missing", "4096"});

  // No backward pass, no copies, an output, a result that nobody reads, an empty storage, and workspace.
  graphs::Builder forward;
  const int32_t images = forward.value("images", 1000, StorageKind::kInput);
  const int32_t one = forward.value("one", 1000);
  const int32_t unread = forward.value("unread", 3000);
  const int32_t empty = forward.value("empty", 0);
  const int32_t out = forward.value("out", 1000, StorageKind::kActivation, true);
  forward.operation("f", "aten.f", {images}, {one, unread, empty}, 5).workspace_bytes = 2000;
  forward.operation("g", "aten.g", {one, empty}, {out}, 0);
  for (const std::string& strategy : strategy_names()) {
    const Plan plan = proven(forward.graph, {.offload_gbps = 1, .prefetch_gbps = 1}, strategy);
    check::equal(plan.predicted.device_peak_bytes, 1024 + 3072 + 2048, "device peak");
  }
}

CHECK_NAMED(planner_refusals, "planner: what is refused") {
  const Graph graph = graphs::small_training_steps()[0];
  check::refuses([&] { plan(graph, {}, {.strategy = "fastest"}); },
                 {"strategy", "default, none, recompute, layerwise, hmms-paper", "\"fastest\""});
  check::refuses([&] { plan(graph, {}, {.search_effort = 0}); }, {"search_effort", "1 or more", "0"});
  check::refuses([&] { plan(graph, {}, {.placement_effort = -1}); }, {"placement_effort", "-1"});
  check::refuses([&] { plan(graph, {.alignment_bytes = 3}); }, {"alignment_bytes", "3"});
  check::refuses([&] { plan(graph, {.alignment_bytes = int64_t{1} << 61}); }, {"2^63 - 1"});
}
