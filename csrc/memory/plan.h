// What the planner decided, in a form that an executor can follow without thinking and a validator can prove right.
// A value type. Three streams run in order each: compute, device-to-host copies, host-to-device copies. Positions in
// time are boundaries: boundary i lies before instance i, boundary n (the number of instances) after the last.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "memory/compression.h"
#include "memory/limits.h"

namespace splitkern::memory {

enum class Pool : uint8_t {
  kDevice,      // general purpose
  kParameters,  // device: parameters, buffers, parameter gradients, inputs: the whole step, never moved
  kHost,        // pinned
};

// One planned storage: graph storages that share bytes one after the other (in-place chains, summed errors).
struct PlanStorage {
  int64_t size_bytes = 0;                                 // the largest member's
  std::vector<int32_t> members;                           // graph storages, in order of first write
  std::optional<Compression> compression = std::nullopt;  // a member's, where copies are compressed

  bool operator==(const PlanStorage&) const = default;
};

// An operation of the graph, run once more or for the first time.
struct Instance {
  int32_t operation = 0;
  bool is_recomputation = false;  // false exactly once per executed operation
  bool accumulate = false;        // adds its accumulating write to what the destination holds: see Plan::fused

  bool operator==(const Instance&) const = default;
};

// Bytes of a pool that belong to a storage from boundary `begin` (inclusive) to boundary `end` (exclusive): at its
// begin after, and at its end because of, the waits of that boundary. Storage -1: workspace of instance `begin`.
struct Residency {
  int32_t storage = 0;
  Pool pool = Pool::kDevice;
  int64_t offset_bytes = 0;
  int64_t size_bytes = 0;
  int32_t begin = 0;
  int32_t end = 0;

  bool operator==(const Residency&) const = default;
};

enum class CopyKind : uint8_t { kOffload, kPrefetch };  // device to host, host to device

// Starts when the compute stream has finished instance issue-1 and everything it waited for until then, the copies of
// its own stream that were issued before, and the copies in `after`.
struct Copy {
  CopyKind kind = CopyKind::kOffload;
  int32_t storage = 0;
  int32_t source = 0;  // residencies
  int32_t destination = 0;
  int32_t issue = 0;           // boundary
  int32_t wait = 0;            // boundary at which the compute stream waits for it
  std::vector<int32_t> after;  // copies of the other stream, issued earlier
  // The host residency holds the layout of kernels/copy/params.h, for which it has room whatever the values: its bytes
  // on the link vary. All copies to and from one host residency are alike.
  bool compressed = false;

  bool operator==(const Copy&) const = default;
};

// What the host does before it launches instance i: first the compute stream waits, then copies are issued, in order.
struct Boundary {
  std::vector<int32_t> waits;   // copies
  std::vector<int32_t> issues;  // copies

  bool operator==(const Boundary&) const = default;
};

// A sum that is not executed because the producer of one operand adds to the other operand in place.
struct FusedSum {
  int32_t sum = 0;       // operation with is_sum: has no instance
  int32_t producer = 0;  // operation whose instance has accumulate

  bool operator==(const FusedSum&) const = default;
};

struct Predicted {
  double step_us = 0;       // with stalls
  double compute_us = 0;    // the captured operations alone
  double recompute_us = 0;  // recomputations
  double stall_us = 0;      // the compute stream waits for copies
  // Highest end of an occupied address.
  int64_t device_peak_bytes = 0;
  int64_t parameters_peak_bytes = 0;
  int64_t host_peak_bytes = 0;
  // Largest sum of live bytes: no placement of these residencies is smaller.
  int64_t device_lower_bound_bytes = 0;
  int64_t host_lower_bound_bytes = 0;

  bool operator==(const Predicted&) const = default;
};

// Bytes that a copy of the storage is counted with on the link.
inline double link_bytes(const PlanStorage& storage, bool compressed) {
  const auto size_bytes = static_cast<double>(storage.size_bytes);
  return compressed && storage.compression ? size_bytes / storage.compression->ratio : size_bytes;
}

struct Plan {
  std::string graph_fingerprint;
  std::string strategy;
  Limits limits;
  std::vector<PlanStorage> storages;  // every graph storage is a member of exactly one
  std::vector<FusedSum> fused;
  std::vector<Instance> instances;
  std::vector<Boundary> boundaries;  // one more than instances
  std::vector<Residency> residencies;
  std::vector<Copy> copies;
  Predicted predicted;

  bool operator==(const Plan&) const = default;
};

}  // namespace splitkern::memory
