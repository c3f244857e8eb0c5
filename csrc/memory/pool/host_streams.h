// Streams of the CPU: queues of work with events, each with a thread of its own, or run step by step by the caller,
// which makes every interleaving reproducible. For tests of what orders streams, anywhere.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "memory/pool/streams.h"

namespace splitkern::memory {

// Thread contract: everything from any thread; step and finish of one stream from one thread at a time.
class HostStreams : public StreamEvents {
 public:
  enum class Mode : uint8_t { kStepped, kThreaded };

  // Stream 0 is there from the start.
  explicit HostStreams(Mode mode);
  // Threaded: waits for what can still run. Drops the rest: what waits for an event that cannot come, or for a step.
  ~HostStreams() override;

  int64_t create();
  // What work throws, the stepping caller gets; a thread of its own has nobody to tell and goes on.
  void put(int64_t stream, std::function<void()> work);
  // Stepped: runs the next entry (work, event or wait). False: there is none, or it must wait.
  bool step(int64_t stream);
  // Until all that was put in the stream has run. Stepped: runs it, and other streams where it must wait for them;
  // throws std::logic_error where nothing can go on.
  void finish(int64_t stream);

  std::unique_ptr<StreamEvent> make() override;

 private:
  friend class HostStreamEvent;
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace splitkern::memory
