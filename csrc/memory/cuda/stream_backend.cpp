#include "memory/cuda/stream_backend.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "memory/cuda/errors.h"
#include "memory/errors.h"
#include "memory/pipeline/checksum.h"
#include "memory/pipeline/zero_coder.h"

namespace splitkern::memory::cuda {
namespace {

constexpr int64_t kStagingBytes = int64_t{4} << 20;  // a multiple of 8, as checksum() wants

cudaStream_t stream_handle(int64_t stream) {
  return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(stream));
}
cudaEvent_t event_handle(int64_t event) {
  return reinterpret_cast<cudaEvent_t>(static_cast<uintptr_t>(event));
}
template <class Handle>
int64_t as_integer(Handle handle) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(handle));
}

}  // namespace

struct Streams::Launched {
  Streams* owner = nullptr;
  StreamId stream = StreamId::kCompute;
  std::function<void()> function;
  std::list<Launched>::iterator place;
};

Streams::Streams(int device, int64_t compute_stream, CopySlots copy_slots)
    : device_(require_device("Streams", device)), copy_slots_(copy_slots) {
  const DeviceGuard guard(device_);
  streams_[static_cast<size_t>(StreamId::kCompute)] = compute_stream;
  // Non-blocking, as the compute stream may be the legacy default stream, which others wait for otherwise.
  cudaStream_t offload = nullptr;
  SPLITKERN_CUDA_CHECK(cudaStreamCreateWithFlags(&offload, cudaStreamNonBlocking));
  cudaStream_t prefetch = nullptr;
  const cudaError_t code = cudaStreamCreateWithFlags(&prefetch, cudaStreamNonBlocking);
  if (code != cudaSuccess) cudaStreamDestroy(offload);
  SPLITKERN_CUDA_CHECK(code);
  streams_[static_cast<size_t>(StreamId::kOffload)] = as_integer(offload);
  streams_[static_cast<size_t>(StreamId::kPrefetch)] = as_integer(prefetch);
}

// An error of these calls says only that the process or the context is at its end.
Streams::~Streams() {
  bool is_called = false;
  {
    const std::lock_guard lock(mutex_);
    is_called = !launched_.empty();
  }
  if (is_called) {
    drain();
  } else {
    drain({StreamId::kOffload, StreamId::kPrefetch});
  }
  int before = device_;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  for (const Event& event : events_) cudaEventDestroy(event_handle(event.handle));
  for (void* staging : staging_) cudaFreeHost(staging);
  cudaStreamDestroy(stream_handle(streams_[static_cast<size_t>(StreamId::kOffload)]));
  cudaStreamDestroy(stream_handle(streams_[static_cast<size_t>(StreamId::kPrefetch)]));
  cudaSetDevice(before);
}

void Streams::set_compute_stream(int64_t compute_stream) {
  const std::lock_guard lock(mutex_);
  streams_[static_cast<size_t>(StreamId::kCompute)] = compute_stream;
}

void Streams::attach_thread() {
  SPLITKERN_CUDA_CHECK(cudaSetDevice(device_));
}

int64_t Streams::stream_of(StreamId stream) const {
  const std::lock_guard lock(mutex_);
  return streams_[static_cast<size_t>(stream)];
}

int64_t Streams::event_of(EventId event, StreamId* recorded_by) const {
  const std::lock_guard lock(mutex_);
  if (event < 0 || static_cast<size_t>(event) >= events_.size())
    throw InvalidArgument("there is no event " + std::to_string(event));
  if (recorded_by != nullptr) *recorded_by = events_[static_cast<size_t>(event)].recorded_by;
  return events_[static_cast<size_t>(event)].handle;
}

void Streams::note_failure(StreamId stream, const std::string& text) noexcept {
  const std::lock_guard lock(mutex_);
  std::string& first = failures_[static_cast<size_t>(stream)];
  if (!first.empty()) return;
  try {
    first = text;
  } catch (...) {
    first = "out of memory";  // short enough to need none
  }
}

bool Streams::has_failed() const {
  const std::lock_guard lock(mutex_);
  return std::ranges::any_of(failures_, [](const std::string& failure) { return !failure.empty(); });
}

void Streams::require_success(int code, const char* what, StreamId stream) {
  const auto error = static_cast<cudaError_t>(code);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch check does not find this one
  const std::string text = std::string(what) + " of the " + to_string(stream) + " stream: " + cudaGetErrorName(error) +
                           ": " + cudaGetErrorString(error);
  note_failure(stream, text);
  throw StreamFailed(text);
}

void Streams::copy(StreamId stream, void* destination, const void* source, int64_t size_bytes) {
  if (has_failed()) return;
  const DeviceGuard guard(device_);
  require_success(cudaMemcpyAsync(destination, source, static_cast<size_t>(size_bytes), cudaMemcpyDefault,
                                  stream_handle(stream_of(stream))),
                  "cudaMemcpyAsync", stream);
}

void Streams::move_slots(StreamId stream, bool to_host, void* device, void* host, const CompressedSlots& slots) {
  if (copy_slots_ == nullptr) throw InvalidArgument("compressed copies need the kernels of the operator library");
  if (has_failed()) return;
  const DeviceGuard guard(device_);
  char text[512] = "";
  const int32_t code = copy_slots_(to_host ? 1 : 0, device, host, slots.elements, slots.element_bytes, slots.begin,
                                   slots.end, device_, stream_handle(stream_of(stream)), text, sizeof(text));
  if (code == 0) return;
  const std::string failure = std::string("a compressed copy of the ") + to_string(stream) + " stream: " + text;
  note_failure(stream, failure);
  throw StreamFailed(failure);
}

void Streams::compress(StreamId stream, void* buffer, const void* source, const CompressedSlots& slots,
                       LinkCount* count) {
  move_slots(stream, true, const_cast<void*>(source), buffer, slots);
  if (count == nullptr) return;
  call(stream, [buffer, slots, count] {
    count->plain_bytes += plain_bytes_of(slots);
    count->link_bytes += link_bytes_of(buffer, slots);
  });
}

void Streams::decompress(StreamId stream, void* destination, const void* buffer, const CompressedSlots& slots) {
  move_slots(stream, false, destination, const_cast<void*>(buffer), slots);
}

void Streams::fill(StreamId stream, void* destination, unsigned char value, int64_t size_bytes) {
  if (has_failed()) return;
  const DeviceGuard guard(device_);
  cudaPointerAttributes attributes = {};
  require_success(cudaPointerGetAttributes(&attributes, destination), "cudaPointerGetAttributes", stream);
  if (attributes.type == cudaMemoryTypeHost) {
    call(stream,
         [destination, value, size_bytes] { std::memset(destination, value, static_cast<size_t>(size_bytes)); });
    return;
  }
  require_success(
      cudaMemsetAsync(destination, value, static_cast<size_t>(size_bytes), stream_handle(stream_of(stream))),
      "cudaMemsetAsync", stream);
}

void Streams::checksum(StreamId stream, const void* source, int64_t size_bytes, std::atomic<uint64_t>* result) {
  if (has_failed()) return;
  const DeviceGuard guard(device_);
  void* staging = nullptr;
  {
    const std::lock_guard lock(mutex_);
    staging = staging_[static_cast<size_t>(stream)];
  }
  if (staging == nullptr) {
    // Without the lock, which functions on the streams take: the runtime may wait for the streams here. A stream's
    // feeder alone calls this.
    SPLITKERN_CUDA_CHECK(cudaHostAlloc(&staging, kStagingBytes, cudaHostAllocDefault));
    const std::lock_guard lock(mutex_);
    staging_[static_cast<size_t>(stream)] = staging;
  }
  // In stream order, so a piece has been read when the next one replaces it.
  const auto state = std::make_shared<uint64_t>(kChecksumSeed);
  const auto* const bytes = static_cast<const unsigned char*>(source);
  for (int64_t begin = 0; begin < size_bytes; begin += kStagingBytes) {
    const int64_t piece_bytes = std::min(kStagingBytes, size_bytes - begin);
    copy(stream, staging, bytes + begin, piece_bytes);
    call(stream, [state, staging, piece_bytes] { *state = memory::checksum(*state, staging, piece_bytes); });
  }
  call(stream, [state, result] { result->store(*state); });
}

void Streams::run(void* launched) noexcept {
  auto* const function = static_cast<Launched*>(launched);
  Streams* const owner = function->owner;
  if (!owner->has_failed()) {
    try {
      function->function();
    } catch (const std::exception& error) {
      owner->note_failure(function->stream, error.what());
    } catch (...) {
      owner->note_failure(function->stream, "an exception that is no std::exception");
    }
  }
  std::list<Launched> done;  // dies after the lock is given back: destructors of captured values may be anything
  const std::lock_guard lock(owner->mutex_);
  done.splice(done.begin(), owner->launched_, function->place);
}

void Streams::call(StreamId stream, std::function<void()> function) {
  if (has_failed()) return;
  const DeviceGuard guard(device_);
  Launched* launched = nullptr;
  {
    const std::lock_guard lock(mutex_);
    launched_.push_front({.owner = this, .stream = stream, .function = std::move(function), .place = {}});
    launched = &launched_.front();
    launched->place = launched_.begin();
  }
  const cudaError_t code = cudaLaunchHostFunc(stream_handle(stream_of(stream)), &Streams::run, launched);
  if (code != cudaSuccess) {
    const std::lock_guard lock(mutex_);
    launched_.erase(launched->place);
  }
  require_success(code, "cudaLaunchHostFunc", stream);
}

EventId Streams::create_event() {
  const std::lock_guard lock(mutex_);
  if (!free_events_.empty()) {
    const EventId event = free_events_.back();
    free_events_.pop_back();
    return event;
  }
  const DeviceGuard guard(device_);
  free_events_.reserve(events_.size() + 1);  // destroy_event() must not need memory
  events_.reserve(events_.size() + 1);
  cudaEvent_t made = nullptr;
  // A thread that waits for one sleeps: feeders wait for most of a step.
  SPLITKERN_CUDA_CHECK(cudaEventCreateWithFlags(&made, cudaEventDisableTiming | cudaEventBlockingSync));
  events_.push_back({.handle = as_integer(made)});
  return static_cast<EventId>(events_.size()) - 1;
}

// Kept for the next create_event(), which may find it recorded: whoever waits for it then waits for what has passed.
void Streams::destroy_event(EventId event) noexcept {
  const std::lock_guard lock(mutex_);
  free_events_.push_back(event);
}

void Streams::record(EventId event, StreamId stream) {
  const int64_t handle = event_of(event);
  const DeviceGuard guard(device_);
  require_success(cudaEventRecord(event_handle(handle), stream_handle(stream_of(stream))), "cudaEventRecord", stream);
  const std::lock_guard lock(mutex_);
  events_[static_cast<size_t>(event)].recorded_by = stream;
}

void Streams::wait(StreamId stream, EventId event) {
  const int64_t handle = event_of(event);
  const DeviceGuard guard(device_);
  require_success(cudaStreamWaitEvent(stream_handle(stream_of(stream)), event_handle(handle), 0), "cudaStreamWaitEvent",
                  stream);
}

bool Streams::query(EventId event) {
  StreamId recorded_by = StreamId::kCompute;
  const cudaError_t code = cudaEventQuery(event_handle(event_of(event, &recorded_by)));
  if (code == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  require_success(code, "cudaEventQuery", recorded_by);
  const std::lock_guard lock(mutex_);
  const std::string& failure = failures_[static_cast<size_t>(recorded_by)];
  if (!failure.empty()) throw StreamFailed(failure);
  return true;
}

void Streams::synchronize(EventId event) {
  StreamId recorded_by = StreamId::kCompute;
  require_success(cudaEventSynchronize(event_handle(event_of(event, &recorded_by))), "cudaEventSynchronize",
                  recorded_by);
  const std::lock_guard lock(mutex_);
  const std::string& failure = failures_[static_cast<size_t>(recorded_by)];
  if (!failure.empty()) throw StreamFailed(failure);
}

void Streams::require_ok(StreamId stream) {
  {
    const std::lock_guard lock(mutex_);
    const std::string& failure = failures_[static_cast<size_t>(stream)];
    if (!failure.empty()) throw StreamFailed(failure);
  }
  const DeviceGuard guard(device_);
  const cudaError_t code = cudaStreamQuery(stream_handle(stream_of(stream)));
  if (code == cudaErrorNotReady) {
    cudaGetLastError();
    return;
  }
  require_success(code, "cudaStreamQuery", stream);
}

void Streams::drain() noexcept {
  drain({StreamId::kCompute, StreamId::kOffload, StreamId::kPrefetch});
}

void Streams::drain(std::initializer_list<StreamId> streams) noexcept {
  try {
    const DeviceGuard guard(device_);
    for (const StreamId stream : streams) {
      const cudaError_t code = cudaStreamSynchronize(stream_handle(stream_of(stream)));
      if (code != cudaSuccess) note_failure(stream, std::string("cudaStreamSynchronize: ") + cudaGetErrorString(code));
    }
  } catch (...) {  // the device cannot be made current: its context is gone, and nothing runs there
  }
}

void Streams::reset() noexcept {
  cudaGetLastError();
  std::list<Launched> never_run;  // a failed context calls no functions
  const std::lock_guard lock(mutex_);
  for (std::string& failure : failures_) failure.clear();
  never_run.swap(launched_);
}

}  // namespace splitkern::memory::cuda
