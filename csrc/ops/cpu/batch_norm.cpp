// CPU bodies of the batch normalisation operators. Statistics take one pass with sums in float64 around a shift per
// patch and channel; normalising and ReLU are one pass. The order of every sum is fixed by the shape alone, so results
// do not depend on the number of threads. Backward rebuilds the ReLU's input with the forward's own arithmetic: one
// function, multiplications and additions never fused, so both agree on the sign bit for bit.
#include <cmath>
#include <memory>
#include <vector>

#include "ops/cpu/operators.h"
#include "ops/cpu/vector.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors pass only between inlined functions

namespace splitkern::cpu {

namespace {

// --- Arithmetic, the same text for one value and for lanes -----------------------------------------------------------

template <class V>
SPLITKERN_INLINE V normalise(const V& x, const V& mean, const V& scale, const V& bias) {
  return (x - mean) * scale + bias;
}

// What reading back the stored output would give; float16 may round a small positive value to zero.
template <class T, class V>
SPLITKERN_INLINE V as_stored(const V& y) {
  if constexpr (!std::is_same_v<T, Half>) {
    return y;
  } else if constexpr (std::is_same_v<V, float>) {
    return static_cast<float>(static_cast<Half>(y));
  } else {
    V stored;
    for (int i = 0; i < kLanes; ++i) stored[i] = static_cast<float>(static_cast<Half>(y[i]));
    return stored;
  }
}

// value where y is positive or NaN, else zero.
template <class V>
SPLITKERN_INLINE V where_active(const V& y, const V& value) {
  const V zero{};
  return y <= zero ? zero : value;
}

// Per channel of one patch; `gain`, `offset` and `slope` only where the gradient is applied:
// gain * (g - offset - (x - mean) * slope).
template <class V>
struct Constants {
  V mean;
  V scale;
  V bias;
  V gain;
  V offset;
  V slope;
};

template <class T, bool kRelu, class V>
SPLITKERN_INLINE V apply_value(const V& x, const Constants<V>& k) {
  const V y = normalise(x, k.mean, k.scale, k.bias);
  return kRelu ? where_active(y, y) : y;
}

template <class T, bool kRelu, class V>
SPLITKERN_INLINE V active_gradient(const V& g, const V& x, const Constants<V>& k) {
  if constexpr (!kRelu) return g;
  return where_active(as_stored<T>(normalise(x, k.mean, k.scale, k.bias)), g);
}

template <class T, bool kRelu, bool kBatchStatistics, class V>
SPLITKERN_INLINE V input_gradient(const V& g, const V& x, const Constants<V>& k) {
  const V active = active_gradient<T, kRelu>(g, x, k);
  if constexpr (!kBatchStatistics) return k.gain * active;
  return k.gain * (active - k.offset - (x - k.mean) * k.slope);
}

// --- Constants of every patch and channel ----------------------------------------------------------------------------

// Row-major [patches, channels], contiguous.
template <class Value>
class Table {
 public:
  using V = Lanes<Value>;

  Table(int64_t patches, int64_t channels) : channels_(channels), values_(6 * patches * channels) {}

  Value* field(int index, int64_t patch) { return values_.data() + index * stride() + patch * channels_; }
  const Value* field(int index, int64_t patch) const { return values_.data() + index * stride() + patch * channels_; }

  SPLITKERN_INLINE Constants<Value> value(int64_t patch, int64_t c) const {
    const Value* const v = field(0, patch) + c;
    const int64_t s = stride();
    return {v[0], v[s], v[2 * s], v[3 * s], v[4 * s], v[5 * s]};
  }
  SPLITKERN_INLINE Constants<V> lanes(int64_t patch, int64_t c) const {
    const Value* const v = field(0, patch) + c;
    const int64_t s = stride();
    return {load_lanes(v),         load_lanes(v + s),     load_lanes(v + 2 * s),
            load_lanes(v + 3 * s), load_lanes(v + 4 * s), load_lanes(v + 5 * s)};
  }

 private:
  int64_t stride() const { return static_cast<int64_t>(values_.size()) / 6; }

  int64_t channels_;
  std::vector<Value> values_;
};

template <class Value>
SPLITKERN_INLINE Constants<Lanes<Value>> broadcast_all(const Constants<Value>& k) {
  return {broadcast(k.mean), broadcast(k.scale),  broadcast(k.bias),
          broadcast(k.gain), broadcast(k.offset), broadcast(k.slope)};
}

// A [C] parameter of any supported type.
double parameter_at(const OptionalTensor& parameter, int64_t channel, double otherwise) {
  if (!parameter.has_value()) return otherwise;
  double value = 0;
  dispatch_type(parameter->scalar_type(), [&](auto element) {
    using T = decltype(element);
    value = static_cast<double>(
        static_cast<Compute<T>>(static_cast<const T*>(parameter->const_data_ptr())[channel * parameter->stride(0)]));
  });
  return value;
}

template <class Value>
class Statistic {
 public:
  explicit Statistic(const Tensor& tensor)
      : data_(static_cast<Value*>(tensor.data_ptr())), patch_(tensor.stride(0)), channel_(tensor.stride(1)) {}
  Value& operator()(int64_t patch, int64_t channel) const { return data_[patch * patch_ + channel * channel_]; }

 private:
  Value* data_;
  int64_t patch_;
  int64_t channel_;
};

// --- Geometry --------------------------------------------------------------------------------------------------------

struct Box {
  int64_t patch;
  int64_t row, row_end;
  int64_t col, col_end;

  int64_t rows() const { return row_end - row; }
  int64_t cols() const { return col_end - col; }
};

std::vector<Box> boxes_of(const Bounds& bounds) {
  std::vector<Box> boxes;
  for (int64_t i = 0; i < bounds.row_patches(); ++i) {
    for (int64_t j = 0; j < bounds.col_patches(); ++j) {
      boxes.push_back({static_cast<int64_t>(boxes.size()), bounds.in_rows[i], bounds.in_rows[i + 1], bounds.in_cols[j],
                       bounds.in_cols[j + 1]});
    }
  }
  return boxes;
}

// True where the rows of a box follow each other without a gap in every tensor: the box is one run of columns.
template <class... Views>
bool rows_follow(const Box& box, const Views&... views) {
  return box.rows() == 1 || ((views.strides[2] == box.cols() * views.strides[3]) && ...);
}

struct Shape {
  Sizes size;
  std::vector<Box> boxes;
  Layout layout;

  int64_t images() const { return size[0]; }
  int64_t channels() const { return size[1]; }
  int64_t pixels(const Box& box) const { return size[0] * box.rows() * box.cols(); }
};

// --- Element-wise passes ---------------------------------------------------------------------------------------------

// value_of(constants, element...) for one value or lanes; inputs are read, the output is written.
template <class T, bool kUnit, class ValueOf, class... Inputs>
SPLITKERN_INLINE void map_run(int64_t count, const Constants<Compute<T>>& k, T* output, int64_t output_stride,
                              const ValueOf& value_of, std::pair<const T*, Inputs>... inputs) {
  const Constants<Lanes<T>> lanes = broadcast_all(k);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if constexpr (kUnit) {
      store_lanes(output + i, value_of(lanes, load_lanes(inputs.first + i)...));
    } else {
      store_lanes(output + i * output_stride, output_stride,
                  value_of(lanes, load_lanes(inputs.first + i * inputs.second, inputs.second)...));
    }
  }
  for (; i < count; ++i) {
    output[i * output_stride] =
        static_cast<T>(value_of(k, static_cast<Compute<T>>(inputs.first[i * inputs.second])...));
  }
}

template <class T, class ValueOf, class... Inputs>
SPLITKERN_INLINE void map_pixels(int64_t pixels, int64_t channels, const Table<Compute<T>>& table, int64_t patch,
                                 T* output, int64_t output_stride, const ValueOf& value_of,
                                 std::pair<const T*, Inputs>... inputs) {
  for (int64_t i = 0; i < pixels; ++i) {
    T* const pixel = output + i * output_stride;
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      store_lanes(pixel + c, value_of(table.lanes(patch, c), load_lanes(inputs.first + i * inputs.second + c)...));
    }
    for (; c < channels; ++c) {
      pixel[c] = static_cast<T>(
          value_of(table.value(patch, c), static_cast<Compute<T>>(inputs.first[i * inputs.second + c])...));
    }
  }
}

// output = value_of(constants, inputs...) everywhere.
template <class T, class ValueOf, class... Inputs>
void map(const Shape& shape, const Table<Compute<T>>& table, const ValueOf& value_of, const View<T>& output,
         const View<Inputs>&... inputs) {
  if (shape.layout == Layout::kInterleaved) {
    const int64_t rows = shape.size[2];
    parallel_tasks(shape.images() * rows, shape.channels() * shape.size[3], [&](int64_t first, int64_t last) {
      run_vectorised([&]() SPLITKERN_BODY {
        for (int64_t task = first; task < last; ++task) {
          const int64_t n = task / rows;
          const int64_t row = task % rows;
          for (const Box& box : shape.boxes) {
            if (row < box.row || row >= box.row_end) continue;
            map_pixels<T>(box.cols(), shape.channels(), table, box.patch, output.at(n, 0, row, box.col),
                          output.strides[3], value_of, std::pair(inputs.at(n, 0, row, box.col), inputs.strides[3])...);
          }
        }
      });
    });
    return;
  }
  dispatch_bool(shape.layout == Layout::kPlanar, [&](auto unit) {
    constexpr bool kUnit = decltype(unit)::value;
    parallel_tasks(shape.images() * shape.channels(), shape.size[2] * shape.size[3], [&](int64_t first, int64_t last) {
      run_vectorised([&]() SPLITKERN_BODY {
        for (int64_t task = first; task < last; ++task) {
          const int64_t n = task / shape.channels();
          const int64_t c = task % shape.channels();
          for (const Box& box : shape.boxes) {
            const Constants<Compute<T>> k = table.value(box.patch, c);
            const bool joined = rows_follow(box, output, inputs...);
            const int64_t count = joined ? box.rows() * box.cols() : box.cols();
            const int64_t row_end = joined ? box.row + 1 : box.row_end;
            for (int64_t row = box.row; row < row_end; ++row) {
              map_run<T, kUnit>(count, k, output.at(n, c, row, box.col), output.strides[3], value_of,
                                std::pair(inputs.at(n, c, row, box.col), inputs.strides[3])...);
            }
          }
        }
      });
    });
  });
}

// --- Reductions ------------------------------------------------------------------------------------------------------

struct TwoSums {
  double first;
  double second;
};

// Interleaved pixels are cut into this many shares at most, summed apart and added in order.
constexpr int64_t kSegments = 32;
// Lanes of channels whose sums stay in registers while a row's pixels pass.
constexpr int kChannelGroups = 8;

// terms_of(constants, element..., first&, second&) adds to the two sums, for one value or lanes. `finish(patch,
// channel, sums)` gets each pair once.
template <class T, class TermsOf, class Finish, class... Inputs>
void reduce(const Shape& shape, const Table<Compute<T>>& table, const TermsOf& terms_of, const Finish& finish,
            const View<Inputs>&... inputs) {
  const int64_t channels = shape.channels();
  const int64_t patches = static_cast<int64_t>(shape.boxes.size());
  if (shape.layout != Layout::kInterleaved) {
    dispatch_bool(shape.layout == Layout::kPlanar, [&](auto unit) {
      constexpr bool kUnit = decltype(unit)::value;
      const int64_t work = shape.size[0] * shape.size[2] * shape.size[3] / patches;
      parallel_tasks(patches * channels, work, [&](int64_t begin, int64_t end) {
        run_vectorised([&]() SPLITKERN_BODY {
          for (int64_t task = begin; task < end; ++task) {
            const Box& box = shape.boxes[task / channels];
            const int64_t c = task % channels;
            const Constants<Compute<T>> k = table.value(box.patch, c);
            const Constants<Lanes<T>> lanes = broadcast_all(k);
            const bool joined = rows_follow(box, inputs...);
            const int64_t count = joined ? box.rows() * box.cols() : box.cols();
            const int64_t row_end = joined ? box.row + 1 : box.row_end;
            Doubles first{}, second{};
            double first_rest = 0, second_rest = 0;
            for (int64_t n = 0; n < shape.images(); ++n) {
              for (int64_t row = box.row; row < row_end; ++row) {
                int64_t i = 0;
                for (; i + kLanes <= count; i += kLanes) {
                  if constexpr (kUnit) {
                    terms_of(lanes, first, second, load_lanes(inputs.at(n, c, row, box.col) + i)...);
                  } else {
                    terms_of(lanes, first, second,
                             load_lanes(inputs.at(n, c, row, box.col) + i * inputs.strides[3], inputs.strides[3])...);
                  }
                }
                for (; i < count; ++i) {
                  terms_of(k, first_rest, second_rest,
                           static_cast<Compute<T>>(inputs.at(n, c, row, box.col)[i * inputs.strides[3]])...);
                }
              }
            }
            finish(box.patch, c, TwoSums{sum_lanes(first) + first_rest, sum_lanes(second) + second_rest});
          }
        });
      });
    });
    return;
  }

  // [patch][segment][2][channel]
  const auto segments_of = [&](const Box& box) { return std::min(kSegments, shape.images() * box.rows()); };
  std::vector<double> partial(patches * kSegments * 2 * channels);
  const int64_t work = shape.size[0] * channels * shape.size[2] * shape.size[3] / (patches * kSegments);
  parallel_tasks(patches * kSegments, work, [&](int64_t begin, int64_t end) {
    run_vectorised([&]() SPLITKERN_BODY {
      for (int64_t task = begin; task < end; ++task) {
        const Box& box = shape.boxes[task / kSegments];
        const int64_t segments = segments_of(box);
        const int64_t segment = task % kSegments;
        if (segment >= segments) continue;
        const int64_t lines = shape.images() * box.rows();
        double* const firsts = partial.data() + task * 2 * channels;
        double* const seconds = firsts + channels;
        for (int64_t line = lines * segment / segments; line < lines * (segment + 1) / segments; ++line) {
          const int64_t n = line / box.rows();
          const int64_t row = box.row + line % box.rows();
          int64_t c = 0;
          for (; c + kChannelGroups * kLanes <= channels; c += kChannelGroups * kLanes) {
            Constants<Lanes<T>> k[kChannelGroups];
            Doubles first[kChannelGroups], second[kChannelGroups];
            for (int group = 0; group < kChannelGroups; ++group) {
              k[group] = table.lanes(box.patch, c + group * kLanes);
              first[group] = load_lanes(firsts + c + group * kLanes);
              second[group] = load_lanes(seconds + c + group * kLanes);
            }
            for (int64_t col = box.col; col < box.col_end; ++col) {
              for (int group = 0; group < kChannelGroups; ++group) {
                terms_of(k[group], first[group], second[group],
                         load_lanes(inputs.at(n, 0, row, col) + c + group * kLanes)...);
              }
            }
            for (int group = 0; group < kChannelGroups; ++group) {
              store_lanes(firsts + c + group * kLanes, first[group]);
              store_lanes(seconds + c + group * kLanes, second[group]);
            }
          }
          for (; c + kLanes <= channels; c += kLanes) {
            const Constants<Lanes<T>> k = table.lanes(box.patch, c);
            Doubles first = load_lanes(firsts + c), second = load_lanes(seconds + c);
            for (int64_t col = box.col; col < box.col_end; ++col) {
              terms_of(k, first, second, load_lanes(inputs.at(n, 0, row, col) + c)...);
            }
            store_lanes(firsts + c, first);
            store_lanes(seconds + c, second);
          }
          for (; c < channels; ++c) {
            const Constants<Compute<T>> k = table.value(box.patch, c);
            for (int64_t col = box.col; col < box.col_end; ++col) {
              terms_of(k, firsts[c], seconds[c], static_cast<Compute<T>>(inputs.at(n, 0, row, col)[c])...);
            }
          }
        }
      }
    });
  });
  for (const Box& box : shape.boxes) {
    for (int64_t c = 0; c < channels; ++c) {
      TwoSums sums{0, 0};
      for (int64_t segment = 0; segment < segments_of(box); ++segment) {
        const double* const firsts = partial.data() + (box.patch * kSegments + segment) * 2 * channels;
        sums.first += firsts[c];
        sums.second += firsts[channels + c];
      }
      finish(box.patch, c, sums);
    }
  }
}

// --- Operators -------------------------------------------------------------------------------------------------------

constexpr int kMean = 0, kScale = 1, kBias = 2, kGain = 3, kOffset = 4, kSlope = 5;

// invstd null: not wanted.
void run_stats(const Tensor& input, const BatchNormCall& call, const Tensor& mean, const Tensor& m2,
               const Tensor* invstd, double eps) {
  if (mean.numel() == 0) return;
  dispatch_type(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Value = Compute<T>;
    const View<const T> x = read_view<T>(input);
    const Sizes size = sizes_of(input);
    const Shape shape{size, boxes_of(call.bounds), layout_of(size, x)};
    const Statistic<Value> mean_at(mean), m2_at(m2);
    const auto invstd_at = invstd == nullptr ? std::nullopt : std::optional(Statistic<Value>(*invstd));
    // The shift, in the place of the mean: a sample, so that the sums stay near the deviations.
    Table<Value> table(call.bounds.patches(), call.channels);
    if (size[0] != 0) {
      for (const Box& box : shape.boxes) {
        for (int64_t c = 0; c < call.channels; ++c) {
          table.field(kMean, box.patch)[c] = static_cast<Value>(*x.at(0, c, box.row, box.col));
        }
      }
    }
    reduce<T>(
        shape, table,
        [](const auto& k, auto& sum, auto& sum_squares, const auto& value) SPLITKERN_BODY {
          const auto deviation = widen(value) - widen(k.mean);
          sum += deviation;
          sum_squares += deviation * deviation;
        },
        [&](int64_t patch, int64_t c, const TwoSums& sums) {
          const double count = static_cast<double>(std::max<int64_t>(shape.pixels(shape.boxes[patch]), 1));
          const double shift = static_cast<double>(table.field(kMean, patch)[c]);
          const double squares = sums.second - sums.first * (sums.first / count);
          const double positive = squares < 0 ? 0.0 : squares;  // a NaN stays
          mean_at(patch, c) = static_cast<Value>(shift + sums.first / count);
          m2_at(patch, c) = static_cast<Value>(positive);
          if (invstd_at.has_value()) {
            (*invstd_at)(patch, c) = static_cast<Value>(1 / std::sqrt(positive / count + eps));
          }
        },
        x);
  });
}

template <class Value>
Table<Value> normalisation_table(const BatchNormCall& call, const Tensor& mean, const Tensor& invstd,
                                 const OptionalTensor& weight, const OptionalTensor& bias) {
  const Statistic<Value> mean_at(mean), invstd_at(invstd);
  Table<Value> table(call.bounds.patches(), call.channels);
  for (int64_t c = 0; c < call.channels; ++c) {
    const Value weight_value = static_cast<Value>(parameter_at(weight, c, 1));
    const Value bias_value = static_cast<Value>(parameter_at(bias, c, 0));
    for (int64_t patch = 0; patch < call.bounds.patches(); ++patch) {
      table.field(kMean, patch)[c] = mean_at(patch, c);
      table.field(kScale, patch)[c] = invstd_at(patch, c) * weight_value;
      table.field(kBias, patch)[c] = bias_value;
    }
  }
  return table;
}

void run_apply(const Tensor& input, const Tensor& mean, const Tensor& invstd, const OptionalTensor& weight,
               const OptionalTensor& bias, const BatchNormCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  dispatch_type(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const View<const T> x = read_view<T>(input);
    const View<T> y = write_view<T>(output);
    const Sizes size = sizes_of(input);
    const Shape shape{size, boxes_of(call.bounds), layout_of(size, x, y)};
    const Table<Compute<T>> table = normalisation_table<Compute<T>>(call, mean, invstd, weight, bias);
    dispatch_bool(call.relu, [&](auto relu) {
      map<T>(
          shape, table,
          [](const auto& k, const auto& value)
              SPLITKERN_BODY { return apply_value<T, decltype(relu)::value>(value, k); },
          y, x);
    });
  });
}

void run_backward_reduce(const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& invstd,
                         const OptionalTensor& weight, const OptionalTensor& bias, const BatchNormCall& call,
                         const Tensor& sum_grad, const Tensor& sum_grad_centered) {
  if (sum_grad.numel() == 0) return;
  dispatch_type(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Value = Compute<T>;
    const View<const T> g = read_view<T>(grad_output);
    const View<const T> x = read_view<T>(input);
    const Sizes size = sizes_of(input);
    const Shape shape{size, boxes_of(call.bounds), layout_of(size, g, x)};
    const Table<Value> table = normalisation_table<Value>(call, mean, invstd, weight, bias);
    const Statistic<Value> sum_at(sum_grad), centered_at(sum_grad_centered);
    dispatch_bool(call.relu, [&](auto relu) {
      reduce<T>(
          shape, table,
          [](const auto& k, auto& sum, auto& sum_centered, const auto& gradient, const auto& value) SPLITKERN_BODY {
            const auto active = widen(active_gradient<T, decltype(relu)::value>(gradient, value, k));
            sum += active;
            sum_centered += active * widen(value - k.mean);
          },
          [&](int64_t patch, int64_t c, const TwoSums& sums) {
            sum_at(patch, c) = static_cast<Value>(sums.first);
            centered_at(patch, c) = static_cast<Value>(sums.second);
          },
          g, x);
    });
  });
}

void run_backward_apply(const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& invstd,
                        const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& sum_grad,
                        const OptionalTensor& sum_grad_centered, const BatchNormCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  dispatch_type(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Value = Compute<T>;
    const View<const T> g = read_view<T>(grad_output);
    const View<const T> x = read_view<T>(input);
    const View<T> dx = write_view<T>(output);
    const Sizes size = sizes_of(input);
    const Shape shape{size, boxes_of(call.bounds), layout_of(size, g, x, dx)};
    Table<Value> table = normalisation_table<Value>(call, mean, invstd, weight, bias);
    const Statistic<Value> invstd_at(invstd);
    const Statistic<Value> sum_at(sum_grad.value_or(invstd)), centered_at(sum_grad_centered.value_or(invstd));
    for (const Box& box : shape.boxes) {
      const Value count = static_cast<Value>(shape.pixels(box));
      for (int64_t c = 0; c < call.channels; ++c) {
        const Value inverse = invstd_at(box.patch, c);
        table.field(kGain, box.patch)[c] = table.field(kScale, box.patch)[c];
        if (!sum_grad.has_value()) continue;
        table.field(kOffset, box.patch)[c] = sum_at(box.patch, c) / count;
        table.field(kSlope, box.patch)[c] = inverse * inverse * (centered_at(box.patch, c) / count);
      }
    }
    dispatch_bool(call.relu, [&](auto relu) {
      dispatch_bool(sum_grad.has_value(), [&](auto batch_statistics) {
        map<T>(
            shape, table,
            [](const auto& k, const auto& gradient, const auto& value) SPLITKERN_BODY {
              return input_gradient<T, decltype(relu)::value, decltype(batch_statistics)::value>(gradient, value, k);
            },
            dx, g, x);
      });
    });
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_batch_norm(const Tensor& input, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const IntList& rows,
                                                            const IntList& cols, double eps,
                                                            StringArgument activation) {
  const BatchNormCall call = check_batch_norm(input, weight, bias, rows, cols, eps, activation);
  const Tensor output = new_output(input, sizes_of(input));
  const Tensor mean = new_statistics(input, call);
  const Tensor invstd = new_statistics(input, call);
  const Tensor m2 = new_statistics(input, call);
  run_stats(input, call, mean, m2, &invstd, eps);
  run_apply(input, mean, invstd, weight, bias, call, output);
  return {output, mean, invstd, m2};
}

void patch_batch_norm_out(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                          const IntList& rows, const IntList& cols, double eps, StringArgument activation,
                          const Tensor& output, const Tensor& mean, const Tensor& invstd, const Tensor& m2) {
  const BatchNormCall call = check_batch_norm(input, weight, bias, rows, cols, eps, activation);
  check_output(kBatchNorm, "output", output, input, sizes_of(input), input.scalar_type());
  check_statistics_output(kBatchNorm, "mean", mean, input, call);
  check_statistics_output(kBatchNorm, "invstd", invstd, input, call);
  check_statistics_output(kBatchNorm, "m2", m2, input, call);
  run_stats(input, call, mean, m2, &invstd, eps);
  run_apply(input, mean, invstd, weight, bias, call, output);
}

std::tuple<Tensor, Tensor> patch_batch_norm_stats(const Tensor& input, const IntList& rows, const IntList& cols) {
  const BatchNormCall call = check_batch_norm_stats(input, rows, cols);
  const Tensor mean = new_statistics(input, call);
  const Tensor m2 = new_statistics(input, call);
  run_stats(input, call, mean, m2, nullptr, 0);
  return {mean, m2};
}

void patch_batch_norm_stats_out(const Tensor& input, const IntList& rows, const IntList& cols, const Tensor& mean,
                                const Tensor& m2) {
  const BatchNormCall call = check_batch_norm_stats(input, rows, cols);
  check_statistics_output(kBatchNormStats, "mean", mean, input, call);
  check_statistics_output(kBatchNormStats, "m2", m2, input, call);
  run_stats(input, call, mean, m2, nullptr, 0);
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
  const Tensor sum_grad = new_statistics(input, call);
  const Tensor sum_grad_centered = new_statistics(input, call);
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
  check_output(kBatchNormBackwardApply, "output", output, grad_output, sizes_of(input), input.scalar_type());
  run_backward_apply(grad_output, input, mean, invstd, weight, bias, sum_grad, sum_grad_centered, call, output);
}

}  // namespace splitkern::cpu
