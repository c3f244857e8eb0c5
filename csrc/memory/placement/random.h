// Random numbers that are the same on every platform and compiler: SplitMix64 (Steele, Lea and Flood, 2014). Used by
// the search for restarts and by the generators of instances.
#pragma once

#include <cstdint>

namespace splitkern::memory::placement {

// A bijection in which every bit of the result depends on every bit of the value.
constexpr uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
  return value ^ (value >> 31);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15ull); }

  // In [0, count), count > 0. The bias is below count / 2^64.
  int64_t below(int64_t count) {
    return static_cast<int64_t>(static_cast<unsigned __int128>(next()) * static_cast<uint64_t>(count) >> 64);
  }
  // In [low, high], both included.
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  // In [0, 1): a multiple of 2^-53.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

}  // namespace splitkern::memory::placement
