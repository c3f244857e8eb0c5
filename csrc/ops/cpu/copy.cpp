// CPU bodies of the copy operators, for both tensors on the CPU: plain strided copies, and the compressed layout of
// kernels/copy/params.h, the same bytes as the CUDA kernels write. Registered in library.cpp.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstring>

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

// The place in the tensor of consecutive elements of a buffer.
class Cursor {
 public:
  // Dimensions outermost first, each with its extent and stride in elements.
  Cursor(const int64_t* extents, const int64_t* strides, int32_t dims, int64_t index)
      : extents_(extents), strides_(strides), dims_(dims) {
    for (int32_t dim = dims - 1; dim >= 0; --dim) {
      coordinates_[dim] = index % extents[dim];
      index /= extents[dim];
      offset_ += coordinates_[dim] * strides[dim];
    }
  }

  int64_t offset() const { return offset_; }

  void step() {
    for (int32_t dim = dims_ - 1; dim >= 0; --dim) {
      offset_ += strides_[dim];
      if (++coordinates_[dim] < extents_[dim]) return;
      offset_ -= extents_[dim] * strides_[dim];
      coordinates_[dim] = 0;
    }
  }

 private:
  const int64_t* extents_;
  const int64_t* strides_;
  int32_t dims_;
  int64_t coordinates_[kernels::kMaxCopyDims] = {};
  int64_t offset_ = 0;
};

template <class T>
struct Chunks {
  static constexpr int64_t kElements = kernels::kCompressedChunkBytes / sizeof(T);
  static constexpr int64_t kMaskBytes = kernels::compressed_mask_bytes(sizeof(T));
  static constexpr int64_t kSlotBytes = kMaskBytes + kernels::kCompressedChunkBytes;
  static constexpr int64_t kGrain = kBytesPerThread / kernels::kCompressedChunkBytes;
};

template <class T>
void compress(const kernels::CompressParams& params, const T* source, unsigned char* buffer) {
  using Sizes = Chunks<T>;
  const kernels::UnitWalk& walk = params.walk;
  const int64_t count = params.header.count;
  unsigned char* const slots = buffer + sizeof(kernels::CompressedHeader);
  std::memcpy(buffer, &params.header, sizeof(kernels::CompressedHeader));
  const int64_t chunks = kernels::compressed_chunks(count, sizeof(T));
  torch::stable::parallel_for(0, chunks, Sizes::kGrain, [&](int64_t begin, int64_t end) {
    Cursor cursor(walk.extents, walk.device_strides, walk.dims, begin * Sizes::kElements);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t elements = std::min(Sizes::kElements, count - chunk * Sizes::kElements);
      unsigned char* const mask = slots + chunk * Sizes::kSlotBytes;
      unsigned char* const values = mask + Sizes::kMaskBytes;
      std::memset(mask, 0, Sizes::kMaskBytes);
      int64_t kept = 0;
      for (int64_t i = 0; i < elements; ++i, cursor.step()) {
        const T value = source[cursor.offset()];
        if (value == 0) continue;
        mask[i / 8] = static_cast<unsigned char>(mask[i / 8] | 1u << (i % 8));
        std::memcpy(values + kept * sizeof(T), &value, sizeof(T));
        ++kept;
      }
      const int64_t used = kept * static_cast<int64_t>(sizeof(T));
      std::memset(values + used, 0, (used + 15) / 16 * 16 - used);
    }
  });
}

template <class T>
void decompress(const kernels::CompressParams& params, const int64_t* extents, const int64_t* strides,
                const unsigned char* buffer, T* target) {
  using Sizes = Chunks<T>;
  const int64_t count = params.header.count;
  const unsigned char* const slots = buffer + sizeof(kernels::CompressedHeader);
  const int64_t chunks = kernels::compressed_chunks(count, sizeof(T));
  torch::stable::parallel_for(0, chunks, Sizes::kGrain, [&](int64_t begin, int64_t end) {
    Cursor cursor(extents, strides, static_cast<int32_t>(params.header.dims), begin * Sizes::kElements);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t elements = std::min(Sizes::kElements, count - chunk * Sizes::kElements);
      const unsigned char* const mask = slots + chunk * Sizes::kSlotBytes;
      const unsigned char* values = mask + Sizes::kMaskBytes;
      for (int64_t i = 0; i < elements; ++i, cursor.step()) {
        T value{0};
        if ((mask[i / 8] >> (i % 8) & 1u) != 0) {
          std::memcpy(&value, values, sizeof(T));
          values += sizeof(T);
        }
        target[cursor.offset()] = value;
      }
    }
  });
}

template <class Body>
void dispatch_element_size(uint32_t element_size, const Body& body) {
  switch (element_size) {
    case 1:
      return body(uint8_t{});
    case 2:
      return body(uint16_t{});
    case 4:
      return body(uint32_t{});
    default:
      return body(uint64_t{});
  }
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
  dispatch_element_size(params.header.element_size, [&](auto element) {
    using T = decltype(element);
    compress<T>(params, static_cast<const T*>(src.const_data_ptr()),
                static_cast<unsigned char*>(dst.mutable_data_ptr()));
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
  dispatch_element_size(params.header.element_size, [&](auto element) {
    using T = decltype(element);
    decompress<T>(params, extents, strides, buffer, static_cast<T*>(dst.mutable_data_ptr()));
  });
}

}  // namespace splitkern::cpu
