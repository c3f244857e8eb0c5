// See describe.h.
#include "describe.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>

namespace splitkern::cuda {

namespace {

constexpr int64_t kReductionThreads = 1 << 18;

std::vector<kernels::AxisPatches> axis_runs(const char* operation, const IntList& in_bounds,
                                            const IntList& out_bounds) {
  const int64_t patches = static_cast<int64_t>(in_bounds.size()) - 1;
  std::vector<kernels::AxisPatches> runs;
  for (int64_t first = 0; first < patches; first += kernels::kMaxPatchesPerAxis) {
    kernels::AxisPatches& run = runs.emplace_back();
    run.first_patch = to_int32(operation, "the number of patches", first);
    run.patches = static_cast<int32_t>(std::min<int64_t>(patches - first, kernels::kMaxPatchesPerAxis));
    for (int32_t i = 0; i <= run.patches; ++i) {
      run.in_bounds[i] = to_int32(operation, "an input extent", in_bounds[first + i]);
      run.out_bounds[i] = to_int32(operation, "an output extent", out_bounds[first + i]);
    }
  }
  return runs;
}

}  // namespace

int32_t to_int32(const char* operation, const char* what, int64_t value) {
  STD_TORCH_CHECK(value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max(),
                  operation, ": ", what, " must lie within 32 bits for the CUDA kernels, got ", value);
  return static_cast<int32_t>(value);
}

kernels::ElementType element_type(const char* operation, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return kernels::ElementType::kFloat64;
    case ScalarType::Float:
      return kernels::ElementType::kFloat32;
    case ScalarType::Half:
      return kernels::ElementType::kFloat16;
    case ScalarType::BFloat16:
      return kernels::ElementType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, operation, ": dtype must be float64, float32, float16 or bfloat16, got scalar type ",
                      static_cast<int>(tensor.scalar_type()));
  }
}

kernels::Strides4 element_strides(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

bool channels_fastest(const Tensor& tensor) {
  return tensor.stride(1) < tensor.stride(3);
}

kernels::WindowAxis window_axis(const char* operation, const Window& window, int axis) {
  return {to_int32(operation, "kernel_size", window.kernel[axis]), to_int32(operation, "stride", window.stride[axis]),
          to_int32(operation, "padding", window.padding[axis]), to_int32(operation, "dilation", window.dilation[axis])};
}

std::vector<kernels::PatchGrid> patch_grids(const char* operation, const Bounds& bounds) {
  const std::vector<kernels::AxisPatches> row_runs = axis_runs(operation, bounds.in_rows, bounds.out_rows);
  const std::vector<kernels::AxisPatches> column_runs = axis_runs(operation, bounds.in_cols, bounds.out_cols);
  std::vector<kernels::PatchGrid> grids;
  for (const kernels::AxisPatches& rows : row_runs) {
    for (const kernels::AxisPatches& columns : column_runs) grids.push_back({rows, columns});
  }
  return grids;
}

int32_t reduction_segments(int64_t results, int64_t terms) {
  const int64_t wanted = std::max<int64_t>(1, kReductionThreads / std::max<int64_t>(results, 1));
  return static_cast<int32_t>(std::min(wanted, std::max<int64_t>(terms, 1)));
}

void describe_reduction(kernels::ConvWeightGradParams& params, int64_t batch, const Bounds& bounds, size_t grids) {
  const int64_t weight_elements = static_cast<int64_t>(params.out_channels) * params.in_channels_per_group *
                                  params.row_window.kernel * params.column_window.kernel;
  const int64_t units = batch * bounds.out_rows.back() * bounds.col_patches();
  const int64_t launches = static_cast<int64_t>(grids);
  params.segments = reduction_segments(weight_elements * launches, units / launches);
}

Tensor new_workspace(const Tensor& like, int64_t elements) {
  const ScalarType type = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return new_flat(like, elements, type);
}

Workspace::Workspace(const Tensor& like, int64_t size_bytes) {
  if (size_bytes > 0) tensor_ = new_flat(like, size_bytes, ScalarType::Byte);
}

}  // namespace splitkern::cuda
