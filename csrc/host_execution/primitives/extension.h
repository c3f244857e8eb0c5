// The asynchronous work of one thread of host execution. Used by machine.cpp, which owns the extensions, and by
// the asynchronous primitives.
#pragma once

#include <cstdint>

namespace splitkern::host {

struct ThreadExtension {};

// Of the calling thread, made where it has none.
ThreadExtension& extension();

}  // namespace splitkern::host
