// Host side that forward and input gradient on Hopper share: what the path refuses, where the weights come from,
// which tile is used. Called by conv_forward.cu and conv_input_grad.cu.
#include "conv_gemm.h"

#include <string_view>

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

double predicted_cycles(const GemmCall& call, const std::vector<GemmProblem>& problems, double computing) {
  constexpr double kBytesPerCycle = 3200;  // of the whole device
  constexpr double kOverlap = 1.64;        // 1: moving and computing take turns; infinite: the longer hides the other
  double bytes = 0;
  for (const GemmProblem& problem : problems) {
    bytes += static_cast<double>(problem.pixels(call.images)) * call.channels;
    if (problem.taps() == 0) continue;
    // Neighbouring windows share what they read; a stride beyond the window leaves some out.
    bytes +=
        static_cast<double>(std::min(problem.rows.operand_extent, problem.rows.outputs * problem.rows.step)) *
        static_cast<double>(std::min(problem.columns.operand_extent, problem.columns.outputs * problem.columns.step)) *
        call.images * call.reduction_channels;
  }
  const double moving = bytes * kElementBytes / kBytesPerCycle;
  return std::pow(std::pow(computing, kOverlap) + std::pow(moving, kOverlap), 1 / kOverlap);
}

TileChoice choose_gemm_tile(const GemmCall& call, const std::vector<GemmProblem>& problems, int32_t multiprocessors) {
  const double blocks = static_cast<double>(ceil_divide(call.reduction_channels, kReductionBlock));
  TileChoice best{-1, 0};
  for (int32_t i = 0; i < kGemmTileCount; ++i) {
    const GemmTile& tile = kGemmTiles[i];
    double tiles = 0;
    double cycles = 0;
    for (const GemmProblem& problem : problems) {
      const double these = static_cast<double>(ceil_divide(problem.pixels(call.images), tile.pixels) *
                                               ceil_divide(call.channels, tile.channels));
      tiles += these;
      cycles += these * (static_cast<double>(problem.taps()) * blocks * tile.cycles_per_block + tile.cycles_per_tile);
    }
    const double total = predicted_cycles(call, problems, std::ceil(tiles / multiprocessors) * cycles / tiles);
    if (best.tile < 0 || total < best.cycles) best = {i, total};
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

void launch_gemm_call(bool input_grad, const GemmCall& call, std::vector<GemmProblem>& problems,
                      int32_t multiprocessors, cudaStream_t stream) {
  const TileChoice choice = choose_gemm_tile(call, problems, multiprocessors);
  if (tuning().gemm_tile < 0 && tuning().window != 0) {
    const double window = window_cycles(call, problems, multiprocessors);  // infinite where it does not take the call
    if (window < choice.cycles || (tuning().window == 1 && std::isfinite(window))) {
      return launch_window(input_grad, call, problems, multiprocessors, stream);
    }
  }
  const int32_t tile = tuning().gemm_tile >= 0 ? tuning().gemm_tile : choice.tile;
  // Long tiles first, so that the last wave is one of short ones.
  std::stable_sort(problems.begin(), problems.end(),
                   [](const GemmProblem& a, const GemmProblem& b) { return a.taps() > b.taps(); });
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

extern "C" int splitkern_tune_sm90(const char* knob, int32_t value) {
  splitkern::kernels::sm90::Tuning& tuning = splitkern::kernels::sm90::tuning();
  struct Knob {
    const char* name;
    int32_t& member;
  };
  const Knob knobs[] = {{"gemm_tile", tuning.gemm_tile},
                        {"lag", tuning.lag},
                        {"window", tuning.window},
                        {"weight_grad_tile", tuning.weight_grad_tile},
                        {"weight_grad_segments", tuning.weight_grad_segments}};
  for (const Knob& candidate : knobs) {
    if (std::string_view(candidate.name) != knob) continue;
    candidate.member = value;
    return 0;
  }
  return 1;
}
