// Tensor maps of the Hopper path, encoded by the driver. Called by its launchers on the host; the driver is reached
// through the runtime, so that nothing links against libcuda and a machine without a driver still loads the library.
#include "../primitives.h"

#ifndef SPLITKERN_HOST_EXECUTION

namespace splitkern::kernels {
namespace {

using EncodeIm2col = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                  const cuuint64_t*, const int*, const int*, cuuint32_t, cuuint32_t, const cuuint32_t*,
                                  CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                  CUtensorMapFloatOOBfill);
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

constexpr unsigned kDriverVersion = 12000;  // the first that knows tensor maps

void* driver_function(const char* name, const char* operation) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check_cuda(cudaGetDriverEntryPointByVersion(name, &function, kDriverVersion, cudaEnableDefault, &found), operation);
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error(std::string(operation) + ": the CUDA driver has no " + name +
                             "; it must be of CUDA 12.0 or newer");
  }
  return function;
}

CUtensorMapDataType data_type(ElementType type, const char* operation) {
  switch (type) {
    case ElementType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case ElementType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case ElementType::kFloat32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case ElementType::kFloat64:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
  }
  throw std::runtime_error(std::string(operation) + ": element type " + std::to_string(static_cast<int32_t>(type)) +
                           " has no tensor map");
}

CUtensorMapSwizzle swizzle_mode(Swizzle swizzle) {
  constexpr CUtensorMapSwizzle kModes[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                           CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  return kModes[static_cast<int32_t>(swizzle)];
}

// "[1, 2, 3]"
template <class Value>
std::string list(const Value* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

[[noreturn]] void refuse(const char* operation, const char* kind, CUresult result, const std::string& arguments) {
  throw std::runtime_error(std::string(operation) + ": the driver refused " + kind + " tensor map with error " +
                           std::to_string(static_cast<int>(result)) + ": " + arguments);
}

}  // namespace

TensorMap encode(const Im2colMap& arguments, const char* operation) {
  static const auto encode_im2col =
      reinterpret_cast<EncodeIm2col>(driver_function("cuTensorMapEncodeIm2col", operation));
  const int rank = arguments.patches == 0 ? 4 : 5;
  cuuint64_t extents[] = {static_cast<cuuint64_t>(arguments.channels), static_cast<cuuint64_t>(arguments.columns),
                          static_cast<cuuint64_t>(arguments.rows), static_cast<cuuint64_t>(arguments.images), 0};
  cuuint64_t strides[] = {static_cast<cuuint64_t>(arguments.column_stride_bytes),
                          static_cast<cuuint64_t>(arguments.row_stride_bytes),
                          static_cast<cuuint64_t>(arguments.image_stride_bytes), 0};
  if (rank == 5) {
    extents[4] = extents[3];
    strides[3] = strides[2];
    extents[3] = static_cast<cuuint64_t>(arguments.patches);
    strides[2] = static_cast<cuuint64_t>(arguments.patch_stride_bytes);
  }
  // Like the extents from the innermost dimension on, whatever the driver's documentation says.
  const int lower[] = {arguments.lower_column, arguments.lower_row, 0};
  const int upper[] = {arguments.upper_column, arguments.upper_row, 0};
  const cuuint32_t steps[] = {1, static_cast<cuuint32_t>(arguments.column_step),
                              static_cast<cuuint32_t>(arguments.row_step), 1, 1};
  TensorMap result;
  const CUresult status =
      encode_im2col(&result.map, data_type(arguments.type, operation), static_cast<cuuint32_t>(rank),
                    const_cast<void*>(arguments.base), extents, strides, lower, upper,
                    static_cast<cuuint32_t>(arguments.box_channels), static_cast<cuuint32_t>(arguments.box_pixels),
                    steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_mode(arguments.swizzle),
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    refuse(operation, "an im2col", status,
           "type " + std::to_string(static_cast<int32_t>(arguments.type)) + ", base " +
               std::to_string(reinterpret_cast<uintptr_t>(arguments.base)) + ", extents " + list(extents, rank) +
               ", strides in bytes " + list(strides, rank - 1) + ", lower corner " + list(lower, rank - 2) +
               ", upper corner " + list(upper, rank - 2) + ", steps " + list(steps, rank) + ", box of " +
               std::to_string(arguments.box_channels) + " channels and " + std::to_string(arguments.box_pixels) +
               " pixels, swizzle " + std::to_string(static_cast<int32_t>(arguments.swizzle)));
  }
  return result;
}

TensorMap encode(const TiledMap& arguments, const char* operation) {
  static const auto encode_tiled = reinterpret_cast<EncodeTiled>(driver_function("cuTensorMapEncodeTiled", operation));
  cuuint64_t extents[5];
  cuuint64_t strides[4];
  cuuint32_t box[5];
  const cuuint32_t steps[] = {1, 1, 1, 1, 1};
  for (int i = 0; i < arguments.rank; ++i) {
    extents[i] = static_cast<cuuint64_t>(arguments.extents[i]);
    box[i] = static_cast<cuuint32_t>(arguments.box[i]);
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(arguments.strides_bytes[i - 1]);
  }
  TensorMap result;
  const CUresult status = encode_tiled(
      &result.map, data_type(arguments.type, operation), static_cast<cuuint32_t>(arguments.rank),
      const_cast<void*>(arguments.base), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle_mode(arguments.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    refuse(operation, "a tiled", status,
           "type " + std::to_string(static_cast<int32_t>(arguments.type)) + ", base " +
               std::to_string(reinterpret_cast<uintptr_t>(arguments.base)) + ", extents " +
               list(extents, arguments.rank) + ", strides in bytes " + list(strides, arguments.rank - 1) + ", box " +
               list(box, arguments.rank) + ", swizzle " + std::to_string(static_cast<int32_t>(arguments.swizzle)));
  }
  return result;
}

}  // namespace splitkern::kernels

#endif
