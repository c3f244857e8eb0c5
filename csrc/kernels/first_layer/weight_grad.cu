// Gradient with respect to the weight where the input has at most four channels: a matrix product of 64 output
// channels by whole windows, reduced over outputs. Each block sums a fixed share of the tiles, then a second kernel
// adds the blocks in ascending order, so the result is the same in every run. Called through conv_paths.h.
// Inputs of any strides; grad_output has neighbouring channels, read 16 bytes at a time.
#include <algorithm>

#include "../budgets.h"
#include "conv.h"
#include "tile.h"

namespace splitkern::kernels::first_layer {
namespace {

constexpr int kChannelTiles = kOutChannels / 16;  // of a product, along output channels
constexpr int kProducts = 7;                      // of a warp, along the window: 7x7 is 28, for four warps
constexpr int kSums = kChannelTiles * kProducts * 4;
constexpr int kReduceSlices = 8;

// Eight columns of the result: two neighbouring taps of a kernel row, four channels each, or one tap where
// neighbouring taps are not neighbouring pixels and the loads are of 16-byte rows.
struct WeightGradCall : ConvWeightGradParams {
  Tiles tiles;
  int32_t taps_per_product;
  int32_t products_per_kernel_row;
  int32_t products;           // of the window
  int32_t product_blocks;     // along grid.y, faster than channel blocks
  int32_t product_warps;      // warps of a block that hold different products: 1, 2, 4 or 8
  int32_t products_per_warp;  // at most kProducts
  int32_t channel_blocks;
  int32_t tile_pixels;
  int32_t columns_reciprocal;  // of 65536, rounded up, as Tiles::pitch_reciprocal
  int32_t grad_step_rows;      // from an output of a tile to the one kGradStep further
  int32_t grad_step_columns;
  int64_t grad_step;      // the same in elements of grad_output
  int64_t grad_next_row;  // in elements, from the end of a row of the tile to the begin of the next
  int32_t stages;
  int32_t copy_bytes;  // from one copy of the pixels to the other
  int32_t blocks;      // along grid.x: shares of the sum
  float* partial;      // [blocks][grid.y][product warps][sum of a lane][lane]
};

// Where an output of a tile lies. Followed in shared memory by the stages of grad_output and two buffers of pixels.
struct Place {
  int32_t first_input;  // in staged pixels
  uint16_t row;
  uint16_t column;
};
struct Storage {
  Place places[kTilePixels];
  Vector16 zeros;
};
static_assert(sizeof(Storage) % 16 == 0);

template <class T>
inline constexpr int kChunks = kOutChannels * static_cast<int>(sizeof(T)) / 16;  // of 16 bytes, in a staged output

// The place of a chunk of an output's channels, such that the accesses of a warp meet different banks.
template <class T>
SPLITKERN_DEVICE int32_t chunk_offset(int32_t pixel, int32_t chunk) {
  const int32_t mask = sizeof(T) == 4 ? pixel % 4 * 2 : pixel % 8;
  return (pixel * kChunks<T> + (chunk ^ mask)) * 16;
}

template <class T>
int32_t stage_bytes(int32_t tile_pixels) {
  return tile_pixels * kOutChannels * static_cast<int32_t>(sizeof(T));
}

// Two copies of 8-byte pixels, the second one pixel further, so that any two neighbours are an aligned 16-byte row
// of one of them; eight rows one pixel apart then meet different banks. One copy of 16-byte pixels.
template <class T>
int32_t pixel_copy_bytes(const Tiles& tiles) {
  const int32_t pixels = tiles.in_rows * tiles.pitch;
  if (sizeof(T) == 4) return pixels * static_cast<int32_t>(sizeof(Pixel<T>));
  const int32_t bytes = (pixels + 2) * static_cast<int32_t>(sizeof(Pixel<T>));
  return bytes + (128 + 48 - bytes % 128) % 128;
}

template <class T>
inline constexpr int kCopies = sizeof(T) == 4 ? 1 : 2;

template <class T>
int64_t shared_bytes(const WeightGradCall& call) {
  const int64_t pipeline = static_cast<int64_t>(call.stages) * stage_bytes<T>(call.tile_pixels) +
                           static_cast<int64_t>(2) * kCopies<T> * call.copy_bytes;
  const int64_t exchange = static_cast<int64_t>(call.product_warps) * kSums * 32 * sizeof(float);
  return static_cast<int64_t>(sizeof(Storage)) + std::max(pipeline, exchange);
}

// Outputs between a thread's copies into one stage: all its chunks then lie alike.
template <class T>
inline constexpr int kGradStep = kThreads / kChunks<T>;
static_assert(kGradStep<Half> % 8 == 0 && kGradStep<float> % 4 == 0);

template <class T>
SPLITKERN_DEVICE void fetch_grads(const WeightGradCall& params, unsigned char* stage, const Tile& tile,
                                  int32_t first_channel) {
  const int32_t chunk = static_cast<int32_t>(thread_index()) % kChunks<T>;
  const int32_t pixel = static_cast<int32_t>(thread_index()) / kChunks<T>;
  const int32_t channel = first_channel + chunk * (16 / static_cast<int32_t>(sizeof(T)));
  const Strides4& strides = params.grad_output_strides;
  int32_t row = (pixel * params.columns_reciprocal) >> 16;
  int32_t column = pixel - row * params.tiles.columns;
  const T* const base = static_cast<const T*>(params.grad_output);
  const T* from = base + tile.image * strides.batch + (tile.rows.out_begin + row) * strides.row +
                  (tile.columns.out_begin + column) * strides.column + channel;
  unsigned char* const to = stage + chunk_offset<T>(pixel, chunk);
#pragma unroll
  for (int i = 0; i < kTilePixels / (kGradStep<T> * static_cast<int>(sizeof(T)) / 2); ++i) {
    if (i * kGradStep<T> >= params.tile_pixels) continue;
    const bool inside = channel < params.out_channels && row < tile.rows.out_count && column < tile.columns.out_count;
    copy_async<16>(to + i * (kGradStep<T> * kChunks<T> * 16), inside ? from : base, inside);
    row += params.grad_step_rows;
    column += params.grad_step_columns;
    const bool wraps = column >= params.tiles.columns;
    row += wraps ? 1 : 0;
    column -= wraps ? params.tiles.columns : 0;
    from += params.grad_step + (wraps ? params.grad_next_row : 0);
  }
}

template <class T>
SPLITKERN_DEVICE void deliver_copies(PixelStream<T, kPixelsPerThread>& stream, int32_t channels, unsigned char* to,
                                     int32_t pixels, int32_t copy_bytes) {
  deliver(stream, channels, pixels, [&](int32_t index, const Pixel<T>& pixel) {
    reinterpret_cast<Pixel<T>*>(to)[index] = pixel;
    if constexpr (kCopies<T> == 2) reinterpret_cast<Pixel<T>*>(to + copy_bytes)[index + 1] = pixel;
  });
}

SPLITKERN_DEVICE bool is_inside(const Place& place, const Tile& tile) {
  return place.row < tile.rows.out_count && place.column < tile.columns.out_count;
}

// The products of one warp, over its share of the outputs of a tile. offsets: of the products' first taps, for the
// lane's part of the load, in staged pixels.
template <class T>
SPLITKERN_DEVICE void multiply_tile(const WeightGradCall& params, const Storage& storage, const unsigned char* grads,
                                    const unsigned char* inputs, const Tile& tile, const int32_t (&offsets)[8],
                                    int32_t products, int32_t split, int32_t splits,
                                    float (&sums)[kChannelTiles][kProducts][4]) {
  const int32_t lane = static_cast<int32_t>(lane_index());
  if constexpr (sizeof(T) == 4) {
    for (int32_t first = split * 8; first < params.tile_pixels; first += splits * 8) {
      const int32_t pixel = first + lane % 4;
      const Place near = storage.places[pixel];
      const Place far = storage.places[pixel + 4];
      const bool near_inside = is_inside(near, tile);
      const bool far_inside = is_inside(far, tile);
      uint32_t a[kChannelTiles][4];
#pragma unroll
      for (int m = 0; m < kChannelTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t channel = m * 16 + lane / 4 + i % 2 * 8;
          const unsigned char* from = grads + chunk_offset<T>(pixel + i / 2 * 4, channel / 4) + channel % 4 * 4;
          a[m][i] = to_tf32(*reinterpret_cast<const float*>(from));
        }
      }
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        if (n >= products) continue;
        const uint32_t* const words = reinterpret_cast<const uint32_t*>(inputs) + offsets[n] * 4 + lane / 4 % 4;
        const uint32_t b[2] = {near_inside ? words[near.first_input * 4] : 0u,
                               far_inside ? words[far.first_input * 4] : 0u};
#pragma unroll
        for (int m = 0; m < kChannelTiles; ++m) mma_16x8x8_tf32(sums[m][n], a[m], b);
      }
    }
  } else {
    for (int32_t first = split * 16; first < params.tile_pixels; first += splits * 16) {
      uint32_t a[kChannelTiles][4];
      const int32_t grad_pixel = first + lane / 16 * 8 + lane % 8;
#pragma unroll
      for (int m = 0; m < kChannelTiles; ++m) {
        load_matrix_x4_transposed(a[m], grads + chunk_offset<T>(grad_pixel, m * 2 + lane / 8 % 2));
      }
      const Place place = storage.places[first + lane / 8 % 2 * 8 + lane % 8];
      const bool inside = is_inside(place, tile);
#pragma unroll
      for (int pair = 0; pair < (kProducts + 1) / 2; ++pair) {
        if (2 * pair >= products) continue;
        // Rows of zeros for places past the patch: an infinity there must not meet a zero gradient.
        const int32_t pixel = place.first_input + offsets[pair];
        const int32_t odd = pixel & 1;
        const void* row = &storage.zeros;
        if (inside) row = inputs + odd * params.copy_bytes + (pixel + odd) * static_cast<int32_t>(sizeof(Pixel<T>));
        uint32_t b[4];
        load_matrix_x4_transposed(b, row);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (2 * pair + i >= kProducts || 2 * pair + i >= products) continue;
          const uint32_t of_product[2] = {b[2 * i], b[2 * i + 1]};
#pragma unroll
          for (int m = 0; m < kChannelTiles; ++m) {
            mma_16x8x16<T>(sums[m][2 * pair + i < kProducts ? 2 * pair + i : 0], a[m], of_product);
          }
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    first_layer_weight_grad_kernel(const __grid_constant__ WeightGradCall params) {
  Storage& storage = dynamic_shared<Storage>();
  unsigned char* const stages = reinterpret_cast<unsigned char*>(&storage + 1);
  const Tiles& tiles = params.tiles;
  const int32_t pixels = tiles.in_rows * tiles.pitch;
  const int32_t grad_bytes = params.tile_pixels * kOutChannels * static_cast<int32_t>(sizeof(T));
  unsigned char* const buffers = stages + params.stages * grad_bytes;
  const int32_t buffer_bytes = kCopies<T> * params.copy_bytes;
  const int32_t product_block = static_cast<int32_t>(block_index().y) % params.product_blocks;
  const int32_t first_channel = static_cast<int32_t>(block_index().y) / params.product_blocks * kOutChannels;
  const int32_t lane = static_cast<int32_t>(lane_index());
  const int32_t warp = static_cast<int32_t>(warp_index());
  const int32_t product_warp = warp % params.product_warps;
  const int32_t split = warp / params.product_warps;
  const int32_t splits = kWarps / params.product_warps;

  for (int32_t pixel = thread_index(); pixel < params.tile_pixels; pixel += kThreads) {
    const int32_t row = pixel / tiles.columns;
    const int32_t column = pixel - row * tiles.columns;
    // A row past the tile is past every patch.
    storage.places[pixel] = {row * static_cast<int32_t>(params.row_window.stride) * tiles.pitch +
                                 column * static_cast<int32_t>(params.column_window.stride),
                             static_cast<uint16_t>(row), static_cast<uint16_t>(column)};
  }
  if (thread_index() == 0) storage.zeros = {{0, 0, 0, 0}};

  const int32_t first_product = (product_block * params.product_warps + product_warp) * params.products_per_warp;
  const int32_t left = params.products - first_product;
  const int32_t products = left < params.products_per_warp ? left : params.products_per_warp;  // negative: none
  int32_t offsets[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    // 16-bit: each half warp addresses one of two products; fp32: each lane reads one of two taps.
    const int32_t own = sizeof(T) == 4 ? i : 2 * i + lane / 16;
    const int32_t product = own < products ? first_product + own : 0;
    const int32_t tap_y = product / params.products_per_kernel_row;
    int32_t tap_x = (product - tap_y * params.products_per_kernel_row) * params.taps_per_product;
    if (sizeof(T) == 4 && lane >= 16 && tap_x + 1 < params.column_window.kernel) ++tap_x;
    offsets[i] = tap_y * static_cast<int32_t>(params.row_window.dilation) * tiles.pitch +
                 tap_x * static_cast<int32_t>(params.column_window.dilation);
  }

  const TileIndex step = tile_index(tiles, static_cast<int32_t>(grid_extent().x));
  TileIndex index = tile_index(tiles, static_cast<int32_t>(block_index().x));
  TileIndex ahead = index;  // whose gradients are fetched
  for (int32_t stage = 0; stage < params.stages - 1; ++stage) {
    if (ahead.image < params.batch) {
      fetch_grads<T>(params, stages + stage * grad_bytes, tile_at(params, tiles, ahead), first_channel);
    }
    advance(tiles, ahead, step);
    copy_async_commit();
  }
  PixelStream<T, kPixelsPerThread> stream;
  Tile tile = tile_at(params, tiles, index);
  begin(stream, params.input, params.input_strides, tiles, tile);
  fetch(stream, params.input, params.input_strides, params.in_channels_per_group, tiles, tile);
  deliver_copies(stream, params.in_channels_per_group, buffers, pixels, params.copy_bytes);

  float sums[kChannelTiles][kProducts][4] = {};
  int32_t stage = 0;
  for (int32_t buffer = 0;; buffer ^= 1) {
    if (params.stages == 2) {
      copy_async_wait<0>();
    } else {
      copy_async_wait<1>();
    }
    // This tile has arrived, and nobody reads the stage and the buffer of the one before.
    block_barrier();
    if (ahead.image < params.batch) {
      const int32_t free_stage = stage == 0 ? params.stages - 1 : stage - 1;
      fetch_grads<T>(params, stages + free_stage * grad_bytes, tile_at(params, tiles, ahead), first_channel);
    }
    copy_async_commit();
    advance(tiles, ahead, step);
    advance(tiles, index, step);
    const bool has_next = index.image < params.batch;
    Tile next = tile;
    if (has_next) {
      next = tile_at(params, tiles, index);
      begin(stream, params.input, params.input_strides, tiles, next);
      fetch(stream, params.input, params.input_strides, params.in_channels_per_group, tiles, next);
    }
    multiply_tile<T>(params, storage, stages + stage * grad_bytes, buffers + buffer * buffer_bytes, tile, offsets,
                     products, split, splits, sums);
    if (!has_next) break;
    deliver_copies(stream, params.in_channels_per_group, buffers + (buffer ^ 1) * buffer_bytes, pixels,
                   params.copy_bytes);
    tile = next;
    if (++stage == params.stages) stage = 0;
  }

  // The warps that hold the same products add up in ascending order.
  float* const exchange = reinterpret_cast<float*>(stages) + product_warp * kSums * 32 + lane;
  copy_async_wait<0>();
  for (int32_t from = 1; from < splits; ++from) {
    block_barrier();
    if (split == from) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) exchange[i * 32] = sums[i / 4 / kProducts][i / 4 % kProducts][i % 4];
    }
    block_barrier();
    if (split == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i / 4 / kProducts][i / 4 % kProducts][i % 4] += exchange[i * 32];
    }
  }
  if (split == 0) {
    const int64_t block = static_cast<int64_t>(block_index().x) * grid_extent().y + block_index().y;
    float* const partial = params.partial + (block * params.product_warps + product_warp) * (kSums * 32) + lane;
#pragma unroll
    for (int i = 0; i < kSums; ++i) partial[i * 32] = sums[i / 4 / kProducts][i / 4 % kProducts][i % 4];
  }
}

struct ReduceStorage {
  float sums[kReduceSlices][32];
};
static_assert(sizeof(ReduceStorage) <= shared_budget("first_layer::first_layer_weight_grad_reduce_kernel"));

// A block adds up 32 elements: each warp every eighth share, then the warps' sums in ascending order.
template <class T>
__global__ void first_layer_weight_grad_reduce_kernel(const __grid_constant__ WeightGradCall params) {
  ReduceStorage& storage = dynamic_shared<ReduceStorage>();
  const int32_t lane = static_cast<int32_t>(lane_index());
  const int32_t slice = static_cast<int32_t>(warp_index());
  const int64_t share = static_cast<int64_t>(params.product_blocks) * params.channel_blocks * params.product_warps *
                        kSums * 32;  // elements
  const float* const partial = params.partial + static_cast<int64_t>(block_index().x) * 32 + lane;
  float sum = 0;
#pragma unroll 4
  for (int32_t block = slice; block < params.blocks; block += kReduceSlices) sum += partial[block * share];
  storage.sums[slice][lane] = sum;
  block_barrier();
  if (slice != 0) return;
  for (int32_t i = 1; i < kReduceSlices; ++i) sum += storage.sums[i][lane];

  int32_t rest = static_cast<int32_t>(block_index().x);
  const int32_t of_lane = rest % kSums;
  rest /= kSums;
  const int32_t product_warp = rest % params.product_warps;
  rest /= params.product_warps;
  const int32_t product_block = rest % params.product_blocks;
  const int32_t channel =
      rest / params.product_blocks * kOutChannels + of_lane / 4 / kProducts * 16 + lane / 4 + of_lane % 4 / 2 * 8;
  const int32_t of_warp = of_lane / 4 % kProducts;
  const int32_t product = (product_block * params.product_warps + product_warp) * params.products_per_warp + of_warp;
  const int32_t column = lane % 4 * 2 + of_lane % 2;
  const int32_t tap_y = product / params.products_per_kernel_row;
  const int32_t tap_x =
      (product - tap_y * params.products_per_kernel_row) * params.taps_per_product + column / kMaxInChannels;
  const int32_t in_channel = column % kMaxInChannels;
  if (channel >= params.out_channels || of_warp >= params.products_per_warp || product >= params.products ||
      column / kMaxInChannels >= params.taps_per_product || tap_x >= params.column_window.kernel ||
      in_channel >= params.in_channels_per_group) {
    return;
  }
  T* const output = static_cast<T*>(params.output) + channel * params.output_strides.batch +
                    in_channel * params.output_strides.channel + tap_y * params.output_strides.row +
                    tap_x * params.output_strides.column;
  if (params.accumulate) sum += to_accumulator(*output);
  *output = from_accumulator<T>(sum);
}

template <class T>
std::string describe_typed(const DeviceTraits& traits, WeightGradCall& call) {
  call.channel_blocks = (call.out_channels + kOutChannels - 1) / kOutChannels;
  call.taps_per_product = sizeof(T) == 4 || call.column_window.dilation == 1 ? 2 : 1;
  const int32_t kernel_columns = static_cast<int32_t>(call.column_window.kernel);
  call.products_per_kernel_row = (kernel_columns + call.taps_per_product - 1) / call.taps_per_product;
  call.products = static_cast<int32_t>(call.row_window.kernel) * call.products_per_kernel_row;
  call.product_blocks = (call.products + kProducts * kWarps - 1) / (kProducts * kWarps);
  call.product_warps = 1;
  while (call.product_blocks * call.product_warps * kProducts < call.products) call.product_warps *= 2;
  const int32_t warps = call.product_blocks * call.product_warps;
  call.products_per_warp = (call.products + warps - 1) / warps;

  int64_t bytes = 0;
  struct Shape {
    int32_t tile_pixels;
    int32_t stages;
  };
  for (const Shape shape : {Shape{kTilePixels, 3}, Shape{kTilePixels, 2}, Shape{kTilePixels / 2, 2}}) {
    call.tile_pixels = shape.tile_pixels / (static_cast<int32_t>(sizeof(T)) / 2);
    call.stages = shape.stages;
    std::string refused = cut_tiles(call.row_window, call.column_window, call.grid, call.input_strides, call.batch,
                                    call.tile_pixels, call.tiles);
    if (!refused.empty()) return refused;
    call.columns_reciprocal = (65536 + call.tiles.columns - 1) / call.tiles.columns;
    call.grad_step_rows = kGradStep<T> / call.tiles.columns;
    call.grad_step_columns = kGradStep<T> % call.tiles.columns;
    const Strides4& strides = call.grad_output_strides;
    call.grad_step = call.grad_step_rows * strides.row + call.grad_step_columns * strides.column;
    call.grad_next_row = strides.row - call.tiles.columns * strides.column;
    call.copy_bytes = pixel_copy_bytes<T>(call.tiles);
    bytes = shared_bytes<T>(call);
    if (bytes <= std::min(traits.shared_memory_bytes, shared_budget("first_layer::first_layer_weight_grad_kernel"))) {
      const int32_t columns = call.product_blocks * call.channel_blocks;
      call.blocks = std::min(call.tiles.count, std::max(1, (traits.multiprocessors + columns - 1) / columns));
      return {};
    }
  }
  return "a tile takes " + std::to_string(bytes) + " bytes of shared memory, the device has " +
         std::to_string(traits.shared_memory_bytes);
}

std::string describe(const ConvWeightGradParams& params, const DeviceTraits& traits, WeightGradCall& call) {
  static_cast<ConvWeightGradParams&>(call) = params;
  return params.type == ElementType::kFloat32 ? describe_typed<float>(traits, call)
                                              : describe_typed<Half>(traits, call);
}

int64_t share_elements(const WeightGradCall& call) {
  return static_cast<int64_t>(call.product_blocks) * call.channel_blocks * call.product_warps * kSums * 32;
}

template <class T>
void launch_typed(const WeightGradCall& call, cudaStream_t stream) {
  const Dim3 block{static_cast<unsigned>(kThreads), 1u, 1u};
  launch(&first_layer_weight_grad_kernel<T>,
         Dim3{static_cast<unsigned>(call.blocks), static_cast<unsigned>(call.product_blocks * call.channel_blocks), 1u},
         block, static_cast<size_t>(shared_bytes<T>(call)), stream, call);
  launch(&first_layer_weight_grad_reduce_kernel<T>, Dim3{static_cast<unsigned>(share_elements(call) / 32), 1u, 1u},
         block, sizeof(ReduceStorage), stream, call);
}

}  // namespace

std::string refusal(const ConvWeightGradParams& params, const DeviceTraits& traits) {
  std::string refused =
      common_refusal(params.type, params.allow_tf32, params.out_channels != params.out_channels_per_group,
                     params.in_channels_per_group, params.row_window, params.column_window);
  if (!refused.empty()) return refused;
  if (params.out_channels > kOutChannels * 1024) return "there are too many output channels";
  refused = vector_refusal("grad_output", params.grad_output, params.grad_output_strides,
                           {params.batch, params.out_channels, params.grid.rows.out_bounds[params.grid.rows.patches],
                            params.grid.columns.out_bounds[params.grid.columns.patches]},
                           params.type == ElementType::kFloat32 ? 4 : 8, 16);
  if (!refused.empty()) return refused;
  WeightGradCall call{};
  return describe(params, traits, call);
}

int64_t workspace_bytes(const ConvWeightGradParams& params, const DeviceTraits& traits) {
  WeightGradCall call{};
  return describe(params, traits, call).empty()
             ? call.blocks * share_elements(call) * static_cast<int64_t>(sizeof(float))
             : 0;
}

void launch(const ConvWeightGradParams& params, const DeviceTraits& traits, void* workspace, cudaStream_t stream) {
  WeightGradCall call{};
  const std::string refused = describe(params, traits, call);
  if (!refused.empty()) throw std::runtime_error(std::string(params.kOperator) + ": " + refused);
  call.partial = static_cast<float*>(workspace);
  switch (params.type) {
    case ElementType::kFloat32:
      return launch_typed<float>(call, stream);
    case ElementType::kFloat16:
      return launch_typed<Half>(call, stream);
    default:
      return launch_typed<BFloat16>(call, stream);
  }
}

}  // namespace splitkern::kernels::first_layer
