// Forward convolution of an input with at most four channels. A block computes 64 output channels of tiles of
// up to 256 outputs as one matrix product whose reduction runs over the window: four taps of four channels a step.
// Called through conv_paths.h. Inputs of any strides; outputs of any, 16 bytes at a time where they allow it.
#include "../budgets.h"
#include "conv.h"
#include "tile.h"

namespace splitkern::kernels::first_layer {
namespace {

constexpr int kChannelTiles = kOutChannels / 16;  // products along output channels
constexpr int kPixelTiles = 4;                    // products along outputs that a warp has under way
static_assert(kWarps * kPixelTiles * 8 == kTilePixels);
// Two blocks hide each other's stores and barriers. fp32's staged pixels and the stores of single elements take too
// many registers for that.
template <class T, bool kVectorStores>
inline constexpr int kBlocksPerMultiprocessor = sizeof(T) == 2 && kVectorStores ? 2 : 1;

constexpr int kSlots = 2;           // inputs that a thread has under way
constexpr int kGroupsPerFetch = 4;  // tap groups that are computed while they are

struct ForwardCall : ConvForwardParams {
  Tiles tiles;
  int32_t tap_groups;  // of four taps
  bool vector_stores;
  int32_t channel_blocks;
};

// An output of a tile.
struct alignas(16) Place {
  int64_t offset;  // in elements, from the tile's first output
  int32_t row;
  int32_t column;
};

// Followed in shared memory by two tiles of pixels and the weights.
struct Storage {
  Place places[kTilePixels];
  int32_t tap_offsets[kMaxTaps];  // in pixels, from the first tap; negative: past the last tap
};
static_assert(sizeof(Storage) % 16 == 0);

// One product of 16-bit elements reduces four taps of four channels, one of tf32 elements half their channels.
template <class T>
inline constexpr int kHalves = static_cast<int>(sizeof(T)) / 2;

template <class T>
size_t shared_bytes(const Tiles& tiles, int32_t tap_groups) {
  const size_t pixels = static_cast<size_t>(tiles.in_rows) * tiles.pitch;
  return sizeof(Storage) + 2 * pixels * sizeof(Pixel<T>) + tap_groups * kOutChannels * 4 * sizeof(Pixel<T>);
}

// The channel behind row `row` of products `tile`: chosen so that what one thread holds of an output, over all
// products, is 16 bytes of neighbouring channels (twice for fp32), and 128 bytes over the eight threads that hold it.
template <class T>
SPLITKERN_DEVICE int32_t channel_of(int32_t tile, int32_t row) {
  if constexpr (sizeof(T) == 4) {
    return tile / 2 * 32 + row % 8 * 4 + tile % 2 * 2 + row / 8;
  } else {
    return row % 8 * 8 + tile * 2 + row / 8;
  }
}

// In shared memory as the lanes of a warp hold them: [tap group][channel tile][half][lane]. The reduction may run in
// any order, so a lane's share of it is one whole tap: its pixels are then read in one access.
template <class T>
SPLITKERN_DEVICE void load_weights(const ForwardCall& params, Vector16* weights, int32_t first_channel) {
  const int32_t taps = static_cast<int32_t>(params.row_window.kernel * params.column_window.kernel);
  const int32_t kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  for (int32_t index = thread_index(); index < params.tap_groups * kChannelTiles * 32; index += kThreads) {
    const int32_t lane = index % 32;
    const int32_t tile = index / 32 % kChannelTiles;
    const int32_t tap = index / 32 / kChannelTiles * 4 + lane % 4;
    const int32_t tap_y = tap / kernel_columns;
    Pixel<T> pixels[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t channel = first_channel + channel_of<T>(tile, lane / 4 + i * 8);
      pixels[i] = zero_pixel<T>();
      if (tap < taps && channel < params.out_channels) {
        const T* from = static_cast<const T*>(params.weight) + channel * params.weight_strides.batch +
                        tap_y * params.weight_strides.row +
                        (tap - tap_y * kernel_columns) * params.weight_strides.column;
        pixels[i] = load_pixel(from, params.weight_strides.channel, params.in_channels_per_group);
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves<T>; ++half) {
      weights[(index / 32 * kHalves<T> + half) * 32 + lane] = {{pixels[0].words[half * 2], pixels[1].words[half * 2],
                                                                pixels[0].words[half * 2 + 1],
                                                                pixels[1].words[half * 2 + 1]}};
    }
  }
}

// The channels of an output that a thread holds, 16 bytes of them in each part.
template <class T>
inline constexpr int kPartChannels = 16 / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kParts = 2 * kChannelTiles / kPartChannels<T>;

template <class T, bool kVectorStores>
SPLITKERN_DEVICE void store_output(const ForwardCall& params, const float (&sums)[kChannelTiles][kPixelTiles][4],
                                   int pixel_tile, int odd, T* output, int32_t channels) {
#pragma unroll
  for (int part = 0; part < kParts<T>; ++part) {
    const int32_t channel = channel_of<T>(part * kChannelTiles / kParts<T>, static_cast<int32_t>(lane_index()) / 4);
    float values[kPartChannels<T>];
#pragma unroll
    for (int i = 0; i < kPartChannels<T>; ++i) {
      const int of_all = part * kPartChannels<T> + i;
      values[i] = sums[of_all / 2][pixel_tile][of_all % 2 * 2 + odd];
    }
    if (params.relu) {
#pragma unroll
      for (int i = 0; i < kPartChannels<T>; ++i) values[i] = activate(values[i], true);
    }
    if constexpr (kVectorStores) {
      Vector16 packed;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          packed.words[i] = float_bits(values[i]);
        } else {
          packed.words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
        }
      }
      if (channel < channels) store_global(output + channel, packed);
    } else {
#pragma unroll
      for (int i = 0; i < kPartChannels<T>; ++i) {
        if (channel + i < channels) {
          output[(channel + i) * params.output_strides.channel] = from_accumulator<T>(values[i]);
        }
      }
    }
  }
}

// Where the outputs of a tile go, all that is kept of it while the next one is fetched.
struct Target {
  int64_t offset;  // of the first output
  int32_t rows;
  int32_t columns;
};

SPLITKERN_DEVICE Target target_of(const ForwardCall& params, const Tile& tile, int32_t first_channel) {
  const int64_t offset = tile.image * params.output_strides.batch + tile.rows.out_begin * params.output_strides.row +
                         tile.columns.out_begin * params.output_strides.column +
                         first_channel * params.output_strides.channel;
  // From a lane's hand, or the compiler would rather compute it again for every store.
  return {shuffle(offset, 0), tile.rows.out_count, tile.columns.out_count};
}

template <class T, bool kVectorStores>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T, kVectorStores>)
    first_layer_forward_kernel(const __grid_constant__ ForwardCall params) {
  Storage& storage = dynamic_shared<Storage>();
  const Tiles& tiles = params.tiles;
  const int32_t pixels = tiles.in_rows * tiles.pitch;
  // Sizes of pixels are even, so the weights are aligned to 16 bytes.
  Pixel<T>* const staged_tiles = reinterpret_cast<Pixel<T>*>(&storage + 1);
  Vector16* const weights = reinterpret_cast<Vector16*>(staged_tiles + 2 * pixels);
  const int32_t first_channel = static_cast<int32_t>(block_index().y) * kOutChannels;
  const int32_t lane = static_cast<int32_t>(lane_index());
  const int32_t first_output = static_cast<int32_t>(warp_index()) * (8 * kPixelTiles);

  PixelStream<T, kSlots> stream;
  const int32_t fetches = (pixels + kSlots * kThreads - 1) / (kSlots * kThreads);
  TileIndex index = tile_index(tiles, static_cast<int32_t>(block_index().x));
  const TileIndex step = tile_index(tiles, static_cast<int32_t>(grid_extent().x));
  Tile tile = tile_at(params, tiles, index);
  begin(stream, params.input, params.input_strides, tiles, tile);
  fetch(stream, params.input, params.input_strides, params.in_channels_per_group, tiles, tile);
  Target target = target_of(params, tile, first_channel);

  const int32_t kernel_columns = static_cast<int32_t>(params.column_window.kernel);
  const int32_t taps = static_cast<int32_t>(params.row_window.kernel) * kernel_columns;
  for (int32_t tap = thread_index(); tap < params.tap_groups * 4; tap += kThreads) {
    const int32_t tap_y = tap / kernel_columns;
    storage.tap_offsets[tap] =
        tap < taps ? tap_y * static_cast<int32_t>(params.row_window.dilation) * tiles.pitch +
                         (tap - tap_y * kernel_columns) * static_cast<int32_t>(params.column_window.dilation)
                   : -1;
  }
  for (int32_t output = thread_index(); output < kTilePixels; output += kThreads) {
    const int32_t row = output / tiles.columns;
    const int32_t column = output - row * tiles.columns;
    storage.places[output] = {row * params.output_strides.row + column * params.output_strides.column, row, column};
  }
  load_weights<T>(params, weights, first_channel);
  float bias[2 * kChannelTiles] = {};
  if (params.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 2 * kChannelTiles; ++i) {
      const int32_t channel = first_channel + channel_of<T>(i / 2, lane / 4 + i % 2 * 8);
      if (channel < params.out_channels) {
        bias[i] = to_accumulator(static_cast<const T*>(params.bias)[channel * params.bias_stride]);
      }
    }
  }

  // Where the windows of this thread's columns of the products begin.
  int32_t first_input[kPixelTiles];
#pragma unroll
  for (int i = 0; i < kPixelTiles; ++i) {
    const int32_t output = first_output + i * 8 + lane / 4;
    const int32_t row = output / tiles.columns;
    // Places past the tile compute an output that exists, and do not store it.
    first_input[i] = row < tiles.rows
                         ? row * static_cast<int32_t>(params.row_window.stride) * tiles.pitch +
                               (output - row * tiles.columns) * static_cast<int32_t>(params.column_window.stride)
                         : 0;
  }

  const auto deliver_to = [&](Pixel<T>* to) {
    deliver(stream, params.in_channels_per_group, pixels, [&](int32_t at, const Pixel<T>& pixel) { to[at] = pixel; });
  };
  deliver_to(staged_tiles);
  for (int32_t fetched = 1; fetched < fetches; ++fetched) {
    fetch(stream, params.input, params.input_strides, params.in_channels_per_group, tiles, tile);
    deliver_to(staged_tiles);
  }
  block_barrier();

  for (int32_t buffer = 0;; buffer ^= 1) {
    advance(tiles, index, step);
    const bool has_next = index.image < params.batch;
    Target next = target;
    if (has_next) {
      tile = tile_at(params, tiles, index);
      begin(stream, params.input, params.input_strides, tiles, tile);
      fetch(stream, params.input, params.input_strides, params.in_channels_per_group, tiles, tile);
      next = target_of(params, tile, first_channel);
    }

    int32_t fetched = has_next ? 1 : fetches;
    const Pixel<T>* const inputs = staged_tiles + buffer * pixels;
    Pixel<T>* const next_inputs = staged_tiles + (buffer ^ 1) * pixels;
    float sums[kChannelTiles][kPixelTiles][4];
#pragma unroll
    for (int i = 0; i < kChannelTiles * kPixelTiles * 4; ++i) {
      const int channel_tile = i / (kPixelTiles * 4);
      sums[channel_tile][i / 4 % kPixelTiles][i % 4] = bias[channel_tile * 2 + i % 4 / 2];
    }
#pragma unroll 1
    for (int32_t tap_group = 0; tap_group < params.tap_groups; ++tap_group) {
      const int32_t offset = storage.tap_offsets[tap_group * 4 + lane % 4];
      Pixel<T> b[kPixelTiles];
#pragma unroll
      for (int i = 0; i < kPixelTiles; ++i) {
        // The weights past the last tap are zero, but an infinity times zero would not be.
        b[i] = offset < 0 ? zero_pixel<T>() : inputs[first_input[i] + offset];
      }
      const Vector16* const of_group = weights + tap_group * (kChannelTiles * kHalves<T> * 32) + lane;
#pragma unroll
      for (int m = 0; m < kChannelTiles; ++m) {
#pragma unroll
        for (int half = 0; half < kHalves<T>; ++half) {
          const Vector16 a = of_group[(m * kHalves<T> + half) * 32];
#pragma unroll
          for (int i = 0; i < kPixelTiles; ++i) {
            const uint32_t column[2] = {b[i].words[half * 2], b[i].words[half * 2 + 1]};
            if constexpr (sizeof(T) == 4) {
              mma_16x8x8_tf32(sums[m][i], a.words, column);
            } else {
              mma_16x8x16<T>(sums[m][i], a.words, column);
            }
          }
        }
      }
      if (tap_group % kGroupsPerFetch == kGroupsPerFetch - 1 && fetched < fetches) {
        deliver_to(next_inputs);
        fetch(stream, params.input, params.input_strides, params.in_channels_per_group, tiles, tile);
        ++fetched;
      }
    }

    T* const output = static_cast<T*>(params.output) + target.offset;
#pragma unroll
    for (int i = 0; i < 2 * kPixelTiles; ++i) {
      const Place place = storage.places[first_output + i / 2 * 8 + lane % 4 * 2 + i % 2];
      if (place.row < target.rows && place.column < target.columns) {
        store_output<T, kVectorStores>(params, sums, i / 2, i % 2, output + place.offset,
                                       params.out_channels - first_channel);
      }
    }
    if (!has_next) break;
    deliver_to(next_inputs);
    for (; fetched < fetches; ++fetched) {
      fetch(stream, params.input, params.input_strides, params.in_channels_per_group, tiles, tile);
      deliver_to(next_inputs);
    }
    block_barrier();
    target = next;
  }
}

std::string describe(const ConvForwardParams& params, const DeviceTraits& traits, ForwardCall& call) {
  static_cast<ConvForwardParams&>(call) = params;
  std::string refused = cut_tiles(params.row_window, params.column_window, params.grid, params.input_strides,
                                  params.batch, kTilePixels, call.tiles);
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

template <class T, bool kVectorStores>
void launch_stores(const ForwardCall& call, const DeviceTraits& traits, cudaStream_t stream) {
  const int64_t blocks =
      std::min<int64_t>(call.tiles.count, kBlocksPerMultiprocessor<T, kVectorStores> * traits.multiprocessors);
  launch(&first_layer_forward_kernel<T, kVectorStores>,
         Dim3{static_cast<unsigned>(blocks), static_cast<unsigned>(call.channel_blocks), 1u},
         Dim3{static_cast<unsigned>(kThreads), 1u, 1u}, shared_bytes<T>(call.tiles, call.tap_groups), stream, call);
}

template <class T>
void launch_typed(const ForwardCall& call, const DeviceTraits& traits, cudaStream_t stream) {
  if (call.vector_stores) {
    launch_stores<T, true>(call, traits, stream);
  } else {
    launch_stores<T, false>(call, traits, stream);
  }
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
