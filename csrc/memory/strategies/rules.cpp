// The strategies that are rules, not searches: they know one schedule each, which fits the budget or does not.
#include <utility>

#include "memory/strategies/strategy.h"

namespace splitkern::memory {
namespace {

std::vector<Proposal> only(const Problem& problem, Scheduler& scheduler, std::vector<Decision> decisions,
                           CopyPolicy policy) {
  const Schedule& schedule = scheduler.run(decisions, policy, problem.device_bytes, problem.limits.host_bytes);
  Proposal proposal{.decisions = std::move(decisions), .policy = policy};
  proposal.feasible = schedule.feasible;
  proposal.step_us = schedule.step_us;
  proposal.least_live_bytes = schedule.device_live_bytes;
  if (proposal.least_live_bytes == 0) {  // it did not get as far as that
    proposal.least_live_bytes =
        scheduler.run(proposal.decisions, policy, kUnlimited, problem.limits.host_bytes).device_live_bytes;
  }
  return {std::move(proposal)};
}

}  // namespace

// vDNN_all: what a layer reads is offloaded while it runs. What no forward layer reads (offsets of poolings,
// statistics) is no feature map and stays.
std::vector<Decision> layerwise_decisions(const Problem& problem) {
  std::vector<Decision> decisions = keep_all(problem);
  for (int32_t storage = 0; storage < problem.live.storages(); ++storage) {
    if (may(problem.live, problem.limits, storage, Decision::kOffload) &&
        problem.live.last_forward[storage] > problem.live.last_forward_write[storage])
      decisions[storage] = Decision::kOffload;
  }
  return decisions;
}

// As they come in, up to the theoretical limit: as many bytes as the link moves while forward, and backward, run.
std::vector<Decision> paper_decisions(const Problem& problem) {
  const Liveness& live = problem.live;
  std::vector<Decision> decisions = keep_all(problem);
  double forward_us = 0;
  double backward_us = 0;
  for (int32_t step = 0; step < live.steps(); ++step)
    (step < live.turn ? forward_us : backward_us) += live.duration_us[step];
  for (int32_t storage : saved_by_write(live)) {
    if (!may(live, problem.limits, storage, Decision::kOffload)) continue;
    forward_us -= copy_us(problem.limits, CopyKind::kOffload, live.link_bytes[storage]);
    backward_us -= copy_us(problem.limits, CopyKind::kPrefetch, live.link_bytes[storage]);
    if (forward_us < 0 || backward_us < 0) break;
    decisions[storage] = Decision::kOffload;
  }
  return decisions;
}

std::vector<Proposal> propose_none(const Problem& problem, Scheduler& scheduler) {
  return only(problem, scheduler, keep_all(problem), CopyPolicy::kBudget);
}
std::vector<Proposal> propose_layerwise(const Problem& problem, Scheduler& scheduler) {
  return only(problem, scheduler, layerwise_decisions(problem), CopyPolicy::kLayerwise);
}
std::vector<Proposal> propose_paper(const Problem& problem, Scheduler& scheduler) {
  return only(problem, scheduler, paper_decisions(problem), CopyPolicy::kHidden);
}

}  // namespace splitkern::memory
