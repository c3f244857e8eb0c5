// Checks of the pool over the CUDA runtime: device and pinned memory, streams ordered by events. They need a GPU.
#include "memory/pool.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "memory/cuda/errors.h"
#include "memory/cuda/events.h"
#include "memory/cuda/upstream.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

class Stream {
 public:
  Stream() { SPLITKERN_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }
  int64_t handle() const { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

int64_t device_free_bytes() {
  size_t free = 0, total = 0;
  SPLITKERN_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return static_cast<int64_t>(free);
}

}  // namespace

CHECK_NAMED(pool_cuda_device, "pool on CUDA: device memory comes and goes back") {
  device_free_bytes();  // makes the context
  const int64_t before = device_free_bytes();
  {
    const auto pool = MemoryPool::create(std::make_shared<cuda::DeviceUpstream>(0),
                                         {.limit_bytes = 256 * kMiB, .events = std::make_shared<cuda::Events>(0)});
    Arena arena = pool->reserve(128 * kMiB);
    void* const one = pool->allocate(64 * kMiB);
    SPLITKERN_CUDA_CHECK(cudaMemset(arena.base(), 1, 128 * kMiB));
    SPLITKERN_CUDA_CHECK(cudaMemset(one, 1, 64 * kMiB));
    check::require(device_free_bytes() <= before - 192 * kMiB, "no memory of the device was taken");
    check::refuses([&] { pool->allocate(65 * kMiB); }, {"limit"});
    pool->free(one);
    pool->trim(true);
    pool->verify();
  }
  check::equal(device_free_bytes(), before, "free memory of the device at the end");
}

CHECK_NAMED(pool_cuda_pinned, "pool on CUDA: pinned memory is the device's too") {
  const auto pool =
      MemoryPool::create(std::make_shared<cuda::PinnedUpstream>(0), {.events = std::make_shared<cuda::Events>(0)});
  const Arena arena = pool->reserve(kMiB);
  std::memset(arena.base(), 3, kMiB);
  cudaPointerAttributes attributes{};
  SPLITKERN_CUDA_CHECK(cudaPointerGetAttributes(&attributes, arena.base()));
  check::require(attributes.type == cudaMemoryTypeHost && attributes.devicePointer == arena.base(), "not pinned");
}

CHECK_NAMED(pool_cuda_exhausted, "pool on CUDA: a full device is an error with the runtime's text, and no later one") {
  const auto pool =
      MemoryPool::create(std::make_shared<cuda::DeviceUpstream>(0), {.events = std::make_shared<cuda::Events>(0)});
  check::refuses([&] { pool->reserve(int64_t{1} << 50); }, {"DeviceUpstream", "cudaErrorMemoryAllocation"});
  check::equal(static_cast<int>(cudaGetLastError()), static_cast<int>(cudaSuccess), "error that stays behind");
  pool->free(pool->allocate(kMiB));
  check::refuses([] { cuda::DeviceUpstream(1 << 20); }, {"device must be below the count of devices"});
  const auto per_thread = static_cast<int64_t>(reinterpret_cast<uintptr_t>(cudaStreamPerThread));
  pool->add_stream(per_thread);
  void* const one = pool->allocate(kMiB, per_thread);
  check::refuses([&] { pool->free(one, per_thread); }, {"cudaStreamPerThread"});
}

CHECK_NAMED(pool_cuda_order,
            "pool on CUDA: memory that one stream frees is written by another only after it was read") {
  // Stream a stands at a gate before it copies to the host what it wrote; b gets the same memory and overwrites it.
  const Stream a, b;
  const int64_t size_bytes = 64 * kMiB;
  const auto pool = MemoryPool::create(
      std::make_shared<cuda::DeviceUpstream>(0),
      {.limit_bytes = size_bytes, .block_bytes = size_bytes, .events = std::make_shared<cuda::Events>(0)});
  const auto host = MemoryPool::create(std::make_shared<cuda::PinnedUpstream>(0));
  pool->add_stream(a.handle());
  pool->add_stream(b.handle());
  const Arena landing = host->reserve(size_bytes);
  for (int round = 1; round <= 8; ++round) {
    std::memset(landing.base(), 0, static_cast<size_t>(size_bytes));
    std::atomic<bool> open = false;
    void* const first = pool->allocate(size_bytes, a.handle());
    SPLITKERN_CUDA_CHECK(cudaMemsetAsync(first, round, static_cast<size_t>(size_bytes), a.get()));
    SPLITKERN_CUDA_CHECK(
        cudaLaunchHostFunc(a.get(), [](void* gate) { static_cast<std::atomic<bool>*>(gate)->wait(false); }, &open));
    SPLITKERN_CUDA_CHECK(
        cudaMemcpyAsync(landing.base(), first, static_cast<size_t>(size_bytes), cudaMemcpyDeviceToHost, a.get()));
    pool->free(first, a.handle());
    const int64_t waits = pool->statistics().stream_waits;
    void* const second = pool->allocate(size_bytes, b.handle());
    const int64_t waited = pool->statistics().stream_waits - waits;
    SPLITKERN_CUDA_CHECK(cudaMemsetAsync(second, 255, static_cast<size_t>(size_bytes), b.get()));
    pool->free(second, b.handle());
    open = true;
    open.notify_all();
    SPLITKERN_CUDA_CHECK(cudaStreamSynchronize(a.get()));
    check::require(second == first, "there is memory for one only");
    check::equal(waited, 1, "waits of b for a");
    const auto* const bytes = static_cast<const unsigned char*>(landing.base());
    for (int64_t at = 0; at < size_bytes; at += 4096 + 1) {
      check::equal(static_cast<int>(bytes[at]), round, "byte " + std::to_string(at));
    }
  }
  pool->verify();
  pool->remove_stream(a.handle());
  pool->remove_stream(b.handle());
}
