// See pack_weights.h. A block moves 64 input channels of one output channel through shared memory, so that reads
// follow the taps (OIHW's fastest index) and writes follow the channels.
#include "pack_weights.h"

#include "../budgets.h"
#include "../primitives.h"

namespace splitkern::kernels::sm90 {
namespace {

constexpr int kPackThreads = 128;
constexpr int kPackChannels = 64;
constexpr int kPackTaps = 32;

struct PackShared {
  uint16_t elements[kPackTaps][kPackChannels + 2];  // two more: columns fall into different banks
};
static_assert(sizeof(PackShared) <= shared_budget("sm90::pack_weights_kernel"));

__global__ void pack_weights_kernel(const __grid_constant__ PackWeightsParams params) {
  PackShared& shared = dynamic_shared<PackShared>();
  const int32_t thread = static_cast<int32_t>(thread_index());
  const int32_t out_channel = static_cast<int32_t>(block_index().x);
  const int32_t first_channel = static_cast<int32_t>(block_index().y) * kPackChannels;
  const int32_t first_tap = static_cast<int32_t>(block_index().z) * kPackTaps;
  const int32_t channels =
      params.in_channels - first_channel < kPackChannels ? params.in_channels - first_channel : kPackChannels;
  const int32_t taps = params.taps - first_tap < kPackTaps ? params.taps - first_tap : kPackTaps;
  const uint16_t* weight = static_cast<const uint16_t*>(params.weight) + out_channel * params.weight_strides.batch +
                           first_channel * params.weight_strides.channel;
  for (int32_t i = thread; i < channels * taps; i += kPackThreads) {
    const int32_t channel = i / taps;
    const int32_t tap = i - channel * taps;
    const int32_t row = (first_tap + tap) / params.kernel_columns;
    const int32_t column = first_tap + tap - row * params.kernel_columns;
    shared.elements[tap][channel] =
        load_global<uint16_t>(weight + channel * params.weight_strides.channel + row * params.weight_strides.row +
                              column * params.weight_strides.column);
  }
  block_barrier();
  uint16_t* packed = static_cast<uint16_t*>(params.packed) +
                     (static_cast<int64_t>(out_channel) * params.taps + first_tap) * params.in_channels + first_channel;
  for (int32_t i = thread; i < taps * kPackChannels; i += kPackThreads) {
    const int32_t tap = i / kPackChannels;
    const int32_t channel = i - tap * kPackChannels;
    if (channel < channels) {
      store_global(packed + static_cast<int64_t>(tap) * params.in_channels + channel, shared.elements[tap][channel]);
    }
  }
}

}  // namespace

void launch_pack_weights(const PackWeightsParams& params, cudaStream_t stream) {
  const Dim3 grid{static_cast<unsigned>(params.out_channels),
                  static_cast<unsigned>((params.in_channels + kPackChannels - 1) / kPackChannels),
                  static_cast<unsigned>((params.taps + kPackTaps - 1) / kPackTaps)};
  launch(&pack_weights_kernel, grid, Dim3{kPackThreads, 1, 1}, sizeof(PackShared), stream, params);
}

}  // namespace splitkern::kernels::sm90
