// What the first layer's kernels share: the cut of every patch into tiles of outputs, and the staging of the
// inputs that a tile reads in shared memory, one pixel of four channels after another, with zeros for
// everything outside the patch. Included by forward.cu and weight_grad.cu.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "../params.h"
#include "../plain/geometry.h"
#include "../primitives.h"
#include "../vector_access.h"

namespace splitkern::kernels::first_layer {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
static_assert(kThreads <= 256, "pitch_reciprocal");
inline constexpr int kTilePixels = 256;     // outputs of one tile
inline constexpr int kPixelsPerThread = 6;  // inputs of one tile that a thread carries from global to shared memory
inline constexpr int kMaxInputPixels = kThreads * kPixelsPerThread;
inline constexpr int kMaxInChannels = 4;  // a pixel in shared memory holds four, zeros where there are fewer
inline constexpr int kOutChannels = 64;   // of one block
inline constexpr int kMaxTaps = 128;

// The tiles of one launch. An input row of a tile is `pitch` pixels long, an even number.
struct Tiles {
  int32_t rows;
  int32_t columns;
  int32_t in_rows;
  int32_t in_columns;
  int32_t pitch;
  int32_t pitch_reciprocal;  // of 65536, rounded up: exact for the threads of a block
  int32_t step_rows;         // from a thread's staged pixel to its next, kThreads further
  int32_t step_columns;
  int64_t step;       // the same in elements of the input
  int64_t next_row;   // in elements, from the end of a staged row to the begin of the next
  int32_t row_tiles;  // over all patches
  int32_t column_tiles;
  int32_t count;                                   // over all images
  int32_t first_row_tile[kMaxPatchesPerAxis + 1];  // of each patch
  int32_t first_column_tile[kMaxPatchesPerAxis + 1];
};

// --- On the host ------------------------------------------------------------------------------------------

inline int64_t window_span(const WindowAxis& window, int64_t outputs) {
  return (outputs - 1) * window.stride + (window.kernel - 1) * window.dilation + 1;
}

inline int32_t widest_patch(const AxisPatches& axis) {
  int32_t widest = 0;
  for (int32_t i = 0; i < axis.patches; ++i) widest = std::max(widest, axis.out_bounds[i + 1] - axis.out_bounds[i]);
  return widest;
}

// Of all patches of the axis; also the first tile of each where `first_tile` is given.
inline int64_t count_tiles(const AxisPatches& axis, int32_t extent, int32_t* first_tile = nullptr) {
  int64_t count = 0;
  for (int32_t i = 0; i < axis.patches; ++i) {
    if (first_tile != nullptr) first_tile[i] = static_cast<int32_t>(count);
    count += (axis.out_bounds[i + 1] - axis.out_bounds[i] + extent - 1) / extent;
  }
  if (first_tile != nullptr) first_tile[axis.patches] = static_cast<int32_t>(count);
  return count;
}

// The tile of at most tile_pixels outputs with the fewest tiles in the launch, then the fewest inputs. Returns empty,
// or why there is none.
inline std::string cut_tiles(const WindowAxis& row_window, const WindowAxis& column_window, const PatchGrid& grid,
                             const Strides4& input_strides, int32_t batch, int32_t tile_pixels, Tiles& tiles) {
  const int32_t widest = widest_patch(grid.columns);
  const int32_t highest = widest_patch(grid.rows);
  int64_t best_tiles = 0;
  int64_t best_inputs = 0;
  // The widths that cut the widest patch into 1, 2, 3 ... columns of tiles, each once.
  for (int32_t columns = std::min(widest, tile_pixels); columns > 0;) {
    const int64_t in_columns = window_span(column_window, columns);
    const int64_t pitch = in_columns + in_columns % 2;
    int32_t rows = std::min(highest, tile_pixels / columns);
    if (pitch <= kMaxInputPixels) {
      while (rows > 0 && window_span(row_window, rows) * pitch > kMaxInputPixels) --rows;
      if (rows > 0) {
        const int32_t in_rows = static_cast<int32_t>(window_span(row_window, rows));
        const int64_t inputs = in_rows * pitch;
        const int64_t count = count_tiles(grid.rows, rows) * count_tiles(grid.columns, columns);
        if (best_tiles == 0 || count < best_tiles || (count == best_tiles && inputs < best_inputs)) {
          best_tiles = count;
          best_inputs = inputs;
          tiles.rows = rows;
          tiles.columns = columns;
          tiles.in_rows = in_rows;
          tiles.in_columns = static_cast<int32_t>(in_columns);
          tiles.pitch = static_cast<int32_t>(pitch);
        }
      }
    }
    const int32_t parts = (widest + columns - 1) / columns;
    columns = std::min((widest + parts) / (parts + 1), columns - 1);
  }
  if (best_tiles == 0) return "a window spans more inputs than are staged at once";
  if (best_tiles * batch > std::numeric_limits<int32_t>::max()) return "there are more than 2^31 tiles of outputs";
  tiles.pitch_reciprocal = (65536 + tiles.pitch - 1) / tiles.pitch;
  tiles.step_rows = kThreads / tiles.pitch;
  tiles.step_columns = kThreads % tiles.pitch;
  tiles.step = tiles.step_rows * input_strides.row + tiles.step_columns * input_strides.column;
  tiles.next_row = input_strides.row - tiles.pitch * input_strides.column;
  tiles.row_tiles = static_cast<int32_t>(count_tiles(grid.rows, tiles.rows, tiles.first_row_tile));
  tiles.column_tiles = static_cast<int32_t>(count_tiles(grid.columns, tiles.columns, tiles.first_column_tile));
  tiles.count = static_cast<int32_t>(best_tiles * batch);
  return {};
}

// What all passes refuse alike.
inline std::string common_refusal(ElementType type, bool allow_tf32, bool grouped, int32_t in_channels_per_group,
                                  const WindowAxis& row_window, const WindowAxis& column_window) {
  if (type == ElementType::kFloat64) return "the type is float64";
  if (type == ElementType::kFloat32 && !allow_tf32) return "float32 may not be rounded to tf32";
  if (grouped) return "the channels are in groups";
  if (in_channels_per_group > kMaxInChannels) {
    return "the input has " + std::to_string(in_channels_per_group) + " channels, more than " +
           std::to_string(kMaxInChannels);
  }
  if (row_window.kernel * column_window.kernel > kMaxTaps) {
    return "the window has " + std::to_string(row_window.kernel * column_window.kernel) + " positions, more than " +
           std::to_string(kMaxTaps);
  }
  return {};
}

// --- On the device ----------------------------------------------------------------------------------------

// One axis of a tile.
struct TileAxis {
  int32_t out_begin;
  int32_t out_count;
  int64_t in_begin;      // what the first output's window starts at
  int32_t inside_first;  // inputs in_begin + [inside_first, inside_last) belong to the patch
  int32_t inside_last;
};

struct Tile {
  int32_t image;
  TileAxis rows;
  TileAxis columns;
};

SPLITKERN_DEVICE int32_t clamp_to_extent(int64_t position, int32_t extent) {
  return position < 0 ? 0 : position > extent ? extent : static_cast<int32_t>(position);
}

SPLITKERN_DEVICE TileAxis tile_axis(const AxisPatches& axis, const WindowAxis& window,
                                    const int32_t (&first_tile)[kMaxPatchesPerAxis + 1], int32_t index, int32_t extent,
                                    int32_t in_extent) {
  const int32_t patch = find_patch(first_tile, axis.patches, index);
  TileAxis tile;
  tile.out_begin = axis.out_bounds[patch] + (index - first_tile[patch]) * extent;
  const int32_t left = axis.out_bounds[patch + 1] - tile.out_begin;
  tile.out_count = left < extent ? left : extent;
  tile.in_begin = tile.out_begin * window.stride - window.padding;
  tile.inside_first = clamp_to_extent(axis.in_bounds[patch] - tile.in_begin, in_extent);
  tile.inside_last = clamp_to_extent(axis.in_bounds[patch + 1] - tile.in_begin, in_extent);
  return tile;
}

// Tiles are numbered along columns, then rows, then images.
struct TileIndex {
  int32_t image;
  int32_t row;
  int32_t column;
};

SPLITKERN_DEVICE TileIndex tile_index(const Tiles& tiles, int32_t number) {
  const int32_t line = number / tiles.column_tiles;
  const int32_t image = line / tiles.row_tiles;
  return {image, line - image * tiles.row_tiles, number - line * tiles.column_tiles};
}

// The tile `step` numbers further, without a division.
SPLITKERN_DEVICE void advance(const Tiles& tiles, TileIndex& index, const TileIndex& step) {
  index.column += step.column;
  index.row += step.row;
  index.image += step.image;
  if (index.column >= tiles.column_tiles) {
    index.column -= tiles.column_tiles;
    ++index.row;
  }
  if (index.row >= tiles.row_tiles) {
    index.row -= tiles.row_tiles;
    ++index.image;
  }
}

template <class Params>
SPLITKERN_DEVICE Tile tile_at(const Params& params, const Tiles& tiles, const TileIndex& index) {
  Tile tile;
  tile.image = index.image;
  tile.rows =
      tile_axis(params.grid.rows, params.row_window, tiles.first_row_tile, index.row, tiles.rows, tiles.in_rows);
  tile.columns = tile_axis(params.grid.columns, params.column_window, tiles.first_column_tile, index.column,
                           tiles.columns, tiles.in_columns);
  return tile;
}

// Four channels of a pixel as the tensor cores read them.
template <class T>
struct PixelOf {
  using Type = Vector8;
};
template <>
struct PixelOf<float> {
  using Type = Vector16;
};
template <class T>
using Pixel = typename PixelOf<T>::Type;

template <class T>
SPLITKERN_DEVICE Pixel<T> zero_pixel() {
  if constexpr (sizeof(T) == 4) {
    return {{0, 0, 0, 0}};
  } else {
    return {{0, 0}};
  }
}

// Up to four elements `stride` apart, rounded to tf32 where they are fp32.
template <class T>
SPLITKERN_DEVICE Pixel<T> load_pixel(const T* from, int64_t stride, int32_t channels) {
  Pixel<T> pixel = zero_pixel<T>();
#pragma unroll
  for (int channel = 0; channel < kMaxInChannels; ++channel) {
    if (channel >= channels) continue;
    if constexpr (sizeof(T) == 4) {
      pixel.words[channel] = to_tf32(bits_float(load_global<uint32_t>(from + channel * stride)));
    } else {
      const uint32_t bits = load_global<uint16_t>(from + channel * stride);
      pixel.words[channel / 2] |= bits << (channel % 2 * 16);
    }
  }
  return pixel;
}

// The inputs of a tile on their way to shared memory: kSlots pixels a thread at a time, so that loads are under way
// while something else is computed. begin, then fetch and deliver in turns.
template <class T, int kSlots>
struct PixelStream {
  using Element = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  Element elements[kSlots][kMaxInChannels];
  bool inside[kSlots];
  const T* from;
  int32_t row;
  int32_t column;
  int32_t index;  // of the pixel that is delivered next
};

template <class T, int kSlots>
SPLITKERN_DEVICE void begin(PixelStream<T, kSlots>& stream, const void* input, const Strides4& strides,
                            const Tiles& tiles, const Tile& tile) {
  stream.index = static_cast<int32_t>(thread_index());
  stream.row = (stream.index * tiles.pitch_reciprocal) >> 16;
  stream.column = stream.index - stream.row * tiles.pitch;
  stream.from = static_cast<const T*>(input) + tile.image * strides.batch +
                (tile.rows.in_begin + stream.row) * strides.row +
                (tile.columns.in_begin + stream.column) * strides.column;
}

// Nothing may depend on what is loaded, not even a branch be around a load: all of them shall be under way together.
template <class T, int kSlots>
SPLITKERN_DEVICE void fetch(PixelStream<T, kSlots>& stream, const void* input, const Strides4& strides,
                            int32_t channels, const Tiles& tiles, const Tile& tile) {
  const int32_t pixels = tiles.in_rows * tiles.pitch;
  using Element = typename PixelStream<T, kSlots>::Element;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (i > 0 && i * kThreads >= pixels) continue;  // of all threads alike
    stream.inside[i] = stream.row >= tile.rows.inside_first && stream.row < tile.rows.inside_last &&
                       stream.column >= tile.columns.inside_first && stream.column < tile.columns.inside_last;
    const T* const from = stream.inside[i] ? stream.from : static_cast<const T*>(input);
#pragma unroll
    for (int channel = 0; channel < kMaxInChannels; ++channel) {
      const int32_t existing = channel < channels ? channel : 0;
      stream.elements[i][channel] = load_global<Element>(from + existing * strides.channel);
    }
    stream.row += tiles.step_rows;
    stream.column += tiles.step_columns;
    const bool wraps = stream.column >= tiles.pitch;
    stream.row += wraps ? 1 : 0;
    stream.column -= wraps ? tiles.pitch : 0;
    stream.from += tiles.step + (wraps ? tiles.next_row : 0);
  }
}

// Calls store(index in the tile, pixel), with zeros for what lies outside the patch and for channels that do not exist.
template <class T, int kSlots, class Store>
SPLITKERN_DEVICE void deliver(PixelStream<T, kSlots>& stream, int32_t channels, int32_t pixels, Store&& store) {
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (i > 0 && i * kThreads >= pixels) continue;
    Pixel<T> pixel = zero_pixel<T>();
#pragma unroll
    for (int channel = 0; channel < kMaxInChannels; ++channel) {
      if (!stream.inside[i] || channel >= channels) continue;
      if constexpr (sizeof(T) == 4) {
        pixel.words[channel] = to_tf32(bits_float(stream.elements[i][channel]));
      } else {
        pixel.words[channel / 2] |= static_cast<uint32_t>(stream.elements[i][channel]) << (channel % 2 * 16);
      }
    }
    if (stream.index < pixels) store(stream.index, pixel);
    stream.index += kThreads;
  }
}

}  // namespace splitkern::kernels::first_layer
