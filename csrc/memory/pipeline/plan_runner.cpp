#include "memory/pipeline/plan_runner.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "memory/errors.h"
#include "memory/pipeline/checksum.h"

namespace splitkern::memory {
namespace {

using Bytes = std::vector<unsigned char>;

// Calls `visit(offset, size)` for the contiguous runs of a tensor, in the order of its elements; the offset counts from
// the first element.
template <class Visit>
void for_each_run(const Tensor& tensor, Visit&& visit) {
  int64_t run_bytes = tensor.element_bytes;
  auto rank = static_cast<int64_t>(tensor.sizes.size());
  for (const int64_t size : tensor.sizes) {
    if (size == 0) return;
  }
  while (rank > 0 && (tensor.sizes[static_cast<size_t>(rank - 1)] == 1 ||
                      tensor.strides_bytes[static_cast<size_t>(rank - 1)] == run_bytes)) {
    run_bytes *= tensor.sizes[static_cast<size_t>(rank - 1)];
    --rank;
  }
  std::vector<int64_t> position(static_cast<size_t>(rank), 0);
  int64_t offset = 0;
  for (;;) {
    visit(offset, run_bytes);
    int64_t axis = rank - 1;
    for (; axis >= 0; --axis) {
      const auto index = static_cast<size_t>(axis);
      offset += tensor.strides_bytes[index];
      if (++position[index] < tensor.sizes[index]) break;
      offset -= position[index] * tensor.strides_bytes[index];
      position[index] = 0;
    }
    if (axis < 0) return;
  }
}

Bytes gather(const Tensor& tensor, const unsigned char* first) {
  Bytes bytes;
  for_each_run(tensor,
               [&](int64_t offset, int64_t size) { bytes.insert(bytes.end(), first + offset, first + offset + size); });
  return bytes;
}

void scatter(const Tensor& tensor, unsigned char* first, const Bytes& bytes) {
  const unsigned char* from = bytes.data();
  for_each_run(tensor, [&](int64_t offset, int64_t size) {
    std::memcpy(first + offset, from, static_cast<size_t>(size));
    from += size;
  });
}

void spoil(const Tensor& tensor, unsigned char* first) {
  for_each_run(tensor,
               [&](int64_t offset, int64_t size) { std::memset(first + offset, 0xA5, static_cast<size_t>(size)); });
}

uint64_t mixed(uint64_t state, uint64_t value) {
  return checksum(state, &value, sizeof(value));
}

Bytes random_bytes(uint64_t seed, size_t size) {
  Bytes bytes(size);
  uint64_t word = 0;
  for (size_t done = 0; done < size; done += sizeof(word)) {
    word = mixed(seed, done);
    word ^= word >> 29;  // the low bytes of a product depend on few bits
    std::memcpy(bytes.data() + done, &word, std::min(sizeof(word), size - done));
  }
  return bytes;
}

Bytes added(Bytes left, const Bytes& right) {
  for (size_t byte = 0; byte < left.size(); ++byte) left[byte] = static_cast<unsigned char>(left[byte] + right[byte]);
  return left;
}

const Tensor& tensor_at(const Graph& graph, int32_t tensor) {
  return graph.tensors[static_cast<size_t>(tensor)];
}

bool same_box(const Tensor& left, const Tensor& right) {
  return left.sizes == right.sizes && left.strides_bytes == right.strides_bytes &&
         left.element_bytes == right.element_bytes;
}

class HashOperations {
 public:
  void operator()(const Graph& graph, const OperationCall& call) {
    const Operation& operation = graph.operations[static_cast<size_t>(call.operation)];
    if (operation.workspace_bytes > 0)
      std::memset(call.workspace, 0x5A, static_cast<size_t>(operation.workspace_bytes));
    for (size_t write = 0; write < operation.writes.size(); ++write) {
      if (keeps_what_is_there(graph, operation, call, write)) continue;
      spoil(tensor_at(graph, operation.writes[write]), call.writes[write]);
    }

    std::vector<Bytes> reads;
    for (size_t read = 0; read < operation.reads.size(); ++read)
      reads.push_back(gather(tensor_at(graph, operation.reads[read]), call.reads[read]));
    if (operation.is_sum) {
      if (reads.size() != 2 || reads[0].size() != reads[1].size() || operation.writes.size() != 1)
        throw InvalidArgument("a sum must have two reads of equal size and one write");
      scatter(tensor_at(graph, operation.writes[0]), call.writes[0], added(std::move(reads[0]), reads[1]));
      return;
    }
    uint64_t state = mixed(kChecksumSeed, static_cast<uint64_t>(call.operation));
    if (operation.is_random) state = mixed(state, ++random_operations_);
    for (const Bytes& bytes : reads) state = mixed(checksum(state, bytes.data(), std::ssize(bytes)), bytes.size());

    for (size_t write = 0; write < operation.writes.size(); ++write) {
      const Tensor& tensor = tensor_at(graph, operation.writes[write]);
      const Bytes there = gather(tensor, call.writes[write]);
      Bytes bytes = random_bytes(mixed(state, write), there.size());
      if (static_cast<int32_t>(write) == call.accumulated) bytes = added(std::move(bytes), there);
      scatter(tensor, call.writes[write], bytes);
    }
  }

 private:
  // Updates and sums need what is there; so does a read that the write lies on by permission.
  static bool keeps_what_is_there(const Graph& graph, const Operation& operation, const OperationCall& call,
                                  size_t write) {
    const auto position = static_cast<int32_t>(write);
    if (position == call.accumulated || std::ranges::count(operation.mutates, position) > 0) return true;
    return std::ranges::any_of(operation.inplace, [&](const InplacePair& pair) {
      const auto read = static_cast<size_t>(pair.read);
      return pair.write == position && call.reads[read] == call.writes[write] &&
             same_box(tensor_at(graph, operation.reads[read]), tensor_at(graph, operation.writes[write]));
    });
  }

  uint64_t random_operations_ = 0;
};

bool is_result(const Storage& storage) {
  return storage.kind == StorageKind::kParameter || storage.kind == StorageKind::kGradient || storage.is_output;
}

bool is_given(const Storage& storage) {
  return storage.kind == StorageKind::kParameter || storage.kind == StorageKind::kInput;
}

void require_values(const Graph& graph, const StorageValues& initial) {
  if (initial.size() != graph.storages.size())
    throw InvalidArgument("initial must hold one entry per storage, " + std::to_string(graph.storages.size()) +
                          ", got " + std::to_string(initial.size()));
  for (size_t index = 0; index < initial.size(); ++index) {
    const Storage& storage = graph.storages[index];
    if (is_given(storage) && std::ssize(initial[index]) != storage.size_bytes)
      throw InvalidArgument("initial value of " + storage.name + " must have " + std::to_string(storage.size_bytes) +
                            " bytes, got " + std::to_string(initial[index].size()));
  }
}

// By storage and byte whether it has a value after the step.
std::vector<std::vector<char>> written_bytes(const Graph& graph) {
  std::vector<std::vector<char>> written(graph.storages.size());
  for (const Operation& operation : graph.operations) {
    for (const auto* tensors : {&operation.reads, &operation.writes}) {
      for (const int32_t index : *tensors) {
        const Tensor& tensor = tensor_at(graph, index);
        const Storage& storage = graph.storages[static_cast<size_t>(tensor.storage)];
        if (!is_result(storage)) continue;
        std::vector<char>& bytes = written[static_cast<size_t>(tensor.storage)];
        if (bytes.empty()) bytes.assign(static_cast<size_t>(storage.size_bytes), is_given(storage) ? 1 : 0);
        if (tensors == &operation.reads) continue;
        for_each_run(tensor, [&](int64_t offset, int64_t size) {
          const auto begin = bytes.begin() + tensor.offset_bytes + offset;
          std::fill(begin, begin + size, char{1});
        });
      }
    }
  }
  return written;
}

// `find(storage)` gives the storage's bytes after the step.
template <class Find>
StorageValues results_of(const Graph& graph, Find&& find) {
  StorageValues results(graph.storages.size());
  const std::vector<std::vector<char>> written = written_bytes(graph);
  for (size_t storage = 0; storage < results.size(); ++storage) {
    if (written[storage].empty()) continue;
    const unsigned char* const bytes = find(storage);
    results[storage].resize(written[storage].size(), 0);
    for (size_t byte = 0; byte < written[storage].size(); ++byte) {
      if (written[storage][byte]) results[storage][byte] = bytes[byte];
    }
  }
  return results;
}

}  // namespace

OperationFunction hash_operations() {
  return HashOperations();
}

StorageValues initial_values(const Graph& graph, uint64_t seed) {
  StorageValues values(graph.storages.size());
  for (size_t storage = 0; storage < values.size(); ++storage) {
    if (is_given(graph.storages[storage]))
      values[storage] = random_bytes(mixed(seed, storage), static_cast<size_t>(graph.storages[storage].size_bytes));
  }
  return values;
}

StorageValues run_graph(const Graph& graph, const StorageValues& initial, const OperationFunction& operation) {
  require_values(graph, initial);
  StorageValues values(graph.storages.size());
  for (size_t storage = 0; storage < values.size(); ++storage) {
    values[storage] = initial[storage];
    values[storage].resize(static_cast<size_t>(graph.storages[storage].size_bytes), 0xFF);
  }
  const auto address = [&](int32_t index) {
    const Tensor& tensor = tensor_at(graph, index);
    return values[static_cast<size_t>(tensor.storage)].data() + tensor.offset_bytes;
  };
  Bytes workspace;
  for (size_t index = 0; index < graph.operations.size(); ++index) {
    OperationCall call;
    call.operation = static_cast<int32_t>(index);
    for (const int32_t read : graph.operations[index].reads) call.reads.push_back(address(read));
    for (const int32_t write : graph.operations[index].writes) call.writes.push_back(address(write));
    workspace.resize(static_cast<size_t>(graph.operations[index].workspace_bytes));
    call.workspace = workspace.data();
    operation(graph, call);
  }
  return results_of(graph, [&](size_t storage) { return values[storage].data(); });
}

std::string first_difference(const Graph& graph, const StorageValues& expected, const StorageValues& actual) {
  for (size_t storage = 0; storage < graph.storages.size(); ++storage) {
    const Bytes& left = expected[storage];
    const Bytes& right = actual[storage];
    if (left == right) continue;
    const auto byte = static_cast<size_t>(std::ranges::mismatch(left, right).in1 - left.begin());
    const auto text_of = [byte](const Bytes& bytes) {
      return byte < bytes.size() ? std::to_string(bytes[byte]) : std::string("nothing");
    };
    return "storage " + graph.storages[storage].name + ", byte " + std::to_string(byte) + ": expected " +
           text_of(left) + ", got " + text_of(right);
  }
  return "";
}

// --- Execution of a plan
// -----------------------------------------------------------------------------------------------

PlanRunner::PlanRunner(StreamBackend& backend, const Graph& graph, const Plan& plan, const CopyPipelineOptions& options)
    : backend_(backend),
      graph_(graph),
      plan_(plan),
      planned_of_(graph.storages.size(), -1),
      residencies_of_(plan.storages.size()),
      arrival_(plan.residencies.size()) {
  int64_t device_bytes = 0;
  int64_t parameters_bytes = 0;
  int64_t host_bytes = 0;
  for (const Residency& residency : plan_.residencies) {
    int64_t end_bytes = 0;
    if (__builtin_add_overflow(residency.offset_bytes, residency.size_bytes, &end_bytes)) continue;  // refused below
    int64_t& bytes = residency.pool == Pool::kDevice ? device_bytes
                     : residency.pool == Pool::kHost ? host_bytes
                                                     : parameters_bytes;
    bytes = std::max(bytes, end_bytes);
  }
  device_.resize(static_cast<size_t>(device_bytes));
  parameters_.resize(static_cast<size_t>(parameters_bytes));
  host_.resize(static_cast<size_t>(host_bytes));
  pipeline_ = std::make_unique<CopyPipeline>(
      backend_, plan_,
      Arenas{device_.data(), device_bytes, parameters_.data(), parameters_bytes, host_.data(), host_bytes}, options);

  for (size_t planned = 0; planned < plan_.storages.size(); ++planned) {
    for (const int32_t member : plan_.storages[planned].members) {
      if (member < 0 || static_cast<size_t>(member) >= planned_of_.size())
        throw InvalidArgument("planned storage " + std::to_string(planned) + ": members must be in [0, " +
                              std::to_string(planned_of_.size()) + "), got " + std::to_string(member));
      planned_of_[static_cast<size_t>(member)] = static_cast<int32_t>(planned);
    }
  }
  for (size_t index = 0; index < plan_.residencies.size(); ++index) {
    const Residency& residency = plan_.residencies[index];
    arrival_[index] = residency.begin;
    if (residency.pool != Pool::kHost && residency.storage >= 0)
      residencies_of_[static_cast<size_t>(residency.storage)].push_back(static_cast<int32_t>(index));
  }
  for (const Copy& copy : plan_.copies) arrival_[static_cast<size_t>(copy.destination)] = copy.wait;

  for (size_t index = 0; index < plan_.instances.size(); ++index) {
    const Instance& instance = plan_.instances[index];
    if (instance.operation < 0 || static_cast<size_t>(instance.operation) >= graph_.operations.size())
      throw InvalidArgument("instance " + std::to_string(index) + ": operation must be in [0, " +
                            std::to_string(graph_.operations.size()) + "), got " + std::to_string(instance.operation));
    const Operation& operation = graph_.operations[static_cast<size_t>(instance.operation)];
    OperationCall call;
    call.operation = instance.operation;
    const auto where = [&](int32_t tensor_index) {
      const Tensor& tensor = tensor_at(graph_, tensor_index);
      const Storage& storage = graph_.storages[static_cast<size_t>(tensor.storage)];
      const int32_t planned = planned_of_[static_cast<size_t>(tensor.storage)];
      const int32_t residency = planned < 0 ? -1 : residency_at(planned, static_cast<int32_t>(index));
      if (residency < 0 || plan_.residencies[static_cast<size_t>(residency)].size_bytes < storage.size_bytes)
        throw InvalidArgument("instance " + std::to_string(index) + " (" + operation.name + ") needs tensor " +
                              tensor.name + ", but storage " + storage.name + " has no device residency of its " +
                              std::to_string(storage.size_bytes) + " bytes there");
      return address(residency) + tensor.offset_bytes;
    };
    for (const int32_t read : operation.reads) call.reads.push_back(where(read));
    for (const int32_t write : operation.writes) call.writes.push_back(where(write));
    if (operation.workspace_bytes > 0) {
      const auto found = std::ranges::find_if(plan_.residencies, [&](const Residency& residency) {
        return residency.storage == -1 && residency.pool == Pool::kDevice &&
               residency.begin == static_cast<int32_t>(index);
      });
      if (found == plan_.residencies.end() || found->size_bytes < operation.workspace_bytes)
        throw InvalidArgument("instance " + std::to_string(index) + " (" + operation.name + ") needs " +
                              std::to_string(operation.workspace_bytes) + " bytes of workspace, but has no residency");
      call.workspace = address(static_cast<int32_t>(found - plan_.residencies.begin()));
    }
    if (instance.accumulate) {
      // The write that the elided sum would have read.
      for (const FusedSum& fused : plan_.fused) {
        if (fused.producer != instance.operation || fused.sum < 0 ||
            static_cast<size_t>(fused.sum) >= graph_.operations.size())
          continue;
        const std::vector<int32_t>& summed = graph_.operations[static_cast<size_t>(fused.sum)].reads;
        const auto write = std::ranges::find_first_of(operation.writes, summed);
        if (write != operation.writes.end()) call.accumulated = static_cast<int32_t>(write - operation.writes.begin());
      }
      if (call.accumulated < 0)
        throw InvalidArgument("instance " + std::to_string(index) + " (" + operation.name +
                              ") accumulates, but no fused sum reads what it writes");
    }
    calls_.push_back(std::move(call));
  }
}

int32_t PlanRunner::residency_at(int32_t planned, int32_t boundary) const {
  int32_t best = -1;
  for (const int32_t index : residencies_of_[static_cast<size_t>(planned)]) {
    const Residency& residency = plan_.residencies[static_cast<size_t>(index)];
    // What is there after the last instance may be said to end with the last boundary or behind it.
    const bool last = static_cast<size_t>(boundary) == plan_.instances.size();
    if (arrival_[static_cast<size_t>(index)] > boundary || residency.end < boundary + (last ? 0 : 1)) continue;
    if (best < 0 || residency.begin > plan_.residencies[static_cast<size_t>(best)].begin) best = index;
  }
  return best;
}

unsigned char* PlanRunner::address(int32_t residency) const {
  const Residency& found = plan_.residencies[static_cast<size_t>(residency)];
  const std::vector<unsigned char>& arena = found.pool == Pool::kDevice ? device_
                                            : found.pool == Pool::kHost ? host_
                                                                        : parameters_;
  return const_cast<unsigned char*>(arena.data()) + found.offset_bytes;
}

StorageValues PlanRunner::run(const StorageValues& initial, const OperationFunction& operation) {
  require_values(graph_, initial);
  for (std::vector<unsigned char>* arena : {&device_, &parameters_, &host_})
    std::ranges::fill(*arena, static_cast<unsigned char>(0xFF));
  for (size_t storage = 0; storage < graph_.storages.size(); ++storage) {
    if (!is_given(graph_.storages[storage])) continue;
    const int32_t residency = planned_of_[storage] < 0 ? -1 : residency_at(planned_of_[storage], 0);
    if (residency >= 0) std::ranges::copy(initial[storage], address(residency));
  }
  try {
    for (size_t index = 0; index < calls_.size(); ++index) {
      pipeline_->at_boundary(static_cast<int32_t>(index));
      backend_.call(StreamId::kCompute, [this, &operation, index] {
        const OperationCall& call = calls_[index];
        try {
          operation(graph_, call);
        } catch (const std::exception& error) {
          throw StreamFailed("instance " + std::to_string(index) + " (" +
                             graph_.operations[static_cast<size_t>(call.operation)].name + "): " + error.what());
        }
      });
    }
    pipeline_->at_boundary(static_cast<int32_t>(calls_.size()));
    pipeline_->synchronize();
    backend_.drain();
    backend_.require_ok(StreamId::kCompute);
  } catch (...) {
    pipeline_->abort();  // the launched instances hold a reference to `operation`
    throw;
  }
  return results_of(graph_, [&](size_t storage) {
    const int32_t planned = planned_of_[storage];
    const int32_t residency = planned < 0 ? -1 : residency_at(planned, static_cast<int32_t>(plan_.instances.size()));
    if (residency < 0 ||
        plan_.residencies[static_cast<size_t>(residency)].size_bytes < graph_.storages[storage].size_bytes)
      throw InvalidArgument("storage " + graph_.storages[storage].name +
                            " must be on the device after the step, but has no residency there");
    return static_cast<const unsigned char*>(address(residency));
  });
}

}  // namespace splitkern::memory
