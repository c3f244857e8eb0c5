// See conv.h: puts the plain launchers into the form that all paths have.
#include "conv.h"

#include <limits>
#include <stdexcept>

namespace splitkern::kernels::plain {

std::string refusal(const ConvForwardParams&, const DeviceTraits&) {
  return {};
}
std::string refusal(const ConvInputGradParams&, const DeviceTraits&) {
  return {};
}
std::string refusal(const ConvWeightGradParams&, const DeviceTraits&) {
  return {};
}

int64_t workspace_bytes(const ConvForwardParams&, const DeviceTraits&) {
  return 0;
}
int64_t workspace_bytes(const ConvInputGradParams&, const DeviceTraits&) {
  return 0;
}
int64_t workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits&) {
  return weight_grad_workspace_bytes(params, 1);
}

void launch(const ConvForwardParams& params, const DeviceTraits&, void*, cudaStream_t stream) {
  launch_conv_forward(params, stream);
}
void launch(const ConvInputGradParams& params, const DeviceTraits&, void*, cudaStream_t stream) {
  launch_conv_input_grad(params, stream);
}
void launch(const ConvWeightGradParams& params, const DeviceTraits&, void* workspace, cudaStream_t stream) {
  launch_weight_grad(params, {&params.grid, 1}, workspace, stream);
}

int64_t weight_grad_workspace_bytes(const ConvWeightGradParams& params, size_t grids) {
  const int64_t weight_elements = static_cast<int64_t>(params.out_channels) * params.in_channels_per_group *
                                  params.row_window.kernel * params.column_window.kernel;
  const int64_t sum_bytes = params.type == ElementType::kFloat64 ? sizeof(double) : sizeof(float);
  return weight_elements * params.segments * static_cast<int64_t>(grids) * sum_bytes;
}

void launch_weight_grad(const ConvWeightGradParams& params, std::span<const PatchGrid> grids, void* workspace,
                        cudaStream_t stream) {
  const int64_t segments = static_cast<int64_t>(grids.size()) * params.segments;
  if (segments > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error(std::string(params.kOperator) +
                             ": the number of partial sums must lie within 32 bits for the CUDA kernels, got " +
                             std::to_string(segments));
  }
  ConvWeightGradParams stage_one = params;
  stage_one.partial_sums = workspace;
  stage_one.first_segment = 0;
  for (const PatchGrid& grid : grids) {
    stage_one.grid = grid;
    launch_conv_weight_grad(stage_one, stream);
    stage_one.first_segment += params.segments;
  }

  ConvWeightGradReduceParams stage_two{};
  stage_two.type = params.type;
  stage_two.out_channels = params.out_channels;
  stage_two.in_channels_per_group = params.in_channels_per_group;
  stage_two.kernel_rows = static_cast<int32_t>(params.row_window.kernel);
  stage_two.kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  stage_two.segments = static_cast<int32_t>(segments);
  stage_two.accumulate = params.accumulate;
  stage_two.output_strides = params.output_strides;
  stage_two.partial_sums = workspace;
  stage_two.output = params.output;
  launch_conv_weight_grad_reduce(stage_two, stream);
}

}  // namespace splitkern::kernels::plain
