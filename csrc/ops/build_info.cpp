// What this library was built from and for, as JSON text. splitkern/_library.py reads it through ctypes right after
// loading and refuses a library whose version is not the Python package's. CMakeLists.txt passes the SPLITKERN_ texts.

#include <torch/headeronly/version.h>

extern "C" __attribute__((visibility("default"))) const char* splitkern_build_info() {
  // TORCH_TARGET_VERSION holds major, minor and patch in its upper three bytes.
  static_assert(TORCH_TARGET_VERSION == 0x020b000000000000ULL, "torch_target below must name this version");
  // clang-format off
  return "{\"version\": \"" SPLITKERN_VERSION "\", "
         "\"cuda_architectures\": \"" SPLITKERN_CUDA_ARCHITECTURES "\", "
         "\"cuda_compiler\": \"" SPLITKERN_CUDA_COMPILER "\", "
         "\"cxx_compiler\": \"" SPLITKERN_CXX_COMPILER "\", "
         "\"torch_target\": \"2.11\", "
         "\"torch_headers\": \"" TORCH_VERSION "\"}";
  // clang-format on
}
