#include "graphs.h"

#include <algorithm>
#include <functional>
#include <map>
#include <stdexcept>
#include <utility>

#include "memory/operation_kinds.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace graphs {

int32_t Builder::storage(std::string name, int64_t size_bytes, Kind kind, bool is_output) {
  graph.storages.push_back({.name = std::move(name), .size_bytes = size_bytes, .kind = kind, .is_output = is_output});
  return static_cast<int32_t>(graph.storages.size()) - 1;
}

int32_t Builder::whole(int32_t storage) {
  const Storage& of = graph.storages[storage];
  graph.tensors.push_back({.name = of.name,
                           .storage = storage,
                           .offset_bytes = 0,
                           .sizes = {of.size_bytes},
                           .strides_bytes = {1},
                           .element_bytes = 1});
  return static_cast<int32_t>(graph.tensors.size()) - 1;
}

int32_t Builder::value(std::string name, int64_t size_bytes, Kind kind, bool is_output) {
  return whole(storage(std::move(name), size_bytes, kind, is_output));
}

int32_t Builder::contiguous(std::string name, std::vector<int64_t> sizes, int64_t element_bytes, Kind kind,
                            bool is_output) {
  std::vector<int64_t> strides(sizes.size());
  int64_t bytes = element_bytes;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = bytes;
    bytes *= sizes[i];
  }
  const int32_t of = storage(name, bytes, kind, is_output);
  graph.tensors.push_back({.name = std::move(name),
                           .storage = of,
                           .offset_bytes = 0,
                           .sizes = std::move(sizes),
                           .strides_bytes = std::move(strides),
                           .element_bytes = element_bytes});
  return static_cast<int32_t>(graph.tensors.size()) - 1;
}

int32_t Builder::part(std::string name, int32_t tensor, const std::vector<int64_t>& begin, std::vector<int64_t> sizes) {
  Tensor result = graph.tensors[tensor];
  result.name = std::move(name);
  for (size_t i = 0; i < begin.size(); ++i) result.offset_bytes += begin[i] * result.strides_bytes[i];
  result.sizes = std::move(sizes);
  graph.tensors.push_back(std::move(result));
  return static_cast<int32_t>(graph.tensors.size()) - 1;
}

Operation& Builder::operation(std::string name, std::string_view target, std::vector<int32_t> reads,
                              std::vector<int32_t> writes, double duration_us) {
  graph.operations.push_back({.name = std::move(name),
                              .target = std::string(target),
                              .duration_us = duration_us,
                              .workspace_bytes = 0,
                              .reads = std::move(reads),
                              .writes = std::move(writes),
                              .inplace = {},
                              .accumulates = {},
                              .mutates = {},
                              .segment = {},
                              .module = {}});
  return graph.operations.back();
}

void Builder::may_overwrite(std::vector<int32_t> reads) {
  for (const int32_t read : reads) graph.operations.back().inplace.push_back({.read = read, .write = 0});
}

namespace {

constexpr int32_t kNone = -1;
using Kind = StorageKind;

// Records the forward pass and, for each step of it, what the backward pass does; a small tape.
class Recorder {
 public:
  explicit Recorder(const Net& net) : net_(net), builder_(net.name) {}

  Graph record() {
    builder_.graph.durations_from = "estimate: " + std::to_string(net_.flops_per_us) + " operations and " +
                                    std::to_string(net_.bytes_per_us) + " bytes per microsecond";
    const int32_t images = map("images", net_.channels, net_.rows, net_.columns, Kind::kInput);
    const int32_t labels = builder_.contiguous("labels", {net_.batch}, 8, Kind::kInput);
    int32_t value = images;
    const auto split = static_cast<size_t>(net_.split_layers);
    if (split > net_.layers.size()) throw std::invalid_argument("split_layers must be at most the number of layers");
    for (size_t i = 0; i < net_.layers.size(); ++i) add_parameters(i);
    if (split > 0) value = region(images, split);
    segment_ = "tail";
    for (size_t i = split; i < net_.layers.size(); ++i) value = block(i, value, i == 0, kNone);
    classifier(value, labels);

    is_backward_ = true;
    for (size_t i = tape_.size(); i-- > 0;) tape_[i]();
    return std::move(builder_.graph);
  }

 private:
  struct Parameters {
    int32_t weight, gamma = kNone, beta = kNone, running_mean = kNone, running_var = kNone;
  };
  struct Extents {
    int64_t channels, rows, columns;
  };

  // Four-dimensional values.
  int32_t map(const std::string& name, int64_t channels, int64_t rows, int64_t columns, Kind kind = Kind::kActivation,
              int64_t element_bytes = 0) {
    const int64_t bytes = element_bytes ? element_bytes : net_.element_bytes;
    const int32_t tensor = builder_.contiguous(name, {net_.batch, channels, rows, columns}, bytes, kind);
    if (net_.channels_last)
      builder_.graph.tensors[tensor].strides_bytes = {rows * columns * channels * bytes, bytes,
                                                      columns * channels * bytes, channels * bytes};
    return tensor;
  }
  int32_t like(const std::string& name, int32_t tensor, int64_t element_bytes = 0) {
    const Extents extents = extents_of(tensor);
    return map(name, extents.channels, extents.rows, extents.columns, Kind::kActivation, element_bytes);
  }
  Extents extents_of(int32_t tensor) const {
    const std::vector<int64_t>& sizes = builder_.graph.tensors[tensor].sizes;
    return {sizes[1], sizes[2], sizes[3]};
  }
  int64_t bytes_of(int32_t tensor) const {
    const Tensor& of = builder_.graph.tensors[tensor];
    int64_t bytes = of.element_bytes;
    for (const int64_t size : of.sizes) bytes *= size;
    return bytes;
  }
  int32_t vector(const std::string& name, int64_t size, Kind kind = Kind::kActivation) {
    return builder_.contiguous(name, {size}, 4, kind);
  }

  Operation& operation(const std::string& name, std::string_view target, std::vector<int32_t> reads,
                       std::vector<int32_t> writes, double flops = 0) {
    int64_t bytes = 0;
    for (const int32_t tensor : reads) bytes += bytes_of(tensor);
    for (const int32_t tensor : writes) bytes += bytes_of(tensor);
    const double duration_us = std::max(flops / net_.flops_per_us, static_cast<double>(bytes) / net_.bytes_per_us);
    Operation& result = builder_.operation(name + suffix_, target, std::move(reads), std::move(writes), duration_us);
    result.is_backward = is_backward_;
    result.patch = patch_;
    result.segment = segment_;
    result.module = module_;
    return result;
  }

  void add_parameters(size_t i) {
    const std::string layer = "layers." + std::to_string(i);
    const int64_t from = i == 0 ? net_.channels : net_.layers[i - 1].channels;
    const int64_t to = net_.layers[i].channels;
    Parameters result{
        .weight = builder_.contiguous(layer + ".conv.weight", {to, from, 3, 3}, net_.element_bytes, Kind::kParameter)};
    if (net_.batch_norm) {
      result.gamma = vector(layer + ".norm.weight", to, Kind::kParameter);
      result.beta = vector(layer + ".norm.bias", to, Kind::kParameter);
      result.running_mean = vector(layer + ".norm.running_mean", to, Kind::kParameter);
      result.running_var = vector(layer + ".norm.running_var", to, Kind::kParameter);
    }
    parameters_.push_back(result);
  }

  // Backward of everything recorded from here on sees this patch and names.
  void on_tape(std::function<void()> backward) {
    tape_.push_back(
        [this, backward = std::move(backward), patch = patch_, suffix = suffix_, segment = segment_, module = module_] {
          patch_ = patch;
          suffix_ = suffix;
          segment_ = segment;
          module_ = module;
          backward();
        });
  }

  // The gradient of a value is the sum of what its readers send back.
  void send(int32_t tensor, int32_t gradient) {
    const auto [place, is_first] = gradients_.try_emplace(tensor, gradient);
    if (is_first) return;
    const std::string name = "grad_sum." + builder_.graph.tensors[tensor].name + "." + std::to_string(counter_++);
    const int32_t sum = like(name, tensor);
    operation(name, targets::kAdd, {place->second, gradient}, {sum}).is_sum = true;
    builder_.may_overwrite({0, 1});
    place->second = sum;
  }
  // Of a parameter: one share per patch, added up; the last sum is the gradient.
  void send_parameter(int32_t parameter, int shares, const std::function<void(int32_t)>& produce) {
    const std::string name = builder_.graph.tensors[parameter].name;
    const Tensor of = builder_.graph.tensors[parameter];
    const auto make = [&](const std::string& made, bool is_last) {
      return builder_.contiguous(made, of.sizes, of.element_bytes, is_last ? Kind::kGradient : Kind::kActivation);
    };
    const int done = shares_[parameter]++;
    const int32_t share =
        make(shares == 1 ? name + ".grad" : name + ".grad_share." + std::to_string(done), shares == 1);
    produce(share);
    if (shares == 1) return;
    if (done == 0) {
      gradients_[parameter] = share;
      return;
    }
    const bool is_last = done == shares - 1;
    const std::string made = is_last ? name + ".grad" : name + ".grad_sum." + std::to_string(done);
    const int32_t sum = make(made, is_last);
    operation("sum." + made, targets::kAdd, {gradients_[parameter], share}, {sum}).is_sum = true;
    builder_.may_overwrite({0, 1});
    gradients_[parameter] = sum;
  }

  // `destination`: where the last operation writes (a patch of a joined tensor), else a storage of its own.
  int32_t block(size_t i, int32_t input, bool is_first, int32_t destination) {
    const Layer& layer = net_.layers[i];
    module_ = "layers." + std::to_string(i);
    const std::string name = module_ + suffix_;
    const Extents extents = extents_of(input);
    const int shares = patch_ == kNone ? 1 : static_cast<int>(net_.grid_rows * net_.grid_columns);
    const auto target_for = [&](bool is_last, const std::string& made, int64_t channels, int64_t rows,
                                int64_t columns) {
      return is_last && destination != kNone ? destination : map(made, channels, rows, columns);
    };

    int32_t value = convolution(i, input, is_first, shares,
                                target_for(false, name + ".conv", layer.channels, extents.rows, extents.columns));
    if (net_.batch_norm) value = norm(i, value, shares);
    if (layer.join) {
      if (previous_input_ == kNone) throw std::invalid_argument("a residual join needs a block before it");
      value = join(name, value, previous_input_);
    }
    value = relu(name, value, target_for(!layer.pool, name + ".relu", layer.channels, extents.rows, extents.columns));
    if (layer.pool) {
      if (extents.rows % 2 != 0 || extents.columns % 2 != 0) throw std::invalid_argument("pooling needs even extents");
      value =
          pool(name, value, target_for(true, name + ".pool", layer.channels, extents.rows / 2, extents.columns / 2));
    }
    previous_input_ = input;
    return value;
  }

  int32_t convolution(size_t i, int32_t input, bool is_first, int shares, int32_t output) {
    const int32_t weight = parameters_[i].weight;
    const std::string name = module_ + ".conv";
    const double flops = 2.0 * static_cast<double>(bytes_of(output)) / static_cast<double>(net_.element_bytes) * 9.0 *
                         static_cast<double>(extents_of(input).channels);
    operation(name, targets::kConv2d, {input, weight}, {output}, flops);
    on_tape([=, this] {
      const int32_t gradient = gradients_.at(output);
      if (!is_first) {
        const int32_t input_gradient = like(name + ".input_grad" + suffix_, input);
        operation(name + ".input_grad", targets::kConv2dInputGrad, {gradient, weight}, {input_gradient}, flops);
        send(input, input_gradient);
      }
      send_parameter(weight, shares, [&](int32_t share) {
        operation(name + ".weight_grad", targets::kConv2dWeightGrad, {gradient, input}, {share}, flops).accumulates = {
            0};
      });
    });
    return output;
  }

  int32_t norm(size_t i, int32_t input, int shares) {
    const Parameters parameters = parameters_[i];
    const std::string name = module_ + ".norm";
    const std::string made = name + suffix_;
    const int64_t channels = extents_of(input).channels;
    const int32_t output = like(made, input);
    const int32_t mean = vector(made + ".mean", channels);
    const int32_t invstd = vector(made + ".invstd", channels);
    const std::vector<int32_t> running = {parameters.running_mean, parameters.running_var};
    if (net_.batch_norm_mutates) {
      operation(name, targets::kBatchNorm, {input, parameters.gamma, parameters.beta, running[0], running[1]},
                {output, mean, invstd, running[0], running[1]})
          .mutates = {3, 4};
    } else {
      operation(name + ".statistics", "batch_norm_statistics", {input}, {mean, invstd});
      operation(name + ".update", "batch_norm_update", {mean, invstd, running[0], running[1]}, running).mutates = {0,
                                                                                                                   1};
      operation(name, targets::kBatchNorm, {input, mean, invstd, parameters.gamma, parameters.beta}, {output});
    }
    builder_.may_overwrite({0});
    on_tape([=, this] {
      const int32_t gradient = gradients_.at(output);
      const int32_t input_gradient = like(name + ".input_grad" + suffix_, input);
      // Its shares come from one operation, so the sums follow it.
      send_parameter(parameters.gamma, shares, [&](int32_t gamma_share) {
        send_parameter(parameters.beta, shares, [&](int32_t beta_share) {
          operation(name + ".backward", targets::kBatchNormBackward, {gradient, input, mean, invstd, parameters.gamma},
                    {input_gradient, gamma_share, beta_share});
          builder_.may_overwrite({0});
        });
      });
      send(input, input_gradient);
    });
    return output;
  }

  int32_t join(const std::string& name, int32_t value, int32_t skip) {
    if (builder_.graph.tensors[value].sizes != builder_.graph.tensors[skip].sizes)
      throw std::invalid_argument("a residual join needs equal sizes");
    const int32_t output = like(name + ".join", value);
    operation(module_ + ".join", targets::kAdd, {value, skip}, {output}).is_sum = true;
    // The skip may be a patch of a joined tensor: its box is another.
    const auto same = [&](int32_t tensor) {
      return builder_.graph.tensors[tensor].strides_bytes == builder_.graph.tensors[output].strides_bytes &&
             builder_.graph.tensors[tensor].offset_bytes == 0;
    };
    builder_.may_overwrite(same(skip) ? std::vector<int32_t>{0, 1} : std::vector<int32_t>{0});
    on_tape([=, this] {
      const int32_t gradient = gradients_.at(output);
      send(value, gradient);
      send(skip, gradient);
    });
    return output;
  }

  int32_t relu(const std::string& name, int32_t input, int32_t output) {
    operation(module_ + ".relu", targets::kRelu, {input}, {output});
    may_overwrite_if_same(input, output);
    on_tape([=, this] {
      const int32_t gradient = gradients_.at(output);
      const int32_t input_gradient = like(name + ".relu.input_grad", input);
      operation(module_ + ".relu.backward", targets::kReluBackward, {gradient, output}, {input_gradient});
      may_overwrite_if_same(gradient, input_gradient);
      send(input, input_gradient);
    });
    return output;
  }
  void may_overwrite_if_same(int32_t read, int32_t write) {
    const Tensor& a = builder_.graph.tensors[read];
    const Tensor& b = builder_.graph.tensors[write];
    if (a.strides_bytes == b.strides_bytes && a.offset_bytes == b.offset_bytes) builder_.may_overwrite({0});
  }

  int32_t pool(const std::string& name, int32_t input, int32_t output) {
    const int32_t offsets = like(name + ".pool.offsets", output, 1);
    operation(module_ + ".pool", targets::kMaxPool2d, {input}, {output, offsets});
    on_tape([=, this] {
      const int32_t gradient = gradients_.at(output);
      const int32_t input_gradient = like(name + ".pool.input_grad", input);
      operation(module_ + ".pool.backward", targets::kMaxPool2dBackward, {gradient, offsets}, {input_gradient});
      send(input, input_gradient);
    });
    return output;
  }

  // The first layers, patch after patch; every patch's last operation writes its box of the joined tensor.
  int32_t region(int32_t images, size_t layers) {
    int64_t scale = 1;
    for (size_t i = 0; i < layers; ++i) scale *= net_.layers[i].pool ? 2 : 1;
    if (net_.rows % (net_.grid_rows * scale) != 0 || net_.columns % (net_.grid_columns * scale) != 0)
      throw std::invalid_argument("the grid must divide the joined extents");
    const int64_t rows = net_.rows / net_.grid_rows;
    const int64_t columns = net_.columns / net_.grid_columns;
    const int64_t channels = net_.layers[layers - 1].channels;
    const int32_t joined = map("joined", channels, net_.rows / scale, net_.columns / scale);
    segment_ = "region";
    for (int64_t y = 0; y < net_.grid_rows; ++y) {
      for (int64_t x = 0; x < net_.grid_columns; ++x) {
        patch_ = static_cast<int32_t>(y * net_.grid_columns + x);
        suffix_ = ".patch" + std::to_string(patch_);
        int32_t value = builder_.part("images" + suffix_, images, {0, 0, y * rows, x * columns},
                                      {net_.batch, net_.channels, rows, columns});
        const std::vector<int64_t> begin = {0, 0, y * rows / scale, x * columns / scale};
        const std::vector<int64_t> sizes = {net_.batch, channels, rows / scale, columns / scale};
        const int32_t output = builder_.part("joined" + suffix_, joined, begin, sizes);
        previous_input_ = kNone;
        for (size_t i = 0; i < layers; ++i) value = block(i, value, i == 0, i + 1 == layers ? output : kNone);
        // The gradient of the joined tensor is one storage; every patch reads its box.
        on_tape([=, this] {
          gradients_[output] = builder_.part("joined.grad" + suffix_, gradients_.at(joined), begin, sizes);
        });
      }
    }
    patch_ = kNone;
    suffix_.clear();
    previous_input_ = kNone;
    return joined;
  }

  void classifier(int32_t value, int32_t labels) {
    module_ = "classifier";
    const Extents extents = extents_of(value);
    const int64_t bytes = net_.element_bytes;
    const int32_t weight =
        builder_.contiguous("classifier.weight", {net_.classes, extents.channels}, bytes, Kind::kParameter);
    const auto features_like = [&](const std::string& name) {
      return builder_.contiguous(name, {net_.batch, extents.channels}, bytes);
    };
    int32_t features = features_like("features");
    const double flops = 2.0 * static_cast<double>(net_.batch * extents.channels * net_.classes);
    operation("features", "aten.mean.dim", {value}, {features});
    int32_t mask = kNone;
    if (net_.dropout) {
      mask = builder_.contiguous("dropout.mask", {net_.batch, extents.channels}, 1);
      const int32_t dropped = features_like("dropout");
      Operation& dropout = operation("dropout", "aten.native_dropout.default", {features}, {dropped, mask});
      dropout.is_random = true;
      builder_.may_overwrite({0});
      features = dropped;
    }
    const int32_t logits = builder_.contiguous("logits", {net_.batch, net_.classes}, bytes);
    operation("logits", targets::kMm, {features, weight}, {logits}, flops);
    const int32_t loss = builder_.contiguous("loss", {}, 4, Kind::kActivation, true);
    const int32_t probabilities = builder_.contiguous("probabilities", {net_.batch, net_.classes}, bytes);
    operation("loss", "aten.nll_loss_forward.default", {logits, labels}, {loss, probabilities});

    on_tape([=, this] {
      const int32_t logits_gradient = builder_.contiguous("logits.grad", {net_.batch, net_.classes}, bytes);
      operation("loss.backward", "aten.nll_loss_backward.default", {probabilities, labels}, {logits_gradient});
      builder_.may_overwrite({0});
      const int32_t weight_gradient =
          builder_.contiguous("classifier.weight.grad", {net_.classes, extents.channels}, bytes, Kind::kGradient);
      int32_t gradient = builder_.contiguous("features.grad", {net_.batch, extents.channels}, bytes);
      operation("logits.input_grad", targets::kMm, {logits_gradient, weight}, {gradient}, flops);
      operation("logits.weight_grad", targets::kMm, {logits_gradient, features}, {weight_gradient}, flops);
      if (mask != kNone) {
        const int32_t before = builder_.contiguous("dropout.grad", {net_.batch, extents.channels}, bytes);
        operation("dropout.backward", "aten.native_dropout_backward.default", {gradient, mask}, {before});
        builder_.may_overwrite({0});
        gradient = before;
      }
      const int32_t value_gradient = like("features.input_grad", value);
      operation("features.backward", "aten.expand.default", {gradient}, {value_gradient});
      send(value, value_gradient);
    });
  }

  const Net& net_;
  Builder builder_;
  std::vector<Parameters> parameters_;
  std::vector<std::function<void()>> tape_;
  std::map<int32_t, int32_t> gradients_;  // of tensors
  std::map<int32_t, int> shares_;         // of parameters, so far
  int32_t previous_input_ = kNone;        // of the block before
  int32_t patch_ = kNone;
  std::string suffix_;
  std::string segment_;
  std::string module_;
  bool is_backward_ = false;
  int counter_ = 0;
};

Net vgg(std::string name, int64_t batch, int64_t image, const std::vector<std::pair<int64_t, int>>& stages) {
  Net net{.name = std::move(name), .batch = batch, .rows = image, .columns = image, .layers = {}, .classes = 1000};
  net.batch_norm = false;
  for (const auto& [channels, count] : stages) {
    for (int i = 0; i < count; ++i) net.layers.push_back({.channels = channels, .pool = i + 1 == count});
  }
  return net;
}

}  // namespace

Graph training_step(const Net& net) {
  return Recorder(net).record();
}

Net vgg11(int64_t batch, int64_t image) {
  return vgg("vgg11", batch, image, {{64, 1}, {128, 1}, {256, 2}, {512, 2}, {512, 2}});
}

Net vgg19(int64_t batch, int64_t image) {
  return vgg("vgg19", batch, image, {{64, 2}, {128, 2}, {256, 4}, {512, 4}, {512, 4}});
}

Net residual_net(int64_t batch, int64_t image, int blocks) {
  Net net{.name = "residual", .batch = batch, .rows = image, .columns = image, .layers = {{.channels = 16}}};
  for (int i = 0; i < blocks; ++i) {
    net.layers.push_back({.channels = 16});
    net.layers.push_back({.channels = 16, .join = true});
  }
  return net;
}

std::vector<Graph> small_training_steps() {
  std::vector<Net> nets;
  nets.push_back({.name = "chain"});
  nets.push_back({.name = "chain without norm", .layers = {{8, true}, {16}, {16, true}}, .batch_norm = false});
  nets.push_back({.name = "mutating norm", .batch_norm_mutates = true});
  nets.push_back(residual_net(2, 8, 2));
  nets.push_back({.name = "split 1x2", .layers = {{8}, {8}, {8, true}, {8}}, .split_layers = 2, .grid_columns = 2});
  nets.push_back({.name = "split 2x2",
                  .layers = {{8}, {8, true}, {16}, {16}},
                  .dropout = true,
                  .split_layers = 3,
                  .grid_rows = 2,
                  .grid_columns = 2});
  Net residual = residual_net(2, 16, 3);
  residual.name = "split residual";
  residual.split_layers = 5;
  residual.grid_rows = residual.grid_columns = 2;
  nets.push_back(residual);
  nets.push_back({.name = "channels last",
                  .layers = {{8}, {8, true}, {16}},
                  .element_bytes = 2,
                  .channels_last = true,
                  .split_layers = 2,
                  .grid_rows = 2});
  nets.push_back({.name = "dropout", .dropout = true});
  std::vector<Graph> result;
  for (const Net& net : nets) result.push_back(training_step(net));
  return result;
}

}  // namespace graphs

CHECK_NAMED(graphs_are_valid, "graph: training steps of the builder are valid") {
  for (const Graph& graph : graphs::small_training_steps()) require_valid(graph);
  require_valid(graphs::training_step(graphs::vgg19(64)));
}
