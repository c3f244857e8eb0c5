// Plain copies between strided device memory and pinned host memory: which of copy engine and kernel moves a call, the
// calls of the engine, and the kernel, which reads or writes mapped host memory itself. Called by
// csrc/ops/cuda/copy.cpp.
#include <algorithm>
#include <numeric>

#include "../budgets.h"
#include "copy.h"
#include "walk.h"

namespace splitkern::kernels {
namespace {

// 4 accesses of 16 bytes by each of 512 threads keep 32 KiB in flight per block. Few and large blocks, so that a
// convolution beside the copy keeps its multiprocessors.
constexpr unsigned kWarps = 16;
constexpr unsigned kThreads = kWarps * kWarpThreads;
constexpr int kAccesses = 4;  // of one thread, all loaded before the first is stored

constexpr int64_t kAutoEngineCalls = 16;
constexpr int64_t kMostEngineCalls = 65536;
constexpr int64_t kMostPitch = (int64_t{1} << 31) - 1;  // cudaDeviceProp::memPitch of every supported GPU

// --- Kernel
// -----------------------------------------------------------------------------------------------------------

// A thread moves single units: whole vectors, or whatever two strided sides have in common.
template <class Params, int kUnit>
__global__ void copy_kernel(const __grid_constant__ Params params) {
  using Unit = typename UnitOf<kUnit>::Type;
  const UnitWalk& walk = params.walk;
  char* const device = static_cast<char*>(params.device);
  char* const host = static_cast<char*>(params.host);
  const int64_t threads = global_thread_count();
  for (int64_t first = global_thread_index(); first < walk.count; first += kAccesses * threads) {
    Unit moved[kAccesses] = {};
    char* targets[kAccesses];
    unrolled<kAccesses>([&](auto step) {
      constexpr int kStep = decltype(step)::value;
      const int64_t index = first + kStep * threads;
      targets[kStep] = nullptr;
      if (index >= walk.count) return;
      const UnitPosition position = locate(walk, index);
      char* const on_device = device + position.device * kUnit;
      char* const on_host = host + position.host * kUnit;
      moved[kStep] = load_global_streaming<Unit>(Params::kToHost ? on_device : on_host);
      targets[kStep] = Params::kToHost ? on_host : on_device;
    });
    unrolled<kAccesses>([&](auto step) {
      constexpr int kStep = decltype(step)::value;
      if (targets[kStep] != nullptr) store_global_streaming<Unit>(targets[kStep], moved[kStep]);
    });
  }
}

struct Stages {
  alignas(16) unsigned char of_warp[kWarps][kStagedBytes];
};
static_assert(sizeof(Stages) <= shared_budget("staged_copy_kernel"));

// The host's side is one run of bytes from a multiple of 16 on, which always moves in vectors; the device's side is
// made of smaller units, which warps collect in shared memory.
template <class Params, int kUnit>
__global__ void staged_copy_kernel(const __grid_constant__ Params params) {
  using Unit = typename UnitOf<kUnit>::Type;
  constexpr int kUnits = kStagedBytes / kUnit;
  const UnitWalk& walk = params.walk;
  const uint32_t lane = lane_index();
  const int64_t warp = static_cast<int64_t>(block_index().x) * kWarps + warp_index();
  const int64_t warps = static_cast<int64_t>(grid_extent().x) * kWarps;
  unsigned char* const staged = dynamic_shared<Stages>().of_warp[warp_index()];
  char* const device = static_cast<char*>(params.device);

  for (int64_t first = warp * kUnits; first < walk.count; first += warps * kUnits) {
    char* const host = static_cast<char*>(params.host) + first * kUnit;
    const int64_t left = walk.count - first;
    const uint32_t units = left < kUnits ? static_cast<uint32_t>(left) : kUnits;
    const uint32_t vectors = units * kUnit / 16;
    const uint32_t tail_unit = vectors * 16 / kUnit + lane;  // behind the last whole vector
    if constexpr (Params::kToHost) {
      gather<kUnit>(walk, device, first, staged);
      warp_barrier();
      unrolled<kStagedVectors>([&](auto step) {
        const uint32_t vector = decltype(step)::value * kWarpThreads + lane;
        if (vector < vectors) store_global_streaming(host + vector * 16, read_staged<Vector16>(staged + vector * 16));
      });
      if (tail_unit < units) {
        store_global_streaming<Unit>(host + tail_unit * kUnit, read_staged<Unit>(staged + tail_unit * kUnit));
      }
    } else {
      Vector16 loaded[kStagedVectors];
      unrolled<kStagedVectors>([&](auto step) {
        const uint32_t vector = decltype(step)::value * kWarpThreads + lane;
        loaded[decltype(step)::value] =
            vector < vectors ? load_global_streaming<Vector16>(host + vector * 16) : Vector16{};
      });
      unrolled<kStagedVectors>([&](auto step) {
        const uint32_t vector = decltype(step)::value * kWarpThreads + lane;
        if (vector < vectors) write_staged<Vector16>(staged + vector * 16, loaded[decltype(step)::value]);
      });
      if (tail_unit < units) {
        write_staged<Unit>(staged + tail_unit * kUnit, load_global_streaming<Unit>(host + tail_unit * kUnit));
      }
      warp_barrier();
      scatter<kUnit>(staged, first, walk.count, device, [&](int64_t index) { return locate(walk, index).device; });
    }
    warp_barrier();  // before the next chunk takes the stage
  }
}

// The largest unit of which both sides are made.
int64_t unit_bytes(const CopyWalk& walk, const void* device, const void* host) {
  int64_t unit = std::gcd(16, walk.extents[walk.dims - 1]);
  for (int32_t dim = 0; dim + 1 < walk.dims; ++dim) {
    unit = std::gcd(std::gcd(unit, walk.device_strides[dim]), walk.host_strides[dim]);
  }
  const auto address = [](const void* pointer) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer) % 16);
  };
  return std::gcd(std::gcd(unit, address(device)), address(host));
}

UnitWalk in_units(const CopyWalk& walk, int64_t unit) {
  UnitWalk result{};
  for (int32_t dim = 0; dim < walk.dims; ++dim) {
    const bool innermost = dim + 1 == walk.dims;
    const int64_t extent = innermost ? walk.extents[dim] / unit : walk.extents[dim];
    if (extent == 1 && (result.dims > 0 || !innermost)) continue;
    result.extents[result.dims] = extent;
    result.host_strides[result.dims] = innermost ? 1 : walk.host_strides[dim] / unit;
    result.device_strides[result.dims] = innermost ? 1 : walk.device_strides[dim] / unit;
    ++result.dims;
  }
  complete(result);
  return result;
}

bool host_is_one_run(const UnitWalk& walk) {
  int64_t expected = 1;
  for (int32_t dim = walk.dims - 1; dim >= 0; --dim) {
    if (walk.host_strides[dim] != expected) return false;
    expected *= walk.extents[dim];
  }
  return true;
}

unsigned blocks_for(int64_t work, int64_t work_per_block) {
  return static_cast<unsigned>(
      std::min((work + work_per_block - 1) / work_per_block, int64_t{copy_tuning().copy_blocks}));
}

template <class Params, int kUnit>
void launch_unit(const Params& params, cudaStream_t stream) {
  const bool packed = host_is_one_run(params.walk) && reinterpret_cast<uintptr_t>(params.host) % 16 == 0;
  if constexpr (kUnit < 16) {
    if (packed) {
      const unsigned blocks = blocks_for(params.walk.count, int64_t{kWarps} * kStagedBytes / kUnit);
      launch(&staged_copy_kernel<Params, kUnit>, {blocks, 1, 1}, {kThreads, 1, 1}, sizeof(Stages), stream, params);
      return;
    }
  }
  const unsigned blocks = blocks_for(params.walk.count, int64_t{kThreads} * kAccesses);
  launch(&copy_kernel<Params, kUnit>, {blocks, 1, 1}, {kThreads, 1, 1}, 0, stream, params);
}

template <class Params>
void launch_kernel(const CopyWalk& walk, void* device, void* host, cudaStream_t stream) {
  const int64_t unit = unit_bytes(walk, device, host);
  Params params{};
  params.walk = in_units(walk, unit);
  params.device = device;
  params.host = host;
  switch (unit) {
    case 1:
      return launch_unit<Params, 1>(params, stream);
    case 2:
      return launch_unit<Params, 2>(params, stream);
    case 4:
      return launch_unit<Params, 4>(params, stream);
    case 8:
      return launch_unit<Params, 8>(params, stream);
    default:
      return launch_unit<Params, 16>(params, stream);
  }
}

// --- Copy engine
// ------------------------------------------------------------------------------------------------------

// Boxes for the copy engine: the innermost dimensions as far as one call takes them, the rest call by call.
struct EnginePlan {
  CopyBox box;  // from the device to the host
  int32_t outer_dims;
  int64_t calls;
};

EnginePlan plan_engine(const CopyWalk& walk) {
  EnginePlan plan{};
  const int64_t row_bytes = walk.extents[walk.dims - 1];
  plan.box = {static_cast<size_t>(row_bytes), 1, 1, 0, 0, 1, 1};
  plan.outer_dims = walk.dims - 1;
  const auto is_pitch = [&](int64_t stride) { return stride >= row_bytes && stride <= kMostPitch; };
  if (plan.outer_dims > 0) {
    const int32_t rows = plan.outer_dims - 1;
    const int64_t device_pitch = walk.device_strides[rows];
    const int64_t host_pitch = walk.host_strides[rows];
    if (is_pitch(device_pitch) && is_pitch(host_pitch)) {
      plan.box.height = walk.extents[rows];
      plan.box.from_pitch = device_pitch;
      plan.box.to_pitch = host_pitch;
      --plan.outer_dims;
    }
    if (plan.box.height > 1 && plan.outer_dims > 0) {
      const int32_t slices = plan.outer_dims - 1;
      const int64_t device_slice = walk.device_strides[slices];
      const int64_t host_slice = walk.host_strides[slices];
      const auto is_slice = [&](int64_t stride, int64_t pitch) {
        return stride % pitch == 0 && stride / pitch >= walk.extents[rows];
      };
      if (is_slice(device_slice, device_pitch) && is_slice(host_slice, host_pitch)) {
        plan.box.depth = walk.extents[slices];
        plan.box.from_slice_pitches = device_slice / device_pitch;
        plan.box.to_slice_pitches = host_slice / host_pitch;
        --plan.outer_dims;
      }
    }
  }
  plan.calls = 1;
  for (int32_t dim = 0; dim < plan.outer_dims; ++dim) plan.calls *= walk.extents[dim];
  return plan;
}

void copy_by_engine(const char* operation, const CopyWalk& walk, void* device, void* host, bool to_host,
                    cudaStream_t stream) {
  const EnginePlan plan = plan_engine(walk);
  CopyBox box = plan.box;
  if (!to_host) {
    std::swap(box.from_pitch, box.to_pitch);
    std::swap(box.from_slice_pitches, box.to_slice_pitches);
  }
  for (int64_t call = 0; call < plan.calls; ++call) {
    int64_t rest = call;
    char* on_device = static_cast<char*>(device);
    char* on_host = static_cast<char*>(host);
    for (int32_t dim = plan.outer_dims - 1; dim >= 0; --dim) {
      const int64_t coordinate = rest % walk.extents[dim];
      on_device += coordinate * walk.device_strides[dim];
      on_host += coordinate * walk.host_strides[dim];
      rest /= walk.extents[dim];
    }
    engine_copy(box, to_host ? on_device : on_host, to_host ? on_host : on_device, to_host, stream, operation);
  }
}

template <class Params>
void copy(const CopyWalk& walk, void* device, void* host, CopyMethod method, cudaStream_t stream) {
  if (choose_copy(Params::kOperator, walk, method).engine) {
    copy_by_engine(Params::kOperator, walk, device, host, Params::kToHost, stream);
  } else {
    launch_kernel<Params>(walk, device, host, stream);
  }
}

}  // namespace

CopyTuning& copy_tuning() {
  static CopyTuning tuning;
  return tuning;
}

CopyChoice choose_copy(const char* operation, const CopyWalk& walk, CopyMethod method) {
  const EnginePlan plan = plan_engine(walk);
  const int64_t row_bytes = walk.extents[walk.dims - 1];
  const std::string rows = "rows of " + std::to_string(row_bytes) + " bytes";
  const std::string calls = std::to_string(plan.calls) + (plan.calls == 1 ? " engine call" : " engine calls");
  if (method == CopyMethod::kKernel) return {false, "the caller asked for the kernel"};
  if (method == CopyMethod::kEngine) {
    if (plan.calls > kMostEngineCalls) {
      throw std::runtime_error(std::string(operation) + ": by must be 'kernel' or 'auto' for strides that would take " +
                               calls + " (at most " + std::to_string(kMostEngineCalls) + "), got 'engine'");
    }
    return {true, "the caller asked for the engine"};
  }
  if (walk.dims == 1) return {true, "engine: one run of " + std::to_string(row_bytes) + " bytes"};
  if (row_bytes < copy_tuning().engine_row_bytes) {
    return {false,
            "kernel: " + rows + ", and the engine takes at least " + std::to_string(copy_tuning().engine_row_bytes)};
  }
  if (plan.calls > kAutoEngineCalls) {
    return {false, "kernel: " + calls + " for " + rows + ", and at most " + std::to_string(kAutoEngineCalls) +
                       " are worth their start"};
  }
  return {true, "engine: " + rows + " in " + calls};
}

void* mapped_host_memory(const void* host, int64_t size_bytes) {
  // Pinned ranges are contiguous, so the first and the last byte speak for those between them.
  void* const first = mapped_host_address(host);
  if (first == nullptr || mapped_host_address(static_cast<const char*>(host) + size_bytes - 1) == nullptr) {
    return nullptr;
  }
  return first;
}

void launch_offload(const CopyWalk& walk, const void* device, void* host, CopyMethod method, cudaStream_t stream) {
  copy<OffloadParams>(walk, const_cast<void*>(device), host, method, stream);
}

void launch_prefetch(const CopyWalk& walk, const void* host, void* device, CopyMethod method, cudaStream_t stream) {
  copy<PrefetchParams>(walk, device, const_cast<void*>(host), method, stream);
}

}  // namespace splitkern::kernels

extern "C" void splitkern_tune_copy(int32_t engine_row_bytes, int32_t copy_blocks, int32_t compress_blocks,
                                    int32_t decompress_blocks) {
  using splitkern::kernels::CopyTuning;
  const auto value = [](int32_t given, int32_t otherwise) { return given < 0 ? otherwise : given; };
  const CopyTuning built_in;
  splitkern::kernels::copy_tuning() = {
      value(engine_row_bytes, built_in.engine_row_bytes), value(copy_blocks, built_in.copy_blocks),
      value(compress_blocks, built_in.compress_blocks), value(decompress_blocks, built_in.decompress_blocks)};
}
