// Whether fp32 convolutions may round their operands to tf32: PyTorch's setting, which the stable ABI does not
// show, so that the Python package registers a function that reads it. Asked by conv.cpp.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace splitkern::cuda {

// True for fp32 where the user's setting allows it; never asks for another type, false while nothing is registered.
bool allows_tf32(kernels::ElementType type);

}  // namespace splitkern::cuda

// `query` returns 0 or 1, may be called from any thread, and must stay callable until it is replaced. Null: none.
extern "C" __attribute__((visibility("default"))) void splitkern_set_tf32_query(int32_t (*query)());
