// The path that takes every call: any shape, type and strides, one thread for one result. Chosen by
// csrc/kernels/conv_paths.cpp where no faster path takes the call; the trio of functions is that of paths.h.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "../paths.h"

namespace splitkern::kernels::plain {

std::string refusal(const ConvForwardParams& params, const DeviceTraits& traits);
std::string refusal(const ConvInputGradParams& params, const DeviceTraits& traits);
std::string refusal(const ConvWeightGradParams& params, const DeviceTraits& traits);

int64_t workspace_bytes(const ConvForwardParams& params, const DeviceTraits& traits);
int64_t workspace_bytes(const ConvInputGradParams& params, const DeviceTraits& traits);
int64_t workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits);

void launch(const ConvForwardParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);
void launch(const ConvInputGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);
void launch(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);

// The weight gradient summed over any number of grids, also none, each cut into params.segments shares; the
// other paths take one grid.
int64_t weight_grad_workspace_bytes(const ConvWeightGradParams& params, size_t grids);
void launch_weight_grad(const ConvWeightGradParams& params, std::span<const PatchGrid> grids, void* workspace,
                        cudaStream_t stream);

}  // namespace splitkern::kernels::plain
