#include "memory/native/interpreter.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "memory/errors.h"
#include "memory/native/random_numbers.h"

namespace interpreter {
namespace {

using namespace splitkern::memory;
using Byte = uint64_t;  // a byte of the plan holds 64 bits here, so that equal by chance does not happen
using Bytes = std::vector<Byte>;

// Addresses of the tensor's bytes within its storage, in logical order.
std::vector<int64_t> addresses(const Tensor& tensor) {
  std::vector<int64_t> all = {tensor.offset_bytes};
  for (size_t d = 0; d < tensor.sizes.size(); ++d) {
    std::vector<int64_t> next;
    for (const int64_t address : all) {
      for (int64_t i = 0; i < tensor.sizes[d]; ++i) next.push_back(address + i * tensor.strides_bytes[d]);
    }
    all = next;
  }
  std::vector<int64_t> bytes;
  for (const int64_t address : all) {
    for (int64_t i = 0; i < tensor.element_bytes; ++i) bytes.push_back(address + i);
  }
  return bytes;
}
bool share(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  return std::ranges::any_of(a, [&](int64_t x) { return std::ranges::find(b, x) != b.end(); });
}

struct Wrong {
  std::string text;
};
void demand(bool condition, const std::string& text) {
  if (!condition) throw Wrong{text};
}

class Judge {
 public:
  Judge(const Graph& graph, const Plan& plan, uint64_t seed) : graph_(graph), plan_(plan), random_(seed) {}

  Judgement run() {
    try {
      for (const Tensor& tensor : graph_.tensors) addresses_.push_back(addresses(tensor));
      execute_graph();
      look_at_lists();
      look_at_addresses();
      look_at_fused();
      look_at_instances();
      explore_states();
    } catch (const Wrong& wrong) {
      return {false, wrong.text};
    }
    // No races: every schedule must come to the same end.
    std::string first;
    constexpr int kSchedules = 5;
    for (int i = 0; i < kSchedules; ++i) {
      std::string result;
      try {
        execute_plan(i);
      } catch (const Wrong& wrong) {
        result = wrong.text;
      }
      if (i > 0 && result.empty() != first.empty())
        throw std::logic_error("schedules disagree: \"" + first + "\" and \"" + result + "\"");
      if (i == 0) first = result;
    }
    return {first.empty(), first};
  }

 private:
  bool is_there(int32_t storage) const {
    return graph_.storages[storage].kind == StorageKind::kParameter ||
           graph_.storages[storage].kind == StorageKind::kInput;
  }
  int32_t storage_of(int32_t tensor) const { return graph_.tensors[tensor].storage; }
  int32_t home(int32_t tensor) const { return home_.at(storage_of(tensor)); }
  int32_t boundary_count() const { return static_cast<int32_t>(plan_.boundaries.size()); }
  int32_t last() const { return static_cast<int32_t>(plan_.instances.size()); }

  // ---- the graph -------------------------------------------------------------------------------------------------

  // Two sums of the same operands are different values, as two convolutions are: a plan must not mix them up.
  static Byte salt(int32_t sum) { return random_numbers::mix(~static_cast<uint64_t>(sum)); }

  // What the operation writes, given all that it reads. `run` counts runs of a random operation.
  std::vector<Bytes> results(int32_t o, const std::vector<Bytes>& read, uint64_t run) const {
    const Operation& operation = graph_.operations[o];
    uint64_t digest = random_numbers::mix(static_cast<uint64_t>(o) * 977 + (operation.is_random ? run : 0));
    for (const Bytes& bytes : read) {
      for (const Byte byte : bytes) digest = random_numbers::mix(digest ^ byte);
    }
    std::vector<Bytes> out;
    for (size_t w = 0; w < operation.writes.size(); ++w) {
      Bytes bytes;
      for (size_t k = 0; k < addresses_[operation.writes[w]].size(); ++k)
        bytes.push_back(operation.is_sum ? read[0].at(k) + read[1].at(k) + salt(o)
                                         : random_numbers::mix(digest + w * 1000003 + k));
      out.push_back(bytes);
    }
    return out;
  }

  void execute_graph() {
    for (size_t s = 0; s < graph_.storages.size(); ++s) {
      Bytes bytes(graph_.storages[s].size_bytes, kUndefined);
      if (is_there(static_cast<int32_t>(s))) {
        for (size_t k = 0; k < bytes.size(); ++k) bytes[k] = initial(static_cast<int32_t>(s), k);
      }
      graph_memory_.push_back(bytes);
    }
    for (size_t o = 0; o < graph_.operations.size(); ++o) {
      const Operation& operation = graph_.operations[o];
      std::vector<Bytes> read;
      for (const int32_t tensor : operation.reads) {
        Bytes bytes;
        for (const int64_t address : addresses_[tensor]) bytes.push_back(graph_memory_[storage_of(tensor)].at(address));
        if (std::ranges::find(bytes, kUndefined) != bytes.end()) throw std::logic_error("the graph reads junk");
        read.push_back(bytes);
      }
      const std::vector<Bytes> out = results(static_cast<int32_t>(o), read, 0);
      for (size_t w = 0; w < out.size(); ++w) {
        for (size_t k = 0; k < out[w].size(); ++k)
          graph_memory_[storage_of(operation.writes[w])].at(addresses_[operation.writes[w]][k]) = out[w][k];
      }
      expected_.push_back(read);
      produced_.push_back(out);
    }
  }
  static Byte initial(int32_t storage, size_t k) {
    return random_numbers::mix(uint64_t{0xabcd} << 32 | (storage * 4096 + k));
  }

  // ---- 1: lists --------------------------------------------------------------------------------------------------

  template <class Items>
  static void demand_index(int64_t index, const Items& items, const char* what) {
    demand(index >= 0 && index < static_cast<int64_t>(items.size()), std::string("index of ") + what);
  }

  void look_at_lists() {
    demand(plan_.graph_fingerprint == fingerprint(graph_), "other graph");
    try {
      require_valid(plan_.limits);
    } catch (const InvalidArgument&) {
      throw Wrong{"limits"};
    }
    for (const double us :
         {plan_.predicted.step_us, plan_.predicted.compute_us, plan_.predicted.recompute_us, plan_.predicted.stall_us})
      demand(std::isfinite(us) && us >= 0, "predicted times");

    for (size_t s = 0; s < graph_.storages.size(); ++s) {
      int times = 0;
      for (size_t p = 0; p < plan_.storages.size(); ++p) {
        for (const int32_t member : plan_.storages[p].members) {
          demand_index(member, graph_.storages, "member");
          if (member != static_cast<int32_t>(s)) continue;
          ++times;
          home_[member] = static_cast<int32_t>(p);
        }
      }
      demand(times == 1, "membership of graph storage " + std::to_string(s));
    }
    for (const PlanStorage& storage : plan_.storages) {
      int64_t largest = 0;
      int there = 0;
      for (const int32_t m : storage.members) {
        largest = std::max(largest, graph_.storages[m].size_bytes);
        if (is_there(m) && graph_.storages[m].size_bytes > 0) ++there;
      }
      demand(!storage.members.empty() && there <= 1, "members");
      demand(storage.size_bytes == largest, "size of a storage");
    }

    for (const FusedSum& fused : plan_.fused) {
      demand_index(fused.sum, graph_.operations, "fused sum");
      demand_index(fused.producer, graph_.operations, "producer");
      demand(std::ranges::count(plan_.fused, fused.sum, &FusedSum::sum) == 1, "fused twice");
      demand(graph_.operations[fused.sum].is_sum, "fused, no sum");
    }
    const auto is_fused = [&](int32_t o) { return std::ranges::count(plan_.fused, o, &FusedSum::sum) > 0; };
    const auto is_producer = [&](int32_t o) { return std::ranges::count(plan_.fused, o, &FusedSum::producer) > 0; };
    std::vector<int32_t> first_runs;
    for (const Instance& instance : plan_.instances) {
      demand_index(instance.operation, graph_.operations, "operation");
      const Operation& operation = graph_.operations[instance.operation];
      if (instance.is_recomputation) {
        demand(std::ranges::find(first_runs, instance.operation) != first_runs.end(), "again before first");
        demand(!operation.is_random && operation.mutates.empty(), "repeated");
      } else {
        first_runs.push_back(instance.operation);
        demand(instance.accumulate == is_producer(instance.operation), "accumulate");
      }
      demand(!instance.accumulate || is_producer(instance.operation), "accumulate");
      demand(!is_fused(instance.operation), "instance of a fused sum");
    }
    std::vector<int32_t> captured;
    for (size_t o = 0; o < graph_.operations.size(); ++o) {
      if (!is_fused(static_cast<int32_t>(o))) captured.push_back(static_cast<int32_t>(o));
    }
    demand(first_runs == captured, "captured order");
    demand(plan_.boundaries.size() == plan_.instances.size() + 1, "boundaries");

    const int64_t alignment = plan_.limits.alignment_bytes;
    for (const Residency& r : plan_.residencies) {
      demand(r.storage >= -1 && r.storage < static_cast<int32_t>(plan_.storages.size()), "index of storage");
      demand(r.pool == Pool::kDevice || r.pool == Pool::kHost || r.pool == Pool::kParameters, "pool");
      demand(r.begin >= 0 && r.begin < r.end && r.end <= last() + 1, "lifetime");
      demand(r.offset_bytes >= 0 && r.offset_bytes % alignment == 0, "offset");
      demand(r.size_bytes >= 0 && r.size_bytes % alignment == 0 && r.size_bytes <= INT64_MAX - r.offset_bytes, "size");
      if (r.storage >= 0) {
        demand(r.size_bytes >= plan_.storages[r.storage].size_bytes, "size below storage");
      } else {
        demand(r.pool == Pool::kDevice && r.begin < last() && r.end == r.begin + 1, "workspace");
        demand(r.size_bytes >= graph_.operations[plan_.instances[r.begin].operation].workspace_bytes, "workspace size");
      }
    }
    for (int32_t i = 0; i < last(); ++i) {
      const auto is_its = [&](const Residency& r) { return r.storage == -1 && r.begin == i; };
      const int64_t count = std::ranges::count_if(plan_.residencies, is_its);
      demand(count <= 1, "two workspaces");
      demand(count == 1 || graph_.operations[plan_.instances[i].operation].workspace_bytes == 0, "no workspace");
    }
    for (size_t p = 0; p < plan_.storages.size(); ++p) {
      bool is_fixed = false;
      for (const int32_t m : plan_.storages[p].members) is_fixed |= graph_.storages[m].kind != StorageKind::kActivation;
      int count = 0;
      for (const Residency& r : plan_.residencies) {
        if (r.storage != static_cast<int32_t>(p)) continue;
        ++count;
        if (is_fixed) {
          demand(plan_.storages[p].size_bytes == 0 || (r.pool == Pool::kParameters && r.begin == 0 && r.end >= last()),
                 "a fixed storage moves");
        } else {
          demand(r.pool != Pool::kParameters, "activation among the parameters");
        }
      }
      demand(!is_fixed || plan_.storages[p].size_bytes == 0 || count == 1, "a fixed storage is not in one place");
    }

    std::map<int32_t, std::pair<int32_t, size_t>> issued;  // copy -> boundary and position there
    for (int32_t b = 0; b < boundary_count(); ++b) {
      for (size_t k = 0; k < plan_.boundaries[b].issues.size(); ++k) {
        const int32_t c = plan_.boundaries[b].issues[k];
        demand_index(c, plan_.copies, "issue");
        demand(issued.emplace(c, std::pair(b, k)).second, "issued twice");
        order_[plan_.copies[c].kind == CopyKind::kOffload ? 0 : 1].push_back(c);
      }
      for (const int32_t c : plan_.boundaries[b].waits) demand_index(c, plan_.copies, "wait");
    }
    for (size_t c = 0; c < plan_.copies.size(); ++c) {
      const Copy& copy = plan_.copies[c];
      const auto index = static_cast<int32_t>(c);
      demand(issued.contains(index) && issued[index].first == copy.issue, "issue");
      int waits = 0;
      for (int32_t b = 0; b < boundary_count(); ++b) {
        for (const int32_t wait : plan_.boundaries[b].waits) {
          if (wait != index) continue;
          ++waits;
          demand(b == copy.wait && b > copy.issue, "wait");
        }
      }
      demand(waits == 1, "waited for once");
      demand_index(copy.storage, plan_.storages, "copy's storage");
      demand_index(copy.source, plan_.residencies, "source");
      demand_index(copy.destination, plan_.residencies, "destination");
      const Residency& from = plan_.residencies[copy.source];
      const Residency& to = plan_.residencies[copy.destination];
      const bool offload = copy.kind == CopyKind::kOffload;
      demand(from.storage == copy.storage && to.storage == copy.storage, "endpoints' storage");
      demand(from.pool == (offload ? Pool::kDevice : Pool::kHost), "source's pool");
      demand(to.pool == (offload ? Pool::kHost : Pool::kDevice), "destination's pool");
      demand((offload ? plan_.limits.offload_gbps : plan_.limits.prefetch_gbps) > 0, "link");
      const Residency& slot = offload ? to : from;
      for (const Copy& other : plan_.copies) {
        const int32_t there = other.kind == CopyKind::kOffload ? other.destination : other.source;
        if (there == (offload ? copy.destination : copy.source))
          demand(other.compressed == copy.compressed, "one host residency plain and compressed");
      }
      if (copy.compressed) {
        const PlanStorage& storage = plan_.storages[copy.storage];
        bool is_measured = false;
        for (const int32_t member : storage.members) {
          const Storage& it = graph_.storages[member];
          is_measured |= it.compression && storage.compression && it.size_bytes == storage.size_bytes &&
                         it.compression->ratio == storage.compression->ratio &&
                         it.compression->element_bytes == storage.compression->element_bytes;
        }
        demand(is_measured, "compressed as measured");
        // Header, a bit for each element in slots of 4096 bytes, the elements to a multiple of 16 bytes.
        const int64_t mask_bytes = 512 / storage.compression->element_bytes;
        int64_t room_bytes = 128;
        for (int64_t begin = 0; begin < storage.size_bytes; begin += 4096) room_bytes += mask_bytes;
        while (room_bytes % 16 != 0) ++room_bytes;
        for (int64_t begin = 0; begin < storage.size_bytes; begin += 16) room_bytes += 16;
        demand(slot.size_bytes >= room_bytes, "room for what is compressed");
        demand(slot.offset_bytes % 16 == 0, "a compressed slot's alignment");
      }
      for (const int32_t other : copy.after) {
        demand_index(other, plan_.copies, "after");
        demand(plan_.copies[other].kind != copy.kind, "after one of the same stream");
        demand(issued.contains(other) && issued[other] < issued[index], "after one that is issued later");
      }
    }
  }

  void look_at_addresses() {
    std::map<Pool, int64_t> peak, bound;
    for (size_t a = 0; a < plan_.residencies.size(); ++a) {
      const Residency& x = plan_.residencies[a];
      demand(x.offset_bytes <= std::numeric_limits<int64_t>::max() - x.size_bytes, "an end beyond every address");
      peak[x.pool] = std::max(peak[x.pool], x.offset_bytes + x.size_bytes);
      for (size_t b = 0; b < a; ++b) {
        const Residency& y = plan_.residencies[b];
        const bool same_time = x.begin < y.end && y.begin < x.end;
        const bool same_bytes = x.offset_bytes < y.offset_bytes + y.size_bytes &&
                                y.offset_bytes < x.offset_bytes + x.size_bytes && x.size_bytes > 0 && y.size_bytes > 0;
        demand(!(x.pool == y.pool && same_time && same_bytes), "overlap");
      }
    }
    for (int32_t b = 0; b <= last(); ++b) {
      std::map<Pool, int64_t> live;
      for (const Residency& r : plan_.residencies) {
        if (r.begin <= b && b < r.end) live[r.pool] += r.size_bytes;
      }
      for (const auto& [pool, bytes] : live) bound[pool] = std::max(bound[pool], bytes);
    }
    const Predicted& predicted = plan_.predicted;
    demand(peak[Pool::kDevice] == predicted.device_peak_bytes && peak[Pool::kHost] == predicted.host_peak_bytes &&
               peak[Pool::kParameters] == predicted.parameters_peak_bytes &&
               bound[Pool::kDevice] == predicted.device_lower_bound_bytes &&
               bound[Pool::kHost] == predicted.host_lower_bound_bytes,
           "predicted bytes");
    demand(peak[Pool::kHost] <= plan_.limits.host_bytes, "host budget");
    demand(static_cast<long double>(peak[Pool::kDevice]) + peak[Pool::kParameters] <= plan_.limits.device_bytes,
           "device budget");
    for (const auto& [pool, bytes] : peak) peak_[pool] = bytes;
  }

  void look_at_fused() {
    for (const FusedSum& fused : plan_.fused) {
      const Operation& sum = graph_.operations[fused.sum];
      const Operation& producer = graph_.operations[fused.producer];
      bool found = false;
      for (const int32_t w : producer.accumulates) {
        const int32_t product = producer.writes[w];
        for (int operand = 0; operand < 2; ++operand) {
          const int32_t read = sum.reads[operand];
          const int32_t other = sum.reads[1 - operand];
          const int32_t out = sum.writes[0];
          if (expected_[fused.sum][operand] != produced_[fused.producer][w]) continue;
          if (storage_of(read) != storage_of(product) || addresses_[read] != addresses_[product]) continue;
          if (home(other) != home(product) || home(out) != home(product)) continue;
          if (addresses_[other] != addresses_[product] || addresses_[out] != addresses_[product]) continue;
          found = true;
          adds_[{fused.producer, w}] = {fused.sum, 1 - operand};
        }
      }
      demand(found, "fused sum " + std::to_string(fused.sum));
      demand(std::ranges::count(plan_.fused, fused.producer, &FusedSum::producer) == std::ssize(producer.accumulates),
             "accumulates");
    }
    for (const FusedSum& fused : plan_.fused) {
      for (const int32_t w : graph_.operations[fused.producer].accumulates)
        demand(adds_.contains({fused.producer, w}), "accumulates");
    }
  }

  // Where the instance finds the tensor; -1 if it touches no byte of it.
  int32_t place(int32_t instance, int32_t tensor) const {
    if (addresses_[tensor].empty()) return -1;
    int32_t found = -1;
    for (size_t r = 0; r < plan_.residencies.size(); ++r) {
      const Residency& residency = plan_.residencies[r];
      if (residency.storage != home(tensor) || residency.pool == Pool::kHost || residency.begin > instance ||
          residency.end <= instance)
        continue;
      demand(found < 0, "in two places");
      found = static_cast<int32_t>(r);
    }
    demand(found >= 0, "not resident");
    return found;
  }

  void look_at_instances() {
    for (int32_t i = 0; i < last(); ++i) {
      const Operation& operation = graph_.operations[plan_.instances[i].operation];
      std::vector<int32_t> read_places, write_places;
      for (const int32_t tensor : operation.reads) read_places.push_back(place(i, tensor));
      for (const int32_t tensor : operation.writes) write_places.push_back(place(i, tensor));
      read_places_.push_back(read_places);
      write_places_.push_back(write_places);
      for (size_t w = 0; w < operation.writes.size(); ++w) {
        const int32_t write = operation.writes[w];
        for (size_t k = 0; k < operation.reads.size(); ++k) {
          const int32_t read = operation.reads[k];
          if (storage_of(read) == storage_of(write) || home(read) != home(write)) continue;
          if (!share(addresses_[read], addresses_[write])) continue;
          bool allowed = false;
          for (const InplacePair& pair : operation.inplace) {
            allowed |= pair.read == static_cast<int32_t>(k) && pair.write == static_cast<int32_t>(w) &&
                       addresses_[read] == addresses_[write];
          }
          demand(allowed, "in place");
        }
        for (size_t k = 0; k < w; ++k) {
          const int32_t other = operation.writes[k];
          if (storage_of(other) == storage_of(write) || home(other) != home(write)) continue;
          demand(!share(addresses_[other], addresses_[write]), "two writes in one place");
        }
      }
    }
  }

  // ---- 2: states -------------------------------------------------------------------------------------------------

  using Touched = std::set<std::pair<Pool, int64_t>>;
  Touched bytes_of(int32_t residency, const std::vector<int64_t>& within) const {
    Touched touched;
    for (const int64_t address : within)
      touched.emplace(plan_.residencies[residency].pool, plan_.residencies[residency].offset_bytes + address);
    return touched;
  }
  static bool meet(const Touched& a, const Touched& b) {
    return std::ranges::any_of(a, [&](const auto& byte) { return b.contains(byte); });
  }
  struct Access {
    Touched reads, writes;
  };
  static bool conflict(const Access& a, const Access& b) {
    return meet(a.writes, b.writes) || meet(a.writes, b.reads) || meet(a.reads, b.writes);
  }

  bool is_issued(int32_t copy, int32_t boundary, bool passed) const {
    return boundary > plan_.copies[copy].issue || (boundary == plan_.copies[copy].issue && passed);
  }

  void explore_states() {
    if (plan_.copies.empty()) return;
    std::vector<Access> copy_access, instance_access;
    for (const Copy& copy : plan_.copies) {
      std::vector<int64_t> whole;
      for (int64_t k = 0; k < plan_.storages[copy.storage].size_bytes; ++k) whole.push_back(k);
      copy_access.push_back({bytes_of(copy.source, whole), bytes_of(copy.destination, whole)});
    }
    for (int32_t i = 0; i < last(); ++i) {
      const Operation& operation = graph_.operations[plan_.instances[i].operation];
      Access access;
      for (size_t k = 0; k < operation.reads.size(); ++k) {
        if (read_places_[i][k] >= 0) access.reads.merge(bytes_of(read_places_[i][k], addresses_[operation.reads[k]]));
      }
      for (size_t k = 0; k < operation.writes.size(); ++k) {
        if (write_places_[i][k] >= 0)
          access.writes.merge(bytes_of(write_places_[i][k], addresses_[operation.writes[k]]));
      }
      instance_access.push_back(access);
    }
    const size_t copies = plan_.copies.size();
    std::vector<std::vector<bool>> with_copy(copies, std::vector<bool>(copies)),
        with_instance(copies, std::vector<bool>(last()));
    for (size_t c = 0; c < copies; ++c) {
      for (size_t d = 0; d < copies; ++d) with_copy[c][d] = conflict(copy_access[c], copy_access[d]);
      for (int32_t i = 0; i < last(); ++i) with_instance[c][i] = conflict(copy_access[c], instance_access[i]);
    }
    std::vector<std::pair<int, size_t>> at(copies);  // stream and position
    for (int stream = 0; stream < 2; ++stream) {
      for (size_t k = 0; k < order_[stream].size(); ++k) at[order_[stream][k]] = {stream, k};
    }

    // Compute: 2b before the waits of boundary b, 2b+1 past them (with instance b under way). Copies: 2k with k done,
    // 2k+1 with the next one under way.
    struct State {
      int32_t compute;
      std::array<int32_t, 2> done;
    };
    const std::array<int32_t, 3> extent = {2 * boundary_count(), static_cast<int32_t>(2 * order_[0].size() + 1),
                                           static_cast<int32_t>(2 * order_[1].size() + 1)};
    const auto number = [&](const State& s) {
      return (static_cast<size_t>(s.compute) * extent[1] + s.done[0]) * extent[2] + s.done[1];
    };
    std::vector<bool> seen(static_cast<size_t>(extent[0]) * extent[1] * extent[2]);
    std::vector<State> open;
    const auto reach = [&](const State& state) {
      if (seen[number(state)]) return;
      seen[number(state)] = true;
      open.push_back(state);
    };
    reach({0, {0, 0}});
    while (!open.empty()) {
      const State state = open.back();
      open.pop_back();
      const int32_t b = state.compute / 2;
      const bool passed = state.compute % 2 == 1;
      const auto is_done = [&](int32_t c) { return static_cast<int32_t>(at[c].second) < state.done[at[c].first] / 2; };
      std::vector<int32_t> under_way;
      for (int stream = 0; stream < 2; ++stream) {
        if (state.done[stream] % 2 == 1) under_way.push_back(order_[stream][state.done[stream] / 2]);
      }
      const int32_t owner_time = passed ? b : b - 1;
      for (const int32_t c : under_way) {
        if (plan_.storages[plan_.copies[c].storage].size_bytes == 0) continue;
        for (const int32_t r : {plan_.copies[c].source, plan_.copies[c].destination}) {
          demand(plan_.residencies[r].begin <= owner_time && owner_time < plan_.residencies[r].end,
                 "copy " + std::to_string(c) + " touches what its residency does not own");
        }
        if (passed && b < last()) demand(!with_instance[c][b], "race of a copy with instance " + std::to_string(b));
      }
      if (under_way.size() == 2) demand(!with_copy[under_way[0]][under_way[1]], "race of two copies");

      if (!passed && std::ranges::all_of(plan_.boundaries[b].waits, is_done)) reach({state.compute + 1, state.done});
      if (passed && b < last()) reach({state.compute + 1, state.done});
      for (int stream = 0; stream < 2; ++stream) {
        State next = state;
        ++next.done[stream];
        if (state.done[stream] % 2 == 1) {
          reach(next);
        } else if (static_cast<size_t>(state.done[stream] / 2) < order_[stream].size()) {
          const int32_t c = order_[stream][state.done[stream] / 2];
          if (is_issued(c, b, passed) && std::ranges::all_of(plan_.copies[c].after, is_done)) reach(next);
        }
      }
    }
  }

  // ---- 3: bytes --------------------------------------------------------------------------------------------------

  Byte junk() { return random_.next() | 1; }
  Byte& byte(int32_t residency, int64_t address) {
    return memory_[plan_.residencies[residency].pool].at(plan_.residencies[residency].offset_bytes + address);
  }
  void fill_with_junk(const Residency& residency) {
    for (int64_t k = 0; k < residency.size_bytes; ++k) memory_[residency.pool].at(residency.offset_bytes + k) = junk();
  }

  // Schedules: 0 copies as early as can be, 1 as late as can be, others by chance.
  void execute_plan(int schedule) {
    for (const auto& [pool, bytes] : peak_) {
      memory_[pool].assign(bytes, 0);
      for (Byte& b : memory_[pool]) b = junk();
    }
    int32_t boundary = 0;
    int step = 0;  // 0: before the waits, 1: instance not begun, 2: instance begun
    std::array<size_t, 2> copy = {0, 0};
    std::array<int, 2> copy_step = {0, 0};
    std::vector<uint64_t> runs(graph_.operations.size(), 0);
    std::vector<bool> done(plan_.copies.size(), false);
    std::vector<Bytes> read;
    const auto is_done = [&](int32_t c) { return done[c]; };
    const auto compute_can = [&] {
      if (step == 0) return boundary <= last() && std::ranges::all_of(plan_.boundaries[boundary].waits, is_done);
      return boundary < last();
    };
    const auto copy_can = [&](int stream) {
      if (copy[stream] == order_[stream].size()) return false;
      const int32_t c = order_[stream][copy[stream]];
      return copy_step[stream] > 0 ||
             (is_issued(c, boundary, step > 0) && std::ranges::all_of(plan_.copies[c].after, is_done));
    };
    const auto advance_compute = [&] {
      if (step == 0) {
        pass(boundary);
        ++step;
      } else if (step == 1) {
        read = begin_instance(boundary);
        ++step;
      } else {
        const int32_t o = plan_.instances[boundary].operation;
        end_instance(boundary, read, runs[o]++);
        ++boundary;
        step = 0;
      }
    };
    const auto advance_copy = [&](int stream) {
      const int32_t c = order_[stream][copy[stream]];
      const Copy& it = plan_.copies[c];
      const int64_t size = plan_.storages[it.storage].size_bytes;
      constexpr int kChunks = 2;
      if (copy_step[stream] == 0) {
        for (int64_t k = 0; k < size; ++k) byte(it.destination, k) = junk();
      } else {
        for (int64_t k = copy_step[stream] - 1; k < size; k += kChunks) byte(it.destination, k) = byte(it.source, k);
      }
      if (++copy_step[stream] <= kChunks) return;
      copy_step[stream] = 0;
      ++copy[stream];
      done[c] = true;
    };
    while (true) {
      std::vector<int> able;
      for (int stream = 0; stream < 2; ++stream) {
        if (copy_can(stream)) able.push_back(stream);
      }
      if (compute_can()) able.push_back(2);
      if (able.empty()) break;
      const int chosen = schedule == 0 ? able.front() : schedule == 1 ? able.back() : able[random_.below(able.size())];
      if (chosen == 2) {
        advance_compute();
      } else {
        advance_copy(chosen);
      }
    }
    if (boundary != last() || step != 1) throw std::logic_error("the schedule is stuck");
  }

  void pass(int32_t boundary) {
    if (boundary == last() && last() > 0) look_at_end();
    for (const Residency& residency : plan_.residencies) {
      if (residency.end == boundary) fill_with_junk(residency);
    }
    for (size_t r = 0; r < plan_.residencies.size(); ++r) {
      const Residency& residency = plan_.residencies[r];
      if (residency.begin != boundary) continue;
      fill_with_junk(residency);
      if (residency.pool != Pool::kParameters) continue;
      for (const int32_t m : plan_.storages[residency.storage].members) {
        if (!is_there(m)) continue;
        for (int64_t k = 0; k < graph_.storages[m].size_bytes; ++k) byte(static_cast<int32_t>(r), k) = initial(m, k);
      }
    }
    if (boundary == last() && last() == 0) look_at_end();
  }

  Bytes load(int32_t place, int32_t tensor) {
    Bytes bytes;
    for (const int64_t address : addresses_[tensor]) bytes.push_back(byte(place, address));
    return bytes;
  }

  std::vector<Bytes> begin_instance(int32_t i) {
    const Instance& instance = plan_.instances[i];
    const Operation& operation = graph_.operations[instance.operation];
    std::vector<Bytes> read;
    for (size_t k = 0; k < operation.reads.size(); ++k) {
      read.push_back(load(read_places_[i][k], operation.reads[k]));
      demand(read[k] == expected_[instance.operation][k],
             "instance " + std::to_string(i) + " reads a wrong value as read " + std::to_string(k));
    }
    // What it adds to is read at its end; everything else that it writes is junk while it runs.
    if (!instance.accumulate) {
      for (size_t w = 0; w < operation.writes.size(); ++w) {
        for (const int64_t address : addresses_[operation.writes[w]]) byte(write_places_[i][w], address) = junk();
      }
    }
    return read;
  }

  void end_instance(int32_t i, const std::vector<Bytes>& read, uint64_t run) {
    const Instance& instance = plan_.instances[i];
    const Operation& operation = graph_.operations[instance.operation];
    std::vector<Bytes> out = results(instance.operation, read, run);
    for (size_t w = 0; w < out.size(); ++w) {
      const int32_t tensor = operation.writes[w];
      const auto add = adds_.find({instance.operation, static_cast<int32_t>(w)});
      if (instance.accumulate && add != adds_.end()) {
        const Bytes old = load(write_places_[i][w], tensor);
        demand(old == expected_[add->second.first][add->second.second],
               "instance " + std::to_string(i) + " adds to a wrong value");
        for (size_t k = 0; k < old.size(); ++k) out[w][k] += old[k] + salt(add->second.first);
      }
    }
    for (size_t w = 0; w < out.size(); ++w) {
      for (size_t k = 0; k < out[w].size(); ++k)
        byte(write_places_[i][w], addresses_[operation.writes[w]][k]) = out[w][k];
    }
  }

  void look_at_end() {
    for (size_t s = 0; s < graph_.storages.size(); ++s) {
      const Storage& storage = graph_.storages[s];
      if (storage.kind == StorageKind::kActivation && !storage.is_output) continue;
      int32_t found = -1;
      int places = 0;
      for (size_t r = 0; r < plan_.residencies.size(); ++r) {
        const Residency& residency = plan_.residencies[r];
        if (residency.storage != home_[static_cast<int32_t>(s)] || residency.pool == Pool::kHost) continue;
        if (residency.begin > std::max(last() - 1, 0) || residency.end < last()) continue;
        found = static_cast<int32_t>(r);
        ++places;
      }
      for (int64_t k = 0; k < storage.size_bytes; ++k) {
        if (graph_memory_[s][k] == kUndefined) continue;
        demand(places == 1, "an output is not in one place");
        demand(byte(found, k) == graph_memory_[s][k], "final value of graph storage " + std::to_string(s));
      }
    }
  }

  static constexpr Byte kUndefined = 0;
  const Graph& graph_;
  const Plan& plan_;
  random_numbers::Random random_;
  std::vector<std::vector<int64_t>> addresses_;  // per tensor
  std::vector<Bytes> graph_memory_;              // per graph storage; after execute_graph: after the step
  std::vector<std::vector<Bytes>> expected_;     // per operation and read
  std::vector<std::vector<Bytes>> produced_;     // per operation and write
  std::map<int32_t, int32_t> home_;              // planned storage of a graph storage
  std::array<std::vector<int32_t>, 2> order_;    // copies of each stream, as issued
  std::map<Pool, int64_t> peak_;
  // Producer and its write -> sum and which operand of it is added to.
  std::map<std::pair<int32_t, int32_t>, std::pair<int32_t, int>> adds_;
  std::vector<std::vector<int32_t>> read_places_, write_places_;  // per instance: residencies
  std::map<Pool, Bytes> memory_;
};

}  // namespace

Judgement judge(const Graph& graph, const Plan& plan, uint64_t seed) {
  return Judge(graph, plan, seed).run();
}

}  // namespace interpreter
