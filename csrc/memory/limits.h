// The machine and the budgets that a plan is made for.
#pragma once

#include <cstdint>
#include <limits>

namespace splitkern::memory {

inline constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

struct Limits {
  int64_t device_bytes = kUnlimited;  // device pool and parameters pool together
  int64_t host_bytes = kUnlimited;    // pinned host pool
  double offload_gbps = 0;            // device to host, 10^9 bytes per second; 0: no copies
  double prefetch_gbps = 0;           // host to device
  double copy_latency_us = 0;         // added to every copy
  int64_t alignment_bytes = 512;      // of every offset and size; a power of two

  bool operator==(const Limits&) const = default;
};

// Throws InvalidArgument where a limit is negative or not finite or the alignment is no power of two.
void require_valid(const Limits& limits);

}  // namespace splitkern::memory
