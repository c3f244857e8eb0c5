// Executes graph and plan on symbols. The value of a byte is named by the write of the graph that makes it, or by the
// storage that holds it before the step; its place in its storage is the same in graph and plan, so equal names are
// equal bytes. In the graph every storage has its own bytes and every read gets its expected names. In the plan the
// residencies hold the names, atom by atom, and every instance must find what is expected of its operation: then it
// writes what its operation writes, the first time and again.
//
// The plan is walked in the order in which the host issues it. That this order decides the values needs every two
// accesses to the same bytes, one of them a write, to be ordered for every timing. Inside a residency that is checked
// here against the last copy of each stream. Between residencies it follows from two facts: at no boundary do two own
// the same byte (check_addresses), and all accesses to a residency lie between the moments at which the compute stream
// passes its first and its last boundary (checked here).
#include <algorithm>
#include <ranges>
#include <span>

#include "memory/validator/atoms.h"
#include "memory/validator/stages.h"

namespace splitkern::memory::validation {
namespace {

using Value = int64_t;
constexpr Value kUndefined = -1;  // 0 and above: storages before the step, then the writes of the graph in order

class Execution {
 public:
  Execution(const Graph& graph, const Plan& plan, const Clocks& clocks, Findings& findings)
      : graph_(graph), plan_(plan), clocks_(clocks), findings_(findings) {}

  void run() {
    if (!cut_storages()) return;
    execute_graph();
    if (!resolve_fused()) return;
    execute_plan();
  }

 private:
  // A stretch of a vector that holds the lists of many.
  struct Slice {
    size_t begin = 0;
    size_t size = 0;
  };
  struct Place {
    std::vector<Value> values;  // per atom of the storage, while it is live
    // The last copies of each stream that read or write it.
    std::array<int32_t, 2> reader = {-1, -1};
    std::array<int32_t, 2> writer = {-1, -1};
  };
  // What a write of a fused sum's producer adds to, and what comes of it.
  struct Accumulation {
    int32_t operation = 0;
    int32_t write = 0;
    int32_t sum = 0;
    size_t operand = 0;  // the sum's read that the destination must hold
  };

  std::span<const int32_t> atoms(int32_t tensor) const {
    return std::span(tensor_atoms_).subspan(atoms_of_tensor_[tensor].begin, atoms_of_tensor_[tensor].size);
  }
  std::span<const Value> expected(size_t read) const {
    return std::span(expected_).subspan(expected_of_read_[read].begin, expected_of_read_[read].size);
  }
  int32_t home(int32_t tensor) const { return home_[graph_.tensors[tensor].storage]; }
  Value value_of_write(int32_t operation, size_t write) const {
    return static_cast<Value>(graph_.storages.size() + first_write_[operation] + write);
  }

  bool is_there_before(int32_t storage) const {
    const Storage& it = graph_.storages[storage];
    return it.size_bytes > 0 && (it.kind == StorageKind::kParameter || it.kind == StorageKind::kInput);
  }

  bool cut_storages() {
    home_.resize(graph_.storages.size());
    for (size_t p = 0; p < plan_.storages.size(); ++p) {
      for (const int32_t member : plan_.storages[p].members) home_[member] = static_cast<int32_t>(p);
    }
    std::vector<std::vector<int32_t>> tensors(plan_.storages.size());
    for (size_t t = 0; t < graph_.tensors.size(); ++t)
      tensors[home(static_cast<int32_t>(t))].push_back(static_cast<int32_t>(t));
    atoms_of_tensor_.resize(graph_.tensors.size());
    atom_count_.resize(plan_.storages.size());
    whole_.resize(graph_.storages.size());
    std::vector<const Tensor*> boxes;
    for (size_t p = 0; p < plan_.storages.size(); ++p) {
      boxes.clear();
      for (const int32_t t : tensors[p]) boxes.push_back(&graph_.tensors[t]);
      // What is there before the step has a value in every byte, whether a tensor names it or not.
      Tensor there;
      int32_t member_there = -1;
      for (const int32_t member : plan_.storages[p].members) {
        if (is_there_before(member)) member_there = member;
      }
      if (member_there >= 0) {
        there.sizes = {graph_.storages[member_there].size_bytes};
        there.strides_bytes = {1};
        boxes.push_back(&there);
      }
      Atoms cut;
      try {
        cut = cut_into_atoms(boxes);
      } catch (const TooComplex& error) {
        findings_.add(Reason::kTooComplex, findings_.storage(static_cast<int64_t>(p)), ": ", error.what());
        return false;
      }
      atom_count_[p] = cut.count;
      for (size_t i = 0; i < tensors[p].size(); ++i) {
        atoms_of_tensor_[tensors[p][i]] = {tensor_atoms_.size(), cut.of_tensor[i].size()};
        tensor_atoms_.insert(tensor_atoms_.end(), cut.of_tensor[i].begin(), cut.of_tensor[i].end());
      }
      if (member_there >= 0) whole_[member_there] = std::move(cut.of_tensor.back());
    }
    // Every graph storage gets an entry per atom of its planned storage.
    constexpr int64_t kMostEntries = int64_t{1} << 26;
    int64_t entries = 0;
    for (size_t p = 0; p < plan_.storages.size(); ++p) {
      entries += static_cast<int64_t>(plan_.storages[p].members.size()) * atom_count_[p];
      if (entries > kMostEntries) {
        findings_.add(Reason::kTooComplex, findings_.storage(static_cast<int64_t>(p)), " has ",
                      plan_.storages[p].members.size(), " members that fall into ", atom_count_[p], " parts");
        return false;
      }
    }
    return true;
  }

  void execute_graph() {
    std::vector<std::vector<Value>>& held = last_;
    held.resize(graph_.storages.size());
    for (size_t s = 0; s < held.size(); ++s) {
      held[s].assign(atom_count_[home_[s]], kUndefined);
      for (const int32_t atom : whole_[s]) held[s][atom] = static_cast<Value>(s);
    }
    first_read_.reserve(graph_.operations.size());
    first_write_.reserve(graph_.operations.size());
    size_t writes = 0;
    for (size_t o = 0; o < graph_.operations.size(); ++o) {
      const Operation& operation = graph_.operations[o];
      first_read_.push_back(expected_of_read_.size());
      first_write_.push_back(writes);
      writes += operation.writes.size();
      for (const int32_t tensor : operation.reads) {
        const size_t begin = expected_.size();
        for (const int32_t atom : atoms(tensor)) expected_.push_back(held[graph_.tensors[tensor].storage][atom]);
        expected_of_read_.push_back({begin, expected_.size() - begin});
      }
      for (size_t w = 0; w < operation.writes.size(); ++w) {
        const int32_t tensor = operation.writes[w];
        for (const int32_t atom : atoms(tensor))
          held[graph_.tensors[tensor].storage][atom] = value_of_write(static_cast<int32_t>(o), w);
      }
    }
  }

  // For every fused sum: which of its operands is the producer's, in which write; the other is what it adds to.
  bool resolve_fused() {
    bool is_right = true;
    for (const FusedSum& fused : plan_.fused) {
      const Operation& sum = graph_.operations[fused.sum];
      const Operation& producer = graph_.operations[fused.producer];
      bool found = false;
      for (size_t operand = 0; operand < 2 && !found; ++operand) {
        for (const int32_t w : producer.accumulates) {
          const int32_t product = producer.writes[w];
          const std::span<const Value> values = expected(first_read_[fused.sum] + operand);
          if (!std::ranges::all_of(values, [&](Value v) { return v == value_of_write(fused.producer, w); })) continue;
          if (!lies_exactly_on(graph_.tensors[sum.reads[operand]], graph_.tensors[product])) continue;
          if (graph_.tensors[sum.reads[operand]].storage != graph_.tensors[product].storage) continue;
          const int32_t other = sum.reads[1 - operand];
          const int32_t out = sum.writes[0];
          if (home(other) != home(product) || home(out) != home(product) ||
              !lies_exactly_on(graph_.tensors[other], graph_.tensors[product]) ||
              !lies_exactly_on(graph_.tensors[out], graph_.tensors[product])) {
            continue;
          }
          accumulations_.push_back({fused.producer, w, fused.sum, 1 - operand});
          found = true;
          break;
        }
      }
      if (!found) {
        is_right = false;
        findings_.add(Reason::kFused, findings_.operation(fused.sum), " does not add what ",
                      findings_.operation(fused.producer),
                      " can accumulate to a tensor of the same storage, in the same place");
      }
    }
    std::ranges::stable_sort(accumulations_, {}, [](const Accumulation& a) { return std::pair(a.operation, a.write); });
    // Instance::accumulate is said of an instance, so it is true of all that its operation can accumulate.
    for (auto one = accumulations_.begin(); one != accumulations_.end();) {
      const auto end = std::ranges::find_if(one, accumulations_.end(),
                                            [&](const Accumulation& a) { return a.operation != one->operation; });
      std::vector<int32_t> writes = graph_.operations[one->operation].accumulates;
      std::ranges::sort(writes);
      if (!std::ranges::equal(writes, std::ranges::subrange(one, end), {}, {}, &Accumulation::write)) {
        is_right = false;
        findings_.add(Reason::kFused, findings_.operation(one->operation), " can accumulate ", writes.size(),
                      " writes, and not each of them has exactly one fused sum");
      }
      one = end;
    }
    return is_right;
  }

  void execute_plan() {
    const auto last = static_cast<int32_t>(plan_.instances.size());
    std::vector<int32_t> begins(plan_.residencies.size());
    for (size_t r = 0; r < begins.size(); ++r) begins[r] = static_cast<int32_t>(r);
    std::vector<int32_t> ends = begins;
    std::ranges::stable_sort(begins, {}, [&](int32_t r) { return plan_.residencies[r].begin; });
    std::ranges::stable_sort(ends, {}, [&](int32_t r) { return plan_.residencies[r].end; });
    places_.resize(plan_.residencies.size());
    on_device_.resize(plan_.storages.size());
    stamps_.resize(plan_.storages.size());

    size_t begun = 0;
    size_t ended = 0;
    for (int32_t b = 0; b <= last && !findings_.full(); ++b) {
      if (b == last && last > 0) check_last_values();
      for (; ended < ends.size() && plan_.residencies[ends[ended]].end <= b; ++ended) end_residency(ends[ended]);
      for (; begun < begins.size() && plan_.residencies[begins[begun]].begin <= b; ++begun)
        begin_residency(begins[begun]);
      for (const int32_t copy : plan_.boundaries[b].issues) execute_copy(copy);
      if (b < last) execute_instance(b);
    }
    if (last == 0) check_last_values();
  }

  void begin_residency(int32_t r) {
    const Residency& residency = plan_.residencies[r];
    if (residency.storage < 0) return;
    places_[r].values.assign(atom_count_[residency.storage], kUndefined);
    if (residency.pool == Pool::kHost) return;
    on_device_[residency.storage].push_back(r);
    if (residency.pool != Pool::kParameters) return;
    for (const int32_t member : plan_.storages[residency.storage].members) {
      for (const int32_t atom : whole_[member]) places_[r].values[atom] = static_cast<Value>(member);
    }
  }

  void end_residency(int32_t r) {
    const Residency& residency = plan_.residencies[r];
    if (residency.storage < 0) return;
    places_[r].values = {};
    std::erase(on_device_[residency.storage], r);
  }

  void execute_copy(int32_t c) {
    const Copy& copy = plan_.copies[c];
    if (plan_.storages[copy.storage].size_bytes == 0) return;  // touches nothing
    const size_t stream = copy.kind == CopyKind::kOffload ? 0 : 1;
    Place& source = places_[copy.source];
    Place& destination = places_[copy.destination];
    bool is_inside = true;
    for (const int32_t r : {copy.source, copy.destination}) {
      const Residency& residency = plan_.residencies[r];
      // After the last boundary nothing is issued and everything was waited for.
      const bool is_done =
          residency.end > static_cast<int32_t>(plan_.instances.size()) || clocks_.done_at_boundary(c, residency.end);
      if (residency.begin > copy.issue || residency.end <= copy.issue) {
        findings_.add(Reason::kOutside, findings_.copy(c), " touches ", findings_.residency(r),
                      ", which does not own its bytes at boundary ", copy.issue);
        is_inside = false;
      } else if (!is_done) {
        findings_.add(Reason::kOutside, findings_.copy(c), " may still touch ", findings_.residency(r),
                      " at its end, boundary ", residency.end, ": nothing waits for the copy until then");
      }
    }
    for (const Place* place : {&source, &destination}) {
      for (const int32_t writer : place->writer) {
        if (writer < 0 || clocks_.done_at_start(writer, c)) continue;
        findings_.add(Reason::kBeforeArrival, findings_.copy(c), place == &source ? " reads " : " writes ", "what ",
                      findings_.copy(writer), " may still be writing, in ",
                      findings_.residency(place == &source ? copy.source : copy.destination));
      }
    }
    for (const int32_t reader : destination.reader) {
      if (reader < 0 || clocks_.done_at_start(reader, c)) continue;
      findings_.add(Reason::kBeforeDeparture, findings_.copy(c), " writes what ", findings_.copy(reader),
                    " may still be reading, in ", findings_.residency(copy.destination));
    }
    source.reader[stream] = c;
    destination.writer[stream] = c;
    if (is_inside) destination.values = source.values;
  }

  // Where an instance finds the storage now: the one residency on the device, or -1.
  int32_t only_on_device(int32_t storage) const {
    return on_device_[storage].size() == 1 ? on_device_[storage][0] : -1;
  }
  // The same for a tensor that this instance touches; reports what is wrong.
  int32_t require_on_device(int32_t instance, int32_t tensor) {
    const std::vector<int32_t>& all = on_device_[home(tensor)];
    if (all.empty()) {
      findings_.add(Reason::kNotResident, findings_.instance(instance), " needs ", findings_.tensor(tensor), " of ",
                    findings_.storage(home(tensor)), ", which is not on the device at boundary ", instance);
    } else if (all.size() > 1) {
      findings_.add(Reason::kSeveralDevice, findings_.instance(instance), " needs ", findings_.tensor(tensor),
                    ", which is on the device in ", findings_.residency(all[0]), " and in ",
                    findings_.residency(all[1]), " at boundary ", instance);
    }
    return only_on_device(home(tensor));
  }

  std::string named(Value value) const {
    if (value == kUndefined) return "nothing";
    const auto storages = static_cast<Value>(graph_.storages.size());
    if (value < storages) return "what " + findings_.graph_storage(value) + " holds before the step";
    const auto write = static_cast<size_t>(value - storages);
    const auto next = std::ranges::upper_bound(first_write_, write);
    const int64_t operation = next - first_write_.begin() - 1;
    return "output " + std::to_string(write - first_write_[operation]) + " of " + findings_.operation(operation);
  }

  // The atoms of the tensor must hold these values; reports the first that does not.
  void require_values(Reason reason, const std::string& who, int32_t tensor, int32_t r, std::span<const Value> wanted) {
    const std::span<const int32_t> parts = atoms(tensor);
    for (size_t i = 0; i < parts.size(); ++i) {
      const Value held = places_[r].values[parts[i]];
      if (held == wanted[i]) continue;
      findings_.add(reason, who, findings_.tensor(tensor), " in ", findings_.residency(r), ": it holds ", named(held),
                    ", expected is ", named(wanted[i]));
      return;
    }
  }

  void execute_instance(int32_t i) {
    const Instance& instance = plan_.instances[i];
    const int32_t o = instance.operation;
    const Operation& operation = graph_.operations[o];
    for (size_t k = 0; k < operation.reads.size(); ++k) {
      const int32_t tensor = operation.reads[k];
      if (atoms(tensor).empty()) continue;
      const int32_t r = require_on_device(i, tensor);
      if (r < 0) continue;
      require_arrived(i, r);
      const bool is_wrong = !std::ranges::equal(atoms(tensor), expected(first_read_[o] + k), {},
                                                [&](int32_t atom) { return places_[r].values[atom]; });
      if (is_wrong) {
        require_values(Reason::kWrongValue, findings_.instance(i) + " reads ", tensor, r, expected(first_read_[o] + k));
      }
    }
    for (size_t w = 0; w < operation.writes.size(); ++w) {
      const int32_t tensor = operation.writes[w];
      if (atoms(tensor).empty()) continue;
      const int32_t r = require_on_device(i, tensor);
      if (r < 0) continue;
      require_arrived(i, r);
      for (const int32_t reader : places_[r].reader) {
        if (reader < 0 || clocks_.done_at_boundary(reader, i)) continue;
        findings_.add(Reason::kBeforeDeparture, findings_.instance(i), " writes what ", findings_.copy(reader),
                      " may still be reading, in ", findings_.residency(r));
      }
      check_inplace(i, w);
    }
    // Only now: an operation reads everything that it needs of what it overwrites.
    std::vector<std::pair<int32_t, Value>> results;
    for (size_t w = 0; w < operation.writes.size(); ++w)
      results.emplace_back(operation.writes[w], value_of_write(o, w));
    if (instance.accumulate) {
      const auto [first, end] = std::ranges::equal_range(accumulations_, o, {}, &Accumulation::operation);
      for (const Accumulation& one : std::ranges::subrange(first, end)) {
        const int32_t tensor = operation.writes[one.write];
        results[one.write].second = value_of_write(one.sum, 0);
        const int32_t r = only_on_device(home(tensor));
        if (r < 0) continue;
        require_values(Reason::kWrongValue, findings_.instance(i) + " adds to ", tensor, r,
                       expected(first_read_[one.sum] + one.operand));
      }
    }
    for (const auto& [tensor, value] : results) {
      const int32_t r = only_on_device(home(tensor));
      if (r < 0) continue;
      for (const int32_t atom : atoms(tensor)) places_[r].values[atom] = value;
    }
  }

  void require_arrived(int32_t i, int32_t r) {
    for (const int32_t writer : places_[r].writer) {
      if (writer < 0 || clocks_.done_at_boundary(writer, i)) continue;
      findings_.add(Reason::kBeforeArrival, findings_.instance(i), " touches what ", findings_.copy(writer),
                    " may still be writing, in ", findings_.residency(r));
    }
  }

  // A write may lie on bytes that the instance reads or writes otherwise only as in the graph itself (the same graph
  // storage), or in an allowed in-place pair of equal boxes.
  void check_inplace(int32_t i, size_t w) {
    const Operation& operation = graph_.operations[plan_.instances[i].operation];
    const int32_t tensor = operation.writes[w];
    const auto shares = [&](int32_t other) {
      return home(other) == home(tensor) && graph_.tensors[other].storage != graph_.tensors[tensor].storage;
    };
    const bool is_alone =
        std::ranges::none_of(operation.reads, shares) && std::ranges::none_of(operation.writes, shares);
    if (is_alone) return;
    std::vector<int64_t>& stamps = stamps_[home(tensor)];
    stamps.resize(atom_count_[home(tensor)], 0);
    ++stamp_;
    for (const int32_t atom : atoms(tensor)) stamps[atom] = stamp_;
    const auto overlaps = [&](int32_t other) {
      return shares(other) && std::ranges::any_of(atoms(other), [&](int32_t atom) { return stamps[atom] == stamp_; });
    };
    for (size_t k = 0; k < operation.reads.size(); ++k) {
      const int32_t read = operation.reads[k];
      if (!overlaps(read)) continue;
      const auto is_pair = [&](const InplacePair& pair) {
        return pair.read == static_cast<int32_t>(k) && pair.write == static_cast<int32_t>(w);
      };
      if (std::ranges::any_of(operation.inplace, is_pair) &&
          lies_exactly_on(graph_.tensors[read], graph_.tensors[tensor])) {
        continue;
      }
      findings_.add(Reason::kInplace, findings_.instance(i), " writes ", findings_.tensor(tensor), " over ",
                    findings_.tensor(read), ", which it reads, in ", findings_.storage(home(tensor)));
    }
    for (size_t other = 0; other < w; ++other) {
      if (!overlaps(operation.writes[other])) continue;
      findings_.add(Reason::kInplace, findings_.instance(i), " writes ", findings_.tensor(tensor), " over ",
                    findings_.tensor(operation.writes[other]), ", which it writes too, in ",
                    findings_.storage(home(tensor)));
    }
  }

  void check_last_values() {
    for (size_t s = 0; s < graph_.storages.size(); ++s) {
      const Storage& storage = graph_.storages[s];
      if (storage.kind == StorageKind::kActivation && !storage.is_output) continue;
      const int32_t r = only_on_device(home_[s]);
      for (int32_t atom = 0; atom < atom_count_[home_[s]]; ++atom) {
        const Value wanted = last_[s][atom];
        if (wanted == kUndefined) continue;
        if (r >= 0 && places_[r].values[atom] == wanted) continue;
        findings_.add(Reason::kFinalValue, findings_.graph_storage(static_cast<int64_t>(s)),
                      r < 0 ? " is not in one place on the device" : " holds " + named(places_[r].values[atom]),
                      " after the step, expected is ", named(wanted));
        break;
      }
    }
  }

  const Graph& graph_;
  const Plan& plan_;
  const Clocks& clocks_;
  Findings& findings_;

  std::vector<int32_t> home_;                // planned storage of a graph storage
  std::vector<int32_t> atom_count_;          // per planned storage
  std::vector<std::vector<int32_t>> whole_;  // per graph storage that is there before the step: all its atoms
  std::vector<int32_t> tensor_atoms_;        // all lists of atoms
  std::vector<Slice> atoms_of_tensor_;       // in tensor_atoms_
  std::vector<Value> expected_;              // all that the operations read, in captured order
  std::vector<Slice> expected_of_read_;      // in expected_, per read of the graph
  std::vector<size_t> first_read_;           // per operation, in expected_of_read_
  std::vector<size_t> first_write_;          // per operation: how many writes the graph has before it
  std::vector<std::vector<Value>> last_;     // per graph storage, after the last operation
  std::vector<Accumulation> accumulations_;  // by operation

  std::vector<Place> places_;                    // per residency
  std::vector<std::vector<int32_t>> on_device_;  // per planned storage: its live residencies on the device
  std::vector<std::vector<int64_t>> stamps_;     // per planned storage and atom: which check_inplace met it last
  int64_t stamp_ = 0;
};

}  // namespace

void check_execution(const Graph& graph, const Plan& plan, const Clocks& clocks, Findings& findings) {
  Execution(graph, plan, clocks, findings).run();
}

}  // namespace splitkern::memory::validation
