// The Hopper kernel for windows of stride 1: the operand's pixels stay in shared memory while all taps read them.
// Chosen by conv_gemm.cu for a forward or an input gradient where it is expected to be the faster kernel.
#pragma once

#include <vector>

#include "conv_gemm.h"

namespace splitkern::kernels::sm90 {

// Predicted cycles of the device; infinite where the kernel does not take the call. All problems of a call share the
// number of taps and their steps.
double window_cycles(const GemmCall& call, const std::vector<GemmProblem>& problems, int32_t multiprocessors);

void launch_window(bool input_grad, const GemmCall& call, const std::vector<GemmProblem>& problems,
                   int32_t multiprocessors, cudaStream_t stream);

}  // namespace splitkern::kernels::sm90
