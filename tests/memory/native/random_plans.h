// Random small graphs, plans for them, and mutants of plans, for the checks of the validator. The plans come from a
// maker that knows nothing of the planner: it drops, copies, repeats and merges at random, mostly where that is right.
#pragma once

#include <string>

#include "memory/graph.h"
#include "memory/native/random_numbers.h"
#include "memory/plan.h"

namespace random_plans {

// Keeps the rules of graph.h.
splitkern::memory::Graph make_graph(random_numbers::Random& random);

// Perhaps valid: most are.
splitkern::memory::Plan make_plan(const splitkern::memory::Graph& graph, random_numbers::Random& random);

// Changes one thing and says which; perhaps nothing that matters. Empty: this plan has nothing of the kind drawn.
std::string mutate(const splitkern::memory::Graph& graph, splitkern::memory::Plan& plan,
                   random_numbers::Random& random);

// Makes the predicted bytes those of the residencies.
void predict(splitkern::memory::Plan& plan);

}  // namespace random_plans
