// CPU bodies of average pooling and its gradient. A window's inputs add up row-major and are then divided, as in ATen;
// gradients add up in the row-major order of outputs. Spread over torch's threads and lanes like max_pool.cpp.
#include "ops/cpu/operators.h"
#include "ops/cpu/pool.h"
#include "ops/cpu/vector.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors pass only between inlined functions

namespace splitkern::cpu {

namespace {

struct Tables {
  explicit Tables(const PoolCall& call)
      : rows(call, 0), cols(call, 1), row_counts(counts(call, rows)), col_counts(counts(call, cols)) {
    if (call.divisor_override == 0) return;
    // An override is a count of its own: all of it along the rows, 1 along the columns.
    std::fill(row_counts.begin(), row_counts.end(), call.divisor_override);
    std::fill(col_counts.begin(), col_counts.end(), 1);
  }

  int64_t divisor(int64_t row, int64_t col) const { return row_counts[row] * col_counts[col]; }

  AxisTables rows;
  AxisTables cols;
  std::vector<int64_t> row_counts;  // the divisor of an output is the product of its two counts
  std::vector<int64_t> col_counts;

 private:
  static std::vector<int64_t> counts(const PoolCall& call, const AxisTables& axis) {
    std::vector<int64_t> counts(axis.outputs());
    for (int64_t output = 0; output < axis.outputs(); ++output) {
      const Span& span = axis.span(output);
      counts[output] =
          call.count_include_pad ? axis.padded_positions(output) : std::max<int64_t>(0, span.tap_end - span.tap_begin);
    }
    return counts;
  }
};

// Nothing to divide by: the window counts no position.
template <class V, class Divisor>
SPLITKERN_INLINE V divide(const V& sum, Divisor divisor) {
  return divisor == 0 ? V{} : sum / static_cast<Divisor>(divisor);
}

// --- Forward ---------------------------------------------------------------------------------------------------------

template <class T>
SPLITKERN_INLINE T average_window(const T* input, int64_t row_stride, int64_t col_stride, const Span& rows,
                                  const Span& cols, int64_t divisor) {
  Compute<T> sum = 0;
  for (int64_t i = rows.tap_begin; i < rows.tap_end; ++i) {
    const T* const line = input + (rows.first + i) * row_stride + cols.first * col_stride;
    for (int64_t j = cols.tap_begin; j < cols.tap_end; ++j) sum += static_cast<Compute<T>>(line[j * col_stride]);
  }
  return static_cast<T>(divide(sum, static_cast<Compute<T>>(divisor)));
}

template <class T>
SPLITKERN_INLINE void average_plane(const T* input, const Sizes& input_strides, T* output, const Sizes& output_strides,
                                    const Tables& tables) {
  const int64_t step = tables.cols.stride() * input_strides[3];  // between the inputs of neighbouring windows
  for (int64_t row = 0; row < tables.rows.outputs(); ++row) {
    const Span& rows = tables.rows.span(row);
    T* const output_row = output + row * output_strides[2];
    const auto one = [&](int64_t col) SPLITKERN_BODY {
      output_row[col * output_strides[3]] = average_window(input, input_strides[2], input_strides[3], rows,
                                                           tables.cols.span(col), tables.divisor(row, col));
    };
    for (const AxisPatch& patch : tables.cols.patches()) {
      int64_t col = patch.out_begin;
      for (; col < patch.inner_begin; ++col) one(col);
      for (; col + kLanes <= patch.inner_end; col += kLanes) {
        Lanes<T> sum{};
        for (int64_t i = rows.tap_begin; i < rows.tap_end; ++i) {
          const T* const line =
              input + (rows.first + i) * input_strides[2] + tables.cols.span(col).first * input_strides[3];
          for (int64_t j = 0; j < tables.cols.kernel(); ++j) {
            const T* const tap = line + j * input_strides[3];
            sum += step == 1 ? load_lanes(tap) : load_lanes(tap, step);
          }
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          output_row[(col + lane) * output_strides[3]] =
              static_cast<T>(divide<Compute<T>>(sum[lane], static_cast<Compute<T>>(tables.divisor(row, col + lane))));
        }
      }
      for (; col < patch.out_end; ++col) one(col);
    }
  }
}

// One row of outputs, all channels; channel strides are 1.
template <class T>
SPLITKERN_INLINE void average_row(const T* input, const Sizes& input_strides, T* output, int64_t output_stride,
                                  int64_t channels, int64_t row, const Tables& tables) {
  const Span& rows = tables.rows.span(row);
  for (int64_t col = 0; col < tables.cols.outputs(); ++col) {
    const Span& cols = tables.cols.span(col);
    const int64_t divisor = tables.divisor(row, col);
    T* const target = output + col * output_stride;
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      Lanes<T> sum{};
      for (int64_t i = rows.tap_begin; i < rows.tap_end; ++i) {
        const T* const line = input + (rows.first + i) * input_strides[2] + c;
        for (int64_t j = cols.tap_begin; j < cols.tap_end; ++j) {
          sum += load_lanes(line + (cols.first + j) * input_strides[3]);
        }
      }
      store_lanes(target + c, divide(sum, static_cast<Compute<T>>(divisor)));
    }
    for (; c < channels; ++c) {
      target[c] = average_window(input + c, input_strides[2], input_strides[3], rows, cols, divisor);
    }
  }
}

void run_forward(const Tensor& input, const PoolCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  const Tables tables(call);
  const int64_t images = call.input_size[0];
  const int64_t channels = call.input_size[1];
  const int64_t rows = tables.rows.outputs();
  const int64_t row_work = tables.cols.outputs() * tables.rows.kernel() * tables.cols.kernel();
  dispatch_type(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const View<const T> x = read_view<T>(input);
    const View<T> y = write_view<T>(output);
    if (layout_of(call.output_size, x, y) == Layout::kInterleaved) {
      parallel_tasks(images * rows, channels * row_work, [&](int64_t first, int64_t last) {
        run_vectorised([&]() SPLITKERN_BODY {
          for (int64_t task = first; task < last; ++task) {
            const int64_t n = task / rows;
            const int64_t row = task % rows;
            average_row(x.at(n, 0, 0, 0), x.strides, y.at(n, 0, row, 0), y.strides[3], channels, row, tables);
          }
        });
      });
      return;
    }
    parallel_tasks(images * channels, rows * row_work, [&](int64_t first, int64_t last) {
      run_vectorised([&]() SPLITKERN_BODY {
        for (int64_t task = first; task < last; ++task) {
          const int64_t n = task / channels;
          const int64_t c = task % channels;
          average_plane(x.at(n, c, 0, 0), x.strides, y.at(n, c, 0, 0), y.strides, tables);
        }
      });
    });
  });
}

// --- Backward --------------------------------------------------------------------------------------------------------

// One output that reads an input: the distance of its first channel from the image's origin, and its divisor.
template <class T>
struct Sender {
  int64_t distance;
  Compute<T> divisor;
};

// One row of inputs, all channels: every input adds what the outputs that read it send, row-major. `senders` is room
// for as many outputs as can read one input.
template <class T>
SPLITKERN_INLINE void gradient_row(const T* gradient, const Sizes& strides, int64_t channels,
                                   const std::vector<Reader>& rows, const std::vector<std::vector<Reader>>& cols,
                                   const Tables& tables, Sender<T>* senders, T* output, int64_t output_stride) {
  for (size_t col = 0; col < cols.size(); ++col) {
    int64_t count = 0;
    for (const Reader& row_reader : rows) {
      for (const Reader& col_reader : cols[col]) {
        senders[count++] = {row_reader.output * strides[2] + col_reader.output * strides[3],
                            static_cast<Compute<T>>(tables.divisor(row_reader.output, col_reader.output))};
      }
    }
    T* const target = output + static_cast<int64_t>(col) * output_stride;
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      Lanes<T> sum{};
      for (int64_t s = 0; s < count; ++s) {
        sum += divide(load_lanes(gradient + senders[s].distance + c), senders[s].divisor);
      }
      store_lanes(target + c, sum);
    }
    for (; c < channels; ++c) {
      Compute<T> sum = 0;
      for (int64_t s = 0; s < count; ++s) {
        sum += divide(static_cast<Compute<T>>(gradient[senders[s].distance + c]), senders[s].divisor);
      }
      target[c] = static_cast<T>(sum);
    }
  }
}

// `plane` receives the sums, row-major and contiguous, in the type to compute in.
template <class T>
SPLITKERN_INLINE void gradient_plane(const T* gradient, const Sizes& strides, const Tables& tables, Compute<T>* plane) {
  const int64_t width = tables.cols.inputs();
  std::fill(plane, plane + tables.rows.inputs() * width, Compute<T>{0});
  for (int64_t row = 0; row < tables.rows.outputs(); ++row) {
    const Span& rows = tables.rows.span(row);
    for (int64_t col = 0; col < tables.cols.outputs(); ++col) {
      const Span& cols = tables.cols.span(col);
      const Compute<T> share = divide(static_cast<Compute<T>>(gradient[row * strides[2] + col * strides[3]]),
                                      static_cast<Compute<T>>(tables.divisor(row, col)));
      for (int64_t i = rows.tap_begin; i < rows.tap_end; ++i) {
        Compute<T>* const line = plane + (rows.first + i) * width + cols.first;
        for (int64_t j = cols.tap_begin; j < cols.tap_end; ++j) line[j] += share;
      }
    }
  }
}

void run_backward(const Tensor& grad_output, const PoolCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  const Tables tables(call);
  const int64_t images = call.input_size[0];
  const int64_t channels = call.input_size[1];
  const int64_t height = call.input_size[2];
  const int64_t width = call.input_size[3];
  dispatch_type(output.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const View<const T> g = read_view<T>(grad_output);
    const View<T> dx = write_view<T>(output);
    if (layout_of(call.input_size, g, dx) == Layout::kInterleaved) {
      const auto row_readers = tables.rows.readers();
      const auto col_readers = tables.cols.readers();
      parallel_tasks(images * height, channels * width * 4, [&](int64_t first, int64_t last) {
        std::vector<Sender<T>> senders(std::min(tables.rows.kernel(), tables.rows.outputs()) *
                                       std::min(tables.cols.kernel(), tables.cols.outputs()));
        run_vectorised([&]() SPLITKERN_BODY {
          for (int64_t task = first; task < last; ++task) {
            const int64_t n = task / height;
            const int64_t row = task % height;
            gradient_row(g.at(n, 0, 0, 0), g.strides, channels, row_readers[row], col_readers, tables, senders.data(),
                         dx.at(n, 0, row, 0), dx.strides[3]);
          }
        });
      });
      return;
    }
    parallel_tasks(images * channels, height * width * 4, [&](int64_t first, int64_t last) {
      std::vector<Compute<T>> plane(height * width);
      for (int64_t task = first; task < last; ++task) {
        const int64_t n = task / channels;
        const int64_t c = task % channels;
        gradient_plane(g.at(n, c, 0, 0), g.strides, tables, plane.data());
        T* const target = dx.at(n, c, 0, 0);
        for (int64_t row = 0; row < height; ++row) {
          for (int64_t col = 0; col < width; ++col) {
            target[row * dx.strides[2] + col * dx.strides[3]] = static_cast<T>(plane[row * width + col]);
          }
        }
      }
    });
  });
}

}  // namespace

Tensor patch_avg_pool2d(const Tensor& input, const IntList& kernel_size, const IntList& stride, const IntList& padding,
                        bool count_include_pad, std::optional<int64_t> divisor_override, const IntList& in_rows,
                        const IntList& in_cols, const IntList& out_rows, const IntList& out_cols) {
  const PoolCall call = check_avg_pool2d(input, kernel_size, stride, padding, count_include_pad, divisor_override,
                                         {in_rows, in_cols, out_rows, out_cols});
  const Tensor output = new_output(input, call.output_size);
  run_forward(input, call, output);
  return output;
}

void patch_avg_pool2d_out(const Tensor& input, const IntList& kernel_size, const IntList& stride,
                          const IntList& padding, bool count_include_pad, std::optional<int64_t> divisor_override,
                          const IntList& in_rows, const IntList& in_cols, const IntList& out_rows,
                          const IntList& out_cols, const Tensor& output) {
  const PoolCall call = check_avg_pool2d(input, kernel_size, stride, padding, count_include_pad, divisor_override,
                                         {in_rows, in_cols, out_rows, out_cols});
  check_output(kAvgPool2d, "output", output, input, call.output_size, input.scalar_type());
  run_forward(input, call, output);
}

Tensor patch_avg_pool2d_backward(const Tensor& grad_output, const IntList& input_size, const IntList& kernel_size,
                                 const IntList& stride, const IntList& padding, bool count_include_pad,
                                 std::optional<int64_t> divisor_override, const IntList& in_rows,
                                 const IntList& in_cols, const IntList& out_rows, const IntList& out_cols) {
  const PoolCall call =
      check_avg_pool2d_backward(grad_output, input_size, kernel_size, stride, padding, count_include_pad,
                                divisor_override, {in_rows, in_cols, out_rows, out_cols});
  const Tensor output = new_output(grad_output, call.input_size);
  run_backward(grad_output, call, output);
  return output;
}

void patch_avg_pool2d_backward_out(const Tensor& grad_output, const IntList& input_size, const IntList& kernel_size,
                                   const IntList& stride, const IntList& padding, bool count_include_pad,
                                   std::optional<int64_t> divisor_override, const IntList& in_rows,
                                   const IntList& in_cols, const IntList& out_rows, const IntList& out_cols,
                                   const Tensor& output) {
  const PoolCall call =
      check_avg_pool2d_backward(grad_output, input_size, kernel_size, stride, padding, count_include_pad,
                                divisor_override, {in_rows, in_cols, out_rows, out_cols});
  check_output(kAvgPool2dBackward, "output", output, grad_output, call.input_size, grad_output.scalar_type());
  run_backward(grad_output, call, output);
}

}  // namespace splitkern::cpu
