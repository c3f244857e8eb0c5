// The same step at other sizes: what a plan decided (instances, copies and their boundaries, what shares bytes) stays,
// sizes and addresses are made anew. Called by plan() for the addresses of what it decided, and once per draw of a
// network whose patch boundaries are drawn afresh in every step. Pure; any thread.
#pragma once

#include <cstdint>
#include <span>

#include "memory/graph.h"
#include "memory/limits.h"
#include "memory/placement.h"
#include "memory/plan.h"

namespace splitkern::memory {

// The graph with other sizes. `numbers` holds the bytes of every storage, then of every tensor its offset, its sizes
// and its strides, in bytes, in the order of the graph. Throws InvalidArgument where there are not as many as that;
// whether the result keeps the rules of graph.h is for require_valid() or validate() to say.
Graph with_sizes(const Graph& graph, std::span<const int64_t> numbers);

// Gives the residencies of a plan, whose sizes are set, addresses pool by pool, and fills in what the plan predicts.
// Each pool's search stops where the pool fits the plan's limits if `stop_when_fitting`, else at the lower bound.
void place_residencies(const Graph& graph, Plan& plan, int64_t placement_effort, bool stop_when_fitting);

// The plan of another graph that differs in sizes alone, for this one, under these limits. Not validated here. Throws
// InvalidArgument where the plan names what it or the graph does not have, Infeasible where a pool needs more than its
// budget, with what it needs.
Plan place_again(const Graph& graph, const Plan& decided, const Limits& limits,
                 int64_t placement_effort = kDefaultEffort);

}  // namespace splitkern::memory
