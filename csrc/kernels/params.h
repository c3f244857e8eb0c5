// Parameter structs of every kernel: extents first, then element strides, then pointers.
// Filled by csrc/ops/cuda, read by the kernels; plain data passed by value, so no header of torch or
// CUDA is needed here. All positions are in the coordinates of the operator call.
#pragma once

#include <cstdint>

namespace splitkern::kernels {

enum class ElementType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

// Kernel parameters hold at most 4 KiB on the oldest supported driver interface, and the four bound
// arrays of a launch travel inside them. A call with more patches is cut into several launches.
inline constexpr int kMaxPatchesPerAxis = 64;

// A run of consecutive patches of one axis. Patch i reads inputs [in_bounds[i], in_bounds[i + 1]) and
// writes outputs [out_bounds[i], out_bounds[i + 1]). Batch norm has one list and keeps it in both.
struct AxisPatches {
  int32_t first_patch;  // index of patch 0 among all patches of the call
  int32_t patches;
  int32_t in_bounds[kMaxPatchesPerAxis + 1];
  int32_t out_bounds[kMaxPatchesPerAxis + 1];
};

struct PatchGrid {
  AxisPatches rows;
  AxisPatches columns;
};
static_assert(sizeof(PatchGrid) <= 2048, "the rest of the 4 KiB belongs to extents, strides and pointers");

// Output o reads positions o * stride - padding + t * dilation for t = 0 .. kernel - 1.
struct WindowAxis {
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;
};

// In elements. For a convolution weight: output channel, input channel, row, column.
struct Strides4 {
  int64_t batch;
  int64_t channel;
  int64_t row;
  int64_t column;
};

struct ConvForwardParams {
  static constexpr const char* kOperator = "splitkern::patch_conv2d";
  ElementType type;
  int32_t batch;
  int32_t out_channels;
  int32_t in_channels_per_group;
  int32_t out_channels_per_group;
  bool relu;
  bool channels_fastest;  // neighbouring threads take neighbouring channels, else columns
  bool allow_tf32;        // fp32 operands may be rounded to tf32
  WindowAxis row_window;
  WindowAxis column_window;
  PatchGrid grid;
  Strides4 input_strides;
  Strides4 weight_strides;
  Strides4 output_strides;
  int64_t bias_stride;
  const void* input;
  const void* weight;
  const void* bias;  // null: none
  void* output;
};

struct ConvInputGradParams {
  static constexpr const char* kOperator = "splitkern::patch_conv2d_input_grad";
  ElementType type;
  int32_t batch;
  int32_t in_channels;
  int32_t in_channels_per_group;
  int32_t out_channels_per_group;
  bool channels_fastest;
  bool allow_tf32;
  WindowAxis row_window;
  WindowAxis column_window;
  PatchGrid grid;
  Strides4 grad_output_strides;
  Strides4 weight_strides;
  Strides4 output_strides;
  const void* grad_output;
  const void* weight;
  void* output;
};

// Stage one of the weight gradient. The reduction runs over units (image, output row, column patch)
// of this launch's patches; `segments` fixed, contiguous shares of them are summed apart.
// Partial sums: [total segments][output channel][kernel row][kernel column][input channel of the group],
// in the accumulation type.
struct ConvWeightGradParams {
  static constexpr const char* kOperator = "splitkern::patch_conv2d_weight_grad";
  ElementType type;
  int32_t batch;
  int32_t out_channels;
  int32_t in_channels_per_group;
  int32_t out_channels_per_group;
  int32_t first_segment;
  int32_t segments;
  bool accumulate;  // add to what output holds
  bool allow_tf32;
  WindowAxis row_window;
  WindowAxis column_window;
  PatchGrid grid;
  Strides4 grad_output_strides;
  Strides4 input_strides;
  Strides4 output_strides;
  const void* grad_output;
  const void* input;
  void* partial_sums;  // of the plain path; the others bring their own workspace
  void* output;
};

// Stage two: adds the segments of one weight element in ascending order.
struct ConvWeightGradReduceParams {
  static constexpr const char* kOperator = "splitkern::patch_conv2d_weight_grad";
  ElementType type;
  int32_t out_channels;
  int32_t in_channels_per_group;
  int32_t kernel_rows;
  int32_t kernel_columns;
  int32_t segments;
  bool accumulate;  // add to what output holds
  Strides4 output_strides;
  const void* partial_sums;
  void* output;
};

// Offsets are uint8: kernel row * kernel width + kernel column, or kNoOffset.
inline constexpr uint8_t kNoOffset = 255;

struct MaxPoolParams {
  static constexpr const char* kOperator = "splitkern::patch_max_pool2d";
  ElementType type;
  int32_t batch;
  int32_t channels;
  bool channels_fastest;
  WindowAxis row_window;
  WindowAxis column_window;
  PatchGrid grid;
  Strides4 input_strides;
  Strides4 values_strides;
  Strides4 offsets_strides;
  const void* input;
  void* values;
  uint8_t* offsets;
};

struct MaxPoolBackwardParams {
  static constexpr const char* kOperator = "splitkern::patch_max_pool2d_backward";
  ElementType type;
  int32_t batch;
  int32_t channels;
  bool channels_fastest;
  WindowAxis row_window;
  WindowAxis column_window;
  PatchGrid grid;
  Strides4 grad_output_strides;
  Strides4 offsets_strides;
  Strides4 output_strides;
  const void* grad_output;
  const uint8_t* offsets;
  void* output;
};

struct MaxPoolGatherParams {
  static constexpr const char* kOperator = "splitkern::patch_max_pool2d_gather";
  ElementType type;
  int32_t batch;
  int32_t channels;
  bool channels_fastest;
  WindowAxis row_window;
  WindowAxis column_window;
  PatchGrid grid;
  Strides4 input_strides;
  Strides4 offsets_strides;
  Strides4 output_strides;
  const void* input;
  const uint8_t* offsets;
  void* output;
};

// How the sum of a window becomes its average.
struct AverageDivisor {
  int64_t override_value;  // 0: none given
  int64_t input_rows;      // extents of the whole axis of the call, not of these patches
  int64_t input_columns;
  bool count_include_pad;
};

struct AvgPoolParams {
  static constexpr const char* kOperator = "splitkern::patch_avg_pool2d";
  ElementType type;
  int32_t batch;
  int32_t channels;
  bool channels_fastest;
  AverageDivisor divisor;
  WindowAxis row_window;
  WindowAxis column_window;
  PatchGrid grid;
  Strides4 input_strides;
  Strides4 output_strides;
  const void* input;
  void* output;
};

struct AvgPoolBackwardParams {
  static constexpr const char* kOperator = "splitkern::patch_avg_pool2d_backward";
  ElementType type;
  int32_t batch;
  int32_t channels;
  bool channels_fastest;
  AverageDivisor divisor;
  WindowAxis row_window;
  WindowAxis column_window;
  PatchGrid grid;
  Strides4 grad_output_strides;
  Strides4 output_strides;
  const void* grad_output;
  void* output;
};

// A [patches of the call][channels] array of statistics, in the accumulation type.
struct PatchStatistic {
  int64_t patch_stride;
  int64_t channel_stride;
  void* values;  // null: not given
};

// A per-channel parameter in the input's type or, with is_float32, in fp32.
struct ChannelParameter {
  int64_t stride;
  const void* values;  // null: not given
  bool is_float32;
};

// Both stages of the statistics. Each (patch, channel) has its pixels cut into `segments` fixed,
// contiguous shares; stage one leaves their mean and sum of squared deviations in
// partial_mean / partial_m2 [segments][patches of the call][channels], stage two merges them in order.
struct BatchNormStatsParams {
  static constexpr const char* kOperator = "splitkern::patch_batch_norm_stats";
  ElementType type;
  int32_t batch;
  int32_t channels;
  int32_t segments;
  int32_t column_patches;  // of the whole call: patch index = row patch * column_patches + column patch
  int64_t patches;         // of the whole call
  PatchGrid grid;
  Strides4 input_strides;
  double eps;
  PatchStatistic mean;
  PatchStatistic m2;
  PatchStatistic invstd;  // 1 / sqrt(m2 / pixels + eps); null where it is not wanted
  const void* input;
  void* partial_mean;
  void* partial_m2;
};

// output = activation((input - mean) * invstd * weight + bias)
struct BatchNormApplyParams {
  static constexpr const char* kOperator = "splitkern::patch_batch_norm_apply";
  ElementType type;
  int32_t batch;
  int32_t channels;
  int32_t column_patches;
  bool relu;
  bool channels_fastest;
  PatchGrid grid;
  Strides4 input_strides;
  Strides4 output_strides;
  PatchStatistic mean;
  PatchStatistic invstd;
  ChannelParameter weight;
  ChannelParameter bias;
  const void* input;
  void* output;
};

// Both stages of the backward sums, segmented like the statistics.
struct BatchNormBackwardReduceParams {
  static constexpr const char* kOperator = "splitkern::patch_batch_norm_backward_reduce";
  ElementType type;
  int32_t batch;
  int32_t channels;
  int32_t segments;
  int32_t column_patches;
  bool relu;
  int64_t patches;
  PatchGrid grid;
  Strides4 grad_output_strides;
  Strides4 input_strides;
  PatchStatistic mean;
  PatchStatistic invstd;
  PatchStatistic sum_grad;
  PatchStatistic sum_grad_centered;
  ChannelParameter weight;
  ChannelParameter bias;
  const void* grad_output;
  const void* input;
  void* partial_sum_grad;
  void* partial_sum_grad_centered;
};

struct BatchNormBackwardApplyParams {
  static constexpr const char* kOperator = "splitkern::patch_batch_norm_backward_apply";
  ElementType type;
  int32_t batch;
  int32_t channels;
  int32_t column_patches;
  bool relu;
  bool channels_fastest;
  PatchGrid grid;
  Strides4 grad_output_strides;
  Strides4 input_strides;
  Strides4 output_strides;
  PatchStatistic mean;
  PatchStatistic invstd;
  PatchStatistic sum_grad;  // both sums null: the statistics are constants
  PatchStatistic sum_grad_centered;
  ChannelParameter weight;
  ChannelParameter bias;
  const void* grad_output;
  const void* input;
  void* output;
};

}  // namespace splitkern::kernels
