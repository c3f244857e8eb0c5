// Queues of work with events on the CPU. See host_streams.h.
#include "memory/pool/host_streams.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "memory/errors.h"

namespace splitkern::memory {

namespace {

// Recorded again, an event is a new point: waits keep the one that they were made for.
struct Point {
  int64_t recorded = 0;
  int64_t passed = 0;
};

struct Entry {
  enum class Kind : uint8_t { kWork, kRecord, kWait };
  Kind kind = Kind::kWork;
  std::function<void()> work;
  std::shared_ptr<Point> point;
  int64_t generation = 0;
};

struct Queue {
  std::deque<Entry> entries;
  bool is_running = false;  // an entry has been taken out and is not done
};

}  // namespace

struct HostStreams::State {
  Mode mode;
  std::mutex mutex;
  std::condition_variable changed;
  std::map<int64_t, Queue> queues;  // a map: queues stay where they are
  std::vector<std::thread> threads;
  bool ends = false;

  Queue& at(int64_t stream) {
    const auto found = queues.find(stream);
    if (found != queues.end()) return found->second;
    throw InvalidArgument("HostStreams: stream must be one of 0 to " + std::to_string(queues.size() - 1) + ", got " +
                          std::to_string(stream));
  }

  static bool can_run(const Queue& queue) {
    if (queue.is_running || queue.entries.empty()) return false;
    const Entry& next = queue.entries.front();
    return next.kind != Entry::Kind::kWait || next.point->passed >= next.generation;
  }

  void run(Queue& queue, std::unique_lock<std::mutex>& lock) {
    Entry entry = std::move(queue.entries.front());
    queue.entries.pop_front();
    if (entry.kind == Entry::Kind::kRecord) entry.point->passed = entry.generation;
    if (entry.kind == Entry::Kind::kWork) {
      queue.is_running = true;
      lock.unlock();
      std::exception_ptr error;
      try {
        entry.work();
      } catch (...) {
        error = std::current_exception();
      }
      entry.work = nullptr;
      lock.lock();
      queue.is_running = false;
      if (error != nullptr && mode == Mode::kStepped) std::rethrow_exception(error);
    }
    changed.notify_all();
  }

  // Stepped: whether any stream could go on; `first` is asked first.
  bool step_any(std::unique_lock<std::mutex>& lock, Queue* first = nullptr) {
    if (first != nullptr && can_run(*first)) {
      run(*first, lock);
      return true;
    }
    for (auto& [stream, queue] : queues) {
      if (!can_run(queue)) continue;
      run(queue, lock);
      return true;
    }
    return false;
  }

  bool is_stuck() const {
    for (const auto& [stream, queue] : queues) {
      if (queue.is_running || can_run(queue)) return false;
    }
    return true;
  }

  template <class Condition>
  void wait_until(std::unique_lock<std::mutex>& lock, const Condition& holds, Queue* first = nullptr) {
    if (mode == Mode::kThreaded) return changed.wait(lock, holds);
    while (!holds()) {
      if (!step_any(lock, first)) throw std::logic_error("HostStreams: deadlock: every stream waits for an event");
    }
  }

  void work_through(Queue& queue) {
    std::unique_lock lock(mutex);
    for (;;) {
      changed.wait(lock, [&] { return ends || can_run(queue); });
      if (!can_run(queue)) return;
      run(queue, lock);
    }
  }

  void start(Queue& queue) {
    if (mode == Mode::kThreaded) threads.emplace_back([this, &queue] { work_through(queue); });
  }
};

class HostStreamEvent : public StreamEvent {
 public:
  explicit HostStreamEvent(std::shared_ptr<HostStreams::State> state) : state_(std::move(state)) {}

  void record(int64_t stream) override {
    const std::lock_guard lock(state_->mutex);
    state_->at(stream).entries.push_back({Entry::Kind::kRecord, nullptr, point_, point_->recorded + 1});
    ++point_->recorded;
    state_->changed.notify_all();
  }

  bool query() override {
    const std::lock_guard lock(state_->mutex);
    return point_->passed >= point_->recorded;
  }

  void wait(int64_t stream) override {
    const std::lock_guard lock(state_->mutex);
    state_->at(stream).entries.push_back({Entry::Kind::kWait, nullptr, point_, point_->recorded});
    state_->changed.notify_all();
  }

  void synchronize() override {
    std::unique_lock lock(state_->mutex);
    state_->wait_until(lock, [point = point_, generation = point_->recorded] { return point->passed >= generation; });
  }

 private:
  const std::shared_ptr<HostStreams::State> state_;
  const std::shared_ptr<Point> point_ = std::make_shared<Point>();
};

HostStreams::HostStreams(Mode mode) : state_(std::make_shared<State>()) {
  state_->mode = mode;
  create();
}

HostStreams::~HostStreams() {
  {
    std::unique_lock lock(state_->mutex);
    if (state_->mode == Mode::kThreaded) state_->changed.wait(lock, [&] { return state_->is_stuck(); });
    state_->ends = true;
    state_->changed.notify_all();
  }
  for (std::thread& thread : state_->threads) thread.join();
}

int64_t HostStreams::create() {
  const std::lock_guard lock(state_->mutex);
  const auto stream = static_cast<int64_t>(state_->queues.size());
  state_->start(state_->queues[stream]);
  return stream;
}

void HostStreams::put(int64_t stream, std::function<void()> work) {
  const std::lock_guard lock(state_->mutex);
  state_->at(stream).entries.push_back({Entry::Kind::kWork, std::move(work), nullptr, 0});
  state_->changed.notify_all();
}

bool HostStreams::step(int64_t stream) {
  std::unique_lock lock(state_->mutex);
  Queue& queue = state_->at(stream);
  if (!State::can_run(queue)) return false;
  state_->run(queue, lock);
  return true;
}

void HostStreams::finish(int64_t stream) {
  std::unique_lock lock(state_->mutex);
  Queue& queue = state_->at(stream);
  state_->wait_until(lock, [&] { return queue.entries.empty() && !queue.is_running; }, &queue);
}

std::unique_ptr<StreamEvent> HostStreams::make() {
  return std::make_unique<HostStreamEvent>(state_);
}

}  // namespace splitkern::memory
