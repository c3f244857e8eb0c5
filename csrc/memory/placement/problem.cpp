// Checks the input of place() and reduces it to sections.
#include "memory/placement/problem.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <string>

#include "memory/errors.h"

namespace splitkern::memory::placement {
namespace {

struct Keyed {
  uint64_t key;
  int32_t position;
};

// Stable, by key. Least significant digit first; digits in which all keys agree cost nothing.
void radix_sort(std::vector<Keyed>& items) {
  constexpr int kDigitBits = 11;
  constexpr int kDigits = (64 + kDigitBits - 1) / kDigitBits;
  constexpr size_t kValues = size_t{1} << kDigitBits;
  if (items.size() < 4 * kValues) {
    std::sort(items.begin(), items.end(),
              [](const Keyed& a, const Keyed& b) { return a.key != b.key ? a.key < b.key : a.position < b.position; });
    return;
  }
  std::vector<std::array<uint32_t, kValues>> counts(kDigits);
  for (auto& count : counts) count.fill(0);
  for (const Keyed& item : items) {
    for (int digit = 0; digit < kDigits; ++digit) {
      ++counts[digit][(item.key >> (digit * kDigitBits)) & (kValues - 1)];
    }
  }
  std::vector<Keyed> other(items.size());
  for (int digit = 0; digit < kDigits; ++digit) {
    auto& count = counts[digit];
    if (*std::max_element(count.begin(), count.end()) == items.size()) continue;
    uint32_t begin = 0;
    for (uint32_t& value : count) begin += std::exchange(value, begin);
    for (const Keyed& item : items) other[count[(item.key >> (digit * kDigitBits)) & (kValues - 1)]++] = item;
    items.swap(other);
  }
}

// Order-preserving map of all integers to the unsigned ones.
uint64_t as_unsigned(int64_t value) {
  return static_cast<uint64_t>(value) ^ (uint64_t{1} << 63);
}

[[noreturn]] void refuse(size_t index, const std::string& text) {
  throw InvalidArgument("place: buffer " + std::to_string(index) + ": " + text);
}

}  // namespace

std::vector<int32_t> sorted_positions(std::span<const int64_t> keys, bool descending) {
  std::vector<Keyed> items(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    const auto key = static_cast<uint64_t>(keys[i]);
    items[i] = {descending ? ~key : key, static_cast<int32_t>(i)};
  }
  radix_sort(items);
  std::vector<int32_t> order(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) order[i] = items[i].position;
  return order;
}

Problem make_problem(std::span<const Buffer> buffers, int64_t alignment_bytes) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  if (alignment_bytes < 1) {
    throw InvalidArgument("place: alignment_bytes must be positive, got " + std::to_string(alignment_bytes));
  }
  if (buffers.size() > size_t{std::numeric_limits<int32_t>::max() / 2}) {
    throw InvalidArgument("place: at most 2^30 - 1 buffers, got " + std::to_string(buffers.size()));
  }
  std::vector<Keyed> begins, ends;
  begins.reserve(buffers.size());
  ends.reserve(buffers.size());
  const int64_t max_units = kMax / alignment_bytes;
  int64_t total = 0;
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Buffer& buffer = buffers[i];
    if (buffer.begin >= buffer.end) {
      refuse(i,
             "begin must be below end, got [" + std::to_string(buffer.begin) + ", " + std::to_string(buffer.end) + ")");
    }
    if (buffer.size_bytes < 0) refuse(i, "size_bytes must not be negative, got " + std::to_string(buffer.size_bytes));
    if (buffer.size_bytes == 0) continue;
    const int64_t units = (buffer.size_bytes - 1) / alignment_bytes + 1;
    if (units > max_units - total) {
      refuse(i, "the sum of all sizes, rounded up to alignment_bytes " + std::to_string(alignment_bytes) +
                    ", must be at most 2^63 - 1; this one has " + std::to_string(buffer.size_bytes) + " bytes");
    }
    total += units;
    begins.push_back({as_unsigned(buffer.begin), static_cast<int32_t>(i)});
    ends.push_back({as_unsigned(buffer.end), static_cast<int32_t>(i)});
  }
  radix_sort(begins);
  radix_sort(ends);

  // A section closes where an end follows a begin; what ends at a time makes room for what begins then.
  const size_t count = begins.size();
  std::vector<int32_t> first(buffers.size()), last(buffers.size());
  int32_t closed = 0;
  bool open = false;
  size_t next = 0;
  for (const Keyed& end : ends) {
    for (; next < count && begins[next].key < end.key; ++next) {
      first[begins[next].position] = closed;
      open = true;
    }
    if (open) ++closed;
    open = false;
    last[end.position] = closed - 1;
  }

  Problem problem;
  problem.first.resize(count);
  problem.last.resize(count);
  problem.size.resize(count);
  problem.original.resize(count);
  // `begins` is by first section already; the rest of the order is settled within each section.
  std::vector<int32_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = begins[i].position;
  for (size_t i = 0; i < count;) {
    size_t j = i;
    while (j < count && first[order[j]] == first[order[i]]) ++j;
    std::sort(order.begin() + i, order.begin() + j, [&](int32_t a, int32_t b) {
      if (last[a] != last[b]) return last[a] > last[b];
      if (buffers[a].size_bytes != buffers[b].size_bytes) return buffers[a].size_bytes > buffers[b].size_bytes;
      return a < b;
    });
    i = j;
  }
  std::vector<int64_t> change(closed + 1, 0);
  for (size_t i = 0; i < count; ++i) {
    const int32_t b = order[i];
    problem.original[i] = b;
    problem.first[i] = first[b];
    problem.last[i] = last[b];
    problem.size[i] = (buffers[b].size_bytes - 1) / alignment_bytes + 1;
    change[first[b]] += problem.size[i];
    change[last[b] + 1] -= problem.size[i];
  }
  problem.live.resize(closed);
  int64_t sum = 0;
  for (int32_t s = 0; s < closed; ++s) {
    sum += change[s];
    problem.live[s] = sum;
    problem.lower_bound = std::max(problem.lower_bound, sum);
  }
  return problem;
}

std::vector<std::pair<int32_t, int32_t>> independent_parts(const Problem& problem) {
  std::vector<std::pair<int32_t, int32_t>> parts;
  int32_t begin = 0, reach = -1;
  for (int32_t i = 0; i < problem.buffers(); ++i) {
    if (i > begin && problem.first[i] > reach) {
      parts.emplace_back(begin, i);
      begin = i;
    }
    reach = std::max(reach, problem.last[i]);
  }
  if (begin < problem.buffers()) parts.emplace_back(begin, problem.buffers());
  return parts;
}

Problem part_of(const Problem& problem, int32_t begin, int32_t end) {
  Problem part;
  const int32_t base = problem.first[begin];
  int32_t top = base;
  for (int32_t i = begin; i < end; ++i) {
    part.first.push_back(problem.first[i] - base);
    part.last.push_back(problem.last[i] - base);
    part.size.push_back(problem.size[i]);
    part.original.push_back(i);
    top = std::max(top, problem.last[i]);
  }
  part.live.assign(problem.live.begin() + base, problem.live.begin() + top + 1);
  part.lower_bound = *std::max_element(part.live.begin(), part.live.end());
  return part;
}

int64_t peak_of(const Problem& problem, std::span<const int64_t> offsets) {
  int64_t peak = 0;
  for (int32_t i = 0; i < problem.buffers(); ++i) peak = std::max(peak, offsets[i] + problem.size[i]);
  return peak;
}

}  // namespace splitkern::memory::placement
