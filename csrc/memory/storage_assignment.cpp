#include "memory/storage_assignment.h"

#include <algorithm>

#include "memory/boxes.h"

namespace splitkern::memory {
namespace {

constexpr int32_t kNone = -1;

class Assigner {
 public:
  Assigner(const Graph& graph, const AssignmentOptions& options)
      : graph_(graph), options_(options), uses_(graph.storages.size()), takes_part_(graph.operations.size()) {
    for (size_t i = 0; i < graph.operations.size(); ++i) {
      const auto index = static_cast<int32_t>(i);
      for (const int32_t tensor : graph.operations[i].reads) {
        Use& use = uses_[graph.tensors[tensor].storage];
        use.first = use.first == kNone ? index : use.first;
        use.previous_read = use.last_read == index ? use.previous_read : use.last_read;
        use.last_read = index;
      }
      for (const int32_t tensor : graph.operations[i].writes) {
        Use& use = uses_[graph.tensors[tensor].storage];
        use.first = use.first == kNone ? index : use.first;
        use.first_write = use.first_write == kNone ? index : use.first_write;
        use.last_write = index;
      }
    }
    // From a fused sum on, its result is there since the producer ran.
    for (Use& use : uses_) {
      use.ready = use.last_write;
      use.since = use.first_write;
    }
  }

  StorageAssignment assign() {
    if (options_.accumulation) {
      for (size_t i = 0; i < graph_.operations.size(); ++i) fuse(static_cast<int32_t>(i));
    }
    for (size_t i = 0; i < graph_.operations.size(); ++i) write_in_place(static_cast<int32_t>(i));
    return collect();
  }

 private:
  struct Use {
    int32_t first = kNone;  // operations
    int32_t first_write = kNone;
    int32_t last_write = kNone;
    int32_t last_read = kNone;
    int32_t previous_read = kNone;  // the reading operation before the last
    int32_t ready = kNone;          // from this operation on it holds its last value
    int32_t since = kNone;          // when its place was first written, by itself or by those before it
    int32_t before = kNone;         // storages: whose place it takes
    int32_t after = kNone;          // and which takes its
  };

  int32_t storage_of(int32_t tensor) const { return graph_.tensors[tensor].storage; }
  bool covers(int32_t tensor) const {
    return covers_storage(graph_.tensors[tensor], graph_.storages[storage_of(tensor)].size_bytes);
  }
  // Whether its place may be taken once `operation` has read it for the last time.
  bool dies_at(int32_t storage, int32_t operation) const {
    const Storage& value = graph_.storages[storage];
    const Use& use = uses_[storage];
    return value.kind == StorageKind::kActivation && !value.is_output && value.size_bytes > 0 && use.after == kNone &&
           use.last_read == operation && use.last_write < operation;
  }
  bool begins_at(int32_t storage, int32_t operation) const {
    return uses_[storage].before == kNone && uses_[storage].first == operation &&
           uses_[storage].first_write == operation;
  }
  void join(int32_t before, int32_t after) {
    uses_[before].after = after;
    uses_[after].before = before;
    uses_[after].since = uses_[before].since;
  }

  // The sum is not run where the producer of one operand can add to the other.
  void fuse(int32_t index) {
    const Operation& sum = graph_.operations[index];
    if (!sum.is_sum || sum.is_random || sum.reads.size() != 2 || sum.writes.size() != 1 || !sum.mutates.empty()) return;
    const int32_t result = storage_of(sum.writes[0]);
    if (!begins_at(result, index) || !covers(sum.writes[0])) return;
    for (int32_t side = 0; side < 2; ++side) {
      const int32_t product = storage_of(sum.reads[side]);
      const int32_t other = storage_of(sum.reads[1 - side]);
      if (!dies_at(product, index) || !dies_at(other, index)) continue;
      if (!same_elements(graph_.tensors[sum.reads[0]], graph_.tensors[sum.writes[0]]) ||
          !same_elements(graph_.tensors[sum.reads[1]], graph_.tensors[sum.writes[0]]))
        continue;
      if (graph_.storages[product].size_bytes != graph_.storages[result].size_bytes ||
          graph_.storages[other].size_bytes != graph_.storages[result].size_bytes)
        continue;
      // The product is written once, wholly, and read by the sum alone.
      const Use& use = uses_[product];
      const int32_t producer = use.first;
      if (use.first_write != producer || use.last_write != producer || use.previous_read != kNone ||
          uses_[other].ready >= producer || uses_[other].previous_read >= producer || takes_part_[producer] ||
          !can_accumulate(producer, sum.reads[side]))
        continue;
      join(other, product);
      join(product, result);
      uses_[result].ready = uses_[result].last_write == index ? producer : uses_[result].last_write;
      takes_part_[producer] = true;
      takes_part_[index] = true;
      fused_.push_back({.sum = index, .producer = producer});
      return;
    }
  }
  // One accumulating write, so that Instance::accumulate can only mean this one, and of the same elements.
  bool can_accumulate(int32_t producer, int32_t product) const {
    const Operation& operation = graph_.operations[producer];
    if (operation.accumulates.size() != 1) return false;
    const int32_t write = operation.writes[operation.accumulates[0]];
    return storage_of(write) == storage_of(product) && same_elements(graph_.tensors[write], graph_.tensors[product]);
  }

  void write_in_place(int32_t index) {
    const Operation& operation = graph_.operations[index];
    if (!(operation.is_sum ? options_.sums : options_.inplace)) return;
    for (size_t write = 0; write < operation.writes.size(); ++write) {
      const int32_t result = storage_of(operation.writes[write]);
      // Of several operands that die here the one whose place is the oldest: a chain of sums stays in one place.
      int32_t best = kNone;
      for (const InplacePair pair : operation.inplace) {
        if (pair.write != static_cast<int32_t>(write) || !fits(index, pair)) continue;
        const int32_t storage = storage_of(operation.reads[pair.read]);
        if (best == kNone || uses_[storage].since < uses_[best].since) best = storage;
      }
      if (best != kNone && begins_at(result, index)) join(best, result);
    }
  }
  bool fits(int32_t index, const InplacePair pair) const {
    const Operation& operation = graph_.operations[index];
    const int32_t read = operation.reads[pair.read];
    const int32_t write = operation.writes[pair.write];
    if (!dies_at(storage_of(read), index)) return false;
    if (!covers(read) || !covers(write)) return false;
    if (!same_elements(graph_.tensors[read], graph_.tensors[write])) return false;
    // What else the operation reads there must be safe to overwrite too.
    for (size_t k = 0; k < operation.reads.size(); ++k) {
      if (storage_of(operation.reads[k]) != storage_of(read)) continue;
      const InplacePair same{.read = static_cast<int32_t>(k), .write = pair.write};
      if (std::find(operation.inplace.begin(), operation.inplace.end(), same) == operation.inplace.end()) return false;
    }
    return true;
  }

  StorageAssignment collect() const {
    StorageAssignment result;
    result.fused = fused_;
    result.storage_of.assign(graph_.storages.size(), kNone);
    for (size_t i = 0; i < graph_.storages.size(); ++i) {
      if (result.storage_of[i] != kNone) continue;
      auto member = static_cast<int32_t>(i);
      while (uses_[member].before != kNone) member = uses_[member].before;
      PlanStorage storage;
      for (; member != kNone; member = uses_[member].after) {
        storage.size_bytes = std::max(storage.size_bytes, graph_.storages[member].size_bytes);
        storage.members.push_back(member);
        result.storage_of[member] = static_cast<int32_t>(result.storages.size());
      }
      result.storages.push_back(std::move(storage));
    }
    return result;
  }

  const Graph& graph_;
  const AssignmentOptions& options_;
  std::vector<Use> uses_;         // per storage
  std::vector<bool> takes_part_;  // per operation: in a fused sum, as sum or producer; once at most
  std::vector<FusedSum> fused_;
};

}  // namespace

StorageAssignment assign_storages(const Graph& graph, const AssignmentOptions& options) {
  return Assigner(graph, options).assign();
}

StorageKind kind_of(const Graph& graph, const PlanStorage& storage) {
  StorageKind kind = StorageKind::kActivation;
  for (const int32_t member : storage.members) {
    const StorageKind of_member = graph.storages[member].kind;
    if (of_member != StorageKind::kActivation) kind = of_member;
  }
  return kind;
}

bool is_output(const Graph& graph, const PlanStorage& storage) {
  return std::any_of(storage.members.begin(), storage.members.end(),
                     [&](int32_t member) { return graph.storages[member].is_output; });
}

}  // namespace splitkern::memory
