// Run-time values to template constants. Used by the launchers; a value without a kernel is an error
// that lists what is supported.
#pragma once

#include <string>

#include "params.h"
#include "primitives.h"

namespace splitkern::kernels {

template <class T>
struct TypeTag {
  using Type = T;
};

// Calls function(TypeTag<T>{}) with the element type that `type` names.
template <class Function>
void dispatch_element_type(const char* operation, ElementType type, Function&& function) {
  switch (type) {
    case ElementType::kFloat64:
      return function(TypeTag<double>{});
    case ElementType::kFloat32:
      return function(TypeTag<float>{});
    case ElementType::kFloat16:
      return function(TypeTag<Half>{});
    case ElementType::kBFloat16:
      return function(TypeTag<BFloat16>{});
  }
  throw std::runtime_error(std::string(operation) + ": element type " + std::to_string(static_cast<int32_t>(type)) +
                           " has no kernel; supported are float64, float32, float16 and bfloat16");
}

// The same for the two 16-bit types alone.
template <class Function>
void dispatch_half_type(const char* operation, ElementType type, Function&& function) {
  if (type == ElementType::kFloat16) return function(TypeTag<Half>{});
  if (type == ElementType::kBFloat16) return function(TypeTag<BFloat16>{});
  throw std::runtime_error(std::string(operation) + ": element type " + std::to_string(static_cast<int32_t>(type)) +
                           " has no kernel; supported are float16 and bfloat16");
}

}  // namespace splitkern::kernels
