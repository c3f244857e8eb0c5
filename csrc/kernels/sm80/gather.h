// Parameters and launch of the gathering matrix product (gather_kernel.h), filled by gather_paths.cu.
// One struct serves both passes: the forward gathers inputs, the input gradient gathers output gradients.
#pragma once

#include "../budgets.h"
#include "../launchers.h"
#include "../paths.h"

namespace splitkern::kernels::sm80 {

inline constexpr int32_t kMaxClasses = 8;  // per axis and launch
inline constexpr int32_t kMaxTaps = 16;    // per axis: each a bit of half a word
inline constexpr int64_t kGatherSharedBytes = shared_budget("sm80::gather_kernel");

// Destinations of one axis that share their taps. The forward has one class. For the input gradient the class of an
// input is its (position + padding) mod stride: only the taps of that residue reach it, so that no multiplication
// by a stride's zeros is done. A class may have no taps: its destinations are zero.
struct GatherClass {
  int32_t first;         // destination position
  int32_t count;         // destinations, destination_step apart
  int32_t source_first;  // source position that tap 0 of the class reads for the first destination
  int32_t taps;
  int32_t weight_first;  // kernel tap that is tap 0 of the class
};

struct GatherAxis {
  int32_t class_count;
  int32_t destination_step;
  int32_t source_step;  // from one destination of a class to the next
  int32_t source_tap;   // from one tap of a class to the next
  int32_t weight_step;
  GatherClass classes[kMaxClasses];
};

struct GatherParams {
  static constexpr const char* kOperator = "the sm_80 gather kernel";
  ElementType type;
  int32_t batch;
  int32_t groups;
  int32_t source_channels;  // per group
  int32_t destination_channels;
  int32_t kernel_columns;
  int32_t weight_taps;  // of the whole kernel
  bool relu;
  bool vector_stores;  // the destination takes 16-byte vectors of channels
  GatherAxis rows;
  GatherAxis columns;
  PatchGrid grid;  // in_bounds: of the source; out_bounds: of the destination
  Strides4 source_strides;
  Strides4 destination_strides;
  int64_t bias_stride;
  const void* source;
  const void* weights;  // [group][destination channel][tap][source channel]
  const void* bias;
  void* destination;
};
static_assert(sizeof(GatherParams) <= 4096);

void launch_gather(const GatherParams& params, const DeviceTraits& device, cudaStream_t stream);

}  // namespace splitkern::kernels::sm80
