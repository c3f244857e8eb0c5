// Vectors of neighbouring channels: the widest access that a call allows, and their elements in registers. Used by
// the kernels of this folder. A vector is whole: the channel count is a multiple of its elements.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "../params.h"
#include "../primitives.h"

namespace splitkern::kernels::nhwc {

// --- Which vectors a call allows (host) -----------------------------------------------------------

// One tensor of a call. Strides of extents that are 1 are never multiplied by anything but zero.
struct VectorTensor {
  const char* name;
  const void* address;
  const Strides4* strides;
  int64_t element_bytes;
};

inline int64_t element_bytes(ElementType type) {
  switch (type) {
    case ElementType::kFloat64:
      return 8;
    case ElementType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

// True where `elements` channels of the tensor can move as one access.
inline bool fits_vector(const VectorTensor& tensor, int64_t elements, int32_t batch) {
  const int64_t bytes = elements * tensor.element_bytes;
  return reinterpret_cast<uintptr_t>(tensor.address) % bytes == 0 && tensor.strides->row % elements == 0 &&
         tensor.strides->column % elements == 0 && (batch == 1 || tensor.strides->batch % elements == 0);
}

// Bytes of one vector of the values' type: 16, 8, 4 or the element. The narrower tensors (offsets) take as many
// elements.
template <size_t kTensors>
int64_t vector_bytes(ElementType type, int32_t batch, int32_t channels, const VectorTensor (&tensors)[kTensors]) {
  const int64_t element = element_bytes(type);
  for (int64_t bytes = 16; bytes > element; bytes /= 2) {
    const int64_t elements = bytes / element;
    bool fits = channels % elements == 0;
    for (const VectorTensor& tensor : tensors) fits = fits && fits_vector(tensor, elements, batch);
    if (fits) return bytes;
  }
  return element;
}

inline std::string first_reason(std::initializer_list<std::string> reasons) {
  for (const std::string& reason : reasons) {
    if (!reason.empty()) return reason;
  }
  return "";
}

template <size_t kTensors>
std::string layout_refusal(ElementType type, const VectorTensor (&tensors)[kTensors]) {
  if (type == ElementType::kFloat64) return "float64 has one kernel, the plain one";
  for (const VectorTensor& tensor : tensors) {
    if (tensor.strides->channel != 1) {
      return std::string("the ") + tensor.name + "'s channel stride is " + std::to_string(tensor.strides->channel) +
             ", not 1";
    }
  }
  return "";
}

template <int kValue>
struct IntTag {
  static constexpr int kInt = kValue;
};

// Calls function(TypeTag<T>{}, IntTag<bytes>{}) for a type and a vector of it.
template <class Function>
void dispatch_vector(const char* operation, ElementType type, int64_t bytes, Function&& function) {
  dispatch_element_type(operation, type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (sizeof(T) <= 4) {
      if (bytes == 16) return function(tag, IntTag<16>{});
      if (bytes == 8) return function(tag, IntTag<8>{});
      if (bytes == 4) return function(tag, IntTag<4>{});
      if constexpr (sizeof(T) == 2) {
        if (bytes == 2) return function(tag, IntTag<2>{});
      }
    }
    throw std::runtime_error(std::string(operation) + ": no kernel for vectors of " + std::to_string(bytes) +
                             " bytes of this type; supported are 16, 8, 4 and one element of float32, float16 and "
                             "bfloat16");
  });
}

// --- Elements in registers ------------------------------------------------------------------------

template <int kBytes>
struct AccessOf;
template <>
struct AccessOf<16> {
  using Type = Vector16;
};
template <>
struct AccessOf<8> {
  using Type = Vector8;
};
template <>
struct AccessOf<4> {
  using Type = uint32_t;
};
template <>
struct AccessOf<2> {
  using Type = uint16_t;
};
template <>
struct AccessOf<1> {
  using Type = uint8_t;
};

// kBytes of memory in 32-bit registers, the first byte lowest.
template <int kBytes>
struct Words {
  static constexpr int kCount = (kBytes + 3) / 4;
  uint32_t words[kCount];
};

template <int kBytes>
SPLITKERN_DEVICE Words<kBytes> load_words(const void* address) {
  using Access = typename AccessOf<kBytes>::Type;
  const Access value = load_global<Access>(address);
  Words<kBytes> result;
  if constexpr (kBytes > 4) {
    for (int i = 0; i < Words<kBytes>::kCount; ++i) result.words[i] = value.words[i];
  } else {
    result.words[0] = value;
  }
  return result;
}

template <int kBytes>
SPLITKERN_DEVICE void store_words(void* address, const Words<kBytes>& value) {
  using Access = typename AccessOf<kBytes>::Type;
  if constexpr (kBytes > 4) {
    Access access;
    for (int i = 0; i < Words<kBytes>::kCount; ++i) access.words[i] = value.words[i];
    store_global(address, access);
  } else {
    store_global(address, static_cast<Access>(value.words[0]));
  }
}

template <int kBytes>
SPLITKERN_DEVICE Words<kBytes> filled_words(uint32_t word) {
  Words<kBytes> result;
  for (int i = 0; i < Words<kBytes>::kCount; ++i) result.words[i] = word;
  return result;
}

// Element i as the accumulation type; i is known where the loop around it is unrolled.
template <class T, int kBytes>
SPLITKERN_DEVICE float element_of(const Words<kBytes>& vector, int i) {
  if constexpr (sizeof(T) == 4) {
    return bits_float(vector.words[i]);
  } else if constexpr (std::is_same_v<T, BFloat16>) {  // the upper half of a float: one instruction
    const uint32_t word = vector.words[i / 2];
    return bits_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
  } else {
    return to_accumulator(from_bits<T>(static_cast<uint16_t>(vector.words[i / 2] >> (i % 2 * 16))));
  }
}

template <class T, int kBytes>
SPLITKERN_DEVICE Words<kBytes> rounded(const float (&values)[kBytes / sizeof(T)]) {
  Words<kBytes> result;
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < Words<kBytes>::kCount; ++i) result.words[i] = float_bits(values[i]);
  } else if constexpr (kBytes == 2) {
    result.words[0] = to_bits(from_accumulator<T>(values[0]));
  } else {
    for (int i = 0; i < Words<kBytes>::kCount; ++i) result.words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
  }
  return result;
}

}  // namespace splitkern::kernels::nhwc
