// Division by a constant of the launch as a multiplication. Used by the kernels of this folder for index arithmetic.
#pragma once

#include "../primitives.h"

namespace splitkern::kernels::nhwc {

struct FastDivisor {
  uint32_t divisor;
  uint32_t magic;
  uint32_t shift;
};

// For divisors 1 .. 2^31 and numerators below 2^31: with s = ceil(log2 d) and m = floor(2^32 (2^s - d) / d) + 1,
// n / d = (floor(n m / 2^32) + n) >> s (Granlund and Montgomery, PLDI 1994, figure 4.1).
inline FastDivisor fast_divisor(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
  const uint64_t magic = (excess << 32) / static_cast<uint64_t>(divisor) + 1;
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(magic), shift};
}

SPLITKERN_DEVICE uint32_t divide(uint32_t numerator, const FastDivisor& by) {
  const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(numerator) * by.magic) >> 32);
  return (high + numerator) >> by.shift;
}
// Also for negative numerators, rounded down.
SPLITKERN_DEVICE int32_t divide_down(int32_t numerator, const FastDivisor& by) {
  return numerator >= 0 ? static_cast<int32_t>(divide(static_cast<uint32_t>(numerator), by))
                        : -1 - static_cast<int32_t>(divide(static_cast<uint32_t>(-1 - numerator), by));
}

}  // namespace splitkern::kernels::nhwc
