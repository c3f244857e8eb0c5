// Proves a placement right by a sweep over time that shares nothing with the code under test: every buffer aligned, no
// two of overlapping lifetimes at overlapping addresses, the peak and the lower bound as they are stated.
#pragma once

#include <algorithm>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "memory/placement.h"
#include "native/check.h"

namespace check {

inline int64_t rounded_up(int64_t size, int64_t alignment) {
  return size == 0 ? 0 : ((size - 1) / alignment + 1) * alignment;
}

// The largest sum of live sizes, each rounded up.
inline int64_t live_peak(const std::vector<splitkern::memory::Buffer>& buffers, int64_t alignment) {
  std::map<int64_t, int64_t> change;
  for (const auto& buffer : buffers) {
    const int64_t size = rounded_up(buffer.size_bytes, alignment);
    change[buffer.begin] += size;
    change[buffer.end] -= size;
  }
  int64_t live = 0, peak = 0;
  for (const auto& [time, difference] : change) peak = std::max(peak, live += difference);
  return peak;
}

inline void placed(const std::vector<splitkern::memory::Buffer>& buffers, const splitkern::memory::Placement& placement,
                   int64_t alignment = 1) {
  equal(placement.offsets.size(), buffers.size(), "the number of offsets");
  struct Event {
    int64_t time;
    bool begins;
    size_t buffer;
  };
  std::vector<Event> events;
  int64_t peak = 0;
  const auto end_of = [&](size_t i) { return placement.offsets[i] + rounded_up(buffers[i].size_bytes, alignment); };
  for (size_t i = 0; i < buffers.size(); ++i) {
    const std::string name = "buffer " + std::to_string(i);
    require(placement.offsets[i] >= 0, name + " has a negative offset");
    require(placement.offsets[i] % alignment == 0, name + " is not aligned");
    if (buffers[i].size_bytes == 0) continue;
    peak = std::max(peak, end_of(i));
    events.push_back({buffers[i].begin, true, i});
    events.push_back({buffers[i].end, false, i});
  }
  std::sort(events.begin(), events.end(),
            [](const Event& a, const Event& b) { return a.time != b.time ? a.time < b.time : a.begins < b.begins; });
  std::map<int64_t, size_t> live;  // by offset
  for (const Event& event : events) {
    const int64_t offset = placement.offsets[event.buffer];
    if (!event.begins) {
      live.erase(offset);
      continue;
    }
    const auto after = live.lower_bound(offset);
    const auto meets = [&](size_t other) {
      return "buffers " + std::to_string(event.buffer) + " and " + std::to_string(other) + " overlap";
    };
    if (after != live.end()) require(end_of(event.buffer) <= after->first, meets(after->second));
    if (after != live.begin()) require(end_of(std::prev(after)->second) <= offset, meets(std::prev(after)->second));
    live.emplace(offset, event.buffer);
  }
  equal(placement.peak_bytes, peak, "the peak");
  equal(placement.lower_bound_bytes, live_peak(buffers, alignment), "the lower bound");
}

}  // namespace check
