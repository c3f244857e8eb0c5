// Errors of the CUDA runtime as exceptions, with file and line. For the sources in this folder.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace splitkern::memory::cuda {

class CudaError : public std::runtime_error {
 public:
  CudaError(cudaError_t code, const char* call, const char* file, int line)
      : std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + call + ": " +
                           cudaGetErrorName(code) + ": " + cudaGetErrorString(code)),
        code(code) {}
  cudaError_t code;
};

inline void check(cudaError_t code, const char* call, const char* file, int line) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch check does not find this one
  throw CudaError(code, call, file, line);
}

// Returns the device. Throws InvalidArgument that names the caller where there is no such one.
int require_device(const char* caller, int device);

// Makes a device current, and the one from before again at its end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace splitkern::memory::cuda

#define SPLITKERN_CUDA_CHECK(call) ::splitkern::memory::cuda::check((call), #call, __FILE__, __LINE__)
