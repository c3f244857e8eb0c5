// The path of GPUs since compute capability 8.0: implicit matrix products with mma.sync over NHWC tensors of fp16,
// bf16 or, as tf32, fp32. The contract of these functions is in ../paths.h.
#pragma once

#include <string>

#include "../launchers.h"
#include "../paths.h"

namespace splitkern::kernels::sm80 {

std::string refusal(const ConvForwardParams& params, const DeviceTraits& device);
std::string refusal(const ConvInputGradParams& params, const DeviceTraits& device);
std::string refusal(const ConvWeightGradParams& params, const DeviceTraits& device);

int64_t workspace_bytes(const ConvForwardParams& params, const DeviceTraits& device);
int64_t workspace_bytes(const ConvInputGradParams& params, const DeviceTraits& device);
int64_t workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& device);

void launch(const ConvForwardParams& params, const DeviceTraits& device, void* workspace, cudaStream_t stream);
void launch(const ConvInputGradParams& params, const DeviceTraits& device, void* workspace, cudaStream_t stream);
void launch(const ConvWeightGradParams& params, const DeviceTraits& device, void* workspace, cudaStream_t stream);

}  // namespace splitkern::kernels::sm80
