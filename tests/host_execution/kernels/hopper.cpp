// Hopper's primitives in host execution against plain loops: barriers, tensor maps, warpgroup products, and that
// leaving out what orders them is noticed.
#include <cmath>
#include <cstring>

#include "check.h"
#include "kernels/primitives.h"

using namespace splitkern::kernels;

namespace {

// --- Barriers -------------------------------------------------------------------------------------

struct RingParams {
  static constexpr const char* kOperator = "check";
  int32_t* output;
  uint32_t rounds;
};
struct RingShared {
  int32_t values[2][32];
  Barrier full[2];
  Barrier empty[2];
};
enum class RingBug { kNone, kParity, kEarlyRelease, kNoEmptyWait };

// Warp 0 fills two stages in turn, warp 1 empties them.
template <RingBug kBug>
__global__ void ring_kernel(const __grid_constant__ RingParams params) {
  RingShared& shared = dynamic_shared<RingShared>();
  if (thread_index() == 0) {
    for (uint32_t stage = 0; stage < 2; ++stage) {
      barrier_init(shared.full[stage], 32);
      barrier_init(shared.empty[stage], 32);
    }
    barrier_init_fence();
  }
  block_barrier();
  for (uint32_t round = 0; round < params.rounds; ++round) {
    const uint32_t stage = round % 2;
    const uint32_t parity = round / 2 % 2;
    if (warp_index() == 0) {
      if (kBug != RingBug::kNoEmptyWait) barrier_wait(shared.empty[stage], parity ^ (kBug != RingBug::kParity));
      shared.values[stage][lane_index()] = static_cast<int32_t>(round * 100 + lane_index());
      barrier_arrive(shared.full[stage]);
    } else {
      barrier_wait(shared.full[stage], parity);
      if (kBug == RingBug::kEarlyRelease) barrier_arrive(shared.empty[stage]);
      params.output[round * 32 + lane_index()] = shared.values[stage][31 - lane_index()];
      if (kBug != RingBug::kEarlyRelease) barrier_arrive(shared.empty[stage]);
    }
  }
}
template <RingBug kBug>
bool ring() {
  std::vector<int32_t> output(8 * 32);
  launch(&ring_kernel<kBug>, Dim3{1}, Dim3{64}, sizeof(RingShared), nullptr, RingParams{output.data(), 8});
  for (int32_t i = 0; i < 8 * 32; ++i) {
    if (output[i] != i / 32 * 100 + 31 - i % 32) return false;
  }
  return true;
}
CHECK_NAMED(barriers, "a ring of stages between two warps") {
  check::in_every_schedule([] { check::require(ring<RingBug::kNone>(), "a value"); }, 16);
}
CHECK_NAMED(early_release, "a stage released before it is read is noticed") {
  check::require(check::noticed_in_some_schedule(&ring<RingBug::kEarlyRelease>), "not noticed");
}
CHECK_NAMED(no_empty_wait, "a stage filled before it is released is noticed") {
  check::require(check::noticed_in_some_schedule(&ring<RingBug::kNoEmptyWait>), "not noticed");
}
CHECK_NAMED(wrong_parity, "a wrong phase bit deadlocks, with the state of the barrier in the report") {
  check::refuses(&ring<RingBug::kParity>,
                 {"check: deadlock",
                  "threads 0 to 31 wait for barrier_wait of parity 0 at byte 272 of shared memory "
                  "(phase 0: 0 of 32 arrivals, 0 bytes to come)"});
}

// --- Loads ----------------------------------------------------------------------------------------

// Values that bfloat16 holds exactly, different for neighbours.
uint16_t value_at(int64_t index) {
  return to_bits(from_accumulator<BFloat16>(static_cast<float>((index * 29 + 3) % 251) - 125));
}

struct View {  // NHWC with margins
  int32_t channels = 24, columns = 5, rows = 4, images = 3;
  int32_t column_stride = 32, row_stride = 32 * 7, image_stride = 32 * 7 * 6;
  std::vector<uint16_t> storage;
  uint16_t* base;

  View() : storage(static_cast<size_t>(image_stride) * images + 64) {
    for (size_t i = 0; i < storage.size(); ++i) storage[i] = value_at(static_cast<int64_t>(i));
    base = storage.data() + (16 - reinterpret_cast<uintptr_t>(storage.data()) % 16) / 2 % 8 + 32;
  }
  uint16_t at(int64_t image, int64_t row, int64_t column, int64_t channel) const {
    const bool inside = image >= 0 && image < images && row >= 0 && row < rows && column >= 0 && column < columns &&
                        channel >= 0 && channel < channels;
    return inside ? base[image * image_stride + row * row_stride + column * column_stride + channel] : uint16_t{0};
  }
  Im2colMap map() const {
    Im2colMap map{};
    map.type = ElementType::kBFloat16;
    map.base = base;
    map.channels = channels, map.columns = columns, map.rows = rows, map.images = images;
    map.column_stride_bytes = column_stride * 2;
    map.row_stride_bytes = row_stride * 2;
    map.image_stride_bytes = image_stride * 2;
    map.column_step = map.row_step = 1;
    map.box_channels = 64;
    map.box_pixels = 48;
    map.swizzle = Swizzle::k128Bytes;
    return map;
  }
};

struct LoadParams {
  static constexpr const char* kOperator = "check";
  TensorMap map;
  int32_t channel, column, row, image;
  uint16_t column_offset, row_offset;
  uint32_t pixels;
  bool init_fence;
  bool wait;
  uint32_t expect_bytes;
  uint16_t* output;  // [pixels][64], unswizzled
};
struct LoadShared {
  alignas(1024) unsigned char tile[64 * 128];
  Barrier full;
};

__global__ void load_kernel(const __grid_constant__ LoadParams params) {
  LoadShared& shared = dynamic_shared<LoadShared>();
  if (thread_index() == 0) {
    barrier_init(shared.full, 1);
    if (params.init_fence) barrier_init_fence();
  }
  block_barrier();
  if (thread_index() == 0) {
    barrier_arrive_expect(shared.full, params.expect_bytes);
    tma_load_im2col(shared.tile, params.map, shared.full, params.channel, params.column, params.row, params.image,
                    params.column_offset, params.row_offset);
  }
  if (params.wait) barrier_wait(shared.full, 0);
  for (uint32_t pixel = thread_index(); pixel < params.pixels; pixel += block_threads()) {
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      const unsigned char* source = shared.tile + pixel * 128 + ((chunk ^ (pixel % 8)) << 4);
      for (uint32_t i = 0; i < 8; ++i) {
        params.output[pixel * 64 + chunk * 8 + i] = reinterpret_cast<const uint16_t*>(source)[i];
      }
    }
  }
  if (!params.wait) barrier_wait(shared.full, 0);
}
LoadParams load_params(const View& view, const Im2colMap& map, uint16_t* output) {
  static_cast<void>(view);
  return {encode(map, "check"),
          8,
          0,
          0,
          0,
          0,
          0,
          static_cast<uint32_t>(map.box_pixels),
          true,
          true,
          static_cast<uint32_t>(map.box_pixels) * 128,
          output};
}
void run_load(const LoadParams& params) {
  launch(&load_kernel, Dim3{1}, Dim3{32}, sizeof(LoadShared), nullptr, params);
}

CHECK_NAMED(im2col, "im2col loads walk columns, rows and images, with steps, offsets, crops and zeros outside") {
  const View view;
  for (const int32_t step : {1, 2}) {
    for (const int32_t lower : {-2, 0, 1}) {
      for (const uint16_t offset : {0, 1, 3}) {
        Im2colMap map = view.map();
        map.column_step = step, map.row_step = 3 - step;
        map.lower_column = lower, map.lower_row = -lower;
        map.upper_column = 1, map.upper_row = -1;
        std::vector<uint16_t> output(48 * 64);
        LoadParams params = load_params(view, map, output.data());
        params.column = lower + 2 * step;
        params.row = -lower;
        params.image = 1;
        params.column_offset = offset;
        params.row_offset = 2;
        run_load(params);
        int64_t column = params.column;
        int64_t row = params.row;
        int64_t image = 1;
        for (int32_t pixel = 0; pixel < 48; ++pixel) {
          for (int32_t channel = 0; channel < 64; ++channel) {
            check::equal(output[pixel * 64 + channel], view.at(image, row + 2, column + offset, 8 + channel),
                         "pixel " + std::to_string(pixel) + " channel " + std::to_string(channel));
          }
          if ((column += step) <= view.columns - 1 + 1) continue;
          column = lower;
          if ((row += 3 - step) <= view.rows - 2) continue;
          row = -lower;
          ++image;
        }
      }
    }
  }
}
CHECK_NAMED(no_barrier_wait, "reading a tile before its barrier is noticed") {
  const View view;
  std::vector<uint16_t> output(48 * 64);
  LoadParams params = load_params(view, view.map(), output.data());
  params.wait = false;
  check::require(check::noticed_in_some_schedule([&] {
                   run_load(params);
                   return output[0] == view.at(0, 0, 0, 8);
                 }),
                 "not noticed");
}
CHECK_NAMED(no_init_fence, "a load on a barrier without barrier_init_fence is refused") {
  const View view;
  std::vector<uint16_t> output(48 * 64);
  LoadParams params = load_params(view, view.map(), output.data());
  params.init_fence = false;
  check::refuses([&] { run_load(params); }, {"TMA load: barrier_init of its barrier was not followed"});
}
CHECK_NAMED(wrong_bytes, "announcing other bytes than the box has is noticed") {
  const View view;
  std::vector<uint16_t> output(48 * 64);
  LoadParams params = load_params(view, view.map(), output.data());
  params.expect_bytes += 128;
  check::refuses([&] { run_load(params); }, {"check: deadlock", "1 of 1 arrivals, 128 bytes to come"});
}
CHECK_NAMED(off_the_walk, "a base pixel outside the bounding box is refused") {
  const View view;
  std::vector<uint16_t> output(48 * 64);
  LoadParams params = load_params(view, view.map(), output.data());
  params.column = view.columns;
  check::refuses([&] { run_load(params); }, {"pixel (column 5, row 0, image 0) is not on the walk"});
}
CHECK_NAMED(encodes, "what the driver would refuse is refused, with every argument") {
  const View view;
  const auto refused = [&](auto&& change, const char* rule) {
    Im2colMap map = view.map();
    change(map);
    check::refuses([&] { static_cast<void>(encode(map, "check")); },
                   {"check: im2col tensor map of type", "extents [", "steps [", rule});
  };
  refused([](Im2colMap& map) { map.base = static_cast<const char*>(map.base) + 8; }, "multiple of 16 bytes");
  refused([](Im2colMap& map) { map.row_stride_bytes += 8; }, "strides must be multiples of 16");
  refused([](Im2colMap& map) { map.image_stride_bytes = int64_t{1} << 40; }, "below 2^40");
  refused([](Im2colMap& map) { map.rows = 0; }, "extents must be at least 1");
  refused([](Im2colMap& map) { map.upper_row = 128; }, "corners must lie");
  refused([](Im2colMap& map) { map.column_step = 9; }, "steps must be 1 to 8");
  refused([](Im2colMap& map) { map.box_pixels = 1025; }, "1 to 1024 pixels");
  refused([](Im2colMap& map) { map.box_channels = 128; }, "span of the swizzle");
  refused([](Im2colMap& map) { map.lower_row = map.rows; }, "bounding box must not be empty");
  TiledMap tiled{};
  tiled.type = ElementType::kBFloat16;
  tiled.base = view.base;
  tiled.rank = 2;
  tiled.extents[0] = tiled.extents[1] = 64;
  tiled.strides_bytes[0] = 128;
  tiled.box[0] = 64, tiled.box[1] = 257;
  check::refuses([&] { static_cast<void>(encode(tiled, "check")); }, {"check: tiled tensor map", "must be 1 to 256"});
}

// --- Stores ---------------------------------------------------------------------------------------

struct StoreParams {
  static constexpr const char* kOperator = "check";
  TensorMap map;
  bool fence;
  bool fence_after_barrier;
  bool wait;
  int32_t channel, column, row, image;
};
struct StoreShared {
  alignas(1024) unsigned char tile[32 * 128];
};

// Writes row r of the tile with value 1000 + r in 16-byte chunk order, through fragments.
__global__ void store_kernel(const __grid_constant__ StoreParams params) {
  StoreShared& shared = dynamic_shared<StoreShared>();
  const uint32_t lane = lane_index();
  for (uint32_t chunk = warp_index() * 4; chunk < warp_index() * 4 + 4; ++chunk) {
    for (uint32_t rows = 0; rows < 32; rows += 32) {
      uint32_t registers[4];
      for (uint32_t matrix = 0; matrix < 4; ++matrix) {
        const float value = static_cast<float>(rows + matrix * 8 + lane / 4);
        registers[matrix] = pack2<BFloat16>(value, value + static_cast<float>(chunk) * 32 - 128);
      }
      const uint32_t row = rows + lane;
      store_matrix_x4(shared.tile + row * 128 + ((chunk ^ (row % 8)) << 4), registers);
    }
  }
  if (params.fence) fence_async_shared();
  block_barrier();
  if (thread_index() == 0) {
    if (params.fence_after_barrier) fence_async_shared();
    tma_store_im2col(params.map, shared.tile, params.channel, params.column, params.row, params.image);
    tma_store_commit();
    if (params.wait) tma_store_wait_read<0>();
  }
}
bool stored(bool fence, bool fence_after_barrier, bool wait) {
  View view;
  const View before = view;
  Im2colMap map = view.map();
  map.box_pixels = 32;
  launch(&store_kernel, Dim3{1}, Dim3{64}, sizeof(StoreShared), nullptr,
         StoreParams{encode(map, "check"), fence, fence_after_barrier, wait, 16, 2, 3, 1});
  const int64_t first = (1 * view.rows + 3) * view.columns + 2;
  for (size_t i = 0; i < view.storage.size(); ++i) {
    uint16_t expected = before.storage[i];
    const auto offset = static_cast<int64_t>(i) - (view.base - view.storage.data());
    const int64_t image = offset / view.image_stride;
    const int64_t row = offset % view.image_stride / view.row_stride;
    const int64_t column = offset % view.row_stride / view.column_stride;
    const int64_t channel = offset % view.column_stride;
    if (offset >= 0 && image < view.images && row < view.rows && column < view.columns && channel >= 16 &&
        channel < view.channels) {
      const int64_t pixel = (image * view.rows + row) * view.columns + column - first;
      if (pixel >= 0 && pixel < 32) {
        const float value = static_cast<float>(pixel);
        const auto chunk = static_cast<float>((channel - 16) / 8);
        expected = to_bits(from_accumulator<BFloat16>(channel % 2 == 0 ? value : value + chunk * 32 - 128));
      }
    }
    if (view.storage[i] != expected) return false;
  }
  return true;
}
CHECK_NAMED(store, "stores write the view and nothing else") {
  check::in_every_schedule([] { check::require(stored(true, false, true), "what was stored"); });
}
CHECK_NAMED(no_fence, "a store without fence_async_shared is noticed") {
  check::require(!stored(false, false, true), "not noticed");
}
CHECK_NAMED(late_fence, "a fence by one thread for the writes of all is noticed") {
  check::require(!stored(false, true, true), "not noticed");
}
CHECK_NAMED(no_store_wait, "a thread that ends while its store reads shared memory is noticed") {
  check::require(check::noticed_in_some_schedule([] { return stored(true, false, false); }), "not noticed");
}

// --- Warpgroup products ---------------------------------------------------------------------------

enum class ProductBug { kNone, kSwizzle, kNoWait, kNoFence, kEarlyRead };
struct ProductParams {
  static constexpr const char* kOperator = "check";
  TensorMap a;  // boxes of 64 channels and 64 rows
  TensorMap b;
  float* d;  // [64][128]
};
struct ProductShared {
  alignas(1024) unsigned char a[64 * 128];
  alignas(1024) unsigned char b[2][64 * 128];
  Barrier full;
};

// d[64][128] = a * b over a reduction of 64. Each operand is stored [64 or 128 rows][64 reduction] or, transposed,
// [64 reduction][64 or 128 rows].
template <bool kTransposedA, bool kTransposedB, ProductBug kBug>
__global__ void product_kernel(const __grid_constant__ ProductParams params) {
  ProductShared& shared = dynamic_shared<ProductShared>();
  if (thread_index() == 0) {
    barrier_init(shared.full, 1);
    barrier_init_fence();
  }
  block_barrier();
  if (thread_index() == 0) {
    barrier_arrive_expect(shared.full, sizeof(shared.a) + sizeof(shared.b));
    tma_load_3d(shared.a, params.a, shared.full, 0, 0, 0);
    for (int32_t i = 0; i < 2; ++i) {
      tma_load_3d(shared.b[i], params.b, shared.full, kTransposedB ? 64 * i : 0, kTransposedB ? 0 : 64 * i, 0);
    }
  }
  barrier_wait(shared.full, 0);
  const Swizzle swizzle = kBug == ProductBug::kSwizzle ? Swizzle::k64Bytes : Swizzle::k128Bytes;
  const uint64_t a = matrix_descriptor(shared.a, swizzle, kTransposedA ? 8192 : 0, 1024);
  const uint64_t b = matrix_descriptor(shared.b, Swizzle::k128Bytes, kTransposedB ? 8192 : 0, 1024);
  float d[64];
  if (kBug != ProductBug::kNoFence) wgmma_fence();
  for (uint32_t step = 0; step < 4; ++step) {
    wgmma<BFloat16, 128, kTransposedA, kTransposedB>(d, advance(a, step * (kTransposedA ? 2048 : 32)),
                                                     advance(b, step * (kTransposedB ? 2048 : 32)), step > 0);
    if (step == 2) wgmma_commit();
  }
  wgmma_commit();
  const auto write = [&] {
    for (uint32_t i = 0; i < 64; ++i) {
      const uint32_t row = 16 * warp_index() + lane_index() / 4 + 8 * (i / 2 % 2);
      params.d[row * 128 + 8 * (i / 4) + 2 * (lane_index() % 4) + i % 2] = d[i];
    }
  };
  if (kBug == ProductBug::kNoWait) return write();
  wgmma_wait<1>();
  if (kBug == ProductBug::kEarlyRead) write();
  wgmma_wait<0>();
  if (kBug != ProductBug::kEarlyRead) write();
}

template <bool kTransposedA, bool kTransposedB, ProductBug kBug>
bool multiplied() {
  const auto operand = [](bool transposed, int32_t rows, int64_t seed, std::vector<uint16_t>& storage) {
    storage.resize(static_cast<size_t>(rows) * 64 + 8);
    uint16_t* base = storage.data() + (16 - reinterpret_cast<uintptr_t>(storage.data()) % 16) / 2 % 8;
    for (int32_t row = 0; row < rows; ++row) {
      for (int32_t k = 0; k < 64; ++k) base[transposed ? k * rows + row : row * 64 + k] = value_at(seed + row * 64 + k);
    }
    TiledMap map{};
    map.type = ElementType::kBFloat16;
    map.base = base;
    map.rank = 3;
    map.extents[0] = transposed ? rows : 64;
    map.extents[1] = transposed ? 64 : rows;
    map.extents[2] = 1;
    map.strides_bytes[0] = map.extents[0] * 2;
    map.strides_bytes[1] = map.strides_bytes[0] * map.extents[1];
    map.box[0] = map.box[1] = 64;
    map.box[2] = 1;
    map.swizzle = Swizzle::k128Bytes;
    return encode(map, "check");
  };
  std::vector<uint16_t> a;
  std::vector<uint16_t> b;
  std::vector<float> d(64 * 128);
  const ProductParams params{operand(kTransposedA, 64, 5, a), operand(kTransposedB, 128, 9999, b), d.data()};
  launch(&product_kernel<kTransposedA, kTransposedB, kBug>, Dim3{1}, Dim3{128}, sizeof(ProductShared), nullptr, params);
  const auto value = [](int64_t index) { return to_accumulator(BFloat16{value_at(index)}); };
  for (int64_t row = 0; row < 64; ++row) {
    for (int64_t column = 0; column < 128; ++column) {
      float expected = 0;
      for (int64_t k = 0; k < 64; ++k) expected += value(5 + row * 64 + k) * value(9999 + column * 64 + k);
      if (d[row * 128 + column] != expected) return false;
    }
  }
  return true;
}
CHECK_NAMED(products, "warpgroup products of all four kinds of operands") {
  check::in_every_schedule(
      [] {
        check::require(multiplied<false, false, ProductBug::kNone>(), "both reduction-contiguous");
        check::require(multiplied<true, false, ProductBug::kNone>(), "a row-contiguous");
        check::require(multiplied<false, true, ProductBug::kNone>(), "b row-contiguous");
        check::require(multiplied<true, true, ProductBug::kNone>(), "both row-contiguous");
      },
      4);
}
CHECK_NAMED(product_swizzle, "a wrong swizzle is noticed") {
  check::require(!multiplied<false, false, ProductBug::kSwizzle>(), "not noticed");
}
CHECK_NAMED(product_wait, "sums read before the wait, or after a wait for too few groups, are noticed") {
  check::require(check::noticed_in_some_schedule(&multiplied<false, false, ProductBug::kNoWait>, 1), "no wait");
  check::require(check::noticed_in_some_schedule(&multiplied<false, false, ProductBug::kEarlyRead>, 1), "early read");
}
CHECK_NAMED(product_fence, "products without wgmma_fence are refused") {
  check::refuses(&multiplied<false, false, ProductBug::kNoFence>, {"no wgmma_fence"});
}

// --- Clusters -------------------------------------------------------------------------------------

struct ClusterParams {
  static constexpr const char* kOperator = "check";
  TensorMap map;
  uint16_t* output;  // [block][2 * 8 * 64]
};
struct ClusterShared {
  alignas(1024) uint16_t tile[2][8 * 64];
  Barrier full;
  Barrier empty;
};

// Each block of a pair loads one half for both, twice, after both have emptied their tiles.
__global__ void cluster_kernel(const __grid_constant__ ClusterParams params) {
  ClusterShared& shared = dynamic_shared<ClusterShared>();
  const uint32_t rank = cluster_rank();
  if (thread_index() == 0) {
    barrier_init(shared.full, 1);
    barrier_init(shared.empty, 2);
    barrier_init_fence();
  }
  cluster_barrier();
  for (uint32_t round = 0; round < 2; ++round) {
    if (thread_index() == 0) {
      barrier_wait(shared.empty, (round & 1) ^ 1);
      barrier_arrive_expect(shared.full, sizeof(shared.tile));
      tma_load_3d_multicast(shared.tile[rank], params.map, shared.full, 0, static_cast<int32_t>(rank * 8),
                            static_cast<int32_t>(round), 3);
    }
    barrier_wait(shared.full, round & 1);
    for (uint32_t i = thread_index(); i < 1024; i += block_threads()) {
      params.output[(block_index().x * 2 + round) * 1024 + i] = shared.tile[i / 512][i % 512];
    }
    block_barrier();
    if (thread_index() < 2) barrier_arrive_cluster(shared.empty, thread_index());
  }
  cluster_barrier();
}
CHECK_NAMED(clusters, "multicast loads into the blocks of a cluster") {
  check::in_every_schedule([] {
    alignas(16) static uint16_t input[2][16][64];
    for (int64_t i = 0; i < 2048; ++i) input[i / 1024][i / 64 % 16][i % 64] = value_at(i);
    TiledMap map{};
    map.type = ElementType::kBFloat16;
    map.base = input;
    map.rank = 3;
    map.extents[0] = 64, map.extents[1] = 16, map.extents[2] = 2;
    map.strides_bytes[0] = 128, map.strides_bytes[1] = 2048;
    map.box[0] = 64, map.box[1] = 8, map.box[2] = 1;
    std::vector<uint16_t> output(4 * 2048);
    launch_clusters(&cluster_kernel, Dim3{4}, 2, Dim3{64}, sizeof(ClusterShared), nullptr,
                    ClusterParams{encode(map, "check"), output.data()});
    for (int64_t i = 0; i < 4 * 2048; ++i) check::equal(output[i], value_at(i % 2048), "an element");
  });
}

}  // namespace
