// Defines launch_gemm_tile for one type and operator. Included by conv_gemm_*.cu alone.
#pragma once

#include "conv_gemm.h"

namespace splitkern::kernels::sm90 {

template <class T, bool kInputGrad>
void launch_gemm_tile(int32_t tile, const GemmCall& call, const std::vector<GemmProblem>& problems,
                      int32_t multiprocessors, cudaStream_t stream) {
  const bool launched = with_index<kGemmTileCount>(tile, [&](auto index) {
    if (problems.front().patches > 0) {
      launch_gemm<GemmTraits<T, kInputGrad, index, true>>(call, problems, multiprocessors, stream);
    } else {
      launch_gemm<GemmTraits<T, kInputGrad, index, false>>(call, problems, multiprocessors, stream);
    }
  });
  if (!launched) {
    throw std::runtime_error(std::string(GemmParams<kInputGrad>::kOperator) + ": the Hopper path has tiles 0 to " +
                             std::to_string(kGemmTileCount - 1) + ", got " + std::to_string(tile));
  }
}

}  // namespace splitkern::kernels::sm90
