#include "memory/liveness.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "memory/boxes.h"
#include "memory/errors.h"

namespace splitkern::memory {
namespace {

int64_t aligned(int64_t bytes, int64_t alignment, int64_t& total) {
  int64_t result = 0;
  if (__builtin_add_overflow(bytes, alignment - 1, &result)) throw InvalidArgument("sizes pass 2^63 - 1 in sum");
  result &= ~(alignment - 1);
  if (__builtin_add_overflow(total, result, &total)) throw InvalidArgument("sizes pass 2^63 - 1 in sum");
  return result;
}

// Finds out whether what a forward step reads or writes stays as it is until the turn.
class Overwrites {
 public:
  Overwrites(const Graph& graph, const Liveness& live) : graph_(graph), live_(live), writes_(live.storages()) {
    for (int32_t step = 0; step < live.turn; ++step) {
      for (int32_t tensor : graph.operations[live.operations[step]].writes)
        writes_[planned(tensor)].push_back({step, tensor});
    }
  }

  // Whether a later forward step (or, for a read, the same one) writes to bytes of `tensor`.
  bool happens(int32_t step, int32_t tensor, bool is_read) const {
    for (const Write& write : writes_[planned(tensor)]) {
      if (write.step < step || (write.step == step && !is_read)) continue;
      if (overlap(write.tensor, tensor)) return true;
    }
    return false;
  }

 private:
  struct Write {
    int32_t step;
    int32_t tensor;
  };

  int32_t planned(int32_t tensor) const { return live_.assignment.storage_of[graph_.tensors[tensor].storage]; }
  bool overlap(int32_t a, int32_t b) const {
    const Tensor& first = graph_.tensors[a];
    const Tensor& second = graph_.tensors[b];
    // Members of one planned storage are the same bytes.
    if (a == b || first.storage != second.storage) return true;
    const Tensor* pair[] = {&first, &second};
    return StorageBoxes(pair).overlap(0, 1);
  }

  const Graph& graph_;
  const Liveness& live_;
  std::vector<std::vector<Write>> writes_;
};

void find_steps(const Graph& graph, Liveness& live, int64_t alignment) {
  std::vector<char> is_fused(graph.operations.size(), 0);
  std::vector<char> is_producer(graph.operations.size(), 0);
  for (const FusedSum& fused : live.assignment.fused) {
    is_fused[fused.sum] = 1;
    is_producer[fused.producer] = 1;
  }
  std::vector<int32_t> position(live.storages(), -1);  // in the row that is being filled
  for (int32_t index = 0; index < static_cast<int32_t>(graph.operations.size()); ++index) {
    if (is_fused[index]) continue;
    const Operation& operation = graph.operations[index];
    live.operations.push_back(index);
    live.accumulates.push_back(is_producer[index]);
    live.duration_us.push_back(operation.duration_us);
    int64_t ignored = 0;
    live.workspace_bytes.push_back(aligned(operation.workspace_bytes, alignment, ignored));
    const size_t begin = live.accesses.elements.size();
    const auto touch = [&](int32_t tensor, bool reads, bool writes) {
      const int32_t storage = live.assignment.storage_of[graph.tensors[tensor].storage];
      if (position[storage] < static_cast<int32_t>(begin)) {
        position[storage] = static_cast<int32_t>(live.accesses.elements.size());
        live.accesses.elements.push_back({.storage = storage});
      }
      Access& access = live.accesses.elements[position[storage]];
      access.reads |= reads;
      access.writes |= writes;
    };
    for (int32_t tensor : operation.reads) touch(tensor, true, false);
    for (int32_t tensor : operation.writes) touch(tensor, is_producer[index], true);
    live.accesses.close_row();
  }
}

void find_lifetimes(const Graph& graph, Liveness& live) {
  const int32_t count = live.storages();
  live.first_access.assign(count, -1);
  live.last_access.assign(count, -1);
  for (int32_t step = 0; step < live.steps(); ++step) {
    for (const Access& access : live.accesses[step]) {
      if (live.first_access[access.storage] < 0) live.first_access[access.storage] = step;
      live.last_access[access.storage] = step;
    }
  }

  live.turn = -1;
  for (int32_t step = 0; step < live.steps() && live.turn < 0; ++step) {
    if (graph.operations[live.operations[step]].is_backward) live.turn = step;
  }
  if (live.turn < 0) {
    std::vector<int64_t> change(live.steps() + 1, 0);
    for (int32_t storage = 0; storage < count; ++storage) {
      if (live.resident[storage] || live.first_access[storage] < 0) continue;
      change[live.first_access[storage]] += live.bytes[storage];
      if (!live.output[storage]) change[live.last_access[storage] + 1] -= live.bytes[storage];
    }
    int64_t now = 0;
    int64_t most = -1;
    live.turn = 0;
    for (int32_t step = 0; step < live.steps(); ++step) {
      now += change[step];
      if (now > most) {
        most = now;
        live.turn = step;
      }
    }
  }

  live.last_forward.assign(count, -1);
  live.last_forward_write.assign(count, -1);
  live.first_backward.assign(count, -1);
  std::vector<std::vector<int32_t>> writers(count);
  for (int32_t step = 0; step < live.steps(); ++step) {
    for (const Access& access : live.accesses[step]) {
      if (step < live.turn) {
        live.last_forward[access.storage] = step;
        if (access.writes) {
          live.last_forward_write[access.storage] = step;
          writers[access.storage].push_back(step);
        }
      } else if (live.first_backward[access.storage] < 0) {
        live.first_backward[access.storage] = step;
      }
    }
  }
  for (const std::vector<int32_t>& row : writers) {
    live.writers.elements.insert(live.writers.elements.end(), row.begin(), row.end());
    live.writers.close_row();
  }
  live.saved.assign(count, 0);
  for (int32_t storage = 0; storage < count; ++storage) {
    live.saved[storage] = !live.resident[storage] && !live.output[storage] && live.bytes[storage] > 0 &&
                          live.last_forward_write[storage] >= 0 && live.first_backward[storage] >= 0;
  }
}

// What only some writes of a storage make cannot be computed alone; what nobody keeps must be computed with it.
void find_recomputable(const Graph& graph, Liveness& live) {
  const int32_t count = live.storages();
  const auto stays = [&](int32_t storage) {
    return live.resident[storage] || live.output[storage] || live.first_backward[storage] >= 0;
  };
  // A step whose operand or result changes later in the forward pass can run again only while that storage as a whole
  // is computed again.
  constexpr int32_t kAnywhere = -1;
  constexpr int32_t kNowhere = -2;
  std::vector<int32_t> only_with(live.turn, kAnywhere);
  const Overwrites overwrites(graph, live);
  for (int32_t step = 0; step < live.turn; ++step) {
    const Operation& operation = graph.operations[live.operations[step]];
    int32_t& place = only_with[step];
    const auto look = [&](int32_t tensor, bool is_read) {
      const int32_t storage = live.assignment.storage_of[graph.tensors[tensor].storage];
      if (!stays(storage) || !overwrites.happens(step, tensor, is_read)) return;
      place = live.saved[storage] && (place == kAnywhere || place == storage) ? storage : kNowhere;
    };
    if (operation.is_random || !operation.mutates.empty() || live.accumulates[step]) place = kNowhere;
    for (int32_t tensor : operation.reads) {
      if (place != kNowhere) look(tensor, true);
    }
    for (int32_t tensor : operation.writes) {
      if (place != kNowhere) look(tensor, false);
    }
  }

  live.recomputable.assign(count, 0);
  for (int32_t storage = 0; storage < count; ++storage) {
    live.recomputable[storage] = !live.resident[storage] && !live.output[storage] &&
                                 std::ranges::all_of(live.writers[storage], [&](int32_t step) {
                                   return only_with[step] == kAnywhere || only_with[step] == storage;
                                 });
  }
  // Takes away until nothing more falls; operands come first nearly always, so a few rounds do.
  live.repeatable.assign(live.steps(), 0);
  for (int32_t step = 0; step < live.turn; ++step) live.repeatable[step] = only_with[step] != kNowhere;
  for (bool changed = true; changed;) {
    changed = false;
    for (int32_t step = 0; step < live.turn; ++step) {
      if (!live.repeatable[step]) continue;
      for (const Access& access : live.accesses[step]) {
        if (access.reads && !stays(access.storage) && !live.recomputable[access.storage]) live.repeatable[step] = 0;
      }
      if (live.repeatable[step]) continue;
      changed = true;
      for (const Access& access : live.accesses[step]) {
        if (access.writes) live.recomputable[access.storage] = 0;
      }
    }
    for (int32_t storage = 0; storage < count; ++storage) {
      if (!live.recomputable[storage]) continue;
      if (!std::ranges::all_of(live.writers[storage], [&](int32_t step) { return live.repeatable[step] != 0; })) {
        live.recomputable[storage] = 0;
        changed = true;
      }
    }
  }

  // Costs in order of the writers: an operand that nothing saves has its own before. Shared operands count every time.
  live.recompute_us.assign(count, 0);
  for (int32_t step = 0; step < live.turn; ++step) {
    double cost = live.duration_us[step];
    for (const Access& access : live.accesses[step]) {
      if (access.reads && !access.writes && !stays(access.storage)) cost += live.recompute_us[access.storage];
    }
    for (const Access& access : live.accesses[step]) {
      if (access.writes) live.recompute_us[access.storage] = std::min(1e30, live.recompute_us[access.storage] + cost);
    }
  }
}

// The measurement of the value that is saved, which is that of the member written last before the turn.
std::optional<Compression> compression_of(const Graph& graph, const Liveness& live, int32_t storage) {
  if (!live.saved[storage]) return std::nullopt;
  const Operation& writer = graph.operations[live.operations[live.last_forward_write[storage]]];
  for (const int32_t tensor : writer.writes) {
    const int32_t member = graph.tensors[tensor].storage;
    if (live.assignment.storage_of[member] != storage) continue;
    const Storage& value = graph.storages[member];
    const bool is_all = value.size_bytes == live.assignment.storages[storage].size_bytes;
    return is_all && value.compression && value.compression->ratio >= kLeastCompressionRatio ? value.compression
                                                                                             : std::nullopt;
  }
  return std::nullopt;
}

void find_copies(const Graph& graph, Liveness& live, const Limits& limits, bool compress) {
  compress &= limits.alignment_bytes >= kCompressedAlignment;
  int64_t total = 0;
  for (int32_t storage = 0; storage < live.storages(); ++storage) {
    const PlanStorage& planned = live.assignment.storages[storage];
    const std::optional<Compression> compression =
        compress ? compression_of(graph, live, storage) : std::optional<Compression>();
    live.compression.push_back(compression);
    live.link_bytes.push_back(static_cast<double>(planned.size_bytes) / (compression ? compression->ratio : 1));
    live.host_bytes.push_back(compression
                                  ? aligned(compressed_room_bytes(planned.size_bytes, compression->element_bytes),
                                            limits.alignment_bytes, total)
                                  : live.bytes[storage]);
  }
}

}  // namespace

Liveness analyse(const Graph& graph, StorageAssignment assignment, const Limits& limits, bool compress) {
  Liveness live;
  live.assignment = std::move(assignment);
  int64_t total = 0;
  for (const PlanStorage& storage : live.assignment.storages) {
    const StorageKind kind = kind_of(graph, storage);
    live.bytes.push_back(aligned(storage.size_bytes, limits.alignment_bytes, total));
    live.resident.push_back(kind != StorageKind::kActivation);
    live.output.push_back(is_output(graph, storage));
    if (live.resident.back()) live.resident_bytes += live.bytes.back();
  }
  find_steps(graph, live, limits.alignment_bytes);
  int64_t peak = total;
  for (int64_t bytes : live.workspace_bytes) {
    if (bytes > std::numeric_limits<int64_t>::max() - total)
      throw InvalidArgument("sizes and a workspace pass 2^63 - 1 in sum");
    peak = std::max(peak, total + bytes);
  }
  find_lifetimes(graph, live);
  find_copies(graph, live, limits, compress);
  find_recomputable(graph, live);
  return live;
}

}  // namespace splitkern::memory
