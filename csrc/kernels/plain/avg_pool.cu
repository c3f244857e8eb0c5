// Average pooling of each patch by itself, and its gradient in gather form. Called by patch_avg_pool2d
// and patch_avg_pool2d_backward. A window is summed in row-major order and divided once.
#include "../dispatch.h"
#include "../launchers.h"
#include "../nhwc/nhwc.h"
#include "geometry.h"

namespace splitkern::kernels {
namespace {

// Window positions of one axis that count: those inside the patch, or with count_include_pad those in
// [-padding, extent + padding) of the whole axis. Outputs are not negative, so none lies before -padding.
SPLITKERN_DEVICE int64_t counted_positions(const AverageDivisor& divisor, const WindowAxis& window, int64_t extent,
                                           const Taps& taps) {
  if (!divisor.count_include_pad) return taps.last > taps.first ? taps.last - taps.first : 0;
  const int64_t positions = extent + window.padding - taps.origin;
  return positions < 0 ? 0 : positions < window.kernel ? positions : window.kernel;
}

SPLITKERN_DEVICE int64_t window_divisor(const AverageDivisor& divisor, const WindowAxis& row_window,
                                        const WindowAxis& column_window, const Taps& y, const Taps& x) {
  if (divisor.override_value != 0) return divisor.override_value;
  return counted_positions(divisor, row_window, divisor.input_rows, y) *
         counted_positions(divisor, column_window, divisor.input_columns, x);
}

template <class T>
__global__ void avg_pool_kernel(const __grid_constant__ AvgPoolParams params) {
  using Value = Accumulator<T>;
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const Region region = output_region(params.grid, params.batch, params.channels);
  const int64_t elements = region_elements(region);

  for (int64_t index = global_thread_index(); index < elements; index += global_thread_count()) {
    const Element element = element_at(region, index, params.channels_fastest);
    const int32_t row_patch = find_patch(rows.out_bounds, rows.patches, element.row);
    const int32_t column_patch = find_patch(columns.out_bounds, columns.patches, element.column);
    const Taps y =
        taps_inside(params.row_window, element.row, rows.in_bounds[row_patch], rows.in_bounds[row_patch + 1]);
    const Taps x = taps_inside(params.column_window, element.column, columns.in_bounds[column_patch],
                               columns.in_bounds[column_patch + 1]);
    const T* input = static_cast<const T*>(params.input) + element.batch * params.input_strides.batch +
                     element.channel * params.input_strides.channel + y.origin * params.input_strides.row +
                     x.origin * params.input_strides.column;
    Value sum = 0;
    for (int64_t tap_y = y.first; tap_y < y.last; ++tap_y) {
      for (int64_t tap_x = x.first; tap_x < x.last; ++tap_x) {
        sum += to_accumulator(input[tap_y * params.input_strides.row + tap_x * params.input_strides.column]);
      }
    }
    const int64_t divisor = window_divisor(params.divisor, params.row_window, params.column_window, y, x);
    const Value average = divisor == 0 ? Value(0) : sum / static_cast<Value>(divisor);
    static_cast<T*>(params.output)[offset_of(params.output_strides, element)] = from_accumulator<T>(average);
  }
}

template <class T>
__global__ void avg_pool_backward_kernel(const __grid_constant__ AvgPoolBackwardParams params) {
  using Value = Accumulator<T>;
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const Region region = input_region(params.grid, params.batch, params.channels);
  const int64_t elements = region_elements(region);

  for (int64_t index = global_thread_index(); index < elements; index += global_thread_count()) {
    const Element element = element_at(region, index, params.channels_fastest);
    const int32_t row_patch = find_patch(rows.in_bounds, rows.patches, element.row);
    const int32_t column_patch = find_patch(columns.in_bounds, columns.patches, element.column);
    const T* grad = static_cast<const T*>(params.grad_output) + element.batch * params.grad_output_strides.batch +
                    element.channel * params.grad_output_strides.channel;

    // Descending taps visit the outputs in ascending order, the order in which ATen scatters them.
    Value sum = 0;
    for (int64_t tap_y = params.row_window.kernel - 1; tap_y >= 0; --tap_y) {
      const int64_t out_row = output_reading(params.row_window, element.row, tap_y, rows.out_bounds[row_patch],
                                             rows.out_bounds[row_patch + 1]);
      if (out_row < 0) continue;
      const Taps y = taps_inside(params.row_window, static_cast<int32_t>(out_row), rows.in_bounds[row_patch],
                                 rows.in_bounds[row_patch + 1]);
      for (int64_t tap_x = params.column_window.kernel - 1; tap_x >= 0; --tap_x) {
        const int64_t out_column =
            output_reading(params.column_window, element.column, tap_x, columns.out_bounds[column_patch],
                           columns.out_bounds[column_patch + 1]);
        if (out_column < 0) continue;
        const Taps x = taps_inside(params.column_window, static_cast<int32_t>(out_column),
                                   columns.in_bounds[column_patch], columns.in_bounds[column_patch + 1]);
        const int64_t divisor = window_divisor(params.divisor, params.row_window, params.column_window, y, x);
        if (divisor == 0) continue;  // the forward wrote a constant zero
        sum += to_accumulator(
                   grad[out_row * params.grad_output_strides.row + out_column * params.grad_output_strides.column]) /
               static_cast<Value>(divisor);
      }
    }
    static_cast<T*>(params.output)[offset_of(params.output_strides, element)] = from_accumulator<T>(sum);
  }
}

}  // namespace

void launch_avg_pool(const AvgPoolParams& params, cudaStream_t stream) {
  if (nhwc::choice_refusal(params).empty()) return nhwc::launch(params, stream);
  const int64_t elements = region_elements(output_region(params.grid, params.batch, params.channels));
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&avg_pool_kernel<typename decltype(tag)::Type>, grid_for(elements), plain_block(), 0, stream, params);
  });
}

void launch_avg_pool_backward(const AvgPoolBackwardParams& params, cudaStream_t stream) {
  if (nhwc::choice_refusal(params).empty()) return nhwc::launch(params, stream);
  const int64_t elements = region_elements(input_region(params.grid, params.batch, params.channels));
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&avg_pool_backward_kernel<typename decltype(tag)::Type>, grid_for(elements), plain_block(), 0, stream,
           params);
  });
}

}  // namespace splitkern::kernels
