// The arguments of the Hopper path's tensor maps as plain numbers, for the test that holds them against the geometry
// (tests/host_execution/test_sm90_maps.py).
#include "kernels/sm90/geometry.h"

namespace {

using namespace splitkern::kernels;

constexpr int32_t kImages = 2;
constexpr int32_t kChannels = 8;

AxisPatches one_patch(const int32_t* bounds) {  // in begin, in end, out begin, out end
  AxisPatches patches{};
  patches.patches = 1;
  patches.in_bounds[0] = bounds[0];
  patches.in_bounds[1] = bounds[1];
  patches.out_bounds[0] = bounds[2];
  patches.out_bounds[1] = bounds[3];
  return patches;
}

int64_t* put(const Im2colMap& map, const unsigned char* base, int64_t* to) {
  for (const int64_t value :
       {static_cast<int64_t>(static_cast<const unsigned char*>(map.base) - base), int64_t{map.channels},
        int64_t{map.columns}, int64_t{map.rows}, int64_t{map.images}, map.column_stride_bytes, map.row_stride_bytes,
        map.image_stride_bytes, int64_t{map.lower_column}, int64_t{map.lower_row}, int64_t{map.upper_column},
        int64_t{map.upper_row}, int64_t{map.column_step}, int64_t{map.row_step}, int64_t{map.box_channels},
        int64_t{map.box_pixels}}) {
    *to++ = value;
  }
  return to;
}

}  // namespace

// One patch of 2 images and 8 channels. Window: kernel, stride, padding, dilation per axis, rows first; bounds: in and
// out begin and end per axis; strides: batch, row, column of the operand, then of the output, in elements. Writes per
// sub-problem the operand's map, the output's map, and taps, first tap, tap step, offset step of rows and columns: 40
// numbers. Returns the number of sub-problems.
extern "C" __attribute__((visibility("default"))) int32_t splitkern_host_sm90_maps(
    int32_t input_grad, const int64_t* window, const int32_t* bounds, const int64_t* strides, int64_t* result) {
  static const unsigned char base[16] = {};
  const WindowAxis row_window{window[0], window[1], window[2], window[3]};
  const WindowAxis column_window{window[4], window[5], window[6], window[7]};
  const AxisPatches rows = one_patch(bounds);
  const AxisPatches columns = one_patch(bounds + 4);
  const Strides4 operand_strides{strides[0], 1, strides[1], strides[2]};
  const Strides4 output_strides{strides[3], 1, strides[4], strides[5]};
  const int32_t row_classes = input_grad != 0 ? sm90::input_grad_classes(row_window, rows, 0) : 1;
  const int32_t column_classes = input_grad != 0 ? sm90::input_grad_classes(column_window, columns, 0) : 1;
  for (int32_t i = 0; i < row_classes; ++i) {
    for (int32_t j = 0; j < column_classes; ++j) {
      const sm90::AxisWalk down =
          input_grad != 0 ? sm90::input_grad_axis(row_window, rows, 0, i) : sm90::forward_axis(row_window, rows, 0);
      const sm90::AxisWalk across = input_grad != 0 ? sm90::input_grad_axis(column_window, columns, 0, j)
                                                    : sm90::forward_axis(column_window, columns, 0);
      result =
          put(sm90::operand_map(ElementType::kBFloat16, base, operand_strides, kChannels, kImages, down, across, 64),
              base, result);
      result = put(sm90::output_map(ElementType::kBFloat16, base, output_strides, kChannels, kImages, down, across, 64),
                   base, result);
      for (const sm90::AxisWalk& walk : {down, across}) {
        for (const int64_t value : {walk.taps, walk.first_tap, walk.tap_step, walk.offset_step}) *result++ = value;
      }
    }
  }
  return row_classes * column_classes;
}
