// Which bytes of a storage the strided boxes (Tensor) of it occupy: coverage, overlap and equality, exactly. Called by
// the check of a graph and by storage assignment. The boxes of one storage are written as boxes of one lattice wherever
// their strides allow it (patches, slices, channels, dtype views), else as runs of bytes; never guessed. Tensors are
// assumed to lie inside their storage (require_valid(Graph) checks that first).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "memory/graph.h"

namespace splitkern::memory {

// A size of 0: no bytes.
bool is_empty(const Tensor& tensor);

// One past the last byte of the box, from the start of the storage; offset_bytes where it is empty. Nothing where that
// is beyond int64.
std::optional<int64_t> end_bytes(const Tensor& tensor);

// Whether element (i0, i1, ...) of both begins at the same byte of its storage, for every index, and is as long: what
// an in-place pair must be. Dimensions of size 1 do not count.
bool same_elements(const Tensor& a, const Tensor& b);

// Whether the box has every byte of a storage of this size.
bool covers_storage(const Tensor& tensor, int64_t size_bytes);

// The boxes of one storage over a common lattice. Boxes are named by their position in `tensors`.
class StorageBoxes {
 public:
  // At most this many runs of bytes for boxes whose strides have no common lattice (each a multiple of the next
  // smaller).
  static constexpr int64_t kMaxRuns = int64_t{1} << 22;

  // Throws InvalidArgument where that limit is passed; the text names the tensor.
  explicit StorageBoxes(std::span<const Tensor* const> tensors);

  bool overlap(int32_t a, int32_t b) const;
  bool contains(int32_t outer, int32_t inner) const;
  bool same_bytes(int32_t a, int32_t b) const { return contains(a, b) && contains(b, a); }
  bool is_lattice() const { return levels_.size() > 1; }

 private:
  friend class ByteSet;
  // One interval [begin, end) per level, flat: begin 0, end 0, begin 1, ...
  using Piece = std::vector<int64_t>;

  std::vector<int64_t> levels_;             // strides in bytes, descending, each a multiple of the next; the last is 1
  std::vector<std::vector<Piece>> pieces_;  // per tensor, disjoint
};

// A set of bytes of one storage that grows by whole boxes. It keeps a reference to `boxes`.
class ByteSet {
 public:
  explicit ByteSet(const StorageBoxes& boxes) : boxes_(&boxes) {}

  void add(int32_t box);
  bool covers(int32_t box) const;
  bool overlaps(int32_t box) const;

 private:
  void add_piece(StorageBoxes::Piece piece);

  const StorageBoxes* boxes_;
  std::vector<StorageBoxes::Piece> pieces_;  // with a lattice; may overlap
  std::map<int64_t, int64_t> runs_;          // without: begin to end, disjoint, apart from each other
};

}  // namespace splitkern::memory
