// Everything that touches the machine: CUDA headers and builtins, PTX, element types, launching. Kernels
// include no other system header. SPLITKERN_HOST_EXECUTION selects a second implementation, in
// csrc/host_execution/primitives, that runs the same kernel source on the CPU for the tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <source_location>
#include <stdexcept>
#include <string>

#ifndef SPLITKERN_HOST_EXECUTION
#include "primitives/device.h"
#include "primitives/device_copy.h"
#include "primitives/device_hopper.h"
#include "primitives/device_mma.h"
#else
#include "host_execution/primitives/host_copy.h"
#include "host_execution/primitives/host_hopper.h"
#endif

namespace splitkern::kernels {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::Type;

template <class Value>
SPLITKERN_DEVICE bool is_nan(Value value) {
  return value != value;
}

}  // namespace splitkern::kernels
