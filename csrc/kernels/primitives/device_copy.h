// Copy engines and pinned host memory on a GPU. Included by primitives.h alone.
#pragma once

#include "device.h"

// In front of a loop that is not worth the code of unrolling.
#define SPLITKERN_ROLLED _Pragma("unroll 1")

namespace splitkern::kernels {

// `depth` slices of `height` rows of `row_bytes`. Pitches are the distances of rows in bytes; slices lie so many
// pitches apart.
struct CopyBox {
  size_t row_bytes;
  size_t height;
  size_t depth;
  size_t from_pitch;
  size_t to_pitch;
  size_t from_slice_pitches;
  size_t to_slice_pitches;
};

inline void engine_copy(const CopyBox& box, const void* from, void* to, bool to_host, cudaStream_t stream,
                        const char* operation, std::source_location where = std::source_location::current()) {
  const cudaMemcpyKind kind = to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
  if (box.height == 1 && box.depth == 1) {
    check_cuda(cudaMemcpyAsync(to, from, box.row_bytes, kind, stream), operation, where);
    return;
  }
  if (box.depth == 1) {
    check_cuda(cudaMemcpy2DAsync(to, box.to_pitch, from, box.from_pitch, box.row_bytes, box.height, kind, stream),
               operation, where);
    return;
  }
  cudaMemcpy3DParms copy{};
  copy.srcPtr = make_cudaPitchedPtr(const_cast<void*>(from), box.from_pitch, box.row_bytes, box.from_slice_pitches);
  copy.dstPtr = make_cudaPitchedPtr(to, box.to_pitch, box.row_bytes, box.to_slice_pitches);
  copy.extent = make_cudaExtent(box.row_bytes, box.height, box.depth);
  copy.kind = kind;
  check_cuda(cudaMemcpy3DAsync(&copy, stream), operation, where);
}

// The device's address of one byte of pinned host memory, else null.
inline void* mapped_host_address(const void* host) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, host) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return nullptr;
  }
  return attributes.type == cudaMemoryTypeHost ? attributes.devicePointer : nullptr;
}

}  // namespace splitkern::kernels
