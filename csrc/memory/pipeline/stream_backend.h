// What the copy pipeline needs of a machine: three streams that each run their actions in order, and events that order
// streams among each other and tell the host. Implemented on host memory with threads (threaded_streams.h) and on CUDA
// (memory/cuda/stream_backend.h). Any thread may call any function; actions of one stream run in the order of the
// calls.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace splitkern::memory {

enum class StreamId : uint8_t { kCompute, kOffload, kPrefetch };
inline constexpr int kStreams = 3;

inline const char* to_string(StreamId stream) {
  constexpr const char* kNames[kStreams] = {"compute", "offload", "prefetch"};
  return kNames[static_cast<int>(stream)];
}

using EventId = int32_t;

// An action of a stream failed, or could not be enqueued.
class StreamFailed : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Slots [begin, end) of a block of plain memory in the compressed layout of kernels/copy/params.h, a slot for every
// 4096 bytes of its elements. The buffer begins with a header, which goes with slot 0.
struct CompressedSlots {
  int64_t elements = 0;       // of the whole block
  int32_t element_bytes = 1;  // 1, 2, 4 or 8
  int64_t begin = 0;
  int64_t end = 0;
};

// Bytes of what was compressed, before and after. Added to by a stream when it has passed the action.
struct LinkCount {
  std::atomic<int64_t> plain_bytes = 0;
  std::atomic<int64_t> link_bytes = 0;
};

// After an action has failed no stream moves a byte or calls a function until reset(); events and waits go on, so that
// nothing hangs and draining is quick.
class StreamBackend {
 public:
  StreamBackend() = default;
  StreamBackend(const StreamBackend&) = delete;
  StreamBackend& operator=(const StreamBackend&) = delete;
  virtual ~StreamBackend() = default;

  // A thread calls this once, before its other calls.
  virtual void attach_thread() {}

  // Actions. None of them waits for anything that a stream does.
  virtual void copy(StreamId stream, void* destination, const void* source, int64_t size_bytes) = 0;
  // The block's slots, to and from a buffer that is aligned to 16 bytes. `source` and `destination` are the whole
  // block's, aligned to its elements. `count` (null: nobody counts) must live until the stream has passed the action.
  virtual void compress(StreamId stream, void* buffer, const void* source, const CompressedSlots& slots,
                        LinkCount* count) = 0;
  virtual void decompress(StreamId stream, void* destination, const void* buffer, const CompressedSlots& slots) = 0;
  virtual void fill(StreamId stream, void* destination, unsigned char value, int64_t size_bytes) = 0;
  // *result must live until the stream has passed the action.
  virtual void checksum(StreamId stream, const void* source, int64_t size_bytes, std::atomic<uint64_t>* result) = 0;
  // `function` runs on a thread of the backend, so it must not call the backend. If it throws, the stream has failed.
  virtual void call(StreamId stream, std::function<void()> function) = 0;

  // An event stands for its latest record() at the time of the call; one that was never recorded holds nobody up.
  virtual EventId create_event() = 0;
  virtual void destroy_event(EventId event) noexcept = 0;  // once no stream waits for it
  virtual void record(EventId event, StreamId stream) = 0;
  virtual void wait(StreamId stream, EventId event) = 0;
  // Whether it has passed; the other one waits until it has. Both throw StreamFailed if the stream that recorded the
  // event had failed by then.
  virtual bool query(EventId event) = 0;
  virtual void synchronize(EventId event) = 0;

  virtual void require_ok(StreamId stream) = 0;  // throws StreamFailed if the stream has failed
  virtual void drain() noexcept = 0;             // waits until every stream has done all that was enqueued
  virtual void reset() noexcept = 0;             // forgets a failure; the streams must be idle
};

}  // namespace splitkern::memory
