// Gradient of the patch convolution with respect to its input, in gather form: one thread computes one
// input element from the outputs of its own patch that read it. Called by patch_conv2d_input_grad.
// No atomics: sums run over kernel rows, kernel columns, then output channels.
#include "../dispatch.h"
#include "../launchers.h"
#include "geometry.h"

namespace splitkern::kernels {
namespace {

template <class T>
__global__ void conv_input_grad_kernel(const __grid_constant__ ConvInputGradParams params) {
  using Value = Accumulator<T>;
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const Region region = input_region(params.grid, params.batch, params.in_channels);
  const int64_t elements = region_elements(region);

  for (int64_t index = global_thread_index(); index < elements; index += global_thread_count()) {
    const Element element = element_at(region, index, params.channels_fastest);
    const int32_t row_patch = find_patch(rows.in_bounds, rows.patches, element.row);
    const int32_t column_patch = find_patch(columns.in_bounds, columns.patches, element.column);
    const int32_t group = element.channel / params.in_channels_per_group;
    const int32_t first_out_channel = group * params.out_channels_per_group;
    const T* grad = static_cast<const T*>(params.grad_output) + element.batch * params.grad_output_strides.batch +
                    first_out_channel * params.grad_output_strides.channel;
    const T* weight = static_cast<const T*>(params.weight) + first_out_channel * params.weight_strides.batch +
                      (element.channel - group * params.in_channels_per_group) * params.weight_strides.channel;

    Value sum = 0;
    for (int64_t tap_y = 0; tap_y < params.row_window.kernel; ++tap_y) {
      const int64_t out_row = output_reading(params.row_window, element.row, tap_y, rows.out_bounds[row_patch],
                                             rows.out_bounds[row_patch + 1]);
      if (out_row < 0) continue;
      for (int64_t tap_x = 0; tap_x < params.column_window.kernel; ++tap_x) {
        const int64_t out_column =
            output_reading(params.column_window, element.column, tap_x, columns.out_bounds[column_patch],
                           columns.out_bounds[column_patch + 1]);
        if (out_column < 0) continue;
        const T* from =
            grad + out_row * params.grad_output_strides.row + out_column * params.grad_output_strides.column;
        const T* factor = weight + tap_y * params.weight_strides.row + tap_x * params.weight_strides.column;
        for (int32_t channel = 0; channel < params.out_channels_per_group; ++channel) {
          sum = multiply_add(to_accumulator(*from), to_accumulator(*factor), sum);
          from += params.grad_output_strides.channel;
          factor += params.weight_strides.batch;
        }
      }
    }
    static_cast<T*>(params.output)[offset_of(params.output_strides, element)] = from_accumulator<T>(sum);
  }
}

}  // namespace

void launch_conv_input_grad(const ConvInputGradParams& params, cudaStream_t stream) {
  const int64_t elements = region_elements(input_region(params.grid, params.batch, params.in_channels));
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&conv_input_grad_kernel<typename decltype(tag)::Type>, grid_for(elements), plain_block(), 0, stream, params);
  });
}

}  // namespace splitkern::kernels
