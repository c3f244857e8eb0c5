// cudaMalloc and cudaHostAlloc as upstreams. See upstream.h.
#include "memory/cuda/upstream.h"

#include <string>

#include "memory/cuda/errors.h"

namespace splitkern::memory::cuda {

namespace {

[[noreturn]] void fail(const char* name, int64_t size_bytes, const CudaError& error) {
  throw UpstreamFailure(std::string(name) + ": no " + std::to_string(size_bytes) + " bytes: " + error.what());
}

}  // namespace

DeviceUpstream::DeviceUpstream(int device) : device_(require_device("DeviceUpstream", device)) {}

void* DeviceUpstream::allocate(int64_t size_bytes, int64_t) {
  const DeviceGuard guard(device_);
  void* block = nullptr;
  try {
    SPLITKERN_CUDA_CHECK(cudaMalloc(&block, static_cast<size_t>(size_bytes)));
  } catch (const CudaError& error) {
    fail("DeviceUpstream", size_bytes, error);
  }
  return block;
}

void DeviceUpstream::free(void* block, int64_t) {
  const DeviceGuard guard(device_);
  SPLITKERN_CUDA_CHECK(cudaFree(block));
}

PinnedUpstream::PinnedUpstream(int device) : device_(require_device("PinnedUpstream", device)) {}

void* PinnedUpstream::allocate(int64_t size_bytes, int64_t) {
  const DeviceGuard guard(device_);
  void* block = nullptr;
  try {
    SPLITKERN_CUDA_CHECK(cudaHostAlloc(&block, static_cast<size_t>(size_bytes), cudaHostAllocPortable));
  } catch (const CudaError& error) {
    fail("PinnedUpstream", size_bytes, error);
  }
  return block;
}

void PinnedUpstream::free(void* block, int64_t) {
  const DeviceGuard guard(device_);
  SPLITKERN_CUDA_CHECK(cudaFreeHost(block));
}

}  // namespace splitkern::memory::cuda
