// CPU bodies of the operators, as library.cpp registers them: one function per schema, arguments in its order.
// Defined in conv.cpp, max_pool.cpp, avg_pool.cpp, batch_norm.cpp and copy.cpp of this folder.
#pragma once

#include <tuple>

#include "ops/arguments.h"

namespace splitkern::cpu {

#define SPLITKERN_BOUNDS_PARAMETERS \
  const IntList &in_rows, const IntList &in_cols, const IntList &out_rows, const IntList &out_cols
#define SPLITKERN_WINDOW_PARAMETERS const IntList &stride, const IntList &padding, const IntList &dilation
#define SPLITKERN_CONV_PARAMETERS SPLITKERN_WINDOW_PARAMETERS, int64_t groups, SPLITKERN_BOUNDS_PARAMETERS
#define SPLITKERN_POOL_PARAMETERS const IntList &kernel_size, SPLITKERN_WINDOW_PARAMETERS, SPLITKERN_BOUNDS_PARAMETERS
#define SPLITKERN_AVG_POOL_PARAMETERS                                                                \
  const IntList &kernel_size, const IntList &stride, const IntList &padding, bool count_include_pad, \
      std::optional<int64_t> divisor_override, SPLITKERN_BOUNDS_PARAMETERS

Tensor patch_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, SPLITKERN_CONV_PARAMETERS,
                    StringArgument activation);
void patch_conv2d_out(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, SPLITKERN_CONV_PARAMETERS,
                      StringArgument activation, const Tensor& output);
Tensor patch_conv2d_input_grad(const Tensor& grad_output, const Tensor& weight, const IntList& input_size,
                               SPLITKERN_CONV_PARAMETERS);
void patch_conv2d_input_grad_out(const Tensor& grad_output, const Tensor& weight, const IntList& input_size,
                                 SPLITKERN_CONV_PARAMETERS, const Tensor& output);
Tensor patch_conv2d_weight_grad(const Tensor& grad_output, const Tensor& input, const IntList& weight_size,
                                SPLITKERN_CONV_PARAMETERS);
void patch_conv2d_weight_grad_out(const Tensor& grad_output, const Tensor& input, const IntList& weight_size,
                                  SPLITKERN_CONV_PARAMETERS, bool accumulate, const Tensor& output);

std::tuple<Tensor, Tensor> patch_max_pool2d(const Tensor& input, SPLITKERN_POOL_PARAMETERS);
void patch_max_pool2d_out(const Tensor& input, SPLITKERN_POOL_PARAMETERS, const Tensor& values, const Tensor& offsets);
Tensor patch_max_pool2d_backward(const Tensor& grad_output, const Tensor& offsets, const IntList& input_size,
                                 SPLITKERN_POOL_PARAMETERS);
void patch_max_pool2d_backward_out(const Tensor& grad_output, const Tensor& offsets, const IntList& input_size,
                                   SPLITKERN_POOL_PARAMETERS, const Tensor& output);
Tensor patch_max_pool2d_gather(const Tensor& input, const Tensor& offsets, SPLITKERN_POOL_PARAMETERS);
void patch_max_pool2d_gather_out(const Tensor& input, const Tensor& offsets, SPLITKERN_POOL_PARAMETERS,
                                 const Tensor& output);

Tensor patch_avg_pool2d(const Tensor& input, SPLITKERN_AVG_POOL_PARAMETERS);
void patch_avg_pool2d_out(const Tensor& input, SPLITKERN_AVG_POOL_PARAMETERS, const Tensor& output);
Tensor patch_avg_pool2d_backward(const Tensor& grad_output, const IntList& input_size, SPLITKERN_AVG_POOL_PARAMETERS);
void patch_avg_pool2d_backward_out(const Tensor& grad_output, const IntList& input_size, SPLITKERN_AVG_POOL_PARAMETERS,
                                   const Tensor& output);

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_batch_norm(const Tensor& input, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const IntList& rows,
                                                            const IntList& cols, double eps, StringArgument activation);
void patch_batch_norm_out(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                          const IntList& rows, const IntList& cols, double eps, StringArgument activation,
                          const Tensor& output, const Tensor& mean, const Tensor& invstd, const Tensor& m2);
std::tuple<Tensor, Tensor> patch_batch_norm_stats(const Tensor& input, const IntList& rows, const IntList& cols);
void patch_batch_norm_stats_out(const Tensor& input, const IntList& rows, const IntList& cols, const Tensor& mean,
                                const Tensor& m2);
Tensor patch_batch_norm_apply(const Tensor& input, const Tensor& mean, const Tensor& invstd,
                              const OptionalTensor& weight, const OptionalTensor& bias, const IntList& rows,
                              const IntList& cols, StringArgument activation);
void patch_batch_norm_apply_out(const Tensor& input, const Tensor& mean, const Tensor& invstd,
                                const OptionalTensor& weight, const OptionalTensor& bias, const IntList& rows,
                                const IntList& cols, StringArgument activation, const Tensor& output);
std::tuple<Tensor, Tensor> patch_batch_norm_backward_reduce(const Tensor& grad_output, const Tensor& input,
                                                            const Tensor& mean, const Tensor& invstd,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            const IntList& rows, const IntList& cols,
                                                            StringArgument activation);
void patch_batch_norm_backward_reduce_out(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                          const Tensor& invstd, const OptionalTensor& weight,
                                          const OptionalTensor& bias, const IntList& rows, const IntList& cols,
                                          StringArgument activation, const Tensor& sum_grad,
                                          const Tensor& sum_grad_centered);
Tensor patch_batch_norm_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                       const Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& sum_grad, const OptionalTensor& sum_grad_centered,
                                       const IntList& rows, const IntList& cols, StringArgument activation);
void patch_batch_norm_backward_apply_out(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                         const Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& sum_grad, const OptionalTensor& sum_grad_centered,
                                         const IntList& rows, const IntList& cols, StringArgument activation,
                                         const Tensor& output);

void offload(const Tensor& src, const Tensor& dst);
void offload_by(const Tensor& src, const Tensor& dst, StringArgument by);
void prefetch(const Tensor& src, const Tensor& dst);
void prefetch_by(const Tensor& src, const Tensor& dst, StringArgument by);
void offload_compressed(const Tensor& src, const Tensor& dst);
void prefetch_compressed(const Tensor& src, const Tensor& dst);

}  // namespace splitkern::cpu
