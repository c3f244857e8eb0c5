// Tiles of the sm_80 kernels: how a block of 128 threads shares a matrix product, where operands lie in
// shared memory, and how a warp takes its fragments from there. Used by gather_kernel.h and weight_grad_kernel.h.
// Everything is counted in bytes of 16-byte vectors where it can be, so that 16-bit types and tf32 share the code.
#pragma once

#include "../primitives.h"

namespace splitkern::kernels::sm80 {

inline constexpr int32_t kThreads = 128;  // four warps, two by two
inline constexpr int32_t kVectorBytes = 16;
// Three stages of the largest tile are 48 KiB, so that two blocks share the 100 KiB of the smallest of these GPUs.
inline constexpr int32_t kStages = 3;
// A stage holds 64 bytes of the reduction per row or column of the tile: two products' worth.
inline constexpr int32_t kStageBytes = 64;
inline constexpr int32_t kSteps = 2;
inline constexpr int32_t kStageVectors = kStageBytes / kVectorBytes;

// The product of one block: kRows x kColumns, a quarter per warp.
template <class Element, int32_t kRowCount, int32_t kColumnCount>
struct Tile {
  using T = Element;
  static constexpr int32_t kRows = kRowCount;
  static constexpr int32_t kColumns = kColumnCount;
  static constexpr int32_t kWarpRows = kRows / 2;
  static constexpr int32_t kWarpColumns = kColumns / 2;
  static constexpr int32_t kRowBlocks = kWarpRows / 16;       // of a warp: blocks of one product
  static constexpr int32_t kColumnBlocks = kWarpColumns / 8;  // even, for they are loaded in pairs
  static constexpr int32_t kVectorElements = kVectorBytes / static_cast<int32_t>(sizeof(T));
  static constexpr int32_t kStageElements = kStageBytes / static_cast<int32_t>(sizeof(T));
  static constexpr bool kTf32 = sizeof(T) == 4;

  static_assert(kTf32 || sizeof(T) == 2);
  static_assert(kRows % 32 == 0 && kColumns % 32 == 0);
  static_assert(kRows <= kThreads, "one thread per row works out its pixel");
  static_assert(kRowBlocks * kColumnBlocks * 4 <= 128, "accumulators, of 255 registers");
};

// What a warp multiplies in one step: 32 bytes of the reduction.
template <class Tile>
struct Fragments {
  uint32_t a[Tile::kRowBlocks][4];
  uint32_t b[Tile::kColumnBlocks][2];
};

template <class Tile>
struct Accumulators {
  float values[Tile::kRowBlocks][Tile::kColumnBlocks][4];
};

template <class Tile>
SPLITKERN_DEVICE void clear(Accumulators<Tile>& sums) {
#pragma unroll
  for (int32_t i = 0; i < Tile::kRowBlocks; ++i) {
#pragma unroll
    for (int32_t j = 0; j < Tile::kColumnBlocks; ++j) {
#pragma unroll
      for (int32_t k = 0; k < 4; ++k) sums.values[i][j][k] = 0;
    }
  }
}

template <class Tile>
SPLITKERN_DEVICE void multiply(Accumulators<Tile>& sums, const Fragments<Tile>& fragments) {
#pragma unroll
  for (int32_t i = 0; i < Tile::kRowBlocks; ++i) {
#pragma unroll
    for (int32_t j = 0; j < Tile::kColumnBlocks; ++j) {
      if constexpr (Tile::kTf32) {
        mma_16x8x8_tf32(sums.values[i][j], fragments.a[i], fragments.b[j]);
      } else {
        mma_16x8x16<typename Tile::T>(sums.values[i][j], fragments.a[i], fragments.b[j]);
      }
    }
  }
}

// --- The main loop ----------------------------------------------------------------------------------

// Adds up `stages` > 0 stages. issue() starts the copies of the next stage, as long as there are any, and commits
// them as one group, also an empty one: the count of copy_async_wait then stays right to the end. load(fragments,
// stage, step) takes a warp's fragments from a stage of the ring. Ends with copies done but fragments possibly being
// read: a barrier before shared memory gets another use.
template <class Tile, class Issue, class Load>
SPLITKERN_DEVICE void multiply_stages(Accumulators<Tile>& sums, int32_t stages, Issue&& issue, Load&& load) {
#pragma unroll
  for (int32_t i = 0; i < kStages - 1; ++i) issue();
  copy_async_wait<kStages - 2>();
  block_barrier();
  int32_t read_stage = 0;
  if constexpr (Tile::kTf32) {
    // Rounding takes registers that loading fragments ahead would need.
    for (int32_t remaining = stages; remaining > 0; --remaining) {
      issue();  // into the stage that every warp has left before the last barrier
#pragma unroll
      for (int32_t step = 0; step < kSteps; ++step) {
        Fragments<Tile> fragments;
        load(fragments, read_stage, step);
        multiply(sums, fragments);
      }
      copy_async_wait<kStages - 2>();
      block_barrier();
      read_stage = read_stage + 1 == kStages ? 0 : read_stage + 1;
    }
  } else {
    Fragments<Tile> fragments[kSteps];
    load(fragments[0], read_stage, 0);
    for (int32_t remaining = stages; remaining > 0; --remaining) {
      load(fragments[1], read_stage, 1);
      issue();  // into the stage that every warp has left before the last barrier
      multiply(sums, fragments[0]);
      copy_async_wait<kStages - 2>();
      block_barrier();
      read_stage = read_stage + 1 == kStages ? 0 : read_stage + 1;
      // Behind the last stage this reads an old one, and nobody uses it: cheaper than a branch here.
      load(fragments[0], read_stage, 0);
      multiply(sums, fragments[1]);
    }
  }
}

// --- Operands whose reduction is contiguous: rows of kStageBytes ------------------------------------

// Byte offset of a vector. Two rows span the 32 banks, so a row pair's index picks the permutation: eight
// consecutive rows of one vector column, and eight consecutive vectors, touch every bank once.
SPLITKERN_DEVICE int32_t stage_offset(int32_t row, int32_t vector) {
  return row * kStageBytes + ((vector ^ ((row >> 1) & 3)) * kVectorBytes);
}

template <class Tile>
SPLITKERN_DEVICE uint32_t operand_bits(uint32_t bits) {
  if constexpr (Tile::kTf32) {
    return to_tf32(bits_float(bits));
  } else {
    return bits;
  }
}

// Fragments of one step from operand rows `a` (this warp's first row) and `b` (its first column). A tf32 fragment
// has the bytes of a 16-bit one: four of its elements are the eight of a matrix row.
template <class Tile>
SPLITKERN_DEVICE void load_fragments(Fragments<Tile>& fragments, const unsigned char* a, const unsigned char* b,
                                     int32_t step) {
  const int32_t lane = static_cast<int32_t>(lane_index());
  const unsigned char* a_row = a + stage_offset(lane & 15, step * 2 + (lane >> 4));
#pragma unroll
  for (int32_t i = 0; i < Tile::kRowBlocks; ++i) {
    load_matrix_x4(fragments.a[i], a_row + i * 16 * kStageBytes);
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) fragments.a[i][k] = operand_bits<Tile>(fragments.a[i][k]);
  }
  const unsigned char* b_row = b + stage_offset((lane & 7) + ((lane >> 4) << 3), step * 2 + ((lane >> 3) & 1));
#pragma unroll
  for (int32_t j = 0; j < Tile::kColumnBlocks; j += 2) {
    uint32_t pair[4];
    load_matrix_x4(pair, b_row + j * 8 * kStageBytes);
#pragma unroll
    for (int32_t k = 0; k < 4; ++k) fragments.b[j + k / 2][k % 2] = operand_bits<Tile>(pair[k]);
  }
}

}  // namespace splitkern::kernels::sm80
