// Test library: the schemas and the bodies of csrc/ops/cuda once more, in a namespace of their own under
// the CPU key, so that the tests run the very same describe, launch and kernel code on CPU tensors.
// SPLITKERN_HOST_NAMESPACE may name another namespace, for tests that load several builds at once.
#include <torch/csrc/stable/library.h>

#include "ops/cuda/register_bodies.h"
#include "ops/schemas.h"

#ifndef SPLITKERN_HOST_NAMESPACE
#define SPLITKERN_HOST_NAMESPACE splitkern_host
#endif

// One more step, so that the macro's value and not its name becomes the namespace.
#define SPLITKERN_DEFINE(name, library) STABLE_TORCH_LIBRARY(name, library)
#define SPLITKERN_IMPLEMENT(name, library) STABLE_TORCH_LIBRARY_IMPL(name, CPU, library)

SPLITKERN_DEFINE(SPLITKERN_HOST_NAMESPACE, library) {
  splitkern::define_schemas(library);
}

SPLITKERN_IMPLEMENT(SPLITKERN_HOST_NAMESPACE, library) {
  splitkern::cuda::register_bodies(library);
}
