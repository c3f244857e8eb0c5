#include "memory/planner.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "memory/errors.h"
#include "memory/liveness.h"
#include "memory/replacement.h"
#include "memory/schedule.h"
#include "memory/storage_assignment.h"
#include "memory/strategies/strategy.h"

namespace splitkern::memory {
namespace {

// How often budgets of live bytes are lowered because addresses need more than live bytes do: of one proposal, and of
// all.
constexpr int kTightenings = 3;
constexpr int kRounds = 3;
constexpr int kHostBisections = 12;

int64_t minus(int64_t budget, int64_t bytes) {
  return budget == kUnlimited ? kUnlimited : budget - bytes;
}

const Strategy& strategy_named(const std::string& name) {
  std::string names;
  for (const Strategy& strategy : strategies()) {
    if (strategy.name == name) return strategy;
    names += (names.empty() ? "" : ", ") + std::string(strategy.name);
  }
  throw InvalidArgument("strategy must be one of " + names + ", got \"" + name + "\"");
}

class Planner {
 public:
  Planner(const Graph& graph, const Limits& limits, const PlanOptions& options, bool compress)
      : graph_(graph),
        limits_(limits),
        options_(options),
        live_(analyse(graph, assign_storages(graph), limits, compress)),
        scheduler_(graph, live_, limits),
        effort_(std::max<int64_t>(kLeastEffort, options.search_effort * live_.steps())) {}

  Plan run() {
    const Strategy& strategy = strategy_named(options_.strategy);
    std::optional<Plan> best = search(strategy);
    // Where a faster proposal found no addresses, another strategy alone might have lowered its own budgets with
    // success.
    if (lost_us_ < (best ? best->predicted.step_us : std::numeric_limits<double>::infinity()) &&
        strategy.name == strategies().front().name) {
      for (const Strategy& other : strategies().subspan(1)) keep_better(best, search(other));
    }
    if (!best) best = least(strategy, limits_);
    if (!best || !fits(*best, limits_)) refuse(strategy);
    best->strategy = options_.strategy;
    return std::move(*best);
  }

 private:
  // Small steps are searched well, as it costs nothing.
  static constexpr int64_t kLeastEffort = 200'000;

  Problem problem(const Limits& limits, int64_t device_bytes) const {
    return {.graph = graph_, .live = live_, .limits = limits, .device_bytes = device_bytes, .effort = effort_};
  }

  static void keep_better(std::optional<Plan>& best, std::optional<Plan> other) {
    if (other && (!best || other->predicted.step_us < best->predicted.step_us)) best = std::move(other);
  }

  static int64_t device_bytes_of(const Plan& plan) {
    return plan.predicted.device_peak_bytes + plan.predicted.parameters_peak_bytes;
  }
  static bool fits(const Plan& plan, const Limits& limits) {
    return device_bytes_of(plan) <= limits.device_bytes && plan.predicted.host_peak_bytes <= limits.host_bytes;
  }

  std::optional<Plan> search(const Strategy& strategy) {
    Limits limits = limits_;
    int64_t device_bytes = minus(limits_.device_bytes, live_.resident_bytes);
    for (int round = 0; round < kRounds; ++round) {
      const std::vector<Proposal> proposals = strategy.propose(problem(limits, device_bytes), scheduler_);
      std::optional<Plan> best;
      int64_t device_excess = kUnlimited;
      int64_t host_excess = kUnlimited;
      for (const Proposal& proposal : proposals) {
        if (!proposal.feasible || (best && proposal.step_us >= best->predicted.step_us)) continue;
        int64_t device_more = 0;
        int64_t host_more = 0;
        std::optional<Plan> found = place_within(proposal, device_bytes, limits.host_bytes, device_more, host_more);
        if (!found) {
          lost_us_ = std::min(lost_us_, proposal.step_us);
          device_excess = std::min(device_excess, device_more);
          host_excess = std::min(host_excess, host_more);
        }
        keep_better(best, std::move(found));
      }
      if (best) return best;
      if (device_excess == kUnlimited) return std::nullopt;
      device_bytes = minus(device_bytes, device_excess);
      limits.host_bytes = minus(limits.host_bytes, host_excess);
      if (limits.host_bytes < 0) return std::nullopt;
    }
    return std::nullopt;
  }

  // The proposal under budgets of live bytes that are lowered until its addresses fit the real ones. Where they do not,
  // `device_more` and `host_more` are what was too much the first time.
  std::optional<Plan> place_within(const Proposal& proposal, int64_t device_bytes, int64_t host_bytes,
                                   int64_t& device_more, int64_t& host_more) {
    for (int attempt = 0; attempt <= kTightenings; ++attempt) {
      const Schedule& schedule = scheduler_.run(proposal.decisions, proposal.policy, device_bytes, host_bytes);
      if (!schedule.feasible) return std::nullopt;
      Plan plan = make(schedule);
      if (fits(plan, limits_)) return plan;
      const int64_t device = std::max<int64_t>(0, device_bytes_of(plan) - limits_.device_bytes);
      const int64_t host = std::max<int64_t>(0, plan.predicted.host_peak_bytes - limits_.host_bytes);
      if (attempt == 0) {
        device_more = device;
        host_more = host;
      }
      // Rules do not look at budgets, and no decision here changes what is on the host.
      if (proposal.policy != CopyPolicy::kBudget || host > 0) return std::nullopt;
      device_bytes = std::min(device_bytes, plan.predicted.device_lower_bound_bytes) - device;
    }
    return std::nullopt;
  }

  // The plan with the least device bytes under the host budget; whether it fits the device is for the caller to see.
  // The default's is the least of all strategies'.
  std::optional<Plan> least(const Strategy& strategy, const Limits& limits) {
    const bool is_default = strategy.name == strategies().front().name;
    std::optional<Plan> best;
    for (const Strategy& candidate : strategies()) {
      if (!is_default && candidate.name != strategy.name) continue;
      const Proposal proposal =
          candidate.least(problem(limits, minus(limits.device_bytes, live_.resident_bytes)), scheduler_);
      if (is_default && best && proposal.least_live_bytes >= best->predicted.device_peak_bytes) continue;
      const Schedule& schedule =
          scheduler_.run(proposal.decisions, proposal.policy, proposal.least_live_bytes, kUnlimited);
      if (!schedule.feasible) continue;
      Plan plan = make(schedule);
      if (plan.predicted.host_peak_bytes > limits.host_bytes) continue;
      if (!best || device_bytes_of(plan) < device_bytes_of(*best)) best = std::move(plan);
    }
    return best;
  }

  [[noreturn]] void refuse(const Strategy& strategy) {
    // With all the host memory that it wants, does it fit the device?
    Limits unlimited = limits_;
    unlimited.host_bytes = kUnlimited;
    std::optional<Plan> best = least(strategy, unlimited);
    if (best && device_bytes_of(*best) <= limits_.device_bytes && limits_.host_bytes != kUnlimited) {
      int64_t too_small = limits_.host_bytes;
      int64_t enough = best->predicted.host_peak_bytes;
      for (int step = 0; step < kHostBisections && enough - too_small > limits_.alignment_bytes; ++step) {
        Limits tried = limits_;
        tried.host_bytes = too_small + (enough - too_small) / 2;
        const std::optional<Plan> plan = least(strategy, tried);
        if (plan && fits(*plan, tried)) {
          enough = std::min(tried.host_bytes, plan->predicted.host_peak_bytes);
        } else {
          too_small = tried.host_bytes;
        }
      }
      throw Infeasible(text(strategy, "host", limits_.host_bytes, enough) + " at this device budget, " +
                           std::to_string(limits_.device_bytes) + " bytes",
                       "host", limits_.host_bytes, enough);
    }
    if (const std::optional<Plan> here = least(strategy, limits_)) best = here;
    const int64_t enough = best ? device_bytes_of(*best) : kUnlimited;
    throw Infeasible(text(strategy, "device", limits_.device_bytes, enough) +
                         ", of which parameters, gradients and inputs " + std::to_string(live_.resident_bytes),
                     "device", limits_.device_bytes, enough);
  }

  std::string text(const Strategy& strategy, const std::string& pool, int64_t budget, int64_t enough) const {
    return "strategy \"" + std::string(strategy.name) + "\" finds no plan within the " + pool + " budget of " +
           std::to_string(budget) + " bytes: " + std::to_string(enough - budget) +
           " bytes are missing, the smallest budget is " + std::to_string(enough) + " bytes";
  }

  // A schedule with addresses and predictions.
  Plan make(const Schedule& schedule) {
    Plan plan;
    plan.graph_fingerprint = fingerprint_;
    plan.limits = limits_;
    plan.storages = live_.assignment.storages;
    plan.fused = live_.assignment.fused;
    for (const Step& step : schedule.instances) {
      plan.instances.push_back({.operation = live_.operations[step.step],
                                .is_recomputation = step.is_recomputation,
                                .accumulate = live_.accumulates[step.step] != 0});
    }
    const int32_t count = static_cast<int32_t>(plan.instances.size());
    plan.boundaries.resize(count + 1);
    add_residencies(schedule, plan);
    for (int32_t copy : schedule.issue_order) {
      const Transfer& transfer = schedule.transfers[copy / 2];
      const Copy& added = plan.copies.emplace_back(copy_of(schedule, transfer, copy % 2 == 0));
      plan.storages[added.storage].compression = live_.compression[added.storage];
      const int32_t index = static_cast<int32_t>(plan.copies.size()) - 1;
      plan.boundaries[added.issue].issues.push_back(index);
      plan.boundaries[added.wait].waits.push_back(index);
    }
    place_residencies(graph_, plan, options_.placement_effort, false);
    return plan;
  }

  // A transfer has three residencies: before, away, after; they begin at first_residency_ of its episode.
  void add_residencies(const Schedule& schedule, Plan& plan) {
    const int32_t count = static_cast<int32_t>(plan.instances.size());
    const auto add = [&](int32_t storage, Pool pool, int64_t bytes, int32_t begin, int32_t end) {
      plan.residencies.push_back({.storage = storage, .pool = pool, .size_bytes = bytes, .begin = begin, .end = end});
    };
    for (int32_t storage = 0; storage < live_.storages(); ++storage) {
      if (live_.resident[storage]) add(storage, Pool::kParameters, live_.bytes[storage], 0, std::max(count, 1));
    }
    first_residency_.clear();
    for (const Episode& episode : schedule.episodes) {
      const int64_t bytes = live_.bytes[episode.storage];
      first_residency_.push_back(static_cast<int32_t>(plan.residencies.size()));
      if (episode.transfer < 0) {
        add(episode.storage, Pool::kDevice, bytes, episode.begin, episode.end);
        continue;
      }
      const Transfer& transfer = schedule.transfers[episode.transfer];
      add(episode.storage, Pool::kDevice, bytes, episode.begin, transfer.offload_wait);
      add(episode.storage, Pool::kHost, live_.host_bytes[episode.storage], transfer.offload_issue,
          transfer.prefetch_wait);
      add(episode.storage, Pool::kDevice, bytes, transfer.prefetch_issue, episode.end);
    }
    for (int32_t instance = 0; instance < count; ++instance) {
      const int64_t bytes = live_.workspace_bytes[schedule.instances[instance].step];
      if (bytes > 0) add(-1, Pool::kDevice, bytes, instance, instance + 1);
    }
  }

  Copy copy_of(const Schedule& schedule, const Transfer& transfer, bool is_offload) const {
    const int32_t before = first_residency_[transfer.episode];
    const int32_t storage = schedule.episodes[transfer.episode].storage;
    return {.kind = is_offload ? CopyKind::kOffload : CopyKind::kPrefetch,
            .storage = storage,
            .source = is_offload ? before : before + 1,
            .destination = is_offload ? before + 1 : before + 2,
            .issue = is_offload ? transfer.offload_issue : transfer.prefetch_issue,
            .wait = is_offload ? transfer.offload_wait : transfer.prefetch_wait,
            .after = {},
            .compressed = live_.compression[storage].has_value()};
  }

  const Graph& graph_;
  const Limits limits_;
  const PlanOptions options_;
  const Liveness live_;
  Scheduler scheduler_;
  const int64_t effort_;
  const std::string fingerprint_ = fingerprint(graph_);
  double lost_us_ = std::numeric_limits<double>::infinity();  // the best predicted time that got no addresses
  std::vector<int32_t> first_residency_;
};

}  // namespace

std::vector<std::string> strategy_names() {
  std::vector<std::string> names;
  for (const Strategy& strategy : strategies()) names.emplace_back(strategy.name);
  return names;
}

Plan plan(const Graph& graph, const Limits& limits, const PlanOptions& options) {
  require_valid(graph);
  require_valid(limits);
  strategy_named(options.strategy);
  if (options.search_effort < 1)
    throw InvalidArgument("search_effort must be 1 or more, got " + std::to_string(options.search_effort));
  if (options.placement_effort < 0)
    throw InvalidArgument("placement_effort must be 0 or more, got " + std::to_string(options.placement_effort));
  if (std::ranges::any_of(graph.storages, [](const Storage& storage) { return storage.compression.has_value(); })) {
    try {
      return Planner(graph, limits, options, /*compress=*/true).run();
    } catch (const Infeasible&) {
      // Compressed slots on the host take more room than plain ones; so the budgets that it names are the plain ones'.
    }
  }
  return Planner(graph, limits, options, /*compress=*/false).run();
}

}  // namespace splitkern::memory
