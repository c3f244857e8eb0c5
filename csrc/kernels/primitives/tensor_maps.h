// What a tensor map is made of, plain data on the device's host side and in host execution alike. Included by
// primitives.h's implementations alone.
#pragma once

#include "../params.h"

namespace splitkern::kernels {

enum class Swizzle : int32_t { kNone, k32Bytes, k64Bytes, k128Bytes };

// An NHWC view walked pixel by pixel in im2col order: W, H, then N inside the bounding box, whose lower corner
// is `lower` and whose upper corner is extent - 1 + `upper`; pixels outside the view read as zero. All extents
// in elements or pixels, strides in bytes.
struct Im2colMap {
  ElementType type;
  const void* base;
  int32_t channels, columns, rows, images;
  int64_t column_stride_bytes, row_stride_bytes, image_stride_bytes;
  int32_t lower_column, lower_row;
  int32_t upper_column, upper_row;
  int32_t column_step, row_step;  // between neighbouring base pixels: the convolution's stride
  int32_t box_channels, box_pixels;
  Swizzle swizzle;
  // 0: none. Else every image is made of that many equal patches, which are walked one after the other: columns, rows,
  // patches, images. Corners then lie in [-16, 15] and offsets below 32.
  int32_t patches;
  int64_t patch_stride_bytes;
};

// A plain box; the innermost dimension is contiguous. Positions outside read as zero and are not written.
struct TiledMap {
  ElementType type;
  const void* base;
  int32_t rank;
  int32_t extents[5];
  int64_t strides_bytes[4];  // of dimensions 1 .. rank - 1
  int32_t box[5];
  Swizzle swizzle;
};

}  // namespace splitkern::kernels
