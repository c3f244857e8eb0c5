// Compressed copies on the host: slots of the layout of kernels/copy/params.h, of blocks of plain memory. Called by the
// backends of the copy pipeline; the bytes are those that the operators and the kernels write.
#pragma once

#include <cstdint>

#include "memory/pipeline/stream_backend.h"

namespace splitkern::memory {

// Codes the slots, and the header with the first of them. Returns the bytes that crossed the link for them.
int64_t compress(void* buffer, const void* source, const CompressedSlots& slots);

// Throws StreamFailed where `buffer` does not begin with the header of such a block. Nothing outside the slots is read,
// and nothing outside their elements written.
void decompress(void* destination, const void* buffer, const CompressedSlots& slots);

// Bytes of the elements in these slots.
int64_t plain_bytes_of(const CompressedSlots& slots);

// What compress() returned, read from the buffer again: for slots that something else has written.
int64_t link_bytes_of(const void* buffer, const CompressedSlots& slots);

}  // namespace splitkern::memory
