// Average pooling and its gradient, a vector of channels per thread. Called by the launchers of plain/avg_pool.cu,
// whose kernels give the same bits: a window is summed in row-major order in fp32 and divided once, gradients are
// divided and then added in ascending order of the outputs. Memory-bound; 2x2 and 3x3 windows are unrolled.
#include "../dispatch.h"
#include "nhwc.h"
#include "pooling.h"

namespace splitkern::kernels::nhwc {
namespace {

struct ForwardParams : AvgPoolParams {
  Tiles tiles;
  Window rows_of_window;
  Window columns_of_window;
};
struct BackwardParams : AvgPoolBackwardParams {
  Tiles tiles;
  Window rows_of_window;
  Window columns_of_window;
};

// The window positions of one axis that count, see plain/avg_pool.cu.
SPLITKERN_DEVICE int32_t counted_positions(bool count_include_pad, const Window& window, int64_t extent,
                                           const WindowTaps& taps) {
  if (!count_include_pad) return taps.last > taps.first ? taps.last - taps.first : 0;
  const int32_t positions = static_cast<int32_t>(extent) + window.padding - taps.origin;
  return positions < 0 ? 0 : positions < window.kernel ? positions : window.kernel;
}

template <class Params>
SPLITKERN_DEVICE int64_t window_divisor(const Params& params, const WindowTaps& y, const WindowTaps& x) {
  const AverageDivisor& divisor = params.divisor;
  if (divisor.override_value != 0) return divisor.override_value;
  const int32_t rows = counted_positions(divisor.count_include_pad, params.rows_of_window, divisor.input_rows, y);
  const int32_t columns =
      counted_positions(divisor.count_include_pad, params.columns_of_window, divisor.input_columns, x);
  return static_cast<int64_t>(rows) * columns;
}

// Division by a window's divisor, exactly rounded. For a power of two the product with the reciprocal is the same
// number; no division at all, for a divisor of 0, gives 0.
struct Quotient {
  float divisor;
  float reciprocal;  // 0 where it is not exact
  bool zero;

  SPLITKERN_DEVICE explicit Quotient(int64_t by) {
    const int64_t magnitude = by < 0 ? -by : by;
    divisor = static_cast<float>(by);
    zero = by == 0;
    reciprocal = (magnitude & (magnitude - 1)) == 0 ? 1.0f / divisor : 0.0f;
  }
  template <int kCount>
  SPLITKERN_DEVICE void divide(float (&values)[kCount]) const {
    if (zero) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = 0.0f;
    } else if (reciprocal != 0.0f) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = multiply_add(values[i], reciprocal, -0.0f);  // rounds by itself
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = values[i] / divisor;
    }
  }
};

template <class T, int kBytes>
SPLITKERN_DEVICE void add(float (&sums)[kBytes / sizeof(T)], const Words<kBytes>& terms) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(kBytes / sizeof(T)); ++i) sums[i] += element_of<T>(terms, i);
}

// kWindow: the rows and columns of the window, whose loads then go out together; 0: as the parameters say.
template <class T, int kBytes, int kWindow>
__global__ void avg_pool_kernel(const __grid_constant__ ForwardParams params) {
  const Item item = item_of(params.tiles);
  if (!item.exists) return;
  const Range in_rows = patch_inputs(params.grid.rows, item.row);
  const Range in_columns = patch_inputs(params.grid.columns, item.column);
  const WindowTaps y = taps_inside(params.rows_of_window, item.row, in_rows.first, in_rows.last);
  const WindowTaps x = taps_inside(params.columns_of_window, item.column, in_columns.first, in_columns.last);
  const Quotient quotient(window_divisor(params, y, x));
  const int64_t step_y = sizeof(T) * params.input_strides.row;
  const int64_t step_x = sizeof(T) * params.input_strides.column;
  uint32_t channel = item.vector * (kBytes / sizeof(T));
  for (int32_t part = 0; part < params.tiles.parts; ++part, channel += params.tiles.part_channels) {
    const char* input = static_cast<const char*>(params.input) +
                        sizeof(T) * pixel_offset(params.input_strides, item.batch, y.origin, x.origin, channel);
    float sums[kBytes / sizeof(T)] = {};
    if constexpr (kWindow != 0) {
      // +0 for what lies outside leaves every sum as it is: one that begins at +0 never becomes -0.
      Words<kBytes> terms[kWindow * kWindow];
#pragma unroll
      for (int tap = 0; tap < kWindow * kWindow; ++tap) {
        const int tap_y = tap / kWindow;
        const int tap_x = tap % kWindow;
        terms[tap] = filled_words<kBytes>(0);
        if (tap_y >= y.first && tap_y < y.last && tap_x >= x.first && tap_x < x.last) {
          terms[tap] = load_words<kBytes>(input + tap_y * step_y + tap_x * step_x);
        }
      }
#pragma unroll
      for (int tap = 0; tap < kWindow * kWindow; ++tap) add<T>(sums, terms[tap]);
    } else {
      for (int32_t tap_y = y.first; tap_y < y.last; ++tap_y) {
        for (int32_t tap_x = x.first; tap_x < x.last; ++tap_x) {
          add<T>(sums, load_words<kBytes>(input + tap_y * step_y + tap_x * step_x));
        }
      }
    }
    quotient.divide(sums);
    store_words(static_cast<T*>(params.output) +
                    pixel_offset(params.output_strides, item.batch, item.row, item.column, channel),
                rounded<T, kBytes>(sums));
  }
}

// One pixel per thread, any window.
template <class T, int kBytes>
__global__ void avg_pool_backward_kernel(const __grid_constant__ BackwardParams params) {
  constexpr int kElements = kBytes / sizeof(T);
  const Item item = item_of(params.tiles);
  if (!item.exists) return;
  const Window& window_y = params.rows_of_window;
  const Window& window_x = params.columns_of_window;
  const int32_t row_patch = find_patch(params.grid.rows.in_bounds, params.grid.rows.patches, item.row);
  const int32_t column_patch = find_patch(params.grid.columns.in_bounds, params.grid.columns.patches, item.column);
  const Range out_rows = outputs_over(window_y, item.row, params.grid.rows.out_bounds[row_patch],
                                      params.grid.rows.out_bounds[row_patch + 1]);
  const Range out_columns = outputs_over(window_x, item.column, params.grid.columns.out_bounds[column_patch],
                                         params.grid.columns.out_bounds[column_patch + 1]);
  uint32_t channel = item.vector * kElements;
  for (int32_t part = 0; part < params.tiles.parts; ++part, channel += params.tiles.part_channels) {
    const T* grads =
        static_cast<const T*>(params.grad_output) + item.batch * params.grad_output_strides.batch + channel;
    // Outputs ascend, the order in which ATen scatters them.
    float sums[kElements] = {};
    for (int32_t out_row = out_rows.first; out_row < out_rows.last; ++out_row) {
      const WindowTaps y = taps_inside(window_y, out_row, params.grid.rows.in_bounds[row_patch],
                                       params.grid.rows.in_bounds[row_patch + 1]);
      for (int32_t out_column = out_columns.first; out_column < out_columns.last; ++out_column) {
        const WindowTaps x = taps_inside(window_x, out_column, params.grid.columns.in_bounds[column_patch],
                                         params.grid.columns.in_bounds[column_patch + 1]);
        const auto grad = load_words<kBytes>(grads + out_row * params.grad_output_strides.row +
                                             out_column * params.grad_output_strides.column);
        float terms[kElements];
#pragma unroll
        for (int i = 0; i < kElements; ++i) terms[i] = element_of<T>(grad, i);
        Quotient(window_divisor(params, y, x)).divide(terms);
#pragma unroll
        for (int i = 0; i < kElements; ++i) sums[i] += terms[i];
      }
    }
    store_words(static_cast<T*>(params.output) +
                    pixel_offset(params.output_strides, item.batch, item.row, item.column, channel),
                rounded<T, kBytes>(sums));
  }
}

// A cell of inputs per thread (pooling.h), so that each gradient is read and divided once for all of its inputs.
template <class T, int kBytes, int kKernel, int kStride>
__global__ void avg_pool_backward_cell_kernel(const __grid_constant__ BackwardParams params) {
  constexpr int kElements = kBytes / sizeof(T);
  using Axis = CellAxis<kKernel, kStride>;
  constexpr int kOutputs = Axis::kOutputs;
  const Item item = item_of(params.tiles);
  if (!item.exists) return;
  const Axis y = cell_axis<kKernel, kStride>(params.grid.rows, params.rows_of_window.padding, item.row);
  const Axis x = cell_axis<kKernel, kStride>(params.grid.columns, params.columns_of_window.padding, item.column);
  WindowTaps taps_y[kOutputs];
  WindowTaps taps_x[kOutputs];
#pragma unroll
  for (int q = 0; q < kOutputs; ++q) {
    const Range rows = patch_inputs(params.grid.rows, y.output[q]);
    const Range columns = patch_inputs(params.grid.columns, x.output[q]);
    taps_y[q] = taps_inside(params.rows_of_window, y.output[q], rows.first, rows.last);
    taps_x[q] = taps_inside(params.columns_of_window, x.output[q], columns.first, columns.last);
  }
  const uint32_t channel = item.vector * kElements;
  auto grads = output_offsets<T>(params.grad_output_strides, item.batch, y, x, channel);
  T* output =
      static_cast<T*>(params.output) + pixel_offset(params.output_strides, item.batch, y.position, x.position, channel);
  for (int32_t part = 0; part < params.tiles.parts; ++part) {
    Words<kBytes> grad[kOutputs][kOutputs];
#pragma unroll
    for (int qy = 0; qy < kOutputs; ++qy) {
#pragma unroll
      for (int qx = 0; qx < kOutputs; ++qx) {
        grad[qy][qx] = load_words<kBytes>(static_cast<const char*>(params.grad_output) + grads.of(qy, qx));
      }
    }
    float sums[kStride][kStride][kElements] = {};
    // Descending q are ascending outputs.
#pragma unroll
    for (int qy = kOutputs - 1; qy >= 0; --qy) {
#pragma unroll
      for (int qx = kOutputs - 1; qx >= 0; --qx) {
        float terms[kElements];
#pragma unroll
        for (int i = 0; i < kElements; ++i) terms[i] = element_of<T>(grad[qy][qx], i);
        Quotient(window_divisor(params, taps_y[qy], taps_x[qx])).divide(terms);
#pragma unroll
        for (int jy = 0; jy < kStride; ++jy) {
#pragma unroll
          for (int jx = 0; jx < kStride; ++jx) {
            const bool reads = y.reads[jy][qy] && x.reads[jx][qx];
#pragma unroll
            for (int i = 0; i < kElements; ++i) sums[jy][jx][i] += reads ? terms[i] : 0.0f;
          }
        }
      }
    }
#pragma unroll
    for (int jy = 0; jy < kStride; ++jy) {
#pragma unroll
      for (int jx = 0; jx < kStride; ++jx) {
        if (y.inside[jy] && x.inside[jx]) {
          store_words(output + jy * params.output_strides.row + jx * params.output_strides.column,
                      rounded<T, kBytes>(sums[jy][jx]));
        }
      }
    }
    grads.first += sizeof(T) * params.tiles.part_channels;
    output += params.tiles.part_channels;
  }
}

int64_t bytes_of(const AvgPoolParams& params) {
  return vector_bytes(params.type, params.batch, params.channels,
                      {{"input", params.input, &params.input_strides, element_bytes(params.type)},
                       {"output", params.output, &params.output_strides, element_bytes(params.type)}});
}
int64_t bytes_of(const AvgPoolBackwardParams& params) {
  return vector_bytes(params.type, params.batch, params.channels,
                      {{"grad_output", params.grad_output, &params.grad_output_strides, element_bytes(params.type)},
                       {"output", params.output, &params.output_strides, element_bytes(params.type)}});
}

std::string divisor_refusal(const AverageDivisor& divisor) {
  if (divisor.input_rows <= kMaxPosition && divisor.input_columns <= kMaxPosition) return "";
  return "the input reaches over 2^29 positions from the origin";
}

}  // namespace

std::string refusal(const AvgPoolParams& params) {
  return first_reason({layout_refusal(params.type, {{"input", params.input, &params.input_strides, 0},
                                                    {"output", params.output, &params.output_strides, 0}}),
                       window_refusal(params), divisor_refusal(params.divisor),
                       extent_refusal(params, output_region(params.grid, params.batch, params.channels))});
}
std::string refusal(const AvgPoolBackwardParams& params) {
  return first_reason({layout_refusal(params.type, {{"grad_output", params.grad_output, &params.grad_output_strides, 0},
                                                    {"output", params.output, &params.output_strides, 0}}),
                       window_refusal(params), divisor_refusal(params.divisor),
                       extent_refusal(params, input_region(params.grid, params.batch, params.channels))});
}

void launch(const AvgPoolParams& params, cudaStream_t stream) {
  const int64_t bytes = bytes_of(params);
  auto nhwc = with_windows<ForwardParams>(params);
  nhwc.tiles = tiles_of(output_rows(params.grid), output_columns(params.grid), params.batch, params.channels, bytes,
                        bytes / element_bytes(params.type));
  const auto queue = [&](void (*kernel)(ForwardParams)) {
    kernels::launch(kernel, tile_grid(nhwc.tiles, params.batch), tile_block(), 0, stream, nhwc);
  };
  dispatch_vector(params.kOperator, params.type, bytes, [&](auto tag, auto width) {
    using T = typename decltype(tag)::Type;
    if constexpr (width.kInt == 16) {
      if (has_window(params, 3)) return queue(&avg_pool_kernel<T, 16, 3>);
      if (has_window(params, 2)) return queue(&avg_pool_kernel<T, 16, 2>);
    }
    queue(&avg_pool_kernel<T, width.kInt, 0>);
  });
}

void launch(const AvgPoolBackwardParams& params, cudaStream_t stream) {
  const int64_t bytes = bytes_of(params);
  auto nhwc = with_windows<BackwardParams>(params);
  const auto queue = [&](void (*kernel)(BackwardParams), Range rows, Range columns) {
    nhwc.tiles = tiles_of(rows, columns, params.batch, params.channels, bytes, bytes / element_bytes(params.type));
    kernels::launch(kernel, tile_grid(nhwc.tiles, params.batch), tile_block(), 0, stream, nhwc);
  };
  const Range rows = input_rows(params.grid);
  const Range columns = input_columns(params.grid);
  dispatch_vector(params.kOperator, params.type, bytes, [&](auto tag, auto width) {
    using T = typename decltype(tag)::Type;
    if constexpr (width.kInt == 16) {
      const Range cell_rows = cells_of(params.row_window, rows);
      const Range cell_columns = cells_of(params.column_window, columns);
      if (has_window(params, 3, 2)) {
        return queue(&avg_pool_backward_cell_kernel<T, 16, 3, 2>, cell_rows, cell_columns);
      }
      if (has_window(params, 2, 2)) {
        return queue(&avg_pool_backward_cell_kernel<T, 16, 2, 2>, cell_rows, cell_columns);
      }
    }
    queue(&avg_pool_backward_kernel<T, width.kInt>, rows, columns);
  });
}

}  // namespace splitkern::kernels::nhwc
