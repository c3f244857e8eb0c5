// From checked tensors and geometry to the parameter structs of csrc/kernels. Used by the operator
// bodies of this folder. Everything a struct holds in 32 bits is range-checked here.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/params.h"

namespace splitkern::cuda {

using IntList = std::vector<int64_t>;

// A value that kernels keep in 32 bits; larger ones are refused by name.
int32_t to_int32(const char* operation, const char* what, int64_t value);

kernels::ElementType element_type(const char* operation, const torch::stable::Tensor& tensor);

kernels::Strides4 strides_of(const torch::stable::Tensor& tensor);

// True where neighbouring threads should take neighbouring channels to touch neighbouring addresses.
bool channels_fastest(const torch::stable::Tensor& tensor);

kernels::WindowAxis window_axis(const char* operation, int64_t kernel, int64_t stride, int64_t padding,
                                int64_t dilation);

// The patches of a call, cut into runs that fit a parameter struct: one launch each, usually one.
std::vector<kernels::PatchGrid> patch_grids(const char* operation, const IntList& in_rows, const IntList& in_cols,
                                            const IntList& out_rows, const IntList& out_cols);

// Number of shares to cut a reduction into: enough that `results` times it keeps a device busy, at most
// one per term, and the same on every device, so that results do not depend on it.
int32_t reduction_segments(int64_t results, int64_t terms);

}  // namespace splitkern::cuda
