// From checked tensors and geometry to the parameter structs of csrc/kernels. Used by the operator
// bodies of this folder. Everything a struct holds in 32 bits is range-checked here.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/params.h"
#include "ops/arguments.h"

namespace splitkern::cuda {

// A value that kernels keep in 32 bits; larger ones are refused by name.
int32_t to_int32(const char* operation, const char* what, int64_t value);

kernels::ElementType element_type(const char* operation, const Tensor& tensor);

kernels::Strides4 element_strides(const Tensor& tensor);

// True where neighbouring threads should take neighbouring channels to touch neighbouring addresses.
bool channels_fastest(const Tensor& tensor);

kernels::WindowAxis window_axis(const char* operation, const Window& window, int axis);

// The patches of a call, cut into runs that fit a parameter struct: one launch each, usually one.
std::vector<kernels::PatchGrid> patch_grids(const char* operation, const Bounds& bounds);

// Number of shares to cut a reduction into: enough that `results` times it keeps a device busy, at most
// one per term, and the same on every device, so that results do not depend on it.
int32_t reduction_segments(int64_t results, int64_t terms);

// Sets how many shares stage one of the weight gradient sums apart in each of the call's `grids`, at least one.
void describe_reduction(kernels::ConvWeightGradParams& params, int64_t batch, const Bounds& bounds, size_t grids);

// Uninitialised room for so many numbers of the accumulation type, on the device of `like`. Freed after
// the launch, for torch's allocator hands it out again only behind the work queued on the same stream.
Tensor new_workspace(const Tensor& like, int64_t elements);

// Uninitialised bytes on the device of `like`, for as long as new_workspace's. None: no allocation, null.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t size_bytes);

  void* data() const { return tensor_.has_value() ? tensor_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

}  // namespace splitkern::cuda
