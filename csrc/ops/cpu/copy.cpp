// CPU bodies of the copy operators, for both tensors on the CPU: plain strided copies, and the compressed layout of
// kernels/copy/params.h, the same bytes as the CUDA kernels write. Registered in library.cpp.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "kernels/copy/host_coder.h"
#include "ops/copies.h"
#include "ops/cpu/operators.h"

namespace splitkern::cpu {

namespace {

constexpr int64_t kBytesPerThread = 1 << 16;

// Rows (innermost runs) of a walk, shared out among threads; body(host offset, device offset) in bytes.
template <class Body>
void for_each_row(const kernels::CopyWalk& walk, const Body& body) {
  const int32_t outer = walk.dims - 1;
  const int64_t row_bytes = walk.extents[outer];
  int64_t rows = 1;
  for (int32_t dim = 0; dim < outer; ++dim) rows *= walk.extents[dim];
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / row_bytes);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    int64_t coordinates[kernels::kMaxCopyDims + 1] = {};
    int64_t host = 0;
    int64_t device = 0;
    int64_t rest = first;
    for (int32_t dim = outer - 1; dim >= 0; --dim) {
      coordinates[dim] = rest % walk.extents[dim];
      rest /= walk.extents[dim];
      host += coordinates[dim] * walk.host_strides[dim];
      device += coordinates[dim] * walk.device_strides[dim];
    }
    for (int64_t row = first; row < last; ++row) {
      body(host, device);
      for (int32_t dim = outer - 1; dim >= 0; --dim) {
        host += walk.host_strides[dim];
        device += walk.device_strides[dim];
        if (++coordinates[dim] < walk.extents[dim]) break;
        host -= walk.extents[dim] * walk.host_strides[dim];
        device -= walk.extents[dim] * walk.device_strides[dim];
        coordinates[dim] = 0;
      }
    }
  });
}

// kBytes: of every row, where they are few enough for a constant to pay.
template <int64_t kBytes, bool kToHost>
void copy_rows(const kernels::CopyWalk& walk, const char* from, char* to) {
  const int64_t row_bytes = kBytes == 0 ? walk.extents[walk.dims - 1] : kBytes;
  for_each_row(walk, [&](int64_t host, int64_t device) {
    std::memcpy(to + (kToHost ? host : device), from + (kToHost ? device : host), row_bytes);
  });
}

template <bool kToHost>
void copy(const kernels::CopyWalk& walk, const Tensor& src, const Tensor& dst) {
  if (walk.dims == 0) return;
  const char* const from = static_cast<const char*>(src.const_data_ptr());
  char* const to = static_cast<char*>(dst.mutable_data_ptr());
  if (walk.dims == 1) {  // one run; nothing says that the tensors are not the same
    std::memmove(to, from, walk.extents[0]);
    return;
  }
  switch (walk.extents[walk.dims - 1]) {
    case 1:
      return copy_rows<1, kToHost>(walk, from, to);
    case 2:
      return copy_rows<2, kToHost>(walk, from, to);
    case 4:
      return copy_rows<4, kToHost>(walk, from, to);
    case 8:
      return copy_rows<8, kToHost>(walk, from, to);
    default:
      return copy_rows<0, kToHost>(walk, from, to);
  }
}

// --- Compression
// ------------------------------------------------------------------------------------------------------

// Slots are shared out among threads: body(first, last).
template <class Body>
void for_each_slot(const kernels::CompressParams& params, const Body& body) {
  constexpr int64_t kGrain = kBytesPerThread / kernels::kCompressedChunkBytes;
  const int64_t slots = kernels::compressed_chunks(params.header.count, params.header.element_size);
  torch::stable::parallel_for(0, slots, kGrain, body);
}

// Whether `order` names each dimension once.
bool is_order(uint32_t order, uint32_t dims) {
  uint32_t seen = 0;
  for (uint32_t place = 0; place < dims; ++place) seen |= 1u << (order >> (4 * place) & 15u);
  return seen == (1u << dims) - 1 && (dims == 8 || order >> (4 * dims) == 0);
}

}  // namespace

void offload(const Tensor& src, const Tensor& dst) {
  copy<true>(check_offload(src, dst), src, dst);
}

void offload_by(const Tensor& src, const Tensor& dst, StringArgument by) {
  parse_copy_method(kOffload, by);  // both are the same here
  offload(src, dst);
}

void prefetch(const Tensor& src, const Tensor& dst) {
  copy<false>(check_prefetch(src, dst), src, dst);
}

void prefetch_by(const Tensor& src, const Tensor& dst, StringArgument by) {
  parse_copy_method(kPrefetch, by);
  prefetch(src, dst);
}

void offload_compressed(const Tensor& src, const Tensor& dst) {
  const kernels::CompressParams params = check_offload_compressed(src, dst);
  unsigned char* const buffer = static_cast<unsigned char*>(dst.mutable_data_ptr());
  std::memcpy(buffer, &params.header, sizeof(params.header));
  kernels::with_element(params.header.element_size, [&](auto element) {
    using T = decltype(element);
    const T* const source = static_cast<const T*>(src.const_data_ptr());
    for_each_slot(
        params, [&](int64_t first, int64_t last) { kernels::compress_slots<T>(params, source, buffer, first, last); });
  });
}

namespace {

// "[4, 6]"
std::string extents_of(const kernels::CompressedHeader& header) {
  std::string text = "[";
  for (uint32_t dim = 0; dim < std::min<uint32_t>(header.dims, kernels::kMaxCopyDims); ++dim) {
    text += (dim > 0 ? ", " : "") + std::to_string(header.extents[dim]);
  }
  return text + "]";
}

}  // namespace

void prefetch_compressed(const Tensor& src, const Tensor& dst) {
  const kernels::CompressParams params = check_prefetch_compressed(src, dst);
  const unsigned char* const buffer = static_cast<const unsigned char*>(src.const_data_ptr());
  kernels::CompressedHeader header;
  std::memcpy(&header, buffer, sizeof(header));
  const uint32_t order = header.order;
  header.order = params.header.order;
  const bool known = std::memcmp(header.magic, params.header.magic, sizeof(header.magic)) == 0 &&
                     header.version == kernels::kCompressedVersion;
  STD_TORCH_CHECK(known, kPrefetchCompressed, ": src must begin with a version ", kernels::kCompressedVersion,
                  " header of offload_compressed, got ", header.version, " in the version's place");
  STD_TORCH_CHECK(std::memcmp(&header, &params.header, sizeof(header)) == 0 && is_order(order, header.dims),
                  kPrefetchCompressed, ": src must hold a tensor of dst's shape ", extents_of(params.header), " with ",
                  params.header.element_size, " bytes an element, got ", extents_of(header), " with ",
                  header.element_size);
  if (header.count == 0) return;
  int64_t extents[kernels::kMaxCopyDims];
  int64_t strides[kernels::kMaxCopyDims];
  for (uint32_t place = 0; place < header.dims; ++place) {
    const uint32_t dim = order >> (4 * place) & 15u;
    extents[place] = header.extents[dim];
    strides[place] = params.strides[dim];
  }
  kernels::with_element(params.header.element_size, [&](auto element) {
    using T = decltype(element);
    T* const target = static_cast<T*>(dst.mutable_data_ptr());
    for_each_slot(params, [&](int64_t first, int64_t last) {
      kernels::decompress_slots<T>(params, extents, strides, buffer, target, first, last);
    });
  });
}

}  // namespace splitkern::cpu
