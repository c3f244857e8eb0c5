// Convolution of an input with at most four channels: the image layer. Tensor cores take whole windows as the
// reduction, staged pixel by pixel. Called through conv_paths.h, which describes the three functions.
#pragma once

#include "../paths.h"

namespace splitkern::kernels::first_layer {

std::string refusal(const ConvForwardParams& params, const DeviceTraits& traits);
std::string refusal(const ConvInputGradParams& params, const DeviceTraits& traits);
std::string refusal(const ConvWeightGradParams& params, const DeviceTraits& traits);

int64_t workspace_bytes(const ConvForwardParams& params, const DeviceTraits& traits);
int64_t workspace_bytes(const ConvInputGradParams& params, const DeviceTraits& traits);
int64_t workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits);

void launch(const ConvForwardParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);
void launch(const ConvInputGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);
void launch(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);

}  // namespace splitkern::kernels::first_layer
