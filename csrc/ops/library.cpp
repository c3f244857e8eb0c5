// The operator library: schemas of splitkern::* and their CPU implementations. Static initialisers run when
// splitkern/_library.py loads the file; csrc/ops/cuda/register.cpp adds the CUDA implementations.
#include <torch/csrc/stable/library.h>

#include "ops/cpu/operators.h"
#include "ops/errors.h"
#include "ops/schemas.h"

STABLE_TORCH_LIBRARY(splitkern, library) {
  splitkern::define_schemas(library);
}

STABLE_TORCH_LIBRARY_IMPL(splitkern, CPU, library) {
  using namespace splitkern::cpu;
  SPLITKERN_BODY(library, "patch_conv2d", patch_conv2d);
  SPLITKERN_BODY(library, "patch_conv2d.out", patch_conv2d_out);
  SPLITKERN_BODY(library, "patch_conv2d_input_grad", patch_conv2d_input_grad);
  SPLITKERN_BODY(library, "patch_conv2d_input_grad.out", patch_conv2d_input_grad_out);
  SPLITKERN_BODY(library, "patch_conv2d_weight_grad", patch_conv2d_weight_grad);
  SPLITKERN_BODY(library, "patch_conv2d_weight_grad.out", patch_conv2d_weight_grad_out);
  SPLITKERN_BODY(library, "patch_max_pool2d", patch_max_pool2d);
  SPLITKERN_BODY(library, "patch_max_pool2d.out", patch_max_pool2d_out);
  SPLITKERN_BODY(library, "patch_max_pool2d_backward", patch_max_pool2d_backward);
  SPLITKERN_BODY(library, "patch_max_pool2d_backward.out", patch_max_pool2d_backward_out);
  SPLITKERN_BODY(library, "patch_max_pool2d_gather", patch_max_pool2d_gather);
  SPLITKERN_BODY(library, "patch_max_pool2d_gather.out", patch_max_pool2d_gather_out);
  SPLITKERN_BODY(library, "patch_avg_pool2d", patch_avg_pool2d);
  SPLITKERN_BODY(library, "patch_avg_pool2d.out", patch_avg_pool2d_out);
  SPLITKERN_BODY(library, "patch_avg_pool2d_backward", patch_avg_pool2d_backward);
  SPLITKERN_BODY(library, "patch_avg_pool2d_backward.out", patch_avg_pool2d_backward_out);
  SPLITKERN_BODY(library, "patch_batch_norm", patch_batch_norm);
  SPLITKERN_BODY(library, "patch_batch_norm.out", patch_batch_norm_out);
  SPLITKERN_BODY(library, "patch_batch_norm_stats", patch_batch_norm_stats);
  SPLITKERN_BODY(library, "patch_batch_norm_stats.out", patch_batch_norm_stats_out);
  SPLITKERN_BODY(library, "patch_batch_norm_apply", patch_batch_norm_apply);
  SPLITKERN_BODY(library, "patch_batch_norm_apply.out", patch_batch_norm_apply_out);
  SPLITKERN_BODY(library, "patch_batch_norm_backward_reduce", patch_batch_norm_backward_reduce);
  SPLITKERN_BODY(library, "patch_batch_norm_backward_reduce.out", patch_batch_norm_backward_reduce_out);
  SPLITKERN_BODY(library, "patch_batch_norm_backward_apply", patch_batch_norm_backward_apply);
  SPLITKERN_BODY(library, "patch_batch_norm_backward_apply.out", patch_batch_norm_backward_apply_out);
  SPLITKERN_BODY(library, "offload", offload);
  SPLITKERN_BODY(library, "offload.by", offload_by);
  SPLITKERN_BODY(library, "prefetch", prefetch);
  SPLITKERN_BODY(library, "prefetch.by", prefetch_by);
  SPLITKERN_BODY(library, "offload_compressed", offload_compressed);
  SPLITKERN_BODY(library, "prefetch_compressed", prefetch_compressed);
}
