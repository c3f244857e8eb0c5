// What the memory library throws. Every text says what came, where, and what is allowed. Nothing was changed when one
// of these is thrown, unless the function's comment says otherwise.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace splitkern::memory {

// A graph, plan, limit or argument that breaks a rule of its type.
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// Text (JSON, CSV) that cannot be read; line and column count from 1.
class ParseError : public std::runtime_error {
 public:
  ParseError(const std::string& text, int64_t line, int64_t column)
      : std::runtime_error(text + " at line " + std::to_string(line) + ", column " + std::to_string(column)),
        line(line),
        column(column) {}
  int64_t line;
  int64_t column;
};

// No plan fits the budget. `pool` is "device" or "host"; all in bytes.
class Infeasible : public std::runtime_error {
 public:
  Infeasible(const std::string& text, std::string pool, int64_t budget_bytes, int64_t smallest_feasible_bytes)
      : std::runtime_error(text),
        pool(std::move(pool)),
        budget_bytes(budget_bytes),
        smallest_feasible_bytes(smallest_feasible_bytes) {}
  std::string pool;
  int64_t budget_bytes;
  int64_t smallest_feasible_bytes;
};

}  // namespace splitkern::memory
