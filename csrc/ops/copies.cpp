// See copies.h.
#include "copies.h"

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>

namespace splitkern {

namespace {

std::string show_shape(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) text << (dim == 0 ? "" : ", ") << tensor.size(dim);
  text << ']';
  return text.str();
}

const char* name_of(const Tensor& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

void check_defined(const char* operation, const Tensor& src, const Tensor& dst) {
  STD_TORCH_CHECK(src.defined(), operation, ": src must be a Tensor, got None");
  STD_TORCH_CHECK(dst.defined(), operation, ": dst must be a Tensor, got None");
}

void check_host(const char* operation, const char* argument, const Tensor& host) {
  STD_TORCH_CHECK(host.is_cpu(), operation, ": ", argument, " must be a host (CPU) tensor, got one on ",
                  host.is_cuda() ? "cuda:" : "device ", host.get_device_index());
}

kernels::CopyWalk check_copy(const char* operation, const Tensor& src, const Tensor& dst, const Tensor& host,
                             const Tensor& device) {
  STD_TORCH_CHECK(src.scalar_type() == dst.scalar_type(), operation, ": dst must have src's type ", name_of(src),
                  ", got ", name_of(dst));
  bool same_shape = src.dim() == dst.dim();
  for (int64_t dim = 0; same_shape && dim < src.dim(); ++dim) same_shape = src.size(dim) == dst.size(dim);
  STD_TORCH_CHECK(same_shape, operation, ": dst must have src's shape ", show_shape(src), ", got ", show_shape(dst));
  check_written(operation, "dst", dst);

  if (src.numel() == 0) return {};
  const int64_t element_size = src.element_size();
  std::vector<CopyDim> dims;
  for (int64_t dim = 0; dim < src.dim(); ++dim) {
    if (src.size(dim) == 1) continue;
    dims.push_back({src.size(dim), host.stride(dim) * element_size, device.stride(dim) * element_size});
  }
  STD_TORCH_CHECK(dims.size() <= kernels::kMaxCopyDims, operation, ": src must have at most ", kernels::kMaxCopyDims,
                  " dimensions of more than 1, got shape ", show_shape(src));
  return walk_of(std::move(dims), element_size);
}

kernels::CompressParams check_compressed(const char* operation, const Tensor& device, const char* device_argument,
                                         const Tensor& host, const char* host_argument) {
  check_host(operation, host_argument, host);
  const int64_t element_size = device.element_size();
  STD_TORCH_CHECK(element_size == 1 || element_size == 2 || element_size == 4 || element_size == 8, operation, ": ",
                  device_argument, " must have elements of 1, 2, 4 or 8 bytes, got ", name_of(device));
  STD_TORCH_CHECK(device.dim() <= kernels::kMaxCopyDims, operation, ": ", device_argument, " must have at most ",
                  kernels::kMaxCopyDims, " dimensions, got shape ", show_shape(device));
  STD_TORCH_CHECK(host.scalar_type() == ScalarType::Byte, operation, ": ", host_argument,
                  " must be of type uint8, got ", name_of(host));
  STD_TORCH_CHECK(host.dim() == 1 && (host.size(0) < 2 || host.stride(0) == 1), operation, ": ", host_argument,
                  " must have 1 dimension of stride 1, got shape ", show_shape(host));
  const int64_t wanted_bytes = kernels::compressed_bytes(device.numel(), element_size);
  STD_TORCH_CHECK(host.numel() >= wanted_bytes, operation, ": ", host_argument, " must have at least ", wanted_bytes,
                  " bytes for shape ", show_shape(device), " of ", name_of(device), ", got ", host.numel());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(host.const_data_ptr()) % 16 == 0, operation, ": ", host_argument,
                  " must begin at a multiple of 16 bytes, got storage offset ", host.storage_offset());

  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(device.const_data_ptr()) % element_size == 0, operation, ": ",
                  device_argument, " must begin at a multiple of its element size ", element_size);

  std::vector<int32_t> order;
  for (int32_t dim = 0; dim < static_cast<int32_t>(device.dim()); ++dim) order.push_back(dim);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    if (device.size(a) == 1 || device.size(b) == 1) return device.size(a) == 1 && device.size(b) != 1;
    return device.stride(a) > device.stride(b);
  });

  kernels::CompressParams params{};
  kernels::CompressedHeader& header = params.header;
  std::copy(std::begin(kernels::kCompressedMagic), std::end(kernels::kCompressedMagic), header.magic);
  header.version = kernels::kCompressedVersion;
  header.element_size = static_cast<uint32_t>(element_size);
  header.count = device.numel();
  header.chunk_bytes = static_cast<uint32_t>(kernels::kCompressedChunkBytes);
  header.dims = static_cast<uint32_t>(device.dim());
  for (size_t place = 0; place < order.size(); ++place) {
    const int32_t dim = order[place];
    header.order |= static_cast<uint32_t>(dim) << (4 * place);
    header.extents[dim] = device.size(dim);
    params.strides[dim] = device.stride(dim);
  }

  kernels::UnitWalk& walk = params.walk;
  if (header.count == 0) {
    walk.dims = 1;  // of extent 0
    return params;
  }
  for (const int32_t dim : order) {
    if (device.size(dim) == 1) continue;
    const int32_t last = walk.dims - 1;
    if (walk.dims > 0 && walk.device_strides[last] == device.size(dim) * device.stride(dim)) {
      walk.extents[last] *= device.size(dim);
      walk.device_strides[last] = device.stride(dim);
    } else {
      walk.extents[walk.dims] = device.size(dim);
      walk.device_strides[walk.dims] = device.stride(dim);
      ++walk.dims;
    }
  }
  if (walk.dims == 0) {
    walk.extents[0] = walk.device_strides[0] = 1;
    walk.dims = 1;
  }
  return params;
}

}  // namespace

kernels::CopyWalk walk_of(std::vector<CopyDim> dims, int64_t element_size) {
  kernels::CopyWalk walk{};
  std::stable_sort(dims.begin(), dims.end(), [](const CopyDim& a, const CopyDim& b) {
    return a.host_stride != b.host_stride ? a.host_stride > b.host_stride : a.device_stride > b.device_stride;
  });
  dims.push_back({element_size, 1, 1});

  for (const CopyDim& dim : dims) {
    if (walk.dims > 0) {
      const int32_t last = walk.dims - 1;
      if (walk.host_strides[last] == dim.extent * dim.host_stride &&
          walk.device_strides[last] == dim.extent * dim.device_stride) {
        walk.extents[last] *= dim.extent;
        walk.host_strides[last] = dim.host_stride;
        walk.device_strides[last] = dim.device_stride;
        continue;
      }
    }
    walk.extents[walk.dims] = dim.extent;
    walk.host_strides[walk.dims] = dim.host_stride;
    walk.device_strides[walk.dims] = dim.device_stride;
    ++walk.dims;
  }
  return walk;
}

kernels::CopyWalk check_offload(const Tensor& src, const Tensor& dst) {
  check_defined(kOffload, src, dst);
  check_host(kOffload, "dst", dst);
  return check_copy(kOffload, src, dst, dst, src);
}

kernels::CopyWalk check_prefetch(const Tensor& src, const Tensor& dst) {
  check_defined(kPrefetch, src, dst);
  check_host(kPrefetch, "src", src);
  return check_copy(kPrefetch, src, dst, src, dst);
}

kernels::CopyMethod parse_copy_method(const char* operation, StringArgument by) {
  size_t length = 0;
  const char* characters = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(by.handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(by.handle, &characters));
  const std::string name(characters, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(by.handle));
  if (name == "auto") return kernels::CopyMethod::kAuto;
  if (name == "engine") return kernels::CopyMethod::kEngine;
  if (name == "kernel") return kernels::CopyMethod::kKernel;
  STD_TORCH_CHECK(false, operation, ": by must be 'auto', 'engine' or 'kernel', got '", name, "'");
}

kernels::CompressParams check_offload_compressed(const Tensor& src, const Tensor& dst) {
  check_defined(kOffloadCompressed, src, dst);
  return check_compressed(kOffloadCompressed, src, "src", dst, "dst");
}

kernels::CompressParams check_prefetch_compressed(const Tensor& src, const Tensor& dst) {
  check_defined(kPrefetchCompressed, src, dst);
  check_written(kPrefetchCompressed, "dst", dst);
  return check_compressed(kPrefetchCompressed, dst, "dst", src, "src");
}

}  // namespace splitkern
