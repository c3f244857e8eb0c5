#include "memory/generators.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "memory/errors.h"
#include "memory/placement/random.h"

namespace splitkern::memory {
namespace {

using placement::Random;

void require_positive(const char* where, const char* name, double value) {
  if (!(value > 0)) {
    throw InvalidArgument(std::string(where) + ": " + name + " must be positive, got " + std::to_string(value));
  }
}

// ---- perfect packings ----

struct Piece {
  int64_t begin, end, bottom, top;
};

// A multiple of `step` strictly between low and high, in the middle 80 % where there is one; low: none.
int64_t cut(int64_t low, int64_t high, int64_t step, Random& random) {
  const int64_t begin = low / step + 1, end = (high + step - 1) / step;
  if (begin >= end) return low;
  const int64_t margin = (end - begin) / 10;
  return random.between(begin + margin, end - 1 - margin) * step;
}

// A step graph's nodes and values, without arithmetic.
struct Value {
  int64_t bytes = 0;
  int32_t gradient = -1;  // the storage class of its gradient: values that share one point to the same value
};

enum class Kind : uint8_t { kConvolution, kBatchNorm, kRelu, kMaxPool, kAdd, kHead };

struct Node {
  Kind kind;
  std::vector<int32_t> inputs;
  int32_t output;
  double flops = 0;
  int64_t workspace_bytes = 0;
  int64_t saved_bytes = 0;  // statistics, offsets: from forward until backward
};

struct Extent {
  int64_t height, width;
  int64_t area() const { return height * width; }
};

class StepBuilder {
 public:
  explicit StepBuilder(const TrainingTrace& options) : options_(options), random_(options.seed) {}

  std::vector<Buffer> run();

 private:
  // A value at some place in the network, for one patch.
  struct Flow {
    int32_t value;
    int64_t channels;
    Extent extent;
  };

  int32_t add_value(int64_t channels, Extent extent);
  Flow convolution(const Flow& in, int64_t channels, int64_t kernel, int64_t stride);
  Flow batch_norm(const Flow& in);
  Flow relu(const Flow& in);
  Flow max_pool(const Flow& in, int64_t stride);
  Flow block(const Flow& in, int64_t channels, int64_t stride, bool bottleneck);
  Flow stem(Flow flow);
  Flow stage(Flow flow, int32_t index);
  int32_t stages() const { return options_.network == Network::kVgg19 ? 5 : 4; }
  std::vector<Buffer> lifetimes();

  const TrainingTrace options_;
  Random random_;
  std::vector<Value> values_;
  std::vector<Node> nodes_;
  int32_t input_ = -1;  // the images: not in this pool
};

int32_t StepBuilder::add_value(int64_t channels, Extent extent) {
  int64_t bytes = options_.batch * channels * extent.area() * options_.element_bytes;
  if (options_.jitter_percent > 0) bytes -= random_.below(bytes / 100 * options_.jitter_percent + 1);
  values_.push_back({std::max<int64_t>(bytes, 1), static_cast<int32_t>(values_.size())});
  return static_cast<int32_t>(values_.size()) - 1;
}

StepBuilder::Flow StepBuilder::convolution(const Flow& in, int64_t channels, int64_t kernel, int64_t stride) {
  Flow out{-1, channels, {(in.extent.height + stride - 1) / stride, (in.extent.width + stride - 1) / stride}};
  out.value = add_value(out.channels, out.extent);
  const double products = static_cast<double>(options_.batch * out.extent.area()) *
                          static_cast<double>(in.channels * channels * kernel * kernel);
  // Implicit products need a little, transforms up to the size of what they transform.
  const int64_t workspace = kernel == 1 ? 0 : values_[out.value].bytes / (1 + random_.below(8));
  nodes_.push_back({Kind::kConvolution, {in.value}, out.value, 2 * products, workspace, 0});
  return out;
}

StepBuilder::Flow StepBuilder::batch_norm(const Flow& in) {
  Flow out = in;
  out.value = add_value(in.channels, in.extent);
  nodes_.push_back({Kind::kBatchNorm, {in.value}, out.value, 0, 0, 8 * in.channels});
  return out;
}

StepBuilder::Flow StepBuilder::relu(const Flow& in) {
  nodes_.push_back({Kind::kRelu, {in.value}, in.value, 0, 0, 0});
  return in;
}

StepBuilder::Flow StepBuilder::max_pool(const Flow& in, int64_t stride) {
  Flow out{-1, in.channels, {(in.extent.height + stride - 1) / stride, (in.extent.width + stride - 1) / stride}};
  out.value = add_value(out.channels, out.extent);
  nodes_.push_back({Kind::kMaxPool, {in.value}, out.value, 0, 0, options_.batch * out.channels * out.extent.area()});
  return out;
}

// A residual block: its input's gradient accumulates in the buffer of its output's.
StepBuilder::Flow StepBuilder::block(const Flow& in, int64_t channels, int64_t stride, bool bottleneck) {
  Flow flow = in;
  if (bottleneck) {
    flow = relu(batch_norm(convolution(flow, channels / 4, 1, 1)));
    flow = relu(batch_norm(convolution(flow, channels / 4, 3, stride)));
    flow = batch_norm(convolution(flow, channels, 1, 1));
  } else {
    flow = relu(batch_norm(convolution(flow, channels, 3, stride)));
    flow = batch_norm(convolution(flow, channels, 3, 1));
  }
  Flow shortcut = in;
  if (stride != 1 || in.channels != channels) shortcut = batch_norm(convolution(in, channels, 1, stride));
  nodes_.push_back({Kind::kAdd, {flow.value, shortcut.value}, flow.value, 0, 0, 0});
  return relu(flow);
}

StepBuilder::Flow StepBuilder::stem(Flow flow) {
  if (options_.network == Network::kVgg19) return flow;
  return max_pool(relu(batch_norm(convolution(flow, 64, 7, 2))), 2);
}

StepBuilder::Flow StepBuilder::stage(Flow flow, int32_t index) {
  if (options_.network == Network::kVgg19) {
    const int64_t channels = std::min<int64_t>(64 << index, 512);
    for (int32_t k = 0; k < (index < 2 ? 2 : 4) * options_.repeat; ++k) flow = relu(convolution(flow, channels, 3, 1));
    return max_pool(flow, 2);
  }
  const bool bottleneck = options_.network == Network::kResNet50;
  constexpr int32_t kBlocks18[] = {2, 2, 2, 2}, kBlocks50[] = {3, 4, 6, 3};
  const int32_t blocks = (bottleneck ? kBlocks50 : kBlocks18)[index] * options_.repeat;
  const int64_t channels = (bottleneck ? 256 : 64) << index;
  for (int32_t k = 0; k < blocks; ++k) flow = block(flow, channels, k == 0 && index > 0 ? 2 : 1, bottleneck);
  return flow;
}

std::vector<Buffer> StepBuilder::run() {
  const int32_t grid = options_.grid, split_stages = stages() / 2;
  Flow joined{};
  for (int32_t patch = 0; patch < grid * grid; ++patch) {
    const int64_t row = patch / grid, column = patch % grid, image = options_.image;
    const Extent extent{std::max<int64_t>(1, image * (row + 1) / grid - image * row / grid),
                        std::max<int64_t>(1, image * (column + 1) / grid - image * column / grid)};
    input_ = add_value(3, extent);
    values_[input_].bytes = 0;
    Flow flow = stem({input_, 3, extent});
    for (int32_t index = 0; index < split_stages; ++index) flow = stage(flow, index);
    if (grid == 1) {
      joined = flow;
      break;
    }
    // The last operation of every patch writes its part of the joined value.
    if (patch == 0) {
      joined = flow;
      joined.extent = {flow.extent.height * grid, flow.extent.width * grid};
      joined.value = add_value(flow.channels, joined.extent);
    }
    const int32_t own = flow.value;
    for (auto node = nodes_.rbegin(); node != nodes_.rend(); ++node) {
      for (int32_t& value : node->inputs) value = value == own ? joined.value : value;
      if (node->output != own) continue;
      node->output = joined.value;
      const bool in_place = node->kind == Kind::kRelu || node->kind == Kind::kAdd;
      if (!in_place) break;
    }
  }
  Flow flow = joined;
  for (int32_t index = split_stages; index < stages(); ++index) flow = stage(flow, index);
  nodes_.push_back({Kind::kHead, {flow.value}, add_value(1000, {1, 1}), 0, 0, 0});
  return lifetimes();
}

std::vector<Buffer> StepBuilder::lifetimes() {
  const auto count = static_cast<int64_t>(nodes_.size());
  const int64_t operations = 2 * count;
  // Forward is operations [0, count); the backward of node k is operation 2·count - 1 - k.
  struct Uses {
    int64_t first = -1, last_forward = -1, first_backward = -1, last = -1;
  };
  std::vector<Uses> activations(values_.size()), gradients(values_.size());
  const auto use = [&](Uses& uses, int64_t operation) {
    if (uses.first < 0 || operation < uses.first) uses.first = operation;
    if (operation < count) {
      uses.last_forward = std::max(uses.last_forward, operation);
    } else if (uses.first_backward < 0 || operation < uses.first_backward) {
      uses.first_backward = operation;
    }
    uses.last = std::max(uses.last, operation);
  };
  const auto gradient_of = [&](int32_t value) {
    while (values_[value].gradient != value) value = values_[value].gradient;
    return value;
  };
  std::vector<Buffer> buffers;
  std::vector<double> starts(operations + 1, 0);
  std::vector<double> durations(operations, 0);
  for (int64_t k = 0; k < count; ++k) {
    const Node& node = nodes_[k];
    if (node.kind == Kind::kAdd) values_[gradient_of(node.inputs[1])].gradient = gradient_of(node.output);
  }
  for (int64_t k = 0; k < count; ++k) {
    const Node& node = nodes_[k];
    const int64_t backward = operations - 1 - k;
    int64_t bytes = 0;
    for (const int32_t input : node.inputs) {
      use(activations[input], k);
      bytes += values_[input].bytes;
      if (node.kind == Kind::kConvolution || node.kind == Kind::kBatchNorm) use(activations[input], backward);
      if (values_[input].bytes > 0) use(gradients[gradient_of(input)], backward);
    }
    use(activations[node.output], k);
    bytes += values_[node.output].bytes;
    if (node.kind == Kind::kRelu) use(activations[node.output], backward);
    use(gradients[gradient_of(node.output)], backward);
    // Arithmetic or memory traffic, whichever takes longer, in microseconds; 500 GB/s.
    const double duration = std::max(node.flops / (options_.tera_flops * 1e6), static_cast<double>(bytes) / 5e5);
    durations[k] = duration;
    durations[backward] = 2 * duration;
    if (node.workspace_bytes > 0) {
      buffers.push_back({k, k + 1, node.workspace_bytes});
      buffers.push_back({backward, backward + 1, node.workspace_bytes});
    }
    if (node.saved_bytes > 0) buffers.push_back({k, backward + 1, node.saved_bytes});
  }
  for (int64_t k = 0; k < operations; ++k) starts[k + 1] = starts[k] + durations[k];
  const auto operation_at = [&](double time) {  // the first that starts at `time` or later
    return std::lower_bound(starts.begin(), starts.end(), time) - starts.begin();
  };

  std::vector<int32_t> order(values_.size());
  std::iota(order.begin(), order.end(), 0);
  std::vector<int64_t> offload_end(values_.size(), -1), prefetch_begin(values_.size(), -1);
  if (options_.offload) {
    const auto moves = [&](int32_t v) {
      return values_[v].bytes > 0 && activations[v].last_forward >= 0 && activations[v].first_backward >= 0;
    };
    const auto copy_us = [&](int32_t v) { return static_cast<double>(values_[v].bytes) / (options_.link_gbps * 1e3); };
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return activations[a].last_forward < activations[b].last_forward; });
    double free_at = 0;
    for (const int32_t v : order) {
      if (!moves(v)) continue;
      free_at = std::max(free_at, starts[activations[v].last_forward + 1]) + copy_us(v);
      offload_end[v] = std::max(operation_at(free_at), activations[v].last_forward + 1);
    }
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return activations[a].first_backward > activations[b].first_backward;
    });
    double needed = starts[operations];
    for (const int32_t v : order) {
      if (!moves(v)) continue;
      needed = std::min(needed, starts[activations[v].first_backward]) - copy_us(v);
      prefetch_begin[v] = std::min<int64_t>(operation_at(std::max(needed, 0.0)), activations[v].first_backward);
    }
  }
  for (size_t v = 0; v < values_.size(); ++v) {
    const Uses& activation = activations[v];
    const Uses& gradient = gradients[v];
    const int64_t bytes = values_[v].bytes;
    if (bytes == 0) continue;
    if (activation.first >= 0) {
      // What would be fetched before it has left stays.
      if (offload_end[v] >= 0 && offload_end[v] < prefetch_begin[v]) {
        buffers.push_back({activation.first, offload_end[v], bytes});
        buffers.push_back({prefetch_begin[v], activation.last + 1, bytes});
      } else {
        buffers.push_back({activation.first, activation.last + 1, bytes});
      }
    }
    if (gradient.first >= 0) buffers.push_back({gradient.first, gradient.last + 1, bytes});
  }
  return buffers;
}

}  // namespace

std::vector<Buffer> perfect_packing(const PerfectPacking& options) {
  const char* where = "perfect_packing";
  require_positive(where, "buffers", static_cast<double>(options.buffers));
  require_positive(where, "duration", static_cast<double>(options.duration));
  require_positive(where, "height_bytes", static_cast<double>(options.height_bytes));
  require_positive(where, "time_step", static_cast<double>(options.time_step));
  require_positive(where, "byte_step", static_cast<double>(options.byte_step));
  Random random(options.seed);
  std::vector<Piece> pieces{{0, options.duration, 0, options.height_bytes}};
  pieces.reserve(options.buffers);
  // Larger pieces are cut first: of several drawn, the largest.
  const auto share = [&](const Piece& piece) {
    return static_cast<double>(piece.end - piece.begin) / static_cast<double>(options.duration) *
           static_cast<double>(piece.top - piece.bottom) / static_cast<double>(options.height_bytes);
  };
  int64_t failures = 0;
  while (static_cast<int64_t>(pieces.size()) < options.buffers) {
    const auto count = static_cast<int64_t>(pieces.size());
    int64_t chosen = random.below(count);
    for (int draw = 0; draw < 2; ++draw) {
      const int64_t other = random.below(count);
      if (share(pieces[other]) > share(pieces[chosen])) chosen = other;
    }
    const Piece whole = pieces[chosen];
    bool done = false;
    if (count + 4 <= options.buffers && random.below(100) < options.pinwheel_percent) {
      const int64_t t1 = cut(whole.begin, whole.end, options.time_step, random);
      const int64_t t2 = cut(t1, whole.end, options.time_step, random);
      const int64_t b1 = cut(whole.bottom, whole.top, options.byte_step, random);
      const int64_t b2 = cut(b1, whole.top, options.byte_step, random);
      if (whole.begin < t1 && t1 < t2 && whole.bottom < b1 && b1 < b2) {
        const bool turned = random.below(2) != 0;  // clockwise or not
        pieces[chosen] = {t1, t2, b1, b2};
        if (turned) {
          pieces.push_back({whole.begin, t1, whole.bottom, b2});
          pieces.push_back({whole.begin, t2, b2, whole.top});
          pieces.push_back({t2, whole.end, b1, whole.top});
          pieces.push_back({t1, whole.end, whole.bottom, b1});
        } else {
          pieces.push_back({whole.begin, t1, b1, whole.top});
          pieces.push_back({t1, whole.end, b2, whole.top});
          pieces.push_back({t2, whole.end, whole.bottom, b2});
          pieces.push_back({whole.begin, t2, whole.bottom, b1});
        }
        done = true;
      }
    }
    if (!done) {
      const bool in_time = random.below(2) != 0;
      Piece rest = whole;
      if (in_time) {
        const int64_t at = cut(whole.begin, whole.end, options.time_step, random);
        done = at > whole.begin;
        pieces[chosen].end = done ? at : whole.end;
        rest.begin = at;
      } else {
        const int64_t at = cut(whole.bottom, whole.top, options.byte_step, random);
        done = at > whole.bottom;
        pieces[chosen].top = done ? at : whole.top;
        rest.bottom = at;
      }
      if (done) pieces.push_back(rest);
    }
    failures = done ? 0 : failures + 1;
    if (failures > 1000 + 20 * options.buffers) {
      throw InvalidArgument("perfect_packing: buffers " + std::to_string(options.buffers) +
                            " is too many for the duration, height and steps; reached " + std::to_string(count));
    }
  }
  for (auto i = static_cast<int64_t>(pieces.size()) - 1; i > 0; --i) std::swap(pieces[i], pieces[random.below(i + 1)]);
  std::vector<Buffer> buffers;
  buffers.reserve(pieces.size());
  for (const Piece& piece : pieces) buffers.push_back({piece.begin, piece.end, piece.top - piece.bottom});
  return buffers;
}

std::vector<Buffer> training_trace(const TrainingTrace& options) {
  const char* where = "training_trace";
  require_positive(where, "batch", static_cast<double>(options.batch));
  require_positive(where, "image", static_cast<double>(options.image));
  require_positive(where, "element_bytes", static_cast<double>(options.element_bytes));
  require_positive(where, "grid", options.grid);
  require_positive(where, "repeat", options.repeat);
  require_positive(where, "tera_flops", options.tera_flops);
  require_positive(where, "link_gbps", options.link_gbps);
  if (options.jitter_percent < 0 || options.jitter_percent > 100) {
    throw InvalidArgument("training_trace: jitter_percent must be in [0, 100], got " +
                          std::to_string(options.jitter_percent));
  }
  return StepBuilder(options).run();
}

}  // namespace splitkern::memory
