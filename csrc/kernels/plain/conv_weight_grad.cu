// Gradient of the patch convolution with respect to its weight, in two stages so that the result is the
// same in every run: fixed shares of the reduction are summed apart, then added in ascending order.
// Called by patch_conv2d_weight_grad, which owns the workspace between the stages.
#include "../dispatch.h"
#include "../launchers.h"
#include "geometry.h"

namespace splitkern::kernels {
namespace {

// Index of a weight element with the input channel fastest: neighbouring threads then read
// neighbouring channels of an NHWC input.
struct WeightElement {
  int64_t out_channel;
  int32_t tap_y;
  int32_t tap_x;
  int32_t in_channel;  // within its group
};

SPLITKERN_DEVICE WeightElement weight_element_at(int64_t index, int32_t in_channels_per_group, int32_t kernel_rows,
                                                 int32_t kernel_columns) {
  WeightElement element;
  element.in_channel = take_remainder(index, in_channels_per_group);
  element.tap_x = take_remainder(index, kernel_columns);
  element.tap_y = take_remainder(index, kernel_rows);
  element.out_channel = index;
  return element;
}

// The outputs of [out_begin, out_end) whose tap reads a position of [in_begin, in_end).
struct Outputs {
  int64_t first;
  int64_t last;
};

SPLITKERN_DEVICE Outputs outputs_inside(const WindowAxis& window, int64_t tap, int32_t in_begin, int32_t in_end,
                                        int32_t out_begin, int32_t out_end) {
  const int64_t shift = window.padding - tap * window.dilation;  // output * stride = position + shift
  const int64_t low = in_begin + shift;
  const int64_t high = in_end - 1 + shift;
  Outputs outputs;
  outputs.first = low <= 0 ? 0 : divide(low + window.stride - 1, window.stride);
  outputs.last = high < 0 ? 0 : divide(high, window.stride) + 1;
  if (outputs.first < out_begin) outputs.first = out_begin;
  if (outputs.last > out_end) outputs.last = out_end;
  return outputs;
}

template <class T>
__global__ void conv_weight_grad_kernel(const __grid_constant__ ConvWeightGradParams params) {
  using Value = Accumulator<T>;
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const int32_t kernel_rows = static_cast<int32_t>(params.row_window.kernel);
  const int32_t kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  const int64_t weight_elements =
      static_cast<int64_t>(params.out_channels) * params.in_channels_per_group * kernel_rows * kernel_columns;
  const int32_t row_begin = rows.out_bounds[0];
  const int32_t row_count = rows.out_bounds[rows.patches] - row_begin;
  const int64_t units = static_cast<int64_t>(params.batch) * row_count * columns.patches;
  const int64_t input_step_x = params.column_window.stride * params.input_strides.column;

  for (int64_t index = global_thread_index(); index < weight_elements * params.segments;
       index += global_thread_count()) {
    const int64_t segment = index / weight_elements;
    const WeightElement element =
        weight_element_at(index - segment * weight_elements, params.in_channels_per_group, kernel_rows, kernel_columns);
    const int64_t group = element.out_channel / params.out_channels_per_group;
    const T* grad =
        static_cast<const T*>(params.grad_output) + element.out_channel * params.grad_output_strides.channel;
    const T* input = static_cast<const T*>(params.input) +
                     (group * params.in_channels_per_group + element.in_channel) * params.input_strides.channel;

    Value sum = 0;
    const int64_t unit_end = units * (segment + 1) / params.segments;
    for (int64_t unit = units * segment / params.segments; unit < unit_end; ++unit) {
      int64_t rest = unit;
      const int32_t column_patch = take_remainder(rest, columns.patches);
      const int32_t out_row = row_begin + take_remainder(rest, row_count);
      const int64_t image = rest;
      const int32_t row_patch = find_patch(rows.out_bounds, rows.patches, out_row);
      const int64_t in_row =
          out_row * params.row_window.stride - params.row_window.padding + element.tap_y * params.row_window.dilation;
      if (in_row < rows.in_bounds[row_patch] || in_row >= rows.in_bounds[row_patch + 1]) continue;
      const Outputs outputs = outputs_inside(params.column_window, element.tap_x, columns.in_bounds[column_patch],
                                             columns.in_bounds[column_patch + 1], columns.out_bounds[column_patch],
                                             columns.out_bounds[column_patch + 1]);
      const int64_t in_column = outputs.first * params.column_window.stride - params.column_window.padding +
                                element.tap_x * params.column_window.dilation;
      const T* from = grad + image * params.grad_output_strides.batch + out_row * params.grad_output_strides.row +
                      outputs.first * params.grad_output_strides.column;
      const T* in = input + image * params.input_strides.batch + in_row * params.input_strides.row +
                    in_column * params.input_strides.column;
      for (int64_t output = outputs.first; output < outputs.last; ++output) {
        sum = multiply_add(to_accumulator(*from), to_accumulator(*in), sum);
        from += params.grad_output_strides.column;
        in += input_step_x;
      }
    }
    static_cast<Value*>(params.partial_sums)[params.first_segment * weight_elements + index] = sum;
  }
}

template <class T>
__global__ void conv_weight_grad_reduce_kernel(const __grid_constant__ ConvWeightGradReduceParams params) {
  using Value = Accumulator<T>;
  const int64_t weight_elements = static_cast<int64_t>(params.out_channels) * params.in_channels_per_group *
                                  params.kernel_rows * params.kernel_columns;
  for (int64_t index = global_thread_index(); index < weight_elements; index += global_thread_count()) {
    const Value* partial = static_cast<const Value*>(params.partial_sums) + index;
    Value sum = 0;
    for (int32_t segment = 0; segment < params.segments; ++segment) {
      sum += *partial;
      partial += weight_elements;
    }
    const WeightElement element =
        weight_element_at(index, params.in_channels_per_group, params.kernel_rows, params.kernel_columns);
    T* output = static_cast<T*>(params.output) + element.out_channel * params.output_strides.batch +
                element.in_channel * params.output_strides.channel + element.tap_y * params.output_strides.row +
                element.tap_x * params.output_strides.column;
    if (params.accumulate) sum += to_accumulator(*output);
    *output = from_accumulator<T>(sum);
  }
}

}  // namespace

void launch_conv_weight_grad(const ConvWeightGradParams& params, cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(params.out_channels) * params.in_channels_per_group *
                          params.row_window.kernel * params.column_window.kernel * params.segments;
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&conv_weight_grad_kernel<typename decltype(tag)::Type>, grid_for(threads), plain_block(), 0, stream, params);
  });
}

void launch_conv_weight_grad_reduce(const ConvWeightGradReduceParams& params, cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(params.out_channels) * params.in_channels_per_group *
                          params.kernel_rows * params.kernel_columns;
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&conv_weight_grad_reduce_kernel<typename decltype(tag)::Type>, grid_for(threads), plain_block(), 0, stream,
           params);
  });
}

}  // namespace splitkern::kernels
