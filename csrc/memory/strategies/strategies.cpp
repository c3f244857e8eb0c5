#include <algorithm>

#include "memory/strategies/strategy.h"

namespace splitkern::memory {
namespace {

template <Propose rule>
Proposal the_only_one(const Problem& problem, Scheduler& scheduler) {
  return rule(problem, scheduler).front();
}

}  // namespace

std::span<const Strategy> strategies() {
  static constexpr Strategy kStrategies[] = {
      {"default", &propose_default, &least_default},
      {"none", &propose_none, &the_only_one<&propose_none>},
      {"recompute", &propose_recompute, &least_recompute},
      {"layerwise", &propose_layerwise, &the_only_one<&propose_layerwise>},
      {"hmms-paper", &propose_paper, &the_only_one<&propose_paper>},
  };
  return kStrategies;
}

std::vector<Decision> keep_all(const Problem& problem) {
  return std::vector<Decision>(problem.live.storages(), Decision::kKeep);
}

std::vector<int32_t> saved_by_write(const Liveness& live) {
  std::vector<int32_t> result;
  for (int32_t storage = 0; storage < live.storages(); ++storage) {
    if (live.saved[storage]) result.push_back(storage);
  }
  std::ranges::stable_sort(result, {}, [&](int32_t storage) { return live.last_forward_write[storage]; });
  return result;
}

}  // namespace splitkern::memory
