// Checks of the strategies: the rules by hand, and the search against every decision that there is.
#include "memory/strategies/strategy.h"

#include <algorithm>
#include <cstdio>

#include "graphs.h"
#include "memory/errors.h"
#include "memory/planner.h"
#include "memory/storage_assignment.h"
#include "memory/validator.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

struct Case {
  Case(Graph step, Limits given)
      : graph(std::move(step)), limits(given), live(analyse(graph, assign_storages(graph), limits)) {}

  Problem problem(int64_t device_bytes) const {
    return {.graph = graph, .live = live, .limits = limits, .device_bytes = device_bytes, .effort = 200'000};
  }

  Graph graph;
  Limits limits;
  Liveness live;
};

// Small, the same everywhere.
class Numbers {
 public:
  explicit Numbers(uint32_t seed) : state_(seed * 2654435761u + 1) {}
  int below(int bound) {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<int>((state_ >> 8) % static_cast<uint32_t>(bound));
  }

 private:
  uint32_t state_;
};

// A forward chain with a few skips, and backward steps that read what the forward ones read and wrote; sizes, times and
// readers by lot. 8 saved storages at most.
Graph random_step(uint32_t seed) {
  Numbers numbers(seed);
  graphs::Builder builder("random " + std::to_string(seed));
  const int length = 4 + numbers.below(5);
  std::vector<int32_t> values = {builder.value("images", 512, StorageKind::kInput)};
  for (int index = 0; index < length; ++index) {
    std::vector<int32_t> reads = {values.back()};
    if (index > 1 && numbers.below(3) == 0) reads.push_back(values[1 + numbers.below(index)]);
    if (reads.size() == 2 && reads[0] == reads[1]) reads.pop_back();
    values.push_back(builder.value("a" + std::to_string(index), 512 * (1 + numbers.below(8))));
    Operation& operation =
        builder.operation("f" + std::to_string(index), "aten.f", reads, {values.back()}, 1 + numbers.below(20));
    operation.is_random = numbers.below(8) == 0;
  }
  int32_t gradient = -1;
  for (int index = length - 1; index >= 0; --index) {
    std::vector<int32_t> reads = {values[index + (numbers.below(2) ? 1 : 0)]};
    if (index > 0 && numbers.below(3) == 0) reads.push_back(values[1 + numbers.below(index)]);
    if (reads.size() == 2 && reads[0] == reads[1]) reads.pop_back();
    if (gradient >= 0) reads.push_back(gradient);
    gradient = builder.value("g" + std::to_string(index), 512 * (1 + numbers.below(4)),
                             index == 0 ? StorageKind::kGradient : StorageKind::kActivation);
    builder.operation("b" + std::to_string(index), "aten.b", reads, {gradient}, 1 + numbers.below(30)).is_backward =
        true;
  }
  return builder.graph;
}

// The least step time over all decisions; infinite where none fits.
double exhaustive(const Case& c, int64_t device_bytes, Scheduler& scheduler) {
  const std::vector<int32_t> saved = saved_by_write(c.live);
  std::vector<Decision> decisions(c.live.storages(), Decision::kKeep);
  double best = std::numeric_limits<double>::infinity();
  const auto descend = [&](const auto& self, size_t position) -> void {
    if (position == saved.size()) {
      const Schedule& schedule = scheduler.run(decisions, CopyPolicy::kBudget, device_bytes, c.limits.host_bytes);
      if (schedule.feasible) best = std::min(best, schedule.step_us);
      return;
    }
    for (Decision decision : {Decision::kKeep, Decision::kOffload, Decision::kRecompute}) {
      if (!may(c.live, c.limits, saved[position], decision)) continue;
      decisions[saved[position]] = decision;
      self(self, position + 1);
    }
    decisions[saved[position]] = Decision::kKeep;
  };
  descend(descend, 0);
  return best;
}

// The plan is right, and predicted by the simulator to take as long as the scheduler says, unless it got no addresses.
void check_plan(const Graph& graph, const Limits& limits, const Proposal& proposal, int& placed) {
  try {
    const Plan found = plan(graph, limits);
    const std::vector<Violation> violations = find_violations(graph, found);
    check::require(violations.empty(), graph.name + ": " + (violations.empty() ? "" : violations[0].text));
    const double more = found.predicted.step_us / proposal.step_us - 1;
    check::require(more > -1e-9, graph.name + ": the plan is no faster than its schedule");
    placed += more < 1e-9;
  } catch (const Infeasible& error) {
    check::require(error.smallest_feasible_bytes > limits.device_bytes, graph.name + ": addresses need more");
  }
}

}  // namespace

CHECK_NAMED(strategies_exhaustive,
            "strategies: the default against every decision that there is, on small random steps") {
  int compared = 0;
  int optimal = 0;
  double sum = 0;
  double worst = 0;
  int placed = 0;
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    const double gbps = 0.05 * (1 << seed % 4);
    const Case c(random_step(seed), {.offload_gbps = gbps, .prefetch_gbps = gbps, .copy_latency_us = 1});
    Scheduler scheduler(c.graph, c.live, c.limits);
    const std::vector<Decision> keep(c.live.storages(), Decision::kKeep);
    const int64_t all = scheduler.run(keep, CopyPolicy::kBudget, kUnlimited, kUnlimited).device_live_bytes;
    for (int percent : {90, 75, 60}) {
      const int64_t budget = all / 100 * percent;
      const double least = exhaustive(c, budget, scheduler);
      const std::vector<Proposal> proposals = propose_default(c.problem(budget), scheduler);
      const bool found = !proposals.empty() && proposals.front().feasible;
      check::require(found == (least < std::numeric_limits<double>::infinity()),
                     c.graph.name + ": feasible exactly where some decision is");
      if (!found) continue;
      Limits limits = c.limits;
      limits.device_bytes = budget + c.live.resident_bytes;
      check_plan(c.graph, limits, proposals.front(), placed);
      const double gap = proposals.front().step_us / least - 1;
      check::require(gap > -1e-9, "no proposal is better than the best");
      ++compared;
      optimal += gap < 1e-9;
      sum += gap;
      worst = std::max(worst, gap);
    }
  }
  check::require(placed * 10 >= compared * 8, "the best proposal nearly always finds addresses");
  std::printf("%d steps: %d optimal, mean gap %.4f %%, worst %.4f %%\n", compared, optimal, 100 * sum / compared,
              100 * worst);
  check::require(compared > 50, "enough budgets were feasible");
  check::require(sum / compared <= 0.001, "mean gap " + std::to_string(sum / compared));
  check::require(worst <= 0.02, "worst gap " + std::to_string(worst));
}

CHECK_NAMED(strategies_paper, "strategies: the paper's rule offloads in order of writing, up to what the link hides") {
  graphs::Net net;
  net.layers = {{}, {}, {.pool = true}, {}};
  net.batch_norm = false;
  Case c(graphs::training_step(net), {.offload_gbps = 1, .prefetch_gbps = 1});
  double forward_us = 0;
  for (int32_t step = 0; step < c.live.turn; ++step) forward_us += c.live.duration_us[step];
  int64_t saved = 0;
  for (int32_t storage : saved_by_write(c.live)) saved += c.live.assignment.storages[storage].size_bytes;
  // The link moves half of what is saved while forward runs.
  c.limits.offload_gbps = c.limits.prefetch_gbps = static_cast<double>(saved) / 2 / forward_us / 1e3;
  const std::vector<Decision> decisions = paper_decisions(c.problem(kUnlimited));
  int64_t offloaded = 0;
  bool is_prefix = true;
  bool ended = false;
  for (int32_t storage : saved_by_write(c.live)) {
    const bool is_offloaded = decisions[storage] == Decision::kOffload;
    is_prefix &= !(ended && is_offloaded);
    ended |= !is_offloaded;
    if (is_offloaded) offloaded += c.live.assignment.storages[storage].size_bytes;
  }
  check::require(is_prefix && ended && offloaded > 0 && offloaded <= saved / 2, "a prefix of at most half the bytes");
}

CHECK_NAMED(strategies_layerwise, "strategies: layer by layer, what a layer reads is offloaded and all else stays") {
  graphs::Net net;
  net.layers = {{.pool = true}, {}};
  net.batch_norm = false;
  const Case c(graphs::training_step(net), {.offload_gbps = 1, .prefetch_gbps = 1});
  const std::vector<Decision> decisions = layerwise_decisions(c.problem(kUnlimited));
  int offloaded = 0;
  for (int32_t storage : saved_by_write(c.live)) {
    const std::string& name = c.graph.storages[c.live.assignment.storages[storage].members.back()].name;
    const bool is_map =
        name.find("offsets") == std::string::npos && c.live.last_forward[storage] > c.live.last_forward_write[storage];
    check::equal(decisions[storage] == Decision::kOffload, is_map, name);
    offloaded += is_map;
  }
  check::require(offloaded >= 2, "feature maps are offloaded");
  const Case linkless(c.graph, {});
  check::require(std::ranges::all_of(layerwise_decisions(linkless.problem(kUnlimited)),
                                     [](Decision decision) { return decision == Decision::kKeep; }),
                 "nothing without a link");
}
