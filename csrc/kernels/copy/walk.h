// From the index of a unit to its place in strided memory, and chunks of units in shared memory. Used by the kernels of
// this folder, a warp at a time.
#pragma once

#include <cstring>
#include <utility>

#include "../primitives.h"
#include "params.h"

namespace splitkern::kernels {

// function(std::integral_constant<int, i>) for i = 0 .. kCount - 1, written out: arrays indexed by decltype(i)::value
// stay in registers, whatever the compiler thinks of unrolling.
template <class Function, int... kIndices>
SPLITKERN_DEVICE void for_each_index(std::integer_sequence<int, kIndices...>, Function&& function) {
  (function(std::integral_constant<int, kIndices>{}), ...);
}
template <int kCount, class Function>
SPLITKERN_DEVICE void unrolled(Function&& function) {
  for_each_index(std::make_integer_sequence<int, kCount>{}, function);
}

template <int kBytes>
struct UnitOf;
template <>
struct UnitOf<1> {
  using Type = uint8_t;
};
template <>
struct UnitOf<2> {
  using Type = uint16_t;
};
template <>
struct UnitOf<4> {
  using Type = uint32_t;
};
template <>
struct UnitOf<8> {
  using Type = Vector8;
};
template <>
struct UnitOf<16> {
  using Type = Vector16;
};

// Offsets in units.
struct UnitPosition {
  int64_t device;
  int64_t host;
};

SPLITKERN_DEVICE uint32_t divide(uint32_t dividend, const Divider& divider) {
  return static_cast<uint32_t>((static_cast<uint64_t>(dividend) * divider.multiplier) >> divider.shift);
}

// At least one dimension; `index` below the count.
SPLITKERN_DEVICE UnitPosition locate(const UnitWalk& walk, int64_t index) {
  UnitPosition position{0, 0};
  if (walk.wide) {
    int64_t rest = index;
    SPLITKERN_ROLLED
    for (int32_t dim = walk.dims - 1; dim > 0; --dim) {
      const int64_t quotient = rest / walk.extents[dim];
      const int64_t coordinate = rest - quotient * walk.extents[dim];
      position.device += coordinate * walk.device_strides[dim];
      position.host += coordinate * walk.host_strides[dim];
      rest = quotient;
    }
    position.device += rest * walk.device_strides[0];
    position.host += rest * walk.host_strides[0];
    return position;
  }
  uint32_t rest = static_cast<uint32_t>(index);
  SPLITKERN_ROLLED
  for (int32_t dim = walk.dims - 1; dim > 0; --dim) {
    const uint32_t quotient = divide(rest, walk.dividers[dim]);
    const uint32_t coordinate = rest - quotient * static_cast<uint32_t>(walk.extents[dim]);
    position.device += coordinate * walk.device_strides[dim];
    position.host += coordinate * walk.host_strides[dim];
    rest = quotient;
  }
  position.device += rest * walk.device_strides[0];
  position.host += rest * walk.host_strides[0];
  return position;
}

// --- Staging: a warp's chunk of consecutive units in shared memory --------------------------------------------------

inline constexpr int kStagedBytes = 4096;
inline constexpr int kStagedVectors = kStagedBytes / 16 / static_cast<int>(kWarpThreads);  // per lane

// Bytes in shared memory as a value; the address is a multiple of its size.
template <class Value>
SPLITKERN_DEVICE Value read_staged(const unsigned char* address) {
  Value value;
  memcpy(&value, __builtin_assume_aligned(address, sizeof(Value)), sizeof(Value));
  return value;
}
template <class Value>
SPLITKERN_DEVICE void write_staged(unsigned char* address, const Value& value) {
  memcpy(__builtin_assume_aligned(address, sizeof(Value)), &value, sizeof(Value));
}

template <int kUnit>
inline constexpr int kUnitsInFlight = kUnit <= 2 ? 8 : 4;  // per lane

// The units from `first` on, from the device into `staged`; zeros behind the last one.
template <int kUnit>
SPLITKERN_DEVICE void gather(const UnitWalk& walk, const char* device, int64_t first, unsigned char* staged) {
  using Unit = typename UnitOf<kUnit>::Type;
  constexpr int kFlight = kUnitsInFlight<kUnit>;
  SPLITKERN_ROLLED
  for (uint32_t begin = lane_index(); begin < kStagedBytes / kUnit; begin += kFlight * kWarpThreads) {
    Unit loaded[kFlight];
    unrolled<kFlight>([&](auto step) {
      const int64_t index = first + begin + decltype(step)::value * kWarpThreads;
      loaded[decltype(step)::value] =
          index < walk.count ? load_global_streaming<Unit>(device + locate(walk, index).device * kUnit) : Unit{};
    });
    unrolled<kFlight>([&](auto step) {
      write_staged<Unit>(staged + (begin + decltype(step)::value * kWarpThreads) * kUnit,
                         loaded[decltype(step)::value]);
    });
  }
}

// The other way; offset(index) is the unit's place on the device.
template <int kUnit, class Offset>
SPLITKERN_DEVICE void scatter(const unsigned char* staged, int64_t first, int64_t count, char* device,
                              Offset&& offset) {
  using Unit = typename UnitOf<kUnit>::Type;
  SPLITKERN_ROLLED
  for (uint32_t unit = lane_index(); unit < kStagedBytes / kUnit && first + unit < count; unit += kWarpThreads) {
    store_global_streaming<Unit>(device + offset(first + unit) * kUnit, read_staged<Unit>(staged + unit * kUnit));
  }
}

// --- On the host
// ------------------------------------------------------------------------------------------------------

inline Divider divider_of(int64_t divisor) {
  uint32_t log2 = 0;
  while ((int64_t{1} << log2) < divisor) ++log2;
  const uint32_t shift = 31 + log2;
  // Rounded up: the error times any dividend below 2^31 stays below 2^shift. Fits, for divisor > 2^(log2 - 1).
  const uint64_t multiplier = ((uint64_t{1} << shift) + static_cast<uint64_t>(divisor) - 1) / divisor;
  return {static_cast<uint32_t>(multiplier), shift};
}

// Fills in what follows from extents: count, width and dividers.
inline void complete(UnitWalk& walk) {
  walk.count = 1;
  for (int32_t dim = 0; dim < walk.dims; ++dim) walk.count *= walk.extents[dim];
  walk.wide = walk.count > (int64_t{1} << 31) - 64;  // a thread may step a few indices past the end
  for (int32_t dim = 0; dim < walk.dims && walk.count > 0 && !walk.wide; ++dim)
    walk.dividers[dim] = divider_of(walk.extents[dim]);
}

}  // namespace splitkern::kernels
