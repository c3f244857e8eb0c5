// CPU bodies of the convolution operators: ATen's own convolution, patch by patch. A patch is a view of its parent; it
// is copied only where its padding is not what ATen can express, or inside ATen. float16 computes in float32 and
// rounds once. Errors raised inside ATen lose their text, so everything is checked before.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <utility>

#include "ops/cpu/operators.h"

namespace splitkern::cpu {

namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::detail::from;
using torch::stable::detail::to;

// --- ATen ------------------------------------------------------------------------------------------------------------

template <size_t count>
void call_aten(const char* operation, const char* overload, std::array<StableIValue, count>& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(operation, overload, stack.data(), TORCH_TARGET_VERSION));
}

StableIValue from_pair(const Pair& pair) {
  return from(IntHeaderOnlyArrayRef(pair.data(), pair.size()));
}

Tensor aten_convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Pair& padding,
                        const ConvCall& call) {
  std::array<StableIValue, 9> stack = {from(input),        from(weight),
                                       from(bias),         from_pair(call.window.stride),
                                       from_pair(padding), from_pair(call.window.dilation),
                                       from(false),        from_pair({0, 0}),
                                       from(call.groups)};
  call_aten("aten::convolution", "", stack);
  return to<Tensor>(stack[0]);
}

enum class Gradient { kInput, kWeight };

Tensor aten_convolution_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                 const Pair& padding, const ConvCall& call, Gradient gradient) {
  const std::array<bool, 3> mask = {gradient == Gradient::kInput, gradient == Gradient::kWeight, false};
  std::array<StableIValue, 11> stack = {from(grad_output),
                                        from(input),
                                        from(weight),
                                        from(std::nullopt),
                                        from_pair(call.window.stride),
                                        from_pair(padding),
                                        from_pair(call.window.dilation),
                                        from(false),
                                        from_pair({0, 0}),
                                        from(call.groups),
                                        from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()))};
  call_aten("aten::convolution_backward", "", stack);
  // All three are owned here, the two that were not asked for undefined.
  std::array<Tensor, 3> gradients = {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  return gradients[gradient == Gradient::kInput ? 0 : 1];
}

void relu_(const Tensor& tensor) {
  std::array<StableIValue, 1> stack = {from(tensor)};
  call_aten("aten::relu_", "", stack);
  to<Tensor>(stack[0]);
}

void copy_to(const Tensor& destination, const Tensor& source) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(destination.get(), source.get(), 0));
}

void zero(const Tensor& tensor) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(tensor.get()));
}

Tensor cast(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// A view of the same storage, `offset` elements behind the tensor's first.
Tensor as_strided(const Tensor& tensor, const Sizes& size, const Sizes& strides, int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 4, size.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

// The box [row, row + rows) x [col, col + cols) as a view.
Tensor box(const Tensor& tensor, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  const Sizes size = sizes_of(tensor);
  if (rows == size[2] && cols == size[3]) return tensor;
  const Sizes strides = element_strides(tensor);
  return as_strided(tensor, {size[0], size[1], rows, cols}, strides, row * strides[2] + col * strides[3]);
}

// --- Memory formats --------------------------------------------------------------------------------------------------

Sizes format_strides(const Sizes& size, bool channels_last) {
  if (channels_last) return {size[1] * size[2] * size[3], 1, size[1] * size[3], size[1]};
  return {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1};
}

bool has_format(const Tensor& tensor, bool channels_last) {
  const Sizes size = sizes_of(tensor);
  const Sizes strides = element_strides(tensor);
  const Sizes wanted = format_strides(size, channels_last);
  for (int i = 0; i < 4; ++i) {
    if (size[i] != 1 && strides[i] != wanted[i]) return false;
  }
  return true;
}

// ATen guesses a tensor's format also from the strides of extents of 1, where both formats are the same memory. What
// counts as contiguous here gets the strides that say so; nothing is copied.
Tensor say_contiguous(const Tensor& tensor) {
  if (!tensor.is_contiguous()) return tensor;
  const Sizes size = sizes_of(tensor);
  const Sizes strides = format_strides(size, false);
  return element_strides(tensor) == strides ? tensor : as_strided(tensor, size, strides);
}

// ATen's result is channels_last as soon as input or weight is; the format of the input alone decides here.
Tensor weight_beside(const Tensor& weight, bool channels_last) {
  if (channels_last) return weight;
  return say_contiguous(torch::stable::contiguous(weight));
}

ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Half ? ScalarType::Float : type;
}

// --- Patches ---------------------------------------------------------------------------------------------------------

// What one axis of a patch reads, in coordinates of the call.
struct AxisPlan {
  bool sees_nothing;    // no window meets the patch
  int64_t begin;        // first input kept; what comes before in the patch is cropped
  int64_t length;       // inputs kept
  int64_t padding;      // begin padding
  int64_t end_padding;  // only where `copies`
  bool copies;          // the two paddings differ: the patch must be copied with both written out
  int64_t surplus;      // outputs that the symmetric padding adds at the end
  int64_t out_begin;
  int64_t outputs;
};

AxisPlan plan_axis(const ConvCall& call, int axis, size_t patch, bool surplus_allowed) {
  const int64_t stride = call.window.stride[axis];
  const int64_t effective = call.window.effective_kernel(axis);
  const int64_t in_begin = call.bounds.in(axis)[patch];
  const int64_t in_end = call.bounds.in(axis)[patch + 1];
  const int64_t out_begin = call.bounds.out(axis)[patch];
  const int64_t outputs = call.bounds.out(axis)[patch + 1] - out_begin;
  const int64_t first = out_begin * stride - call.window.padding[axis];
  const int64_t last = first + (outputs - 1) * stride + effective;

  AxisPlan plan{};
  plan.out_begin = out_begin;
  plan.outputs = outputs;
  plan.sees_nothing = last <= in_begin || first >= in_end;
  if (plan.sees_nothing) return plan;
  plan.begin = std::max(in_begin, first);
  plan.padding = plan.begin - first;
  plan.length = in_end - plan.begin;
  // oneDNN (in torch 2.11) reads out of bounds for windows that lie in the padding alone: those are copied.
  const bool padding_allowed = plan.padding < effective;
  const auto symmetric_outputs = [&] {
    const int64_t slack = plan.length + 2 * plan.padding - effective;
    return slack < 0 ? 0 : slack / stride + 1;
  };
  // Inputs that the last window does not reach are harmless where they make no further output.
  if (padding_allowed && symmetric_outputs() == outputs) return plan;
  plan.end_padding = last - in_end;
  if (plan.end_padding < 0) {
    plan.length += plan.end_padding;
    plan.end_padding = 0;
    if (padding_allowed && symmetric_outputs() == outputs) return plan;
  }
  plan.copies = !surplus_allowed || !padding_allowed || plan.end_padding > plan.padding;
  if (!plan.copies) plan.surplus = symmetric_outputs() - outputs;
  return plan;
}

struct PatchPlan {
  AxisPlan rows;
  AxisPlan cols;

  bool sees_nothing() const { return rows.sees_nothing || cols.sees_nothing; }
  bool copies() const { return rows.copies || cols.copies; }
  bool surplus() const { return rows.surplus != 0 || cols.surplus != 0; }
  // What ATen pads; an axis that is copied brings its zeros along.
  Pair padding() const { return {rows.copies ? 0 : rows.padding, cols.copies ? 0 : cols.padding}; }
  // Where the kept inputs begin in the copy, and its extents.
  Pair copy_begin() const { return {rows.copies ? rows.padding : 0, cols.copies ? cols.padding : 0}; }
  Sizes copy_size(const Sizes& input_size) const {
    return {input_size[0], input_size[1], copy_extent(rows), copy_extent(cols)};
  }
  Tensor output_box(const Tensor& output) const {
    return box(output, rows.out_begin, rows.outputs, cols.out_begin, cols.outputs);
  }
  Tensor input_box(const Tensor& input) const { return box(input, rows.begin, rows.length, cols.begin, cols.length); }

 private:
  static int64_t copy_extent(const AxisPlan& axis) {
    return axis.copies ? axis.padding + axis.length + axis.end_padding : axis.length;
  }
};

// Calls body(plan) for every patch, row-major: the order in which weight gradients add up.
template <class Body>
void for_each_patch(const ConvCall& call, bool surplus_allowed, const Body& body) {
  for (size_t i = 0; i + 1 < call.bounds.in_rows.size(); ++i) {
    const AxisPlan rows = plan_axis(call, 0, i, surplus_allowed);
    for (size_t j = 0; j + 1 < call.bounds.in_cols.size(); ++j) {
      body(PatchPlan{rows, plan_axis(call, 1, j, surplus_allowed)});
    }
  }
}

// The patch's inputs in the type to compute in, with its zeros where ATen cannot pad.
Tensor patch_input(const Tensor& input, const PatchPlan& plan, ScalarType type) {
  const Tensor view = plan.input_box(input);
  if (!plan.copies()) return cast(view, type);
  const Sizes size = sizes_of(view);
  const Tensor copy = new_output(input, plan.copy_size(size), type);
  zero(copy);
  const Pair begin = plan.copy_begin();
  copy_to(box(copy, begin[0], size[2], begin[1], size[3]), view);
  return copy;
}

// --- Forward ---------------------------------------------------------------------------------------------------------

Tensor convolve_patch(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const ConvCall& call,
                      const PatchPlan& plan) {
  const Tensor result =
      aten_convolution(patch_input(input, plan, weight.scalar_type()), weight, bias, plan.padding(), call);
  if (call.relu) relu_(result);
  return box(result, 0, plan.rows.outputs, 0, plan.cols.outputs);
}

// What a patch gives whose windows meet no input.
void fill_with_bias(const Tensor& output, const OptionalTensor& bias, bool relu) {
  if (!bias.has_value()) return zero(output);
  copy_to(output, as_strided(*bias, sizes_of(output), {0, bias->stride(0), 0, 0}));
  if (relu) relu_(output);
}

// Into `destination` where there is one, else into a new tensor, which for a single patch is ATen's result itself.
Tensor run_forward(const Tensor& given_input, const Tensor& given_weight, const OptionalTensor& given_bias,
                   const ConvCall& call, const OptionalTensor& destination) {
  const Tensor input = say_contiguous(given_input);
  const bool channels_last = is_channels_last(input);
  const bool no_inputs = call.input_size[1] == 0;
  const auto make_output = [&] { return destination.has_value() ? *destination : new_output(input, call.output_size); };
  if (call.output_size[0] * call.output_size[1] == 0) return make_output();

  const ScalarType type = compute_type(input.scalar_type());
  const Tensor weight = cast(weight_beside(given_weight, channels_last), type);
  OptionalTensor bias = given_bias;
  if (bias.has_value()) bias = cast(*bias, type);

  if (!destination.has_value() && call.bounds.patches() == 1 && type == input.scalar_type()) {
    const PatchPlan plan{plan_axis(call, 0, 0, true), plan_axis(call, 1, 0, true)};
    if (!no_inputs && !plan.sees_nothing() && !plan.surplus()) {
      const Tensor result = convolve_patch(input, weight, bias, call, plan);
      if (has_format(result, channels_last)) return result;
      const Tensor output = make_output();
      copy_to(output, result);
      return output;
    }
  }
  const Tensor output = make_output();
  for_each_patch(call, true, [&](const PatchPlan& plan) {
    const Tensor part = plan.output_box(output);
    if (no_inputs || plan.sees_nothing()) {
      fill_with_bias(part, given_bias, call.relu);
    } else {
      copy_to(part, convolve_patch(input, weight, bias, call, plan));
    }
  });
  return output;
}

// --- Input gradient --------------------------------------------------------------------------------------------------

// ATen asks for the forward's input and uses only its extents and format. The gradient's memory serves where it is
// large enough; a second large allocation per call costs up to half of a small convolution's time in page faults.
Tensor stand_in(const Tensor& gradient, const Sizes& size, bool channels_last) {
  const bool dense = has_format(gradient, false) || has_format(gradient, true);
  const Sizes strides = format_strides(size, channels_last);
  if (dense && gradient.numel() >= size[0] * size[1] * size[2] * size[3]) return as_strided(gradient, size, strides);
  return say_contiguous(new_output(gradient, size));
}

Tensor run_input_grad(const Tensor& given_grad_output, const Tensor& given_weight, const ConvCall& call,
                      const OptionalTensor& destination) {
  const Tensor grad_output = say_contiguous(given_grad_output);
  const bool channels_last = is_channels_last(grad_output);
  const auto make_output = [&] {
    return destination.has_value() ? *destination : new_output(grad_output, call.input_size);
  };
  if (call.input_size[0] * call.input_size[1] == 0) return make_output();
  if (call.output_size[1] == 0) {
    const Tensor output = make_output();
    zero(output);
    return output;
  }

  const ScalarType type = compute_type(grad_output.scalar_type());
  const Tensor weight = cast(weight_beside(given_weight, channels_last), type);
  const auto patch_gradient = [&](const PatchPlan& plan) {
    const Tensor gradient = cast(plan.output_box(grad_output), type);
    return aten_convolution_backward(gradient, stand_in(gradient, plan.copy_size(call.input_size), channels_last),
                                     weight, plan.padding(), call, Gradient::kInput);
  };
  const auto covers_patch = [](const AxisPlan& plan, const IntList& bounds, size_t patch) {
    return !plan.copies && plan.begin == bounds[patch] && plan.length == bounds[patch + 1] - bounds[patch];
  };

  if (!destination.has_value() && call.bounds.patches() == 1 && type == grad_output.scalar_type()) {
    const PatchPlan plan{plan_axis(call, 0, 0, false), plan_axis(call, 1, 0, false)};
    if (!plan.sees_nothing() && covers_patch(plan.rows, call.bounds.in_rows, 0) &&
        covers_patch(plan.cols, call.bounds.in_cols, 0)) {
      const Tensor result = patch_gradient(plan);
      if (has_format(result, channels_last)) return result;
      const Tensor output = make_output();
      copy_to(output, result);
      return output;
    }
  }
  const Tensor output = make_output();
  for (size_t i = 0; i + 1 < call.bounds.in_rows.size(); ++i) {
    for (size_t j = 0; j + 1 < call.bounds.in_cols.size(); ++j) {
      const PatchPlan plan{plan_axis(call, 0, i, false), plan_axis(call, 1, j, false)};
      if (plan.sees_nothing() || !covers_patch(plan.rows, call.bounds.in_rows, i) ||
          !covers_patch(plan.cols, call.bounds.in_cols, j)) {
        const int64_t row = call.bounds.in_rows[i];
        const int64_t col = call.bounds.in_cols[j];
        zero(box(output, row, call.bounds.in_rows[i + 1] - row, col, call.bounds.in_cols[j + 1] - col));
      }
      if (plan.sees_nothing()) continue;
      const Pair begin = plan.copy_begin();
      copy_to(plan.input_box(output),
              box(patch_gradient(plan), begin[0], plan.rows.length, begin[1], plan.cols.length));
    }
  }
  return output;
}

// --- Weight gradient -------------------------------------------------------------------------------------------------

template <class Element>
void add_elements(const Tensor& sum, const Tensor& term) {
  Element* const values = static_cast<Element*>(sum.mutable_data_ptr());
  const Element* const terms = static_cast<const Element*>(term.const_data_ptr());
  const int64_t count = sum.numel();
  for (int64_t i = 0; i < count; ++i) values[i] += terms[i];
}

// Both contiguous, of type float32 or float64.
void add_to(const Tensor& sum, const Tensor& term) {
  sum.scalar_type() == ScalarType::Double ? add_elements<double>(sum, term) : add_elements<float>(sum, term);
}

// A strided 1x1 window reads single inputs, of which oneDNN makes a copy. In torch 2.11 to 2.13 it leaves lanes of that
// copy unwritten where channels_last channels do not fill its vectors, and adds them in: ATen then gets those inputs
// alone, with stride 1.
bool onednn_adds_unwritten_lanes(const Tensor& input, const ConvCall& call) {
  constexpr int64_t kLargestVector = 16;
  const Pair stride = call.window.stride;
  return call.weight_size[2] == 1 && call.weight_size[3] == 1 && (stride[0] > 1 || stride[1] > 1) &&
         is_channels_last(input) && call.weight_size[1] % kLargestVector != 0;
}

struct Samples {
  int64_t out_begin;
  int64_t count;
  int64_t in_begin;

  static Samples of(const ConvCall& call, int axis, size_t patch) {
    const int64_t stride = call.window.stride[axis];
    const int64_t padding = call.window.padding[axis];
    const auto first_output_at = [&](int64_t position) {
      return position + padding <= 0 ? 0 : (position + padding + stride - 1) / stride;
    };
    const int64_t begin = std::max(call.bounds.out(axis)[patch], first_output_at(call.bounds.in(axis)[patch]));
    const int64_t end = std::min(call.bounds.out(axis)[patch + 1], first_output_at(call.bounds.in(axis)[patch + 1]));
    return {begin, std::max<int64_t>(end - begin, 0), begin * stride - padding};
  }
};

Tensor sampled_input(const Tensor& input, const Pair& stride, const Samples& rows, const Samples& cols) {
  const Sizes size = sizes_of(input);
  const Sizes strides = element_strides(input);
  return as_strided(input, {size[0], size[1], rows.count, cols.count},
                    {strides[0], strides[1], strides[2] * stride[0], strides[3] * stride[1]},
                    rows.in_begin * strides[2] + cols.in_begin * strides[3]);
}

// Adds the patches in row-major order in at least float32; `base`, where given, is added before rounding. The result is
// contiguous, or channels_last as ATen made it. `unused`, where given, is memory of the weight's size that is neither
// read nor written.
Tensor run_weight_grad(const Tensor& given_grad_output, const Tensor& given_input, const ConvCall& call,
                       const OptionalTensor& base, const OptionalTensor& unused) {
  const Tensor grad_output = say_contiguous(given_grad_output);
  const Tensor input = say_contiguous(given_input);
  const ScalarType given_type = grad_output.scalar_type();
  const ScalarType sum_type = given_type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  // A lone bfloat16 patch needs no sum in float32: ATen's own kernel accumulates and rounds once.
  const bool lone = call.bounds.patches() == 1 && !base.has_value();
  const ScalarType type = lone ? compute_type(given_type) : sum_type;

  OptionalTensor sum;
  if (base.has_value()) {
    sum = new_output(*base, call.weight_size, sum_type);  // its format, which ATen's terms have too
    copy_to(*sum, *base);
  }
  if (grad_output.numel() != 0 && input.numel() != 0 && call.weight_size[1] != 0) {
    // Of the format that ATen chooses for the images: otherwise it converts what it does not read.
    const bool is_like_images =
        unused.has_value() && unused->scalar_type() == type && has_format(*unused, is_channels_last(input));
    const Tensor unread = is_like_images ? *unused : new_output(input, call.weight_size, type);
    const auto add = [&](const Tensor& gradient, const Tensor& read, const Pair& padding, const ConvCall& of) {
      Tensor term = aten_convolution_backward(gradient, read, unread, padding, of, Gradient::kWeight);
      if (!has_format(term, false) && !has_format(term, true)) term = torch::stable::contiguous(term);
      if (sum.has_value()) {
        add_to(*sum, term);
      } else {
        sum = term;
      }
    };
    if (onednn_adds_unwritten_lanes(input, call)) {
      const Pair stride = call.window.stride;
      ConvCall of_samples = call;
      of_samples.window.stride = {1, 1};
      for (size_t i = 0; i + 1 < call.bounds.in_rows.size(); ++i) {
        const Samples rows = Samples::of(call, 0, i);
        for (size_t j = 0; j + 1 < call.bounds.in_cols.size(); ++j) {
          const Samples cols = Samples::of(call, 1, j);
          if (rows.count == 0 || cols.count == 0) continue;
          add(cast(box(grad_output, rows.out_begin, rows.count, cols.out_begin, cols.count), type),
              cast(sampled_input(input, stride, rows, cols), type), {0, 0}, of_samples);
        }
      }
    } else {
      for_each_patch(call, false, [&](const PatchPlan& plan) {
        if (plan.sees_nothing()) return;
        add(cast(plan.output_box(grad_output), type), patch_input(input, plan, type), plan.padding(), call);
      });
    }
  }
  if (!sum.has_value()) {
    sum = new_contiguous(grad_output, call.weight_size, given_type);
    zero(*sum);
  }
  return *sum;
}

}  // namespace

Tensor patch_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const IntList& stride,
                    const IntList& padding, const IntList& dilation, int64_t groups, const IntList& in_rows,
                    const IntList& in_cols, const IntList& out_rows, const IntList& out_cols,
                    StringArgument activation) {
  const ConvCall call = check_conv2d(input, weight, bias, stride, padding, dilation, groups,
                                     {in_rows, in_cols, out_rows, out_cols}, activation);
  return run_forward(input, weight, bias, call, std::nullopt);
}

void patch_conv2d_out(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const IntList& stride,
                      const IntList& padding, const IntList& dilation, int64_t groups, const IntList& in_rows,
                      const IntList& in_cols, const IntList& out_rows, const IntList& out_cols,
                      StringArgument activation, const Tensor& output) {
  const ConvCall call = check_conv2d(input, weight, bias, stride, padding, dilation, groups,
                                     {in_rows, in_cols, out_rows, out_cols}, activation);
  check_output(kConv2d, "output", output, input, call.output_size, input.scalar_type());
  run_forward(input, weight, bias, call, output);
}

Tensor patch_conv2d_input_grad(const Tensor& grad_output, const Tensor& weight, const IntList& input_size,
                               const IntList& stride, const IntList& padding, const IntList& dilation, int64_t groups,
                               const IntList& in_rows, const IntList& in_cols, const IntList& out_rows,
                               const IntList& out_cols) {
  const ConvCall call = check_conv2d_input_grad(grad_output, weight, input_size, stride, padding, dilation, groups,
                                                {in_rows, in_cols, out_rows, out_cols});
  return run_input_grad(grad_output, weight, call, std::nullopt);
}

void patch_conv2d_input_grad_out(const Tensor& grad_output, const Tensor& weight, const IntList& input_size,
                                 const IntList& stride, const IntList& padding, const IntList& dilation, int64_t groups,
                                 const IntList& in_rows, const IntList& in_cols, const IntList& out_rows,
                                 const IntList& out_cols, const Tensor& output) {
  const ConvCall call = check_conv2d_input_grad(grad_output, weight, input_size, stride, padding, dilation, groups,
                                                {in_rows, in_cols, out_rows, out_cols});
  check_output(kConv2dInputGrad, "output", output, grad_output, call.input_size, grad_output.scalar_type());
  run_input_grad(grad_output, weight, call, output);
}

Tensor patch_conv2d_weight_grad(const Tensor& grad_output, const Tensor& input, const IntList& weight_size,
                                const IntList& stride, const IntList& padding, const IntList& dilation, int64_t groups,
                                const IntList& in_rows, const IntList& in_cols, const IntList& out_rows,
                                const IntList& out_cols) {
  const ConvCall call = check_conv2d_weight_grad(grad_output, input, weight_size, stride, padding, dilation, groups,
                                                 {in_rows, in_cols, out_rows, out_cols});
  return torch::stable::contiguous(
      cast(run_weight_grad(grad_output, input, call, std::nullopt, std::nullopt), grad_output.scalar_type()));
}

void patch_conv2d_weight_grad_out(const Tensor& grad_output, const Tensor& input, const IntList& weight_size,
                                  const IntList& stride, const IntList& padding, const IntList& dilation,
                                  int64_t groups, const IntList& in_rows, const IntList& in_cols,
                                  const IntList& out_rows, const IntList& out_cols, bool accumulate,
                                  const Tensor& output) {
  const ConvCall call = check_conv2d_weight_grad(grad_output, input, weight_size, stride, padding, dilation, groups,
                                                 {in_rows, in_cols, out_rows, out_cols});
  check_output(kConv2dWeightGrad, "output", output, grad_output, call.weight_size, grad_output.scalar_type());
  const OptionalTensor base = accumulate ? OptionalTensor(output) : std::nullopt;
  copy_to(output, run_weight_grad(grad_output, input, call, base, output));
}

}  // namespace splitkern::cpu
