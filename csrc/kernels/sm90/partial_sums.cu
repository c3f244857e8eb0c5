// Second half of the weight gradient on Hopper: adds the partial sums of partial_sums.h in a fixed order.
#include "partial_sums.h"

#include <algorithm>

#include "../budgets.h"
#include "../dispatch.h"

namespace splitkern::kernels::sm90 {
namespace {

constexpr int32_t kReduceThreads = 256;

struct ReduceParams {
  static constexpr const char* kOperator = ConvWeightGradParams::kOperator;
  PartialSums partial_sums;
  int32_t out_channels;
  int32_t in_channels;
  int32_t kernel_columns;
  bool accumulate;
  Strides4 output_strides;
  void* output;
};

// kGroups neighbours in a block share one vector of four columns: each adds every kGroups-th partial sum, then
// the first adds theirs in order.
template <class T, int kGroups>
__global__ void __launch_bounds__(kReduceThreads) partial_sums_kernel(const __grid_constant__ ReduceParams params) {
  constexpr int32_t kVectors = kReduceThreads / kGroups;
  struct Sums {
    float values[kGroups][kVectors][4];
  };
  static_assert(sizeof(Sums) <= shared_budget("sm90::partial_sums_kernel"));
  Sums& shared = dynamic_shared<Sums>();
  wait_for_previous_kernel();
  const int32_t vector = static_cast<int32_t>(thread_index()) % kVectors;
  const int32_t group = static_cast<int32_t>(thread_index()) / kVectors;
  const PartialSums& partial_sums = params.partial_sums;
  const int64_t vectors_per_row = static_cast<int64_t>(partial_sums.units) * (kUnitChannels / 4);
  const int64_t index = static_cast<int64_t>(block_index().x) * kVectors + vector;
  const int32_t row = static_cast<int32_t>(index / vectors_per_row);
  const int32_t column = static_cast<int32_t>(index - row * vectors_per_row) * 4;
  const int32_t unit = column / kUnitChannels;
  const int32_t channel_block = unit / partial_sums.taps;
  const int32_t tap = unit - channel_block * partial_sums.taps;
  const int32_t channel = channel_block * kUnitChannels + column % kUnitChannels;
  const bool wanted = row < params.out_channels && channel < params.in_channels;

  float sums[4] = {0, 0, 0, 0};
  if (wanted) {
    const int32_t row_tile = row / partial_sums.tile_rows;
    const int32_t column_tile = unit / partial_sums.tile_units;
    const int64_t tile = static_cast<int64_t>(column_tile) * partial_sums.row_tiles + row_tile;
    const int64_t items = static_cast<int64_t>(partial_sums.tiles) * partial_sums.chunks;
    // The block that holds item q is the last whose share begins at or before it.
    const int64_t first = ((tile * partial_sums.chunks + 1) * partial_sums.blocks - 1) / items;
    const int64_t last = ((tile + 1) * partial_sums.chunks * partial_sums.blocks - 1) / items;
    const int32_t tile_columns = partial_sums.tile_units * kUnitChannels;
    const int64_t slot_elements = static_cast<int64_t>(partial_sums.tile_rows) * tile_columns;
    const float* partial = partial_sums.values +
                           static_cast<int64_t>(row - row_tile * partial_sums.tile_rows) * tile_columns +
                           (column - column_tile * tile_columns);
#pragma unroll 4
    for (int64_t block = first + group; block <= last; block += kGroups) {
      const Vector16 value = load_global_streaming<Vector16>(partial + (block + tile) * slot_elements);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += bits_float(value.words[i]);
    }
  }
  if constexpr (kGroups > 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.values[group][vector][i] = sums[i];
    block_barrier();
    if (group != 0) return;
    for (int other = 1; other < kGroups; ++other) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += shared.values[other][vector][i];
    }
  }
  if (!wanted) return;
  const int32_t tap_row = tap / params.kernel_columns;
  T* output = static_cast<T*>(params.output) + row * params.output_strides.batch +
              channel * params.output_strides.channel + tap_row * params.output_strides.row +
              (tap - tap_row * params.kernel_columns) * params.output_strides.column;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (channel + i >= params.in_channels) return;
    if (params.accumulate) sums[i] += to_accumulator(*output);
    *output = from_accumulator<T>(sums[i]);
    output += params.output_strides.channel;
  }
}

template <int kGroups>
void launch_groups(const ReduceParams& params, ElementType type, cudaStream_t stream) {
  constexpr int64_t kVectors = kReduceThreads / kGroups;
  const int64_t vectors = int64_t{params.out_channels} * params.partial_sums.units * (kUnitChannels / 4);
  const Dim3 grid{static_cast<unsigned>((vectors + kVectors - 1) / kVectors), 1u, 1u};
  dispatch_half_type(params.kOperator, type, [&](auto tag) {
    launch_following(&partial_sums_kernel<typename decltype(tag)::Type, kGroups>, grid, Dim3{kReduceThreads, 1u, 1u},
                     sizeof(float) * 4 * kReduceThreads, stream, params);
  });
}

}  // namespace

int32_t reduction_blocks(int64_t tiles, int64_t chunks, int32_t multiprocessors) {
  // A share of fewer than four chunks costs more in partial sums than it saves.
  const int64_t blocks = std::clamp<int64_t>(tiles * chunks / 4, 1, multiprocessors);
  const int64_t multiple = blocks / tiles * tiles;
  return static_cast<int32_t>(10 * multiple >= 9 * blocks ? multiple : blocks);
}

void launch_reduce(const ConvWeightGradParams& params, const PartialSums& partial_sums, cudaStream_t stream) {
  ReduceParams reduce{};
  reduce.partial_sums = partial_sums;
  reduce.out_channels = params.out_channels;
  reduce.in_channels = params.in_channels_per_group;
  reduce.kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  reduce.accumulate = params.accumulate;
  reduce.output_strides = params.output_strides;
  reduce.output = params.output;
  const int32_t summands = partial_sums.blocks / partial_sums.tiles;
  if (summands >= 16) {
    launch_groups<16>(reduce, params.type, stream);
  } else if (summands >= 4) {
    launch_groups<4>(reduce, params.type, stream);
  } else {
    launch_groups<1>(reduce, params.type, stream);
  }
}

}  // namespace splitkern::kernels::sm90
