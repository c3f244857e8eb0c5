// A list of named checks with one main for all: a check throws where something is wrong. Used by the primitive
// checks beside it; test_primitives.py builds and runs them.
#pragma once

#include <cstdint>
#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

extern "C" void splitkern_host_set_schedule(uint64_t seed);

namespace check {

inline std::vector<std::pair<std::string, std::function<void()>>>& list() {
  static std::vector<std::pair<std::string, std::function<void()>>> checks;
  return checks;
}

struct Register {
  Register(const char* name, std::function<void()> body) { list().emplace_back(name, std::move(body)); }
};

inline void require(bool condition, const std::string& text) {
  if (!condition) throw std::runtime_error("wrong: " + text);
}
template <class Actual, class Expected>
void equal(const Actual& actual, const Expected& expected, const std::string& what) {
  if (actual != static_cast<Actual>(expected)) {
    throw std::runtime_error("wrong: " + what + " is " + std::to_string(actual) + ", expected " +
                             std::to_string(expected));
  }
}
// The body must throw, and the text must hold every one of `parts`.
inline void refuses(const std::function<void()>& body, const std::vector<std::string>& parts) {
  std::string text;
  try {
    body();
  } catch (const std::exception& error) {
    text = error.what();
  }
  if (text.empty()) throw std::runtime_error("wrong: nothing was thrown; expected " + parts.front());
  for (const std::string& part : parts) {
    if (text.find(part) == std::string::npos)
      throw std::runtime_error("wrong: \"" + text + "\" lacks \"" + part + "\"");
  }
}
// Over several schedules; true where any of them threw or returned false.
inline bool noticed_in_some_schedule(const std::function<bool()>& body, uint64_t schedules = 8) {
  for (uint64_t seed = 1; seed <= schedules; ++seed) {
    splitkern_host_set_schedule(seed);
    try {
      if (!body()) return true;
    } catch (const std::exception&) {
      return true;
    }
  }
  return false;
}
inline void in_every_schedule(const std::function<void()>& body, uint64_t schedules = 8) {
  for (uint64_t seed = 1; seed <= schedules; ++seed) {
    splitkern_host_set_schedule(seed);
    body();
  }
}

}  // namespace check

#define CHECK_NAMED(identifier, name)                                    \
  static void identifier();                                              \
  static const check::Register register_##identifier(name, &identifier); \
  static void identifier()
