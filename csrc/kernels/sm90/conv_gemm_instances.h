// Defines launch_gemm_tile for one type and operator. Included by conv_gemm_*.cu alone.
#pragma once

#include "conv_gemm.h"

namespace splitkern::kernels::sm90 {

template <class Function, int... kIndices>
void each_on_host(std::integer_sequence<int, kIndices...>, const Function& function) {
  (function(Index<kIndices>{}), ...);
}

template <class T, bool kInputGrad>
void launch_gemm_tile(int32_t tile, const GemmCall& call, const std::vector<GemmProblem>& problems,
                      int32_t multiprocessors, cudaStream_t stream) {
  bool launched = false;
  each_on_host(std::make_integer_sequence<int, kGemmTileCount>{}, [&](auto index) {
    if (index != tile) return;
    launched = true;
    launch_gemm<GemmTraits<T, kInputGrad, index>>(call, problems, multiprocessors, stream);
  });
  if (!launched) {
    throw std::runtime_error(std::string(GemmParams<kInputGrad>::kOperator) + ": the Hopper path has tiles 0 to " +
                             std::to_string(kGemmTileCount - 1) + ", got " + std::to_string(tile));
  }
}

}  // namespace splitkern::kernels::sm90
