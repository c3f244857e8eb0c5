#include "memory/limits.h"

#include <bit>
#include <cmath>
#include <string>

#include "memory/errors.h"

namespace splitkern::memory {
namespace {

void require_amount(const char* name, double value) {
  if (!std::isfinite(value) || value < 0)
    throw InvalidArgument(std::string(name) + " must be 0 or more, got " + std::to_string(value));
}
void require_bytes(const char* name, int64_t value) {
  if (value < 0) throw InvalidArgument(std::string(name) + " must be 0 or more, got " + std::to_string(value));
}

}  // namespace

void require_valid(const Limits& limits) {
  require_bytes("device_bytes", limits.device_bytes);
  require_bytes("host_bytes", limits.host_bytes);
  require_amount("offload_gbps", limits.offload_gbps);
  require_amount("prefetch_gbps", limits.prefetch_gbps);
  require_amount("copy_latency_us", limits.copy_latency_us);
  if (limits.alignment_bytes < 1 || !std::has_single_bit(static_cast<uint64_t>(limits.alignment_bytes)))
    throw InvalidArgument("alignment_bytes must be a power of two, got " + std::to_string(limits.alignment_bytes));
}

}  // namespace splitkern::memory
