// See explain.h. Describes the call as conv.cpp does, with null for every pointer.
#include "explain.h"

#include <algorithm>
#include <exception>
#include <string>

#include "describe.h"
#include "kernels/conv_paths.h"
#include "kernels/nhwc/nhwc.h"

namespace splitkern::cuda {

namespace {

kernels::Strides4 dense_strides(const int64_t (&size)[4], bool channels_last) {
  if (channels_last) return {size[1] * size[2] * size[3], 1, size[3] * size[1], size[1]};
  return {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1};
}

template <class Question>
Bounds bounds_of(const Question& question) {
  return {IntList(question.in_rows, question.in_rows + question.row_patches + 1),
          IntList(question.in_columns, question.in_columns + question.column_patches + 1),
          IntList(question.out_rows, question.out_rows + question.row_patches + 1),
          IntList(question.out_columns, question.out_columns + question.column_patches + 1)};
}

// What the three structs share.
template <class Params>
Params describe(const SplitkernConvQuestion& question) {
  constexpr const char* kOperator = Params::kOperator;
  Params params{};
  params.type = static_cast<kernels::ElementType>(question.type);
  params.allow_tf32 = question.allow_tf32 != 0;
  params.batch = to_int32(kOperator, "the batch", question.input_size[0]);
  params.in_channels_per_group = to_int32(kOperator, "in_channels", question.weight_size[1]);
  params.out_channels_per_group = to_int32(kOperator, "out_channels", question.weight_size[0] / question.groups);
  const Window window{{question.weight_size[2], question.weight_size[3]},
                      {question.stride[0], question.stride[1]},
                      {question.padding[0], question.padding[1]},
                      {question.dilation[0], question.dilation[1]}};
  params.row_window = window_axis(kOperator, window, 0);
  params.column_window = window_axis(kOperator, window, 1);
  return params;
}

std::string as_text(const kernels::PathChoice& choice) {
  std::string text = kernels::name_of(choice.path);
  text.append("\n").append(std::to_string(choice.workspace_bytes)).append("\n").append(choice.reason);
  return text;
}

std::string explain(const SplitkernConvQuestion& question) {
  const bool channels_last = question.channels_last != 0;
  const kernels::DeviceTraits traits{question.compute_capability, question.multiprocessors,
                                     question.shared_memory_bytes};
  const Bounds bounds = bounds_of(question);
  const int64_t output_size[4] = {question.input_size[0], question.weight_size[0], bounds.out_rows.back(),
                                  bounds.out_cols.back()};
  const kernels::Strides4 input = dense_strides(question.input_size, channels_last);
  const kernels::Strides4 weight = dense_strides(question.weight_size, channels_last);
  const kernels::Strides4 output = dense_strides(output_size, channels_last);

  if (question.pass == 0) {
    auto params = describe<kernels::ConvForwardParams>(question);
    params.out_channels = static_cast<int32_t>(question.weight_size[0]);
    params.channels_fastest = channels_last;
    params.input_strides = input;
    params.weight_strides = weight;
    params.output_strides = output;
    params.grid = patch_grids(params.kOperator, bounds).front();
    return as_text(kernels::choose_path(params, traits));
  }
  if (question.pass == 1) {
    auto params = describe<kernels::ConvInputGradParams>(question);
    params.in_channels = to_int32(params.kOperator, "in_channels", question.input_size[1]);
    params.channels_fastest = channels_last;
    params.grad_output_strides = output;
    params.weight_strides = weight;
    params.output_strides = input;
    params.grid = patch_grids(params.kOperator, bounds).front();
    return as_text(kernels::choose_path(params, traits));
  }
  auto params = describe<kernels::ConvWeightGradParams>(question);
  params.out_channels = static_cast<int32_t>(question.weight_size[0]);
  params.grad_output_strides = output;
  params.input_strides = input;
  params.output_strides = dense_strides(question.weight_size, false);
  const std::vector<kernels::PatchGrid> grids = patch_grids(params.kOperator, bounds);
  describe_reduction(params, output_size[0], bounds, grids.size());
  return as_text(kernels::choose_path(params, grids, traits));
}

template <class Params>
Params describe_pool(const SplitkernLayerQuestion& question, const Bounds& bounds) {
  constexpr const char* kOperator = Params::kOperator;
  Params params{};
  params.type = static_cast<kernels::ElementType>(question.type);
  params.batch = to_int32(kOperator, "the batch", question.input_size[0]);
  params.channels = to_int32(kOperator, "the number of channels", question.input_size[1]);
  const Window window{{question.kernel[0], question.kernel[1]},
                      {question.stride[0], question.stride[1]},
                      {question.padding[0], question.padding[1]},
                      {question.dilation[0], question.dilation[1]}};
  params.channels_fastest = question.channels_last != 0;
  params.row_window = window_axis(kOperator, window, 0);
  params.column_window = window_axis(kOperator, window, 1);
  params.grid = patch_grids(kOperator, bounds).front();
  return params;
}

template <class Params>
Params describe_norm(const SplitkernLayerQuestion& question, const Bounds& bounds) {
  constexpr const char* kOperator = Params::kOperator;
  Params params{};
  params.type = static_cast<kernels::ElementType>(question.type);
  params.batch = to_int32(kOperator, "the batch", question.input_size[0]);
  params.channels = to_int32(kOperator, "the number of channels", question.input_size[1]);
  params.column_patches = to_int32(kOperator, "the number of patches", bounds.col_patches());
  params.grid = patch_grids(kOperator, bounds).front();
  params.input_strides = dense_strides(question.input_size, question.channels_last != 0);
  return params;
}

// The launchers decide by the same refusal.
template <class Params>
std::string as_text(const Params& params) {
  const std::string refusal = kernels::nhwc::choice_refusal(params);
  if (refusal.empty()) return "nhwc\n0\nnhwc: several channels in one access";
  return "plain\n0\nplain: any shape, type and strides; not nhwc: " + refusal;
}

std::string explain_norm(const SplitkernLayerQuestion& question, const Bounds& bounds) {
  if (question.pass == 0) {
    auto params = describe_norm<kernels::BatchNormStatsParams>(question, bounds);
    params.patches = bounds.patches();
    params.segments = 1;
    return as_text(params);
  }
  if (question.pass == 1) {
    auto params = describe_norm<kernels::BatchNormApplyParams>(question, bounds);
    params.output_strides = params.input_strides;
    return as_text(params);
  }
  if (question.pass == 2) {
    auto params = describe_norm<kernels::BatchNormBackwardReduceParams>(question, bounds);
    params.patches = bounds.patches();
    params.segments = 1;
    params.grad_output_strides = params.input_strides;
    return as_text(params);
  }
  auto params = describe_norm<kernels::BatchNormBackwardApplyParams>(question, bounds);
  params.grad_output_strides = params.input_strides;
  params.output_strides = params.input_strides;
  return as_text(params);
}

std::string explain(const SplitkernLayerQuestion& question) {
  const bool channels_last = question.channels_last != 0;
  const Bounds bounds = bounds_of(question);
  if (question.operation == 2) return explain_norm(question, bounds);
  const int64_t output_size[4] = {question.input_size[0], question.input_size[1], bounds.out_rows.back(),
                                  bounds.out_cols.back()};
  const kernels::Strides4 input = dense_strides(question.input_size, channels_last);
  const kernels::Strides4 output = dense_strides(output_size, channels_last);

  if (question.operation == 1) {
    const kernels::AverageDivisor divisor{0, question.input_size[2], question.input_size[3], true};
    if (question.pass == 0) {
      auto params = describe_pool<kernels::AvgPoolParams>(question, bounds);
      params.divisor = divisor;
      params.input_strides = input;
      params.output_strides = output;
      return as_text(params);
    }
    auto params = describe_pool<kernels::AvgPoolBackwardParams>(question, bounds);
    params.divisor = divisor;
    params.grad_output_strides = output;
    params.output_strides = input;
    return as_text(params);
  }
  if (question.pass == 0) {
    auto params = describe_pool<kernels::MaxPoolParams>(question, bounds);
    params.input_strides = input;
    params.values_strides = output;
    params.offsets_strides = output;
    return as_text(params);
  }
  auto params = describe_pool<kernels::MaxPoolBackwardParams>(question, bounds);
  params.grad_output_strides = output;
  params.offsets_strides = output;
  params.output_strides = input;
  return as_text(params);
}

template <class Question>
int write_explanation(const Question& question, char* text, int64_t size_bytes) {
  std::string answer;
  int failed = 0;
  try {
    answer = explain(question);
  } catch (const std::exception& error) {
    answer = error.what();
    failed = 1;
  }
  const size_t length = std::min(answer.size(), static_cast<size_t>(std::max<int64_t>(size_bytes, 1) - 1));
  std::copy_n(answer.data(), length, text);
  text[length] = '\0';
  return failed;
}

}  // namespace

}  // namespace splitkern::cuda

extern "C" int splitkern_explain_conv2d(const SplitkernConvQuestion* question, char* text, int64_t size_bytes) {
  return splitkern::cuda::write_explanation(*question, text, size_bytes);
}

extern "C" int splitkern_explain_layer(const SplitkernLayerQuestion* question, char* text, int64_t size_bytes) {
  return splitkern::cuda::write_explanation(*question, text, size_bytes);
}
