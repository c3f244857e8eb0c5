// The kernel behind forward and input gradient on Hopper, and the choice of its tile. Persistent blocks of three
// warpgroups: one thread of the first feeds a ring of shared-memory stages by TMA, the other two multiply. Tiles are
// (pixels of one sub-problem) x (channels); the pixels of a tile may span images. Instantiated by conv_gemm_*.cu.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../budgets.h"
#include "block.h"
#include "conv.h"
#include "geometry.h"
#include "params.h"
#include "refusals.h"
#include "unrolled.h"

namespace splitkern::kernels::sm90 {

// With kSwapped the channels are the rows of the products and the pixels their columns, so that products stay wide
// (256 columns, the cheapest in shared-memory reads) also where there are only 64 or 128 channels.
struct GemmTile {
  int pixels;
  int channels;
  bool swapped;
  int stages;
  int store_rounds;  // parts of the tile that pass through the staging buffer one after another
  // What a tile takes on an H200, fitted to measurements of the layers of VGG-19 and ResNet-50: per 64 reduction
  // channels of a tap, and once for its end.
  double cycles_per_block;
  double cycles_per_tile;
  int lag;  // stages by which the second warpgroup follows the first
};

inline constexpr GemmTile kGemmTiles[] = {
    {128, 256, false, 4, 2, 1203, 3860, 1}, {256, 128, true, 4, 2, 1230, 2900, 1},
    {192, 128, true, 4, 1, 924, 2140, 1},   {128, 128, true, 6, 1, 605, 2250, 2},
    {128, 256, false, 3, 1, 1250, 3000, 0}, {256, 64, true, 4, 1, 724, 1400, 1},
    {256, 128, true, 3, 1, 1280, 2500, 0},  {96, 128, true, 7, 1, 500, 2000, 2},
};
inline constexpr int kGemmTileCount = sizeof(kGemmTiles) / sizeof(kGemmTiles[0]);

// kPatches: the maps have patches.
template <class T_, bool kInputGrad_, int kTileIndex, bool kPatches_>
struct GemmTraits {
  using T = T_;
  static constexpr GemmTile kTile = kGemmTiles[kTileIndex];
  static constexpr bool kInputGrad = kInputGrad_;
  static constexpr bool kPatches = kPatches_;
  static constexpr bool kSwapped = kTile.swapped;
  static constexpr int kPixels = kTile.pixels;
  static constexpr int kChannels = kTile.channels;
  static constexpr int kStages = kTile.stages;
  static constexpr int kRounds = kTile.store_rounds;
  // Each warpgroup takes half the pixels, or half the channels.
  static constexpr bool kSplitPixels = !kSwapped || kChannels == 64;
  static constexpr int kWarpgroupPixels = kSplitPixels ? kPixels / kMathWarpgroups : kPixels;
  static constexpr int kWarpgroupChannels = kSplitPixels ? kChannels : kChannels / kMathWarpgroups;
  static constexpr int kColumns = kSwapped ? kWarpgroupPixels : kWarpgroupChannels;
  static_assert((kSwapped ? kWarpgroupChannels : kWarpgroupPixels) == 64, "a product has 64 rows");
  static_assert(kColumns % (kRounds * (kSwapped ? 16 : 64)) == 0);

  static constexpr int kLoadPixels = kPixels <= 256 ? kPixels : kPixels / 2;  // of one TMA box
  static constexpr int kStorePixels = kSwapped ? kColumns / kRounds : 64;
  static constexpr int kStoreLines = kSwapped ? kRounds : 1;  // runs of pixels of a warpgroup that are stored apart
  static constexpr int kStoreBlocks = kSwapped ? 1 : kColumns / 64 / kRounds;  // of 64 channels
  static constexpr int kOperandBytes = kPixels * 128;
  static constexpr int kWeightBytes = kChannels * 128;
  static constexpr int kStageBytes = kOperandBytes + kWeightBytes;
  static constexpr int kStagingBytes = kStorePixels * 128 * kStoreBlocks;
};

template <class Traits>
struct GemmShared {
  struct alignas(1024) Stage {
    unsigned char operand[Traits::kOperandBytes];
    unsigned char weights[Traits::kWeightBytes];
  };
  Stage stages[Traits::kStages];
  alignas(1024) unsigned char staging[kMathWarpgroups][Traits::kStagingBytes];
  float bias[kMathWarpgroups][Traits::kWarpgroupChannels];
  Barrier full[Traits::kStages];
  Barrier empty[Traits::kStages];
  Barrier lead;  // the first warpgroup has begun
};

// Tile numbers of a block only grow, so the sub-problem is found by going forward.
struct TilePosition {
  int32_t sub_problem = 0;
  int32_t pixel = 0;
  int32_t channel = 0;
};
template <class Traits, class Params>
SPLITKERN_DEVICE void locate(const Params& params, int32_t tile, TilePosition& position) {
  while (position.sub_problem + 1 < params.sub_problems &&
         params.sub_problem[position.sub_problem + 1].first_tile <= tile) {
    ++position.sub_problem;
  }
  const int32_t local = tile - params.sub_problem[position.sub_problem].first_tile;
  const int32_t pixel_tile = local / params.channel_tiles;
  position.pixel = pixel_tile * Traits::kPixels;
  position.channel = (local - pixel_tile * params.channel_tiles) * Traits::kChannels;
}

struct Pixel {
  int32_t column;
  int32_t row;
  int32_t patch;
  int32_t image;
};
template <class Traits>
SPLITKERN_DEVICE Pixel pixel_at(const SubProblem& problem, int32_t index) {
  Pixel pixel;
  const int32_t line = index / problem.columns;
  const int32_t plane = line / problem.rows;
  pixel.column = index - line * problem.columns;
  pixel.row = line - plane * problem.rows;
  pixel.image = Traits::kPatches ? plane / problem.patches : plane;
  pixel.patch = plane - pixel.image * problem.patches;  // read only where the maps have patches
  return pixel;
}

// The producer's thread: fills stages in the order in which the math warpgroups empty them.
template <class Traits, class Params>
SPLITKERN_DEVICE void load_tiles(const Params& params, GemmShared<Traits>& shared) {
  prefetch_map(params.weights);
  Ring<Traits::kStages> ring;
  TilePosition position;
  int32_t prefetched = -1;  // sub-problem whose maps are on their way
  const int32_t stride = static_cast<int32_t>(grid_extent().x);
  for (int32_t tile = static_cast<int32_t>(block_index().x); tile < params.tiles; tile += stride) {
    locate<Traits>(params, tile, position);
    const SubProblem& problem = params.sub_problem[position.sub_problem];
    const TensorMap& operand = params.operand[position.sub_problem];
    if (position.sub_problem > prefetched) {
      prefetch_map(params.output[position.sub_problem]);
      prefetched = position.sub_problem;
    }
    TilePosition next = position;
    if (tile + stride < params.tiles) locate<Traits>(params, tile + stride, next);
    if (next.sub_problem > prefetched) {
      prefetch_map(params.operand[next.sub_problem]);
      prefetch_map(params.output[next.sub_problem]);
      prefetched = next.sub_problem;
    }
    constexpr int kBoxes = Traits::kPixels / Traits::kLoadPixels;
    Pixel first[kBoxes];
    unrolled<kBoxes>([&](auto box) {
      int32_t pixel = position.pixel + box * Traits::kLoadPixels;
      // A box wholly behind the last pixel is never stored: load any.
      if (pixel >= problem.pixels) pixel = position.pixel;
      first[box] = pixel_at<Traits>(problem, pixel);
      first[box].row = problem.lower_row + first[box].row * problem.row_step;
      first[box].column = problem.lower_column + first[box].column * problem.column_step;
    });
    for (int32_t row_tap = 0; row_tap < problem.row_taps.taps; ++row_tap) {
      const int32_t tap_row = problem.row_taps.first_tap + row_tap * problem.row_taps.tap_step;
      const uint16_t row_offset = static_cast<uint16_t>(row_tap * problem.row_taps.offset_step);
      for (int32_t column_tap = 0; column_tap < problem.column_taps.taps; ++column_tap) {
        const int32_t tap =
            tap_row * params.kernel_columns + problem.column_taps.first_tap + column_tap * problem.column_taps.tap_step;
        const uint16_t column_offset = static_cast<uint16_t>(column_tap * problem.column_taps.offset_step);
        for (int32_t block = 0; block < params.reduction_blocks; ++block) {
          const int32_t reduction = block * kReductionBlock;
          Barrier& full = shared.full[ring.index];
          auto& stage = shared.stages[ring.index];
          barrier_wait(shared.empty[ring.index], ring.parity ^ 1);
          barrier_arrive_expect(full, Traits::kStageBytes);
          unrolled<kBoxes>([&](auto box) {
            unsigned char* destination = stage.operand + box * Traits::kLoadPixels * 128;
            const Pixel& from = first[box];
            if constexpr (Traits::kPatches) {
              tma_load_im2col_patches(destination, operand, full, reduction, from.column, from.row, from.patch,
                                      from.image, column_offset, row_offset);
            } else {
              tma_load_im2col(destination, operand, full, reduction, from.column, from.row, from.image, column_offset,
                              row_offset);
            }
          });
          if constexpr (Traits::kInputGrad) {
            unrolled<Traits::kChannels / 64>([&](auto columns) {
              tma_load_3d(stage.weights + columns * 8192, params.weights, full, position.channel + columns * 64, tap,
                          reduction);
            });
          } else {
            tma_load_3d(stage.weights, params.weights, full, reduction, tap, position.channel);
          }
          ring.next();
        }
      }
    }
  }
}

// One warpgroup's part of a tile from its accumulators to the output tensor, through its staging buffer. kPlain: there
// is neither bias nor activation, which saves most of the instructions.
template <class Traits, bool kPlain, class Params>
SPLITKERN_DEVICE void store_tile(const Params& params, GemmShared<Traits>& shared, const TilePosition& position,
                                 const Pixel (&to)[Traits::kStoreLines], uint32_t warpgroup, uint32_t thread,
                                 const float (&sums)[Traits::kColumns / 2]) {
  using T = typename Traits::T;
  const TensorMap& output = params.output[position.sub_problem];
  unsigned char* staging = shared.staging[warpgroup];
  const float* bias = shared.bias[warpgroup];
  const uint32_t warp = thread / kWarpThreads;
  const uint32_t lane = thread % kWarpThreads;
  const int32_t first_channel =
      position.channel + (Traits::kSplitPixels ? 0 : static_cast<int32_t>(warpgroup) * Traits::kWarpgroupChannels);
  const auto finish = [&](float sum, float offset) {
    const float value = sum + offset;
    return params.relu && value <= 0.0f ? 0.0f : value;  // a NaN stays a NaN
  };
  constexpr int kRoundColumns = Traits::kColumns / Traits::kRounds;

  unrolled<Traits::kRounds>([&](auto round) {
    if (thread == 0) tma_store_wait_read<0>();
    named_barrier(1 + warpgroup, kWarpgroupThreads);  // the staging buffer is free; the bias is there
    unrolled<kRoundColumns / 16>([&](auto group) {
      constexpr int kColumn = round * kRoundColumns + group * 16;  // two 8x8 matrices wide, two high
      uint32_t registers[4];
      unrolled<4>([&](auto matrix) {
        constexpr int kHigh = matrix % 2;
        constexpr int kWide = matrix / 2;
        constexpr int kSum = (kColumn + 8 * kWide) / 2 + 2 * kHigh;
        if constexpr (kPlain) {
          registers[matrix] = pack2<T>(sums[kSum], sums[kSum + 1]);
        } else if constexpr (Traits::kSwapped) {
          const float both = bias[16 * warp + 8 * kHigh + lane / 4];
          registers[matrix] = pack2<T>(finish(sums[kSum], both), finish(sums[kSum + 1], both));
        } else {
          const float* pair = bias + kColumn + 8 * kWide + 2 * (lane % 4);
          registers[matrix] = pack2<T>(finish(sums[kSum], pair[0]), finish(sums[kSum + 1], pair[1]));
        }
      });
      const uint32_t high = lane / 8 % 2;
      const uint32_t wide = lane / 16;
      const uint32_t line = lane % 8;
      if constexpr (Traits::kSwapped) {
        const uint32_t pixel = group * 16 + 8 * wide + line;
        const uint32_t chunk = 2 * warp + high;
        store_matrix_x4_transposed(staging + pixel * 128 + ((chunk ^ line) << 4), registers);
      } else {
        const uint32_t pixel = 16 * warp + 8 * high + line;
        constexpr int kBlock = group / 4;
        const uint32_t chunk = group % 4 * 2 + wide;
        store_matrix_x4(staging + kBlock * Traits::kStorePixels * 128 + pixel * 128 + ((chunk ^ line) << 4), registers);
      }
    });
    fence_async_shared();
    named_barrier(1 + warpgroup, kWarpgroupThreads);
    if (thread == 0) {
      const Pixel& first = to[Traits::kSwapped ? round : 0];
      if (first.image >= 0) {
        unrolled<Traits::kStoreBlocks>([&](auto block) {
          const int32_t channel = first_channel + (Traits::kSwapped ? 0 : round * Traits::kStoreBlocks + block) * 64;
          if (channel < params.channels) {
            const unsigned char* source = staging + block * Traits::kStorePixels * 128;
            if constexpr (Traits::kPatches) {
              tma_store_im2col_patches(output, source, channel, first.column, first.row, first.patch, first.image);
            } else {
              tma_store_im2col(output, source, channel, first.column, first.row, first.image);
            }
          }
        });
      }
      tma_store_commit();
    }
  });
}

template <class Traits, class Params>
SPLITKERN_DEVICE void multiply_tiles(const Params& params, GemmShared<Traits>& shared, uint32_t warpgroup) {
  using T = typename Traits::T;
  constexpr int kColumns = Traits::kColumns;
  constexpr bool kTransposedA = Traits::kSwapped && Traits::kInputGrad;
  constexpr bool kTransposedB = !Traits::kSwapped && Traits::kInputGrad;
  // How far 16 reduction elements are apart.
  constexpr uint32_t kStepA = kTransposedA ? 2048 : 32;
  constexpr uint32_t kStepB = kTransposedB ? 2048 : 32;
  const uint32_t thread = thread_index() % kWarpgroupThreads;
  const bool arrives = thread % kWarpThreads == 0;
  const uint32_t operand_offset = Traits::kSplitPixels ? warpgroup * Traits::kWarpgroupPixels * 128 : 0;
  const bool plain = Traits::kInputGrad || (params.bias == nullptr && !params.relu);
  const uint32_t weight_offset = Traits::kSplitPixels ? 0 : warpgroup * Traits::kWarpgroupChannels * 128;

  // The second warpgroup stays some stages behind the first, so that one multiplies while the other stores.
  int32_t lead = warpgroup == 0 ? params.lag : 0;
  if (warpgroup == 1 && params.lag > 0) barrier_wait(shared.lead, 0);

  Ring<Traits::kStages> ring;
  TilePosition position;
  const int32_t stride = static_cast<int32_t>(grid_extent().x);
  locate<Traits>(params, static_cast<int32_t>(block_index().x), position);  // there are no more blocks than tiles
  for (int32_t tile = static_cast<int32_t>(block_index().x); tile < params.tiles; tile += stride) {
    const SubProblem& problem = params.sub_problem[position.sub_problem];
    const int32_t iterations = problem.row_taps.taps * problem.column_taps.taps * params.reduction_blocks;

    float sums[kColumns / 2];
    if (iterations == 0) {
      unrolled<kColumns / 2>([&](auto i) { sums[i] = 0.0f; });
    }
    uint32_t previous = 0;
    for (int32_t iteration = 0; iteration < iterations; ++iteration) {
      auto& stage = shared.stages[ring.index];
      const uint64_t operand = matrix_descriptor(stage.operand + operand_offset, Swizzle::k128Bytes, 16, 1024);
      const uint64_t weights =
          matrix_descriptor(stage.weights + weight_offset, Swizzle::k128Bytes, Traits::kInputGrad ? 8192 : 16, 1024);
      const uint64_t a = Traits::kSwapped ? weights : operand;
      const uint64_t b = Traits::kSwapped ? operand : weights;
      barrier_wait(shared.full[ring.index], ring.parity);
      wgmma_fence();
      unrolled<kReductionBlock / 16>([&](auto step) {
        wgmma<T, kColumns, kTransposedA, kTransposedB>(sums, advance(a, step * kStepA), advance(b, step * kStepB),
                                                       step > 0 || iteration > 0);
      });
      wgmma_commit();
      if (iteration > 0) {
        wgmma_wait<1>();  // the products of the stage before are done
        if (arrives) barrier_arrive(shared.empty[previous]);
      }
      previous = ring.index;
      ring.next();
      if (lead != 0 && --lead == 0 && thread == 0) barrier_arrive(shared.lead);
    }
    if (lead != 0 && thread == 0) barrier_arrive(shared.lead);
    lead = 0;

    // While the last products are under way: where the tile goes, its bias, and what comes next.
    Pixel to[Traits::kStoreLines];
    unrolled<Traits::kStoreLines>([&](auto line) {
      const int32_t pixel = position.pixel +
                            (Traits::kSplitPixels ? static_cast<int32_t>(warpgroup) * Traits::kWarpgroupPixels : 0) +
                            line * Traits::kStorePixels;
      to[line] = pixel_at<Traits>(problem, pixel);
      if (pixel >= problem.pixels) to[line].image = -1;  // not stored
    });
    // Read after the first barrier of store_tile. The last tile's reads are over: store_tile ends with a barrier.
    for (uint32_t i = thread; !plain && i < Traits::kWarpgroupChannels; i += kWarpgroupThreads) {
      const int32_t channel = position.channel + static_cast<int32_t>(i) +
                              (Traits::kSplitPixels ? 0 : static_cast<int32_t>(warpgroup) * Traits::kWarpgroupChannels);
      shared.bias[warpgroup][i] = params.bias != nullptr && channel < params.channels
                                      ? to_accumulator(static_cast<const T*>(params.bias)[channel * params.bias_stride])
                                      : 0.0f;
    }
    const TilePosition current = position;
    if (tile + stride < params.tiles) locate<Traits>(params, tile + stride, position);
    wgmma_wait<0>();
    if (iterations > 0 && arrives) barrier_arrive(shared.empty[previous]);
    if (plain) {
      store_tile<Traits, true>(params, shared, current, to, warpgroup, thread, sums);
    } else {
      store_tile<Traits, false>(params, shared, current, to, warpgroup, thread, sums);
    }
  }
  if (thread == 0) tma_store_wait<0>();
}

template <class Traits>
__global__ void __launch_bounds__(kBlockThreads, 1)
    conv_gemm_kernel(const __grid_constant__ GemmParams<Traits::kInputGrad> params) {
  using Shared = GemmShared<Traits>;
  static_assert(sizeof(Shared) <= shared_budget("sm90::conv_gemm_kernel"));
  Shared& shared = dynamic_shared<Shared>();
  if (thread_index() == 0) barrier_init(shared.lead, 1);
  init_ring<Shared, Traits::kStages>(shared);
  const uint32_t warp = warp_index();
  if (warp < kWarpgroupThreads / kWarpThreads) {
    release_registers<40>();
    if (warp == 0 && lane_index() == 0) load_tiles<Traits>(params, shared);
  } else {
    claim_registers<232>();
    multiply_tiles<Traits>(params, shared, warp / (kWarpgroupThreads / kWarpThreads) - 1);
  }
}

// --- On the host ------------------------------------------------------------------------------------------

// A GEMM call before its sub-problems are cut into launches.
struct GemmCall {
  ElementType type;
  int32_t images;
  int32_t channels;            // of the outputs
  int32_t reduction_channels;  // of the operand
  int32_t out_channels;        // of the convolution: the weights' outermost extent
  int32_t in_channels;
  int32_t taps;
  int32_t kernel_columns;
  bool relu;
  int64_t bias_stride;
  const void* bias;
  const void* operand;
  Strides4 operand_strides;
  void* output;
  Strides4 output_strides;
  const void* weights;  // [out channel][tap][in channel]
  WeightLayout layout;
};

// Boxes of one tap, 64 input channels and `box_out_channels` output channels.
inline TiledMap weight_map(const GemmCall& call, int32_t box_out_channels) {
  TiledMap map{};
  map.type = call.type;
  map.base = call.weights;
  map.rank = 3;
  map.extents[0] = call.in_channels;
  map.extents[1] = call.taps;
  map.extents[2] = call.out_channels;
  map.strides_bytes[0] = call.layout.tap_stride * kElementBytes;
  map.strides_bytes[1] = call.layout.out_channel_stride * kElementBytes;
  map.box[0] = 64;
  map.box[1] = 1;
  map.box[2] = box_out_channels;
  map.swizzle = Swizzle::k128Bytes;
  return map;
}

struct GemmProblem {
  AxisWalk rows;
  AxisWalk columns;
  // Equal patches as one problem, so that only its last tile is a partial one. `patches` (0: the maps have none) lie
  // patch steps apart; `rows_of_patches` more of each count as images, which then lie image steps apart. In elements.
  int32_t patches = 0;
  int32_t rows_of_patches = 1;
  int64_t operand_patch_step = 0;
  int64_t output_patch_step = 0;
  int64_t operand_image_step = 0;
  int64_t output_image_step = 0;
  int64_t pixels(int64_t images) const {
    return rows.outputs * columns.outputs * images * rows_of_patches * std::max(patches, 1);
  }
  int64_t taps() const { return rows.taps * columns.taps; }
};

template <class Traits>
void launch_gemm(const GemmCall& call, const std::vector<GemmProblem>& problems, int32_t multiprocessors,
                 cudaStream_t stream) {
  using Params = GemmParams<Traits::kInputGrad>;
  Params params;
  params.channels = call.channels;
  params.channel_tiles = static_cast<int32_t>(ceil_divide(call.channels, Traits::kChannels));
  params.reduction_blocks = static_cast<int32_t>(ceil_divide(call.reduction_channels, kReductionBlock));
  params.kernel_columns = call.kernel_columns;
  params.relu = call.relu;
  params.lag = tuning().lag >= 0 ? std::min(tuning().lag, Traits::kStages - 1) : Traits::kTile.lag;
  params.bias_stride = call.bias_stride;
  params.bias = call.bias;

  params.weights =
      encode(weight_map(call, Traits::kInputGrad ? kReductionBlock : Traits::kChannels), Params::kOperator);

  for (size_t first = 0; first < problems.size(); first += kMaxSubProblems) {
    params.sub_problems = static_cast<int32_t>(std::min<size_t>(problems.size() - first, kMaxSubProblems));
    params.tiles = 0;
    for (int32_t i = 0; i < params.sub_problems; ++i) {
      const GemmProblem& problem = problems[first + i];
      const AxisWalk& rows = problem.rows;
      const AxisWalk& columns = problem.columns;
      const int32_t pixels = static_cast<int32_t>(problem.pixels(call.images));
      params.sub_problem[i] = {params.tiles,
                               pixels,
                               static_cast<int32_t>(columns.outputs),
                               static_cast<int32_t>(rows.outputs),
                               std::max(problem.patches, 1),
                               static_cast<int32_t>(columns.lower),
                               static_cast<int32_t>(rows.lower),
                               static_cast<int32_t>(columns.step),
                               static_cast<int32_t>(rows.step),
                               {static_cast<int32_t>(rows.taps), static_cast<int32_t>(rows.first_tap),
                                static_cast<int32_t>(rows.tap_step), static_cast<int32_t>(rows.offset_step)},
                               {static_cast<int32_t>(columns.taps), static_cast<int32_t>(columns.first_tap),
                                static_cast<int32_t>(columns.tap_step), static_cast<int32_t>(columns.offset_step)}};
      params.tiles += static_cast<int32_t>(ceil_divide(pixels, Traits::kPixels)) * params.channel_tiles;
      const int32_t images = call.images * problem.rows_of_patches;
      Im2colMap operand = operand_map(call.type, call.operand, call.operand_strides, call.reduction_channels, images,
                                      rows, columns, Traits::kLoadPixels);
      Im2colMap output = output_map(call.type, call.output, call.output_strides, call.channels, images, rows, columns,
                                    Traits::kStorePixels);
      if constexpr (Traits::kPatches) {
        set_patches(operand, problem.patches, problem.operand_patch_step, problem.operand_image_step);
        set_patches(output, problem.patches, problem.output_patch_step, problem.output_image_step);
      }
      params.operand[i] = encode(operand, Params::kOperator);
      params.output[i] = encode(output, Params::kOperator);
    }
    const unsigned blocks = static_cast<unsigned>(std::min(params.tiles, multiprocessors));
    kernels::launch(&conv_gemm_kernel<Traits>, Dim3{blocks, 1, 1}, Dim3{kBlockThreads, 1, 1},
                    sizeof(GemmShared<Traits>), stream, params);
  }
}

// Instantiated in conv_gemm_*.cu, one file per type and operator.
// Every problem has patches, or none has.
template <class T, bool kInputGrad>
void launch_gemm_tile(int32_t tile, const GemmCall& call, const std::vector<GemmProblem>& problems,
                      int32_t multiprocessors, cudaStream_t stream);

// The weights as the maps want them: as they are, or queued to be packed into the workspace.
const void* weights_for_maps(const void* weight, const Strides4& strides, const WeightLayout& layout,
                             int32_t out_channels, int32_t in_channels, int32_t taps, int32_t kernel_columns,
                             void* workspace, cudaStream_t stream);

// Sorts the problems, chooses the tile and launches.
void launch_gemm_call(bool input_grad, const GemmCall& call, std::vector<GemmProblem>& problems,
                      int32_t multiprocessors, cudaStream_t stream);

// Cycles of the device for a call whose products and stores take `computing` where memory does not limit them; what
// it moves to and from memory overlaps with that in part. Fitted to the same measurements as kGemmTiles.
double predicted_cycles(const GemmCall& call, const std::vector<GemmProblem>& problems, double computing);

struct TileChoice {
  int32_t tile;
  double cycles;
};

// The tile with the least predicted time: whole waves of tiles.
TileChoice choose_gemm_tile(const GemmCall& call, const std::vector<GemmProblem>& problems, int32_t multiprocessors);

}  // namespace splitkern::kernels::sm90
