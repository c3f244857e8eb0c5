// The machine on the CPU, for the tests: one thread after another, so there are neither barriers nor
// shared memory. Included by primitives.h alone.
#pragma once

#include <bit>
#include <cmath>

#include "kernels/launchers.h"

#define __global__
#define __grid_constant__
#define SPLITKERN_DEVICE inline
#define SPLITKERN_HOST_DEVICE inline

namespace splitkern::kernels {

struct Dim3 {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
};
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct HostThread {
  int64_t index;
  int64_t count;
};
inline thread_local HostThread host_thread{0, 1};

inline int64_t global_thread_index() {
  return host_thread.index;
}
inline int64_t global_thread_count() {
  return host_thread.count;
}

inline float to_accumulator(float value) {
  return value;
}
inline double to_accumulator(double value) {
  return value;
}
inline float to_accumulator(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline float to_accumulator(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa units of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  const uint32_t wide_exponent = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | (wide_exponent << 23) | (mantissa << 13));
}

template <class T>
T from_accumulator(double value);
template <>
inline double from_accumulator<double>(double value) {
  return value;
}
template <class T>
T from_accumulator(float value);
template <>
inline float from_accumulator<float>(float value) {
  return value;
}
// Both round to nearest, ties to even, as the device's conversions do.
template <>
inline BFloat16 from_accumulator<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Half from_accumulator<Half>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7fff;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    rounded = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which adding 0.5 rounds to
    rounded = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(sign | rounded)};
}

inline float multiply_add(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double multiply_add(double a, double b, double c) {
  return std::fma(a, b, c);
}
inline float square_root(float value) {
  return std::sqrt(value);
}
inline double square_root(double value) {
  return std::sqrt(value);
}

// Threads run in descending order, so that a kernel that relies on an earlier thread shows it.
template <class Params>
void launch(void (*kernel)(Params), Dim3 grid, Dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Params& params) {
  if (shared_bytes != 0 || stream != nullptr || grid.y * grid.z * block.y * block.z != 1) {
    throw std::runtime_error(std::string(Params::kOperator) +
                             ": host execution takes one-dimensional launches without shared memory or stream");
  }
  const int64_t threads = static_cast<int64_t>(grid.x) * block.x;
  for (int64_t index = threads - 1; index >= 0; --index) {
    host_thread = {index, threads};
    kernel(params);
  }
}

}  // namespace splitkern::kernels
