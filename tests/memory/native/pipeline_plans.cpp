#include "memory/native/pipeline_plans.h"

#include <algorithm>
#include <map>
#include <random>
#include <string>

using namespace splitkern::memory;

namespace pipeline_plans {
namespace {

class Dice {
 public:
  explicit Dice(uint64_t seed) : engine_(seed) {}
  int32_t between(int32_t least, int32_t most) {
    return least + static_cast<int32_t>(engine_() % static_cast<uint64_t>(most - least + 1));
  }
  bool chance(int32_t percent) { return between(1, 100) <= percent; }

 private:
  std::mt19937_64 engine_;
};

class GraphBuilder {
 public:
  explicit GraphBuilder(uint64_t seed) : dice(seed) {}

  int32_t storage(const std::string& name, int64_t size_bytes, StorageKind kind, bool is_output = false) {
    graph.storages.push_back({.name = name, .size_bytes = size_bytes, .kind = kind, .is_output = is_output});
    return static_cast<int32_t>(graph.storages.size()) - 1;
  }
  int32_t tensor(int32_t storage, int64_t offset, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
    graph.tensors.push_back({.name = "t" + std::to_string(graph.tensors.size()),
                             .storage = storage,
                             .offset_bytes = offset,
                             .sizes = std::move(sizes),
                             .strides_bytes = std::move(strides),
                             .element_bytes = 1});
    return static_cast<int32_t>(graph.tensors.size()) - 1;
  }
  // A storage and the tensor that is all of it.
  int32_t whole(const std::string& name, int64_t size_bytes, StorageKind kind, bool is_output = false) {
    const int32_t index = storage(name, size_bytes, kind, is_output);
    return tensor(index, 0, {size_bytes}, {1});
  }
  Operation& operation(const std::string& name, std::vector<int32_t> reads, std::vector<int32_t> writes) {
    Operation made;
    made.name = name;
    made.target = "test";
    made.duration_us = 1;
    made.workspace_bytes = dice.chance(20) ? dice.between(1, 100) : 0;
    made.reads = std::move(reads);
    made.writes = std::move(writes);
    graph.operations.push_back(std::move(made));
    return graph.operations.back();
  }

  Graph graph;
  Dice dice;
};

int32_t storage_of(const Graph& graph, int32_t tensor) {
  return graph.tensors[static_cast<size_t>(tensor)].storage;
}

}  // namespace

Graph random_graph(uint64_t seed) {
  GraphBuilder builder(seed);
  Dice& dice = builder.dice;
  const int32_t layers = dice.between(2, 6);
  const int64_t width = dice.between(4, 60) * 2;  // bytes of every activation, so that all can be summed
  std::vector<int32_t> activations = {builder.whole("images", width, StorageKind::kInput)};
  const int32_t labels = builder.whole("labels", 16, StorageKind::kInput);
  std::vector<int32_t> weights = {-1};
  std::vector<int32_t> skips = {-1};  // by layer: the earlier activation that it reads too

  for (int32_t layer = 1; layer <= layers; ++layer) {
    const std::string name = std::to_string(layer);
    weights.push_back(builder.whole("weight" + name, dice.between(8, 40), StorageKind::kParameter));
    const int32_t before = activations.back();
    skips.push_back(layer >= 3 && dice.chance(40) ? activations[static_cast<size_t>(dice.between(1, layer - 2))] : -1);
    std::vector<int32_t> reads = {before, weights.back()};
    if (skips.back() >= 0) reads.push_back(skips.back());
    const int32_t kind = dice.between(0, 3);
    if (kind == 0) {  // two patches: interleaved halves of rows of one storage
      const int32_t joined = builder.storage("joined" + name, width, StorageKind::kActivation);
      const int64_t half = width / 4;
      for (int32_t patch = 0; patch < 2; ++patch) {
        const int32_t box =
            builder.tensor(joined, patch * half, {2, patch == 0 ? half : width / 2 - half}, {width / 2, 1});
        builder.operation("patch" + name + "_" + std::to_string(patch), reads, {box}).patch = patch;
      }
      activations.push_back(builder.tensor(joined, 0, {width}, {1}));
    } else {
      const int32_t convolved = builder.whole("convolved" + name, width, StorageKind::kActivation);
      std::vector<int32_t> writes = {convolved};
      if (kind == 1) {  // running statistics
        const int32_t running = builder.whole("running" + name, 8, StorageKind::kParameter);
        reads.push_back(running);
        writes.push_back(running);
        builder.operation("norm" + name, reads, writes).mutates = {1};
      } else {
        builder.operation("convolution" + name, reads, writes).is_random = dice.chance(20);
      }
      if (kind == 2) {
        const int32_t relu = builder.whole("relu" + name, width, StorageKind::kActivation);
        builder.operation("relu" + name, {convolved}, {relu}).inplace = {{.read = 0, .write = 0}};
        activations.push_back(relu);
      } else {
        activations.push_back(convolved);
      }
    }
  }

  std::map<int32_t, int32_t> gradient_of;  // by activation
  const int32_t loss = builder.whole("loss", 8, StorageKind::kActivation, /*is_output=*/true);
  int32_t gradient = builder.whole("gradient" + std::to_string(layers), width, StorageKind::kActivation);
  builder.operation("loss", {activations.back(), labels}, {loss, gradient});
  for (int32_t layer = layers; layer >= 1; --layer) {
    const std::string name = std::to_string(layer);
    const auto index = static_cast<size_t>(layer);
    // Of skip connections, which came first since later layers are further back.
    if (const auto other = gradient_of.find(activations[index]); other != gradient_of.end()) {
      const int32_t sum = builder.whole("sum" + name, width, StorageKind::kActivation);
      Operation& operation = builder.operation("sum" + name, {other->second, gradient}, {sum});
      operation.is_sum = true;
      operation.workspace_bytes = 0;
      operation.inplace = {{.read = 0, .write = 0}, {.read = 1, .write = 0}};
      gradient = sum;
    }
    const int32_t weight_gradient =
        builder.whole("weight_gradient" + name,
                      builder.graph.storages[static_cast<size_t>(storage_of(builder.graph, weights[index]))].size_bytes,
                      StorageKind::kGradient);
    builder.operation("backward_weight" + name, {gradient, activations[index - 1]}, {weight_gradient}).is_backward =
        true;
    if (skips[index] >= 0) {
      const int32_t skip_gradient = builder.whole("skip_gradient" + name, width, StorageKind::kActivation);
      builder.operation("backward_skip" + name, {gradient, activations[index]}, {skip_gradient}).is_backward = true;
      if (const auto other = gradient_of.find(skips[index]); other != gradient_of.end()) {
        const int32_t sum = builder.whole("skip_sum" + name, width, StorageKind::kActivation);
        Operation& operation = builder.operation("skip_sum" + name, {other->second, skip_gradient}, {sum});
        operation.is_sum = true;
        operation.workspace_bytes = 0;
        operation.inplace = {{.read = 0, .write = 0}, {.read = 1, .write = 0}};
        other->second = sum;
      } else {
        gradient_of[skips[index]] = skip_gradient;
      }
    }
    if (layer == 1) break;
    const int32_t next = builder.whole("gradient" + std::to_string(layer - 1), width, StorageKind::kActivation);
    Operation& operation =
        builder.operation("backward_input" + name, {gradient, activations[index], weights[index]}, {next});
    operation.is_backward = true;
    operation.accumulates = {0};
    gradient = next;
  }
  return builder.graph;
}

namespace {

class PlanBuilder {
 public:
  PlanBuilder(const Graph& graph, uint64_t seed) : graph_(graph), dice_(seed) {}

  Plan build() {
    merge();
    make_instances();
    plan_.boundaries.resize(plan_.instances.size() + 1);
    for (size_t planned = 0; planned < plan_.storages.size(); ++planned) live(static_cast<int32_t>(planned));
    for (size_t index = 0; index < plan_.instances.size(); ++index) {
      const int64_t bytes = operation_of(static_cast<int32_t>(index)).workspace_bytes;
      if (bytes > 0) reside(-1, Pool::kDevice, bytes, static_cast<int32_t>(index), static_cast<int32_t>(index) + 1);
    }
    list_copies();
    place();
    return plan_;
  }

 private:
  const Operation& operation_of(int32_t instance) const {
    return graph_.operations[static_cast<size_t>(plan_.instances[static_cast<size_t>(instance)].operation)];
  }
  bool touches(const Operation& operation, int32_t storage) const {
    const auto in = [&](const std::vector<int32_t>& tensors) {
      return std::ranges::any_of(tensors, [&](int32_t tensor) { return storage_of(graph_, tensor) == storage; });
    };
    return in(operation.reads) || in(operation.writes);
  }
  int32_t last_use(int32_t storage) const {
    int32_t last = -1;
    for (size_t index = 0; index < graph_.operations.size(); ++index) {
      if (touches(graph_.operations[index], storage)) last = static_cast<int32_t>(index);
    }
    return last;
  }
  bool movable(int32_t storage) const {
    const Storage& found = graph_.storages[static_cast<size_t>(storage)];
    return found.kind == StorageKind::kActivation && !found.is_output;
  }
  int32_t root(int32_t storage) const {
    while (into_[static_cast<size_t>(storage)] >= 0) storage = into_[static_cast<size_t>(storage)];
    return storage;
  }

  // In-place pairs and fused sums. All tensors of random graphs that may be merged are whole storages of one size.
  void merge() {
    into_.assign(graph_.storages.size(), -1);
    for (size_t index = 0; index < graph_.operations.size(); ++index) {
      const Operation& operation = graph_.operations[index];
      if (operation.is_sum && dice_.chance(60) && fuse(static_cast<int32_t>(index))) continue;
      for (const InplacePair& pair : operation.inplace) {
        const int32_t read = storage_of(graph_, operation.reads[static_cast<size_t>(pair.read)]);
        const int32_t write = storage_of(graph_, operation.writes[static_cast<size_t>(pair.write)]);
        if (!movable(read) || last_use(read) != static_cast<int32_t>(index) || !dice_.chance(60)) continue;
        into_[static_cast<size_t>(write)] = root(read);
        break;
      }
    }
    std::map<int32_t, size_t> planned;
    planned_of_.resize(graph_.storages.size());
    for (size_t storage = 0; storage < graph_.storages.size(); ++storage) {
      const auto [found, is_new] = planned.try_emplace(root(static_cast<int32_t>(storage)), plan_.storages.size());
      if (is_new) plan_.storages.emplace_back();
      PlanStorage& made = plan_.storages[found->second];
      made.members.push_back(static_cast<int32_t>(storage));
      made.size_bytes = std::max(made.size_bytes, graph_.storages[storage].size_bytes);
      planned_of_[storage] = static_cast<int32_t>(found->second);
    }
  }
  bool fuse(int32_t sum) {
    const Operation& operation = graph_.operations[static_cast<size_t>(sum)];
    for (const size_t product : {1, 0}) {
      const int32_t added = storage_of(graph_, operation.reads[product]);
      const int32_t other = storage_of(graph_, operation.reads[1 - product]);
      if (!movable(added) || !movable(other) || last_use(added) != sum || last_use(other) != sum) continue;
      int32_t producer = -1;
      int32_t uses_of_added = 0;
      for (int32_t index = 0; index < sum; ++index) {
        if (!touches(graph_.operations[static_cast<size_t>(index)], added)) continue;
        ++uses_of_added;
        producer = index;
      }
      if (uses_of_added != 1 || graph_.operations[static_cast<size_t>(producer)].accumulates.empty()) continue;
      bool other_is_ready = true;
      for (int32_t index = producer; index < sum; ++index)
        other_is_ready &= !touches(graph_.operations[static_cast<size_t>(index)], other);
      if (!other_is_ready) continue;
      plan_.fused.push_back({.sum = sum, .producer = producer});
      into_[static_cast<size_t>(added)] = root(other);
      into_[static_cast<size_t>(storage_of(graph_, operation.writes[0]))] = root(other);
      return true;
    }
    return false;
  }

  // Captured order without fused sums, and before some reads the reader's input once more.
  void make_instances() {
    std::vector<char> repeated(graph_.storages.size(), 0);
    for (size_t index = 0; index < graph_.operations.size(); ++index) {
      const auto is_sum = [&](const FusedSum& fused) { return fused.sum == static_cast<int32_t>(index); };
      if (std::ranges::any_of(plan_.fused, is_sum)) continue;
      for (const int32_t read : graph_.operations[index].reads) {
        const int32_t storage = storage_of(graph_, read);
        if (repeated[static_cast<size_t>(storage)] || !graph_.operations[index].is_backward || !dice_.chance(40))
          continue;
        const int32_t producer = repeatable_producer(storage, static_cast<int32_t>(index));
        if (producer < 0) continue;
        repeated[static_cast<size_t>(storage)] = 1;
        plan_.instances.push_back({.operation = producer, .is_recomputation = true});
      }
      const auto produces = [&](const FusedSum& fused) { return fused.producer == static_cast<int32_t>(index); };
      plan_.instances.push_back(
          {.operation = static_cast<int32_t>(index), .accumulate = std::ranges::any_of(plan_.fused, produces)});
    }
  }
  // The only writer of an unmerged storage, if it can run again from unmerged storages and from what never changes.
  int32_t repeatable_producer(int32_t storage, int32_t before) const {
    const auto unmerged = [&](int32_t index) {
      return plan_.storages[static_cast<size_t>(planned_of_[static_cast<size_t>(index)])].members.size() == 1;
    };
    if (!movable(storage) || !unmerged(storage)) return -1;
    int32_t producer = -1;
    for (int32_t index = 0; index < before; ++index) {
      for (const int32_t write : graph_.operations[static_cast<size_t>(index)].writes) {
        if (storage_of(graph_, write) != storage) continue;
        if (producer >= 0) return -1;
        producer = index;
      }
    }
    if (producer < 0) return -1;
    const Operation& operation = graph_.operations[static_cast<size_t>(producer)];
    if (operation.is_random || !operation.mutates.empty() || operation.writes.size() != 1 || operation.is_backward)
      return -1;
    for (const int32_t read : operation.reads) {
      const int32_t source = storage_of(graph_, read);
      if (graph_.storages[static_cast<size_t>(source)].kind == StorageKind::kActivation && !unmerged(source)) return -1;
    }
    return producer;
  }

  int32_t reside(int32_t storage, Pool pool, int64_t size_bytes, int32_t begin, int32_t end) {
    plan_.residencies.push_back({.storage = storage,
                                 .pool = pool,
                                 .size_bytes = (size_bytes + kAlignment - 1) / kAlignment * kAlignment,
                                 .begin = begin,
                                 .end = end});
    return static_cast<int32_t>(plan_.residencies.size()) - 1;
  }

  void live(int32_t planned) {
    const PlanStorage& storage = plan_.storages[static_cast<size_t>(planned)];
    const auto instances = static_cast<int32_t>(plan_.instances.size());
    const auto kind_of = [&](int32_t member) { return graph_.storages[static_cast<size_t>(member)].kind; };
    if (std::ranges::any_of(storage.members,
                            [&](int32_t member) { return kind_of(member) != StorageKind::kActivation; })) {
      reside(planned, Pool::kParameters, storage.size_bytes, 0, instances + 1);
      return;
    }
    std::vector<int32_t> uses;
    std::vector<char> begins_anew;
    std::vector<char> writes;
    for (int32_t index = 0; index < instances; ++index) {
      const Operation& operation = operation_of(index);
      const auto is_member = [&](int32_t tensor) {
        return planned_of_[static_cast<size_t>(storage_of(graph_, tensor))] == planned;
      };
      const bool is_written = std::ranges::any_of(operation.writes, is_member);
      if (!is_written && !std::ranges::any_of(operation.reads, is_member)) continue;
      uses.push_back(index);
      writes.push_back(is_written);
      begins_anew.push_back(is_written && plan_.instances[static_cast<size_t>(index)].is_recomputation);
    }
    if (uses.empty()) return;
    const auto is_output = [&](int32_t member) { return graph_.storages[static_cast<size_t>(member)].is_output; };
    const bool stays = std::ranges::any_of(storage.members, is_output);

    int32_t begin = uses.front();
    int32_t host = -1;      // residency of a copy that is still good
    int32_t incoming = -1;  // prefetch into the residency that begins at `begin`
    const auto finish = [&](int32_t end) {
      const int32_t residency = reside(planned, Pool::kDevice, storage.size_bytes, begin, end);
      if (incoming >= 0) plan_.copies[static_cast<size_t>(incoming)].destination = residency;
      incoming = -1;
      return residency;
    };
    for (size_t use = 0; use < uses.size(); ++use) {
      const int32_t now = uses[use];
      if (writes[use]) host = -1;
      if (use + 1 == uses.size()) {
        finish(stays ? instances + 1 : now + 1);
        break;
      }
      const int32_t next = uses[use + 1];
      if (begins_anew[use + 1]) {
        finish(now + 1);
        begin = next;
        continue;
      }
      // A boundary to issue the prefetch at and one more: there must be room for both before the next use.
      if (next - now < 3 || !dice_.chance(60)) continue;
      Copy prefetch{.kind = CopyKind::kPrefetch, .storage = planned, .wait = next, .after = {}};
      if (host >= 0) {  // it lies there already
        finish(now + 1);
        prefetch.issue = dice_.between(now + 1, next - 1);
      } else {
        Copy offload{.kind = CopyKind::kOffload, .storage = planned, .issue = now + 1, .after = {}};
        offload.wait = dice_.between(now + 2, next);
        offload.source = finish(offload.wait);
        prefetch.issue = dice_.between(now + 1, next - 1);
        host = reside(planned, Pool::kHost, storage.size_bytes, now + 1, next);
        offload.destination = host;
        if (offload.wait > prefetch.issue) prefetch.after = {static_cast<int32_t>(plan_.copies.size())};
        plan_.copies.push_back(std::move(offload));
      }
      plan_.residencies[static_cast<size_t>(host)].end = next;
      prefetch.source = host;
      begin = prefetch.issue;
      incoming = static_cast<int32_t>(plan_.copies.size());
      plan_.copies.push_back(std::move(prefetch));
    }
  }

  void list_copies() {
    for (size_t copy = 0; copy < plan_.copies.size(); ++copy) {
      plan_.boundaries[static_cast<size_t>(plan_.copies[copy].issue)].issues.push_back(static_cast<int32_t>(copy));
      plan_.boundaries[static_cast<size_t>(plan_.copies[copy].wait)].waits.push_back(static_cast<int32_t>(copy));
    }
  }

  // First fit, in order of begin.
  void place() {
    std::vector<size_t> order(plan_.residencies.size());
    for (size_t index = 0; index < order.size(); ++index) order[index] = index;
    std::ranges::stable_sort(order, {}, [&](size_t index) { return plan_.residencies[index].begin; });
    std::vector<size_t> placed;
    for (const size_t index : order) {
      Residency& residency = plan_.residencies[index];
      for (bool moved = true; moved;) {
        moved = false;
        for (const size_t other_index : placed) {
          const Residency& other = plan_.residencies[other_index];
          if (other.pool != residency.pool || other.end <= residency.begin || residency.end <= other.begin) continue;
          if (other.offset_bytes + other.size_bytes <= residency.offset_bytes ||
              residency.offset_bytes + residency.size_bytes <= other.offset_bytes)
            continue;
          residency.offset_bytes = other.offset_bytes + other.size_bytes;
          moved = true;
        }
      }
      placed.push_back(index);
    }
  }

  static constexpr int64_t kAlignment = 16;
  const Graph& graph_;
  Dice dice_;
  Plan plan_;
  std::vector<int32_t> into_;  // by graph storage: the storage it shares bytes with, or -1
  std::vector<int32_t> planned_of_;
};

// By copy: its place in the order of issues.
std::vector<int32_t> issue_order(const Plan& plan) {
  std::vector<int32_t> order(plan.copies.size());
  int32_t next = 0;
  for (const Boundary& boundary : plan.boundaries) {
    for (const int32_t copy : boundary.issues) order[static_cast<size_t>(copy)] = next++;
  }
  return order;
}

// Whether a copy issued after `copy` on its stream is waited for at `latest` or before: then so was `copy`.
bool is_replaced(const Plan& plan, int32_t copy, int32_t latest) {
  const std::vector<int32_t> order = issue_order(plan);
  for (size_t other = 0; other < plan.copies.size(); ++other) {
    if (plan.copies[other].kind == plan.copies[static_cast<size_t>(copy)].kind &&
        order[other] > order[static_cast<size_t>(copy)] && plan.copies[other].wait <= latest)
      return true;
  }
  return false;
}

}  // namespace

Plan random_plan(const Graph& graph, uint64_t seed) {
  return PlanBuilder(graph, seed).build();
}

std::vector<int32_t> needed_waits(const Plan& plan) {
  std::vector<int32_t> needed;
  for (size_t copy = 0; copy < plan.copies.size(); ++copy) {
    if (plan.copies[copy].kind == CopyKind::kPrefetch &&
        !is_replaced(plan, static_cast<int32_t>(copy), plan.copies[copy].wait))
      needed.push_back(static_cast<int32_t>(copy));
  }
  return needed;
}

std::vector<int32_t> needed_afters(const Plan& plan) {
  std::vector<int32_t> needed;
  for (size_t copy = 0; copy < plan.copies.size(); ++copy) {
    // A prefetch that was issued earlier holds up this one, too.
    const std::vector<int32_t> order = issue_order(plan);
    const auto& after = plan.copies[copy].after;
    if (after.empty() || is_replaced(plan, after.front(), plan.copies[copy].issue)) continue;
    bool replaced = false;
    for (size_t other = 0; other < plan.copies.size(); ++other) {
      if (plan.copies[other].kind != CopyKind::kPrefetch || order[other] > order[copy] || other == copy) continue;
      for (const int32_t earlier : plan.copies[other].after)
        replaced |= order[static_cast<size_t>(earlier)] > order[static_cast<size_t>(after.front())];
    }
    if (!replaced) needed.push_back(static_cast<int32_t>(copy));
  }
  return needed;
}

Plan without_wait(Plan plan, int32_t copy) {
  for (Boundary& boundary : plan.boundaries) std::erase(boundary.waits, copy);
  return plan;
}

Plan without_after(Plan plan, int32_t copy) {
  plan.copies[static_cast<size_t>(copy)].after.clear();
  return plan;
}

}  // namespace pipeline_plans
