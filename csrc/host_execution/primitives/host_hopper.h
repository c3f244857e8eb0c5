// The twin of device_hopper.h: barriers with transaction counts, tensor maps, the tensor memory accelerator and
// warpgroup products. Included by primitives.h alone; barriers.cpp, tensor_memory.cpp and warpgroups.cpp implement it.
#pragma once

#include "host_mma.h"
#include "kernels/primitives/tensor_maps.h"

namespace splitkern::kernels {

struct alignas(8) Barrier {
  uint64_t state;  // a mark and a number; the machine keeps the rest, so that an overwritten barrier is noticed
};

// The arguments themselves, which loads and stores interpret. As large as the device's, so that as many fit a launch.
struct TensorMap {
  enum class Kind : int32_t { kNone, kIm2col, kTiled } kind;
  union {
    Im2colMap im2col;
    TiledMap tiled;
  };
  unsigned char unused[16];
};
static_assert(sizeof(TensorMap) == 128);

// Throw where the driver would refuse the arguments, with `operation` and every argument in the text.
TensorMap encode(const Im2colMap& arguments, const char* operation);
TensorMap encode(const TiledMap& arguments, const char* operation);

}  // namespace splitkern::kernels

namespace splitkern::host {

void barrier_init(kernels::Barrier& barrier, uint32_t arrivals);
void barrier_init_fence();
void barrier_arrive(kernels::Barrier& barrier, uint32_t bytes);
void barrier_arrive_cluster(kernels::Barrier& barrier, uint32_t rank);
void barrier_wait(kernels::Barrier& barrier, uint32_t parity);

inline constexpr uint16_t kThisBlock = 0;  // instead of a mask of the blocks of the cluster
// at: channel, column, row, image and, for a map with patches, the patch.
void load_im2col(void* shared, const kernels::TensorMap& map, kernels::Barrier& barrier, const int32_t* at,
                 int32_t rank, uint16_t column_offset, uint16_t row_offset);
void load_tiled(void* shared, const kernels::TensorMap& map, kernels::Barrier& barrier, const int32_t* at, int32_t rank,
                uint16_t blocks);
void store_im2col(const kernels::TensorMap& map, const void* shared, const int32_t* at, int32_t rank);
void store_tiled(const kernels::TensorMap& map, const void* shared, const int32_t* at, int32_t rank);
void store_commit();
void store_wait(uint32_t pending, bool written);
void fence_async_shared();

struct WarpgroupProduct {
  uint64_t a;
  uint64_t b;
  uint32_t columns;
  bool accumulate;
  bool transposed_a;
  bool transposed_b;
  Operand operand;

  bool operator==(const WarpgroupProduct&) const = default;
};
void warpgroup_fence();
void warpgroup_multiply(float* d, const WarpgroupProduct& product);
void warpgroup_commit();
void warpgroup_wait(uint32_t pending);
void set_registers(uint32_t registers);

}  // namespace splitkern::host

namespace splitkern::kernels {

inline void barrier_init(Barrier& barrier, uint32_t arrivals) {
  host::barrier_init(barrier, arrivals);
}
inline void barrier_init_fence() {
  host::barrier_init_fence();
}
inline void barrier_arrive(Barrier& barrier) {
  host::barrier_arrive(barrier, 0);
}
inline void barrier_arrive_expect(Barrier& barrier, uint32_t bytes) {
  host::barrier_arrive(barrier, bytes);
}
inline void barrier_arrive_cluster(Barrier& barrier, uint32_t rank) {
  host::barrier_arrive_cluster(barrier, rank);
}
inline void barrier_wait(Barrier& barrier, uint32_t parity) {
  host::barrier_wait(barrier, parity);
}

inline uint32_t cluster_rank() {
  return host::current_thread().block->rank;
}
inline void cluster_barrier() {
  host::meet_cluster();
}

template <class Params>
void launch_clusters(void (*kernel)(Params), Dim3 grid, uint32_t cluster_blocks, Dim3 block, size_t shared_bytes,
                     cudaStream_t, const Params& params) {
  host_launch::run(kernel, grid, cluster_blocks, block, shared_bytes, params);
}

template <class Params>
void launch_following(void (*kernel)(Params), Dim3 grid, Dim3 block, size_t shared_bytes, cudaStream_t,
                      const Params& params) {
  host_launch::run(kernel, grid, 1, block, shared_bytes, params);
}
inline void allow_next_kernel() {}
inline void wait_for_previous_kernel() {}

inline void prefetch_map(const TensorMap&) {}
inline void tma_load_im2col(void* shared, const TensorMap& map, Barrier& barrier, int32_t channel, int32_t column,
                            int32_t row, int32_t image, uint16_t column_offset, uint16_t row_offset) {
  const int32_t at[] = {channel, column, row, image};
  host::load_im2col(shared, map, barrier, at, 4, column_offset, row_offset);
}
inline void tma_load_im2col_patches(void* shared, const TensorMap& map, Barrier& barrier, int32_t channel,
                                    int32_t column, int32_t row, int32_t patch, int32_t image, uint16_t column_offset,
                                    uint16_t row_offset) {
  const int32_t at[] = {channel, column, row, image, patch};
  host::load_im2col(shared, map, barrier, at, 5, column_offset, row_offset);
}
inline void tma_load_3d(void* shared, const TensorMap& map, Barrier& barrier, int32_t x, int32_t y, int32_t z) {
  const int32_t at[] = {x, y, z};
  host::load_tiled(shared, map, barrier, at, 3, host::kThisBlock);
}
inline void tma_load_4d(void* shared, const TensorMap& map, Barrier& barrier, int32_t x, int32_t y, int32_t z,
                        int32_t w) {
  const int32_t at[] = {x, y, z, w};
  host::load_tiled(shared, map, barrier, at, 4, host::kThisBlock);
}
inline void tma_load_3d_multicast(void* shared, const TensorMap& map, Barrier& barrier, int32_t x, int32_t y, int32_t z,
                                  uint16_t blocks) {
  const int32_t at[] = {x, y, z};
  host::load_tiled(shared, map, barrier, at, 3, blocks);
}
inline void tma_store_im2col(const TensorMap& map, const void* shared, int32_t channel, int32_t column, int32_t row,
                             int32_t image) {
  const int32_t at[] = {channel, column, row, image};
  host::store_im2col(map, shared, at, 4);
}
inline void tma_store_im2col_patches(const TensorMap& map, const void* shared, int32_t channel, int32_t column,
                                     int32_t row, int32_t patch, int32_t image) {
  const int32_t at[] = {channel, column, row, image, patch};
  host::store_im2col(map, shared, at, 5);
}
inline void tma_store_4d(const TensorMap& map, const void* shared, int32_t x, int32_t y, int32_t z, int32_t w) {
  const int32_t at[] = {x, y, z, w};
  host::store_tiled(map, shared, at, 4);
}
inline void tma_store_commit() {
  host::store_commit();
}
template <int kPending>
void tma_store_wait_read() {
  host::store_wait(kPending, false);
}
template <int kPending>
void tma_store_wait() {
  host::store_wait(kPending, true);
}
inline void fence_async_shared() {
  host::fence_async_shared();
}

inline void store_matrix_x4(void* row, const uint32_t (&registers)[4]) {
  host::store_matrix(row, registers, false);
}
inline void store_matrix_x4_transposed(void* row, const uint32_t (&registers)[4]) {
  host::store_matrix(row, registers, true);
}

inline uint64_t matrix_descriptor(const void* shared, Swizzle swizzle, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kModes[] = {0, 3, 2, 1};
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffffu) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3ffffu) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3ffffu) >> 4) << 32 | kModes[static_cast<int>(swizzle)] << 62;
}
inline uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

inline void wgmma_fence() {
  host::warpgroup_fence();
}
inline void wgmma_commit() {
  host::warpgroup_commit();
}
template <int kPending>
void wgmma_wait() {
  host::warpgroup_wait(kPending);
}
template <int kRegisters>
void release_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  host::set_registers(kRegisters);
}
template <int kRegisters>
void claim_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  host::set_registers(kRegisters);
}
// d holds poison until the wait.
template <class T, int kColumns, bool kTransposedA, bool kTransposedB>
void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 256);
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  host::warpgroup_multiply(d, {a, b, kColumns, accumulate, kTransposedA, kTransposedB, host::kOperand<T>});
}

}  // namespace splitkern::kernels
