// What the sm_80 kernels ask of a call, one question per function: each returns an empty string or the reason for
// refusing, as a phrase. Host code, used by gather_paths.cu and weight_grad.cu.
#pragma once

#include <cstdint>
#include <string>

#include "../paths.h"

namespace splitkern::kernels::sm80 {

inline constexpr int64_t kVectorAlignment = 16;
// Positions and their sums stay in 32 bits.
inline constexpr int64_t kMaxPosition = 1 << 30;

inline int64_t element_bytes(ElementType type) {
  return type == ElementType::kFloat32 ? 4 : 2;
}

inline std::string refuse_device_and_type(ElementType type, bool allow_tf32, const DeviceTraits& device,
                                          int64_t shared_bytes) {
  if (device.compute_capability < 80) {
    return "the device has compute capability " + std::to_string(device.compute_capability) + ", under 80";
  }
  if (device.shared_memory_bytes < shared_bytes) {
    return "a block may have " + std::to_string(device.shared_memory_bytes) + " bytes of shared memory, under " +
           std::to_string(shared_bytes);
  }
  if (type == ElementType::kFloat64) return "the type is float64";
  if (type == ElementType::kFloat32 && !allow_tf32) return "float32 may not be rounded to tf32";
  return {};
}

inline std::string refuse_channels(const char* what, int64_t channels, ElementType type) {
  const int64_t vector = kVectorAlignment / element_bytes(type);
  if (channels % vector == 0) return {};
  return std::string(what) + " per group number " + std::to_string(channels) + ", no multiple of " +
         std::to_string(vector);
}

inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorAlignment == 0;
}

// Whether pixels begin at 16-byte boundaries and channels lie side by side. The stride of an axis that is never
// stepped along (last position 0) does not matter.
inline bool has_vectors(const Strides4& strides, const void* base, ElementType type, int64_t last_image,
                        int64_t last_row, int64_t last_column) {
  const int64_t vector = kVectorAlignment / element_bytes(type);
  return strides.channel == 1 && aligned(base) && (last_image == 0 || strides.batch % vector == 0) &&
         (last_row == 0 || strides.row % vector == 0) && (last_column == 0 || strides.column % vector == 0);
}

// The strides without those that has_vectors disregards: they may be no multiples of a vector.
inline Strides4 stepped_strides(const Strides4& strides, int64_t last_image, int64_t last_row, int64_t last_column) {
  return {last_image == 0 ? 0 : strides.batch, strides.channel, last_row == 0 ? 0 : strides.row,
          last_column == 0 ? 0 : strides.column};
}

// For a tensor that is read in 16-byte vectors of channels.
inline std::string refuse_layout(const std::string& what, const Strides4& strides, const void* base, ElementType type,
                                 int64_t last_image, int64_t last_row, int64_t last_column) {
  if (strides.channel != 1) {
    return "the channel stride of " + what + " is " + std::to_string(strides.channel) + ", not 1";
  }
  if (has_vectors(strides, base, type, last_image, last_row, last_column)) return {};
  return "the pixels of " + what + " do not all begin at multiples of 16 bytes";
}

inline std::string refuse_positions(const WindowAxis& window, const AxisPatches& patches) {
  const int64_t first = patches.out_bounds[0] * window.stride - window.padding;
  const int64_t last = patches.out_bounds[patches.patches] * window.stride - window.padding;
  const int64_t reach = window.kernel * window.dilation;
  const int64_t padding = window.padding < 0 ? -window.padding : window.padding;
  if (window.stride >= kMaxPosition || padding >= kMaxPosition / 2 || first < -kMaxPosition || last > kMaxPosition ||
      reach >= kMaxPosition || patches.in_bounds[patches.patches] >= kMaxPosition / 2) {
    return "a window reaches beyond position 2^30";
  }
  return {};
}

// The first reason there is.
template <class... Reasons>
std::string first_reason(Reasons&&... reasons) {
  std::string first;
  static_cast<void>(((first = reasons, !first.empty()) || ...));
  return first;
}

}  // namespace splitkern::kernels::sm80
