// Weights of any strides as [output channel][tap][input channel], contiguous, for the tensor maps. Called by the
// launchers of this folder where the weights do not lie so already.
#pragma once

#include "../launchers.h"
#include "../params.h"

namespace splitkern::kernels::sm90 {

struct PackWeightsParams {
  static constexpr const char* kOperator = "splitkern: packing the weights of a convolution";
  int32_t out_channels;
  int32_t in_channels;
  int32_t taps;
  int32_t kernel_columns;
  Strides4 weight_strides;
  const void* weight;  // 16-bit elements
  void* packed;
};

void launch_pack_weights(const PackWeightsParams& params, cudaStream_t stream);

}  // namespace splitkern::kernels::sm90
