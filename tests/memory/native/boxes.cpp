// Checks of strided boxes against a bitmap of their bytes.
#include "memory/boxes.h"

#include <algorithm>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "memory/errors.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

using Bitmap = std::vector<bool>;

Tensor box(int64_t offset, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t element_bytes = 1) {
  return {.name = "box",
          .storage = 0,
          .offset_bytes = offset,
          .sizes = std::move(sizes),
          .strides_bytes = std::move(strides),
          .element_bytes = element_bytes};
}

std::string text_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "box at " << tensor.offset_bytes << " of " << tensor.element_bytes << " bytes:";
  for (size_t i = 0; i < tensor.sizes.size(); ++i) text << " " << tensor.sizes[i] << "*" << tensor.strides_bytes[i];
  return text.str();
}

// Byte by byte, in order of the elements.
std::vector<int64_t> bytes_in_order(const Tensor& tensor) {
  std::vector<int64_t> begins{tensor.offset_bytes};
  for (size_t i = 0; i < tensor.sizes.size(); ++i) {
    std::vector<int64_t> next;
    for (const int64_t begin : begins) {
      for (int64_t k = 0; k < tensor.sizes[i]; ++k) next.push_back(begin + k * tensor.strides_bytes[i]);
    }
    begins = std::move(next);
  }
  return begins;
}

Bitmap bitmap_of(const Tensor& tensor, int64_t size) {
  Bitmap bitmap(size);
  for (const int64_t begin : bytes_in_order(tensor)) {
    for (int64_t k = 0; k < tensor.element_bytes; ++k) bitmap.at(begin + k) = true;
  }
  return bitmap;
}

bool is_subset(const Bitmap& inner, const Bitmap& outer) {
  for (size_t i = 0; i < inner.size(); ++i) {
    if (inner[i] && !outer[i]) return false;
  }
  return true;
}

bool intersect(const Bitmap& a, const Bitmap& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] && b[i]) return true;
  }
  return false;
}

// Both must be equal; the text is made only where they are not.
void same(bool actual, bool expected, const char* what, const Tensor& a, const Tensor* b = nullptr) {
  if (actual != expected) check::equal(actual, expected, text_of(a) + (b ? " and " + text_of(*b) : "") + ": " + what);
}

using Random = std::mt19937_64;
int64_t pick(Random& random, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
}

// A contiguous tensor of up to four dimensions, in a random order of its dimensions.
Tensor random_parent(Random& random) {
  const int64_t rank = pick(random, 1, 4);
  const int64_t element_bytes = int64_t{1} << pick(random, 0, 2);
  std::vector<int64_t> sizes(rank), strides(rank), order(rank);
  for (int64_t i = 0; i < rank; ++i) {
    sizes[i] = pick(random, 1, 5);
    order[i] = i;
  }
  std::shuffle(order.begin(), order.end(), random);
  int64_t bytes = element_bytes;
  for (const int64_t i : order) {
    strides[i] = bytes;
    bytes *= sizes[i];
  }
  return box(0, sizes, strides, element_bytes);
}

// Slices, steps, flattened runs, broadcasts, bytes of elements, windows: what views of a tensor are.
Tensor random_view(Random& random, const Tensor& parent, int64_t size) {
  Tensor view = parent;
  switch (pick(random, 0, 7)) {
    case 0: {  // a run of elements, as a flattened slice is
      const int64_t count = size / parent.element_bytes;
      const int64_t begin = pick(random, 0, count - 1);
      return box(begin * parent.element_bytes, {pick(random, 0, count - begin)}, {parent.element_bytes},
                 parent.element_bytes);
    }
    case 1: {  // windows that overlap
      const int64_t step = pick(random, 1, 3) * parent.element_bytes;
      const int64_t width = pick(random, 1, 4);
      const int64_t room = size - width * parent.element_bytes;
      if (room < 0) return view;
      return box(0, {room / step + 1, width}, {step, parent.element_bytes}, parent.element_bytes);
    }
    case 2: {  // anything at all
      Tensor any = box(pick(random, 0, size - 1), {}, {}, 1);
      int64_t left = size - 1 - any.offset_bytes;
      for (int64_t k = pick(random, 0, 3); k > 0; --k) {
        const int64_t stride = pick(random, 0, std::min<int64_t>(left, 12));
        const int64_t extent =
            stride == 0 ? pick(random, 1, 3) : pick(random, 1, std::min<int64_t>(left / stride + 1, 4));
        any.sizes.push_back(extent);
        any.strides_bytes.push_back(stride);
        left -= (extent - 1) * stride;
      }
      return any;
    }
    default:
      break;
  }
  for (size_t i = 0; i < view.sizes.size(); ++i) {
    if (pick(random, 0, 2) == 0) continue;
    const int64_t begin = pick(random, 0, view.sizes[i] - 1);
    const int64_t step = pick(random, 0, 3) == 0 ? 2 : 1;
    view.offset_bytes += begin * view.strides_bytes[i];
    view.sizes[i] = pick(random, pick(random, 0, 8) == 0 ? 0 : 1, (view.sizes[i] - begin + step - 1) / step);
    view.strides_bytes[i] *= step;
  }
  if (view.element_bytes > 1 && pick(random, 0, 4) == 0) {  // a view of half the element
    view.element_bytes /= 2;
    view.offset_bytes += pick(random, 0, 1) * view.element_bytes;
  }
  if (pick(random, 0, 4) == 0) {  // a broadcast
    view.sizes.push_back(pick(random, 1, 3));
    view.strides_bytes.push_back(0);
  }
  return view;
}

}  // namespace

CHECK_NAMED(boxes_random, "boxes: coverage, overlap and equality as a bitmap has them, on random boxes") {
  Random random(20240501);
  int lattices = 0;
  int runs = 0;
  int covered = 0;
  for (int round = 0; round < 2000; ++round) {
    const Tensor parent = random_parent(random);
    const int64_t size = *end_bytes(parent);
    std::vector<Tensor> tensors{parent};
    for (int64_t k = pick(random, 1, 6); k > 0; --k) tensors.push_back(random_view(random, parent, size));
    std::vector<Bitmap> bitmaps;
    std::vector<const Tensor*> pointers;
    for (const Tensor& tensor : tensors) {
      bitmaps.push_back(bitmap_of(tensor, size));
      pointers.push_back(&tensor);
      const auto last = std::find(bitmaps.back().rbegin(), bitmaps.back().rend(), true);
      same(is_empty(tensor), last == bitmaps.back().rend(), "empty", tensor);
      if (!is_empty(tensor)) same(*end_bytes(tensor) == bitmaps.back().rend() - last, true, "end", tensor);
      same(covers_storage(tensor, size), bitmaps.back() == Bitmap(size, true), "covers all", tensor);
    }
    const StorageBoxes boxes(pointers);
    (boxes.is_lattice() ? lattices : runs) += 1;
    const auto count = static_cast<int32_t>(tensors.size());
    for (int32_t a = 0; a < count; ++a) {
      for (int32_t b = 0; b < count; ++b) {
        const Tensor& first = tensors[a];
        const Tensor& second = tensors[b];
        same(boxes.overlap(a, b), intersect(bitmaps[a], bitmaps[b]), "overlap", first, &second);
        same(boxes.contains(a, b), is_subset(bitmaps[b], bitmaps[a]), "contains", first, &second);
        same(boxes.same_bytes(a, b), bitmaps[a] == bitmaps[b], "same bytes", first, &second);
        if (!is_empty(first) && same_elements(first, second))
          same(bytes_in_order(first) == bytes_in_order(second), true, "same elements", first, &second);
      }
    }
    // A set that grows, in random order and without the parent.
    ByteSet set(boxes);
    Bitmap bytes(size);
    for (int step = 0; step < 5; ++step) {
      const auto added = static_cast<int32_t>(pick(random, 1, count - 1));
      set.add(added);
      for (int64_t i = 0; i < size; ++i) bytes[i] = bytes[i] || bitmaps[added][i];
      for (int32_t b = 0; b < count; ++b) {
        same(set.covers(b), is_subset(bitmaps[b], bytes), "covered by the set", tensors[b]);
        same(set.overlaps(b), intersect(bitmaps[b], bytes), "overlaps the set", tensors[b]);
        covered += set.covers(b) && !is_empty(tensors[b]);
      }
    }
  }
  // All paths were taken often.
  check::require(lattices > 500 && runs > 500 && covered > 4000, std::to_string(lattices) + " lattices, " +
                                                                     std::to_string(runs) + " runs, " +
                                                                     std::to_string(covered) + " covered");
}

CHECK_NAMED(boxes_elements, "boxes: dimensions of size 1 do not tell boxes apart, order and element size do") {
  check::require(same_elements(box(8, {2, 1, 3}, {12, 7, 4}, 4), box(8, {2, 3}, {12, 4}, 4)), "size 1");
  check::require(!same_elements(box(0, {2, 3}, {12, 4}, 4), box(0, {3, 2}, {4, 12}, 4)), "transposed");
  check::require(!same_elements(box(0, {2, 6}, {12, 2}, 2), box(0, {2, 3}, {12, 4}, 4)), "element size");
  check::require(!same_elements(box(0, {2}, {4}, 4), box(4, {2}, {4}, 4)), "offset");
  check::require(!same_elements(box(0, {2, 3}, {12, 4}, 4), box(0, {2}, {12}, 4)), "a dimension more");
}

CHECK_NAMED(boxes_touching_runs, "boxes: without a lattice, runs that touch are one") {
  // Runs of two bytes at 0, 4, 6 and 10.
  const Tensor runs = box(0, {2, 2}, {6, 4}, 2);
  const Tensor middle = box(4, {4}, {1});
  const Tensor beyond = box(4, {5}, {1});
  const std::vector<const Tensor*> pointers{&runs, &middle, &beyond};
  const StorageBoxes boxes(pointers);
  check::require(!boxes.is_lattice(), "no lattice");
  check::require(boxes.contains(0, 1) && !boxes.contains(0, 2) && boxes.overlap(0, 2), "4 to 8, and not 9");
}

CHECK_NAMED(boxes_patches, "boxes: the patches of a joined tensor cover it, in any order, without runs") {
  // 32 images of 64 channels and 56×56: as runs of bytes these would be millions.
  const int64_t row = 56 * 4, channel = 56 * row, image = 64 * channel;
  std::vector<Tensor> tensors{box(0, {32, 64, 56, 56}, {image, channel, row, 4}, 4)};
  for (int64_t y = 0; y < 4; ++y) {
    for (int64_t x = 0; x < 4; ++x)
      tensors.push_back(box(y * 14 * row + x * 14 * 4, {32, 64, 14, 14}, {image, channel, row, 4}, 4));
  }
  std::vector<const Tensor*> pointers;
  for (const Tensor& tensor : tensors) pointers.push_back(&tensor);
  const StorageBoxes boxes(pointers);
  check::require(boxes.is_lattice(), "a lattice");
  Random random(7);
  for (int round = 0; round < 20; ++round) {
    std::vector<int32_t> order(16);
    for (int32_t i = 0; i < 16; ++i) order[i] = i + 1;
    std::shuffle(order.begin(), order.end(), random);
    ByteSet set(boxes);
    for (const int32_t patch : order) {
      check::require(!set.overlaps(patch) && !set.covers(0), "not yet");
      set.add(patch);
    }
    check::require(set.covers(0), "covered");
  }
}

CHECK_NAMED(boxes_bounds, "boxes: ends beyond 64 bits and more runs than allowed are told") {
  constexpr int64_t kHuge = int64_t{1} << 62;
  check::require(!end_bytes(box(0, {3}, {kHuge}, 1)), "product");
  check::require(!end_bytes(box(kHuge, {2, 2}, {kHuge, 1}, 1)), "sum");
  check::equal(*end_bytes(box(5, {0, 3}, {kHuge, kHuge}, 4)), 5, "end of an empty box");
  // Strides 7 and 5 have no common lattice; 3000·3000 runs are too many.
  const Tensor diagonal = box(0, {3000, 3000}, {70001, 10}, 1);
  const Tensor other = box(0, {3000, 3000}, {50001, 10}, 1);
  const std::vector<const Tensor*> pointers{&diagonal, &other};
  check::refuses([&] { StorageBoxes{pointers}; }, {"\"box\"", "lattice", "4194304"});
}
