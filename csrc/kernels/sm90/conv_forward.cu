// Forward convolution on Hopper: one sub-problem per patch. Called through choose_path.
#include "conv_gemm.h"

namespace splitkern::kernels::sm90 {
namespace {

WeightLayout layout_of(const ConvForwardParams& params) {
  return weight_layout(params.weight, params.weight_strides, params.out_channels, params.in_channels_per_group,
                       params.row_window.kernel, params.column_window.kernel);
}

}  // namespace

std::string refusal(const ConvForwardParams& params, const DeviceTraits& traits) {
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  std::string reason = device_refusal(traits);
  if (reason.empty()) reason = type_refusal(params.type);
  if (reason.empty()) reason = groups_refusal(params.out_channels, params.out_channels_per_group);
  if (reason.empty()) {
    reason = tensor_refusal("input", params.input, params.in_channels_per_group, columns.in_bounds[columns.patches],
                            rows.in_bounds[rows.patches], params.batch, params.input_strides);
  }
  if (reason.empty()) {
    reason = tensor_refusal("output", params.output, params.out_channels, columns.out_bounds[columns.patches],
                            rows.out_bounds[rows.patches], params.batch, params.output_strides);
  }
  for (int32_t i = 0; i < rows.patches && reason.empty(); ++i) {
    reason = walk_refusal(forward_axis(params.row_window, rows, i), "rows");
  }
  for (int32_t i = 0; i < columns.patches && reason.empty(); ++i) {
    reason = walk_refusal(forward_axis(params.column_window, columns, i), "columns");
  }
  for (int32_t i = 0; i < rows.patches && reason.empty(); ++i) {
    for (int32_t j = 0; j < columns.patches && reason.empty(); ++j) {
      reason = pixels_refusal(forward_axis(params.row_window, rows, i), forward_axis(params.column_window, columns, j),
                              params.batch);
    }
  }
  return reason;
}

int64_t workspace_bytes(const ConvForwardParams& params, const DeviceTraits&) {
  return weight_workspace_bytes(layout_of(params), params.out_channels, params.in_channels_per_group,
                                params.row_window.kernel * params.column_window.kernel);
}

void launch(const ConvForwardParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream) {
  GemmCall call{};
  call.type = params.type;
  call.images = params.batch;
  call.channels = params.out_channels;
  call.reduction_channels = params.in_channels_per_group;
  call.out_channels = params.out_channels;
  call.in_channels = params.in_channels_per_group;
  call.taps = static_cast<int32_t>(params.row_window.kernel * params.column_window.kernel);
  call.kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  call.relu = params.relu;
  call.bias_stride = params.bias_stride;
  call.bias = params.bias;
  call.operand = params.input;
  call.operand_strides = params.input_strides;
  call.output = params.output;
  call.output_strides = params.output_strides;
  call.layout = layout_of(params);
  call.weights = weights_for_maps(params.weight, params.weight_strides, call.layout, call.out_channels,
                                  call.in_channels, call.taps, call.kernel_columns, workspace, stream);
  std::vector<GemmProblem> problems;
  for (int32_t i = 0; i < params.grid.rows.patches; ++i) {
    for (int32_t j = 0; j < params.grid.columns.patches; ++j) {
      problems.push_back({forward_axis(params.row_window, params.grid.rows, i),
                          forward_axis(params.column_window, params.grid.columns, j)});
    }
  }
  launch_gemm_call(false, call, problems, traits.multiprocessors, stream);
}

}  // namespace splitkern::kernels::sm90
