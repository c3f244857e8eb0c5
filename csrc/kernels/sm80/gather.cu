// Instances of the gathering matrix product and the choice among its tiles. Called by gather_paths.cu.
#include "gather_kernel.h"

#include "launching.h"

namespace splitkern::kernels::sm80 {
namespace {

constexpr TileModel kTileModels[] = {
    {TileSize::k128x128, 128, 128, 1.0},
    {TileSize::k128x64, 128, 64, 1.2},
    {TileSize::k64x64, 64, 64, 1.5},
};

template <class Tile>
void launch_tile(const GatherParams& params, int64_t pixels, cudaStream_t stream) {
  const int64_t blocks = ceil_divide(pixels, Tile::kRows) * ceil_divide(params.destination_channels, Tile::kColumns);
  const Dim3 grid{static_cast<unsigned>(blocks),
                  static_cast<unsigned>(params.rows.class_count * params.columns.class_count),
                  static_cast<unsigned>(params.groups)};
  static_assert(sizeof(GatherShared<Tile>) <= shared_budget("sm80::gather_kernel"));
  kernels::launch(&gather_kernel<Tile>, grid, Dim3{kThreads, 1u, 1u}, sizeof(GatherShared<Tile>), stream, params);
}

template <class T>
void launch_type(const GatherParams& params, const DeviceTraits& device, cudaStream_t stream) {
  int64_t pixels = 0;  // of the largest class
  for (int32_t y = 0; y < params.rows.class_count; ++y) {
    for (int32_t x = 0; x < params.columns.class_count; ++x) {
      const int64_t count =
          static_cast<int64_t>(params.batch) * params.rows.classes[y].count * params.columns.classes[x].count;
      if (count > pixels) pixels = count;
    }
  }
  if (pixels == 0) return;
  const int64_t products = static_cast<int64_t>(params.groups) * params.rows.class_count * params.columns.class_count;
  switch (choose_tile(kTileModels, pixels, params.destination_channels, products, device.multiprocessors)) {
    case TileSize::k128x128:
      return launch_tile<Tile<T, 128, 128>>(params, pixels, stream);
    case TileSize::k128x64:
      return launch_tile<Tile<T, 128, 64>>(params, pixels, stream);
    default:
      return launch_tile<Tile<T, 64, 64>>(params, pixels, stream);
  }
}

}  // namespace

void launch_gather(const GatherParams& params, const DeviceTraits& device, cudaStream_t stream) {
  switch (params.type) {
    case ElementType::kFloat16:
      return launch_type<Half>(params, device, stream);
    case ElementType::kBFloat16:
      return launch_type<BFloat16>(params, device, stream);
    default:
      return launch_type<float>(params, device, stream);
  }
}

}  // namespace splitkern::kernels::sm80
