// Registers the bodies of this folder: splitkern::*, CUDA. The test library that executes kernels on the
// CPU compiles this file too and takes a namespace of its own, so that both can be in one process.
#include <torch/csrc/stable/library.h>

#include "register_bodies.h"

#ifndef SPLITKERN_HOST_EXECUTION
STABLE_TORCH_LIBRARY_IMPL(splitkern, CUDA, library) {
  splitkern::cuda::register_bodies(library);
}
#endif
