// A training step and a machine in, a plan out: the whole of planning, stage by stage (storage assignment, decisions
// and schedule, placement, predicted times). Called by users and by everything that runs or shows plans.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "memory/graph.h"
#include "memory/limits.h"
#include "memory/placement.h"
#include "memory/plan.h"

namespace splitkern::memory {

struct PlanOptions {
  // "none": everything is kept. "recompute": what does not fit is computed again. "layerwise": every feature map is
  // offloaded, layer by layer (vDNN). "hmms-paper": offloaded as far as the link hides it (Jin and Hong). "default":
  // all of it together; never predicted slower than any of the others under the same limits, feasible whenever one of
  // them is.
  std::string strategy = "default";
  // The search of "default" and "recompute": about how often all operations may be scheduled. Time-free: the same
  // arguments give the same plan everywhere.
  int64_t search_effort = 1000;
  int64_t placement_effort = kDefaultEffort;
};

std::vector<std::string> strategy_names();

// Copies of a storage are compressed where its measured compression is kLeastCompressionRatio or more, unless the
// larger slots on the host leave no plan. Pure and deterministic; any thread. Throws InvalidArgument for a graph or
// limits that break their rules, an unknown strategy, or an effort below 1; Infeasible where the strategy finds no plan
// within the limits, with the pool that is too small and the smallest budget of it at which this function, called with
// otherwise the same arguments, returns one.
Plan plan(const Graph& graph, const Limits& limits, const PlanOptions& options = {});

}  // namespace splitkern::memory
