// Host arithmetic of the Hopper path: patches as sub-problems of one GEMM-like kernel, and the tensor maps that
// let the TMA unit gather their windows. Pure integers; the launchers of this folder and their tests call it.
//
// A sub-problem is a rectangle of outputs (a patch, or one stride class of a patch's input gradient) whose tap
// number i reads, for output j of an axis, position lower + j * step + i * offset_step of the operand's patch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "../params.h"
#include "../primitives.h"

namespace splitkern::kernels::sm90 {

// One axis of a sub-problem.
struct AxisWalk {
  int64_t operand_begin;   // where the operand's patch begins in its tensor
  int64_t operand_extent;  // of the patch
  int64_t output_begin;    // output j is at output_begin + j * output_step
  int64_t output_step;
  int64_t outputs;
  int64_t lower;
  int64_t step;
  int64_t taps;  // 0: nothing is read, the outputs are zero
  int64_t first_tap;
  int64_t tap_step;
  int64_t offset_step;
};

inline AxisWalk forward_axis(const WindowAxis& window, const AxisPatches& patches, int32_t patch) {
  AxisWalk walk{};
  walk.operand_begin = patches.in_bounds[patch];
  walk.operand_extent = patches.in_bounds[patch + 1] - patches.in_bounds[patch];
  walk.output_begin = patches.out_bounds[patch];
  walk.output_step = 1;
  walk.outputs = patches.out_bounds[patch + 1] - patches.out_bounds[patch];
  walk.lower = walk.output_begin * window.stride - window.padding - walk.operand_begin;
  walk.step = window.stride;
  walk.taps = window.kernel;
  walk.tap_step = 1;
  walk.offset_step = window.dilation;
  return walk;
}

inline int32_t input_grad_classes(const WindowAxis& window, const AxisPatches& patches, int32_t patch) {
  return static_cast<int32_t>(
      std::min<int64_t>(window.stride, patches.in_bounds[patch + 1] - patches.in_bounds[patch]));
}

// Inputs begin + stride_class + j * stride of a patch. Input x is read through tap r by output (x + padding -
// r * dilation) / stride where that is whole, so the taps of a class are stride / gcd apart, and one tap further
// the output is dilation / gcd less: the walk goes from the last tap to the first, so that its offsets grow.
inline AxisWalk input_grad_axis(const WindowAxis& window, const AxisPatches& patches, int32_t patch,
                                int32_t stride_class) {
  AxisWalk walk{};
  walk.operand_begin = patches.out_bounds[patch];
  walk.operand_extent = patches.out_bounds[patch + 1] - patches.out_bounds[patch];
  walk.output_begin = patches.in_bounds[patch] + stride_class;
  walk.output_step = window.stride;
  walk.outputs = (patches.in_bounds[patch + 1] - walk.output_begin + window.stride - 1) / window.stride;
  walk.step = 1;
  const int64_t common = std::gcd(window.stride, window.dilation);
  const int64_t reached = walk.output_begin + window.padding;
  const int64_t tap_distance = window.stride / common;
  for (int64_t tap = 0; tap < std::min(tap_distance, window.kernel); ++tap) {
    if ((reached - tap * window.dilation) % window.stride != 0) continue;
    walk.taps = (window.kernel - 1 - tap) / tap_distance + 1;
    walk.first_tap = tap + (walk.taps - 1) * tap_distance;
    walk.tap_step = -tap_distance;
    walk.offset_step = window.dilation / common;
    walk.lower = (reached - walk.first_tap * window.dilation) / window.stride - walk.operand_begin;
    return walk;
  }
  return walk;
}

// The bounding box's upper corner: counted from the operand's last position, and such that exactly the outputs
// are walked.
inline int64_t upper_corner(const AxisWalk& walk) {
  return walk.lower + (walk.outputs - 1) * walk.step - (walk.operand_extent - 1);
}

// Why the TMA unit cannot walk this axis, or an empty string.
inline std::string walk_refusal(const AxisWalk& walk, const char* axis) {
  if (walk.taps == 0) return {};
  const int64_t upper = upper_corner(walk);
  if (walk.lower < -128 || walk.lower > 127 || upper < -128 || upper > 127) {
    return std::string("a patch's windows begin ") + std::to_string(walk.lower) + " and end " + std::to_string(upper) +
           " " + axis + " from its inputs' ends, and TMA reaches from -128 to 127";
  }
  if ((walk.taps - 1) * walk.offset_step > 255) {
    return std::string("the last tap lies ") + std::to_string((walk.taps - 1) * walk.offset_step) + " " + axis +
           " from the first, and TMA reaches 255";
  }
  if (walk.step > 8) {
    return std::string("the stride is ") + std::to_string(walk.step) + " " + axis + ", and TMA steps by 8 at most";
  }
  return {};
}

// --- Tensors as the TMA unit sees them ------------------------------------------------------------------

inline constexpr int64_t kElementBytes = 2;

// Why a tensor up to these positions (a run of patches may begin further in) and of these element strides (channels
// contiguous) has no tensor map, or empty. Strides of extents of 1 are free.
inline std::string tensor_refusal(const char* name, const void* base, int64_t channels, int64_t columns, int64_t rows,
                                  int64_t images, const Strides4& strides) {
  const std::string prefix = std::string("the ") + name;
  if (channels == 0 || columns == 0 || rows == 0 || images == 0) return prefix + " is empty";
  if (channels % 8 != 0) return prefix + "'s " + std::to_string(channels) + " channels are not a multiple of 8";
  if (channels > 1 && strides.channel != 1) {
    return prefix + "'s channel stride is " + std::to_string(strides.channel) + ", not 1";
  }
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return prefix + " is not aligned to 16 bytes";
  int64_t least = channels;
  const int64_t extents[] = {columns, rows, images};
  const int64_t steps[] = {strides.column, strides.row, strides.batch};
  const char* names[] = {"column", "row", "batch"};
  for (int i = 0; i < 3; ++i) {
    if (extents[i] <= 1) continue;
    if (steps[i] % 8 != 0 || steps[i] < least || steps[i] >= (int64_t{1} << 36)) {
      return prefix + "'s " + names[i] + " stride is " + std::to_string(steps[i]) +
             ", which is no multiple of 8 elements of at least " + std::to_string(least) + " and below 2^36";
    }
    least = steps[i];
  }
  return {};
}

// Strides in bytes, those of extents of 1 replaced by ones that every driver accepts.
inline void set_strides(Im2colMap& map, const Strides4& strides, int64_t row_step, int64_t column_step) {
  map.column_stride_bytes = map.columns > 1 ? strides.column * column_step * kElementBytes
                                            : std::max<int64_t>(map.channels, 8) * kElementBytes;
  map.row_stride_bytes = map.rows > 1 ? strides.row * row_step * kElementBytes : map.column_stride_bytes * map.columns;
  map.image_stride_bytes = map.images > 1 ? strides.batch * kElementBytes : map.row_stride_bytes * map.rows;
}

// The operand of a sub-problem, to be loaded in boxes of 64 channels.
inline Im2colMap operand_map(ElementType type, const void* base, const Strides4& strides, int32_t channels,
                             int32_t images, const AxisWalk& rows, const AxisWalk& columns, int32_t box_pixels) {
  Im2colMap map{};
  map.type = type;
  map.base = static_cast<const unsigned char*>(base) +
             (rows.operand_begin * strides.row + columns.operand_begin * strides.column) * kElementBytes;
  map.channels = channels;
  map.columns = static_cast<int32_t>(columns.operand_extent);
  map.rows = static_cast<int32_t>(rows.operand_extent);
  map.images = images;
  set_strides(map, strides, 1, 1);
  if (rows.taps > 0 && columns.taps > 0) {
    map.lower_row = static_cast<int32_t>(rows.lower);
    map.lower_column = static_cast<int32_t>(columns.lower);
    map.upper_row = static_cast<int32_t>(upper_corner(rows));
    map.upper_column = static_cast<int32_t>(upper_corner(columns));
    map.row_step = static_cast<int32_t>(rows.step);
    map.column_step = static_cast<int32_t>(columns.step);
  } else {  // never loaded
    map.row_step = 1;
    map.column_step = 1;
  }
  map.box_channels = 64;
  map.box_pixels = box_pixels;
  map.swizzle = Swizzle::k128Bytes;
  return map;
}

// The outputs of a sub-problem, every one of them in im2col order.
inline Im2colMap output_map(ElementType type, const void* base, const Strides4& strides, int32_t channels,
                            int32_t images, const AxisWalk& rows, const AxisWalk& columns, int32_t box_pixels) {
  Im2colMap map{};
  map.type = type;
  map.base = static_cast<const unsigned char*>(base) +
             (rows.output_begin * strides.row + columns.output_begin * strides.column) * kElementBytes;
  map.channels = channels;
  map.columns = static_cast<int32_t>(columns.outputs);
  map.rows = static_cast<int32_t>(rows.outputs);
  map.images = images;
  set_strides(map, strides, rows.output_step, columns.output_step);
  map.row_step = 1;
  map.column_step = 1;
  map.box_channels = 64;
  map.box_pixels = box_pixels;
  map.swizzle = Swizzle::k128Bytes;
  return map;
}

// Of the element of channel 0 and image 0 there.
inline const void* address_of(const void* base, const Strides4& strides, int64_t row, int64_t column) {
  return static_cast<const unsigned char*>(base) + (row * strides.row + column * strides.column) * kElementBytes;
}

// A patch of an NHWC tensor from `base` on, to be moved in boxes of 64 channels, rows and columns.
inline TiledMap box_map(ElementType type, const void* base, const Strides4& strides, int32_t channels, int32_t images,
                        int64_t rows, int64_t columns, int32_t box_rows, int32_t box_columns) {
  Im2colMap extents{};
  extents.channels = channels;
  extents.columns = static_cast<int32_t>(columns);
  extents.rows = static_cast<int32_t>(rows);
  extents.images = images;
  set_strides(extents, strides, 1, 1);
  TiledMap map{};
  map.type = type;
  map.base = base;
  map.rank = 4;
  map.extents[0] = channels;
  map.extents[1] = extents.columns;
  map.extents[2] = extents.rows;
  map.extents[3] = images;
  map.strides_bytes[0] = extents.column_stride_bytes;
  map.strides_bytes[1] = extents.row_stride_bytes;
  map.strides_bytes[2] = extents.image_stride_bytes;
  map.box[0] = 64;
  map.box[1] = box_columns;
  map.box[2] = box_rows;
  map.box[3] = 1;
  map.swizzle = Swizzle::k128Bytes;
  return map;
}

// Turns a map into one of `patches` equal patches per image; steps in elements.
inline void set_patches(Im2colMap& map, int32_t patches, int64_t patch_step, int64_t image_step) {
  map.patches = patches;
  map.patch_stride_bytes = patch_step * kElementBytes;
  if (map.images > 1) {
    map.image_stride_bytes = image_step * kElementBytes;
  } else {
    map.image_stride_bytes = std::max(map.patch_stride_bytes * patches, map.row_stride_bytes * map.rows);
  }
}

// --- Weights --------------------------------------------------------------------------------------------

// Whether the weights lie as [output channel][tap][input channel] with strides that a tensor map takes.
struct WeightLayout {
  bool in_place;
  int64_t tap_stride;  // in elements
  int64_t out_channel_stride;
};

inline WeightLayout weight_layout(const void* base, const Strides4& strides, int64_t out_channels, int64_t in_channels,
                                  int64_t kernel_rows, int64_t kernel_columns) {
  const int64_t tap_stride = kernel_columns > 1 ? strides.column : kernel_rows > 1 ? strides.row : in_channels;
  const bool rows_follow = kernel_rows <= 1 || kernel_columns <= 1 || strides.row == kernel_columns * strides.column;
  const int64_t taps = kernel_rows * kernel_columns;
  const int64_t out_channel_stride = out_channels > 1 ? strides.batch : taps * tap_stride;
  const bool in_place = reinterpret_cast<uintptr_t>(base) % 16 == 0 && (in_channels == 1 || strides.channel == 1) &&
                        rows_follow && tap_stride % 8 == 0 && tap_stride >= in_channels &&
                        out_channel_stride % 8 == 0 && out_channel_stride >= taps * tap_stride;
  if (in_place) return {true, tap_stride, out_channel_stride};
  return {false, in_channels, taps * in_channels};
}

inline int64_t weight_workspace_bytes(const WeightLayout& layout, int64_t out_channels, int64_t in_channels,
                                      int64_t taps) {
  return layout.in_place ? 0 : out_channels * taps * in_channels * kElementBytes;
}

inline int64_t ceil_divide(int64_t numerator, int64_t divisor) {
  return (numerator + divisor - 1) / divisor;
}

}  // namespace splitkern::kernels::sm90
