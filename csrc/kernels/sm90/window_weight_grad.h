// The Hopper weight gradient for 3x3 windows of stride 1: all nine taps read one copy of the input's pixels in shared
// memory. Chosen by conv_weight_grad.cu where it is expected to be the faster kernel.
#pragma once

#include <optional>

#include "../paths.h"

namespace splitkern::kernels::sm90 {

// Predicted cycles of a multiprocessor, without the second kernel; none where the kernel does not take the call.
std::optional<double> window_weight_grad_cycles(const ConvWeightGradParams& params, const DeviceTraits& traits);

int64_t window_weight_grad_workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits);

void launch_window_weight_grad(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace,
                               cudaStream_t stream);

}  // namespace splitkern::kernels::sm90
