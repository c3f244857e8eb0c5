// Puts the operator's name in front of errors that do not carry it: those of allocations and of ATen, whose own text
// the stable ABI leaves on stderr. Wraps every body where it is registered.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace splitkern {

template <size_t kLength>
struct OperatorName {
  char text[kLength];
  constexpr OperatorName(const char (&name)[kLength]) {
    for (size_t i = 0; i < kLength; ++i) text[i] = name[i];
  }
};

template <OperatorName kName, auto kBody>
struct Named;

template <OperatorName kName, class Result, class... Arguments, Result (*kBody)(Arguments...)>
struct Named<kName, kBody> {
  static Result call(Arguments... arguments) {
    try {
      return kBody(std::forward<Arguments>(arguments)...);
    } catch (const std::exception& error) {
      const std::string_view text = error.what();
      if (text.find("splitkern::") != std::string_view::npos) throw;
      throw std::runtime_error(std::string("splitkern::").append(kName.text).append(": ").append(text));
    }
  }
};

}  // namespace splitkern

// In a library initialiser: the body that implements the operator, or overload, of that name.
#define SPLITKERN_BODY(library, name, body) library.impl(name, TORCH_BOX((&::splitkern::Named<name, &body>::call)))
