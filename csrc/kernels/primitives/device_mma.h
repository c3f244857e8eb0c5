// What GPUs since compute capability 8.0 have: asynchronous 16-byte copies into shared memory, matrix
// fragments, warp-wide matrix products. Included by primitives.h alone.
#pragma once

#include "device.h"

namespace splitkern::kernels {

SPLITKERN_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- Asynchronous copies --------------------------------------------------------------------------

// kBytes (4, 8 or 16) from global to shared memory, both aligned to kBytes; zeros where not `valid`, and
// then `global` is not read (it must still be a plausible pointer: pass the tensor's base).
template <int kBytes>
SPLITKERN_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const uint32_t bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}
// Closes the group of this thread's copies since the last commit.
SPLITKERN_DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's groups are under way. Other threads' copies: a barrier after it.
template <int kPending>
SPLITKERN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- Fragments ------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix i / 8 (16 bytes,
// aligned); register m of lane i receives elements (row i / 4, columns 2 * (i % 4) and the next) of matrix m.
SPLITKERN_DEVICE void load_matrix_x4(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each matrix transposed: register m of lane i receives (rows 2 * (i % 4) and the next, column i / 4).
SPLITKERN_DEVICE void load_matrix_x4_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// --- Products -------------------------------------------------------------------------------------

// d[16][8] += a[16][16] * b[16][8], fp32 accumulation, T = Half or BFloat16. With group = lane / 4 and
// pair = 2 * (lane % 4): a = {(group, pair), (group + 8, pair), (group, pair + 8), (group + 8, pair + 8)},
// two columns each; b = {(pair, group), (pair + 8, group)}, two rows each; d = {(group, pair), (group,
// pair + 1), (group + 8, pair), (group + 8, pair + 1)}.
template <class T>
SPLITKERN_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
SPLITKERN_DEVICE void mma_16x8x16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
SPLITKERN_DEVICE void mma_16x8x16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d[16][8] += a[16][8] * b[8][8], operands as to_tf32 gives them. With group = lane / 4 and thread = lane % 4:
// a = {(group, thread), (group + 8, thread), (group, thread + 4), (group + 8, thread + 4)},
// b = {(thread, group), (thread + 4, group)}, d as above.
SPLITKERN_DEVICE void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace splitkern::kernels
