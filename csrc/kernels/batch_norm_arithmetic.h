// The formulas of batch normalisation that every path computes with the same roundings: forward and backward must see
// the same sign of the activation's input, and an output the same bits whatever its layout. Used by plain and nhwc.
#pragma once

#include "params.h"
#include "primitives.h"

namespace splitkern::kernels {

// What the activation sees.
template <class Value>
SPLITKERN_DEVICE Value normalise(Value input, Value mean, Value invstd, Value weight, Value bias) {
  return multiply_add((input - mean) * invstd, weight, bias);
}

// What normalised values are compared with: the activation replaces those at or below it by 0. Nothing is at or below
// a NaN, which stands for no activation; a NaN value is never at or below and stays a NaN, as in PyTorch.
template <class Value>
inline constexpr Value kNoActivation = std::numeric_limits<Value>::quiet_NaN();
template <class Value>
SPLITKERN_DEVICE Value activation_threshold(bool relu) {
  return relu ? Value(0) : kNoActivation<Value>;
}
template <class Value>
SPLITKERN_DEVICE Value activated(Value normalised, Value threshold) {
  return normalised <= threshold ? Value(0) : normalised;
}
template <class Value>
SPLITKERN_DEVICE Value masked(Value grad, Value normalised, Value threshold) {
  return normalised <= threshold ? Value(0) : grad;
}

// What the gradient of the input takes from the sums of its patch: d input = scale * (grad - mean_grad - centered *
// slope), with centered = input - mean. Where the statistics are constants, it is scale * grad.
template <class Value>
struct InputGradient {
  Value mean_grad;
  Value slope;
  Value scale;
};

template <class Value>
SPLITKERN_DEVICE InputGradient<Value> input_gradient(Value invstd, Value weight, Value sum_grad,
                                                     Value sum_grad_centered, Value pixels) {
  return {sum_grad / pixels, invstd * invstd * (sum_grad_centered / pixels), weight * invstd};
}
template <class Value>
SPLITKERN_DEVICE Value grad_of_input(const InputGradient<Value>& of, Value grad, Value centered) {
  return of.scale * multiply_add(-centered, of.slope, grad - of.mean_grad);
}

template <class Value>
SPLITKERN_DEVICE Value* statistic_at(const PatchStatistic& statistic, int64_t patch, int32_t channel) {
  return static_cast<Value*>(statistic.values) + patch * statistic.patch_stride + channel * statistic.channel_stride;
}

template <class T>
SPLITKERN_DEVICE Accumulator<T> parameter_or(const ChannelParameter& parameter, int32_t channel,
                                             Accumulator<T> otherwise) {
  if (parameter.values == nullptr) return otherwise;
  if (parameter.is_float32) return static_cast<const float*>(parameter.values)[channel * parameter.stride];
  return to_accumulator(static_cast<const T*>(parameter.values)[channel * parameter.stride]);
}

}  // namespace splitkern::kernels
