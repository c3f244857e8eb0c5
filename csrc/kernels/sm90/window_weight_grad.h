// The Hopper weight gradient for 3x3 windows of stride 1: all nine taps read one copy of the input's pixels in shared
// memory. Chosen by weight_grad.cu where it is expected to be the faster kernel.
#pragma once

#include "../paths.h"

namespace splitkern::kernels::sm90 {

// The share of this kernel's products that is part of the gradient; 0 where it does not take the call.
double window_weight_grad_efficiency(const ConvWeightGradParams& params);

int64_t window_weight_grad_workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits);

int64_t shares_workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits);
void launch_shares(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace,
                   cudaStream_t stream);
void launch_window_weight_grad(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace,
                               cudaStream_t stream);

}  // namespace splitkern::kernels::sm90
