// One sweep over the boundaries, all pools at once: what is owned, ordered by address. A residency that begins can
// only collide with its two neighbours, as those that are there are disjoint.
#include <algorithm>
#include <array>
#include <map>

#include "memory/validator/stages.h"

namespace splitkern::memory::validation {

void check_addresses(const Plan& plan, Findings& findings) {
  constexpr size_t kPools = 3;
  const size_t count = plan.residencies.size();
  std::vector<int32_t> begins(count);
  for (size_t i = 0; i < count; ++i) begins[i] = static_cast<int32_t>(i);
  std::vector<int32_t> ends = begins;
  std::ranges::stable_sort(begins, {}, [&](int32_t i) { return plan.residencies[i].begin; });
  std::ranges::stable_sort(ends, {}, [&](int32_t i) { return plan.residencies[i].end; });

  std::array<std::map<int64_t, int32_t>, kPools> owned;
  std::array<int64_t, kPools> peak{};
  std::array<int64_t, kPools> live{};
  std::array<int64_t, kPools> most_live{};
  size_t ended = 0;
  for (const int32_t i : begins) {
    const Residency& residency = plan.residencies[i];
    while (ended < count && plan.residencies[ends[ended]].end <= residency.begin) {
      const Residency& old = plan.residencies[ends[ended++]];
      if (old.size_bytes == 0) continue;
      owned[static_cast<size_t>(old.pool)].erase(old.offset_bytes);
      live[static_cast<size_t>(old.pool)] -= old.size_bytes;
    }
    const auto pool = static_cast<size_t>(residency.pool);
    const int64_t end_bytes = residency.offset_bytes + residency.size_bytes;
    peak[pool] = std::max(peak[pool], end_bytes);
    if (residency.size_bytes == 0) continue;
    const auto above = owned[pool].lower_bound(residency.offset_bytes);
    int32_t other = -1;
    if (above != owned[pool].end() && above->first < end_bytes) other = above->second;
    if (above != owned[pool].begin()) {
      const Residency& below = plan.residencies[std::prev(above)->second];
      if (below.offset_bytes + below.size_bytes > residency.offset_bytes) other = std::prev(above)->second;
    }
    if (other >= 0) {
      // The sweep's state would not be disjoint any more: the first one is all that this stage reports.
      findings.add(Reason::kOverlap, findings.residency(i), " and ", findings.residency(other), " overlap at boundary ",
                   residency.begin);
      return;
    }
    owned[pool].emplace(residency.offset_bytes, i);
    live[pool] += residency.size_bytes;  // at most the highest address: they are disjoint
    most_live[pool] = std::max(most_live[pool], live[pool]);
  }

  const auto device = static_cast<size_t>(Pool::kDevice);
  const auto parameters = static_cast<size_t>(Pool::kParameters);
  const auto host = static_cast<size_t>(Pool::kHost);
  if (peak[device] > plan.limits.device_bytes || peak[parameters] > plan.limits.device_bytes - peak[device]) {
    findings.add(Reason::kBudget, "device pool (", peak[device], " bytes) and parameters pool (", peak[parameters],
                 " bytes) are larger than device_bytes = ", plan.limits.device_bytes);
  }
  if (peak[host] > plan.limits.host_bytes) {
    findings.add(Reason::kBudget, "host pool (", peak[host],
                 " bytes) is larger than host_bytes = ", plan.limits.host_bytes);
  }
  const auto require_same = [&](const char* what, int64_t predicted, int64_t real) {
    if (predicted != real)
      findings.add(Reason::kPrediction, "predicted ", what, " is ", predicted, " bytes, the residencies make it ",
                   real);
  };
  require_same("device_peak_bytes", plan.predicted.device_peak_bytes, peak[device]);
  require_same("parameters_peak_bytes", plan.predicted.parameters_peak_bytes, peak[parameters]);
  require_same("host_peak_bytes", plan.predicted.host_peak_bytes, peak[host]);
  require_same("device_lower_bound_bytes", plan.predicted.device_lower_bound_bytes, most_live[device]);
  require_same("host_lower_bound_bytes", plan.predicted.host_lower_bound_bytes, most_live[host]);
}

}  // namespace splitkern::memory::validation
