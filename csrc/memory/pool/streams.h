// How a MemoryPool orders streams: events, as an interface. A stream is an integer (a cudaStream_t, or the number of a
// HostStreams stream). Implemented in pool/host_streams.h for tests without a GPU and in cuda/events.h.
#pragma once

#include <cstdint>
#include <memory>

namespace splitkern::memory {

// A point in the work of a stream. Thread contract: query and synchronize may be called at the same time as anything;
// record and wait are called by one thread at a time (the pool holds its lock).
class StreamEvent {
 public:
  virtual ~StreamEvent() = default;

  // The point after all that was put in the stream so far. Replaces an earlier point. Does not wait.
  virtual void record(int64_t stream) = 0;
  // Whether the stream has passed the point. Does not wait.
  virtual bool query() = 0;
  // What is put in `stream` from now on starts after the point as it is now. Does not wait.
  virtual void wait(int64_t stream) = 0;
  // Waits until the stream has passed the point.
  virtual void synchronize() = 0;
};

class StreamEvents {
 public:
  virtual ~StreamEvents() = default;
  virtual std::unique_ptr<StreamEvent> make() = 0;
};

}  // namespace splitkern::memory
