// What the copy operators hand to csrc/kernels/copy: where the bytes lie on both sides, and the layout of a
// compressed buffer. Filled by csrc/ops/copies.*, read by the CPU bodies too; neither torch nor CUDA here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace splitkern::kernels {

inline constexpr int kMaxCopyDims = 8;  // of a tensor, extents of 1 not counted for plain copies

// --- Plain copies
// -----------------------------------------------------------------------------------------------------

// Every byte of a pair of tensors of equal shape: dimensions outermost first, strides in bytes. The order is that of
// the host's strides, neighbours are merged where both sides allow it, and the innermost dimension runs over
// consecutive bytes of both sides. No dimensions: nothing to copy.
struct CopyWalk {
  int32_t dims;
  int64_t extents[kMaxCopyDims + 1];
  int64_t host_strides[kMaxCopyDims + 1];
  int64_t device_strides[kMaxCopyDims + 1];
};

enum class CopyMethod : int32_t { kAuto, kEngine, kKernel };

// n / d for 0 <= n < 2^31 is (n * multiplier) >> shift.
struct Divider {
  uint32_t multiplier;
  uint32_t shift;
};

// The same in units, the elements that a kernel moves. With `wide`, indices pass 2^31 and the dividers are unused.
struct UnitWalk {
  int32_t dims;
  bool wide;
  int64_t count;
  Divider dividers[kMaxCopyDims + 1];
  int64_t extents[kMaxCopyDims + 1];
  int64_t host_strides[kMaxCopyDims + 1];
  int64_t device_strides[kMaxCopyDims + 1];
};

struct CopyParams {
  UnitWalk walk;
  void* device;  // read only by an offload
  void* host;    // as the device addresses it; read only by a prefetch
};

struct OffloadParams : CopyParams {
  static constexpr const char* kOperator = "splitkern::offload";
  static constexpr bool kToHost = true;
};

struct PrefetchParams : CopyParams {
  static constexpr const char* kOperator = "splitkern::prefetch";
  static constexpr bool kToHost = false;
};

// --- Compressed copies -----------------------------------------------------------------------------------------------

// A compressed buffer, version 1, little endian:
//
//   header           128 bytes, CompressedHeader
//   slot 0, 1, ...   one per 4096 bytes of elements, in the order that the header names:
//     mask           one bit per element, bit e % 8 of byte e / 8; 0: all bits of the element are 0
//     values         the other elements, packed, zero-padded to a multiple of 16 bytes
//
// Every slot but the last takes the room of its worst case, so that its place depends on no other slot and the host
// never needs a size; what lies behind the values of a slot is not written. The last slot holds a whole mask, and room
// for the elements that are left, rounded up to 16 bytes.
inline constexpr uint32_t kCompressedMagic[2] = {0x4b4c5053u, 0x4f52455au};  // "SPLKZERO"
inline constexpr uint32_t kCompressedVersion = 1;
inline constexpr int64_t kCompressedChunkBytes = 4096;

struct CompressedHeader {
  uint32_t magic[2];
  uint32_t version;
  uint32_t element_size;  // bytes: 1, 2, 4 or 8
  int64_t count;          // elements
  uint32_t chunk_bytes;
  uint32_t dims;
  // Four bits per dimension, the lowest for the outermost in memory: its index in the shape. Elements are numbered in
  // this order, which is that of descending strides, with extents of 1 in front.
  uint32_t order;
  uint32_t reserved;
  int64_t extents[kMaxCopyDims];  // the shape, 0 behind it
  uint32_t reserved_tail[6];
};
static_assert(sizeof(CompressedHeader) == 128, "the decompressor's warp compares one word per lane");
inline constexpr uint32_t kCompressedOrderWord = offsetof(CompressedHeader, order) / 4;

constexpr int64_t compressed_mask_bytes(int64_t element_size) {
  return kCompressedChunkBytes / element_size / 8;
}

constexpr int64_t compressed_chunks(int64_t count, int64_t element_size) {
  const int64_t chunk_elements = kCompressedChunkBytes / element_size;
  return (count + chunk_elements - 1) / chunk_elements;
}

// Room for any `count` elements.
constexpr int64_t compressed_bytes(int64_t count, int64_t element_size) {
  return static_cast<int64_t>(sizeof(CompressedHeader)) +
         compressed_chunks(count, element_size) * compressed_mask_bytes(element_size) +
         (count * element_size + 15) / 16 * 16;
}

inline constexpr int64_t kAllSlots = std::numeric_limits<int64_t>::max();

struct CompressParams {
  CompressedHeader header;  // what is written, or what must be found
  // In elements and in the header's order; host strides unused. `vectors`: 16 bytes of elements from any index that is
  // a multiple of their number lie together and aligned.
  UnitWalk walk;
  bool vectors;
  int64_t strides[kMaxCopyDims];  // of the device tensor, in elements, by index in the shape
  void* device;
  void* host;
  // The slots that are moved: all of them unless told. The header is written with the first and read with any.
  int64_t first_slot = 0;
  int64_t end_slot = kAllSlots;
};

// Of `count` elements that lie one behind the other, as one dimension; addresses are the caller's.
inline CompressParams contiguous_compression(int64_t count, int64_t element_size) {
  CompressParams params{};
  params.header.magic[0] = kCompressedMagic[0];
  params.header.magic[1] = kCompressedMagic[1];
  params.header.version = kCompressedVersion;
  params.header.element_size = static_cast<uint32_t>(element_size);
  params.header.count = count;
  params.header.chunk_bytes = static_cast<uint32_t>(kCompressedChunkBytes);
  params.header.dims = 1;
  params.header.extents[0] = count;
  params.walk.dims = 1;
  params.walk.extents[0] = count;
  params.walk.device_strides[0] = params.strides[0] = 1;
  return params;
}

struct OffloadCompressedParams : CompressParams {
  static constexpr const char* kOperator = "splitkern::offload_compressed";
};

struct PrefetchCompressedParams : CompressParams {
  static constexpr const char* kOperator = "splitkern::prefetch_compressed";
};

}  // namespace splitkern::kernels
