// What the Hopper kernels' blocks have in common: three warpgroups, a ring of shared-memory stages between the one that
// loads and the two that multiply.
#pragma once

#include "../primitives.h"

namespace splitkern::kernels::sm90 {

inline constexpr int kReductionBlock = 64;  // channels of a stage: 128 bytes, the swizzle's span
inline constexpr int kMathWarpgroups = 2;
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kBlockThreads = (1 + kMathWarpgroups) * kWarpgroupThreads;
inline constexpr int kSharedBytes = 232448;  // that a block may have on compute capability 9.0

// Where a ring of stages stands; a wait for stage `index` takes `parity` (full) or its opposite (empty).
template <int kStages>
struct Ring {
  uint32_t index = 0;
  uint32_t parity = 0;
  SPLITKERN_DEVICE void next() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// Both barriers of every stage, and the block waits until all of it sees them. Called by the whole block.
template <class Shared, int kStages>
SPLITKERN_DEVICE void init_ring(Shared& shared) {
  if (thread_index() == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(shared.full[stage], 1);
      barrier_init(shared.empty[stage], kMathWarpgroups * kWarpgroupThreads / kWarpThreads);
    }
    barrier_init_fence();
  }
  block_barrier();
}

}  // namespace splitkern::kernels::sm90
