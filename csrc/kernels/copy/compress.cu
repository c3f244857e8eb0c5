// Lossless zero-value compression on the way to mapped host memory, and back: one warp per chunk, layout in params.h.
// An element is left out exactly when all its bits are 0, so negative zero and every NaN come back as they were.
// Called by csrc/ops/cuda/copy.cpp.
#include <algorithm>

#include "../budgets.h"
#include "copy.h"
#include "walk.h"

namespace splitkern::kernels {
namespace {

constexpr unsigned kWarps = 16;         // few and large blocks, as in strided.cu
constexpr int kSteps = kStagedVectors;  // of a warp with 16 bytes per lane, per chunk
constexpr int64_t kMostMaskBytes = compressed_mask_bytes(1);
static_assert(kMostMaskBytes == kWarpThreads * 16, "a lane holds at most 16 bytes of a mask");
static_assert(kCompressedChunkBytes == kStagedBytes, "a chunk is gathered in the slot that it then becomes");

// A slot as it lies in the buffer: the mask, the values behind it.
struct Slot {
  alignas(16) unsigned char bytes[kMostMaskBytes + kCompressedChunkBytes];
};
struct Slots {
  Slot of_warp[kWarps];
};
static_assert(sizeof(Slots) <= shared_budget("compress_kernel"));
static_assert(sizeof(Slots) <= shared_budget("decompress_kernel"));

// Sizes for elements of type T (an unsigned integer of the element's size).
template <class T>
struct Chunk {
  static constexpr int kPerLane = 16 / sizeof(T);
  static constexpr int kElements = kCompressedChunkBytes / sizeof(T);
  static constexpr int kMaskBytes = kElements / 8;
  static constexpr int64_t kSlotBytes = kMaskBytes + kCompressedChunkBytes;
};

SPLITKERN_DEVICE uint32_t header_word(const CompressParams& params, uint32_t word) {
  return read_staged<uint32_t>(reinterpret_cast<const unsigned char*>(&params.header) + 4 * word);
}

template <class T>
SPLITKERN_DEVICE T element_of(const Vector16& vector, int index) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<T>(vector.words[2 * index]) | static_cast<T>(vector.words[2 * index + 1]) << 32;
  } else {
    const int bit = index * static_cast<int>(sizeof(T)) * 8;
    return static_cast<T>(vector.words[bit / 32] >> (bit % 32));
  }
}

template <class T>
SPLITKERN_DEVICE void set_element(Vector16& vector, int index, T value) {  // over zeros
  if constexpr (sizeof(T) == 8) {
    vector.words[2 * index] = static_cast<uint32_t>(value);
    vector.words[2 * index + 1] = static_cast<uint32_t>(value >> 32);
  } else {
    const int bit = index * static_cast<int>(sizeof(T)) * 8;
    vector.words[bit / 32] |= static_cast<uint32_t>(value) << (bit % 32);
  }
}

// Sums of `value` (at most kMost) over the lanes before this one, and over the warp.
struct WarpSums {
  uint32_t before;
  uint32_t all;
};
template <int kMost>
SPLITKERN_DEVICE WarpSums warp_sums(uint32_t value) {
  const uint32_t lanes_before = (1u << lane_index()) - 1;
  WarpSums sums{0, 0};
  for (int bit = 0; (1 << bit) <= kMost; ++bit) {
    const uint32_t votes = ballot(((value >> bit) & 1u) != 0);
    sums.before += count_bits(votes & lanes_before) << bit;
    sums.all += count_bits(votes) << bit;
  }
  return sums;
}

// --- Compression
// ------------------------------------------------------------------------------------------------------

// The bits of 32 lanes' elements, kPerLane each, in element order from `mask` on.
template <class T>
SPLITKERN_DEVICE void store_mask(unsigned char* mask, uint32_t bits) {
  constexpr int kPerLane = Chunk<T>::kPerLane;
  if constexpr (kPerLane == 16) {
    write_staged<uint16_t>(mask + 2 * lane_index(), static_cast<uint16_t>(bits));
  } else {
    constexpr uint32_t kLanesPerByte = 8 / kPerLane;
    uint32_t byte = bits << (lane_index() % kLanesPerByte * kPerLane);
    for (uint32_t distance = 1; distance < kLanesPerByte; distance *= 2) byte |= shuffle_xor(byte, distance);
    if (lane_index() % kLanesPerByte == 0) mask[lane_index() / kLanesPerByte] = static_cast<unsigned char>(byte);
  }
}

template <class T>
__global__ void compress_kernel(const __grid_constant__ OffloadCompressedParams params) {
  using Sizes = Chunk<T>;
  const uint32_t lane = lane_index();
  const int64_t warp = static_cast<int64_t>(block_index().x) * kWarps + warp_index();
  const int64_t warps = static_cast<int64_t>(grid_extent().x) * kWarps;
  Slot& slot = dynamic_shared<Slots>().of_warp[warp_index()];
  unsigned char* const values = slot.bytes + Sizes::kMaskBytes;
  const char* const device = static_cast<const char*>(params.device);
  unsigned char* const buffer = static_cast<unsigned char*>(params.host);
  if (warp == 0 && params.first_slot == 0)
    store_global_streaming<uint32_t>(buffer + 4 * lane, header_word(params, lane));

  for (int64_t chunk = params.first_slot + warp; chunk < params.end_slot; chunk += warps) {
    const int64_t first = chunk * Sizes::kElements;
    Vector16 loaded[kSteps];
    if (params.vectors && first + Sizes::kElements <= params.walk.count) {
      unrolled<kSteps>([&](auto step) {
        const int64_t index = first + (decltype(step)::value * kWarpThreads + lane) * Sizes::kPerLane;
        loaded[decltype(step)::value] =
            load_global_streaming<Vector16>(device + locate(params.walk, index).device * sizeof(T));
      });
    } else {
      gather<sizeof(T)>(params.walk, device, first, slot.bytes);
      warp_barrier();
      unrolled<kSteps>([&](auto step) {
        loaded[decltype(step)::value] =
            read_staged<Vector16>(slot.bytes + (decltype(step)::value * kWarpThreads + lane) * 16);
      });
      warp_barrier();  // before mask and values take the slot
    }
    uint32_t kept = 0;
    unrolled<kSteps>([&](auto step) {
      constexpr int kStep = decltype(step)::value;
      const Vector16& vector = loaded[kStep];
      uint32_t bits = 0;
      unrolled<Sizes::kPerLane>(
          [&](auto i) { bits |= (element_of<T>(vector, decltype(i)::value) != 0 ? 1u : 0u) << decltype(i)::value; });
      const WarpSums sums = warp_sums<Sizes::kPerLane>(count_bits(bits));
      store_mask<T>(slot.bytes + kStep * kWarpThreads * Sizes::kPerLane / 8, bits);
      uint32_t place = kept + sums.before;
      unrolled<Sizes::kPerLane>([&](auto i) {
        if ((bits >> decltype(i)::value & 1u) == 0) return;
        write_staged<T>(values + place++ * sizeof(T), element_of<T>(vector, decltype(i)::value));
      });
      kept += sums.all;
    });
    const uint32_t used_bytes = Sizes::kMaskBytes + kept * static_cast<uint32_t>(sizeof(T));
    const uint32_t stored_bytes = (used_bytes + 15) / 16 * 16;
    if (used_bytes + lane < stored_bytes) slot.bytes[used_bytes + lane] = 0;
    warp_barrier();
    unsigned char* const target = buffer + sizeof(CompressedHeader) + chunk * Sizes::kSlotBytes;
    for (uint32_t offset = lane * 16; offset < stored_bytes; offset += kWarpThreads * 16) {
      store_global_streaming(target + offset, read_staged<Vector16>(slot.bytes + offset));
    }
    warp_barrier();  // before the next chunk overwrites the slot
  }
}

// --- Decompression
// ----------------------------------------------------------------------------------------------------

enum class Found { kExpected, kOtherOrder, kForeign };

// Whether `order` names each dimension once.
SPLITKERN_DEVICE bool is_order(uint32_t order, uint32_t dims) {
  uint32_t seen = 0;
  for (uint32_t place = 0; place < dims; ++place) seen |= 1u << (order >> (4 * place) & 15u);
  const uint32_t above = dims == 8 ? 0 : order >> (4 * dims);
  return seen == (1u << dims) - 1 && above == 0;
}

// As locate, for elements numbered in another order than the device tensor's own.
SPLITKERN_DEVICE int64_t locate_in_order(const CompressParams& params, uint32_t order, int64_t index) {
  int64_t offset = 0;
  int64_t rest = index;
  SPLITKERN_ROLLED
  for (int32_t place = static_cast<int32_t>(params.header.dims) - 1; place >= 0; --place) {
    const uint32_t dim = order >> (4 * place) & 15u;
    const int64_t extent = params.header.extents[dim];
    offset += rest % extent * params.strides[dim];
    rest /= extent;
  }
  return offset;
}

template <class T>
SPLITKERN_DEVICE uint32_t load_mask(const unsigned char* mask) {
  constexpr int kPerLane = Chunk<T>::kPerLane;
  if constexpr (kPerLane == 16) {
    return read_staged<uint16_t>(mask + 2 * lane_index());
  } else {
    constexpr uint32_t kLanesPerByte = 8 / kPerLane;
    return mask[lane_index() / kLanesPerByte] >> (lane_index() % kLanesPerByte * kPerLane) & ((1u << kPerLane) - 1);
  }
}

template <class T>
__global__ void decompress_kernel(const __grid_constant__ PrefetchCompressedParams params) {
  using Sizes = Chunk<T>;
  const uint32_t lane = lane_index();
  const int64_t warp = static_cast<int64_t>(block_index().x) * kWarps + warp_index();
  const int64_t warps = static_cast<int64_t>(grid_extent().x) * kWarps;
  Slot& slot = dynamic_shared<Slots>().of_warp[warp_index()];
  const unsigned char* const values = slot.bytes + Sizes::kMaskBytes;
  char* const device = static_cast<char*>(params.device);
  const unsigned char* const buffer = static_cast<const unsigned char*>(params.host);
  const unsigned char* const slots = buffer + sizeof(CompressedHeader);

  // A warp's masks cross the link one chunk ahead of their values.
  constexpr uint32_t kMaskLanes = Sizes::kMaskBytes / 16;
  const auto load_mask_of = [&](int64_t chunk) {
    return lane < kMaskLanes && chunk < params.end_slot
               ? load_global_streaming<Vector16>(slots + chunk * Sizes::kSlotBytes + lane * 16)
               : Vector16{};
  };
  Vector16 next_mask = load_mask_of(params.first_slot + warp);
  const uint32_t word = load_global_streaming<uint32_t>(buffer + 4 * lane);
  const uint32_t differing = ballot(word != header_word(params, lane));
  const uint32_t order = shuffle(word, kCompressedOrderWord);
  const Found found = differing == 0 ? Found::kExpected
                      : differing == 1u << kCompressedOrderWord && is_order(order, params.header.dims)
                          ? Found::kOtherOrder
                          : Found::kForeign;

  for (int64_t chunk = params.first_slot + warp; chunk < params.end_slot; chunk += warps) {
    const int64_t first = chunk * Sizes::kElements;
    const Vector16 mask = next_mask;
    uint32_t kept = 0;
    unrolled<4>([&](auto i) { kept += count_bits(mask.words[decltype(i)::value]); });
    for (uint32_t distance = 1; distance < kWarpThreads; distance *= 2) kept += shuffle_xor(kept, distance);
    // A mask that claims elements behind the last one must not make the warp read behind the buffer.
    const int64_t left = params.walk.count - first;
    if (kept > left) kept = static_cast<uint32_t>(left);
    if (found == Found::kForeign) kept = 0;
    const uint32_t vectors = (kept * static_cast<uint32_t>(sizeof(T)) + 15) / 16;

    const unsigned char* const source = slots + chunk * Sizes::kSlotBytes + Sizes::kMaskBytes;
    Vector16 loaded[kSteps];
    unrolled<kSteps>([&](auto step) {
      const uint32_t vector = decltype(step)::value * kWarpThreads + lane;
      loaded[decltype(step)::value] =
          vector < vectors ? load_global_streaming<Vector16>(source + vector * 16) : Vector16{};
    });
    next_mask = load_mask_of(chunk + warps);
    if (lane < kMaskLanes) write_staged<Vector16>(slot.bytes + lane * 16, mask);
    unrolled<kSteps>([&](auto step) {
      const uint32_t vector = decltype(step)::value * kWarpThreads + lane;
      if (vector >= vectors) return;
      write_staged<Vector16>(slot.bytes + Sizes::kMaskBytes + vector * 16, loaded[decltype(step)::value]);
    });
    warp_barrier();

    uint32_t taken = 0;
    unrolled<kSteps>([&](auto step) {
      constexpr int kStep = decltype(step)::value;
      const uint32_t bits = load_mask<T>(slot.bytes + kStep * kWarpThreads * Sizes::kPerLane / 8);
      const WarpSums sums = warp_sums<Sizes::kPerLane>(count_bits(bits));
      uint32_t place = taken + sums.before;
      Vector16 vector{};
      unrolled<Sizes::kPerLane>([&](auto i) {
        if ((bits >> decltype(i)::value & 1u) == 0) return;
        set_element<T>(vector, decltype(i)::value, read_staged<T>(values + place++ * sizeof(T)));
      });
      taken += sums.all;
      loaded[kStep] = found == Found::kForeign ? Vector16{{~0u, ~0u, ~0u, ~0u}} : vector;
    });
    if (params.vectors && found != Found::kOtherOrder && left >= Sizes::kElements) {
      unrolled<kSteps>([&](auto step) {
        const int64_t index = first + (decltype(step)::value * kWarpThreads + lane) * Sizes::kPerLane;
        store_global_streaming(device + locate(params.walk, index).device * sizeof(T), loaded[decltype(step)::value]);
      });
    } else {
      warp_barrier();  // all lanes have read mask and values
      unrolled<kSteps>([&](auto step) {
        write_staged<Vector16>(slot.bytes + (decltype(step)::value * kWarpThreads + lane) * 16,
                               loaded[decltype(step)::value]);
      });
      warp_barrier();
      scatter<sizeof(T)>(slot.bytes, first, params.walk.count, device, [&](int64_t index) {
        return found == Found::kOtherOrder ? locate_in_order(params, order, index) : locate(params.walk, index).device;
      });
    }
    warp_barrier();  // before the next chunk overwrites the slot
  }
}

// --- Launching
// --------------------------------------------------------------------------------------------------------

template <class T, class Params>
void launch_for(void (*kernel)(Params), Params params, int32_t most_blocks, cudaStream_t stream) {
  complete(params.walk);
  const int32_t last = params.walk.dims - 1;
  constexpr int64_t kPerLane = Chunk<T>::kPerLane;
  params.vectors = params.walk.device_strides[last] == 1 && reinterpret_cast<uintptr_t>(params.device) % 16 == 0 &&
                   (last == 0 || params.walk.extents[last] % kPerLane == 0);
  for (int32_t dim = 0; dim < last; ++dim) params.vectors &= params.walk.device_strides[dim] % kPerLane == 0;
  params.end_slot = std::min(params.end_slot, compressed_chunks(params.walk.count, sizeof(T)));
  const int64_t chunks = params.end_slot - params.first_slot;
  // An empty tensor still gets its header.
  const unsigned blocks = static_cast<unsigned>(std::clamp<int64_t>((chunks + kWarps - 1) / kWarps, 1, most_blocks));
  launch(kernel, {blocks, 1, 1}, {kWarps * kWarpThreads, 1, 1}, sizeof(Slots), stream, params);
}

template <class Function>
void dispatch_element_size(const char* operation, uint32_t element_size, Function&& function) {
  switch (element_size) {
    case 1:
      return function(uint8_t{});
    case 2:
      return function(uint16_t{});
    case 4:
      return function(uint32_t{});
    case 8:
      return function(uint64_t{});
  }
  throw std::runtime_error(std::string(operation) + ": elements of " + std::to_string(element_size) +
                           " bytes have no kernel; supported are 1, 2, 4 and 8");
}

}  // namespace

void launch_offload_compressed(const OffloadCompressedParams& params, cudaStream_t stream) {
  dispatch_element_size(params.kOperator, params.header.element_size, [&](auto element) {
    using T = decltype(element);
    launch_for<T>(&compress_kernel<T>, params, copy_tuning().compress_blocks, stream);
  });
}

void launch_prefetch_compressed(const PrefetchCompressedParams& params, cudaStream_t stream) {
  dispatch_element_size(params.kOperator, params.header.element_size, [&](auto element) {
    using T = decltype(element);
    launch_for<T>(&decompress_kernel<T>, params, copy_tuning().decompress_blocks, stream);
  });
}

}  // namespace splitkern::kernels
