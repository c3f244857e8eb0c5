// The matrix product behind the forward pass and the input gradient: each destination pixel gathers, tap by tap,
// the source pixels that its patch holds. Launched by gather_paths.cu through gather.h; instantiated in gather.cu.
// A tile is a run of destination pixels, linear over (image, row, column) of the whole call: patch borders only
// switch taps off, pixel by pixel, so there are no tails at them. Weights: [group][channel][tap][source channel].
#pragma once

#include "../plain/geometry.h"
#include "gather.h"
#include "tiles.h"

namespace splitkern::kernels::sm80 {

template <class Tile>
struct GatherShared {
  struct Stage {
    unsigned char source[Tile::kRows * kStageBytes];
    unsigned char weights[Tile::kColumns * kStageBytes];
  };
  struct Source {
    int32_t vectors;  // offset of the pixel under tap 0, inside the tensor or not
    uint32_t taps;    // bit t: row tap t stays in the patch; bit 16 + t: column tap t does
  };
  // A warp's share of the output passes through its scratch in slices of at most 128 bytes per pixel.
  static constexpr int32_t kSliceColumns = Tile::kWarpColumns * sizeof(typename Tile::T) <= 128
                                               ? Tile::kWarpColumns
                                               : 128 / static_cast<int32_t>(sizeof(typename Tile::T));
  static constexpr int32_t kSliceBytes = kSliceColumns * static_cast<int32_t>(sizeof(typename Tile::T));
  struct Epilogue {
    unsigned char scratch[kThreads / kWarpThreads][Tile::kWarpRows * kSliceBytes];
    int64_t destinations[Tile::kRows];  // element offset of each pixel's channel 0, or -1
  };
  // Before, during and after the main loop.
  union {
    Source sources[Tile::kRows];
    Stage stages[kStages];
    Epilogue epilogue;
  };
};

struct GatherPixel {
  bool exists;
  int64_t source_offset;  // elements
  int64_t destination_offset;
  uint32_t taps;  // as in GatherShared
};

// Which of the taps at position + t * step, t = 0 .. taps - 1, lie in [begin, end).
SPLITKERN_DEVICE uint32_t taps_in_patch(int32_t position, int32_t step, int32_t taps, int32_t begin, int32_t end) {
  uint32_t inside = 0;
  for (int32_t tap = 0; tap < taps; ++tap) {
    if (position >= begin && position < end) inside |= 1u << tap;
    position += step;
  }
  return inside;
}

SPLITKERN_DEVICE GatherPixel gather_pixel(const GatherParams& params, const GatherClass& rows,
                                          const GatherClass& columns, int64_t index) {
  GatherPixel pixel;
  int64_t image = index;
  const int32_t column_index = take_remainder(image, columns.count);
  const int32_t row_index = take_remainder(image, rows.count);
  pixel.exists = image < params.batch;
  const int32_t row = rows.first + row_index * params.rows.destination_step;
  const int32_t column = columns.first + column_index * params.columns.destination_step;
  const int32_t source_row = rows.source_first + row_index * params.rows.source_step;
  const int32_t source_column = columns.source_first + column_index * params.columns.source_step;
  pixel.destination_offset = image * params.destination_strides.batch + row * params.destination_strides.row +
                             column * params.destination_strides.column;
  pixel.source_offset = image * params.source_strides.batch + source_row * params.source_strides.row +
                        source_column * params.source_strides.column;
  const AxisPatches& row_patches = params.grid.rows;
  const AxisPatches& column_patches = params.grid.columns;
  const int32_t row_patch = find_patch(row_patches.out_bounds, row_patches.patches, row);
  const int32_t column_patch = find_patch(column_patches.out_bounds, column_patches.patches, column);
  const uint32_t row_taps = taps_in_patch(source_row, params.rows.source_tap, rows.taps,
                                          row_patches.in_bounds[row_patch], row_patches.in_bounds[row_patch + 1]);
  const uint32_t column_taps =
      taps_in_patch(source_column, params.columns.source_tap, columns.taps, column_patches.in_bounds[column_patch],
                    column_patches.in_bounds[column_patch + 1]);
  pixel.taps = pixel.exists ? row_taps | column_taps << kMaxTaps : 0;
  return pixel;
}

template <class Tile>
__global__ void gather_kernel(const __grid_constant__ GatherParams params) {
  using T = typename Tile::T;
  using Shared = GatherShared<Tile>;
  constexpr int32_t kElementBytes = static_cast<int32_t>(sizeof(T));
  constexpr int32_t kRowsPerPass = kThreads / kStageVectors;
  constexpr int32_t kSourcePasses = Tile::kRows / kRowsPerPass;
  constexpr int32_t kWeightPasses = Tile::kColumns / kRowsPerPass;

  Shared& shared = dynamic_shared<Shared>();
  const int32_t thread = static_cast<int32_t>(thread_index());
  const int32_t warp = static_cast<int32_t>(warp_index());
  const int32_t lane = static_cast<int32_t>(lane_index());
  const int32_t warp_row = warp / 2 * Tile::kWarpRows;
  const int32_t warp_column = warp % 2 * Tile::kWarpColumns;

  const Dim3 block = block_index();
  const int32_t class_index = static_cast<int32_t>(block.y);
  const GatherClass rows = params.rows.classes[class_index / params.columns.class_count];
  const GatherClass columns = params.columns.classes[class_index % params.columns.class_count];
  const int32_t column_tiles = (params.destination_channels + Tile::kColumns - 1) / Tile::kColumns;
  const int32_t row_tile = static_cast<int32_t>(block.x) / column_tiles;  // neighbours share the gathered pixels
  const int32_t first_channel = (static_cast<int32_t>(block.x) % column_tiles) * Tile::kColumns;
  const int32_t group = static_cast<int32_t>(block.z);
  const int64_t first_pixel = static_cast<int64_t>(row_tile) * Tile::kRows;
  if (first_pixel >= static_cast<int64_t>(params.batch) * rows.count * columns.count) return;  // of a smaller class

  // One thread works out a pixel; the four that copy its vectors take the result from shared memory.
  if (thread < Tile::kRows) {
    const GatherPixel pixel = gather_pixel(params, rows, columns, first_pixel + thread);
    shared.sources[thread] = {static_cast<int32_t>(pixel.source_offset / Tile::kVectorElements), pixel.taps};
  }
  block_barrier();
  const int32_t vector = thread % kStageVectors;
  const int32_t first_row = thread / kStageVectors;
  int32_t source_vectors[kSourcePasses];
  uint32_t taps[kSourcePasses];
#pragma unroll
  for (int32_t i = 0; i < kSourcePasses; ++i) {
    const typename Shared::Source& source = shared.sources[first_row + i * kRowsPerPass];
    source_vectors[i] = source.vectors;
    taps[i] = source.taps;
  }
  block_barrier();

  const int32_t channel_bytes = params.source_channels * kElementBytes;
  const unsigned char* source = static_cast<const unsigned char*>(params.source) +
                                static_cast<int64_t>(group) * channel_bytes + vector * kVectorBytes;
  const int32_t weight_row_bytes = params.weight_taps * channel_bytes;
  const unsigned char* weights =
      static_cast<const unsigned char*>(params.weights) +
      (static_cast<int64_t>(group) * params.destination_channels + first_channel) * weight_row_bytes +
      (rows.weight_first * params.kernel_columns + columns.weight_first) * channel_bytes + vector * kVectorBytes;
  int32_t weight_offsets[kWeightPasses];
#pragma unroll
  for (int32_t i = 0; i < kWeightPasses; ++i) {
    // Channels behind the last one repeat it: their sums are not stored.
    const int32_t row = first_row + i * kRowsPerPass;
    const int32_t last_row = params.destination_channels - first_channel - 1;
    weight_offsets[i] = (row < last_row ? row : last_row) * weight_row_bytes;
  }

  // The reduction: channels fastest, then the class's column taps, then its row taps.
  const int64_t source_column_bytes = params.columns.source_tap * params.source_strides.column * kElementBytes;
  const int64_t source_row_bytes =
      params.rows.source_tap * params.source_strides.row * kElementBytes - columns.taps * source_column_bytes;
  const int32_t weight_column_bytes = params.columns.weight_step * channel_bytes;
  const int32_t weight_row_step_bytes =
      params.rows.weight_step * params.kernel_columns * channel_bytes - columns.taps * weight_column_bytes;
  const int32_t stages = rows.taps * columns.taps * ((channel_bytes + kStageBytes - 1) / kStageBytes);
  int32_t row_tap = 0;
  int32_t column_tap = 0;
  int32_t channel = vector * kVectorBytes;  // of this thread's vector
  uint32_t valid = 0;                       // bit i: the tap lies in the patch of pass i's pixel
  const auto enter_tap = [&]() {
    const uint32_t tap_bits = 1u << row_tap | 0x10000u << column_tap;
    valid = 0;
#pragma unroll
    for (int32_t i = 0; i < kSourcePasses; ++i) valid |= (taps[i] & tap_bits) == tap_bits ? 1u << i : 0u;
  };
  enter_tap();
  const int32_t copy_offset = stage_offset(first_row, vector);  // passes are whole permutations apart
  static_assert(kRowsPerPass % 8 == 0);
  int32_t unissued = stages;
  int32_t write_stage = 0;
  const auto issue = [&]() {
    if (unissued > 0) {
      --unissued;
      typename Shared::Stage& stage = shared.stages[write_stage];
      const bool channel_exists = channel < channel_bytes;
#pragma unroll
      for (int32_t i = 0; i < kSourcePasses; ++i) {
        const bool exists = channel_exists && (valid & (1u << i)) != 0;
        copy_async<kVectorBytes>(
            stage.source + copy_offset + i * kRowsPerPass * kStageBytes,
            exists ? source + static_cast<int64_t>(source_vectors[i]) * kVectorBytes : params.source, exists);
      }
#pragma unroll
      for (int32_t i = 0; i < kWeightPasses; ++i) {
        copy_async<kVectorBytes>(stage.weights + copy_offset + i * kRowsPerPass * kStageBytes,
                                 weights + weight_offsets[i], channel_exists);
      }
      channel += kStageBytes;
      source += kStageBytes;
      weights += kStageBytes;
      if (channel - vector * kVectorBytes >= channel_bytes) {
        const int32_t stepped = channel - vector * kVectorBytes;
        channel -= stepped;
        source += source_column_bytes - stepped;
        weights += weight_column_bytes - stepped;
        if (++column_tap == columns.taps) {
          column_tap = 0;
          ++row_tap;
          source += source_row_bytes;
          weights += weight_row_step_bytes;
        }
        enter_tap();
      }
    }
    copy_async_commit();
    write_stage = write_stage + 1 == kStages ? 0 : write_stage + 1;
  };

  Accumulators<Tile> sums;
  clear(sums);
  if (stages > 0) {
    multiply_stages(sums, stages, issue, [&](Fragments<Tile>& fragments, int32_t stage, int32_t step) {
      load_fragments<Tile>(fragments, shared.stages[stage].source + warp_row * kStageBytes,
                           shared.stages[stage].weights + warp_column * kStageBytes, step);
    });
    block_barrier();
  }

  // Through shared memory to whole 16-byte vectors of neighbouring channels. Offsets are worked out again: they
  // would cost registers during the main loop.
  if (thread < Tile::kRows) {
    const GatherPixel pixel = gather_pixel(params, rows, columns, first_pixel + thread);
    shared.epilogue.destinations[thread] = pixel.exists ? pixel.destination_offset : -1;
  }
  block_barrier();
  constexpr int32_t kSliceColumns = Shared::kSliceColumns;
  constexpr int32_t kSliceVectors = Shared::kSliceBytes / kVectorBytes;
  constexpr int32_t kPixelsPerPass = static_cast<int32_t>(kWarpThreads) / kSliceVectors;
  unsigned char* scratch = shared.epilogue.scratch[warp];
  // A permutation of a row's vectors that keeps both the fragments' writes and the vectors' reads free of conflicts.
  const auto scratch_offset = [](int32_t row, int32_t vector_index) {
    const int32_t permutation = kElementBytes == 4 ? (row & 3) << 1 : row;
    return row * Shared::kSliceBytes + (vector_index ^ (permutation & (kSliceVectors - 1))) * kVectorBytes;
  };
#pragma unroll
  for (int32_t slice = 0; slice < Tile::kWarpColumns / kSliceColumns; ++slice) {
    const int32_t slice_channel = first_channel + warp_column + slice * kSliceColumns;  // within the group
#pragma unroll
    for (int32_t block_in_slice = 0; block_in_slice < kSliceColumns / 8; ++block_in_slice) {
      const int32_t pair = block_in_slice * 8 + lane % 4 * 2;
      float bias[2] = {0, 0};
      if (params.bias != nullptr) {
#pragma unroll
        for (int32_t k = 0; k < 2; ++k) {
          const int32_t channel = slice_channel + pair + k;
          if (channel < params.destination_channels) {
            bias[k] = to_accumulator(static_cast<const T*>(
                params.bias)[(group * params.destination_channels + channel) * params.bias_stride]);
          }
        }
      }
#pragma unroll
      for (int32_t i = 0; i < Tile::kRowBlocks; ++i) {
        const float (&values)[4] = sums.values[i][slice * (kSliceColumns / 8) + block_in_slice];
#pragma unroll
        for (int32_t half = 0; half < 2; ++half) {
          const float low = activate(values[half * 2] + bias[0], params.relu);
          const float high = activate(values[half * 2 + 1] + bias[1], params.relu);
          const int32_t byte = pair * kElementBytes;
          unsigned char* to =
              scratch + scratch_offset(i * 16 + half * 8 + lane / 4, byte / kVectorBytes) + byte % kVectorBytes;
          if constexpr (Tile::kTf32) {
            *reinterpret_cast<Vector8*>(to) = {{float_bits(low), float_bits(high)}};
          } else {
            *reinterpret_cast<uint32_t*>(to) = pack2<T>(low, high);
          }
        }
      }
    }
    warp_barrier();
    const int32_t slice_vector = lane % kSliceVectors;
    const int32_t channel = slice_channel + slice_vector * Tile::kVectorElements;
    const int32_t channels = params.destination_channels - channel;
#pragma unroll 4
    for (int32_t row = lane / kSliceVectors; row < Tile::kWarpRows; row += kPixelsPerPass) {
      const int64_t offset = shared.epilogue.destinations[warp_row + row];
      if (offset < 0 || channels <= 0) continue;
      const unsigned char* from = scratch + scratch_offset(row, slice_vector);
      T* to =
          static_cast<T*>(params.destination) + offset +
          (static_cast<int64_t>(group) * params.destination_channels + channel) * params.destination_strides.channel;
      if (params.vector_stores && channels >= Tile::kVectorElements) {
        store_global(to, *reinterpret_cast<const Vector16*>(from));
      } else {
#pragma unroll
        for (int32_t k = 0; k < Tile::kVectorElements; ++k) {
          if (k < channels) to[k * params.destination_strides.channel] = reinterpret_cast<const T*>(from)[k];
        }
      }
    }
    warp_barrier();
  }
}

}  // namespace splitkern::kernels::sm80
