// Checks of the copy pipeline over the CUDA runtime: device memory to pinned memory and back, beside a compute stream.
// They need a GPU.
#include "memory/copy_pipeline.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "memory/cuda/errors.h"
#include "memory/cuda/stream_backend.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

constexpr int64_t kBytes = (int64_t{40} << 20) + 12345;  // several chunks, the last one odd

// One storage that leaves after instance 0 and is back, in another slot, before instance 3. 4 instances.
class RoundTrip {
 public:
  RoundTrip() {
    SPLITKERN_CUDA_CHECK(cudaStreamCreateWithFlags(&compute_, cudaStreamNonBlocking));
    SPLITKERN_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&device), 2 * kBytes));
    SPLITKERN_CUDA_CHECK(cudaHostAlloc(reinterpret_cast<void**>(&host), kBytes, cudaHostAllocDefault));
    plan.storages = {{.size_bytes = kBytes, .members = {0}}};
    plan.instances.resize(4);
    plan.boundaries.resize(5);
    plan.residencies = {
        {.storage = 0, .pool = Pool::kDevice, .size_bytes = kBytes, .begin = 0, .end = 2},
        {.storage = 0, .pool = Pool::kHost, .size_bytes = kBytes, .begin = 1, .end = 3},
        {.storage = 0, .pool = Pool::kDevice, .offset_bytes = kBytes, .size_bytes = kBytes, .begin = 2, .end = 4}};
    plan.copies = {{.kind = CopyKind::kOffload, .source = 0, .destination = 1, .issue = 1, .wait = 2, .after = {}},
                   {.kind = CopyKind::kPrefetch, .source = 1, .destination = 2, .issue = 2, .wait = 3, .after = {}}};
    plan.boundaries[1].issues = {0};
    plan.boundaries[2] = {.waits = {0}, .issues = {1}};
    plan.boundaries[3].waits = {1};
  }
  ~RoundTrip() {
    cudaFree(device);
    cudaFreeHost(host);
    cudaStreamDestroy(compute_);
  }
  RoundTrip(const RoundTrip&) = delete;
  RoundTrip& operator=(const RoundTrip&) = delete;

  int64_t compute() const { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(compute_)); }
  Arenas arenas() const { return {.device = device, .device_bytes = 2 * kBytes, .host = host, .host_bytes = kBytes}; }
  // Instance 0 writes `value` everywhere; instance 3 copies what came back to `back`.
  void launch(int32_t instance, unsigned char value) {
    if (instance == 0) SPLITKERN_CUDA_CHECK(cudaMemsetAsync(device, value, kBytes, compute_));
    if (instance == 3) {
      back.resize(kBytes);
      SPLITKERN_CUDA_CHECK(cudaMemcpyAsync(back.data(), device + kBytes, kBytes, cudaMemcpyDeviceToHost, compute_));
    }
  }
  void step(CopyPipeline& pipeline, unsigned char value) {
    for (int32_t boundary = 0; boundary < pipeline.boundary_count(); ++boundary) {
      pipeline.at_boundary(boundary);
      launch(boundary, value);
    }
  }
  int64_t device_bytes_of(unsigned char value, int64_t offset) {
    std::vector<unsigned char> bytes(kBytes);
    SPLITKERN_CUDA_CHECK(cudaStreamSynchronize(compute_));
    SPLITKERN_CUDA_CHECK(cudaMemcpy(bytes.data(), device + offset, kBytes, cudaMemcpyDeviceToHost));
    return std::ranges::count(bytes, value);
  }

  Plan plan;
  unsigned char* device = nullptr;
  unsigned char* host = nullptr;
  std::vector<unsigned char> back;

 private:
  cudaStream_t compute_ = nullptr;
};

}  // namespace

CHECK_NAMED(pipeline_cuda_round_trip, "pipeline on CUDA: storages come back, freed slots are poisoned") {
  RoundTrip trip;
  cuda::Streams streams(0, trip.compute());
  CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.checksums = true, .poison = true});
  for (unsigned char value = 1; value <= 3; ++value) {
    trip.step(pipeline, value);
    pipeline.synchronize();
    streams.drain();
    check::equal(std::ranges::count(trip.back, value), kBytes, "bytes that came back");
    check::equal(trip.device_bytes_of(0xFF, 0), kBytes, "poisoned bytes of the device slot");
    check::equal(std::count(trip.host, trip.host + kBytes, 0xFF), kBytes, "poisoned bytes of the host slot");
  }
  check::equal(pipeline.statistics().offload_chunks, 3 * 3, "chunks that left");
  check::equal(pipeline.statistics().prefetched_bytes, 3 * kBytes, "bytes that came back, by the statistics");
}

CHECK_NAMED(pipeline_cuda_checksums, "pipeline on CUDA: a storage that comes back changed is named") {
  RoundTrip trip;
  cuda::Streams streams(0, trip.compute());
  CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.checksums = true});
  pipeline.at_boundary(0);
  trip.launch(0, 9);
  pipeline.at_boundary(1);
  pipeline.synchronize();  // it has left
  trip.host[kBytes - 1] ^= 1;
  check::refuses(
      [&] {
        for (int32_t boundary = 2; boundary < 5; ++boundary) pipeline.at_boundary(boundary);
        pipeline.synchronize();
      },
      {"prefetch of storage 0", "not those that copy 0 read"});
  trip.step(pipeline, 8);
  pipeline.synchronize();
  streams.drain();
  check::equal(std::ranges::count(trip.back, 8), kBytes, "bytes that came back in the next step");
}

CHECK_NAMED(pipeline_cuda_abort, "pipeline on CUDA: after an abort nothing touches the arenas") {
  RoundTrip trip;
  cuda::Streams streams(0, trip.compute());
  CopyPipeline pipeline(streams, trip.plan, trip.arenas(), {.chunk_bytes = int64_t{1} << 20, .max_in_flight = 1});
  for (int32_t last = 0; last < 4; ++last) {
    for (int32_t boundary = 0; boundary <= last; ++boundary) {
      pipeline.at_boundary(boundary);
      trip.launch(boundary, 3);
    }
    pipeline.abort();
    std::fill(trip.host, trip.host + kBytes, static_cast<unsigned char>(77));
    SPLITKERN_CUDA_CHECK(cudaMemset(trip.device, 78, 2 * kBytes));
    SPLITKERN_CUDA_CHECK(cudaDeviceSynchronize());
    check::equal(std::count(trip.host, trip.host + kBytes, 77), kBytes, "host bytes left alone");
    check::equal(trip.device_bytes_of(78, 0), kBytes, "device bytes left alone");
  }
  trip.step(pipeline, 5);
  pipeline.synchronize();
  streams.drain();
  check::equal(std::ranges::count(trip.back, 5), kBytes, "bytes that came back in the next step");
}

CHECK_NAMED(pipeline_cuda_function_fails, "pipeline on CUDA: a function that throws fails its stream until the reset") {
  RoundTrip trip;
  cuda::Streams streams(0, trip.compute());
  streams.call(StreamId::kPrefetch, [] { throw std::runtime_error("out of luck"); });
  streams.drain();
  check::refuses([&] { streams.require_ok(StreamId::kPrefetch); }, {"out of luck"});
  streams.require_ok(StreamId::kCompute);
  streams.reset();
  streams.require_ok(StreamId::kPrefetch);
}
