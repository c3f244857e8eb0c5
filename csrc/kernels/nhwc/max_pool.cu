// Max pooling, its gradient and its gather, a vector of channels per thread. Called by the launchers of
// plain/max_pool.cu, whose kernels give the same bits: the first maximum in row-major window order wins, and the last
// NaN. Memory-bound; 3x3 and 2x2 windows have their loads unrolled, so that all of them are in flight together.
#include "../dispatch.h"
#include "nhwc.h"
#include "pooling.h"

namespace splitkern::kernels::nhwc {
namespace {

struct ForwardParams : MaxPoolParams {
  Tiles tiles;
  Window rows_of_window;
  Window columns_of_window;
};
struct BackwardParams : MaxPoolBackwardParams {
  Tiles tiles;
  Window rows_of_window;
  Window columns_of_window;
};
struct GatherParams : MaxPoolGatherParams {
  Tiles tiles;
  Window rows_of_window;
  Window columns_of_window;
  FastDivisor kernel_columns;
};

// In registers an offset takes as many bits as a value, so that one mask selects both.
template <class T>
SPLITKERN_DEVICE uint32_t in_every_lane(uint32_t offset) {
  return sizeof(T) == 4 ? offset : offset * 0x10001u;
}

template <class T>
SPLITKERN_DEVICE uint32_t minus_infinity();
template <>
SPLITKERN_DEVICE uint32_t minus_infinity<float>() {
  return 0xff800000u;
}
template <>
SPLITKERN_DEVICE uint32_t minus_infinity<Half>() {
  return 0xfc00fc00u;
}
template <>
SPLITKERN_DEVICE uint32_t minus_infinity<BFloat16>() {
  return 0xff80ff80u;
}

// The running maximum of a vector and where it was found.
template <class T, int kBytes>
struct Maximum {
  Words<kBytes> values;
  Words<kBytes> offsets;

  // `offset` is in every lane.
  SPLITKERN_DEVICE void take(const Words<kBytes>& candidate, uint32_t offset) {
#pragma unroll
    for (int i = 0; i < Words<kBytes>::kCount; ++i) {
      const uint32_t mask = exceeds_mask<T>(candidate.words[i], values.words[i]);
      values.words[i] = (candidate.words[i] & mask) | (values.words[i] & ~mask);
      offsets.words[i] = (offset & mask) | (offsets.words[i] & ~mask);
    }
  }
};

// One byte per element.
template <class T, int kBytes>
SPLITKERN_DEVICE Words<kBytes / sizeof(T)> to_bytes(const Words<kBytes>& lanes) {
  constexpr int kElements = kBytes / sizeof(T);
  constexpr int kLanesPerWord = 4 / sizeof(T);
  Words<kElements> bytes = filled_words<kElements>(0);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const uint32_t offset = (lanes.words[i / kLanesPerWord] >> (i % kLanesPerWord * 16)) & 0xffu;
    bytes.words[i / 4] |= offset << (i % 4 * 8);
  }
  return bytes;
}

// Writes one vector of maxima and of offsets.
template <class T, int kBytes>
SPLITKERN_DEVICE void store_maximum(const ForwardParams& params, const Item& item, uint32_t channel,
                                    const Maximum<T, kBytes>& best) {
  store_words(
      static_cast<T*>(params.values) + pixel_offset(params.values_strides, item.batch, item.row, item.column, channel),
      best.values);
  store_words(params.offsets + pixel_offset(params.offsets_strides, item.batch, item.row, item.column, channel),
              to_bytes<T, kBytes>(best.offsets));
}

// Any window.
template <class T, int kBytes>
__global__ void max_pool_kernel(const __grid_constant__ ForwardParams params) {
  const Item item = item_of(params.tiles);
  if (!item.exists) return;
  const Range in_rows = patch_inputs(params.grid.rows, item.row);
  const Range in_columns = patch_inputs(params.grid.columns, item.column);
  const WindowTaps y = taps_inside(params.rows_of_window, item.row, in_rows.first, in_rows.last);
  const WindowTaps x = taps_inside(params.columns_of_window, item.column, in_columns.first, in_columns.last);
  const int64_t step_y = params.rows_of_window.dilation.divisor * params.input_strides.row;
  const int64_t step_x = params.columns_of_window.dilation.divisor * params.input_strides.column;
  const int32_t window_columns = params.columns_of_window.kernel;

  // A window of nothing but -inf saves its first position, an empty one saves none.
  const bool empty = y.first >= y.last || x.first >= x.last;
  const uint32_t first_offset = empty ? kNoOffset : static_cast<uint32_t>(y.first * window_columns + x.first);
  uint32_t channel = item.vector * (kBytes / sizeof(T));
  for (int32_t part = 0; part < params.tiles.parts; ++part, channel += params.tiles.part_channels) {
    const T* input = static_cast<const T*>(params.input) +
                     pixel_offset(params.input_strides, item.batch, y.origin, x.origin, channel);
    Maximum<T, kBytes> best{filled_words<kBytes>(minus_infinity<T>()),
                            filled_words<kBytes>(in_every_lane<T>(first_offset))};
    for (int32_t tap_y = y.first; tap_y < y.last; ++tap_y) {
      for (int32_t tap_x = x.first; tap_x < x.last; ++tap_x) {
        best.take(load_words<kBytes>(input + tap_y * step_y + tap_x * step_x),
                  in_every_lane<T>(static_cast<uint32_t>(tap_y * window_columns + tap_x)));
      }
    }
    store_maximum<T, kBytes>(params, item, channel, best);
  }
}

// The positions of a window of kWindow taps without dilation; one outside the patch becomes the nearest inside. Such
// a position then comes up again with its own tap, which changes nothing: the first maximum and the last NaN of the
// row-major sequence stay where they are.
template <int kWindow>
struct ClampedTaps {
  bool any;  // no: the window sees nothing of the patch
  int32_t position[kWindow];
  int32_t tap[kWindow];
};

template <int kWindow>
SPLITKERN_DEVICE ClampedTaps<kWindow> clamped_taps(const Window& window, const AxisPatches& axis, int32_t output) {
  const Range inputs = patch_inputs(axis, output);
  const int32_t origin = window_origin(window, output);
  ClampedTaps<kWindow> taps;
  taps.any = origin < inputs.last && origin + kWindow > inputs.first;
#pragma unroll
  for (int tap = 0; tap < kWindow; ++tap) {
    const int32_t position = origin + tap < inputs.last ? origin + tap : inputs.last - 1;
    taps.position[tap] = position > inputs.first ? position : inputs.first;
    taps.tap[tap] = taps.position[tap] - origin;
  }
  return taps;
}

// A square window of known size without dilation: all loads at once.
template <class T, int kBytes, int kWindow>
__global__ void max_pool_square_kernel(const __grid_constant__ ForwardParams params) {
  const Item item = item_of(params.tiles);
  if (!item.exists) return;
  const auto y = clamped_taps<kWindow>(params.rows_of_window, params.grid.rows, item.row);
  const auto x = clamped_taps<kWindow>(params.columns_of_window, params.grid.columns, item.column);
  const bool empty = !(y.any && x.any);
  const char* image = static_cast<const char*>(params.input) + sizeof(T) * item.batch * params.input_strides.batch;
  int64_t row[kWindow];
  int64_t column[kWindow];
  uint32_t row_offset[kWindow];
  uint32_t column_offset[kWindow];
#pragma unroll
  for (int tap = 0; tap < kWindow; ++tap) {
    row[tap] = sizeof(T) * y.position[tap] * params.input_strides.row;
    column[tap] = sizeof(T) * x.position[tap] * params.input_strides.column;
    row_offset[tap] = in_every_lane<T>(static_cast<uint32_t>(y.tap[tap] * kWindow));
    column_offset[tap] = in_every_lane<T>(static_cast<uint32_t>(x.tap[tap]));
  }
  uint32_t channel = item.vector * (kBytes / sizeof(T));
  image += sizeof(T) * channel;
  for (int32_t part = 0; part < params.tiles.parts; ++part) {
    Words<kBytes> candidates[kWindow * kWindow];
#pragma unroll
    for (int tap_y = 0; tap_y < kWindow; ++tap_y) {
      const char* row_of_image = image + row[tap_y];
#pragma unroll
      for (int tap_x = 0; tap_x < kWindow; ++tap_x) {
        candidates[tap_y * kWindow + tap_x] = load_words<kBytes>(row_of_image + column[tap_x]);
      }
    }
    Maximum<T, kBytes> best{candidates[0], filled_words<kBytes>(row_offset[0] + column_offset[0])};
#pragma unroll
    for (int tap = 1; tap < kWindow * kWindow; ++tap) {
      best.take(candidates[tap], row_offset[tap / kWindow] + column_offset[tap % kWindow]);
    }
    if (empty) {
      best.values = filled_words<kBytes>(minus_infinity<T>());
      best.offsets = filled_words<kBytes>(in_every_lane<T>(kNoOffset));
    }
    store_maximum<T, kBytes>(params, item, channel, best);
    image += sizeof(T) * params.tiles.part_channels;
    channel += params.tiles.part_channels;
  }
}

// The offsets of a vector, each as wide as its value.
template <class T, int kBytes>
SPLITKERN_DEVICE Words<kBytes> load_offsets(const uint8_t* offsets) {
  constexpr int kElements = kBytes / sizeof(T);
  const Words<kElements> bytes = load_words<kElements>(offsets);
  Words<kBytes> lanes;
#pragma unroll
  for (int i = 0; i < Words<kBytes>::kCount; ++i) {
    if constexpr (sizeof(T) == 4) {
      lanes.words[i] = (bytes.words[0] >> (i * 8)) & 0xffu;
    } else {
      const uint32_t pair = bytes.words[i / 2] >> (i % 2 * 16);
      lanes.words[i] = (pair & 0xffu) | ((pair & 0xff00u) << 8);
    }
  }
  return lanes;
}

// The gradients whose offset is `tap`, which is in every lane; +0 for the others.
template <class T, int kBytes>
SPLITKERN_DEVICE Words<kBytes> where_offset(const Words<kBytes>& grad, const Words<kBytes>& offsets, uint32_t tap) {
  Words<kBytes> masked;
#pragma unroll
  for (int i = 0; i < Words<kBytes>::kCount; ++i) {
    masked.words[i] = grad.words[i] & equal_mask<T>(offsets.words[i], tap);
  }
  return masked;
}

// Adding +0 leaves every sum as it is: one that begins at +0 never becomes -0.
template <class T, int kBytes>
SPLITKERN_DEVICE void add(float (&sums)[kBytes / sizeof(T)], const Words<kBytes>& grad) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(kBytes / sizeof(T)); ++i) sums[i] += element_of<T>(grad, i);
}

// One pixel per thread, any window.
template <class T, int kBytes>
__global__ void max_pool_backward_kernel(const __grid_constant__ BackwardParams params) {
  const Item item = item_of(params.tiles);
  if (!item.exists) return;
  const Window& window_y = params.rows_of_window;
  const Window& window_x = params.columns_of_window;
  const Range patch_rows = patch_outputs(params.grid.rows, item.row);
  const Range patch_columns = patch_outputs(params.grid.columns, item.column);
  const Range out_rows = outputs_over(window_y, item.row, patch_rows.first, patch_rows.last);
  const Range out_columns = outputs_over(window_x, item.column, patch_columns.first, patch_columns.last);

  uint32_t channel = item.vector * (kBytes / sizeof(T));
  for (int32_t part = 0; part < params.tiles.parts; ++part, channel += params.tiles.part_channels) {
    const T* grads =
        static_cast<const T*>(params.grad_output) + item.batch * params.grad_output_strides.batch + channel;
    const uint8_t* offsets = params.offsets + item.batch * params.offsets_strides.batch + channel;
    // Outputs ascend, the order in which ATen scatters them.
    float sums[kBytes / sizeof(T)] = {};
    for (int32_t out_row = out_rows.first; out_row < out_rows.last; ++out_row) {
      const int32_t tap_y = tap_on(window_y, item.row, out_row);
      if (tap_y < 0) continue;
      for (int32_t out_column = out_columns.first; out_column < out_columns.last; ++out_column) {
        const int32_t tap_x = tap_on(window_x, item.column, out_column);
        if (tap_x < 0) continue;
        const auto grad = load_words<kBytes>(grads + out_row * params.grad_output_strides.row +
                                             out_column * params.grad_output_strides.column);
        const auto offset = load_offsets<T, kBytes>(offsets + out_row * params.offsets_strides.row +
                                                    out_column * params.offsets_strides.column);
        const uint32_t tap = static_cast<uint32_t>(tap_y * window_x.kernel + tap_x);
        add<T>(sums, where_offset<T>(grad, offset, in_every_lane<T>(tap)));
      }
    }
    store_words(static_cast<T*>(params.output) +
                    pixel_offset(params.output_strides, item.batch, item.row, item.column, channel),
                rounded<T, kBytes>(sums));
  }
}

// A cell of inputs per thread (pooling.h), so that each gradient is read for all of its inputs at once.
template <class T, int kBytes, int kKernel, int kStride>
__global__ void max_pool_backward_cell_kernel(const __grid_constant__ BackwardParams params) {
  using Axis = CellAxis<kKernel, kStride>;
  constexpr int kOutputs = Axis::kOutputs;
  constexpr uint32_t kNeverRow = 0x1000;  // no offset in memory is above 255
  constexpr uint32_t kNeverColumn = 0x400;
  const Item item = item_of(params.tiles);
  if (!item.exists) return;
  const Axis y = cell_axis<kKernel, kStride>(params.grid.rows, params.rows_of_window.padding, item.row);
  const Axis x = cell_axis<kKernel, kStride>(params.grid.columns, params.columns_of_window.padding, item.column);
  // The offset that means position j in output q, as a sum of rows and columns.
  uint32_t row_tap[kStride][kOutputs];
  uint32_t column_tap[kStride][kOutputs];
#pragma unroll
  for (int j = 0; j < kStride; ++j) {
#pragma unroll
    for (int q = 0; q < kOutputs; ++q) {
      const uint32_t tap = kStride * q + j;
      row_tap[j][q] = in_every_lane<T>(y.reads[j][q] ? tap * kKernel : kNeverRow);
      column_tap[j][q] = in_every_lane<T>(x.reads[j][q] ? tap : kNeverColumn);
    }
  }
  const uint32_t channel = item.vector * (kBytes / sizeof(T));
  auto grads = output_offsets<T>(params.grad_output_strides, item.batch, y, x, channel);
  auto offsets = output_offsets<uint8_t>(params.offsets_strides, item.batch, y, x, channel);
  T* output =
      static_cast<T*>(params.output) + pixel_offset(params.output_strides, item.batch, y.position, x.position, channel);
  for (int32_t part = 0; part < params.tiles.parts; ++part) {
    Words<kBytes> grad[kOutputs][kOutputs];
    Words<kBytes> offset[kOutputs][kOutputs];
#pragma unroll
    for (int qy = 0; qy < kOutputs; ++qy) {
#pragma unroll
      for (int qx = 0; qx < kOutputs; ++qx) {
        grad[qy][qx] = load_words<kBytes>(static_cast<const char*>(params.grad_output) + grads.of(qy, qx));
        offset[qy][qx] = load_offsets<T, kBytes>(params.offsets + offsets.of(qy, qx));
      }
    }
#pragma unroll
    for (int jy = 0; jy < kStride; ++jy) {
#pragma unroll
      for (int jx = 0; jx < kStride; ++jx) {
        const int rows = outputs_on<kKernel, kStride>(jy);
        const int columns = outputs_on<kKernel, kStride>(jx);
        // Descending q are ascending outputs. Two gradients need no wider sum: added to +0 and to each other they
        // round once, to the same bits.
        const bool narrow = rows * columns <= 2;
        float sums[kBytes / sizeof(T)] = {};
        Words<kBytes> narrow_sums = filled_words<kBytes>(0);
#pragma unroll
        for (int qy = rows - 1; qy >= 0; --qy) {
#pragma unroll
          for (int qx = columns - 1; qx >= 0; --qx) {
            const auto found = where_offset<T>(grad[qy][qx], offset[qy][qx], row_tap[jy][qy] + column_tap[jx][qx]);
            if (narrow) {
              for (int i = 0; i < Words<kBytes>::kCount; ++i) {
                narrow_sums.words[i] = add_lanes<T>(narrow_sums.words[i], found.words[i]);
              }
            } else {
              add<T>(sums, found);
            }
          }
        }
        if (y.inside[jy] && x.inside[jx]) {
          store_words(output + jy * params.output_strides.row + jx * params.output_strides.column,
                      narrow ? narrow_sums : rounded<T, kBytes>(sums));
        }
      }
    }
    grads.first += sizeof(T) * params.tiles.part_channels;
    offsets.first += params.tiles.part_channels;
    output += params.tiles.part_channels;
  }
}

// Reads what the forward saved, so an offset that points outside its patch (offsets of another call) reads nothing.
// Element is an unsigned integer of the values' size: data moves, nothing is computed.
template <class Element, int kBytes>
__global__ void max_pool_gather_kernel(const __grid_constant__ GatherParams params) {
  constexpr int kElements = kBytes / sizeof(Element);
  constexpr int kElementsPerWord = 4 / sizeof(Element);
  const Item item = item_of(params.tiles);
  if (!item.exists) return;
  const Range in_rows = patch_inputs(params.grid.rows, item.row);
  const Range in_columns = patch_inputs(params.grid.columns, item.column);
  const WindowTaps y = taps_inside(params.rows_of_window, item.row, in_rows.first, in_rows.last);
  const WindowTaps x = taps_inside(params.columns_of_window, item.column, in_columns.first, in_columns.last);
  const int64_t step_y = params.rows_of_window.dilation.divisor * params.input_strides.row;
  const int64_t step_x = params.columns_of_window.dilation.divisor * params.input_strides.column;
  uint32_t channel = item.vector * kElements;
  for (int32_t part = 0; part < params.tiles.parts; ++part, channel += params.tiles.part_channels) {
    const Element* input = static_cast<const Element*>(params.input) +
                           pixel_offset(params.input_strides, item.batch, y.origin, x.origin, channel);
    const Words<kElements> offsets = load_words<kElements>(
        params.offsets + pixel_offset(params.offsets_strides, item.batch, item.row, item.column, channel));
    Words<kBytes> values = filled_words<kBytes>(0);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const uint32_t offset = (offsets.words[i / 4] >> (i % 4 * 8)) & 0xffu;
      const int32_t tap_y = static_cast<int32_t>(divide(offset, params.kernel_columns));
      const int32_t tap_x = static_cast<int32_t>(offset) - tap_y * params.columns_of_window.kernel;
      uint32_t value = 0;
      if (offset != kNoOffset && tap_y >= y.first && tap_y < y.last && tap_x >= x.first && tap_x < x.last) {
        value = load_global<Element>(input + tap_y * step_y + tap_x * step_x + i);
      }
      values.words[i / kElementsPerWord] |= value << (i % kElementsPerWord * 16);
    }
    store_words(static_cast<Element*>(params.output) +
                    pixel_offset(params.output_strides, item.batch, item.row, item.column, channel),
                values);
  }
}

int64_t bytes_of(const MaxPoolParams& params) {
  return vector_bytes(params.type, params.batch, params.channels,
                      {{"input", params.input, &params.input_strides, element_bytes(params.type)},
                       {"values", params.values, &params.values_strides, element_bytes(params.type)},
                       {"offsets", params.offsets, &params.offsets_strides, 1}});
}
int64_t bytes_of(const MaxPoolBackwardParams& params) {
  return vector_bytes(params.type, params.batch, params.channels,
                      {{"grad_output", params.grad_output, &params.grad_output_strides, element_bytes(params.type)},
                       {"offsets", params.offsets, &params.offsets_strides, 1},
                       {"output", params.output, &params.output_strides, element_bytes(params.type)}});
}
// The elements of the input are read one by one.
int64_t bytes_of(const MaxPoolGatherParams& params) {
  return vector_bytes(params.type, params.batch, params.channels,
                      {{"offsets", params.offsets, &params.offsets_strides, 1},
                       {"output", params.output, &params.output_strides, element_bytes(params.type)}});
}

}  // namespace

std::string refusal(const MaxPoolParams& params) {
  return first_reason({layout_refusal(params.type, {{"input", params.input, &params.input_strides, 0},
                                                    {"values", params.values, &params.values_strides, 0},
                                                    {"offsets", params.offsets, &params.offsets_strides, 0}}),
                       window_refusal(params),
                       extent_refusal(params, output_region(params.grid, params.batch, params.channels))});
}
std::string refusal(const MaxPoolBackwardParams& params) {
  return first_reason({layout_refusal(params.type, {{"grad_output", params.grad_output, &params.grad_output_strides, 0},
                                                    {"offsets", params.offsets, &params.offsets_strides, 0},
                                                    {"output", params.output, &params.output_strides, 0}}),
                       window_refusal(params),
                       extent_refusal(params, input_region(params.grid, params.batch, params.channels))});
}
std::string refusal(const MaxPoolGatherParams& params) {
  return first_reason({layout_refusal(params.type, {{"input", params.input, &params.input_strides, 0},
                                                    {"offsets", params.offsets, &params.offsets_strides, 0},
                                                    {"output", params.output, &params.output_strides, 0}}),
                       window_refusal(params),
                       extent_refusal(params, output_region(params.grid, params.batch, params.channels))});
}

void launch(const MaxPoolParams& params, cudaStream_t stream) {
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
      if (has_window(params, 3)) return queue(&max_pool_square_kernel<T, 16, 3>);
      if (has_window(params, 2)) return queue(&max_pool_square_kernel<T, 16, 2>);
    }
    queue(&max_pool_kernel<T, width.kInt>);
  });
}

void launch(const MaxPoolBackwardParams& params, cudaStream_t stream) {
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
        return queue(&max_pool_backward_cell_kernel<T, 16, 3, 2>, cell_rows, cell_columns);
      }
      if (has_window(params, 2, 2)) {
        return queue(&max_pool_backward_cell_kernel<T, 16, 2, 2>, cell_rows, cell_columns);
      }
    }
    queue(&max_pool_backward_kernel<T, width.kInt>, rows, columns);
  });
}

void launch(const MaxPoolGatherParams& params, cudaStream_t stream) {
  const int64_t bytes = bytes_of(params);
  auto nhwc = with_windows<GatherParams>(params);
  nhwc.kernel_columns = fast_divisor(params.column_window.kernel);
  nhwc.tiles = tiles_of(output_rows(params.grid), output_columns(params.grid), params.batch, params.channels, bytes,
                        bytes / element_bytes(params.type));
  const auto queue = [&](void (*kernel)(GatherParams)) {
    kernels::launch(kernel, tile_grid(nhwc.tiles, params.batch), tile_block(), 0, stream, nhwc);
  };
  const bool wide = element_bytes(params.type) == 4;
  if (bytes == 16) return queue(wide ? &max_pool_gather_kernel<uint32_t, 16> : &max_pool_gather_kernel<uint16_t, 16>);
  if (bytes == 8) return queue(wide ? &max_pool_gather_kernel<uint32_t, 8> : &max_pool_gather_kernel<uint16_t, 8>);
  if (bytes == 4) return queue(wide ? &max_pool_gather_kernel<uint32_t, 4> : &max_pool_gather_kernel<uint16_t, 4>);
  queue(&max_pool_gather_kernel<uint16_t, 2>);
}

}  // namespace splitkern::kernels::nhwc
