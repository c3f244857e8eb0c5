// The device that host execution pretends to be: the twin of csrc/kernels/device.cu.
#include <mutex>

#include "kernels/launchers.h"
#include "kernels/paths.h"

namespace splitkern::kernels {

namespace {

std::mutex mutex;
DeviceTraits traits{90, 132, 232448};  // an H100 or H200

}  // namespace

void use_device(int) {}

DeviceTraits device_traits() {
  const std::lock_guard lock(mutex);
  return traits;
}

}  // namespace splitkern::kernels

// For the tests: what device_traits answers from here on.
extern "C" __attribute__((visibility("default"))) void splitkern_host_set_device(int32_t compute_capability,
                                                                                 int32_t multiprocessors,
                                                                                 int64_t shared_memory_bytes) {
  const std::lock_guard lock(splitkern::kernels::mutex);
  splitkern::kernels::traits = {compute_capability, multiprocessors, shared_memory_bytes};
}
