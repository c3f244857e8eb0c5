// Gradient of the patch convolution with respect to its weight on Hopper. Called through sm90/conv.h.
// The product [out channels x pixels] * [pixels x (tap, in channel)] reads both operands as they lie in
// NHWC memory, pixel after pixel, by im2col loads whose maps end at each patch's borders. The reduction
// over the pixels of all patches is cut into equal shares, one per block whatever the number of output
// tiles (a share may end one tile and begin the next); the shares are fixed by the shape and the number of
// multiprocessors, and a second kernel adds a tile's partial sums in their order: every run gives the same bits.
#include <algorithm>

#include "../dispatch.h"
#include "conv.h"
#include "conv_gemm.h"
#include "partial_sums.h"
#include "window_weight_grad.h"

namespace splitkern::kernels::sm90 {
namespace {

constexpr int32_t kChunkPixels = 64;  // of the reduction, per pipeline stage
constexpr int32_t kBoxBytes = kChunkPixels * kUnitChannels * 2;
constexpr int32_t kMaxPatches = 116;

struct ShareGradParams {
  static constexpr const char* kOperator = ConvWeightGradParams::kOperator;
  TensorMap grad_output[kMaxPatches];
  TensorMap input[kMaxPatches];
  struct Patch {
    int32_t out_columns;
    int32_t out_rows;
    int32_t lower_column;  // of the input positions that tap (0, 0) reads
    int32_t lower_row;
    int32_t chunk_begin;  // of this patch among all chunks
  } patches[kMaxPatches];
  int32_t patch_count;
  int32_t chunks;  // of all patches
  int32_t column_stride;
  int32_t row_stride;
  int32_t column_dilation;
  int32_t row_dilation;
  int32_t kernel_columns;
  int32_t kernel_rows;
  int32_t taps;
  int32_t units;  // taps of every 64 input channels
  int32_t row_tiles;
  int32_t column_tiles;
  float* partial_sums;  // [block + tile][kRows][kColumns]
};
static_assert(sizeof(ShareGradParams) <= 32764, "kernel parameters are limited to 32764 bytes");

// kRowBlocks = 2: each multiplying warpgroup takes 64 of the tile's 128 output channels and all its units.
// kRowBlocks = 1: both take the same 64 output channels and half of the units each.
template <int kRowBlocksValue, int kUnitsPerGroupValue, int kStagesValue>
struct Tile {
  static constexpr int kRowBlocks = kRowBlocksValue;
  static constexpr int kUnitsPerGroup = kUnitsPerGroupValue;
  static constexpr int kStages = kStagesValue;
  static constexpr int kUnits = kRowBlocks == 2 ? kUnitsPerGroup : 2 * kUnitsPerGroup;
  static constexpr int kRows = 64 * kRowBlocks;
  static constexpr int kColumns = kUnitChannels * kUnits;
  static constexpr int kGroupColumns = kUnitChannels * kUnitsPerGroup;
  static_assert(kGroupColumns <= 256, "a warpgroup product is at most 256 columns wide");
};

template <class Tile>
struct Storage {
  struct Stage {
    unsigned char grad_output[Tile::kRowBlocks][kBoxBytes];
    unsigned char input[Tile::kUnits][kBoxBytes];
  };
  alignas(1024) Stage stages[Tile::kStages];
  Barrier full[Tile::kStages];
  Barrier empty[Tile::kStages];
};

template <class Tile>
SPLITKERN_DEVICE void produce(const ShareGradParams& params, Storage<Tile>& shared, Share share) {
  Ring<Tile::kStages> ring;
  int32_t patch = 0;
  for (int64_t item = share.begin; item < share.end;) {
    const int32_t tile = static_cast<int32_t>(item / params.chunks);
    int32_t chunk = static_cast<int32_t>(item - static_cast<int64_t>(tile) * params.chunks);
    const int64_t left_in_tile = params.chunks - chunk;
    const int64_t left = share.end - item < left_in_tile ? share.end - item : left_in_tile;
    const int32_t column_tile = tile / params.row_tiles;
    const int32_t first_row = (tile - column_tile * params.row_tiles) * Tile::kRows;
    const int32_t first_unit = column_tile * Tile::kUnits;
    const int32_t units = params.units - first_unit < Tile::kUnits ? params.units - first_unit : Tile::kUnits;
    patch = 0;
    for (int64_t done = 0; done < left; ++done, ++chunk) {
      while (patch + 1 < params.patch_count && params.patches[patch + 1].chunk_begin <= chunk) ++patch;
      const ShareGradParams::Patch& box = params.patches[patch];
      int32_t pixel = (chunk - box.chunk_begin) * kChunkPixels;
      const int32_t line = pixel / box.out_columns;
      const int32_t column = pixel - line * box.out_columns;
      const int32_t image = line / box.out_rows;
      const int32_t row = line - image * box.out_rows;

      typename Storage<Tile>::Stage& stage = shared.stages[ring.index];
      Barrier& full = shared.full[ring.index];
      barrier_wait(shared.empty[ring.index], ring.parity ^ 1);
      barrier_arrive_expect(full, (Tile::kRowBlocks + units) * kBoxBytes);
      for (int32_t block = 0; block < Tile::kRowBlocks; ++block) {
        tma_load_im2col(stage.grad_output[block], params.grad_output[patch], full, first_row + 64 * block, column, row,
                        image, 0, 0);
      }
      int32_t channel_block = first_unit / params.taps;
      const int32_t tap = first_unit - channel_block * params.taps;
      int32_t tap_row = tap / params.kernel_columns;
      int32_t tap_column = tap - tap_row * params.kernel_columns;
      for (int32_t unit = 0; unit < units; ++unit) {
        tma_load_im2col(stage.input[unit], params.input[patch], full, channel_block * kUnitChannels,
                        box.lower_column + column * params.column_stride, box.lower_row + row * params.row_stride,
                        image, static_cast<uint16_t>(tap_column * params.column_dilation),
                        static_cast<uint16_t>(tap_row * params.row_dilation));
        if (++tap_column == params.kernel_columns) {
          tap_column = 0;
          if (++tap_row == params.kernel_rows) {
            tap_row = 0;
            ++channel_block;
          }
        }
      }
      ring.next();
    }
    item += left;
  }
}

template <class T, class Tile>
SPLITKERN_DEVICE void multiply(const ShareGradParams& params, Storage<Tile>& shared, Share share, int32_t group) {
  constexpr int32_t kGroupColumns = Tile::kGroupColumns;
  const int32_t thread = static_cast<int32_t>(thread_index()) % 128;
  const int32_t row_block = Tile::kRowBlocks == 2 ? group : 0;
  const int32_t first_unit = Tile::kRowBlocks == 2 ? 0 : group * Tile::kUnitsPerGroup;
  Ring<Tile::kStages> ring;
  float sums[kGroupColumns / 2];
  for (int64_t item = share.begin; item < share.end;) {
    const int32_t tile = static_cast<int32_t>(item / params.chunks);
    const int64_t left_in_tile = static_cast<int64_t>(tile + 1) * params.chunks - item;
    const int64_t left = share.end - item < left_in_tile ? share.end - item : left_in_tile;
    int32_t previous = -1;
    for (int64_t done = 0; done < left; ++done) {
      typename Storage<Tile>::Stage& stage = shared.stages[ring.index];
      barrier_wait(shared.full[ring.index], ring.parity);
      const uint64_t a = matrix_descriptor(stage.grad_output[row_block], Swizzle::k128Bytes, kBoxBytes, 1024);
      const uint64_t b = matrix_descriptor(stage.input[first_unit], Swizzle::k128Bytes, kBoxBytes, 1024);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kChunkPixels / 16; ++step) {
        wgmma<T, kGroupColumns, true, true>(sums, advance(a, 2048 * step), advance(b, 2048 * step),
                                            done != 0 || step != 0);
      }
      wgmma_commit();
      wgmma_wait<1>();  // the batch before has been read
      if (previous >= 0 && thread == 0) barrier_arrive(shared.empty[previous]);
      previous = static_cast<int32_t>(ring.index);
      ring.next();
    }
    wgmma_wait<0>();
    if (thread == 0) barrier_arrive(shared.empty[previous]);

    // Columns of units that the last tile lacks hold whatever the stage held: the reduction does not read them.
    float* slot = params.partial_sums + (static_cast<int64_t>(block_index().x) + tile) * (Tile::kRows * Tile::kColumns);
    float* corner = slot + (64 * row_block + 16 * (thread / 32) + thread % 32 / 4) * Tile::kColumns +
                    first_unit * kUnitChannels + 2 * (thread % 4);
#pragma unroll
    for (int i = 0; i < kGroupColumns / 2; i += 2) {
      store_global(corner + 8 * (i / 2 % 2) * Tile::kColumns + 8 * (i / 4),
                   Vector8{{float_bits(sums[i]), float_bits(sums[i + 1])}});
    }
    item += left;
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(kBlockThreads, 1)
    weight_grad_kernel(const __grid_constant__ ShareGradParams params) {
  Storage<Tile>& shared = dynamic_shared<Storage<Tile>>();
  if (thread_index() == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(shared.full[stage], 1);
      barrier_init(shared.empty[stage], 2);
    }
    barrier_init_fence();
  }
  block_barrier();
  const int64_t items = static_cast<int64_t>(params.row_tiles) * params.column_tiles * params.chunks;
  const Share share = share_of(block_index().x, grid_extent().x, items);
  const int32_t warpgroup = static_cast<int32_t>(warp_index()) / 4;
  if (warpgroup == 0) {
    release_registers<40>();
    if (thread_index() == 0) produce(params, shared, share);
  } else {
    claim_registers<232>();
    multiply<T>(params, shared, share, warpgroup - 1);
  }
}

// What the shape decides before any pointer is known.
struct Schedule {
  int32_t row_blocks;       // Tile::kRowBlocks
  int32_t units_per_group;  // Tile::kUnitsPerGroup
  int32_t tile_units;
  int32_t units;
  int32_t row_tiles;
  int32_t column_tiles;
  int32_t chunks;
  int32_t blocks;

  int64_t slots() const { return static_cast<int64_t>(blocks) + int64_t{row_tiles} * column_tiles; }
  int64_t slot_elements() const { return int64_t{64} * row_blocks * tile_units * kUnitChannels; }
};

int64_t patch_chunks(const ConvWeightGradParams& params, int32_t row_patch, int32_t column_patch) {
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const int64_t pixels = int64_t{params.batch} * (rows.out_bounds[row_patch + 1] - rows.out_bounds[row_patch]) *
                         (columns.out_bounds[column_patch + 1] - columns.out_bounds[column_patch]);
  return (pixels + kChunkPixels - 1) / kChunkPixels;
}

Schedule schedule_of(const ConvWeightGradParams& params, const DeviceTraits& traits) {
  Schedule schedule{};
  const int32_t taps = static_cast<int32_t>(params.row_window.kernel * params.column_window.kernel);
  schedule.units = taps * ((params.in_channels_per_group + kUnitChannels - 1) / kUnitChannels);
  schedule.row_blocks = params.out_channels > 64 ? 2 : 1;
  if (schedule.row_blocks == 2) {
    schedule.units_per_group = schedule.units <= 2                             ? schedule.units
                               : schedule.units % 4 == 0 || schedule.units > 9 ? 4
                                                                               : 3;
    schedule.tile_units = schedule.units_per_group;
  } else {
    schedule.units_per_group = schedule.units <= 2 ? 1 : schedule.units <= 4 ? 2 : 3;
    schedule.tile_units = 2 * schedule.units_per_group;
  }
  schedule.row_tiles = (params.out_channels + 64 * schedule.row_blocks - 1) / (64 * schedule.row_blocks);
  schedule.column_tiles = (schedule.units + schedule.tile_units - 1) / schedule.tile_units;
  int64_t chunks = 0;
  for (int32_t i = 0; i < params.grid.rows.patches; ++i) {
    for (int32_t j = 0; j < params.grid.columns.patches; ++j) chunks += patch_chunks(params, i, j);
  }
  schedule.chunks = static_cast<int32_t>(chunks);
  schedule.blocks = reduction_blocks(schedule.row_tiles * schedule.column_tiles, chunks, traits.multiprocessors);
  return schedule;
}

template <class T, class Tile>
void launch_products(const ShareGradParams& params, int32_t blocks, cudaStream_t stream) {
  kernels::launch(&weight_grad_kernel<T, Tile>, Dim3{static_cast<unsigned>(blocks), 1u, 1u},
                  Dim3{kBlockThreads, 1u, 1u}, sizeof(Storage<Tile>), stream, params);
}

template <class T>
void launch_products(const Schedule& schedule, const ShareGradParams& params, cudaStream_t stream) {
  const int32_t choice = 10 * schedule.row_blocks + schedule.units_per_group;
  switch (choice) {
    case 11:
      return launch_products<T, Tile<1, 1, 8>>(params, schedule.blocks, stream);
    case 12:
      return launch_products<T, Tile<1, 2, 5>>(params, schedule.blocks, stream);
    case 13:
      return launch_products<T, Tile<1, 3, 4>>(params, schedule.blocks, stream);
    case 21:
      return launch_products<T, Tile<2, 1, 8>>(params, schedule.blocks, stream);
    case 22:
      return launch_products<T, Tile<2, 2, 6>>(params, schedule.blocks, stream);
    case 23:
      return launch_products<T, Tile<2, 3, 5>>(params, schedule.blocks, stream);
    case 24:
      return launch_products<T, Tile<2, 4, 4>>(params, schedule.blocks, stream);
    default:
      throw std::runtime_error(std::string(params.kOperator) + ": no tile of kind " + std::to_string(choice) +
                               "; there are 11, 12, 13, 21, 22, 23 and 24");
  }
}

}  // namespace

int64_t shares_workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits) {
  const Schedule schedule = schedule_of(params, traits);
  return schedule.slots() * schedule.slot_elements() * static_cast<int64_t>(sizeof(float));
}

void launch_shares(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream) {
  const Schedule schedule = schedule_of(params, traits);
  ShareGradParams products{};
  products.chunks = schedule.chunks;
  products.column_stride = static_cast<int32_t>(params.column_window.stride);
  products.row_stride = static_cast<int32_t>(params.row_window.stride);
  products.column_dilation = static_cast<int32_t>(params.column_window.dilation);
  products.row_dilation = static_cast<int32_t>(params.row_window.dilation);
  products.kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  products.kernel_rows = static_cast<int32_t>(params.row_window.kernel);
  products.taps = products.kernel_rows * products.kernel_columns;
  products.units = schedule.units;
  products.row_tiles = schedule.row_tiles;
  products.column_tiles = schedule.column_tiles;
  products.partial_sums = static_cast<float*>(workspace);
  int32_t chunk = 0;
  for (int32_t i = 0; i < params.grid.rows.patches; ++i) {
    for (int32_t j = 0; j < params.grid.columns.patches; ++j) {
      const int32_t index = products.patch_count++;
      const AxisWalk rows = forward_axis(params.row_window, params.grid.rows, i);
      const AxisWalk columns = forward_axis(params.column_window, params.grid.columns, j);
      const Im2colMap input = operand_map(params.type, params.input, params.input_strides, params.in_channels_per_group,
                                          params.batch, rows, columns, kChunkPixels);
      const Im2colMap grad_output = output_map(params.type, params.grad_output, params.grad_output_strides,
                                               params.out_channels, params.batch, rows, columns, kChunkPixels);
      products.grad_output[index] = encode(grad_output, params.kOperator);
      products.input[index] = encode(input, params.kOperator);
      products.patches[index] = {grad_output.columns, grad_output.rows, input.lower_column, input.lower_row, chunk};
      chunk += static_cast<int32_t>(patch_chunks(params, i, j));
    }
  }

  PartialSums partial_sums{};
  partial_sums.units = schedule.units;
  partial_sums.taps = products.taps;
  partial_sums.row_tiles = schedule.row_tiles;
  partial_sums.tile_rows = 64 * schedule.row_blocks;
  partial_sums.tile_units = schedule.tile_units;
  partial_sums.chunks = schedule.chunks;
  partial_sums.blocks = schedule.blocks;
  partial_sums.tiles = schedule.row_tiles * schedule.column_tiles;
  partial_sums.values = products.partial_sums;
  dispatch_half_type(params.kOperator, params.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    launch_products<T>(schedule, products, stream);
  });
  launch_reduce(params, partial_sums, stream);
}

}  // namespace splitkern::kernels::sm90
