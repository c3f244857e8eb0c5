// The schemas of every operator, apart from the namespace: library.cpp defines them as splitkern::*, the test library
// that runs the CUDA kernels on the CPU defines them again under a namespace of its own.
// Defaults live in the Python wrappers, not here.
#pragma once

#include <torch/csrc/stable/library.h>

namespace splitkern {

#define SPLITKERN_WINDOW "SymInt[] stride, SymInt[] padding, SymInt[] dilation"
#define SPLITKERN_BOUNDS "SymInt[] in_rows, SymInt[] in_cols, SymInt[] out_rows, SymInt[] out_cols"
#define SPLITKERN_CONV SPLITKERN_WINDOW ", SymInt groups, " SPLITKERN_BOUNDS
#define SPLITKERN_FORWARD "Tensor input, Tensor weight, Tensor? bias, " SPLITKERN_CONV ", str activation"
#define SPLITKERN_INPUT_GRAD "Tensor grad_output, Tensor weight, SymInt[] input_size, " SPLITKERN_CONV
#define SPLITKERN_WEIGHT_GRAD "Tensor grad_output, Tensor input, SymInt[] weight_size, " SPLITKERN_CONV
#define SPLITKERN_POOL "SymInt[] kernel_size, " SPLITKERN_WINDOW ", " SPLITKERN_BOUNDS
#define SPLITKERN_AVG_POOL                                                                    \
  "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, bool count_include_pad, SymInt? " \
  "divisor_override, " SPLITKERN_BOUNDS
#define SPLITKERN_NORM "Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, "
#define SPLITKERN_PATCHES "SymInt[] rows, SymInt[] cols"

inline void define_schemas(torch::stable::detail::StableLibrary& library) {
  library.def("patch_conv2d(" SPLITKERN_FORWARD ") -> Tensor");
  library.def("patch_conv2d.out(" SPLITKERN_FORWARD ", *, Tensor(a!) output) -> ()");
  library.def("patch_conv2d_input_grad(" SPLITKERN_INPUT_GRAD ") -> Tensor");
  library.def("patch_conv2d_input_grad.out(" SPLITKERN_INPUT_GRAD ", *, Tensor(a!) output) -> ()");
  library.def("patch_conv2d_weight_grad(" SPLITKERN_WEIGHT_GRAD ") -> Tensor");
  library.def("patch_conv2d_weight_grad.out(" SPLITKERN_WEIGHT_GRAD ", bool accumulate, *, Tensor(a!) output) -> ()");

  library.def("patch_max_pool2d(Tensor input, " SPLITKERN_POOL ") -> (Tensor values, Tensor offsets)");
  library.def("patch_max_pool2d.out(Tensor input, " SPLITKERN_POOL ", *, Tensor(a!) values, Tensor(b!) offsets) -> ()");
  library.def("patch_max_pool2d_backward(Tensor grad_output, Tensor offsets, SymInt[] input_size, " SPLITKERN_POOL
              ") -> Tensor");
  library.def("patch_max_pool2d_backward.out(Tensor grad_output, Tensor offsets, SymInt[] input_size, " SPLITKERN_POOL
              ", *, Tensor(a!) output) -> ()");
  library.def("patch_max_pool2d_gather(Tensor input, Tensor offsets, " SPLITKERN_POOL ") -> Tensor");
  library.def("patch_max_pool2d_gather.out(Tensor input, Tensor offsets, " SPLITKERN_POOL
              ", *, Tensor(a!) output) -> ()");

  library.def("patch_avg_pool2d(Tensor input, " SPLITKERN_AVG_POOL ") -> Tensor");
  library.def("patch_avg_pool2d.out(Tensor input, " SPLITKERN_AVG_POOL ", *, Tensor(a!) output) -> ()");
  library.def("patch_avg_pool2d_backward(Tensor grad_output, SymInt[] input_size, " SPLITKERN_AVG_POOL ") -> Tensor");
  library.def("patch_avg_pool2d_backward.out(Tensor grad_output, SymInt[] input_size, " SPLITKERN_AVG_POOL
              ", *, Tensor(a!) output) -> ()");

  library.def("patch_batch_norm(Tensor input, Tensor? weight, Tensor? bias, " SPLITKERN_PATCHES
              ", float eps, str activation) -> (Tensor output, Tensor mean, Tensor invstd, Tensor m2)");
  library.def("patch_batch_norm.out(Tensor input, Tensor? weight, Tensor? bias, " SPLITKERN_PATCHES
              ", float eps, str activation, *, Tensor(a!) output, Tensor(b!) mean, Tensor(c!) invstd, Tensor(d!) m2) "
              "-> ()");
  library.def("patch_batch_norm_stats(Tensor input, " SPLITKERN_PATCHES ") -> (Tensor mean, Tensor m2)");
  library.def("patch_batch_norm_stats.out(Tensor input, " SPLITKERN_PATCHES
              ", *, Tensor(a!) mean, Tensor(b!) m2) -> ()");
  library.def("patch_batch_norm_apply(Tensor input, " SPLITKERN_NORM SPLITKERN_PATCHES ", str activation) -> Tensor");
  library.def("patch_batch_norm_apply.out(Tensor input, " SPLITKERN_NORM SPLITKERN_PATCHES
              ", str activation, *, Tensor(a!) output) -> ()");
  library.def("patch_batch_norm_backward_reduce(Tensor grad_output, Tensor input, " SPLITKERN_NORM SPLITKERN_PATCHES
              ", str activation) -> (Tensor sum_grad, Tensor sum_grad_centered)");
  library.def("patch_batch_norm_backward_reduce.out(Tensor grad_output, Tensor input, " SPLITKERN_NORM SPLITKERN_PATCHES
              ", str activation, *, Tensor(a!) sum_grad, Tensor(b!) sum_grad_centered) -> ()");
  library.def("patch_batch_norm_backward_apply(Tensor grad_output, Tensor input, " SPLITKERN_NORM
              "Tensor? sum_grad, Tensor? sum_grad_centered, " SPLITKERN_PATCHES ", str activation) -> Tensor");
  library.def("patch_batch_norm_backward_apply.out(Tensor grad_output, Tensor input, " SPLITKERN_NORM
              "Tensor? sum_grad, Tensor? sum_grad_centered, " SPLITKERN_PATCHES
              ", str activation, *, Tensor(a!) output) -> ()");

  // `by` forces what the call is made of: "auto", "engine" or "kernel".
  library.def("offload(Tensor src, Tensor(a!) dst) -> ()");
  library.def("offload.by(Tensor src, Tensor(a!) dst, *, str by) -> ()");
  library.def("prefetch(Tensor src, Tensor(a!) dst) -> ()");
  library.def("prefetch.by(Tensor src, Tensor(a!) dst, *, str by) -> ()");
  library.def("offload_compressed(Tensor src, Tensor(a!) dst) -> ()");
  library.def("prefetch_compressed(Tensor src, Tensor(a!) dst) -> ()");
}

#undef SPLITKERN_WINDOW
#undef SPLITKERN_BOUNDS
#undef SPLITKERN_CONV
#undef SPLITKERN_FORWARD
#undef SPLITKERN_INPUT_GRAD
#undef SPLITKERN_WEIGHT_GRAD
#undef SPLITKERN_POOL
#undef SPLITKERN_AVG_POOL
#undef SPLITKERN_NORM
#undef SPLITKERN_PATCHES

}  // namespace splitkern
