// Weight gradient of 3x3 windows of stride 1 on Hopper. A tile is 64 output channels times all nine taps of 64 input
// channels: a block loads a box of gradients and the box of inputs under it, with its border, once, and tap (r, s)
// multiplies the gradients with the same inputs r rows and s columns further on. Warpgroup r takes kernel row r; its
// three taps are one product of 192 columns, whose blocks of 64 columns begin one pixel apart in shared memory.
// Both boxes have the same row length, so that one run over a box's pixels is the reduction: in the columns beyond a
// patch the gradients are zeros of the loads, and what the inputs hold there does not count, if it is finite. It is the
// next row's inputs, or zeros: the maps end where the windows do, and all boxes of a launch are alike, so that nothing
// is ever left behind a box. An infinity or NaN that some window reads may therefore reach every tap of its channel.
#include "window_weight_grad.h"

#include <algorithm>
#include <vector>

#include "../budgets.h"
#include "../dispatch.h"
#include "conv_gemm.h"
#include "partial_sums.h"

namespace splitkern::kernels::sm90 {
namespace {

constexpr int32_t kTaps = 3;  // per axis, and warpgroups that multiply
constexpr int32_t kColumns = kTaps * kUnitChannels;
constexpr int32_t kWindowThreads = (1 + kTaps) * kWarpgroupThreads;
constexpr int32_t kMaxProblems = kMaxSubProblems;
constexpr int32_t kPixelBytes = kUnitChannels * 2;
constexpr int32_t kStages = 2;
constexpr int32_t kStageBytes = (kSharedBytes - 1024) / kStages / 1024 * 1024;
constexpr int32_t kStepPixels = 16;  // of one product

struct WindowGradParams {
  static constexpr const char* kOperator = ConvWeightGradParams::kOperator;
  TensorMap grad_output[kMaxProblems];
  TensorMap input[kMaxProblems];
  struct Problem {
    int32_t lower_column;  // of the input box of output (0, 0)
    int32_t lower_row;
    int32_t box_columns;
    int32_t rows;         // of gradients in a box
    int32_t row_tiles;    // per image
    int32_t chunk_begin;  // of this problem among all chunks
  } problems[kMaxProblems];
  int32_t problem_count;
  int32_t chunks;
  int32_t offset_row_step;
  int32_t offset_column_step;
  int32_t row_tiles;      // of 64 output channels
  int32_t channel_tiles;  // of 64 input channels
  float* partial_sums;
};
static_assert(sizeof(WindowGradParams) <= kMaxParamsBytes);

struct Storage {
  alignas(1024) unsigned char stages[kStages][kStageBytes];  // gradients, then inputs
  Barrier full[kStages];
  Barrier empty[kStages];
};
static_assert(sizeof(Storage) <= shared_budget("sm90::window_weight_grad_kernel"));

struct Chunk {
  int32_t problem = 0;
  int32_t row = 0;
  int32_t image = 0;
};

SPLITKERN_DEVICE void locate(const WindowGradParams& params, int32_t chunk, Chunk& place) {
  while (place.problem + 1 < params.problem_count && params.problems[place.problem + 1].chunk_begin <= chunk) {
    ++place.problem;
  }
  const WindowGradParams::Problem& problem = params.problems[place.problem];
  const int32_t local = chunk - problem.chunk_begin;
  place.image = local / problem.row_tiles;
  place.row = (local - place.image * problem.row_tiles) * problem.rows;
}

SPLITKERN_DEVICE void produce(const WindowGradParams& params, Storage& shared, Share share) {
  Ring<kStages> ring;
  for (int64_t item = share.begin; item < share.end;) {
    const int32_t tile = static_cast<int32_t>(item / params.chunks);
    int32_t chunk = static_cast<int32_t>(item - static_cast<int64_t>(tile) * params.chunks);
    const int64_t left_in_tile = params.chunks - chunk;
    const int64_t left = share.end - item < left_in_tile ? share.end - item : left_in_tile;
    const int32_t channel_tile = tile / params.row_tiles;
    const int32_t first_output = (tile - channel_tile * params.row_tiles) * 64;
    const int32_t first_input = channel_tile * kUnitChannels;
    Chunk place;
    for (int64_t done = 0; done < left; ++done, ++chunk) {
      locate(params, chunk, place);
      const WindowGradParams::Problem& problem = params.problems[place.problem];
      const int32_t grad_bytes = problem.rows * problem.box_columns * kPixelBytes;
      const int32_t border_bytes = (kTaps - 1) * params.offset_row_step * problem.box_columns * kPixelBytes;
      unsigned char* stage = shared.stages[ring.index];
      Barrier& full = shared.full[ring.index];
      barrier_wait(shared.empty[ring.index], ring.parity ^ 1);
      barrier_arrive_expect(full, static_cast<uint32_t>(2 * grad_bytes + border_bytes));
      tma_load_4d(stage, params.grad_output[place.problem], full, first_output, 0, place.row, place.image);
      tma_load_4d(stage + grad_bytes, params.input[place.problem], full, first_input, problem.lower_column,
                  problem.lower_row + place.row, place.image);
      ring.next();
    }
    item += left;
  }
}

template <class T>
SPLITKERN_DEVICE void multiply(const WindowGradParams& params, Storage& shared, Share share, int32_t kernel_row) {
  const int32_t thread = static_cast<int32_t>(thread_index()) % kWarpgroupThreads;
  Ring<kStages> ring;
  float sums[kColumns / 2];
  for (int64_t item = share.begin; item < share.end;) {
    const int32_t tile = static_cast<int32_t>(item / params.chunks);
    int32_t chunk = static_cast<int32_t>(item - static_cast<int64_t>(tile) * params.chunks);
    const int64_t left_in_tile = params.chunks - chunk;
    const int64_t left = share.end - item < left_in_tile ? share.end - item : left_in_tile;
    Chunk place;
    int32_t previous = -1;
    for (int64_t done = 0; done < left; ++done, ++chunk) {
      locate(params, chunk, place);
      const WindowGradParams::Problem& problem = params.problems[place.problem];
      const int32_t pixels = problem.rows * problem.box_columns;
      const unsigned char* grads = shared.stages[ring.index];
      const unsigned char* inputs =
          grads + (pixels + kernel_row * params.offset_row_step * problem.box_columns) * kPixelBytes;
      uint64_t a = matrix_descriptor(grads, Swizzle::k128Bytes, 16, 1024);
      uint64_t b = matrix_descriptor(inputs, Swizzle::k128Bytes,
                                     static_cast<uint32_t>(params.offset_column_step * kPixelBytes), 1024);
      barrier_wait(shared.full[ring.index], ring.parity);
      for (int32_t pixel = 0; pixel < pixels; pixel += kStepPixels) {
        wgmma_fence();
        wgmma<T, kColumns, true, true>(sums, a, b, done != 0 || pixel != 0);
        wgmma_commit();
        wgmma_wait<1>();  // the product before has been read
        if (previous >= 0 && thread == 0) barrier_arrive(shared.empty[previous]);
        previous = -1;
        a = advance(a, kStepPixels * kPixelBytes);
        b = advance(b, kStepPixels * kPixelBytes);
      }
      previous = static_cast<int32_t>(ring.index);
      ring.next();
    }
    wgmma_wait<0>();
    if (thread == 0) barrier_arrive(shared.empty[previous]);

    constexpr int32_t kTileColumns = kTaps * kColumns;
    float* slot = params.partial_sums + (static_cast<int64_t>(block_index().x) + tile) * (64 * kTileColumns);
    float* corner =
        slot + (16 * (thread / 32) + thread % 32 / 4) * kTileColumns + kernel_row * kColumns + 2 * (thread % 4);
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 2) {
      store_global(corner + 8 * (i / 2 % 2) * kTileColumns + 8 * (i / 4),
                   Vector8{{float_bits(sums[i]), float_bits(sums[i + 1])}});
    }
    item += left;
  }
}

template <class T>
__global__ void __launch_bounds__(kWindowThreads, 1)
    window_weight_grad_kernel(const __grid_constant__ WindowGradParams params) {
  Storage& shared = dynamic_shared<Storage>();
  allow_next_kernel();
  // The last taps read a few pixels past a box; what stands there meets zeros, and must be a number for that.
  for (int32_t i = static_cast<int32_t>(thread_index()); i < kStages * kStageBytes / 16; i += kWindowThreads) {
    reinterpret_cast<Vector16*>(&shared.stages[0][0])[i] = Vector16{{0, 0, 0, 0}};
  }
  fence_async_shared();
  if (thread_index() == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared.full[i], 1);
      barrier_init(shared.empty[i], kTaps);
    }
    barrier_init_fence();
  }
  block_barrier();
  const int64_t items = static_cast<int64_t>(params.row_tiles) * params.channel_tiles * params.chunks;
  const Share share = share_of(block_index().x, grid_extent().x, items);
  const int32_t warpgroup = static_cast<int32_t>(warp_index()) / 4;
  if (warpgroup == 0) {
    release_registers<32>();
    if (thread_index() == 0) produce(params, shared, share);
  } else {
    claim_registers<160>();
    multiply<T>(params, shared, share, warpgroup - 1);
  }
}

// --- Host ---------------------------------------------------------------------------------------------------------

// A strip of a patch's columns, and how its rows are cut.
struct Strip {
  AxisWalk rows;
  AxisWalk columns;  // of the patch
  int32_t first_column;
  int32_t width;
  int32_t box_columns;
  int32_t box_rows;
  int32_t row_tiles;
};

struct Plan {
  std::vector<Strip> strips;
  int64_t pixels = 0;  // multiplied, useful or not
};

// How a patch's outputs are cut into boxes.
struct Cut {
  int32_t strips = 0;  // 0: they cannot be
  int32_t width;
  int32_t box_columns;
  int32_t box_rows;
  int32_t row_tiles;
};

// The cut into the fewest pixels, the border columns of every box and the rows behind the last counted.
Cut cut_of(int32_t out_rows, int32_t out_columns, int32_t border_rows, int32_t border_columns) {
  Cut best{};
  int64_t best_pixels = 0;
  for (int32_t strips = 1; strips <= 8 && strips <= out_columns; ++strips) {
    const int32_t width = static_cast<int32_t>(ceil_divide(out_columns, strips));
    for (int32_t box_rows = std::min(out_rows + 1, 64); box_rows >= 1; --box_rows) {
      int32_t box_columns = width + border_columns;
      while (box_rows * box_columns % kStepPixels != 0) ++box_columns;
      const int32_t stage_pixels = (2 * box_rows + border_rows) * box_columns + border_columns;
      if (box_columns > 256 || box_rows + border_rows > 256 || stage_pixels * kPixelBytes > kStageBytes) continue;
      const int32_t row_tiles = static_cast<int32_t>(ceil_divide(out_rows, box_rows));
      const int64_t pixels = int64_t{strips} * row_tiles * box_rows * box_columns;
      if (best.strips == 0 || pixels < best_pixels) {
        best = {strips, width, box_columns, box_rows, row_tiles};
        best_pixels = pixels;
      }
    }
  }
  return best;
}

std::vector<AxisWalk> walks_of(const WindowAxis& window, const AxisPatches& patches) {
  std::vector<AxisWalk> walks;
  for (int32_t patch = 0; patch < patches.patches; ++patch) walks.push_back(forward_axis(window, patches, patch));
  return walks;
}

// Positions of the patch that its windows can read, from its first on.
int64_t read_extent(const AxisWalk& walk) {
  const int64_t end = walk.lower + walk.outputs + (kTaps - 1) * walk.offset_step;
  return std::clamp<int64_t>(end, 1, walk.operand_extent);
}

Plan plan_of(const ConvWeightGradParams& params) {
  Plan plan;
  const auto three = [](const WindowAxis& axis) { return axis.kernel == kTaps && axis.stride == 1; };
  if (!three(params.row_window) || !three(params.column_window)) return plan;
  const int32_t border_rows = static_cast<int32_t>((kTaps - 1) * params.row_window.dilation);
  const int32_t border_columns = static_cast<int32_t>((kTaps - 1) * params.column_window.dilation);
  const auto longest = [](const std::vector<AxisWalk>& walks) {
    int64_t outputs = 0;
    for (const AxisWalk& walk : walks) outputs = std::max(outputs, walk.outputs);
    return static_cast<int32_t>(outputs);
  };
  const std::vector<AxisWalk> row_walks = walks_of(params.row_window, params.grid.rows);
  const std::vector<AxisWalk> column_walks = walks_of(params.column_window, params.grid.columns);
  // One box for all patches: see above.
  const Cut cut = cut_of(longest(row_walks), longest(column_walks), border_rows, border_columns);
  if (cut.strips == 0) return plan;
  for (const AxisWalk& rows : row_walks) {
    for (const AxisWalk& columns : column_walks) {
      const int32_t row_tiles = static_cast<int32_t>(ceil_divide(rows.outputs, cut.box_rows));
      for (int32_t first = 0; first < columns.outputs; first += cut.width) {
        const int32_t width = std::min(cut.width, static_cast<int32_t>(columns.outputs) - first);
        plan.strips.push_back({rows, columns, first, width, cut.box_columns, cut.box_rows, row_tiles});
        plan.pixels += int64_t{row_tiles} * cut.box_rows * cut.box_columns * params.batch;
      }
    }
  }
  if (static_cast<int64_t>(plan.strips.size()) > kMaxProblems) return {};
  return plan;
}

struct Shape {
  int32_t row_tiles;
  int32_t channel_tiles;
  int32_t chunks;
  int32_t blocks;
};

Shape shape_of(const Plan& plan, const ConvWeightGradParams& params, const DeviceTraits& traits) {
  Shape shape{};
  shape.row_tiles = static_cast<int32_t>(ceil_divide(params.out_channels, 64));
  shape.channel_tiles = static_cast<int32_t>(ceil_divide(params.in_channels_per_group, kUnitChannels));
  for (const Strip& strip : plan.strips) shape.chunks += strip.row_tiles * params.batch;
  shape.blocks = reduction_blocks(int64_t{shape.row_tiles} * shape.channel_tiles, shape.chunks, traits.multiprocessors);
  return shape;
}

}  // namespace

std::optional<double> window_weight_grad_cycles(const ConvWeightGradParams& params, const DeviceTraits& traits) {
  const Plan plan = plan_of(params);
  if (plan.strips.empty()) return std::nullopt;
  const Shape shape = shape_of(plan, params, traits);
  // Half a cycle per column and 16 pixels, for each of the three warpgroups.
  const double products = static_cast<double>(plan.pixels) / kStepPixels * kTaps * kColumns / 2;
  return products * shape.row_tiles * shape.channel_tiles / shape.blocks;
}

int64_t window_weight_grad_workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits) {
  const Shape shape = shape_of(plan_of(params), params, traits);
  return (int64_t{shape.row_tiles} * shape.channel_tiles + shape.blocks) * 64 * kTaps * kColumns *
         static_cast<int64_t>(sizeof(float));
}

void launch_window_weight_grad(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace,
                               cudaStream_t stream) {
  const Plan plan = plan_of(params);
  if (plan.strips.empty()) {
    throw std::runtime_error(std::string(params.kOperator) + ": the window kernel takes no such call");
  }
  const Shape shape = shape_of(plan, params, traits);
  WindowGradParams products{};
  products.offset_row_step = static_cast<int32_t>(params.row_window.dilation);
  products.offset_column_step = static_cast<int32_t>(params.column_window.dilation);
  products.row_tiles = shape.row_tiles;
  products.channel_tiles = shape.channel_tiles;
  products.partial_sums = static_cast<float*>(workspace);
  const int32_t border_rows = (kTaps - 1) * products.offset_row_step;
  for (const Strip& strip : plan.strips) {
    const int32_t index = products.problem_count++;
    const AxisWalk& rows = strip.rows;
    const AxisWalk& columns = strip.columns;
    const void* grad_output = address_of(params.grad_output, params.grad_output_strides, rows.output_begin,
                                         columns.output_begin + strip.first_column);
    const void* input = address_of(params.input, params.input_strides, rows.operand_begin, columns.operand_begin);
    products.grad_output[index] =
        encode(box_map(params.type, grad_output, params.grad_output_strides, params.out_channels, params.batch,
                       rows.outputs, strip.width, strip.box_rows, strip.box_columns),
               params.kOperator);
    products.input[index] =
        encode(box_map(params.type, input, params.input_strides, params.in_channels_per_group, params.batch,
                       read_extent(rows), read_extent(columns), strip.box_rows + border_rows, strip.box_columns),
               params.kOperator);
    products.problems[index] = {static_cast<int32_t>(columns.lower) + strip.first_column,
                                static_cast<int32_t>(rows.lower),
                                strip.box_columns,
                                strip.box_rows,
                                strip.row_tiles,
                                products.chunks};
    products.chunks += strip.row_tiles * params.batch;
  }

  PartialSums partial_sums{};
  partial_sums.taps = kTaps * kTaps;
  partial_sums.units = partial_sums.taps * shape.channel_tiles;
  partial_sums.row_tiles = shape.row_tiles;
  partial_sums.tile_rows = 64;
  partial_sums.tile_units = partial_sums.taps;
  partial_sums.chunks = shape.chunks;
  partial_sums.blocks = shape.blocks;
  partial_sums.tiles = shape.row_tiles * shape.channel_tiles;
  partial_sums.values = products.partial_sums;
  dispatch_half_type(params.kOperator, params.type, [&](auto tag) {
    kernels::launch(&window_weight_grad_kernel<typename decltype(tag)::Type>,
                    Dim3{static_cast<unsigned>(shape.blocks), 1u, 1u}, Dim3{kWindowThreads, 1u, 1u}, sizeof(Storage),
                    stream, products);
  });
  launch_reduce(params, partial_sums, stream);
}

}  // namespace splitkern::kernels::sm90
