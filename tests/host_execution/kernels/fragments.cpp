// Asynchronous copies, matrix fragments and warp products of host execution against plain loops.
#include <cmath>

#include "check.h"
#include "kernels/primitives.h"

using namespace splitkern::kernels;

namespace {

// --- Asynchronous copies --------------------------------------------------------------------------

struct CopyParams {
  static constexpr const char* kOperator = "check";
  const uint32_t* input;
  uint32_t* output;
};
struct CopyShared {
  alignas(16) uint32_t stages[2][32][4];
};

// Two groups under way; `kPending` of them may still be when the first is read.
template <int kPending, bool kBarrier>
__global__ void copy_kernel(const __grid_constant__ CopyParams params) {
  CopyShared& shared = dynamic_shared<CopyShared>();
  const uint32_t lane = lane_index();
  for (uint32_t stage = 0; stage < 2; ++stage) {
    copy_async<16>(shared.stages[stage][lane], params.input + (stage * 32 + lane) * 4, lane % 5 != 3);
    copy_async_commit();
  }
  copy_async_wait<kPending>();
  if constexpr (kBarrier) warp_barrier();
  for (uint32_t i = 0; i < 4; ++i) params.output[lane * 4 + i] = shared.stages[0][(lane + 1) % 32][i];
  copy_async_wait<0>();
}

template <int kPending, bool kBarrier>
bool copies() {
  alignas(16) static uint32_t input[2 * 32 * 4];
  for (uint32_t i = 0; i < 256; ++i) input[i] = 77 + i;
  std::vector<uint32_t> output(128);
  launch(&copy_kernel<kPending, kBarrier>, Dim3{1}, Dim3{32}, sizeof(CopyShared), nullptr,
         CopyParams{input, output.data()});
  for (uint32_t i = 0; i < 128; ++i) {
    const uint32_t source = (i / 4 + 1) % 32;
    if (output[i] != (source % 5 == 3 ? 0 : input[source * 4 + i % 4])) return false;
  }
  return true;
}

CHECK_NAMED(copy, "asynchronous copies arrive at the wait, and fill zeros") {
  check::in_every_schedule([] { check::require(copies<1, true>(), "what was copied"); });
}
CHECK_NAMED(copy_wait, "a wait for too few groups is noticed") {
  check::require(check::noticed_in_some_schedule(&copies<2, true>, 1), "not noticed");
}
CHECK_NAMED(copy_barrier, "reading another thread's copy without a barrier is noticed") {
  check::require(check::noticed_in_some_schedule(&copies<1, false>), "not noticed");
}

// --- Fragments ------------------------------------------------------------------------------------

struct MatrixParams {
  static constexpr const char* kOperator = "check";
  bool transposed;
  uint32_t* registers;  // [lane][4]
};
struct MatrixShared {
  alignas(16) uint16_t rows[32][8];
};

__global__ void load_kernel(const __grid_constant__ MatrixParams params) {
  MatrixShared& shared = dynamic_shared<MatrixShared>();
  const uint32_t lane = lane_index();
  for (uint32_t i = 0; i < 8; ++i) shared.rows[lane][i] = static_cast<uint16_t>(lane * 8 + i);
  warp_barrier();
  uint32_t registers[4];
  if (params.transposed) {
    load_matrix_x4_transposed(registers, shared.rows[lane]);
  } else {
    load_matrix_x4(registers, shared.rows[lane]);
  }
  for (uint32_t i = 0; i < 4; ++i) params.registers[lane * 4 + i] = registers[i];
}
CHECK_NAMED(load, "load_matrix_x4 distributes rows, and columns when transposed") {
  for (const bool transposed : {false, true}) {
    std::vector<uint32_t> registers(128);
    launch(&load_kernel, Dim3{1}, Dim3{32}, sizeof(MatrixShared), nullptr, MatrixParams{transposed, registers.data()});
    for (uint32_t lane = 0; lane < 32; ++lane) {
      for (uint32_t matrix = 0; matrix < 4; ++matrix) {
        const uint32_t row = lane / 4;
        const uint32_t column = 2 * (lane % 4);
        const auto element = [&](uint32_t y, uint32_t x) { return (matrix * 8 + y) * 8 + x; };
        const uint32_t low = transposed ? element(column, row) : element(row, column);
        const uint32_t high = transposed ? element(column + 1, row) : element(row, column + 1);
        check::equal(registers[lane * 4 + matrix], low | high << 16, "a register");
      }
    }
  }
}

// What store_matrix_x4 wrote, load_matrix_x4 reads back.
__global__ void store_kernel(const __grid_constant__ MatrixParams params) {
  MatrixShared& shared = dynamic_shared<MatrixShared>();
  const uint32_t lane = lane_index();
  uint32_t registers[4];
  for (uint32_t i = 0; i < 4; ++i) registers[i] = lane * 64 + i;
  if (params.transposed) {
    store_matrix_x4_transposed(shared.rows[lane], registers);
  } else {
    store_matrix_x4(shared.rows[lane], registers);
  }
  warp_barrier();
  if (params.transposed) {
    load_matrix_x4_transposed(registers, shared.rows[lane]);
  } else {
    load_matrix_x4(registers, shared.rows[lane]);
  }
  for (uint32_t i = 0; i < 4; ++i) params.registers[lane * 4 + i] = registers[i];
}
CHECK_NAMED(store, "store_matrix_x4 mirrors load_matrix_x4") {
  for (const bool transposed : {false, true}) {
    std::vector<uint32_t> registers(128);
    launch(&store_kernel, Dim3{1}, Dim3{32}, sizeof(MatrixShared), nullptr, MatrixParams{transposed, registers.data()});
    for (uint32_t i = 0; i < 128; ++i) check::equal(registers[i], i / 4 * 64 + i % 4, "a register");
  }
}

// --- Products -------------------------------------------------------------------------------------

struct MmaParams {
  static constexpr const char* kOperator = "check";
  const float* a;  // [16][reduction]
  const float* b;  // [reduction][8]
  float* d;        // [16][8]
};

template <class T>
__global__ void mma_kernel(const __grid_constant__ MmaParams params) {
  const uint32_t group = lane_index() / 4;
  const uint32_t pair = 2 * (lane_index() % 4);
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
  for (uint32_t i = 0; i < 4; ++i) {
    const float* element = params.a + (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
    a[i] = pack2<T>(element[0], element[1]);
    d[i] = params.d[(group + i / 2 * 8) * 8 + pair + i % 2];
  }
  for (uint32_t i = 0; i < 2; ++i) {
    const float* element = params.b + (pair + i * 8) * 8 + group;
    b[i] = pack2<T>(element[0], element[8]);
  }
  mma_16x8x16<T>(d, a, b);
  for (uint32_t i = 0; i < 4; ++i) params.d[(group + i / 2 * 8) * 8 + pair + i % 2] = d[i];
}
__global__ void mma_tf32_kernel(const __grid_constant__ MmaParams params) {
  const uint32_t group = lane_index() / 4;
  const uint32_t thread = lane_index() % 4;
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
  for (uint32_t i = 0; i < 4; ++i) {
    // Bits below tf32's precision are not read.
    a[i] = to_tf32(params.a[(group + i % 2 * 8) * 8 + thread + i / 2 * 4]) | 0x1234u;
    d[i] = params.d[(group + i / 2 * 8) * 8 + 2 * thread + i % 2];
  }
  for (uint32_t i = 0; i < 2; ++i) b[i] = to_tf32(params.b[(thread + i * 4) * 8 + group]);
  mma_16x8x8_tf32(d, a, b);
  for (uint32_t i = 0; i < 4; ++i) params.d[(group + i / 2 * 8) * 8 + 2 * thread + i % 2] = d[i];
}

void product(uint32_t reduction, void (*kernel)(MmaParams)) {
  std::vector<float> a(16 * reduction);
  std::vector<float> b(reduction * 8);
  std::vector<float> d(128);
  std::vector<float> expected(128);
  for (uint32_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * 37 % 61) - 30;
  for (uint32_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * 23 % 41) - 20;
  for (uint32_t i = 0; i < 128; ++i) expected[i] = d[i] = static_cast<float>(i);
  for (uint32_t row = 0; row < 16; ++row) {
    for (uint32_t column = 0; column < 8; ++column) {
      for (uint32_t k = 0; k < reduction; ++k) {
        expected[row * 8 + column] += a[row * reduction + k] * b[k * 8 + column];
      }
    }
  }
  launch(kernel, Dim3{1}, Dim3{32}, 0, nullptr, MmaParams{a.data(), b.data(), d.data()});
  for (uint32_t i = 0; i < 128; ++i) check::equal(d[i], expected[i], "a sum");
}

CHECK_NAMED(mma_half, "mma_16x8x16 of halves") {
  product(16, &mma_kernel<Half>);
}
CHECK_NAMED(mma_bfloat16, "mma_16x8x16 of bfloat16") {
  product(16, &mma_kernel<BFloat16>);
}
CHECK_NAMED(mma_tf32, "mma_16x8x8 of tf32") {
  product(8, &mma_tf32_kernel);
}

}  // namespace
