// Gradient of the convolution with respect to its weight on Hopper: what the path refuses, how the reduction is cut
// into segments, both stages. Called through choose_path. The segments depend on the call and on the number of
// multiprocessors alone, and their sums are added in ascending order, so results repeat to the bit.
#include <algorithm>
#include <cmath>
#include <utility>

#include "../budgets.h"
#include "../dispatch.h"
#include "conv_weight_grad_kernel.h"
#include "refusals.h"
#include "window_weight_grad.h"

namespace splitkern::kernels::sm90 {
namespace {

constexpr int kReduceThreads = 256;
constexpr int kReduceVectors = 16;                             // of 4 channels: a block's 64 channels of one tap
constexpr int kReduceParts = kReduceThreads / kReduceVectors;  // taps times groups of segments

struct ReduceShared {
  float sums[kReduceParts][64];  // [group][tap], channel
};
static_assert(sizeof(ReduceShared) <= shared_budget("sm90::weight_grad_reduce_kernel"));

// A block sums some taps of 64 in-channels of one out channel. Each of its groups of threads adds every groups-th
// segment, all of whose loads may be under way at once; then the groups' sums are added in order. Reads follow the
// channels, writes follow the taps, the fastest index of an OIHW weight.
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    weight_grad_reduce_kernel(const __grid_constant__ WeightGradReduceParams params) {
  ReduceShared& shared = dynamic_shared<ReduceShared>();
  wait_for_previous_kernel();
  const int32_t thread = static_cast<int32_t>(thread_index());
  const int32_t out_channel = static_cast<int32_t>(block_index().x);
  const int32_t first_channel = static_cast<int32_t>(block_index().y) * 64;
  const int32_t first_tap = static_cast<int32_t>(block_index().z) * params.taps_per_block;
  const int32_t channels = params.in_channels - first_channel < 64 ? params.in_channels - first_channel : 64;
  const int32_t taps =
      params.taps - first_tap < params.taps_per_block ? params.taps - first_tap : params.taps_per_block;
  const int64_t weights = static_cast<int64_t>(params.out_channels) * params.taps * params.in_channels;

  const int32_t vector = thread % kReduceVectors;
  const int32_t part = thread / kReduceVectors;
  const int32_t group = part / params.taps_per_block;
  const int32_t tap_of_part = part - group * params.taps_per_block;
  if (group < params.groups && tap_of_part < taps && vector * 4 < channels) {
    const float* partial =
        params.partial_sums +
        (static_cast<int64_t>(out_channel) * params.taps + first_tap + tap_of_part) * params.in_channels +
        first_channel + vector * 4 + group * weights;
    const int64_t step = params.groups * weights;
    float sums[4] = {0, 0, 0, 0};
    const auto add = [&](const Vector16& loaded) {
      unrolled<4>([&](auto i) { sums[i] += bits_float(loaded.words[i]); });
    };
    int32_t left = (params.segments - group + params.groups - 1) / params.groups;
    for (; left >= 4; left -= 4) {  // four loads under way, added in order
      Vector16 loaded[4];
      unrolled<4>([&](auto j) { loaded[j] = load_global_streaming<Vector16>(partial + j * step); });
      unrolled<4>([&](auto j) { add(loaded[j]); });
      partial += 4 * step;
    }
    for (; left > 0; --left) {
      add(load_global_streaming<Vector16>(partial));
      partial += step;
    }
    unrolled<4>([&](auto i) { shared.sums[part][vector * 4 + i] = sums[i]; });
  }
  block_barrier();

  T* output = static_cast<T*>(params.output) + out_channel * params.output_strides.batch +
              first_channel * params.output_strides.channel;
  for (int32_t i = thread; i < taps * channels; i += kReduceThreads) {
    const int32_t channel = i / taps;
    const int32_t tap = i - channel * taps;
    float sum = 0;
    for (int32_t other = 0; other < params.groups; ++other) {
      sum += shared.sums[other * params.taps_per_block + tap][channel];
    }
    const int32_t row = (first_tap + tap) / params.kernel_columns;
    const int32_t column = first_tap + tap - row * params.kernel_columns;
    T* element = output + channel * params.output_strides.channel + row * params.output_strides.row +
                 column * params.output_strides.column;
    if (params.accumulate) sum += to_accumulator(*element);
    *element = from_accumulator<T>(sum);
  }
}

int32_t taps_of(const ConvWeightGradParams& params) {
  return static_cast<int32_t>(params.row_window.kernel * params.column_window.kernel);
}

// Patches of one launch and its share of the partial sums.
struct Part {
  int32_t first_patch;
  int32_t patches;
  int32_t chunks;
  int32_t segments;
};
struct Plan {
  int32_t tile;
  int32_t row_tiles;
  int32_t column_tiles;
  int32_t sums;   // arrays of partial sums in all
  double cycles;  // of a multiprocessor, predicted
  std::vector<Part> parts;
};

int64_t pixels_of(const ConvWeightGradParams& params, int32_t patch) {
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  const int32_t row = patch / columns.patches;
  const int32_t column = patch % columns.patches;
  return static_cast<int64_t>(params.batch) * (rows.out_bounds[row + 1] - rows.out_bounds[row]) *
         (columns.out_bounds[column + 1] - columns.out_bounds[column]);
}

std::vector<Part> parts_of(const ConvWeightGradParams& params, int32_t pixels_per_chunk) {
  std::vector<Part> parts;
  const int32_t patches = params.grid.rows.patches * params.grid.columns.patches;
  for (int32_t first = 0; first < patches; first += kMaxWeightGradPatches) {
    Part part{first, std::min(patches - first, kMaxWeightGradPatches), 0, 1};
    for (int32_t i = 0; i < part.patches; ++i) {
      part.chunks += static_cast<int32_t>(ceil_divide(pixels_of(params, first + i), pixels_per_chunk));
    }
    parts.push_back(part);
  }
  return parts;
}

// The tile and the segments with the least predicted time: whole waves of items, beside them what is moved to and from
// memory, then what writing, reading and adding the partial sums costs. Fitted to the same measurements as the tiles.
Plan make_plan(const ConvWeightGradParams& params, int32_t multiprocessors) {
  constexpr double kL2BytesPerCycle = 48;        // of one multiprocessor, all of them reading
  constexpr double kCyclesPerItem = 2000;        // filling the pipeline and writing the sums
  constexpr double kReduceBytesPerCycle = 1590;  // of the whole device
  constexpr double kMemoryBytesPerCycle = 1260;
  constexpr double kOverlap = 2.7;  // see predicted_cycles
  const PatchGrid& grid = params.grid;
  const double moving =
      kElementBytes * params.batch *
      (static_cast<double>(grid.rows.out_bounds[grid.rows.patches] - grid.rows.out_bounds[0]) *
           (grid.columns.out_bounds[grid.columns.patches] - grid.columns.out_bounds[0]) * params.out_channels +
       static_cast<double>(grid.rows.in_bounds[grid.rows.patches] - grid.rows.in_bounds[0]) *
           (grid.columns.in_bounds[grid.columns.patches] - grid.columns.in_bounds[0]) * params.in_channels_per_group) /
      kMemoryBytesPerCycle;
  const int32_t blocks = taps_of(params) * static_cast<int32_t>(ceil_divide(params.in_channels_per_group, 64));
  const double sum_bytes = 4.0 * params.out_channels * taps_of(params) * params.in_channels_per_group;
  Plan best{};
  for (int32_t index = 0; index < kWeightGradTileCount; ++index) {
    if (tuning().weight_grad_tile >= 0 && tuning().weight_grad_tile != index) continue;
    const WeightGradTile& tile = kWeightGradTiles[index];
    Plan plan{};
    plan.tile = index;
    plan.row_tiles = static_cast<int32_t>(ceil_divide(params.out_channels, tile.out_channels));
    plan.column_tiles = static_cast<int32_t>(ceil_divide(blocks, tile.blocks));
    plan.parts = parts_of(params, chunk_pixels(tile));
    const int32_t tiles = plan.row_tiles * plan.column_tiles;
    const double stage_pixels = chunk_pixels(tile);
    const double loaded = (ceil_divide(params.out_channels, 64) * 1.0 / plan.row_tiles +
                           static_cast<double>(blocks) / plan.column_tiles) *
                          128 * stage_pixels;
    const double cycles_per_chunk = std::max(tile.cycles_per_stage, loaded / kL2BytesPerCycle);
    double total = 0;
    for (Part& part : plan.parts) {
      double part_cycles = 0;
      for (int32_t waves = 1; waves <= 8; ++waves) {
        int32_t segments = std::max(1, waves * multiprocessors / tiles);
        segments = std::min(segments, part.chunks);
        if (tuning().weight_grad_segments > 0) segments = std::min(tuning().weight_grad_segments, part.chunks);
        const double rounds = static_cast<double>(ceil_divide(static_cast<int64_t>(tiles) * segments, multiprocessors));
        const double products =
            rounds * (static_cast<double>(ceil_divide(part.chunks, segments)) * cycles_per_chunk + kCyclesPerItem);
        const double parts_share = moving / static_cast<double>(plan.parts.size());
        const double cycles = std::pow(std::pow(products, kOverlap) + std::pow(parts_share, kOverlap), 1 / kOverlap) +
                              2.0 * segments * sums_per_segment(tile) * sum_bytes / kReduceBytesPerCycle;
        if (waves == 1 || cycles < part_cycles) {
          part_cycles = cycles;
          part.segments = segments;
        }
      }
      total += part_cycles;
      plan.sums += part.segments * sums_per_segment(tile);
    }
    plan.cycles = total;
    if (best.parts.empty() || total < best.cycles) best = plan;
  }
  if (best.parts.empty()) {
    throw std::runtime_error(std::string(params.kOperator) + ": the Hopper weight gradient has tiles 0 to " +
                             std::to_string(kWeightGradTileCount - 1) + ", got " +
                             std::to_string(tuning().weight_grad_tile));
  }
  return best;
}

bool same_axis(const WindowAxis& a, const WindowAxis& b) {
  return a.kernel == b.kernel && a.stride == b.stride && a.padding == b.padding && a.dilation == b.dilation;
}
bool same_bounds(const AxisPatches& a, const AxisPatches& b) {
  return a.patches == b.patches && std::equal(a.in_bounds, a.in_bounds + a.patches + 1, b.in_bounds) &&
         std::equal(a.out_bounds, a.out_bounds + a.patches + 1, b.out_bounds);
}

// make_plan; a call asks several times for the same plan, so each thread remembers its last one.
const Plan& plan_of(const ConvWeightGradParams& params, int32_t multiprocessors) {
  struct Last {
    ConvWeightGradParams params{};
    int32_t multiprocessors = 0;
    int32_t tile = -1;
    int32_t segments = -1;
    Plan plan{};
  };
  static thread_local Last last;
  const ConvWeightGradParams& before = last.params;
  const bool same =
      last.multiprocessors == multiprocessors && last.tile == tuning().weight_grad_tile &&
      last.segments == tuning().weight_grad_segments && before.batch == params.batch &&
      before.out_channels == params.out_channels && before.in_channels_per_group == params.in_channels_per_group &&
      same_axis(before.row_window, params.row_window) && same_axis(before.column_window, params.column_window) &&
      same_bounds(before.grid.rows, params.grid.rows) && same_bounds(before.grid.columns, params.grid.columns);
  if (!same) {
    last.multiprocessors = 0;  // nothing to remember where make_plan throws
    last.plan = make_plan(params, multiprocessors);
    last.params = params;
    last.tile = tuning().weight_grad_tile;
    last.segments = tuning().weight_grad_segments;
    last.multiprocessors = multiprocessors;
  }
  return last.plan;
}

void launch_part(const ConvWeightGradParams& params, const Plan& plan, const Part& part, float* partial_sums,
                 int32_t multiprocessors, cudaStream_t stream) {
  const WeightGradTile& tile = kWeightGradTiles[plan.tile];
  const int32_t pixels = chunk_pixels(tile);
  WeightGradParams part_params;
  part_params.patches = part.patches;
  part_params.chunks = part.chunks;
  part_params.segments = part.segments;
  part_params.column_tiles = plan.column_tiles;
  part_params.tiles = plan.row_tiles * plan.column_tiles;
  part_params.items = part_params.tiles * part.segments;
  part_params.out_channels = params.out_channels;
  part_params.in_channels = params.in_channels_per_group;
  part_params.channel_blocks = static_cast<int32_t>(ceil_divide(params.in_channels_per_group, 64));
  part_params.taps = taps_of(params);
  part_params.kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  part_params.column_step = static_cast<int32_t>(params.column_window.stride);
  part_params.row_step = static_cast<int32_t>(params.row_window.stride);
  part_params.column_dilation = static_cast<int32_t>(params.column_window.dilation);
  part_params.row_dilation = static_cast<int32_t>(params.row_window.dilation);
  part_params.partial_sums = partial_sums;
  int32_t chunks = 0;
  for (int32_t i = 0; i < part.patches; ++i) {
    const int32_t patch = part.first_patch + i;
    const AxisWalk rows = forward_axis(params.row_window, params.grid.rows, patch / params.grid.columns.patches);
    const AxisWalk columns =
        forward_axis(params.column_window, params.grid.columns, patch % params.grid.columns.patches);
    part_params.patch[i] = {chunks, static_cast<int32_t>(columns.outputs), static_cast<int32_t>(rows.outputs),
                            static_cast<int32_t>(columns.lower), static_cast<int32_t>(rows.lower)};
    chunks += static_cast<int32_t>(ceil_divide(pixels_of(params, patch), pixels));
    part_params.gradient[i] = encode(output_map(params.type, params.grad_output, params.grad_output_strides,
                                                params.out_channels, params.batch, rows, columns, pixels),
                                     params.kOperator);
    part_params.input[i] = encode(operand_map(params.type, params.input, params.input_strides,
                                              params.in_channels_per_group, params.batch, rows, columns, pixels),
                                  params.kOperator);
  }
  if (params.type == ElementType::kFloat16) {
    launch_weight_grad_tile<Half>(plan.tile, part_params, multiprocessors, stream);
  } else {
    launch_weight_grad_tile<BFloat16>(plan.tile, part_params, multiprocessors, stream);
  }
}

}  // namespace

namespace {

// Measured on an H200 over 3x3 layers of VGG-19 and ResNet-50: see conv_gemm.cu.
bool takes_window_kernel(const ConvWeightGradParams& params, const DeviceTraits& traits) {
  if (tuning().window == 0 || tuning().weight_grad_tile >= 0) return false;
  const std::optional<double> cycles = window_weight_grad_cycles(params, traits);
  if (!cycles.has_value()) return false;
  return tuning().window == 1 || 1.2 * *cycles + 14000 < plan_of(params, traits.multiprocessors).cycles;
}

}  // namespace

std::string refusal(const ConvWeightGradParams& params, const DeviceTraits& traits) {
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  std::string reason = device_refusal(traits);
  if (reason.empty()) reason = type_refusal(params.type);
  if (reason.empty()) reason = groups_refusal(params.out_channels, params.out_channels_per_group);
  if (reason.empty()) {
    reason = tensor_refusal("gradient", params.grad_output, params.out_channels, columns.out_bounds[columns.patches],
                            rows.out_bounds[rows.patches], params.batch, params.grad_output_strides);
  }
  if (reason.empty()) {
    reason = tensor_refusal("input", params.input, params.in_channels_per_group, columns.in_bounds[columns.patches],
                            rows.in_bounds[rows.patches], params.batch, params.input_strides);
  }
  for (int32_t i = 0; i < rows.patches && reason.empty(); ++i) {
    reason = walk_refusal(forward_axis(params.row_window, rows, i), "rows");
  }
  for (int32_t i = 0; i < columns.patches && reason.empty(); ++i) {
    reason = walk_refusal(forward_axis(params.column_window, columns, i), "columns");
  }
  int64_t pixels = 0;
  for (int32_t i = 0; i < rows.patches * columns.patches && reason.empty(); ++i) pixels += pixels_of(params, i);
  if (reason.empty() && pixels > int64_t{1} << 30) {
    reason = "the patches have " + std::to_string(pixels) + " pixels, over 2^30";
  }
  return reason;
}

int64_t workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits) {
  if (takes_window_kernel(params, traits)) return window_weight_grad_workspace_bytes(params, traits);
  return int64_t{4} * plan_of(params, traits.multiprocessors).sums * params.out_channels * taps_of(params) *
         params.in_channels_per_group;
}

void launch(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream) {
  if (takes_window_kernel(params, traits)) return launch_window_weight_grad(params, traits, workspace, stream);
  const Plan& plan = plan_of(params, traits.multiprocessors);
  const int64_t weights = static_cast<int64_t>(params.out_channels) * taps_of(params) * params.in_channels_per_group;
  float* partial_sums = static_cast<float*>(workspace);
  for (const Part& part : plan.parts) {
    launch_part(params, plan, part, partial_sums, traits.multiprocessors, stream);
    partial_sums += part.segments * sums_per_segment(kWeightGradTiles[plan.tile]) * weights;
  }

  WeightGradReduceParams reduce{};
  reduce.out_channels = params.out_channels;
  reduce.in_channels = params.in_channels_per_group;
  reduce.taps = taps_of(params);
  reduce.kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  reduce.segments = plan.sums;
  reduce.accumulate = params.accumulate;
  reduce.output_strides = params.output_strides;
  reduce.partial_sums = static_cast<const float*>(workspace);
  reduce.output = params.output;
  const int64_t lines = ceil_divide(reduce.in_channels, 64) * reduce.out_channels;
  // All taps of a channel in one block write the longest runs; few blocks would leave the device idle.
  reduce.taps_per_block = std::min(reduce.taps, lines >= 4 * traits.multiprocessors ? kReduceParts : 3);
  reduce.groups = std::min(kReduceParts / reduce.taps_per_block, reduce.segments);
  const Dim3 grid{static_cast<unsigned>(reduce.out_channels),
                  static_cast<unsigned>(ceil_divide(reduce.in_channels, 64)),
                  static_cast<unsigned>(ceil_divide(reduce.taps, reduce.taps_per_block))};
  const auto launch_reduce = [&](auto tag) {
    launch_following(&weight_grad_reduce_kernel<typename decltype(tag)::Type>, grid, Dim3{kReduceThreads, 1, 1},
                     sizeof(ReduceShared), stream, reduce);
  };
  if (params.type == ElementType::kFloat16) {
    launch_reduce(TypeTag<Half>{});
  } else {
    launch_reduce(TypeTag<BFloat16>{});
  }
}

}  // namespace splitkern::kernels::sm90
