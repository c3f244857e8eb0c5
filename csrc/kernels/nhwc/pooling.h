// Where a thread of the pooling kernels of this folder works, and which windows and patches meet there. All of it in
// 32 bits: refusal() keeps calls out whose positions might not fit. Divisions by launch constants are multiplications.
#pragma once

#include <algorithm>

#include "../plain/geometry.h"
#include "fast_divisor.h"
#include "vectors.h"

namespace splitkern::kernels::nhwc {

// --- Windows --------------------------------------------------------------------------------------

inline constexpr int64_t kMaxPosition = 1 << 29;

struct Window {
  int32_t kernel;
  int32_t padding;
  FastDivisor stride;
  FastDivisor dilation;
};

inline Window window_of(const WindowAxis& axis) {
  return {static_cast<int32_t>(axis.kernel), static_cast<int32_t>(axis.padding), fast_divisor(axis.stride),
          fast_divisor(axis.dilation)};
}

// True where no position that a window touches leaves 30 bits.
inline bool positions_fit(const WindowAxis& axis, const AxisPatches& patches) {
  return axis.padding <= kMaxPosition && axis.padding >= -kMaxPosition && axis.kernel * axis.dilation <= kMaxPosition &&
         axis.stride * patches.out_bounds[patches.patches] <= kMaxPosition &&
         patches.in_bounds[patches.patches] <= kMaxPosition;
}

struct Range {
  int32_t first;
  int32_t last;  // behind the last one
};

struct WindowTaps {
  int32_t origin;
  int32_t first;
  int32_t last;
};

SPLITKERN_DEVICE int32_t window_origin(const Window& window, int32_t output) {
  return output * static_cast<int32_t>(window.stride.divisor) - window.padding;
}

// The taps t in [first, last) of one output whose positions origin + t * dilation lie in [in_begin, in_end).
SPLITKERN_DEVICE WindowTaps taps_inside(const Window& window, int32_t output, int32_t in_begin, int32_t in_end) {
  WindowTaps taps;
  taps.origin = window_origin(window, output);
  const int32_t to_begin = in_begin - taps.origin;
  const int32_t to_last = in_end - 1 - taps.origin;
  const int32_t dilation = static_cast<int32_t>(window.dilation.divisor);
  taps.first = to_begin <= 0 ? 0 : divide_down(to_begin + dilation - 1, window.dilation);
  taps.last = to_last < 0 ? 0 : divide_down(to_last, window.dilation) + 1;
  if (taps.last > window.kernel) taps.last = window.kernel;
  return taps;
}

// The outputs of a patch whose windows reach over `position`; with a dilation not all of them have a tap on it.
SPLITKERN_DEVICE Range outputs_over(const Window& window, int32_t position, int32_t out_begin, int32_t out_end) {
  const int32_t shifted = position + window.padding;
  const int32_t reach = (window.kernel - 1) * static_cast<int32_t>(window.dilation.divisor);
  Range outputs;
  outputs.first = divide_down(shifted - reach + static_cast<int32_t>(window.stride.divisor) - 1, window.stride);
  outputs.last = divide_down(shifted, window.stride) + 1;
  if (outputs.first < out_begin) outputs.first = out_begin;
  if (outputs.last > out_end) outputs.last = out_end;
  return outputs;
}

// The tap with which `output`, one of outputs_over, reads `position`, or -1.
SPLITKERN_DEVICE int32_t tap_on(const Window& window, int32_t position, int32_t output) {
  const int32_t distance = position - window_origin(window, output);
  if (window.dilation.divisor == 1) return distance;
  const int32_t tap = divide_down(distance, window.dilation);
  return tap * static_cast<int32_t>(window.dilation.divisor) == distance ? tap : -1;
}

SPLITKERN_DEVICE Range patch_inputs(const AxisPatches& axis, int32_t output) {
  const int32_t patch = find_patch(axis.out_bounds, axis.patches, output);
  return {axis.in_bounds[patch], axis.in_bounds[patch + 1]};
}
SPLITKERN_DEVICE Range patch_outputs(const AxisPatches& axis, int32_t position) {
  const int32_t patch = find_patch(axis.in_bounds, axis.patches, position);
  return {axis.out_bounds[patch], axis.out_bounds[patch + 1]};
}

// --- Threads --------------------------------------------------------------------------------------

// A block takes kTileLanes neighbouring (column, vector) pairs of kTileRows rows of one image: whole lines of memory,
// and overlapping windows of neighbouring rows and columns meet in the block's first-level cache.
inline constexpr uint32_t kTileLanes = 64;
inline constexpr uint32_t kTileRows = 4;
inline constexpr uint32_t kTileThreads = kTileLanes * kTileRows;

// The items of a launch: rows x columns of outputs, inputs or cells of inputs, each `vectors` vectors deep.
struct Tiles {
  int32_t row_begin;
  int32_t column_begin;
  uint32_t rows;
  uint32_t lanes;
  FastDivisor vectors;  // of one part
  FastDivisor lane_tiles;
  FastDivisor row_tiles;
  int32_t parts;
  int32_t part_channels;
};

// A thread that takes the same pixels of two parts of the channels works out once where they lie. Parts stay at least
// 64 bytes long, and calls too small to fill a device keep all their threads.
inline int32_t parts_of(int64_t items, int64_t vectors, int64_t bytes) {
  constexpr int64_t kManyItems = 1 << 19;
  return items >= kManyItems && vectors % 2 == 0 && vectors / 2 * bytes >= 64 ? 2 : 1;
}

inline int64_t tiles_across(int64_t items, int64_t tile) {
  return (items + tile - 1) / tile;
}

// `bytes`: of one vector, `elements` in it.
inline Tiles tiles_of(Range rows, Range columns, int32_t batch, int32_t channels, int64_t bytes, int64_t elements) {
  const int64_t height = rows.last - rows.first;
  const int64_t width = columns.last - columns.first;
  const int64_t vectors = channels / elements;
  const int32_t parts = parts_of(batch * height * width * vectors, vectors, bytes);
  const int64_t lanes = width * (vectors / parts);
  return {rows.first,
          columns.first,
          static_cast<uint32_t>(height),
          static_cast<uint32_t>(lanes),
          fast_divisor(vectors / parts),
          fast_divisor(tiles_across(lanes, kTileLanes)),
          fast_divisor(tiles_across(height, kTileRows)),
          parts,
          channels / parts};
}

// True where every index of a launch over so many items fits: lanes of a row and blocks stay below 2^31.
inline bool tiles_fit(int64_t batch, int64_t rows, int64_t columns, int64_t vectors) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (vectors >= kLimit / std::max<int64_t>(columns, 1) || batch >= kLimit) return false;
  const int64_t row_blocks = tiles_across(columns * vectors, kTileLanes) * tiles_across(rows, kTileRows);
  return row_blocks < kLimit && row_blocks * batch < kLimit;
}

inline Dim3 tile_grid(const Tiles& tiles, int32_t batch) {
  return Dim3{tiles.lane_tiles.divisor * tiles.row_tiles.divisor * static_cast<unsigned>(batch), 1u, 1u};
}
inline Dim3 tile_block() {
  return Dim3{kTileThreads, 1u, 1u};
}

struct Item {
  int64_t batch;
  int32_t row;
  int32_t column;
  uint32_t vector;
  bool exists;
};

SPLITKERN_DEVICE Item item_of(const Tiles& tiles) {
  const uint32_t block = block_index().x;
  const uint32_t row_block = divide(block, tiles.lane_tiles);
  const uint32_t image = divide(row_block, tiles.row_tiles);
  const uint32_t lane = (block - row_block * tiles.lane_tiles.divisor) * kTileLanes + thread_index() % kTileLanes;
  const uint32_t row = (row_block - image * tiles.row_tiles.divisor) * kTileRows + thread_index() / kTileLanes;
  const uint32_t column = divide(lane, tiles.vectors);
  Item item;
  item.batch = image;
  item.row = tiles.row_begin + static_cast<int32_t>(row);
  item.column = tiles.column_begin + static_cast<int32_t>(column);
  item.vector = lane - column * tiles.vectors.divisor;
  item.exists = lane < tiles.lanes && row < tiles.rows;
  return item;
}

// Of a channel at a row and column.
SPLITKERN_DEVICE int64_t pixel_offset(const Strides4& strides, int64_t batch, int32_t row, int32_t column,
                                      uint32_t channel) {
  return batch * strides.batch + row * strides.row + column * strides.column + channel;
}

// --- What the parameter structs of pooling share --------------------------------------------------

template <class Params>
std::string window_refusal(const Params& params) {
  if (positions_fit(params.row_window, params.grid.rows) && positions_fit(params.column_window, params.grid.columns)) {
    return "";
  }
  return "a window reaches over 2^29 positions from the origin";
}

// Columns as outputs or as inputs, whichever the call writes; cells of inputs are fewer.
template <class Params>
std::string extent_refusal(const Params& params, const Region& region) {
  if (tiles_fit(params.batch, region.rows, region.columns, params.channels)) return "";
  return "the launch would need more than 2^31 indices";
}

// The struct of these kernels: that of the launcher, and what is worked out once per launch.
template <class NhwcParams, class Params>
NhwcParams with_windows(const Params& params) {
  NhwcParams result{};
  static_cast<Params&>(result) = params;
  result.rows_of_window = window_of(params.row_window);
  result.columns_of_window = window_of(params.column_window);
  return result;
}

inline Range output_rows(const PatchGrid& grid) {
  return {grid.rows.out_bounds[0], grid.rows.out_bounds[grid.rows.patches]};
}
inline Range output_columns(const PatchGrid& grid) {
  return {grid.columns.out_bounds[0], grid.columns.out_bounds[grid.columns.patches]};
}
inline Range input_rows(const PatchGrid& grid) {
  return {grid.rows.in_bounds[0], grid.rows.in_bounds[grid.rows.patches]};
}
inline Range input_columns(const PatchGrid& grid) {
  return {grid.columns.in_bounds[0], grid.columns.in_bounds[grid.columns.patches]};
}

// --- Cells of inputs ------------------------------------------------------------------------------

// The gradients of a K x K window at stride S (no dilation) compute S x S neighbouring inputs in one thread: cell r
// of an axis holds the positions S * r - padding + j, j < S, and output r - q reads j with tap S * q + j.
inline int64_t floor_divide(int64_t numerator, int64_t divisor) {
  const int64_t quotient = numerator / divisor;
  return quotient * divisor > numerator ? quotient - 1 : quotient;
}

// The cells that hold the positions of a launch.
inline Range cells_of(const WindowAxis& window, Range positions) {
  return {static_cast<int32_t>(floor_divide(positions.first + window.padding, window.stride)),
          static_cast<int32_t>(floor_divide(positions.last - 1 + window.padding, window.stride) + 1)};
}

template <int kKernel, int kStride>
struct CellAxis {
  static constexpr int kOutputs = (kKernel + kStride - 1) / kStride;
  int32_t position;               // of j = 0
  int32_t output[kOutputs];       // r - q, or where the launch has none the next output that it has
  bool inside[kStride];           // position + j belongs to the launch
  bool reads[kStride][kOutputs];  // output r - q has a tap on position + j and is of the same patch
};

template <int kKernel, int kStride>
SPLITKERN_DEVICE CellAxis<kKernel, kStride> cell_axis(const AxisPatches& axis, int32_t padding, int32_t cell) {
  CellAxis<kKernel, kStride> result;
  result.position = cell * kStride - padding;
  const int32_t begin = axis.in_bounds[0];
  const int32_t end = axis.in_bounds[axis.patches];
#pragma unroll
  for (int q = 0; q < result.kOutputs; ++q) {
    const int32_t last = axis.out_bounds[axis.patches] - 1;
    const int32_t output = cell - q < last ? cell - q : last;
    result.output[q] = output > axis.out_bounds[0] ? output : axis.out_bounds[0];
  }
  int32_t patch = find_patch(axis.in_bounds, axis.patches, result.position < begin ? begin : result.position);
#pragma unroll
  for (int j = 0; j < kStride; ++j) {
    const int32_t position = result.position + j;
    result.inside[j] = position >= begin && position < end;
    // No patch is empty, so the next position lies in this patch or in the next.
    if (j > 0 && result.inside[j] && position >= axis.in_bounds[patch + 1]) ++patch;
    const int32_t first = axis.out_bounds[patch];
    const int32_t last = axis.out_bounds[patch + 1];
#pragma unroll
    for (int q = 0; q < result.kOutputs; ++q) {
      const int32_t output = cell - q;
      result.reads[j][q] = result.inside[j] && output >= first && output < last && kStride * q + j < kKernel;
    }
  }
  return result;
}

// Where the outputs of a cell lie in one tensor, in bytes from its beginning: of the outputs q = 0, and from there to
// the others. Worked out once per thread, so that an access adds little.
template <int kOutputs>
struct OutputOffsets {
  int64_t first;
  int64_t to_row[kOutputs];
  int64_t to_column[kOutputs];

  SPLITKERN_DEVICE int64_t of(int row, int column) const {
    return first + (row == 0 ? 0 : to_row[row]) + (column == 0 ? 0 : to_column[column]);
  }
};

template <class T, int kKernel, int kStride, int kOutputs = CellAxis<kKernel, kStride>::kOutputs>
SPLITKERN_DEVICE OutputOffsets<kOutputs> output_offsets(const Strides4& strides, int64_t batch,
                                                        const CellAxis<kKernel, kStride>& y,
                                                        const CellAxis<kKernel, kStride>& x, uint32_t channel) {
  OutputOffsets<kOutputs> offsets;
  offsets.first = sizeof(T) * pixel_offset(strides, batch, y.output[0], x.output[0], channel);
#pragma unroll
  for (int q = 0; q < kOutputs; ++q) {
    offsets.to_row[q] = static_cast<int64_t>(sizeof(T)) * strides.row * (y.output[q] - y.output[0]);
    offsets.to_column[q] = static_cast<int64_t>(sizeof(T)) * strides.column * (x.output[q] - x.output[0]);
  }
  return offsets;
}

// How many outputs have a tap on position j of a cell, at most.
template <int kKernel, int kStride>
SPLITKERN_HOST_DEVICE constexpr int outputs_on(int j) {
  return (kKernel - j + kStride - 1) / kStride;
}

// True where a window is square, of this size and not dilated.
template <class Params>
bool has_window(const Params& params, int64_t kernel) {
  const auto matches = [&](const WindowAxis& axis) { return axis.kernel == kernel && axis.dilation == 1; };
  return matches(params.row_window) && matches(params.column_window);
}
template <class Params>
bool has_window(const Params& params, int64_t kernel, int64_t stride) {
  return has_window(params, kernel) && params.row_window.stride == stride && params.column_window.stride == stride;
}

}  // namespace splitkern::kernels::nhwc
