#include "memory/placement/search.h"

#include <algorithm>
#include <limits>

#include "memory/placement/random.h"

namespace splitkern::memory::placement {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr size_t kTableSize = size_t{1} << 16;

}  // namespace

Search::Search(const Problem& problem, std::function<bool()> stop) : problem_(problem), stop_(std::move(stop)) {
  const int32_t n = problem.buffers(), m = problem.sections();
  starts_.assign(m + 1, 0);
  for (int32_t i = 0; i < n; ++i) ++starts_[problem.first[i] + 1];
  for (int32_t s = 0; s < m; ++s) starts_[s + 1] += starts_[s];
  reach_.assign(m, m);
  for (int32_t i = 0; i < n; ++i) reach_[problem.last[i]] = std::min(reach_[problem.last[i]], problem.first[i]);
  for (int32_t s = m - 2; s >= 0; --s) reach_[s] = std::min(reach_[s], std::min(s, reach_[s + 1]));
  if (m > 0) reach_[m - 1] = std::min(reach_[m - 1], m - 1);
  weight_.assign(m, 0);
  key_.resize(n);
  for (int32_t i = 0; i < n; ++i) key_[i] = mix(0x9e3779b97f4a7c15ull * (i + 1));
  refuted_.assign(kTableSize, 0);
  covers_.resize(m + 1);
  ends_before_.resize(m + 1);
  begins_after_.resize(m + 1);
  offsets_.assign(n, 0);
}

void Search::reset() {
  std::fill(weight_.begin(), weight_.end(), 0);
}

uint64_t Search::floor_hash(int32_t section, int64_t floor) const {
  return mix(static_cast<uint64_t>(floor) * 0xd1342543de82ef95ull + static_cast<uint64_t>(section));
}

uint64_t Search::hash_of(int32_t begin, int32_t end) const {
  uint64_t hash = mix((static_cast<uint64_t>(begin) << 32) + static_cast<uint64_t>(end));
  for (int32_t s = begin; s < end; ++s) {
    hash += floor_hash(s, floor_[s]);
    for (int32_t i = starts_[s]; i < starts_[s + 1]; ++i) hash += placed_[i] ? 0 : key_[i];
  }
  return hash;
}

void Search::remember(uint64_t hash) {
  refuted_[hash & (kTableSize - 1)] = hash;
}
bool Search::refuted(uint64_t hash) const {
  return refuted_[hash & (kTableSize - 1)] == hash;
}

void Search::undo(size_t mark) {
  while (trail_.size() > mark) {
    const Change change = trail_.back();
    trail_.pop_back();
    if (change.buffer < 0) {
      floor_[change.section] = change.floor;
      continue;
    }
    const int32_t i = change.buffer, first = problem_.first[i], last = problem_.last[i];
    placed_[i] = 0;
    for (int32_t s = first; s <= last; ++s) {
      floor_[s] = change.floor;
      remaining_[s] += problem_.size[i];
    }
    for (int32_t s = first; s < last; ++s) ++crossing_[s];
  }
}

bool Search::raise(int32_t section, int64_t floor, uint64_t& hash) {
  if (floor > capacity_ - remaining_[section]) {
    weight_[section] += 1;
    return false;
  }
  trail_.push_back({-1, section, floor_[section]});
  hash += floor_hash(section, floor) - floor_hash(section, floor_[section]);
  floor_[section] = floor;
  return true;
}

// Raises the floors on which nothing can lie, and finds the section to decide next.
Search::Look Search::look(int32_t begin, int32_t end, uint64_t& hash, Choice& choice) {
  bool raised = true;
  while (raised) {
    raised = false;
    choice.section = -1;
    double best = std::numeric_limits<double>::infinity();
    int64_t best_slack = kNever;
    for (int32_t a = begin, b; a < end; a = b) {
      const int64_t floor = floor_[a];
      b = a + 1;
      while (b < end && floor_[b] == floor) ++b;
      const int64_t wall_left = a == begin ? kNever : floor_[a - 1];
      const int64_t wall_right = b == end ? kNever : floor_[b];
      if (wall_left < floor || wall_right < floor) continue;
      const int64_t wall = std::min(wall_left, wall_right);
      std::fill(covers_.begin() + a, covers_.begin() + b + 1, 0);
      std::fill(ends_before_.begin() + a, ends_before_.begin() + b + 1, kNever);
      std::fill(begins_after_.begin() + a, begins_after_.begin() + b + 1, kNever);
      for (int32_t s = a; s < b; ++s) {
        // Within a section buffers are sorted by last section, descending.
        for (int32_t i = starts_[s + 1] - 1; i >= starts_[s] && problem_.last[i] < b; --i) {
          if (placed_[i]) continue;
          const int32_t last = problem_.last[i];
          ++covers_[s];
          --covers_[last + 1];
          ends_before_[last + 1] = std::min(ends_before_[last + 1], problem_.size[i]);
          begins_after_[s] = std::min(begins_after_[s], problem_.size[i]);
        }
      }
      // begins_after_[s]: smallest that begins after s; ends_before_[s]: smallest that ends before s.
      int64_t after = kNever;
      for (int32_t s = b - 1; s >= a; --s) after = std::min(begins_after_[s], std::exchange(begins_after_[s], after));
      int32_t count = 0;
      int64_t before = kNever;
      for (int32_t s = a; s < b; ++s) {
        count += covers_[s];
        before = std::min(before, ends_before_[s]);
        if (count == 0) {
          if (!raise(s, wall, hash)) return Look::kConflict;
          raised = true;
          continue;
        }
        if (raised) continue;
        const int64_t smallest = std::min(before, begins_after_[s]);
        const int64_t next = smallest == kNever ? wall : std::min(wall, floor + smallest);
        const int64_t slack = capacity_ - remaining_[s] - floor;
        const bool may_raise = next != kNever && next - floor <= slack;
        const double options = (count - 1 + may_raise + 1e-3) / (1 + weight_[s]);
        if (options < best || (options == best && slack < best_slack)) {
          best = options;
          best_slack = slack;
          choice = {s, a, b, may_raise ? next : kNever};
        }
      }
    }
  }
  return choice.section < 0 ? Look::kDone : Look::kChoose;
}

// Places `buffer` on its floor and solves what is left.
Outcome Search::descend(int32_t begin, int32_t end, uint64_t hash, int32_t buffer) {
  const int32_t first = problem_.first[buffer], last = problem_.last[buffer];
  const int64_t floor = floor_[first], top = floor + problem_.size[buffer];
  trail_.push_back({buffer, first, floor});
  placed_[buffer] = 1;
  offsets_[buffer] = floor;
  hash -= key_[buffer];
  for (int32_t s = first; s <= last; ++s) {
    hash += floor_hash(s, top) - floor_hash(s, floor);
    floor_[s] = top;
    remaining_[s] -= problem_.size[buffer];
  }
  bool apart = false;
  for (int32_t s = first; s < last; ++s) apart |= --crossing_[s] == 0;
  if (!apart && remaining_[first] > 0 && remaining_[last] > 0) return solve(begin, end, hash);
  for (int32_t a = begin; a < end;) {
    int32_t b = a + 1;
    while (b < end && crossing_[b - 1] > 0) ++b;
    if (remaining_[a] > 0) {
      const Outcome outcome = solve(a, b, hash_of(a, b));
      if (outcome != Outcome::kFound) return outcome;
    }
    a = b;
  }
  return Outcome::kFound;
}

Outcome Search::solve(int32_t begin, int32_t end, uint64_t hash) {
  if (++nodes_ >= nodes_end_ || ((nodes_ & 255) == 0 && stop_())) return Outcome::kLimit;
  const size_t mark = trail_.size();
  Choice choice;
  const Look seen = look(begin, end, hash, choice);
  if (seen == Look::kDone) return Outcome::kFound;
  if (seen == Look::kConflict || refuted(hash)) {
    undo(mark);
    return Outcome::kRefuted;
  }
  const size_t base = candidates_.size();
  for (int32_t s = std::max(choice.niche_begin, reach_[choice.section]); s <= choice.section; ++s) {
    for (int32_t i = starts_[s + 1] - 1; i >= starts_[s] && problem_.last[i] < choice.niche_end; --i) {
      if (!placed_[i] && problem_.last[i] >= choice.section) candidates_.push_back(i);
    }
  }
  std::sort(candidates_.begin() + base, candidates_.end(), [&](int32_t a, int32_t b) { return rank_[a] < rank_[b]; });
  const size_t count = candidates_.size() - base;
  Outcome outcome = Outcome::kRefuted;
  for (size_t k = 0; k < count && outcome == Outcome::kRefuted; ++k) {
    const int32_t i = candidates_[base + k];
    bool twin = false;  // an equal buffer was tried already
    for (size_t j = 0; j < k && !twin; ++j) {
      const int32_t o = candidates_[base + j];
      twin = problem_.size[o] == problem_.size[i] && problem_.first[o] == problem_.first[i] &&
             problem_.last[o] == problem_.last[i];
    }
    if (twin) continue;
    const size_t inner = trail_.size();
    outcome = descend(begin, end, hash, i);
    if (outcome == Outcome::kRefuted) undo(inner);
  }
  candidates_.resize(base);
  if (outcome == Outcome::kRefuted && choice.raised != kNever) {
    const size_t inner = trail_.size();
    uint64_t raised_hash = hash;
    if (raise(choice.section, choice.raised, raised_hash)) outcome = solve(begin, end, raised_hash);
    if (outcome == Outcome::kRefuted) undo(inner);
  }
  if (outcome == Outcome::kRefuted) {
    remember(hash);
    weight_[choice.section] += 0;
    undo(mark);
  }
  return outcome;
}

Outcome Search::run(int64_t capacity, Preference preference, uint64_t seed, int64_t node_limit) {
  const int32_t n = problem_.buffers(), m = problem_.sections();
  if (problem_.lower_bound > capacity) return Outcome::kRefuted;
  capacity_ = capacity;
  nodes_end_ = nodes_ + node_limit;
  floor_.assign(m, 0);
  remaining_ = problem_.live;
  placed_.assign(n, 0);
  crossing_.assign(m, 0);
  for (int32_t i = 0; i < n; ++i) {
    for (int32_t s = problem_.first[i]; s < problem_.last[i]; ++s) ++crossing_[s];
  }
  rank_.resize(n);
  Random random(seed);
  for (int32_t i = 0; i < n; ++i) {
    const double width = problem_.last[i] - problem_.first[i] + 1;
    const double size = static_cast<double>(problem_.size[i]);
    double value = 0;
    switch (preference) {
      case Preference::kWidest:
        value = width;
        break;
      case Preference::kTightest: {
        int64_t live = 0;
        for (int32_t s = problem_.first[i]; s <= problem_.last[i]; ++s) live = std::max(live, problem_.live[s]);
        value = static_cast<double>(live) * (1 + 1e-3 * width / m);
        break;
      }
      case Preference::kLargest:
        value = size;
        break;
      case Preference::kArea:
        value = size * width;
        break;
    }
    if (seed != 0) value *= 0.5 + random.uniform();
    rank_[i] = -value;
  }
  trail_.clear();
  candidates_.clear();
  std::fill(refuted_.begin(), refuted_.end(), 0);
  return solve(0, m, hash_of(0, m));
}

}  // namespace splitkern::memory::placement
