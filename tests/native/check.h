// A list of named checks with one main for all (main.cpp): a check throws where something is wrong.
#pragma once

#include <cstdint>
#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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

}  // namespace check

#define CHECK_NAMED(identifier, name)                                    \
  static void identifier();                                              \
  static const check::Register register_##identifier(name, &identifier); \
  static void identifier()
