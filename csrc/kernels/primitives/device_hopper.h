// What Hopper (sm_90a) adds: memory barriers with transaction counts, the tensor memory accelerator,
// warpgroup matrix products, clusters. Included by primitives.h alone; kernels that use it are compiled
// for sm_90a and nothing else.
#pragma once

#include <cuda.h>

#include "device_mma.h"
#include "device_wgmma.h"
#include "tensor_maps.h"

namespace splitkern::kernels {

// --- Memory barriers --------------------------------------------------------------------------------

// In shared memory. A phase completes when all arrivals and all announced bytes have come; waiting names the
// parity of the phase: 0 for the first, then alternating. A fresh barrier counts as having completed phase 1.
struct alignas(8) Barrier {
  uint64_t state;
};

SPLITKERN_DEVICE void barrier_init(Barrier& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// After the last barrier_init, before a block or cluster barrier: shows them to the TMA unit and the cluster.
SPLITKERN_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SPLITKERN_DEVICE void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// One arrival that also announces `bytes` of TMA loads.
SPLITKERN_DEVICE void barrier_arrive_expect(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
// One arrival at the same barrier of block `rank` of the cluster.
SPLITKERN_DEVICE void barrier_arrive_cluster(Barrier& barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}
SPLITKERN_DEVICE void barrier_wait(Barrier& barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
}

// --- Clusters ---------------------------------------------------------------------------------------

SPLITKERN_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Every thread of every block of the cluster.
SPLITKERN_DEVICE void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// --- Tensor maps, on the host -----------------------------------------------------------------------

struct TensorMap {
  CUtensorMap map;
};

// Throw where the driver refuses the arguments, with `operation` and every argument in the text.
TensorMap encode(const Im2colMap& arguments, const char* operation);
TensorMap encode(const TiledMap& arguments, const char* operation);

// As launch, with `cluster_blocks` neighbouring blocks of grid.x to a cluster.
template <class Params>
void launch_clusters(void (*kernel)(Params), Dim3 grid, uint32_t cluster_blocks, Dim3 block, size_t shared_bytes,
                     cudaStream_t stream, const Params& params,
                     std::source_location where = std::source_location::current()) {
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes)),
             Params::kOperator, where);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster_blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* arguments[] = {const_cast<Params*>(&params)};
  check_cuda(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), Params::kOperator, where);
}

// --- Kernels that follow each other -----------------------------------------------------------------

// As launch, but the kernel may start before the stream's previous kernel ends, once that one has allowed it in every
// block or is done: its start-up hides behind the other's end. Until wait_for_previous_kernel it touches no memory
// that another kernel writes.
template <class Params>
void launch_following(void (*kernel)(Params), Dim3 grid, Dim3 block, size_t shared_bytes, cudaStream_t stream,
                      const Params& params, std::source_location where = std::source_location::current()) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* arguments[] = {const_cast<Params*>(&params)};
  check_cuda(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), Params::kOperator, where);
}
SPLITKERN_DEVICE void allow_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Until the previous kernel has ended and what it wrote is visible.
SPLITKERN_DEVICE void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// --- Tensor memory accelerator ----------------------------------------------------------------------
// One thread issues. Loads complete on a barrier that expects their bytes (the whole box, also where it is
// partly outside). Shared addresses are multiples of 128 bytes (1024 for 128-byte swizzle). The map lies in the
// kernel's parameters.

SPLITKERN_DEVICE void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// box_pixels pixels from base pixel (column, row, image) on, each shifted by the offsets, channels from `channel` on.
SPLITKERN_DEVICE void tma_load_im2col(void* shared, const TensorMap& map, Barrier& barrier, int32_t channel,
                                      int32_t column, int32_t row, int32_t image, uint16_t column_offset,
                                      uint16_t row_offset) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2], {%7, %8};" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(channel), "r"(column), "r"(row), "r"(image), "h"(column_offset),
      "h"(row_offset)
      : "memory");
}
// The same for a map with patches.
SPLITKERN_DEVICE void tma_load_im2col_patches(void* shared, const TensorMap& map, Barrier& barrier, int32_t channel,
                                              int32_t column, int32_t row, int32_t patch, int32_t image,
                                              uint16_t column_offset, uint16_t row_offset) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6, %7}], [%2], {%8, %9, %10};" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(channel), "r"(column), "r"(row), "r"(patch), "r"(image),
      "h"(column_offset), "h"(row_offset), "h"(static_cast<uint16_t>(0))
      : "memory");
}
SPLITKERN_DEVICE void tma_load_3d(void* shared, const TensorMap& map, Barrier& barrier, int32_t x, int32_t y,
                                  int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
SPLITKERN_DEVICE void tma_load_4d(void* shared, const TensorMap& map, Barrier& barrier, int32_t x, int32_t y, int32_t z,
                                  int32_t w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// The same into the same shared offset of every block of the cluster whose bit is set, completing on each
// block's barrier at the same offset.
SPLITKERN_DEVICE void tma_load_3d_multicast(void* shared, const TensorMap& map, Barrier& barrier, int32_t x, int32_t y,
                                            int32_t z, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}
// Stores belong to the issuing thread's current group.
SPLITKERN_DEVICE void tma_store_im2col(const TensorMap& map, const void* shared, int32_t channel, int32_t column,
                                       int32_t row, int32_t image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.im2col_no_offs.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(shared_address(shared)), "r"(channel), "r"(column), "r"(row), "r"(image)
      : "memory");
}
SPLITKERN_DEVICE void tma_store_im2col_patches(const TensorMap& map, const void* shared, int32_t channel,
                                               int32_t column, int32_t row, int32_t patch, int32_t image) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.im2col_no_offs.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(
          &map),
      "r"(shared_address(shared)), "r"(channel), "r"(column), "r"(row), "r"(patch), "r"(image)
      : "memory");
}
SPLITKERN_DEVICE void tma_store_4d(const TensorMap& map, const void* shared, int32_t x, int32_t y, int32_t z,
                                   int32_t w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
SPLITKERN_DEVICE void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until at most kPending groups of this thread still read shared memory.
template <int kPending>
SPLITKERN_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
SPLITKERN_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
// Shows this thread's ordinary writes to shared memory to the TMA unit and to wgmma; then a barrier.
SPLITKERN_DEVICE void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- Fragments to shared memory ---------------------------------------------------------------------

// The mirror of load_matrix_x4: lane i gives the address of row i % 8 of matrix i / 8.
SPLITKERN_DEVICE void store_matrix_x4(void* row, const uint32_t (&registers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}
SPLITKERN_DEVICE void store_matrix_x4_transposed(void* row, const uint32_t (&registers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

// --- Warpgroup products -----------------------------------------------------------------------------

// Where a 16-bit operand tile lies in shared memory.
// Reduction-contiguous (kTransposed false): rows of 64 reduction elements (128 bytes, swizzled), 8 rows to a
//   1024-byte atom, stride_bytes between atoms of 8 rows; leading_bytes is not read. 16 further reduction
//   elements are 32 bytes further on.
// Row-contiguous (kTransposed true): for each reduction index 64 rows (128 bytes, swizzled), 8 reduction
//   indices to a 1024-byte atom; stride_bytes between atoms of 8 reduction indices, leading_bytes between
//   blocks of 64 rows. 16 further reduction elements are 2 * stride_bytes further on.
SPLITKERN_DEVICE uint64_t matrix_descriptor(const void* shared, Swizzle swizzle, uint32_t leading_bytes,
                                            uint32_t stride_bytes) {
  constexpr uint64_t kModes[] = {0, 3, 2, 1};
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffffu) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3ffffu) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3ffffu) >> 4) << 32 | kModes[static_cast<int>(swizzle)] << 62;
}
SPLITKERN_DEVICE uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Before the first product of a batch, and after writing its accumulators otherwise.
SPLITKERN_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
SPLITKERN_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
SPLITKERN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The number of registers a thread of the calling warpgroup may hold from here on; a multiple of 8.
template <int kRegisters>
SPLITKERN_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
SPLITKERN_DEVICE void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// d[64][kColumns] = (accumulate ? d : 0) + a[64][16] * b[16][kColumns] for the calling warpgroup, asynchronously:
// d is touched again only after wgmma_wait. Register i of thread t (of 128) holds row 16 * (t / 32) + (t % 32) / 4 +
// 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * (t % 4) + i % 2.
template <class T, int kColumns, bool kTransposedA, bool kTransposedB>
SPLITKERN_DEVICE void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  WarpgroupProduct<T, kColumns, kTransposedA, kTransposedB>::issue(d, a, b, accumulate);
}

}  // namespace splitkern::kernels
