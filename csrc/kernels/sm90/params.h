// Parameter structs of the Hopper kernels, tensor maps included: they travel by value and stay in the kernel's
// parameters, because the TMA unit reads maps from there. Filled by the launchers of this folder.
#pragma once

#include <cstdint>

#include "../params.h"
#include "../primitives.h"

namespace splitkern::kernels::sm90 {

// Kernel parameters hold 32764 bytes, and a map takes 128.
inline constexpr size_t kMaxParamsBytes = 32764;

struct TapWalk {
  int32_t taps;
  int32_t first_tap;
  int32_t tap_step;
  int32_t offset_step;
};

// See geometry.h. Pixels are numbered along columns, then rows, then patches, then images.
struct SubProblem {
  int32_t first_tile;
  int32_t pixels;
  int32_t columns;
  int32_t rows;
  int32_t patches;  // 1 where the maps have none
  int32_t lower_column;
  int32_t lower_row;
  int32_t column_step;
  int32_t row_step;
  TapWalk row_taps;
  TapWalk column_taps;
};

// Of one launch. Every further KiB of parameters delays a launch by 0.08 us once there are more than some 8 KiB of them
// (measured), so a call of more patches is cut into several launches.
inline constexpr int kMaxSubProblems = 32;

// Forward (kInputGrad false) and input gradient: for every sub-problem
// outputs[pixel][channel] = activation(sum over taps and reduction channels of operand * weight + bias).
template <bool kInputGrad>
struct GemmParams {
  static constexpr const char* kOperator = kInputGrad ? ConvInputGradParams::kOperator : ConvForwardParams::kOperator;
  int32_t sub_problems;
  int32_t tiles;
  int32_t channels;  // of the outputs
  int32_t channel_tiles;
  int32_t reduction_blocks;  // of 64 reduction channels
  int32_t kernel_columns;
  int32_t lag;  // see GemmTile
  bool relu;
  int64_t bias_stride;
  const void* bias;  // null: none
  SubProblem sub_problem[kMaxSubProblems];
  TensorMap weights;
  TensorMap operand[kMaxSubProblems];
  TensorMap output[kMaxSubProblems];
};
static_assert(sizeof(GemmParams<false>) <= kMaxParamsBytes);

// A patch of the weight gradient: its output pixels are the reduction, cut into chunks that the stages hold.
struct WeightGradPatch {
  int32_t first_chunk;
  int32_t columns;  // of the outputs
  int32_t rows;
  int32_t lower_column;
  int32_t lower_row;
};

inline constexpr int kMaxWeightGradPatches = 32;

// partial_sums[segment][out channel][tap][in channel] = sum over the segment's chunks of gradient * input.
// A work item is (segment, tile of out channels, tile of (tap, 64 in-channels) blocks), the last fastest.
struct WeightGradParams {
  static constexpr const char* kOperator = ConvWeightGradParams::kOperator;
  int32_t patches;
  int32_t chunks;
  int32_t segments;  // shares of the chunks
  int32_t items;
  int32_t column_tiles;  // of (tap, channel block) blocks
  int32_t tiles;         // of one segment
  int32_t out_channels;
  int32_t in_channels;
  int32_t channel_blocks;
  int32_t taps;
  int32_t kernel_columns;
  int32_t column_step;  // the convolution's stride
  int32_t row_step;
  int32_t column_dilation;
  int32_t row_dilation;
  float* partial_sums;
  WeightGradPatch patch[kMaxWeightGradPatches];
  TensorMap gradient[kMaxWeightGradPatches];
  TensorMap input[kMaxWeightGradPatches];
};
static_assert(sizeof(WeightGradParams) <= kMaxParamsBytes);

// Adds the partial sums of every weight element in ascending order of segments.
struct WeightGradReduceParams {
  static constexpr const char* kOperator = ConvWeightGradParams::kOperator;
  int32_t out_channels;
  int32_t in_channels;
  int32_t taps;
  int32_t kernel_columns;
  int32_t segments;
  int32_t taps_per_block;
  int32_t groups;  // of segments, summed apart
  bool accumulate;
  Strides4 output_strides;
  const float* partial_sums;
  void* output;
};

}  // namespace splitkern::kernels::sm90
