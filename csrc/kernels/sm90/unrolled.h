// Loops whose index is a constant in every pass, so that arrays indexed by it stay in registers under every compiler;
// and the way from a number to a constant.
#pragma once

#include <utility>

#include "../primitives.h"

namespace splitkern::kernels::sm90 {

template <int kValue>
struct Index {
  SPLITKERN_HOST_DEVICE constexpr operator int() const { return kValue; }
};

template <class Function, int... kIndices>
SPLITKERN_DEVICE void unrolled_over(const Function& function, std::integer_sequence<int, kIndices...>) {
  (function(Index<kIndices>{}), ...);
}
// function(0), ..., function(kCount - 1), each argument an Index.
template <int kCount, class Function>
SPLITKERN_DEVICE void unrolled(const Function& function) {
  unrolled_over(function, std::make_integer_sequence<int, kCount>{});
}

// On the host: function(Index<value>{}) where 0 <= value < kCount; returns whether it is.
template <class Function, int... kIndices>
bool with_index_of(int value, const Function& function, std::integer_sequence<int, kIndices...>) {
  return ((value == kIndices ? (function(Index<kIndices>{}), true) : false) || ...);
}
template <int kCount, class Function>
bool with_index(int value, const Function& function) {
  return with_index_of(value, function, std::make_integer_sequence<int, kCount>{});
}

}  // namespace splitkern::kernels::sm90
