// See device_scope.h. The library links libtorch_cpu alone, so that it also loads beside a CPU-only
// torch; PyTorch's current stream is therefore looked up by name in the CUDA part of torch, which is in
// the process whenever a CUDA tensor is.
#include "device_scope.h"

#include <torch/headeronly/util/Exception.h>

#ifndef SPLITKERN_HOST_EXECUTION
#include <dlfcn.h>
#endif

namespace splitkern::cuda {

#ifndef SPLITKERN_HOST_EXECUTION

namespace {

using GetCurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

GetCurrentStream find_get_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  STD_TORCH_CHECK(library != nullptr,
                  "splitkern: a CUDA tensor needs torch's CUDA library libtorch_cuda.so in the process, and it is not "
                  "loaded");
  void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(symbol != nullptr,
                  "splitkern: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream; torch 2.11 to 2.13 has it");
  return reinterpret_cast<GetCurrentStream>(symbol);
}

}  // namespace

DeviceScope::DeviceScope(const torch::stable::Tensor& tensor) {
  const int32_t device_index = tensor.get_device_index();
  guard_.emplace(device_index);
  kernels::use_device(device_index);
  static const GetCurrentStream get_current_stream = find_get_current_stream();
  void* stream = nullptr;
  STD_TORCH_CHECK(get_current_stream(device_index, &stream) == AOTI_TORCH_SUCCESS,
                  "splitkern: torch gave no current stream for device ", device_index);
  stream_ = static_cast<cudaStream_t>(stream);
}

#else

DeviceScope::DeviceScope(const torch::stable::Tensor&) {}

#endif

}  // namespace splitkern::cuda
