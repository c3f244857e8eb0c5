// Host side that forward and input gradient on Hopper share: what the path refuses, where the weights come from,
// which tile is used. Called by conv_forward.cu and conv_input_grad.cu.
#include "conv_gemm.h"

#include "pack_weights.h"
#include "window.h"

namespace splitkern::kernels::sm90 {

Tuning& tuning() {
  static Tuning values;
  return values;
}

std::string device_refusal(const DeviceTraits& traits) {
  if (traits.compute_capability != 90) {
    return "the device has compute capability " + std::to_string(traits.compute_capability / 10) + "." +
           std::to_string(traits.compute_capability % 10) + ", not 9.0";
  }
  if (traits.shared_memory_bytes < kSharedBytes) {
    return "a block has " + std::to_string(traits.shared_memory_bytes) + " bytes of shared memory, not " +
           std::to_string(kSharedBytes);
  }
  return {};
}

std::string type_refusal(ElementType type) {
  if (type == ElementType::kFloat16 || type == ElementType::kBFloat16) return {};
  return "its types are float16 and bfloat16";
}

std::string groups_refusal(int64_t channels, int64_t channels_per_group) {
  if (channels == channels_per_group) return {};
  return "the convolution has " + std::to_string(channels / channels_per_group) + " groups";
}

std::string pixels_refusal(const AxisWalk& rows, const AxisWalk& columns, int64_t images) {
  const int64_t pixels = rows.outputs * columns.outputs * images;
  if (pixels <= (int64_t{1} << 30)) return {};
  return "a patch has " + std::to_string(pixels) + " pixels, over 2^30";
}

GemmChoice choose_gemm_tile(const GemmCall& call, const std::vector<GemmProblem>& problems, int32_t multiprocessors) {
  if (tuning().gemm_tile >= 0) return {tuning().gemm_tile, 0};
  constexpr double kMultipliesPerCycle = 2048;  // of one multiprocessor's tensor cores, 16-bit operands
  constexpr double kSharedBytesPerCycle = 128;
  constexpr double kL2BytesPerCycle = 40;  // of one multiprocessor, all of them reading
  constexpr double kCyclesPerTile = 1200;  // epilogue and pipeline fill
  const double blocks = static_cast<double>(ceil_divide(call.reduction_channels, kReductionBlock));
  GemmChoice best{};
  for (int32_t i = 0; i < kGemmTileCount; ++i) {
    const GemmTile& tile = kGemmTiles[i];
    const double columns = tile.swapped ? (tile.channels == 64 ? tile.pixels / 2 : tile.pixels) : tile.channels;
    const double loaded = (tile.pixels + tile.channels) * 2.0 * kReductionBlock;
    const double read = kMathWarpgroups * (64 + columns) * 2.0 * kReductionBlock;
    const double cycles_per_block =
        std::max({static_cast<double>(tile.pixels) * tile.channels * kReductionBlock / kMultipliesPerCycle,
                  (loaded + read) / kSharedBytesPerCycle, loaded / kL2BytesPerCycle});
    double tiles = 0;
    double cycles = 0;
    for (const GemmProblem& problem : problems) {
      const double these = static_cast<double>(ceil_divide(problem.pixels(call.images), tile.pixels) *
                                               ceil_divide(call.channels, tile.channels));
      tiles += these;
      cycles += these * (static_cast<double>(problem.taps()) * blocks * cycles_per_block + kCyclesPerTile);
    }
    const double waves = std::ceil(tiles / multiprocessors);
    const double total = waves * (cycles / tiles);
    if (i == 0 || total < best.cycles) best = {i, total};
  }
  return best;
}

const void* weights_for_maps(const void* weight, const Strides4& strides, const WeightLayout& layout,
                             int32_t out_channels, int32_t in_channels, int32_t taps, int32_t kernel_columns,
                             void* workspace, cudaStream_t stream) {
  if (layout.in_place) return weight;
  PackWeightsParams pack{};
  pack.out_channels = out_channels;
  pack.in_channels = in_channels;
  pack.taps = taps;
  pack.kernel_columns = kernel_columns;
  pack.weight_strides = strides;
  pack.weight = weight;
  pack.packed = workspace;
  launch_pack_weights(pack, stream);
  return workspace;
}

namespace {

// Both predictions leave memory out. Measured on an H200 over VGG-19's and ResNet-50's layers, the im2col kernel took
// 1.22 to 1.30 of its cycles, the window kernel, which moves less, 1.10 to 1.22 of its own.
bool takes_window_kernel(const GemmCall& call, const std::vector<GemmProblem>& problems, int32_t multiprocessors,
                         double gemm_cycles) {
  if (call.taps == 1 || tuning().window == 0) return false;
  const std::optional<double> cycles = window_cycles(call, problems, multiprocessors);
  if (!cycles.has_value()) return false;
  return tuning().window == 1 || 1.14 * *cycles < 1.25 * gemm_cycles;
}

}  // namespace

void launch_gemm_call(bool input_grad, const GemmCall& call, std::vector<GemmProblem>& problems,
                      int32_t multiprocessors, cudaStream_t stream) {
  // Long tiles first, so that the last wave is one of short ones.
  std::stable_sort(problems.begin(), problems.end(),
                   [](const GemmProblem& a, const GemmProblem& b) { return a.taps() > b.taps(); });
  const GemmChoice choice = choose_gemm_tile(call, problems, multiprocessors);
  if (takes_window_kernel(call, problems, multiprocessors, choice.cycles)) {
    return launch_window(input_grad, call, problems, multiprocessors, stream);
  }
  const int32_t tile = choice.tile;
  const bool half = call.type == ElementType::kFloat16;
  if (input_grad) {
    half ? launch_gemm_tile<Half, true>(tile, call, problems, multiprocessors, stream)
         : launch_gemm_tile<BFloat16, true>(tile, call, problems, multiprocessors, stream);
  } else {
    half ? launch_gemm_tile<Half, false>(tile, call, problems, multiprocessors, stream)
         : launch_gemm_tile<BFloat16, false>(tile, call, problems, multiprocessors, stream);
  }
}

}  // namespace splitkern::kernels::sm90

extern "C" void splitkern_tune_sm90(int32_t gemm_tile, int32_t window, int32_t weight_grad_tile,
                                    int32_t weight_grad_segments) {
  splitkern::kernels::sm90::tuning() = {gemm_tile, window, weight_grad_tile, weight_grad_segments};
}
