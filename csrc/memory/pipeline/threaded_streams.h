// The three streams on host memory: one thread and one queue each. For machines without a GPU and for tests: random
// delays before every action let the streams run against each other for real, and a fixed priority, on a single thread,
// makes the extreme schedules without any reliance on time.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "memory/pipeline/stream_backend.h"

namespace splitkern::memory {

struct ThreadedStreamOptions {
  uint64_t seed = 0;
  // Before every action, and between the pieces of a copy, the stream rests for a random time from 0 to this.
  int32_t max_delay_us = 0;
  int64_t piece_bytes = int64_t{1} << 20;  // a copy is moved in pieces of this size
  // All three streams, the most urgent first. A stream then moves only if no more urgent one can, now or after what a
  // running host thread may still enqueue: it must be held up by an event, or idle while a host thread waits. Actions
  // do not overlap in time, so that a plan with a race gives wrong bytes, but no race of threads.
  std::optional<std::array<StreamId, kStreams>> priority = std::nullopt;
};

// Any thread may call any function. The destructor first runs everything that was enqueued.
class ThreadedStreams final : public StreamBackend {
 public:
  // Throws InvalidArgument for options outside their range.
  explicit ThreadedStreams(ThreadedStreamOptions options = {});
  ~ThreadedStreams() override;

  void copy(StreamId stream, void* destination, const void* source, int64_t size_bytes) override;
  void compress(StreamId stream, void* buffer, const void* source, const CompressedSlots& slots,
                LinkCount* count) override;
  void decompress(StreamId stream, void* destination, const void* buffer, const CompressedSlots& slots) override;
  void fill(StreamId stream, void* destination, unsigned char value, int64_t size_bytes) override;
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

  // The n-th copy (compressed or not) that begins from now on fails half-way, 1 being the next; 0 takes that back.
  void fail_copy(int64_t n);
  int64_t live_events() const;  // created and not destroyed

 private:
  struct Event {
    int64_t recorded = 0;   // records enqueued
    int64_t completed = 0;  // the latest of them that a stream has passed
    std::string failure;    // of the stream that passed it
  };
  struct Action {
    enum class Kind : uint8_t { kBytes, kRecord, kWait };
    Kind kind = Kind::kBytes;
    EventId event = 0;
    int64_t generation = 0;  // of the event
    bool is_copy = false;
    std::function<void(std::mt19937_64&, bool)> body;  // kBytes; the flag: it is the copy that fails
  };

  void work(size_t thread, const std::vector<StreamId>& streams);
  void rest(std::mt19937_64& random) const;
  void enqueue(StreamId stream, Action action);
  void enqueue_slots(StreamId stream, const CompressedSlots& slots, std::function<void(const CompressedSlots&)> move);
  void wake(StreamId stream);
  void wake_all();
  void stop() noexcept;
  Event& event_at(EventId event);
  std::deque<Action>& queue_of(StreamId stream) { return queues_[static_cast<size_t>(stream)]; }
  bool held_up(StreamId stream);  // its next action is a wait for an event that has not come
  bool may_run(StreamId stream);

  const ThreadedStreamOptions options_;
  mutable std::mutex mutex_;                            // for everything below
  std::array<std::condition_variable, kStreams> work_;  // by thread: a stream of it may be able to move
  std::condition_variable progress_;                    // host threads: an event passed or a queue became empty
  std::array<std::deque<Action>, kStreams> queues_;     // an action leaves its queue when it is done
  std::deque<Event> events_;
  std::vector<EventId> free_events_;
  std::array<std::string, kStreams> failures_;  // first of each stream
  bool failed_ = false;
  int64_t copies_until_failure_ = 0;
  int running_ = 0;        // streams in the body of an action
  int hosts_waiting_ = 0;  // threads in synchronize() or drain()
  bool stopping_ = false;
  std::array<std::thread, kStreams> threads_;  // one per stream; with a priority the first serves all
};

}  // namespace splitkern::memory
