#include "memory/pipeline/zero_coder.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/copy/host_coder.h"

namespace splitkern::memory {
namespace {

kernels::CompressParams params_of(const CompressedSlots& slots) {
  return kernels::contiguous_compression(slots.elements, slots.element_bytes);
}

int64_t header_bytes(const CompressedSlots& slots) {
  return slots.begin == 0 ? static_cast<int64_t>(sizeof(kernels::CompressedHeader)) : 0;
}

}  // namespace

int64_t compress(void* buffer, const void* source, const CompressedSlots& slots) {
  const kernels::CompressParams params = params_of(slots);
  auto* const bytes = static_cast<unsigned char*>(buffer);
  if (slots.begin == 0) std::memcpy(bytes, &params.header, sizeof(params.header));
  return header_bytes(slots) + kernels::with_element(params.header.element_size, [&](auto element) {
           using T = decltype(element);
           return kernels::compress_slots<T>(params, static_cast<const T*>(source), bytes, slots.begin, slots.end);
         });
}

void decompress(void* destination, const void* buffer, const CompressedSlots& slots) {
  const kernels::CompressParams params = params_of(slots);
  const auto* const bytes = static_cast<const unsigned char*>(buffer);
  if (std::memcmp(bytes, &params.header, sizeof(params.header)) != 0) {
    throw StreamFailed("the host slot does not begin with the header of " + std::to_string(slots.elements) +
                       " compressed elements of " + std::to_string(slots.element_bytes) + " bytes");
  }
  kernels::with_element(params.header.element_size, [&](auto element) {
    using T = decltype(element);
    kernels::decompress_slots<T>(params, params.walk.extents, params.walk.device_strides, bytes,
                                 static_cast<T*>(destination), slots.begin, slots.end);
  });
}

int64_t plain_bytes_of(const CompressedSlots& slots) {
  const int64_t all = slots.elements * slots.element_bytes;
  return std::min(slots.end * kernels::kCompressedChunkBytes, all) - slots.begin * kernels::kCompressedChunkBytes;
}

int64_t link_bytes_of(const void* buffer, const CompressedSlots& slots) {
  return header_bytes(slots) + kernels::with_element(static_cast<uint32_t>(slots.element_bytes), [&](auto element) {
           return kernels::link_bytes_of_slots<decltype(element)>(static_cast<const unsigned char*>(buffer),
                                                                  slots.begin, slots.end);
         });
}

}  // namespace splitkern::memory
