// The machine on a GPU: builtins, vector accesses, conversions, launching. Included by primitives.h alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SPLITKERN_DEVICE __device__ __forceinline__
#define SPLITKERN_HOST_DEVICE __host__ __device__ inline

namespace splitkern::kernels {

using Dim3 = dim3;
using Half = __half;
using BFloat16 = __nv_bfloat16;

SPLITKERN_DEVICE int64_t global_thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
SPLITKERN_DEVICE int64_t global_thread_count() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

SPLITKERN_DEVICE float to_accumulator(float value) {
  return value;
}
SPLITKERN_DEVICE double to_accumulator(double value) {
  return value;
}
SPLITKERN_DEVICE float to_accumulator(Half value) {
  return __half2float(value);
}
SPLITKERN_DEVICE float to_accumulator(BFloat16 value) {
  return __bfloat162float(value);
}

template <class T>
SPLITKERN_DEVICE T from_accumulator(double value);
template <>
SPLITKERN_DEVICE double from_accumulator<double>(double value) {
  return value;
}
template <class T>
SPLITKERN_DEVICE T from_accumulator(float value);
template <>
SPLITKERN_DEVICE float from_accumulator<float>(float value) {
  return value;
}
template <>
SPLITKERN_DEVICE Half from_accumulator<Half>(float value) {
  return __float2half_rn(value);
}
template <>
SPLITKERN_DEVICE BFloat16 from_accumulator<BFloat16>(float value) {
  return __float2bfloat16_rn(value);
}

SPLITKERN_DEVICE float multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
SPLITKERN_DEVICE double multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}
SPLITKERN_DEVICE float square_root(float value) {
  return __fsqrt_rn(value);
}
SPLITKERN_DEVICE double square_root(double value) {
  return __dsqrt_rn(value);
}

// --- Threads -------------------------------------------------------------------------------------

inline constexpr uint32_t kWarpThreads = 32;

SPLITKERN_DEVICE uint32_t thread_index() {  // within the block, which is one-dimensional
  return threadIdx.x;
}
SPLITKERN_DEVICE uint32_t lane_index() {
  return threadIdx.x % kWarpThreads;
}
// The same value in every lane, and known to the compiler as such.
SPLITKERN_DEVICE uint32_t warp_index() {
  return __shfl_sync(0xffffffffu, threadIdx.x / kWarpThreads, 0);
}
SPLITKERN_DEVICE uint32_t block_threads() {
  return blockDim.x;
}
SPLITKERN_DEVICE Dim3 block_index() {
  return {blockIdx.x, blockIdx.y, blockIdx.z};
}
SPLITKERN_DEVICE Dim3 grid_extent() {
  return {gridDim.x, gridDim.y, gridDim.z};
}

// Collectives: every thread of the block (warp) calls them.
SPLITKERN_DEVICE void block_barrier() {
  __syncthreads();
}
SPLITKERN_DEVICE void warp_barrier() {
  __syncwarp();
}
// `threads` threads of the block, whole warps, meet at barrier 1 .. 15; 0 is block_barrier's.
SPLITKERN_DEVICE void named_barrier(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
template <class Value>
SPLITKERN_DEVICE Value shuffle(Value value, uint32_t lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class Value>
SPLITKERN_DEVICE Value shuffle_xor(Value value, uint32_t mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
SPLITKERN_DEVICE uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}
SPLITKERN_DEVICE uint32_t count_bits(uint32_t value) {
  return __popc(value);
}

// --- Memory --------------------------------------------------------------------------------------

// The block's dynamic shared memory as one plain struct, aligned to 1024 bytes.
template <class Storage>
SPLITKERN_DEVICE Storage& dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char splitkern_shared[];
  return *reinterpret_cast<Storage*>(splitkern_shared);
}

// 16 bytes that move as one access; addresses are multiples of 16.
struct alignas(16) Vector16 {
  uint32_t words[4];
};
struct alignas(8) Vector8 {
  uint32_t words[2];
};
// Vector: Vector16, Vector8, uint32_t, uint16_t or uint8_t. Global memory that no thread writes during the kernel.
template <class Vector>
SPLITKERN_DEVICE Vector load_global(const void* address) {
  if constexpr (sizeof(Vector) == 16) {
    const uint4 value = __ldg(static_cast<const uint4*>(address));
    return {{value.x, value.y, value.z, value.w}};
  } else if constexpr (sizeof(Vector) == 8) {
    const uint2 value = __ldg(static_cast<const uint2*>(address));
    return {{value.x, value.y}};
  } else {
    return __ldg(static_cast<const Vector*>(address));
  }
}
// The same for data that is read once: leaves the caches to the rest.
template <class Vector>
SPLITKERN_DEVICE Vector load_global_streaming(const void* address) {
  if constexpr (sizeof(Vector) == 16) {
    const uint4 value = __ldcs(static_cast<const uint4*>(address));
    return {{value.x, value.y, value.z, value.w}};
  } else if constexpr (sizeof(Vector) == 8) {
    const uint2 value = __ldcs(static_cast<const uint2*>(address));
    return {{value.x, value.y}};
  } else {
    return __ldcs(static_cast<const Vector*>(address));
  }
}
// Global or mapped host memory.
template <class Vector>
SPLITKERN_DEVICE void store_global(void* address, const Vector& value) {
  if constexpr (sizeof(Vector) == 16) {
    // As an assignment it may end up as four stores, each beside the instruction that computes its word.
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
                 "r"(value.words[0]), "r"(value.words[1]), "r"(value.words[2]), "r"(value.words[3])
                 : "memory");
  } else if constexpr (sizeof(Vector) == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "r"(value.words[0]),
                 "r"(value.words[1])
                 : "memory");
  } else {
    *static_cast<Vector*>(address) = value;
  }
}
template <class Vector>
SPLITKERN_DEVICE void store_global_streaming(void* address, const Vector& value) {
  if constexpr (sizeof(Vector) == 16) {
    __stcs(static_cast<uint4*>(address), uint4{value.words[0], value.words[1], value.words[2], value.words[3]});
  } else if constexpr (sizeof(Vector) == 8) {
    __stcs(static_cast<uint2*>(address), uint2{value.words[0], value.words[1]});
  } else {
    __stcs(static_cast<Vector*>(address), value);
  }
}

// --- Elements ------------------------------------------------------------------------------------

template <class T>
SPLITKERN_DEVICE T from_bits(uint16_t bits);
template <>
SPLITKERN_DEVICE Half from_bits<Half>(uint16_t bits) {
  return __ushort_as_half(bits);
}
template <>
SPLITKERN_DEVICE BFloat16 from_bits<BFloat16>(uint16_t bits) {
  return __ushort_as_bfloat16(bits);
}
SPLITKERN_DEVICE uint16_t to_bits(Half value) {
  return __half_as_ushort(value);
}
SPLITKERN_DEVICE uint16_t to_bits(BFloat16 value) {
  return __bfloat16_as_ushort(value);
}
SPLITKERN_DEVICE uint32_t float_bits(float value) {
  return __float_as_uint(value);
}
SPLITKERN_DEVICE float bits_float(uint32_t bits) {
  return __uint_as_float(bits);
}
// Two values, each rounded to nearest even, in one register; `low` in the lower half.
template <class T>
SPLITKERN_DEVICE uint32_t pack2(float low, float high);
template <>
SPLITKERN_DEVICE uint32_t pack2<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
SPLITKERN_DEVICE uint32_t pack2<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// All bits of each lane (one float, or two halves) where the candidate is greater than the best or is NaN.
template <class T>
SPLITKERN_DEVICE uint32_t exceeds_mask(uint32_t candidate, uint32_t best);
template <>
SPLITKERN_DEVICE uint32_t exceeds_mask<float>(uint32_t candidate, uint32_t best) {
  const float value = __uint_as_float(candidate);
  return value > __uint_as_float(best) || value != value ? 0xffffffffu : 0u;
}
template <>
SPLITKERN_DEVICE uint32_t exceeds_mask<Half>(uint32_t candidate, uint32_t best) {
  const __half2 values = reinterpret_cast<const __half2&>(candidate);
  return __hgt2_mask(values, reinterpret_cast<const __half2&>(best)) | __hneu2_mask(values, values);
}
template <>
SPLITKERN_DEVICE uint32_t exceeds_mask<BFloat16>(uint32_t candidate, uint32_t best) {
  const __nv_bfloat162 values = reinterpret_cast<const __nv_bfloat162&>(candidate);
  return __hgt2_mask(values, reinterpret_cast<const __nv_bfloat162&>(best)) | __hneu2_mask(values, values);
}
// All bits of each lane (one 32-bit or two 16-bit ones, as wide as T) where both hold the same number below 0x7c00.
template <class T>
SPLITKERN_DEVICE uint32_t equal_mask(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return a == b ? 0xffffffffu : 0u;
  } else {  // as fp16 such numbers are finite and not negative, and one instruction compares two
    return __heq2_mask(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  }
}
// Sums of one float or of two halves, each rounded once.
template <class T>
SPLITKERN_DEVICE uint32_t add_lanes(uint32_t a, uint32_t b);
template <>
SPLITKERN_DEVICE uint32_t add_lanes<float>(uint32_t a, uint32_t b) {
  return __float_as_uint(__fadd_rn(__uint_as_float(a), __uint_as_float(b)));
}
template <>
SPLITKERN_DEVICE uint32_t add_lanes<Half>(uint32_t a, uint32_t b) {
  const __half2 sum = __hadd2_rn(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(sum);
}
template <>
SPLITKERN_DEVICE uint32_t add_lanes<BFloat16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 sum =
      __hadd2_rn(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(sum);
}
// The value rounded to tf32 (nearest, ties away from zero), as the bits that mma_tf32 reads.
SPLITKERN_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// --- Launching -----------------------------------------------------------------------------------

// Throws for a failed call. Reading the error also clears it where CUDA lets it be cleared, so a
// refused launch does not surface again in somebody else's next call.
inline void check_cuda(cudaError_t error, const char* operation,
                       std::source_location where = std::source_location::current()) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  throw std::runtime_error(std::string(operation) + ": CUDA error " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ") at " + where.file_name() + ":" +
                           std::to_string(where.line()));
}

// Params names its operator (kOperator), which the error carries.
template <class Params>
void launch(void (*kernel)(Params), Dim3 grid, Dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Params& params, std::source_location where = std::source_location::current()) {
  if (shared_bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               Params::kOperator, where);
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes, stream),
             Params::kOperator, where);
}

}  // namespace splitkern::kernels
