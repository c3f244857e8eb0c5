// The Hopper kernel for windows of stride 1: the operand's pixels stay in shared memory while all taps read them.
// Called by the launchers of the forward and the input gradient where it is expected to be the faster one.
#pragma once

#include <cstdint>
#include <vector>

#include "../paths.h"
#include "geometry.h"

namespace splitkern::kernels::sm90 {

struct WindowProblem {
  AxisWalk rows;
  AxisWalk columns;
};

// output[pixel][channel] = activation(sum over taps and operand channels + bias) on every problem. All problems
// share the number of taps and their steps. A forward reads weights [output channel][tap][operand channel]; an
// input gradient the same memory, there [operand channel][tap][output channel].
struct WindowCall {
  const char* operation;
  ElementType type;
  int32_t images;
  const void* operand;
  Strides4 operand_strides;
  int32_t operand_channels;
  const void* weight;
  WeightLayout weight_layout;
  int32_t kernel_rows;
  int32_t kernel_columns;
  bool input_grad;
  void* output;
  Strides4 output_strides;
  int32_t output_channels;
  const void* bias;  // null: none
  int64_t bias_stride;
  bool relu;
  std::vector<WindowProblem> problems;
};

// The share of this kernel's products that reach the output, 0 where it does not take the call.
double window_efficiency(const WindowCall& call, const DeviceTraits& traits);

void launch_window(const WindowCall& call, const DeviceTraits& traits, cudaStream_t stream);

}  // namespace splitkern::kernels::sm90
