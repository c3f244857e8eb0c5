// See arguments.h. Called at the head of every operator body, on the CPU and on CUDA alike; reads no element of any
// tensor and changes none.
#include "arguments.h"

#include <torch/csrc/stable/device.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>

namespace splitkern {

namespace {

constexpr int64_t kMaxPosition = (int64_t{1} << 31) - 1;

template <class List>
std::string show(const List& values) {
  std::ostringstream text;
  text << '[';
  bool first = true;
  for (const int64_t value : values) {
    if (!first) text << ", ";
    text << value;
    first = false;
  }
  text << ']';
  return text.str();
}

std::string show_shape(const Tensor& tensor) {
  IntList shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return show(shape);
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

const char* device_name(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : tensor.is_cuda() ? "cuda" : "other";
}

// --- Tensors ---------------------------------------------------------------------------------------------------------

void check_tensor(const char* operation, const char* argument, const Tensor& tensor, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.defined(), operation, ": ", argument, " must be a Tensor, got None");
  STD_TORCH_CHECK(tensor.dim() == dimensions, operation, ": ", argument, " must have ", dimensions,
                  " dimensions, got shape ", show_shape(tensor));
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  operation, ": ", argument, " must be of type float64, float32, float16, bfloat16, got ",
                  name_of(type));
}

void check_device(const char* operation, const char* argument, const Tensor& tensor, const Tensor& like,
                  const char* of) {
  STD_TORCH_CHECK(tensor.device() == like.device(), operation, ": ", argument, " must be on ", of, "'s device ",
                  device_name(like), ":", like.get_device_index(), ", got ", device_name(tensor), ":",
                  tensor.get_device_index());
}

void check_type(const char* operation, const char* argument, const Tensor& tensor, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, operation, ": ", argument, " must be of type ", name_of(type), ", got ",
                  name_of(tensor.scalar_type()));
}

void check_like(const char* operation, const char* argument, const Tensor& tensor, const Tensor& like, const char* of) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), operation, ": ", argument, " must have ", of, "'s type ",
                  name_of(like.scalar_type()), ", got ", name_of(tensor.scalar_type()));
  check_device(operation, argument, tensor, like, of);
}

template <class List>
void check_shape(const char* operation, const char* argument, const Tensor& tensor, const List& shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  STD_TORCH_CHECK(same, operation, ": ", argument, " must have shape ", show(shape), ", got ", show_shape(tensor));
}

// --- Integers --------------------------------------------------------------------------------------------------------

Pair parse_pair(const char* operation, const char* argument, const IntList& values) {
  STD_TORCH_CHECK(values.size() == 2, operation, ": ", argument, " must hold 2 values, got ", show(values));
  return {values[0], values[1]};
}

Pair parse_positive(const char* operation, const char* argument, const IntList& values) {
  const Pair pair = parse_pair(operation, argument, values);
  STD_TORCH_CHECK(pair[0] >= 1 && pair[1] >= 1, operation, ": ", argument, " must be at least 1, got ", show(values));
  return pair;
}

Sizes parse_sizes(const char* operation, const char* argument, const IntList& values) {
  STD_TORCH_CHECK(values.size() == 4, operation, ": ", argument, " must hold 4 values, got ", show(values));
  STD_TORCH_CHECK(std::all_of(values.begin(), values.end(), [](int64_t value) { return value >= 0; }), operation, ": ",
                  argument, " must not be negative, got ", show(values));
  return {values[0], values[1], values[2], values[3]};
}

bool parse_relu(const char* operation, StringArgument activation) {
  size_t length = 0;
  const char* characters = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(activation.handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(activation.handle, &characters));
  const std::string name(characters, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(activation.handle));
  STD_TORCH_CHECK(name == "none" || name == "relu", operation, ": activation must be 'none' or 'relu', got '", name,
                  "'");
  return name == "relu";
}

void check_bounds(const char* operation, const char* argument, const IntList& bounds, int64_t extent,
                  const char* what) {
  STD_TORCH_CHECK(bounds.size() >= 2, operation, ": ", argument, " must hold at least 2 boundaries, got ",
                  show(bounds));
  STD_TORCH_CHECK(bounds.front() == 0, operation, ": ", argument, " must begin at 0, got ", show(bounds));
  for (size_t i = 1; i < bounds.size(); ++i) {
    STD_TORCH_CHECK(bounds[i - 1] < bounds[i], operation, ": ", argument, " must increase strictly, got ",
                    show(bounds));
  }
  STD_TORCH_CHECK(bounds.back() == extent, operation, ": ", argument, " must end at the ", what, " ", extent, ", got ",
                  show(bounds));
}

// No position that a window can name leaves 31 bits, so that no arithmetic below overflows 64.
void check_positions(const char* operation, int axis, int64_t extent, int64_t outputs, const Window& window) {
  const int64_t stride = window.stride[axis];
  const int64_t padding = window.padding[axis];
  const int64_t dilation = window.dilation[axis];
  const int64_t kernel = window.kernel[axis];
  const auto magnitude = [](int64_t value) { return value < 0 ? -static_cast<double>(value) : double(value); };
  // Doubles do not overflow and are exact wherever the comparison is close.
  const double span = double(outputs - 1) * double(stride) + double(dilation) * double(kernel - 1) + 1;
  const double farthest = std::max(span, double(extent)) + magnitude(padding);
  STD_TORCH_CHECK(farthest <= double(kMaxPosition), operation, ": window positions along ", axis == 0 ? "rows" : "cols",
                  " must stay within ", kMaxPosition, ", got about ", farthest, " (stride ", stride, ", padding ",
                  padding, ", dilation ", dilation, ", kernel ", kernel, ", ", outputs, " outputs)");
}

// grad_output is null where the output extents are what out_rows and out_cols end at.
void check_axes(const char* operation, const Sizes& input_size, const Window& window, const Bounds& bounds,
                const Tensor* grad_output) {
  static constexpr const char* kInNames[] = {"in_rows", "in_cols"};
  static constexpr const char* kOutNames[] = {"out_rows", "out_cols"};
  static constexpr const char* kInExtents[] = {"input height", "input width"};
  static constexpr const char* kOutExtents[] = {"grad_output height", "grad_output width"};
  for (int axis = 0; axis < 2; ++axis) {
    const IntList& in = bounds.in(axis);
    const IntList& out = bounds.out(axis);
    STD_TORCH_CHECK(in.size() == out.size(), operation, ": ", kInNames[axis], " and ", kOutNames[axis],
                    " must have the same length, got ", show(in), " and ", show(out));
    check_bounds(operation, kInNames[axis], in, input_size[2 + axis], kInExtents[axis]);
    check_bounds(operation, kOutNames[axis], out, grad_output == nullptr ? out.back() : grad_output->size(2 + axis),
                 kOutExtents[axis]);
    check_positions(operation, axis, in.back(), out.back(), window);
  }
}

// --- Convolution -----------------------------------------------------------------------------------------------------

void check_channels(const char* operation, int64_t channels, const Sizes& weight_size, int64_t groups) {
  STD_TORCH_CHECK(groups >= 1, operation, ": groups must be an integer of at least 1, got ", groups);
  STD_TORCH_CHECK(channels % groups == 0, operation, ": groups must divide the input channels ", channels, ", got ",
                  groups);
  STD_TORCH_CHECK(weight_size[1] == channels / groups, operation, ": weight must have ", channels / groups,
                  " input channels per group (input channels ", channels, ", groups ", groups, "), got shape ",
                  show(weight_size));
  STD_TORCH_CHECK(weight_size[0] % groups == 0, operation, ": groups must divide the output channels ", weight_size[0],
                  ", got ", groups);
}

Window parse_conv_window(const char* operation, const Sizes& weight_size, const IntList& stride, const IntList& padding,
                         const IntList& dilation) {
  STD_TORCH_CHECK(weight_size[2] >= 1 && weight_size[3] >= 1, operation, ": kernel_size must be at least 1, got ",
                  show(Pair{weight_size[2], weight_size[3]}));
  return {{weight_size[2], weight_size[3]},
          parse_positive(operation, "stride", stride),
          parse_pair(operation, "padding", padding),
          parse_positive(operation, "dilation", dilation)};
}

ConvCall finish_conv(const char* operation, const Sizes& input_size, const Sizes& weight_size, const IntList& stride,
                     const IntList& padding, const IntList& dilation, int64_t groups, Bounds&& bounds,
                     const Tensor* grad_output) {
  check_channels(operation, input_size[1], weight_size, groups);
  const Window window = parse_conv_window(operation, weight_size, stride, padding, dilation);
  check_axes(operation, input_size, window, bounds, grad_output);
  const Sizes output_size = {input_size[0], weight_size[0], bounds.out_rows.back(), bounds.out_cols.back()};
  if (grad_output != nullptr) check_shape(operation, "grad_output", *grad_output, output_size);
  return {window, std::move(bounds), groups, false, input_size, weight_size, output_size};
}

// --- Pooling ---------------------------------------------------------------------------------------------------------

PoolCall finish_pool(const char* operation, const Sizes& input_size, const Window& window, Bounds&& bounds,
                     const Tensor* grad_output) {
  check_axes(operation, input_size, window, bounds, grad_output);
  const Sizes output_size = {input_size[0], input_size[1], bounds.out_rows.back(), bounds.out_cols.back()};
  if (grad_output != nullptr) check_shape(operation, "grad_output", *grad_output, output_size);
  return {window, std::move(bounds), false, 0, input_size, output_size};
}

Window parse_max_pool_window(const char* operation, const IntList& kernel_size, const IntList& stride,
                             const IntList& padding, const IntList& dilation) {
  const Pair kernel = parse_positive(operation, "kernel_size", kernel_size);
  STD_TORCH_CHECK(kernel[0] <= kMaxWindowPositions && kernel[1] <= kMaxWindowPositions &&
                      kernel[0] * kernel[1] <= kMaxWindowPositions,
                  operation, ": kernel_size must have at most ", kMaxWindowPositions, " positions, got ",
                  show(kernel_size));
  return {kernel, parse_positive(operation, "stride", stride), parse_pair(operation, "padding", padding),
          parse_positive(operation, "dilation", dilation)};
}

void check_offsets(const char* operation, const Tensor& offsets, const Tensor& like, const char* of,
                   const Sizes& size) {
  check_shape(operation, "offsets", offsets, size);
  check_type(operation, "offsets", offsets, ScalarType::Byte);
  check_device(operation, "offsets", offsets, like, of);
}

PoolCall finish_avg_pool(const char* operation, const Sizes& input_size, const IntList& kernel_size,
                         const IntList& stride, const IntList& padding, bool count_include_pad,
                         std::optional<int64_t> divisor_override, Bounds&& bounds, const Tensor* grad_output) {
  STD_TORCH_CHECK(divisor_override != 0, operation, ": divisor_override must not be 0, got 0");
  const Window window = {parse_positive(operation, "kernel_size", kernel_size),
                         parse_positive(operation, "stride", stride),
                         parse_pair(operation, "padding", padding),
                         {1, 1}};
  PoolCall call = finish_pool(operation, input_size, window, std::move(bounds), grad_output);
  call.count_include_pad = count_include_pad;
  call.divisor_override = divisor_override.value_or(0);
  return call;
}

// --- Batch norm ------------------------------------------------------------------------------------------------------

BatchNormCall describe_batch_norm(const char* operation, const Tensor& input, const IntList& rows, const IntList& cols,
                                  bool relu) {
  check_tensor(operation, "input", input, 4);
  check_bounds(operation, "rows", rows, input.size(2), "input height");
  check_bounds(operation, "cols", cols, input.size(3), "input width");
  return {{rows, cols, rows, cols},
          relu,
          input.size(1),
          input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float};
}

void check_parameter(const char* operation, const char* argument, const OptionalTensor& parameter,
                     const Tensor& input) {
  if (!parameter.has_value()) return;
  check_tensor(operation, argument, *parameter, 1);
  STD_TORCH_CHECK(parameter->scalar_type() == input.scalar_type() || parameter->scalar_type() == ScalarType::Float,
                  operation, ": ", argument, " must be of type ", name_of(input.scalar_type()), " or float32, got ",
                  name_of(parameter->scalar_type()));
  check_device(operation, argument, *parameter, input, "input");
  check_shape(operation, argument, *parameter, IntList{input.size(1)});
}

void check_statistics(const char* operation, const char* argument, const Tensor& tensor, const Tensor& input,
                      const BatchNormCall& call) {
  check_tensor(operation, argument, tensor, 2);
  check_type(operation, argument, tensor, call.statistics_type);
  check_device(operation, argument, tensor, input, "input");
  check_shape(operation, argument, tensor, call.statistics_size());
}

BatchNormCall check_normalised(const char* operation, const Tensor* grad_output, const Tensor& input,
                               const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
                               const OptionalTensor& bias, const IntList& rows, const IntList& cols, bool relu) {
  BatchNormCall call = describe_batch_norm(operation, input, rows, cols, relu);
  if (grad_output != nullptr) {
    check_tensor(operation, "grad_output", *grad_output, 4);
    check_like(operation, "grad_output", *grad_output, input, "input");
    check_shape(operation, "grad_output", *grad_output, sizes_of(input));
  }
  check_statistics(operation, "mean", mean, input, call);
  check_statistics(operation, "invstd", invstd, input, call);
  check_parameter(operation, "weight", weight, input);
  check_parameter(operation, "bias", bias, input);
  return call;
}

}  // namespace

// --- Convolution -----------------------------------------------------------------------------------------------------

ConvCall check_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const IntList& stride,
                      const IntList& padding, const IntList& dilation, int64_t groups, Bounds bounds,
                      StringArgument activation) {
  const bool relu = parse_relu(kConv2d, activation);
  check_tensor(kConv2d, "input", input, 4);
  check_tensor(kConv2d, "weight", weight, 4);
  check_like(kConv2d, "weight", weight, input, "input");
  if (bias.has_value()) {
    check_tensor(kConv2d, "bias", *bias, 1);
    check_like(kConv2d, "bias", *bias, input, "input");
    check_shape(kConv2d, "bias", *bias, IntList{weight.size(0)});
  }
  ConvCall call = finish_conv(kConv2d, sizes_of(input), sizes_of(weight), stride, padding, dilation, groups,
                              std::move(bounds), nullptr);
  call.relu = relu;
  return call;
}

ConvCall check_conv2d_input_grad(const Tensor& grad_output, const Tensor& weight, const IntList& input_size,
                                 const IntList& stride, const IntList& padding, const IntList& dilation, int64_t groups,
                                 Bounds bounds) {
  check_tensor(kConv2dInputGrad, "grad_output", grad_output, 4);
  check_tensor(kConv2dInputGrad, "weight", weight, 4);
  check_like(kConv2dInputGrad, "weight", weight, grad_output, "grad_output");
  const Sizes input = parse_sizes(kConv2dInputGrad, "input_size", input_size);
  return finish_conv(kConv2dInputGrad, input, sizes_of(weight), stride, padding, dilation, groups, std::move(bounds),
                     &grad_output);
}

ConvCall check_conv2d_weight_grad(const Tensor& grad_output, const Tensor& input, const IntList& weight_size,
                                  const IntList& stride, const IntList& padding, const IntList& dilation,
                                  int64_t groups, Bounds bounds) {
  check_tensor(kConv2dWeightGrad, "grad_output", grad_output, 4);
  check_tensor(kConv2dWeightGrad, "input", input, 4);
  check_like(kConv2dWeightGrad, "input", input, grad_output, "grad_output");
  const Sizes weight = parse_sizes(kConv2dWeightGrad, "weight_size", weight_size);
  return finish_conv(kConv2dWeightGrad, sizes_of(input), weight, stride, padding, dilation, groups, std::move(bounds),
                     &grad_output);
}

// --- Pooling ---------------------------------------------------------------------------------------------------------

PoolCall check_max_pool2d(const Tensor& input, const IntList& kernel_size, const IntList& stride,
                          const IntList& padding, const IntList& dilation, Bounds bounds) {
  check_tensor(kMaxPool2d, "input", input, 4);
  const Window window = parse_max_pool_window(kMaxPool2d, kernel_size, stride, padding, dilation);
  return finish_pool(kMaxPool2d, sizes_of(input), window, std::move(bounds), nullptr);
}

PoolCall check_max_pool2d_backward(const Tensor& grad_output, const Tensor& offsets, const IntList& input_size,
                                   const IntList& kernel_size, const IntList& stride, const IntList& padding,
                                   const IntList& dilation, Bounds bounds) {
  check_tensor(kMaxPool2dBackward, "grad_output", grad_output, 4);
  const Sizes input = parse_sizes(kMaxPool2dBackward, "input_size", input_size);
  const Window window = parse_max_pool_window(kMaxPool2dBackward, kernel_size, stride, padding, dilation);
  PoolCall call = finish_pool(kMaxPool2dBackward, input, window, std::move(bounds), &grad_output);
  check_offsets(kMaxPool2dBackward, offsets, grad_output, "grad_output", call.output_size);
  return call;
}

PoolCall check_max_pool2d_gather(const Tensor& input, const Tensor& offsets, const IntList& kernel_size,
                                 const IntList& stride, const IntList& padding, const IntList& dilation,
                                 Bounds bounds) {
  check_tensor(kMaxPool2dGather, "input", input, 4);
  const Window window = parse_max_pool_window(kMaxPool2dGather, kernel_size, stride, padding, dilation);
  PoolCall call = finish_pool(kMaxPool2dGather, sizes_of(input), window, std::move(bounds), nullptr);
  check_offsets(kMaxPool2dGather, offsets, input, "input", call.output_size);
  return call;
}

PoolCall check_avg_pool2d(const Tensor& input, const IntList& kernel_size, const IntList& stride,
                          const IntList& padding, bool count_include_pad, std::optional<int64_t> divisor_override,
                          Bounds bounds) {
  check_tensor(kAvgPool2d, "input", input, 4);
  return finish_avg_pool(kAvgPool2d, sizes_of(input), kernel_size, stride, padding, count_include_pad, divisor_override,
                         std::move(bounds), nullptr);
}

PoolCall check_avg_pool2d_backward(const Tensor& grad_output, const IntList& input_size, const IntList& kernel_size,
                                   const IntList& stride, const IntList& padding, bool count_include_pad,
                                   std::optional<int64_t> divisor_override, Bounds bounds) {
  check_tensor(kAvgPool2dBackward, "grad_output", grad_output, 4);
  const Sizes input = parse_sizes(kAvgPool2dBackward, "input_size", input_size);
  return finish_avg_pool(kAvgPool2dBackward, input, kernel_size, stride, padding, count_include_pad, divisor_override,
                         std::move(bounds), &grad_output);
}

// --- Batch norm ------------------------------------------------------------------------------------------------------

BatchNormCall check_batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                               const IntList& rows, const IntList& cols, double eps, StringArgument activation) {
  const bool relu = parse_relu(kBatchNorm, activation);
  BatchNormCall call = describe_batch_norm(kBatchNorm, input, rows, cols, relu);
  check_parameter(kBatchNorm, "weight", weight, input);
  check_parameter(kBatchNorm, "bias", bias, input);
  STD_TORCH_CHECK(eps >= 0, kBatchNorm, ": eps must not be negative, got ", eps);
  return call;
}

BatchNormCall check_batch_norm_stats(const Tensor& input, const IntList& rows, const IntList& cols) {
  return describe_batch_norm(kBatchNormStats, input, rows, cols, false);
}

BatchNormCall check_batch_norm_apply(const Tensor& input, const Tensor& mean, const Tensor& invstd,
                                     const OptionalTensor& weight, const OptionalTensor& bias, const IntList& rows,
                                     const IntList& cols, StringArgument activation) {
  const bool relu = parse_relu(kBatchNormApply, activation);
  return check_normalised(kBatchNormApply, nullptr, input, mean, invstd, weight, bias, rows, cols, relu);
}

BatchNormCall check_batch_norm_backward_reduce(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                               const Tensor& invstd, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const IntList& rows, const IntList& cols,
                                               StringArgument activation) {
  const bool relu = parse_relu(kBatchNormBackwardReduce, activation);
  return check_normalised(kBatchNormBackwardReduce, &grad_output, input, mean, invstd, weight, bias, rows, cols, relu);
}

BatchNormCall check_batch_norm_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                              const Tensor& invstd, const OptionalTensor& weight,
                                              const OptionalTensor& bias, const OptionalTensor& sum_grad,
                                              const OptionalTensor& sum_grad_centered, const IntList& rows,
                                              const IntList& cols, StringArgument activation) {
  constexpr const char* kOperator = kBatchNormBackwardApply;
  const bool relu = parse_relu(kOperator, activation);
  BatchNormCall call = check_normalised(kOperator, &grad_output, input, mean, invstd, weight, bias, rows, cols, relu);
  STD_TORCH_CHECK(sum_grad.has_value() == sum_grad_centered.has_value(), kOperator,
                  ": sum_grad and sum_grad_centered must be given together or not at all, got only ",
                  sum_grad.has_value() ? "sum_grad" : "sum_grad_centered");
  if (sum_grad.has_value()) {
    check_statistics(kOperator, "sum_grad", *sum_grad, input, call);
    check_statistics(kOperator, "sum_grad_centered", *sum_grad_centered, input, call);
  }
  return call;
}

// --- Outputs ---------------------------------------------------------------------------------------------------------

namespace {

Tensor new_strided(const Tensor& like, const int64_t* size, const int64_t* strides, int64_t dimensions,
                   ScalarType type) {
  const auto shim = [](auto value) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(value)); };
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status = aoti_torch_empty_strided(dimensions, size, strides, shim(type),
                                                         shim(like.device().type()), like.get_device_index(), &handle);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "out of memory: torch could not allocate a tensor of size ",
                  show(IntList(size, size + dimensions)), " on ", device_name(like), "; its own message is on stderr");
  return Tensor(handle);
}

Tensor new_contiguous_strides(const Tensor& like, const Sizes& size, ScalarType type) {
  Sizes strides;
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(size[i], 1);
  }
  return new_strided(like, size.data(), strides.data(), 4, type);
}

}  // namespace

bool is_channels_last(const Tensor& tensor) {
  return tensor.stride(1) == 1 && !tensor.is_contiguous();
}

Tensor new_output(const Tensor& like, const Sizes& size) {
  return new_output(like, size, like.scalar_type());
}

Tensor new_output(const Tensor& like, const Sizes& size, ScalarType type) {
  if (!is_channels_last(like)) return new_contiguous_strides(like, size, type);
  const int64_t column = size[1];
  const int64_t row = column * size[3];
  const Sizes strides = {row * size[2], 1, row, column};
  return new_strided(like, size.data(), strides.data(), 4, type);
}

Tensor new_contiguous(const Tensor& like, const Sizes& size, ScalarType type) {
  return new_contiguous_strides(like, size, type);
}

Tensor new_flat(const Tensor& like, int64_t elements, ScalarType type) {
  const int64_t stride = 1;
  return new_strided(like, &elements, &stride, 1, type);
}

Tensor new_statistics(const Tensor& like, const BatchNormCall& call) {
  const Pair size = call.statistics_size();
  const Pair strides = {std::max<int64_t>(size[1], 1), 1};
  return new_strided(like, size.data(), strides.data(), 2, call.statistics_type);
}

void check_written(const char* operation, const char* argument, const Tensor& tensor) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) < 2 || tensor.stride(dim) != 0, operation, ": ", argument,
                    " must not hold one place several times, got stride 0 in dimension ", dim, " of extent ",
                    tensor.size(dim));
  }
}

void check_output(const char* operation, const char* argument, const Tensor& output, const Tensor& like,
                  const Sizes& size, ScalarType type) {
  check_shape(operation, argument, output, size);
  check_type(operation, argument, output, type);
  check_written(operation, argument, output);
  STD_TORCH_CHECK(output.device() == like.device(), operation, ": ", argument, " must be on the device of the inputs ",
                  device_name(like), ":", like.get_device_index(), ", got ", device_name(output), ":",
                  output.get_device_index());
}

void check_statistics_output(const char* operation, const char* argument, const Tensor& output, const Tensor& like,
                             const BatchNormCall& call) {
  check_statistics(operation, argument, output, like, call);
}

Sizes sizes_of(const Tensor& tensor) {
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
}

Sizes element_strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

}  // namespace splitkern
