// Upstreams of a MemoryPool that stands alone on a GPU: device memory and pinned host memory. Both calls are slow and
// may wait for the device, which is why the pool keeps its blocks. Blocks are aligned as the driver aligns them, to 256
// bytes at least; the pool refuses one that does not suit its own alignment.
#pragma once

#include <cstdint>

#include "memory/upstream.h"

namespace splitkern::memory::cuda {

// cudaMalloc on one device, whichever is current in the calling thread.
class DeviceUpstream : public Upstream {
 public:
  // Throws InvalidArgument where there is no such device.
  explicit DeviceUpstream(int device);
  void* allocate(int64_t size_bytes, int64_t alignment_bytes) override;
  void free(void* block, int64_t size_bytes) override;

 private:
  int device_;
};

// cudaHostAlloc: page-locked, addressable by every device at the address that the host uses.
class PinnedUpstream : public Upstream {
 public:
  // The device whose context the calls make current. Throws InvalidArgument where there is no such device.
  explicit PinnedUpstream(int device);
  void* allocate(int64_t size_bytes, int64_t alignment_bytes) override;
  void free(void* block, int64_t size_bytes) override;

 private:
  int device_;
};

}  // namespace splitkern::memory::cuda
