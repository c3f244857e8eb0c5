// Batch normalisation of each patch by its own statistics: statistics, apply with activation, and both
// steps of the backward. Called by the patch_batch_norm operators. Reductions have two stages over fixed
// shares of the pixels, so every run adds in the same order. The activation's input is rebuilt by the
// same operations in forward and backward, so both see the same sign.
#include "../batch_norm_arithmetic.h"
#include "../dispatch.h"
#include "../launchers.h"
#include "../nhwc/nhwc.h"
#include "geometry.h"

namespace splitkern::kernels {
namespace {

struct PatchBox {
  int32_t row_begin;
  int32_t rows;
  int32_t column_begin;
  int32_t columns;
  int64_t patch;   // index among all patches of the call
  int64_t pixels;  // over all images
};

SPLITKERN_DEVICE PatchBox patch_box(const PatchGrid& grid, int32_t row_patch, int32_t column_patch,
                                    int32_t column_patches, int32_t batch) {
  PatchBox box;
  box.row_begin = grid.rows.in_bounds[row_patch];
  box.rows = grid.rows.in_bounds[row_patch + 1] - box.row_begin;
  box.column_begin = grid.columns.in_bounds[column_patch];
  box.columns = grid.columns.in_bounds[column_patch + 1] - box.column_begin;
  box.patch = static_cast<int64_t>(grid.rows.first_patch + row_patch) * column_patches + grid.columns.first_patch +
              column_patch;
  box.pixels = static_cast<int64_t>(batch) * box.rows * box.columns;
  return box;
}

// One share of one (patch, channel). Channels run fastest over threads, then patches, then segments.
struct Share {
  PatchBox box;
  int32_t channel;
  int64_t segment;
  int64_t first_pixel;
  int64_t last_pixel;
  int64_t partial_index;
};

template <class Params>
SPLITKERN_DEVICE Share share_at(const Params& params, int64_t index) {
  Share share;
  share.channel = take_remainder(index, params.channels);
  const int32_t column_patch = take_remainder(index, params.grid.columns.patches);
  const int32_t row_patch = take_remainder(index, params.grid.rows.patches);
  share.segment = index;
  share.box = patch_box(params.grid, row_patch, column_patch, params.column_patches, params.batch);
  share.first_pixel = share.box.pixels * share.segment / params.segments;
  share.last_pixel = share.box.pixels * (share.segment + 1) / params.segments;
  share.partial_index = (share.segment * params.patches + share.box.patch) * params.channels + share.channel;
  return share;
}

template <class Params>
SPLITKERN_HOST_DEVICE int64_t patch_channels(const Params& params) {
  return static_cast<int64_t>(params.grid.rows.patches) * params.grid.columns.patches * params.channels;
}

SPLITKERN_DEVICE Element pixel_of(const PatchBox& box, int32_t channel, int64_t pixel) {
  Element element;
  element.channel = channel;
  element.column = box.column_begin + take_remainder(pixel, box.columns);
  element.row = box.row_begin + take_remainder(pixel, box.rows);
  element.batch = pixel;
  return element;
}

SPLITKERN_DEVICE void next_pixel(const PatchBox& box, Element& element) {
  if (++element.column < box.column_begin + box.columns) return;
  element.column = box.column_begin;
  if (++element.row < box.row_begin + box.rows) return;
  element.row = box.row_begin;
  ++element.batch;
}

template <class T>
__global__ void batch_norm_stats_kernel(const __grid_constant__ BatchNormStatsParams params) {
  using Value = Accumulator<T>;
  const int64_t shares = patch_channels(params) * params.segments;
  for (int64_t index = global_thread_index(); index < shares; index += global_thread_count()) {
    const Share share = share_at(params, index);
    Element element = pixel_of(share.box, share.channel, share.first_pixel);
    Value mean = 0;
    Value m2 = 0;
    Value count = 0;
    for (int64_t pixel = share.first_pixel; pixel < share.last_pixel; ++pixel) {
      const Value value = to_accumulator(static_cast<const T*>(params.input)[offset_of(params.input_strides, element)]);
      count += Value(1);
      const Value delta = value - mean;
      mean += delta / count;
      m2 = multiply_add(delta, value - mean, m2);
      next_pixel(share.box, element);
    }
    static_cast<Value*>(params.partial_mean)[share.partial_index] = mean;
    static_cast<Value*>(params.partial_m2)[share.partial_index] = m2;
  }
}

template <class T>
__global__ void batch_norm_stats_merge_kernel(const __grid_constant__ BatchNormStatsParams params) {
  using Value = Accumulator<T>;
  for (int64_t index = global_thread_index(); index < patch_channels(params); index += global_thread_count()) {
    const Share first = share_at(params, index);
    Value mean = 0;
    Value m2 = 0;
    int64_t count = 0;
    for (int64_t segment = 0; segment < params.segments; ++segment) {
      const int64_t segment_end = first.box.pixels * (segment + 1) / params.segments;
      const int64_t segment_count = segment_end - count;
      if (segment_count == 0) continue;
      const int64_t at = first.partial_index + segment * params.patches * params.channels;
      const Value delta = static_cast<const Value*>(params.partial_mean)[at] - mean;
      const Value share_of_all = static_cast<Value>(segment_count) / static_cast<Value>(segment_end);
      mean = multiply_add(delta, share_of_all, mean);
      m2 +=
          static_cast<const Value*>(params.partial_m2)[at] + delta * delta * (static_cast<Value>(count) * share_of_all);
      count = segment_end;
    }
    *statistic_at<Value>(params.mean, first.box.patch, first.channel) = mean;
    *statistic_at<Value>(params.m2, first.box.patch, first.channel) = m2;
    if (params.invstd.values != nullptr) {
      const Value pixels = first.box.pixels == 0 ? Value(1) : static_cast<Value>(first.box.pixels);
      *statistic_at<Value>(params.invstd, first.box.patch, first.channel) =
          Value(1) / square_root(m2 / pixels + static_cast<Value>(params.eps));
    }
  }
}

template <class T>
__global__ void batch_norm_apply_kernel(const __grid_constant__ BatchNormApplyParams params) {
  using Value = Accumulator<T>;
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const Region region = input_region(params.grid, params.batch, params.channels);
  const int64_t elements = region_elements(region);
  for (int64_t index = global_thread_index(); index < elements; index += global_thread_count()) {
    const Element element = element_at(region, index, params.channels_fastest);
    const PatchBox box =
        patch_box(params.grid, find_patch(rows.in_bounds, rows.patches, element.row),
                  find_patch(columns.in_bounds, columns.patches, element.column), params.column_patches, params.batch);
    const Value value = to_accumulator(static_cast<const T*>(params.input)[offset_of(params.input_strides, element)]);
    const Value normalised = normalise<Value>(value, *statistic_at<Value>(params.mean, box.patch, element.channel),
                                              *statistic_at<Value>(params.invstd, box.patch, element.channel),
                                              parameter_or<T>(params.weight, element.channel, 1),
                                              parameter_or<T>(params.bias, element.channel, 0));
    static_cast<T*>(params.output)[offset_of(params.output_strides, element)] =
        from_accumulator<T>(activated(normalised, activation_threshold<Value>(params.relu)));
  }
}

template <class T>
__global__ void batch_norm_backward_reduce_kernel(const __grid_constant__ BatchNormBackwardReduceParams params) {
  using Value = Accumulator<T>;
  const int64_t shares = patch_channels(params) * params.segments;
  for (int64_t index = global_thread_index(); index < shares; index += global_thread_count()) {
    const Share share = share_at(params, index);
    const Value mean = *statistic_at<Value>(params.mean, share.box.patch, share.channel);
    const Value invstd = *statistic_at<Value>(params.invstd, share.box.patch, share.channel);
    const Value weight = parameter_or<T>(params.weight, share.channel, 1);
    const Value bias = parameter_or<T>(params.bias, share.channel, 0);
    Element element = pixel_of(share.box, share.channel, share.first_pixel);
    Value sum_grad = 0;
    Value sum_grad_centered = 0;
    for (int64_t pixel = share.first_pixel; pixel < share.last_pixel; ++pixel) {
      const Value value = to_accumulator(static_cast<const T*>(params.input)[offset_of(params.input_strides, element)]);
      const Value grad_output =
          to_accumulator(static_cast<const T*>(params.grad_output)[offset_of(params.grad_output_strides, element)]);
      const Value grad =
          masked(grad_output, normalise(value, mean, invstd, weight, bias), activation_threshold<Value>(params.relu));
      sum_grad += grad;
      sum_grad_centered = multiply_add(grad, value - mean, sum_grad_centered);
      next_pixel(share.box, element);
    }
    static_cast<Value*>(params.partial_sum_grad)[share.partial_index] = sum_grad;
    static_cast<Value*>(params.partial_sum_grad_centered)[share.partial_index] = sum_grad_centered;
  }
}

template <class T>
__global__ void batch_norm_backward_reduce_merge_kernel(const __grid_constant__ BatchNormBackwardReduceParams params) {
  using Value = Accumulator<T>;
  for (int64_t index = global_thread_index(); index < patch_channels(params); index += global_thread_count()) {
    const Share first = share_at(params, index);
    Value sum_grad = 0;
    Value sum_grad_centered = 0;
    for (int64_t segment = 0; segment < params.segments; ++segment) {
      const int64_t at = first.partial_index + segment * params.patches * params.channels;
      sum_grad += static_cast<const Value*>(params.partial_sum_grad)[at];
      sum_grad_centered += static_cast<const Value*>(params.partial_sum_grad_centered)[at];
    }
    *statistic_at<Value>(params.sum_grad, first.box.patch, first.channel) = sum_grad;
    *statistic_at<Value>(params.sum_grad_centered, first.box.patch, first.channel) = sum_grad_centered;
  }
}

template <class T>
__global__ void batch_norm_backward_apply_kernel(const __grid_constant__ BatchNormBackwardApplyParams params) {
  using Value = Accumulator<T>;
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const Region region = input_region(params.grid, params.batch, params.channels);
  const int64_t elements = region_elements(region);
  for (int64_t index = global_thread_index(); index < elements; index += global_thread_count()) {
    const Element element = element_at(region, index, params.channels_fastest);
    const PatchBox box =
        patch_box(params.grid, find_patch(rows.in_bounds, rows.patches, element.row),
                  find_patch(columns.in_bounds, columns.patches, element.column), params.column_patches, params.batch);
    const Value mean = *statistic_at<Value>(params.mean, box.patch, element.channel);
    const Value invstd = *statistic_at<Value>(params.invstd, box.patch, element.channel);
    const Value weight = parameter_or<T>(params.weight, element.channel, 1);
    const Value bias = parameter_or<T>(params.bias, element.channel, 0);
    const Value value = to_accumulator(static_cast<const T*>(params.input)[offset_of(params.input_strides, element)]);
    const Value grad_output =
        to_accumulator(static_cast<const T*>(params.grad_output)[offset_of(params.grad_output_strides, element)]);
    Value grad =
        masked(grad_output, normalise(value, mean, invstd, weight, bias), activation_threshold<Value>(params.relu));
    if (params.sum_grad.values != nullptr) {
      const InputGradient<Value> of = input_gradient(
          invstd, weight, *statistic_at<Value>(params.sum_grad, box.patch, element.channel),
          *statistic_at<Value>(params.sum_grad_centered, box.patch, element.channel), static_cast<Value>(box.pixels));
      grad = grad_of_input(of, grad, value - mean);
    } else {
      grad = weight * invstd * grad;
    }
    static_cast<T*>(params.output)[offset_of(params.output_strides, element)] = from_accumulator<T>(grad);
  }
}

}  // namespace

int32_t batch_norm_segments(const BatchNormStatsParams& params, int64_t pixels) {
  return nhwc::choice_refusal(params).empty() ? nhwc::segments(params, pixels) : 0;
}

int32_t batch_norm_segments(const BatchNormBackwardReduceParams& params, int64_t pixels) {
  return nhwc::choice_refusal(params).empty() ? nhwc::segments(params, pixels) : 0;
}

void launch_batch_norm_stats(const BatchNormStatsParams& params, cudaStream_t stream) {
  if (nhwc::choice_refusal(params).empty()) return nhwc::launch(params, stream);
  const int64_t shares = patch_channels(params) * params.segments;
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&batch_norm_stats_kernel<typename decltype(tag)::Type>, grid_for(shares), plain_block(), 0, stream, params);
  });
}

void launch_batch_norm_stats_merge(const BatchNormStatsParams& params, cudaStream_t stream) {
  if (nhwc::choice_refusal(params).empty()) return nhwc::launch_merge(params, stream);
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&batch_norm_stats_merge_kernel<typename decltype(tag)::Type>, grid_for(patch_channels(params)),
           plain_block(), 0, stream, params);
  });
}

void launch_batch_norm_apply(const BatchNormApplyParams& params, cudaStream_t stream) {
  if (nhwc::choice_refusal(params).empty()) return nhwc::launch(params, stream);
  const int64_t elements = region_elements(input_region(params.grid, params.batch, params.channels));
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&batch_norm_apply_kernel<typename decltype(tag)::Type>, grid_for(elements), plain_block(), 0, stream,
           params);
  });
}

void launch_batch_norm_backward_reduce(const BatchNormBackwardReduceParams& params, cudaStream_t stream) {
  if (nhwc::choice_refusal(params).empty()) return nhwc::launch(params, stream);
  const int64_t shares = patch_channels(params) * params.segments;
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&batch_norm_backward_reduce_kernel<typename decltype(tag)::Type>, grid_for(shares), plain_block(), 0, stream,
           params);
  });
}

void launch_batch_norm_backward_reduce_merge(const BatchNormBackwardReduceParams& params, cudaStream_t stream) {
  if (nhwc::choice_refusal(params).empty()) return nhwc::launch_merge(params, stream);
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&batch_norm_backward_reduce_merge_kernel<typename decltype(tag)::Type>, grid_for(patch_channels(params)),
           plain_block(), 0, stream, params);
  });
}

void launch_batch_norm_backward_apply(const BatchNormBackwardApplyParams& params, cudaStream_t stream) {
  if (nhwc::choice_refusal(params).empty()) return nhwc::launch(params, stream);
  const int64_t elements = region_elements(input_region(params.grid, params.batch, params.channels));
  dispatch_element_type(params.kOperator, params.type, [&](auto tag) {
    launch(&batch_norm_backward_apply_kernel<typename decltype(tag)::Type>, grid_for(elements), plain_block(), 0,
           stream, params);
  });
}

}  // namespace splitkern::kernels
