// Whether a tensor of neighbouring channels can be read or written several channels at a time. Called by launchers and
// by the refusals of their paths, on the host.
#pragma once

#include <cstdint>
#include <string>

#include "params.h"

namespace splitkern::kernels {

// Of a tensor, as far as a launch reaches: strides of extents of one do not count.
struct Extents {
  int32_t batch;
  int32_t channels;
  int32_t rows;
  int32_t columns;
};

// Empty where `elements` neighbouring channels, aligned to `bytes`, are one access everywhere; else why not.
inline std::string vector_refusal(const char* name, const void* address, const Strides4& strides,
                                  const Extents& extents, int64_t elements, uintptr_t bytes) {
  if (extents.channels % elements != 0) {
    return std::string(name) + " has " + std::to_string(extents.channels) + " channels, not a multiple of " +
           std::to_string(elements);
  }
  if (strides.channel != 1 && extents.channels > 1) {
    return std::string(name) + "'s channel stride is " + std::to_string(strides.channel) + ", not 1";
  }
  const auto aligned = [&](int64_t stride, int32_t extent) { return extent <= 1 || stride % elements == 0; };
  if (!aligned(strides.batch, extents.batch) || !aligned(strides.row, extents.rows) ||
      !aligned(strides.column, extents.columns) || reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    return std::string(name) + "'s pixels are not aligned to " + std::to_string(bytes) + " bytes";
  }
  return {};
}

}  // namespace splitkern::kernels
