// Random cases on which the validator and the brute-force judge must agree: for the check, and for the long run.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "memory/validator.h"

namespace validator_cases {

struct Tally {
  int64_t plans_accepted = 0;
  int64_t plans_rejected = 0;
  int64_t mutants_accepted = 0;
  int64_t mutants_rejected = 0;
  std::map<splitkern::memory::Reason, int64_t> reasons;      // of the rejected ones
  std::map<std::string, std::pair<int64_t, int64_t>> kinds;  // of mutation: accepted, rejected
  std::vector<std::string> disagreements;                    // false accepts and false rejects, with how to get there
};

// `graphs` random graphs, one per seed from this one on, each with one plan and a few mutants of it.
Tally compare(int64_t graphs, uint64_t seed);

}  // namespace validator_cases
