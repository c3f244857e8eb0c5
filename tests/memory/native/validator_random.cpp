// The validator against the brute-force judge, on random graphs, plans and mutants: a part of what validator_fuzz runs.
#include <set>
#include <string>

#include "memory/native/graphs.h"
#include "memory/native/random_plans.h"
#include "memory/native/validator_cases.h"
#include "memory/storage_assignment.h"
#include "memory/validator.h"
#include "native/check.h"

using namespace splitkern::memory;

CHECK_NAMED(validator_random, "validator: agrees with the brute-force judge on random plans and mutants") {
  const validator_cases::Tally tally = validator_cases::compare(600, 1);
  check::require(tally.disagreements.empty(), tally.disagreements.empty() ? "" : tally.disagreements.front());
  // The cases must be of both kinds, and of every reason that a random plan can have.
  check::require(tally.plans_accepted > 400 && tally.plans_rejected > 10, "plans of both kinds");
  check::require(tally.mutants_accepted > 200 && tally.mutants_rejected > 1000, "mutants of both kinds");
  for (int reason = 0; reason <= static_cast<int>(Reason::kFinalValue); ++reason) {
    const auto it = static_cast<Reason>(reason);
    // Rare or not drawn at all; the checks by hand have them.
    const std::set<Reason> rare = {Reason::kIndex, Reason::kLimits, Reason::kBoundaries, Reason::kAlignment};
    check::require(rare.contains(it) || tally.reasons.contains(it), "no case of " + std::string(to_string(it)));
  }
}

namespace {

// Everything stays on the device from its first use to its last, as storage assignment has merged it.
Plan keep_all(const Graph& graph, const StorageAssignment& assignment) {
  Plan plan;
  plan.graph_fingerprint = fingerprint(graph);
  plan.storages = assignment.storages;
  plan.fused = assignment.fused;
  std::set<int32_t> sums, producers;
  for (const FusedSum& fused : plan.fused) {
    sums.insert(fused.sum);
    producers.insert(fused.producer);
  }
  for (int32_t o = 0; o < static_cast<int32_t>(graph.operations.size()); ++o) {
    if (!sums.contains(o)) plan.instances.push_back({o, false, producers.contains(o)});
  }
  const auto last = static_cast<int32_t>(plan.instances.size());
  plan.boundaries.resize(last + 1);
  std::vector<int32_t> begin(plan.storages.size(), last), end(plan.storages.size(), 0);
  for (int32_t i = 0; i < last; ++i) {
    const Operation& operation = graph.operations[plan.instances[i].operation];
    for (const std::vector<int32_t>* list : {&operation.reads, &operation.writes}) {
      for (const int32_t t : *list) {
        const int32_t p = assignment.storage_of[graph.tensors[t].storage];
        begin[p] = std::min(begin[p], i);
        end[p] = i + 1;
      }
    }
  }
  int64_t top = 0;
  int64_t fixed_top = 0;
  for (int32_t p = 0; p < static_cast<int32_t>(plan.storages.size()); ++p) {
    const int64_t size = (plan.storages[p].size_bytes + 511) / 512 * 512;
    if (kind_of(graph, plan.storages[p]) != StorageKind::kActivation) {
      plan.residencies.push_back({p, Pool::kParameters, fixed_top, size, 0, last});
      fixed_top += size;
    } else if (end[p] > 0) {
      const bool stays = is_output(graph, plan.storages[p]);
      plan.residencies.push_back({p, Pool::kDevice, top, size, begin[p], stays ? last : end[p]});
      top += size;
    }
  }
  for (int32_t i = 0; i < last; ++i) {
    const int64_t bytes = graph.operations[plan.instances[i].operation].workspace_bytes;
    if (bytes > 0) plan.residencies.push_back({-1, Pool::kDevice, top, (bytes + 511) / 512 * 512, i, i + 1});
  }
  random_plans::predict(plan);
  return plan;
}

}  // namespace

CHECK_NAMED(validator_assignment, "validator: accepts what storage assignment makes of training steps") {
  for (const Graph& graph : graphs::small_training_steps()) {
    for (const bool merging : {true, false}) {
      const StorageAssignment assignment =
          assign_storages(graph, {.inplace = merging, .sums = merging, .accumulation = merging});
      const std::vector<Violation> found = find_violations(graph, keep_all(graph, assignment));
      check::require(found.empty(), graph.name + ": " + (found.empty() ? "" : found[0].text));
    }
  }
}
