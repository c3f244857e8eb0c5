#include "memory/simulator.h"

#include <algorithm>
#include <string>

#include "memory/errors.h"

namespace splitkern::memory {
namespace {

template <class Container>
void require_index(const char* what, int64_t boundary, int32_t index, const Container& of) {
  if (index >= 0 && static_cast<size_t>(index) < of.size()) return;
  throw InvalidArgument("boundary " + std::to_string(boundary) + " names " + what + " " + std::to_string(index) +
                        ", there are " + std::to_string(of.size()));
}

double transfer_us(const Plan& plan, const Copy& copy) {
  const bool is_offload = copy.kind == CopyKind::kOffload;
  const double gbps = is_offload ? plan.limits.offload_gbps : plan.limits.prefetch_gbps;
  if (!(gbps > 0)) {
    throw InvalidArgument(std::string("the plan copies ") + (is_offload ? "to" : "from") +
                          " the host, but its limits give no bandwidth: " + std::to_string(gbps) + " GB/s");
  }
  return plan.limits.copy_latency_us + link_bytes(plan.storages[copy.storage], copy.compressed) / gbps * 1e-3;
}

}  // namespace

Timeline simulate(const Graph& graph, const Plan& plan) {
  const size_t count = plan.instances.size();
  if (plan.boundaries.size() != count + 1) {
    throw InvalidArgument("a plan of " + std::to_string(count) + " instances has " + std::to_string(count + 1) +
                          " boundaries, got " + std::to_string(plan.boundaries.size()));
  }
  Timeline timeline;
  timeline.instances.resize(count);
  timeline.copies.resize(plan.copies.size());
  timeline.stalls_us.resize(count + 1);
  std::vector<char> is_issued(plan.copies.size(), 0);
  double compute_stream = 0;
  double copy_streams[2] = {0, 0};
  for (size_t boundary = 0; boundary <= count; ++boundary) {
    const int64_t at = static_cast<int64_t>(boundary);
    const double arrived = compute_stream;
    for (int32_t index : plan.boundaries[boundary].waits) {
      require_index("copy", at, index, plan.copies);
      if (!is_issued[index]) {
        throw InvalidArgument("boundary " + std::to_string(boundary) + " waits for copy " + std::to_string(index) +
                              ", which no boundary before has issued");
      }
      compute_stream = std::max(compute_stream, timeline.copies[index].end_us);
    }
    timeline.stalls_us[boundary] = compute_stream - arrived;
    timeline.stall_us += timeline.stalls_us[boundary];
    for (int32_t index : plan.boundaries[boundary].issues) {
      require_index("copy", at, index, plan.copies);
      const Copy& copy = plan.copies[index];
      require_index("storage", at, copy.storage, plan.storages);
      double& stream = copy_streams[copy.kind == CopyKind::kOffload ? 0 : 1];
      double begin = std::max(stream, compute_stream);
      for (int32_t before : copy.after) {
        require_index("copy", at, before, plan.copies);
        if (!is_issued[before]) {
          throw InvalidArgument("copy " + std::to_string(index) + " comes after copy " + std::to_string(before) +
                                ", which is not issued earlier");
        }
        begin = std::max(begin, timeline.copies[before].end_us);
      }
      stream = begin + transfer_us(plan, copy);
      timeline.copies[index] = {begin, stream};
      is_issued[index] = 1;
    }
    if (boundary == count) break;
    const Instance& instance = plan.instances[boundary];
    require_index("operation", at, instance.operation, graph.operations);
    const double duration = graph.operations[instance.operation].duration_us;
    timeline.instances[boundary] = {compute_stream, compute_stream + duration};
    compute_stream += duration;
    (instance.is_recomputation ? timeline.recompute_us : timeline.compute_us) += duration;
  }
  timeline.step_us = compute_stream;
  return timeline;
}

}  // namespace splitkern::memory
