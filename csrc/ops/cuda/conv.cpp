// CUDA bodies of the three convolution operators: check, allocate, describe, launch. Called by the
// dispatcher; arguments.h refuses everything that the kernels do not expect, conv_paths.h chooses the kernels.
#include "operators.h"

#include "describe.h"
#include "device_scope.h"
#include "kernels/conv_paths.h"
#include "tf32.h"

namespace splitkern::cuda {

namespace {

// One grid of patches after the other, for operators whose patches write apart.
template <class Params>
void launch_each(Params& params, const Bounds& bounds, const Tensor& like, cudaStream_t stream) {
  const kernels::DeviceTraits traits = kernels::device_traits();
  for (const kernels::PatchGrid& grid : patch_grids(Params::kOperator, bounds)) {
    params.grid = grid;
    const kernels::PathChoice choice = kernels::choose_path(params, traits);
    const Workspace workspace(like, choice.workspace_bytes);
    kernels::launch_path(choice, params, traits, workspace.data(), stream);
  }
}

void run_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const ConvCall& call,
                 const Tensor& output) {
  constexpr const char* kOperator = kernels::ConvForwardParams::kOperator;
  if (output.numel() == 0) return;
  const DeviceScope device(input);
  kernels::ConvForwardParams params{};
  params.type = element_type(kOperator, input);
  params.allow_tf32 = allows_tf32(params.type);
  params.batch = to_int32(kOperator, "the batch", output.size(0));
  params.out_channels = to_int32(kOperator, "out_channels", output.size(1));
  params.in_channels_per_group = to_int32(kOperator, "in_channels", weight.size(1));
  params.out_channels_per_group = to_int32(kOperator, "out_channels", output.size(1) / call.groups);
  params.relu = call.relu;
  params.channels_fastest = channels_fastest(output);
  params.row_window = window_axis(kOperator, call.window, 0);
  params.column_window = window_axis(kOperator, call.window, 1);
  params.input_strides = element_strides(input);
  params.weight_strides = element_strides(weight);
  params.output_strides = element_strides(output);
  params.input = input.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.output = output.mutable_data_ptr();
  if (bias.has_value()) {
    params.bias_stride = bias->stride(0);
    params.bias = bias->const_data_ptr();
  }
  launch_each(params, call.bounds, output, device.stream());
}

void run_input_grad(const Tensor& grad_output, const Tensor& weight, const ConvCall& call, const Tensor& output) {
  constexpr const char* kOperator = kernels::ConvInputGradParams::kOperator;
  if (output.numel() == 0) return;
  const DeviceScope device(grad_output);
  kernels::ConvInputGradParams params{};
  params.type = element_type(kOperator, grad_output);
  params.allow_tf32 = allows_tf32(params.type);
  params.batch = to_int32(kOperator, "the batch", output.size(0));
  params.in_channels = to_int32(kOperator, "in_channels", output.size(1));
  params.in_channels_per_group = to_int32(kOperator, "in_channels", weight.size(1));
  params.out_channels_per_group = to_int32(kOperator, "out_channels", weight.size(0) / call.groups);
  params.channels_fastest = channels_fastest(output);
  params.row_window = window_axis(kOperator, call.window, 0);
  params.column_window = window_axis(kOperator, call.window, 1);
  params.grad_output_strides = element_strides(grad_output);
  params.weight_strides = element_strides(weight);
  params.output_strides = element_strides(output);
  params.grad_output = grad_output.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.output = output.mutable_data_ptr();
  launch_each(params, call.bounds, output, device.stream());
}

void run_weight_grad(const Tensor& grad_output, const Tensor& input, const ConvCall& call, bool accumulate,
                     const Tensor& output) {
  constexpr const char* kOperator = kernels::ConvWeightGradParams::kOperator;
  if (output.numel() == 0) return;
  const DeviceScope device(grad_output);
  // An empty batch has nothing to add up.
  const std::vector<kernels::PatchGrid> grids =
      grad_output.numel() == 0 ? std::vector<kernels::PatchGrid>() : patch_grids(kOperator, call.bounds);

  kernels::ConvWeightGradParams params{};
  params.type = element_type(kOperator, grad_output);
  params.allow_tf32 = allows_tf32(params.type);
  params.batch = to_int32(kOperator, "the batch", grad_output.size(0));
  params.out_channels = to_int32(kOperator, "out_channels", output.size(0));
  params.in_channels_per_group = to_int32(kOperator, "in_channels", output.size(1));
  params.out_channels_per_group = to_int32(kOperator, "out_channels", output.size(0) / call.groups);
  params.accumulate = accumulate;
  params.row_window = window_axis(kOperator, call.window, 0);
  params.column_window = window_axis(kOperator, call.window, 1);
  params.grad_output_strides = element_strides(grad_output);
  params.input_strides = element_strides(input);
  params.output_strides = element_strides(output);
  params.grad_output = grad_output.const_data_ptr();
  params.input = input.const_data_ptr();
  params.output = output.mutable_data_ptr();
  if (!grids.empty()) describe_reduction(params, grad_output.size(0), call.bounds, grids.size());

  const kernels::DeviceTraits traits = kernels::device_traits();
  const kernels::PathChoice choice = kernels::choose_path(params, grids, traits);
  const Workspace workspace(output, choice.workspace_bytes);
  kernels::launch_path(choice, params, grids, traits, workspace.data(), device.stream());
}

}  // namespace

Tensor patch_conv2d(const Tensor& input, const Tensor& weight, OptionalTensor bias, IntList stride, IntList padding,
                    IntList dilation, int64_t groups, IntList in_rows, IntList in_cols, IntList out_rows,
                    IntList out_cols, StringArgument activation) {
  const ConvCall call = check_conv2d(input, weight, bias, stride, padding, dilation, groups,
                                     {in_rows, in_cols, out_rows, out_cols}, activation);
  const Tensor output = new_output(input, call.output_size);
  run_forward(input, weight, bias, call, output);
  return output;
}

void patch_conv2d_out(const Tensor& input, const Tensor& weight, OptionalTensor bias, IntList stride, IntList padding,
                      IntList dilation, int64_t groups, IntList in_rows, IntList in_cols, IntList out_rows,
                      IntList out_cols, StringArgument activation, const Tensor& output) {
  const ConvCall call = check_conv2d(input, weight, bias, stride, padding, dilation, groups,
                                     {in_rows, in_cols, out_rows, out_cols}, activation);
  check_output(kConv2d, "output", output, input, call.output_size, input.scalar_type());
  run_forward(input, weight, bias, call, output);
}

Tensor patch_conv2d_input_grad(const Tensor& grad_output, const Tensor& weight, IntList input_size, IntList stride,
                               IntList padding, IntList dilation, int64_t groups, IntList in_rows, IntList in_cols,
                               IntList out_rows, IntList out_cols) {
  const ConvCall call = check_conv2d_input_grad(grad_output, weight, input_size, stride, padding, dilation, groups,
                                                {in_rows, in_cols, out_rows, out_cols});
  const Tensor output = new_output(grad_output, call.input_size);
  run_input_grad(grad_output, weight, call, output);
  return output;
}

void patch_conv2d_input_grad_out(const Tensor& grad_output, const Tensor& weight, IntList input_size, IntList stride,
                                 IntList padding, IntList dilation, int64_t groups, IntList in_rows, IntList in_cols,
                                 IntList out_rows, IntList out_cols, const Tensor& output) {
  const ConvCall call = check_conv2d_input_grad(grad_output, weight, input_size, stride, padding, dilation, groups,
                                                {in_rows, in_cols, out_rows, out_cols});
  check_output(kConv2dInputGrad, "output", output, grad_output, call.input_size, grad_output.scalar_type());
  run_input_grad(grad_output, weight, call, output);
}

Tensor patch_conv2d_weight_grad(const Tensor& grad_output, const Tensor& input, IntList weight_size, IntList stride,
                                IntList padding, IntList dilation, int64_t groups, IntList in_rows, IntList in_cols,
                                IntList out_rows, IntList out_cols) {
  const ConvCall call = check_conv2d_weight_grad(grad_output, input, weight_size, stride, padding, dilation, groups,
                                                 {in_rows, in_cols, out_rows, out_cols});
  const Tensor output = new_contiguous(grad_output, call.weight_size, grad_output.scalar_type());
  run_weight_grad(grad_output, input, call, false, output);
  return output;
}

void patch_conv2d_weight_grad_out(const Tensor& grad_output, const Tensor& input, IntList weight_size, IntList stride,
                                  IntList padding, IntList dilation, int64_t groups, IntList in_rows, IntList in_cols,
                                  IntList out_rows, IntList out_cols, bool accumulate, const Tensor& output) {
  const ConvCall call = check_conv2d_weight_grad(grad_output, input, weight_size, stride, padding, dilation, groups,
                                                 {in_rows, in_cols, out_rows, out_cols});
  check_output(kConv2dWeightGrad, "output", output, grad_output, call.weight_size, grad_output.scalar_type());
  run_weight_grad(grad_output, input, call, accumulate, output);
}

}  // namespace splitkern::cuda
