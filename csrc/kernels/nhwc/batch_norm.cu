// Batch normalisation of patches, a vector of channels per thread. Called by the launchers of plain/batch_norm.cu. A
// block takes a fixed share of the pixels of one patch for up to 128 bytes of channels: its threads keep the channels'
// parameters or sums in registers and walk over pixels; lanes, blocks and segments are then merged in a fixed order.
// Every kernel reads and writes each element once.
#include "../batch_norm_arithmetic.h"
#include "../budgets.h"
#include "../dispatch.h"
#include "fast_divisor.h"
#include "nhwc.h"
#include "vectors.h"

namespace splitkern::kernels::nhwc {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kMaxTileBytes = 128;  // of a pixel's channels in one block
constexpr int32_t kMaxSegments = 1024;
constexpr int64_t kMaxPixels = (int64_t{1} << 31) - 1;

// --- Blocks and pixels ----------------------------------------------------------------------------

// How a launch is cut: blocks = channel tiles x shares x patches, channel tiles fastest.
struct Blocks {
  uint32_t tile_shift;  // log2 of the vectors of a channel tile
  FastDivisor channel_tiles;
  FastDivisor shares;
  FastDivisor column_patches;  // of the launch
};

struct StatsParams : BatchNormStatsParams {
  Blocks blocks;
};
struct ApplyParams : BatchNormApplyParams {
  Blocks blocks;
};
struct BackwardReduceParams : BatchNormBackwardReduceParams {
  Blocks blocks;
};
struct BackwardApplyParams : BatchNormBackwardApplyParams {
  Blocks blocks;
};

// Of `pixels` pixels, share i of n has pixels / n, and one more where i < pixels % n.
struct Share {
  int32_t first;
  int32_t count;
};
SPLITKERN_DEVICE Share share_of(int32_t pixels, int32_t shares, int32_t index) {
  const int32_t least = pixels / shares;
  const int32_t extra = pixels - least * shares;
  return {index * least + (index < extra ? index : extra), least + (index < extra ? 1 : 0)};
}

struct PatchBox {
  int64_t patch;  // index among all patches of the call
  int32_t row_begin;
  int32_t rows;
  int32_t column_begin;
  int32_t columns;
};

template <class Params>
SPLITKERN_DEVICE PatchBox patch_box(const Params& params, int32_t row_patch, int32_t column_patch) {
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  PatchBox box;
  box.patch =
      static_cast<int64_t>(rows.first_patch + row_patch) * params.column_patches + columns.first_patch + column_patch;
  box.row_begin = rows.in_bounds[row_patch];
  box.rows = rows.in_bounds[row_patch + 1] - box.row_begin;
  box.column_begin = columns.in_bounds[column_patch];
  box.columns = columns.in_bounds[column_patch + 1] - box.column_begin;
  return box;
}

// What one thread does: the vector of channels that begins at `channel`, in every lanes-th pixel of the share.
struct Work {
  PatchBox box;
  int32_t pixels;  // of the patch, over all images
  int32_t share_index;
  Share share;
  uint32_t tile_channel;  // first channel of the block
  uint32_t channel;       // first channel of the thread
  uint32_t lane;
  uint32_t lanes;
  int32_t count;  // pixels of this thread
};

template <int kElements, class Params>
SPLITKERN_DEVICE Work work_of(const Params& params) {
  const Blocks& blocks = params.blocks;
  const uint32_t block = block_index().x;
  const uint32_t share_and_patch = divide(block, blocks.channel_tiles);
  const uint32_t patch = divide(share_and_patch, blocks.shares);
  const uint32_t row_patch = divide(patch, blocks.column_patches);
  Work work;
  work.box = patch_box(params, static_cast<int32_t>(row_patch),
                       static_cast<int32_t>(patch - row_patch * blocks.column_patches.divisor));
  work.pixels = params.batch * work.box.rows * work.box.columns;
  work.share_index = static_cast<int32_t>(share_and_patch - patch * blocks.shares.divisor);
  work.share = share_of(work.pixels, static_cast<int32_t>(blocks.shares.divisor), work.share_index);
  const uint32_t tile = block - share_and_patch * blocks.channel_tiles.divisor;
  work.tile_channel = (tile << blocks.tile_shift) * kElements;
  work.channel = work.tile_channel + (thread_index() & ((1u << blocks.tile_shift) - 1)) * kElements;
  work.lane = thread_index() >> blocks.tile_shift;
  work.lanes = kThreads >> blocks.tile_shift;
  const int32_t behind = work.share.count - static_cast<int32_t>(work.lane);
  work.count = behind <= 0 ? 0 : (behind - 1) / static_cast<int32_t>(work.lanes) + 1;
  if (work.channel >= static_cast<uint32_t>(params.channels)) work.count = 0;
  return work;
}

// The pixels of a thread, one after the other.
struct Walk {
  int32_t image;
  int32_t row;  // within the patch, as the column
  int32_t column;
  int32_t step_images;
  int32_t step_rows;
  int32_t step_columns;

  SPLITKERN_DEVICE explicit Walk(const Work& work) {
    const int32_t pixel = work.share.first + static_cast<int32_t>(work.lane);
    split(work.box, pixel, image, row, column);
    split(work.box, static_cast<int32_t>(work.lanes), step_images, step_rows, step_columns);
  }
  static SPLITKERN_DEVICE void split(const PatchBox& box, int32_t pixel, int32_t& images, int32_t& rows,
                                     int32_t& columns) {
    const uint32_t row = static_cast<uint32_t>(pixel) / static_cast<uint32_t>(box.columns);
    columns = pixel - static_cast<int32_t>(row) * box.columns;
    images = static_cast<int32_t>(row / static_cast<uint32_t>(box.rows));
    rows = static_cast<int32_t>(row) - images * box.rows;
  }
  SPLITKERN_DEVICE void next(const PatchBox& box) {
    column += step_columns;
    row += step_rows;
    image += step_images;
    if (column >= box.columns) {
      column -= box.columns;
      ++row;
    }
    if (row >= box.rows) {
      row -= box.rows;
      ++image;
    }
  }
  // Of the pixel from the first one of the patch.
  SPLITKERN_DEVICE int64_t offset(const Strides4& strides) const {
    return static_cast<uint32_t>(image) * strides.batch + static_cast<uint32_t>(row) * strides.row +
           static_cast<uint32_t>(column) * strides.column;
  }
};

template <class T>
SPLITKERN_DEVICE const T* first_pixel(const void* tensor, const Strides4& strides, const Work& work) {
  return static_cast<const T*>(tensor) + work.box.row_begin * strides.row + work.box.column_begin * strides.column +
         work.channel;
}

// --- Parameters of the block's channels -----------------------------------------------------------

// kCount numbers per channel, staged so that every thread finds those of its channels as vectors.
template <int kCount, int kTileChannels>
struct alignas(16) Stage {
  float values[kCount][kTileChannels];

  // value(i, channel) gives number i of a channel. Ends in a barrier.
  template <class Value>
  SPLITKERN_DEVICE void fill(const Work& work, uint32_t tile_channels, int32_t channels, Value&& value) {
    for (uint32_t at = thread_index(); at < kCount * tile_channels; at += kThreads) {
      const uint32_t number = at / tile_channels;
      const uint32_t channel = work.tile_channel + at - number * tile_channels;
      if (channel < static_cast<uint32_t>(channels)) {
        values[number][channel - work.tile_channel] = value(number, static_cast<int32_t>(channel));
      }
    }
    block_barrier();
  }
  template <int kElements>
  SPLITKERN_DEVICE void read(const Work& work, int number, float (&result)[kElements]) const {
    const uint32_t first = work.channel - work.tile_channel;
#pragma unroll
    for (int i = 0; i < kElements; ++i) result[i] = values[number][first + i];
  }
};

template <int kBytes, class T>
constexpr int kTileChannelsOf = kMaxTileBytes / sizeof(T);

// mean, invstd, weight, bias: what normalise() needs.
template <class T, class Params>
SPLITKERN_DEVICE float normalising_number(const Params& params, int64_t patch, uint32_t number, int32_t channel) {
  switch (number) {
    case 0:
      return *statistic_at<float>(params.mean, patch, channel);
    case 1:
      return *statistic_at<float>(params.invstd, patch, channel);
    case 2:
      return parameter_or<T>(params.weight, channel, 1);
    default:
      return parameter_or<T>(params.bias, channel, 0);
  }
}

// --- Sums over the lanes of a block ---------------------------------------------------------------

// Parts that are merged: a thread for every channel of the tile takes kElements lanes, then one takes what is left.
template <int kElements>
struct alignas(16) LaneSums {
  float first[kThreads * kElements];
  float second[kThreads * kElements];
  float first_of_group[kThreads];
  float second_of_group[kThreads];
  int32_t count_of_group[kThreads];
};

struct Moments {
  float mean;
  float m2;
  int32_t count;
};

// Chan, Golub and LeVeque's formula for many parts at once: the mean about the first part's, then the deviations.
template <class Count, class Mean, class M2>
SPLITKERN_DEVICE Moments merged(int32_t parts, Count&& count_of, Mean&& mean_of, M2&& m2_of) {
  const float pivot = mean_of(0);
  Moments all{0.0f, 0.0f, 0};
  float sum = 0;
  for (int32_t i = 0; i < parts; ++i) {
    const int32_t count = count_of(i);
    all.count += count;
    sum = multiply_add(static_cast<float>(count), mean_of(i) - pivot, sum);
  }
  all.mean = all.count == 0 ? pivot : pivot + sum / static_cast<float>(all.count);
  for (int32_t i = 0; i < parts; ++i) {
    const float delta = mean_of(i) - all.mean;
    all.m2 += multiply_add(static_cast<float>(count_of(i)) * delta, delta, m2_of(i));
  }
  return all;
}

// How many pixels of the share a lane has.
SPLITKERN_DEVICE int32_t pixels_of_lane(const Work& work, uint32_t lane) {
  const int32_t behind = work.share.count - static_cast<int32_t>(lane);
  return behind <= 0 ? 0 : (behind - 1) / static_cast<int32_t>(work.lanes) + 1;
}

// --- Statistics -----------------------------------------------------------------------------------

// Adds kPixels values of every channel to its mean and its sum of squared deviations.
template <class T, int kBytes, int kPixels>
SPLITKERN_DEVICE void add_pixels(const Words<kBytes> (&pixels)[kPixels], float (&mean)[kBytes / sizeof(T)],
                                 float (&m2)[kBytes / sizeof(T)], int32_t& count) {
  const float before = static_cast<float>(count);
  count += kPixels;
  const float share = static_cast<float>(kPixels) / static_cast<float>(count);
  const float spread = before * share;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kBytes / sizeof(T)); ++i) {
    float values[kPixels];
    float sum = 0;
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      values[p] = element_of<T>(pixels[p], i);
      sum = p == 0 ? values[p] : sum + values[p];
    }
    const float new_mean = sum * (1.0f / kPixels);  // a power of two: exact
    float new_m2 = 0;
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const float deviation = values[p] - new_mean;
      new_m2 = multiply_add(deviation, deviation, new_m2);
    }
    const float delta = new_mean - mean[i];
    mean[i] = multiply_add(delta, share, mean[i]);
    // In this order the first values, whose spread is 0, may be as large as they like.
    m2[i] = multiply_add(delta * spread, delta, m2[i] + new_m2);
  }
}

template <class T, int kBytes>
__global__ void batch_norm_stats_kernel(const __grid_constant__ StatsParams params) {
  constexpr int kElements = kBytes / sizeof(T);
  constexpr int kPixels = 4;
  const Work work = work_of<kElements>(params);
  const T* input = first_pixel<T>(params.input, params.input_strides, work);
  Walk walk(work);
  float mean[kElements] = {};
  float m2[kElements] = {};
  int32_t count = 0;
  while (count + kPixels <= work.count) {
    Words<kBytes> pixels[kPixels];
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      pixels[p] = load_words<kBytes>(input + walk.offset(params.input_strides));
      walk.next(work.box);
    }
    add_pixels<T>(pixels, mean, m2, count);
  }
  while (count < work.count) {
    const Words<kBytes> pixels[1] = {load_words<kBytes>(input + walk.offset(params.input_strides))};
    walk.next(work.box);
    add_pixels<T>(pixels, mean, m2, count);
  }

  auto& shared = dynamic_shared<LaneSums<kElements>>();
  static_assert(sizeof(shared) <= shared_budget("nhwc::batch_norm_stats_kernel"));
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    shared.first[thread_index() * kElements + i] = mean[i];
    shared.second[thread_index() * kElements + i] = m2[i];
  }
  block_barrier();
  const uint32_t tile_channels = kElements << params.blocks.tile_shift;
  const uint32_t channel = thread_index() % tile_channels;
  const uint32_t group = thread_index() / tile_channels;
  const auto lane_index_of = [&](int32_t i) { return (group * kElements + i) * tile_channels + channel; };
  const Moments part = merged(
      kElements, [&](int32_t i) { return pixels_of_lane(work, group * kElements + i); },
      [&](int32_t i) { return shared.first[lane_index_of(i)]; },
      [&](int32_t i) { return shared.second[lane_index_of(i)]; });
  shared.first_of_group[thread_index()] = part.mean;
  shared.second_of_group[thread_index()] = part.m2;
  shared.count_of_group[thread_index()] = part.count;
  block_barrier();
  if (group != 0 || work.tile_channel + channel >= static_cast<uint32_t>(params.channels)) return;
  const auto group_index_of = [&](int32_t i) { return i * tile_channels + channel; };
  const Moments all = merged(
      kThreads / tile_channels, [&](int32_t i) { return shared.count_of_group[group_index_of(i)]; },
      [&](int32_t i) { return shared.first_of_group[group_index_of(i)]; },
      [&](int32_t i) { return shared.second_of_group[group_index_of(i)]; });
  const int64_t at =
      (work.share_index * params.patches + work.box.patch) * params.channels + work.tile_channel + channel;
  static_cast<float*>(params.partial_mean)[at] = all.mean;
  static_cast<float*>(params.partial_m2)[at] = all.m2;
}

// --- Merging the segments -------------------------------------------------------------------------

constexpr int32_t kMergeChannels = 8;  // neighbours, one sector of memory
constexpr int32_t kMergeThreads = 512;
constexpr int32_t kMergeLanes = kMergeThreads / kMergeChannels;
constexpr int32_t kSegmentsPerLane = kMaxSegments / kMergeLanes;
constexpr int32_t kMergeWarps = kMergeThreads / kWarpThreads;
static_assert(kMaxSegments % kMergeLanes == 0 && kWarpThreads % kMergeChannels == 0);

struct MergeSums {
  float sums[2][kMergeWarps][kMergeChannels];
};

// What a thread of a merging block reads: the segments lane, lane + kMergeLanes, ... of one channel of one patch.
struct MergeWork {
  PatchBox box;
  int32_t pixels;
  int32_t channel;
  int32_t lane;
  bool exists;
  int64_t first_partial;  // of segment 0
  int64_t segment_step;
};

template <class Params>
SPLITKERN_DEVICE MergeWork merge_work(const Params& params) {
  const uint32_t channel_groups = (static_cast<uint32_t>(params.channels) + kMergeChannels - 1) / kMergeChannels;
  const uint32_t patch = block_index().x / channel_groups;
  const uint32_t row_patch = divide(patch, params.blocks.column_patches);
  MergeWork work;
  work.box = patch_box(params, static_cast<int32_t>(row_patch),
                       static_cast<int32_t>(patch - row_patch * params.blocks.column_patches.divisor));
  work.pixels = params.batch * work.box.rows * work.box.columns;
  work.channel = static_cast<int32_t>((block_index().x - patch * channel_groups) * kMergeChannels +
                                      thread_index() % kMergeChannels);
  work.lane = static_cast<int32_t>(thread_index() / kMergeChannels);
  work.exists = work.channel < params.channels;
  work.first_partial = work.box.patch * params.channels + work.channel;
  work.segment_step = params.patches * params.channels;
  return work;
}

// The thread's segments, 0 for those that are not there.
template <class Params>
SPLITKERN_DEVICE void read_segments(const Params& params, const MergeWork& work, const void* partials,
                                    float (&values)[kSegmentsPerLane]) {
#pragma unroll
  for (int32_t i = 0; i < kSegmentsPerLane; ++i) {
    const int32_t segment = work.lane + i * kMergeLanes;
    values[i] = 0;
    if (work.exists && segment < params.segments) {
      values[i] = static_cast<const float*>(partials)[work.first_partial + segment * work.segment_step];
    }
  }
}

// The sum over all lanes of a channel, in every thread of the channel. `sums` is used once per kernel.
SPLITKERN_DEVICE float sum_over_lanes(float value, float (&sums)[kMergeWarps][kMergeChannels]) {
#pragma unroll
  for (uint32_t step = kMergeChannels; step < kWarpThreads; step *= 2) value += shuffle_xor(value, step);
  const uint32_t channel = thread_index() % kMergeChannels;
  if (lane_index() < kMergeChannels) sums[thread_index() / kWarpThreads][channel] = value;
  block_barrier();
  float sum = 0;
#pragma unroll
  for (int32_t warp = 0; warp < kMergeWarps; ++warp) sum += sums[warp][channel];
  return sum;
}

__global__ void batch_norm_stats_merge_kernel(const __grid_constant__ StatsParams params) {
  auto& shared = dynamic_shared<MergeSums>();
  static_assert(sizeof(shared) <= shared_budget("nhwc::batch_norm_stats_merge_kernel"));
  const MergeWork work = merge_work(params);
  float means[kSegmentsPerLane];
  float m2s[kSegmentsPerLane];
  read_segments(params, work, params.partial_mean, means);
  read_segments(params, work, params.partial_m2, m2s);
  // As merged(), with the segments of all lanes at once.
  const float pivot = work.exists ? static_cast<const float*>(params.partial_mean)[work.first_partial] : 0.0f;
  const int32_t least = work.pixels / params.segments;
  const int32_t extra = work.pixels - least * params.segments;
  float counts[kSegmentsPerLane];
  float sum = 0;
#pragma unroll
  for (int32_t i = 0; i < kSegmentsPerLane; ++i) {
    const int32_t segment = work.lane + i * kMergeLanes;
    counts[i] = segment < params.segments ? static_cast<float>(least + (segment < extra ? 1 : 0)) : 0.0f;
    sum = multiply_add(counts[i], means[i] - pivot, sum);
  }
  const float pixels = static_cast<float>(work.pixels);
  const float mean = pivot + sum_over_lanes(sum, shared.sums[0]) / pixels;
  float m2 = 0;
#pragma unroll
  for (int32_t i = 0; i < kSegmentsPerLane; ++i) {
    const float delta = means[i] - mean;
    m2 += multiply_add(counts[i] * delta, delta, m2s[i]);
  }
  m2 = sum_over_lanes(m2, shared.sums[1]);
  if (!work.exists || work.lane != 0) return;
  *statistic_at<float>(params.mean, work.box.patch, work.channel) = mean;
  *statistic_at<float>(params.m2, work.box.patch, work.channel) = m2;
  if (params.invstd.values != nullptr) {
    *statistic_at<float>(params.invstd, work.box.patch, work.channel) =
        1.0f / square_root(m2 / pixels + static_cast<float>(params.eps));
  }
}

// --- Apply ----------------------------------------------------------------------------------------

// kPixels at a time while there are so many, then one by one: step(pixels) with an IntTag.
template <int kPixels, class Step>
SPLITKERN_DEVICE void each_pixel(int32_t count, Step&& step) {
  int32_t left = count;
  for (; left >= kPixels; left -= kPixels) step(IntTag<kPixels>{});
  for (; left > 0; --left) step(IntTag<1>{});
}

template <class T, int kBytes>
__global__ void batch_norm_apply_kernel(const __grid_constant__ ApplyParams params) {
  constexpr int kElements = kBytes / sizeof(T);
  auto& stage = dynamic_shared<Stage<4, kTileChannelsOf<kBytes, T>>>();
  static_assert(sizeof(stage) <= shared_budget("nhwc::batch_norm_apply_kernel"));
  const Work work = work_of<kElements>(params);
  stage.fill(work, kElements << params.blocks.tile_shift, params.channels, [&](uint32_t number, int32_t channel) {
    return normalising_number<T>(params, work.box.patch, number, channel);
  });
  if (work.count == 0) return;
  float mean[kElements];
  float invstd[kElements];
  float weight[kElements];
  float bias[kElements];
  stage.read(work, 0, mean);
  stage.read(work, 1, invstd);
  stage.read(work, 2, weight);
  stage.read(work, 3, bias);
  const float threshold = activation_threshold<float>(params.relu);
  const T* input = first_pixel<T>(params.input, params.input_strides, work);
  T* output = const_cast<T*>(first_pixel<T>(params.output, params.output_strides, work));
  Walk walk(work);
  each_pixel<4>(work.count, [&](auto tag) {
    constexpr int kPixels = decltype(tag)::kInt;
    Words<kBytes> pixels[kPixels];
    int64_t offsets[kPixels];
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      pixels[p] = load_words<kBytes>(input + walk.offset(params.input_strides));
      offsets[p] = walk.offset(params.output_strides);
      walk.next(work.box);
    }
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      float values[kElements];
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        values[i] =
            activated(normalise(element_of<T>(pixels[p], i), mean[i], invstd[i], weight[i], bias[i]), threshold);
      }
      store_words(output + offsets[p], rounded<T, kBytes>(values));
    }
  });
}

// --- Backward -------------------------------------------------------------------------------------

template <int kElements, int kTileChannels>
struct ReduceShared {
  Stage<4, kTileChannels> stage;
  LaneSums<kElements> lanes;
};

template <class T, int kBytes>
__global__ void batch_norm_backward_reduce_kernel(const __grid_constant__ BackwardReduceParams params) {
  constexpr int kElements = kBytes / sizeof(T);
  auto& shared = dynamic_shared<ReduceShared<kElements, kTileChannelsOf<kBytes, T>>>();
  static_assert(sizeof(shared) <= shared_budget("nhwc::batch_norm_backward_reduce_kernel"));
  const Work work = work_of<kElements>(params);
  shared.stage.fill(
      work, kElements << params.blocks.tile_shift, params.channels,
      [&](uint32_t number, int32_t channel) { return normalising_number<T>(params, work.box.patch, number, channel); });
  float sum_grad[kElements] = {};
  float sum_grad_centered[kElements] = {};
  if (work.count > 0) {
    float mean[kElements];
    float invstd[kElements];
    float weight[kElements];
    float bias[kElements];
    shared.stage.read(work, 0, mean);
    shared.stage.read(work, 1, invstd);
    shared.stage.read(work, 2, weight);
    shared.stage.read(work, 3, bias);
    const float threshold = activation_threshold<float>(params.relu);
    const T* input = first_pixel<T>(params.input, params.input_strides, work);
    const T* grad_output = first_pixel<T>(params.grad_output, params.grad_output_strides, work);
    Walk walk(work);
    each_pixel<2>(work.count, [&](auto tag) {
      constexpr int kPixels = decltype(tag)::kInt;
      Words<kBytes> pixels[kPixels];
      Words<kBytes> grads[kPixels];
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        pixels[p] = load_words<kBytes>(input + walk.offset(params.input_strides));
        grads[p] = load_words<kBytes>(grad_output + walk.offset(params.grad_output_strides));
        walk.next(work.box);
      }
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const float value = element_of<T>(pixels[p], i);
          const float grad =
              masked(element_of<T>(grads[p], i), normalise(value, mean[i], invstd[i], weight[i], bias[i]), threshold);
          sum_grad[i] += grad;
          sum_grad_centered[i] = multiply_add(grad, value - mean[i], sum_grad_centered[i]);
        }
      }
    });
  }

  auto& lanes = shared.lanes;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    lanes.first[thread_index() * kElements + i] = sum_grad[i];
    lanes.second[thread_index() * kElements + i] = sum_grad_centered[i];
  }
  block_barrier();
  const uint32_t tile_channels = kElements << params.blocks.tile_shift;
  const uint32_t channel = thread_index() % tile_channels;
  const uint32_t group = thread_index() / tile_channels;
  float first = 0;
  float second = 0;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    first += lanes.first[(group * kElements + i) * tile_channels + channel];
    second += lanes.second[(group * kElements + i) * tile_channels + channel];
  }
  lanes.first_of_group[thread_index()] = first;
  lanes.second_of_group[thread_index()] = second;
  block_barrier();
  if (group != 0 || work.tile_channel + channel >= static_cast<uint32_t>(params.channels)) return;
  first = 0;
  second = 0;
  for (uint32_t i = 0; i < kThreads / tile_channels; ++i) {
    first += lanes.first_of_group[i * tile_channels + channel];
    second += lanes.second_of_group[i * tile_channels + channel];
  }
  const int64_t at =
      (work.share_index * params.patches + work.box.patch) * params.channels + work.tile_channel + channel;
  static_cast<float*>(params.partial_sum_grad)[at] = first;
  static_cast<float*>(params.partial_sum_grad_centered)[at] = second;
}

__global__ void batch_norm_backward_reduce_merge_kernel(const __grid_constant__ BackwardReduceParams params) {
  auto& shared = dynamic_shared<MergeSums>();
  static_assert(sizeof(shared) <= shared_budget("nhwc::batch_norm_backward_reduce_merge_kernel"));
  const MergeWork work = merge_work(params);
  float grads[kSegmentsPerLane];
  float centered[kSegmentsPerLane];
  read_segments(params, work, params.partial_sum_grad, grads);
  read_segments(params, work, params.partial_sum_grad_centered, centered);
  float sum_grad = 0;
  float sum_grad_centered = 0;
#pragma unroll
  for (int32_t i = 0; i < kSegmentsPerLane; ++i) {
    sum_grad += grads[i];
    sum_grad_centered += centered[i];
  }
  sum_grad = sum_over_lanes(sum_grad, shared.sums[0]);
  sum_grad_centered = sum_over_lanes(sum_grad_centered, shared.sums[1]);
  if (!work.exists || work.lane != 0) return;
  *statistic_at<float>(params.sum_grad, work.box.patch, work.channel) = sum_grad;
  *statistic_at<float>(params.sum_grad_centered, work.box.patch, work.channel) = sum_grad_centered;
}

template <class T, int kBytes>
__global__ void batch_norm_backward_apply_kernel(const __grid_constant__ BackwardApplyParams params) {
  constexpr int kElements = kBytes / sizeof(T);
  auto& stage = dynamic_shared<Stage<6, kTileChannelsOf<kBytes, T>>>();
  static_assert(sizeof(stage) <= shared_budget("nhwc::batch_norm_backward_apply_kernel"));
  const Work work = work_of<kElements>(params);
  const bool constant_statistics = params.sum_grad.values == nullptr;
  stage.fill(work, kElements << params.blocks.tile_shift, params.channels, [&](uint32_t number, int32_t channel) {
    if (number < 4) return normalising_number<T>(params, work.box.patch, number, channel);
    if (constant_statistics) return 0.0f;
    const InputGradient<float> of = input_gradient(
        *statistic_at<float>(params.invstd, work.box.patch, channel), parameter_or<T>(params.weight, channel, 1),
        *statistic_at<float>(params.sum_grad, work.box.patch, channel),
        *statistic_at<float>(params.sum_grad_centered, work.box.patch, channel), static_cast<float>(work.pixels));
    return number == 4 ? of.mean_grad : of.slope;
  });
  if (work.count == 0) return;
  float mean[kElements];
  float invstd[kElements];
  float weight[kElements];
  float bias[kElements];
  float mean_grad[kElements];
  float slope[kElements];
  stage.read(work, 0, mean);
  stage.read(work, 1, invstd);
  stage.read(work, 2, weight);
  stage.read(work, 3, bias);
  stage.read(work, 4, mean_grad);
  stage.read(work, 5, slope);
  const float threshold = activation_threshold<float>(params.relu);
  const T* input = first_pixel<T>(params.input, params.input_strides, work);
  const T* grad_output = first_pixel<T>(params.grad_output, params.grad_output_strides, work);
  T* output = const_cast<T*>(first_pixel<T>(params.output, params.output_strides, work));
  Walk walk(work);
  each_pixel<2>(work.count, [&](auto tag) {
    constexpr int kPixels = decltype(tag)::kInt;
    Words<kBytes> pixels[kPixels];
    Words<kBytes> grads[kPixels];
    int64_t offsets[kPixels];
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      pixels[p] = load_words<kBytes>(input + walk.offset(params.input_strides));
      grads[p] = load_words<kBytes>(grad_output + walk.offset(params.grad_output_strides));
      offsets[p] = walk.offset(params.output_strides);
      walk.next(work.box);
    }
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      float values[kElements];
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const float value = element_of<T>(pixels[p], i);
        const float grad =
            masked(element_of<T>(grads[p], i), normalise(value, mean[i], invstd[i], weight[i], bias[i]), threshold);
        const InputGradient<float> of{mean_grad[i], slope[i], weight[i] * invstd[i]};
        values[i] = constant_statistics ? of.scale * grad : grad_of_input(of, grad, value - mean[i]);
      }
      store_words(output + offsets[p], rounded<T, kBytes>(values));
    }
  });
}

// --- Launching ------------------------------------------------------------------------------------

int64_t bytes_of(const BatchNormStatsParams& params) {
  return vector_bytes(params.type, params.batch, params.channels,
                      {{"input", params.input, &params.input_strides, element_bytes(params.type)}});
}
int64_t bytes_of(const BatchNormApplyParams& params) {
  return vector_bytes(params.type, params.batch, params.channels,
                      {{"input", params.input, &params.input_strides, element_bytes(params.type)},
                       {"output", params.output, &params.output_strides, element_bytes(params.type)}});
}
int64_t bytes_of(const BatchNormBackwardReduceParams& params) {
  return vector_bytes(params.type, params.batch, params.channels,
                      {{"grad_output", params.grad_output, &params.grad_output_strides, element_bytes(params.type)},
                       {"input", params.input, &params.input_strides, element_bytes(params.type)}});
}
int64_t bytes_of(const BatchNormBackwardApplyParams& params) {
  return vector_bytes(params.type, params.batch, params.channels,
                      {{"grad_output", params.grad_output, &params.grad_output_strides, element_bytes(params.type)},
                       {"input", params.input, &params.input_strides, element_bytes(params.type)},
                       {"output", params.output, &params.output_strides, element_bytes(params.type)}});
}

int32_t largest_extent(const AxisPatches& axis) {
  int32_t largest = 0;
  for (int32_t i = 0; i < axis.patches; ++i) largest = std::max(largest, axis.in_bounds[i + 1] - axis.in_bounds[i]);
  return largest;
}

// Vectors of a channel tile: as many as kMaxTileBytes hold, fewer where that leaves fewer threads without a channel.
uint32_t tile_shift(int64_t vectors, int64_t bytes) {
  uint32_t shift = 0;
  while ((bytes << shift) < kMaxTileBytes && (int64_t{1} << shift) < vectors) ++shift;
  if (shift > 0 && (bytes << (shift - 1)) >= 64 && vectors % (int64_t{1} << shift) != 0 &&
      vectors % (int64_t{1} << (shift - 1)) == 0) {
    --shift;
  }
  return shift;
}

template <class Params>
int64_t channel_tiles(const Params& params, int64_t bytes) {
  const int64_t vectors = params.channels / (bytes / element_bytes(params.type));
  const int64_t tile = int64_t{1} << tile_shift(vectors, bytes);
  return (vectors + tile - 1) / tile;
}

template <class Params>
int64_t lanes_of(const Params& params, int64_t bytes) {
  return kThreads >> tile_shift(params.channels / (bytes / element_bytes(params.type)), bytes);
}

// What keeps every kernel here from a call, the tensors' layouts apart.
template <class Params>
std::string extent_refusal(const Params& params) {
  if (params.batch == 0) return "the batch is empty";
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  if (int64_t{largest_extent(rows)} * largest_extent(columns) > kMaxPixels / params.batch) {
    return "a patch has 2^31 pixels or more over the batch";
  }
  if (int64_t{rows.patches} * columns.patches * kMaxSegments > kMaxPixels / params.channels) {
    return "the launch would need 2^31 blocks or more";
  }
  return "";
}

template <class Params>
std::string segment_refusal(const Params& params) {
  if (params.segments <= kMaxSegments) return "";
  return "the sums come in " + std::to_string(params.segments) + " segments, more than " + std::to_string(kMaxSegments);
}

template <class Params>
Blocks blocks_of(const Params& params, int64_t bytes, int64_t shares) {
  return {tile_shift(params.channels / (bytes / element_bytes(params.type)), bytes),
          fast_divisor(channel_tiles(params, bytes)), fast_divisor(shares), fast_divisor(params.grid.columns.patches)};
}

template <class Params>
Dim3 block_grid(const Params& params) {
  return Dim3{params.blocks.channel_tiles.divisor * params.blocks.shares.divisor *
                  static_cast<unsigned>(params.grid.rows.patches * params.grid.columns.patches),
              1u, 1u};
}
template <class Params>
Dim3 merge_grid(const Params& params) {
  return Dim3{static_cast<unsigned>((params.channels + kMergeChannels - 1) / kMergeChannels) *
                  static_cast<unsigned>(params.grid.rows.patches * params.grid.columns.patches),
              1u, 1u};
}

// Shares of an element-wise pass: whole waves of blocks, `resident` of them on a multiprocessor, in which each thread
// has about kPixelsPerThread pixels. Depends on the device, which no result here does.
template <class Params>
int64_t element_wise_shares(const Params& params, int64_t bytes, int64_t resident) {
  constexpr int64_t kPixelsPerThread = 12;
  const int64_t pixels = int64_t{params.batch} * largest_extent(params.grid.rows) * largest_extent(params.grid.columns);
  const int64_t patches_and_tiles =
      channel_tiles(params, bytes) * params.grid.rows.patches * params.grid.columns.patches;
  const int64_t most = std::max<int64_t>(pixels / (2 * lanes_of(params, bytes)), 1);
  const int64_t blocks = patches_and_tiles * pixels / (kPixelsPerThread * lanes_of(params, bytes));
  const int64_t wave = std::max(1, device_traits().multiprocessors) * resident;
  const int64_t waves = std::max<int64_t>((blocks + wave / 2) / wave, 1);
  const int64_t shares = std::max<int64_t>(waves * wave / patches_and_tiles, 1);
  return std::min({shares, most, kMaxPixels / patches_and_tiles});
}

// Enough blocks to keep a device busy, but at least kPixelsPerThread pixels for each of their threads.
template <class Params>
int32_t segments_of(const Params& params, int64_t pixels) {
  constexpr int64_t kBlocks = 792;  // two or three whole waves on 132 multiprocessors
  constexpr int64_t kPixelsPerThread = 4;
  const int64_t bytes = bytes_of(params);
  const int64_t wanted = kBlocks / std::min(kBlocks, params.patches * channel_tiles(params, bytes));
  const int64_t most = pixels / (kPixelsPerThread * lanes_of(params, bytes));
  return static_cast<int32_t>(std::clamp<int64_t>(std::min(wanted, most), 1, kMaxSegments));
}

Dim3 work_block() {
  return Dim3{static_cast<unsigned>(kThreads), 1u, 1u};
}
Dim3 merge_block() {
  return Dim3{static_cast<unsigned>(kMergeThreads), 1u, 1u};
}

template <class NhwcParams, class Params>
NhwcParams with_blocks(const Params& params, int64_t shares) {
  NhwcParams result{};
  static_cast<Params&>(result) = params;
  result.blocks = blocks_of(params, bytes_of(params), shares);
  return result;
}

}  // namespace

std::string refusal(const BatchNormStatsParams& params) {
  return first_reason({layout_refusal(params.type, {{"input", params.input, &params.input_strides, 0}}),
                       extent_refusal(params), segment_refusal(params)});
}
std::string refusal(const BatchNormApplyParams& params) {
  return first_reason({layout_refusal(params.type, {{"input", params.input, &params.input_strides, 0},
                                                    {"output", params.output, &params.output_strides, 0}}),
                       extent_refusal(params)});
}
std::string refusal(const BatchNormBackwardReduceParams& params) {
  return first_reason({layout_refusal(params.type, {{"grad_output", params.grad_output, &params.grad_output_strides, 0},
                                                    {"input", params.input, &params.input_strides, 0}}),
                       extent_refusal(params), segment_refusal(params)});
}
std::string refusal(const BatchNormBackwardApplyParams& params) {
  return first_reason({layout_refusal(params.type, {{"grad_output", params.grad_output, &params.grad_output_strides, 0},
                                                    {"input", params.input, &params.input_strides, 0},
                                                    {"output", params.output, &params.output_strides, 0}}),
                       extent_refusal(params)});
}

int32_t segments(const BatchNormStatsParams& params, int64_t pixels) {
  return segments_of(params, pixels);
}
int32_t segments(const BatchNormBackwardReduceParams& params, int64_t pixels) {
  return segments_of(params, pixels);
}

void launch(const BatchNormStatsParams& params, cudaStream_t stream) {
  const auto nhwc = with_blocks<StatsParams>(params, params.segments);
  dispatch_vector(params.kOperator, params.type, bytes_of(params), [&](auto tag, auto width) {
    using T = typename decltype(tag)::Type;
    kernels::launch(&batch_norm_stats_kernel<T, width.kInt>, block_grid(nhwc), work_block(),
                    sizeof(LaneSums<width.kInt / sizeof(T)>), stream, nhwc);
  });
}

void launch_merge(const BatchNormStatsParams& params, cudaStream_t stream) {
  const auto nhwc = with_blocks<StatsParams>(params, params.segments);
  kernels::launch(&batch_norm_stats_merge_kernel, merge_grid(nhwc), merge_block(), sizeof(MergeSums), stream, nhwc);
}

void launch(const BatchNormApplyParams& params, cudaStream_t stream) {
  const auto nhwc = with_blocks<ApplyParams>(params, element_wise_shares(params, bytes_of(params), 4));
  dispatch_vector(params.kOperator, params.type, bytes_of(params), [&](auto tag, auto width) {
    using T = typename decltype(tag)::Type;
    kernels::launch(&batch_norm_apply_kernel<T, width.kInt>, block_grid(nhwc), work_block(),
                    sizeof(Stage<4, kTileChannelsOf<width.kInt, T>>), stream, nhwc);
  });
}

void launch(const BatchNormBackwardReduceParams& params, cudaStream_t stream) {
  const auto nhwc = with_blocks<BackwardReduceParams>(params, params.segments);
  dispatch_vector(params.kOperator, params.type, bytes_of(params), [&](auto tag, auto width) {
    using T = typename decltype(tag)::Type;
    kernels::launch(&batch_norm_backward_reduce_kernel<T, width.kInt>, block_grid(nhwc), work_block(),
                    sizeof(ReduceShared<width.kInt / sizeof(T), kTileChannelsOf<width.kInt, T>>), stream, nhwc);
  });
}

void launch_merge(const BatchNormBackwardReduceParams& params, cudaStream_t stream) {
  const auto nhwc = with_blocks<BackwardReduceParams>(params, params.segments);
  kernels::launch(&batch_norm_backward_reduce_merge_kernel, merge_grid(nhwc), merge_block(), sizeof(MergeSums), stream,
                  nhwc);
}

void launch(const BatchNormBackwardApplyParams& params, cudaStream_t stream) {
  const auto nhwc = with_blocks<BackwardApplyParams>(params, element_wise_shares(params, bytes_of(params), 2));
  dispatch_vector(params.kOperator, params.type, bytes_of(params), [&](auto tag, auto width) {
    using T = typename decltype(tag)::Type;
    kernels::launch(&batch_norm_backward_apply_kernel<T, width.kInt>, block_grid(nhwc), work_block(),
                    sizeof(Stage<6, kTileChannelsOf<width.kInt, T>>), stream, nhwc);
  });
}

}  // namespace splitkern::kernels::nhwc
