// The violations found so far and how their texts name the parts of a plan. Internal to the validator.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "memory/validator.h"

namespace splitkern::memory::validation {

class Findings {
 public:
  Findings(const Graph& graph, const Plan& plan, int64_t most) : graph_(graph), plan_(plan), most_(most) {}

  bool full() const { return static_cast<int64_t>(found_.size()) >= most_; }
  bool any() const { return !found_.empty(); }
  template <class... Parts>
  void add(Reason reason, const Parts&... parts) {
    if (full()) return;
    std::ostringstream text;
    (text << ... << parts);
    found_.push_back({reason, text.str()});
  }
  std::vector<Violation> take() { return std::move(found_); }

  // Texts; the indices must be in range, but for those of the storages, copies and residencies that they refer to.
  std::string operation(int64_t index) const;
  std::string instance(int64_t index) const;
  std::string graph_storage(int64_t index) const;
  std::string storage(int64_t index) const;
  std::string tensor(int64_t index) const;
  std::string residency(int64_t index) const;
  std::string copy(int64_t index) const;

 private:
  const Graph& graph_;
  const Plan& plan_;
  int64_t most_;
  std::vector<Violation> found_;
};

}  // namespace splitkern::memory::validation
