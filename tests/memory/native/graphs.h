// Small training steps as Graphs, for the checks of all parts of the planner: convolutional networks with forward, loss
// and backward, whole or split in patches, with residual joins and weight gradients that are summed over patches. And a
// builder for graphs made by hand. Everything they make is valid (require_valid).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "memory/graph.h"

namespace graphs {

// Appends to a graph; every call returns an index.
class Builder {
 public:
  explicit Builder(std::string name = "graph") { graph.name = std::move(name); }

  using Kind = splitkern::memory::StorageKind;
  int32_t storage(std::string name, int64_t size_bytes, Kind kind = Kind::kActivation, bool is_output = false);
  // All of a storage, as bytes.
  int32_t whole(int32_t storage);
  // A storage of this size and its only tensor; returns the tensor.
  int32_t value(std::string name, int64_t size_bytes, Kind kind = Kind::kActivation, bool is_output = false);
  // A contiguous tensor with a storage of its own.
  int32_t contiguous(std::string name, std::vector<int64_t> sizes, int64_t element_bytes, Kind kind = Kind::kActivation,
                     bool is_output = false);
  // A part of a tensor: [begin, begin + sizes) of its elements.
  int32_t part(std::string name, int32_t tensor, const std::vector<int64_t>& begin, std::vector<int64_t> sizes);

  // The reference stays good until the next operation.
  splitkern::memory::Operation& operation(std::string name, std::string_view target, std::vector<int32_t> reads,
                                          std::vector<int32_t> writes, double duration_us = 1);
  // Operation::inplace for the last operation: each of these reads with write 0.
  void may_overwrite(std::vector<int32_t> reads);

  splitkern::memory::Graph graph;
};

// One block of a network: convolution 3×3 with stride 1, then BatchNorm, ReLU, max pooling 2×2.
struct Layer {
  int64_t channels = 8;
  bool pool = false;
  bool join = false;  // residual: what the block before got is added before the ReLU (needs equal sizes)
};

struct Net {
  std::string name = "net";
  int64_t batch = 2;
  int64_t channels = 3;  // of the images
  int64_t rows = 16;
  int64_t columns = 16;
  std::vector<Layer> layers = {{}, {}, {}};
  int64_t classes = 10;
  int64_t element_bytes = 4;
  bool batch_norm = true;
  // BatchNorm in one operation that also updates the running statistics, so that it can be run only once; else
  // statistics, update and application are operations of their own.
  bool batch_norm_mutates = false;
  bool dropout = false;  // before the classifier: a random operation
  bool channels_last = false;
  // The first `split_layers` layers run patch by patch, forward in order, backward in reverse order.
  int split_layers = 0;
  int64_t grid_rows = 1;
  int64_t grid_columns = 1;
  // Speed of the machine that the durations are estimated for.
  double flops_per_us = 12e6;
  double bytes_per_us = 500e3;
};

// Images and labels in, the loss, all parameter gradients and updated running statistics out. Throws
// std::invalid_argument where the layers do not fit together.
splitkern::memory::Graph training_step(const Net& net);

// Networks of well-known shape, by their layers: whole VGG-11 and VGG-19 (convolutions), and a plain residual network.
Net vgg11(int64_t batch, int64_t image = 224);
Net vgg19(int64_t batch, int64_t image = 224);
Net residual_net(int64_t batch, int64_t image, int blocks);

// Every kind of graph above once, small enough for exhaustive checks: chain, chain with mutating BatchNorm, residual,
// split 1×2 and 2×2, split residual, channels last, dropout.
std::vector<splitkern::memory::Graph> small_training_steps();

}  // namespace graphs
