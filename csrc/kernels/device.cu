// The device of the CUDA runtime that is linked into this library, and what it can do. Called by csrc/ops/cuda
// before it allocates and launches.
#include <map>
#include <mutex>

#include "launchers.h"
#include "paths.h"
#include "primitives.h"

namespace splitkern::kernels {

#ifndef SPLITKERN_HOST_EXECUTION  // else csrc/host_execution/device.cpp
void use_device(int device_index) {
  check_cuda(cudaSetDevice(device_index), "splitkern: selecting the device");
}

DeviceTraits device_traits() {
  static std::mutex mutex;
  static std::map<int, DeviceTraits> known;  // asking the runtime for attributes costs more than a launch's share
  int device = 0;
  check_cuda(cudaGetDevice(&device), "splitkern: reading the device");
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(device); found != known.end()) return found->second;
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device), "splitkern: reading the device's attributes");
    return value;
  };
  const DeviceTraits traits{
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
      attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  known.emplace(device, traits);
  return traits;
}
#endif

}  // namespace splitkern::kernels
