// The Hopper kernel for windows of stride 1: the operand's pixels stay in shared memory while all taps read them.
// Chosen by conv_gemm.cu for a forward or an input gradient where it is expected to be the faster kernel.
#pragma once

#include <vector>

#include "conv_gemm.h"

namespace splitkern::kernels::sm90 {

// The share of this kernel's products that reaches the output; 0 where it does not take the call. All problems of a
// call share the number of taps and their steps.
double window_efficiency(const GemmCall& call, const std::vector<GemmProblem>& problems);

void launch_window(bool input_grad, const GemmCall& call, const std::vector<GemmProblem>& problems,
                   int32_t multiprocessors, cudaStream_t stream);

}  // namespace splitkern::kernels::sm90
