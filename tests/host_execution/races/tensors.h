// What the race checks share: channels-last tensors without torch, geometry of two uneven patches per axis, and the
// loop over schedules. Each check runs one operator as csrc/ops/cuda would describe it.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../kernels/check.h"
#include "kernels/launchers.h"

namespace races {

using splitkern::kernels::AxisPatches;
using splitkern::kernels::ElementType;
using splitkern::kernels::PatchGrid;
using splitkern::kernels::Strides4;
using splitkern::kernels::WindowAxis;

inline int64_t size_of(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
}

// Bytes aligned as torch aligns them.
class Bytes {
 public:
  explicit Bytes(int64_t bytes, int value = 0)
      : bytes_(bytes), data_(static_cast<unsigned char*>(std::aligned_alloc(128, (bytes + 255) / 128 * 128))) {
    std::memset(data_.get(), value, static_cast<size_t>(bytes));
  }
  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(data_.get());
  }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(unsigned char* data) const { std::free(data); }
  };
  int64_t bytes_;
  std::unique_ptr<unsigned char[], Free> data_;
};

// Elements 1.0 or 0.5 with either sign.
inline void fill(Bytes& bytes, ElementType type, uint32_t seed) {
  const int64_t count = bytes.bytes() / size_of(type);
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const float value = ((seed >> 30 & 1) != 0 ? 1.0f : 0.5f) * ((seed >> 31) != 0 ? -1.0f : 1.0f);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    switch (type) {
      case ElementType::kFloat64:
        bytes.data<double>()[i] = value;
        break;
      case ElementType::kFloat32:
        bytes.data<float>()[i] = value;
        break;
      case ElementType::kBFloat16:
        bytes.data<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
        break;
      case ElementType::kFloat16:
        bytes.data<uint16_t>()[i] = static_cast<uint16_t>((bits >> 16 & 0x8000u) | ((bits >> 23 & 0xffu) - 112) << 10);
        break;
    }
  }
}

struct Nhwc {
  ElementType type;
  int32_t batch, channels, rows, columns;
  Bytes bytes;

  Nhwc(ElementType element, int32_t images, int32_t channel_count, int32_t height, int32_t width, uint32_t seed = 0)
      : type(element),
        batch(images),
        channels(channel_count),
        rows(height),
        columns(width),
        bytes(int64_t{images} * channel_count * height * width * size_of(element)) {
    if (seed != 0) fill(bytes, type, seed);
  }
  Strides4 strides() const { return {int64_t{rows} * columns * channels, 1, int64_t{columns} * channels, channels}; }
  void* data() const { return bytes.data(); }
};

inline AxisPatches two_patches(int32_t inputs, int32_t outputs, const WindowAxis& window) {
  const auto effective = static_cast<int32_t>(window.dilation * (window.kernel - 1) + 1);
  const int32_t y = outputs / 2 + 1;
  const auto x = static_cast<int32_t>(y * window.stride - window.padding + (effective - window.stride + 1) / 2);
  AxisPatches axis{};
  axis.patches = 2;
  axis.in_bounds[1] = std::clamp(x, 1, inputs - 1);
  axis.in_bounds[2] = inputs;
  axis.out_bounds[1] = y;
  axis.out_bounds[2] = outputs;
  return axis;
}
inline int32_t outputs_of(int32_t inputs, const WindowAxis& window) {
  return static_cast<int32_t>(
      (inputs + 2 * window.padding - window.dilation * (window.kernel - 1) - 1) / window.stride + 1);
}

// The same bits whatever the schedule.
inline void under_schedules(const Bytes& output, const std::function<void()>& body) {
  std::vector<unsigned char> first;
  for (const uint64_t seed : {1, 2}) {
    splitkern_host_set_schedule(seed);
    std::memset(output.data(), 0xff, static_cast<size_t>(output.bytes()));
    body();
    if (first.empty()) {
      first.assign(output.data<unsigned char>(), output.data<unsigned char>() + output.bytes());
      check::require(first != std::vector<unsigned char>(first.size(), 0xff), "nothing was written");
    } else {
      check::require(std::memcmp(first.data(), output.data(), first.size()) == 0, "the schedule changes the result");
    }
  }
}

}  // namespace races
