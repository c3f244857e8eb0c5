// CUDA bodies of the pooling operators: check, allocate, describe, launch. Called by the dispatcher;
// arguments.h refuses everything that the kernels do not expect.
#include "operators.h"

#include "describe.h"
#include "device_scope.h"
#include "kernels/launchers.h"

namespace splitkern::cuda {

namespace {

// What every pooling struct shares. The layout of the written tensor decides which threads are neighbours.
template <class Params>
Params describe_pool(const Tensor& written, const PoolCall& call) {
  Params params{};
  params.type = element_type(Params::kOperator, written);
  params.batch = to_int32(Params::kOperator, "the batch", written.size(0));
  params.channels = to_int32(Params::kOperator, "the number of channels", written.size(1));
  params.channels_fastest = channels_fastest(written);
  params.row_window = window_axis(Params::kOperator, call.window, 0);
  params.column_window = window_axis(Params::kOperator, call.window, 1);
  return params;
}

template <class Params>
void launch_each(Params& params, const Bounds& bounds, void (*launcher)(const Params&, cudaStream_t),
                 cudaStream_t stream) {
  for (const kernels::PatchGrid& grid : patch_grids(Params::kOperator, bounds)) {
    params.grid = grid;
    launcher(params, stream);
  }
}

void run_max_pool(const Tensor& input, const PoolCall& call, const Tensor& values, const Tensor& offsets) {
  if (values.numel() == 0) return;
  const DeviceScope device(input);
  auto params = describe_pool<kernels::MaxPoolParams>(values, call);
  params.input_strides = element_strides(input);
  params.values_strides = element_strides(values);
  params.offsets_strides = element_strides(offsets);
  params.input = input.const_data_ptr();
  params.values = values.mutable_data_ptr();
  params.offsets = static_cast<uint8_t*>(offsets.mutable_data_ptr());
  launch_each(params, call.bounds, &kernels::launch_max_pool, device.stream());
}

void run_max_pool_backward(const Tensor& grad_output, const Tensor& offsets, const PoolCall& call,
                           const Tensor& output) {
  if (output.numel() == 0) return;
  const DeviceScope device(grad_output);
  auto params = describe_pool<kernels::MaxPoolBackwardParams>(output, call);
  params.grad_output_strides = element_strides(grad_output);
  params.offsets_strides = element_strides(offsets);
  params.output_strides = element_strides(output);
  params.grad_output = grad_output.const_data_ptr();
  params.offsets = static_cast<const uint8_t*>(offsets.const_data_ptr());
  params.output = output.mutable_data_ptr();
  launch_each(params, call.bounds, &kernels::launch_max_pool_backward, device.stream());
}

void run_max_pool_gather(const Tensor& input, const Tensor& offsets, const PoolCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  const DeviceScope device(input);
  auto params = describe_pool<kernels::MaxPoolGatherParams>(output, call);
  params.input_strides = element_strides(input);
  params.offsets_strides = element_strides(offsets);
  params.output_strides = element_strides(output);
  params.input = input.const_data_ptr();
  params.offsets = static_cast<const uint8_t*>(offsets.const_data_ptr());
  params.output = output.mutable_data_ptr();
  launch_each(params, call.bounds, &kernels::launch_max_pool_gather, device.stream());
}

kernels::AverageDivisor average_divisor(const PoolCall& call) {
  return {call.divisor_override, call.input_size[2], call.input_size[3], call.count_include_pad};
}

void run_avg_pool(const Tensor& input, const PoolCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  const DeviceScope device(input);
  auto params = describe_pool<kernels::AvgPoolParams>(output, call);
  params.divisor = average_divisor(call);
  params.input_strides = element_strides(input);
  params.output_strides = element_strides(output);
  params.input = input.const_data_ptr();
  params.output = output.mutable_data_ptr();
  launch_each(params, call.bounds, &kernels::launch_avg_pool, device.stream());
}

void run_avg_pool_backward(const Tensor& grad_output, const PoolCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  const DeviceScope device(grad_output);
  auto params = describe_pool<kernels::AvgPoolBackwardParams>(output, call);
  params.divisor = average_divisor(call);
  params.grad_output_strides = element_strides(grad_output);
  params.output_strides = element_strides(output);
  params.grad_output = grad_output.const_data_ptr();
  params.output = output.mutable_data_ptr();
  launch_each(params, call.bounds, &kernels::launch_avg_pool_backward, device.stream());
}

}  // namespace

std::tuple<Tensor, Tensor> patch_max_pool2d(const Tensor& input, IntList kernel_size, IntList stride, IntList padding,
                                            IntList dilation, IntList in_rows, IntList in_cols, IntList out_rows,
                                            IntList out_cols) {
  const PoolCall call =
      check_max_pool2d(input, kernel_size, stride, padding, dilation, {in_rows, in_cols, out_rows, out_cols});
  const Tensor values = new_output(input, call.output_size);
  const Tensor offsets = new_output(input, call.output_size, ScalarType::Byte);
  run_max_pool(input, call, values, offsets);
  return {values, offsets};
}

void patch_max_pool2d_out(const Tensor& input, IntList kernel_size, IntList stride, IntList padding, IntList dilation,
                          IntList in_rows, IntList in_cols, IntList out_rows, IntList out_cols, const Tensor& values,
                          const Tensor& offsets) {
  const PoolCall call =
      check_max_pool2d(input, kernel_size, stride, padding, dilation, {in_rows, in_cols, out_rows, out_cols});
  check_output(kMaxPool2d, "values", values, input, call.output_size, input.scalar_type());
  check_output(kMaxPool2d, "offsets", offsets, input, call.output_size, ScalarType::Byte);
  run_max_pool(input, call, values, offsets);
}

Tensor patch_max_pool2d_backward(const Tensor& grad_output, const Tensor& offsets, IntList input_size,
                                 IntList kernel_size, IntList stride, IntList padding, IntList dilation,
                                 IntList in_rows, IntList in_cols, IntList out_rows, IntList out_cols) {
  const PoolCall call = check_max_pool2d_backward(grad_output, offsets, input_size, kernel_size, stride, padding,
                                                  dilation, {in_rows, in_cols, out_rows, out_cols});
  const Tensor output = new_output(grad_output, call.input_size);
  run_max_pool_backward(grad_output, offsets, call, output);
  return output;
}

void patch_max_pool2d_backward_out(const Tensor& grad_output, const Tensor& offsets, IntList input_size,
                                   IntList kernel_size, IntList stride, IntList padding, IntList dilation,
                                   IntList in_rows, IntList in_cols, IntList out_rows, IntList out_cols,
                                   const Tensor& output) {
  const PoolCall call = check_max_pool2d_backward(grad_output, offsets, input_size, kernel_size, stride, padding,
                                                  dilation, {in_rows, in_cols, out_rows, out_cols});
  check_output(kMaxPool2dBackward, "output", output, grad_output, call.input_size, grad_output.scalar_type());
  run_max_pool_backward(grad_output, offsets, call, output);
}

Tensor patch_max_pool2d_gather(const Tensor& input, const Tensor& offsets, IntList kernel_size, IntList stride,
                               IntList padding, IntList dilation, IntList in_rows, IntList in_cols, IntList out_rows,
                               IntList out_cols) {
  const PoolCall call = check_max_pool2d_gather(input, offsets, kernel_size, stride, padding, dilation,
                                                {in_rows, in_cols, out_rows, out_cols});
  const Tensor output = new_output(input, call.output_size);
  run_max_pool_gather(input, offsets, call, output);
  return output;
}

void patch_max_pool2d_gather_out(const Tensor& input, const Tensor& offsets, IntList kernel_size, IntList stride,
                                 IntList padding, IntList dilation, IntList in_rows, IntList in_cols, IntList out_rows,
                                 IntList out_cols, const Tensor& output) {
  const PoolCall call = check_max_pool2d_gather(input, offsets, kernel_size, stride, padding, dilation,
                                                {in_rows, in_cols, out_rows, out_cols});
  check_output(kMaxPool2dGather, "output", output, input, call.output_size, input.scalar_type());
  run_max_pool_gather(input, offsets, call, output);
}

Tensor patch_avg_pool2d(const Tensor& input, IntList kernel_size, IntList stride, IntList padding,
                        bool count_include_pad, std::optional<int64_t> divisor_override, IntList in_rows,
                        IntList in_cols, IntList out_rows, IntList out_cols) {
  const PoolCall call = check_avg_pool2d(input, kernel_size, stride, padding, count_include_pad, divisor_override,
                                         {in_rows, in_cols, out_rows, out_cols});
  const Tensor output = new_output(input, call.output_size);
  run_avg_pool(input, call, output);
  return output;
}

void patch_avg_pool2d_out(const Tensor& input, IntList kernel_size, IntList stride, IntList padding,
                          bool count_include_pad, std::optional<int64_t> divisor_override, IntList in_rows,
                          IntList in_cols, IntList out_rows, IntList out_cols, const Tensor& output) {
  const PoolCall call = check_avg_pool2d(input, kernel_size, stride, padding, count_include_pad, divisor_override,
                                         {in_rows, in_cols, out_rows, out_cols});
  check_output(kAvgPool2d, "output", output, input, call.output_size, input.scalar_type());
  run_avg_pool(input, call, output);
}

Tensor patch_avg_pool2d_backward(const Tensor& grad_output, IntList input_size, IntList kernel_size, IntList stride,
                                 IntList padding, bool count_include_pad, std::optional<int64_t> divisor_override,
                                 IntList in_rows, IntList in_cols, IntList out_rows, IntList out_cols) {
  const PoolCall call =
      check_avg_pool2d_backward(grad_output, input_size, kernel_size, stride, padding, count_include_pad,
                                divisor_override, {in_rows, in_cols, out_rows, out_cols});
  const Tensor output = new_output(grad_output, call.input_size);
  run_avg_pool_backward(grad_output, call, output);
  return output;
}

void patch_avg_pool2d_backward_out(const Tensor& grad_output, IntList input_size, IntList kernel_size, IntList stride,
                                   IntList padding, bool count_include_pad, std::optional<int64_t> divisor_override,
                                   IntList in_rows, IntList in_cols, IntList out_rows, IntList out_cols,
                                   const Tensor& output) {
  const PoolCall call =
      check_avg_pool2d_backward(grad_output, input_size, kernel_size, stride, padding, count_include_pad,
                                divisor_override, {in_rows, in_cols, out_rows, out_cols});
  check_output(kAvgPool2dBackward, "output", output, grad_output, call.input_size, grad_output.scalar_type());
  run_avg_pool_backward(grad_output, call, output);
}

}  // namespace splitkern::cuda
