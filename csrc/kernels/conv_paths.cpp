// See conv_paths.h. A path is one line of the table; the order of the table is the order of preference.
#include "conv_paths.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "depthwise/conv.h"
#include "first_layer/conv.h"
#include "plain/conv.h"
#include "sm80/conv.h"
#ifndef SPLITKERN_WITHOUT_SM90  // a build for other architectures alone
#include "sm90/conv.h"
#endif

namespace splitkern::kernels {
namespace {

constexpr int32_t kAnyCapability = 10000;

struct PathName {
  Path path;
  const char* name;
};
constexpr PathName kNames[] = {{Path::kPlain, "plain"},
                               {Path::kDepthwise, "depthwise"},
                               {Path::kFirstLayer, "first_layer"},
                               {Path::kSm80, "sm80"},
                               {Path::kSm90, "sm90"}};

template <class Params>
struct Candidate {
  Path path;
  const char* merit;  // why it is taken where it can be
  int32_t least_capability, greatest_capability;
  std::string (*refusal)(const Params&, const DeviceTraits&);
  int64_t (*workspace_bytes)(const Params&, const DeviceTraits&);
  void (*launch)(const Params&, const DeviceTraits&, void*, cudaStream_t);
};

// The most preferred first; plain, which takes everything, last.
template <class Params>
constexpr Candidate<Params> kCandidates[] = {
    {Path::kDepthwise, "few channels per group: a direct kernel moves the fewest bytes", 80, kAnyCapability,
     &depthwise::refusal, &depthwise::workspace_bytes, &depthwise::launch},
    {Path::kFirstLayer, "few input channels: the reduction is packed across taps", 80, kAnyCapability,
     &first_layer::refusal, &first_layer::workspace_bytes, &first_layer::launch},
#ifndef SPLITKERN_WITHOUT_SM90
    {Path::kSm90, "tensor cores by wgmma, fed by TMA", 90, 90, &sm90::refusal, &sm90::workspace_bytes, &sm90::launch},
#endif
    {Path::kSm80, "tensor cores by mma.sync, fed by cp.async", 80, kAnyCapability, &sm80::refusal,
     &sm80::workspace_bytes, &sm80::launch},
    {Path::kPlain, "any shape, type and strides", 0, kAnyCapability, &plain::refusal, &plain::workspace_bytes,
     &plain::launch},
};

constexpr int32_t kAutomatic = -1;
std::atomic<int32_t> forced_path{kAutomatic};

// Nothing to read or to add up: the faster paths need not know such calls.
bool is_empty(const ConvForwardParams& params) {
  return params.batch == 0 || params.out_channels == 0 || params.in_channels_per_group == 0;
}
bool is_empty(const ConvInputGradParams& params) {
  return params.batch == 0 || params.in_channels == 0 || params.out_channels_per_group == 0;
}
bool is_empty(const ConvWeightGradParams& params) {
  return params.batch == 0 || params.out_channels == 0 || params.in_channels_per_group == 0;
}

template <class Params>
std::string why_not(const Candidate<Params>& candidate, const Params& params, const DeviceTraits& traits) {
  if (candidate.path == Path::kPlain) return {};
  if (traits.compute_capability < candidate.least_capability ||
      traits.compute_capability > candidate.greatest_capability) {
    return "the device has compute capability " + std::to_string(traits.compute_capability / 10) + "." +
           std::to_string(traits.compute_capability % 10);
  }
  if (is_empty(params)) return "the call is empty";
  return candidate.refusal(params, traits);
}

// common_refusal: what keeps every path but plain from the call, whatever its parameters.
template <class Params>
PathChoice choose(const Params& params, const DeviceTraits& traits, const std::string& common_refusal) {
  const int32_t forced = forced_path.load(std::memory_order_relaxed);
  // Texts grow by append: GCC 12 warns, wrongly, of overlaps in what it inlines of `"text" + string`.
  std::string others;
  for (const Candidate<Params>& candidate : kCandidates<Params>) {
    if (forced != kAutomatic && static_cast<int32_t>(candidate.path) != forced) continue;
    std::string refusal =
        candidate.path != Path::kPlain && !common_refusal.empty() ? common_refusal : why_not(candidate, params, traits);
    if (refusal.empty()) {
      return {
          candidate.path, candidate.workspace_bytes(params, traits),
          std::string(name_of(candidate.path)) + ": " + (forced == kAutomatic ? candidate.merit : "forced") + others};
    }
    if (forced != kAutomatic) {
      throw std::runtime_error(std::string(Params::kOperator) + ": the path " + name_of(candidate.path) +
                               " was forced, but it does not take this call: " + refusal);
    }
    others.append("; not ").append(name_of(candidate.path)).append(": ").append(refusal);
  }
  throw std::runtime_error(std::string(Params::kOperator) + ": the path " + name_of(static_cast<Path>(forced)) +
                           " was forced, but this build does not hold it");
}

template <class Params>
void launch_chosen(const PathChoice& choice, const Params& params, const DeviceTraits& traits, void* workspace,
                   cudaStream_t stream) {
  for (const Candidate<Params>& candidate : kCandidates<Params>) {
    if (candidate.path == choice.path) return candidate.launch(params, traits, workspace, stream);
  }
  throw std::logic_error(std::string(Params::kOperator) + ": the chosen path is not in the table");
}

}  // namespace

const char* name_of(Path path) {
  for (const PathName& entry : kNames) {
    if (entry.path == path) return entry.name;
  }
  throw std::logic_error("splitkern: a path without a name");
}

PathChoice choose_path(const ConvForwardParams& params, const DeviceTraits& traits) {
  return choose(params, traits, {});
}

PathChoice choose_path(const ConvInputGradParams& params, const DeviceTraits& traits) {
  return choose(params, traits, {});
}

PathChoice choose_path(const ConvWeightGradParams& params, std::span<const PatchGrid> grids,
                       const DeviceTraits& traits) {
  ConvWeightGradParams first = params;
  std::string common_refusal;
  if (grids.empty()) {
    common_refusal = "there is nothing to add up";
  } else {
    first.grid = grids[0];
    if (grids.size() > 1) {
      common_refusal.append("more than ").append(std::to_string(kMaxPatchesPerAxis));
      common_refusal.append(" patches on an axis, which are summed over several launches");
    }
  }
  PathChoice choice = choose(first, traits, common_refusal);
  if (choice.path == Path::kPlain) choice.workspace_bytes = plain::weight_grad_workspace_bytes(params, grids.size());
  return choice;
}

void launch_path(const PathChoice& choice, const ConvForwardParams& params, const DeviceTraits& traits, void* workspace,
                 cudaStream_t stream) {
  launch_chosen(choice, params, traits, workspace, stream);
}

void launch_path(const PathChoice& choice, const ConvInputGradParams& params, const DeviceTraits& traits,
                 void* workspace, cudaStream_t stream) {
  launch_chosen(choice, params, traits, workspace, stream);
}

void launch_path(const PathChoice& choice, const ConvWeightGradParams& params, std::span<const PatchGrid> grids,
                 const DeviceTraits& traits, void* workspace, cudaStream_t stream) {
  if (choice.path == Path::kPlain) return plain::launch_weight_grad(params, grids, workspace, stream);
  ConvWeightGradParams only = params;
  only.grid = grids[0];
  launch_chosen(choice, only, traits, workspace, stream);
}

bool plain_path_is_forced() {
  return forced_path.load(std::memory_order_relaxed) == static_cast<int32_t>(Path::kPlain);
}

}  // namespace splitkern::kernels

extern "C" const char* splitkern_conv_paths() {
  using namespace splitkern::kernels;
  static const std::string names = [] {
    std::string text;
    for (const auto& candidate : kCandidates<ConvForwardParams>) {
      text.append(text.empty() ? "" : " ").append(name_of(candidate.path));
    }
    return text;
  }();
  return names.c_str();
}

extern "C" int splitkern_force_path(const char* name) {
  using namespace splitkern::kernels;
  if (name == nullptr || *name == '\0') {
    forced_path.store(kAutomatic, std::memory_order_relaxed);
    return 0;
  }
  for (const PathName& entry : kNames) {
    if (std::string_view(name) == entry.name) {
      forced_path.store(static_cast<int32_t>(entry.path), std::memory_order_relaxed);
      return 0;
    }
  }
  return 1;
}
