// The Hopper path: TMA, memory barriers and warpgroup products, compiled for sm_90a alone. 16-bit types, NHWC,
// one group. The three functions per parameter struct that paths.h asks for, and the knobs of its tile choice.
#pragma once

#include <cstdint>
#include <string>

#include "../paths.h"

namespace splitkern::kernels::sm90 {

std::string refusal(const ConvForwardParams& params, const DeviceTraits& traits);
std::string refusal(const ConvInputGradParams& params, const DeviceTraits& traits);
std::string refusal(const ConvWeightGradParams& params, const DeviceTraits& traits);

int64_t workspace_bytes(const ConvForwardParams& params, const DeviceTraits& traits);
int64_t workspace_bytes(const ConvInputGradParams& params, const DeviceTraits& traits);
int64_t workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits);

void launch(const ConvForwardParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);
void launch(const ConvInputGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);
void launch(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream);

// What the cost models would choose, overridden: for measurements and for tests that must reach every kernel.
// Negative: the model chooses. Set before the calls that it is meant for; plain process-wide values.
struct Tuning {
  int32_t gemm_tile = -1;             // index into kGemmTiles
  int32_t lag = -1;                   // see GemmTile
  int32_t merge = -1;                 // 0: equal patches stay problems of their own
  int32_t window = -1;                // 1: the window kernels wherever they can, 0: never
  int32_t weight_grad_tile = -1;      // index into kWeightGradTiles
  int32_t weight_grad_segments = -1;  // shares of the reduction
};
Tuning& tuning();

}  // namespace splitkern::kernels::sm90

// Sets one member of Tuning, by its name, from outside the library. Returns 0, or 1 for a name that it does not have.
extern "C" __attribute__((visibility("default"))) int splitkern_tune_sm90(const char* knob, int32_t value);
