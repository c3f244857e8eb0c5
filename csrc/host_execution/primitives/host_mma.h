// The twin of device_mma.h: asynchronous copies, fragments and warp-wide products. Included by primitives.h
// alone; fragments.cpp implements it.
#pragma once

#include "host.h"

namespace splitkern::host {

void copy_async(void* shared, const void* global, uint32_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(uint32_t pending);
void load_matrix(uint32_t (&registers)[4], const void* row, bool transposed);
void store_matrix(void* row, const uint32_t (&registers)[4], bool transposed);

enum class Operand : int32_t { kHalf, kBFloat16, kTf32 };
void mma(Operand operand, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <class T>
inline constexpr Operand kOperand = Operand::kHalf;
template <>
inline constexpr Operand kOperand<kernels::BFloat16> = Operand::kBFloat16;

}  // namespace splitkern::host

namespace splitkern::kernels {

inline uint32_t shared_address(const void* shared) {
  return host::shared_address(shared, 0, "shared_address");
}

// The destination holds poison until this thread's wait, even where the copy is of zeros.
template <int kBytes>
void copy_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  host::copy_async(shared, global, kBytes, valid);
}
inline void copy_async_commit() {
  host::copy_async_commit();
}
template <int kPending>
void copy_async_wait() {
  host::copy_async_wait(kPending);
}

inline void load_matrix_x4(uint32_t (&registers)[4], const void* row) {
  host::load_matrix(registers, row, false);
}
inline void load_matrix_x4_transposed(uint32_t (&registers)[4], const void* row) {
  host::load_matrix(registers, row, true);
}

template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  host::mma(host::kOperand<T>, d, a, b);
}
inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::mma(host::Operand::kTf32, d, a, b);
}

}  // namespace splitkern::kernels
