// Cuts the bytes of a storage into atoms: the coarsest parts of which every tensor of the storage consists of whole
// ones. What is then said of an atom holds for each of its bytes. Exact for every strided box. Internal to the
// validator; the boxes lie inside the storage and their strides are not negative (graph.h).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "memory/graph.h"

namespace splitkern::memory::validation {

// Bounds of the work that irregular boxes may make; a plan that needs more is refused, never guessed at.
inline constexpr int64_t kMostRectangles = int64_t{1} << 21;
inline constexpr int64_t kMostCells = int64_t{1} << 23;

class TooComplex : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Atoms {
  int32_t count = 0;
  std::vector<std::vector<int32_t>> of_tensor;  // sorted; in the order of the tensors given
};

// Throws TooComplex.
Atoms cut_into_atoms(const std::vector<const Tensor*>& tensors);

// Whether element i of one tensor begins where element i of the other begins, for every i, and they are as long.
bool lies_exactly_on(const Tensor& tensor, const Tensor& other);

}  // namespace splitkern::memory::validation
