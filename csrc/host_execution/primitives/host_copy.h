// Stand-ins for copy engines and pinned memory on the CPU, for the tests: every byte of host memory counts as pinned.
// Included by primitives.h alone.
#pragma once

#include <cstring>

#include "host.h"

#define SPLITKERN_ROLLED

namespace splitkern::kernels {

struct CopyBox {
  size_t row_bytes;
  size_t height;
  size_t depth;
  size_t from_pitch;
  size_t to_pitch;
  size_t from_slice_pitches;
  size_t to_slice_pitches;
};

// Refuses what the CUDA runtime refuses, so that the boxes the launcher makes are tested as well.
inline void engine_copy(const CopyBox& box, const void* from, void* to, bool, cudaStream_t, const char* operation) {
  const bool rows_fit =
      box.height * box.depth == 1 || (box.from_pitch >= box.row_bytes && box.to_pitch >= box.row_bytes);
  const bool slices_fit =
      box.depth == 1 || (box.from_slice_pitches >= box.height && box.to_slice_pitches >= box.height);
  if (!rows_fit || !slices_fit) {
    throw std::runtime_error(std::string(operation) + ": a box for the copy engine has overlapping rows or slices");
  }
  for (size_t slice = 0; slice < box.depth; ++slice) {
    for (size_t row = 0; row < box.height; ++row) {
      std::memcpy(static_cast<char*>(to) + (slice * box.to_slice_pitches + row) * box.to_pitch,
                  static_cast<const char*>(from) + (slice * box.from_slice_pitches + row) * box.from_pitch,
                  box.row_bytes);
    }
  }
}

inline void* mapped_host_address(const void* host) {
  return const_cast<void*>(host);
}

}  // namespace splitkern::kernels
