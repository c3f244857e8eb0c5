// What the direct kernels share: how a forward pass and an input gradient become one gathering operation, how work
// is dealt to threads, vector loads. Included by the files of this folder, which conv.cpp launches.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "../paths.h"
#include "../plain/geometry.h"
#include "../primitives.h"
#include "../vector_access.h"

namespace splitkern::kernels::depthwise {

inline constexpr int kThreads = 256;
inline constexpr int kRun = 4;   // neighbouring results of a row that a thread computes together
inline constexpr int kBand = 4;  // rows that a thread computes one after another: their inputs stay in the L1 cache

// One result per destination position, from the source positions that the taps reach. A forward pass gathers from
// the input into the output; an input gradient from grad_output into the gradient, with all roles exchanged.
// The grid's "in" bounds are the source's, its "out" bounds the destination's.
template <class Conv>
struct Gather {
  static constexpr const char* kOperator = Conv::kOperator;
  static constexpr bool kTransposed = std::is_same_v<Conv, ConvInputGradParams>;
  ElementType type;
  int32_t batch;
  int32_t groups;
  int32_t source_channels;       // of a group
  int32_t destination_channels;  // of a group
  bool relu;
  int32_t runs;     // of columns, over all patches
  int32_t bands;    // of rows, over all patches together
  int32_t lanes;    // threads of a block that share a place and differ in channels
  int32_t vectors;  // of destination channels in all, each one thread's
  int32_t first_run[kMaxPatchesPerAxis + 1];
  WindowAxis row_window;
  WindowAxis column_window;
  PatchGrid grid;
  Strides4 source_strides;
  Strides4 destination_strides;
  int64_t weight_destination_stride;  // between the weights of neighbouring destination channels
  int64_t weight_source_stride;
  int64_t weight_group_stride;
  int64_t weight_row_stride;
  int64_t weight_column_stride;
  int64_t bias_stride;
  const void* source;
  const void* weight;
  const void* bias;
  void* destination;
};

// The extents of a tensor whose rows and columns the grid's "in" or "out" bounds cut.
inline Extents extents_in(const PatchGrid& grid, int32_t batch, int32_t channels) {
  return {batch, channels, grid.rows.in_bounds[grid.rows.patches], grid.columns.in_bounds[grid.columns.patches]};
}
inline Extents extents_out(const PatchGrid& grid, int32_t batch, int32_t channels) {
  return {batch, channels, grid.rows.out_bounds[grid.rows.patches], grid.columns.out_bounds[grid.columns.patches]};
}

inline bool takes_vectors(const void* address, const Strides4& strides, const Extents& extents, int64_t elements,
                          uintptr_t bytes) {
  return vector_refusal("", address, strides, extents, elements, bytes).empty();
}

// --- On the device ----------------------------------------------------------------------------------------

template <class T>
inline constexpr int kVectorElements = 16 / static_cast<int>(sizeof(T));

template <class T>
SPLITKERN_DEVICE void widen(float (&values)[kVectorElements<T>], const Vector16& vector) {
#pragma unroll
  for (int i = 0; i < kVectorElements<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = bits_float(vector.words[i]);
    } else {
      values[i] = to_accumulator(from_bits<T>(static_cast<uint16_t>(vector.words[i / 2] >> (i % 2 * 16))));
    }
  }
}

template <class T>
SPLITKERN_DEVICE Vector16 narrow(const float (&values)[kVectorElements<T>]) {
  Vector16 vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      vector.words[i] = float_bits(values[i]);
    } else {
      vector.words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return vector;
}

// Four neighbouring elements, in one access where kVector; else `count` of them, `stride` apart, then zeros.
template <class T, bool kVector>
SPLITKERN_DEVICE void load4(float (&values)[4], const T* from, int64_t stride, int32_t count) {
  if constexpr (kVector && sizeof(T) == 4) {
    widen<T>(values, load_global<Vector16>(from));
  } else if constexpr (kVector) {
    const Vector8 vector = load_global<Vector8>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = to_accumulator(from_bits<T>(static_cast<uint16_t>(vector.words[i / 2] >> (i % 2 * 16))));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = i < count ? to_accumulator(from[i * stride]) : 0.0f;
  }
}

// The sources of one destination position and tap, before the patch's bounds are asked; kNowhere: none.
inline constexpr int64_t kNowhere = INT64_MIN;
template <bool kTransposed>
SPLITKERN_DEVICE int64_t source_of(const WindowAxis& window, int32_t position, int32_t tap) {
  if constexpr (kTransposed) {
    const int64_t shifted = position + window.padding - tap * window.dilation;
    if (window.stride == 1) return shifted;
    if (shifted < 0) return kNowhere;
    const int64_t source = divide(shifted, window.stride);
    return source * window.stride == shifted ? source : kNowhere;
  } else {
    return position * window.stride - window.padding + tap * window.dilation;
  }
}

// A position counted from a patch's first one, in 32 bits: what lies far outside the patch stays outside.
inline constexpr int32_t kFarAway = 1 << 30;
SPLITKERN_DEVICE int32_t relative_to(int32_t begin, int64_t position) {
  const int64_t relative = position - begin;
  return static_cast<int32_t>(relative < -kFarAway || relative > kFarAway ? -kFarAway : relative);
}

// kRun destinations of a row, all in one patch.
struct Run {
  int32_t begin;
  int32_t count;
  int32_t source_begin;  // of the patch
  int32_t source_end;
};

SPLITKERN_DEVICE Run run_at(const AxisPatches& axis, const int32_t (&first_run)[kMaxPatchesPerAxis + 1],
                            int32_t index) {
  const int32_t patch = find_patch(first_run, axis.patches, index);
  Run run;
  run.begin = axis.out_bounds[patch] + (index - first_run[patch]) * kRun;
  const int32_t left = axis.out_bounds[patch + 1] - run.begin;
  run.count = left < kRun ? left : kRun;
  run.source_begin = axis.in_bounds[patch];
  run.source_end = axis.in_bounds[patch + 1];
  return run;
}

}  // namespace splitkern::kernels::depthwise
