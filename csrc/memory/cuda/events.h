// CUDA events for the order of streams in a MemoryPool. A stream is a cudaStream_t as an integer: 0 is the legacy
// default stream, 1 and 2 are cudaStreamLegacy and cudaStreamPerThread, as in PyTorch and CuPy.
#pragma once

#include <cstdint>
#include <memory>

#include "memory/pool/streams.h"

namespace splitkern::memory::cuda {

// Of one device: its streams must be of that device. Thread contract: as StreamEvents.
class Events : public StreamEvents {
 public:
  // Throws InvalidArgument where there is no such device.
  explicit Events(int device);
  std::unique_ptr<StreamEvent> make() override;

 private:
  int device_;
};

}  // namespace splitkern::memory::cuda
