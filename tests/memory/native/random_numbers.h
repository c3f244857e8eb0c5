// Random numbers that are the same on every machine, for checks on random cases.
#pragma once

#include <cstdint>
#include <vector>

namespace random_numbers {

inline uint64_t mix(uint64_t x) {  // the finisher of splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(mix(seed)) {}
  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15); }
  int64_t below(int64_t bound) { return static_cast<int64_t>(next() % static_cast<uint64_t>(bound)); }
  // Both ends included.
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(double share) { return static_cast<double>(next() >> 11) < share * 9007199254740992.0; }
  template <class Item>
  const Item& pick(const std::vector<Item>& items) {
    return items.at(below(static_cast<int64_t>(items.size())));
  }

 private:
  uint64_t state_;
};

}  // namespace random_numbers
