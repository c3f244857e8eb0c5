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
  static_assert(sizeof(WeightGradShared<Tile>) <= kSharedBytes);
  kernels::launch(&weight_grad_kernel<Tile>, grid, Dim3{kThreads, 1u, 1u}, sizeof(WeightGradShared<Tile>), stream,
                  params);
}

template <class T>
void launch_type(const ConvWeightGradParams& params, TileSize tile, cudaStream_t stream) {
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
  switch (params.type) {
    case ElementType::kFloat16:
      launch_type<Half>(params, chosen.tile, stream);
      break;
    case ElementType::kBFloat16:
      launch_type<BFloat16>(params, chosen.tile, stream);
      break;
    default:
      launch_type<float>(params, chosen.tile, stream);
      break;
  }
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
  launch_conv_weight_grad_reduce(reduce, stream);
}

}  // namespace splitkern::kernels::sm80
