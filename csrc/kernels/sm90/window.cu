// Convolution windows of stride 1 on Hopper. A block loads a box of the operand, with the border that the taps
// reach, once per 64 channels; tap (r, s) then reads the same shared memory r rows and s columns further on, since a
// product's columns may begin at any pixel. Only the weights, [64 or 128 channels x 64], stream through per tap.
// Products are computed for whole rows of the box: the last columns of a row mix two rows of pixels, and the store,
// whose map ends at the patch's border, drops them. Zeros beyond a patch come from the loads, whose maps end there.
// Where 64 channels go in and at most 64 come out, all taps' weights stay in shared memory, and the two warpgroups take
// boxes in turns: one multiplies while the other stores.
#include "window.h"

#include <algorithm>
#include <limits>

#include "../budgets.h"
#include "../dispatch.h"

namespace splitkern::kernels::sm90 {
namespace {

constexpr int32_t kMaxProblems = kMaxSubProblems;
constexpr int32_t kChannels = 64;  // of the reduction per step: 128 bytes
constexpr int32_t kPixelBytes = kChannels * 2;

template <bool kInputGrad>
struct WindowParams {
  static constexpr const char* kOperator = kInputGrad ? ConvInputGradParams::kOperator : ConvForwardParams::kOperator;
  TensorMap operand[kMaxProblems];
  TensorMap output[kMaxProblems];
  TensorMap weight;
  struct Problem {
    int32_t lower_column;
    int32_t lower_row;
    int32_t box_columns;
    int32_t box_bytes;
    int32_t group_rows;  // of output per multiplying warpgroup and tile
    int32_t row_tiles;   // per image
    int32_t tile_begin;  // of this problem among all pixel tiles
  } problems[kMaxProblems];
  int32_t problem_count;
  int32_t tiles;  // pixel tiles times channel tiles
  int32_t channel_tiles;
  int32_t channel_blocks;  // of the reduction
  int32_t tap_rows;
  int32_t tap_columns;
  int32_t first_tap;
  int32_t tap_row_step;  // in the weights, between neighbours of the walk
  int32_t tap_column_step;
  int32_t offset_row_step;  // in pixels of the operand
  int32_t offset_column_step;
  int32_t output_channels;
  int64_t bias_stride;
  const void* bias;
  bool relu;
};
static_assert(sizeof(WindowParams<false>) <= kMaxParamsBytes);

// kWide: both warpgroups multiply the same pixels, each with 64 of 128 output channels. Else both have the same 64
// output channels, and the second takes the rows below the first one's.
template <bool kWideValue, int kColumnsValue>
struct Tile {
  static constexpr bool kWide = kWideValue;
  static constexpr int kColumns = kColumnsValue;  // pixels of one product
  static constexpr int kWeightBlocks = kWide ? 2 : 1;
  static constexpr int kGroups = kWide ? 1 : 2;  // that stack their rows in a tile
  static constexpr int kStages = !kWide || kColumns <= 216 ? 5 : 4;
  // A wide tile stages its outputs beside the operand, a narrow one in the operand's place.
  static constexpr int kStagingBytes = kWide ? kColumns * kPixelBytes : 1024;
  static constexpr int kWeightBytes = kWeightBlocks * kChannels * kPixelBytes;
  static constexpr int kBoxPixels =
      (kSharedBytes - 1024 - kStages * kWeightBytes - 2 * kStagingBytes) / 2 / kPixelBytes / 8 * 8;
  static_assert(kColumns % 8 == 0 && kColumns <= 256);
  static_assert(kWide || kBoxPixels >= 2 * kColumns, "the outputs of both warpgroups take the operand's place");
};

template <class Tile>
struct Storage {
  alignas(1024) unsigned char boxes[2][Tile::kBoxPixels * kPixelBytes];
  alignas(1024) unsigned char staging[2][Tile::kStagingBytes];
  alignas(1024) unsigned char weights[Tile::kStages][Tile::kWeightBytes];
  Barrier box_full[2];
  Barrier box_empty[2];
  Barrier weight_full[Tile::kStages];
  Barrier weight_empty[Tile::kStages];
};

struct Place {
  int32_t problem;
  int32_t channel_tile;
  int32_t image;
  int32_t row;  // first output row of the tile
};

// Problems come in ascending order of tiles, so the search goes on from the last one.
template <int kGroups, class Params>
SPLITKERN_DEVICE Place place_of(const Params& params, int32_t tile, int32_t problem) {
  Place place;
  const int32_t pixels = tile / params.channel_tiles;
  place.channel_tile = tile - pixels * params.channel_tiles;
  while (problem + 1 < params.problem_count && params.problems[problem + 1].tile_begin <= pixels) ++problem;
  place.problem = problem;
  const auto& box = params.problems[problem];
  const int32_t local = pixels - box.tile_begin;
  place.image = local / box.row_tiles;
  place.row = (local - place.image * box.row_tiles) * box.group_rows * kGroups;
  return place;
}

template <class Tile, bool kInputGrad>
SPLITKERN_DEVICE void produce(const WindowParams<kInputGrad>& params, Storage<Tile>& shared) {
  Ring<2> boxes;
  Ring<Tile::kStages> weights;
  int32_t problem = 0;
  for (int32_t tile = static_cast<int32_t>(block_index().x); tile < params.tiles;
       tile += static_cast<int32_t>(grid_extent().x)) {
    const Place place = place_of<Tile::kGroups>(params, tile, problem);
    problem = place.problem;
    const auto& box = params.problems[problem];
    const int32_t first_channel = place.channel_tile * Tile::kWeightBlocks * kChannels;
    for (int32_t block = 0; block < params.channel_blocks; ++block) {
      barrier_wait(shared.box_empty[boxes.index], boxes.parity ^ 1);
      barrier_arrive_expect(shared.box_full[boxes.index], static_cast<uint32_t>(box.box_bytes));
      tma_load_4d(shared.boxes[boxes.index], params.operand[problem], shared.box_full[boxes.index], block * kChannels,
                  box.lower_column, box.lower_row + place.row, place.image);
      boxes.next();
      for (int32_t row = 0; row < params.tap_rows; ++row) {
        for (int32_t column = 0; column < params.tap_columns; ++column) {
          const int32_t tap = params.first_tap + row * params.tap_row_step + column * params.tap_column_step;
          Barrier& full = shared.weight_full[weights.index];
          barrier_wait(shared.weight_empty[weights.index], weights.parity ^ 1);
          barrier_arrive_expect(full, Tile::kWeightBytes);
          if constexpr (kInputGrad) {
            for (int32_t half = 0; half < Tile::kWeightBlocks; ++half) {
              tma_load_3d(shared.weights[weights.index] + half * kChannels * kPixelBytes, params.weight, full,
                          first_channel + half * kChannels, tap, block * kChannels);
            }
          } else {
            tma_load_3d(shared.weights[weights.index], params.weight, full, block * kChannels, tap, first_channel);
          }
          weights.next();
        }
      }
    }
  }
}

// Registers of pixel block `block` (8 pixels) of a warpgroup's product, as store_matrix takes them.
template <class T>
SPLITKERN_DEVICE void pack_block(const float* sums, float bias_low, float bias_high, bool relu, uint32_t& low,
                                 uint32_t& high) {
  float values[4] = {sums[0] + bias_low, sums[1] + bias_low, sums[2] + bias_high, sums[3] + bias_high};
  if (relu) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = values[i] <= 0.0f ? 0.0f : values[i];  // a NaN stays
  }
  low = pack2<T>(values[0], values[1]);
  high = pack2<T>(values[2], values[3]);
}

// A warpgroup's product, 64 channels from `first_channel` on, to [pixel][64 channels] with swizzled 16-byte chunks.
template <class T, int kColumns, class Params>
SPLITKERN_DEVICE void stage_outputs(const Params& params, const float (&sums)[kColumns / 2], int32_t first_channel,
                                    int32_t thread, unsigned char* staging) {
  const int32_t warp = thread / 32;
  const int32_t lane = thread % 32;
  float bias_low = 0;
  float bias_high = 0;
  if (params.bias != nullptr) {
    const int32_t channel = first_channel + 16 * warp + lane / 4;
    const T* bias = static_cast<const T*>(params.bias);
    if (channel < params.output_channels) bias_low = to_accumulator(bias[channel * params.bias_stride]);
    if (channel + 8 < params.output_channels) bias_high = to_accumulator(bias[(channel + 8) * params.bias_stride]);
  }
  // Matrix m of a store: channels 8 * (m % 2) of the warp's 16, pixels 8 * (m / 2).
  const int32_t chunk = 2 * warp + lane / 8 % 2;
#pragma unroll
  for (int block = 0; block < kColumns / 8; block += 2) {
    constexpr int kBlocks = kColumns / 8;
    const int second = block + 1 < kBlocks ? block + 1 : block;  // an odd last block is stored twice
    uint32_t registers[4];
    pack_block<T>(sums + 4 * block, bias_low, bias_high, params.relu, registers[0], registers[1]);
    pack_block<T>(sums + 4 * second, bias_low, bias_high, params.relu, registers[2], registers[3]);
    const int32_t pixel = 8 * (lane / 16 == 0 ? block : second) + lane % 8;
    store_matrix_x4_transposed(staging + pixel * kPixelBytes + (chunk ^ (pixel & 7)) * 16, registers);
  }
}

template <class T, class Tile, bool kInputGrad>
SPLITKERN_DEVICE void multiply(const WindowParams<kInputGrad>& params, Storage<Tile>& shared, int32_t group) {
  constexpr int32_t kColumns = Tile::kColumns;
  const int32_t thread = static_cast<int32_t>(thread_index()) % 128;
  const uint32_t own_barrier = 1 + static_cast<uint32_t>(group);
  constexpr uint32_t kBothBarrier = 3;

  Ring<2> boxes;
  Ring<Tile::kStages> weights;
  int32_t problem = 0;
  int32_t staged_box = -1;  // narrow: the box whose place the last tile's outputs leave from
  float sums[kColumns / 2];
  for (int32_t tile = static_cast<int32_t>(block_index().x); tile < params.tiles;
       tile += static_cast<int32_t>(grid_extent().x)) {
    const Place place = place_of<Tile::kGroups>(params, tile, problem);
    problem = place.problem;
    const auto& box = params.problems[problem];
    const int32_t group_pixels = Tile::kWide ? 0 : group * box.group_rows * box.box_columns;
    int32_t read_weights = -1;
    int32_t read_box = -1;
    bool first = true;
    for (int32_t block = 0; block < params.channel_blocks; ++block) {
      barrier_wait(shared.box_full[boxes.index], boxes.parity);
      const unsigned char* pixels = shared.boxes[boxes.index] + group_pixels * kPixelBytes;
      for (int32_t row = 0; row < params.tap_rows; ++row) {
        for (int32_t column = 0; column < params.tap_columns; ++column) {
          const int32_t shift = row * params.offset_row_step * box.box_columns + column * params.offset_column_step;
          barrier_wait(shared.weight_full[weights.index], weights.parity);
          const uint64_t a =
              matrix_descriptor(shared.weights[weights.index] + (Tile::kWide ? group * kChannels * kPixelBytes : 0),
                                Swizzle::k128Bytes, kChannels * kPixelBytes, 1024);
          const uint64_t b = matrix_descriptor(pixels + shift * kPixelBytes, Swizzle::k128Bytes, 16, 1024);
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < kChannels / 16; ++step) {
            wgmma<T, kColumns, kInputGrad, false>(sums, advance(a, (kInputGrad ? 2048 : 32) * step),
                                                  advance(b, 32 * step), !first || step != 0);
          }
          first = false;
          wgmma_commit();
          wgmma_wait<1>();  // the batch before has read what it reads
          if (thread == 0) {
            if (read_weights >= 0) barrier_arrive(shared.weight_empty[read_weights]);
            if (read_box >= 0) barrier_arrive(shared.box_empty[read_box]);
            if (staged_box >= 0) {
              tma_store_wait_read<0>();
              barrier_arrive(shared.box_empty[staged_box]);
            }
          }
          read_weights = weights.index;
          read_box = -1;
          staged_box = -1;
          weights.next();
        }
      }
      read_box = boxes.index;
      boxes.next();
    }
    wgmma_wait<0>();
    if (thread == 0) barrier_arrive(shared.weight_empty[read_weights]);

    unsigned char* staging;
    if constexpr (Tile::kWide) {
      if (thread == 0) {
        barrier_arrive(shared.box_empty[read_box]);
        tma_store_wait_read<0>();
      }
      staging = shared.staging[group];
      named_barrier(own_barrier, 128);
    } else {
      staging = shared.boxes[read_box] + group * kColumns * kPixelBytes;
      staged_box = read_box;
      named_barrier(kBothBarrier, 256);  // the other warpgroup read the same box
    }
    const int32_t first_channel =
        place.channel_tile * Tile::kWeightBlocks * kChannels + (Tile::kWide ? group * kChannels : 0);
    stage_outputs<T, kColumns>(params, sums, first_channel, thread, staging);
    fence_async_shared();
    named_barrier(own_barrier, 128);
    if (thread == 0) {
      tma_store_4d(params.output[problem], staging, first_channel, 0,
                   place.row + (Tile::kWide ? 0 : group * box.group_rows), place.image);
      tma_store_commit();
    }
  }
  if (thread == 0) tma_store_wait<0>();
}

template <class T, class Tile, bool kInputGrad>
__global__ void __launch_bounds__(kBlockThreads, 1)
    window_kernel(const __grid_constant__ WindowParams<kInputGrad> params) {
  Storage<Tile>& shared = dynamic_shared<Storage<Tile>>();
  if (thread_index() == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.box_full[i], 1);
      barrier_init(shared.box_empty[i], 2);
    }
    for (int i = 0; i < Tile::kStages; ++i) {
      barrier_init(shared.weight_full[i], 1);
      barrier_init(shared.weight_empty[i], 2);
    }
    barrier_init_fence();
  }
  block_barrier();
  const int32_t warpgroup = static_cast<int32_t>(warp_index()) / 4;
  if (warpgroup == 0) {
    release_registers<40>();
    if (thread_index() == 0) produce<Tile, kInputGrad>(params, shared);
  } else {
    claim_registers<232>();
    multiply<T, Tile, kInputGrad>(params, shared, warpgroup - 1);
  }
}

// --- Resident weights ---------------------------------------------------------------------------------------------

constexpr int32_t kResidentTaps = 9;
constexpr int32_t kResidentBoxes = 3;
constexpr int32_t kResidentBoxPixels = 400;

struct ResidentStorage {
  alignas(1024) unsigned char boxes[kResidentBoxes][kResidentBoxPixels * kPixelBytes];
  alignas(1024) unsigned char weights[kResidentTaps][kChannels * kPixelBytes];
  Barrier box_full[kResidentBoxes];
  Barrier box_empty[kResidentBoxes];
  Barrier weights_full;
};
static_assert(sizeof(ResidentStorage) <= shared_budget("sm90::resident_window_kernel"));

template <bool kInputGrad>
SPLITKERN_DEVICE void produce_resident(const WindowParams<kInputGrad>& params, ResidentStorage& shared) {
  const int32_t taps = params.tap_rows * params.tap_columns;
  barrier_arrive_expect(shared.weights_full, static_cast<uint32_t>(taps * kChannels * kPixelBytes));
  for (int32_t i = 0; i < taps; ++i) {
    const int32_t row = i / params.tap_columns;
    const int32_t tap =
        params.first_tap + row * params.tap_row_step + (i - row * params.tap_columns) * params.tap_column_step;
    tma_load_3d(shared.weights[i], params.weight, shared.weights_full, 0, tap, 0);
  }
  Ring<kResidentBoxes> ring;
  int32_t problem = 0;
  for (int32_t tile = static_cast<int32_t>(block_index().x); tile < params.tiles;
       tile += static_cast<int32_t>(grid_extent().x)) {
    const Place place = place_of<1>(params, tile, problem);
    problem = place.problem;
    const auto& box = params.problems[problem];
    barrier_wait(shared.box_empty[ring.index], ring.parity ^ 1);
    barrier_arrive_expect(shared.box_full[ring.index], static_cast<uint32_t>(box.box_bytes));
    tma_load_4d(shared.boxes[ring.index], params.operand[problem], shared.box_full[ring.index], 0, box.lower_column,
                box.lower_row + place.row, place.image);
    ring.next();
  }
}

// Warpgroup `group` takes every second box of the block. Outputs leave from their box, which goes back to the producer
// when the store has read it; that is asked for only after the next box's products are on their way.
template <class T, int kColumns, bool kInputGrad>
SPLITKERN_DEVICE void multiply_resident(const WindowParams<kInputGrad>& params, ResidentStorage& shared,
                                        int32_t group) {
  const int32_t thread = static_cast<int32_t>(thread_index()) % 128;
  const uint32_t own_barrier = 1 + static_cast<uint32_t>(group);
  const int32_t stride = static_cast<int32_t>(grid_extent().x);
  Ring<kResidentBoxes> ring;
  if (group == 1) ring.next();
  int32_t problem = 0;
  int32_t staged_box = -1;
  float sums[kColumns / 2];
  barrier_wait(shared.weights_full, 0);
  for (int32_t tile = static_cast<int32_t>(block_index().x) + group * stride; tile < params.tiles; tile += 2 * stride) {
    const Place place = place_of<1>(params, tile, problem);
    problem = place.problem;
    const auto& box = params.problems[problem];
    unsigned char* pixels = shared.boxes[ring.index];
    barrier_wait(shared.box_full[ring.index], ring.parity);
    int32_t tap = 0;
    for (int32_t row = 0; row < params.tap_rows; ++row) {
      for (int32_t column = 0; column < params.tap_columns; ++column) {
        const int32_t shift = row * params.offset_row_step * box.box_columns + column * params.offset_column_step;
        const uint64_t a = matrix_descriptor(shared.weights[tap], Swizzle::k128Bytes, kChannels * kPixelBytes, 1024);
        const uint64_t b = matrix_descriptor(pixels + shift * kPixelBytes, Swizzle::k128Bytes, 16, 1024);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kChannels / 16; ++step) {
          wgmma<T, kColumns, kInputGrad, false>(sums, advance(a, (kInputGrad ? 2048 : 32) * step),
                                                advance(b, 32 * step), tap != 0 || step != 0);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (staged_box >= 0 && thread == 0) {
          tma_store_wait_read<0>();
          barrier_arrive(shared.box_empty[staged_box]);
        }
        staged_box = -1;
        ++tap;
      }
    }
    wgmma_wait<0>();
    named_barrier(own_barrier, 128);  // every warp's products have read the box
    stage_outputs<T, kColumns>(params, sums, 0, thread, pixels);
    fence_async_shared();
    named_barrier(own_barrier, 128);
    if (thread == 0) {
      tma_store_4d(params.output[problem], pixels, 0, 0, place.row, place.image);
      tma_store_commit();
    }
    staged_box = static_cast<int32_t>(ring.index);
    ring.next();
    ring.next();
  }
  if (thread == 0) tma_store_wait<0>();
}

template <class T, int kColumns, bool kInputGrad>
__global__ void __launch_bounds__(kBlockThreads, 1)
    resident_window_kernel(const __grid_constant__ WindowParams<kInputGrad> params) {
  ResidentStorage& shared = dynamic_shared<ResidentStorage>();
  if (thread_index() == 0) {
    for (int i = 0; i < kResidentBoxes; ++i) {
      barrier_init(shared.box_full[i], 1);
      barrier_init(shared.box_empty[i], 1);
    }
    barrier_init(shared.weights_full, 1);
    barrier_init_fence();
  }
  block_barrier();
  const int32_t warpgroup = static_cast<int32_t>(warp_index()) / 4;
  if (warpgroup == 0) {
    release_registers<40>();
    if (thread_index() == 0) produce_resident(params, shared);
  } else {
    claim_registers<232>();
    multiply_resident<T, kColumns>(params, shared, warpgroup - 1);
  }
}

// --- Host ---------------------------------------------------------------------------------------------------------

// A strip of a problem's columns, and how its rows are cut.
struct Strip {
  int32_t problem;
  int32_t first_column;
  int32_t columns;
  int32_t box_columns;
  int32_t group_rows;
  int32_t row_tiles;
};

enum class Kind { kWide, kNarrow, kResident };

struct Plan {
  Kind kind = Kind::kWide;
  int32_t columns = 0;  // pixels of a product
  double cycles = 0;    // of a multiprocessor, predicted
  std::vector<Strip> strips;
};

int32_t box_capacity(Kind kind, int32_t columns) {
  if (kind == Kind::kResident) return kResidentBoxPixels;
  if (columns == 216) return kind == Kind::kWide ? Tile<true, 216>::kBoxPixels : Tile<false, 216>::kBoxPixels;
  return kind == Kind::kWide ? Tile<true, 232>::kBoxPixels : Tile<false, 232>::kBoxPixels;
}

int32_t tile_channels(Kind kind) {
  return kind == Kind::kWide ? 128 : 64;
}
// Rows of boxes that a tile stacks.
int32_t tile_groups(Kind kind) {
  return kind == Kind::kNarrow ? 2 : 1;
}

// Below, kNarrow and kResident took over three times what is predicted (14 columns of 64 to 64 channels, H200).
constexpr int32_t kMinNarrowBoxColumns = 24;

// How a problem's outputs are cut for products of `columns` pixels.
struct Cut {
  int32_t strips = 0;  // 0: they cannot be
  int32_t width;
  int32_t box_columns;
  int32_t group_rows;
  int32_t row_tiles;
};

// The cut into the fewest tiles, among those into the one with the smallest box.
Cut cut_of(int32_t out_rows, int32_t out_columns, int32_t border_rows, int32_t border_columns, Kind kind,
           int32_t columns) {
  const int32_t groups = tile_groups(kind);
  const int32_t capacity = box_capacity(kind, columns);
  Cut best{};
  int32_t best_box = 0;
  for (int32_t strips = 1; strips <= 8 && strips <= out_columns; ++strips) {
    const int32_t width = static_cast<int32_t>(ceil_divide(out_columns, strips));
    const int32_t box_columns = width + border_columns;
    if (box_columns > 256) continue;
    const auto fits = [&](int32_t rows) {
      const int32_t box_rows = groups * rows + border_rows;
      // The last product's last tap reads up to here, past the box's end where the product is not full.
      const int32_t reach = ((groups - 1) * rows + border_rows) * box_columns + border_columns + columns;
      return box_rows <= 256 && std::max(reach, box_rows * box_columns) <= capacity;
    };
    int32_t rows = std::min(columns / box_columns, static_cast<int32_t>(ceil_divide(out_rows, groups)));
    while (rows > 0 && !fits(rows)) --rows;
    if (rows == 0) continue;
    const int32_t row_tiles = static_cast<int32_t>(ceil_divide(out_rows, groups * rows));
    rows = static_cast<int32_t>(ceil_divide(out_rows, groups * row_tiles));  // as many tiles, of even heights
    const int32_t box = (groups * rows + border_rows) * box_columns;
    const int32_t tiles = strips * row_tiles;
    const int32_t best_tiles = best.strips * best.row_tiles;
    if (best.strips == 0 || tiles < best_tiles || (tiles == best_tiles && box < best_box)) {
      best = {strips, width, box_columns, rows, row_tiles};
      best_box = box;
    }
  }
  return best;
}

// Cuts every problem for products of `columns` pixels; no strips where one does not fit.
Plan plan_with(const GemmCall& call, const std::vector<GemmProblem>& problems, Kind kind, int32_t columns,
               int32_t multiprocessors) {
  Plan plan{kind, columns, 0, {}};
  const AxisWalk& row_taps = problems.front().rows;
  const AxisWalk& column_taps = problems.front().columns;
  const int32_t border_rows = static_cast<int32_t>((row_taps.taps - 1) * row_taps.offset_step);
  const int32_t border_columns = static_cast<int32_t>((column_taps.taps - 1) * column_taps.offset_step);
  int64_t tiles = 0;
  Cut cut{};
  int64_t cut_rows = -1;
  int64_t cut_columns = -1;
  for (size_t index = 0; index < problems.size(); ++index) {
    const int64_t out_rows = problems[index].rows.outputs;
    const int64_t out_columns = problems[index].columns.outputs;
    if (out_rows != cut_rows || out_columns != cut_columns) {  // neighbouring patches are mostly alike
      cut = cut_of(static_cast<int32_t>(out_rows), static_cast<int32_t>(out_columns), border_rows, border_columns, kind,
                   columns);
      cut_rows = out_rows;
      cut_columns = out_columns;
    }
    if (cut.strips == 0 || (kind != Kind::kWide && cut.box_columns < kMinNarrowBoxColumns)) return {};
    tiles += int64_t{cut.strips} * cut.row_tiles * call.images;
    for (int32_t strip = 0; strip < cut.strips; ++strip) {
      const int32_t first = strip * cut.width;
      const int32_t width = std::min(cut.width, static_cast<int32_t>(out_columns) - first);
      if (width <= 0) continue;
      plan.strips.push_back(
          {static_cast<int32_t>(index), first, width, cut.box_columns, cut.group_rows, cut.row_tiles});
    }
    if (static_cast<int64_t>(plan.strips.size()) > kMaxProblems) return {};
  }
  // Measured on an H200: products at 0.96 of the tensor cores' rate (half a cycle per column for 64 rows and 16 of the
  // reduction), and what a tile takes beside them; turns hide that.
  constexpr double kCyclesPerColumn = 0.52;
  constexpr double kCyclesPerTile = 2700;
  tiles *= ceil_divide(call.channels, tile_channels(kind));
  const double waves = static_cast<double>(ceil_divide(tiles, multiprocessors));
  const double products = static_cast<double>(problems.front().taps() *
                                              ceil_divide(call.reduction_channels, kChannels) * (kChannels / 16)) *
                          columns * kCyclesPerColumn;
  plan.cycles =
      kind == Kind::kResident ? waves * products + 2 * kCyclesPerTile : waves * (2 * products + kCyclesPerTile);
  return plan;
}

Plan plan_of(const GemmCall& call, const std::vector<GemmProblem>& problems, int32_t multiprocessors) {
  Plan best;
  if (problems.empty()) return best;
  for (const GemmProblem& problem : problems) {
    if (problem.rows.step != 1 || problem.columns.step != 1 || problem.rows.output_step != 1 ||
        problem.columns.output_step != 1 || problem.rows.taps == 0 || problem.columns.taps == 0) {
      return best;
    }
  }
  for (const Kind kind : {Kind::kWide, Kind::kNarrow, Kind::kResident}) {
    if (kind == Kind::kResident &&
        (call.channels > kChannels || call.reduction_channels > kChannels || problems.front().taps() > kResidentTaps)) {
      continue;
    }
    for (const int32_t columns : {216, 232}) {
      Plan plan = plan_with(call, problems, kind, columns, multiprocessors);
      if (!plan.strips.empty() && (best.strips.empty() || plan.cycles < best.cycles)) best = std::move(plan);
    }
  }
  return best;
}

template <class T, class Tile, bool kInputGrad>
void launch_tiles(const WindowParams<kInputGrad>& params, int32_t multiprocessors, cudaStream_t stream) {
  static_assert(sizeof(Storage<Tile>) <= shared_budget("sm90::window_kernel"));
  const unsigned blocks = static_cast<unsigned>(std::min(params.tiles, multiprocessors));
  kernels::launch(&window_kernel<T, Tile, kInputGrad>, Dim3{blocks, 1u, 1u}, Dim3{kBlockThreads, 1u, 1u},
                  sizeof(Storage<Tile>), stream, params);
}

template <class T, int kColumns, bool kInputGrad>
void launch_resident(const WindowParams<kInputGrad>& params, int32_t multiprocessors, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(std::min(params.tiles, multiprocessors));
  kernels::launch(&resident_window_kernel<T, kColumns, kInputGrad>, Dim3{blocks, 1u, 1u}, Dim3{kBlockThreads, 1u, 1u},
                  sizeof(ResidentStorage), stream, params);
}

template <class T, int kColumns, bool kInputGrad>
void launch_kind(Kind kind, const WindowParams<kInputGrad>& params, int32_t multiprocessors, cudaStream_t stream) {
  switch (kind) {
    case Kind::kWide:
      return launch_tiles<T, Tile<true, kColumns>, kInputGrad>(params, multiprocessors, stream);
    case Kind::kNarrow:
      return launch_tiles<T, Tile<false, kColumns>, kInputGrad>(params, multiprocessors, stream);
    case Kind::kResident:
      return launch_resident<T, kColumns, kInputGrad>(params, multiprocessors, stream);
  }
}

template <bool kInputGrad>
WindowParams<kInputGrad> describe(const Plan& plan, const GemmCall& call, const std::vector<GemmProblem>& problems) {
  const AxisWalk& row_taps = problems.front().rows;
  const AxisWalk& column_taps = problems.front().columns;
  WindowParams<kInputGrad> params{};
  params.tap_rows = static_cast<int32_t>(row_taps.taps);
  params.tap_columns = static_cast<int32_t>(column_taps.taps);
  params.first_tap = static_cast<int32_t>(row_taps.first_tap * call.kernel_columns + column_taps.first_tap);
  params.tap_row_step = static_cast<int32_t>(row_taps.tap_step * call.kernel_columns);
  params.tap_column_step = static_cast<int32_t>(column_taps.tap_step);
  params.offset_row_step = static_cast<int32_t>(row_taps.offset_step);
  params.offset_column_step = static_cast<int32_t>(column_taps.offset_step);
  params.channel_blocks = static_cast<int32_t>(ceil_divide(call.reduction_channels, kChannels));
  params.channel_tiles = static_cast<int32_t>(ceil_divide(call.channels, tile_channels(plan.kind)));
  params.output_channels = call.channels;
  params.bias = call.bias;
  params.bias_stride = call.bias_stride;
  params.relu = call.relu;
  params.weight = encode(weight_map(call, kInputGrad ? kChannels : tile_channels(plan.kind)), params.kOperator);
  const int32_t border_rows = (params.tap_rows - 1) * params.offset_row_step;
  const int32_t groups = tile_groups(plan.kind);
  int32_t pixel_tiles = 0;
  for (const Strip& strip : plan.strips) {
    const GemmProblem& problem = problems[strip.problem];
    const int32_t index = params.problem_count++;
    const int32_t box_rows = groups * strip.group_rows + border_rows;
    const void* operand =
        address_of(call.operand, call.operand_strides, problem.rows.operand_begin, problem.columns.operand_begin);
    const void* output = address_of(call.output, call.output_strides, problem.rows.output_begin,
                                    problem.columns.output_begin + strip.first_column);
    params.operand[index] =
        encode(box_map(call.type, operand, call.operand_strides, call.reduction_channels, call.images,
                       problem.rows.operand_extent, problem.columns.operand_extent, box_rows, strip.box_columns),
               params.kOperator);
    params.output[index] = encode(box_map(call.type, output, call.output_strides, call.channels, call.images,
                                          problem.rows.outputs, strip.columns, strip.group_rows, strip.box_columns),
                                  params.kOperator);
    auto& described = params.problems[index];
    described.lower_column = static_cast<int32_t>(problem.columns.lower) + strip.first_column;
    described.lower_row = static_cast<int32_t>(problem.rows.lower);
    described.box_columns = strip.box_columns;
    described.box_bytes = box_rows * strip.box_columns * kPixelBytes;
    described.group_rows = strip.group_rows;
    described.row_tiles = strip.row_tiles;
    described.tile_begin = pixel_tiles;
    pixel_tiles += strip.row_tiles * call.images;
  }
  params.tiles = pixel_tiles * params.channel_tiles;
  return params;
}

template <bool kInputGrad>
void launch_pass(const GemmCall& call, const std::vector<GemmProblem>& problems, int32_t multiprocessors,
                 cudaStream_t stream) {
  const Plan plan = plan_of(call, problems, multiprocessors);
  const char* operation = WindowParams<kInputGrad>::kOperator;
  if (plan.strips.empty()) throw std::runtime_error(std::string(operation) + ": the window kernel takes no such call");
  const WindowParams<kInputGrad> params = describe<kInputGrad>(plan, call, problems);
  dispatch_half_type(operation, call.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (plan.columns == 216) {
      launch_kind<T, 216>(plan.kind, params, multiprocessors, stream);
    } else {
      launch_kind<T, 232>(plan.kind, params, multiprocessors, stream);
    }
  });
}

}  // namespace

double window_cycles(const GemmCall& call, const std::vector<GemmProblem>& problems, int32_t multiprocessors) {
  const Plan plan = plan_of(call, problems, multiprocessors);
  if (plan.strips.empty() || call.taps == 1) return std::numeric_limits<double>::infinity();
  return predicted_cycles(call, problems, plan.cycles);
}

void launch_window(bool input_grad, const GemmCall& call, const std::vector<GemmProblem>& problems,
                   int32_t multiprocessors, cudaStream_t stream) {
  if (input_grad) {
    launch_pass<true>(call, problems, multiprocessors, stream);
  } else {
    launch_pass<false>(call, problems, multiprocessors, stream);
  }
}

}  // namespace splitkern::kernels::sm90
