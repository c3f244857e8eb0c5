// Checks of storage assignment: each rule by its exact result, and all together on random graphs against an interpreter
// that runs them byte by byte, with and without shared storages.
#include "memory/storage_assignment.h"

#include <algorithm>
#include <random>
#include <sstream>

#include "graphs.h"
#include "memory/operation_kinds.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

using Kind = StorageKind;

// "a>b>c, d>e; sum<producer": the planned storages of several members, then the fused sums.
std::string text_of(const Graph& graph, const StorageAssignment& assignment) {
  std::ostringstream text;
  bool is_first = true;
  for (const PlanStorage& storage : assignment.storages) {
    if (storage.members.size() < 2) continue;
    text << (is_first ? "" : ", ");
    is_first = false;
    for (size_t i = 0; i < storage.members.size(); ++i)
      text << (i == 0 ? "" : ">") << graph.storages[storage.members[i]].name;
  }
  is_first = true;
  for (const FusedSum& fused : assignment.fused) {
    text << (is_first ? "; " : ", ") << graph.operations[fused.sum].name << "<"
         << graph.operations[fused.producer].name;
    is_first = false;
  }
  return text.str();
}

void assigns(const Graph& graph, const std::string& expected, const AssignmentOptions& options = {}) {
  require_valid(graph);
  const std::string text = text_of(graph, assign_storages(graph, options));
  check::require(text == expected, graph.name + ": \"" + text + "\", expected \"" + expected + "\"");
}

// x in; a = conv(x); b = relu(a), which may overwrite; out = mean(b).
struct Chain {
  Chain() : builder("chain") {
    x = builder.contiguous("x", {4, 4}, 1, Kind::kInput);
    a = builder.contiguous("a", {4, 4}, 1);
    b = builder.contiguous("b", {4, 4}, 1);
    out = builder.contiguous("out", {}, 4, Kind::kActivation, true);
    builder.operation("conv", targets::kConv2d, {x}, {a});
    builder.operation("relu", targets::kRelu, {a}, {b});
    builder.may_overwrite({0});
    builder.operation("mean", "mean", {b}, {out});
  }
  Operation& operation(size_t i) { return builder.graph.operations[i]; }
  graphs::Builder builder;
  int32_t x, a, b, out;
};

// p and q made, s = p + q, which may overwrite both.
struct Sum {
  explicit Sum(Kind result = Kind::kActivation) : builder("sum") {
    x = builder.value("x", 8, Kind::kInput);
    p = builder.value("p", 8);
    q = builder.value("q", 8);
    s = builder.value("s", 8, result);
    out = builder.value("out", 8, Kind::kActivation, true);
    builder.operation("make p", "make", {x}, {p});
    builder.operation("make q", "make", {x}, {q});
    builder.operation("sum", targets::kAdd, {p, q}, {s}).is_sum = true;
    builder.may_overwrite({0, 1});
    builder.operation("use", "use", {s}, {out});
  }
  Operation& operation(size_t i) { return builder.graph.operations[i]; }
  graphs::Builder builder;
  int32_t x, p, q, s, out;
};

// Shares w0, w1, ... of a weight gradient, each made by an operation that can add to its destination and added to the
// sum so far; the last sum is the gradient.
graphs::Builder shares(int count) {
  graphs::Builder builder("shares");
  const int32_t x = builder.value("x", 8, Kind::kInput);
  int32_t sum = -1;
  for (int i = 0; i < count; ++i) {
    const std::string number = std::to_string(i);
    const int32_t share = builder.value("w" + number, 8);
    builder.operation("make" + number, targets::kConv2dWeightGrad, {x}, {share}).accumulates = {0};
    if (i > 0) {
      const int32_t next = builder.value("s" + number, 8, i + 1 == count ? Kind::kGradient : Kind::kActivation);
      builder.operation("sum" + number, targets::kAdd, {sum, share}, {next}).is_sum = true;
      builder.may_overwrite({0, 1});
      sum = next;
    } else {
      sum = share;
    }
  }
  return builder;
}

}  // namespace

CHECK_NAMED(assignment_inplace, "storage assignment: an element-wise operation takes the place of what dies at it") {
  assigns(Chain().builder.graph, "a>b");
  assigns(Chain().builder.graph, "", {.inplace = false});
  {
    Chain chain;  // read later
    chain.builder.operation("late", "late", {chain.a}, {});
    assigns(chain.builder.graph, "");
  }
  {
    Chain chain;  // a part of it is read later
    const int32_t part = chain.builder.part("part", chain.a, {3, 3}, {1, 1});
    chain.builder.operation("late", "late", {part}, {});
    assigns(chain.builder.graph, "");
  }
  {
    Chain chain;  // a part of it is written later
    const int32_t part = chain.builder.part("part", chain.a, {3, 3}, {1, 1});
    chain.builder.operation("late", "late", {}, {part});
    assigns(chain.builder.graph, "");
  }
  {
    Chain chain;  // its value is returned
    chain.builder.graph.storages[1].is_output = true;
    assigns(chain.builder.graph, "");
  }
  {
    Chain chain;  // the result may be returned, or be a gradient
    chain.builder.graph.storages[2].is_output = true;
    assigns(chain.builder.graph, "a>b");
    chain.builder.graph.storages[2].kind = Kind::kGradient;
    assigns(chain.builder.graph, "a>b");
    const StorageAssignment assignment = assign_storages(chain.builder.graph);
    check::require(kind_of(chain.builder.graph, assignment.storages[1]) == Kind::kGradient, "kind");
    check::require(is_output(chain.builder.graph, assignment.storages[1]), "output");
    check::require(!is_output(chain.builder.graph, assignment.storages[0]), "no output");
    check::require(kind_of(chain.builder.graph, assignment.storages[0]) == Kind::kInput, "kind of the input");
  }
  {
    Chain chain;  // a gradient is needed after the step
    chain.builder.graph.storages[1].kind = Kind::kGradient;
    assigns(chain.builder.graph, "");
  }
  {
    Chain chain;  // inputs and parameters stay
    chain.operation(1).reads = {chain.x};
    assigns(chain.builder.graph, "");
    chain.builder.graph.storages[0].kind = Kind::kParameter;
    assigns(chain.builder.graph, "");
  }
  {
    Chain chain;  // only part of the storage, on one side or on both
    chain.builder.graph.storages[1].size_bytes += 1;
    assigns(chain.builder.graph, "");
    chain.builder.graph.storages[2].size_bytes += 1;
    assigns(chain.builder.graph, "");
    chain.builder.graph.storages[1].size_bytes -= 1;
    assigns(chain.builder.graph, "");
  }
  {
    Chain chain;  // the operation reads it in a second way
    const int32_t rows = chain.builder.part("rows", chain.a, {0, 0}, {2, 4});
    chain.operation(1).reads = {chain.a, rows};
    assigns(chain.builder.graph, "");
    chain.operation(1).reads = {chain.a, chain.a};  // wholly, but not element by element
    assigns(chain.builder.graph, "");
    chain.operation(1).inplace = {{.read = 0, .write = 0}, {.read = 1, .write = 0}};
    assigns(chain.builder.graph, "a>b");
  }
  {
    Chain chain;  // the operation updates it, too
    chain.operation(1).writes = {chain.b, chain.a};
    chain.operation(1).mutates = {1};
    assigns(chain.builder.graph, "");
  }
  {
    Chain chain;  // two results: only one takes the place
    const int32_t second = chain.builder.contiguous("second", {4, 4}, 1);
    chain.operation(1).writes = {chain.b, second};
    chain.operation(1).inplace = {{.read = 0, .write = 1}, {.read = 0, .write = 0}};
    assigns(chain.builder.graph, "a>b");
  }
  {
    graphs::Builder builder("chains");  // a chain of three; a result that was begun before; values of no bytes
    const int32_t x = builder.value("x", 4, Kind::kInput);
    const int32_t a = builder.value("a", 4), b = builder.value("b", 4), c = builder.value("c", 4);
    const int32_t d = builder.value("d", 4), e = builder.value("e", 4);
    const int32_t none = builder.value("none", 0), nothing = builder.value("nothing", 0);
    builder.operation("1", "make", {x}, {a, e});
    builder.operation("2", "relu", {a}, {b});
    builder.may_overwrite({0});
    builder.operation("3", "relu", {b}, {c});
    builder.may_overwrite({0});
    builder.operation("4", "make", {x}, {d});
    builder.operation("5", "relu", {c}, {e});
    builder.may_overwrite({0});
    builder.operation("6", "relu", {none}, {nothing});
    builder.may_overwrite({0});
    builder.operation("7", "use", {d, e}, {});
    assigns(builder.graph, "a>b>c");
    check::require(assign_storages(builder.graph).storage_of == std::vector<int32_t>{0, 1, 1, 1, 2, 3, 4, 5},
                   "storage_of");
  }
}

CHECK_NAMED(assignment_sums, "storage assignment: a sum takes the place of the operand that dies") {
  assigns(Sum().builder.graph, "p>s");  // the one that was there first
  assigns(Sum().builder.graph, "p>s", {.inplace = false});
  assigns(Sum().builder.graph, "", {.sums = false});
  assigns(Sum(Kind::kGradient).builder.graph, "p>s");
  {
    Sum sum;
    sum.operation(2).reads = {sum.q, sum.p};
    assigns(sum.builder.graph, "p>s");
    sum.builder.operation("late", "late", {sum.p}, {});
    assigns(sum.builder.graph, "q>s");
    sum.builder.operation("later", "late", {sum.q}, {});
    assigns(sum.builder.graph, "");
  }
  {
    Sum sum;  // twice the same
    sum.operation(2).reads = {sum.p, sum.p};
    assigns(sum.builder.graph, "p>s");
  }
  {
    Sum sum;  // as far as the operation allows it
    sum.operation(2).inplace = {{.read = 1, .write = 0}};
    assigns(sum.builder.graph, "q>s");
    sum.operation(2).inplace = {};
    assigns(sum.builder.graph, "");
  }
  {
    graphs::Builder builder("joins");  // errors of three residual joins, one storage
    const int32_t x = builder.value("x", 8, Kind::kInput);
    int32_t error = builder.value("e0", 8);
    builder.operation("start", "make", {x}, {error});
    for (int i = 1; i <= 3; ++i) {
      const std::string number = std::to_string(i);
      const int32_t branch = builder.value("branch" + number, 8);
      builder.operation("conv" + number, targets::kConv2dInputGrad, {error}, {branch});
      const int32_t sum = builder.value("e" + number, 8);
      builder.operation("join" + number, targets::kAdd, {branch, error}, {sum}).is_sum = true;
      builder.may_overwrite({0, 1});
      error = sum;
    }
    builder.operation("end", "use", {error}, {});
    assigns(builder.graph, "e0>e1>e2>e3");
  }
}

CHECK_NAMED(assignment_accumulation,
            "storage assignment: shares of a weight gradient are added up where they are made") {
  assigns(shares(2).graph, "w0>w1>s1; sum1<make1");
  assigns(shares(4).graph, "w0>w1>s1>w2>s2>w3>s3; sum1<make1, sum2<make2, sum3<make3");
  assigns(shares(3).graph, "w0>s1>s2", {.accumulation = false});
  assigns(shares(3).graph, "w0>w1>s1>w2>s2; sum1<make1, sum2<make2", {.inplace = false, .sums = false});
  {
    Graph graph = shares(4).graph;
    const StorageAssignment assignment = assign_storages(graph);
    check::equal(assignment.storages.size(), 2u, "planned storages");
    check::require(kind_of(graph, assignment.storages[1]) == Kind::kGradient, "a gradient");
    // All shares first, then the sums: the same.
    std::stable_partition(graph.operations.begin(), graph.operations.end(),
                          [](const Operation& operation) { return !operation.is_sum; });
    assigns(graph, "w0>w1>s1>w2>s2>w3>s3; sum1<make1, sum2<make2, sum3<make3");
    // The other operand in the other place.
    for (Operation& operation : graph.operations) {
      if (operation.is_sum) std::swap(operation.reads[0], operation.reads[1]);
    }
    assigns(graph, "w0>w1>s1>w2>s2>w3>s3; sum1<make1, sum2<make2, sum3<make3");
  }
  const std::string in_place = "w0>s1";
  const auto shares_of_two = [] { return shares(2).graph; };
  const auto insert = [](Graph& graph, size_t at, Operation operation) {
    graph.operations.insert(graph.operations.begin() + static_cast<std::ptrdiff_t>(at), std::move(operation));
  };
  const auto reader = [](int32_t tensor) {
    return Operation{.name = "reader",
                     .target = "use",
                     .reads = {tensor},
                     .writes = {},
                     .inplace = {},
                     .accumulates = {},
                     .mutates = {},
                     .segment = {},
                     .module = {}};
  };
  // Tensors: x 0, w0 1, w1 2, s1 3. Operations: make0 0, make1 1, sum1 2.
  {
    Graph graph = shares_of_two();  // it cannot
    graph.operations[1].accumulates = {};
    assigns(graph, in_place);
  }
  {
    Graph graph = shares_of_two();  // that the first one can does not help: the second is not there yet
    graph.operations[1].accumulates = {};
    check::require(!graph.operations[0].accumulates.empty(), "the first can");
    assigns(graph, in_place);
  }
  {
    Graph graph = shares_of_two();  // the product is read by another
    insert(graph, 2, reader(2));
    assigns(graph, in_place);
  }
  {
    Graph graph = shares_of_two();  // and after the sum
    insert(graph, 3, reader(2));
    assigns(graph, in_place);
  }
  {
    Graph graph = shares_of_two();  // the other operand is read between
    insert(graph, 2, reader(1));
    assigns(graph, in_place);
  }
  {
    Graph graph = shares_of_two();  // or by the producer
    graph.operations[1].reads = {0, 1};
    assigns(graph, in_place);
  }
  {
    Graph graph = shares_of_two();  // or after the sum
    insert(graph, 3, reader(1));
    assigns(graph, "w1>s1");
  }
  {
    Graph graph = shares_of_two();  // but before the producer it may be
    insert(graph, 1, reader(1));
    assigns(graph, "w0>w1>s1; sum1<make1");
  }
  {
    Graph graph = shares_of_two();  // it is changed after the producer has run
    Operation change = reader(1);
    change.writes = {1};
    change.mutates = {0};
    insert(graph, 2, change);
    assigns(graph, in_place);
  }
  {
    Graph graph = shares_of_two();  // the product is changed after the producer has run
    Operation change = reader(0);
    change.writes = {4};
    graph.tensors.push_back({.name = "part", .storage = 2, .sizes = {3}, .strides_bytes = {1}});
    insert(graph, 2, change);
    assigns(graph, in_place);
  }
  {
    Graph graph = shares_of_two();  // one of both is returned
    graph.storages[2].is_output = true;
    assigns(graph, in_place);
    graph.storages[2].is_output = false;
    graph.storages[1].is_output = true;
    assigns(graph, "w1>s1");
    graph.storages[1].is_output = false;
    graph.storages[3].is_output = true;  // the sum may be
    assigns(graph, "w0>w1>s1; sum1<make1");
  }
  {
    Graph graph = shares_of_two();  // one of the storages is larger than its tensor
    graph.storages[2].size_bytes += 1;
    assigns(graph, in_place);
  }
  {
    Graph graph = shares_of_two();  // the producer has two such writes: which one adds would not be clear
    graph.storages.push_back({.name = "bias", .size_bytes = 8});
    graph.tensors.push_back({.name = "bias", .storage = 4, .sizes = {8}, .strides_bytes = {1}});
    graph.operations[1].writes.push_back(4);
    assigns(graph, "w0>w1>s1; sum1<make1");
    graph.operations[1].accumulates = {0, 1};
    assigns(graph, in_place);
    graph.operations[1].accumulates = {1};
    assigns(graph, in_place);
  }
  {
    Graph graph = shares_of_two();  // more than a sum
    graph.operations[2].is_random = true;
    assigns(graph, in_place);
  }
  {
    Graph graph = shares(3).graph;  // a sum that is not run adds to nothing, whatever it could
    // make0, make1, make2, sum1, sum2: the second sum could only be left to the first.
    std::stable_partition(graph.operations.begin(), graph.operations.end(),
                          [](const Operation& operation) { return !operation.is_sum; });
    graph.operations[2].accumulates = {};
    graph.operations[3].accumulates = {0};
    assigns(graph, "w0>w1>s1>s2; sum1<make1");
  }
  {
    // Sums as a tree: those of the leaves need not run, the one above adds in place.
    Graph graph = shares(4).graph;
    // w0 1, w1 2, s1 3, w2 4, s2 5, w3 6, s3 7; s2 = w2 + w3, s3 = s1 + s2.
    std::swap(graph.operations[4], graph.operations[5]);
    graph.operations[5].reads = {4, 6};
    graph.operations[6].reads = {3, 5};
    assigns(graph, "w0>w1>s1>s3, w2>w3>s2; sum1<make1, sum2<make3");
  }
}

CHECK_NAMED(assignment_training, "storage assignment: training steps of split and residual networks") {
  // Three convolutions split 2×2: three of four shares of each weight gradient vanish, and their sums.
  graphs::Net net{.layers = {{8}, {8, true}, {16}, {16}}, .split_layers = 3, .grid_rows = 2, .grid_columns = 2};
  const Graph graph = graphs::training_step(net);
  const StorageAssignment assignment = assign_storages(graph);
  check::equal(assignment.fused.size(), 9u, "fused sums");
  int gradients = 0;
  for (size_t i = 0; i < graph.storages.size(); ++i) {
    if (graph.storages[i].kind != Kind::kGradient) continue;
    ++gradients;
    const size_t members = assignment.storages[assignment.storage_of[i]].members.size();
    const std::string& name = graph.storages[i].name;
    const bool is_split = name.starts_with("layers.") && !name.starts_with("layers.3");
    // Weights: four shares and three sums. BatchNorm's backward cannot accumulate: the first share and the sums.
    check::equal(members, is_split ? (name.find("conv") != std::string::npos ? 7u : 4u) : 1u, name);
  }
  check::equal(gradients, 13, "gradients");

  // ReLU in the place of BatchNorm's result, and all errors in one place.
  const Graph chain = graphs::training_step({.name = "one layer", .layers = {{}}});
  assigns(chain,
          "layers.0.norm>layers.0.relu, probabilities>logits.grad, "
          "features.input_grad>layers.0.relu.input_grad>layers.0.norm.input_grad");

  const Graph residual = graphs::training_step(graphs::residual_net(2, 8, 1));
  assigns(residual,
          "layers.0.norm>layers.0.relu, layers.1.norm>layers.1.relu, layers.2.norm>layers.2.join>layers.2.relu, "
          "probabilities>logits.grad, "
          "features.input_grad>layers.2.relu.input_grad>grad_sum.layers.0.relu.0>layers.0.relu.input_grad>"
          "layers.0.norm.input_grad, "
          "layers.2.conv.input_grad>layers.1.relu.input_grad>layers.1.norm.input_grad");
}
