#include "memory/native/validator_cases.h"

#include "memory/native/interpreter.h"
#include "memory/native/random_plans.h"

namespace validator_cases {

using namespace splitkern::memory;

Tally compare(int64_t graphs, uint64_t seed) {
  constexpr int kMutants = 4;
  Tally tally;
  // Whether the validator accepts; the judge must say the same.
  const auto decide = [&](const Graph& graph, const Plan& plan, const std::string& what, uint64_t case_seed) {
    const std::vector<Violation> found = find_violations(graph, plan);
    const interpreter::Judgement judgement = interpreter::judge(graph, plan, case_seed);
    if (!found.empty()) ++tally.reasons[found[0].reason];
    if (found.empty() != judgement.is_valid) {
      tally.disagreements.push_back("graph " + std::to_string(case_seed) + ", " + what +
                                    ": validator: " + (found.empty() ? "accepted" : found[0].text) +
                                    "; judge: " + (judgement.is_valid ? "valid" : judgement.why));
    }
    return found.empty();
  };
  for (int64_t i = 0; i < graphs; ++i) {
    const uint64_t case_seed = seed + static_cast<uint64_t>(i);
    random_numbers::Random random(case_seed);
    const Graph graph = random_plans::make_graph(random);
    const Plan plan = random_plans::make_plan(graph, random);
    ++(decide(graph, plan, "plan", case_seed) ? tally.plans_accepted : tally.plans_rejected);
    for (int m = 0; m < kMutants; ++m) {
      Plan mutant = plan;
      const std::string what = random_plans::mutate(graph, mutant, random);
      if (what.empty()) continue;
      const bool accepted = decide(graph, mutant, what, case_seed);
      ++(accepted ? tally.mutants_accepted : tally.mutants_rejected);
      ++(accepted ? tally.kinds[what].first : tally.kinds[what].second);
    }
  }
  return tally;
}

}  // namespace validator_cases
