#include "memory/boxes.h"

#include <algorithm>
#include <string>
#include <utility>

#include "memory/checked_arithmetic.h"
#include "memory/errors.h"

namespace splitkern::memory {
namespace {

// More pieces than this for one box: runs serve better.
constexpr size_t kMaxPieces = 1024;

struct Dimension {
  int64_t extent;
  int64_t stride_bytes;
};

// The same bytes with as few dimensions as possible, strides strictly descending; none for a box of one byte. Where
// every stride is a multiple of the next, no byte occurs twice: dimensions that touch or overlap have become one.
std::vector<Dimension> normalised(const Tensor& tensor) {
  std::vector<Dimension> sorted;
  if (tensor.element_bytes > 1) sorted.push_back({tensor.element_bytes, 1});
  for (size_t i = 0; i < tensor.sizes.size(); ++i) {
    if (tensor.sizes[i] > 1 && tensor.strides_bytes[i] > 0)
      sorted.push_back({tensor.sizes[i], tensor.strides_bytes[i]});
  }
  std::sort(sorted.begin(), sorted.end(), [](const Dimension& a, const Dimension& b) {
    return a.stride_bytes != b.stride_bytes ? a.stride_bytes < b.stride_bytes : a.extent < b.extent;
  });
  std::vector<Dimension> merged;  // innermost first
  for (const Dimension& outer : sorted) {
    if (!merged.empty()) {
      Dimension& inner = merged.back();
      const int64_t factor = outer.stride_bytes / inner.stride_bytes;
      if (outer.stride_bytes % inner.stride_bytes == 0 && factor <= inner.extent) {
        inner.extent += (outer.extent - 1) * factor;
        continue;
      }
    }
    merged.push_back(outer);
  }
  std::reverse(merged.begin(), merged.end());
  return merged;
}

// Splits a box of the lattice into intervals of digits: address = sum of digit·level, where each digit but the first is
// below the ratio of its level to the one before.
class Splitter {
 public:
  Splitter(const std::vector<int64_t>& levels, std::vector<std::vector<int64_t>>& pieces)
      : levels_(levels), pieces_(pieces), extents_(levels.size(), 1), digits_(2 * levels.size()) {}

  // False: more than kMaxPieces.
  bool split(int64_t offset_bytes, const std::vector<Dimension>& dimensions) {
    std::fill(extents_.begin(), extents_.end(), 1);
    for (const Dimension& dimension : dimensions) {
      const auto level = std::lower_bound(levels_.begin(), levels_.end(), dimension.stride_bytes, std::greater<>());
      extents_[level - levels_.begin()] = dimension.extent;
    }
    return descend(levels_.size() - 1, offset_bytes);
  }

 private:
  // `base` is the address of the box in units of the level; what is below it has been split.
  bool descend(size_t level, int64_t base) {
    const int64_t extent = extents_[level];
    if (level == 0) {
      set(level, base, base + extent);
      if (pieces_.size() == kMaxPieces) return false;
      pieces_.push_back(digits_);
      return true;
    }
    const int64_t radix = levels_[level - 1] / levels_[level];
    const int64_t carry = base / radix;
    const int64_t digit = base % radix;
    if (digit + extent <= radix) {
      set(level, digit, digit + extent);
      return descend(level - 1, carry);
    }
    set(level, digit, radix);
    if (!descend(level - 1, carry)) return false;
    const int64_t rest = extent - (radix - digit);
    if (rest / radix > 0) {
      // A dimension of the box at the next level would have merged with this one, so that level is free.
      set(level, 0, radix);
      extents_[level - 1] = rest / radix;
      const bool done = descend(level - 1, carry + 1);
      extents_[level - 1] = 1;
      if (!done) return false;
    }
    if (rest % radix == 0) return true;
    set(level, 0, rest % radix);
    return descend(level - 1, carry + 1 + rest / radix);
  }
  void set(size_t level, int64_t begin, int64_t end) {
    digits_[2 * level] = begin;
    digits_[2 * level + 1] = end;
  }

  const std::vector<int64_t>& levels_;
  std::vector<std::vector<int64_t>>& pieces_;
  std::vector<int64_t> extents_;
  std::vector<int64_t> digits_;
};

// The box as sorted runs of bytes that neither touch nor overlap. `budget` is what is left of StorageBoxes::kMaxRuns.
std::vector<std::vector<int64_t>> runs_of(const Tensor& tensor, std::vector<Dimension> dimensions, int64_t& budget) {
  int64_t run_bytes = 1;
  if (!dimensions.empty() && dimensions.back().stride_bytes == 1) {
    run_bytes = dimensions.back().extent;
    dimensions.pop_back();
  }
  int64_t count = 1;
  for (const Dimension& dimension : dimensions) {
    if (count > budget / dimension.extent)
      throw InvalidArgument("tensor \"" + tensor.name +
                            "\": its strides have no common lattice with those of the other " +
                            "tensors of its storage, and as runs of bytes they are more than " +
                            std::to_string(StorageBoxes::kMaxRuns) + " together");
    count *= dimension.extent;
  }
  budget -= count;
  std::vector<int64_t> begins{tensor.offset_bytes};
  begins.reserve(count);
  for (const Dimension& dimension : dimensions) {
    const size_t before = begins.size();
    for (int64_t i = 1; i < dimension.extent; ++i) {
      for (size_t j = 0; j < before; ++j) begins.push_back(begins[j] + i * dimension.stride_bytes);
    }
  }
  std::sort(begins.begin(), begins.end());
  std::vector<std::vector<int64_t>> runs;
  for (const int64_t begin : begins) {
    if (!runs.empty() && begin <= runs.back()[1])
      runs.back()[1] = std::max(runs.back()[1], begin + run_bytes);
    else
      runs.push_back({begin, begin + run_bytes});
  }
  return runs;
}

bool intersect(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  for (size_t i = 0; i < a.size(); i += 2) {
    if (a[i] >= b[i + 1] || b[i] >= a[i + 1]) return false;
  }
  return true;
}

bool lies_in(const std::vector<int64_t>& inner, const std::vector<int64_t>& outer) {
  for (size_t i = 0; i < inner.size(); i += 2) {
    if (inner[i] < outer[i] || inner[i + 1] > outer[i + 1]) return false;
  }
  return true;
}

// Appends `from` without `hole`, as disjoint pieces.
void subtract(std::vector<int64_t> from, const std::vector<int64_t>& hole, std::vector<std::vector<int64_t>>& out) {
  if (!intersect(from, hole)) {
    out.push_back(std::move(from));
    return;
  }
  for (size_t i = 0; i < from.size(); i += 2) {
    if (from[i] < hole[i]) {
      out.push_back(from);
      out.back()[i + 1] = hole[i];
      from[i] = hole[i];
    }
    if (hole[i + 1] < from[i + 1]) {
      out.push_back(from);
      out.back()[i] = hole[i + 1];
      from[i + 1] = hole[i + 1];
    }
  }
}

bool covered_by(const std::vector<int64_t>& piece, const std::vector<std::vector<int64_t>>& holes) {
  std::vector<std::vector<int64_t>> left{piece};
  std::vector<std::vector<int64_t>> next;
  for (const std::vector<int64_t>& hole : holes) {
    next.clear();
    for (std::vector<int64_t>& part : left) subtract(std::move(part), hole, next);
    std::swap(left, next);
    if (left.empty()) return true;
  }
  return false;
}

// Whether b continues a along one level, or lies along it: then a becomes the union.
bool unite(std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  if (lies_in(b, a)) return true;
  if (lies_in(a, b)) {
    a = b;
    return true;
  }
  size_t differs = a.size();
  for (size_t i = 0; i < a.size(); i += 2) {
    if (a[i] == b[i] && a[i + 1] == b[i + 1]) continue;
    if (differs != a.size()) return false;
    differs = i;
  }
  if (a[differs] > b[differs + 1] || b[differs] > a[differs + 1]) return false;
  a[differs] = std::min(a[differs], b[differs]);
  a[differs + 1] = std::max(a[differs + 1], b[differs + 1]);
  return true;
}

}  // namespace

bool is_empty(const Tensor& tensor) {
  return std::find(tensor.sizes.begin(), tensor.sizes.end(), 0) != tensor.sizes.end();
}

std::optional<int64_t> end_bytes(const Tensor& tensor) {
  if (is_empty(tensor)) return tensor.offset_bytes;
  std::optional<int64_t> end = checked_add(tensor.offset_bytes, tensor.element_bytes);
  for (size_t i = 0; end && i < tensor.sizes.size(); ++i) {
    const std::optional<int64_t> step = checked_multiply(tensor.sizes[i] - 1, tensor.strides_bytes[i]);
    end = step ? checked_add(*end, *step) : std::nullopt;
  }
  return end;
}

bool same_elements(const Tensor& a, const Tensor& b) {
  if (a.element_bytes != b.element_bytes || a.offset_bytes != b.offset_bytes) return false;
  size_t i = 0;
  size_t j = 0;
  while (true) {
    while (i < a.sizes.size() && a.sizes[i] == 1) ++i;
    while (j < b.sizes.size() && b.sizes[j] == 1) ++j;
    if (i == a.sizes.size() || j == b.sizes.size()) return i == a.sizes.size() && j == b.sizes.size();
    if (a.sizes[i] != b.sizes[j] || a.strides_bytes[i] != b.strides_bytes[j]) return false;
    ++i;
    ++j;
  }
}

bool covers_storage(const Tensor& tensor, int64_t size_bytes) {
  if (size_bytes == 0) return true;
  if (tensor.offset_bytes != 0 || is_empty(tensor)) return false;
  const std::vector<Dimension> dimensions = normalised(tensor);
  if (dimensions.empty()) return size_bytes == 1;
  return dimensions.size() == 1 && dimensions[0].stride_bytes == 1 && dimensions[0].extent == size_bytes;
}

StorageBoxes::StorageBoxes(std::span<const Tensor* const> tensors) {
  std::vector<std::vector<Dimension>> dimensions;
  for (const Tensor* tensor : tensors) {
    dimensions.push_back(normalised(*tensor));
    for (const Dimension& dimension : dimensions.back()) levels_.push_back(dimension.stride_bytes);
  }
  levels_.push_back(1);
  std::sort(levels_.begin(), levels_.end(), std::greater<>());
  levels_.erase(std::unique(levels_.begin(), levels_.end()), levels_.end());
  bool is_lattice = true;
  for (size_t i = 1; i < levels_.size(); ++i) is_lattice = is_lattice && levels_[i - 1] % levels_[i] == 0;
  pieces_.resize(tensors.size());
  for (size_t i = 0; is_lattice && i < tensors.size(); ++i) {
    if (!is_empty(*tensors[i]))
      is_lattice = Splitter(levels_, pieces_[i]).split(tensors[i]->offset_bytes, dimensions[i]);
  }
  if (is_lattice) return;
  levels_ = {1};
  int64_t budget = kMaxRuns;
  for (size_t i = 0; i < tensors.size(); ++i) {
    pieces_[i].clear();
    if (!is_empty(*tensors[i])) pieces_[i] = runs_of(*tensors[i], std::move(dimensions[i]), budget);
  }
}

bool StorageBoxes::overlap(int32_t a, int32_t b) const {
  if (!is_lattice()) {
    auto run = pieces_[a].begin();
    for (const Piece& other : pieces_[b]) {
      while (run != pieces_[a].end() && (*run)[1] <= other[0]) ++run;
      if (run == pieces_[a].end()) return false;
      if ((*run)[0] < other[1]) return true;
    }
    return false;
  }
  for (const Piece& piece : pieces_[a]) {
    for (const Piece& other : pieces_[b]) {
      if (intersect(piece, other)) return true;
    }
  }
  return false;
}

bool StorageBoxes::contains(int32_t outer, int32_t inner) const {
  if (!is_lattice()) {
    auto run = pieces_[outer].begin();
    for (const Piece& piece : pieces_[inner]) {
      while (run != pieces_[outer].end() && (*run)[1] < piece[1]) ++run;
      if (run == pieces_[outer].end() || (*run)[0] > piece[0]) return false;
    }
    return true;
  }
  for (const Piece& piece : pieces_[inner]) {
    if (!covered_by(piece, pieces_[outer])) return false;
  }
  return true;
}

void ByteSet::add_piece(StorageBoxes::Piece piece) {
  // Boxes that together are one become one (patches in order, slices of a stack): the set stays short.
  bool changed = true;
  while (changed) {
    changed = false;
    for (size_t i = pieces_.size(); i-- > 0;) {
      if (!unite(piece, pieces_[i])) continue;
      pieces_.erase(pieces_.begin() + static_cast<std::ptrdiff_t>(i));
      changed = true;
    }
  }
  pieces_.push_back(std::move(piece));
}

void ByteSet::add(int32_t box) {
  for (const StorageBoxes::Piece& piece : boxes_->pieces_[box]) {
    if (boxes_->is_lattice()) {
      add_piece(piece);
      continue;
    }
    int64_t begin = piece[0];
    int64_t end = piece[1];
    auto run = runs_.upper_bound(begin);
    if (run != runs_.begin() && std::prev(run)->second >= begin) --run;
    while (run != runs_.end() && run->first <= end) {
      begin = std::min(begin, run->first);
      end = std::max(end, run->second);
      run = runs_.erase(run);
    }
    runs_[begin] = end;
  }
}

bool ByteSet::covers(int32_t box) const {
  for (const StorageBoxes::Piece& piece : boxes_->pieces_[box]) {
    if (boxes_->is_lattice()) {
      if (!covered_by(piece, pieces_)) return false;
      continue;
    }
    const auto run = runs_.upper_bound(piece[0]);
    if (run == runs_.begin() || std::prev(run)->second < piece[1]) return false;
  }
  return true;
}

bool ByteSet::overlaps(int32_t box) const {
  for (const StorageBoxes::Piece& piece : boxes_->pieces_[box]) {
    if (boxes_->is_lattice()) {
      for (const StorageBoxes::Piece& other : pieces_) {
        if (intersect(piece, other)) return true;
      }
      continue;
    }
    const auto run = runs_.lower_bound(piece[1]);
    if (run != runs_.begin() && std::prev(run)->second > piece[0]) return true;
  }
  return false;
}

}  // namespace splitkern::memory
