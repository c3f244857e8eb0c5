// Weight gradients of convolutions in groups of few channels. Each block sums a fixed, contiguous share of the
// outputs for some channels and taps; a second kernel adds the shares in ascending order, so the result is the same
// in every run. Where every group is one channel a thread carries 16 bytes of channels, else four by four channels of
// one group. Called through conv_paths.h.
#include "../budgets.h"
#include "conv.h"
#include "direct.h"

namespace splitkern::kernels::depthwise {
namespace {

constexpr int kDepthwiseTaps = 9;  // that a thread sums at once: a whole 3x3 window
constexpr int kGroupedTaps = 3;
constexpr int kBlockChannels = 4;  // of a group, both input and output, that a thread combines
constexpr int kMaxDepthwiseLanes = 32;
constexpr int kMaxGroupedLanes = 16;
constexpr int kReduceSlices = 8;

struct WeightGradCall : ConvWeightGradParams {
  int32_t groups;
  int32_t lanes;
  int32_t vectors;    // of channels, or pairs of channel blocks: one thread's each
  int32_t in_blocks;  // of kBlockChannels, in a group
  int32_t out_blocks;
  int32_t channel_blocks;  // grid.y
  int32_t tap_blocks;      // grid.z
  int32_t blocks;          // grid.x: shares
  int32_t runs;            // of columns, over all patches
  int32_t first_run[kMaxPatchesPerAxis + 1];
  float* partial;  // [blocks][tap][output channel][input channel of the group]
};

// One run of outputs of a row. Positions relative to the patch's first input, in 32 bits.
struct Place {
  Run columns;
  int64_t image;
  int32_t row;
  int32_t first_input_row;     // what tap 0 reads
  int32_t first_input_column;  // of the first output
  int64_t patch_offset;        // of the patch's first input, in the image
  uint32_t height;             // of the patch's inputs
  uint32_t width;
};

SPLITKERN_DEVICE Place place_at(const WeightGradCall& params, int64_t unit) {
  const AxisPatches& rows = params.grid.rows;
  Place place;
  place.columns = run_at(params.grid.columns, params.first_run, take_remainder(unit, params.runs));
  place.row = rows.out_bounds[0] + take_remainder(unit, rows.out_bounds[rows.patches] - rows.out_bounds[0]);
  place.image = unit;
  const int32_t patch = find_patch(rows.out_bounds, rows.patches, place.row);
  place.first_input_row =
      relative_to(rows.in_bounds[patch], place.row * params.row_window.stride - params.row_window.padding);
  place.first_input_column = relative_to(
      place.columns.source_begin, place.columns.begin * params.column_window.stride - params.column_window.padding);
  place.patch_offset =
      rows.in_bounds[patch] * params.input_strides.row + place.columns.source_begin * params.input_strides.column;
  place.height = static_cast<uint32_t>(rows.in_bounds[patch + 1] - rows.in_bounds[patch]);
  place.width = static_cast<uint32_t>(place.columns.source_end - place.columns.source_begin);
  return place;
}

SPLITKERN_DEVICE int64_t units_of(const WeightGradCall& params) {
  const AxisPatches& rows = params.grid.rows;
  return static_cast<int64_t>(params.batch) * (rows.out_bounds[rows.patches] - rows.out_bounds[0]) * params.runs;
}

// Where the taps of a block, at most kTaps, read: rows and columns from the first tap's.
template <int kTaps>
struct TapOffsets {
  int32_t rows[kTaps];
  int32_t columns[kTaps];
};

template <int kTaps>
SPLITKERN_DEVICE TapOffsets<kTaps> tap_offsets(const WeightGradCall& params, int32_t first_tap) {
  const int32_t kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  TapOffsets<kTaps> offsets;
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    const int32_t tap_y = (first_tap + t) / kernel_columns;
    offsets.rows[t] = tap_y * static_cast<int32_t>(params.row_window.dilation);
    offsets.columns[t] = (first_tap + t - tap_y * kernel_columns) * static_cast<int32_t>(params.column_window.dilation);
  }
  // Past the last tap: outside every patch.
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    if (first_tap + t >= params.row_window.kernel * kernel_columns) offsets.rows[t] = kFarAway;
  }
  return offsets;
}

// The input at a tap of an output whose tap 0 reads column `column`, or null where it lies outside the patch.
template <class T>
SPLITKERN_DEVICE const T* input_of(const WeightGradCall& params, const T* patch, const Place& place, int32_t column,
                                   int32_t row_offset, int32_t column_offset) {
  const uint32_t row = static_cast<uint32_t>(place.first_input_row + row_offset);
  const uint32_t tap_column = static_cast<uint32_t>(column + column_offset);
  return row < place.height && tap_column < place.width
             ? patch + row * params.input_strides.row + tap_column * params.input_strides.column
             : nullptr;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    depthwise_weight_grad_kernel(const __grid_constant__ WeightGradCall params) {
  constexpr int kElements = kVectorElements<T>;
  float* const exchange = &dynamic_shared<float>();  // [place][channel of the block]
  const int32_t lane = static_cast<int32_t>(thread_index()) % params.lanes;
  const int32_t place_of_thread = static_cast<int32_t>(thread_index()) / params.lanes;
  const int32_t places = kThreads / params.lanes;
  const int32_t block_channels = params.lanes * kElements;
  const int32_t first_channel = static_cast<int32_t>(block_index().y) * block_channels;
  const int32_t channel = first_channel + lane * kElements;
  const int32_t taps = static_cast<int32_t>(params.row_window.kernel * params.column_window.kernel);
  const int32_t first_tap = static_cast<int32_t>(block_index().z) * kDepthwiseTaps;
  const TapOffsets<kDepthwiseTaps> offsets = tap_offsets<kDepthwiseTaps>(params, first_tap);

  float sums[kDepthwiseTaps][kElements] = {};
  if (place_of_thread < places && channel < params.groups) {
    const int64_t units = units_of(params);
    const int64_t end = units * (block_index().x + 1) / params.blocks;
    for (int64_t unit = units * block_index().x / params.blocks + place_of_thread; unit < end; unit += places) {
      const Place place = place_at(params, unit);
      const T* const input =
          static_cast<const T*>(params.input) + place.image * params.input_strides.batch + place.patch_offset + channel;
      const T* grad = static_cast<const T*>(params.grad_output) + place.image * params.grad_output_strides.batch +
                      place.row * params.grad_output_strides.row +
                      place.columns.begin * params.grad_output_strides.column + channel;
      int32_t column = place.first_input_column;
#pragma unroll 1
      for (int32_t output = 0; output < place.columns.count; ++output) {
        float grads[kElements];
        widen<T>(grads, load_global<Vector16>(grad));
        grad += params.grad_output_strides.column;
#pragma unroll
        for (int t = 0; t < kDepthwiseTaps; ++t) {
          const T* const from = input_of(params, input, place, column, offsets.rows[t], offsets.columns[t]);
          if (from == nullptr) continue;
          float values[kElements];
          widen<T>(values, load_global<Vector16>(from));
#pragma unroll
          for (int i = 0; i < kElements; ++i) sums[t][i] = multiply_add(grads[i], values[i], sums[t][i]);
        }
        column += static_cast<int32_t>(params.column_window.stride);
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kDepthwiseTaps; ++t) {
    if (place_of_thread < places) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        exchange[place_of_thread * block_channels + lane * kElements + i] = sums[t][i];
      }
    }
    block_barrier();
    const int32_t index = static_cast<int32_t>(thread_index());
    if (index < block_channels && first_channel + index < params.groups && first_tap + t < taps) {
      float sum = exchange[index];
      for (int32_t place = 1; place < places; ++place) sum += exchange[place * block_channels + index];
      params.partial[(static_cast<int64_t>(block_index().x) * taps + first_tap + t) * params.groups + first_channel +
                     index] = sum;
    }
    block_barrier();
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    grouped_weight_grad_kernel(const __grid_constant__ WeightGradCall params) {
  constexpr int kPairs = kBlockChannels * kBlockChannels;
  float* const exchange = &dynamic_shared<float>();  // [place][lane][output channel][input channel]
  const int32_t lane = static_cast<int32_t>(thread_index()) % params.lanes;
  const int32_t place_of_thread = static_cast<int32_t>(thread_index()) / params.lanes;
  const int32_t places = kThreads / params.lanes;
  const int32_t first_vector = static_cast<int32_t>(block_index().y) * params.lanes;
  const int32_t taps = static_cast<int32_t>(params.row_window.kernel * params.column_window.kernel);
  const int32_t first_tap = static_cast<int32_t>(block_index().z) * kGroupedTaps;
  const TapOffsets<kGroupedTaps> offsets = tap_offsets<kGroupedTaps>(params, first_tap);
  const int32_t vector = first_vector + lane;

  float sums[kGroupedTaps][kBlockChannels][kBlockChannels] = {};
  if (place_of_thread < places && vector < params.vectors) {
    int64_t rest = vector;
    const int32_t in_channel = take_remainder(rest, params.in_blocks) * kBlockChannels;
    const int32_t out_channel = take_remainder(rest, params.out_blocks) * kBlockChannels;
    const int64_t input_offset = (rest * params.in_channels_per_group + in_channel) * params.input_strides.channel;
    const int64_t grad_offset =
        (rest * params.out_channels_per_group + out_channel) * params.grad_output_strides.channel;
    const int64_t units = units_of(params);
    const int64_t end = units * (block_index().x + 1) / params.blocks;
    for (int64_t unit = units * block_index().x / params.blocks + place_of_thread; unit < end; unit += places) {
      const Place place = place_at(params, unit);
      const T* const input = static_cast<const T*>(params.input) + place.image * params.input_strides.batch +
                             place.patch_offset + input_offset;
      const T* grad = static_cast<const T*>(params.grad_output) + place.image * params.grad_output_strides.batch +
                      place.row * params.grad_output_strides.row +
                      place.columns.begin * params.grad_output_strides.column + grad_offset;
      int32_t column = place.first_input_column;
#pragma unroll 1
      for (int32_t output = 0; output < place.columns.count; ++output) {
        float grads[kBlockChannels];
        load4<T, kVector>(grads, grad, params.grad_output_strides.channel, params.out_channels_per_group - out_channel);
        grad += params.grad_output_strides.column;
#pragma unroll
        for (int t = 0; t < kGroupedTaps; ++t) {
          const T* const from = input_of(params, input, place, column, offsets.rows[t], offsets.columns[t]);
          if (from == nullptr) continue;
          float values[kBlockChannels];
          load4<T, kVector>(values, from, params.input_strides.channel, params.in_channels_per_group - in_channel);
#pragma unroll
          for (int k = 0; k < kBlockChannels; ++k) {
#pragma unroll
            for (int i = 0; i < kBlockChannels; ++i) {
              sums[t][k][i] = multiply_add(grads[k], values[i], sums[t][k][i]);
            }
          }
        }
        column += static_cast<int32_t>(params.column_window.stride);
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kGroupedTaps; ++t) {
    if (place_of_thread < places) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        exchange[(place_of_thread * params.lanes + lane) * kPairs + i] =
            sums[t][i / kBlockChannels][i % kBlockChannels];
      }
    }
    block_barrier();
    const int32_t index = static_cast<int32_t>(thread_index());
    int64_t rest = first_vector + index / kPairs;
    if (index < params.lanes * kPairs && rest < params.vectors && first_tap + t < taps) {
      float sum = exchange[index];
      for (int32_t place = 1; place < places; ++place) sum += exchange[place * params.lanes * kPairs + index];
      const int32_t in_channel = take_remainder(rest, params.in_blocks) * kBlockChannels + index % kBlockChannels;
      const int32_t out_channel =
          take_remainder(rest, params.out_blocks) * kBlockChannels + index % kPairs / kBlockChannels;
      if (in_channel < params.in_channels_per_group && out_channel < params.out_channels_per_group) {
        const int64_t tap = static_cast<int64_t>(block_index().x) * taps + first_tap + t;
        const int64_t out_of_all = rest * params.out_channels_per_group + out_channel;
        params.partial[(tap * params.out_channels + out_of_all) * params.in_channels_per_group + in_channel] = sum;
      }
    }
    block_barrier();
  }
}

struct ReduceStorage {
  float sums[kReduceSlices][32];
};
static_assert(sizeof(ReduceStorage) <= shared_budget("depthwise::direct_weight_grad_reduce_kernel"));

// A block adds up 32 elements: each warp every eighth share, then the warps' sums in ascending order.
template <class T>
__global__ void direct_weight_grad_reduce_kernel(const __grid_constant__ WeightGradCall params) {
  ReduceStorage& storage = dynamic_shared<ReduceStorage>();
  const int32_t lane = static_cast<int32_t>(lane_index());
  const int32_t slice = static_cast<int32_t>(warp_index());
  const int64_t elements =
      params.row_window.kernel * params.column_window.kernel * params.out_channels * params.in_channels_per_group;
  const int64_t element = static_cast<int64_t>(block_index().x) * 32 + lane;
  float sum = 0;
  if (element < elements) {
    const float* const partial = params.partial + element;
#pragma unroll 4
    for (int32_t block = slice; block < params.blocks; block += kReduceSlices) sum += partial[block * elements];
  }
  storage.sums[slice][lane] = sum;
  block_barrier();
  if (slice != 0 || element >= elements) return;
  for (int32_t i = 1; i < kReduceSlices; ++i) sum += storage.sums[i][lane];

  int64_t rest = element;
  const int32_t in_channel = take_remainder(rest, params.in_channels_per_group);
  const int32_t out_channel = take_remainder(rest, params.out_channels);
  const int32_t tap_x = take_remainder(rest, static_cast<int32_t>(params.column_window.kernel));
  T* const output = static_cast<T*>(params.output) + out_channel * params.output_strides.batch +
                    in_channel * params.output_strides.channel + rest * params.output_strides.row +
                    tap_x * params.output_strides.column;
  if (params.accumulate) sum += to_accumulator(*output);
  *output = from_accumulator<T>(sum);
}

// --- On the host ------------------------------------------------------------------------------------------

struct Plan {
  bool depthwise;
  bool vector_loads;
  int64_t elements;  // of the weight
  int64_t shared_bytes;
};

int32_t blocks_of(int64_t things, int64_t in_block) {
  return static_cast<int32_t>((things + in_block - 1) / in_block);
}

std::string plan_call(const ConvWeightGradParams& params, const DeviceTraits& traits, WeightGradCall& call,
                      Plan& plan) {
  static_cast<ConvWeightGradParams&>(call) = params;
  if (params.type == ElementType::kFloat64) return "the type is float64";
  call.groups = params.out_channels / params.out_channels_per_group;
  if (call.groups == 1) return "the channels are in one group";
  if (params.in_channels_per_group % 8 == 0 && params.out_channels_per_group % 8 == 0) {
    return "the groups have " + std::to_string(params.in_channels_per_group) + " input and " +
           std::to_string(params.out_channels_per_group) + " output channels, enough for tensor cores";
  }
  const bool wide = params.type == ElementType::kFloat32;
  const int32_t elements = wide ? 4 : 8;
  const int64_t taps = params.row_window.kernel * params.column_window.kernel;
  for (const WindowAxis& window : {params.row_window, params.column_window}) {
    if (window.kernel * window.dilation >= kFarAway / 2 || window.stride >= kFarAway / 8) {
      return "the window reaches too far";
    }
  }
  plan.elements = taps * params.out_channels * params.in_channels_per_group;
  plan.depthwise = params.in_channels_per_group == 1 && params.out_channels_per_group == 1 &&
                   takes_vectors(params.input, params.input_strides, extents_in(params.grid, params.batch, call.groups),
                                 elements, 16) &&
                   takes_vectors(params.grad_output, params.grad_output_strides,
                                 extents_out(params.grid, params.batch, call.groups), elements, 16);
  call.in_blocks = blocks_of(params.in_channels_per_group, kBlockChannels);
  call.out_blocks = blocks_of(params.out_channels_per_group, kBlockChannels);
  const int64_t vectors =
      plan.depthwise ? call.groups / elements : static_cast<int64_t>(call.groups) * call.in_blocks * call.out_blocks;
  const int64_t most_lanes = plan.depthwise ? kMaxDepthwiseLanes : kMaxGroupedLanes;
  const int64_t blocks = (vectors + most_lanes - 1) / most_lanes;
  if (blocks > 65535) return "there are too many channels";
  call.vectors = static_cast<int32_t>(vectors);
  call.lanes = blocks_of(vectors, blocks);
  call.channel_blocks = blocks_of(vectors, call.lanes);
  call.tap_blocks = blocks_of(taps, plan.depthwise ? kDepthwiseTaps : kGroupedTaps);
  if (call.tap_blocks > 65535) return "the window is too large";
  const int64_t thread_floats = plan.depthwise ? elements : kBlockChannels * kBlockChannels;
  plan.shared_bytes = kThreads * thread_floats * static_cast<int64_t>(sizeof(float));
  const int64_t most_bytes = plan.depthwise ? shared_budget("depthwise::depthwise_weight_grad_kernel")
                                            : shared_budget("depthwise::grouped_weight_grad_kernel");
  if (plan.shared_bytes > std::min(traits.shared_memory_bytes, most_bytes)) {
    return "the sums of a block take " + std::to_string(plan.shared_bytes) + " bytes of shared memory";
  }
  plan.vector_loads =
      takes_vectors(params.input, params.input_strides,
                    extents_in(params.grid, params.batch, params.in_channels_per_group), 4, wide ? 16 : 8) &&
      takes_vectors(params.grad_output, params.grad_output_strides,
                    extents_out(params.grid, params.batch, params.out_channels_per_group), 4, wide ? 16 : 8);

  const AxisPatches& columns = call.grid.columns;
  int64_t runs = 0;
  for (int32_t i = 0; i < columns.patches; ++i) {
    call.first_run[i] = static_cast<int32_t>(runs);
    runs += (columns.out_bounds[i + 1] - columns.out_bounds[i] + kRun - 1) / kRun;
  }
  call.first_run[columns.patches] = static_cast<int32_t>(runs);
  call.runs = static_cast<int32_t>(runs);
  // Shares that fill the device, but none so small that adding them up costs more than they do.
  const AxisPatches& rows = call.grid.rows;
  const int64_t units = static_cast<int64_t>(call.batch) * (rows.out_bounds[rows.patches] - rows.out_bounds[0]) * runs;
  const int64_t per_block = static_cast<int64_t>(4) * (kThreads / call.lanes);
  const int64_t most = std::max<int64_t>(1, static_cast<int64_t>(4) * traits.multiprocessors /
                                                (static_cast<int64_t>(call.channel_blocks) * call.tap_blocks));
  call.blocks = static_cast<int32_t>(std::clamp<int64_t>((units + per_block - 1) / per_block, 1, most));
  return {};
}

template <class T>
void launch_typed(const WeightGradCall& call, const Plan& plan, cudaStream_t stream) {
  const Dim3 block{static_cast<unsigned>(kThreads), 1u, 1u};
  void (*kernel)(WeightGradCall) = &depthwise_weight_grad_kernel<T>;
  if (!plan.depthwise) {
    kernel = plan.vector_loads ? &grouped_weight_grad_kernel<T, true> : &grouped_weight_grad_kernel<T, false>;
  }
  launch(kernel,
         Dim3{static_cast<unsigned>(call.blocks), static_cast<unsigned>(call.channel_blocks),
              static_cast<unsigned>(call.tap_blocks)},
         block, static_cast<size_t>(plan.shared_bytes), stream, call);
  launch(&direct_weight_grad_reduce_kernel<T>, Dim3{static_cast<unsigned>((plan.elements + 31) / 32), 1u, 1u}, block,
         sizeof(ReduceStorage), stream, call);
}

}  // namespace

std::string refusal(const ConvWeightGradParams& params, const DeviceTraits& traits) {
  WeightGradCall call{};
  Plan plan{};
  return plan_call(params, traits, call, plan);
}

int64_t workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits) {
  WeightGradCall call{};
  Plan plan{};
  if (!plan_call(params, traits, call, plan).empty()) return 0;
  return call.blocks * plan.elements * static_cast<int64_t>(sizeof(float));
}

void launch(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream) {
  WeightGradCall call{};
  Plan plan{};
  const std::string refused = plan_call(params, traits, call, plan);
  if (!refused.empty()) throw std::runtime_error(std::string(params.kOperator) + ": " + refused);
  call.partial = static_cast<float*>(workspace);
  switch (params.type) {
    case ElementType::kFloat32:
      return launch_typed<float>(call, plan, stream);
    case ElementType::kFloat16:
      return launch_typed<Half>(call, plan, stream);
    default:
      return launch_typed<BFloat16>(call, plan, stream);
  }
}

}  // namespace splitkern::kernels::depthwise
