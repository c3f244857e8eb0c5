// The weight-gradient kernel on Hopper: out channels x (tap, in-channel) tiles, the reduction over output pixels.
// Both operands arrive channel-contiguous, so both products' operands are the transposed kind. Persistent blocks of
// three warpgroups as in conv_gemm.h; every item leaves its tile of partial sums in the workspace, in fp32.
// Instantiated by conv_weight_grad_*.cu.
#pragma once

#include <vector>

#include "../budgets.h"
#include "block.h"
#include "conv.h"
#include "geometry.h"
#include "params.h"
#include "unrolled.h"

namespace splitkern::kernels::sm90 {

// `split_reduction`: with 64 out channels both warpgroups compute the same tile, each from half of a stage's pixels,
// and leave partial sums of their own. Else each takes half of 128 out channels.
struct WeightGradTile {
  int out_channels;
  int blocks;  // of 64 (tap, in-channel) columns
  bool split_reduction;
  int stages;
  double cycles_per_stage;  // on an H200, fitted to measurements of the layers of VGG-19 and ResNet-50
};

inline constexpr WeightGradTile kWeightGradTiles[] = {
    {128, 4, false, 4, 1158}, {128, 3, false, 5, 904}, {128, 2, false, 7, 712}, {128, 1, false, 9, 414},
    {64, 3, true, 3, 1418},   {64, 2, true, 4, 953},   {64, 1, true, 7, 450},
};
inline constexpr int kWeightGradTileCount = sizeof(kWeightGradTiles) / sizeof(kWeightGradTiles[0]);

// Pixels of a stage.
constexpr int chunk_pixels(const WeightGradTile& tile) {
  return tile.split_reduction ? 128 : 64;
}
// Arrays of partial sums per segment.
constexpr int sums_per_segment(const WeightGradTile& tile) {
  return tile.split_reduction ? kMathWarpgroups : 1;
}

template <class T_, int kTileIndex>
struct WeightGradTraits {
  using T = T_;
  static constexpr WeightGradTile kTile = kWeightGradTiles[kTileIndex];
  static constexpr bool kSplitReduction = kTile.split_reduction;
  static constexpr int kOutChannels = kTile.out_channels;
  static_assert(kOutChannels == (kSplitReduction ? 64 : 128), "a product has 64 rows");
  static constexpr int kBlocks = kTile.blocks;
  static constexpr int kColumns = kBlocks * 64;
  static constexpr int kStages = kTile.stages;
  static constexpr int kChunkPixels = chunk_pixels(kTile);
  static constexpr int kBoxBytes = kChunkPixels * 128;
  static constexpr int kGradientBoxes = kOutChannels / 64;
};

template <class Traits>
struct WeightGradShared {
  struct alignas(1024) Stage {
    unsigned char gradient[Traits::kGradientBoxes * Traits::kBoxBytes];
    unsigned char input[Traits::kBlocks * Traits::kBoxBytes];
  };
  Stage stages[Traits::kStages];
  Barrier full[Traits::kStages];
  Barrier empty[Traits::kStages];
};

struct WeightGradItem {
  int32_t segment;
  int32_t out_channel;
  int32_t block;
  int32_t first_chunk;
  int32_t last_chunk;  // one past
};
template <class Traits>
SPLITKERN_DEVICE WeightGradItem weight_grad_item(const WeightGradParams& params, int32_t index) {
  WeightGradItem item;
  item.segment = index / params.tiles;
  const int32_t tile = index - item.segment * params.tiles;
  const int32_t row = tile / params.column_tiles;
  item.out_channel = row * Traits::kOutChannels;
  item.block = (tile - row * params.column_tiles) * Traits::kBlocks;
  item.first_chunk = static_cast<int32_t>(static_cast<int64_t>(params.chunks) * item.segment / params.segments);
  item.last_chunk = static_cast<int32_t>(static_cast<int64_t>(params.chunks) * (item.segment + 1) / params.segments);
  return item;
}

template <class Traits>
SPLITKERN_DEVICE void load_items(const WeightGradParams& params, WeightGradShared<Traits>& shared) {
  Ring<Traits::kStages> ring;
  const int32_t stride = static_cast<int32_t>(grid_extent().x);
  for (int32_t index = static_cast<int32_t>(block_index().x); index < params.items; index += stride) {
    const WeightGradItem item = weight_grad_item<Traits>(params, index);
    int32_t channel[Traits::kBlocks];
    uint16_t column_offset[Traits::kBlocks];
    uint16_t row_offset[Traits::kBlocks];
    uint32_t bytes = 0;
    // Boxes wholly outside are left out: their rows or columns of the products are never stored.
    unrolled<Traits::kGradientBoxes>([&](auto box) {
      if (item.out_channel + box * 64 < params.out_channels) bytes += Traits::kBoxBytes;
    });
    unrolled<Traits::kBlocks>([&](auto i) {
      const int32_t tap = (item.block + i) / params.channel_blocks;
      const int32_t row = tap / params.kernel_columns;
      channel[i] = tap < params.taps ? (item.block + i - tap * params.channel_blocks) * 64 : -1;
      column_offset[i] = static_cast<uint16_t>((tap - row * params.kernel_columns) * params.column_dilation);
      row_offset[i] = static_cast<uint16_t>(row * params.row_dilation);
      if (channel[i] >= 0) bytes += Traits::kBoxBytes;
    });

    int32_t patch_index = 0;
    for (int32_t chunk = item.first_chunk; chunk < item.last_chunk; ++chunk) {
      while (patch_index + 1 < params.patches && params.patch[patch_index + 1].first_chunk <= chunk) ++patch_index;
      const WeightGradPatch& patch = params.patch[patch_index];
      const int32_t pixel = (chunk - patch.first_chunk) * Traits::kChunkPixels;
      const int32_t line = pixel / patch.columns;
      const int32_t image = line / patch.rows;
      const int32_t row = line - image * patch.rows;
      const int32_t column = pixel - line * patch.columns;
      const int32_t in_column = patch.lower_column + column * params.column_step;
      const int32_t in_row = patch.lower_row + row * params.row_step;
      Barrier& full = shared.full[ring.index];
      auto& stage = shared.stages[ring.index];
      barrier_wait(shared.empty[ring.index], ring.parity ^ 1);
      barrier_arrive_expect(full, bytes);
      unrolled<Traits::kGradientBoxes>([&](auto box) {
        if (item.out_channel + box * 64 < params.out_channels) {
          tma_load_im2col(stage.gradient + box * Traits::kBoxBytes, params.gradient[patch_index], full,
                          item.out_channel + box * 64, column, row, image, 0, 0);
        }
      });
      unrolled<Traits::kBlocks>([&](auto i) {
        if (channel[i] >= 0) {
          tma_load_im2col(stage.input + i * Traits::kBoxBytes, params.input[patch_index], full, channel[i], in_column,
                          in_row, image, column_offset[i], row_offset[i]);
        }
      });
      ring.next();
    }
  }
}

// A warpgroup's 64 rows of sums to the workspace; 4 threads write 32 contiguous bytes.
template <class Traits>
SPLITKERN_DEVICE void store_item(const WeightGradParams& params, const WeightGradItem& item, uint32_t warpgroup,
                                 uint32_t thread, const float (&sums)[Traits::kColumns / 2]) {
  const int32_t warp = static_cast<int32_t>(thread / kWarpThreads);
  const int32_t lane = static_cast<int32_t>(thread % kWarpThreads);
  const int64_t weights = static_cast<int64_t>(params.taps) * params.in_channels;  // of one out channel
  const int32_t set =
      Traits::kSplitReduction ? item.segment * kMathWarpgroups + static_cast<int32_t>(warpgroup) : item.segment;
  const int32_t first_row =
      item.out_channel + (Traits::kSplitReduction ? 0 : static_cast<int32_t>(warpgroup) * 64) + 16 * warp + lane / 4;
  float* destination = params.partial_sums + (static_cast<int64_t>(set) * params.out_channels + first_row) * weights;
  unrolled<Traits::kBlocks>([&](auto block) {
    const int32_t tap = (item.block + block) / params.channel_blocks;
    const int32_t first_channel = (item.block + block - tap * params.channel_blocks) * 64 + 2 * (lane % 4);
    if (tap >= params.taps) return;
    unrolled<2>([&](auto half) {
      if (first_row + 8 * half >= params.out_channels) return;
      float* line = destination + 8 * half * weights + static_cast<int64_t>(tap) * params.in_channels + first_channel;
      unrolled<8>([&](auto group) {
        constexpr int kSum = block * 32 + group * 4 + half * 2;
        if (first_channel + 8 * group < params.in_channels) {
          store_global(line + 8 * group, Vector8{{float_bits(sums[kSum]), float_bits(sums[kSum + 1])}});
        }
      });
    });
  });
}

template <class Traits>
SPLITKERN_DEVICE void multiply_items(const WeightGradParams& params, WeightGradShared<Traits>& shared,
                                     uint32_t warpgroup) {
  using T = typename Traits::T;
  constexpr int kColumns = Traits::kColumns;
  constexpr uint32_t kStep = 2048;  // 16 pixels
  const uint32_t thread = thread_index() % kWarpgroupThreads;
  const bool arrives = thread % kWarpThreads == 0;
  // Half the pixels of every box, or its own box of the gradient.
  const uint32_t gradient_offset = warpgroup * 8192;
  const uint32_t input_offset = Traits::kSplitReduction ? warpgroup * 8192 : 0;

  Ring<Traits::kStages> ring;
  const int32_t stride = static_cast<int32_t>(grid_extent().x);
  for (int32_t index = static_cast<int32_t>(block_index().x); index < params.items; index += stride) {
    const WeightGradItem item = weight_grad_item<Traits>(params, index);
    const int32_t chunks = item.last_chunk - item.first_chunk;
    float sums[kColumns / 2];
    if (chunks == 0) {
      unrolled<kColumns / 2>([&](auto i) { sums[i] = 0.0f; });
    }
    uint32_t previous = 0;
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
      auto& stage = shared.stages[ring.index];
      const uint64_t a =
          matrix_descriptor(stage.gradient + gradient_offset, Swizzle::k128Bytes, Traits::kBoxBytes, 1024);
      const uint64_t b = matrix_descriptor(stage.input + input_offset, Swizzle::k128Bytes, Traits::kBoxBytes, 1024);
      barrier_wait(shared.full[ring.index], ring.parity);
      wgmma_fence();
      unrolled<4>([&](auto step) {
        wgmma<T, kColumns, true, true>(sums, advance(a, step * kStep), advance(b, step * kStep), step > 0 || chunk > 0);
      });
      wgmma_commit();
      if (chunk > 0) {
        wgmma_wait<1>();  // the products of the stage before are done
        if (arrives) barrier_arrive(shared.empty[previous]);
      }
      previous = ring.index;
      ring.next();
    }
    wgmma_wait<0>();
    if (chunks > 0 && arrives) barrier_arrive(shared.empty[previous]);
    store_item<Traits>(params, item, warpgroup, thread, sums);
  }
}

template <class Traits>
__global__ void __launch_bounds__(kBlockThreads, 1)
    conv_weight_grad_kernel(const __grid_constant__ WeightGradParams params) {
  using Shared = WeightGradShared<Traits>;
  static_assert(sizeof(Shared) <= shared_budget("sm90::conv_weight_grad_kernel"));
  Shared& shared = dynamic_shared<Shared>();
  allow_next_kernel();
  init_ring<Shared, Traits::kStages>(shared);
  const uint32_t warp = warp_index();
  if (warp < kWarpgroupThreads / kWarpThreads) {
    release_registers<40>();
    if (warp == 0 && lane_index() == 0) load_items<Traits>(params, shared);
  } else {
    claim_registers<232>();
    multiply_items<Traits>(params, shared, warp / (kWarpgroupThreads / kWarpThreads) - 1);
  }
}

// Queues the kernel with tile number `tile`; defined in conv_weight_grad_*.cu, one file per type.
template <class T>
void launch_weight_grad_tile(int32_t tile, const WeightGradParams& params, int32_t multiprocessors,
                             cudaStream_t stream);

}  // namespace splitkern::kernels::sm90
