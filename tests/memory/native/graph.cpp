// Checks of what a valid graph is, of its fingerprint, and of the kinds of operations.
#include "memory/graph.h"

#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <set>

#include "graphs.h"
#include "memory/errors.h"
#include "memory/operation_kinds.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

// x and w given, a = conv(x, w), b = relu(a) in place, running statistics r updated, s = a + b.
Graph small() {
  graphs::Builder builder("small");
  const int32_t x = builder.contiguous("x", {2, 8}, 4, StorageKind::kInput);
  const int32_t w = builder.contiguous("w", {8, 8}, 4, StorageKind::kParameter);
  const int32_t r = builder.contiguous("r", {8}, 4, StorageKind::kParameter);
  const int32_t a = builder.contiguous("a", {2, 8}, 4);
  const int32_t b = builder.contiguous("b", {2, 8}, 4);
  const int32_t s = builder.contiguous("s", {2, 8}, 4, StorageKind::kActivation, true);
  builder.operation("conv", targets::kConv2d, {x, w}, {a});
  builder.operation("relu", targets::kRelu, {a}, {b});
  builder.may_overwrite({0});
  builder.operation("update", "update", {a, r}, {r}).mutates = {0};
  builder.operation("sum", targets::kAdd, {a, b}, {s}).is_sum = true;
  return builder.graph;
}

void refused(const std::function<void(Graph&)>& change, const std::vector<std::string>& parts) {
  Graph graph = small();
  require_valid(graph);
  change(graph);
  check::refuses([&] { require_valid(graph); }, parts);
}

}  // namespace

CHECK_NAMED(graph_refusals, "graph: every rule is kept, and the text says where") {
  refused([](Graph& g) { g.storages[1].name = "x"; }, {"storages[1].name must be unique", "\"x\" again"});
  refused([](Graph& g) { g.tensors[2].name = "w"; }, {"tensors[2].name must be unique", "\"w\" again"});
  refused([](Graph& g) { g.operations[1].name = "conv"; }, {"operations[1].name must be unique", "\"conv\" again"});
  refused([](Graph& g) { g.storages[0].size_bytes = -1; }, {"storages[0] \"x\": size_bytes must be 0 or more, got -1"});
  refused([](Graph& g) { g.storages[0].size_bytes = g.storages[1].size_bytes = kHuge / 8; },
          {"storages[1] \"w\": size_bytes of all storages together", "1152921504606846975"});
  refused([](Graph& g) { g.storages[3].kind = static_cast<StorageKind>(4); }, {"storages[3] \"a\": kind", "got 4"});
  refused([](Graph& g) { g.tensors[0].storage = 6; }, {"tensors[0] \"x\": storage", "one of the 6 storages", "got 6"});
  refused([](Graph& g) { g.tensors[0].storage = -1; }, {"tensors[0] \"x\": storage", "got -1"});
  refused([](Graph& g) { g.tensors[0].offset_bytes = -4; },
          {"tensors[0] \"x\": offset_bytes must be 0 or more, got -4"});
  refused([](Graph& g) { g.tensors[0].element_bytes = 0; },
          {"tensors[0] \"x\": element_bytes must be 1 or more, got 0"});
  refused([](Graph& g) { g.tensors[0].sizes = {2}; },
          {"tensors[0] \"x\": strides_bytes must have as many", "(1), got 2"});
  refused([](Graph& g) { g.tensors[0].sizes[1] = -3; }, {"tensors[0] \"x\": sizes[1] must be 0 or more, got -3"});
  refused([](Graph& g) { g.tensors[0].strides_bytes[0] = -8; }, {"strides_bytes[0] must be 0 or more, got -8"});
  refused([](Graph& g) { g.tensors[0].sizes[0] = 3; },
          {"tensors[0] \"x\" must end within its storage \"x\" of 64 bytes, got an end of 96"});
  refused([](Graph& g) { g.tensors[0].offset_bytes = 4; }, {"tensors[0] \"x\"", "64 bytes, got an end of 68"});
  refused([](Graph& g) { g.tensors[0].sizes[0] = kHuge; }, {"tensors[0] \"x\"", "got an end beyond 64 bits"});
  refused([](Graph& g) { g.tensors[0].offset_bytes = kHuge; }, {"tensors[0] \"x\"", "got an end beyond 64 bits"});
  refused([](Graph& g) { g.tensors[0].sizes[0] = 0, g.tensors[0].offset_bytes = 65; }, {"got an end of 65"});

  refused([](Graph& g) { g.operations[0].duration_us = -1; },
          {"operations[0] \"conv\": duration_us must be finite", "-1"});
  refused([](Graph& g) { g.operations[0].duration_us = NAN; }, {"operations[0] \"conv\": duration_us", "nan"});
  refused([](Graph& g) { g.operations[0].duration_us = INFINITY; }, {"operations[0] \"conv\": duration_us", "inf"});
  refused([](Graph& g) { g.operations[0].duration_us = g.operations[1].duration_us = 1e308; },
          {"operations[1] \"relu\": duration_us of all operations together"});
  refused([](Graph& g) { g.operations[0].workspace_bytes = -1; }, {"operations[0] \"conv\": workspace_bytes", "-1"});
  refused([](Graph& g) { g.operations[0].workspace_bytes = kHuge; },
          {"operations[0] \"conv\": workspace_bytes", "at most"});
  refused([](Graph& g) { g.operations[0].patch = -2; }, {"operations[0] \"conv\": patch must be -1 or more, got -2"});
  refused([](Graph& g) { g.operations[0].reads[1] = 6; }, {"operations[0] \"conv\": reads[1]", "6 tensors, got 6"});
  refused([](Graph& g) { g.operations[0].writes[0] = -1; }, {"operations[0] \"conv\": writes[0]", "got -1"});
  refused([](Graph& g) { g.operations[0].accumulates = {1}; },
          {"operations[0] \"conv\": accumulates[0]", "1 writes, got 1"});
  refused([](Graph& g) { g.operations[0].accumulates = {0, 0}; }, {"accumulates[1] must be unique, got 0 again"});
  refused([](Graph& g) { g.operations[2].mutates = {-1}; }, {"operations[2] \"update\": mutates[0]", "got -1"});
  refused([](Graph& g) { g.operations[1].inplace[0].read = 1; }, {"inplace[0][0] must be", "1 reads, got 1"});
  refused([](Graph& g) { g.operations[1].inplace[0].write = -1; }, {"inplace[0][1] must be", "1 writes, got -1"});
  refused([](Graph& g) { g.operations[0].inplace = {{.read = 1, .write = 0}}; },
          {"operations[0] \"conv\": inplace[0] must pair boxes of equal", "\"w\" and \"a\""});
  refused([](Graph& g) { g.operations[2].reads = {3}; },
          {"operations[2] \"update\": mutates[0] must be a write of a tensor that is read too, got \"r\""});
  refused([](Graph& g) { g.operations[2].mutates = {}; },
          {"operations[2] \"update\": writes[0] must be a mutation", "\"r\""});
  refused([](Graph& g) { g.operations[0].writes = {0}; },
          {"operations[0] \"conv\": writes[0] must be a mutation", "\"x\""});
  refused([](Graph& g) { g.operations[3].reads = {3}; },
          {"operations[3] \"sum\": is_sum needs two reads", "got 1 and 1"});
  refused([](Graph& g) { g.operations[3].reads = {3, 2}; },
          {"operations[3] \"sum\": is_sum needs equal sizes", "\"r\""});
  refused([](Graph& g) { g.operations[3].writes = {5, 4, 5}; },
          {"operations[3] \"sum\": writes[2] must not overlap another write", "\"s\" over \"s\""});

  refused([](Graph& g) { std::swap(g.operations[0], g.operations[1]); },
          {"operations[0] \"relu\": reads[0] must have been written wholly", "\"a\""});
  // A cycle: each reads what the other writes.
  refused([](Graph& g) { g.operations[0].reads.push_back(4); }, {"operations[0] \"conv\": reads[2]", "\"b\""});
  refused([](Graph& g) { g.operations[0].reads.push_back(3); }, {"operations[0] \"conv\": reads[2]", "\"a\""});
}

CHECK_NAMED(graph_partly_written, "graph: a read of which one byte was not written is refused") {
  // A joined tensor of 4×6 elements, written in patches of 2×3.
  graphs::Builder builder;
  const int32_t joined = builder.contiguous("joined", {4, 6}, 2);
  std::vector<int32_t> patches;
  for (int64_t y = 0; y < 4; y += 2) {
    for (int64_t x = 0; x < 6; x += 3) {
      patches.push_back(builder.part("patch" + std::to_string(patches.size()), joined, {y, x}, {2, 3}));
      builder.operation("write" + std::to_string(patches.back()), "fill", {}, {patches.back()});
    }
  }
  const int32_t loss = builder.value("loss", 4, StorageKind::kActivation, true);
  builder.operation("read", "mean", {joined}, {loss});
  require_valid(builder.graph);
  for (const int32_t patch : patches) {
    Graph graph = builder.graph;
    graph.tensors[patch].sizes[1] -= 1;
    check::refuses([&] { require_valid(graph); }, {"operations[4] \"read\": reads[0]", "\"joined\""});
    graph.operations.back().reads = {patch};  // but this part is there
    require_valid(graph);
  }
  // Patches of one operation must not overlap; of several they may.
  Graph graph = builder.graph;
  graph.operations[0].writes = {patches[0], patches[1], patches[3]};
  require_valid(graph);
  graph.tensors[patches[1]].offset_bytes -= 2;
  check::refuses([&] { require_valid(graph); },
                 {"operations[0]", "writes[1] must not overlap another write", "\"patch1\""});
  graph.operations[0].writes = {patches[0]};
  check::refuses([&] { require_valid(graph); }, {"operations[4] \"read\": reads[0]"});
}

CHECK_NAMED(graph_empty, "graph: nothing at all, and values of no bytes") {
  require_valid(Graph{});
  graphs::Builder builder;
  const int32_t none = builder.contiguous("none", {0, 4}, 4);
  builder.operation("read", "mean", {none}, {});  // no byte of it is missing
  require_valid(builder.graph);
}

CHECK_NAMED(graph_random_coverage, "graph: reads before writes as a bitmap finds them, on random graphs") {
  std::mt19937_64 random(3);
  const auto pick = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
  };
  int valid = 0;
  int invalid = 0;
  for (int round = 0; round < 2000; ++round) {
    graphs::Builder builder;
    const int32_t parents = static_cast<int32_t>(pick(1, 2));
    const std::vector<int64_t> extents = {pick(1, 3), pick(1, 4), pick(1, 4)};
    for (int32_t i = 0; i < parents; ++i) builder.contiguous("parent" + std::to_string(i), extents, pick(1, 2));
    for (int32_t i = 0; i < 8; ++i) {
      std::vector<int64_t> begin, sizes;
      for (const int64_t extent : extents) {
        begin.push_back(pick(0, 1) ? 0 : pick(0, extent - 1));
        sizes.push_back(begin.back() == 0 && pick(0, 1) ? extent : pick(1, extent - begin.back()));
      }
      builder.part("part" + std::to_string(i), static_cast<int32_t>(pick(0, parents - 1)), begin, sizes);
    }
    const auto any = [&] { return static_cast<int32_t>(pick(0, parents + 7)); };
    for (int i = 0; i < 8; ++i) {
      std::vector<int32_t> reads;
      if (i > 3) reads.push_back(any());
      builder.operation("op" + std::to_string(i), "op", reads, {any()});
    }
    const Graph& graph = builder.graph;
    // The first operation that reads a byte too early.
    std::vector<std::vector<bool>> written(parents);
    for (int32_t i = 0; i < parents; ++i) written[i].resize(graph.storages[i].size_bytes);
    const auto each_byte = [&](const Tensor& tensor, const std::function<void(int64_t)>& visit) {
      for (int64_t a = 0; a < tensor.sizes[0]; ++a) {
        for (int64_t b = 0; b < tensor.sizes[1]; ++b) {
          for (int64_t c = 0; c < tensor.sizes[2] * tensor.element_bytes; ++c)
            visit(tensor.offset_bytes + a * tensor.strides_bytes[0] + b * tensor.strides_bytes[1] + c);
        }
      }
    };
    std::string expected;
    for (size_t i = 0; i < graph.operations.size() && expected.empty(); ++i) {
      for (const int32_t read : graph.operations[i].reads)
        each_byte(graph.tensors[read], [&](int64_t byte) {
          if (!written[graph.tensors[read].storage][byte]) expected = "operations[" + std::to_string(i) + "]";
        });
      for (const int32_t write : graph.operations[i].writes)
        each_byte(graph.tensors[write], [&](int64_t byte) { written[graph.tensors[write].storage][byte] = true; });
    }
    (expected.empty() ? valid : invalid) += 1;
    if (expected.empty())
      require_valid(graph);
    else
      check::refuses([&] { require_valid(graph); }, {expected, "must have been written wholly"});
  }
  check::require(valid > 200 && invalid > 200, std::to_string(valid) + " valid, " + std::to_string(invalid) + " not");
}

CHECK_NAMED(graph_fingerprint,
            "graph: the fingerprint changes with everything but names of the graph, modules and segments") {
  const Graph graph = small();
  std::set<std::string> seen{fingerprint(graph)};
  check::equal(seen.begin()->size(), 32u, "length");
  check::require(seen.begin()->find_first_not_of("0123456789abcdef") == std::string::npos, "hexadecimal");
  // Plans are stored: the same on every machine and from version to version.
  check::require(*seen.begin() == "f665b88dcc92bd3052d36267889cd801", "the fingerprint is " + *seen.begin());

  Graph other = graph;
  other.name = "another";
  other.operations[0].module = "layer1";
  other.operations[0].segment = "stem";
  check::require(fingerprint(other) == fingerprint(graph), "names");

  using Change = std::function<void(Graph&)>;
  const std::vector<Change> changes = {
      [](Graph& g) { g.durations_from = "measured"; },
      [](Graph& g) { g.storages[0].name = "y"; },
      [](Graph& g) { g.storages[0].size_bytes += 1; },
      [](Graph& g) { g.storages[0].kind = StorageKind::kParameter; },
      [](Graph& g) { g.storages[0].is_output = true; },
      [](Graph& g) { g.storages.pop_back(); },
      [](Graph& g) { g.tensors[0].name = "y"; },
      [](Graph& g) { g.tensors[0].storage = 1; },
      [](Graph& g) { g.tensors[0].offset_bytes = 4; },
      [](Graph& g) { g.tensors[0].sizes = {8, 2}; },
      [](Graph& g) { g.tensors[0].sizes = {2, 8, 1}; },
      [](Graph& g) { g.tensors[0].strides_bytes = {32, 8}; },
      [](Graph& g) { g.tensors[0].element_bytes = 2; },
      [](Graph& g) { g.operations[0].name = "convolution"; },
      [](Graph& g) { g.operations[0].target = "conv3d"; },
      [](Graph& g) { g.operations[0].duration_us = 1.0000000000000002; },
      [](Graph& g) { g.operations[0].workspace_bytes = 1; },
      [](Graph& g) { g.operations[0].reads = {1, 0}; },
      [](Graph& g) { g.operations[0].reads = {0}, g.operations[0].writes = {1, 3}; },
      [](Graph& g) { g.operations[0].writes = {4}; },
      [](Graph& g) { g.operations[1].inplace = {}; },
      [](Graph& g) { g.operations[1].inplace[0].read = 1; },
      [](Graph& g) { g.operations[1].inplace[0].write = 1; },
      [](Graph& g) { g.operations[0].accumulates = {0}; },
      [](Graph& g) { g.operations[0].mutates = {0}; },
      [](Graph& g) { g.operations[0].is_sum = true; },
      [](Graph& g) { g.operations[0].is_random = true; },
      [](Graph& g) { g.operations[0].is_backward = true; },
      [](Graph& g) { g.operations[0].patch = 0; },
      [](Graph& g) { std::swap(g.operations[0], g.operations[1]); },
      [](Graph& g) { g.operations.pop_back(); },
  };
  for (const Change& change : changes) {
    Graph changed = graph;
    change(changed);
    check::require(seen.insert(fingerprint(changed)).second, "change " + std::to_string(seen.size()) + " is not seen");
  }
  Graph zero = graph;
  zero.operations[0].duration_us = 0.0;
  const std::string positive = fingerprint(zero);
  zero.operations[0].duration_us = -0.0;
  check::require(fingerprint(zero) == positive, "zeros are equal, so their fingerprints are");
}

CHECK_NAMED(graph_kinds, "graph: kinds of operations and their targets") {
  for (int i = 1; i <= static_cast<int>(OperationKind::kAddmm); ++i) {
    const auto kind = static_cast<OperationKind>(i);
    check::require(kind_of(target_of(kind)) == kind, std::string(target_of(kind)));
  }
  check::require(kind_of(targets::kConv2dWeightGrad) == OperationKind::kConv2dWeightGrad, "conv2d_weight_grad");
  check::require(kind_of(targets::kReluBackward) == OperationKind::kReluBackward, "relu_backward");
  check::require(kind_of(targets::kAddmm) == OperationKind::kAddmm, "addmm");
  check::require(kind_of("aten.mean.dim") == OperationKind::kOther && kind_of("") == OperationKind::kOther, "others");
  check::require(is_window(OperationKind::kMaxPool2d) && !is_window(OperationKind::kConv2dInputGrad), "windows");
  check::require(is_compute_bound(OperationKind::kMm) && !is_compute_bound(OperationKind::kRelu), "compute bound");
}
