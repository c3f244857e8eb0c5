// See search.h for the idea. All state is in vectors, the depth of the search takes no stack.
#include "memory/placement/search.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "memory/placement/random.h"

namespace splitkern::memory::placement {
namespace {

constexpr size_t kTableSize = size_t{1} << 16;
constexpr int32_t kSectionsPerNode = 512;

uint64_t floor_hash(int32_t section, int64_t floor) {
  return mix(static_cast<uint64_t>(floor) * 0xd1342543de82ef95ull + static_cast<uint64_t>(section));
}

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

void Search::forget_failures() {
  std::fill(weight_.begin(), weight_.end(), 0);
}

uint64_t Search::hash_of(int32_t begin, int32_t end) const {
  if (wide(begin, end)) return 0;
  uint64_t hash = mix((static_cast<uint64_t>(begin) << 32) + static_cast<uint64_t>(end));
  for (int32_t s = begin; s < end; ++s) {
    hash += floor_hash(s, floor_[s]);
    for (int32_t i = starts_[s]; i < starts_[s + 1]; ++i) hash += placed_[i] ? 0 : key_[i];
  }
  return hash;
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

bool Search::raise(Goal& goal, int32_t section, int64_t floor) {
  if (floor > capacity_ - remaining_[section]) {
    weight_[section] += 1;
    return false;
  }
  trail_.push_back({-1, section, floor_[section]});
  if (!wide(goal.begin, goal.end)) goal.hash += floor_hash(section, floor) - floor_hash(section, floor_[section]);
  floor_[section] = floor;
  return true;
}

// Raises what nothing can lie on in the niche [a, b), and offers its sections as the choice. False: a section lost more
// than it has.
bool Search::look_at_niche(Goal& goal, int32_t a, int32_t b, Choice& choice, double& best, int64_t& best_slack,
                           bool& raised) {
  const int64_t floor = floor_[a];
  const int64_t wall = std::min(a == goal.begin ? kNever : floor_[a - 1], b == goal.end ? kNever : floor_[b]);
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
  // Now the smallest buffer in the niche that begins after a section, then, on the way, that ends before it.
  int64_t after = kNever;
  for (int32_t s = b - 1; s >= a; --s) after = std::min(begins_after_[s], std::exchange(begins_after_[s], after));
  int32_t count = 0;
  int64_t before = kNever;
  for (int32_t s = a; s < b; ++s) {
    count += covers_[s];
    before = std::min(before, ends_before_[s]);
    if (count == 0) {
      if (!raise(goal, s, wall)) return false;
      raised = true;
      continue;
    }
    if (raised) continue;
    // What lies higher in this section lies on a wall, or on something that lies beside it in the niche.
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
  return true;
}

// Raises the floors on which nothing can lie, and finds the section to decide next.
Search::Look Search::look(Goal& goal, Choice& choice) {
  for (bool raised = true; raised;) {
    raised = false;
    choice.section = -1;
    double best = std::numeric_limits<double>::infinity();
    int64_t best_slack = kNever;
    const auto run_end = [&](int32_t s) {
      const int64_t floor = floor_[s];
      while (s < goal.end && floor_[s] == floor) ++s;
      return s;
    };
    if (focus_ == Focus::kAll || !wide(goal.begin, goal.end)) {
      nodes_ += (goal.end - goal.begin) / kSectionsPerNode;
      for (int32_t a = goal.begin, b; a < goal.end; a = b) {
        b = run_end(a);
        if ((a > goal.begin && floor_[a - 1] < floor_[a]) || (b < goal.end && floor_[b] < floor_[a])) continue;
        if (!look_at_niche(goal, a, b, choice, best, best_slack, raised)) return Look::kConflict;
      }
      continue;
    }
    // Down the skyline from the last change to the next niche.
    for (int32_t s = goal.near;;) {
      int32_t a = s;
      while (a > goal.begin && floor_[a - 1] == floor_[s]) --a;
      const int32_t b = run_end(s);
      const int64_t left = a == goal.begin ? kNever : floor_[a - 1], right = b == goal.end ? kNever : floor_[b];
      if (std::min(left, right) > floor_[s]) {
        nodes_ += (b - a) / kSectionsPerNode;
        if (!look_at_niche(goal, a, b, choice, best, best_slack, raised)) return Look::kConflict;
        break;
      }
      s = left <= right ? a - 1 : b;
    }
  }
  return choice.section < 0 ? Look::kDone : Look::kChoose;
}

// Places `buffer` on its floor; what is left of the goal becomes one or more goals.
void Search::place(const Goal& goal, int32_t buffer, int32_t decision) {
  const int32_t first = problem_.first[buffer], last = problem_.last[buffer];
  const int64_t size = problem_.size[buffer], floor = floor_[first], top = floor + size;
  trail_.push_back({buffer, first, floor});
  placed_[buffer] = 1;
  offsets_[buffer] = floor;
  std::fill(floor_.begin() + first, floor_.begin() + last + 1, top);
  for (int32_t s = first; s <= last; ++s) remaining_[s] -= size;
  bool apart = remaining_[first] == 0 || remaining_[last] == 0;
  for (int32_t s = first; s < last; ++s) apart |= --crossing_[s] == 0;
  if (!apart) {
    uint64_t hash = 0;
    if (!wide(goal.begin, goal.end)) {
      hash = goal.hash - key_[buffer];
      for (int32_t s = first; s <= last; ++s) hash += floor_hash(s, top) - floor_hash(s, floor);
    }
    goals_.push_back({goal.begin, goal.end, first, decision, goal.next, hash});
    open_ = static_cast<int32_t>(goals_.size()) - 1;
    return;
  }
  // Only boundaries under the buffer can have become free. The leftmost range comes first in the list.
  open_ = goal.next;
  int32_t end = goal.end;
  for (int32_t s = last; s > first; --s) {
    if (crossing_[s - 1] > 0) continue;
    add_goal(s, end, first, decision);
    end = s;
  }
  add_goal(goal.begin, end, first, decision);
}

void Search::add_goal(int32_t begin, int32_t end, int32_t near, int32_t decision) {
  if (remaining_[begin] == 0) return;  // a section without buffers stands alone
  goals_.push_back({begin, end, std::clamp(near, begin, end - 1), decision, open_, hash_of(begin, end)});
  open_ = static_cast<int32_t>(goals_.size()) - 1;
}

bool Search::is_twin(const Decision& decision) const {
  const int32_t i = candidates_[decision.next];
  for (size_t k = decision.candidates; k < decision.next; ++k) {
    const int32_t other = candidates_[k];
    if (problem_.size[other] == problem_.size[i] && problem_.first[other] == problem_.first[i] &&
        problem_.last[other] == problem_.last[i]) {
      return true;
    }
  }
  return false;
}

// Takes back what a decision led to and tries its next branch; where there is none, that of the decision that it
// followed from. False: nothing is left at all.
bool Search::advance(int32_t index) {
  for (; index >= 0; index = decisions_[index].goal.parent) {
    decisions_.resize(index + 1);
    Decision& decision = decisions_[index];
    undo(decision.trail_after);
    goals_.resize(decision.goals);
    candidates_.resize(decision.candidates_end);
    while (decision.next < decision.candidates_end && is_twin(decision)) ++decision.next;
    if (decision.next < decision.candidates_end) {
      place(decision.goal, candidates_[decision.next++], index);
      return true;
    }
    if (decision.next++ == decision.candidates_end && decision.choice.raised != kNever) {
      Goal goal = decision.goal;
      if (raise(goal, decision.choice.section, decision.choice.raised)) {
        goal.parent = index;
        goal.near = decision.choice.section;
        goals_.push_back(goal);
        open_ = static_cast<int32_t>(goals_.size()) - 1;
        return true;
      }
    }
    if (decision.goal.hash != 0) refuted_[decision.goal.hash & (kTableSize - 1)] = decision.goal.hash;
    undo(decision.trail_before);
  }
  return false;
}

Outcome Search::run(int64_t capacity, Preference preference, uint64_t seed, int64_t node_limit, Focus focus) {
  const int32_t n = problem_.buffers(), m = problem_.sections();
  if (problem_.lower_bound > capacity) return Outcome::kRefuted;
  capacity_ = capacity;
  focus_ = focus;
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
  decisions_.clear();
  goals_.clear();
  std::fill(refuted_.begin(), refuted_.end(), 0);
  open_ = -1;
  for (int32_t s = m - 1, end = m; s >= 0; --s) {
    if (s > 0 && crossing_[s - 1] > 0) continue;
    add_goal(s, end, s, -1);
    end = s;
  }
  int64_t steps = 0;
  while (open_ >= 0) {
    if (++nodes_ > nodes_end_ || ((++steps & 63) == 0 && stop_())) return Outcome::kLimit;
    Goal goal = goals_[open_];
    const size_t before = trail_.size();
    Choice choice;
    const Look seen = look(goal, choice);
    if (seen == Look::kDone) {
      open_ = goal.next;
      continue;
    }
    if (seen == Look::kConflict || (goal.hash != 0 && refuted_[goal.hash & (kTableSize - 1)] == goal.hash)) {
      if (!advance(goal.parent)) return Outcome::kRefuted;
      continue;
    }
    const size_t begin = candidates_.size();
    for (int32_t s = std::max(choice.niche_begin, reach_[choice.section]); s <= choice.section; ++s) {
      for (int32_t i = starts_[s + 1] - 1; i >= starts_[s] && problem_.last[i] < choice.niche_end; --i) {
        if (!placed_[i] && problem_.last[i] >= choice.section) candidates_.push_back(i);
      }
    }
    std::sort(candidates_.begin() + begin, candidates_.end(),
              [&](int32_t a, int32_t b) { return rank_[a] != rank_[b] ? rank_[a] < rank_[b] : a < b; });
    decisions_.push_back({goal, choice, before, trail_.size(), goals_.size(), begin, candidates_.size(), begin});
    if (!advance(static_cast<int32_t>(decisions_.size()) - 1)) return Outcome::kRefuted;
  }
  return Outcome::kFound;
}

}  // namespace splitkern::memory::placement
