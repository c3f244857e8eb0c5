// From decisions (keep, offload, compute again) to a schedule: which instances run, when each storage occupies device
// and host, when copies are issued and waited for, and the step time that this predicts. Called by the strategies,
// hundreds of times for one plan, so one run is near-linear in the size of the step. Knows no addresses: bytes that are
// live at one time must fit, placement comes later.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "memory/limits.h"
#include "memory/liveness.h"
#include "memory/plan.h"

namespace splitkern::memory {

// For a storage that is saved across the turn. All others are kept.
enum class Decision : uint8_t { kKeep, kOffload, kRecompute };

enum class CopyPolicy : uint8_t {
  // Offloads as soon as the value is final; the slot is free when the copy is predicted to have ended, sooner (and with
  // a
  // stall) where the bytes are needed. Prefetches in order of need, just early enough, as soon as there is room.
  kBudget,
  // Jin and Hong, section 4: the same, but blind to the budget.
  kHidden,
  // vDNN: a feature map leaves while the last layer that reads it runs, and comes back while the layer before the one
  // that
  // needs it runs; both layers wait for their copies.
  kLayerwise,
};

// Bytes of one storage from boundary `begin` to boundary `end`, in the middle of which they may be on the host.
struct Episode {
  int32_t storage = 0;
  int32_t begin = 0;
  int32_t end = 0;
  int32_t transfer = -1;
};

// Out and back.
struct Transfer {
  int32_t episode = 0;
  int32_t offload_issue = 0;  // boundaries
  int32_t offload_wait = 0;
  int32_t prefetch_issue = 0;
  int32_t prefetch_wait = 0;
};

struct Step {
  int32_t step = 0;
  bool is_recomputation = false;
};

struct Schedule {
  bool feasible = false;
  // Where it is not: bytes that are missing, most at which instance. A decision that no budget could save lacks
  // kUnlimited.
  int64_t shortage_bytes = 0;
  int32_t short_at = 0;
  bool short_on_host = false;

  std::vector<Step> instances;
  std::vector<Episode> episodes;
  std::vector<Transfer> transfers;
  std::vector<int32_t> issue_order;  // 2·transfer for an offload, 2·transfer + 1 for a prefetch

  double step_us = 0;
  double compute_us = 0;
  double recompute_us = 0;
  int64_t device_live_bytes = 0;  // without the parameters pool
  int64_t host_live_bytes = 0;
  int64_t least_device_bytes = 0;  // the budget at which the same decisions would still do, however slowly
};

// Holds the buffers of its runs: not for several threads at a time. Keeps references to graph and liveness.
class Scheduler {
 public:
  Scheduler(const Graph& graph, const Liveness& live, const Limits& limits);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // One decision per planned storage; those that are not saved count as kKeep. Budgets are of live bytes,
  // `device_bytes` for the device pool alone. The result is valid until the next call.
  const Schedule& run(std::span<const Decision> decisions, CopyPolicy policy, int64_t device_bytes, int64_t host_bytes);

  // Instances and least_device_bytes alone: a fraction of the work, for searches for what fits at all.
  const Schedule& measure(std::span<const Decision> decisions);

  // How many of `order`, from its front, must be offloaded beside the decisions for the live bytes to fit; more than
  // there are if all do not help. Those that are offloaded anyway count without being asked for. What measure() says of
  // the decisions without them is in `least_device_bytes`.
  int32_t offloads_needed(std::span<const Decision> decisions, std::span<const int32_t> order, int64_t device_bytes);

  // Whether a storage that is kept under the decisions of the last call would be off the device at that instance if it
  // were offloaded or computed again.
  bool would_be_absent(int32_t storage, int32_t instance) const;

  // Instances that all calls so far have scheduled.
  int64_t work() const;

 private:
  class State;
  std::unique_ptr<State> state_;
};

// A saved storage that may be computed again, and whose copies the link could carry at all.
bool may(const Liveness& live, const Limits& limits, int32_t storage, Decision decision);

// Microseconds on the link.
double copy_us(const Limits& limits, CopyKind kind, double bytes);

}  // namespace splitkern::memory
