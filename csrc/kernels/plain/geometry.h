// Index arithmetic of the plain kernels: which element a thread computes, which patch holds it, which
// taps of a window stay inside the patch, and which output reads an input. Positions are 64-bit where
// a window may start outside the extents, so no padding or crop can wrap around.
#pragma once

#include "../params.h"
#include "../primitives.h"

namespace splitkern::kernels {

inline constexpr int kBlockThreads = 256;
// Enough blocks to fill any device; what is left is taken in grid-sized strides.
inline constexpr int64_t kMaxBlocks = 1 << 16;

inline Dim3 grid_for(int64_t elements) {
  const int64_t blocks = (elements + kBlockThreads - 1) / kBlockThreads;
  return Dim3{static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), 1u, 1u};
}
inline Dim3 plain_block() {
  return Dim3{static_cast<unsigned>(kBlockThreads), 1u, 1u};
}

// The elements that one launch writes: all images and channels of a rectangle of rows and columns.
struct Region {
  int32_t batch;
  int32_t channels;
  int32_t row_begin;
  int32_t rows;
  int32_t column_begin;
  int32_t columns;
};

struct Element {
  int64_t batch;
  int32_t channel;
  int32_t row;
  int32_t column;
};

SPLITKERN_HOST_DEVICE int64_t region_elements(const Region& region) {
  return static_cast<int64_t>(region.batch) * region.channels * region.rows * region.columns;
}
SPLITKERN_HOST_DEVICE Region output_region(const PatchGrid& grid, int32_t batch, int32_t channels) {
  const AxisPatches& rows = grid.rows;
  const AxisPatches& columns = grid.columns;
  return {batch,
          channels,
          rows.out_bounds[0],
          rows.out_bounds[rows.patches] - rows.out_bounds[0],
          columns.out_bounds[0],
          columns.out_bounds[columns.patches] - columns.out_bounds[0]};
}
SPLITKERN_HOST_DEVICE Region input_region(const PatchGrid& grid, int32_t batch, int32_t channels) {
  const AxisPatches& rows = grid.rows;
  const AxisPatches& columns = grid.columns;
  return {batch,
          channels,
          rows.in_bounds[0],
          rows.in_bounds[rows.patches] - rows.in_bounds[0],
          columns.in_bounds[0],
          columns.in_bounds[columns.patches] - columns.in_bounds[0]};
}

// Divides `index` by a positive extent in place and returns the remainder. 64-bit division is several
// times dearer than 32-bit, and most tensors never need it.
SPLITKERN_DEVICE int32_t take_remainder(int64_t& index, int32_t extent) {
  if ((index >> 32) == 0) {
    const uint32_t low = static_cast<uint32_t>(index);
    const uint32_t quotient = low / static_cast<uint32_t>(extent);
    index = quotient;
    return static_cast<int32_t>(low - quotient * static_cast<uint32_t>(extent));
  }
  const int64_t quotient = index / extent;
  const int32_t remainder = static_cast<int32_t>(index - quotient * extent);
  index = quotient;
  return remainder;
}

SPLITKERN_DEVICE Element element_at(const Region& region, int64_t index, bool channels_fastest) {
  Element element;
  if (channels_fastest) element.channel = take_remainder(index, region.channels);
  element.column = region.column_begin + take_remainder(index, region.columns);
  element.row = region.row_begin + take_remainder(index, region.rows);
  if (!channels_fastest) element.channel = take_remainder(index, region.channels);
  element.batch = index;
  return element;
}

SPLITKERN_DEVICE int64_t offset_of(const Strides4& strides, const Element& element) {
  return element.batch * strides.batch + element.channel * strides.channel + element.row * strides.row +
         element.column * strides.column;
}

// The patch i with bounds[i] <= position < bounds[i + 1]; the caller's position lies within the bounds.
SPLITKERN_DEVICE int32_t find_patch(const int32_t (&bounds)[kMaxPatchesPerAxis + 1], int32_t patches,
                                    int32_t position) {
  int32_t low = 0;
  int32_t high = patches;
  while (high - low > 1) {
    const int32_t middle = (low + high) >> 1;
    if (bounds[middle] <= position) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// numerator / divisor, rounded down, for a non-negative numerator and a positive divisor.
SPLITKERN_DEVICE int64_t divide(int64_t numerator, int64_t divisor) {
  if (divisor == 1) return numerator;
  if (((numerator | divisor) >> 32) == 0) return static_cast<uint32_t>(numerator) / static_cast<uint32_t>(divisor);
  return numerator / divisor;
}

// The taps t in [first, last) of one output whose positions origin + t * dilation lie in a patch.
struct Taps {
  int64_t origin;
  int64_t first;
  int64_t last;
};

SPLITKERN_DEVICE Taps taps_inside(const WindowAxis& window, int32_t output, int32_t in_begin, int32_t in_end) {
  Taps taps;
  taps.origin = output * window.stride - window.padding;
  const int64_t to_begin = in_begin - taps.origin;
  const int64_t to_last = in_end - 1 - taps.origin;
  taps.first = to_begin <= 0 ? 0 : divide(to_begin + window.dilation - 1, window.dilation);
  taps.last = to_last < 0 ? 0 : divide(to_last, window.dilation) + 1;
  if (taps.last > window.kernel) taps.last = window.kernel;
  return taps;
}

// The output that reads `position` at tap `tap`, or -1 where none of [out_begin, out_end) does.
SPLITKERN_DEVICE int64_t output_reading(const WindowAxis& window, int32_t position, int64_t tap, int32_t out_begin,
                                        int32_t out_end) {
  const int64_t shifted = position + window.padding - tap * window.dilation;
  if (shifted < 0) return -1;
  const int64_t output = divide(shifted, window.stride);
  return output * window.stride == shifted && output >= out_begin && output < out_end ? output : -1;
}

template <class Value>
SPLITKERN_DEVICE Value activate(Value value, bool relu) {
  return relu && value <= Value(0) ? Value(0) : value;  // a NaN stays a NaN, as in PyTorch
}

}  // namespace splitkern::kernels
