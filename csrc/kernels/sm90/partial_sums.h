// How the weight gradients of this folder share their reduction among blocks, and the kernel that adds the blocks'
// partial sums. The products' tiles times their chunks of pixels are one row of items, tile after tile; block b takes
// items [b * items / blocks, (b + 1) * items / blocks), so a block may end one tile and begin the next, and all are
// equally busy. What it summed of tile t goes to slot b + t, which no other pair has.
#pragma once

#include <cstdint>

#include "../params.h"
#include "../primitives.h"

namespace splitkern::kernels::sm90 {

inline constexpr int32_t kUnitChannels = 64;  // a unit: one tap of 64 input channels, 64 columns of the product

struct PartialSums {
  int32_t units;  // taps of every 64 input channels, the taps fastest
  int32_t taps;
  int32_t row_tiles;  // tiles are numbered by unit, then by output channel, which is the faster
  int32_t tile_rows;  // output channels
  int32_t tile_units;
  int32_t chunks;
  int32_t blocks;
  int32_t tiles;
  const float* values;  // [slot][tile_rows][64 * tile_units]
};

struct Share {
  int64_t begin;
  int64_t end;
};
SPLITKERN_DEVICE Share share_of(int64_t block, int64_t blocks, int64_t items) {
  return {block * items / blocks, (block + 1) * items / blocks};
}

// The number of blocks for so many tiles and chunks: all multiprocessors, but where a multiple of the tiles keeps
// nearly all of them busy that multiple, for then the blocks of different tiles read the same pixels at the same time;
// and fewer where a share would be too short to be worth its partial sum.
int32_t reduction_blocks(int64_t tiles, int64_t chunks, int32_t multiprocessors);

// Adds the slots of every tile in ascending order and writes (or accumulates) params.output.
void launch_reduce(const ConvWeightGradParams& params, const PartialSums& partial_sums, cudaStream_t stream);

}  // namespace splitkern::kernels::sm90
