// Storage assignment on random graphs: an interpreter runs each graph byte by byte, once with a storage for every
// storage of the graph and once as assigned, and every operation must read the same.
#include <algorithm>
#include <random>

#include "graphs.h"
#include "memory/boxes.h"
#include "memory/operation_kinds.h"
#include "memory/storage_assignment.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

using Kind = StorageKind;
using Bytes = std::vector<uint8_t>;

// Where each element begins (elements have one byte here).
std::vector<int64_t> places(const Tensor& tensor) {
  std::vector<int64_t> result{tensor.offset_bytes};
  for (size_t i = 0; i < tensor.sizes.size(); ++i) {
    std::vector<int64_t> next;
    for (const int64_t begin : result) {
      for (int64_t k = 0; k < tensor.sizes[i]; ++k) next.push_back(begin + k * tensor.strides_bytes[i]);
    }
    result = std::move(next);
  }
  return result;
}

uint64_t mixed(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15u + b + 0x632be59bd9b4e019u;
  x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9u;
  return x ^ (x >> 29);
}

// Runs operations on memory that graph storages are mapped to. An operation computes its results element after element,
// and looks at its other reads anew for each: whatever it overwrites too early spoils what follows.
class Interpreter {
 public:
  Interpreter(const Graph& graph, const StorageAssignment* assignment) : graph_(graph), assignment_(assignment) {
    for (const Tensor& tensor : graph.tensors) places_.push_back(places(tensor));
    const size_t count = assignment ? assignment->storages.size() : graph.storages.size();
    for (size_t i = 0; i < count; ++i)
      memory_.emplace_back(assignment ? assignment->storages[i].size_bytes : graph.storages[i].size_bytes, 0xee);
    for (size_t i = 0; i < graph.storages.size(); ++i) {
      if (graph.storages[i].kind != Kind::kParameter && graph.storages[i].kind != Kind::kInput) continue;
      for (size_t k = 0; k < static_cast<size_t>(graph.storages[i].size_bytes); ++k)
        memory_of(static_cast<int32_t>(i))[k] = static_cast<uint8_t>(mixed(i, k));
    }
  }

  Bytes read(int32_t tensor) {
    Bytes bytes;
    for (const int64_t place : places_[tensor]) bytes.push_back(at(tensor, place));
    return bytes;
  }
  Bytes storage(int32_t storage) {
    Bytes& bytes = memory_of(storage);
    return {bytes.begin(), bytes.begin() + graph_.storages[storage].size_bytes};
  }

  void run(size_t index, bool accumulate) {
    const Operation& operation = graph_.operations[index];
    for (size_t w = 0; w < operation.writes.size(); ++w) {
      const int32_t write = operation.writes[w];
      const std::vector<int64_t>& targets = places_[write];
      const bool adds = accumulate && operation.accumulates == std::vector<int32_t>{static_cast<int32_t>(w)};
      for (size_t e = 0; e < targets.size(); ++e) {
        const uint8_t value = element(index, w, e);
        uint8_t& target = at(write, targets[e]);
        target = static_cast<uint8_t>(adds ? target + value : value);
      }
    }
  }

 private:
  Bytes& memory_of(int32_t storage) { return memory_[assignment_ ? assignment_->storage_of[storage] : storage]; }
  uint8_t& at(int32_t tensor, int64_t place) { return memory_of(graph_.tensors[tensor].storage).at(place); }

  uint8_t element(size_t index, size_t w, size_t e) {
    const Operation& operation = graph_.operations[index];
    if (operation.is_sum) {
      const int32_t a = operation.reads[0], b = operation.reads[1];
      return static_cast<uint8_t>(at(a, places_[a][e]) + at(b, places_[b][e]));
    }
    uint64_t value = mixed(index, w);
    for (size_t r = 0; r < operation.reads.size(); ++r) {
      const int32_t read = operation.reads[r];
      const InplacePair pair{.read = static_cast<int32_t>(r), .write = static_cast<int32_t>(w)};
      // An update computes element by element, as what may write in place does.
      const bool updates = operation.writes[w] == read;
      if (updates || std::find(operation.inplace.begin(), operation.inplace.end(), pair) != operation.inplace.end()) {
        value = mixed(value, at(read, places_[read][e]));
      } else {
        for (const int64_t place : places_[read]) value = mixed(value, at(read, place));
        value = mixed(value, e);
      }
    }
    return static_cast<uint8_t>(value >> 8);
  }

  const Graph& graph_;
  const StorageAssignment* assignment_;
  std::vector<std::vector<int64_t>> places_;  // of tensors
  std::vector<Bytes> memory_;
};

// Values are shared where every operation that runs reads what it reads without sharing, and what must be there at the
// end is there.
void require_same_values(const Graph& graph, const StorageAssignment& assignment) {
  Interpreter apart(graph, nullptr);
  Interpreter shared(graph, &assignment);
  std::vector<bool> is_skipped(graph.operations.size());
  std::vector<bool> accumulates(graph.operations.size());
  for (const FusedSum& fused : assignment.fused) {
    check::require(!is_skipped[fused.sum] && !accumulates[fused.producer], "an operation is fused twice");
    is_skipped[fused.sum] = accumulates[fused.producer] = true;
  }
  for (size_t i = 0; i < graph.operations.size(); ++i) {
    check::require(!(is_skipped[i] && accumulates[i]), "an operation both accumulates and does not run");
    if (!is_skipped[i]) {
      for (const int32_t read : graph.operations[i].reads)
        check::require(apart.read(read) == shared.read(read),
                       graph.operations[i].name + " reads another " + graph.tensors[read].name);
      shared.run(i, accumulates[i]);
    }
    apart.run(i, false);
  }
  for (size_t i = 0; i < graph.storages.size(); ++i) {
    const auto storage = static_cast<int32_t>(i);
    if (graph.storages[i].kind == Kind::kActivation && !graph.storages[i].is_output) continue;
    check::require(apart.storage(storage) == shared.storage(storage),
                   graph.storages[i].name + " is another at the end");
  }
}

void require_members_once(const Graph& graph, const StorageAssignment& assignment) {
  std::vector<int> seen(graph.storages.size());
  for (size_t i = 0; i < assignment.storages.size(); ++i) {
    int64_t largest = 0;
    for (const int32_t member : assignment.storages[i].members) {
      ++seen[member];
      check::equal(assignment.storage_of[member], static_cast<int32_t>(i), "storage_of");
      largest = std::max(largest, graph.storages[member].size_bytes);
    }
    check::equal(assignment.storages[i].size_bytes, largest, "size");
  }
  check::require(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }), "every storage once");
}

// A graph of small values that meets the rules and their exceptions often.
class RandomGraph {
 public:
  explicit RandomGraph(uint64_t seed) : random_(seed), builder_("random " + std::to_string(seed)) {}

  Graph make() {
    for (int i = 0; i < 2; ++i)
      known_.push_back(add("given" + std::to_string(i), i == 0 ? Kind::kInput : Kind::kParameter));
    const int64_t count = pick(3, 24);
    for (int64_t i = 0; i < count; ++i) {
      switch (pick(0, 9)) {
        case 0:
        case 1:
        case 2:
          sum();
          break;
        case 3:
          mutation();
          break;
        case 4:
          join();
          break;
        case 5:
          produce();
          break;
        case 6:
        case 7:  // a share and the sum of it with something
          produce();
          if (pick(0, 3) == 0) map();
          sum(known_.back());
          break;
        default:
          map();
      }
    }
    Graph& graph = builder_.graph;
    // Partial values must be written wholly before they count: see join().
    for (Storage& storage : graph.storages) {
      if (storage.kind != Kind::kActivation) continue;
      if (pick(0, 19) == 0) storage.is_output = true;
      if (pick(0, 19) == 0) storage.kind = Kind::kGradient;
    }
    require_valid(graph);
    return std::move(graph);
  }

 private:
  int64_t pick(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random_() % static_cast<uint64_t>(high - low + 1));
  }
  std::string name(const std::string& of) { return of + std::to_string(names_++); }
  int32_t add(const std::string& of, Kind kind = Kind::kActivation) {
    const int32_t tensor = builder_.contiguous(of, {2, 3}, 1, kind);
    // Now and then a storage that is larger than its tensor.
    if (pick(0, 14) == 0) builder_.graph.storages.back().size_bytes += 2;
    return tensor;
  }
  // What was made last most often, so that values die soon.
  int32_t any() {
    const auto last = static_cast<int64_t>(known_.size()) - 1;
    return known_[pick(0, 3) == 0 ? pick(0, last) : pick(std::max<int64_t>(0, last - 2), last)];
  }
  bool same_box(int32_t a, int32_t b) const {
    return same_elements(builder_.graph.tensors[a], builder_.graph.tensors[b]);
  }
  void pairs(const std::vector<int32_t>& reads, int32_t write) {
    std::vector<int32_t> allowed;
    for (size_t i = 0; i < reads.size(); ++i) {
      if (same_box(reads[i], write) && pick(0, 4) != 0) allowed.push_back(static_cast<int32_t>(i));
    }
    builder_.may_overwrite(allowed);
  }

  void map() {  // element-wise in some of its reads
    std::vector<int32_t> reads;
    for (int64_t k = pick(1, 2); k > 0; --k) reads.push_back(any());
    const int32_t write = add(name("map"));
    builder_.operation(name("operation"), "map", reads, {write});
    pairs(reads, write);
    known_.push_back(write);
  }
  void produce() {
    const int32_t write = add(name("product"));
    builder_.operation(name("operation"), "produce", {pick(0, 5) == 0 ? any() : known_[pick(0, 1)]}, {write})
        .accumulates = {0};
    known_.push_back(write);
  }
  void sum() { sum(any()); }
  void sum(int32_t other) {
    std::vector<int32_t> reads = {any(), other};
    if (pick(0, 1)) std::swap(reads[0], reads[1]);
    const auto is_whole = [&](int32_t tensor) {
      return builder_.graph.tensors[tensor].sizes == std::vector<int64_t>{2, 3};
    };
    if (!is_whole(reads[0]) || !is_whole(reads[1])) return;
    const int32_t write = add(name("sum"));
    Operation& operation = builder_.operation(name("operation"), targets::kAdd, reads, {write});
    operation.is_sum = true;
    if (pick(0, 9) == 0) operation.accumulates = {0};
    pairs(reads, write);
    known_.push_back(write);
  }
  void mutation() {
    const int32_t tensor = pick(0, 1) ? known_[1] : any();
    builder_.operation(name("operation"), "update", {any(), tensor}, {tensor}).mutates = {0};
  }
  // Rows of one value written by operations of their own, and a row that is read.
  void join() {
    const int32_t joined = add(name("joined"));
    for (int64_t row = 0; row < 2; ++row) {
      const int32_t part = builder_.part(name("row"), joined, {row, 0}, {1, 3});
      const std::vector<int32_t> reads = {any()};
      builder_.operation(name("operation"), "row", reads, {part});
      pairs(reads, part);
      known_.push_back(part);
    }
    known_.push_back(joined);
  }

  std::mt19937_64 random_;
  graphs::Builder builder_;
  std::vector<int32_t> known_;
  int names_ = 0;
};

}  // namespace

CHECK_NAMED(assignment_random, "storage assignment: random graphs compute the same with shared storages") {
  int64_t merged = 0;
  int64_t fused = 0;
  for (uint64_t seed = 0; seed < 1500; ++seed) {
    const Graph graph = RandomGraph(seed).make();
    for (const int rules : {7, static_cast<int>(seed % 7)}) {
      const AssignmentOptions options{
          .inplace = (rules & 1) != 0, .sums = (rules & 2) != 0, .accumulation = (rules & 4) != 0};
      const StorageAssignment assignment = assign_storages(graph, options);
      require_members_once(graph, assignment);
      try {
        require_same_values(graph, assignment);
      } catch (const std::exception& error) {
        throw std::runtime_error(graph.name + ", rules " + std::to_string(rules) + ": " + error.what());
      }
      if (rules == 0) check::equal(assignment.storages.size(), graph.storages.size(), "without rules");
      if (rules != 7) continue;
      merged += static_cast<int64_t>(graph.storages.size() - assignment.storages.size());
      fused += static_cast<int64_t>(assignment.fused.size());
    }
  }
  check::require(merged > 4000 && fused > 400, std::to_string(merged) + " merged, " + std::to_string(fused) + " fused");
}
