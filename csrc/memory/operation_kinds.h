// The targets (Operation::target) that mean something to the planner and to cost models. Capture writes them; every
// other target is the name of an ATen or splitkern operator and counts as kOther.
#pragma once

#include <string_view>

#include "memory/graph.h"

namespace splitkern::memory {

enum class OperationKind : uint8_t {
  kOther,
  kConv2d,
  kConv2dInputGrad,
  kConv2dWeightGrad,
  kBatchNorm,
  kBatchNormBackward,
  kMaxPool2d,
  kMaxPool2dBackward,
  kAvgPool2d,
  kAvgPool2dBackward,
  kRelu,
  kReluBackward,
  kAdd,
  kMm,
  kAddmm,
};

namespace targets {
inline constexpr std::string_view kConv2d = "conv2d";
inline constexpr std::string_view kConv2dInputGrad = "conv2d_input_grad";
inline constexpr std::string_view kConv2dWeightGrad = "conv2d_weight_grad";
inline constexpr std::string_view kBatchNorm = "batch_norm";
inline constexpr std::string_view kBatchNormBackward = "batch_norm_backward";
inline constexpr std::string_view kMaxPool2d = "max_pool2d";
inline constexpr std::string_view kMaxPool2dBackward = "max_pool2d_backward";
inline constexpr std::string_view kAvgPool2d = "avg_pool2d";
inline constexpr std::string_view kAvgPool2dBackward = "avg_pool2d_backward";
inline constexpr std::string_view kRelu = "relu";
inline constexpr std::string_view kReluBackward = "relu_backward";
inline constexpr std::string_view kAdd = "add";
inline constexpr std::string_view kMm = "mm";
inline constexpr std::string_view kAddmm = "addmm";
}  // namespace targets

OperationKind kind_of(std::string_view target);
inline OperationKind kind_of(const Operation& operation) {
  return kind_of(operation.target);
}

// The target of a kind; "" for kOther.
std::string_view target_of(OperationKind kind);

// Matrix products in the wide sense: their time grows with the reduction, all others' with the bytes alone.
bool is_compute_bound(OperationKind kind);

// Convolutions and poolings, forward: the layers that vDNN's rule and the split region count.
bool is_window(OperationKind kind);

}  // namespace splitkern::memory
