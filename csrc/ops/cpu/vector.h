// What the hand-written CPU loops share: eight-lane vectors (compiler extensions of GCC and Clang, lowered to whatever
// the machine has), element conversions, run-time choice of the instruction set, and parallel loops on torch's threads.
// Everything called inside run_vectorised must be SPLITKERN_INLINE, or it is compiled for the baseline machine.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ops/arguments.h"

namespace splitkern::cpu {

#define SPLITKERN_INLINE inline __attribute__((always_inline))

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// The type to compute in.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline constexpr int kLanes = 8;
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Doubles = double __attribute__((vector_size(kLanes * sizeof(double))));
template <class T>
using Lanes = std::conditional_t<std::is_same_v<Compute<T>, double>, Doubles, Floats>;

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors pass only between inlined functions

template <class T>
SPLITKERN_INLINE Lanes<T> broadcast(T value) {
  return Lanes<T>{} + value;
}

template <class T>
SPLITKERN_INLINE Lanes<T> load_lanes(const T* from) {
  Lanes<T> lanes;
  if constexpr (std::is_same_v<T, Compute<T>>) {
    std::memcpy(&lanes, from, sizeof(lanes));
  } else {
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(from[i]);
  }
  return lanes;
}

template <class T>
SPLITKERN_INLINE Lanes<T> load_lanes(const T* from, int64_t stride) {
  Lanes<T> lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<Compute<T>>(from[i * stride]);
  return lanes;
}

template <class T>
SPLITKERN_INLINE void store_lanes(T* to, const Lanes<T>& lanes) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    std::memcpy(to, &lanes, sizeof(lanes));
  } else {
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<T>(lanes[i]);
  }
}

template <class T>
SPLITKERN_INLINE void store_lanes(T* to, int64_t stride, const Lanes<T>& lanes) {
  for (int i = 0; i < kLanes; ++i) to[i * stride] = static_cast<T>(lanes[i]);
}

SPLITKERN_INLINE Doubles widen(const Floats& lanes) {
  return __builtin_convertvector(lanes, Doubles);
}
SPLITKERN_INLINE Doubles widen(const Doubles& lanes) {
  return lanes;
}
SPLITKERN_INLINE double widen(float value) {
  return value;
}
SPLITKERN_INLINE double widen(double value) {
  return value;
}

SPLITKERN_INLINE double sum_lanes(const Doubles& lanes) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

#pragma GCC diagnostic pop

// --- Instruction sets ------------------------------------------------------------------------------------------------

#if defined(__x86_64__)

template <class Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"), flatten)) void run_avx512(const Body& body) {
  body();
}

template <class Body>
__attribute__((target("avx2,f16c"), flatten)) void run_avx2(const Body& body) {
  body();
}

// Calls a lambda marked SPLITKERN_BODY, compiled for the best instruction set of the machine.
template <class Body>
void run_vectorised(const Body& body) {
  static const int level = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                               ? 2
                           : __builtin_cpu_supports("avx2") ? 1
                                                            : 0;
  if (level == 2) return run_avx512(body);
  if (level == 1) return run_avx2(body);
  body();
}

#else

template <class Body>
void run_vectorised(const Body& body) {
  body();
}

#endif

#define SPLITKERN_BODY __attribute__((always_inline))

// --- Threads ---------------------------------------------------------------------------------------------------------

// body(first, last) over the tasks, on torch's intra-op threads; `task_work` is the elements of one task.
template <class Body>
void parallel_tasks(int64_t tasks, int64_t task_work, const Body& body) {
  constexpr int64_t kWorkPerThread = 32768;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(task_work, 1));
  torch::stable::parallel_for(0, tasks, grain, body);
}

// --- Run-time value to template constant -----------------------------------------------------------------------------

// body(T{}) with T the tensor's element type; the checks admit no other.
template <class Body>
void dispatch_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "splitkern: element type must be float64, float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(type));
  }
}

template <class Body>
void dispatch_bool(bool value, const Body& body) {
  value ? body(std::true_type{}) : body(std::false_type{});
}

// --- Tensors ---------------------------------------------------------------------------------------------------------

// A [N, C, H, W] tensor as the loops see it: origin and element strides.
template <class T>
struct View {
  T* data;
  Sizes strides;

  T* at(int64_t image, int64_t channel, int64_t row, int64_t col) const {
    return data + image * strides[0] + channel * strides[1] + row * strides[2] + col * strides[3];
  }
};

template <class T>
View<const T> read_view(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), element_strides(tensor)};
}

template <class T>
View<T> write_view(const Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), element_strides(tensor)};
}

// kPlanar: neighbouring columns are neighbours in memory, in every tensor of the call. kInterleaved: neighbouring
// channels are. kStrided: neither, or the tensors differ; walked like kPlanar with strides.
enum class Layout { kPlanar, kInterleaved, kStrided };

template <class... Views>
Layout layout_of(const Sizes& size, const Views&... views) {
  if (((views.strides[3] == 1) && ...)) return Layout::kPlanar;
  if (size[1] > 1 && ((views.strides[1] == 1) && ...)) return Layout::kInterleaved;
  return Layout::kStrided;
}

}  // namespace splitkern::cpu
