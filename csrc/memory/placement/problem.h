// A placement instance in the form that the heuristics and the search work on: time reduced to sections, sizes rounded
// up, empty buffers dropped, independent parts apart. Made once by place() from checked input.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "memory/placement.h"

namespace splitkern::memory::placement {

// A section is a maximal set of buffers that are live together. Only those matter: two lifetimes meet exactly if the
// buffers share a section, each buffer covers a run of consecutive sections, and there are no more sections than
// buffers.
struct Problem {
  std::vector<int32_t> first;  // of each buffer: first and last section that it covers
  std::vector<int32_t> last;
  std::vector<int64_t> size;      // in units of the alignment, positive
  std::vector<int32_t> original;  // position among the caller's buffers
  std::vector<int64_t> live;      // of each section: sum of the sizes
  int64_t lower_bound = 0;        // max of live

  int32_t buffers() const { return static_cast<int32_t>(size.size()); }
  int32_t sections() const { return static_cast<int32_t>(live.size()); }
};

// Buffers are sorted by first section, then by last section descending, size descending, position.
Problem make_problem(std::span<const Buffer> buffers, int64_t alignment_bytes);

// The parts between sections that no buffer spans, as [begin, end) ranges of buffers: each is a problem of its own, and
// all may use the same addresses.
std::vector<std::pair<int32_t, int32_t>> independent_parts(const Problem& problem);

// Buffers [begin, end) of a problem as a problem of their own.
Problem part_of(const Problem& problem, int32_t begin, int32_t end);

// The order of `keys`, ascending or descending; equal keys in order of position. Keys are not negative. Linear time.
std::vector<int32_t> sorted_positions(std::span<const int64_t> keys, bool descending);

int64_t peak_of(const Problem& problem, std::span<const int64_t> offsets);

}  // namespace splitkern::memory::placement
