// The device of the CUDA runtime that is linked into this library. Called by csrc/ops/cuda before it
// allocates and launches.
#include "launchers.h"
#include "primitives.h"

namespace splitkern::kernels {

#ifndef SPLITKERN_HOST_EXECUTION
void use_device(int device_index) {
  check_cuda(cudaSetDevice(device_index), "splitkern: selecting the device");
}
#else
void use_device(int) {}
#endif

}  // namespace splitkern::kernels
