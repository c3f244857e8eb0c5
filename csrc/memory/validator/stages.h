// The stages of the proof, in order; each may assume that those before it found nothing. Internal to the validator.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "memory/validator/findings.h"

namespace splitkern::memory::validation {

// Indices, sizes, lists that must agree, captured order, pools: everything that can be seen without executing the plan.
void check_form(const Graph& graph, const Plan& plan, Findings& findings);

// No two residencies own a byte at once; peaks, bounds and budgets.
void check_addresses(const Plan& plan, Findings& findings);

// What has certainly happened when something starts, whatever the timing. Streams run in order, so "the first k copies
// of this stream are done" says all that can be known of a stream.
class Clocks {
 public:
  explicit Clocks(const Plan& plan);

  // The copy is done when the compute stream has passed the waits of this boundary.
  bool done_at_boundary(int32_t copy, int32_t boundary) const {
    return position_[copy] < at_boundary_[boundary][stream_[copy]];
  }
  // The copy is done when the other one starts.
  bool done_at_start(int32_t copy, int32_t other) const { return position_[copy] < at_start_[other][stream_[copy]]; }

 private:
  using Done = std::array<int32_t, 2>;  // copies of each copy stream
  std::vector<int32_t> stream_;         // per copy
  std::vector<int32_t> position_;       // per copy: in its stream
  std::vector<Done> at_start_;          // per copy
  std::vector<Done> at_boundary_;       // per boundary, after its waits
};

// Executes the graph and the plan side by side on symbols: causality inside residencies, and values.
void check_execution(const Graph& graph, const Plan& plan, const Clocks& clocks, Findings& findings);

}  // namespace splitkern::memory::validation
