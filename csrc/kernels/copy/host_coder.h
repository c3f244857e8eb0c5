// Host side of the compressed layout of params.h, slot by slot: the same bytes as the kernels of compress.cu write.
// Called by the CPU bodies of the copy operators and by the copy pipeline of csrc/memory; neither torch nor CUDA here.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>

#include "params.h"

namespace splitkern::kernels {

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
  int64_t coordinates_[kMaxCopyDims] = {};
  int64_t offset_ = 0;
};

// Sizes for elements of type T (an unsigned integer of the element's size).
template <class T>
struct SlotSizes {
  static constexpr int64_t kElements = kCompressedChunkBytes / sizeof(T);
  static constexpr int64_t kMaskBytes = compressed_mask_bytes(sizeof(T));
  static constexpr int64_t kSlotBytes = kMaskBytes + kCompressedChunkBytes;
  static constexpr int64_t padded(int64_t value_bytes) { return (value_bytes + 15) / 16 * 16; }
};

// Slots [begin, end) of `buffer`, which begins with the header; the header itself is the caller's. Returns the bytes of
// these slots that cross the link: masks, and values with their padding.
template <class T>
int64_t compress_slots(const CompressParams& params, const T* source, unsigned char* buffer, int64_t begin,
                       int64_t end) {
  using Sizes = SlotSizes<T>;
  unsigned char* const slots = buffer + sizeof(CompressedHeader);
  Cursor cursor(params.walk.extents, params.walk.device_strides, params.walk.dims, begin * Sizes::kElements);
  int64_t link_bytes = 0;
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t elements = std::min(Sizes::kElements, params.header.count - slot * Sizes::kElements);
    unsigned char* const mask = slots + slot * Sizes::kSlotBytes;
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
    std::memset(values + used, 0, Sizes::padded(used) - used);
    link_bytes += Sizes::kMaskBytes + Sizes::padded(used);
  }
  return link_bytes;
}

// The reverse; `extents` and `strides` are those of the tensor in the buffer's order. Whatever the slots hold, nothing
// outside them is read.
template <class T>
void decompress_slots(const CompressParams& params, const int64_t* extents, const int64_t* strides,
                      const unsigned char* buffer, T* target, int64_t begin, int64_t end) {
  using Sizes = SlotSizes<T>;
  const unsigned char* const slots = buffer + sizeof(CompressedHeader);
  Cursor cursor(extents, strides, static_cast<int32_t>(params.header.dims), begin * Sizes::kElements);
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t elements = std::min(Sizes::kElements, params.header.count - slot * Sizes::kElements);
    const unsigned char* const mask = slots + slot * Sizes::kSlotBytes;
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
}

// What compress_slots() returned for these slots, from their masks.
template <class T>
int64_t link_bytes_of_slots(const unsigned char* buffer, int64_t begin, int64_t end) {
  using Sizes = SlotSizes<T>;
  int64_t link_bytes = 0;
  for (int64_t slot = begin; slot < end; ++slot) {
    const unsigned char* const mask = buffer + sizeof(CompressedHeader) + slot * Sizes::kSlotBytes;
    int64_t kept = 0;
    for (int64_t byte = 0; byte < Sizes::kMaskBytes; byte += 8) {
      uint64_t word = 0;
      std::memcpy(&word, mask + byte, sizeof(word));
      kept += std::popcount(word);
    }
    link_bytes += Sizes::kMaskBytes + Sizes::padded(kept * static_cast<int64_t>(sizeof(T)));
  }
  return link_bytes;
}

// `body` with a value of the unsigned type of this size: 1, 2, 4 or 8.
template <class Body>
auto with_element(uint32_t element_size, const Body& body) {
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

}  // namespace splitkern::kernels
