// CPU bodies of max pooling, its gradient and the gradient's gradient. Planes of NCHW and rows of NHWC are spread over
// torch's threads. Windows that lie inside their patch go eight at a time (NCHW: neighbouring outputs, NHWC:
// neighbouring channels). Gradients add up in the row-major order of outputs, as ATen's do. Offsets come from the
// caller, so one that points outside its patch is skipped.
#include <bit>
#include <limits>

#include "ops/cpu/operators.h"
#include "ops/cpu/pool.h"
#include "ops/cpu/vector.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors pass only between inlined functions

namespace splitkern::cpu {

namespace {

using OffsetLanes = uint8_t __attribute__((vector_size(kLanes)));

// The running maximum of one window, or of eight. A NaN replaces whatever was there, as in ATen.
template <class T>
struct Maximum {
  Compute<T> value = -std::numeric_limits<Compute<T>>::infinity();
  int64_t offset = kNoOffset;

  SPLITKERN_INLINE void start(int64_t first_offset) { offset = first_offset; }
  SPLITKERN_INLINE void see(Compute<T> candidate, int64_t candidate_offset) {
    if (candidate > value || candidate != candidate) {
      value = candidate;
      offset = candidate_offset;
    }
  }
  SPLITKERN_INLINE void store(T* values, uint8_t* offsets) const {
    *values = static_cast<T>(value);
    *offsets = static_cast<uint8_t>(offset);
  }
};

template <class T>
struct MaximumLanes {
  using Offsets = decltype(Lanes<T>{} > Lanes<T>{});
  using Offset = std::conditional_t<std::is_same_v<Compute<T>, double>, int64_t, int32_t>;

  Lanes<T> value = broadcast<Compute<T>>(-std::numeric_limits<Compute<T>>::infinity());
  Offsets offset = Offsets{} + static_cast<Offset>(kNoOffset);

  SPLITKERN_INLINE void start(int64_t first_offset) { offset = Offsets{} + static_cast<Offset>(first_offset); }
  SPLITKERN_INLINE void see(const Lanes<T>& candidate, int64_t candidate_offset) {
    const Offsets wins = (candidate > value) | (candidate != candidate);
    value = wins ? candidate : value;
    offset = wins ? Offsets{} + static_cast<Offset>(candidate_offset) : offset;
  }
  SPLITKERN_INLINE OffsetLanes stored_offsets() const { return __builtin_convertvector(offset, OffsetLanes); }
};

// Every other element of 16.
template <class T>
SPLITKERN_INLINE Lanes<T> load_every_other(const T* from) {
  const Lanes<T> low = load_lanes(from);
  const Lanes<T> high = load_lanes(from + kLanes);
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
}

struct Tables {
  explicit Tables(const PoolCall& call) : rows(call, 0), cols(call, 1) {}

  AxisTables rows;
  AxisTables cols;
};

// --- Forward ---------------------------------------------------------------------------------------------------------

// One window by itself; `input` at column 0 and row 0 of the plane.
template <class T>
SPLITKERN_INLINE void pool_window(const T* input, int64_t row_stride, int64_t col_stride, const Tables& tables,
                                  const Span& rows, const Span& cols, T* value, uint8_t* offset) {
  Maximum<T> maximum;
  if (!rows.empty() && !cols.empty()) maximum.start(rows.tap_begin * tables.cols.kernel() + cols.tap_begin);
  for (int64_t i = rows.tap_begin; i < rows.tap_end; ++i) {
    const T* const line = input + (rows.first + i * tables.rows.dilation()) * row_stride;
    for (int64_t j = cols.tap_begin; j < cols.tap_end; ++j) {
      maximum.see(static_cast<Compute<T>>(line[(cols.first + j * tables.cols.dilation()) * col_stride]),
                  i * tables.cols.kernel() + j);
    }
  }
  maximum.store(value, offset);
}

// Eight neighbouring windows with all their column taps. `load` reads the eight inputs of one tap.
template <class T, class Load>
SPLITKERN_INLINE void pool_eight(const T* input, int64_t row_stride, int64_t col_stride, const Tables& tables,
                                 const Span& rows, const Span& cols, T* values, int64_t value_stride, uint8_t* offsets,
                                 int64_t offset_stride, const Load& load) {
  MaximumLanes<T> maximum;
  if (!rows.empty()) maximum.start(rows.tap_begin * tables.cols.kernel());
  for (int64_t i = rows.tap_begin; i < rows.tap_end; ++i) {
    const T* tap = input + (rows.first + i * tables.rows.dilation()) * row_stride + cols.first * col_stride;
    for (int64_t j = 0; j < tables.cols.kernel(); ++j) {
      maximum.see(load(tap), i * tables.cols.kernel() + j);
      tap += tables.cols.dilation() * col_stride;
    }
  }
  const OffsetLanes stored = maximum.stored_offsets();
  if (value_stride == 1 && offset_stride == 1) {
    store_lanes(values, maximum.value);
    std::memcpy(offsets, &stored, sizeof(stored));
  } else {
    store_lanes(values, value_stride, maximum.value);
    for (int lane = 0; lane < kLanes; ++lane) offsets[lane * offset_stride] = stored[lane];
  }
}

template <class T>
SPLITKERN_INLINE void pool_plane(const T* input, const Sizes& input_strides, T* values, const Sizes& value_strides,
                                 uint8_t* offsets, const Sizes& offset_strides, const Tables& tables) {
  const int64_t step = tables.cols.stride() * input_strides[3];  // between the inputs of neighbouring windows
  for (int64_t row = 0; row < tables.rows.outputs(); ++row) {
    const Span& rows = tables.rows.span(row);
    T* const value_row = values + row * value_strides[2];
    uint8_t* const offset_row = offsets + row * offset_strides[2];
    const auto one = [&](int64_t col) SPLITKERN_BODY {
      pool_window(input, input_strides[2], input_strides[3], tables, rows, tables.cols.span(col),
                  value_row + col * value_strides[3], offset_row + col * offset_strides[3]);
    };
    const auto eight = [&](int64_t col, const auto& load) SPLITKERN_BODY {
      pool_eight(input, input_strides[2], input_strides[3], tables, rows, tables.cols.span(col),
                 value_row + col * value_strides[3], value_strides[3], offset_row + col * offset_strides[3],
                 offset_strides[3], load);
    };
    const auto load_any = [&](const T* tap) SPLITKERN_BODY { return load_lanes(tap, step); };
    for (const AxisPatch& patch : tables.cols.patches()) {
      int64_t col = patch.out_begin;
      for (; col < patch.inner_begin; ++col) one(col);
      if (patch.inner_end - col >= kLanes) {
        if (step == 1) {
          for (; col + kLanes <= patch.inner_end; col += kLanes) {
            eight(col, [](const T* tap) SPLITKERN_BODY { return load_lanes(tap); });
          }
        } else if (step == 2) {
          // The sixteenth element read is the first of the next window's tap, or before it.
          for (; col + kLanes < patch.inner_end; col += kLanes) {
            eight(col, [](const T* tap) SPLITKERN_BODY { return load_every_other(tap); });
          }
        } else {
          for (; col + kLanes <= patch.inner_end; col += kLanes) eight(col, load_any);
        }
        // The rest, some of it once more.
        if (col < patch.inner_end) {
          eight(patch.inner_end - kLanes, load_any);
          col = patch.inner_end;
        }
      }
      for (; col < patch.out_end; ++col) one(col);
    }
  }
}

// A position of one window, as the distance of its first channel from the plane's origin.
struct Tap {
  int64_t distance;
  int64_t offset;
};

// One row of outputs, all channels; channel strides are 1.
template <class T>
SPLITKERN_INLINE void pool_row(const T* input, const Sizes& input_strides, T* values, const Sizes& value_strides,
                               uint8_t* offsets, const Sizes& offset_strides, int64_t channels, const Span& rows,
                               const Tables& tables) {
  Tap taps[kMaxWindowPositions];
  for (int64_t col = 0; col < tables.cols.outputs(); ++col) {
    const Span& cols = tables.cols.span(col);
    int64_t count = 0;
    for (int64_t i = rows.tap_begin; i < rows.tap_end; ++i) {
      for (int64_t j = cols.tap_begin; j < cols.tap_end; ++j) {
        taps[count++] = {(rows.first + i * tables.rows.dilation()) * input_strides[2] +
                             (cols.first + j * tables.cols.dilation()) * input_strides[3],
                         i * tables.cols.kernel() + j};
      }
    }
    T* const value = values + col * value_strides[3];
    uint8_t* const offset = offsets + col * offset_strides[3];
    // Several groups of channels per visit of a tap, as long as they last.
    const auto groups = [&](int64_t c, auto count_of_groups) SPLITKERN_BODY {
      constexpr int kGroups = decltype(count_of_groups)::value;
      MaximumLanes<T> maxima[kGroups];
      for (int group = 0; group < kGroups && count > 0; ++group) maxima[group].start(taps[0].offset);
      for (int64_t t = 0; t < count; ++t) {
        const T* const from = input + taps[t].distance + c;
        for (int group = 0; group < kGroups; ++group) {
          maxima[group].see(load_lanes(from + group * kLanes), taps[t].offset);
        }
      }
      for (int group = 0; group < kGroups; ++group) {
        store_lanes(value + c + group * kLanes, maxima[group].value);
        const OffsetLanes stored = maxima[group].stored_offsets();
        std::memcpy(offset + c + group * kLanes, &stored, sizeof(stored));
      }
    };
    int64_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) groups(c, std::integral_constant<int, 4>{});
    for (; c + kLanes <= channels; c += kLanes) groups(c, std::integral_constant<int, 1>{});
    for (; c < channels; ++c) {
      Maximum<T> maximum;
      if (count > 0) maximum.start(taps[0].offset);
      for (int64_t t = 0; t < count; ++t) {
        maximum.see(static_cast<Compute<T>>(input[taps[t].distance + c]), taps[t].offset);
      }
      maximum.store(value + c, offset + c);
    }
  }
}

void run_forward(const Tensor& input, const PoolCall& call, const Tensor& values, const Tensor& offsets) {
  if (values.numel() == 0) return;
  const Tables tables(call);
  const int64_t images = call.input_size[0];
  const int64_t channels = call.input_size[1];
  const int64_t outputs = tables.rows.outputs() * tables.cols.outputs();
  const int64_t taps = tables.rows.kernel() * tables.cols.kernel();
  dispatch_type(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const View<const T> x = read_view<T>(input);
    const View<T> y = write_view<T>(values);
    const View<uint8_t> o = write_view<uint8_t>(offsets);
    if (layout_of(call.output_size, x, y, o) == Layout::kInterleaved) {
      const int64_t rows = tables.rows.outputs();
      parallel_tasks(images * rows, channels * tables.cols.outputs() * taps, [&](int64_t first, int64_t last) {
        run_vectorised([&]() SPLITKERN_BODY {
          for (int64_t task = first; task < last; ++task) {
            const int64_t n = task / rows;
            const int64_t row = task % rows;
            pool_row(x.at(n, 0, 0, 0), x.strides, y.at(n, 0, row, 0), y.strides, o.at(n, 0, row, 0), o.strides,
                     channels, tables.rows.span(row), tables);
          }
        });
      });
      return;
    }
    parallel_tasks(images * channels, outputs * taps, [&](int64_t first, int64_t last) {
      run_vectorised([&]() SPLITKERN_BODY {
        for (int64_t task = first; task < last; ++task) {
          const int64_t n = task / channels;
          const int64_t c = task % channels;
          pool_plane(x.at(n, c, 0, 0), x.strides, y.at(n, c, 0, 0), y.strides, o.at(n, c, 0, 0), o.strides, tables);
        }
      });
    });
  });
}

// --- Offsets back to positions ---------------------------------------------------------------------------------------

// Row and column distance of every offset from its window's first position, so that no element needs a division.
struct TapTable {
  TapTable(const PoolCall& call, int64_t row_stride, int64_t col_stride)
      : positions(call.window.kernel[0] * call.window.kernel[1]) {
    for (int64_t offset = 0; offset < positions; ++offset) {
      rows[offset] = offset / call.window.kernel[1] * call.window.dilation[0];
      cols[offset] = offset % call.window.kernel[1] * call.window.dilation[1];
      distance[offset] = rows[offset] * row_stride + cols[offset] * col_stride;
    }
  }

  int64_t positions;
  int64_t rows[kMaxWindowPositions];
  int64_t cols[kMaxWindowPositions];
  int64_t distance[kMaxWindowPositions];
};

// Calls body(row, col, distance of the named input from the plane's origin) for every output of the plane whose offset
// names a position of its patch, row-major. Strides are the input plane's, as in `taps`. kUnit: the offsets' columns
// are neighbours.
template <bool kUnit, class Body>
SPLITKERN_INLINE void for_each_position(const uint8_t* offsets, const Sizes& offset_strides, const Tables& tables,
                                        const TapTable& taps, int64_t row_stride, int64_t col_stride,
                                        const Body& body) {
  for (int64_t row = 0; row < tables.rows.outputs(); ++row) {
    const AxisPatch& row_patch = tables.rows.patch_of(row);
    const Span& rows = tables.rows.span(row);
    const bool inner_row = rows.tap_begin == 0 && rows.tap_end == tables.rows.kernel();
    const uint8_t* const line = offsets + row * offset_strides[2];
    const int64_t offset_stride = kUnit ? 1 : offset_strides[3];
    const int64_t row_distance = rows.first * row_stride;
    for (const AxisPatch& col_patch : tables.cols.patches()) {
      const auto border = [&](int64_t begin, int64_t end) SPLITKERN_BODY {
        for (int64_t col = begin; col < end; ++col) {
          const int64_t offset = line[col * offset_stride];
          if (offset >= taps.positions) continue;
          const int64_t input_row = rows.first + taps.rows[offset];
          const int64_t input_col = tables.cols.span(col).first + taps.cols[offset];
          if (input_row < row_patch.in_begin || input_row >= row_patch.in_end || input_col < col_patch.in_begin ||
              input_col >= col_patch.in_end) {
            continue;
          }
          body(row, col, input_row * row_stride + input_col * col_stride);
        }
      };
      if (!inner_row) {
        border(col_patch.out_begin, col_patch.out_end);
        continue;
      }
      border(col_patch.out_begin, col_patch.inner_begin);
      int64_t origin = 0;
      if (col_patch.inner_begin < col_patch.inner_end) {
        origin = row_distance + tables.cols.span(col_patch.inner_begin).first * col_stride;
      }
      for (int64_t col = col_patch.inner_begin; col < col_patch.inner_end; ++col) {
        const int64_t offset = line[col * offset_stride];
        if (offset < taps.positions) body(row, col, origin + taps.distance[offset]);
        origin += tables.cols.stride() * col_stride;
      }
      border(col_patch.inner_end, col_patch.out_end);
    }
  }
}

// --- Backward --------------------------------------------------------------------------------------------------------

// Eight stored offsets as integers of the elements' width. Spelt out for float, where GCC goes lane by lane otherwise.
template <class Flags>
SPLITKERN_INLINE Flags load_offsets(const uint8_t* from) {
  if constexpr (sizeof(Flags) == kLanes * sizeof(int32_t) && std::endian::native == std::endian::little) {
    using Bytes = uint8_t __attribute__((vector_size(16)));
    using Words = uint16_t __attribute__((vector_size(16)));
    Bytes bytes{};
    std::memcpy(&bytes, from, kLanes);
    const Words words = reinterpret_cast<Words>(
        __builtin_shufflevector(bytes, Bytes{}, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    using Quad = int32_t __attribute__((vector_size(16)));
    const Quad low = reinterpret_cast<Quad>(__builtin_shufflevector(words, Words{}, 0, 8, 1, 9, 2, 10, 3, 11));
    const Quad high = reinterpret_cast<Quad>(__builtin_shufflevector(words, Words{}, 4, 12, 5, 13, 6, 14, 7, 15));
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
  } else {
    OffsetLanes stored;
    std::memcpy(&stored, from, sizeof(stored));
    return __builtin_convertvector(stored, Flags);
  }
}

// One output that reads an input, by the distance of its first channel from the image's origin.
struct Sender {
  int64_t gradient;
  int64_t offset;
  int64_t tap;
};

// One row of inputs, all channels: every input adds what the outputs that read it send, row-major.
template <class T>
SPLITKERN_INLINE void gradient_row(const T* gradient, const Sizes& gradient_strides, const uint8_t* offsets,
                                   const Sizes& offset_strides, int64_t channels, const std::vector<Reader>& rows,
                                   const std::vector<std::vector<Reader>>& cols, int64_t kernel_cols, T* output,
                                   int64_t output_stride) {
  using Flags = decltype(Lanes<T>{} > Lanes<T>{});
  using Flag = std::conditional_t<std::is_same_v<Compute<T>, double>, int64_t, int32_t>;
  Sender senders[kMaxWindowPositions];
  for (size_t col = 0; col < cols.size(); ++col) {
    int64_t count = 0;
    for (const Reader& row_reader : rows) {
      for (const Reader& col_reader : cols[col]) {
        senders[count++] = {row_reader.output * gradient_strides[2] + col_reader.output * gradient_strides[3],
                            row_reader.output * offset_strides[2] + col_reader.output * offset_strides[3],
                            row_reader.tap * kernel_cols + col_reader.tap};
      }
    }
    T* const target = output + static_cast<int64_t>(col) * output_stride;
    const auto groups = [&](int64_t c, auto count_of_groups) SPLITKERN_BODY {
      constexpr int kGroups = decltype(count_of_groups)::value;
      Lanes<T> sums[kGroups] = {};
      for (int64_t s = 0; s < count; ++s) {
        const T* const from = gradient + senders[s].gradient + c;
        const uint8_t* const chosen_by = offsets + senders[s].offset + c;
        const Flags tap = Flags{} + static_cast<Flag>(senders[s].tap);
        for (int group = 0; group < kGroups; ++group) {
          const Flags chosen = load_offsets<Flags>(chosen_by + group * kLanes) == tap;
          sums[group] += chosen ? load_lanes(from + group * kLanes) : Lanes<T>{};
        }
      }
      for (int group = 0; group < kGroups; ++group) store_lanes(target + c + group * kLanes, sums[group]);
    };
    int64_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) groups(c, std::integral_constant<int, 4>{});
    for (; c + kLanes <= channels; c += kLanes) groups(c, std::integral_constant<int, 1>{});
    for (; c < channels; ++c) {
      Compute<T> sum = 0;
      for (int64_t s = 0; s < count; ++s) {
        if (offsets[senders[s].offset + c] != senders[s].tap) continue;
        sum += static_cast<Compute<T>>(gradient[senders[s].gradient + c]);
      }
      target[c] = static_cast<T>(sum);
    }
  }
}

// `plane` receives the sums, row-major and contiguous, in the type to compute in.
template <class T>
SPLITKERN_INLINE void gradient_plane(const T* gradient, const Sizes& gradient_strides, const uint8_t* offsets,
                                     const Sizes& offset_strides, const Tables& tables, const TapTable& taps,
                                     Compute<T>* plane) {
  const int64_t width = tables.cols.inputs();
  std::fill(plane, plane + tables.rows.inputs() * width, Compute<T>{0});
  dispatch_bool(offset_strides[3] == 1 && gradient_strides[3] == 1, [&](auto unit) SPLITKERN_BODY {
    constexpr bool kUnit = decltype(unit)::value;
    const int64_t col_stride = kUnit ? 1 : gradient_strides[3];
    for_each_position<kUnit>(offsets, offset_strides, tables, taps, width, 1,
                             [&](int64_t row, int64_t col, int64_t distance) SPLITKERN_BODY {
                               plane[distance] +=
                                   static_cast<Compute<T>>(gradient[row * gradient_strides[2] + col * col_stride]);
                             });
  });
}

void run_backward(const Tensor& grad_output, const Tensor& offsets, const PoolCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  const Tables tables(call);
  const int64_t images = call.input_size[0];
  const int64_t channels = call.input_size[1];
  const int64_t height = call.input_size[2];
  const int64_t width = call.input_size[3];
  dispatch_type(output.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const View<const T> g = read_view<T>(grad_output);
    const View<const uint8_t> o = read_view<uint8_t>(offsets);
    const View<T> dx = write_view<T>(output);
    if (layout_of(call.input_size, g, o, dx) == Layout::kInterleaved) {
      const auto row_readers = tables.rows.readers();
      const auto col_readers = tables.cols.readers();
      parallel_tasks(images * height, channels * width * 4, [&](int64_t first, int64_t last) {
        run_vectorised([&]() SPLITKERN_BODY {
          for (int64_t task = first; task < last; ++task) {
            const int64_t n = task / height;
            const int64_t row = task % height;
            gradient_row(g.at(n, 0, 0, 0), g.strides, o.at(n, 0, 0, 0), o.strides, channels, row_readers[row],
                         col_readers, tables.cols.kernel(), dx.at(n, 0, row, 0), dx.strides[3]);
          }
        });
      });
      return;
    }
    const TapTable taps(call, width, 1);
    const bool in_place =
        std::is_same_v<T, Compute<T>> && (width == 1 || dx.strides[3] == 1) && (height == 1 || dx.strides[2] == width);
    parallel_tasks(images * channels, height * width * 2, [&](int64_t first, int64_t last) {
      std::vector<Compute<T>> scratch(in_place ? 0 : height * width);
      for (int64_t task = first; task < last; ++task) {
        const int64_t n = task / channels;
        const int64_t c = task % channels;
        T* const target = dx.at(n, c, 0, 0);
        Compute<T>* plane = scratch.data();
        if constexpr (std::is_same_v<T, Compute<T>>) {
          if (in_place) plane = target;
        }
        gradient_plane(g.at(n, c, 0, 0), g.strides, o.at(n, c, 0, 0), o.strides, tables, taps, plane);
        if (in_place) continue;
        for (int64_t row = 0; row < height; ++row) {
          for (int64_t col = 0; col < width; ++col) {
            target[row * dx.strides[2] + col * dx.strides[3]] = static_cast<T>(plane[row * width + col]);
          }
        }
      }
    });
  });
}

// --- Gather ----------------------------------------------------------------------------------------------------------

void run_gather(const Tensor& input, const Tensor& offsets, const PoolCall& call, const Tensor& output) {
  if (output.numel() == 0) return;
  const Tables tables(call);
  const int64_t channels = call.input_size[1];
  const int64_t rows = tables.rows.outputs();
  const int64_t cols = tables.cols.outputs();
  dispatch_type(output.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const View<const T> x = read_view<T>(input);
    const View<const uint8_t> o = read_view<uint8_t>(offsets);
    const View<T> y = write_view<T>(output);
    const TapTable taps(call, x.strides[2], x.strides[3]);
    parallel_tasks(call.input_size[0] * channels, rows * cols, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t n = task / channels;
        const int64_t c = task % channels;
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t col = 0; col < cols; ++col) *y.at(n, c, row, col) = static_cast<T>(0.0f);
        }
        const T* const plane = x.at(n, c, 0, 0);
        for_each_position<false>(o.at(n, c, 0, 0), o.strides, tables, taps, x.strides[2], x.strides[3],
                                 [&](int64_t row, int64_t col, int64_t distance)
                                     SPLITKERN_BODY { *y.at(n, c, row, col) = plane[distance]; });
      }
    });
  });
}

}  // namespace

std::tuple<Tensor, Tensor> patch_max_pool2d(const Tensor& input, const IntList& kernel_size, const IntList& stride,
                                            const IntList& padding, const IntList& dilation, const IntList& in_rows,
                                            const IntList& in_cols, const IntList& out_rows, const IntList& out_cols) {
  const PoolCall call =
      check_max_pool2d(input, kernel_size, stride, padding, dilation, {in_rows, in_cols, out_rows, out_cols});
  const Tensor values = new_output(input, call.output_size);
  const Tensor offsets = new_output(input, call.output_size, ScalarType::Byte);
  run_forward(input, call, values, offsets);
  return {values, offsets};
}

void patch_max_pool2d_out(const Tensor& input, const IntList& kernel_size, const IntList& stride,
                          const IntList& padding, const IntList& dilation, const IntList& in_rows,
                          const IntList& in_cols, const IntList& out_rows, const IntList& out_cols,
                          const Tensor& values, const Tensor& offsets) {
  const PoolCall call =
      check_max_pool2d(input, kernel_size, stride, padding, dilation, {in_rows, in_cols, out_rows, out_cols});
  check_output(kMaxPool2d, "values", values, input, call.output_size, input.scalar_type());
  check_output(kMaxPool2d, "offsets", offsets, input, call.output_size, ScalarType::Byte);
  run_forward(input, call, values, offsets);
}

Tensor patch_max_pool2d_backward(const Tensor& grad_output, const Tensor& offsets, const IntList& input_size,
                                 const IntList& kernel_size, const IntList& stride, const IntList& padding,
                                 const IntList& dilation, const IntList& in_rows, const IntList& in_cols,
                                 const IntList& out_rows, const IntList& out_cols) {
  const PoolCall call = check_max_pool2d_backward(grad_output, offsets, input_size, kernel_size, stride, padding,
                                                  dilation, {in_rows, in_cols, out_rows, out_cols});
  const Tensor output = new_output(grad_output, call.input_size);
  run_backward(grad_output, offsets, call, output);
  return output;
}

void patch_max_pool2d_backward_out(const Tensor& grad_output, const Tensor& offsets, const IntList& input_size,
                                   const IntList& kernel_size, const IntList& stride, const IntList& padding,
                                   const IntList& dilation, const IntList& in_rows, const IntList& in_cols,
                                   const IntList& out_rows, const IntList& out_cols, const Tensor& output) {
  const PoolCall call = check_max_pool2d_backward(grad_output, offsets, input_size, kernel_size, stride, padding,
                                                  dilation, {in_rows, in_cols, out_rows, out_cols});
  check_output(kMaxPool2dBackward, "output", output, grad_output, call.input_size, grad_output.scalar_type());
  run_backward(grad_output, offsets, call, output);
}

Tensor patch_max_pool2d_gather(const Tensor& input, const Tensor& offsets, const IntList& kernel_size,
                               const IntList& stride, const IntList& padding, const IntList& dilation,
                               const IntList& in_rows, const IntList& in_cols, const IntList& out_rows,
                               const IntList& out_cols) {
  const PoolCall call = check_max_pool2d_gather(input, offsets, kernel_size, stride, padding, dilation,
                                                {in_rows, in_cols, out_rows, out_cols});
  const Tensor output = new_output(input, call.output_size);
  run_gather(input, offsets, call, output);
  return output;
}

void patch_max_pool2d_gather_out(const Tensor& input, const Tensor& offsets, const IntList& kernel_size,
                                 const IntList& stride, const IntList& padding, const IntList& dilation,
                                 const IntList& in_rows, const IntList& in_cols, const IntList& out_rows,
                                 const IntList& out_cols, const Tensor& output) {
  const PoolCall call = check_max_pool2d_gather(input, offsets, kernel_size, stride, padding, dilation,
                                                {in_rows, in_cols, out_rows, out_cols});
  check_output(kMaxPool2dGather, "output", output, input, call.output_size, input.scalar_type());
  run_gather(input, offsets, call, output);
}

}  // namespace splitkern::cpu
