// Every operator body of this folder, for whichever library registers it: register.cpp as the CUDA
// implementation, the test library of csrc/host_execution as one that runs on the CPU.
#pragma once

#include <torch/csrc/stable/library.h>

#include "operators.h"

namespace splitkern::cuda {

inline void register_bodies(torch::stable::detail::StableLibrary& library) {
  library.impl("patch_conv2d", TORCH_BOX(&patch_conv2d));
  library.impl("patch_conv2d.out", TORCH_BOX(&patch_conv2d_out));
  library.impl("patch_conv2d_input_grad", TORCH_BOX(&patch_conv2d_input_grad));
  library.impl("patch_conv2d_input_grad.out", TORCH_BOX(&patch_conv2d_input_grad_out));
  library.impl("patch_conv2d_weight_grad", TORCH_BOX(&patch_conv2d_weight_grad));
  library.impl("patch_conv2d_weight_grad.out", TORCH_BOX(&patch_conv2d_weight_grad_out));
  library.impl("patch_max_pool2d", TORCH_BOX(&patch_max_pool2d));
  library.impl("patch_max_pool2d.out", TORCH_BOX(&patch_max_pool2d_out));
  library.impl("patch_max_pool2d_backward", TORCH_BOX(&patch_max_pool2d_backward));
  library.impl("patch_max_pool2d_backward.out", TORCH_BOX(&patch_max_pool2d_backward_out));
  library.impl("patch_max_pool2d_gather", TORCH_BOX(&patch_max_pool2d_gather));
  library.impl("patch_max_pool2d_gather.out", TORCH_BOX(&patch_max_pool2d_gather_out));
  library.impl("patch_avg_pool2d", TORCH_BOX(&patch_avg_pool2d));
  library.impl("patch_avg_pool2d.out", TORCH_BOX(&patch_avg_pool2d_out));
  library.impl("patch_avg_pool2d_backward", TORCH_BOX(&patch_avg_pool2d_backward));
  library.impl("patch_avg_pool2d_backward.out", TORCH_BOX(&patch_avg_pool2d_backward_out));
  library.impl("patch_batch_norm", TORCH_BOX(&patch_batch_norm));
  library.impl("patch_batch_norm_stats", TORCH_BOX(&patch_batch_norm_stats));
  library.impl("patch_batch_norm_stats.out", TORCH_BOX(&patch_batch_norm_stats_out));
  library.impl("patch_batch_norm_apply", TORCH_BOX(&patch_batch_norm_apply));
  library.impl("patch_batch_norm_apply.out", TORCH_BOX(&patch_batch_norm_apply_out));
  library.impl("patch_batch_norm_backward_reduce", TORCH_BOX(&patch_batch_norm_backward_reduce));
  library.impl("patch_batch_norm_backward_reduce.out", TORCH_BOX(&patch_batch_norm_backward_reduce_out));
  library.impl("patch_batch_norm_backward_apply", TORCH_BOX(&patch_batch_norm_backward_apply));
  library.impl("patch_batch_norm_backward_apply.out", TORCH_BOX(&patch_batch_norm_backward_apply_out));
  library.impl("offload", TORCH_BOX(&offload));
  library.impl("offload.by", TORCH_BOX(&offload_by));
  library.impl("prefetch", TORCH_BOX(&prefetch));
  library.impl("prefetch.by", TORCH_BOX(&prefetch_by));
  library.impl("offload_compressed", TORCH_BOX(&offload_compressed));
  library.impl("prefetch_compressed", TORCH_BOX(&prefetch_compressed));
}

}  // namespace splitkern::cuda
