// Convolution of each patch by itself, any shape and type: one thread computes one output element.
// Called by patch_conv2d. Sums run over kernel rows, kernel columns, then input channels, by fused
// multiply-adds in fp32 (fp64 for fp64), so a result does not depend on the launch's shape.
#include "../dispatch.h"
#include "../launchers.h"
#include "geometry.h"

namespace splitkern::kernels {
namespace {

template <class T>
__global__ void conv_forward_kernel(const __grid_constant__ ConvForwardParams params) {
  using Value = Accumulator<T>;
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const Region region = output_region(params.grid, params.batch, params.out_channels);
  const int64_t elements = region_elements(region);
  const int64_t input_step_y = params.row_window.dilation * params.input_strides.row;
  const int64_t input_step_x = params.column_window.dilation * params.input_strides.column;

  for (int64_t index = global_thread_index(); index < elements; index += global_thread_count()) {
    const Element element = element_at(region, index, params.channels_fastest);
    const int32_t row_patch = find_patch(rows.out_bounds, rows.patches, element.row);
    const int32_t column_patch = find_patch(columns.out_bounds, columns.patches, element.column);
    const Taps y =
        taps_inside(params.row_window, element.row, rows.in_bounds[row_patch], rows.in_bounds[row_patch + 1]);
    const Taps x = taps_inside(params.column_window, element.column, columns.in_bounds[column_patch],
                               columns.in_bounds[column_patch + 1]);
    const int32_t first_in_channel = element.channel / params.out_channels_per_group * params.in_channels_per_group;
    const T* input = static_cast<const T*>(params.input) + element.batch * params.input_strides.batch +
                     first_in_channel * params.input_strides.channel + y.origin * params.input_strides.row +
                     x.origin * params.input_strides.column;
    const T* weight = static_cast<const T*>(params.weight) + element.channel * params.weight_strides.batch;

    Value sum = 0;
    for (int64_t tap_y = y.first; tap_y < y.last; ++tap_y) {
      for (int64_t tap_x = x.first; tap_x < x.last; ++tap_x) {
        const T* in = input + tap_y * input_step_y + tap_x * input_step_x;
        const T* factor = weight + tap_y * params.weight_strides.row + tap_x * params.weight_strides.column;
        for (int32_t channel = 0; channel < params.in_channels_per_group; ++channel) {
          sum = multiply_add(to_accumulator(*in), to_accumulator(*factor), sum);
          in += params.input_strides.channel;
          factor += params.weight_strides.channel;
        }
      }
    }
    if (params.bias != nullptr) {
      sum += to_accumulator(static_cast<const T*>(params.bias)[element.channel * params.bias_stride]);
    }
    static_cast<T*>(params.output)[offset_of(params.output_strides, element)] =
        from_accumulator<T>(activate(sum, params.relu));
  }
}

}  // namespace

void launch_conv_forward(const ConvForwardParams& params, cudaStream_t stream) {
  const int64_t elements = region_elements(output_region(params.grid, params.batch, params.out_channels));
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&conv_forward_kernel<typename decltype(tag)::Type>, grid_for(elements), plain_block(), 0, stream, params);
  });
}

}  // namespace splitkern::kernels
