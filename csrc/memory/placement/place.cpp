// place(): sorted heuristics first, then branch and bound on the parts that they leave above the lower bound, first for
// the bound itself, then for whatever is better than the best so far.
#include "memory/placement.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
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

// The statistics of a training step are many and hold next to nothing, but stand in the way of every search among the
// activations. So the smallest buffers, as many as never hold more than a share of the bound together, come last, into
// the holes that the others leave.
void search_large(Part& part, int64_t target, int64_t effort, const Clock& clock) {
  constexpr int64_t kShareOfSmall = 256;
  const Problem& problem = part.problem;
  const int32_t n = problem.buffers();
  std::vector<int32_t> order = sorted_positions(problem.size, /*descending=*/true);
  const auto live_peak = [&](size_t from) {  // of order[from, n)
    std::vector<int64_t> change(problem.sections() + 1, 0);
    for (const int32_t i : std::span(order).subspan(from)) {
      change[problem.first[i]] += problem.size[i];
      change[problem.last[i] + 1] -= problem.size[i];
    }
    int64_t live = 0, peak = 0;
    for (const int64_t bytes : change) peak = std::max(peak, live += bytes);
    return peak;
  };
  size_t low = 0, high = order.size();  // the small ones begin in here
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (live_peak(middle) > problem.lower_bound / kShareOfSmall) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  // All of a size belong together.
  while (low < order.size() && low > 0 && problem.size[order[low]] == problem.size[order[low - 1]]) ++low;
  if (low == 0 || (order.size() - low) * 4 < order.size()) return;

  std::vector<Buffer> large(low);
  for (size_t k = 0; k < low; ++k) {
    const int32_t i = order[k];
    large[k] = {problem.first[i], problem.last[i] + 1, problem.size[i]};
  }
  Part rest{make_problem(large, 1), {}, kUnlimited};
  const int64_t wanted = rest.problem.lower_bound;
  apply_sweeps(rest, wanted, clock);
  if (rest.peak > wanted) search_part(rest, wanted, effort, clock);
  if (rest.peak > std::max(target, part.peak)) return;
  std::vector<int64_t> offsets(n, 0);
  for (int32_t k = 0; k < rest.problem.buffers(); ++k) offsets[order[rest.problem.original[k]]] = rest.offsets[k];
  std::vector<int64_t> tightest(n, 0);
  for (const int32_t i : std::span(order).subspan(low)) {
    tightest[i] =
        *std::max_element(problem.live.begin() + problem.first[i], problem.live.begin() + problem.last[i] + 1);
  }
  const auto length = [&](int32_t i) { return problem.last[i] - problem.first[i]; };
  using Less = std::function<bool(int32_t, int32_t)>;
  const Less orders[] = {
      // The long ones, the large ones, or those at the tightest time first.
      [&](int32_t x, int32_t y) {
        return std::pair(length(x), problem.size[x]) > std::pair(length(y), problem.size[y]);
      },
      [&](int32_t x, int32_t y) {
        return std::pair(problem.size[x], length(x)) > std::pair(problem.size[y], length(y));
      },
      [&](int32_t x, int32_t y) { return std::pair(tightest[x], length(x)) > std::pair(tightest[y], length(y)); },
  };
  for (const Less& less : orders) {
    std::stable_sort(order.begin() + low, order.end(), less);
    if (auto filled = first_fit_in_order(problem, order, kFirstFitWork, low, offsets)) part.offer(std::move(*filled));
    if (part.peak <= target) break;
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
      search_part(part, wanted, options.effort / 4, clock);
      if (part.peak > wanted) search_large(part, wanted, options.effort / 8, clock);
      // What is left above the bound then may be next to nothing, and as dear to find as before.
      const bool is_near = part.peak - wanted <= wanted >> 12;
      if (part.peak > wanted && !is_near) search_part(part, wanted, options.effort, clock);
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
