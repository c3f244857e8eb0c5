// One launcher per kernel: queues the work on the stream and returns. Called by csrc/ops/cuda, which
// has checked the arguments and made the tensors' device current. A launch that CUDA refuses throws
// std::runtime_error with file, line and operator.
#pragma once

#include "params.h"

// The CUDA runtime declares the same; naming it here keeps CUDA headers out of the operator bodies.
typedef struct CUstream_st* cudaStream_t;

namespace splitkern::kernels {

// The runtime linked into this library keeps its own current device: set it beside torch's guard.
void use_device(int device_index);

void launch_conv_forward(const ConvForwardParams& params, cudaStream_t stream);
void launch_conv_input_grad(const ConvInputGradParams& params, cudaStream_t stream);
void launch_conv_weight_grad(const ConvWeightGradParams& params, cudaStream_t stream);
void launch_conv_weight_grad_reduce(const ConvWeightGradReduceParams& params, cudaStream_t stream);

void launch_max_pool(const MaxPoolParams& params, cudaStream_t stream);
void launch_max_pool_backward(const MaxPoolBackwardParams& params, cudaStream_t stream);
void launch_max_pool_gather(const MaxPoolGatherParams& params, cudaStream_t stream);
void launch_avg_pool(const AvgPoolParams& params, cudaStream_t stream);
void launch_avg_pool_backward(const AvgPoolBackwardParams& params, cudaStream_t stream);

// The segments that suit the kernels that will take the call, whose patches have so many pixels on average; 0: any
// number does. The same on every device.
int32_t batch_norm_segments(const BatchNormStatsParams& params, int64_t pixels);
int32_t batch_norm_segments(const BatchNormBackwardReduceParams& params, int64_t pixels);

void launch_batch_norm_stats(const BatchNormStatsParams& params, cudaStream_t stream);
void launch_batch_norm_stats_merge(const BatchNormStatsParams& params, cudaStream_t stream);
void launch_batch_norm_apply(const BatchNormApplyParams& params, cudaStream_t stream);
void launch_batch_norm_backward_reduce(const BatchNormBackwardReduceParams& params, cudaStream_t stream);
void launch_batch_norm_backward_reduce_merge(const BatchNormBackwardReduceParams& params, cudaStream_t stream);
void launch_batch_norm_backward_apply(const BatchNormBackwardApplyParams& params, cudaStream_t stream);

}  // namespace splitkern::kernels
