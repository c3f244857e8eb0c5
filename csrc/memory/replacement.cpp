#include "memory/replacement.h"

#include <algorithm>
#include <string>
#include <vector>

#include "memory/errors.h"
#include "memory/simulator.h"

namespace splitkern::memory {
namespace {

int64_t aligned(int64_t bytes, int64_t alignment) {
  int64_t result = 0;
  if (__builtin_add_overflow(bytes, alignment - 1, &result)) throw InvalidArgument("a size passes 2^63 - 1");
  return result & ~(alignment - 1);
}

void require_index(const char* what, int32_t index, size_t count) {
  if (index < 0 || static_cast<size_t>(index) >= count)
    throw InvalidArgument(std::string("the plan's ") + what + " must be below " + std::to_string(count) + ", got " +
                          std::to_string(index));
}

void require_within(const char* pool, int64_t budget, int64_t needed) {
  if (needed <= budget) return;
  throw Infeasible("the plan's decisions need " + std::to_string(needed) + " bytes of the " + pool +
                       " at these sizes, the budget is " + std::to_string(budget) + " bytes",
                   pool, budget, needed);
}

}  // namespace

Graph with_sizes(const Graph& graph, std::span<const int64_t> numbers) {
  size_t wanted = graph.storages.size();
  for (const Tensor& tensor : graph.tensors) wanted += 1 + tensor.sizes.size() + tensor.strides_bytes.size();
  if (numbers.size() != wanted)
    throw InvalidArgument("numbers must hold " + std::to_string(wanted) + " values for this graph, got " +
                          std::to_string(numbers.size()));
  Graph made = graph;
  auto next = numbers.begin();
  for (Storage& storage : made.storages) storage.size_bytes = *next++;
  for (Tensor& tensor : made.tensors) {
    tensor.offset_bytes = *next++;
    for (int64_t& size : tensor.sizes) size = *next++;
    for (int64_t& stride : tensor.strides_bytes) stride = *next++;
  }
  return made;
}

void place_residencies(const Graph& graph, Plan& plan, int64_t placement_effort, bool stop_when_fitting) {
  Predicted& predicted = plan.predicted;
  for (const Pool pool : {Pool::kParameters, Pool::kDevice, Pool::kHost}) {
    std::vector<Buffer> buffers;
    std::vector<size_t> residencies;
    for (size_t index = 0; index < plan.residencies.size(); ++index) {
      const Residency& residency = plan.residencies[index];
      if (residency.pool != pool) continue;
      buffers.push_back({residency.begin, residency.end, residency.size_bytes});
      residencies.push_back(index);
    }
    PlacementOptions options{.alignment_bytes = plan.limits.alignment_bytes, .effort = placement_effort};
    if (stop_when_fitting && pool == Pool::kHost) options.capacity_bytes = plan.limits.host_bytes;
    if (stop_when_fitting && pool == Pool::kDevice && plan.limits.device_bytes != kUnlimited)
      options.capacity_bytes = std::max<int64_t>(0, plan.limits.device_bytes - predicted.parameters_peak_bytes);
    const Placement placement = place(buffers, options);
    for (size_t index = 0; index < residencies.size(); ++index)
      plan.residencies[residencies[index]].offset_bytes = placement.offsets[index];
    (pool == Pool::kParameters ? predicted.parameters_peak_bytes
     : pool == Pool::kDevice   ? predicted.device_peak_bytes
                               : predicted.host_peak_bytes) = placement.peak_bytes;
    if (pool == Pool::kDevice) predicted.device_lower_bound_bytes = placement.lower_bound_bytes;
    if (pool == Pool::kHost) predicted.host_lower_bound_bytes = placement.lower_bound_bytes;
  }
  const Timeline timeline = simulate(graph, plan);
  predicted.step_us = timeline.step_us;
  predicted.compute_us = timeline.compute_us;
  predicted.recompute_us = timeline.recompute_us;
  predicted.stall_us = timeline.stall_us;
}

Plan place_again(const Graph& graph, const Plan& decided, const Limits& limits, int64_t placement_effort) {
  require_valid(limits);
  if (placement_effort < 0)
    throw InvalidArgument("placement_effort must be 0 or more, got " + std::to_string(placement_effort));
  Plan plan = decided;
  plan.graph_fingerprint = fingerprint(graph);
  plan.limits = limits;
  for (const Instance& instance : plan.instances)
    require_index("operations", instance.operation, graph.operations.size());
  for (PlanStorage& storage : plan.storages) {
    storage.size_bytes = 0;
    for (const int32_t member : storage.members) {
      require_index("members", member, graph.storages.size());
      storage.size_bytes = std::max(storage.size_bytes, graph.storages[static_cast<size_t>(member)].size_bytes);
    }
  }
  for (Residency& residency : plan.residencies) {
    int64_t bytes = 0;
    if (residency.storage >= 0) {
      require_index("storages", residency.storage, plan.storages.size());
      bytes = plan.storages[static_cast<size_t>(residency.storage)].size_bytes;
    } else {
      require_index("instances", residency.begin, plan.instances.size());
      const Instance& instance = plan.instances[static_cast<size_t>(residency.begin)];
      bytes = graph.operations[static_cast<size_t>(instance.operation)].workspace_bytes;
    }
    residency.size_bytes = aligned(bytes, limits.alignment_bytes);
  }
  place_residencies(graph, plan, placement_effort, true);
  const Predicted& predicted = plan.predicted;
  require_within("device", limits.device_bytes, predicted.device_peak_bytes + predicted.parameters_peak_bytes);
  require_within("host", limits.host_bytes, predicted.host_peak_bytes);
  return plan;
}

}  // namespace splitkern::memory
