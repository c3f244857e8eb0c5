// What an operator does before it computes: check its arguments, describe the call in plain numbers, allocate.
// Shared by the CPU and the CUDA bodies, which receive arguments as the stable ABI hands them over. Every failed check
// throws with operator, argument, rule and what came. Python's twin is splitkern/ops/_common.py.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace splitkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntList = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;
using Pair = std::array<int64_t, 2>;   // rows, columns
using Sizes = std::array<int64_t, 4>;  // N, C, H, W; a convolution weight: O, C / groups, rows, columns

inline constexpr const char* kConv2d = "splitkern::patch_conv2d";
inline constexpr const char* kConv2dInputGrad = "splitkern::patch_conv2d_input_grad";
inline constexpr const char* kConv2dWeightGrad = "splitkern::patch_conv2d_weight_grad";
inline constexpr const char* kMaxPool2d = "splitkern::patch_max_pool2d";
inline constexpr const char* kMaxPool2dBackward = "splitkern::patch_max_pool2d_backward";
inline constexpr const char* kMaxPool2dGather = "splitkern::patch_max_pool2d_gather";
inline constexpr const char* kAvgPool2d = "splitkern::patch_avg_pool2d";
inline constexpr const char* kAvgPool2dBackward = "splitkern::patch_avg_pool2d_backward";
inline constexpr const char* kBatchNorm = "splitkern::patch_batch_norm";
inline constexpr const char* kBatchNormStats = "splitkern::patch_batch_norm_stats";
inline constexpr const char* kBatchNormApply = "splitkern::patch_batch_norm_apply";
inline constexpr const char* kBatchNormBackwardReduce = "splitkern::patch_batch_norm_backward_reduce";
inline constexpr const char* kBatchNormBackwardApply = "splitkern::patch_batch_norm_backward_apply";

inline constexpr int64_t kMaxWindowPositions = 255;  // offsets are uint8, and 255 says "none"
inline constexpr uint8_t kNoOffset = 255;

// A `str` argument. The ABI's own conversion to std::string never frees the string that it copies from, so operators
// take the handle, and the check_* functions read and free it.
struct StringArgument {
  StringHandle handle;
};

// Output o reads positions o * stride - padding + t * dilation, t = 0 .. kernel - 1, on each axis.
struct Window {
  Pair kernel;
  Pair stride;
  Pair padding;  // may be negative
  Pair dilation;

  int64_t effective_kernel(int axis) const { return dilation[axis] * (kernel[axis] - 1) + 1; }
};

// Patch (i, j) reads inputs [in_rows[i], in_rows[i + 1]) x [in_cols[j], in_cols[j + 1]) and writes the like box of
// out_rows, out_cols. Batch norm has one list per axis, held twice.
struct Bounds {
  IntList in_rows;
  IntList in_cols;
  IntList out_rows;
  IntList out_cols;

  const IntList& in(int axis) const { return axis == 0 ? in_rows : in_cols; }
  const IntList& out(int axis) const { return axis == 0 ? out_rows : out_cols; }
  int64_t row_patches() const { return static_cast<int64_t>(in_rows.size()) - 1; }
  int64_t col_patches() const { return static_cast<int64_t>(in_cols.size()) - 1; }
  int64_t patches() const { return row_patches() * col_patches(); }
};

struct ConvCall {
  Window window;
  Bounds bounds;
  int64_t groups;
  bool relu;  // forward only
  Sizes input_size;
  Sizes weight_size;
  Sizes output_size;
};

struct PoolCall {
  Window window;
  Bounds bounds;
  bool count_include_pad;    // average only
  int64_t divisor_override;  // average only; 0: none given
  Sizes input_size;
  Sizes output_size;
};

struct BatchNormCall {
  Bounds bounds;
  bool relu;
  int64_t channels;
  ScalarType statistics_type;  // float64 for float64, else float32

  Pair statistics_size() const { return {bounds.patches(), channels}; }
};

// --- Checks. `bounds` is moved into the result. ----------------------------------------------------------------------

ConvCall check_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const IntList& stride,
                      const IntList& padding, const IntList& dilation, int64_t groups, Bounds bounds,
                      StringArgument activation);
ConvCall check_conv2d_input_grad(const Tensor& grad_output, const Tensor& weight, const IntList& input_size,
                                 const IntList& stride, const IntList& padding, const IntList& dilation, int64_t groups,
                                 Bounds bounds);
ConvCall check_conv2d_weight_grad(const Tensor& grad_output, const Tensor& input, const IntList& weight_size,
                                  const IntList& stride, const IntList& padding, const IntList& dilation,
                                  int64_t groups, Bounds bounds);

PoolCall check_max_pool2d(const Tensor& input, const IntList& kernel_size, const IntList& stride,
                          const IntList& padding, const IntList& dilation, Bounds bounds);
PoolCall check_max_pool2d_backward(const Tensor& grad_output, const Tensor& offsets, const IntList& input_size,
                                   const IntList& kernel_size, const IntList& stride, const IntList& padding,
                                   const IntList& dilation, Bounds bounds);
PoolCall check_max_pool2d_gather(const Tensor& input, const Tensor& offsets, const IntList& kernel_size,
                                 const IntList& stride, const IntList& padding, const IntList& dilation, Bounds bounds);
PoolCall check_avg_pool2d(const Tensor& input, const IntList& kernel_size, const IntList& stride,
                          const IntList& padding, bool count_include_pad, std::optional<int64_t> divisor_override,
                          Bounds bounds);
PoolCall check_avg_pool2d_backward(const Tensor& grad_output, const IntList& input_size, const IntList& kernel_size,
                                   const IntList& stride, const IntList& padding, bool count_include_pad,
                                   std::optional<int64_t> divisor_override, Bounds bounds);

BatchNormCall check_batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                               const IntList& rows, const IntList& cols, double eps, StringArgument activation);
BatchNormCall check_batch_norm_stats(const Tensor& input, const IntList& rows, const IntList& cols);
BatchNormCall check_batch_norm_apply(const Tensor& input, const Tensor& mean, const Tensor& invstd,
                                     const OptionalTensor& weight, const OptionalTensor& bias, const IntList& rows,
                                     const IntList& cols, StringArgument activation);
BatchNormCall check_batch_norm_backward_reduce(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                               const Tensor& invstd, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const IntList& rows, const IntList& cols,
                                               StringArgument activation);
BatchNormCall check_batch_norm_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                              const Tensor& invstd, const OptionalTensor& weight,
                                              const OptionalTensor& bias, const OptionalTensor& sum_grad,
                                              const OptionalTensor& sum_grad_centered, const IntList& rows,
                                              const IntList& cols, StringArgument activation);

// --- Outputs ---------------------------------------------------------------------------------------------------------

// The memory format that outputs take over: channel stride 1 and not plainly contiguous.
bool is_channels_last(const Tensor& tensor);

// Uninitialised, on `like`'s device, in its memory format and, unless another is named, of its type.
Tensor new_output(const Tensor& like, const Sizes& size);
Tensor new_output(const Tensor& like, const Sizes& size, ScalarType type);

// Uninitialised and contiguous, on `like`'s device.
Tensor new_contiguous(const Tensor& like, const Sizes& size, ScalarType type);
Tensor new_flat(const Tensor& like, int64_t elements, ScalarType type);
Tensor new_statistics(const Tensor& like, const BatchNormCall& call);

// Writing one place several times would leave what the order of the writes decides.
void check_written(const char* operation, const char* argument, const Tensor& tensor);

// A tensor given to write to has this shape and type and lies on `like`'s device; any strides.
void check_output(const char* operation, const char* argument, const Tensor& output, const Tensor& like,
                  const Sizes& size, ScalarType type);
void check_statistics_output(const char* operation, const char* argument, const Tensor& output, const Tensor& like,
                             const BatchNormCall& call);

Sizes sizes_of(const Tensor& tensor);         // of 4 dimensions
Sizes element_strides(const Tensor& tensor);  // of 4 dimensions

}  // namespace splitkern
