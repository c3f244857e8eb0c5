// Proves a plan right or says what is wrong with it. Called on every plan before it runs, by tests, and by whoever
// reads a plan from a file. Shares no code with the planner: only the types of the graph, the plan and the limits. It
// trusts nothing in the plan and nothing that the planner claims; the graph must keep the rules of graph.h.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "memory/errors.h"
#include "memory/graph.h"
#include "memory/plan.h"

namespace splitkern::memory {

// What a plan can do wrong. Proven in this order; a plan whose form is wrong is not looked into further.
enum class Reason : uint8_t {
  // Form
  kOtherGraph,  // the plan was made for another graph
  kLimits,      // its limits break a rule of limits.h
  kIndex,       // an index or an enumerator out of range
  kMembership,  // a graph storage is not a member of exactly one planned storage, or two of them need the same bytes
  kSize,        // smaller than what lies in it, no multiple of the alignment, negative or overflowing
  kAlignment,   // an offset that is negative or no multiple of the alignment
  kOrder,       // captured order is not kept, or an operation is missing, or twice, or repeated before its first run
  kRepetition,  // a random or mutating operation runs again
  kFused,       // the conditions of Plan::fused do not hold, or Instance::accumulate does not go with it
  kBoundaries,  // not one more boundary than instances
  kIssue,       // a copy is not issued exactly once, at its boundary
  kWait,        // a copy is not waited for exactly once, at its boundary, after its issue
  kEndpoints,   // a copy between wrong pools or residencies of another storage
  kAfter,       // a copy after one that is of its own stream or not issued earlier
  kLink,        // a copy in a direction whose bandwidth is 0
  kCompressed,  // a compressed copy without a measurement, without room for any values, or back as a plain one
  kLifetime,    // a residency that ends before it begins or lies outside the step
  kPool,        // a parameter, input or gradient that moves, or an activation among them
  kWorkspace,   // workspace that is missing, twice, or of an instance that needs none
  // Addresses
  kOverlap,     // two residencies own the same bytes at once
  kBudget,      // a pool is larger than its budget
  kPrediction,  // predicted peaks or bounds are not those of the residencies
  // Causality
  kNotResident,      // an instance touches a storage that is not on the device
  kSeveralDevice,    // or that is there in two residencies: which does it mean?
  kOutside,          // a copy begins before, or can still run after, a residency that it touches
  kBeforeArrival,    // an access to bytes that a copy may still be writing
  kBeforeDeparture,  // a write to bytes that a copy may still be reading
  // Values
  kInplace,     // a write over bytes that the same instance reads, where the operation does not allow it
  kWrongValue,  // an instance reads something other than in the graph
  kFinalValue,  // a parameter, input, gradient or output does not hold its last value on the device after the step
  kTooComplex,  // boxes of one storage that are too irregular to be told apart within the validator's bounds
};
std::string_view to_string(Reason reason);

struct Violation {
  Reason reason = Reason::kOtherGraph;
  std::string text;  // names the instance, operation, storage, copy or residency, the boundary and the bytes
};

// Its reason is that of the first violation; its text lists all that were found.
class InvalidPlan : public InvalidArgument {
 public:
  explicit InvalidPlan(std::vector<Violation> violations);
  Reason reason;
  std::vector<Violation> violations;
};

// The first violations, `most` at most, in a fixed order; none: the plan is proven right under the execution model of
// plan.h, for every timing of the three streams. Throws InvalidArgument if the graph is not valid or `most` < 1.
// Near-linear in the sizes of graph and plan. Pure; any thread.
std::vector<Violation> find_violations(const Graph& graph, const Plan& plan, int64_t most = 1);

// Throws InvalidPlan with the first violation.
void validate(const Graph& graph, const Plan& plan);

}  // namespace splitkern::memory
