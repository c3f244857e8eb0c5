// Static placement: buffers with known lifetimes get addresses in one arena so that the highest used address is as low
// as can be found (dynamic storage allocation; strongly NP-hard). Called by the planner for each of its pools, and by
// the command line for MiniMalloc's CSV files. Knows nothing of graphs. Stages in placement/: problem.h, heuristics.h,
// search.h.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "memory/limits.h"

namespace splitkern::memory {

// Occupies size_bytes at one address from `begin` (inclusive) to `end` (exclusive). Times are any integers, begin <
// end. A buffer of no bytes is allowed and gets offset 0.
struct Buffer {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size_bytes = 0;

  bool operator==(const Buffer&) const = default;
};

// The work spent where the simple heuristics do not reach the lower bound, for each part that is independent in time:
// nodes of branch and bound, about a microsecond of one core each. The same effort gives the same placement everywhere.
// kNoSearch: heuristics alone, as for parts of more than 16,384 buffers.
inline constexpr int64_t kNoSearch = 0;
inline constexpr int64_t kDefaultEffort = 1'000'000;

struct PlacementOptions {
  int64_t alignment_bytes = 1;          // of every offset and size; any positive number
  int64_t capacity_bytes = kUnlimited;  // stop as soon as the peak is at most this; by itself no reason to fail
  int64_t effort = kDefaultEffort;
  double time_limit_s = 0;  // 0: none, and the result depends on nothing but the arguments. Else the best at that time
};

struct Placement {
  std::vector<int64_t> offsets;  // one a buffer, in the order of the buffers
  int64_t peak_bytes = 0;        // highest end of a buffer; sizes rounded up to the alignment
  int64_t lower_bound_bytes = 0;
};

// Buffers whose lifetimes meet do not overlap in the result. Never worse than first-fit in order of begin, nor, up to
// two million pairs of buffers that meet and unless the time is over, than first-fit in order of size. Pure; safe to
// call from several threads. Throws InvalidArgument for begin >= end, a negative size, an option out of range, or sizes
// whose sum (each rounded up to the alignment) passes 2^63 - 1.
Placement place(std::span<const Buffer> buffers, const PlacementOptions& options = {});

// The largest sum of sizes, each rounded up to the alignment, that are live at one time: no placement is lower. Throws
// as place() does.
int64_t lower_bound_bytes(std::span<const Buffer> buffers, int64_t alignment_bytes = 1);

}  // namespace splitkern::memory
