// Instances of the placement problem with known properties, for checks and benches, and for others to compare with:
// packings without a gap, and the buffers of CNN training steps. The same options give the same buffers on every
// platform and compiler: integers and SplitMix64 (placement/random.h), no standard distributions.
#pragma once

#include <cstdint>
#include <vector>

#include "memory/placement.h"

namespace splitkern::memory {

// A rectangle of `duration` by `height_bytes`, cut into pieces. The buffers are the pieces in random order, without
// their addresses: the lower bound is height_bytes, at every time, and a placement that reaches it exists.
struct PerfectPacking {
  int64_t buffers = 100;
  int64_t duration = 1'000'000;
  int64_t height_bytes = 1'048'576;
  // Every cut is at a multiple of these, chosen by the cut's share of what it cuts; large ones make many buffers alike.
  int64_t time_step = 1;
  int64_t byte_step = 1;
  // The share of cuts, in percent, that make a pinwheel (five pieces that no straight cut separates); the rest halve a
  // piece in time or in space.
  int32_t pinwheel_percent = 0;
  uint64_t seed = 1;
};

// Throws InvalidArgument if the rectangle cannot be cut into so many pieces.
std::vector<Buffer> perfect_packing(const PerfectPacking& options);

enum class Network : uint8_t { kVgg19, kResNet18, kResNet50 };

// The device buffers of one training step, one time unit an operation: activations until their last use in backward,
// gradients of activations, workspaces of convolutions, statistics of BatchNorm, offsets of max pooling. ReLU and
// residual sums work in place, the gradients on both sides of a residual sum share one buffer. The split region is the
// first half of the network's stages; its patches run one after the other, forward in order, backward in reverse.
struct TrainingTrace {
  Network network = Network::kResNet50;
  int64_t batch = 64;
  int64_t image = 224;  // height and width
  int64_t element_bytes = 4;
  int32_t grid = 1;    // grid x grid patches
  int32_t repeat = 1;  // every block of the network this many times: deeper networks
  // Activations that backward needs are offloaded and prefetched, in order, as fast as the link goes: two buffers each.
  bool offload = false;
  double tera_flops = 12;  // arithmetic of the machine, for how long an operation hides a copy
  double link_gbps = 34;
  // Each size is lowered at random by up to this much, so that not all buffers of a stage are alike.
  int32_t jitter_percent = 0;
  uint64_t seed = 1;
};

// Sizes are not yet rounded to an alignment. Throws InvalidArgument for options that are not positive.
std::vector<Buffer> training_trace(const TrainingTrace& options);

}  // namespace splitkern::memory
