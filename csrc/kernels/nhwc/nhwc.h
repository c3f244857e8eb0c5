// Pooling and batch normalisation of tensors whose channels lie next to each other, several channels in one access.
// The launchers of csrc/kernels/plain ask refusal() and hand a call over where it is empty; `splitkern doctor
// --explain` prints it. Pooling gives the same bits as the plain kernels, batch norm the same formulas.
#pragma once

#include <cstdint>
#include <string>

#include "../conv_paths.h"
#include "../launchers.h"
#include "../params.h"

namespace splitkern::kernels::nhwc {

// Empty where these kernels take the call, else the reason as a phrase: "the input's channel stride is 56, not 1".
// Looks at types, extents, strides and the alignment of pointers (null pointers count as aligned).
std::string refusal(const MaxPoolParams& params);
std::string refusal(const MaxPoolBackwardParams& params);
std::string refusal(const MaxPoolGatherParams& params);
std::string refusal(const AvgPoolParams& params);
std::string refusal(const AvgPoolBackwardParams& params);
std::string refusal(const BatchNormStatsParams& params);
std::string refusal(const BatchNormApplyParams& params);
std::string refusal(const BatchNormBackwardReduceParams& params);
std::string refusal(const BatchNormBackwardApplyParams& params);

// refusal(), and the reason where the plain path is forced: what the launchers go by.
template <class Params>
std::string choice_refusal(const Params& params) {
  return plain_path_is_forced() ? "the plain path was forced" : refusal(params);
}

// Queue the call; it must not be refused.
void launch(const MaxPoolParams& params, cudaStream_t stream);
void launch(const MaxPoolBackwardParams& params, cudaStream_t stream);
void launch(const MaxPoolGatherParams& params, cudaStream_t stream);
void launch(const AvgPoolParams& params, cudaStream_t stream);
void launch(const AvgPoolBackwardParams& params, cudaStream_t stream);
void launch(const BatchNormStatsParams& params, cudaStream_t stream);
void launch_merge(const BatchNormStatsParams& params, cudaStream_t stream);
void launch(const BatchNormApplyParams& params, cudaStream_t stream);
void launch(const BatchNormBackwardReduceParams& params, cudaStream_t stream);
void launch_merge(const BatchNormBackwardReduceParams& params, cudaStream_t stream);
void launch(const BatchNormBackwardApplyParams& params, cudaStream_t stream);

// The segments that these kernels want for the sums of a call whose patches have so many pixels on average.
// The same on every device.
int32_t segments(const BatchNormStatsParams& params, int64_t pixels);
int32_t segments(const BatchNormBackwardReduceParams& params, int64_t pixels);

}  // namespace splitkern::kernels::nhwc
