// Placements by one pass: the baselines that place() never falls behind, and the filling of niches that scales to
// millions of buffers. All work on a Problem, are pure and deterministic, and return an offset for every buffer.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "memory/placement/problem.h"

namespace splitkern::memory::placement {

// Time goes on; every buffer takes the lowest gap that is large enough when it begins. Gaps are indexed by address in
// blocks: O(n · sqrt(gaps)) in the worst case, near O(n) in practice.
std::vector<int64_t> first_fit_by_begin(const Problem& problem);

// In the given order, every buffer at the lowest address at which it meets no earlier one. In proportion to the pairs
// that meet; gives up (nothing) after `work_limit` of them. The first `fixed` of the order stay where `offsets` has
// them.
std::optional<std::vector<int64_t>> first_fit_in_order(const Problem& problem, std::span<const int32_t> order,
                                                       int64_t work_limit, size_t fixed = 0,
                                                       std::vector<int64_t> offsets = {});

// In the given order, every buffer on top of what lies there already, holes below stay empty. From the offsets of
// another placement, ascending, this lets everything fall. O(n log n).
std::vector<int64_t> drop_in_order(const Problem& problem, std::span<const int32_t> order);

enum class Fill : uint8_t {
  kFromLeft,   // the earliest buffer that fits, of several the longest
  kFromRight,  // the same with time reversed
};

// Niche by niche of the skyline (see search.h): a buffer that fits is laid on the floor, until none does; then the
// floor is raised to the lower wall. Never goes back. Without keys the buffer that `fill` says; with one key a section,
// the longest of those that cover the section of the niche with the largest key, if there is one. O(n log n).
std::vector<int64_t> fill_niches(const Problem& problem, Fill fill, std::span<const double> keys = {});

}  // namespace splitkern::memory::placement
