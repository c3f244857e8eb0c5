// Gradient of the convolution with respect to its input on Hopper: one sub-problem per patch and stride class (inputs
// that are read through the same taps). Inputs that no window reads get zeros. Called through choose_path.
#include "conv_gemm.h"

namespace splitkern::kernels::sm90 {
namespace {

int32_t out_channels_of(const ConvInputGradParams& params) {
  return params.out_channels_per_group * (params.in_channels / params.in_channels_per_group);
}

WeightLayout layout_of(const ConvInputGradParams& params) {
  return weight_layout(params.weight, params.weight_strides, out_channels_of(params), params.in_channels_per_group,
                       params.row_window.kernel, params.column_window.kernel);
}

// The walks of every patch and class of one axis.
std::vector<AxisWalk> walks(const WindowAxis& window, const AxisPatches& patches) {
  std::vector<AxisWalk> result;
  for (int32_t patch = 0; patch < patches.patches; ++patch) {
    const int32_t classes = input_grad_classes(window, patches, patch);
    for (int32_t i = 0; i < classes; ++i) result.push_back(input_grad_axis(window, patches, patch, i));
  }
  return result;
}

}  // namespace

std::string refusal(const ConvInputGradParams& params, const DeviceTraits& traits) {
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  std::string reason = device_refusal(traits);
  if (reason.empty()) reason = type_refusal(params.type);
  if (reason.empty()) reason = groups_refusal(params.in_channels, params.in_channels_per_group);
  if (reason.empty() && (params.row_window.stride > 8 || params.column_window.stride > 8)) {
    reason = "the stride is over 8";
  }
  if (reason.empty()) {
    reason =
        tensor_refusal("gradient", params.grad_output, out_channels_of(params), columns.out_bounds[columns.patches],
                       rows.out_bounds[rows.patches], params.batch, params.grad_output_strides);
  }
  if (reason.empty()) {
    reason = tensor_refusal("output", params.output, params.in_channels, columns.in_bounds[columns.patches],
                            rows.in_bounds[rows.patches], params.batch, params.output_strides);
  }
  if (!reason.empty()) return reason;
  const std::vector<AxisWalk> row_walks = walks(params.row_window, rows);
  const std::vector<AxisWalk> column_walks = walks(params.column_window, columns);
  for (const AxisWalk& walk : row_walks) {
    if (reason.empty()) reason = walk_refusal(walk, "rows");
  }
  for (const AxisWalk& walk : column_walks) {
    if (reason.empty()) reason = walk_refusal(walk, "columns");
  }
  for (const AxisWalk& row_walk : row_walks) {
    for (const AxisWalk& column_walk : column_walks) {
      if (reason.empty()) reason = pixels_refusal(row_walk, column_walk, params.batch);
    }
  }
  return reason;
}

int64_t workspace_bytes(const ConvInputGradParams& params, const DeviceTraits&) {
  return weight_workspace_bytes(layout_of(params), out_channels_of(params), params.in_channels_per_group,
                                params.row_window.kernel * params.column_window.kernel);
}

void launch(const ConvInputGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream) {
  GemmCall call{};
  call.type = params.type;
  call.images = params.batch;
  call.channels = params.in_channels;
  call.reduction_channels = out_channels_of(params);
  call.out_channels = out_channels_of(params);
  call.in_channels = params.in_channels;
  call.taps = static_cast<int32_t>(params.row_window.kernel * params.column_window.kernel);
  call.kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  call.operand = params.grad_output;
  call.operand_strides = params.grad_output_strides;
  call.output = params.output;
  call.output_strides = params.output_strides;
  call.layout = layout_of(params);
  call.weights = weights_for_maps(params.weight, params.weight_strides, call.layout, call.out_channels,
                                  call.in_channels, call.taps, call.kernel_columns, workspace, stream);
  std::vector<GemmProblem> problems;
  const std::vector<AxisWalk> column_walks = walks(params.column_window, params.grid.columns);
  for (const AxisWalk& row_walk : walks(params.row_window, params.grid.rows)) {
    for (const AxisWalk& column_walk : column_walks) problems.push_back({row_walk, column_walk});
  }
  launch_gemm_call(true, call, problems, traits.multiprocessors, stream);
}

}  // namespace splitkern::kernels::sm90
