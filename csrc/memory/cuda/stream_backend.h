// The streams of a CopyPipeline on CUDA: copies on two streams of its own beside the caller's compute stream, ordered
// by events. Device memory and pinned host memory only: from pageable memory a copy would hold up the thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "memory/pipeline/stream_backend.h"

namespace splitkern::memory::cuda {

// Launches what moves the slots of a compressed block on a stream: kernels, which are in the operator library
// (splitkern_copy_slots of csrc/ops/cuda/copy.cpp), as this one is built without nvcc. Returns 0, or not, with a text
// of at most `text_bytes`, its terminating zero included.
using CopySlots = int32_t (*)(int32_t to_host, void* device, void* host, int64_t elements, int32_t element_bytes,
                              int64_t begin_slot, int64_t end_slot, int32_t device_index, void* stream, char* text,
                              int64_t text_bytes);

// Any thread may call any function. An error inside the context (a failed kernel) is for good: reset() cannot mend it.
class Streams final : public StreamBackend {
 public:
  // compute_stream: a cudaStream_t of the device as an integer, as for Events; the caller's, who keeps it. Throws
  // InvalidArgument where there is no such device, CudaError where a stream cannot be made.
  // copy_slots: null where no plan has compressed copies.
  Streams(int device, int64_t compute_stream, CopySlots copy_slots = nullptr);
  // Waits for its own streams, and for the compute stream where that is to call a function.
  ~Streams() override;

  // Of the next step. Between steps only, and the caller orders the new stream after the old one.
  void set_compute_stream(int64_t compute_stream);

  void attach_thread() override;
  void copy(StreamId stream, void* destination, const void* source, int64_t size_bytes) override;
  // Counting goes to a host thread, which reads a bit for each element: the stream waits for it.
  void compress(StreamId stream, void* buffer, const void* source, const CompressedSlots& slots,
                LinkCount* count) override;
  void decompress(StreamId stream, void* destination, const void* buffer, const CompressedSlots& slots) override;
  void fill(StreamId stream, void* destination, unsigned char value, int64_t size_bytes) override;
  // Through pinned memory to a host thread: for debugging, and slow.
  void checksum(StreamId stream, const void* source, int64_t size_bytes, std::atomic<uint64_t>* result) override;
  void call(StreamId stream, std::function<void()> function) override;
  EventId create_event() override;
  void destroy_event(EventId event) noexcept override;
  void record(EventId event, StreamId stream) override;
  void wait(StreamId stream, EventId event) override;
  bool query(EventId event) override;
  void synchronize(EventId event) override;
  void require_ok(StreamId stream) override;
  void drain() noexcept override;
  void reset() noexcept override;

 private:
  struct Launched;  // a function that a stream will call
  void drain(std::initializer_list<StreamId> streams) noexcept;

  static void run(void* launched) noexcept;
  void move_slots(StreamId stream, bool to_host, void* device, void* host, const CompressedSlots& slots);
  void note_failure(StreamId stream, const std::string& text) noexcept;
  bool has_failed() const;
  void require_success(int code, const char* what, StreamId stream);  // code: a cudaError_t
  int64_t stream_of(StreamId stream) const;
  int64_t event_of(EventId event, StreamId* recorded_by = nullptr) const;

  const int device_;
  const CopySlots copy_slots_;
  mutable std::mutex mutex_;  // for everything below
  std::array<int64_t, kStreams> streams_ = {};
  std::array<std::string, kStreams> failures_;  // first of each stream
  struct Event {
    int64_t handle = 0;
    StreamId recorded_by = StreamId::kCompute;
  };
  std::vector<Event> events_;
  std::vector<EventId> free_events_;
  std::list<Launched> launched_;
  std::array<void*, kStreams> staging_ = {};  // pinned, of checksums; made when first needed
};

}  // namespace splitkern::memory::cuda
