// Every convolution path under the race check, all three operators, two uneven patches per axis.
#include "kernels/sm90/conv.h"
#include "kernels/conv_paths.h"
#include "tensors.h"

using namespace splitkern::kernels;
using races::Bytes;
using races::Nhwc;

extern "C" void splitkern_host_set_device(int32_t compute_capability, int32_t multiprocessors,
                                          int64_t shared_memory_bytes);

namespace {

struct Conv {
  const char* path;
  ElementType type;
  int32_t in_channels;
  int32_t out_channels;
  int32_t groups;
  int32_t kernel;
  int32_t stride;
  int32_t extent = 9;
  int32_t batch = 2;
  bool window = false;  // of the Hopper path: a whole window's pixels in shared memory
};

struct Call {
  Conv conv;
  WindowAxis window;
  PatchGrid grid{};
  Nhwc input;
  Nhwc grad_output;
  Nhwc weight;  // [out channel][row][column][in channel]
  Nhwc bias;

  static int32_t outputs(const Conv& conv) {
    return races::outputs_of(conv.extent, {conv.kernel, conv.stride, conv.kernel / 2, 1});
  }
  explicit Call(const Conv& c)
      : conv(c),
        window{c.kernel, c.stride, c.kernel / 2, 1},
        input(c.type, c.batch, c.in_channels, c.extent, c.extent, 1),
        grad_output(c.type, c.batch, c.out_channels, outputs(c), outputs(c), 2),
        weight(c.type, c.out_channels, c.in_channels / c.groups, c.kernel, c.kernel, 3),
        bias(c.type, 1, c.out_channels, 1, 1, 4) {
    grid.rows = grid.columns = races::two_patches(c.extent, outputs(c), window);
    check::require(splitkern_force_path(c.path) == 0, "no such path");
    sm90::tuning().window = c.window ? 1 : 0;
    splitkern_host_set_device(90, 4, 232448);  // few blocks, each with several tiles
  }

  template <class Params>
  Params describe() const {
    Params params{};
    params.type = conv.type;
    params.allow_tf32 = true;
    params.batch = conv.batch;
    params.in_channels_per_group = conv.in_channels / conv.groups;
    params.out_channels_per_group = conv.out_channels / conv.groups;
    params.row_window = params.column_window = window;
    params.grid = grid;
    return params;
  }
  template <class Params, class... Grids>
  static void run(const Params& params, const Grids&... grids) {
    const DeviceTraits traits = device_traits();
    const PathChoice choice = choose_path(params, grids..., traits);
    const Bytes workspace(choice.workspace_bytes + 1, 0xff);
    launch_path(choice, params, grids..., traits, workspace.data(), nullptr);
  }
};

void forward(const Conv& conv) {
  const Call call(conv);
  const Nhwc output(conv.type, conv.batch, conv.out_channels, call.grad_output.rows, call.grad_output.columns);
  auto params = call.describe<ConvForwardParams>();
  params.out_channels = conv.out_channels;
  params.relu = true;
  params.channels_fastest = true;
  params.input_strides = call.input.strides();
  params.weight_strides = call.weight.strides();
  params.output_strides = output.strides();
  params.bias_stride = 1;
  params.input = call.input.data();
  params.weight = call.weight.data();
  params.bias = call.bias.data();
  params.output = output.data();
  races::under_schedules(output.bytes, [&] { Call::run(params); });
}

void input_grad(const Conv& conv) {
  const Call call(conv);
  const Nhwc output(conv.type, conv.batch, conv.in_channels, conv.extent, conv.extent);
  auto params = call.describe<ConvInputGradParams>();
  params.in_channels = conv.in_channels;
  params.channels_fastest = true;
  params.grad_output_strides = call.grad_output.strides();
  params.weight_strides = call.weight.strides();
  params.output_strides = output.strides();
  params.grad_output = call.grad_output.data();
  params.weight = call.weight.data();
  params.output = output.data();
  races::under_schedules(output.bytes, [&] { Call::run(params); });
}

void weight_grad(const Conv& conv) {
  const Call call(conv);
  const Nhwc output(conv.type, conv.out_channels, conv.in_channels / conv.groups, conv.kernel, conv.kernel);
  auto params = call.describe<ConvWeightGradParams>();
  params.out_channels = conv.out_channels;
  params.segments = 3;  // read by the plain path alone
  params.grad_output_strides = call.grad_output.strides();
  params.input_strides = call.input.strides();
  params.output_strides = output.strides();
  params.grad_output = call.grad_output.data();
  params.input = call.input.data();
  params.output = output.data();
  const PatchGrid grids[] = {call.grid};
  races::under_schedules(output.bytes, [&] { Call::run(params, std::span<const PatchGrid>(grids)); });
}

constexpr ElementType kSingle = ElementType::kFloat32;
constexpr ElementType kHalf = ElementType::kFloat16;
constexpr ElementType kBrain = ElementType::kBFloat16;

constexpr Conv kPlain{"plain", kSingle, 4, 6, 2, 3, 2};
constexpr Conv kDepthwise{"depthwise", kBrain, 32, 32, 32, 3, 1};
constexpr Conv kGrouped{"depthwise", kHalf, 32, 32, 8, 3, 2};
constexpr Conv kFirstLayer{"first_layer", kBrain, 3, 32, 1, 3, 1};
constexpr Conv kFirstLayerSevens{"first_layer", kHalf, 3, 64, 1, 7, 2, 14};
constexpr Conv kTensorCores{"sm80", kBrain, 40, 72, 1, 3, 1};
constexpr Conv kTensorCoresStrided{"sm80", kHalf, 32, 64, 1, 3, 2};
constexpr Conv kTensorCoresTf32{"sm80", kSingle, 20, 36, 1, 3, 1};
constexpr Conv kHopper{"sm90", kBrain, 72, 136, 1, 3, 1};
constexpr Conv kHopperNarrow{"sm90", kHalf, 64, 64, 1, 3, 2};
constexpr Conv kHopperPointwise{"sm90", kBrain, 64, 256, 1, 1, 1};
constexpr Conv kHopperWindow{"sm90", kBrain, 72, 136, 1, 3, 1, 9, 2, true};
constexpr Conv kHopperResident{"sm90", kHalf, 24, 40, 1, 3, 1, 48, 1, true};

CHECK_NAMED(plain_forward, "plain forward") {
  forward(kPlain);
}
CHECK_NAMED(plain_input, "plain input gradient") {
  input_grad(kPlain);
}
CHECK_NAMED(plain_weight, "plain weight gradient") {
  weight_grad(kPlain);
}
CHECK_NAMED(depthwise_forward, "depthwise forward") {
  forward(kDepthwise);
}
CHECK_NAMED(depthwise_input, "depthwise input gradient") {
  input_grad(kDepthwise);
}
CHECK_NAMED(depthwise_weight, "depthwise weight gradient") {
  weight_grad(kDepthwise);
}
CHECK_NAMED(grouped_forward, "grouped forward") {
  forward(kGrouped);
}
CHECK_NAMED(grouped_input, "grouped input gradient") {
  input_grad(kGrouped);
}
CHECK_NAMED(grouped_weight, "grouped weight gradient") {
  weight_grad(kGrouped);
}
CHECK_NAMED(first_layer_forward, "first layer forward") {
  forward(kFirstLayer);
}
CHECK_NAMED(first_layer_input, "first layer input gradient") {
  input_grad(kFirstLayer);
}
CHECK_NAMED(first_layer_weight, "first layer weight gradient") {
  weight_grad(kFirstLayer);
}
CHECK_NAMED(sevens_forward, "first layer of 7x7 forward") {
  forward(kFirstLayerSevens);
}
CHECK_NAMED(sevens_weight, "first layer of 7x7 weight gradient") {
  weight_grad(kFirstLayerSevens);
}
CHECK_NAMED(sm80_forward, "sm80 forward") {
  forward(kTensorCores);
}
CHECK_NAMED(sm80_input, "sm80 input gradient") {
  input_grad(kTensorCores);
}
CHECK_NAMED(sm80_weight, "sm80 weight gradient") {
  weight_grad(kTensorCores);
}
CHECK_NAMED(sm80_strided_forward, "sm80 strided forward") {
  forward(kTensorCoresStrided);
}
CHECK_NAMED(sm80_strided_input, "sm80 strided input gradient") {
  input_grad(kTensorCoresStrided);
}
CHECK_NAMED(sm80_strided_weight, "sm80 strided weight gradient") {
  weight_grad(kTensorCoresStrided);
}
CHECK_NAMED(sm80_tf32_forward, "sm80 tf32 forward") {
  forward(kTensorCoresTf32);
}
CHECK_NAMED(sm80_tf32_input, "sm80 tf32 input gradient") {
  input_grad(kTensorCoresTf32);
}
CHECK_NAMED(sm80_tf32_weight, "sm80 tf32 weight gradient") {
  weight_grad(kTensorCoresTf32);
}
CHECK_NAMED(sm90_forward, "sm90 forward") {
  forward(kHopper);
}
CHECK_NAMED(sm90_input, "sm90 input gradient") {
  input_grad(kHopper);
}
CHECK_NAMED(sm90_weight, "sm90 weight gradient") {
  weight_grad(kHopper);
}
CHECK_NAMED(sm90_narrow_forward, "sm90 narrow forward") {
  forward(kHopperNarrow);
}
CHECK_NAMED(sm90_narrow_input, "sm90 narrow input gradient") {
  input_grad(kHopperNarrow);
}
CHECK_NAMED(sm90_narrow_weight, "sm90 narrow weight gradient") {
  weight_grad(kHopperNarrow);
}
CHECK_NAMED(sm90_pointwise_forward, "sm90 pointwise forward") {
  forward(kHopperPointwise);
}
CHECK_NAMED(sm90_pointwise_input, "sm90 pointwise input gradient") {
  input_grad(kHopperPointwise);
}
CHECK_NAMED(sm90_pointwise_weight, "sm90 pointwise weight gradient") {
  weight_grad(kHopperPointwise);
}
CHECK_NAMED(sm90_window_forward, "sm90 window forward") {
  forward(kHopperWindow);
}
CHECK_NAMED(sm90_window_input, "sm90 window input gradient") {
  input_grad(kHopperWindow);
}
CHECK_NAMED(sm90_window_weight, "sm90 window weight gradient") {
  weight_grad(kHopperWindow);
}
CHECK_NAMED(sm90_resident_forward, "sm90 resident window forward") {
  forward(kHopperResident);
}
CHECK_NAMED(sm90_resident_input, "sm90 resident window input gradient") {
  input_grad(kHopperResident);
}
CHECK_NAMED(sm90_resident_weight, "sm90 resident window weight gradient") {
  weight_grad(kHopperResident);
}

}  // namespace
