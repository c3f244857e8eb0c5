#include "memory/native/random_plans.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace random_plans {
namespace {

using namespace splitkern::memory;
using random_numbers::Random;

// ---- graphs --------------------------------------------------------------------------------------------------------

class GraphMaker {
 public:
  explicit GraphMaker(Random& random) : random_(random) {}

  Graph run() {
    graph_.name = "random";
    element_bytes_ = random_.between(1, 2);
    rows_ = random_.between(1, 3);
    columns_ = random_.between(1, 3);
    const int64_t parameters = random_.between(0, 2);
    for (int64_t i = 0; i < parameters; ++i) readable_.push_back(whole(add_storage(StorageKind::kParameter)));
    readable_.push_back(whole(add_storage(StorageKind::kInput)));
    const int64_t operations = random_.chance(0.05) ? random_.between(15, 40) : random_.between(2, 14);
    while (std::ssize(graph_.operations) < operations) add_something();
    for (Storage& storage : graph_.storages) {
      if (storage.kind == StorageKind::kActivation) storage.is_output = random_.chance(0.12);
    }
    return std::move(graph_);
  }

 private:
  int32_t add_storage(StorageKind kind) {
    Storage storage;
    storage.name = "s" + std::to_string(graph_.storages.size());
    // Sometimes another shape, so that sizes differ.
    const bool other = random_.chance(0.2);
    shape_.push_back(other ? std::pair(random_.between(1, 3), random_.between(1, 3)) : std::pair(rows_, columns_));
    storage.size_bytes = shape_.back().first * shape_.back().second * element_bytes_;
    storage.kind = kind;
    graph_.storages.push_back(storage);
    return static_cast<int32_t>(graph_.storages.size()) - 1;
  }
  int32_t add_box(int32_t storage, int64_t row, int64_t column, int64_t rows, int64_t columns) {
    const int64_t row_bytes = shape_[storage].second * element_bytes_;
    Tensor tensor;
    tensor.name = "t" + std::to_string(graph_.tensors.size());
    tensor.storage = storage;
    tensor.offset_bytes = row * row_bytes + column * element_bytes_;
    tensor.element_bytes = element_bytes_;
    if (row == 0 && column == 0 && rows == shape_[storage].first && columns == shape_[storage].second &&
        random_.chance(0.3)) {
      tensor.sizes = {rows * columns};  // the same bytes, in the same order, said otherwise
      tensor.strides_bytes = {element_bytes_};
    } else {
      tensor.sizes = {rows, columns};
      tensor.strides_bytes = {row_bytes, element_bytes_};
    }
    graph_.tensors.push_back(tensor);
    return static_cast<int32_t>(graph_.tensors.size()) - 1;
  }
  int32_t whole(int32_t storage) { return add_box(storage, 0, 0, shape_[storage].first, shape_[storage].second); }
  int32_t some_readable() {
    // Recent ones mostly, so that chains are long; old ones at times, so that lifetimes are.
    const auto count = static_cast<int64_t>(readable_.size());
    return readable_[random_.chance(0.6) ? count - 1 - random_.below(std::min<int64_t>(count, 3))
                                         : random_.below(count)];
  }
  Operation& add_operation() {
    Operation operation;
    operation.name = "o" + std::to_string(graph_.operations.size());
    operation.target = "any";
    operation.duration_us = 1;
    if (random_.chance(0.15)) operation.workspace_bytes = random_.between(1, 12);
    operation.is_random = random_.chance(0.08);
    graph_.operations.push_back(operation);
    return graph_.operations.back();
  }
  // A part of a readable tensor's storage, at times.
  int32_t perhaps_part(int32_t tensor) {
    const int32_t storage = graph_.tensors[tensor].storage;
    if (!random_.chance(0.2) || !is_whole(tensor)) return tensor;
    const auto [rows, columns] = shape_[storage];
    const int64_t row = random_.below(rows);
    const int64_t column = random_.below(columns);
    return add_box(storage, row, column, random_.between(1, rows - row), random_.between(1, columns - column));
  }
  bool is_whole(int32_t tensor) const {
    int64_t bytes = element_bytes_;
    for (const int64_t size : graph_.tensors[tensor].sizes) bytes *= size;
    return bytes == graph_.storages[graph_.tensors[tensor].storage].size_bytes;
  }

  void add_something() {
    const int64_t kind = random_.below(12);
    if (kind < 3) return add_plain();
    if (kind < 6) return add_elementwise();
    if (kind < 7) return add_sum();
    if (kind < 8) return add_accumulated();
    if (kind < 10) return add_parts();
    if (kind < 11) return add_mutation();
    add_rewrite();
  }
  StorageKind result_kind() { return random_.chance(0.12) ? StorageKind::kGradient : StorageKind::kActivation; }

  void add_plain() {
    std::vector<int32_t> reads;
    for (int64_t i = random_.between(1, 3); i > 0; --i) reads.push_back(perhaps_part(some_readable()));
    std::vector<int32_t> writes;
    for (int64_t i = random_.chance(0.2) ? 2 : 1; i > 0; --i) writes.push_back(whole(add_storage(result_kind())));
    Operation& operation = add_operation();
    operation.reads = reads;
    operation.writes = writes;
    for (const int32_t t : writes) readable_.push_back(t);
  }
  // Writes where it reads, if it may: a new storage of the same shape.
  int32_t like(int32_t tensor, StorageKind kind) {
    const int32_t storage = graph_.tensors[tensor].storage;
    const auto shape = shape_[storage];
    const int32_t made = add_storage(kind);
    shape_[made] = shape;
    graph_.storages[made].size_bytes = graph_.storages[storage].size_bytes;
    Tensor box = graph_.tensors[tensor];
    box.name = "t" + std::to_string(graph_.tensors.size());
    box.storage = made;
    graph_.tensors.push_back(box);
    return static_cast<int32_t>(graph_.tensors.size()) - 1;
  }
  void add_elementwise() {
    const int32_t read = some_readable();
    if (!is_whole(read)) return;
    const int32_t other = random_.chance(0.3) ? some_readable() : -1;
    const int32_t write = like(read, result_kind());
    Operation& operation = add_operation();
    operation.reads = {read};
    if (other >= 0) operation.reads.push_back(other);
    operation.writes = {write};
    if (random_.chance(0.85)) operation.inplace.push_back({0, 0});
    readable_.push_back(write);
  }
  void add_sum_of(int32_t a, int32_t b) {
    const int32_t write = like(a, result_kind());
    Operation& operation = add_operation();
    operation.is_random = false;
    operation.reads = {a, b};
    if (random_.chance(0.5)) std::swap(operation.reads[0], operation.reads[1]);
    operation.writes = {write};
    operation.is_sum = true;
    if (random_.chance(0.7)) operation.inplace = {{0, 0}, {1, 0}};
    readable_.push_back(write);
  }
  bool same_box(int32_t a, int32_t b) const {
    Tensor x = graph_.tensors[a];
    const Tensor& y = graph_.tensors[b];
    return x.offset_bytes == y.offset_bytes && x.sizes == y.sizes && x.strides_bytes == y.strides_bytes;
  }
  void add_sum() {
    const int32_t a = some_readable();
    const int32_t b = some_readable();
    if (is_whole(a) && is_whole(b) && same_box(a, b)) add_sum_of(a, b);
  }
  void add_accumulated() {
    const int32_t a = some_readable();
    if (!is_whole(a)) return;
    const int32_t product = like(a, StorageKind::kActivation);
    std::vector<int32_t> writes = {product};
    if (random_.chance(0.2)) writes.push_back(whole(add_storage(StorageKind::kActivation)));
    const int32_t read = some_readable();
    Operation& operation = add_operation();
    operation.reads = {read};
    operation.writes = writes;
    operation.accumulates = {0};
    if (writes.size() == 2 && random_.chance(0.3)) operation.accumulates = {0, 1};
    if (writes.size() == 2) readable_.push_back(writes[1]);
    if (random_.chance(0.2)) add_plain();
    if (random_.chance(0.1)) readable_.push_back(product);
    add_sum_of(a, product);
  }
  // A joined tensor: two operations write a part each, others may come between.
  void add_parts() {
    const int32_t storage = add_storage(StorageKind::kActivation);
    const auto [rows, columns] = shape_[storage];
    std::vector<int32_t> parts;
    if (rows > 1 && random_.chance(0.5)) {
      const int64_t cut = random_.between(1, rows - 1);
      parts = {add_box(storage, 0, 0, cut, columns), add_box(storage, cut, 0, rows - cut, columns)};
    } else if (columns > 1) {
      const int64_t cut = random_.between(1, columns - 1);
      parts = {add_box(storage, 0, 0, rows, cut), add_box(storage, 0, cut, rows, columns - cut)};
    } else {
      parts = {whole(storage)};
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      const int32_t read = perhaps_part(some_readable());
      Operation& operation = add_operation();
      operation.reads = {read};
      operation.writes = {parts[i]};
      readable_.push_back(parts[i]);
      if (i == 0 && random_.chance(0.3)) add_plain();
    }
    readable_.push_back(whole(storage));
  }
  void add_mutation() {
    std::vector<int32_t> parameters;
    for (const int32_t t : readable_) {
      if (graph_.storages[graph_.tensors[t].storage].kind == StorageKind::kParameter) parameters.push_back(t);
    }
    if (parameters.empty()) return;
    const int32_t mutated = random_.pick(parameters);
    const int32_t read = some_readable();
    const bool two = random_.chance(0.6);
    const int32_t out = two ? whole(add_storage(StorageKind::kActivation)) : -1;
    Operation& operation = add_operation();
    operation.reads = {read, mutated};
    operation.writes = {mutated};
    operation.mutates = {0};
    if (!two) return;
    operation.writes.push_back(out);
    readable_.push_back(out);
  }
  // Writes an activation once more: another version of the same bytes.
  void add_rewrite() {
    const int32_t tensor = some_readable();
    if (graph_.storages[graph_.tensors[tensor].storage].kind != StorageKind::kActivation) return;
    const int32_t read = some_readable();
    if (graph_.tensors[read].storage == graph_.tensors[tensor].storage && read != tensor) return;
    Operation& operation = add_operation();
    operation.reads = {read};
    operation.writes = {tensor};
    if (read == tensor) operation.inplace = {{0, 0}};
  }

  Random& random_;
  Graph graph_;
  int64_t element_bytes_ = 1;
  int64_t rows_ = 1;
  int64_t columns_ = 1;
  std::vector<std::pair<int64_t, int64_t>> shape_;  // per storage: rows, columns
  std::vector<int32_t> readable_;                   // tensors
};

// ---- plans ---------------------------------------------------------------------------------------------------------

int64_t rounded_up(int64_t bytes, int64_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

void place(Plan& plan) {
  for (size_t r = 0; r < plan.residencies.size(); ++r) {
    Residency& residency = plan.residencies[r];
    residency.offset_bytes = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t other = 0; other < r; ++other) {
        const Residency& it = plan.residencies[other];
        if (it.pool == residency.pool && it.begin < residency.end && residency.begin < it.end &&
            it.offset_bytes < residency.offset_bytes + residency.size_bytes &&
            residency.offset_bytes < it.offset_bytes + it.size_bytes) {
          residency.offset_bytes = it.offset_bytes + it.size_bytes;
          moved = true;
        }
      }
    }
  }
}

class PlanMaker {
  static constexpr int32_t kEnd = 1 << 30;  // after every operation

 public:
  PlanMaker(const Graph& graph, Random& random) : graph_(graph), random_(random) {}

  Plan run() {
    plan_.graph_fingerprint = fingerprint(graph_);
    plan_.strategy = "random";
    plan_.limits.alignment_bytes = int64_t{1} << random_.between(0, 4);
    plan_.limits.offload_gbps = plan_.limits.prefetch_gbps = 1;
    careless_ = random_.chance(0.1) ? 0.3 : 0.02;
    merge();
    list_instances();
    repeat();
    for (size_t i = 0; i < list_.size(); ++i) plan_.instances.push_back(list_[i]);
    plan_.boundaries.resize(list_.size() + 1);
    make_residencies();
    order_boundaries();
    place(plan_);
    predict(plan_);
    if (random_.chance(0.5)) {
      plan_.limits.device_bytes = plan_.predicted.device_peak_bytes + plan_.predicted.parameters_peak_bytes;
      plan_.limits.host_bytes = plan_.predicted.host_peak_bytes;
    }
    return std::move(plan_);
  }

 private:
  bool careless() { return random_.chance(careless_); }
  int32_t storage_of(int32_t tensor) const { return graph_.tensors[tensor].storage; }
  int32_t home(int32_t tensor) const { return home_[storage_of(tensor)]; }
  bool is_activation(int32_t storage) const { return graph_.storages[storage].kind == StorageKind::kActivation; }
  bool is_read_after(int32_t storage, int32_t operation) const {
    for (size_t o = operation + 1; o < graph_.operations.size(); ++o) {
      for (const int32_t t : graph_.operations[o].reads) {
        if (storage_of(t) == storage) return true;
      }
    }
    return graph_.storages[storage].is_output;
  }
  bool is_written_between(int32_t storage, int32_t first, int32_t end) const {
    for (int32_t o = first; o < std::min<int32_t>(end, std::ssize(graph_.operations)); ++o) {
      for (const int32_t t : graph_.operations[o].writes) {
        if (storage_of(t) == storage) return true;
      }
    }
    return false;
  }
  bool is_read_between(int32_t storage, int32_t first, int32_t end) const {
    for (int32_t o = first; o < std::min<int32_t>(end, std::ssize(graph_.operations)); ++o) {
      for (const int32_t t : graph_.operations[o].reads) {
        if (storage_of(t) == storage) return true;
      }
    }
    return false;
  }

  // Members that share a planned storage: in-place pairs, fused sums, rarely anything.
  void merge() {
    const auto count = static_cast<int32_t>(graph_.storages.size());
    std::vector<std::vector<int32_t>> groups(count);
    std::vector<int32_t> group(count);
    for (int32_t s = 0; s < count; ++s) {
      groups[s] = {s};
      group[s] = s;
    }
    const auto join = [&](int32_t into, int32_t from) {
      const int32_t a = group[into];
      const int32_t b = group[from];
      if (a == b) return;
      for (const int32_t s : groups[b]) {
        groups[a].push_back(s);
        group[s] = a;
      }
      groups[b].clear();
    };
    const bool merging = random_.chance(0.7);
    for (size_t i = 0; i < graph_.operations.size() && merging; ++i) {
      const auto o = static_cast<int32_t>(i);
      const Operation& operation = graph_.operations[o];
      if (operation.is_sum && random_.chance(0.8) && fuse(o)) {
        const int32_t out = storage_of(operation.writes[0]);
        join(storage_of(operation.reads[0]), storage_of(operation.reads[1]));
        join(storage_of(operation.reads[0]), out);
        continue;
      }
      for (const InplacePair& pair : operation.inplace) {
        const int32_t read = storage_of(operation.reads[pair.read]);
        const int32_t write = storage_of(operation.writes[pair.write]);
        if (read == write || !random_.chance(0.7)) continue;
        const bool alone = groups[group[write]].size() == 1 && groups[group[read]].back() == read;
        const bool right = is_activation(read) && alone && !is_read_after(read, o) &&
                           !is_written_between(write, 0, o) && !is_written_between(read, o + 1, kEnd) &&
                           graph_.storages[write].kind == StorageKind::kActivation;
        if (right || careless()) {
          join(read, write);
          break;
        }
      }
    }
    if (careless()) join(random_.below(count), random_.below(count));
    home_.resize(count);
    for (const std::vector<int32_t>& members : groups) {
      if (members.empty()) continue;
      PlanStorage storage;
      storage.members = members;
      for (const int32_t m : members) {
        storage.size_bytes = std::max(storage.size_bytes, graph_.storages[m].size_bytes);
        home_[m] = static_cast<int32_t>(plan_.storages.size());
      }
      plan_.storages.push_back(storage);
    }
  }
  bool fuse(int32_t sum) {
    const Operation& it = graph_.operations[sum];
    for (int operand = 0; operand < 2; ++operand) {
      const int32_t product = it.reads[operand];
      const int32_t other = it.reads[1 - operand];
      for (int32_t o = 0; o < sum; ++o) {
        const Operation& producer = graph_.operations[o];
        if (producer.accumulates.size() != 1 || producer.writes[producer.accumulates[0]] != product) continue;
        const bool right =
            !is_read_between(storage_of(product), 0, sum) && !is_read_after(storage_of(product), sum) &&
            is_activation(storage_of(other)) && !is_read_after(storage_of(other), sum) &&
            !is_read_between(storage_of(other), o, sum) && !is_written_between(storage_of(other), o, kEnd) &&
            storage_of(other) != storage_of(product) && !is_written_between(storage_of(it.writes[0]), 0, sum);
        if (!right && !careless()) continue;
        if (fused_producers_.contains(o)) continue;
        plan_.fused.push_back({sum, o});
        fused_producers_.insert(o);
        fused_sums_.insert(sum);
        return true;
      }
    }
    return false;
  }

  void list_instances() {
    for (size_t i = 0; i < graph_.operations.size(); ++i) {
      const auto o = static_cast<int32_t>(i);
      if (!fused_sums_.contains(o)) list_.push_back({o, false, fused_producers_.contains(o)});
    }
  }
  // Inserts recomputations, each in front of an instance that reads what it makes; mostly where its own operands are
  // still what they were.
  void repeat() {
    if (!random_.chance(0.6)) return;
    for (int64_t tries = random_.between(1, 6); tries > 0; --tries) {
      const auto before = static_cast<int32_t>(random_.below(std::ssize(list_)));
      const int32_t earlier = static_cast<int32_t>(random_.below(before + 1));
      if (earlier >= before - 1) continue;
      const int32_t o = list_[earlier].operation;
      const Operation& operation = graph_.operations[o];
      if ((operation.is_random || !operation.mutates.empty() || list_[earlier].accumulate) && !careless()) continue;
      std::set<int32_t> made, used;
      for (const int32_t t : operation.writes) made.insert(home(t));
      for (const int32_t t : operation.reads) used.insert(home(t));
      bool right = true;
      for (const int32_t p : made) right &= !used.contains(p);
      for (size_t i = 0; i < list_.size(); ++i) {
        if (static_cast<int32_t>(i) == earlier || list_[i].is_recomputation) continue;
        for (const int32_t t : graph_.operations[list_[i].operation].writes) {
          // Nobody else ever writes what it makes; nobody writes its operands in between.
          right &= !made.contains(home(t));
          right &= !(used.contains(home(t)) && static_cast<int32_t>(i) > earlier && static_cast<int32_t>(i) < before);
        }
      }
      if (!right && !careless()) continue;
      list_.insert(list_.begin() + before, Instance{o, true, list_[earlier].accumulate});
    }
  }

  int32_t add_residency(int32_t storage, Pool pool, int32_t begin, int32_t end) {
    const int64_t bytes = storage < 0 ? 0 : plan_.storages[storage].size_bytes;
    Residency residency;
    residency.storage = storage;
    residency.pool = pool;
    residency.size_bytes = rounded_up(bytes, plan_.limits.alignment_bytes);
    if (pool == Pool::kHost && plan_.storages[storage].compression) {
      const int32_t element_bytes = plan_.storages[storage].compression->element_bytes;
      residency.size_bytes = rounded_up(compressed_room_bytes(bytes, element_bytes), plan_.limits.alignment_bytes);
    }
    residency.begin = begin;
    residency.end = end;
    plan_.residencies.push_back(residency);
    return static_cast<int32_t>(plan_.residencies.size()) - 1;
  }
  int32_t add_copy(CopyKind kind, int32_t storage, int32_t source, int32_t destination, int32_t issue, int32_t wait) {
    const bool compressed = plan_.storages[storage].compression.has_value();
    plan_.copies.push_back({kind, storage, source, destination, issue, wait, {}, compressed});
    return static_cast<int32_t>(plan_.copies.size()) - 1;
  }

  struct Use {
    int32_t instance = 0;
    bool writes = false;
    bool renews = false;  // a recomputation that writes every byte: what was there before need not be
  };

  void make_residencies() {
    const auto last = static_cast<int32_t>(list_.size());
    const double copying = random_.chance(0.75) ? 0.45 : 0.0;
    for (int32_t p = 0; p < static_cast<int32_t>(plan_.storages.size()); ++p) {
      bool fixed = false;
      bool output = false;
      for (const int32_t m : plan_.storages[p].members) {
        fixed |= !is_activation(m);
        output |= graph_.storages[m].is_output;
      }
      if (fixed) {
        add_residency(p, Pool::kParameters, 0, last + static_cast<int32_t>(random_.below(2)));
        continue;
      }
      const std::vector<Use> uses = uses_of(p);
      if (uses.empty()) continue;
      for (const int32_t m : plan_.storages[p].members) {
        const bool is_all = graph_.storages[m].size_bytes == plan_.storages[p].size_bytes;
        if (plan_.limits.alignment_bytes >= kCompressedAlignment && is_all && random_.chance(0.7))
          plan_.storages[p].compression = graph_.storages[m].compression;
      }
      int32_t current = add_residency(p, Pool::kDevice, uses[0].instance, uses[0].instance + 1);
      int32_t on_host = -1;  // a host residency with the present value, and its offload
      int32_t offload = -1;
      for (size_t u = 1; u <= uses.size(); ++u) {
        const int32_t from = uses[u - 1].instance;
        if (u == uses.size() && !output) break;
        const int32_t to = u < uses.size() ? uses[u].instance : last;
        if (uses[u - 1].writes) on_host = -1;
        if (u < uses.size() && uses[u].renews && random_.chance(0.9)) {  // dropped and made again
          current = add_residency(p, Pool::kDevice, to, to + 1);
          on_host = -1;
          continue;
        }
        if (to - from < 3 || !random_.chance(copying)) {
          plan_.residencies[current].end = std::max(to, to + (u < uses.size() ? 1 : 0));
          continue;
        }
        if (on_host >= 0) {  // still there from the last time: dropped, then fetched once more
          const int32_t issue = static_cast<int32_t>(random_.between(from + 1, to - 1));
          const int32_t wait = static_cast<int32_t>(random_.between(issue + 1, to));
          plan_.residencies[current].end = static_cast<int32_t>(random_.between(from + 1, issue));
          current = add_residency(p, Pool::kDevice, issue, std::max(to + (u < uses.size() ? 1 : 0), issue + 1));
          add_copy(CopyKind::kPrefetch, p, on_host, current, issue, wait);
          plan_.residencies[on_host].end = std::max(plan_.residencies[on_host].end, wait);
          continue;
        }
        const int32_t out = static_cast<int32_t>(random_.between(from + 1, to - 2));
        const int32_t out_wait = static_cast<int32_t>(random_.between(out + 1, to - 1));
        int32_t in = static_cast<int32_t>(random_.between(out_wait, to - 1));
        const bool early = random_.chance(0.35);  // begins while the offload may still run
        if (early) in = static_cast<int32_t>(random_.between(out, to - 1));
        const int32_t in_wait = static_cast<int32_t>(random_.between(in + 1, to));
        plan_.residencies[current].end = std::max(out_wait, std::min(in, out_wait));
        on_host = add_residency(p, Pool::kHost, out, std::max(in_wait, out_wait));
        const int32_t fetched = add_residency(p, Pool::kDevice, in, std::max(to + (u < uses.size() ? 1 : 0), in + 1));
        offload = add_copy(CopyKind::kOffload, p, current, on_host, out, out_wait);
        const int32_t prefetch = add_copy(CopyKind::kPrefetch, p, on_host, fetched, in, in_wait);
        if (in < out_wait || random_.chance(0.3)) {
          if (!careless() && !random_.chance(0.05)) after_[prefetch] = offload;
        }
        current = fetched;
      }
    }
    for (int32_t i = 0; i < last; ++i) {
      const int64_t bytes = graph_.operations[list_[i].operation].workspace_bytes;
      if (bytes == 0) continue;
      const int32_t r = add_residency(-1, Pool::kDevice, i, i + 1);
      plan_.residencies[r].size_bytes = rounded_up(bytes, plan_.limits.alignment_bytes);
    }
    // First fit in another order gives other addresses.
    if (random_.chance(0.5)) return;
    std::vector<int32_t> order(plan_.residencies.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.below(static_cast<int64_t>(i))]);
    std::vector<Residency> shuffled(order.size());
    for (size_t i = 0; i < order.size(); ++i) shuffled[order[i]] = plan_.residencies[i];
    plan_.residencies = shuffled;
    for (Copy& copy : plan_.copies) {
      copy.source = order[copy.source];
      copy.destination = order[copy.destination];
    }
  }

  std::vector<Use> uses_of(int32_t p) const {
    std::vector<Use> uses;
    for (size_t i = 0; i < list_.size(); ++i) {
      const Operation& operation = graph_.operations[list_[i].operation];
      Use use{static_cast<int32_t>(i), false, false};
      bool reads = false;
      int64_t bytes = 0;
      for (const int32_t t : operation.reads) reads |= home(t) == p;
      for (const int32_t t : operation.writes) {
        if (home(t) != p) continue;
        use.writes = true;
        int64_t size = graph_.tensors[t].element_bytes;
        for (const int64_t n : graph_.tensors[t].sizes) size *= n;
        bytes = std::max(bytes, size);
      }
      use.renews = use.writes && !reads && !list_[i].accumulate && bytes == plan_.storages[p].size_bytes;
      if (reads || use.writes) uses.push_back(use);
    }
    return uses;
  }

  // Within a boundary the order is free, but for a copy that is after another.
  void order_boundaries() {
    std::vector<int32_t> order(plan_.copies.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.below(static_cast<int64_t>(i))]);
    std::map<int32_t, size_t> rank;
    for (size_t i = 0; i < order.size(); ++i) rank[order[i]] = i;
    for (const auto& [prefetch, offload] : after_) {
      if (plan_.copies[prefetch].issue == plan_.copies[offload].issue && rank[prefetch] < rank[offload]) {
        std::swap(order[rank[prefetch]], order[rank[offload]]);
        std::swap(rank[prefetch], rank[offload]);
      }
      plan_.copies[prefetch].after = {offload};
    }
    for (const int32_t c : order) {
      plan_.boundaries[plan_.copies[c].issue].issues.push_back(c);
      plan_.boundaries[plan_.copies[c].wait].waits.push_back(c);
    }
  }

  const Graph& graph_;
  Random& random_;
  Plan plan_;
  double careless_ = 0;
  std::vector<int32_t> home_;  // per graph storage
  std::set<int32_t> fused_producers_, fused_sums_;
  std::vector<Instance> list_;
  std::map<int32_t, int32_t> after_;  // prefetch -> offload
};

}  // namespace

Graph make_graph(Random& random) {
  Graph graph = GraphMaker(random).run();
  for (Storage& storage : graph.storages) {
    if (storage.kind == StorageKind::kActivation && random.chance(0.7))
      storage.compression = Compression{1 + static_cast<double>(random.below(3)), 1};
  }
  return graph;
}

Plan make_plan(const Graph& graph, Random& random) {
  return PlanMaker(graph, random).run();
}

void predict(Plan& plan) {
  std::map<Pool, int64_t> peak, bound;
  for (const Residency& r : plan.residencies) {
    peak[r.pool] = std::max(peak[r.pool], r.offset_bytes + r.size_bytes);
    int64_t live = 0;  // the most are live when some residency begins
    for (const Residency& other : plan.residencies) {
      if (other.pool == r.pool && other.begin <= r.begin && r.begin < other.end) live += other.size_bytes;
    }
    bound[r.pool] = std::max(bound[r.pool], live);
  }
  plan.predicted.device_peak_bytes = peak[Pool::kDevice];
  plan.predicted.parameters_peak_bytes = peak[Pool::kParameters];
  plan.predicted.host_peak_bytes = peak[Pool::kHost];
  plan.predicted.device_lower_bound_bytes = bound[Pool::kDevice];
  plan.predicted.host_lower_bound_bytes = bound[Pool::kHost];
}

namespace {

template <class Item>
Item* some(std::vector<Item>& items, Random& random) {
  return items.empty() ? nullptr : &items[random.below(std::ssize(items))];
}
void remove(std::vector<int32_t>& list, int32_t item) {
  std::erase(list, item);
}

// Puts instances and copies where they belong after an instance was added at or removed from a position.
void shift_boundaries(Plan& plan, int32_t at, int32_t by) {
  const auto moved = [&](int32_t boundary) { return boundary > at ? boundary + by : boundary; };
  for (Residency& r : plan.residencies) {
    r.begin = moved(r.begin);
    r.end = moved(r.end);
  }
  std::vector<Boundary> boundaries(plan.instances.size() + 1);
  for (size_t b = 0; b < plan.boundaries.size(); ++b) {
    Boundary& to = boundaries.at(std::min<size_t>(moved(static_cast<int32_t>(b)), plan.instances.size()));
    to.waits.insert(to.waits.end(), plan.boundaries[b].waits.begin(), plan.boundaries[b].waits.end());
    to.issues.insert(to.issues.end(), plan.boundaries[b].issues.begin(), plan.boundaries[b].issues.end());
  }
  plan.boundaries = boundaries;
  for (size_t b = 0; b < plan.boundaries.size(); ++b) {
    for (const int32_t c : plan.boundaries[b].issues) plan.copies[c].issue = static_cast<int32_t>(b);
    for (const int32_t c : plan.boundaries[b].waits) plan.copies[c].wait = static_cast<int32_t>(b);
  }
}

std::string mutate_once(const Graph& graph, Plan& plan, Random& random) {
  const auto last = static_cast<int32_t>(plan.instances.size());
  const int64_t alignment = plan.limits.alignment_bytes;
  Residency* residency = some(plan.residencies, random);
  Copy* copy = some(plan.copies, random);
  const auto index = copy == nullptr ? -1 : static_cast<int32_t>(copy - plan.copies.data());
  const auto nearby = [&](int32_t boundary) { return boundary + static_cast<int32_t>(random.between(-2, 2)); };
  switch (random.below(33)) {
    case 0:
      if (residency == nullptr) return "";
      residency->offset_bytes += alignment * random.between(-3, 3);
      return "an offset shifted";
    case 1:
      if (residency == nullptr) return "";
      residency->offset_bytes = some(plan.residencies, random)->offset_bytes;
      return "an offset taken from another";
    case 2:
      if (residency == nullptr) return "";
      residency->begin += static_cast<int32_t>(random.between(1, 2));
      return "a residency begins later";
    case 3:
      if (residency == nullptr) return "";
      residency->end -= static_cast<int32_t>(random.between(1, 2));
      return "a residency ends earlier";
    case 4:
      if (residency == nullptr) return "";
      (random.chance(0.5) ? residency->begin : residency->end) = static_cast<int32_t>(random.between(-1, last + 2));
      return "a residency's time drawn anew";
    case 5:
      if (residency == nullptr) return "";
      residency->size_bytes += alignment * random.between(-1, 1) + (random.chance(0.2) ? 1 : 0);
      return "a residency's size changed";
    case 6:
      if (residency == nullptr) return "";
      residency->pool = static_cast<Pool>(random.below(3));
      return "a residency in another pool";
    case 7:
      if (residency == nullptr) return "";
      residency->storage = static_cast<int32_t>(random.between(-1, std::ssize(plan.storages) - 1));
      return "a residency of another storage";
    case 8:
    case 9: {  // a copy that waits elsewhere, consistently
      if (copy == nullptr) return "";
      remove(plan.boundaries[copy->wait].waits, index);
      copy->wait = random.chance(0.5) ? nearby(copy->wait) : static_cast<int32_t>(random.between(0, last));
      copy->wait = std::clamp(copy->wait, 0, last);
      plan.boundaries[copy->wait].waits.push_back(index);
      return "a wait moved";
    }
    case 10:
    case 11: {
      if (copy == nullptr) return "";
      remove(plan.boundaries[copy->issue].issues, index);
      copy->issue = random.chance(0.5) ? nearby(copy->issue) : static_cast<int32_t>(random.between(0, last));
      copy->issue = std::clamp(copy->issue, 0, last);
      std::vector<int32_t>& issues = plan.boundaries[copy->issue].issues;
      issues.insert(issues.begin() + random.between(0, std::ssize(issues)), index);
      return "an issue moved";
    }
    case 12:
      if (copy == nullptr) return "";
      remove(plan.boundaries[copy->wait].waits, index);
      return "a wait dropped";
    case 13:
      if (copy == nullptr) return "";
      if (random.chance(0.5)) {
        remove(plan.boundaries[copy->issue].issues, index);
      } else {
        plan.boundaries[random.between(0, last)].issues.push_back(index);
      }
      return "an issue dropped or doubled";
    case 14:
      if (copy == nullptr) return "";
      std::swap(copy->source, copy->destination);
      if (random.chance(0.5)) copy->kind = copy->kind == CopyKind::kOffload ? CopyKind::kPrefetch : CopyKind::kOffload;
      return "a copy's endpoints swapped";
    case 15:
      if (copy == nullptr) return "";
      (random.chance(0.5) ? copy->source : copy->destination) =
          static_cast<int32_t>(random.below(std::ssize(plan.residencies)));
      return "another endpoint";
    case 16:
      for (Copy& it : plan.copies) {
        if (it.after.empty()) continue;
        it.after.clear();
        return "an after dropped";
      }
      return "";
    case 17:
      if (copy == nullptr) return "";
      copy->after.push_back(static_cast<int32_t>(random.below(std::ssize(plan.copies))));
      return "an after added";
    case 18: {
      if (last < 2) return "";
      const int64_t i = random.below(last - 1);
      std::swap(plan.instances[i], plan.instances[i + 1]);
      return "two instances swapped";
    }
    case 19: {
      if (last < 1) return "";
      std::vector<int32_t> again;
      for (int32_t i = 0; i < last; ++i) {
        if (plan.instances[i].is_recomputation) again.push_back(i);
      }
      const auto i = again.empty() ? static_cast<int32_t>(random.below(last)) : random.pick(again);
      plan.instances.erase(plan.instances.begin() + i);
      std::erase_if(plan.residencies, [&](const Residency& r) {
        const bool its = r.storage == -1 && r.begin == i && plan.copies.empty();
        return its;
      });
      shift_boundaries(plan, i, -1);
      return "an instance dropped";
    }
    case 20: {
      if (last < 1) return "";
      const int64_t i = random.below(last);
      Instance again = plan.instances[i];
      again.is_recomputation = random.chance(0.9);
      const auto at = static_cast<int32_t>(random.between(i + 1, last));
      plan.instances.insert(plan.instances.begin() + at, again);
      shift_boundaries(plan, at, 1);
      const int64_t bytes = graph.operations[again.operation].workspace_bytes;
      if (bytes > 0) {
        plan.residencies.push_back({-1, Pool::kDevice, rounded_up(plan.predicted.device_peak_bytes, alignment),
                                    rounded_up(bytes, alignment), at, at + 1});
      }
      return "an instance repeated";
    }
    case 21: {
      if (last < 1) return "";
      Instance& instance = plan.instances[random.below(last)];
      switch (random.below(3)) {
        case 0:
          instance.accumulate = !instance.accumulate;
          return "accumulate flipped";
        case 1:
          instance.is_recomputation = !instance.is_recomputation;
          return "recomputation flipped";
        default:
          instance.operation = static_cast<int32_t>(random.below(std::ssize(graph.operations)));
          return "an instance of another operation";
      }
    }
    case 22: {
      FusedSum* fused = some(plan.fused, random);
      if (fused == nullptr) return "";
      if (random.chance(0.4)) {
        plan.fused.erase(plan.fused.begin() + (fused - plan.fused.data()));
        return "a fused sum forgotten";
      }
      (random.chance(0.5) ? fused->sum : fused->producer) =
          static_cast<int32_t>(random.below(std::ssize(graph.operations)));
      return "another fused sum";
    }
    case 23:
    case 24: {  // a member of another storage
      if (plan.storages.size() < 2) return "";
      PlanStorage& from = *some(plan.storages, random);
      PlanStorage& to = *some(plan.storages, random);
      if (from.members.empty()) return "";
      to.members.push_back(from.members.back());
      if (random.chance(0.9)) from.members.pop_back();
      if (random.chance(0.8)) {
        for (PlanStorage* storage : {&from, &to}) {
          storage->size_bytes = 0;
          for (const int32_t m : storage->members)
            storage->size_bytes = std::max(storage->size_bytes, graph.storages[m].size_bytes);
        }
      }
      return "a member of another storage";
    }
    case 25: {  // two whole storages become one
      if (plan.storages.size() < 2) return "";
      PlanStorage& storage = *some(plan.storages, random);
      storage.size_bytes += random.between(-1, 1);
      return "a storage's size changed";
    }
    case 26:
      if (residency == nullptr) return "";
      if (random.chance(0.5)) {
        plan.residencies.push_back(*residency);
        plan.residencies.back().offset_bytes =
            rounded_up(std::max({plan.predicted.device_peak_bytes, plan.predicted.host_peak_bytes,
                                 plan.predicted.parameters_peak_bytes}),
                       alignment);
        return "a residency doubled";
      }
      if (!plan.copies.empty()) return "";
      plan.residencies.erase(plan.residencies.begin() + (residency - plan.residencies.data()));
      return "a residency forgotten";
    case 27: {
      int64_t& limit = random.chance(0.5) ? plan.limits.device_bytes : plan.limits.host_bytes;
      limit = std::max<int64_t>(
          plan.predicted.host_peak_bytes + plan.predicted.device_peak_bytes * random.below(2) + random.between(-2, 2),
          0);
      return "another budget";
    }
    case 28:
      switch (random.below(4)) {
        case 0:
          plan.limits.alignment_bytes = int64_t{1} << random.between(0, 5);
          return "another alignment";
        case 1:
          (random.chance(0.5) ? plan.limits.offload_gbps : plan.limits.prefetch_gbps) = 0;
          return "no link";
        case 2:
          plan.graph_fingerprint += "0";
          return "another graph";
        default:
          plan.predicted.step_us = -1;
          return "a negative time";
      }
    case 29: {  // the same bytes copied once more, perhaps while they are on their way elsewhere
      if (copy == nullptr) return "";
      Copy again = *copy;
      again.after.clear();
      again.issue = std::clamp(nearby(again.issue), 0, last - 1);
      again.wait = static_cast<int32_t>(random.between(again.issue + 1, std::max(again.issue + 1, again.wait)));
      const auto added = static_cast<int32_t>(plan.copies.size());
      plan.boundaries[again.issue].issues.push_back(added);
      plan.boundaries[again.wait].waits.push_back(added);
      plan.copies.push_back(again);
      return "a copy doubled";
    }
    case 31:
      if (copy == nullptr) return "";
      copy->compressed = !copy->compressed;
      return "a copy compressed or not";
    case 32: {
      if (copy == nullptr) return "";
      std::optional<Compression>& compression = plan.storages[copy->storage].compression;
      compression =
          random.chance(0.5) ? std::nullopt : std::optional(Compression{1 + static_cast<double>(random.below(3)), 1});
      return "another compression";
    }
    default: {  // a residency cut in two: what it holds is lost in the middle
      if (residency == nullptr || residency->end - residency->begin < 2) return "";
      Residency second = *residency;
      second.begin = static_cast<int32_t>(random.between(residency->begin + 1, residency->end - 1));
      residency->end = second.begin;
      plan.residencies.push_back(second);
      return "a residency cut in two";
    }
  }
}

}  // namespace

std::string mutate(const Graph& graph, Plan& plan, Random& random) {
  const std::string what = mutate_once(graph, plan, random);
  if (what.empty()) return what;
  // Mostly let the consequences count, not the figures.
  if (random.chance(0.85)) {
    const bool negative = std::ranges::any_of(plan.residencies, [](const Residency& r) { return r.size_bytes < 0; });
    if (!negative) predict(plan);
    if (what != "another budget") {
      plan.limits.device_bytes = kUnlimited;
      plan.limits.host_bytes = kUnlimited;
    }
  }
  return what;
}

}  // namespace random_plans
