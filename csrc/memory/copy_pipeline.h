// Runs the copies of a Plan: an executor calls at_boundary() before every instance, launches the instance on the
// compute stream, and the plan's offloads and prefetches run beside it, in chunks. Assumes a valid plan (the
// validator's work); only what would reach outside the arenas or hang is refused here.
//
// Why nothing hangs. Large copies are fed to their stream chunk by chunk by a thread per copy stream, which waits while
// max_in_flight chunks are on their way: compute is not held up by it. Order all copies by their place in the lists of
// issues. Copy c's first chunk waits on its stream for the compute position of its boundary, for the copies in `after`,
// and for earlier copies of its stream; its feeder waits until those of `after` have been fed. All of these are earlier
// in the order: the compute position itself lies behind waits only for copies issued earlier. So the first copy that
// has not finished can always go on. at_boundary(i) waits on the host until the copies that boundary i waits for have
// been fed to the last chunk. Everything before boundary i has been launched by then, and nothing after it may start
// before those copies are done, so compute loses no time: the chunks still in flight cover the launches that follow.
// Those copies were issued at earlier boundaries, so they need nothing that the waiting thread still has to launch.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "memory/pipeline/stream_backend.h"
#include "memory/plan.h"

namespace splitkern::memory {

// The memory that a plan's offsets count from, one block per pool.
struct Arenas {
  void* device = nullptr;
  int64_t device_bytes = 0;
  void* parameters = nullptr;
  int64_t parameters_bytes = 0;
  void* host = nullptr;
  int64_t host_bytes = 0;
};

struct CopyPipelineOptions {
  int64_t chunk_bytes = int64_t{16} << 20;
  int32_t max_in_flight = 2;  // chunks of one stream that are enqueued and not done
  int32_t count_every = 64;   // steps: in the first of so many, what compressed offloads put on the link is counted
  // For debugging: compare each storage on its way back with what left, and fill the bytes of a residency with 0xFF
  // (NaN in every floating-point type) on the compute stream when it ends.
  bool checksums = false;
  bool poison = false;
};

// Since the pipeline was made. Copies and chunks count when they are enqueued.
struct CopyStatistics {
  int64_t steps = 0;  // completed, aborted ones not included
  int64_t offloads = 0;
  int64_t offload_chunks = 0;
  int64_t offloaded_bytes = 0;  // plain, also of compressed copies
  int64_t prefetches = 0;
  int64_t prefetch_chunks = 0;
  int64_t prefetched_bytes = 0;
  // Compressed offloads that were counted: bytes of the storages, and what crossed the link for them.
  int64_t counted_bytes = 0;
  int64_t counted_link_bytes = 0;
  double host_wait_us = 0;  // the calling thread waited, for copies to be fed or done
};

// A copy did not arrive, or arrived changed. The pipeline has drained and is ready for the next step.
class CopyFailed : public std::runtime_error {
 public:
  CopyFailed(const std::string& text, CopyKind kind, int32_t copy, int32_t storage, int64_t size_bytes)
      : std::runtime_error(text), kind(kind), copy(copy), storage(storage), size_bytes(size_bytes) {}
  CopyKind kind;
  int32_t copy;     // position in Plan::copies
  int32_t storage;  // planned storage
  int64_t size_bytes;
};

// abort() ended the step.
class StepAborted : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// One thread at a time calls at_boundary() and synchronize(); any thread may call abort() and statistics(). The
// backend, which nobody else may drain or reset meanwhile, and the arenas outlive the pipeline.
class CopyPipeline {
 public:
  // Throws InvalidArgument where options are out of range, the plan is malformed, or a residency lies outside its
  // arena.
  CopyPipeline(StreamBackend& backend, Plan plan, const Arenas& arenas, const CopyPipelineOptions& options = {});
  // Aborts a step that was begun and joins the threads. After synchronize() behind the last boundary it waits for no
  // stream.
  ~CopyPipeline();
  CopyPipeline(const CopyPipeline&) = delete;
  CopyPipeline& operator=(const CopyPipeline&) = delete;

  // Boundaries come in order, 0 to the number of instances; the last one ends the step, and 0 begins the next. Makes
  // the compute stream wait and issues copies as plan.h says of a boundary; what the caller launches on the compute
  // stream next is the instance. After the last boundary the compute stream also waits for copies that no boundary
  // waits for. Returns without waiting for the device, but for the feeding of copies that the boundary waits for.
  //
  // Throws CopyFailed for a copy that failed (which is seen at the latest by synchronize()), StreamFailed if the
  // compute stream did, StepAborted after abort(): then nothing touches the arenas any more, and the next boundary is
  // 0. Throws InvalidArgument for a boundary out of turn, and changes nothing.
  void at_boundary(int32_t boundary);
  // Waits until all copies issued so far are done. Throws as at_boundary() does.
  void synchronize();
  // Ends a step in the middle: no copy is enqueued any more, chunks in flight and launched instances run to their end.
  // Afterwards nothing touches the arenas. Without effect between steps, but for the wait.
  void abort() noexcept;

  CopyStatistics statistics() const;
  int32_t boundary_count() const { return static_cast<int32_t>(plan_.boundaries.size()); }

 private:
  struct Chunk {
    int32_t copy = 0;
    EventId done = 0;
  };
  // A copy stream, its thread, and what only that thread uses.
  struct Feeder {
    StreamId stream = StreamId::kOffload;
    std::vector<EventId> events;  // a ring, one per chunk in flight
    std::deque<Chunk> in_flight;  // enqueued, not known to be done
    size_t next_event = 0;
    std::deque<int32_t> queue;      // copies to feed; mutex_
    bool busy = false;              // mutex_
    std::deque<int32_t> unsettled;  // copies issued and not known to be done; the calling thread's
    std::thread thread;
  };
  class Turn;  // the calling thread is inside

  Feeder& feeder_of(int32_t copy) {
    return feeders_[plan_.copies[static_cast<size_t>(copy)].kind == CopyKind::kOffload ? 0 : 1];
  }
  int64_t copied_bytes(int32_t copy) const;
  int64_t chunk_count(int32_t copy) const;
  void enqueue_chunk(const Feeder& feeder, int32_t copy, int64_t chunk, LinkCount* count);
  bool make_room(Feeder& feeder);
  unsigned char* address(int32_t residency) const;
  CopyFailed failure_of(int32_t copy, const std::string& why) const;

  void feed_all(Feeder& feeder);
  void feed(Feeder& feeder, int32_t copy);
  bool dropping() const { return cancels_ > 0 || failure_ != nullptr; }  // mutex_

  void run_boundary(int32_t boundary);
  void poll();
  bool settle(int32_t copy, bool wait);
  void wait_until_fed(int32_t copy);
  void finish_unsettled();
  bool is_settled() const;
  void recover() noexcept;
  void stop_feeders() noexcept;

  StreamBackend& backend_;
  const Plan plan_;
  const CopyPipelineOptions options_;
  const Arenas arenas_;

  std::vector<std::vector<int32_t>> ending_;           // residencies to poison, by boundary
  std::vector<int32_t> unwaited_;                      // copies that no boundary waits for
  std::vector<int32_t> offload_of_;                    // by copy: the offload that a prefetch brings back, or -1
  std::vector<EventId> position_;                      // by boundary: compute's; -1 where nothing is issued
  std::vector<EventId> done_;                          // by copy
  std::vector<std::atomic<uint64_t>> left_;            // by copy: checksum of what an offload read
  std::vector<std::atomic<uint64_t>> came_;            // by copy: checksum of what a prefetch wrote
  std::vector<std::atomic<bool>> changed_on_the_way_;  // by copy
  LinkCount count_;

  mutable std::mutex mutex_;  // for what follows, and where it is named above
  std::condition_variable changed_;
  std::array<Feeder, 2> feeders_;
  std::vector<char> fed_;       // by copy: its last chunk is enqueued and its event recorded
  std::exception_ptr failure_;  // of a feeder
  int cancels_ = 0;             // threads in recover() and abort()
  bool inside_ = false;         // a thread is in at_boundary() or synchronize()
  bool aborted_ = false;        // the step that was begun last
  bool stopping_ = false;
  int32_t next_ = 0;  // boundary
  CopyStatistics statistics_;
};

}  // namespace splitkern::memory
