#include "memory/operation_kinds.h"

#include <iterator>

namespace splitkern::memory {
namespace {

// In the order of OperationKind.
constexpr std::string_view kTargets[] = {
    "",
    targets::kConv2d,
    targets::kConv2dInputGrad,
    targets::kConv2dWeightGrad,
    targets::kBatchNorm,
    targets::kBatchNormBackward,
    targets::kMaxPool2d,
    targets::kMaxPool2dBackward,
    targets::kAvgPool2d,
    targets::kAvgPool2dBackward,
    targets::kRelu,
    targets::kReluBackward,
    targets::kAdd,
    targets::kMm,
    targets::kAddmm,
};
static_assert(std::size(kTargets) == static_cast<size_t>(OperationKind::kAddmm) + 1);

}  // namespace

OperationKind kind_of(std::string_view target) {
  for (size_t i = 1; i < std::size(kTargets); ++i) {
    if (kTargets[i] == target) return static_cast<OperationKind>(i);
  }
  return OperationKind::kOther;
}

std::string_view target_of(OperationKind kind) {
  return kTargets[static_cast<size_t>(kind)];
}

bool is_compute_bound(OperationKind kind) {
  switch (kind) {
    case OperationKind::kConv2d:
    case OperationKind::kConv2dInputGrad:
    case OperationKind::kConv2dWeightGrad:
    case OperationKind::kMm:
    case OperationKind::kAddmm:
      return true;
    default:
      return false;
  }
}

bool is_window(OperationKind kind) {
  return kind == OperationKind::kConv2d || kind == OperationKind::kMaxPool2d || kind == OperationKind::kAvgPool2d;
}

}  // namespace splitkern::memory
