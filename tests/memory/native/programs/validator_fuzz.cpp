// The long run of the validator against the brute-force judge: validator_fuzz GRAPHS SEED. Status 1 after a false
// accept or a false reject, which it prints; then `validator_fuzz 1 ...` of that graph's seed shows it alone.
#include <cstdlib>
#include <iostream>
#include <string>

#include "memory/native/validator_cases.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: validator_fuzz GRAPHS SEED\n";
    return 2;
  }
  const int64_t graphs = std::stoll(argv[1]);
  const uint64_t seed = std::stoull(argv[2]);
  const validator_cases::Tally tally = validator_cases::compare(graphs, seed);
  for (const std::string& text : tally.disagreements) std::cout << "DISAGREE: " << text << "\n";
  for (const auto& [kind, counts] : tally.kinds)
    std::cout << kind << ": " << counts.first << " accepted, " << counts.second << " rejected\n";
  for (const auto& [reason, count] : tally.reasons)
    std::cout << "reason \"" << splitkern::memory::to_string(reason) << "\": " << count << "\n";
  std::cout << "plans: " << tally.plans_accepted << " accepted, " << tally.plans_rejected
            << " rejected; mutants: " << tally.mutants_accepted << " accepted, " << tally.mutants_rejected
            << " rejected; disagreements: " << tally.disagreements.size() << "\n";
  return tally.disagreements.empty() ? EXIT_SUCCESS : EXIT_FAILURE;
}
