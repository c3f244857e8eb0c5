// Chooses the path of a convolution call and launches it: the only place that knows every path. Called by
// csrc/ops/cuda/conv.cpp, and by the explanation that `splitkern doctor --explain` prints.
#pragma once

#include <cstdint>
#include <span>

#include "paths.h"

namespace splitkern::kernels {

const char* name_of(Path path);

// Throw where a forced path (splitkern_force_path) refuses the call.
PathChoice choose_path(const ConvForwardParams& params, const DeviceTraits& traits);
PathChoice choose_path(const ConvInputGradParams& params, const DeviceTraits& traits);
// All grids of the call at once, for their sums meet in one output; params.grid is ignored. No grid at all: an
// empty sum.
PathChoice choose_path(const ConvWeightGradParams& params, std::span<const PatchGrid> grids,
                       const DeviceTraits& traits);

// Queues what choose_path returned for the same arguments; workspace has choice.workspace_bytes.
void launch_path(const PathChoice& choice, const ConvForwardParams& params, const DeviceTraits& traits, void* workspace,
                 cudaStream_t stream);
void launch_path(const PathChoice& choice, const ConvInputGradParams& params, const DeviceTraits& traits,
                 void* workspace, cudaStream_t stream);
void launch_path(const PathChoice& choice, const ConvWeightGradParams& params, std::span<const PatchGrid> grids,
                 const DeviceTraits& traits, void* workspace, cudaStream_t stream);

// True while the plain path is forced: pooling, batch norm and copies then take their plain kernels as well.
bool plain_path_is_forced();

}  // namespace splitkern::kernels

// The names of the paths in this build, the most preferred first, with a space between.
extern "C" __attribute__((visibility("default"))) const char* splitkern_conv_paths();

// For tests and benchmarks: every convolution of this library takes the named path ("plain", "depthwise",
// "first_layer", "sm80", "sm90"), and a call that the path refuses throws. Null or "": automatic again. Returns 0,
// or 1 for a name that no path has. Process-wide; calls that run at the same time see the old or the new choice.
extern "C" __attribute__((visibility("default"))) int splitkern_force_path(const char* name);
