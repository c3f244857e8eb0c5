// Plays a plan on three streams (compute, device to host, host to device) that run in order each: when every instance
// and every copy begins and ends, if durations and bandwidths are as the graph and the limits say. Called for a plan's
// predicted times and for its picture; knows nothing of how plans are made.
#pragma once

#include <vector>

#include "memory/graph.h"
#include "memory/plan.h"

namespace splitkern::memory {

struct Span {
  double begin_us = 0;
  double end_us = 0;

  bool operator==(const Span&) const = default;
};

struct Timeline {
  std::vector<Span> instances;
  std::vector<Span> copies;
  std::vector<double> stalls_us;  // per boundary: the compute stream waits for copies
  double step_us = 0;             // the compute stream has finished, and waited for what boundary n waits for
  double compute_us = 0;
  double recompute_us = 0;
  double stall_us = 0;

  bool operator==(const Timeline&) const = default;
};

// The host is taken to be ahead of the streams. A copy moves the planned storage's size_bytes, not rounded up. Throws
// InvalidArgument where the plan names what it or the graph does not have, waits for a copy that was not issued, or
// copies without bandwidth; whether the plan is right is for validate() to say.
Timeline simulate(const Graph& graph, const Plan& plan);

}  // namespace splitkern::memory
