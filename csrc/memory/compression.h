// Lossless compressed copies as the planner sees them: what a measurement says of a storage's values, and what a copy
// in the zero-skipping layout of kernels/copy/params.h takes. Called by graph, planner, validator and pipeline.
#pragma once

#include <cstdint>

#include "kernels/copy/params.h"

namespace splitkern::memory {

// What the coder made of real values: never assumed.
struct Compression {
  double ratio = 1;           // plain bytes over bytes on the link
  int32_t element_bytes = 1;  // of the elements whose zeros are left out: 1, 2, 4 or 8

  bool operator==(const Compression&) const = default;
};

// A storage is copied compressed where the link carries so many times less. Below that it is not worth it: the kernels
// reach 0.9 times the rate that plain copies do (bench/results, 50 % zeros: 1.62 of 1.78).
inline constexpr double kLeastCompressionRatio = 1.125;

inline constexpr int64_t kCompressedAlignment = 16;  // of a compressed buffer

inline bool is_codable(int64_t size_bytes, int32_t element_bytes) {
  return (element_bytes == 1 || element_bytes == 2 || element_bytes == 4 || element_bytes == 8) &&
         size_bytes % element_bytes == 0;
}

// Room for whatever values the storage may hold: more than the storage itself.
inline int64_t compressed_room_bytes(int64_t size_bytes, int32_t element_bytes) {
  return kernels::compressed_bytes(size_bytes / element_bytes, element_bytes);
}

}  // namespace splitkern::memory
