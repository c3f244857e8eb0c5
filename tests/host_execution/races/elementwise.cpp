// Pooling, batch normalisation and copies under the race check, in the layout that has fast kernels and by the plain
// ones.
#include "kernels/conv_paths.h"
#include "kernels/copy/copy.h"
#include "tensors.h"

using namespace splitkern::kernels;
using races::Bytes;
using races::Nhwc;

namespace {

constexpr int32_t kBatch = 2;
constexpr int32_t kChannels = 40;
constexpr int32_t kExtent = 11;
constexpr WindowAxis kWindow{3, 2, 1, 1};
constexpr ElementType kType = ElementType::kBFloat16;

// Both the fast kernels and the plain ones.
void each_path(const std::function<void()>& body) {
  for (const char* path : {"", "plain"}) {
    check::require(splitkern_force_path(path) == 0, "no such path");
    body();
  }
  splitkern_force_path(nullptr);
}

template <class Params>
Params pooling() {
  Params params{};
  params.type = kType;
  params.batch = kBatch;
  params.channels = kChannels;
  params.channels_fastest = true;
  params.row_window = params.column_window = kWindow;
  params.grid.rows = params.grid.columns = races::two_patches(kExtent, races::outputs_of(kExtent, kWindow), kWindow);
  return params;
}

struct Pooled {
  int32_t outputs = races::outputs_of(kExtent, kWindow);
  Nhwc input{kType, kBatch, kChannels, kExtent, kExtent, 5};
  Nhwc output{kType, kBatch, kChannels, outputs, outputs};
  Nhwc grad_output{kType, kBatch, kChannels, outputs, outputs, 6};
  Nhwc grad_input{kType, kBatch, kChannels, kExtent, kExtent};
  Bytes offsets{int64_t{kBatch} * kChannels * outputs * outputs};
};

CHECK_NAMED(max_pool, "max pooling, its gradient and its gather") {
  each_path([] {
    const Pooled pooled;
    auto params = pooling<MaxPoolParams>();
    params.input_strides = pooled.input.strides();
    params.values_strides = params.offsets_strides = pooled.output.strides();
    params.input = pooled.input.data();
    params.values = pooled.output.data();
    params.offsets = pooled.offsets.data<uint8_t>();
    races::under_schedules(pooled.output.bytes, [&] { launch_max_pool(params, nullptr); });
    auto backward = pooling<MaxPoolBackwardParams>();
    backward.grad_output_strides = backward.offsets_strides = pooled.output.strides();
    backward.output_strides = pooled.grad_input.strides();
    backward.grad_output = pooled.grad_output.data();
    backward.offsets = params.offsets;
    backward.output = pooled.grad_input.data();
    races::under_schedules(pooled.grad_input.bytes, [&] { launch_max_pool_backward(backward, nullptr); });
    auto gather = pooling<MaxPoolGatherParams>();
    gather.input_strides = pooled.input.strides();
    gather.offsets_strides = gather.output_strides = pooled.output.strides();
    gather.input = pooled.input.data();
    gather.offsets = params.offsets;
    gather.output = pooled.output.data();
    races::under_schedules(pooled.output.bytes, [&] { launch_max_pool_gather(gather, nullptr); });
  });
}

CHECK_NAMED(avg_pool, "average pooling and its gradient") {
  each_path([] {
    const Pooled pooled;
    auto params = pooling<AvgPoolParams>();
    params.divisor = {0, kExtent, kExtent, true};
    params.input_strides = pooled.input.strides();
    params.output_strides = pooled.output.strides();
    params.input = pooled.input.data();
    params.output = pooled.output.data();
    races::under_schedules(pooled.output.bytes, [&] { launch_avg_pool(params, nullptr); });
    auto backward = pooling<AvgPoolBackwardParams>();
    backward.divisor = params.divisor;
    backward.grad_output_strides = pooled.output.strides();
    backward.output_strides = pooled.grad_input.strides();
    backward.grad_output = pooled.grad_output.data();
    backward.output = pooled.grad_input.data();
    races::under_schedules(pooled.grad_input.bytes, [&] { launch_avg_pool_backward(backward, nullptr); });
  });
}

template <class Params>
Params normalisation(const Nhwc& input) {
  Params params{};
  params.type = kType;
  params.batch = kBatch;
  params.channels = kChannels;
  params.column_patches = 2;
  params.grid.rows = races::two_patches(kExtent, kExtent, {1, 1, 0, 1});
  for (int i = 0; i < 3; ++i) params.grid.rows.in_bounds[i] = params.grid.rows.out_bounds[i];
  params.grid.columns = params.grid.rows;
  params.input_strides = input.strides();
  params.input = input.data();
  return params;
}
template <class Params>
void segments(Params& params) {
  params.patches = 4;
  params.segments = 1;
  const int32_t wanted = batch_norm_segments(params, kBatch * kExtent * kExtent / 4);
  params.segments = wanted > 0 ? wanted : 3;
}

CHECK_NAMED(batch_norm, "batch normalisation: statistics, apply, backward sums, backward apply") {
  each_path([] {
    const Pooled pooled;
    constexpr int64_t kResults = 4 * kChannels;
    const auto floats = [](int64_t count) { return Bytes(count * 4); };
    const auto statistic = [](const Bytes& bytes) { return PatchStatistic{kChannels, 1, bytes.data()}; };
    const Bytes mean = floats(kResults);
    const Bytes m2 = floats(kResults);
    const Bytes invstd = floats(kResults);
    auto stats = normalisation<BatchNormStatsParams>(pooled.input);
    stats.eps = 1e-5;
    stats.mean = statistic(mean);
    stats.m2 = statistic(m2);
    stats.invstd = statistic(invstd);
    segments(stats);
    const Bytes partial_first = floats(stats.segments * kResults);
    const Bytes partial_second = floats(stats.segments * kResults);
    stats.partial_mean = partial_first.data();
    stats.partial_m2 = partial_second.data();
    races::under_schedules(m2, [&] {
      launch_batch_norm_stats(stats, nullptr);
      launch_batch_norm_stats_merge(stats, nullptr);
    });

    Nhwc weight(ElementType::kFloat32, 1, kChannels, 1, 1, 7);
    const ChannelParameter parameter{1, weight.data(), true};
    auto apply = normalisation<BatchNormApplyParams>(pooled.input);
    apply.relu = apply.channels_fastest = true;
    apply.output_strides = pooled.grad_input.strides();
    apply.mean = stats.mean;
    apply.invstd = stats.invstd;
    apply.weight = apply.bias = parameter;
    apply.output = pooled.grad_input.data();
    races::under_schedules(pooled.grad_input.bytes, [&] { launch_batch_norm_apply(apply, nullptr); });

    const Nhwc grad_output(kType, kBatch, kChannels, kExtent, kExtent, 8);
    const Bytes sum_grad = floats(kResults);
    const Bytes sum_grad_centered = floats(kResults);
    auto reduce = normalisation<BatchNormBackwardReduceParams>(pooled.input);
    reduce.relu = true;
    reduce.grad_output_strides = grad_output.strides();
    reduce.mean = stats.mean;
    reduce.invstd = stats.invstd;
    reduce.sum_grad = statistic(sum_grad);
    reduce.sum_grad_centered = statistic(sum_grad_centered);
    reduce.weight = reduce.bias = parameter;
    reduce.grad_output = grad_output.data();
    segments(reduce);
    const Bytes partial_third = floats(reduce.segments * kResults);
    const Bytes partial_fourth = floats(reduce.segments * kResults);
    reduce.partial_sum_grad = partial_third.data();
    reduce.partial_sum_grad_centered = partial_fourth.data();
    races::under_schedules(sum_grad_centered, [&] {
      launch_batch_norm_backward_reduce(reduce, nullptr);
      launch_batch_norm_backward_reduce_merge(reduce, nullptr);
    });

    auto backward = normalisation<BatchNormBackwardApplyParams>(pooled.input);
    backward.relu = backward.channels_fastest = true;
    backward.grad_output_strides = grad_output.strides();
    backward.output_strides = pooled.grad_input.strides();
    backward.mean = stats.mean;
    backward.invstd = stats.invstd;
    backward.sum_grad = reduce.sum_grad;
    backward.sum_grad_centered = reduce.sum_grad_centered;
    backward.weight = backward.bias = parameter;
    backward.grad_output = grad_output.data();
    backward.output = pooled.grad_input.data();
    races::under_schedules(pooled.grad_input.bytes, [&] { launch_batch_norm_backward_apply(backward, nullptr); });
  });
}

// --- Copies ---------------------------------------------------------------------------------------

// 37 rows of 600 bytes, 640 apart on the device.
constexpr int64_t kRows = 37;
constexpr int64_t kRowBytes = 600;
constexpr int64_t kPitch = 640;

CHECK_NAMED(strided, "offload and prefetch by a kernel") {
  Bytes device(kRows * kPitch);
  const Bytes host(kRows * kRowBytes);
  races::fill(device, ElementType::kFloat32, 9);
  CopyWalk walk{};
  walk.dims = 2;
  walk.extents[0] = kRows, walk.extents[1] = kRowBytes;
  walk.host_strides[0] = kRowBytes, walk.host_strides[1] = 1;
  walk.device_strides[0] = kPitch, walk.device_strides[1] = 1;
  races::under_schedules(host, [&] { launch_offload(walk, device.data(), host.data(), CopyMethod::kKernel, nullptr); });
  const Bytes back(kRows * kPitch);
  races::under_schedules(back, [&] { launch_prefetch(walk, host.data(), back.data(), CopyMethod::kKernel, nullptr); });
  for (int64_t row = 0; row < kRows; ++row) {
    check::require(std::memcmp(device.data<char>() + row * kPitch, back.data<char>() + row * kPitch, kRowBytes) == 0,
                   "what came back");
  }
}

CHECK_NAMED(compressed, "compressed offload and prefetch") {
  constexpr int64_t kCount = 5000;  // three chunks of 2048 elements, the last one partial
  Bytes device(kCount * 2);
  races::fill(device, ElementType::kBFloat16, 10);
  for (int64_t i = 0; i < kCount; ++i) {
    if (i * 7 % 5 < 2) device.data<uint16_t>()[i] = 0;
  }
  CompressedHeader header{};
  header.magic[0] = kCompressedMagic[0];
  header.magic[1] = kCompressedMagic[1];
  header.version = kCompressedVersion;
  header.element_size = 2;
  header.count = kCount;
  header.chunk_bytes = kCompressedChunkBytes;
  header.dims = 1;
  header.extents[0] = kCount;
  const auto describe = [&](auto params, const Bytes& elements, const Bytes& host) {
    params.header = header;
    params.walk.dims = 1;
    params.walk.count = kCount;
    params.walk.extents[0] = kCount;
    params.walk.device_strides[0] = 1;
    params.vectors = true;
    params.strides[0] = 1;
    params.device = elements.data();
    params.host = host.data();
    return params;
  };
  const Bytes host(compressed_bytes(kCount, 2));
  const auto offload = describe(OffloadCompressedParams{}, device, host);
  races::under_schedules(host, [&] { launch_offload_compressed(offload, nullptr); });
  const Bytes back(kCount * 2);
  const auto prefetch = describe(PrefetchCompressedParams{}, back, host);
  races::under_schedules(back, [&] { launch_prefetch_compressed(prefetch, nullptr); });
  check::require(std::memcmp(device.data(), back.data(), kCount * 2) == 0, "what came back");
}

}  // namespace
