// What strategies have in common: each turns a step and its budgets into proposals, which plan() gives addresses and
// compares. To add one: its functions here, a line in strategies.cpp.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "memory/graph.h"
#include "memory/limits.h"
#include "memory/liveness.h"
#include "memory/schedule.h"

namespace splitkern::memory {

struct Problem {
  const Graph& graph;
  const Liveness& live;
  const Limits& limits;
  int64_t device_bytes = 0;  // for the device pool alone
  int64_t effort = 0;        // instances that a search may schedule, roughly; time-free, so that results repeat
};

struct Proposal {
  std::vector<Decision> decisions;  // per planned storage
  CopyPolicy policy = CopyPolicy::kBudget;
  bool feasible = false;         // by live bytes
  double step_us = 0;            // predicted, where feasible
  int64_t least_live_bytes = 0;  // of the device pool: the least under which this can be scheduled
};

// Best first; what follows is for where there are no addresses for the ones before. Without a feasible one the list is
// empty or holds infeasible ones. The scheduler is one of the problem's step and limits.
using Propose = std::vector<Proposal> (*)(const Problem&, Scheduler&);

struct Strategy {
  std::string_view name;
  Propose propose;
  // The proposal with the least live bytes on the device under the host budget, whatever the device budget and the
  // time.
  Proposal (*least)(const Problem&, Scheduler&);
};
std::span<const Strategy> strategies();

// Rules (rules.cpp).
std::vector<Proposal> propose_none(const Problem& problem, Scheduler& scheduler);
std::vector<Proposal> propose_layerwise(const Problem& problem, Scheduler& scheduler);
std::vector<Proposal> propose_paper(const Problem& problem, Scheduler& scheduler);
// Searches (search.cpp).
std::vector<Proposal> propose_recompute(const Problem& problem, Scheduler& scheduler);
std::vector<Proposal> propose_default(const Problem& problem, Scheduler& scheduler);
Proposal least_recompute(const Problem& problem, Scheduler& scheduler);
Proposal least_default(const Problem& problem, Scheduler& scheduler);

// Which storages the rules of the papers offload, without regard to budgets.
std::vector<Decision> layerwise_decisions(const Problem& problem);
std::vector<Decision> paper_decisions(const Problem& problem);
std::vector<Decision> keep_all(const Problem& problem);

// Storages that are saved across the turn, in order of their last write before it.
std::vector<int32_t> saved_by_write(const Liveness& live);

}  // namespace splitkern::memory
