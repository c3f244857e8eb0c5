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
    const auto reads = [](const AxisWalk& walk) {
      return static_cast<double>(std::min(walk.operand_extent, walk.outputs * walk.step));
    };
    const double images = static_cast<double>(problem.pixels(call.images)) /
                          static_cast<double>(problem.rows.outputs * problem.columns.outputs);
    bytes += reads(problem.rows) * reads(problem.columns) * images * call.reduction_channels;
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

namespace {

bool same_shape(const AxisWalk& a, const AxisWalk& b) {
  return a.operand_extent == b.operand_extent && a.output_step == b.output_step && a.outputs == b.outputs &&
         a.lower == b.lower && a.step == b.step && a.taps == b.taps && a.first_tap == b.first_tap &&
         a.tap_step == b.tap_step && a.offset_step == b.offset_step;
}

// Narrower than without patches.
bool walk_takes_patches(const AxisWalk& walk) {
  if (walk.taps == 0) return true;
  return walk.lower >= -16 && walk.lower <= 15 && upper_corner(walk) >= -16 && upper_corner(walk) <= 15 &&
         (walk.taps - 1) * walk.offset_step < 32;
}

// Equal distances between neighbouring patches of an axis, in the operand and in the output.
struct Lattice {
  int64_t patches = 1;
  int64_t operand_step = 0;
  int64_t output_step = 0;
};

// patches = 0 where the distances differ.
Lattice lattice_of(const std::vector<const AxisWalk*>& walks) {
  Lattice lattice;
  lattice.patches = static_cast<int64_t>(walks.size());
  for (size_t i = 1; i < walks.size(); ++i) {
    const int64_t operand_step = walks[i]->operand_begin - walks[i - 1]->operand_begin;
    const int64_t output_step = walks[i]->output_begin - walks[i - 1]->output_begin;
    if (i == 1) {
      lattice.operand_step = operand_step;
      lattice.output_step = output_step;
    } else if (operand_step != lattice.operand_step || output_step != lattice.output_step) {
      return {0, 0, 0};
    }
  }
  return lattice;
}

// One problem for all members of a group of equal shape, or one per row of patches; false where they are no lattice.
bool merge_group(const GemmCall& call, const std::vector<const GemmProblem*>& group, std::vector<GemmProblem>& merged) {
  std::vector<const AxisWalk*> rows;
  std::vector<const AxisWalk*> columns;
  for (const GemmProblem* problem : group) {  // row by row
    if (rows.empty() || problem->rows.operand_begin != rows.back()->operand_begin ||
        problem->rows.output_begin != rows.back()->output_begin) {
      rows.push_back(&problem->rows);
    }
    if (rows.size() == 1) columns.push_back(&problem->columns);
  }
  if (rows.size() * columns.size() != group.size()) return false;
  const Lattice down = lattice_of(rows);
  const Lattice across = lattice_of(columns);
  if (down.patches == 0 || across.patches == 0 || group.front()->pixels(call.images) * group.size() > (1 << 30)) {
    return false;
  }
  GemmProblem problem = *group.front();
  const bool only_rows = across.patches == 1;
  const Lattice& patches = only_rows ? down : across;
  const int64_t operand_unit = only_rows ? call.operand_strides.row : call.operand_strides.column;
  const int64_t output_unit = only_rows ? call.output_strides.row : call.output_strides.column;
  problem.patches = static_cast<int32_t>(patches.patches);
  problem.operand_patch_step = patches.patches > 1 ? patches.operand_step * operand_unit : 8;
  problem.output_patch_step = patches.patches > 1 ? patches.output_step * output_unit : 8;
  problem.operand_image_step = call.operand_strides.batch;
  problem.output_image_step = call.output_strides.batch;
  if (only_rows || down.patches == 1) {
    merged.push_back(problem);
    return true;
  }
  const int64_t operand_row = down.operand_step * call.operand_strides.row;
  const int64_t output_row = down.output_step * call.output_strides.row;
  if (call.images == 1 || (call.operand_strides.batch == down.patches * operand_row &&
                           call.output_strides.batch == down.patches * output_row)) {
    problem.rows_of_patches = static_cast<int32_t>(down.patches);
    problem.operand_image_step = operand_row;
    problem.output_image_step = output_row;
    merged.push_back(problem);
    return true;
  }
  for (const AxisWalk* walk : rows) {
    problem.rows = *walk;
    merged.push_back(problem);
  }
  return true;
}

// Patches of equal shape and equal distances as single problems; as they are where that does not hold for all.
std::vector<GemmProblem> merge_patches(const GemmCall& call, const std::vector<GemmProblem>& problems) {
  std::vector<GemmProblem> merged;
  std::vector<bool> taken(problems.size(), false);
  if (problems.size() == 1 || tuning().merge == 0) return problems;
  for (size_t i = 0; i < problems.size(); ++i) {
    if (taken[i]) continue;
    if (!walk_takes_patches(problems[i].rows) || !walk_takes_patches(problems[i].columns)) return problems;
    std::vector<const GemmProblem*> group;
    for (size_t j = i; j < problems.size(); ++j) {
      if (taken[j] || !same_shape(problems[i].rows, problems[j].rows) ||
          !same_shape(problems[i].columns, problems[j].columns)) {
        continue;
      }
      taken[j] = true;
      group.push_back(&problems[j]);
    }
    if (!merge_group(call, group, merged)) return problems;
  }
  return merged.size() < problems.size() ? merged : problems;
}

}  // namespace

void launch_gemm_call(bool input_grad, const GemmCall& call, std::vector<GemmProblem>& problems,
                      int32_t multiprocessors, cudaStream_t stream) {
  std::vector<GemmProblem> merged = merge_patches(call, problems);
  const TileChoice choice = choose_gemm_tile(call, merged, multiprocessors);
  if (tuning().gemm_tile < 0 && tuning().window != 0) {
    const double window = window_cycles(call, problems, multiprocessors);  // infinite where it does not take the call
    if (window < choice.cycles || (tuning().window == 1 && std::isfinite(window))) {
      return launch_window(input_grad, call, problems, multiprocessors, stream);
    }
  }
  const int32_t tile = tuning().gemm_tile >= 0 ? tuning().gemm_tile : choice.tile;
  // Long tiles first, so that the last wave is one of short ones.
  std::stable_sort(merged.begin(), merged.end(),
                   [](const GemmProblem& a, const GemmProblem& b) { return a.taps() > b.taps(); });
  const bool half = call.type == ElementType::kFloat16;
  if (input_grad) {
    half ? launch_gemm_tile<Half, true>(tile, call, merged, multiprocessors, stream)
         : launch_gemm_tile<BFloat16, true>(tile, call, merged, multiprocessors, stream);
  } else {
    half ? launch_gemm_tile<Half, false>(tile, call, merged, multiprocessors, stream)
         : launch_gemm_tile<BFloat16, false>(tile, call, merged, multiprocessors, stream);
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
                        {"merge", tuning.merge},
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
