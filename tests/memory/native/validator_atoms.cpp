// Checks of how the validator cuts a storage into atoms, against lists of bytes.
#include "memory/validator/atoms.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "memory/native/random_numbers.h"
#include "native/check.h"

using namespace splitkern::memory;
using namespace splitkern::memory::validation;

namespace {

std::vector<int64_t> bytes_of(const Tensor& tensor) {
  std::vector<int64_t> all = {tensor.offset_bytes};
  for (size_t d = 0; d < tensor.sizes.size(); ++d) {
    std::vector<int64_t> next;
    for (const int64_t byte : all) {
      for (int64_t i = 0; i < tensor.sizes[d]; ++i) next.push_back(byte + i * tensor.strides_bytes[d]);
    }
    all = next;
  }
  std::vector<int64_t> bytes;
  for (const int64_t byte : all) {
    for (int64_t i = 0; i < tensor.element_bytes; ++i) bytes.push_back(byte + i);
  }
  return bytes;
}

Tensor box(int64_t offset, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t element = 1) {
  return {"t", 0, offset, std::move(sizes), std::move(strides), element};
}

Atoms cut(const std::vector<Tensor>& tensors) {
  std::vector<const Tensor*> pointers;
  for (const Tensor& tensor : tensors) pointers.push_back(&tensor);
  return cut_into_atoms(pointers);
}

// Bytes that the same tensors hold are one atom; there are no others.
void require_exact(const std::vector<Tensor>& tensors, const std::string& what) {
  const Atoms atoms = cut(tensors);
  std::map<int64_t, std::set<size_t>> holders;
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (const int64_t byte : bytes_of(tensors[t])) holders[byte].insert(t);
  }
  std::set<std::set<size_t>> kinds;
  for (const auto& [byte, set] : holders) kinds.insert(set);
  check::equal(atoms.count, kinds.size(), what + ": atoms");
  std::vector<std::set<size_t>> holders_of(atoms.count);
  for (size_t t = 0; t < tensors.size(); ++t) {
    const std::vector<int32_t>& list = atoms.of_tensor[t];
    check::require(std::ranges::is_sorted(list) && std::ranges::adjacent_find(list) == list.end(), what + ": sorted");
    for (const int32_t atom : list) holders_of.at(atom).insert(t);
  }
  check::require(std::set(holders_of.begin(), holders_of.end()) == kinds, what + ": which tensors hold an atom");
}

}  // namespace

CHECK_NAMED(atoms_patches, "validator: the patches of a large joined tensor are one atom each") {
  // NCHW, 64 × 64 × 112 × 112 of 4 bytes, cut 4 × 4, and all of it as one run; channels last too.
  for (const bool last : {false, true}) {
    const int64_t n = 64, c = 64, h = 112, w = 112, e = 4;
    const std::vector<int64_t> strides = last ? std::vector<int64_t>{h * w * c * e, e, w * c * e, c * e}
                                              : std::vector<int64_t>{c * h * w * e, h * w * e, w * e, e};
    std::vector<Tensor> tensors = {box(0, {n * c * h * w}, {e}, e)};
    const std::vector<int64_t> cuts = {0, 29, 56, 83, 112};
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        tensors.push_back(box(cuts[i] * strides[2] + cuts[j] * strides[3],
                              {n, c, cuts[i + 1] - cuts[i], cuts[j + 1] - cuts[j]}, strides, e));
      }
    }
    const Atoms atoms = cut(tensors);
    check::equal(atoms.count, 16, "atoms");
    check::equal(atoms.of_tensor[0].size(), 16, "atoms of the whole");
    std::set<int32_t> different;
    for (size_t t = 1; t < tensors.size(); ++t) {
      check::equal(atoms.of_tensor[t].size(), 1, "atoms of a patch");
      different.insert(atoms.of_tensor[t][0]);
    }
    check::equal(different.size(), 16, "different patches");
  }
}

CHECK_NAMED(atoms_random, "validator: atoms of random boxes, as by bytes") {
  random_numbers::Random random(11);
  for (int round = 0; round < 1500; ++round) {
    std::vector<Tensor> tensors;
    const int64_t element = random.between(1, 3);
    // A storage of up to four digits, regular boxes of it, sometimes anything.
    std::vector<int64_t> extents;
    for (int64_t d = random.between(1, 4); d > 0; --d) extents.push_back(random.between(1, 4));
    for (int64_t count = random.between(1, 5); count > 0; --count) {
      if (random.chance(0.15)) {
        Tensor any = box(random.below(9), {}, {}, random.between(0, 2));
        for (int64_t d = random.between(0, 3); d > 0; --d) {
          any.sizes.push_back(random.between(random.chance(0.1) ? 0 : 1, 4));
          any.strides_bytes.push_back(random.below(9));
        }
        tensors.push_back(any);
        continue;
      }
      Tensor part = box(0, {}, {}, element);
      int64_t stride = element;
      for (size_t d = extents.size(); d-- > 0;) {
        const int64_t begin = random.chance(0.4) ? 0 : random.below(extents[d]);
        const int64_t size = begin == 0 && random.chance(0.6) ? extents[d] : random.between(1, extents[d] - begin);
        part.offset_bytes += begin * stride;
        part.sizes.insert(part.sizes.begin(), size);
        part.strides_bytes.insert(part.strides_bytes.begin(), stride);
        stride *= extents[d];
      }
      // Runs across rows, and every second element.
      if (random.chance(0.2)) part = box(random.below(stride), {random.between(1, stride)}, {element}, element);
      if (random.chance(0.1)) part.strides_bytes.back() *= 2;
      tensors.push_back(part);
    }
    require_exact(tensors, "round " + std::to_string(round));
  }
}

CHECK_NAMED(atoms_positions, "validator: whether a tensor lies exactly on another, as by lists of bytes") {
  random_numbers::Random random(12);
  int64_t same = 0;
  for (int round = 0; round < 20000; ++round) {
    const auto draw = [&] {
      Tensor tensor = box(random.below(2), {}, {}, random.between(1, 2));
      for (int64_t d = random.between(0, 3); d > 0; --d) {
        tensor.sizes.push_back(random.between(1, 2));
        tensor.strides_bytes.push_back(random.below(5));
      }
      return tensor;
    };
    const Tensor a = draw();
    const Tensor b = draw();
    const bool expected = bytes_of(a) == bytes_of(b);
    same += expected ? 1 : 0;
    check::require(lies_exactly_on(a, b) == expected, "round " + std::to_string(round));
  }
  check::require(same > 500, "cases that lie on each other");
}

CHECK_NAMED(atoms_bounds, "validator: boxes that are too irregular are refused, not guessed at") {
  // Strides that do not divide each other: single bytes, and too many of them.
  check::refuses([] { cut({box(0, {int64_t{1} << 22}, {3}), box(0, {int64_t{1} << 22}, {2})}); }, {"more than"});
}
