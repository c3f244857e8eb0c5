// A brute-force judge of small plans, for the checks of the validator: independent of it and as plain as can be. Lists
// are compared pair by pair, tensors are lists of bytes, and the three streams are explored state by state.
//
// What it decides. A plan is valid if
//   1. its lists keep the rules of plan.h (looked at entry by entry);
//   2. in no reachable state of the three streams (every stream anywhere in its program that the others allow) do two
//      accesses that are under way touch the same byte, one of them writing, or does an access under way touch a byte
//      that its residency does not own at that point of the compute stream;
//   3. executed on bytes, with operations that hash all they read, every instance reads what its operation reads in
//      the graph, and what must be there after the step is.
// By 2 the result of 3 is the same for every schedule; that is tested too, under eager, late and random schedules in
// which every access first fills what it writes with junk.
#pragma once

#include <cstdint>
#include <string>

#include "memory/graph.h"
#include "memory/plan.h"

namespace interpreter {

struct Judgement {
  bool is_valid = false;
  std::string why;  // the first thing that is wrong
};

// Throws if two schedules of a plan without races disagree: then the judge itself is wrong.
Judgement judge(const splitkern::memory::Graph& graph, const splitkern::memory::Plan& plan, uint64_t seed);

}  // namespace interpreter
