#include "memory/placement/heuristics.h"

#include <algorithm>
#include <limits>

namespace splitkern::memory::placement {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// The free ranges of an arena without end, by address. Blocks of neighbouring gaps, with the largest gap of each block
// apart, so that the search for the lowest gap that is large enough touches little memory.
class GapList {
 public:
  GapList() { blocks_.push_back({{{0, kNever}}}), largest_.push_back(kNever); }

  int64_t allocate(int64_t size) {
    size_t b = 0;
    while (largest_[b] < size) ++b;
    Block& block = blocks_[b];
    size_t k = 0;
    while (block.gaps[k].size < size) ++k;
    const int64_t offset = block.gaps[k].offset;
    const bool was_largest = block.gaps[k].size == largest_[b];
    block.gaps[k].offset += size;
    // The last gap is endless: its size stays.
    if (block.gaps[k].size != kNever) block.gaps[k].size -= size;
    if (block.gaps[k].size == 0) block.gaps.erase(block.gaps.begin() + k);
    if (block.gaps.empty()) {
      erase(b);
    } else if (was_largest) {
      measure(b);
    }
    return offset;
  }

  void free(int64_t offset, int64_t size) {
    // The block of the first gap above `offset`; the last gap of all is always above.
    size_t b = std::partition_point(blocks_.begin(), blocks_.end(),
                                    [&](const Block& block) { return block.gaps.back().offset < offset; }) -
               blocks_.begin();
    Block& block = blocks_[b];
    const auto next =
        std::partition_point(block.gaps.begin(), block.gaps.end(), [&](const Gap& gap) { return gap.offset < offset; });
    const size_t k = next - block.gaps.begin();
    Gap* before = k > 0 ? &block.gaps[k - 1] : b > 0 ? &blocks_[b - 1].gaps.back() : nullptr;
    const bool joins_before = before != nullptr && before->offset + before->size == offset;
    const bool joins_after = offset + size == next->offset;
    if (joins_before && joins_after) {
      next->offset = before->offset;
      if (next->size != kNever) next->size += before->size + size;
      if (k > 0) {
        block.gaps.erase(block.gaps.begin() + (k - 1));
        measure(b);
      } else {
        largest_[b] = std::max(largest_[b], next->size);
        blocks_[b - 1].gaps.pop_back();
        if (blocks_[b - 1].gaps.empty()) {
          erase(b - 1);
        } else {
          measure(b - 1);
        }
      }
    } else if (joins_before) {
      before->size += size;
      const size_t of = k > 0 ? b : b - 1;
      largest_[of] = std::max(largest_[of], before->size);
    } else if (joins_after) {
      next->offset = offset;
      if (next->size != kNever) next->size += size;
      largest_[b] = std::max(largest_[b], next->size);
    } else {
      block.gaps.insert(next, {offset, size});
      largest_[b] = std::max(largest_[b], size);
      if (block.gaps.size() > kBlockGaps) split(b);
    }
  }

 private:
  static constexpr size_t kBlockGaps = 128;
  struct Gap {
    int64_t offset, size;
  };
  struct Block {
    std::vector<Gap> gaps;
  };

  void measure(size_t b) {
    int64_t largest = 0;
    for (const Gap& gap : blocks_[b].gaps) largest = std::max(largest, gap.size);
    largest_[b] = largest;
  }
  void erase(size_t b) {
    blocks_.erase(blocks_.begin() + b);
    largest_.erase(largest_.begin() + b);
  }
  void split(size_t b) {
    Block upper;
    auto& gaps = blocks_[b].gaps;
    upper.gaps.assign(gaps.begin() + gaps.size() / 2, gaps.end());
    gaps.resize(gaps.size() / 2);
    blocks_.insert(blocks_.begin() + b + 1, std::move(upper));
    largest_.insert(largest_.begin() + b + 1, 0);
    measure(b);
    measure(b + 1);
  }

  std::vector<Block> blocks_;
  std::vector<int64_t> largest_;
};

// Positions of buffers by the section in which they end: those of section s are [starts[s], starts[s+1]).
struct ByLast {
  explicit ByLast(const Problem& problem) : starts(problem.sections() + 1, 0), buffers(problem.buffers()) {
    for (const int32_t last : problem.last) ++starts[last + 1];
    for (int32_t s = 0; s < problem.sections(); ++s) starts[s + 1] += starts[s];
    std::vector<int32_t> next(starts.begin(), starts.end() - 1);
    for (int32_t i = 0; i < problem.buffers(); ++i) buffers[next[problem.last[i]]++] = i;
  }
  std::vector<int32_t> starts, buffers;
};

// The buffers placed so far, found by sections: every buffer hangs at the O(log m) nodes of a binary tree that make up
// its run of sections.
class PlacedTree {
 public:
  explicit PlacedTree(const Problem& problem) : problem_(problem), seen_(problem.buffers(), 0) {
    leaves_ = 1;
    while (leaves_ < problem.sections()) leaves_ *= 2;
    nodes_.resize(2 * leaves_);
    filled_.assign(2 * leaves_, 0);
  }

  void add(int32_t buffer) {
    int32_t low = problem_.first[buffer] + leaves_, high = problem_.last[buffer] + leaves_ + 1;
    const auto hang = [&](int32_t node) {
      nodes_[node].push_back(buffer);
      for (; node > 0 && !filled_[node]; node /= 2) filled_[node] = 1;
    };
    for (; low < high; low /= 2, high /= 2) {
      if (low & 1) hang(low++);
      if (high & 1) hang(--high);
    }
  }

  // Appends every placed buffer that meets `buffer` once.
  void collect(int32_t buffer, std::vector<int32_t>& out) {
    ++stamp_;
    visit(1, 0, leaves_, problem_.first[buffer], problem_.last[buffer] + 1, out);
  }

 private:
  void visit(int32_t node, int32_t begin, int32_t end, int32_t low, int32_t high, std::vector<int32_t>& out) {
    if (!filled_[node] || high <= begin || end <= low) return;
    for (const int32_t i : nodes_[node]) {
      if (seen_[i] == stamp_) continue;
      seen_[i] = stamp_;
      out.push_back(i);
    }
    if (end - begin == 1) return;
    const int32_t middle = begin + (end - begin) / 2;
    visit(2 * node, begin, middle, low, high, out);
    visit(2 * node + 1, middle, end, low, high, out);
  }

  const Problem& problem_;
  int32_t leaves_;
  std::vector<std::vector<int32_t>> nodes_;
  std::vector<char> filled_;  // something hangs at the node or below
  std::vector<int32_t> seen_;
  int32_t stamp_ = 0;
};

// Floors of sections: highest of a run, and setting a run to one that is higher than all of it.
class FloorTree {
 public:
  explicit FloorTree(int32_t sections) {
    leaves_ = 1;
    while (leaves_ < sections) leaves_ *= 2;
    highest_.assign(2 * leaves_, 0);
    whole_.assign(2 * leaves_, 0);
  }

  int64_t highest(int32_t first, int32_t last) const {
    int64_t result = 0;
    int32_t low = first + leaves_, high = last + leaves_ + 1;
    const int32_t left = low, right = high - 1;
    for (; low < high; low /= 2, high /= 2) {
      if (low & 1) result = std::max(result, highest_[low++]);
      if (high & 1) result = std::max(result, highest_[--high]);
    }
    // What was set for a whole run that holds part of this one.
    for (int32_t node = left / 2; node > 0; node /= 2) result = std::max(result, whole_[node]);
    for (int32_t node = right / 2; node > 0; node /= 2) result = std::max(result, whole_[node]);
    return result;
  }

  void set(int32_t first, int32_t last, int64_t floor) {
    int32_t low = first + leaves_, high = last + leaves_ + 1;
    const int32_t left = low, right = high - 1;
    for (; low < high; low /= 2, high /= 2) {
      if (low & 1) whole_[low] = highest_[low] = floor, ++low;
      if (high & 1) --high, whole_[high] = highest_[high] = floor;
    }
    for (int32_t node = left / 2; node > 0; node /= 2) highest_[node] = std::max(highest_[node], floor);
    for (int32_t node = right / 2; node > 0; node /= 2) highest_[node] = std::max(highest_[node], floor);
  }

 private:
  int32_t leaves_;
  std::vector<int64_t> highest_;  // in the node's run, of what was set at the node or below
  std::vector<int64_t> whole_;    // set for the whole run
};

Problem reversed(const Problem& problem, std::vector<int32_t>& from) {
  const int32_t n = problem.buffers(), m = problem.sections();
  std::vector<int64_t> key(n);
  for (int32_t i = 0; i < n; ++i) {
    key[i] = (static_cast<int64_t>(m - 1 - problem.last[i]) << 31) + problem.first[i];
  }
  from = sorted_positions(key, false);
  Problem result;
  result.lower_bound = problem.lower_bound;
  result.live.assign(problem.live.rbegin(), problem.live.rend());
  result.first.resize(n);
  result.last.resize(n);
  result.size.resize(n);
  result.original = from;
  for (int32_t k = 0; k < n; ++k) {
    result.first[k] = m - 1 - problem.last[from[k]];
    result.last[k] = m - 1 - problem.first[from[k]];
    result.size[k] = problem.size[from[k]];
  }
  return result;
}

// The section with the largest key of a run.
class KeyTree {
 public:
  explicit KeyTree(std::span<const double> keys) : keys_(keys) {
    leaves_ = 1;
    while (leaves_ < static_cast<int32_t>(keys.size())) leaves_ *= 2;
    best_.assign(2 * leaves_, 0);
    for (int32_t s = 0; s < leaves_; ++s) best_[leaves_ + s] = std::min(s, static_cast<int32_t>(keys.size()) - 1);
    for (int32_t node = leaves_ - 1; node > 0; --node) best_[node] = better(best_[2 * node], best_[2 * node + 1]);
  }

  int32_t largest(int32_t begin, int32_t end) const {
    int32_t result = begin;
    for (int32_t low = begin + leaves_, high = end + leaves_; low < high; low /= 2, high /= 2) {
      if (low & 1) result = better(result, best_[low++]);
      if (high & 1) result = better(result, best_[--high]);
    }
    return result;
  }

 private:
  int32_t better(int32_t a, int32_t b) const { return keys_[b] > keys_[a] || (keys_[b] == keys_[a] && b < a) ? b : a; }

  std::span<const double> keys_;
  int32_t leaves_;
  std::vector<int32_t> best_;
};

std::vector<int64_t> fill_from_left(const Problem& problem, std::span<const double> keys) {
  constexpr int kStartsTried = 16;
  const int32_t n = problem.buffers(), m = problem.sections();
  std::vector<int64_t> offsets(n, 0);
  if (n == 0) return offsets;
  std::optional<KeyTree> tightest;
  if (!keys.empty()) tightest.emplace(keys);
  // Remaining buffers by first section, each bucket by last section descending; the tree holds the smallest last
  // section of each bucket. `skip` jumps over those that are placed.
  std::vector<int32_t> starts(m + 1, 0);
  for (const int32_t first : problem.first) ++starts[first + 1];
  for (int32_t s = 0; s < m; ++s) starts[s + 1] += starts[s];
  int32_t leaves = 1;
  while (leaves < m) leaves *= 2;
  std::vector<int32_t> least(2 * leaves, m);
  std::vector<int32_t> tail(m);  // one past the last remaining of a bucket
  std::vector<char> placed(n, 0);
  for (int32_t s = 0; s < m; ++s) {
    tail[s] = starts[s + 1];
    if (starts[s] < tail[s]) least[leaves + s] = problem.last[tail[s] - 1];
  }
  for (int32_t node = leaves - 1; node > 0; --node) least[node] = std::min(least[2 * node], least[2 * node + 1]);
  // The first section from `a` on in which a remaining buffer begins that ends before `b`; m: none.
  const auto find = [&](int32_t a, int32_t b) {
    if (a >= m) return m;
    int32_t node = a + leaves;
    while (least[node] >= b) {
      while (node & 1) {
        node /= 2;
        if (node == 0) return m;
      }
      if (node == 0) return m;
      ++node;
    }
    while (node < leaves) node = least[2 * node] < b ? 2 * node : 2 * node + 1;
    return node - leaves;
  };

  // The skyline: runs of sections by their begin.
  std::vector<int32_t> run_end(m), run_before(m + 1);
  std::vector<int64_t> floor(m + 1, kNever);
  run_end[0] = m;
  run_before[0] = -1;
  run_before[m] = 0;
  floor[0] = 0;
  const auto merge_next = [&](int32_t run) {  // with the run that follows
    run_end[run] = run_end[run_end[run]];
    run_before[run_end[run]] = run;
  };
  int32_t run = 0;
  for (int32_t left = n; left > 0;) {
    const int32_t begin = run, end = run_end[run], before = run_before[run];
    const int64_t here = floor[run];
    const int64_t wall_left = before < 0 ? kNever : floor[before], wall_right = end == m ? kNever : floor[end];
    if (wall_left < here || wall_right < here) {
      run = wall_left <= wall_right ? before : end;
      continue;
    }
    int32_t s = find(begin, end);
    if (s >= end) {
      const int64_t wall = std::min(wall_left, wall_right);
      floor[run] = wall;
      if (end < m && wall_right == wall) merge_next(run);
      if (before >= 0 && wall_left == wall) merge_next(run = before);
      continue;
    }
    // The longest of those that begin at a section and end in the niche; there is one.
    const auto longest_at = [&](int32_t start) {
      int32_t i = std::partition_point(problem.last.begin() + starts[start], problem.last.begin() + tail[start],
                                       [&](int32_t last) { return last >= end; }) -
                  problem.last.begin();
      while (placed[i]) ++i;
      return i;
    };
    int32_t i = longest_at(s);
    if (tightest) {
      const int32_t wanted = tightest->largest(begin, end);
      int32_t longest = 0;
      for (int32_t start = s, k = 0; start <= wanted && k < kStartsTried; start = find(start + 1, end), ++k) {
        const int32_t j = longest_at(start);
        if (problem.last[j] < wanted || problem.last[j] - start < longest) continue;
        longest = problem.last[j] - start + 1;
        i = j;
      }
      s = problem.first[i];
    }
    placed[i] = 1;
    --left;
    offsets[i] = here;
    if (i == tail[s] - 1) {
      while (tail[s] > starts[s] && placed[tail[s] - 1]) --tail[s];
      int32_t node = leaves + s;
      least[node] = tail[s] > starts[s] ? problem.last[tail[s] - 1] : m;
      for (node /= 2; node > 0; node /= 2) least[node] = std::min(least[2 * node], least[2 * node + 1]);
    }
    const int32_t to = problem.last[i] + 1;
    const int64_t top = here + problem.size[i];
    if (to < end) {  // the niche to the right
      run_end[to] = end;
      run_before[end] = to;
      run_end[run] = to;
      run_before[to] = run;
      floor[to] = here;
    }
    int32_t on = run;  // the run of the buffer
    if (s > begin) {
      run_end[s] = run_end[run];
      run_before[run_end[s]] = s;
      run_end[run] = s;
      run_before[s] = run;
      on = s;
    }
    floor[on] = top;
    if (to == end && end < m && wall_right == top) merge_next(on);
    if (s == begin && before >= 0 && wall_left == top) merge_next(on = before);
    run = to < end ? to : on;
  }
  return offsets;
}

}  // namespace

std::vector<int64_t> first_fit_by_begin(const Problem& problem) {
  std::vector<int64_t> offsets(problem.buffers());
  const ByLast by_last(problem);
  GapList gaps;
  int32_t next = 0;
  for (int32_t s = 0; s < problem.sections(); ++s) {
    for (; next < problem.buffers() && problem.first[next] == s; ++next) {
      offsets[next] = gaps.allocate(problem.size[next]);
    }
    for (int32_t k = by_last.starts[s]; k < by_last.starts[s + 1]; ++k) {
      const int32_t i = by_last.buffers[k];
      gaps.free(offsets[i], problem.size[i]);
    }
  }
  return offsets;
}

std::optional<std::vector<int64_t>> first_fit_in_order(const Problem& problem, std::span<const int32_t> order,
                                                       int64_t work_limit, size_t fixed, std::vector<int64_t> offsets) {
  offsets.resize(problem.buffers(), 0);
  PlacedTree placed(problem);
  for (const int32_t i : order.first(fixed)) placed.add(i);
  std::vector<int32_t> met;
  int64_t work = 0;
  for (const int32_t i : order.subspan(fixed)) {
    met.clear();
    placed.collect(i, met);
    work += static_cast<int64_t>(met.size());
    if (work > work_limit) return std::nullopt;
    std::sort(met.begin(), met.end(),
              [&](int32_t a, int32_t b) { return offsets[a] != offsets[b] ? offsets[a] < offsets[b] : a < b; });
    int64_t offset = 0;
    for (const int32_t other : met) {
      if (offsets[other] - offset >= problem.size[i]) break;
      offset = std::max(offset, offsets[other] + problem.size[other]);
    }
    offsets[i] = offset;
    placed.add(i);
  }
  return offsets;
}

std::vector<int64_t> drop_in_order(const Problem& problem, std::span<const int32_t> order) {
  std::vector<int64_t> offsets(problem.buffers(), 0);
  FloorTree floors(problem.sections());
  for (const int32_t i : order) {
    offsets[i] = floors.highest(problem.first[i], problem.last[i]);
    floors.set(problem.first[i], problem.last[i], offsets[i] + problem.size[i]);
  }
  return offsets;
}

std::vector<int64_t> fill_niches(const Problem& problem, Fill fill, std::span<const double> keys) {
  if (fill == Fill::kFromLeft) return fill_from_left(problem, keys);
  std::vector<int32_t> from;
  const Problem mirror = reversed(problem, from);
  const std::vector<double> mirrored_keys(keys.rbegin(), keys.rend());
  const std::vector<int64_t> mirrored = fill_from_left(mirror, mirrored_keys);
  std::vector<int64_t> offsets(problem.buffers());
  for (size_t k = 0; k < from.size(); ++k) offsets[from[k]] = mirrored[k];
  return offsets;
}

}  // namespace splitkern::memory::placement
