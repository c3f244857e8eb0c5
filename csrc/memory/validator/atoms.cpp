// A box becomes a set of rectangles in mixed-radix digits of the byte address: the radices come from the strides of all
// boxes of the storage, so the patches of a joined tensor are one rectangle each, however many rows they have. The
// cuts of all rectangles along each digit span a grid; its cells are sorted by which boxes hold them, by refining one
// partition box after box. Where the strides are no chain of divisors the only digit is the address itself and a
// rectangle is a run of bytes.
#include "memory/validator/atoms.h"

#include <algorithm>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>

namespace splitkern::memory::validation {
namespace {

struct Dim {
  int64_t stride = 1;
  int64_t size = 1;

  auto operator<=>(const Dim&) const = default;
};

// Bytes of a tensor, in logical order: the last dimension is the bytes of an element. Without dimensions of one, and
// neighbours that are one longer dimension are joined, so equal lists of addresses are equal boxes.
struct ByteBox {
  bool is_empty = false;
  int64_t offset = 0;
  std::vector<Dim> dims;

  auto operator<=>(const ByteBox&) const = default;
};

void append(std::vector<Dim>& dims, Dim dim) {
  if (dim.size == 1) return;
  if (!dims.empty() && dims.back().stride == dim.stride * dim.size) {
    dims.back() = {dim.stride, dims.back().size * dim.size};
  } else {
    dims.push_back(dim);
  }
}

ByteBox in_logical_order(const Tensor& tensor) {
  ByteBox box;
  for (const int64_t size : tensor.sizes) box.is_empty |= size == 0;
  if (tensor.element_bytes == 0) box.is_empty = true;
  if (box.is_empty) return box;
  box.offset = tensor.offset_bytes;
  for (size_t d = 0; d < tensor.sizes.size(); ++d) append(box.dims, {tensor.strides_bytes[d], tensor.sizes[d]});
  append(box.dims, {1, tensor.element_bytes});
  return box;
}

// As a set of bytes: descending strides, and what is repeated (stride 0) once.
ByteBox as_set(ByteBox box) {
  std::erase_if(box.dims, [](const Dim& dim) { return dim.stride == 0; });
  std::ranges::stable_sort(box.dims, [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  std::vector<Dim> joined;
  for (const Dim& dim : box.dims) append(joined, dim);
  box.dims = std::move(joined);
  return box;
}

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
};
using Rectangle = std::vector<Range>;  // per digit, lowest first

// Digit k counts multiples of weights[k], up to weights[k + 1]; the highest has no bound.
class Digits {
 public:
  explicit Digits(const std::vector<ByteBox>& boxes) {
    weights_ = {1};
    for (const ByteBox& box : boxes) {
      for (const Dim& dim : box.dims) weights_.push_back(dim.stride);
    }
    std::ranges::sort(weights_);
    weights_.erase(std::unique(weights_.begin(), weights_.end()), weights_.end());
    for (size_t k = 0; k + 1 < weights_.size(); ++k) {
      if (weights_[k + 1] % weights_[k] == 0) continue;
      weights_ = {1};
      break;
    }
  }

  size_t count() const { return weights_.size(); }

  void decompose(const ByteBox& box, std::vector<Rectangle>& out) const {
    if (box.is_empty) return;
    const bool fits =
        std::ranges::all_of(box.dims, [&](const Dim& dim) { return std::ranges::binary_search(weights_, dim.stride); });
    if (fits) {
      split(box, out);
    } else {
      add_runs(box, 0, box.offset, out);
    }
  }

 private:
  // The outer dimensions one by one, the innermost as a run if its bytes are neighbours.
  void add_runs(const ByteBox& box, size_t d, int64_t offset, std::vector<Rectangle>& out) const {
    if (d == box.dims.size()) return split({false, offset, {}}, out);
    const Dim& dim = box.dims[d];
    if (d + 1 == box.dims.size() && dim.stride == 1) return split({false, offset, {dim}}, out);
    for (int64_t i = 0; i < dim.size; ++i) add_runs(box, d + 1, offset + i * dim.stride, out);
  }

  void split(const ByteBox& box, std::vector<Rectangle>& out) const {
    Rectangle ranges(count());
    for (size_t k = 0; k < count(); ++k) {
      const int64_t digit = k + 1 < count() ? box.offset % weights_[k + 1] / weights_[k] : box.offset / weights_[k];
      ranges[k] = {digit, digit + 1};
    }
    for (const Dim& dim : box.dims) {
      const auto k = std::ranges::lower_bound(weights_, dim.stride) - weights_.begin();
      ranges[k].end += dim.size - 1;
    }
    carry(std::move(ranges), 0, out);
  }

  // The addresses are all sums of one multiple of each weight, each from its range. Cuts a range that passes its
  // digit's radix into at most three: the rest of the first turn, whole turns, the last; what is turned over is added
  // to the next digit's range, and the sum of two ranges is a range, also where positions of the box coincide.
  void carry(Rectangle ranges, size_t k, std::vector<Rectangle>& out) const {
    for (; k + 1 < count(); ++k) {
      const int64_t radix = weights_[k + 1] / weights_[k];
      // What a carry from below has shifted past the radix goes up.
      const int64_t shift = ranges[k].begin / radix;
      const Range range = {ranges[k].begin % radix, ranges[k].end - shift * radix};
      ranges[k] = range;
      ranges[k + 1].begin += shift;
      ranges[k + 1].end += shift;
      if (range.end <= radix) continue;
      const int64_t turns = range.end / radix;  // whole ones, the first of them perhaps not from its beginning
      if (range.begin > 0) {
        Rectangle first = ranges;
        first[k].end = radix;
        carry(std::move(first), k + 1, out);
      }
      if (const int64_t begin = range.begin > 0 ? 1 : 0; turns > begin) {
        Rectangle whole = ranges;
        whole[k] = {0, radix};
        whole[k + 1].begin += begin;
        whole[k + 1].end += turns - 1;
        carry(std::move(whole), k + 1, out);
      }
      if (range.end % radix != 0) {
        Rectangle last = ranges;
        last[k] = {0, range.end % radix};
        last[k + 1].begin += turns;
        last[k + 1].end += turns;
        carry(std::move(last), k + 1, out);
      }
      return;
    }
    if (static_cast<int64_t>(out.size()) >= kMostRectangles)
      throw TooComplex("a tensor falls into more than " + std::to_string(kMostRectangles) + " parts");
    out.push_back(std::move(ranges));
  }

  std::vector<int64_t> weights_;
};

// Calls visit with the number of every cell of the grid that the rectangle covers.
template <class Visit>
void for_each_cell(const std::vector<std::vector<int64_t>>& cuts, const Rectangle& rectangle, const Visit& visit) {
  struct Span {
    int64_t begin, end;
  };
  std::vector<Span> spans(cuts.size());
  for (size_t k = 0; k < cuts.size(); ++k) {
    const auto at = [&](int64_t value) { return std::ranges::lower_bound(cuts[k], value) - cuts[k].begin(); };
    spans[k] = {at(rectangle[k].begin), at(rectangle[k].end)};
  }
  const auto walk = [&](const auto& self, size_t k, int64_t cell) -> void {
    if (k == 0) {
      for (int64_t i = spans[0].begin; i < spans[0].end; ++i)
        visit(cell * (static_cast<int64_t>(cuts[0].size()) - 1) + i);
      return;
    }
    for (int64_t i = spans[k].begin; i < spans[k].end; ++i)
      self(self, k - 1, cell * (static_cast<int64_t>(cuts[k].size()) - 1) + i);
  };
  walk(walk, cuts.size() - 1, 0);
}

}  // namespace

bool lies_exactly_on(const Tensor& tensor, const Tensor& other) {
  return in_logical_order(tensor) == in_logical_order(other);
}

Atoms cut_into_atoms(const std::vector<const Tensor*>& tensors) {
  Atoms atoms;
  atoms.of_tensor.resize(tensors.size());
  // Most storages have one box, read and written by several tensors.
  std::map<ByteBox, int32_t> number;
  std::vector<ByteBox> boxes;
  std::vector<int32_t> box_of(tensors.size());
  for (size_t t = 0; t < tensors.size(); ++t) {
    ByteBox box = as_set(in_logical_order(*tensors[t]));
    const auto [entry, is_new] = number.try_emplace(box, static_cast<int32_t>(boxes.size()));
    if (is_new) boxes.push_back(std::move(box));
    box_of[t] = entry->second;
  }
  if (boxes.size() == 1) {
    if (boxes[0].is_empty) return atoms;
    atoms.count = 1;
    for (std::vector<int32_t>& list : atoms.of_tensor) list = {0};
    return atoms;
  }

  const Digits digits(boxes);
  std::vector<Rectangle> rectangles;
  std::vector<size_t> first(boxes.size() + 1, 0);
  for (size_t b = 0; b < boxes.size(); ++b) {
    digits.decompose(boxes[b], rectangles);
    first[b + 1] = rectangles.size();
  }
  std::vector<std::vector<int64_t>> cuts(digits.count());
  int64_t cells = 1;
  for (size_t k = 0; k < cuts.size(); ++k) {
    for (const Rectangle& rectangle : rectangles) cuts[k].insert(cuts[k].end(), {rectangle[k].begin, rectangle[k].end});
    std::ranges::sort(cuts[k]);
    cuts[k].erase(std::unique(cuts[k].begin(), cuts[k].end()), cuts[k].end());
    const int64_t ranges = std::max<int64_t>(static_cast<int64_t>(cuts[k].size()) - 1, 0);
    if (ranges > kMostCells / std::max<int64_t>(cells, 1))
      throw TooComplex("the boxes of one storage span a grid of more than " + std::to_string(kMostCells) + " cells");
    cells *= ranges;
  }

  // Class 0: in no box so far. Cells of one class were in the same boxes so far.
  std::vector<int32_t> class_of(cells, 0);
  std::vector<int32_t> last_box(cells, -1);  // rectangles of one box may overlap
  int32_t classes = 1;
  int64_t visited = 0;
  for (size_t b = 0; b < boxes.size(); ++b) {
    std::unordered_map<int32_t, int32_t> refined;
    for (size_t r = first[b]; r < first[b + 1]; ++r) {
      for_each_cell(cuts, rectangles[r], [&](int64_t cell) {
        if (++visited > 8 * kMostCells) throw TooComplex("the boxes of one storage overlap too often");
        if (last_box[cell] == static_cast<int32_t>(b)) return;
        last_box[cell] = static_cast<int32_t>(b);
        const auto [entry, is_new] = refined.try_emplace(class_of[cell], classes);
        if (is_new) ++classes;
        class_of[cell] = entry->second;
      });
    }
  }
  // Number the classes that are left, in the order in which the boxes meet them.
  std::vector<int32_t> atom_of_class(classes, -1);
  std::vector<std::vector<int32_t>> of_box(boxes.size());
  for (size_t b = 0; b < boxes.size(); ++b) {
    std::vector<int32_t>& list = of_box[b];
    for (size_t r = first[b]; r < first[b + 1]; ++r) {
      for_each_cell(cuts, rectangles[r], [&](int64_t cell) {
        int32_t& atom = atom_of_class[class_of[cell]];
        if (atom < 0) atom = atoms.count++;
        if (list.empty() || list.back() != atom) list.push_back(atom);
      });
    }
    std::ranges::sort(list);
    list.erase(std::unique(list.begin(), list.end()), list.end());
  }
  for (size_t t = 0; t < tensors.size(); ++t) atoms.of_tensor[t] = of_box[box_of[t]];
  return atoms;
}

}  // namespace splitkern::memory::validation
