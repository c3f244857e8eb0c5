// Test library: the schemas and the bodies of csrc/ops/cuda once more, in a namespace of their own (namespace.h) under
// the CPU key, so that the tests run the very same describe, launch and kernel code on CPU tensors.
#include <torch/csrc/stable/library.h>

#include "namespace.h"
#include "ops/cuda/register_bodies.h"
#include "ops/schemas.h"

namespace splitkern::host_execution {
namespace {

using torch::stable::detail::StableLibrary;
using torch::stable::detail::StableTorchLibraryInit;

// What STABLE_TORCH_LIBRARY and STABLE_TORCH_LIBRARY_IMPL expand to, which take a literal name only. In this order, and
// kNamespace is there before any initialiser runs.
const StableTorchLibraryInit schemas(StableLibrary::Kind::DEF, &define_schemas, kNamespace, nullptr, __FILE__,
                                     __LINE__);
const StableTorchLibraryInit bodies(StableLibrary::Kind::IMPL, &cuda::register_bodies, kNamespace, "CPU", __FILE__,
                                    __LINE__);

}  // namespace
}  // namespace splitkern::host_execution
