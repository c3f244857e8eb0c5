// The machine on the CPU, for the tests: the twin of device.h and, through the headers included last, of
// device_mma.h and device_hopper.h. Included by primitives.h alone; machine.h runs the threads.
#pragma once

#include <bit>
#include <cmath>
#include <typeinfo>

#include "kernels/launchers.h"
#include "machine.h"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define SPLITKERN_DEVICE inline
#define SPLITKERN_HOST_DEVICE inline

namespace splitkern::kernels {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline int64_t global_thread_index() {
  const host::Thread& thread = host::current_thread();
  return static_cast<int64_t>(thread.block->index.x) * host::current_launch->block.x + thread.index;
}
inline int64_t global_thread_count() {
  return static_cast<int64_t>(host::current_launch->grid.x) * host::current_launch->block.x;
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

// --- Threads -------------------------------------------------------------------------------------

inline constexpr uint32_t kWarpThreads = host::kWarpThreads;

inline uint32_t thread_index() {
  return host::current_thread().index;
}
inline uint32_t lane_index() {
  return host::current_thread().index % kWarpThreads;
}
inline uint32_t warp_index() {
  return host::current_thread().index / kWarpThreads;
}
inline uint32_t block_threads() {
  return host::current_launch->block.x;
}
inline Dim3 block_index() {
  return host::current_thread().block->index;
}
inline Dim3 grid_extent() {
  return host::current_launch->grid;
}

inline void block_barrier() {
  host::meet_block(0, 0, "block_barrier");
}
inline void warp_barrier() {
  host::meet_warp("warp_barrier", nullptr, true, nullptr);
}
inline void named_barrier(uint32_t barrier, uint32_t threads) {
  host::meet_block(barrier, threads, barrier == 0 ? "block_barrier" : "named_barrier");
}
template <class Value>
Value shuffle(Value value, uint32_t lane) {
  static_assert(sizeof(Value) == 4 || sizeof(Value) == 8);
  host::exchange(&value, sizeof(Value), lane, "shuffle");
  return value;
}
template <class Value>
Value shuffle_xor(Value value, uint32_t mask) {
  static_assert(sizeof(Value) == 4 || sizeof(Value) == 8);
  host::exchange(&value, sizeof(Value), lane_index() ^ mask, "shuffle_xor");
  return value;
}
inline uint32_t ballot(bool predicate) {
  return host::vote(predicate);
}
inline uint32_t count_bits(uint32_t value) {
  return static_cast<uint32_t>(std::popcount(value));
}

// --- Memory --------------------------------------------------------------------------------------

// All bits set, a NaN in every floating-point type, until the block has written it.
template <class Storage>
Storage& dynamic_shared() {
  static_assert(std::is_trivially_copyable_v<Storage> && alignof(Storage) <= 1024);
  return *reinterpret_cast<Storage*>(host::dynamic_shared(sizeof(Storage), typeid(Storage).name()));
}

struct alignas(16) Vector16 {
  uint32_t words[4];
};
struct alignas(8) Vector8 {
  uint32_t words[2];
};
template <class Vector>
Vector load_global(const void* address) {
  host::check_alignment(address, sizeof(Vector), "load_global");
  Vector value;
  __builtin_memcpy(&value, address, sizeof(Vector));
  return value;
}
template <class Vector>
Vector load_global_streaming(const void* address) {
  host::check_alignment(address, sizeof(Vector), "load_global_streaming");
  Vector value;
  __builtin_memcpy(&value, address, sizeof(Vector));
  return value;
}
template <class Vector>
void store_global(void* address, const Vector& value) {
  host::check_alignment(address, sizeof(Vector), "store_global");
  __builtin_memcpy(address, &value, sizeof(Vector));
}
template <class Vector>
void store_global_streaming(void* address, const Vector& value) {
  host::check_alignment(address, sizeof(Vector), "store_global_streaming");
  __builtin_memcpy(address, &value, sizeof(Vector));
}

// --- Elements ------------------------------------------------------------------------------------

template <class T>
T from_bits(uint16_t bits) {
  return T{bits};
}
inline uint16_t to_bits(Half value) {
  return value.bits;
}
inline uint16_t to_bits(BFloat16 value) {
  return value.bits;
}
inline uint32_t float_bits(float value) {
  return std::bit_cast<uint32_t>(value);
}
inline float bits_float(uint32_t bits) {
  return std::bit_cast<float>(bits);
}
template <class T>
uint32_t pack2(float low, float high) {
  return from_accumulator<T>(low).bits | static_cast<uint32_t>(from_accumulator<T>(high).bits) << 16;
}
template <class T>
uint32_t exceeds_mask(uint32_t candidate, uint32_t best) {
  if constexpr (sizeof(T) == 4) {
    const float value = bits_float(candidate);
    return value > bits_float(best) || value != value ? 0xffffffffu : 0u;
  } else {
    uint32_t mask = 0;
    for (int shift = 0; shift < 32; shift += 16) {
      const float value = to_accumulator(T{static_cast<uint16_t>(candidate >> shift)});
      const float other = to_accumulator(T{static_cast<uint16_t>(best >> shift)});
      if (value > other || value != value) mask |= 0xffffu << shift;
    }
    return mask;
  }
}
template <class T>
uint32_t equal_mask(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return a == b ? 0xffffffffu : 0u;
  } else {
    return ((a ^ b) & 0xffffu ? 0u : 0xffffu) | ((a ^ b) >> 16 ? 0u : 0xffff0000u);
  }
}
template <class T>
uint32_t add_lanes(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return float_bits(bits_float(a) + bits_float(b));
  } else {  // fp32 holds enough bits that rounding twice is rounding once (Figueroa 1995)
    const auto lane = [](uint32_t lanes, int shift) {
      return to_accumulator(T{static_cast<uint16_t>(lanes >> shift)});
    };
    return pack2<T>(lane(a, 0) + lane(b, 0), lane(a, 16) + lane(b, 16));
  }
}
// The 13 low bits of the result are zero here; the device leaves them undefined, so nothing may read them.
inline uint32_t to_tf32(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0x7fffffu) == 0 ? bits : 0x7fffffffu & ~0x1fffu;
  return (bits + 0x1000u) & ~0x1fffu;  // adding half a unit to the magnitude: ties go away from zero
}

// --- Launching -----------------------------------------------------------------------------------

namespace host_launch {

template <class Params>
struct Closure {
  void (*kernel)(Params);
  const Params* params;

  static void run(const void* closure) {
    const auto& self = *static_cast<const Closure*>(closure);
    self.kernel(*self.params);
  }
};

template <class Params>
void run(void (*kernel)(Params), Dim3 grid, uint32_t cluster_blocks, Dim3 block, size_t shared_bytes,
         const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 32764);
  const Closure<Params> closure{kernel, &params};
  host::execute({Params::kOperator, grid, block, cluster_blocks, shared_bytes, &Closure<Params>::run, &closure});
}

}  // namespace host_launch

template <class Params>
void launch(void (*kernel)(Params), Dim3 grid, Dim3 block, size_t shared_bytes, cudaStream_t, const Params& params) {
  host_launch::run(kernel, grid, 1, block, shared_bytes, params);
}

}  // namespace splitkern::kernels
