// Hopper kernels of the forward convolution in bf16; called by conv_forward.cu.
#include "conv_gemm_instances.h"

namespace splitkern::kernels::sm90 {

template void launch_gemm_tile<BFloat16, false>(int32_t tile, const GemmCall& call,
                                                const std::vector<GemmProblem>& problems, int32_t multiprocessors,
                                                cudaStream_t stream);

}  // namespace splitkern::kernels::sm90
