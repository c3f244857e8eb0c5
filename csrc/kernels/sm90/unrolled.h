// Loops whose index is a constant in every pass, so that arrays indexed by it stay in registers under every compiler.
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

}  // namespace splitkern::kernels::sm90
