// Gradient with respect to an input of at most four channels, in gather form: a thread computes all channels of
// four inputs, a stride apart so that the same taps reach them. Called through conv_paths.h. Few trainings need it.
// Sums run over kernel rows, kernel columns, then output channels, in fp32. grad_output has neighbouring channels.
#include <algorithm>

#include "../budgets.h"
#include "conv.h"
#include "tile.h"

namespace splitkern::kernels::first_layer {
namespace {

constexpr int kInputs = 4;  // of one thread

struct InputGradCall : ConvInputGradParams {
  int32_t column_groups;  // of kInputs * stride columns
  int64_t threads;
};

template <class T>
inline constexpr int kVectorElements = 16 / static_cast<int>(sizeof(T));

// The weights of one tap and output channel, all input channels.
struct alignas(16) Factors {
  float of_channel[kMaxInChannels];
};

template <class T>
SPLITKERN_DEVICE void widen(float (&values)[kVectorElements<T>], const Vector16& vector) {
#pragma unroll
  for (int i = 0; i < kVectorElements<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = bits_float(vector.words[i]);
    } else {
      values[i] = to_accumulator(from_bits<T>(static_cast<uint16_t>(vector.words[i / 2] >> (i % 2 * 16))));
    }
  }
}

template <class T>
__global__ void first_layer_input_grad_kernel(const __grid_constant__ InputGradCall params) {
  constexpr int kElements = kVectorElements<T>;
  Factors* const weights = &dynamic_shared<Factors>();
  const int32_t out_channels = params.out_channels_per_group;
  const int32_t kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  const int32_t taps = static_cast<int32_t>(params.row_window.kernel) * kernel_columns;
  for (int32_t index = thread_index(); index < taps * out_channels; index += kThreads) {
    const int32_t tap = index / out_channels;
    const int32_t channel = index - tap * out_channels;
    const int32_t tap_y = tap / kernel_columns;
    const T* from = static_cast<const T*>(params.weight) + channel * params.weight_strides.batch +
                    tap_y * params.weight_strides.row + (tap - tap_y * kernel_columns) * params.weight_strides.column;
#pragma unroll
    for (int i = 0; i < kMaxInChannels; ++i) {
      weights[index].of_channel[i] =
          i < params.in_channels ? to_accumulator(from[i * params.weight_strides.channel]) : 0.0f;
    }
  }
  block_barrier();

  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const Region region = input_region(params.grid, params.batch, params.in_channels);
  const int32_t stride = static_cast<int32_t>(params.column_window.stride);

  for (int64_t index = global_thread_index(); index < params.threads; index += global_thread_count()) {
    int64_t rest = index;
    const int32_t residue = take_remainder(rest, stride);
    const int32_t group = take_remainder(rest, params.column_groups);
    const int32_t row = region.row_begin + take_remainder(rest, region.rows);
    const int64_t image = rest;
    const int32_t row_patch = find_patch(rows.in_bounds, rows.patches, row);
    const int64_t first_column = static_cast<int64_t>(group) * kInputs * stride + residue;

    int32_t column[kInputs];  // negative: none
    int32_t patch[kInputs];
    float sums[kInputs][kMaxInChannels] = {};
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      const int64_t place = first_column + static_cast<int64_t>(i) * stride;
      column[i] = place < region.columns ? region.column_begin + static_cast<int32_t>(place) : -1;
      patch[i] = column[i] < 0 ? 0 : find_patch(columns.in_bounds, columns.patches, column[i]);
    }

    for (int64_t tap_y = 0; tap_y < params.row_window.kernel; ++tap_y) {
      const int64_t out_row =
          output_reading(params.row_window, row, tap_y, rows.out_bounds[row_patch], rows.out_bounds[row_patch + 1]);
      if (out_row < 0) continue;
      const T* const line = static_cast<const T*>(params.grad_output) + image * params.grad_output_strides.batch +
                            out_row * params.grad_output_strides.row;
      for (int32_t tap_x = 0; tap_x < kernel_columns; ++tap_x) {
        const T* from[kInputs];
        bool any = false;
#pragma unroll
        for (int i = 0; i < kInputs; ++i) {
          const int64_t out_column =
              column[i] < 0 ? -1
                            : output_reading(params.column_window, column[i], tap_x, columns.out_bounds[patch[i]],
                                             columns.out_bounds[patch[i] + 1]);
          from[i] = out_column < 0 ? nullptr : line + out_column * params.grad_output_strides.column;
          any = any || from[i] != nullptr;
        }
        if (!any) continue;
        const Factors* const factors = weights + (static_cast<int32_t>(tap_y) * kernel_columns + tap_x) * out_channels;
#pragma unroll 1
        for (int32_t channel = 0; channel < out_channels; channel += kElements) {
          float grads[kInputs][kElements];
#pragma unroll
          for (int i = 0; i < kInputs; ++i) {
            widen<T>(grads[i], from[i] == nullptr ? Vector16{{0, 0, 0, 0}} : load_global<Vector16>(from[i] + channel));
          }
#pragma unroll
          for (int k = 0; k < kElements; ++k) {
            const Factors factor = factors[channel + k];
#pragma unroll
            for (int i = 0; i < kInputs; ++i) {
              // An infinite weight must not meet the zeros of an output that does not read this input.
              if (from[i] == nullptr) continue;
#pragma unroll
              for (int c = 0; c < kMaxInChannels; ++c) {
                sums[i][c] = multiply_add(grads[i][k], factor.of_channel[c], sums[i][c]);
              }
            }
          }
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      if (column[i] < 0) continue;
      T* const output = static_cast<T*>(params.output) + image * params.output_strides.batch +
                        row * params.output_strides.row + column[i] * params.output_strides.column;
#pragma unroll
      for (int c = 0; c < kMaxInChannels; ++c) {
        if (c < params.in_channels) output[c * params.output_strides.channel] = from_accumulator<T>(sums[i][c]);
      }
    }
  }
}

size_t shared_bytes(const ConvInputGradParams& params) {
  return static_cast<size_t>(params.row_window.kernel * params.column_window.kernel) * params.out_channels_per_group *
         sizeof(Factors);
}

template <class T>
void launch_typed(const InputGradCall& call, const DeviceTraits& traits, cudaStream_t stream) {
  const int64_t blocks =
      std::min<int64_t>((call.threads + kThreads - 1) / kThreads, static_cast<int64_t>(4) * traits.multiprocessors);
  launch(&first_layer_input_grad_kernel<T>, Dim3{static_cast<unsigned>(blocks), 1u, 1u},
         Dim3{static_cast<unsigned>(kThreads), 1u, 1u}, shared_bytes(call), stream, call);
}

}  // namespace

std::string refusal(const ConvInputGradParams& params, const DeviceTraits& traits) {
  std::string refused = common_refusal(params.type, true, params.in_channels != params.in_channels_per_group,
                                       params.in_channels_per_group, params.row_window, params.column_window);
  if (!refused.empty()) return refused;
  const int64_t elements = params.type == ElementType::kFloat32 ? 4 : 8;
  refused = vector_refusal(
      "grad_output", params.grad_output, params.grad_output_strides,
      {params.batch, params.out_channels_per_group, params.grid.rows.out_bounds[params.grid.rows.patches],
       params.grid.columns.out_bounds[params.grid.columns.patches]},
      elements, 16);
  if (!refused.empty()) return refused;
  const int64_t most_bytes =
      std::min(traits.shared_memory_bytes, shared_budget("first_layer::first_layer_input_grad_kernel"));
  if (static_cast<int64_t>(shared_bytes(params)) > most_bytes) {
    return "the weights take " + std::to_string(shared_bytes(params)) + " bytes of shared memory, more than " +
           std::to_string(most_bytes);
  }
  return {};
}

int64_t workspace_bytes(const ConvInputGradParams&, const DeviceTraits&) {
  return 0;
}

void launch(const ConvInputGradParams& params, const DeviceTraits& traits, void*, cudaStream_t stream) {
  InputGradCall call{};
  static_cast<ConvInputGradParams&>(call) = params;
  const Region region = input_region(params.grid, params.batch, params.in_channels);
  const int64_t step = kInputs * params.column_window.stride;
  call.column_groups = static_cast<int32_t>((region.columns + step - 1) / step);
  call.threads = static_cast<int64_t>(region.batch) * region.rows * call.column_groups * params.column_window.stride;
  switch (params.type) {
    case ElementType::kFloat32:
      return launch_typed<float>(call, traits, stream);
    case ElementType::kFloat16:
      return launch_typed<Half>(call, traits, stream);
    default:
      return launch_typed<BFloat16>(call, traits, stream);
  }
}

}  // namespace splitkern::kernels::first_layer
