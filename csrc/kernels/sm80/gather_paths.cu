// Forward and input gradient of the sm_80 path: from the parameters of a call to those of the gathering matrix
// product, and the weights into the layout that it reads. Called through conv.h.
#include "../budgets.h"
#include "../plain/geometry.h"
#include "conv.h"
#include "gather.h"
#include "launching.h"
#include "refusals.h"

namespace splitkern::kernels::sm80 {
namespace {

// --- Weights ----------------------------------------------------------------------------------------

// From any strides to [group][row][tap][column]; a row is a destination channel, a column a source channel.
struct RepackParams {
  static constexpr const char* kOperator = "the sm_80 weight layout kernel";
  int32_t groups;
  int32_t rows;
  int32_t columns;
  int32_t kernel_rows;
  int32_t kernel_columns;
  int64_t group_stride;
  int64_t row_stride;
  int64_t column_stride;
  int64_t kernel_row_stride;
  int64_t kernel_column_stride;
  const void* from;
  void* to;
};

constexpr int32_t kRepackTile = 32;
constexpr int32_t kRepackThreads = 256;

template <class Bits>
struct RepackShared {
  Bits tile[kRepackTile][kRepackTile + 1];  // one more: a column then touches every bank
};
static_assert(sizeof(RepackShared<uint32_t>) <= shared_budget("sm80::repack_kernel"));

static_assert(sizeof(RepackShared<uint32_t>) <= shared_budget("sm80::repack_kernel"));

// One block takes a tile of rows and columns of one tap: reads along the shorter stride, writes along columns.
template <class Bits>
__global__ void repack_kernel(const __grid_constant__ RepackParams params) {
  RepackShared<Bits>& shared = dynamic_shared<RepackShared<Bits>>();
  const Dim3 block = block_index();
  const int32_t column_tiles = (params.columns + kRepackTile - 1) / kRepackTile;
  const int32_t row_tiles = (params.rows + kRepackTile - 1) / kRepackTile;
  int64_t rest = block.x;
  const int32_t first_column = take_remainder(rest, column_tiles) * kRepackTile;
  const int32_t first_row = take_remainder(rest, row_tiles) * kRepackTile;
  const int32_t kernel_column = take_remainder(rest, params.kernel_columns);
  const int32_t kernel_row = take_remainder(rest, params.kernel_rows);
  const int64_t group = rest;
  const Bits* from = static_cast<const Bits*>(params.from) + group * params.group_stride +
                     kernel_row * params.kernel_row_stride + kernel_column * params.kernel_column_stride;
  const bool read_along_columns = params.column_stride <= params.row_stride;
  const int32_t lane = static_cast<int32_t>(thread_index()) % kRepackTile;
  const int32_t first = static_cast<int32_t>(thread_index()) / kRepackTile;
#pragma unroll
  for (int32_t i = first; i < kRepackTile; i += kRepackThreads / kRepackTile) {
    const int32_t row = read_along_columns ? i : lane;
    const int32_t column = read_along_columns ? lane : i;
    if (first_row + row < params.rows && first_column + column < params.columns) {
      shared.tile[row][column] = load_global<Bits>(from + (first_row + row) * params.row_stride +
                                                   (first_column + column) * params.column_stride);
    }
  }
  block_barrier();
  const int32_t taps = params.kernel_rows * params.kernel_columns;
  const int32_t tap = kernel_row * params.kernel_columns + kernel_column;
#pragma unroll
  for (int32_t row = first; row < kRepackTile; row += kRepackThreads / kRepackTile) {
    if (first_row + row < params.rows && first_column + lane < params.columns) {
      Bits* to = static_cast<Bits*>(params.to) +
                 ((group * params.rows + first_row + row) * taps + tap) * params.columns + first_column + lane;
      store_global<Bits>(to, shared.tile[row][lane]);
    }
  }
}

RepackParams describe_weights(const ConvForwardParams& params) {
  RepackParams repack{};
  repack.groups = params.out_channels / params.out_channels_per_group;
  repack.rows = params.out_channels_per_group;
  repack.columns = params.in_channels_per_group;
  repack.row_stride = params.weight_strides.batch;
  repack.column_stride = params.weight_strides.channel;
  repack.group_stride = params.out_channels_per_group * params.weight_strides.batch;
  return repack;
}
RepackParams describe_weights(const ConvInputGradParams& params) {
  RepackParams repack{};
  repack.groups = params.in_channels / params.in_channels_per_group;
  repack.rows = params.in_channels_per_group;
  repack.columns = params.out_channels_per_group;
  repack.row_stride = params.weight_strides.channel;
  repack.column_stride = params.weight_strides.batch;
  repack.group_stride = params.out_channels_per_group * params.weight_strides.batch;
  return repack;
}
template <class Params>
RepackParams weights_of(const Params& params) {
  RepackParams repack = describe_weights(params);
  repack.kernel_rows = static_cast<int32_t>(params.row_window.kernel);
  repack.kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  repack.kernel_row_stride = params.weight_strides.row;
  repack.kernel_column_stride = params.weight_strides.column;
  repack.from = params.weight;
  return repack;
}

int64_t elements(const RepackParams& repack) {
  return static_cast<int64_t>(repack.groups) * repack.rows * repack.kernel_rows * repack.kernel_columns *
         repack.columns;
}

// Whether the weights lie as the kernel reads them; strides along an axis of one position do not matter.
bool in_place(const RepackParams& repack) {
  const auto is = [](int64_t extent, int64_t stride, int64_t wanted) { return extent == 1 || stride == wanted; };
  const int64_t columns = repack.columns;
  const int64_t taps = static_cast<int64_t>(repack.kernel_rows) * repack.kernel_columns;
  return aligned(repack.from) && is(columns, repack.column_stride, 1) &&
         is(repack.kernel_columns, repack.kernel_column_stride, columns) &&
         is(repack.kernel_rows, repack.kernel_row_stride, repack.kernel_columns * columns) &&
         is(repack.rows, repack.row_stride, taps * columns) &&
         is(repack.groups, repack.group_stride, repack.rows * taps * columns);
}

template <class Params>
int64_t weight_workspace_bytes(const Params& params) {
  const RepackParams repack = weights_of(params);
  return in_place(repack) ? 0 : elements(repack) * element_bytes(params.type);
}

// The weights in the kernel's layout: themselves, or their copy in the workspace.
template <class Params>
const void* prepare_weights(const Params& params, void* workspace, cudaStream_t stream) {
  RepackParams repack = weights_of(params);
  if (in_place(repack) || elements(repack) == 0) return params.weight;
  repack.to = workspace;
  const int64_t blocks = ceil_divide(repack.rows, kRepackTile) * ceil_divide(repack.columns, kRepackTile) *
                         repack.kernel_rows * repack.kernel_columns * repack.groups;
  const Dim3 grid{static_cast<unsigned>(blocks), 1u, 1u};
  const Dim3 block{kRepackThreads, 1u, 1u};
  if (element_bytes(params.type) == 2) {
    kernels::launch(&repack_kernel<uint16_t>, grid, block, sizeof(RepackShared<uint16_t>), stream, repack);
  } else {
    kernels::launch(&repack_kernel<uint32_t>, grid, block, sizeof(RepackShared<uint32_t>), stream, repack);
  }
  return workspace;
}

// --- Axes -------------------------------------------------------------------------------------------

GatherAxis forward_axis(const WindowAxis& window, const AxisPatches& patches) {
  GatherAxis axis{};
  axis.class_count = 1;
  axis.destination_step = 1;
  axis.source_step = static_cast<int32_t>(window.stride);
  axis.source_tap = static_cast<int32_t>(window.dilation);
  axis.weight_step = 1;
  const int32_t first = patches.out_bounds[0];
  axis.classes[0] = {first, patches.out_bounds[patches.patches] - first,
                     static_cast<int32_t>(first * window.stride - window.padding), static_cast<int32_t>(window.kernel),
                     0};
  return axis;
}

int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// An input at `position` is read by output o at tap t where position + padding = o * stride + t * dilation. Taps of
// one residue lie stride / gcd apart, and so do the outputs dilation / gcd, in the opposite direction.
GatherClass input_grad_class(const WindowAxis& window, const AxisPatches& patches, int64_t residue) {
  const int64_t begin = patches.in_bounds[0];
  const int64_t end = patches.in_bounds[patches.patches];
  const int64_t divisor = greatest_common_divisor(window.stride, window.dilation);
  const int64_t to_first = ((residue - begin - window.padding) % window.stride + window.stride) % window.stride;
  GatherClass result{};
  result.first = static_cast<int32_t>(begin + to_first);
  result.count = result.first < end ? static_cast<int32_t>((end - 1 - result.first) / window.stride + 1) : 0;
  int64_t tap = 0;
  while (tap < window.kernel && (tap * window.dilation - residue) % window.stride != 0) ++tap;
  if (tap == window.kernel) return result;
  const int64_t tap_step = window.stride / divisor;
  result.taps = static_cast<int32_t>((window.kernel - 1 - tap) / tap_step + 1);
  result.weight_first = static_cast<int32_t>(tap);
  result.source_first = static_cast<int32_t>((result.first + window.padding - tap * window.dilation) / window.stride);
  return result;
}

// Classes [first_class, first_class + kMaxClasses) of the axis, as far as there are any.
GatherAxis input_grad_axis(const WindowAxis& window, const AxisPatches& patches, int64_t first_class) {
  const int64_t divisor = greatest_common_divisor(window.stride, window.dilation);
  GatherAxis axis{};
  axis.destination_step = static_cast<int32_t>(window.stride);
  axis.source_step = 1;
  axis.source_tap = static_cast<int32_t>(-(window.dilation / divisor));
  axis.weight_step = static_cast<int32_t>(window.stride / divisor);
  for (int64_t residue = first_class; residue < window.stride && axis.class_count < kMaxClasses; ++residue) {
    axis.classes[axis.class_count++] = input_grad_class(window, patches, residue);
  }
  return axis;
}

AxisPatches swap_roles(const AxisPatches& patches) {
  AxisPatches swapped = patches;
  for (int32_t i = 0; i <= patches.patches; ++i) {
    swapped.in_bounds[i] = patches.out_bounds[i];
    swapped.out_bounds[i] = patches.in_bounds[i];
  }
  return swapped;
}

// --- Refusals shared by both passes -----------------------------------------------------------------

template <class Params>
std::string refuse_window(const Params& params) {
  for (const WindowAxis* window : {&params.row_window, &params.column_window}) {
    if (window->kernel > kMaxTaps) {
      return "the kernel has " + std::to_string(window->kernel) + " positions along an axis, over " +
             std::to_string(kMaxTaps);
    }
  }
  return first_reason(refuse_positions(params.row_window, params.grid.rows),
                      refuse_positions(params.column_window, params.grid.columns));
}

std::string refuse_sizes(int64_t batch, int64_t rows, int64_t columns, const RepackParams& weights) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  const int64_t tiles = ceil_divide(batch * rows * columns, 64) * ceil_divide(weights.rows, 64);
  if (tiles > kMaxBlocks || elements(weights) > kMaxBlocks) return "the call has more tiles than a launch has blocks";
  constexpr int64_t kMaxRowElements = 1 << 22;  // a tile's rows then stay within 2^31 bytes
  const int64_t row_elements = static_cast<int64_t>(weights.kernel_rows) * weights.kernel_columns * weights.columns;
  if (row_elements >= kMaxRowElements) return "the weights of one channel pass 2^22 elements";
  constexpr int64_t kMaxGroups = 65535;
  if (weights.groups > kMaxGroups) return "there are more than 65535 groups";
  return {};
}

// Offsets of pixels under tap 0, inside the tensor or not, are kept in 32 bits, counted in vectors.
std::string refuse_span(const char* what, const Strides4& strides, ElementType type, int64_t batch,
                        int64_t greatest_row, int64_t greatest_column) {
  const double span = static_cast<double>(batch) * static_cast<double>(strides.batch) +
                      static_cast<double>(greatest_row) * static_cast<double>(strides.row) +
                      static_cast<double>(greatest_column) * static_cast<double>(strides.column);
  if (span * static_cast<double>(element_bytes(type)) < 2147483648.0 * kVectorAlignment) return {};
  return std::string(what) + ", with its padding, spans 32 GiB or more";
}

// The greatest distance from position 0 of what tap 0 of any output reads.
int64_t greatest_position(const WindowAxis& window, const AxisPatches& patches) {
  const int64_t first = patches.out_bounds[0] * window.stride - window.padding;
  const int64_t last = patches.out_bounds[patches.patches] * window.stride - window.padding;
  const int64_t before = first < 0 ? -first : first;
  const int64_t behind = last < 0 ? -last : last;
  return before > behind ? before : behind;
}
// The greatest distance from output 0 that an input counts back to, whether or not such an output exists.
int64_t greatest_output(const WindowAxis& window, const AxisPatches& patches) {
  const int64_t padding = window.padding < 0 ? -window.padding : window.padding;
  return (patches.in_bounds[patches.patches] + padding + window.kernel * window.dilation) / window.stride + 1;
}

int64_t extent(const int32_t (&bounds)[kMaxPatchesPerAxis + 1], const AxisPatches& patches) {
  return bounds[patches.patches] - bounds[0];
}
int64_t last(const int32_t (&bounds)[kMaxPatchesPerAxis + 1], const AxisPatches& patches) {
  return bounds[patches.patches] - 1;
}

}  // namespace

std::string refusal(const ConvForwardParams& params, const DeviceTraits& device) {
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  return first_reason(
      refuse_device_and_type(params.type, params.allow_tf32, device, kGatherSharedBytes),
      refuse_channels("input channels", params.in_channels_per_group, params.type),
      refuse_layout("the input", params.input_strides, params.input, params.type, params.batch - 1,
                    last(rows.in_bounds, rows), last(columns.in_bounds, columns)),
      refuse_window(params),
      refuse_span("the input", params.input_strides, params.type, params.batch,
                  greatest_position(params.row_window, rows), greatest_position(params.column_window, columns)),
      refuse_sizes(params.batch, extent(rows.out_bounds, rows), extent(columns.out_bounds, columns),
                   weights_of(params)));
}

std::string refusal(const ConvInputGradParams& params, const DeviceTraits& device) {
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  return first_reason(
      refuse_device_and_type(params.type, params.allow_tf32, device, kGatherSharedBytes),
      refuse_channels("output channels", params.out_channels_per_group, params.type),
      refuse_layout("grad_output", params.grad_output_strides, params.grad_output, params.type, params.batch - 1,
                    last(rows.out_bounds, rows), last(columns.out_bounds, columns)),
      refuse_window(params),
      refuse_span("grad_output", params.grad_output_strides, params.type, params.batch,
                  greatest_output(params.row_window, rows), greatest_output(params.column_window, columns)),
      refuse_sizes(params.batch, extent(rows.in_bounds, rows), extent(columns.in_bounds, columns), weights_of(params)));
}

int64_t workspace_bytes(const ConvForwardParams& params, const DeviceTraits&) {
  return weight_workspace_bytes(params);
}
int64_t workspace_bytes(const ConvInputGradParams& params, const DeviceTraits&) {
  return weight_workspace_bytes(params);
}

void launch(const ConvForwardParams& params, const DeviceTraits& device, void* workspace, cudaStream_t stream) {
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  GatherParams gather{};
  gather.type = params.type;
  gather.batch = params.batch;
  gather.groups = params.out_channels / params.out_channels_per_group;
  gather.source_channels = params.in_channels_per_group;
  gather.destination_channels = params.out_channels_per_group;
  gather.kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  gather.weight_taps = static_cast<int32_t>(params.row_window.kernel * params.column_window.kernel);
  gather.relu = params.relu;
  gather.vector_stores = params.out_channels_per_group % (kVectorAlignment / element_bytes(params.type)) == 0 &&
                         has_vectors(params.output_strides, params.output, params.type, params.batch - 1,
                                     last(rows.out_bounds, rows), last(columns.out_bounds, columns));
  gather.rows = forward_axis(params.row_window, rows);
  gather.columns = forward_axis(params.column_window, columns);
  gather.grid = params.grid;
  gather.source_strides = stepped_strides(params.input_strides, params.batch - 1, last(rows.in_bounds, rows),
                                          last(columns.in_bounds, columns));
  gather.destination_strides = params.output_strides;
  gather.bias_stride = params.bias_stride;
  gather.source = params.input;
  gather.bias = params.bias;
  gather.destination = params.output;
  with_operator(params.kOperator, [&] {
    gather.weights = prepare_weights(params, workspace, stream);
    launch_gather(gather, device, stream);
  });
}

void launch(const ConvInputGradParams& params, const DeviceTraits& device, void* workspace, cudaStream_t stream) {
  const AxisPatches& rows = params.grid.rows;
  const AxisPatches& columns = params.grid.columns;
  GatherParams gather{};
  gather.type = params.type;
  gather.batch = params.batch;
  gather.groups = params.in_channels / params.in_channels_per_group;
  gather.source_channels = params.out_channels_per_group;
  gather.destination_channels = params.in_channels_per_group;
  gather.kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  gather.weight_taps = static_cast<int32_t>(params.row_window.kernel * params.column_window.kernel);
  gather.vector_stores = params.in_channels_per_group % (kVectorAlignment / element_bytes(params.type)) == 0 &&
                         has_vectors(params.output_strides, params.output, params.type, params.batch - 1,
                                     last(rows.in_bounds, rows), last(columns.in_bounds, columns));
  gather.grid = {swap_roles(rows), swap_roles(columns)};
  gather.source_strides = stepped_strides(params.grad_output_strides, params.batch - 1, last(rows.out_bounds, rows),
                                          last(columns.out_bounds, columns));
  gather.destination_strides = params.output_strides;
  gather.source = params.grad_output;
  gather.destination = params.output;
  with_operator(params.kOperator, [&] {
    gather.weights = prepare_weights(params, workspace, stream);
    for (int64_t y = 0; y < params.row_window.stride; y += kMaxClasses) {
      gather.rows = input_grad_axis(params.row_window, rows, y);
      for (int64_t x = 0; x < params.column_window.stride; x += kMaxClasses) {
        gather.columns = input_grad_axis(params.column_window, columns, x);
        launch_gather(gather, device, stream);
      }
    }
  });
}

}  // namespace splitkern::kernels::sm80
