// Threads, barriers, shuffles and shared memory of host execution, by kernels written as kernels are.
#include <cmath>
#include <numeric>

#include "check.h"
#include "kernels/primitives.h"

using namespace splitkern::kernels;

namespace {

struct Params {
  static constexpr const char* kOperator = "check";
  int32_t* output;
  const int32_t* input;
  int32_t number;
};

// --- Indices --------------------------------------------------------------------------------------

__global__ void indices_kernel(const __grid_constant__ Params params) {
  const Dim3 block = block_index();
  const Dim3 grid = grid_extent();
  const uint32_t linear = (block.z * grid.y + block.y) * grid.x + block.x;
  int32_t* mine = params.output + (linear * block_threads() + thread_index()) * 3;
  mine[0] += 1;
  mine[1] = static_cast<int32_t>(warp_index() * 100 + lane_index());
  mine[2] = static_cast<int32_t>(global_thread_index());
}

CHECK_NAMED(indices, "every thread of a 3-D grid runs once and knows where it is") {
  std::vector<int32_t> output(2 * 3 * 4 * 70 * 3);
  launch(&indices_kernel, Dim3{2, 3, 4}, Dim3{70, 1, 1}, 0, nullptr, Params{output.data(), nullptr, 0});
  for (int block = 0; block < 24; ++block) {
    for (int thread = 0; thread < 70; ++thread) {
      const int32_t* mine = output.data() + (block * 70 + thread) * 3;
      check::equal(mine[0], 1, "runs");
      check::equal(mine[1], thread / 32 * 100 + thread % 32, "warp and lane");
      check::equal(mine[2], block % 2 * 70 + thread, "global index");
    }
  }
}

// --- Barriers -------------------------------------------------------------------------------------

struct Shared {
  int32_t values[128];
  int32_t sums[4];
};

template <bool kBarrier>
__global__ void neighbours_kernel(const __grid_constant__ Params params) {
  Shared& shared = dynamic_shared<Shared>();
  const uint32_t thread = thread_index();
  for (int32_t round = 0; round < 3; ++round) {
    shared.values[thread] = params.input[thread] + round;
    block_barrier();
    params.output[round * 128 + thread] = shared.values[(thread + 37) % 128];
    if constexpr (kBarrier) block_barrier();  // else the next round overwrites what others have yet to read
  }
}

template <bool kBarrier>
bool neighbours() {
  std::vector<int32_t> input(128);
  std::vector<int32_t> output(3 * 128);
  std::iota(input.begin(), input.end(), 1000);
  launch(&neighbours_kernel<kBarrier>, Dim3{2}, Dim3{128}, sizeof(Shared), nullptr,
         Params{output.data(), input.data(), 0});
  for (int i = 0; i < 3 * 128; ++i) {
    if (output[i] != 1000 + (i % 128 + 37) % 128 + i / 128) return false;
  }
  return true;
}

CHECK_NAMED(barrier, "a block barrier orders shared memory") {
  check::in_every_schedule([] { check::require(neighbours<true>(), "a value of a neighbour"); }, 16);
}
CHECK_NAMED(missing_barrier, "a missing second barrier is noticed") {
  check::require(check::noticed_in_some_schedule(&neighbours<false>), "not noticed");
}

__global__ void poison_kernel(const __grid_constant__ Params params) {
  const Shared& shared = dynamic_shared<Shared>();
  params.output[block_index().x * 128 + thread_index()] = shared.values[thread_index()];
  block_barrier();
  dynamic_shared<Shared>().values[thread_index()] = 7;
}
CHECK_NAMED(poison, "shared memory is poisoned for every block") {
  std::vector<int32_t> output(2 * 128);
  launch(&poison_kernel, Dim3{2}, Dim3{128}, sizeof(Shared), nullptr, Params{output.data(), nullptr, 0});
  for (const int32_t value : output) check::equal(value, -1, "unwritten shared memory");
  check::refuses([&] { launch(&poison_kernel, Dim3{2}, Dim3{128}, 64, nullptr, Params{output.data(), nullptr, 0}); },
                 {"check: block (", "dynamic_shared", "needs 528 bytes", "asked for 64"});
}

__global__ void overflow_kernel(const __grid_constant__ Params params) {
  int32_t* values = dynamic_shared<Shared>().values;
  if (thread_index() == 7) values[params.number] = 5;
}
CHECK_NAMED(overflow, "a write past the end of shared memory is noticed") {
  check::refuses(
      [] { launch(&overflow_kernel, Dim3{1}, Dim3{32}, sizeof(Shared), nullptr, Params{nullptr, nullptr, 132}); },
      {"check: block (0, 0, 0) wrote past the end of its 528 bytes"});
}

// Half of the threads leave early: block_barrier is then for the others.
__global__ void leavers_kernel(const __grid_constant__ Params params) {
  if (warp_index() < 2) return;
  Shared& shared = dynamic_shared<Shared>();
  shared.values[thread_index()] = static_cast<int32_t>(thread_index());
  block_barrier();
  params.output[thread_index()] = shared.values[64 + (thread_index() + 1) % 64];
}
CHECK_NAMED(leavers, "block_barrier does without threads that have left") {
  check::in_every_schedule([] {
    std::vector<int32_t> output(128);
    launch(&leavers_kernel, Dim3{1}, Dim3{128}, sizeof(Shared), nullptr, Params{output.data(), nullptr, 0});
    for (int i = 64; i < 128; ++i) check::equal(output[i], 64 + (i + 1) % 64, "neighbour");
  });
}

// Warps 0 and 1 hand values to warps 2 and 3 and back, each pair meeting at its own barriers.
__global__ void named_kernel(const __grid_constant__ Params params) {
  Shared& shared = dynamic_shared<Shared>();
  const uint32_t pair = warp_index() % 2;
  const bool giver = warp_index() < 2;
  for (int32_t round = 0; round < 4; ++round) {
    if (giver) shared.values[thread_index()] = round * 1000 + static_cast<int32_t>(thread_index());
    named_barrier(1 + pair, 64);
    if (!giver) params.output[round * 64 + thread_index() - 64] = shared.values[thread_index() - 64];
    named_barrier(3 + pair, 64);
  }
}
CHECK_NAMED(named, "named barriers join warps in pairs") {
  check::in_every_schedule([] {
    std::vector<int32_t> output(4 * 64);
    launch(&named_kernel, Dim3{1}, Dim3{128}, sizeof(Shared), nullptr, Params{output.data(), nullptr, 0});
    for (int i = 0; i < 256; ++i) check::equal(output[i], i / 64 * 1000 + i % 64, "value");
  });
}

// --- Warps ----------------------------------------------------------------------------------------

__global__ void warp_sum_kernel(const __grid_constant__ Params params) {
  int32_t value = params.input[thread_index()];
  for (uint32_t mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  const int64_t first = shuffle(static_cast<int64_t>(value) << 40 | thread_index(), 3);
  const uint32_t odd = ballot(params.input[thread_index()] % 3 == 0);
  params.output[thread_index() * 3] = static_cast<int32_t>(first >> 40);
  params.output[thread_index() * 3 + 1] = static_cast<int32_t>(first & 0xff);
  params.output[thread_index() * 3 + 2] = static_cast<int32_t>(count_bits(odd & ((1u << lane_index()) - 1)));
}
CHECK_NAMED(warps, "shuffles and ballots without shared memory") {
  check::in_every_schedule([] {
    std::vector<int32_t> input(64);
    std::vector<int32_t> output(64 * 3);
    std::iota(input.begin(), input.end(), 5);
    launch(&warp_sum_kernel, Dim3{1}, Dim3{64}, 0, nullptr, Params{output.data(), input.data(), 0});
    for (int i = 0; i < 64; ++i) {
      const int first = i / 32 * 32;
      int32_t sum = 0;
      int32_t before = 0;
      for (int j = first; j < first + 32; ++j) {
        sum += input[j];
        before += j < i && input[j] % 3 == 0;
      }
      check::equal(output[i * 3], sum, "sum of the warp");
      check::equal(output[i * 3 + 1], first + 3, "lane of the shuffle");
      check::equal(output[i * 3 + 2], before, "ballot");
    }
  });
}

// --- Misuse ---------------------------------------------------------------------------------------

__global__ void deadlock_kernel(const __grid_constant__ Params params) {
  if (warp_index() == static_cast<uint32_t>(params.number)) {
    named_barrier(2, 96);
  } else if (lane_index() == 5) {
    warp_barrier();
  } else {
    named_barrier(3, 64);
  }
}
CHECK_NAMED(deadlock, "a deadlock reports every waiter") {
  check::refuses(
      [] { launch(&deadlock_kernel, Dim3{1}, Dim3{96}, 0, nullptr, Params{nullptr, nullptr, 1}); },
      {"check: deadlock", "block (0, 0, 0)", "threads 0 to 4 wait for named_barrier (62 of 64 threads have come)",
       "threads 5 to 5 wait for warp_barrier (1 of 32", "threads 6 to 31",
       "threads 32 to 63 wait for named_barrier (32 of 96"});
  std::vector<int32_t> output(2 * 128);  // and the next launch is not disturbed
  launch(&poison_kernel, Dim3{2}, Dim3{128}, sizeof(Shared), nullptr, Params{output.data(), nullptr, 0});
}

__global__ void divergent_kernel(const __grid_constant__ Params) {
  if (lane_index() < 16) {
    static_cast<void>(ballot(true));
  } else {
    warp_barrier();
  }
}
CHECK_NAMED(divergent, "lanes in different collectives are refused") {
  check::refuses([] { launch(&divergent_kernel, Dim3{1}, Dim3{32}, 0, nullptr, Params{}); },
                 {"check: block (0, 0, 0) thread ", "where others wait in"});
}

__global__ void misaligned_kernel(const __grid_constant__ Params params) {
  store_global<Vector16>(params.output + 1, load_global<Vector16>(params.output));
}
CHECK_NAMED(misaligned, "vector accesses check alignment") {
  alignas(16) int32_t values[8] = {};
  check::refuses([&] { launch(&misaligned_kernel, Dim3{1}, Dim3{1}, 0, nullptr, Params{values, nullptr, 0}); },
                 {"thread 0: store_global of 16 bytes"});
}

CHECK_NAMED(extents, "impossible launches are refused") {
  const auto with = [](Dim3 grid, Dim3 block) {
    return [=] { launch(&misaligned_kernel, grid, block, 0, nullptr, Params{}); };
  };
  check::refuses(with(Dim3{0}, Dim3{32}), {"check: host execution: a grid"});
  check::refuses(with(Dim3{1, 70000}, Dim3{32}), {"check: host execution: a grid"});
  check::refuses(with(Dim3{1}, Dim3{1025}), {"check: host execution: a block"});
  check::refuses(with(Dim3{1}, Dim3{32, 2}), {"check: host execution: a block"});
}

// --- Elements -------------------------------------------------------------------------------------

CHECK_NAMED(tf32, "to_tf32 rounds to nearest, ties away from zero") {
  const auto rounded = [](float value) { return bits_float(to_tf32(value)); };
  check::equal(rounded(1.0f + 0x1p-11f), 1.0f + 0x1p-10f, "a tie");
  check::equal(rounded(-1.0f - 0x1p-11f), -1.0f - 0x1p-10f, "a negative tie");
  check::equal(rounded(1.0f + 0x1p-12f), 1.0f, "below a tie");
  check::equal(rounded(1.0f + 0x1.8p-11f), 1.0f + 0x1p-10f, "above a tie");
  check::equal(rounded(kInfinity), kInfinity, "infinity");
  check::require(is_nan(rounded(std::nanf(""))), "NaN");
}
CHECK_NAMED(packs, "pack2 puts the first value low") {
  check::equal(pack2<BFloat16>(1.0f, -2.0f), 0xc0003f80u, "bfloat16");
  check::equal(pack2<Half>(1.0f, -2.0f), 0xc0003c00u, "half");
}

}  // namespace
