// Weight gradient of the sm_80 path, stage one: output channels x (taps x input channels) of one group, summed over
// a fixed share of all output pixels of the call. Launched by weight_grad.cu, which then adds the shares.
// Takes ConvWeightGradParams with `segments` shares and fp32 `partial_sums`.
#pragma once

#include "../plain/geometry.h"
#include "tiles.h"

namespace splitkern::kernels::sm80 {

// One thread works out one pixel, for stages at a time.
inline constexpr int32_t kPixelGroup = kThreads;

template <class Tile>
struct WeightGradShared {
  struct Stage {  // a row per pixel
    unsigned char grad_output[Tile::kStageElements * Tile::kRows * sizeof(typename Tile::T)];
    unsigned char input[Tile::kStageElements * Tile::kColumns * sizeof(typename Tile::T)];
  };
  struct alignas(16) Pixel {
    int64_t grad_output_bytes;  // offset, or -1: behind the last pixel
    int64_t input_bytes;        // offset under tap 0, inside the tensor or not
    int32_t row;                // of tap 0, counted from the patch's first input
    int32_t column;
    int32_t patch_rows;  // inputs of the patch
    int32_t patch_columns;
  };
  Stage stages[kStages];
  Pixel pixels[2][kPixelGroup];
};

template <class Tile>
SPLITKERN_DEVICE typename WeightGradShared<Tile>::Pixel weight_grad_pixel(const ConvWeightGradParams& params,
                                                                          int64_t index) {
  constexpr int64_t kElementBytes = sizeof(typename Tile::T);
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const Region region = output_region(params.grid, params.batch, 1);
  int64_t image = index;
  const int32_t column = region.column_begin + take_remainder(image, region.columns);
  const int32_t row = region.row_begin + take_remainder(image, region.rows);
  typename WeightGradShared<Tile>::Pixel pixel{-1, 0, 0, 0, 0, 0};
  if (image >= params.batch) return pixel;
  const int32_t row_patch = find_patch(rows.out_bounds, rows.patches, row);
  const int32_t column_patch = find_patch(columns.out_bounds, columns.patches, column);
  const int64_t input_row = row * params.row_window.stride - params.row_window.padding;
  const int64_t input_column = column * params.column_window.stride - params.column_window.padding;
  pixel.grad_output_bytes = (image * params.grad_output_strides.batch + row * params.grad_output_strides.row +
                             column * params.grad_output_strides.column) *
                            kElementBytes;
  pixel.input_bytes = (image * params.input_strides.batch + input_row * params.input_strides.row +
                       input_column * params.input_strides.column) *
                      kElementBytes;
  pixel.row = static_cast<int32_t>(input_row - rows.in_bounds[row_patch]);
  pixel.column = static_cast<int32_t>(input_column - columns.in_bounds[column_patch]);
  pixel.patch_rows = rows.in_bounds[row_patch + 1] - rows.in_bounds[row_patch];
  pixel.patch_columns = columns.in_bounds[column_patch + 1] - columns.in_bounds[column_patch];
  return pixel;
}

// --- Operands whose reduction runs over rows: a row of channels per pixel ----------------------------

// Byte offset of a vector of a row. Rows are multiples of 128 bytes, so without the permutation the rows of one
// vector column would all meet in the same banks. 16-bit fragments take one vector of eight rows at a time, tf32
// fragments eight elements of four rows.
template <class Tile, int32_t kChannels>
SPLITKERN_DEVICE int32_t pixel_row_offset(int32_t pixel, int32_t vector) {
  constexpr int32_t kRowBytes = kChannels * static_cast<int32_t>(sizeof(typename Tile::T));
  static_assert(kRowBytes % 128 == 0);
  const int32_t permutation = Tile::kTf32 ? (pixel & 3) << 1 : pixel & 7;
  return pixel * kRowBytes + (vector ^ permutation) * kVectorBytes;
}

// Where a lane finds its vectors of a warp's channels: pair j of vectors, of the four in 128 bytes, starts at
// offsets[j], later ones whole rows of banks further. Vector numbers meet in the permutation bit by bit.
struct LaneOffsets {
  int32_t offsets[4];
  SPLITKERN_DEVICE int32_t of(int32_t vector_pair) const { return offsets[vector_pair % 4] + vector_pair / 4 * 128; }
};

template <class Tile, int32_t kChannels>
SPLITKERN_DEVICE LaneOffsets lane_offsets(int32_t pixel, int32_t warp_channel, int32_t lane_vector) {
  const int32_t warp_vector = warp_channel / Tile::kVectorElements;
  LaneOffsets lane;
#pragma unroll
  for (int32_t j = 0; j < 4; ++j) {
    lane.offsets[j] = pixel_row_offset<Tile, kChannels>(pixel, (warp_vector | lane_vector) ^ (2 * j));
  }
  return lane;
}

// Fragments of one step; `row` and `column` are the warp's first within the tile.
template <class Tile>
SPLITKERN_DEVICE void load_fragments_transposed(Fragments<Tile>& fragments, const unsigned char* grad_output,
                                                const unsigned char* input, int32_t row, int32_t column, int32_t step) {
  constexpr int32_t kGradRowBytes = Tile::kRows * static_cast<int32_t>(sizeof(typename Tile::T));
  constexpr int32_t kInputRowBytes = Tile::kColumns * static_cast<int32_t>(sizeof(typename Tile::T));
  const int32_t lane = static_cast<int32_t>(lane_index());
  if constexpr (Tile::kTf32) {
    // Element by element: a matrix of 32-bit elements cannot be transposed on its way to the registers.
    const int32_t pixel = lane % 4;
    const int32_t byte = lane / 4 % 4 * 4;
    const LaneOffsets a = lane_offsets<Tile, Tile::kRows>(pixel, row, lane / 16);
    const LaneOffsets b = lane_offsets<Tile, Tile::kColumns>(pixel, column, lane / 16);
    const auto load = [](const unsigned char* address) { return to_tf32(*reinterpret_cast<const float*>(address)); };
#pragma unroll
    for (int32_t i = 0; i < Tile::kRowBlocks; ++i) {
#pragma unroll
      for (int32_t k = 0; k < 4; ++k) {
        fragments.a[i][k] = load(grad_output + a.of(i * 2 + k % 2) + (step * 8 + k / 2 * 4) * kGradRowBytes + byte);
      }
    }
#pragma unroll
    for (int32_t j = 0; j < Tile::kColumnBlocks; ++j) {
#pragma unroll
      for (int32_t k = 0; k < 2; ++k) {
        fragments.b[j][k] = load(input + b.of(j) + (step * 8 + k * 4) * kInputRowBytes + byte);
      }
    }
  } else {
    const int32_t low_bit = (lane >> 3) & 1;
    const int32_t high_bit = lane >> 4;
    const LaneOffsets a = lane_offsets<Tile, Tile::kRows>((lane & 7) + high_bit * 8, row, low_bit);
    const LaneOffsets b = lane_offsets<Tile, Tile::kColumns>((lane & 7) + low_bit * 8, column, high_bit);
#pragma unroll
    for (int32_t i = 0; i < Tile::kRowBlocks; ++i) {
      load_matrix_x4_transposed(fragments.a[i], grad_output + a.of(i) + step * 16 * kGradRowBytes);
    }
#pragma unroll
    for (int32_t j = 0; j < Tile::kColumnBlocks; j += 2) {
      uint32_t pair[4];
      load_matrix_x4_transposed(pair, input + b.of(j / 2) + step * 16 * kInputRowBytes);
#pragma unroll
      for (int32_t k = 0; k < 4; ++k) fragments.b[j + k / 2][k % 2] = pair[k];
    }
  }
}

template <class Tile>
__global__ void weight_grad_kernel(const __grid_constant__ ConvWeightGradParams params) {
  using T = typename Tile::T;
  using Shared = WeightGradShared<Tile>;
  constexpr int32_t kElementBytes = static_cast<int32_t>(sizeof(T));
  constexpr int32_t kPixels = Tile::kStageElements;  // of a stage
  constexpr int32_t kStagesPerGroup = kPixelGroup / kPixels;
  constexpr int32_t kRowVectors = Tile::kRows / Tile::kVectorElements;
  constexpr int32_t kColumnVectors = Tile::kColumns / Tile::kVectorElements;
  constexpr int32_t kGradPixelsPerPass = kThreads / kRowVectors;
  constexpr int32_t kInputPixelsPerPass = kThreads / kColumnVectors;
  constexpr int32_t kGradPasses = kPixels / kGradPixelsPerPass;
  constexpr int32_t kInputPasses = kPixels / kInputPixelsPerPass;
  static_assert(kGradPixelsPerPass * kGradPasses == kPixels && kInputPixelsPerPass * kInputPasses == kPixels);
  static_assert(kStagesPerGroup > kStages, "pixels are worked out a barrier before they are read");

  Shared& shared = dynamic_shared<Shared>();
  const int32_t thread = static_cast<int32_t>(thread_index());
  const int32_t warp = static_cast<int32_t>(warp_index());
  const int32_t lane = static_cast<int32_t>(lane_index());
  const int32_t warp_row = warp / 2 * Tile::kWarpRows;
  const int32_t warp_column = warp % 2 * Tile::kWarpColumns;

  const Dim3 block = block_index();
  const int32_t kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  const int32_t taps = static_cast<int32_t>(params.row_window.kernel) * kernel_columns;
  const int32_t weight_columns = taps * params.in_channels_per_group;
  const int32_t row_tiles = (params.out_channels_per_group + Tile::kRows - 1) / Tile::kRows;
  const int32_t first_row = static_cast<int32_t>(block.x) % row_tiles * Tile::kRows;
  const int32_t first_column = static_cast<int32_t>(block.x) / row_tiles * Tile::kColumns;
  const int32_t segment = static_cast<int32_t>(block.y);
  const int32_t group = static_cast<int32_t>(block.z);

  // This thread's vector of a grad_output row, and of an input row: one tap's channels.
  const int32_t grad_vector = thread % kRowVectors;
  const int32_t grad_channel = first_row + grad_vector * Tile::kVectorElements;
  const bool grad_channel_exists = grad_channel < params.out_channels_per_group;
  const unsigned char* grad_output =
      static_cast<const unsigned char*>(params.grad_output) +
      (static_cast<int64_t>(group) * params.out_channels_per_group + grad_channel) * kElementBytes;
  const int32_t input_vector = thread % kColumnVectors;
  const int32_t weight_column = first_column + input_vector * Tile::kVectorElements;
  const bool weight_column_exists = weight_column < weight_columns;
  const int32_t tap = weight_column_exists ? weight_column / params.in_channels_per_group : 0;
  const int32_t tap_row = tap / kernel_columns * static_cast<int32_t>(params.row_window.dilation);
  const int32_t tap_column = tap % kernel_columns * static_cast<int32_t>(params.column_window.dilation);
  const int32_t input_channel = weight_column_exists ? weight_column - tap * params.in_channels_per_group : 0;
  const unsigned char* input = static_cast<const unsigned char*>(params.input) +
                               (static_cast<int64_t>(group) * params.in_channels_per_group + input_channel +
                                tap_row * params.input_strides.row + tap_column * params.input_strides.column) *
                                   kElementBytes;

  // Shares are whole groups of pixels, linear over (image, row, column) of the call's output.
  const Region region = output_region(params.grid, params.batch, 1);
  const int64_t groups = (region_elements(region) + kPixelGroup - 1) / kPixelGroup;
  const int64_t first_group = groups * segment / params.segments;
  const int32_t group_count = static_cast<int32_t>(groups * (segment + 1) / params.segments - first_group);
  const int32_t stages = group_count * kStagesPerGroup;

  const auto find_pixels = [&](int32_t pixel_group) {
    shared.pixels[pixel_group & 1][thread] =
        weight_grad_pixel<Tile>(params, (first_group + pixel_group) * kPixelGroup + thread);
  };
  int32_t issued = 0;
  int32_t write_stage = 0;
  const auto issue = [&]() {
    if (issued < stages) {
      typename Shared::Stage& stage = shared.stages[write_stage];
      const int32_t pixel_group = issued / kStagesPerGroup;
      const int32_t stage_in_group = issued % kStagesPerGroup;
      const typename Shared::Pixel* pixels = shared.pixels[pixel_group & 1] + stage_in_group * kPixels;
#pragma unroll
      for (int32_t i = 0; i < kGradPasses; ++i) {
        const int32_t p = thread / kRowVectors + i * kGradPixelsPerPass;
        const int64_t offset = pixels[p].grad_output_bytes;
        const bool valid = grad_channel_exists && offset >= 0;
        copy_async<kVectorBytes>(stage.grad_output + pixel_row_offset<Tile, Tile::kRows>(p, grad_vector),
                                 valid ? grad_output + offset : params.grad_output, valid);
      }
#pragma unroll
      for (int32_t i = 0; i < kInputPasses; ++i) {
        const int32_t p = thread / kColumnVectors + i * kInputPixelsPerPass;
        const typename Shared::Pixel pixel = pixels[p];
        const bool valid =
            weight_column_exists &&
            static_cast<uint32_t>(pixel.row + tap_row) < static_cast<uint32_t>(pixel.patch_rows) &&
            static_cast<uint32_t>(pixel.column + tap_column) < static_cast<uint32_t>(pixel.patch_columns);
        copy_async<kVectorBytes>(stage.input + pixel_row_offset<Tile, Tile::kColumns>(p, input_vector),
                                 valid ? input + pixel.input_bytes : params.input, valid);
      }
      // Its half of the table was last read two issues ago, with a barrier since; it is first read behind another one.
      if (stage_in_group == 1 && pixel_group + 1 < group_count) find_pixels(pixel_group + 1);
      ++issued;
    }
    copy_async_commit();
    write_stage = write_stage + 1 == kStages ? 0 : write_stage + 1;
  };

  Accumulators<Tile> sums;
  clear(sums);
  if (stages > 0) {
    find_pixels(0);
    block_barrier();
    multiply_stages(sums, stages, issue, [&](Fragments<Tile>& fragments, int32_t stage, int32_t step) {
      load_fragments_transposed<Tile>(fragments, shared.stages[stage].grad_output, shared.stages[stage].input, warp_row,
                                      warp_column, step);
    });
  }

  float* partial_sums =
      static_cast<float*>(params.partial_sums) +
      (static_cast<int64_t>(segment) * params.out_channels + group * params.out_channels_per_group) * weight_columns;
#pragma unroll
  for (int32_t i = 0; i < Tile::kRowBlocks; ++i) {
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const int32_t row = first_row + warp_row + i * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int32_t j = 0; j < Tile::kColumnBlocks; ++j) {
        const int32_t column = first_column + warp_column + j * 8 + lane % 4 * 2;
        if (row < params.out_channels_per_group && column < weight_columns) {  // an even number of columns
          store_global(partial_sums + static_cast<int64_t>(row) * weight_columns + column,
                       Vector8{{float_bits(sums.values[i][j][half * 2]), float_bits(sums.values[i][j][half * 2 + 1])}});
        }
      }
    }
  }
}

}  // namespace splitkern::kernels::sm80
