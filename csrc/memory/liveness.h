// What the decisions of a plan rest on: which operations run, which planned storages they touch, what is saved across
// the turn from forward to backward, and what can be computed again. Made once per plan() from a valid graph; read by
// the scheduler and the strategies. Positions of operations that run are called steps: a fused sum has none.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "memory/graph.h"
#include "memory/limits.h"
#include "memory/storage_assignment.h"

namespace splitkern::memory {

// All that one step does with one planned storage.
struct Access {
  int32_t storage = 0;
  bool reads = false;
  bool writes = false;
};

// Lists of one element type per index, in one allocation.
template <class Element>
struct Rows {
  std::vector<int32_t> begins{0};
  std::vector<Element> elements;

  int32_t size() const { return static_cast<int32_t>(begins.size()) - 1; }
  std::span<const Element> operator[](int32_t row) const {
    return std::span(elements).subspan(begins[row], begins[row + 1] - begins[row]);
  }
  void close_row() { begins.push_back(static_cast<int32_t>(elements.size())); }
};

struct Liveness {
  StorageAssignment assignment;

  // Per step.
  std::vector<int32_t> operations;  // of the graph, ascending
  std::vector<char> accumulates;    // producer of a fused sum
  std::vector<double> duration_us;
  std::vector<int64_t> workspace_bytes;  // aligned
  Rows<Access> accesses;                 // each storage once, in order of first mention
  // Forward steps that may run again in a backward pass: they draw no random numbers, update nothing, and all that they
  // read is there at the turn or can be computed again.
  std::vector<char> repeatable;

  // The first backward step; without any, the step at which most bytes are live. What is saved is live across it.
  int32_t turn = 0;

  // Per planned storage.
  std::vector<int64_t> bytes;  // aligned
  // How it is copied: compressed where that was measured to pay.
  std::vector<std::optional<Compression>> compression;
  std::vector<double> link_bytes;
  std::vector<int64_t> host_bytes;  // aligned: of its slot in the host pool
  std::vector<char> resident;       // parameters pool: never moved
  std::vector<char> output;
  std::vector<int32_t> first_access;  // steps; -1: never accessed
  std::vector<int32_t> last_access;
  std::vector<int32_t> last_forward;  // last access before the turn; -1: none
  std::vector<int32_t> last_forward_write;
  std::vector<int32_t> first_backward;  // first access at or after the turn; -1: none
  std::vector<char> saved;              // a movable activation accessed on both sides of the turn
  std::vector<char> recomputable;       // by its writers before the turn
  std::vector<double> recompute_us;     // of these writers, and of what they need that nothing saves
  Rows<int32_t> writers;                // steps before the turn

  int64_t resident_bytes = 0;  // sum over the parameters pool

  int32_t steps() const { return static_cast<int32_t>(operations.size()); }
  int32_t storages() const { return static_cast<int32_t>(bytes.size()); }
};

// `compress`: whether copies may be compressed at all. Throws InvalidArgument where sizes rounded up to the alignment
// pass 2^63 - 1 in sum.
Liveness analyse(const Graph& graph, StorageAssignment assignment, const Limits& limits, bool compress = true);

}  // namespace splitkern::memory
