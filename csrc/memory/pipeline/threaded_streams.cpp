#include "memory/pipeline/threaded_streams.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "kernels/copy/params.h"
#include "memory/errors.h"
#include "memory/pipeline/checksum.h"
#include "memory/pipeline/zero_coder.h"

namespace splitkern::memory {
namespace {

ThreadedStreamOptions checked(ThreadedStreamOptions options) {
  if (options.max_delay_us < 0)
    throw InvalidArgument("max_delay_us must be 0 or more, got " + std::to_string(options.max_delay_us));
  if (options.piece_bytes < 1)
    throw InvalidArgument("piece_bytes must be 1 or more, got " + std::to_string(options.piece_bytes));
  if (options.priority) {
    for (const StreamId stream : {StreamId::kCompute, StreamId::kOffload, StreamId::kPrefetch}) {
      const auto times = std::ranges::count(*options.priority, stream);
      if (times != 1)
        throw InvalidArgument("priority must name every stream once, but names " + std::string(to_string(stream)) +
                              " " + std::to_string(times) + " times");
    }
  }
  return options;
}

}  // namespace

ThreadedStreams::ThreadedStreams(ThreadedStreamOptions options) : options_(checked(std::move(options))) {
  try {
    if (options_.priority) {
      threads_[0] = std::thread([this] { work(0, {options_.priority->begin(), options_.priority->end()}); });
      return;
    }
    for (size_t thread = 0; thread < kStreams; ++thread)
      threads_[thread] = std::thread([this, thread] { work(thread, {static_cast<StreamId>(thread)}); });
  } catch (...) {  // no thread to be had: end those that began
    stop();
    throw;
  }
}

ThreadedStreams::~ThreadedStreams() {
  stop();
}

void ThreadedStreams::stop() noexcept {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    ++hosts_waiting_;  // nothing more will come
  }
  wake_all();
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void ThreadedStreams::enqueue(StreamId stream, Action action) {
  {
    const std::lock_guard lock(mutex_);
    queue_of(stream).push_back(std::move(action));
  }
  wake(stream);
}

// After something was enqueued.
void ThreadedStreams::wake(StreamId stream) {
  work_[options_.priority ? 0 : static_cast<size_t>(stream)].notify_one();
}

void ThreadedStreams::wake_all() {
  for (std::condition_variable& work : work_) work.notify_one();
}

void ThreadedStreams::copy(StreamId stream, void* destination, const void* source, int64_t size_bytes) {
  auto* const to = static_cast<unsigned char*>(destination);
  const auto* const from = static_cast<const unsigned char*>(source);
  Action action;
  action.is_copy = true;
  action.body = [this, to, from, size_bytes](std::mt19937_64& random, bool fails) {
    const int64_t moved = fails ? size_bytes / 2 : size_bytes;
    for (int64_t done = 0; done < moved; done += options_.piece_bytes) {
      if (done > 0) rest(random);
      std::memcpy(to + done, from + done, static_cast<size_t>(std::min(options_.piece_bytes, moved - done)));
    }
    if (fails) throw StreamFailed("injected failure of a copy of " + std::to_string(size_bytes) + " bytes");
  };
  enqueue(stream, std::move(action));
}

// A copy that moves slots, in pieces.
void ThreadedStreams::enqueue_slots(StreamId stream, const CompressedSlots& slots,
                                    std::function<void(const CompressedSlots&)> move) {
  Action action;
  action.is_copy = true;
  action.body = [this, slots, move = std::move(move)](std::mt19937_64& random, bool fails) {
    const int64_t step = std::max<int64_t>(1, options_.piece_bytes / kernels::kCompressedChunkBytes);
    const int64_t end = fails ? slots.begin + (slots.end - slots.begin) / 2 : slots.end;
    for (int64_t begin = slots.begin; begin < end; begin += step) {
      if (begin > slots.begin) rest(random);
      CompressedSlots piece = slots;
      piece.begin = begin;
      piece.end = std::min(begin + step, end);
      move(piece);
    }
    if (fails) {
      throw StreamFailed("injected failure of a compressed copy of " + std::to_string(slots.end - slots.begin) +
                         " slots");
    }
  };
  enqueue(stream, std::move(action));
}

void ThreadedStreams::compress(StreamId stream, void* buffer, const void* source, const CompressedSlots& slots,
                               LinkCount* count) {
  enqueue_slots(stream, slots, [buffer, source, count](const CompressedSlots& piece) {
    const int64_t link_bytes = memory::compress(buffer, source, piece);
    if (count == nullptr) return;
    count->plain_bytes += plain_bytes_of(piece);
    count->link_bytes += link_bytes;
  });
}

void ThreadedStreams::decompress(StreamId stream, void* destination, const void* buffer, const CompressedSlots& slots) {
  enqueue_slots(stream, slots, [destination, buffer](const CompressedSlots& piece) {
    memory::decompress(destination, buffer, piece);
  });
}

void ThreadedStreams::fill(StreamId stream, void* destination, unsigned char value, int64_t size_bytes) {
  call(stream, [destination, value, size_bytes] { std::memset(destination, value, static_cast<size_t>(size_bytes)); });
}

void ThreadedStreams::checksum(StreamId stream, const void* source, int64_t size_bytes, std::atomic<uint64_t>* result) {
  call(stream, [source, size_bytes, result] { result->store(memory::checksum(kChecksumSeed, source, size_bytes)); });
}

void ThreadedStreams::call(StreamId stream, std::function<void()> function) {
  Action action;
  action.body = [function = std::move(function)](std::mt19937_64&, bool) { function(); };
  enqueue(stream, std::move(action));
}

EventId ThreadedStreams::create_event() {
  const std::lock_guard lock(mutex_);
  if (!free_events_.empty()) {
    const EventId event = free_events_.back();
    free_events_.pop_back();
    events_[static_cast<size_t>(event)] = Event{};
    return event;
  }
  free_events_.reserve(events_.size() + 1);  // destroy_event() must not need memory
  events_.emplace_back();
  return static_cast<EventId>(events_.size()) - 1;
}

void ThreadedStreams::destroy_event(EventId event) noexcept {
  const std::lock_guard lock(mutex_);
  free_events_.push_back(event);
}

int64_t ThreadedStreams::live_events() const {
  const std::lock_guard lock(mutex_);
  return static_cast<int64_t>(events_.size() - free_events_.size());
}

ThreadedStreams::Event& ThreadedStreams::event_at(EventId event) {
  if (event < 0 || static_cast<size_t>(event) >= events_.size())
    throw InvalidArgument("there is no event " + std::to_string(event));
  return events_[static_cast<size_t>(event)];
}

void ThreadedStreams::record(EventId event, StreamId stream) {
  {
    const std::lock_guard lock(mutex_);
    Action action;
    action.kind = Action::Kind::kRecord;
    action.event = event;
    action.generation = event_at(event).recorded + 1;
    queue_of(stream).push_back(std::move(action));
    ++event_at(event).recorded;
  }
  wake(stream);
}

void ThreadedStreams::wait(StreamId stream, EventId event) {
  {
    const std::lock_guard lock(mutex_);
    Action action;
    action.kind = Action::Kind::kWait;
    action.event = event;
    action.generation = event_at(event).recorded;
    queue_of(stream).push_back(std::move(action));
  }
  wake(stream);
}

bool ThreadedStreams::query(EventId event) {
  const std::lock_guard lock(mutex_);
  const Event& found = event_at(event);
  if (found.completed < found.recorded) return false;
  if (!found.failure.empty()) throw StreamFailed(found.failure);
  return true;
}

void ThreadedStreams::synchronize(EventId event) {
  std::unique_lock lock(mutex_);
  const Event& found = event_at(event);
  const int64_t generation = found.recorded;
  ++hosts_waiting_;
  wake_all();  // with a priority, less urgent streams may now move
  progress_.wait(lock, [&] { return found.completed >= generation; });
  --hosts_waiting_;
  if (!found.failure.empty()) throw StreamFailed(found.failure);
}

void ThreadedStreams::require_ok(StreamId stream) {
  const std::lock_guard lock(mutex_);
  const std::string& failure = failures_[static_cast<size_t>(stream)];
  if (!failure.empty()) throw StreamFailed(failure);
}

void ThreadedStreams::drain() noexcept {
  std::unique_lock lock(mutex_);
  ++hosts_waiting_;
  wake_all();  // with a priority, less urgent streams may now move
  progress_.wait(lock, [&] { return std::ranges::all_of(queues_, [](const auto& queue) { return queue.empty(); }); });
  --hosts_waiting_;
}

void ThreadedStreams::reset() noexcept {
  const std::lock_guard lock(mutex_);
  failed_ = false;
  for (std::string& failure : failures_) failure.clear();
  for (Event& event : events_) event.failure.clear();
}

void ThreadedStreams::fail_copy(int64_t n) {
  const std::lock_guard lock(mutex_);
  copies_until_failure_ = n;
}

bool ThreadedStreams::held_up(StreamId stream) {
  const std::deque<Action>& queue = queue_of(stream);
  return !queue.empty() && queue.front().kind == Action::Kind::kWait &&
         events_[static_cast<size_t>(queue.front().event)].completed < queue.front().generation;
}

bool ThreadedStreams::may_run(StreamId stream) {
  if (queue_of(stream).empty() || held_up(stream)) return false;
  if (!options_.priority) return true;
  for (const StreamId urgent : *options_.priority) {
    if (urgent == stream) break;
    if (queue_of(urgent).empty() ? hosts_waiting_ == 0 : !held_up(urgent)) return false;
  }
  return true;
}

void ThreadedStreams::rest(std::mt19937_64& random) const {
  if (options_.max_delay_us == 0) return;
  const auto delay_us = static_cast<int64_t>(random() % (static_cast<uint64_t>(options_.max_delay_us) + 1));
  std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
}

// Serves the streams, of those that can move the first.
void ThreadedStreams::work(size_t thread, const std::vector<StreamId>& streams) {
  std::mt19937_64 random(options_.seed * kStreams + thread);
  const auto next = [&] { return std::ranges::find_if(streams, [this](StreamId stream) { return may_run(stream); }); };
  const auto is_idle = [this](StreamId stream) { return queue_of(stream).empty(); };
  std::unique_lock lock(mutex_);
  for (;;) {
    work_[thread].wait(lock,
                       [&] { return next() != streams.end() || (stopping_ && std::ranges::all_of(streams, is_idle)); });
    const auto found = next();
    if (found == streams.end()) return;
    const StreamId stream = *found;
    if (options_.max_delay_us > 0) {
      lock.unlock();
      rest(random);
      lock.lock();
      if (!may_run(stream)) continue;
    }
    std::deque<Action>& queue = queue_of(stream);
    Action action = std::move(queue.front());
    queue.front() = Action{};  // keeps the place until the action is done
    std::string failure;
    if (action.kind == Action::Kind::kBytes && !failed_) {
      const bool fails = action.is_copy && copies_until_failure_ > 0 && --copies_until_failure_ == 0;
      lock.unlock();
      try {
        action.body(random, fails);
      } catch (const std::exception& error) {
        failure = error.what();
        if (failure.empty()) failure = "an exception without text";
      } catch (...) {
        failure = "an exception that is no std::exception";
      }
      action.body = nullptr;
      lock.lock();
    }
    std::string& first = failures_[static_cast<size_t>(stream)];
    if (!failure.empty()) {
      failed_ = true;
      if (first.empty()) first = std::move(failure);
    }
    if (action.kind == Action::Kind::kRecord) {
      Event& event = events_[static_cast<size_t>(action.event)];
      // Records of several streams may pass in another order than they were enqueued: the latest counts.
      if (action.generation > event.completed) {
        event.completed = action.generation;
        event.failure = first;
      }
    }
    queue.pop_front();
    if (action.kind == Action::Kind::kRecord) wake_all();
    if (queue.empty() || action.kind == Action::Kind::kRecord) progress_.notify_all();
  }
}

}  // namespace splitkern::memory
