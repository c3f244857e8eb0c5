// Which implementation computes a convolution call, and why. Each path is a namespace with three functions per
// parameter struct: whether it takes the call, how much workspace it needs, and the launch. choose_path, the one
// place that decides, is called by csrc/ops/cuda and, for `splitkern doctor --explain`, without a device.
#pragma once

#include <cstdint>
#include <string>

#include "launchers.h"
#include "params.h"

namespace splitkern::kernels {

struct DeviceTraits {
  int32_t compute_capability;  // 10 * major + minor
  int32_t multiprocessors;
  int64_t shared_memory_bytes;  // that one block may opt in to
};

// Of the current device.
DeviceTraits device_traits();

enum class Path : int32_t { kPlain, kDepthwise, kFirstLayer, kSm80, kSm90 };

struct PathChoice {
  Path path;
  int64_t workspace_bytes;
  std::string reason;  // why this path, and why not each faster one
};

// For every path P other than plain, in csrc/kernels/P/conv.h, overloaded for ConvForwardParams,
// ConvInputGradParams and ConvWeightGradParams:
//
//   std::string refusal(const Params&, const DeviceTraits&);
//       empty where the path takes the call, else the reason as a phrase: "the input's channel stride is 56, not 1".
//       Looks at extents, strides, types and the alignment of pointers (null pointers count as aligned).
//   int64_t workspace_bytes(const Params&, const DeviceTraits&);
//   void launch(const Params&, const DeviceTraits&, void* workspace, cudaStream_t);
//       queues everything; the weight gradient writes its output, also under `accumulate`.

}  // namespace splitkern::kernels
