// Stage 1 of planning: which storages of the graph share one planned storage, one after the other, and which sums need
// not run. Called by plan(); pure and deterministic, near-linear in the size of the graph.
#pragma once

#include <cstdint>
#include <vector>

#include "memory/graph.h"
#include "memory/plan.h"

namespace splitkern::memory {

// Each rule can be switched off, for comparisons.
struct AssignmentOptions {
  bool inplace = true;       // operations but sums write where they read, as Operation::inplace allows
  bool sums = true;          // sums (residual joins) write into the operand that dies, as Operation::inplace allows
  bool accumulation = true;  // a producer adds to the other operand of the sum behind it (patch weight gradients)

  bool operator==(const AssignmentOptions&) const = default;
};

struct StorageAssignment {
  std::vector<PlanStorage> storages;  // in order of their lowest graph storage; members in order of first write
  std::vector<int32_t> storage_of;    // graph storage to planned storage
  std::vector<FusedSum> fused;        // in order of the sums

  bool operator==(const StorageAssignment&) const = default;
};

// The members of a planned storage have equal sizes and follow each other in time: each is written for the first time
// by the operation that reads the one before for the last time (or, in a fused sum, by the producer). Only activations
// that are no outputs are ever followed, so the last member alone may be a gradient or an output; parameters and inputs
// stay alone.
//
// A fused sum has no instance. From its producer on, the planned storage holds the sum: the producer of product p runs
// with Instance::accumulate over the other operand o, and o, p and the sum are consecutive members.
//
// The graph must be valid; require_valid is not called again.
StorageAssignment assign_storages(const Graph& graph, const AssignmentOptions& options = {});

// Of a planned storage: kParameter or kInput where it has one such member, kGradient if any member is one.
StorageKind kind_of(const Graph& graph, const PlanStorage& storage);

// Whether its last value is returned.
bool is_output(const Graph& graph, const PlanStorage& storage);

}  // namespace splitkern::memory
