// Max pooling of each patch by itself: values with the position inside the window, the gradient, and
// the gather that is the gradient's own gradient. Called by patch_max_pool2d and its backward operators.
// The first maximum in row-major window order wins and, as in PyTorch, the last NaN does.
#include "../dispatch.h"
#include "../launchers.h"
#include "../nhwc/nhwc.h"
#include "geometry.h"

namespace splitkern::kernels {
namespace {

template <class T>
__global__ void max_pool_kernel(const __grid_constant__ MaxPoolParams params) {
  using Value = Accumulator<T>;
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const Region region = output_region(params.grid, params.batch, params.channels);
  const int64_t elements = region_elements(region);
  const int64_t step_y = params.row_window.dilation * params.input_strides.row;
  const int64_t step_x = params.column_window.dilation * params.input_strides.column;

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

    // A window of nothing but -inf saves its first position, an empty one saves none.
    T best = from_accumulator<T>(Value(-kInfinity));
    int64_t best_tap = y.first < y.last && x.first < x.last ? y.first * params.column_window.kernel + x.first
                                                            : static_cast<int64_t>(kNoOffset);
    for (int64_t tap_y = y.first; tap_y < y.last; ++tap_y) {
      for (int64_t tap_x = x.first; tap_x < x.last; ++tap_x) {
        const T candidate = input[tap_y * step_y + tap_x * step_x];
        const Value value = to_accumulator(candidate);
        if (value > to_accumulator(best) || is_nan(value)) {
          best = candidate;
          best_tap = tap_y * params.column_window.kernel + tap_x;
        }
      }
    }
    static_cast<T*>(params.values)[offset_of(params.values_strides, element)] = best;
    params.offsets[offset_of(params.offsets_strides, element)] = static_cast<uint8_t>(best_tap);
  }
}

template <class T>
__global__ void max_pool_backward_kernel(const __grid_constant__ MaxPoolBackwardParams params) {
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
    const uint8_t* offsets = params.offsets + element.batch * params.offsets_strides.batch +
                             element.channel * params.offsets_strides.channel;

    // Descending taps visit the outputs in ascending order, the order in which ATen scatters them.
    Value sum = 0;
    for (int64_t tap_y = params.row_window.kernel - 1; tap_y >= 0; --tap_y) {
      const int64_t out_row = output_reading(params.row_window, element.row, tap_y, rows.out_bounds[row_patch],
                                             rows.out_bounds[row_patch + 1]);
      if (out_row < 0) continue;
      for (int64_t tap_x = params.column_window.kernel - 1; tap_x >= 0; --tap_x) {
        const int64_t out_column =
            output_reading(params.column_window, element.column, tap_x, columns.out_bounds[column_patch],
                           columns.out_bounds[column_patch + 1]);
        if (out_column < 0) continue;
        const int64_t tap = tap_y * params.column_window.kernel + tap_x;
        if (tap == offsets[out_row * params.offsets_strides.row + out_column * params.offsets_strides.column]) {
          sum += to_accumulator(
              grad[out_row * params.grad_output_strides.row + out_column * params.grad_output_strides.column]);
        }
      }
    }
    static_cast<T*>(params.output)[offset_of(params.output_strides, element)] = from_accumulator<T>(sum);
  }
}

// Reads what the forward saved, so an offset that points outside its patch (offsets of another call)
// reads nothing instead of another patch's data.
template <class T>
__global__ void max_pool_gather_kernel(const __grid_constant__ MaxPoolGatherParams params) {
  using Value = Accumulator<T>;
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const Region region = output_region(params.grid, params.batch, params.channels);
  const int64_t elements = region_elements(region);
  const uint32_t kernel_columns = static_cast<uint32_t>(params.column_window.kernel);

  for (int64_t index = global_thread_index(); index < elements; index += global_thread_count()) {
    const Element element = element_at(region, index, params.channels_fastest);
    const int32_t row_patch = find_patch(rows.out_bounds, rows.patches, element.row);
    const int32_t column_patch = find_patch(columns.out_bounds, columns.patches, element.column);
    const Taps y =
        taps_inside(params.row_window, element.row, rows.in_bounds[row_patch], rows.in_bounds[row_patch + 1]);
    const Taps x = taps_inside(params.column_window, element.column, columns.in_bounds[column_patch],
                               columns.in_bounds[column_patch + 1]);
    const uint32_t offset = params.offsets[offset_of(params.offsets_strides, element)];
    const int64_t tap_y = offset / kernel_columns;
    const int64_t tap_x = offset % kernel_columns;
    T value = from_accumulator<T>(Value(0));
    if (offset != kNoOffset && tap_y >= y.first && tap_y < y.last && tap_x >= x.first && tap_x < x.last) {
      const int64_t row = y.origin + tap_y * params.row_window.dilation;
      const int64_t column = x.origin + tap_x * params.column_window.dilation;
      value = static_cast<const T*>(
          params.input)[element.batch * params.input_strides.batch + element.channel * params.input_strides.channel +
                        row * params.input_strides.row + column * params.input_strides.column];
    }
    static_cast<T*>(params.output)[offset_of(params.output_strides, element)] = value;
  }
}

}  // namespace

void launch_max_pool(const MaxPoolParams& params, cudaStream_t stream) {
  if (nhwc::choice_refusal(params).empty()) return nhwc::launch(params, stream);
  const int64_t elements = region_elements(output_region(params.grid, params.batch, params.channels));
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&max_pool_kernel<typename decltype(tag)::Type>, grid_for(elements), plain_block(), 0, stream, params);
  });
}

void launch_max_pool_backward(const MaxPoolBackwardParams& params, cudaStream_t stream) {
  if (nhwc::choice_refusal(params).empty()) return nhwc::launch(params, stream);
  const int64_t elements = region_elements(input_region(params.grid, params.batch, params.channels));
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&max_pool_backward_kernel<typename decltype(tag)::Type>, grid_for(elements), plain_block(), 0, stream,
           params);
  });
}

void launch_max_pool_gather(const MaxPoolGatherParams& params, cudaStream_t stream) {
  if (nhwc::choice_refusal(params).empty()) return nhwc::launch(params, stream);
  const int64_t elements = region_elements(output_region(params.grid, params.batch, params.channels));
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&max_pool_gather_kernel<typename decltype(tag)::Type>, grid_for(elements), plain_block(), 0, stream, params);
  });
}

}  // namespace splitkern::kernels
