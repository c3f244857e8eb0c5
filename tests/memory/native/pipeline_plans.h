// Small random training steps and valid plans for them, for the checks of the copy pipeline and the plan runner. They
// share nothing with the planner: what is offloaded, recomputed, merged and fused is drawn at random.
#pragma once

#include <cstdint>
#include <vector>

#include "memory/graph.h"
#include "memory/plan.h"

namespace pipeline_plans {

// Forward and backward through a few layers, with skip connections and their sums, joined tensors of two patches,
// in-place candidates, running statistics, random operations and workspaces. At least 8 bytes per tensor.
splitkern::memory::Graph random_graph(uint64_t seed);

splitkern::memory::Plan random_plan(const splitkern::memory::Graph& graph, uint64_t seed);

// A copy whose wait no other wait replaces, so that dropping it breaks the plan: prefetches only.
std::vector<int32_t> needed_waits(const splitkern::memory::Plan& plan);
// A prefetch whose `after` nothing replaces.
std::vector<int32_t> needed_afters(const splitkern::memory::Plan& plan);

// The same plan without the wait for a copy, or without what a copy comes after.
splitkern::memory::Plan without_wait(splitkern::memory::Plan plan, int32_t copy);
splitkern::memory::Plan without_after(splitkern::memory::Plan plan, int32_t copy);

}  // namespace pipeline_plans
