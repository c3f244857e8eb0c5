// Convolution in groups of few channels, depthwise above all: direct kernels on the ordinary arithmetic units, for
// there is too little reduction for tensor cores. Called through conv_paths.h, which describes the three functions.
#pragma once

#include "../paths.h"

namespace splitkern::kernels::depthwise {

std::string refusal(const ConvForwardParams& params, const DeviceTraits& traits);
std::string refusal(const ConvInputGradParams& params, const DeviceTraits& traits);
std::string refusal(const ConvWeightGradParams& params, const DeviceTraits& traits);

int64_t workspace_bytes(const ConvForwardParams& params, const DeviceTraits& traits);
int64_t workspace_bytes(const ConvInputGradParams& params, const DeviceTraits& traits);
int64_t workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits);

void launch(const ConvForwardParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);
void launch(const ConvInputGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);
void launch(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);

}  // namespace splitkern::kernels::depthwise
