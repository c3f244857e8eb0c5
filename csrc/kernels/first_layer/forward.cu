// Forward convolution of an input with at most four channels. A block computes 64 output channels of tiles of
// up to 256 outputs as one matrix product whose reduction runs over the window: four taps of four channels a step.
// Called through conv_paths.h. Inputs of any strides; outputs of any, 16 bytes at a time where they allow it.
#include "../budgets.h"
#include "conv.h"
#include "tile.h"

namespace splitkern::kernels::first_layer {
namespace {

constexpr int kRowTiles = 2;                     // products of 16 outputs that a warp has under way
constexpr int kChannelTiles = kOutChannels / 8;  // products of 8 channels
static_assert(kWarps * kRowTiles * 16 == kTilePixels);

struct ForwardCall : ConvForwardParams {
  Tiles tiles;
  int32_t tap_groups;  // of four taps
  bool vector_stores;
  int32_t channel_blocks;
};

// Followed in shared memory by two tiles of pixels and the weights.
struct Storage {
  int32_t tap_offsets[kMaxTaps];  // in pixels, from the first tap; negative: past the last tap
  float bias[kOutChannels];
};

// The weights that the lanes of a warp hold for one step and the channels of a product, two products in one
// 16-byte access where an element has 16 bits.
template <class T>
inline constexpr int kProductsPerVector = 16 / static_cast<int>(sizeof(Pixel<T>));

template <class T>
size_t shared_bytes(const Tiles& tiles, int32_t tap_groups) {
  const size_t pixels = static_cast<size_t>(tiles.in_rows) * tiles.pitch;
  return sizeof(Storage) + 2 * pixels * sizeof(Pixel<T>) + tap_groups * kOutChannels * 4 * sizeof(Pixel<T>);
}

// The channel behind column `column` of product `product`: chosen so that the columns that one thread holds of
// several products are neighbouring channels, 16 bytes of them in each store.
template <class T>
SPLITKERN_DEVICE int32_t channel_of(int32_t product, int32_t column) {
  constexpr int kProducts = 8 / static_cast<int>(sizeof(T));  // per 16-byte store
  return product / kProducts * (8 * kProducts) + column / 2 * (2 * kProducts) + product % kProducts * 2 + column % 2;
}

// d[16][8] += four taps of four channels; `low` and `high` belong to outputs lane / 4 and lane / 4 + 8.
template <class T>
SPLITKERN_DEVICE void multiply(float (&d)[4], const Pixel<T>& low, const Pixel<T>& high, const Pixel<T>& weight) {
  // The reduction may run in any order, so a thread's share of it is one whole tap, read in one access.
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
      const uint32_t a[4] = {low.words[half], high.words[half], low.words[half + 1], high.words[half + 1]};
      const uint32_t b[2] = {weight.words[half], weight.words[half + 1]};
      mma_16x8x8_tf32(d, a, b);
    }
  } else {
    const uint32_t a[4] = {low.words[0], high.words[0], low.words[1], high.words[1]};
    const uint32_t b[2] = {weight.words[0], weight.words[1]};
    mma_16x8x16<T>(d, a, b);
  }
}

template <class T>
SPLITKERN_DEVICE void load_weights(const ForwardCall& params, Pixel<T>* weights, int32_t first_channel) {
  const int32_t taps = static_cast<int32_t>(params.row_window.kernel * params.column_window.kernel);
  const int32_t kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  const int32_t padded_taps = params.tap_groups * 4;
  for (int32_t index = thread_index(); index < padded_taps * kOutChannels; index += kThreads) {
    // In the order of shared memory: tap group, vector of products, lane, product in the vector.
    int32_t rest = index;
    const int32_t in_vector = rest % kProductsPerVector<T>;
    rest /= kProductsPerVector<T>;
    const int32_t lane = rest % 32;
    rest /= 32;
    const int32_t product = rest % (kChannelTiles / kProductsPerVector<T>)*kProductsPerVector<T> + in_vector;
    const int32_t tap = rest / (kChannelTiles / kProductsPerVector<T>)*4 + lane % 4;
    const int32_t channel = first_channel + channel_of<T>(product, lane / 4);
    Pixel<T> pixel = zero_pixel<T>();
    if (tap < taps && channel < params.out_channels) {
      const int32_t tap_y = tap / kernel_columns;
      const T* from = static_cast<const T*>(params.weight) + channel * params.weight_strides.batch +
                      tap_y * params.weight_strides.row + (tap - tap_y * kernel_columns) * params.weight_strides.column;
      pixel = load_pixel(from, params.weight_strides.channel, params.in_channels_per_group);
    }
    weights[index] = pixel;
  }
}

template <class T>
SPLITKERN_DEVICE void store_staged(const StagedPixels<T>& staged, Pixel<T>* to, int32_t pixels) {
#pragma unroll
  for (int i = 0; i < kPixelsPerThread; ++i) {
    const int32_t index = static_cast<int32_t>(thread_index()) + i * kThreads;
    if (index < pixels) to[index] = staged.pixels[i];
  }
}

// One output of the tile, all its channels that this thread holds.
template <class T>
SPLITKERN_DEVICE void store_output(const ForwardCall& params, const float* bias, const float (&sums)[kChannelTiles][4],
                                   int half, T* output, int32_t first_channel) {
  constexpr int kProducts = 8 / static_cast<int>(sizeof(T));
  const int32_t column = static_cast<int32_t>(lane_index()) % 4 * 2;
#pragma unroll
  for (int product = 0; product < kChannelTiles; product += kProducts) {
    const int32_t channel = channel_of<T>(product, column);
    float values[2 * kProducts];
#pragma unroll
    for (int i = 0; i < 2 * kProducts; ++i) {
      values[i] = activate(sums[product + i / 2][half * 2 + i % 2] + bias[channel + i], params.relu);
    }
    if (params.vector_stores) {
      if (first_channel + channel >= params.out_channels) continue;
      Vector16 packed;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          packed.words[i] = float_bits(values[i]);
        } else {
          packed.words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
        }
      }
      store_global(output + channel, packed);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kProducts; ++i) {
        if (first_channel + channel + i < params.out_channels) {
          output[(channel + i) * params.output_strides.channel] = from_accumulator<T>(values[i]);
        }
      }
    }
  }
}

// Two blocks to a multiprocessor leave 128 registers to a thread, too few for fp32 pixels on sm_90a.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1)
    first_layer_forward_kernel(const __grid_constant__ ForwardCall params) {
  Storage& storage = dynamic_shared<Storage>();
  const Tiles& tiles = params.tiles;
  const int32_t pixels = tiles.in_rows * tiles.pitch;
  Pixel<T>* const staged_tiles = reinterpret_cast<Pixel<T>*>(&storage + 1);
  Pixel<T>* const weights = staged_tiles + 2 * pixels;
  const int32_t first_channel = static_cast<int32_t>(block_index().y) * kOutChannels;

  StagedPixels<T> staged;
  int32_t index = static_cast<int32_t>(block_index().x);
  Tile tile = tile_at(params, tiles, index);
  fetch(staged, params.input, params.input_strides, params.in_channels_per_group, tiles, tile);

  const int32_t taps = static_cast<int32_t>(params.row_window.kernel * params.column_window.kernel);
  for (int32_t tap = thread_index(); tap < params.tap_groups * 4; tap += kThreads) {
    const int32_t tap_y = tap / static_cast<int32_t>(params.column_window.kernel);
    const int32_t tap_x = tap - tap_y * static_cast<int32_t>(params.column_window.kernel);
    storage.tap_offsets[tap] = tap < taps ? tap_y * static_cast<int32_t>(params.row_window.dilation) * tiles.pitch +
                                                tap_x * static_cast<int32_t>(params.column_window.dilation)
                                          : -1;
  }
  for (int32_t channel = thread_index(); channel < kOutChannels; channel += kThreads) {
    const int32_t of_all = first_channel + channel;
    storage.bias[channel] = params.bias != nullptr && of_all < params.out_channels
                                ? to_accumulator(static_cast<const T*>(params.bias)[of_all * params.bias_stride])
                                : 0.0f;
  }
  load_weights<T>(params, weights, first_channel);

  // The outputs of this thread's products: rows lane / 4 and lane / 4 + 8 of each.
  const int32_t lane = static_cast<int32_t>(lane_index());
  int32_t row_of[2 * kRowTiles];
  int32_t column_of[2 * kRowTiles];
  int32_t first_input[2 * kRowTiles];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int32_t output = static_cast<int32_t>(warp_index()) * (16 * kRowTiles) + i * 8 + lane / 4;
    row_of[i] = output / tiles.columns;
    column_of[i] = output - row_of[i] * tiles.columns;
    // Places past the tile compute an output that exists, and do not store it.
    first_input[i] = row_of[i] < tiles.rows ? row_of[i] * static_cast<int32_t>(params.row_window.stride) * tiles.pitch +
                                                  column_of[i] * static_cast<int32_t>(params.column_window.stride)
                                            : 0;
  }

  store_staged(staged, staged_tiles, pixels);
  block_barrier();

  for (int32_t buffer = 0;; buffer ^= 1) {
    const int32_t next_index = index + static_cast<int32_t>(grid_extent().x);
    const bool has_next = next_index < tiles.count;
    Tile next = tile;
    if (has_next) {
      next = tile_at(params, tiles, next_index);
      fetch(staged, params.input, params.input_strides, params.in_channels_per_group, tiles, next);
    }

    const Pixel<T>* const inputs = staged_tiles + buffer * pixels;
    float sums[kRowTiles][kChannelTiles][4] = {};
#pragma unroll 1
    for (int32_t tap_group = 0; tap_group < params.tap_groups; ++tap_group) {
      const int32_t offset = storage.tap_offsets[tap_group * 4 + lane % 4];
      Pixel<T> a[2 * kRowTiles];
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        // The weights past the last tap are zero, but an infinity times zero would not be.
        a[i] = offset < 0 ? zero_pixel<T>() : inputs[first_input[i] + offset];
      }
      const Pixel<T>* const of_group = weights + (tap_group * kChannelTiles * 32 + lane * kProductsPerVector<T>);
#pragma unroll
      for (int product = 0; product < kChannelTiles; product += kProductsPerVector<T>) {
        struct alignas(16) {
          Pixel<T> of[kProductsPerVector<T>];
        } b;
        b = *reinterpret_cast<const decltype(b)*>(of_group + product * 32);
#pragma unroll
        for (int i = 0; i < kProductsPerVector<T>; ++i) {
#pragma unroll
          for (int row = 0; row < kRowTiles; ++row) {
            multiply<T>(sums[row][product + i], a[2 * row], a[2 * row + 1], b.of[i]);
          }
        }
      }
    }

    T* const output = static_cast<T*>(params.output) + tile.image * params.output_strides.batch +
                      tile.rows.out_begin * params.output_strides.row +
                      tile.columns.out_begin * params.output_strides.column +
                      first_channel * params.output_strides.channel;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      if (row_of[i] < tile.rows.out_count && column_of[i] < tile.columns.out_count) {
        store_output(params, storage.bias, sums[i / 2], i % 2,
                     output + row_of[i] * params.output_strides.row + column_of[i] * params.output_strides.column,
                     first_channel);
      }
    }
    if (!has_next) break;
    store_staged(staged, staged_tiles + (buffer ^ 1) * pixels, pixels);
    block_barrier();
    tile = next;
    index = next_index;
  }
}

std::string describe(const ConvForwardParams& params, const DeviceTraits& traits, ForwardCall& call) {
  static_cast<ConvForwardParams&>(call) = params;
  std::string refused =
      cut_tiles(params.row_window, params.column_window, params.grid, params.batch, kTilePixels, call.tiles);
  if (!refused.empty()) return refused;
  const bool wide = params.type == ElementType::kFloat32;
  call.tap_groups = static_cast<int32_t>((params.row_window.kernel * params.column_window.kernel + 3) / 4);
  call.channel_blocks = (params.out_channels + kOutChannels - 1) / kOutChannels;
  call.vector_stores =
      vector_refusal("output", params.output, params.output_strides,
                     {params.batch, params.out_channels, params.grid.rows.out_bounds[params.grid.rows.patches],
                      params.grid.columns.out_bounds[params.grid.columns.patches]},
                     wide ? 4 : 8, 16)
          .empty();
  const size_t bytes =
      wide ? shared_bytes<float>(call.tiles, call.tap_groups) : shared_bytes<Half>(call.tiles, call.tap_groups);
  const int64_t most_bytes =
      std::min(traits.shared_memory_bytes, shared_budget("first_layer::first_layer_forward_kernel"));
  if (static_cast<int64_t>(bytes) > most_bytes) {
    return "a tile takes " + std::to_string(bytes) + " bytes of shared memory, more than " + std::to_string(most_bytes);
  }
  return {};
}

template <class T>
void launch_typed(const ForwardCall& call, const DeviceTraits& traits, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>(call.tiles.count, 2 * traits.multiprocessors);
  launch(&first_layer_forward_kernel<T>,
         Dim3{static_cast<unsigned>(blocks), static_cast<unsigned>(call.channel_blocks), 1u},
         Dim3{static_cast<unsigned>(kThreads), 1u, 1u}, shared_bytes<T>(call.tiles, call.tap_groups), stream, call);
}

}  // namespace

std::string refusal(const ConvForwardParams& params, const DeviceTraits& traits) {
  std::string refused =
      common_refusal(params.type, params.allow_tf32, params.out_channels != params.out_channels_per_group,
                     params.in_channels_per_group, params.row_window, params.column_window);
  if (!refused.empty()) return refused;
  if (params.out_channels > kOutChannels * 65535) return "there are too many output channels";
  ForwardCall call{};
  return describe(params, traits, call);
}

int64_t workspace_bytes(const ConvForwardParams&, const DeviceTraits&) {
  return 0;
}

void launch(const ConvForwardParams& params, const DeviceTraits& traits, void*, cudaStream_t stream) {
  ForwardCall call{};
  const std::string refused = describe(params, traits, call);
  if (!refused.empty()) throw std::runtime_error(std::string(params.kOperator) + ": " + refused);
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
