// CPU bodies of the batch norm operators: check, allocate, describe, compute. Registered by library.cpp.
// A call walks contiguous runs: rows of a plane where columns are neighbours, pixels where channels are. Sums are
// accumulated in double, in an order that does not depend on the number of threads.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "batch_norm_runs.h"
#include "operators.h"

namespace splitkern::cpu {

namespace {

// Pixel rows that one partial sum of a channels-last reduction covers: fixed, so that results do not depend on threads.
constexpr int64_t kRowsPerPartial = 8;
constexpr int64_t kGrainElements = 1 << 14;

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class F>
void parallel(int64_t count, int64_t elements_each, const F& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_each));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

struct Box {
  int64_t top, bottom, left, right;

  int64_t rows() const { return bottom - top; }
  int64_t columns() const { return right - left; }
};

Box box_of(const Bounds& bounds, int64_t patch) {
  const int64_t i = patch / bounds.col_patches(), j = patch % bounds.col_patches();
  return {bounds.in_rows[i], bounds.in_rows[i + 1], bounds.in_cols[j], bounds.in_cols[j + 1]};
}

// A tensor of 4 dimensions as its data and element strides.
template <class T>
struct View {
  T* data = nullptr;
  Sizes strides = {};

  View() = default;
  explicit View(const Tensor& tensor)
      : data(static_cast<T*>(tensor.data_ptr())), strides(element_strides(tensor)) {}

  T* at(int64_t n, int64_t c, int64_t row, int64_t column) const {
    return data + n * strides[0] + c * strides[1] + row * strides[2] + column * strides[3];
  }
};

// Reads a run as accumulators: in place where type and stride allow it, else into `buffer`.
template <class T, class A>
const A* load(const T* from, int64_t stride, int64_t count, std::vector<A>& buffer) {
  if constexpr (std::is_same_v<T, A>) {
    if (stride == 1) return from;
  }
  buffer.resize(count);
  for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<A>(from[i * stride]);
  return buffer.data();
}

// Where a run's results go: the tensor itself where type and stride allow it, else `buffer`, from which store() copies.
template <class T, class A>
A* target(T* to, int64_t stride, int64_t count, std::vector<A>& buffer) {
  if constexpr (std::is_same_v<T, A>) {
    if (stride == 1) return to;
  }
  buffer.resize(count);
  return buffer.data();
}

template <class T, class A>
void store(T* to, int64_t stride, int64_t count, const A* from) {
  if constexpr (std::is_same_v<T, A>) {
    if (from == to) return;
  }
  for (int64_t i = 0; i < count; ++i) to[i * stride] = static_cast<T>(from[i]);
}

// Statistics [P, C] and parameters [C] as contiguous accumulators.
template <class A>
std::vector<A> read_statistic(const Tensor& tensor) {
  const int64_t patches = tensor.size(0), channels = tensor.size(1);
  std::vector<A> values(patches * channels);
  const A* data = static_cast<const A*>(tensor.const_data_ptr());
  for (int64_t p = 0; p < patches; ++p) {
    for (int64_t c = 0; c < channels; ++c) values[p * channels + c] = data[p * tensor.stride(0) + c * tensor.stride(1)];
  }
  return values;
}

template <class A>
void write_statistic(const std::vector<A>& values, const Tensor& tensor) {
  const int64_t patches = tensor.size(0), channels = tensor.size(1);
  A* data = static_cast<A*>(tensor.data_ptr());
  for (int64_t p = 0; p < patches; ++p) {
    for (int64_t c = 0; c < channels; ++c) data[p * tensor.stride(0) + c * tensor.stride(1)] = values[p * channels + c];
  }
}

template <class A, class T>
void read_parameter_as(const Tensor& tensor, std::vector<A>& values) {
  const T* data = static_cast<const T*>(tensor.const_data_ptr());
  for (size_t c = 0; c < values.size(); ++c) values[c] = static_cast<A>(data[static_cast<int64_t>(c) * tensor.stride(0)]);
}

template <class A>
std::vector<A> read_parameter(const OptionalTensor& tensor, int64_t channels, A otherwise) {
  std::vector<A> values(channels, otherwise);
  if (!tensor.has_value()) return values;
  switch (tensor->scalar_type()) {
    case ScalarType::Double:
      read_parameter_as<A, double>(*tensor, values);
      break;
    case ScalarType::Float:
      read_parameter_as<A, float>(*tensor, values);
      break;
    case ScalarType::Half:
      read_parameter_as<A, torch::headeronly::Half>(*tensor, values);
      break;
    default:  // the checks let nothing else through
      read_parameter_as<A, torch::headeronly::BFloat16>(*tensor, values);
  }
  return values;
}

// y = (x - mean) * scale + bias of every patch and channel, and the coefficients of the input gradient.
template <class A>
struct Affine {
  int64_t channels;
  bool relu;
  std::vector<A> mean, scale, bias, a, b, c;

  Affine(const BatchNormCall& call, const Tensor& mean_tensor, const Tensor& invstd, const OptionalTensor& weight,
         const OptionalTensor& bias_tensor)
      : channels(call.channels),
        relu(call.relu),
        mean(read_statistic<A>(mean_tensor)),
        scale(read_statistic<A>(invstd)),
        bias(read_parameter<A>(bias_tensor, call.channels, A(0))) {
    const std::vector<A> weights = read_parameter<A>(weight, channels, A(1));
    for (size_t i = 0; i < scale.size(); ++i) scale[i] *= weights[i % channels];
  }

  // dx = w·invstd·(g' - sum_grad/n - (x - mean)·invstd²·sum_grad_centered/n); without sums only the first term.
  void add_gradient(const BatchNormCall& call, const Sizes& size, const Tensor& invstd_tensor,
                    const OptionalTensor& sum_grad, const OptionalTensor& sum_grad_centered) {
    a = scale;
    b.assign(scale.size(), A(0));
    c.assign(scale.size(), A(0));
    if (!sum_grad.has_value()) return;
    const std::vector<A> invstd = read_statistic<A>(invstd_tensor);
    const std::vector<A> sums = read_statistic<A>(*sum_grad), centered = read_statistic<A>(*sum_grad_centered);
    for (int64_t p = 0; p < call.bounds.patches(); ++p) {
      const Box box = box_of(call.bounds, p);
      const double count = static_cast<double>(size[0] * box.rows() * box.columns());
      for (int64_t i = p * channels; i < (p + 1) * channels; ++i) {
        const double factor = static_cast<double>(scale[i]), inverse = static_cast<double>(invstd[i]);
        b[i] = static_cast<A>(-factor * inverse * inverse * static_cast<double>(centered[i]) / count);
        c[i] = static_cast<A>(-factor * static_cast<double>(sums[i]) / count);
      }
    }
  }

  Coefficients<A> at(int64_t patch, int64_t channel) const {
    const int64_t i = patch * channels + channel;
    return {&mean[i],     &scale[i], &bias[channel], a.empty() ? nullptr : &a[i], b.empty() ? nullptr : &b[i],
            c.empty() ? nullptr : &c[i], relu};
  }
};

// Whether neighbouring channels are neighbours in memory in all of a call's tensors.
bool by_pixel(const Sizes& size, std::initializer_list<const Tensor*> tensors) {
  return size[1] > 1 && std::all_of(tensors.begin(), tensors.end(), [](const Tensor* t) { return t->stride(1) == 1; });
}

// Calls body(partial, n, row, box) for the pixel rows of every patch, one partial sum per kRowsPerPartial of them, and
// merge(patch, partial sums of it) in order afterwards. A partial sum holds 2 * channels doubles.
template <class Body, class Merge>
void reduce_pixel_rows(const Bounds& bounds, const Sizes& size, const Body& body, const Merge& merge) {
  const int64_t channels = size[1];
  for (int64_t patch = 0; patch < bounds.patches(); ++patch) {
    const Box box = box_of(bounds, patch);
    const int64_t rows = size[0] * box.rows();
    const int64_t partials = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
    std::vector<double> sums(partials * 2 * channels, 0.0);
    parallel(partials, kRowsPerPartial * box.columns() * channels, [&](int64_t partial) {
      const int64_t last = std::min(rows, (partial + 1) * kRowsPerPartial);
      for (int64_t i = partial * kRowsPerPartial; i < last; ++i) {
        body(patch, &sums[partial * 2 * channels], i / box.rows(), box.top + i % box.rows(), box);
      }
    });
    std::vector<double> total(2 * channels, 0.0);
    for (int64_t partial = 0; partial < partials; ++partial) {
      for (int64_t i = 0; i < 2 * channels; ++i) total[i] += sums[partial * 2 * channels + i];
    }
    merge(patch, total.data(), total.data() + channels);
  }
}

template <class T>
void compute_stats(const Tensor& input, const BatchNormCall& call, const Tensor& mean, const Tensor& m2) {
  using A = Accumulator<T>;
  const Sizes size = sizes_of(input);
  const int64_t channels = call.channels, patches = call.bounds.patches();
  const View<T> x(input);
  std::vector<A> means(patches * channels, A(0)), m2s(patches * channels, A(0));
  const auto finish = [&](int64_t patch, int64_t channel, A shift, double first, double second) {
    const Box box = box_of(call.bounds, patch);
    const double count = static_cast<double>(size[0] * box.rows() * box.columns());
    means[patch * channels + channel] = static_cast<A>(static_cast<double>(shift) + first / count);
    const double squares = second - first * first / count;
    m2s[patch * channels + channel] = static_cast<A>(squares < 0 ? 0.0 : squares);
  };
  // The shift, the first value, keeps the sums of squares free of cancellation where the mean is large.
  const auto shift_of = [&](const Box& box, int64_t c) { return static_cast<A>(*x.at(0, c, box.top, box.left)); };
  if (size[0] == 0) {
    // Nothing to sum.
  } else if (by_pixel(size, {&input})) {
    std::vector<A> shifts(patches * channels);
    for (int64_t i = 0; i < patches * channels; ++i) {
      shifts[i] = shift_of(box_of(call.bounds, i / channels), i % channels);
    }
    reduce_pixel_rows(
        call.bounds, size,
        [&](int64_t patch, double* sums, int64_t n, int64_t row, const Box& box) {
          std::vector<A> buffer;
          for (int64_t column = box.left; column < box.right; ++column) {
            const A* pixel = load(x.at(n, 0, row, column), 1, channels, buffer);
            pixel_stats(pixel, channels, &shifts[patch * channels], sums, sums + channels);
          }
        },
        [&](int64_t patch, const double* first, const double* second) {
          for (int64_t c = 0; c < channels; ++c) finish(patch, c, shifts[patch * channels + c], first[c], second[c]);
        });
  } else {
    parallel(patches * channels, input.numel() / (patches * channels), [&](int64_t i) {
      const int64_t patch = i / channels, c = i % channels;
      const Box box = box_of(call.bounds, patch);
      const A shift = shift_of(box, c);
      std::vector<A> buffer;
      Lanes sums;
      for (int64_t n = 0; n < size[0]; ++n) {
        for (int64_t row = box.top; row < box.bottom; ++row) {
          const A* run = load(x.at(n, c, row, box.left), x.strides[3], box.columns(), buffer);
          plane_stats(run, box.columns(), shift, sums);
        }
      }
      double first = 0, second = 0;
      for (int lane = 0; lane < Lanes::kCount; ++lane) first += sums.first[lane], second += sums.second[lane];
      finish(patch, c, shift, first, second);
    });
  }
  write_statistic(means, mean);
  write_statistic(m2s, m2);
}

template <class T>
void compute_apply(const Tensor& input, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
                   const OptionalTensor& bias, const BatchNormCall& call, const Tensor& output) {
  using A = Accumulator<T>;
  const Sizes size = sizes_of(input);
  const Affine<A> affine(call, mean, invstd, weight, bias);
  const View<T> x(input), y(output);
  const int64_t channels = call.channels;
  const bool pixels = by_pixel(size, {&input, &output});
  const int64_t inner = pixels ? 1 : channels;
  for (int64_t patch = 0; patch < call.bounds.patches(); ++patch) {
    const Box box = box_of(call.bounds, patch);
    parallel(size[0] * inner * box.rows(), box.columns() * channels / inner, [&](int64_t i) {
      const int64_t row = box.top + i % box.rows(), c = i / box.rows() % inner, n = i / box.rows() / inner;
      const Coefficients<A> k = affine.at(patch, c);
      std::vector<A> in, out;
      if (pixels) {
        for (int64_t column = box.left; column < box.right; ++column) {
          T* to = y.at(n, 0, row, column);
          A* results = target(to, 1, channels, out);
          pixel_apply(load(x.at(n, 0, row, column), 1, channels, in), results, channels, k);
          store(to, 1, channels, results);
        }
        return;
      }
      T* to = y.at(n, c, row, box.left);
      A* results = target(to, y.strides[3], box.columns(), out);
      plane_apply(load(x.at(n, c, row, box.left), x.strides[3], box.columns(), in), results, box.columns(), k);
      store(to, y.strides[3], box.columns(), results);
    });
  }
}

template <class T>
void compute_backward_reduce(const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& invstd,
                             const OptionalTensor& weight, const OptionalTensor& bias, const BatchNormCall& call,
                             const Tensor& sum_grad, const Tensor& sum_grad_centered) {
  using A = Accumulator<T>;
  const Sizes size = sizes_of(input);
  const Affine<A> affine(call, mean, invstd, weight, bias);
  const View<T> g(grad_output), x(input);
  const int64_t channels = call.channels, patches = call.bounds.patches();
  std::vector<A> sums(patches * channels, A(0)), centered(patches * channels, A(0));
  if (by_pixel(size, {&input, &grad_output})) {
    reduce_pixel_rows(
        call.bounds, size,
        [&](int64_t patch, double* partial, int64_t n, int64_t row, const Box& box) {
          const Coefficients<A> k = affine.at(patch, 0);
          std::vector<A> grads, values;
          for (int64_t column = box.left; column < box.right; ++column) {
            pixel_reduce(load(g.at(n, 0, row, column), 1, channels, grads),
                         load(x.at(n, 0, row, column), 1, channels, values), channels, k, partial, partial + channels);
          }
        },
        [&](int64_t patch, const double* first, const double* second) {
          for (int64_t c = 0; c < channels; ++c) {
            sums[patch * channels + c] = static_cast<A>(first[c]);
            centered[patch * channels + c] = static_cast<A>(second[c]);
          }
        });
  } else {
    parallel(patches * channels, input.numel() / std::max<int64_t>(1, patches * channels), [&](int64_t i) {
      const int64_t patch = i / channels, c = i % channels;
      const Box box = box_of(call.bounds, patch);
      const Coefficients<A> k = affine.at(patch, c);
      std::vector<A> grads, values;
      Lanes lanes;
      for (int64_t n = 0; n < size[0]; ++n) {
        for (int64_t row = box.top; row < box.bottom; ++row) {
          plane_reduce(load(g.at(n, c, row, box.left), g.strides[3], box.columns(), grads),
                       load(x.at(n, c, row, box.left), x.strides[3], box.columns(), values), box.columns(), k, lanes);
        }
      }
      double first = 0, second = 0;
      for (int lane = 0; lane < Lanes::kCount; ++lane) first += lanes.first[lane], second += lanes.second[lane];
      sums[i] = static_cast<A>(first);
      centered[i] = static_cast<A>(second);
    });
  }
  write_statistic(sums, sum_grad);
  write_statistic(centered, sum_grad_centered);
}

template <class T>
void compute_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& invstd,
                            const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& sum_grad,
                            const OptionalTensor& sum_grad_centered, const BatchNormCall& call, const Tensor& output) {
  using A = Accumulator<T>;
  const Sizes size = sizes_of(input);
  Affine<A> affine(call, mean, invstd, weight, bias);
  affine.add_gradient(call, size, invstd, sum_grad, sum_grad_centered);
  const View<T> g(grad_output), x(input), dx(output);
  const int64_t channels = call.channels;
  const bool pixels = by_pixel(size, {&input, &grad_output, &output});
  const int64_t inner = pixels ? 1 : channels;
  for (int64_t patch = 0; patch < call.bounds.patches(); ++patch) {
    const Box box = box_of(call.bounds, patch);
    parallel(size[0] * inner * box.rows(), box.columns() * channels / inner, [&](int64_t i) {
      const int64_t row = box.top + i % box.rows(), c = i / box.rows() % inner, n = i / box.rows() / inner;
      const Coefficients<A> k = affine.at(patch, c);
      std::vector<A> grads, values, out;
      if (pixels) {
        for (int64_t column = box.left; column < box.right; ++column) {
          T* to = dx.at(n, 0, row, column);
          A* results = target(to, 1, channels, out);
          pixel_grad(load(g.at(n, 0, row, column), 1, channels, grads),
                     load(x.at(n, 0, row, column), 1, channels, values), results, channels, k);
          store(to, 1, channels, results);
        }
        return;
      }
      T* to = dx.at(n, c, row, box.left);
      A* results = target(to, dx.strides[3], box.columns(), out);
      plane_grad(load(g.at(n, c, row, box.left), g.strides[3], box.columns(), grads),
                 load(x.at(n, c, row, box.left), x.strides[3], box.columns(), values), results, box.columns(), k);
      store(to, dx.strides[3], box.columns(), results);
    });
  }
}

// Calls body with a value of the tensor's element type; the checks let nothing but these four through.
template <class Body>
void for_type(const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      return body(torch::headeronly::BFloat16{});
  }
}

void run_stats(const Tensor& input, const BatchNormCall& call, const Tensor& mean, const Tensor& m2) {
  if (mean.numel() == 0) return;
  for_type(input, [&](auto type) { compute_stats<decltype(type)>(input, call, mean, m2); });
}

void run_apply(const Tensor& input, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
               const OptionalTensor& bias, const BatchNormCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  for_type(input,
           [&](auto type) { compute_apply<decltype(type)>(input, mean, invstd, weight, bias, call, output); });
}

void run_backward_reduce(const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& invstd,
                         const OptionalTensor& weight, const OptionalTensor& bias, const BatchNormCall& call,
                         const Tensor& sum_grad, const Tensor& sum_grad_centered) {
  if (sum_grad.numel() == 0) return;
  for_type(input, [&](auto type) {
    compute_backward_reduce<decltype(type)>(grad_output, input, mean, invstd, weight, bias, call, sum_grad,
                                            sum_grad_centered);
  });
}

void run_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& invstd,
                        const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& sum_grad,
                        const OptionalTensor& sum_grad_centered, const BatchNormCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  for_type(input, [&](auto type) {
    compute_backward_apply<decltype(type)>(grad_output, input, mean, invstd, weight, bias, sum_grad, sum_grad_centered,
                                           call, output);
  });
}

template <class A>
void write_invstd(const Tensor& m2, const BatchNormCall& call, int64_t batch, double eps, const Tensor& invstd) {
  std::vector<A> values = read_statistic<A>(m2);
  for (int64_t p = 0; p < call.bounds.patches(); ++p) {
    const Box box = box_of(call.bounds, p);
    const double count = static_cast<double>(std::max<int64_t>(1, batch * box.rows() * box.columns()));
    for (int64_t i = p * call.channels; i < (p + 1) * call.channels; ++i) {
      values[i] = static_cast<A>(1.0 / std::sqrt(static_cast<double>(values[i]) / count + eps));
    }
  }
  write_statistic(values, invstd);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_batch_norm(const Tensor& input, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const IntList& rows,
                                                            const IntList& cols, double eps,
                                                            StringArgument activation) {
  const BatchNormCall call = check_batch_norm(input, weight, bias, rows, cols, eps, activation);
  const Tensor output = new_output(input, sizes_of(input));
  const Tensor mean = new_statistics(input, call), invstd = new_statistics(input, call);
  const Tensor m2 = new_statistics(input, call);
  run_stats(input, call, mean, m2);
  if (call.statistics_type == ScalarType::Double) {
    write_invstd<double>(m2, call, input.size(0), eps, invstd);
  } else {
    write_invstd<float>(m2, call, input.size(0), eps, invstd);
  }
  run_apply(input, mean, invstd, weight, bias, call, output);
  return {output, mean, invstd, m2};
}

std::tuple<Tensor, Tensor> patch_batch_norm_stats(const Tensor& input, const IntList& rows, const IntList& cols) {
  const BatchNormCall call = check_batch_norm_stats(input, rows, cols);
  const Tensor mean = new_statistics(input, call), m2 = new_statistics(input, call);
  run_stats(input, call, mean, m2);
  return {mean, m2};
}

void patch_batch_norm_stats_out(const Tensor& input, const IntList& rows, const IntList& cols, const Tensor& mean,
                                const Tensor& m2) {
  const BatchNormCall call = check_batch_norm_stats(input, rows, cols);
  check_statistics_output(kBatchNormStats, "mean", mean, input, call);
  check_statistics_output(kBatchNormStats, "m2", m2, input, call);
  run_stats(input, call, mean, m2);
}

Tensor patch_batch_norm_apply(const Tensor& input, const Tensor& mean, const Tensor& invstd,
                              const OptionalTensor& weight, const OptionalTensor& bias, const IntList& rows,
                              const IntList& cols, StringArgument activation) {
  const BatchNormCall call = check_batch_norm_apply(input, mean, invstd, weight, bias, rows, cols, activation);
  const Tensor output = new_output(input, sizes_of(input));
  run_apply(input, mean, invstd, weight, bias, call, output);
  return output;
}

void patch_batch_norm_apply_out(const Tensor& input, const Tensor& mean, const Tensor& invstd,
                                const OptionalTensor& weight, const OptionalTensor& bias, const IntList& rows,
                                const IntList& cols, StringArgument activation, const Tensor& output) {
  const BatchNormCall call = check_batch_norm_apply(input, mean, invstd, weight, bias, rows, cols, activation);
  check_output(kBatchNormApply, "output", output, input, sizes_of(input), input.scalar_type());
  run_apply(input, mean, invstd, weight, bias, call, output);
}

std::tuple<Tensor, Tensor> patch_batch_norm_backward_reduce(const Tensor& grad_output, const Tensor& input,
                                                            const Tensor& mean, const Tensor& invstd,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            const IntList& rows, const IntList& cols,
                                                            StringArgument activation) {
  const BatchNormCall call =
      check_batch_norm_backward_reduce(grad_output, input, mean, invstd, weight, bias, rows, cols, activation);
  const Tensor sum_grad = new_statistics(input, call), sum_grad_centered = new_statistics(input, call);
  run_backward_reduce(grad_output, input, mean, invstd, weight, bias, call, sum_grad, sum_grad_centered);
  return {sum_grad, sum_grad_centered};
}

void patch_batch_norm_backward_reduce_out(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                          const Tensor& invstd, const OptionalTensor& weight,
                                          const OptionalTensor& bias, const IntList& rows, const IntList& cols,
                                          StringArgument activation, const Tensor& sum_grad,
                                          const Tensor& sum_grad_centered) {
  const BatchNormCall call =
      check_batch_norm_backward_reduce(grad_output, input, mean, invstd, weight, bias, rows, cols, activation);
  check_statistics_output(kBatchNormBackwardReduce, "sum_grad", sum_grad, input, call);
  check_statistics_output(kBatchNormBackwardReduce, "sum_grad_centered", sum_grad_centered, input, call);
  run_backward_reduce(grad_output, input, mean, invstd, weight, bias, call, sum_grad, sum_grad_centered);
}

Tensor patch_batch_norm_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                       const Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& sum_grad, const OptionalTensor& sum_grad_centered,
                                       const IntList& rows, const IntList& cols, StringArgument activation) {
  const BatchNormCall call = check_batch_norm_backward_apply(grad_output, input, mean, invstd, weight, bias, sum_grad,
                                                             sum_grad_centered, rows, cols, activation);
  const Tensor output = new_output(grad_output, sizes_of(input));
  run_backward_apply(grad_output, input, mean, invstd, weight, bias, sum_grad, sum_grad_centered, call, output);
  return output;
}

void patch_batch_norm_backward_apply_out(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                         const Tensor& invstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& sum_grad, const OptionalTensor& sum_grad_centered,
                                         const IntList& rows, const IntList& cols, StringArgument activation,
                                         const Tensor& output) {
  const BatchNormCall call = check_batch_norm_backward_apply(grad_output, input, mean, invstd, weight, bias, sum_grad,
                                                             sum_grad_centered, rows, cols, activation);
  check_output(kBatchNormBackwardApply, "output", output, input, sizes_of(input), input.scalar_type());
  run_backward_apply(grad_output, input, mean, invstd, weight, bias, sum_grad, sum_grad_centered, call, output);
}

}  // namespace splitkern::cpu
