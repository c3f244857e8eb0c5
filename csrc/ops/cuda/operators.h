// The CUDA bodies of the operators, as the dispatcher calls them (schemas in ops/schemas.h). Defined in
// conv.cpp, pool.cpp, batch_norm.cpp and copy.cpp, registered in register.cpp.
#pragma once

#include <optional>
#include <tuple>

#include "ops/arguments.h"

namespace splitkern::cuda {

Tensor patch_conv2d(const Tensor& input, const Tensor& weight, OptionalTensor bias, IntList stride, IntList padding,
                    IntList dilation, int64_t groups, IntList in_rows, IntList in_cols, IntList out_rows,
                    IntList out_cols, StringArgument activation);
void patch_conv2d_out(const Tensor& input, const Tensor& weight, OptionalTensor bias, IntList stride, IntList padding,
                      IntList dilation, int64_t groups, IntList in_rows, IntList in_cols, IntList out_rows,
                      IntList out_cols, StringArgument activation, const Tensor& output);
Tensor patch_conv2d_input_grad(const Tensor& grad_output, const Tensor& weight, IntList input_size, IntList stride,
                               IntList padding, IntList dilation, int64_t groups, IntList in_rows, IntList in_cols,
                               IntList out_rows, IntList out_cols);
void patch_conv2d_input_grad_out(const Tensor& grad_output, const Tensor& weight, IntList input_size, IntList stride,
                                 IntList padding, IntList dilation, int64_t groups, IntList in_rows, IntList in_cols,
                                 IntList out_rows, IntList out_cols, const Tensor& output);
Tensor patch_conv2d_weight_grad(const Tensor& grad_output, const Tensor& input, IntList weight_size, IntList stride,
                                IntList padding, IntList dilation, int64_t groups, IntList in_rows, IntList in_cols,
                                IntList out_rows, IntList out_cols);
void patch_conv2d_weight_grad_out(const Tensor& grad_output, const Tensor& input, IntList weight_size, IntList stride,
                                  IntList padding, IntList dilation, int64_t groups, IntList in_rows, IntList in_cols,
                                  IntList out_rows, IntList out_cols, bool accumulate, const Tensor& output);
std::tuple<Tensor, Tensor> patch_max_pool2d(const Tensor& input, IntList kernel_size, IntList stride, IntList padding,
                                            IntList dilation, IntList in_rows, IntList in_cols, IntList out_rows,
                                            IntList out_cols);
void patch_max_pool2d_out(const Tensor& input, IntList kernel_size, IntList stride, IntList padding, IntList dilation,
                          IntList in_rows, IntList in_cols, IntList out_rows, IntList out_cols, const Tensor& values,
                          const Tensor& offsets);
Tensor patch_max_pool2d_backward(const Tensor& grad_output, const Tensor& offsets, IntList input_size,
                                 IntList kernel_size, IntList stride, IntList padding, IntList dilation,
                                 IntList in_rows, IntList in_cols, IntList out_rows, IntList out_cols);
void patch_max_pool2d_backward_out(const Tensor& grad_output, const Tensor& offsets, IntList input_size,
                                   IntList kernel_size, IntList stride, IntList padding, IntList dilation,
                                   IntList in_rows, IntList in_cols, IntList out_rows, IntList out_cols,
                                   const Tensor& output);
Tensor patch_max_pool2d_gather(const Tensor& input, const Tensor& offsets, IntList kernel_size, IntList stride,
                               IntList padding, IntList dilation, IntList in_rows, IntList in_cols, IntList out_rows,
                               IntList out_cols);
void patch_max_pool2d_gather_out(const Tensor& input, const Tensor& offsets, IntList kernel_size, IntList stride,
                                 IntList padding, IntList dilation, IntList in_rows, IntList in_cols, IntList out_rows,
                                 IntList out_cols, const Tensor& output);
Tensor patch_avg_pool2d(const Tensor& input, IntList kernel_size, IntList stride, IntList padding,
                        bool count_include_pad, std::optional<int64_t> divisor_override, IntList in_rows,
                        IntList in_cols, IntList out_rows, IntList out_cols);
void patch_avg_pool2d_out(const Tensor& input, IntList kernel_size, IntList stride, IntList padding,
                          bool count_include_pad, std::optional<int64_t> divisor_override, IntList in_rows,
                          IntList in_cols, IntList out_rows, IntList out_cols, const Tensor& output);
Tensor patch_avg_pool2d_backward(const Tensor& grad_output, IntList input_size, IntList kernel_size, IntList stride,
                                 IntList padding, bool count_include_pad, std::optional<int64_t> divisor_override,
                                 IntList in_rows, IntList in_cols, IntList out_rows, IntList out_cols);
void patch_avg_pool2d_backward_out(const Tensor& grad_output, IntList input_size, IntList kernel_size, IntList stride,
                                   IntList padding, bool count_include_pad, std::optional<int64_t> divisor_override,
                                   IntList in_rows, IntList in_cols, IntList out_rows, IntList out_cols,
                                   const Tensor& output);
std::tuple<Tensor, Tensor, Tensor, Tensor> patch_batch_norm(const Tensor& input, OptionalTensor weight,
                                                            OptionalTensor bias, IntList rows, IntList cols, double eps,
                                                            StringArgument activation);
void patch_batch_norm_out(const Tensor& input, OptionalTensor weight, OptionalTensor bias, IntList rows, IntList cols,
                          double eps, StringArgument activation, const Tensor& output, const Tensor& mean,
                          const Tensor& invstd, const Tensor& m2);
std::tuple<Tensor, Tensor> patch_batch_norm_stats(const Tensor& input, IntList rows, IntList cols);
void patch_batch_norm_stats_out(const Tensor& input, IntList rows, IntList cols, const Tensor& mean, const Tensor& m2);
Tensor patch_batch_norm_apply(const Tensor& input, const Tensor& mean, const Tensor& invstd, OptionalTensor weight,
                              OptionalTensor bias, IntList rows, IntList cols, StringArgument activation);
void patch_batch_norm_apply_out(const Tensor& input, const Tensor& mean, const Tensor& invstd, OptionalTensor weight,
                                OptionalTensor bias, IntList rows, IntList cols, StringArgument activation,
                                const Tensor& output);
std::tuple<Tensor, Tensor> patch_batch_norm_backward_reduce(const Tensor& grad_output, const Tensor& input,
                                                            const Tensor& mean, const Tensor& invstd,
                                                            OptionalTensor weight, OptionalTensor bias, IntList rows,
                                                            IntList cols, StringArgument activation);
void patch_batch_norm_backward_reduce_out(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                          const Tensor& invstd, OptionalTensor weight, OptionalTensor bias,
                                          IntList rows, IntList cols, StringArgument activation, const Tensor& sum_grad,
                                          const Tensor& sum_grad_centered);
Tensor patch_batch_norm_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                       const Tensor& invstd, OptionalTensor weight, OptionalTensor bias,
                                       OptionalTensor sum_grad, OptionalTensor sum_grad_centered, IntList rows,
                                       IntList cols, StringArgument activation);
void patch_batch_norm_backward_apply_out(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                         const Tensor& invstd, OptionalTensor weight, OptionalTensor bias,
                                         OptionalTensor sum_grad, OptionalTensor sum_grad_centered, IntList rows,
                                         IntList cols, StringArgument activation, const Tensor& output);

void offload(const Tensor& src, const Tensor& dst);
void offload_by(const Tensor& src, const Tensor& dst, StringArgument by);
void prefetch(const Tensor& src, const Tensor& dst);
void prefetch_by(const Tensor& src, const Tensor& dst, StringArgument by);
void offload_compressed(const Tensor& src, const Tensor& dst);
void prefetch_compressed(const Tensor& src, const Tensor& dst);

}  // namespace splitkern::cuda
