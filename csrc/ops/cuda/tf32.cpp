// See tf32.h.
#include "tf32.h"

#include <atomic>

namespace splitkern::cuda {

namespace {

std::atomic<int32_t (*)()> registered_query{nullptr};

}  // namespace

bool allows_tf32(kernels::ElementType type) {
  if (type != kernels::ElementType::kFloat32) return false;
  int32_t (*const query)() = registered_query.load(std::memory_order_acquire);
  return query != nullptr && query() != 0;
}

}  // namespace splitkern::cuda

extern "C" void splitkern_set_tf32_query(int32_t (*query)()) {
  splitkern::cuda::registered_query.store(query, std::memory_order_release);
}
