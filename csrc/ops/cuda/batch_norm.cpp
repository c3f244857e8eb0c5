// CUDA bodies of the batch normalisation operators: check, allocate, describe, launch. Called by the
// dispatcher; arguments.h refuses everything that the kernels do not expect.
#include "operators.h"

#include "describe.h"
#include "device_scope.h"
#include "kernels/launchers.h"

namespace splitkern::cuda {

namespace {

// What every batch norm struct shares.
template <class Params>
Params describe_batch_norm(const Tensor& input, const BatchNormCall& call) {
  Params params{};
  params.type = element_type(Params::kOperator, input);
  params.batch = to_int32(Params::kOperator, "the batch", input.size(0));
  params.channels = to_int32(Params::kOperator, "the number of channels", input.size(1));
  params.column_patches = to_int32(Params::kOperator, "the number of patches", call.bounds.col_patches());
  params.input_strides = element_strides(input);
  params.input = input.const_data_ptr();
  return params;
}

kernels::PatchStatistic statistic(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.data_ptr()};
}

kernels::ChannelParameter parameter(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {0, nullptr, false};
  return {tensor->stride(0), tensor->const_data_ptr(), tensor->scalar_type() == torch::headeronly::ScalarType::Float};
}

// As many as the kernels that will take the call want: there are `results` sums of `pixels` terms on average.
template <class Params>
int32_t segments(Params params, const Bounds& bounds, int64_t results, int64_t pixels) {
  params.segments = 1;
  params.grid = patch_grids(params.kOperator, bounds)[0];
  const int32_t wanted = kernels::batch_norm_segments(params, pixels);
  return wanted > 0 ? wanted : reduction_segments(results, pixels);
}

// `invstd` and `eps` are for the one operator that wants the inverse deviation as well.
void run_stats(const Tensor& input, const BatchNormCall& call, const Tensor& mean, const Tensor& m2,
               const OptionalTensor& invstd = std::nullopt, double eps = 0) {
  if (mean.numel() == 0) return;
  const DeviceScope device(input);
  auto params = describe_batch_norm<kernels::BatchNormStatsParams>(input, call);
  params.patches = call.bounds.patches();
  params.mean = statistic(mean);
  params.m2 = statistic(m2);
  params.eps = eps;
  if (invstd.has_value()) params.invstd = statistic(*invstd);
  params.segments = segments(params, call.bounds, mean.numel(), input.numel() / mean.numel());
  const int64_t partials = params.segments * mean.numel();
  const Tensor partial_mean = new_workspace(input, partials);
  const Tensor partial_m2 = new_workspace(input, partials);
  params.partial_mean = partial_mean.mutable_data_ptr();
  params.partial_m2 = partial_m2.mutable_data_ptr();
  for (const kernels::PatchGrid& grid : patch_grids(params.kOperator, call.bounds)) {
    params.grid = grid;
    kernels::launch_batch_norm_stats(params, device.stream());
    kernels::launch_batch_norm_stats_merge(params, device.stream());
  }
}

void run_apply(const Tensor& input, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
               const OptionalTensor& bias, const BatchNormCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  const DeviceScope device(input);
  auto params = describe_batch_norm<kernels::BatchNormApplyParams>(input, call);
  params.relu = call.relu;
  params.channels_fastest = channels_fastest(output);
  params.output_strides = element_strides(output);
  params.mean = statistic(mean);
  params.invstd = statistic(invstd);
  params.weight = parameter(weight);
  params.bias = parameter(bias);
  params.output = output.mutable_data_ptr();
  for (const kernels::PatchGrid& grid : patch_grids(params.kOperator, call.bounds)) {
    params.grid = grid;
    kernels::launch_batch_norm_apply(params, device.stream());
  }
}

void run_backward_reduce(const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& invstd,
                         const OptionalTensor& weight, const OptionalTensor& bias, const BatchNormCall& call,
                         const Tensor& sum_grad, const Tensor& sum_grad_centered) {
  if (sum_grad.numel() == 0) return;
  const DeviceScope device(input);
  auto params = describe_batch_norm<kernels::BatchNormBackwardReduceParams>(input, call);
  params.relu = call.relu;
  params.patches = call.bounds.patches();
  params.grad_output_strides = element_strides(grad_output);
  params.mean = statistic(mean);
  params.invstd = statistic(invstd);
  params.sum_grad = statistic(sum_grad);
  params.sum_grad_centered = statistic(sum_grad_centered);
  params.weight = parameter(weight);
  params.bias = parameter(bias);
  params.grad_output = grad_output.const_data_ptr();
  params.segments = segments(params, call.bounds, mean.numel(), input.numel() / mean.numel());
  const int64_t partials = params.segments * mean.numel();
  const Tensor partial_sum_grad = new_workspace(input, partials);
  const Tensor partial_sum_grad_centered = new_workspace(input, partials);
  params.partial_sum_grad = partial_sum_grad.mutable_data_ptr();
  params.partial_sum_grad_centered = partial_sum_grad_centered.mutable_data_ptr();
  for (const kernels::PatchGrid& grid : patch_grids(params.kOperator, call.bounds)) {
    params.grid = grid;
    kernels::launch_batch_norm_backward_reduce(params, device.stream());
    kernels::launch_batch_norm_backward_reduce_merge(params, device.stream());
  }
}

void run_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& invstd,
                        const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& sum_grad,
                        const OptionalTensor& sum_grad_centered, const BatchNormCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  const DeviceScope device(input);
  auto params = describe_batch_norm<kernels::BatchNormBackwardApplyParams>(input, call);
  params.relu = call.relu;
  params.channels_fastest = channels_fastest(output);
  params.grad_output_strides = element_strides(grad_output);
  params.output_strides = element_strides(output);
  params.mean = statistic(mean);
  params.invstd = statistic(invstd);
  if (sum_grad.has_value()) {
    params.sum_grad = statistic(*sum_grad);
    params.sum_grad_centered = statistic(*sum_grad_centered);
  }
  params.weight = parameter(weight);
  params.bias = parameter(bias);
  params.grad_output = grad_output.const_data_ptr();
  params.output = output.mutable_data_ptr();
  for (const kernels::PatchGrid& grid : patch_grids(params.kOperator, call.bounds)) {
    params.grid = grid;
    kernels::launch_batch_norm_backward_apply(params, device.stream());
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_batch_norm(const Tensor& input, OptionalTensor weight,
                                                            OptionalTensor bias, IntList rows, IntList cols, double eps,
                                                            StringArgument activation) {
  const BatchNormCall call = check_batch_norm(input, weight, bias, rows, cols, eps, activation);
  const Tensor output = new_output(input, sizes_of(input));
  const Tensor mean = new_statistics(input, call);
  const Tensor invstd = new_statistics(input, call);
  const Tensor m2 = new_statistics(input, call);
  run_stats(input, call, mean, m2, invstd, eps);
  run_apply(input, mean, invstd, weight, bias, call, output);
  return {output, mean, invstd, m2};
}

void patch_batch_norm_out(const Tensor& input, OptionalTensor weight, OptionalTensor bias, IntList rows, IntList cols,
                          double eps, StringArgument activation, const Tensor& output, const Tensor& mean,
                          const Tensor& invstd, const Tensor& m2) {
  const BatchNormCall call = check_batch_norm(input, weight, bias, rows, cols, eps, activation);
  check_output(kBatchNorm, "output", output, input, sizes_of(input), input.scalar_type());
  check_statistics_output(kBatchNorm, "mean", mean, input, call);
  check_statistics_output(kBatchNorm, "invstd", invstd, input, call);
  check_statistics_output(kBatchNorm, "m2", m2, input, call);
  run_stats(input, call, mean, m2, invstd, eps);
  run_apply(input, mean, invstd, weight, bias, call, output);
}

std::tuple<Tensor, Tensor> patch_batch_norm_stats(const Tensor& input, IntList rows, IntList cols) {
  const BatchNormCall call = check_batch_norm_stats(input, rows, cols);
  const Tensor mean = new_statistics(input, call);
  const Tensor m2 = new_statistics(input, call);
  run_stats(input, call, mean, m2);
  return {mean, m2};
}

void patch_batch_norm_stats_out(const Tensor& input, IntList rows, IntList cols, const Tensor& mean, const Tensor& m2) {
  const BatchNormCall call = check_batch_norm_stats(input, rows, cols);
  check_statistics_output(kBatchNormStats, "mean", mean, input, call);
  check_statistics_output(kBatchNormStats, "m2", m2, input, call);
  run_stats(input, call, mean, m2);
}

Tensor patch_batch_norm_apply(const Tensor& input, const Tensor& mean, const Tensor& invstd, OptionalTensor weight,
                              OptionalTensor bias, IntList rows, IntList cols, StringArgument activation) {
  const BatchNormCall call = check_batch_norm_apply(input, mean, invstd, weight, bias, rows, cols, activation);
  const Tensor output = new_output(input, sizes_of(input));
  run_apply(input, mean, invstd, weight, bias, call, output);
  return output;
}

void patch_batch_norm_apply_out(const Tensor& input, const Tensor& mean, const Tensor& invstd, OptionalTensor weight,
                                OptionalTensor bias, IntList rows, IntList cols, StringArgument activation,
                                const Tensor& output) {
  const BatchNormCall call = check_batch_norm_apply(input, mean, invstd, weight, bias, rows, cols, activation);
  check_output(kBatchNormApply, "output", output, input, sizes_of(input), input.scalar_type());
  run_apply(input, mean, invstd, weight, bias, call, output);
}

std::tuple<Tensor, Tensor> patch_batch_norm_backward_reduce(const Tensor& grad_output, const Tensor& input,
                                                            const Tensor& mean, const Tensor& invstd,
                                                            OptionalTensor weight, OptionalTensor bias, IntList rows,
                                                            IntList cols, StringArgument activation) {
  const BatchNormCall call =
      check_batch_norm_backward_reduce(grad_output, input, mean, invstd, weight, bias, rows, cols, activation);
  const Tensor sum_grad = new_statistics(input, call);
  const Tensor sum_grad_centered = new_statistics(input, call);
  run_backward_reduce(grad_output, input, mean, invstd, weight, bias, call, sum_grad, sum_grad_centered);
  return {sum_grad, sum_grad_centered};
}

void patch_batch_norm_backward_reduce_out(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                          const Tensor& invstd, OptionalTensor weight, OptionalTensor bias,
                                          IntList rows, IntList cols, StringArgument activation, const Tensor& sum_grad,
                                          const Tensor& sum_grad_centered) {
  const BatchNormCall call =
      check_batch_norm_backward_reduce(grad_output, input, mean, invstd, weight, bias, rows, cols, activation);
  check_statistics_output(kBatchNormBackwardReduce, "sum_grad", sum_grad, input, call);
  check_statistics_output(kBatchNormBackwardReduce, "sum_grad_centered", sum_grad_centered, input, call);
  run_backward_reduce(grad_output, input, mean, invstd, weight, bias, call, sum_grad, sum_grad_centered);
}

Tensor patch_batch_norm_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                       const Tensor& invstd, OptionalTensor weight, OptionalTensor bias,
                                       OptionalTensor sum_grad, OptionalTensor sum_grad_centered, IntList rows,
                                       IntList cols, StringArgument activation) {
  const BatchNormCall call = check_batch_norm_backward_apply(grad_output, input, mean, invstd, weight, bias, sum_grad,
                                                             sum_grad_centered, rows, cols, activation);
  const Tensor output = new_output(grad_output, sizes_of(input));
  run_backward_apply(grad_output, input, mean, invstd, weight, bias, sum_grad, sum_grad_centered, call, output);
  return output;
}

void patch_batch_norm_backward_apply_out(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                         const Tensor& invstd, OptionalTensor weight, OptionalTensor bias,
                                         OptionalTensor sum_grad, OptionalTensor sum_grad_centered, IntList rows,
                                         IntList cols, StringArgument activation, const Tensor& output) {
  const BatchNormCall call = check_batch_norm_backward_apply(grad_output, input, mean, invstd, weight, bias, sum_grad,
                                                             sum_grad_centered, rows, cols, activation);
  check_output(kBatchNormBackwardApply, "output", output, grad_output, sizes_of(input), input.scalar_type());
  run_backward_apply(grad_output, input, mean, invstd, weight, bias, sum_grad, sum_grad_centered, call, output);
}

}  // namespace splitkern::cuda
