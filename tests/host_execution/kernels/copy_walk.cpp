// Where the copy kernels find a unit: both widths of index arithmetic, against counting.
#include <algorithm>

#include "check.h"
#include "kernels/copy/walk.h"

using namespace splitkern::kernels;

namespace {

UnitWalk walk_of(std::initializer_list<int64_t> extents) {
  UnitWalk walk{};
  int64_t step = 3;
  for (const int64_t extent : extents) {
    walk.extents[walk.dims] = extent;
    walk.device_strides[walk.dims] = step;
    walk.host_strides[walk.dims] = 7 * step + 1;
    step = step * 5 + 2;
    ++walk.dims;
  }
  complete(walk);
  return walk;
}

// From the coordinates, innermost first.
UnitPosition counted(const UnitWalk& walk, int64_t index) {
  UnitPosition position{0, 0};
  for (int32_t dim = walk.dims - 1; dim >= 0; --dim) {
    position.device += index % walk.extents[dim] * walk.device_strides[dim];
    position.host += index % walk.extents[dim] * walk.host_strides[dim];
    index /= walk.extents[dim];
  }
  return position;
}

void compare(const UnitWalk& walk, int64_t index) {
  const UnitPosition expected = counted(walk, index);
  const UnitPosition found = locate(walk, index);
  check::equal(found.device, expected.device, "device offset of " + std::to_string(index));
  check::equal(found.host, expected.host, "host offset of " + std::to_string(index));
}

CHECK_NAMED(narrow_walks, "a copy walk of fewer than 2^31 units divides by multiplying") {
  for (const UnitWalk& walk : {walk_of({1}), walk_of({1000003}), walk_of({3, 5, 7, 11}), walk_of({46337, 46327}),
                               walk_of({2, 1073741783}), walk_of({1073741783, 2}), walk_of({64, 1, 1024, 1, 3})}) {
    check::require(!walk.wide, "narrow");
    const int64_t step = walk.count / 100000 + 1;
    for (int64_t index = 0; index < walk.count; index += step) compare(walk, index);
    for (int64_t index = std::max<int64_t>(0, walk.count - 1000); index < walk.count; ++index) compare(walk, index);
  }
}

CHECK_NAMED(wide_walks, "a copy walk of 2^31 units and more uses 64-bit indices") {
  for (const UnitWalk& walk :
       {walk_of({int64_t{1} << 33}), walk_of({3, 1073741783}), walk_of({1073741783, 3}), walk_of({70000, 3, 70001})}) {
    check::require(walk.wide, "wide");
    const int64_t step = walk.count / 100000 + 1;
    for (int64_t index = 0; index < walk.count; index += step) compare(walk, index);
    for (int64_t index = walk.count - 1000; index < walk.count; ++index) compare(walk, index);
  }
}

CHECK_NAMED(narrow_dividers, "the multipliers of a narrow walk are exact for every divisor at the ends of its range") {
  for (int64_t divisor = 1; divisor < (int64_t{1} << 31); divisor += divisor / 3000 + 1) {
    const Divider divider = divider_of(divisor);
    for (const int64_t dividend :
         {int64_t{0}, divisor - 1, divisor, (int64_t{1} << 31) - 1, ((int64_t{1} << 31) - 1) / divisor * divisor,
          ((int64_t{1} << 31) - 1) / divisor * divisor - 1}) {
      check::equal(divide(static_cast<uint32_t>(dividend), divider), dividend / divisor,
                   std::to_string(dividend) + " / " + std::to_string(divisor));
    }
  }
}

}  // namespace
