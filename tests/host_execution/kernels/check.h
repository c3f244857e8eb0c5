// What the primitive checks need beyond the list of checks: several schedules of the machine. test_primitives.py builds
// and runs them.
#pragma once

#include "../../native/check.h"

extern "C" void splitkern_host_set_schedule(uint64_t seed);

namespace check {

// Over several schedules; true where any of them threw or returned false.
inline bool noticed_in_some_schedule(const std::function<bool()>& body, uint64_t schedules = 8) {
  for (uint64_t seed = 1; seed <= schedules; ++seed) {
    splitkern_host_set_schedule(seed);
    try {
      if (!body()) return true;
    } catch (const std::exception&) {
      return true;
    }
  }
  return false;
}
inline void in_every_schedule(const std::function<void()>& body, uint64_t schedules = 8) {
  for (uint64_t seed = 1; seed <= schedules; ++seed) {
    splitkern_host_set_schedule(seed);
    body();
  }
}

}  // namespace check
