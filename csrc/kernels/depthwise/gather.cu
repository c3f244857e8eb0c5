// Forward passes and input gradients of convolutions in groups of few channels, both as a gathering of results
// (direct.h). Where every group is one channel a thread computes 16 bytes of channels of four neighbouring results,
// else four channels of one group. Called through conv_paths.h. Sums run over kernel rows, kernel columns, then the
// group's channels, in fp32.
#include "../budgets.h"
#include "conv.h"
#include "direct.h"

namespace splitkern::kernels::depthwise {
namespace {

constexpr int kGroupResults = 4;  // channels of a group that a thread computes
constexpr int kMaxDepthwiseLanes = 32;
constexpr int kMaxGroupedLanes = 16;

template <class T, class Conv>
SPLITKERN_DEVICE const T* source_line(const Gather<Conv>& params, int64_t image, int32_t row, int32_t row_patch,
                                      int32_t tap_y) {
  const int64_t source = source_of<Gather<Conv>::kTransposed>(params.row_window, row, tap_y);
  if (source < params.grid.rows.in_bounds[row_patch] || source >= params.grid.rows.in_bounds[row_patch + 1]) {
    return nullptr;
  }
  return static_cast<const T*>(params.source) + image * params.source_strides.batch +
         source * params.source_strides.row;
}

template <class T, class Conv>
SPLITKERN_DEVICE float weight_at(const Gather<Conv>& params, int32_t group, int32_t destination, int32_t source,
                                 int32_t tap) {
  const int32_t kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  const int32_t tap_y = tap / kernel_columns;
  return to_accumulator(static_cast<const T*>(
      params.weight)[group * params.weight_group_stride + destination * params.weight_destination_stride +
                     source * params.weight_source_stride + tap_y * params.weight_row_stride +
                     (tap - tap_y * kernel_columns) * params.weight_column_stride]);
}

// kKernelColumns and kStride: of the columns, with dilation 1, whose inputs then stay in registers; 0: any.
template <class T, class Conv, int kKernelColumns, int kStride>
__global__ void depthwise_gather_kernel(const __grid_constant__ Gather<Conv> params) {
  constexpr int kElements = kVectorElements<T>;
  constexpr bool kTransposed = Gather<Conv>::kTransposed;
  float* const weights = &dynamic_shared<float>();  // [tap][channel of the block]
  const int32_t block_channels = params.lanes * kElements;
  const int32_t first_channel = static_cast<int32_t>(block_index().y) * block_channels;
  const int32_t kernel_rows = static_cast<int32_t>(params.row_window.kernel);
  const int32_t kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  for (int32_t index = thread_index(); index < kernel_rows * kernel_columns * block_channels; index += kThreads) {
    const int32_t tap = index / block_channels;
    const int32_t channel = first_channel + index - tap * block_channels;
    weights[index] = channel < params.groups ? weight_at<T>(params, channel, 0, 0, tap) : 0.0f;
  }
  block_barrier();

  const int32_t lane = static_cast<int32_t>(thread_index()) % params.lanes;
  const int32_t place = static_cast<int32_t>(thread_index()) / params.lanes;
  const int32_t places = kThreads / params.lanes;
  const int32_t channel = first_channel + lane * kElements;
  if (place >= places || channel >= params.groups) return;
  float bias[kElements] = {};
  if (params.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      bias[i] = to_accumulator(static_cast<const T*>(params.bias)[(channel + i) * params.bias_stride]);
    }
  }

  const AxisPatches& rows = params.grid.rows;
  const int64_t units = static_cast<int64_t>(params.batch) * params.bands * params.runs;
  for (int64_t unit = static_cast<int64_t>(block_index().x) * places + place; unit < units;
       unit += static_cast<int64_t>(grid_extent().x) * places) {
    int64_t rest = unit;
    const Run run = run_at(params.grid.columns, params.first_run, take_remainder(rest, params.runs));
    int32_t row = rows.out_bounds[0] + take_remainder(rest, params.bands) * kBand;
    const int64_t image = rest;
    const int32_t row_end = row + kBand < rows.out_bounds[rows.patches] ? row + kBand : rows.out_bounds[rows.patches];
    const uint32_t width = static_cast<uint32_t>(run.source_end - run.source_begin);

#pragma unroll 1
    for (; row < row_end; ++row) {
      const int32_t row_patch = find_patch(rows.out_bounds, rows.patches, row);
      float sums[kRun][kElements] = {};
#pragma unroll 1
      for (int32_t tap_y = 0; tap_y < kernel_rows; ++tap_y) {
        const T* line = source_line<T>(params, image, row, row_patch, tap_y);
        if (line == nullptr) continue;
        line += channel + run.source_begin * params.source_strides.column;
        const float* const factors = weights + tap_y * kernel_columns * block_channels + lane * kElements;
        if constexpr (kKernelColumns != 0) {
          // Each result meets its taps in ascending order, as in the other kernels: an input gradient's from right to
          // left.
          constexpr int kSpan = (kRun - 1) * kStride + kKernelColumns;
          const int32_t first = relative_to(
              run.source_begin, kTransposed ? run.begin + params.column_window.padding - (kKernelColumns - 1)
                                            : static_cast<int64_t>(run.begin) * kStride - params.column_window.padding);
          float factor[kKernelColumns][kElements];
#pragma unroll
          for (int tap = 0; tap < kKernelColumns; ++tap) {
            const int32_t tap_x = kTransposed ? kKernelColumns - 1 - tap : tap;
#pragma unroll
            for (int i = 0; i < kElements; ++i) factor[tap][i] = factors[tap_x * block_channels + i];
          }
#pragma unroll
          for (int step = 0; step < kSpan; ++step) {
            const int column = kTransposed ? kSpan - 1 - step : step;
            if (static_cast<uint32_t>(first + column) >= width) continue;
            float values[kElements];
            widen<T>(values, load_global<Vector16>(line + (first + column) * params.source_strides.column));
#pragma unroll
            for (int o = 0; o < kRun; ++o) {
              const int tap = column - o * kStride;
              if (tap < 0 || tap >= kKernelColumns) continue;
#pragma unroll
              for (int i = 0; i < kElements; ++i) {
                sums[o][i] = multiply_add(values[i], factor[tap][i], sums[o][i]);
              }
            }
          }
        } else {
          for (int32_t tap_x = 0; tap_x < kernel_columns; ++tap_x) {
            float factor[kElements];
#pragma unroll
            for (int i = 0; i < kElements; ++i) factor[i] = factors[tap_x * block_channels + i];
#pragma unroll
            for (int o = 0; o < kRun; ++o) {
              const int64_t column = source_of<kTransposed>(params.column_window, run.begin + o, tap_x);
              if (column < run.source_begin || column >= run.source_end) continue;
              float values[kElements];
              widen<T>(values,
                       load_global<Vector16>(line + (column - run.source_begin) * params.source_strides.column));
#pragma unroll
              for (int i = 0; i < kElements; ++i) sums[o][i] = multiply_add(values[i], factor[i], sums[o][i]);
            }
          }
        }
      }
      T* const to = static_cast<T*>(params.destination) + image * params.destination_strides.batch +
                    row * params.destination_strides.row + run.begin * params.destination_strides.column + channel;
#pragma unroll
      for (int o = 0; o < kRun; ++o) {
        if (o >= run.count) continue;
#pragma unroll
        for (int i = 0; i < kElements; ++i) sums[o][i] = activate(sums[o][i] + bias[i], params.relu);
        store_global(to + o * params.destination_strides.column, narrow<T>(sums[o]));
      }
    }
  }
}

// kVector: four channels of the source at once; the destination's at once where vector_stores.
template <class T, class Conv, bool kVector>
__global__ void grouped_gather_kernel(const __grid_constant__ Gather<Conv> params) {
  constexpr bool kTransposed = Gather<Conv>::kTransposed;
  struct alignas(16) Factors {
    float of_result[kGroupResults];
  };
  Factors* const weights = &dynamic_shared<Factors>();  // [tap][channel of the source][lane]
  const int32_t lanes = params.lanes;
  const int32_t vectors_per_group = (params.destination_channels + kGroupResults - 1) / kGroupResults;
  const int32_t first_vector = static_cast<int32_t>(block_index().y) * lanes;
  const int32_t kernel_rows = static_cast<int32_t>(params.row_window.kernel);
  const int32_t kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  const int32_t source_channels = params.source_channels;
  for (int32_t index = thread_index(); index < kernel_rows * kernel_columns * source_channels * lanes;
       index += kThreads) {
    int32_t rest = index / lanes;
    const int32_t vector = first_vector + index - rest * lanes;
    const int32_t tap = rest / source_channels;
    const int32_t source = rest - tap * source_channels;
    const int32_t group = vector / vectors_per_group;
    const int32_t first = (vector - group * vectors_per_group) * kGroupResults;
#pragma unroll
    for (int i = 0; i < kGroupResults; ++i) {
      weights[index].of_result[i] = vector < params.vectors && first + i < params.destination_channels
                                        ? weight_at<T>(params, group, first + i, source, tap)
                                        : 0.0f;
    }
  }
  block_barrier();

  const int32_t lane = static_cast<int32_t>(thread_index()) % lanes;
  const int32_t place = static_cast<int32_t>(thread_index()) / lanes;
  const int32_t places = kThreads / lanes;
  const int32_t vector = first_vector + lane;
  if (place >= places || vector >= params.vectors) return;
  const int32_t group = vector / vectors_per_group;
  const int32_t in_group = (vector - group * vectors_per_group) * kGroupResults;
  const int32_t channel = group * params.destination_channels + in_group;
  const int32_t left = params.destination_channels - in_group;
  const int32_t results = left < kGroupResults ? left : kGroupResults;
  const int64_t source_channel_offset = static_cast<int64_t>(group) * source_channels * params.source_strides.channel;

  const AxisPatches& rows = params.grid.rows;
  const int64_t units = static_cast<int64_t>(params.batch) * params.bands * params.runs;
  for (int64_t unit = static_cast<int64_t>(block_index().x) * places + place; unit < units;
       unit += static_cast<int64_t>(grid_extent().x) * places) {
    int64_t rest = unit;
    const Run run = run_at(params.grid.columns, params.first_run, take_remainder(rest, params.runs));
    int32_t row = rows.out_bounds[0] + take_remainder(rest, params.bands) * kBand;
    const int64_t image = rest;
    const int32_t row_end = row + kBand < rows.out_bounds[rows.patches] ? row + kBand : rows.out_bounds[rows.patches];

#pragma unroll 1
    for (; row < row_end; ++row) {
      const int32_t row_patch = find_patch(rows.out_bounds, rows.patches, row);
      float sums[kRun][kGroupResults] = {};
#pragma unroll 1
      for (int32_t tap_y = 0; tap_y < kernel_rows; ++tap_y) {
        const T* const line = source_line<T>(params, image, row, row_patch, tap_y);
        if (line == nullptr) continue;
#pragma unroll 1
        for (int32_t tap_x = 0; tap_x < kernel_columns; ++tap_x) {
          const T* from[kRun];
#pragma unroll
          for (int o = 0; o < kRun; ++o) {
            const int64_t column = source_of<kTransposed>(params.column_window, run.begin + o, tap_x);
            from[o] = column < run.source_begin || column >= run.source_end
                          ? nullptr
                          : line + column * params.source_strides.column + source_channel_offset;
          }
          const Factors* const factors = weights + (tap_y * kernel_columns + tap_x) * source_channels * lanes + lane;
#pragma unroll 1
          for (int32_t source = 0; source < source_channels; source += 4) {
            float values[kRun][4];
#pragma unroll
            for (int o = 0; o < kRun; ++o) {
              if (from[o] != nullptr) {
                load4<T, kVector>(values[o], from[o] + source * params.source_strides.channel,
                                  params.source_strides.channel, source_channels - source);
              } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) values[o][i] = 0;
              }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (!kVector && source + i >= source_channels) continue;
              const Factors factor = factors[(source + i) * lanes];
#pragma unroll
              for (int o = 0; o < kRun; ++o) {
#pragma unroll
                for (int k = 0; k < kGroupResults; ++k) {
                  sums[o][k] = multiply_add(values[o][i], factor.of_result[k], sums[o][k]);
                }
              }
            }
          }
        }
      }
      T* const to = static_cast<T*>(params.destination) + image * params.destination_strides.batch +
                    row * params.destination_strides.row + run.begin * params.destination_strides.column +
                    channel * params.destination_strides.channel;
#pragma unroll
      for (int k = 0; k < kGroupResults; ++k) {
        if (k >= results) continue;
        const float bias = params.bias == nullptr
                               ? 0.0f
                               : to_accumulator(static_cast<const T*>(params.bias)[(channel + k) * params.bias_stride]);
#pragma unroll
        for (int o = 0; o < kRun; ++o) {
          if (o >= run.count) continue;
          to[o * params.destination_strides.column + k * params.destination_strides.channel] =
              from_accumulator<T>(activate(sums[o][k] + bias, params.relu));
        }
      }
    }
  }
}

// --- On the host ------------------------------------------------------------------------------------------

Gather<ConvForwardParams> gather_of(const ConvForwardParams& params) {
  Gather<ConvForwardParams> call{};
  call.type = params.type;
  call.batch = params.batch;
  call.groups = params.out_channels / params.out_channels_per_group;
  call.source_channels = params.in_channels_per_group;
  call.destination_channels = params.out_channels_per_group;
  call.relu = params.relu;
  call.row_window = params.row_window;
  call.column_window = params.column_window;
  call.grid = params.grid;
  call.source_strides = params.input_strides;
  call.destination_strides = params.output_strides;
  call.weight_destination_stride = params.weight_strides.batch;
  call.weight_source_stride = params.weight_strides.channel;
  call.weight_group_stride = params.weight_strides.batch * params.out_channels_per_group;
  call.weight_row_stride = params.weight_strides.row;
  call.weight_column_stride = params.weight_strides.column;
  call.bias_stride = params.bias_stride;
  call.source = params.input;
  call.weight = params.weight;
  call.bias = params.bias;
  call.destination = params.output;
  return call;
}

AxisPatches exchanged(const AxisPatches& axis) {
  AxisPatches other = axis;
  std::copy(std::begin(axis.in_bounds), std::end(axis.in_bounds), other.out_bounds);
  std::copy(std::begin(axis.out_bounds), std::end(axis.out_bounds), other.in_bounds);
  return other;
}

Gather<ConvInputGradParams> gather_of(const ConvInputGradParams& params) {
  Gather<ConvInputGradParams> call{};
  call.type = params.type;
  call.batch = params.batch;
  call.groups = params.in_channels / params.in_channels_per_group;
  call.source_channels = params.out_channels_per_group;
  call.destination_channels = params.in_channels_per_group;
  call.row_window = params.row_window;
  call.column_window = params.column_window;
  call.grid = {exchanged(params.grid.rows), exchanged(params.grid.columns)};
  call.source_strides = params.grad_output_strides;
  call.destination_strides = params.output_strides;
  call.weight_destination_stride = params.weight_strides.channel;
  call.weight_source_stride = params.weight_strides.batch;
  call.weight_group_stride = params.weight_strides.batch * params.out_channels_per_group;
  call.weight_row_stride = params.weight_strides.row;
  call.weight_column_stride = params.weight_strides.column;
  call.source = params.grad_output;
  call.weight = params.weight;
  call.destination = params.output;
  return call;
}

// How a call is computed: by 16 bytes of channels, or by four channels of a group.
struct Plan {
  bool depthwise;
  bool vector_loads;
  int64_t shared_bytes;
};

template <class Conv>
int64_t taps_of(const Gather<Conv>& call) {
  return call.row_window.kernel * call.column_window.kernel;
}

// Deals channels to the lanes of a block: as few lanes as the same number of blocks allows.
int32_t even_lanes(int32_t vectors, int64_t most) {
  const int64_t blocks = (vectors + most - 1) / most;
  return static_cast<int32_t>((vectors + blocks - 1) / blocks);
}

template <class Conv>
std::string plan_call(const DeviceTraits& traits, Gather<Conv>& call, Plan& plan) {
  constexpr bool kTransposed = Gather<Conv>::kTransposed;
  if (call.type == ElementType::kFloat64) return "the type is float64";
  if (call.groups == 1) return "the channels are in one group";
  if (call.source_channels % 8 == 0 && call.destination_channels % 8 == 0) {
    return "the groups have " + std::to_string(kTransposed ? call.destination_channels : call.source_channels) +
           " input and " + std::to_string(kTransposed ? call.source_channels : call.destination_channels) +
           " output channels, enough for tensor cores";
  }
  const bool wide = call.type == ElementType::kFloat32;
  const int32_t elements = wide ? 4 : 8;
  plan.depthwise =
      call.source_channels == 1 && call.destination_channels == 1 &&
      takes_vectors(call.source, call.source_strides, extents_in(call.grid, call.batch, call.groups), elements, 16) &&
      takes_vectors(call.destination, call.destination_strides, extents_out(call.grid, call.batch, call.groups),
                    elements, 16);
  int64_t lane_bytes;
  int64_t most_lanes;
  if (plan.depthwise) {
    call.vectors = call.groups / elements;
    lane_bytes = taps_of(call) * elements * static_cast<int64_t>(sizeof(float));
    most_lanes = kMaxDepthwiseLanes;
  } else {
    plan.vector_loads = takes_vectors(call.source, call.source_strides,
                                      extents_in(call.grid, call.batch, call.source_channels), 4, wide ? 16 : 8);
    const int64_t vectors =
        static_cast<int64_t>(call.groups) * ((call.destination_channels + kGroupResults - 1) / kGroupResults);
    call.vectors = static_cast<int32_t>(vectors);
    lane_bytes = taps_of(call) * call.source_channels * static_cast<int64_t>(kGroupResults * sizeof(float));
    most_lanes = kMaxGroupedLanes;
  }
  // Half the shared memory, so that two blocks hide each other's waiting.
  const int64_t most_bytes = plan.depthwise ? shared_budget("depthwise::depthwise_gather_kernel")
                                            : shared_budget("depthwise::grouped_gather_kernel");
  most_lanes = std::min(most_lanes, std::min(traits.shared_memory_bytes / 2, most_bytes) / lane_bytes);
  if (most_lanes == 0) return "the weights of a group do not fit in shared memory";
  call.lanes = even_lanes(call.vectors, most_lanes);
  if (call.vectors > static_cast<int64_t>(call.lanes) * 65535) return "there are too many channels";
  plan.shared_bytes = call.lanes * lane_bytes;

  const AxisPatches& columns = call.grid.columns;
  int64_t runs = 0;
  for (int32_t i = 0; i < columns.patches; ++i) {
    call.first_run[i] = static_cast<int32_t>(runs);
    runs += (columns.out_bounds[i + 1] - columns.out_bounds[i] + kRun - 1) / kRun;
  }
  call.first_run[columns.patches] = static_cast<int32_t>(runs);
  call.runs = static_cast<int32_t>(runs);
  const AxisPatches& rows = call.grid.rows;
  call.bands = (rows.out_bounds[rows.patches] - rows.out_bounds[0] + kBand - 1) / kBand;
  return {};
}

template <class T, class Conv>
void launch_typed(const Gather<Conv>& call, const Plan& plan, const DeviceTraits& traits, cudaStream_t stream) {
  const int64_t places = kThreads / call.lanes;
  const int64_t units = static_cast<int64_t>(call.batch) * call.bands * call.runs;
  const int64_t channel_blocks = (call.vectors + call.lanes - 1) / call.lanes;
  const int64_t blocks = std::min<int64_t>((units + places - 1) / places,
                                           std::max<int64_t>(1, 16 * traits.multiprocessors / channel_blocks));
  const auto start = [&](void (*kernel)(Gather<Conv>)) {
    launch(kernel, Dim3{static_cast<unsigned>(blocks), static_cast<unsigned>(channel_blocks), 1u},
           Dim3{static_cast<unsigned>(kThreads), 1u, 1u}, static_cast<size_t>(plan.shared_bytes), stream, call);
  };
  if (!plan.depthwise) {
    return start(plan.vector_loads ? &grouped_gather_kernel<T, Conv, true> : &grouped_gather_kernel<T, Conv, false>);
  }
  const WindowAxis& window = call.column_window;
  if (window.dilation == 1 && window.stride == 1) {
    if (window.kernel == 3) return start(&depthwise_gather_kernel<T, Conv, 3, 1>);
    if (window.kernel == 5) return start(&depthwise_gather_kernel<T, Conv, 5, 1>);
    if (window.kernel == 7) return start(&depthwise_gather_kernel<T, Conv, 7, 1>);
  }
  if constexpr (!Gather<Conv>::kTransposed) {
    if (window.dilation == 1 && window.stride == 2 && window.kernel == 3) {
      return start(&depthwise_gather_kernel<T, Conv, 3, 2>);
    }
  }
  start(&depthwise_gather_kernel<T, Conv, 0, 0>);
}

template <class Conv>
std::string refusal_of(const Conv& params, const DeviceTraits& traits) {
  Gather<Conv> call = gather_of(params);
  Plan plan{};
  return plan_call(traits, call, plan);
}

template <class Conv>
void launch_gather(const Conv& params, const DeviceTraits& traits, cudaStream_t stream) {
  Gather<Conv> call = gather_of(params);
  Plan plan{};
  const std::string refused = plan_call(traits, call, plan);
  if (!refused.empty()) throw std::runtime_error(std::string(params.kOperator) + ": " + refused);
  switch (params.type) {
    case ElementType::kFloat32:
      return launch_typed<float>(call, plan, traits, stream);
    case ElementType::kFloat16:
      return launch_typed<Half>(call, plan, traits, stream);
    default:
      return launch_typed<BFloat16>(call, plan, traits, stream);
  }
}

}  // namespace

std::string refusal(const ConvForwardParams& params, const DeviceTraits& traits) {
  return refusal_of(params, traits);
}
std::string refusal(const ConvInputGradParams& params, const DeviceTraits& traits) {
  return refusal_of(params, traits);
}

int64_t workspace_bytes(const ConvForwardParams&, const DeviceTraits&) {
  return 0;
}
int64_t workspace_bytes(const ConvInputGradParams&, const DeviceTraits&) {
  return 0;
}

void launch(const ConvForwardParams& params, const DeviceTraits& traits, void*, cudaStream_t stream) {
  launch_gather(params, traits, stream);
}
void launch(const ConvInputGradParams& params, const DeviceTraits& traits, void*, cudaStream_t stream) {
  launch_gather(params, traits, stream);
}

}  // namespace splitkern::kernels::depthwise
