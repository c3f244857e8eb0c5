#include "memory/copy_pipeline.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "memory/errors.h"
#include "memory/pipeline/plan_form.h"

namespace splitkern::memory {
namespace {

const char* name_of(CopyKind kind) {
  return kind == CopyKind::kOffload ? "offload" : "prefetch";
}

CopyPipelineOptions checked(const CopyPipelineOptions& options) {
  if (options.chunk_bytes < 1)
    throw InvalidArgument("chunk_bytes must be 1 or more, got " + std::to_string(options.chunk_bytes));
  if (options.max_in_flight < 1)
    throw InvalidArgument("max_in_flight must be 1 or more, got " + std::to_string(options.max_in_flight));
  if (options.count_every < 1)
    throw InvalidArgument("count_every must be 1 or more, got " + std::to_string(options.count_every));
  return options;
}

int64_t whole_slots(int64_t chunk_bytes) {
  constexpr int64_t kSlot = kernels::kCompressedChunkBytes;
  return std::max(kSlot, chunk_bytes / kSlot * kSlot);
}

class Stopwatch {
 public:
  explicit Stopwatch(double& total_us) : total_us_(total_us), begin_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() {
    total_us_ += std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  double& total_us_;
  const std::chrono::steady_clock::time_point begin_;
};

}  // namespace

// --- Construction
// ------------------------------------------------------------------------------------------------------

CopyPipeline::CopyPipeline(StreamBackend& backend, Plan plan, const Arenas& arenas, const CopyPipelineOptions& options)
    : backend_(backend),
      plan_(std::move(plan)),
      options_(checked(options)),
      arenas_(arenas),
      left_(plan_.copies.size()),
      came_(plan_.copies.size()),
      changed_on_the_way_(plan_.copies.size()) {
  require_well_formed(plan_, arenas);

  const size_t copies = plan_.copies.size();
  ending_.resize(plan_.boundaries.size());
  fed_.assign(copies, 0);
  offload_of_.assign(copies, -1);
  if (options_.poison) {
    // What ends at the last boundary or behind it is the step's result.
    for (size_t index = 0; index < plan_.residencies.size(); ++index) {
      const Residency& residency = plan_.residencies[index];
      if (residency.pool != Pool::kParameters && static_cast<size_t>(residency.end) < plan_.instances.size())
        ending_[static_cast<size_t>(residency.end)].push_back(static_cast<int32_t>(index));
    }
  }
  std::vector<char> waited(copies, 0);
  std::vector<int32_t> offload_into(plan_.residencies.size(), -1);
  for (const Boundary& boundary : plan_.boundaries) {
    for (const int32_t copy : boundary.waits) waited[static_cast<size_t>(copy)] = 1;
    for (const int32_t copy : boundary.issues) {
      const Copy& issued = plan_.copies[static_cast<size_t>(copy)];
      if (issued.kind == CopyKind::kOffload)
        offload_into[static_cast<size_t>(issued.destination)] = copy;
      else
        offload_of_[static_cast<size_t>(copy)] = offload_into[static_cast<size_t>(issued.source)];
    }
  }
  for (size_t copy = 0; copy < copies; ++copy) {
    if (!waited[copy]) unwaited_.push_back(static_cast<int32_t>(copy));
  }

  feeders_[0].stream = StreamId::kOffload;
  feeders_[1].stream = StreamId::kPrefetch;
  try {
    position_.reserve(plan_.boundaries.size());
    for (const Boundary& boundary : plan_.boundaries)
      position_.push_back(boundary.issues.empty() ? -1 : backend_.create_event());
    done_.reserve(copies);
    for (size_t copy = 0; copy < copies; ++copy) done_.push_back(backend_.create_event());
    for (Feeder& feeder : feeders_) {
      feeder.events.reserve(static_cast<size_t>(options_.max_in_flight));
      for (int32_t chunk = 0; chunk < options_.max_in_flight; ++chunk) feeder.events.push_back(backend_.create_event());
      feeder.thread = std::thread([this, &feeder] { feed_all(feeder); });
    }
  } catch (...) {
    stop_feeders();
    throw;
  }
}

CopyPipeline::~CopyPipeline() {
  if (!is_settled()) abort();
  stop_feeders();
}

// Between steps, every copy known to be done.
bool CopyPipeline::is_settled() const {
  const std::lock_guard lock(mutex_);
  return next_ == 0 && !inside_ && cancels_ == 0 && !failure_ &&
         std::ranges::all_of(feeders_, [](const Feeder& feeder) {
           return feeder.queue.empty() && !feeder.busy && feeder.unsettled.empty();
         });
}

void CopyPipeline::stop_feeders() noexcept {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (Feeder& feeder : feeders_) {
    if (feeder.thread.joinable()) feeder.thread.join();
    for (const EventId event : feeder.events) backend_.destroy_event(event);
  }
  for (const EventId event : done_) backend_.destroy_event(event);
  for (const EventId event : position_) {
    if (event >= 0) backend_.destroy_event(event);
  }
}

int64_t CopyPipeline::copied_bytes(int32_t copy) const {
  const int32_t storage = plan_.copies[static_cast<size_t>(copy)].storage;
  return plan_.storages[static_cast<size_t>(storage)].size_bytes;
}

unsigned char* CopyPipeline::address(int32_t residency) const {
  const Residency& found = plan_.residencies[static_cast<size_t>(residency)];
  void* const arena = found.pool == Pool::kDevice ? arenas_.device
                      : found.pool == Pool::kHost ? arenas_.host
                                                  : arenas_.parameters;
  return static_cast<unsigned char*>(arena) + found.offset_bytes;
}

CopyFailed CopyPipeline::failure_of(int32_t copy, const std::string& why) const {
  const Copy& failed = plan_.copies[static_cast<size_t>(copy)];
  const int64_t size_bytes = copied_bytes(copy);
  return CopyFailed(std::string(name_of(failed.kind)) + " of storage " + std::to_string(failed.storage) + " (copy " +
                        std::to_string(copy) + ", " + std::to_string(size_bytes) + " bytes, issued at boundary " +
                        std::to_string(failed.issue) + "): " + why,
                    failed.kind, copy, failed.storage, size_bytes);
}

// --- The feeders' threads
// ----------------------------------------------------------------------------------------------

void CopyPipeline::feed_all(Feeder& feeder) {
  std::exception_ptr unusable;  // the thread itself: every copy fails with it
  try {
    backend_.attach_thread();
  } catch (...) {
    unusable = std::current_exception();
  }
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stopping_ || !feeder.queue.empty(); });
    if (stopping_) return;
    const int32_t copy = feeder.queue.front();
    feeder.queue.pop_front();
    feeder.busy = true;
    // An event that is not recorded yet would hold nobody up.
    changed_.wait(lock, [&] {
      return dropping() || std::ranges::all_of(plan_.copies[static_cast<size_t>(copy)].after, [&](int32_t earlier) {
               return fed_[static_cast<size_t>(earlier)] != 0;
             });
    });
    if (!dropping()) {
      std::exception_ptr failure = unusable;
      lock.unlock();
      if (!failure) {
        try {
          feed(feeder, copy);
        } catch (...) {
          failure = std::current_exception();
        }
      }
      lock.lock();
      if (failure && !failure_) failure_ = failure;
    }
    feeder.busy = false;
    changed_.notify_all();
  }
}

// A compressed copy goes in whole slots.
int64_t CopyPipeline::chunk_count(int32_t copy) const {
  const int64_t size_bytes = copied_bytes(copy);
  const int64_t chunk_bytes =
      plan_.copies[static_cast<size_t>(copy)].compressed ? whole_slots(options_.chunk_bytes) : options_.chunk_bytes;
  return size_bytes / chunk_bytes + (size_bytes % chunk_bytes != 0 ? 1 : 0);
}

void CopyPipeline::enqueue_chunk(const Feeder& feeder, int32_t copy, int64_t chunk, LinkCount* count) {
  const Copy& fed = plan_.copies[static_cast<size_t>(copy)];
  const int64_t size_bytes = copied_bytes(copy);
  const unsigned char* const source = address(fed.source);
  unsigned char* const destination = address(fed.destination);
  if (!fed.compressed) {
    const int64_t begin = chunk * options_.chunk_bytes;
    backend_.copy(feeder.stream, destination + begin, source + begin,
                  std::min(options_.chunk_bytes, size_bytes - begin));
    return;
  }
  const int32_t element_bytes = plan_.storages[static_cast<size_t>(fed.storage)].compression->element_bytes;
  const int64_t most = whole_slots(options_.chunk_bytes) / kernels::kCompressedChunkBytes;
  CompressedSlots slots{.elements = size_bytes / element_bytes, .element_bytes = element_bytes, .begin = chunk * most};
  slots.end = std::min(slots.begin + most, kernels::compressed_chunks(slots.elements, element_bytes));
  if (fed.kind == CopyKind::kOffload) {
    backend_.compress(feeder.stream, destination, source, slots, count);
  } else {
    backend_.decompress(feeder.stream, destination, source, slots);
  }
}

// Waits until one more chunk may be in flight; false if nothing more is to be enqueued.
bool CopyPipeline::make_room(Feeder& feeder) {
  if (feeder.in_flight.size() < feeder.events.size()) return true;
  const Chunk oldest = feeder.in_flight.front();
  try {
    backend_.synchronize(oldest.done);
  } catch (const StreamFailed& error) {
    throw failure_of(oldest.copy, error.what());
  }
  feeder.in_flight.pop_front();
  const std::lock_guard lock(mutex_);
  return !dropping();
}

void CopyPipeline::feed(Feeder& feeder, int32_t copy) {
  const auto index = static_cast<size_t>(copy);
  const Copy& fed = plan_.copies[index];
  const int64_t size_bytes = copied_bytes(copy);
  const unsigned char* const source = address(fed.source);
  unsigned char* const destination = address(fed.destination);
  const bool offload = fed.kind == CopyKind::kOffload;
  const int64_t chunks = chunk_count(copy);
  LinkCount* count = nullptr;
  if (fed.compressed && offload) {
    const std::lock_guard lock(mutex_);
    if (statistics_.steps % options_.count_every == 0) count = &count_;
  }
  try {
    backend_.wait(feeder.stream, position_[static_cast<size_t>(fed.issue)]);
    for (const int32_t earlier : fed.after) backend_.wait(feeder.stream, done_[static_cast<size_t>(earlier)]);
    if (options_.checksums && offload) backend_.checksum(feeder.stream, source, size_bytes, &left_[index]);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (!make_room(feeder)) return;
      const EventId event = feeder.events[feeder.next_event];
      enqueue_chunk(feeder, copy, chunk, count);
      backend_.record(event, feeder.stream);
      feeder.in_flight.push_back({.copy = copy, .done = event});
      feeder.next_event = (feeder.next_event + 1) % feeder.events.size();
    }
    const int32_t origin = offload_of_[index];
    if (options_.checksums && origin >= 0) {
      // Compared in stream order: the next step's offload may not yet have replaced what this one is compared with.
      backend_.checksum(feeder.stream, destination, size_bytes, &came_[index]);
      backend_.call(feeder.stream, [this, index, origin] {
        if (came_[index].load() != left_[static_cast<size_t>(origin)].load()) changed_on_the_way_[index].store(true);
      });
    }
    backend_.record(done_[index], feeder.stream);
  } catch (const CopyFailed&) {
    throw;
  } catch (const std::exception& error) {
    throw failure_of(copy, error.what());
  }
  {
    const std::lock_guard lock(mutex_);
    fed_[index] = 1;
    (offload ? statistics_.offloads : statistics_.prefetches) += 1;
    (offload ? statistics_.offload_chunks : statistics_.prefetch_chunks) += chunks;
    (offload ? statistics_.offloaded_bytes : statistics_.prefetched_bytes) += size_bytes;
  }
  changed_.notify_all();
}

// --- The calling thread
// ------------------------------------------------------------------------------------------------

// Keeps abort() from clearing up under the calling thread.
class CopyPipeline::Turn {
 public:
  explicit Turn(CopyPipeline& pipeline) : pipeline_(pipeline) {
    if (pipeline.cancels_ > 0) throw StepAborted("the step is being aborted");
    if (pipeline.inside_) throw InvalidArgument("one thread at a time may call at_boundary() and synchronize()");
    pipeline.inside_ = true;
  }
  ~Turn() {
    {
      const std::lock_guard lock(pipeline_.mutex_);
      pipeline_.inside_ = false;
    }
    pipeline_.changed_.notify_all();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  CopyPipeline& pipeline_;
};

void CopyPipeline::at_boundary(int32_t boundary) {
  std::unique_lock lock(mutex_);
  if (boundary < 0 || boundary >= boundary_count())
    throw InvalidArgument("boundary must be in [0, " + std::to_string(boundary_count()) + "), got " +
                          std::to_string(boundary));
  if (cancels_ > 0) throw StepAborted("the step is being aborted");
  if (boundary != next_) {
    if (aborted_) throw StepAborted("the step was aborted: the next boundary is 0, got " + std::to_string(boundary));
    throw InvalidArgument("boundary must be " + std::to_string(next_) + ", the next one, got " +
                          std::to_string(boundary));
  }
  const Turn turn(*this);
  aborted_ = false;
  lock.unlock();
  try {
    run_boundary(boundary);
  } catch (...) {
    recover();
    throw;
  }
  lock.lock();
  ++next_;
  if (static_cast<size_t>(next_) == plan_.boundaries.size()) {
    next_ = 0;
    ++statistics_.steps;
  }
  lock.unlock();
}

void CopyPipeline::run_boundary(int32_t boundary) {
  const Boundary& planned = plan_.boundaries[static_cast<size_t>(boundary)];
  poll();
  for (const int32_t copy : planned.waits) {
    wait_until_fed(copy);
    backend_.wait(StreamId::kCompute, done_[static_cast<size_t>(copy)]);
  }
  for (const int32_t residency : ending_[static_cast<size_t>(boundary)]) {
    backend_.fill(StreamId::kCompute, address(residency), 0xFF,
                  plan_.residencies[static_cast<size_t>(residency)].size_bytes);
  }
  if (!planned.issues.empty()) {
    for (const int32_t copy : planned.issues) {
      // Its event is about to be recorded again: see first what became of the last step's copy.
      std::deque<int32_t>& unsettled = feeder_of(copy).unsettled;
      while (std::ranges::find(unsettled, copy) != unsettled.end()) {
        settle(unsettled.front(), /*wait=*/true);
        unsettled.pop_front();
      }
    }
    backend_.record(position_[static_cast<size_t>(boundary)], StreamId::kCompute);
    {
      const std::lock_guard lock(mutex_);
      for (const int32_t copy : planned.issues) {
        fed_[static_cast<size_t>(copy)] = 0;
        changed_on_the_way_[static_cast<size_t>(copy)].store(false);
        feeder_of(copy).queue.push_back(copy);
        feeder_of(copy).unsettled.push_back(copy);
      }
    }
    changed_.notify_all();
  }
  if (static_cast<size_t>(boundary) + 1 == plan_.boundaries.size()) {
    for (const int32_t copy : unwaited_) {
      wait_until_fed(copy);
      backend_.wait(StreamId::kCompute, done_[static_cast<size_t>(copy)]);
    }
  }
}

void CopyPipeline::synchronize() {
  std::unique_lock lock(mutex_);
  const Turn turn(*this);
  lock.unlock();
  try {
    poll();
    finish_unsettled();
  } catch (...) {
    recover();
    throw;
  }
}

// Throws for what has gone wrong so far, without waiting.
void CopyPipeline::poll() {
  {
    const std::lock_guard lock(mutex_);
    if (cancels_ > 0) throw StepAborted("the step was aborted");
    if (failure_) std::rethrow_exception(failure_);
  }
  for (Feeder& feeder : feeders_) {
    while (!feeder.unsettled.empty() && settle(feeder.unsettled.front(), /*wait=*/false)) feeder.unsettled.pop_front();
  }
  backend_.require_ok(StreamId::kCompute);
}

void CopyPipeline::finish_unsettled() {
  for (Feeder& feeder : feeders_) {
    while (!feeder.unsettled.empty()) {
      settle(feeder.unsettled.front(), /*wait=*/true);
      feeder.unsettled.pop_front();
    }
  }
  backend_.require_ok(StreamId::kCompute);
}

// Whether an issued copy is done; throws if it went wrong.
bool CopyPipeline::settle(int32_t copy, bool wait) {
  const auto index = static_cast<size_t>(copy);
  if (wait) {
    wait_until_fed(copy);
  } else {
    const std::lock_guard lock(mutex_);
    if (!fed_[index]) return false;
  }
  try {
    if (wait) {
      double waited_us = 0;
      {
        const Stopwatch stopwatch(waited_us);
        backend_.synchronize(done_[index]);
      }
      const std::lock_guard lock(mutex_);
      statistics_.host_wait_us += waited_us;
    } else if (!backend_.query(done_[index])) {
      return false;
    }
  } catch (const StreamFailed& error) {
    throw failure_of(copy, error.what());
  }
  if (changed_on_the_way_[index].load())
    throw failure_of(copy, "the bytes that came back are not those that copy " + std::to_string(offload_of_[index]) +
                               " read: the device slot changed while it left, the host slot meanwhile, or the "
                               "device slot while it came");
  return true;
}

void CopyPipeline::wait_until_fed(int32_t copy) {
  std::unique_lock lock(mutex_);
  if (!fed_[static_cast<size_t>(copy)] && !dropping()) {
    const Stopwatch stopwatch(statistics_.host_wait_us);
    changed_.wait(lock, [&] { return fed_[static_cast<size_t>(copy)] != 0 || dropping(); });
  }
  if (cancels_ > 0) throw StepAborted("the step was aborted");
  if (failure_) std::rethrow_exception(failure_);
}

void CopyPipeline::recover() noexcept {
  std::unique_lock lock(mutex_);
  ++cancels_;
  for (Feeder& feeder : feeders_) feeder.queue.clear();
  changed_.notify_all();
  changed_.wait(lock, [&] { return !feeders_[0].busy && !feeders_[1].busy; });
  lock.unlock();
  backend_.drain();
  backend_.reset();
  lock.lock();
  for (Feeder& feeder : feeders_) {
    feeder.in_flight.clear();
    feeder.unsettled.clear();
  }
  std::ranges::fill(fed_, char{0});
  failure_ = nullptr;
  next_ = 0;
  --cancels_;
  lock.unlock();
  changed_.notify_all();
}

void CopyPipeline::abort() noexcept {
  std::unique_lock lock(mutex_);
  ++cancels_;
  aborted_ = aborted_ || next_ != 0 || inside_;
  changed_.notify_all();
  changed_.wait(lock, [&] { return !inside_; });
  lock.unlock();
  recover();
  lock.lock();
  --cancels_;
  lock.unlock();
  changed_.notify_all();
}

CopyStatistics CopyPipeline::statistics() const {
  const std::lock_guard lock(mutex_);
  CopyStatistics statistics = statistics_;
  statistics.counted_bytes = count_.plain_bytes.load();
  statistics.counted_link_bytes = count_.link_bytes.load();
  return statistics;
}

}  // namespace splitkern::memory
