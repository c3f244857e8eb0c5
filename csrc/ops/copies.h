// Arguments of the copy operators: checked, and described as plain strides (kernels/copy/params.h). Shared by the CPU
// and the CUDA bodies. Python's twin is splitkern/ops/copy.py.
#pragma once

#include "kernels/copy/params.h"
#include "ops/arguments.h"

namespace splitkern {

inline constexpr const char* kOffload = "splitkern::offload";
inline constexpr const char* kPrefetch = "splitkern::prefetch";
inline constexpr const char* kOffloadCompressed = "splitkern::offload_compressed";
inline constexpr const char* kPrefetchCompressed = "splitkern::prefetch_compressed";

// One dimension of a pair of tensors, strides in bytes.
struct CopyDim {
  int64_t extent;
  int64_t host_stride;
  int64_t device_stride;
};

// Of at most kMaxCopyDims dimensions, in any order, without extents of 0 or 1.
kernels::CopyWalk walk_of(std::vector<CopyDim> dims, int64_t element_size);

// Of tensors without elements: a walk without dimensions.
kernels::CopyWalk check_offload(const Tensor& src, const Tensor& dst);
kernels::CopyWalk check_prefetch(const Tensor& src, const Tensor& dst);

// Reads and frees `by`.
kernels::CopyMethod parse_copy_method(const char* operation, StringArgument by);

// Header, walk and strides of the device tensor; pointers are the caller's. An empty tensor has a header too.
kernels::CompressParams check_offload_compressed(const Tensor& src, const Tensor& dst);
kernels::CompressParams check_prefetch_compressed(const Tensor& src, const Tensor& dst);

}  // namespace splitkern
