// The operator library: schemas of splitkern::* and their CPU implementations. Static initialisers run when
// splitkern/_library.py loads the file; csrc/ops/cuda/register.cpp adds the CUDA implementations.
#include <torch/csrc/stable/library.h>

#include "ops/schemas.h"

STABLE_TORCH_LIBRARY(splitkern, library) {
  splitkern::define_schemas(library);
}
