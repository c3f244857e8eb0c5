// Checks of place(): right by an independent sweep, optimal against brute force, the lower bound reached where that is
// known to be possible, what is refused. Nothing here depends on time.
#include "memory/placement.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "memory/generators.h"
#include "memory/placement/heuristics.h"
#include "memory/placement/random.h"
#include "memory/placement/search.h"
#include "placement_checker.h"

using namespace splitkern::memory;
using placement::Random;

namespace {

constexpr int64_t kMin = std::numeric_limits<int64_t>::min();
constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

std::vector<Buffer> random_buffers(Random& random, int64_t count, int64_t times, int64_t sizes) {
  std::vector<Buffer> buffers;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = random.below(times);
    buffers.push_back({begin, random.between(begin + 1, times), random.between(1, sizes)});
  }
  return buffers;
}

bool meet(const Buffer& a, const Buffer& b) {
  return a.begin < b.end && b.begin < a.end;
}

// In some order every buffer lies at the lowest address that is free of the earlier ones: the best of all orders.
int64_t optimum(const std::vector<Buffer>& buffers) {
  std::vector<size_t> order(buffers.size());
  std::iota(order.begin(), order.end(), 0);
  int64_t best = kMax;
  do {
    std::vector<int64_t> offsets(buffers.size());
    int64_t peak = 0;
    for (size_t k = 0; k < order.size(); ++k) {
      const size_t i = order[k];
      int64_t offset = 0;
      for (bool moved = true; moved;) {
        moved = false;
        for (size_t l = 0; l < k; ++l) {
          const size_t j = order[l];
          if (meet(buffers[i], buffers[j]) && offset < offsets[j] + buffers[j].size_bytes &&
              offsets[j] < offset + buffers[i].size_bytes) {
            offset = offsets[j] + buffers[j].size_bytes;
            moved = true;
          }
        }
      }
      offsets[i] = offset;
      peak = std::max(peak, offset + buffers[i].size_bytes);
    }
    best = std::min(best, peak);
  } while (std::next_permutation(order.begin(), order.end()));
  return best;
}

// Fifteen buffers, at most 8 bytes live, that no placement within 8 holds. Such instances are rare.
const std::vector<Buffer> kAboveBound = {{0, 1, 5}, {3, 4, 2}, {1, 2, 5},  {6, 12, 2}, {2, 3, 3},
                                         {0, 6, 1}, {4, 6, 3}, {0, 7, 1},  {8, 9, 5},  {9, 12, 4},
                                         {0, 7, 1}, {7, 8, 5}, {9, 12, 2}, {2, 7, 1},  {2, 8, 1}};

// Whether some integer offsets hold all buffers below `capacity`: all are tried, one buffer after the other.
bool fits(const std::vector<Buffer>& buffers, int64_t capacity, std::vector<int64_t>& offsets) {
  const size_t k = offsets.size();
  if (k == buffers.size()) return true;
  for (int64_t offset = 0; offset + buffers[k].size_bytes <= capacity; ++offset) {
    bool free = true;
    for (size_t j = 0; j < k && free; ++j) {
      free = !meet(buffers[j], buffers[k]) || offset >= offsets[j] + buffers[j].size_bytes ||
             offsets[j] >= offset + buffers[k].size_bytes;
    }
    if (!free) continue;
    offsets.push_back(offset);
    const bool found = fits(buffers, capacity, offsets);
    offsets.pop_back();
    if (found) return true;
  }
  return false;
}

Placement checked(const std::vector<Buffer>& buffers, const PlacementOptions& options = {}) {
  Placement result = place(buffers, options);
  check::placed(buffers, result, options.alignment_bytes);
  return result;
}

void reaches_bound(const std::vector<Buffer>& buffers, const PlacementOptions& options, const std::string& what) {
  const Placement result = checked(buffers, options);
  check::equal(result.peak_bytes, result.lower_bound_bytes, "the peak of " + what);
}

}  // namespace

CHECK_NAMED(placement_edges, "placement: no buffers, empty buffers, one buffer, equal buffers, times at both ends") {
  check::equal(checked({}).peak_bytes, 0, "the peak of nothing");
  check::equal(checked({{0, 1, 0}, {0, 1, 0}}).peak_bytes, 0, "the peak of empty buffers");
  check::equal(checked({{kMin, kMax, kMax}}).peak_bytes, kMax, "the peak of one giant");
  check::equal(
      checked({{kMin, kMax, 512}, {kMin, kMin + 1, 512}, {kMax - 1, kMax, 512}}, {.alignment_bytes = 512}).peak_bytes,
      1024, "the peak of times at both ends");
  check::equal(checked(std::vector<Buffer>(50, {3, 9, 7})).peak_bytes, 350, "the peak of equal buffers");
  check::equal(checked({{0, 5, 3}, {5, 9, 3}, {9, 10, 3}}).peak_bytes, 3, "the peak of buffers that only touch");
  // Rounded up before they are summed; the alignment need not be a power of two.
  check::equal(checked({{0, 2, 1}, {1, 3, 13}}, {.alignment_bytes = 12}).peak_bytes, 36, "the peak of rounded sizes");
  check::equal(checked({{0, 2, 100}}, {.alignment_bytes = kMax}).peak_bytes, kMax, "the peak at the largest alignment");
}

CHECK_NAMED(placement_refusals, "placement: what is refused") {
  const auto refuse = [](std::vector<Buffer> buffers, PlacementOptions options, std::vector<std::string> parts) {
    check::refuses([&] { place(buffers, options); }, parts);
  };
  refuse({{0, 1, 1}, {4, 4, 1}}, {}, {"buffer 1", "begin must be below end", "[4, 4)"});
  refuse({{5, 4, 0}}, {}, {"buffer 0", "[5, 4)"});
  refuse({{0, 1, -3}}, {}, {"buffer 0", "size_bytes must not be negative", "-3"});
  refuse({{0, 1, kMax}, {7, 8, 1}}, {}, {"buffer 1", "sum of all sizes", "2^63 - 1"});
  refuse({{0, 1, kMax}}, {.alignment_bytes = 2}, {"buffer 0", "alignment_bytes 2", std::to_string(kMax)});
  refuse({{0, 1, 1}, {0, 1, 1}}, {.alignment_bytes = kMax}, {"buffer 1", "sum of all sizes"});
  refuse({}, {.alignment_bytes = 0}, {"alignment_bytes must be positive", "0"});
  refuse({}, {.capacity_bytes = -1}, {"capacity_bytes", "-1"});
  refuse({}, {.effort = -1}, {"effort", "-1"});
  refuse({}, {.time_limit_s = -1}, {"time_limit_s", "-1"});
  refuse({}, {.time_limit_s = std::numeric_limits<double>::quiet_NaN()}, {"time_limit_s", "nan"});
  check::refuses([] { lower_bound_bytes(std::vector<Buffer>{{1, 0, 1}}); }, {"buffer 0", "[1, 0)"});
}

CHECK_NAMED(placement_optimal, "placement: optimal against all orders, up to seven buffers") {
  Random random(11);
  for (int k = 0; k < 300; ++k) {
    const auto buffers = random_buffers(random, random.between(1, 6) + (k % 30 == 0), 7, k % 2 == 0 ? 4 : 30);
    check::equal(checked(buffers).peak_bytes, optimum(buffers), "the peak of instance " + std::to_string(k));
  }
}

CHECK_NAMED(placement_above_bound, "placement: optimal where the lower bound cannot be reached") {
  std::vector<int64_t> offsets;
  check::require(!fits(kAboveBound, 8, offsets) && fits(kAboveBound, 9, offsets), "the instance must need 9 bytes");
  Random random(4);
  for (int64_t scale = 1; scale <= 5; ++scale) {
    auto buffers = kAboveBound;
    for (auto& buffer : buffers) {
      buffer = {buffer.begin * 10 - scale, buffer.end * 10 - scale, buffer.size_bytes * scale};
    }
    for (auto& buffer : buffers) std::swap(buffer, buffers[random.below(static_cast<int64_t>(buffers.size()))]);
    const Placement result = checked(buffers);
    check::equal(result.lower_bound_bytes, 8 * scale, "the lower bound");
    check::equal(result.peak_bytes, 9 * scale, "the peak");
  }
  // A part that has to be higher makes room in the others; the result is still the least of the whole.
  auto two = kAboveBound;
  for (const Buffer& buffer : kAboveBound) two.push_back({buffer.begin + 100, buffer.end + 100, buffer.size_bytes});
  check::equal(checked(two).peak_bytes, 9, "the peak of two parts");
}

CHECK_NAMED(placement_random, "placement: right on random instances of every shape, also in another order") {
  Random random(5);
  for (int k = 0; k < 120; ++k) {
    const int64_t count = random.between(1, 160);
    auto buffers = random_buffers(random, count, random.between(1, 1 + 2 * count), random.between(1, 5000));
    for (auto& buffer : buffers) {
      if (random.below(20) == 0) buffer.size_bytes = 0;
    }
    const PlacementOptions options{.alignment_bytes = random.below(2) == 0 ? 1 : 256, .effort = 2000};
    const Placement result = checked(buffers, options);
    check::require(place(buffers, options).offsets == result.offsets, "the same twice");
    for (auto i = static_cast<int64_t>(buffers.size()) - 1; i > 0; --i) {
      std::swap(buffers[i], buffers[random.below(i + 1)]);
    }
    checked(buffers, options);
  }
}

CHECK_NAMED(placement_perfect, "placement: packings without a gap are found again") {
  for (const int32_t pinwheels : {0, 50}) {
    for (const int64_t count : {1, 10, 60, 200, 500}) {
      for (uint64_t seed = 1; seed <= 3; ++seed) {
        const auto buffers = perfect_packing({.buffers = count, .pinwheel_percent = pinwheels, .seed = seed});
        check::equal(buffers.size(), static_cast<size_t>(count), "the number of pieces");
        check::equal(check::live_peak(buffers, 1), 1048576, "the height of the packing");
        reaches_bound(buffers, {}, std::to_string(count) + " pieces, seed " + std::to_string(seed));
      }
    }
  }
}

CHECK_NAMED(placement_training, "placement: training steps reach the lower bound") {
  for (const Network network : {Network::kVgg19, Network::kResNet18, Network::kResNet50}) {
    for (const int32_t grid : {1, 2, 4}) {
      for (const bool offload : {false, true}) {
        const auto buffers = training_trace({.network = network, .grid = grid, .offload = offload});
        reaches_bound(buffers, {.alignment_bytes = 512},
                      "network " + std::to_string(static_cast<int>(network)) + ", grid " + std::to_string(grid) +
                          (offload ? ", offload" : ""));
      }
    }
  }
}

CHECK_NAMED(placement_baselines, "placement: never above first-fit by begin and first-fit by size") {
  Random random(23);
  for (int k = 0; k < 40; ++k) {
    const auto buffers = random_buffers(random, random.between(20, 300), random.between(5, 400), 1000);
    const int64_t peak = checked(buffers, {.effort = kNoSearch}).peak_bytes;
    const placement::Problem problem = placement::make_problem(buffers, 1);
    const auto by_size = placement::sorted_positions(problem.size, true);
    for (const auto& offsets :
         {placement::first_fit_by_begin(problem), *placement::first_fit_in_order(problem, by_size, kMax)}) {
      check::require(peak <= placement::peak_of(problem, offsets), "above a baseline at instance " + std::to_string(k));
    }
  }
}

CHECK_NAMED(placement_each_heuristic, "placement: every heuristic by itself is right") {
  Random random(31);
  for (int k = 0; k < 60; ++k) {
    const int64_t count = k < 50 ? random.between(1, 80) : 3000;
    const auto buffers = k % 2 == 0 ? random_buffers(random, count, random.between(1, 2 * count), 100)
                                    : perfect_packing({.buffers = count, .seed = static_cast<uint64_t>(k)});
    const placement::Problem problem = placement::make_problem(buffers, 1);
    const auto order = placement::sorted_positions(problem.size, true);
    const std::vector<double> keys(problem.live.begin(), problem.live.end());
    for (const auto& offsets : {placement::first_fit_by_begin(problem), placement::drop_in_order(problem, order),
                                placement::fill_niches(problem, placement::Fill::kFromLeft),
                                placement::fill_niches(problem, placement::Fill::kFromRight),
                                placement::fill_niches(problem, placement::Fill::kFromLeft, keys),
                                placement::fill_niches(problem, placement::Fill::kFromRight, keys)}) {
      Placement result{std::vector<int64_t>(buffers.size()), placement::peak_of(problem, offsets), problem.lower_bound};
      for (int32_t i = 0; i < problem.buffers(); ++i) result.offsets[problem.original[i]] = offsets[i];
      check::placed(buffers, result);
    }
  }
  const placement::Problem problem = placement::make_problem(std::vector<Buffer>(10, {0, 1, 1}), 1);
  const auto order = placement::sorted_positions(problem.size, true);
  check::require(placement::first_fit_in_order(problem, order, 45).has_value(), "45 pairs are within 45");
  check::require(!placement::first_fit_in_order(problem, order, 44).has_value(), "45 pairs are not within 44");
}

CHECK_NAMED(placement_search, "placement: the search finds, refutes and keeps its limit") {
  const auto never = [] { return false; };
  const placement::Problem hard = placement::make_problem(kAboveBound, 1);
  Random random(3);
  for (const placement::Focus focus : {placement::Focus::kAll, placement::Focus::kNear}) {
    for (const placement::Preference preference : {placement::Preference::kWidest, placement::Preference::kTightest,
                                                   placement::Preference::kLargest, placement::Preference::kArea}) {
      placement::Search search(hard, never);
      for (uint64_t seed = 0; seed < 3; ++seed) {
        check::require(search.run(7, preference, seed, 1 << 20, focus) == placement::Outcome::kRefuted, "7 bytes");
        check::require(search.run(8, preference, seed, 1 << 20, focus) == placement::Outcome::kRefuted, "8 bytes");
        check::require(search.run(9, preference, seed, 1 << 20, focus) == placement::Outcome::kFound, "9 bytes");
        check::equal(placement::peak_of(hard, search.offsets()), 9, "the peak of what was found");
      }
    }
  }
  for (int k = 0; k < 60; ++k) {
    const auto buffers = random_buffers(random, random.between(2, 6), 6, 9);
    const int64_t best = optimum(buffers);
    const placement::Problem problem = placement::make_problem(buffers, 1);
    placement::Search search(problem, never);  // parts apart and not: it splits them itself
    check::require(search.run(best, placement::Preference::kArea, k, 1 << 20) == placement::Outcome::kFound,
                   "the optimum must be found");
    check::require(placement::peak_of(problem, search.offsets()) <= best, "what was found is above the capacity");
    check::require(search.run(best - 1, placement::Preference::kArea, k, 1 << 20) == placement::Outcome::kRefuted,
                   "below the optimum there is nothing");
  }
  const auto buffers = perfect_packing({.buffers = 200});
  const placement::Problem problem = placement::make_problem(buffers, 1);
  placement::Search search(problem, [] { return false; });
  check::require(search.run(1048576, placement::Preference::kWidest, 0, 50) == placement::Outcome::kLimit, "the limit");
  check::require(search.nodes() <= 51, "nodes beyond the limit");
  placement::Search stopped(problem, [] { return true; });
  check::require(stopped.run(1048576, placement::Preference::kWidest, 0, 1 << 20) != placement::Outcome::kRefuted,
                 "a stop refutes nothing");
}

CHECK_NAMED(placement_options, "placement: capacity ends the work early, time and effort leave a right placement") {
  const auto buffers = perfect_packing({.buffers = 300});
  const int64_t without = checked(buffers, {.effort = kNoSearch}).peak_bytes;
  check::require(without > 1048576, "the heuristics alone must not solve the instance");
  const Placement roomy = checked(buffers, {.capacity_bytes = without});
  check::require(roomy.peak_bytes <= without, "the capacity holds");
  check::equal(checked(buffers, {.capacity_bytes = 2 * without, .effort = kNoSearch}).lower_bound_bytes, 1048576,
               "the lower bound under a capacity");
  // The first heuristic is enough for a capacity that it meets: nothing more is tried.
  const placement::Problem problem = placement::make_problem(buffers, 1);
  const int64_t first = placement::peak_of(problem, placement::first_fit_by_begin(problem));
  check::equal(checked(buffers, {.capacity_bytes = first}).peak_bytes, first,
               "the peak at a capacity that is met at once");
  checked(buffers, {.time_limit_s = 1e-9});
  Random random(2);
  checked(random_buffers(random, 3000, 4000, 100), {.time_limit_s = 1e-9});
}

CHECK_NAMED(placement_large, "placement: many buffers") {
  const auto trace =
      training_trace({.network = Network::kResNet50, .grid = 4, .repeat = 2, .offload = true, .jitter_percent = 20});
  check::require(trace.size() > 5000, "the trace must be large");
  const Placement result = checked(trace, {.alignment_bytes = 512});
  check::require(result.peak_bytes <= result.lower_bound_bytes / 200 * 201, "more than 0.5 % above the bound");
  Random random(77);
  checked(random_buffers(random, 20000, 20000, 1 << 20), {.effort = kNoSearch});
}
