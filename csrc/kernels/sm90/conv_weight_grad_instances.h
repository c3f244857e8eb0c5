// Defines launch_weight_grad_tile for one type. Included by conv_weight_grad_*.cu alone.
#pragma once

#include <algorithm>

#include "conv_weight_grad_kernel.h"

namespace splitkern::kernels::sm90 {

template <class T>
void launch_weight_grad_tile(int32_t tile, const WeightGradParams& params, int32_t multiprocessors,
                             cudaStream_t stream) {
  const bool launched = with_index<kWeightGradTileCount>(tile, [&](auto index) {
    using Traits = WeightGradTraits<T, index>;
    const unsigned blocks = static_cast<unsigned>(std::min(params.items, multiprocessors));
    kernels::launch(&conv_weight_grad_kernel<Traits>, Dim3{blocks, 1, 1}, Dim3{kBlockThreads, 1, 1},
                    sizeof(WeightGradShared<Traits>), stream, params);
  });
  if (!launched) {
    throw std::runtime_error(std::string(params.kOperator) + ": the Hopper weight gradient has tiles 0 to " +
                             std::to_string(kWeightGradTileCount - 1) + ", got " + std::to_string(tile));
  }
}

}  // namespace splitkern::kernels::sm90
