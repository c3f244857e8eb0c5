// Devices: which is current, and whether there is such a one. See errors.h.
#include "memory/cuda/errors.h"

#include "memory/errors.h"

namespace splitkern::memory::cuda {

int require_device(const char* caller, int device) {
  int count = 0;
  SPLITKERN_CUDA_CHECK(cudaGetDeviceCount(&count));
  if (device < 0 || device >= count) {
    throw InvalidArgument(std::string(caller) + ": device must be below the count of devices, " +
                          std::to_string(count) + ", got " + std::to_string(device));
  }
  return device;
}

DeviceGuard::DeviceGuard(int device) {
  SPLITKERN_CUDA_CHECK(cudaGetDevice(&before_));
  if (before_ == device) return;
  SPLITKERN_CUDA_CHECK(cudaSetDevice(device));
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(before_);  // it was current, so this can only repeat an error that a call has thrown
}

}  // namespace splitkern::memory::cuda
