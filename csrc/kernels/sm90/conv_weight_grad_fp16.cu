// Hopper kernels of the weight gradient in fp16; called by conv_weight_grad.cu.
#include "conv_weight_grad_instances.h"

namespace splitkern::kernels::sm90 {

template void launch_weight_grad_tile<Half>(int32_t tile, const WeightGradParams& params, int32_t multiprocessors,
                                            cudaStream_t stream);

}  // namespace splitkern::kernels::sm90
