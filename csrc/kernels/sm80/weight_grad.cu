// Weight gradient of the sm_80 path: how the reduction is shared out, and the launches. Called through conv.h.
#include "../budgets.h"
#include "conv.h"
#include "launching.h"
#include "refusals.h"
#include "weight_grad_kernel.h"

namespace splitkern::kernels::sm80 {
namespace {

constexpr TileModel kTileModels[] = {
    {TileSize::k128x128, 128, 128, 1.0},
    {TileSize::k128x64, 128, 64, 1.2},
    {TileSize::k64x128, 64, 128, 1.2},
    {TileSize::k64x64, 64, 64, 1.5},
};
constexpr int64_t kSharedBytes = shared_budget("sm80::weight_grad_kernel");
constexpr int64_t kMaxSegments = 1024;
// How many multiplications a multiprocessor does while one fp32 number crosses its share of the memory's bandwidth.
constexpr double kMultiplicationsPerPartial = 512;
// Of pixels, per block: filling the stages and writing the sums.
constexpr int64_t kBlockOverheadPixels = 256;

// --- Stage two --------------------------------------------------------------------------------------

constexpr int32_t kReduceWarps = 8;
constexpr int32_t kReduceElements = 4 * static_cast<int32_t>(kWarpThreads);  // of a block: a vector per lane

struct ReduceShared {
  float sums[kReduceWarps][kReduceElements];
};
static_assert(sizeof(ReduceShared) <= shared_budget("sm80::weight_grad_reduce_kernel"));

// Each warp adds every eighth share of a block's elements, in ascending order; then the warps' sums are added in
// ascending order. Rows of shares are whole vectors, for in_channels_per_group fills vectors.
template <class T>
__global__ void weight_grad_reduce_kernel(const __grid_constant__ ConvWeightGradReduceParams params) {
  ReduceShared& shared = dynamic_shared<ReduceShared>();
  const int64_t elements = static_cast<int64_t>(params.out_channels) * params.in_channels_per_group *
                           params.kernel_rows * params.kernel_columns;
  const int64_t first = static_cast<int64_t>(block_index().x) * kReduceElements;
  const int32_t warp = static_cast<int32_t>(warp_index());
  const int32_t thread = static_cast<int32_t>(thread_index());
  const int32_t lane = static_cast<int32_t>(lane_index());
  float sums[4] = {0, 0, 0, 0};
  if (first + lane * 4 < elements) {
    const float* partial = static_cast<const float*>(params.partial_sums) + first + lane * 4 + warp * elements;
#pragma unroll 4
    for (int32_t segment = warp; segment < params.segments; segment += kReduceWarps) {
      const Vector16 values = load_global<Vector16>(partial);
#pragma unroll
      for (int32_t k = 0; k < 4; ++k) sums[k] += bits_float(values.words[k]);
      partial += kReduceWarps * elements;
    }
  }
#pragma unroll
  for (int32_t k = 0; k < 4; ++k) shared.sums[warp][lane * 4 + k] = sums[k];
  block_barrier();
  int64_t rest = first + thread;
  if (thread >= kReduceElements || rest >= elements) return;
  float sum = 0;
#pragma unroll
  for (int32_t i = 0; i < kReduceWarps; ++i) sum += shared.sums[i][thread];
  const int32_t in_channel = take_remainder(rest, params.in_channels_per_group);
  const int32_t tap_x = take_remainder(rest, params.kernel_columns);
  const int32_t tap_y = take_remainder(rest, params.kernel_rows);
  T* output = static_cast<T*>(params.output) + rest * params.output_strides.batch +
              in_channel * params.output_strides.channel + tap_y * params.output_strides.row +
              tap_x * params.output_strides.column;
  if (params.accumulate) sum += to_accumulator(*output);
  *output = from_accumulator<T>(sum);
}

template <class T>
void launch_reduce(const ConvWeightGradReduceParams& params, int64_t elements, cudaStream_t stream) {
  const Dim3 grid{static_cast<unsigned>(ceil_divide(elements, kReduceElements)), 1u, 1u};
  const Dim3 block{kReduceWarps * kWarpThreads, 1u, 1u};
  kernels::launch(&weight_grad_reduce_kernel<T>, grid, block, sizeof(ReduceShared), stream, params);
}

// --- Stage one --------------------------------------------------------------------------------------

struct WeightGradSchedule {
  TileSize tile;
  int32_t segments;
};

int64_t weight_elements(const ConvWeightGradParams& params) {
  return static_cast<int64_t>(params.out_channels) * params.in_channels_per_group * params.row_window.kernel *
         params.column_window.kernel;
}

int64_t pixel_groups(const ConvWeightGradParams& params) {
  return ceil_divide(region_elements(output_region(params.grid, params.batch, 1)), kPixelGroup);
}

// The tile and number of shares with the shortest predicted time. A function of the shape and the number of
// multiprocessors alone, so that a device always adds in the same order.
WeightGradSchedule schedule(const ConvWeightGradParams& params, const DeviceTraits& device) {
  const int64_t groups = pixel_groups(params);
  const int64_t columns = params.in_channels_per_group * params.row_window.kernel * params.column_window.kernel;
  const double partial_cost =
      2.0 * kMultiplicationsPerPartial * static_cast<double>(weight_elements(params)) / device.multiprocessors;
  WeightGradSchedule best{TileSize::k128x128, 1};
  double best_time = 0;
  for (const TileModel& tile : kTileModels) {
    const int64_t tiles = ceil_divide(params.out_channels_per_group, tile.rows) * ceil_divide(columns, tile.columns) *
                          (params.out_channels / params.out_channels_per_group);
    for (int64_t segments = 1; segments <= groups && segments <= kMaxSegments; ++segments) {
      const int64_t blocks = ceil_divide(tiles * segments, device.multiprocessors);  // of the fullest multiprocessor
      const int64_t pixels = ceil_divide(groups, segments) * kPixelGroup + kBlockOverheadPixels;
      const double time = static_cast<double>(blocks * pixels) * tile.rows * tile.columns * tile.cost +
                          partial_cost * static_cast<double>(segments);
      if (best_time == 0 || time < best_time) {
        best = {tile.size, static_cast<int32_t>(segments)};
        best_time = time;
      }
    }
  }
  return best;
}

template <class Tile>
void launch_tile(const ConvWeightGradParams& params, cudaStream_t stream) {
  const int64_t columns = params.in_channels_per_group * params.row_window.kernel * params.column_window.kernel;
  const int64_t tiles = ceil_divide(params.out_channels_per_group, Tile::kRows) * ceil_divide(columns, Tile::kColumns);
  const Dim3 grid{static_cast<unsigned>(tiles), static_cast<unsigned>(params.segments),
                  static_cast<unsigned>(params.out_channels / params.out_channels_per_group)};
  static_assert(sizeof(WeightGradShared<Tile>) <= shared_budget("sm80::weight_grad_kernel"));
  kernels::launch(&weight_grad_kernel<Tile>, grid, Dim3{kThreads, 1u, 1u}, sizeof(WeightGradShared<Tile>), stream,
                  params);
}

template <class T>
void launch_stage_one(const ConvWeightGradParams& params, TileSize tile, cudaStream_t stream) {
  switch (tile) {
    case TileSize::k128x128:
      return launch_tile<Tile<T, 128, 128>>(params, stream);
    case TileSize::k128x64:
      return launch_tile<Tile<T, 128, 64>>(params, stream);
    case TileSize::k64x128:
      return launch_tile<Tile<T, 64, 128>>(params, stream);
    case TileSize::k64x64:
      return launch_tile<Tile<T, 64, 64>>(params, stream);
  }
}

template <class T>
void launch_stages(const ConvWeightGradParams& params, TileSize tile, const ConvWeightGradReduceParams& reduce,
                   cudaStream_t stream) {
  launch_stage_one<T>(params, tile, stream);
  launch_reduce<T>(reduce, weight_elements(params), stream);
}

std::string refuse_sizes(const ConvWeightGradParams& params) {
  constexpr int64_t kMaxElements = 1 << 30;
  if (weight_elements(params) >= kMaxElements) return "the weight has 2^30 elements or more";
  constexpr int64_t kMaxGroups = 65535;
  if (params.out_channels / params.out_channels_per_group > kMaxGroups) return "there are more than 65535 groups";
  constexpr int64_t kMaxPixelGroups = 1 << 26;
  if (pixel_groups(params) >= kMaxPixelGroups) return "there are 2^33 output pixels or more";
  return {};
}

}  // namespace

std::string refusal(const ConvWeightGradParams& params, const DeviceTraits& device) {
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  return first_reason(
      refuse_device_and_type(params.type, params.allow_tf32, device, kSharedBytes),
      refuse_channels("input channels", params.in_channels_per_group, params.type),
      refuse_channels("output channels", params.out_channels_per_group, params.type),
      refuse_layout("grad_output", params.grad_output_strides, params.grad_output, params.type, params.batch - 1,
                    rows.out_bounds[rows.patches] - 1, columns.out_bounds[columns.patches] - 1),
      refuse_layout("the input", params.input_strides, params.input, params.type, params.batch - 1,
                    rows.in_bounds[rows.patches] - 1, columns.in_bounds[columns.patches] - 1),
      refuse_positions(params.row_window, rows), refuse_positions(params.column_window, columns), refuse_sizes(params));
}

int64_t workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& device) {
  return weight_elements(params) * schedule(params, device).segments * static_cast<int64_t>(sizeof(float));
}

void launch(const ConvWeightGradParams& call, const DeviceTraits& device, void* workspace, cudaStream_t stream) {
  ConvWeightGradParams params = call;
  const WeightGradSchedule chosen = schedule(params, device);
  params.first_segment = 0;
  params.segments = chosen.segments;
  params.partial_sums = workspace;
  ConvWeightGradReduceParams reduce{};
  reduce.type = params.type;
  reduce.out_channels = params.out_channels;
  reduce.in_channels_per_group = params.in_channels_per_group;
  reduce.kernel_rows = static_cast<int32_t>(params.row_window.kernel);
  reduce.kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  reduce.segments = params.segments;
  reduce.accumulate = params.accumulate;
  reduce.output_strides = params.output_strides;
  reduce.partial_sums = workspace;
  reduce.output = params.output;
  switch (params.type) {
    case ElementType::kFloat16:
      return launch_stages<Half>(params, chosen.tile, reduce, stream);
    case ElementType::kBFloat16:
      return launch_stages<BFloat16>(params, chosen.tile, reduce, stream);
    default:
      return launch_stages<float>(params, chosen.tile, reduce, stream);
  }
}

}  // namespace splitkern::kernels::sm80
