// CUDA events without timing. See events.h.
#include "memory/cuda/events.h"

#include <string>

#include "memory/cuda/errors.h"
#include "memory/errors.h"

namespace splitkern::memory::cuda {

namespace {

cudaStream_t handle(int64_t stream) {
  const auto handle = reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(stream));
  if (handle == cudaStreamPerThread) {
    throw InvalidArgument("cuda::Events: stream must be the same one in every thread, got 2, cudaStreamPerThread");
  }
  return handle;
}

class Event : public StreamEvent {
 public:
  explicit Event(int device) : device_(device) {
    const DeviceGuard guard(device_);
    SPLITKERN_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
  }

  // The runtime keeps what is pending of a destroyed event. An error says only that the process is at its end.
  ~Event() override { cudaEventDestroy(event_); }

  void record(int64_t stream) override {
    const DeviceGuard guard(device_);
    SPLITKERN_CUDA_CHECK(cudaEventRecord(event_, handle(stream)));
  }

  bool query() override {
    const cudaError_t code = cudaEventQuery(event_);
    if (code == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    SPLITKERN_CUDA_CHECK(code);
    return true;
  }

  void wait(int64_t stream) override {
    const DeviceGuard guard(device_);
    SPLITKERN_CUDA_CHECK(cudaStreamWaitEvent(handle(stream), event_, 0));
  }

  void synchronize() override { SPLITKERN_CUDA_CHECK(cudaEventSynchronize(event_)); }

 private:
  int device_;
  cudaEvent_t event_ = nullptr;
};

}  // namespace

Events::Events(int device) : device_(require_device("Events", device)) {}

std::unique_ptr<StreamEvent> Events::make() {
  return std::make_unique<Event>(device_);
}

}  // namespace splitkern::memory::cuda
