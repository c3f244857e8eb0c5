#include <algorithm>

#include "memory/validator/stages.h"

namespace splitkern::memory::validation {

Clocks::Clocks(const Plan& plan)
    : stream_(plan.copies.size()),
      position_(plan.copies.size()),
      at_start_(plan.copies.size()),
      at_boundary_(plan.boundaries.size()) {
  const auto join = [](Done& done, const Done& more) {
    for (size_t s = 0; s < done.size(); ++s) done[s] = std::max(done[s], more[s]);
  };
  // When the copy is done, all that was done at its start is, and itself.
  const auto at_end = [&](int32_t copy) {
    Done done = at_start_[copy];
    done[stream_[copy]] = position_[copy] + 1;
    return done;
  };
  Done compute{};
  std::array<Done, 2> stream_end{};
  // In the order in which the host issues everything: what a copy depends on is issued before it.
  for (size_t b = 0; b < plan.boundaries.size(); ++b) {
    for (const int32_t copy : plan.boundaries[b].waits) join(compute, at_end(copy));
    at_boundary_[b] = compute;
    for (const int32_t copy : plan.boundaries[b].issues) {
      const size_t stream = plan.copies[copy].kind == CopyKind::kOffload ? 0 : 1;
      stream_[copy] = static_cast<int32_t>(stream);
      position_[copy] = stream_end[stream][stream];
      Done start = compute;
      join(start, stream_end[stream]);
      for (const int32_t other : plan.copies[copy].after) join(start, at_end(other));
      at_start_[copy] = start;
      stream_end[stream] = at_end(copy);
    }
  }
}

}  // namespace splitkern::memory::validation
