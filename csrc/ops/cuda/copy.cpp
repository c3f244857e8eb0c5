// CUDA bodies of the copy operators: check, describe, launch; nothing is allocated. Called by the dispatcher, which
// chooses CUDA where one of the two tensors is a CUDA tensor.
#include "kernels/copy/copy.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>

#include "device_scope.h"
#include "operators.h"
#include "ops/copies.h"

namespace splitkern::cuda {

namespace {

// The first and the last byte of a tensor with elements, from its lowest address on; strides are not negative.
int64_t span_bytes(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return (last + 1) * tensor.element_size();
}

void* mapped(const char* operation, const char* argument, const Tensor& host, int64_t size_bytes) {
  void* const address = kernels::mapped_host_memory(host.const_data_ptr(), size_bytes);
  STD_TORCH_CHECK(address != nullptr, operation, ": ", argument,
                  " must be pinned host memory (tensor.pin_memory()), got pageable memory");
  return address;
}

void run_offload(const Tensor& src, const Tensor& dst, kernels::CopyMethod method) {
  const kernels::CopyWalk walk = check_offload(src, dst);
  if (walk.dims == 0) return;
  const DeviceScope device(src);
  void* const host = mapped(kOffload, "dst", dst, span_bytes(dst));
  kernels::launch_offload(walk, src.const_data_ptr(), host, method, device.stream());
}

void run_prefetch(const Tensor& src, const Tensor& dst, kernels::CopyMethod method) {
  const kernels::CopyWalk walk = check_prefetch(src, dst);
  if (walk.dims == 0) return;
  const DeviceScope device(dst);
  const void* const host = mapped(kPrefetch, "src", src, span_bytes(src));
  kernels::launch_prefetch(walk, host, dst.mutable_data_ptr(), method, device.stream());
}

}  // namespace

void offload(const Tensor& src, const Tensor& dst) {
  run_offload(src, dst, kernels::CopyMethod::kAuto);
}

void offload_by(const Tensor& src, const Tensor& dst, StringArgument by) {
  run_offload(src, dst, parse_copy_method(kOffload, by));
}

void prefetch(const Tensor& src, const Tensor& dst) {
  run_prefetch(src, dst, kernels::CopyMethod::kAuto);
}

void prefetch_by(const Tensor& src, const Tensor& dst, StringArgument by) {
  run_prefetch(src, dst, parse_copy_method(kPrefetch, by));
}

void offload_compressed(const Tensor& src, const Tensor& dst) {
  kernels::OffloadCompressedParams params{check_offload_compressed(src, dst)};
  const DeviceScope device(src);
  params.device = const_cast<void*>(src.const_data_ptr());
  params.host = mapped(kOffloadCompressed, "dst", dst, dst.numel());
  kernels::launch_offload_compressed(params, device.stream());
}

void prefetch_compressed(const Tensor& src, const Tensor& dst) {
  kernels::PrefetchCompressedParams params{check_prefetch_compressed(src, dst)};
  if (params.header.count == 0) return;
  const DeviceScope device(dst);
  params.device = dst.mutable_data_ptr();
  params.host = mapped(kPrefetchCompressed, "src", src, src.numel());
  kernels::launch_prefetch_compressed(params, device.stream());
}

}  // namespace splitkern::cuda

// What an offload or prefetch between such tensors would use, and why, as text: for splitkern/ops/copy.py, through
// ctypes. No device is needed. `dims` extents of more than 1, at most kMaxCopyDims; strides in bytes.
extern "C" __attribute__((visibility("default"))) void splitkern_explain_copy(int64_t element_size, int64_t dims,
                                                                              const int64_t* extents,
                                                                              const int64_t* host_strides,
                                                                              const int64_t* device_strides, char* text,
                                                                              int64_t size_bytes) {
  using namespace splitkern;
  std::vector<CopyDim> list;
  for (int64_t dim = 0; dim < dims; ++dim) list.push_back({extents[dim], host_strides[dim], device_strides[dim]});
  const std::string reason =
      kernels::choose_copy(kOffload, walk_of(list, element_size), kernels::CopyMethod::kAuto).reason;
  const size_t length = std::min(reason.size(), static_cast<size_t>(std::max<int64_t>(size_bytes, 1) - 1));
  std::copy_n(reason.data(), length, text);
  text[length] = '\0';
}

// The slots [begin_slot, end_slot) of a compressed block of plain device memory, to or from pinned host memory, on a
// stream: for the copy pipeline (csrc/memory/cuda/stream_backend.h), which has no kernels of its own. 0, or 1 with a
// text.
extern "C" __attribute__((visibility("default"))) int32_t splitkern_copy_slots(
    int32_t to_host, void* device, void* host, int64_t elements, int32_t element_bytes, int64_t begin_slot,
    int64_t end_slot, int32_t device_index, void* stream, char* text, int64_t text_bytes) {
  using namespace splitkern;
  try {
    const auto describe = [&](auto params) {
      static_cast<kernels::CompressParams&>(params) = kernels::contiguous_compression(elements, element_bytes);
      params.first_slot = begin_slot;
      params.end_slot = end_slot;
      params.device = device;
      params.host = kernels::mapped_host_memory(host, kernels::compressed_bytes(elements, element_bytes));
      if (params.host == nullptr)
        throw std::runtime_error(std::string(params.kOperator) + ": host memory must be pinned");
      return params;
    };
    kernels::use_device(device_index);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (to_host != 0) {
      kernels::launch_offload_compressed(describe(kernels::OffloadCompressedParams{}), cuda_stream);
    } else {
      kernels::launch_prefetch_compressed(describe(kernels::PrefetchCompressedParams{}), cuda_stream);
    }
    return 0;
  } catch (const std::exception& error) {
    const std::string_view what = error.what();
    const size_t length = std::min(what.size(), static_cast<size_t>(std::max<int64_t>(text_bytes, 1) - 1));
    std::copy_n(what.data(), length, text);
    text[length] = '\0';
    return 1;
  }
}
