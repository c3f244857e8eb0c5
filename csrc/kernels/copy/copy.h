// Launchers of the copy operators: strided device memory to and from pinned host memory, on the copy engines or by a
// kernel. Called by csrc/ops/cuda/copy.cpp with checked arguments and the device current.
#pragma once

#include <string>

#include "../launchers.h"
#include "params.h"

namespace splitkern::kernels {

// What measurement on a GPU decides. Plain process-wide values.
struct CopyTuning {
  int32_t engine_row_bytes = 2048;  // shorter rows go to the kernel: an engine spends a fixed time per row
  int32_t copy_blocks = 8;          // at most, of each kernel
  int32_t compress_blocks = 12;
  int32_t decompress_blocks = 12;
};
CopyTuning& copy_tuning();

struct CopyChoice {
  bool engine;
  std::string reason;
};

// The one place that decides between copy engine and kernel. Throws where the engine was asked for and would need more
// calls than make sense.
CopyChoice choose_copy(const char* operation, const CopyWalk& walk, CopyMethod method);

// The address at which the device reaches so many bytes of host memory; null unless all of them are pinned.
void* mapped_host_memory(const void* host, int64_t size_bytes);

// `host` as mapped_host_memory returned it: the copy engines take it like the host's own address.
void launch_offload(const CopyWalk& walk, const void* device, void* host, CopyMethod method, cudaStream_t stream);
void launch_prefetch(const CopyWalk& walk, const void* host, void* device, CopyMethod method, cudaStream_t stream);

void launch_offload_compressed(const OffloadCompressedParams& params, cudaStream_t stream);
// A buffer whose header is not the expected one fills the device tensor with 0xff bytes (NaN in every floating type).
// Whatever the buffer holds, nothing outside it is read and nothing outside the tensor written.
void launch_prefetch_compressed(const PrefetchCompressedParams& params, cudaStream_t stream);

}  // namespace splitkern::kernels

// Sets the tuning from outside the library, before the calls that it is meant for; negative values: as built in.
extern "C" __attribute__((visibility("default"))) void splitkern_tune_copy(int32_t engine_row_bytes,
                                                                           int32_t copy_blocks, int32_t compress_blocks,
                                                                           int32_t decompress_blocks);
