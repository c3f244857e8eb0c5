// Checks of the limits that a plan is made for.
#include "memory/limits.h"

#include <cmath>

#include "native/check.h"

using namespace splitkern::memory;

CHECK_NAMED(limits_refusals, "limits: what is refused") {
  require_valid(Limits{});
  check::refuses([] { require_valid(Limits{.device_bytes = -1}); }, {"device_bytes", "-1"});
  check::refuses([] { require_valid(Limits{.offload_gbps = NAN}); }, {"offload_gbps", "nan"});
  check::refuses([] { require_valid(Limits{.alignment_bytes = 48}); }, {"alignment_bytes", "power of two", "48"});
}
