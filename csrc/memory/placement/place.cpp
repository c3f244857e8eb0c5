// place(): sorted heuristics first, then branch and bound on the parts that they leave above the lower bound, first for
// the bound itself, then for whatever is better than the best so far.
#include "memory/placement.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>

#include "memory/errors.h"
#include "memory/placement/heuristics.h"
#include "memory/placement/problem.h"
#include "memory/placement/search.h"

namespace splitkern::memory {
namespace {

using namespace placement;

// Above, even one descent of the search takes longer than all heuristics together.
constexpr int32_t kSearchBuffers = 16384;
// Above, of the heuristics only the two fastest.
constexpr int32_t kManyBuffers = 400'000;
// Pairs of buffers that first-fit by size may look at: some 2,000 buffers that all meet.
constexpr int64_t kFirstFitWork = 2'000'000;

class Clock {
 public:
  explicit Clock(double limit_s) : limit_s_(limit_s), begin_(std::chrono::steady_clock::now()) {}
  bool over() const {
    return limit_s_ > 0 && std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count() >= limit_s_;
  }

 private:
  double limit_s_;
  std::chrono::steady_clock::time_point begin_;
};

// One part and the best placement of it so far.
struct Part {
  Problem problem;
  std::vector<int64_t> offsets;
  int64_t peak = kUnlimited;

  void offer(std::vector<int64_t> candidate) {
    const int64_t candidate_peak = peak_of(problem, candidate);
    if (!offsets.empty() && candidate_peak >= peak) return;
    peak = candidate_peak;
    offsets = std::move(candidate);
  }
};

// What costs no more than sorting.
void apply_sweeps(Part& part, int64_t target, const Clock& clock) {
  const Problem& problem = part.problem;
  const auto enough = [&] { return part.peak <= target || clock.over(); };
  part.offer(first_fit_by_begin(problem));
  if (enough()) return;
  part.offer(fill_niches(problem, Fill::kFromRight));
  if (enough()) return;
  part.offer(fill_niches(problem, Fill::kFromLeft));
  if (enough() || problem.buffers() > kManyBuffers) return;
  const std::vector<double> keys(problem.live.begin(), problem.live.end());
  part.offer(fill_niches(problem, Fill::kFromRight, keys));
  if (enough()) return;
  part.offer(fill_niches(problem, Fill::kFromLeft, keys));
}

// The only one that fills holes under what lies there already, and costs the more for it.
void apply_first_fit_by_size(Part& part, int64_t target, const Clock& clock) {
  if (part.peak <= target || clock.over()) return;
  const auto order = sorted_positions(part.problem.size, /*descending=*/true);
  if (auto offsets = first_fit_in_order(part.problem, order, kFirstFitWork)) part.offer(std::move(*offsets));
}

// Spends up to `effort` nodes to bring the peak to `target`.
void search_part(Part& part, int64_t target, int64_t effort, const Clock& clock) {
  constexpr Preference kPreferences[] = {Preference::kWidest, Preference::kTightest, Preference::kLargest,
                                         Preference::kArea};
  const Problem& problem = part.problem;
  const auto stop = [&] { return clock.over(); };
  // One for the target, one for capacities above it: what fails at one capacity would mislead at another.
  Search at_target(problem, stop), above(problem, stop);
  const auto left = [&] { return effort - at_target.nodes() - above.nodes(); };
  const auto spent = [&] { return left() <= 0 || clock.over(); };
  const auto attempt = [&](Search& search, int64_t capacity, uint64_t round, int64_t node_limit) {
    const Focus focus = round % 2 == 0 ? Focus::kNear : Focus::kAll;
    for (const Preference preference : kPreferences) {
      if (spent()) break;
      const Outcome outcome = search.run(capacity, preference, round, std::min(node_limit, left()), focus);
      if (outcome == Outcome::kFound) {
        part.offer(std::vector<int64_t>(search.offsets().begin(), search.offsets().end()));
      }
      if (outcome != Outcome::kLimit) return outcome;
    }
    return Outcome::kLimit;
  };
  int64_t node_limit = 2 * static_cast<int64_t>(problem.buffers()) * (1 + problem.sections() / 1024);
  for (uint64_t round = 0; part.peak > target && !spent(); ++round, node_limit *= 2) {
    if (attempt(at_target, target, round, node_limit) == Outcome::kRefuted) ++target;
    if (round == 0) continue;  // both ways of focus first
    // Where the target resists: halve what is between it and the best, for as many nodes.
    const int64_t end = 2 * at_target.nodes();
    for (int64_t low = target; part.peak > low + 1 && at_target.nodes() + above.nodes() < end && !spent();) {
      const int64_t capacity = low + (part.peak - low) / 2;
      above.forget_failures();
      const Outcome outcome = attempt(above, capacity, round, node_limit);
      if (outcome == Outcome::kRefuted) target = std::max(target, capacity + 1);
      if (outcome != Outcome::kFound) low = capacity;
    }
  }
}

}  // namespace

Placement place(std::span<const Buffer> buffers, const PlacementOptions& options) {
  if (options.capacity_bytes < 0) {
    throw InvalidArgument("place: capacity_bytes must not be negative, got " + std::to_string(options.capacity_bytes));
  }
  if (options.effort < 0) {
    throw InvalidArgument("place: effort must not be negative, got " + std::to_string(options.effort));
  }
  if (!(options.time_limit_s >= 0) || !std::isfinite(options.time_limit_s)) {
    throw InvalidArgument("place: time_limit_s must be finite and not negative, got " +
                          std::to_string(options.time_limit_s));
  }
  const Clock clock(options.time_limit_s);
  const Problem problem = make_problem(buffers, options.alignment_bytes);
  // A part may rise to where another has to, or to the capacity if that is given.
  int64_t target = problem.lower_bound;
  if (options.capacity_bytes != kUnlimited) target = std::max(target, options.capacity_bytes / options.alignment_bytes);

  const auto ranges = independent_parts(problem);
  std::vector<Part> parts;
  parts.reserve(ranges.size());
  for (const auto& [begin, end] : ranges) {
    parts.push_back({part_of(problem, begin, end), {}, kUnlimited});
    apply_sweeps(parts.back(), target, clock);
  }
  // The highest parts first: what they cannot go below, the others need not either.
  std::vector<size_t> high;
  for (size_t p = 0; p < parts.size(); ++p) {
    if (parts[p].peak > target) high.push_back(p);
  }
  std::stable_sort(high.begin(), high.end(), [&](size_t a, size_t b) { return parts[a].peak > parts[b].peak; });
  int64_t reached = target;
  for (const size_t p : high) {
    Part& part = parts[p];
    const int64_t wanted = std::max(reached, part.problem.lower_bound);
    if (options.effort > 0 && part.problem.buffers() <= kSearchBuffers && part.peak > wanted) {
      search_part(part, wanted, options.effort, clock);
    }
    apply_first_fit_by_size(part, wanted, clock);
    reached = std::max(reached, part.peak);
  }

  Placement placement;
  placement.offsets.assign(buffers.size(), 0);
  placement.lower_bound_bytes = problem.lower_bound * options.alignment_bytes;
  for (const Part& part : parts) {
    for (int32_t i = 0; i < part.problem.buffers(); ++i) {
      placement.offsets[problem.original[part.problem.original[i]]] = part.offsets[i] * options.alignment_bytes;
    }
    placement.peak_bytes = std::max(placement.peak_bytes, part.peak * options.alignment_bytes);
  }
  return placement;
}

int64_t lower_bound_bytes(std::span<const Buffer> buffers, int64_t alignment_bytes) {
  return make_problem(buffers, alignment_bytes).lower_bound * alignment_bytes;
}

}  // namespace splitkern::memory
