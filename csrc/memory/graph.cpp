#include "memory/graph.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <string_view>
#include <unordered_set>

#include "memory/boxes.h"
#include "memory/checked_arithmetic.h"
#include "memory/errors.h"

namespace splitkern::memory {
namespace {

constexpr size_t kMaxCount = std::numeric_limits<int32_t>::max();

std::string element(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

template <class Named>
std::string where(const char* list, size_t i, const Named& item) {
  return element(list, i) + " \"" + item.name + "\"";
}

[[noreturn]] void refuse(const std::string& place, const std::string& rule, const std::string& came) {
  throw InvalidArgument(place + " " + rule + ", got " + came);
}

template <class Named>
void require_names(const char* list, const std::vector<Named>& items) {
  if (items.size() > kMaxCount)
    refuse(list, "must have at most " + std::to_string(kMaxCount) + " elements", std::to_string(items.size()));
  std::unordered_set<std::string_view> seen;
  seen.reserve(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    if (!seen.insert(items[i].name).second)
      refuse(element(list, i) + ".name", "must be unique", "\"" + items[i].name + "\" again");
  }
}

// The places in the checks below are functions: their texts are only made for an error.
template <class Place>
void require_at_least(const Place& place, int64_t value, int64_t least) {
  if (value < least) refuse(place(), "must be " + std::to_string(least) + " or more", std::to_string(value));
}

template <class Place>
void require_index(const Place& place, int64_t index, size_t size, const char* of) {
  if (index < 0 || index >= static_cast<int64_t>(size))
    refuse(place(), "must be the index of one of the " + std::to_string(size) + " " + of, std::to_string(index));
}

void require_storages(const Graph& graph) {
  require_names("storages", graph.storages);
  int64_t total = 0;
  for (size_t i = 0; i < graph.storages.size(); ++i) {
    const Storage& storage = graph.storages[i];
    const auto size = [&] { return where("storages", i, storage) + ": size_bytes"; };
    if (storage.kind > StorageKind::kActivation)
      refuse(where("storages", i, storage) + ": kind", "must be one of StorageKind's",
             std::to_string(static_cast<int>(storage.kind)));
    require_at_least(size, storage.size_bytes, 0);
    if (storage.size_bytes > kMaxGraphBytes - total)
      refuse(size(), "of all storages together must be at most " + std::to_string(kMaxGraphBytes),
             std::to_string(total) + " before it and " + std::to_string(storage.size_bytes) + " for it");
    total += storage.size_bytes;
    if (!storage.compression) continue;
    const auto [ratio, element_bytes] = *storage.compression;
    const std::string place = where("storages", i, storage) + ": compression.";
    if (!std::isfinite(ratio) || ratio <= 0)
      refuse(place + "ratio", "must be finite and above 0", std::to_string(ratio));
    if (!is_codable(storage.size_bytes, element_bytes))
      refuse(place + "element_bytes",
             "must be 1, 2, 4 or 8 and divide the " + std::to_string(storage.size_bytes) + " bytes of the storage",
             std::to_string(element_bytes));
  }
}

void require_tensors(const Graph& graph) {
  require_names("tensors", graph.tensors);
  for (size_t i = 0; i < graph.tensors.size(); ++i) {
    const Tensor& tensor = graph.tensors[i];
    const auto place = [&](const char* field) {
      return [&, field] { return where("tensors", i, tensor) + ": " + field; };
    };
    const auto item = [&](const char* list, size_t k) {
      return [&, list, k] { return where("tensors", i, tensor) + ": " + element(list, k); };
    };
    require_index(place("storage"), tensor.storage, graph.storages.size(), "storages");
    require_at_least(place("offset_bytes"), tensor.offset_bytes, 0);
    require_at_least(place("element_bytes"), tensor.element_bytes, 1);
    if (tensor.strides_bytes.size() != tensor.sizes.size())
      refuse(place("strides_bytes")(),
             "must have as many elements as sizes (" + std::to_string(tensor.sizes.size()) + ")",
             std::to_string(tensor.strides_bytes.size()));
    for (size_t k = 0; k < tensor.sizes.size(); ++k) {
      require_at_least(item("sizes", k), tensor.sizes[k], 0);
      require_at_least(item("strides_bytes", k), tensor.strides_bytes[k], 0);
    }
    const Storage& storage = graph.storages[tensor.storage];
    const std::optional<int64_t> end = end_bytes(tensor);
    if (!end || *end > storage.size_bytes)
      refuse(where("tensors", i, tensor),
             "must end within its storage \"" + storage.name + "\" of " + std::to_string(storage.size_bytes) + " bytes",
             end ? "an end of " + std::to_string(*end) : std::string("an end beyond 64 bits"));
  }
}

bool contains(const std::vector<int32_t>& list, int32_t value) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

void require_operation(const Graph& graph, size_t i) {
  const Operation& operation = graph.operations[i];
  const auto place = [&](const char* field) { return where("operations", i, operation) + ": " + field; };
  const auto item = [&](const char* list, size_t k) {
    return where("operations", i, operation) + ": " + element(list, k);
  };
  const auto name = [&](int32_t tensor) { return "\"" + graph.tensors[tensor].name + "\""; };

  require_at_least([&] { return place("workspace_bytes"); }, operation.workspace_bytes, 0);
  if (operation.workspace_bytes > kMaxGraphBytes)
    refuse(place("workspace_bytes"), "must be at most " + std::to_string(kMaxGraphBytes),
           std::to_string(operation.workspace_bytes));
  require_at_least([&] { return place("patch"); }, operation.patch, -1);
  const auto require_indices = [&](const char* list, const std::vector<int32_t>& indices, size_t size, const char* of) {
    for (size_t k = 0; k < indices.size(); ++k) require_index([&] { return item(list, k); }, indices[k], size, of);
  };
  require_indices("reads", operation.reads, graph.tensors.size(), "tensors");
  require_indices("writes", operation.writes, graph.tensors.size(), "tensors");
  // Positions, each at most once.
  const auto require_positions = [&](const char* list, const std::vector<int32_t>& positions) {
    require_indices(list, positions, operation.writes.size(), "writes");
    for (size_t k = 1; k < positions.size(); ++k) {
      const auto here = positions.begin() + static_cast<std::ptrdiff_t>(k);
      if (std::find(positions.begin(), here, *here) != here)
        refuse(item(list, k), "must be unique", std::to_string(*here) + " again");
    }
  };
  require_positions("accumulates", operation.accumulates);
  require_positions("mutates", operation.mutates);
  for (size_t k = 0; k < operation.inplace.size(); ++k) {
    const InplacePair pair = operation.inplace[k];
    require_index([&] { return item("inplace", k) + "[0]"; }, pair.read, operation.reads.size(), "reads");
    require_index([&] { return item("inplace", k) + "[1]"; }, pair.write, operation.writes.size(), "writes");
    const int32_t read = operation.reads[pair.read];
    const int32_t write = operation.writes[pair.write];
    if (!same_elements(graph.tensors[read], graph.tensors[write]))
      refuse(item("inplace", k), "must pair boxes of equal offset, sizes, strides and element size",
             name(read) + " and " + name(write));
  }
  for (size_t k = 0; k < operation.mutates.size(); ++k) {
    const int32_t tensor = operation.writes[operation.mutates[k]];
    if (!contains(operation.reads, tensor))
      refuse(item("mutates", k), "must be a write of a tensor that is read too", name(tensor));
  }
  for (size_t k = 0; k < operation.writes.size(); ++k) {
    const StorageKind kind = graph.storages[graph.tensors[operation.writes[k]].storage].kind;
    const bool is_given = kind == StorageKind::kParameter || kind == StorageKind::kInput;
    if (is_given && !contains(operation.mutates, static_cast<int32_t>(k)))
      refuse(item("writes", k), "must be a mutation where it is of a parameter or an input",
             name(operation.writes[k]) + ", which is none");
  }
  if (!operation.is_sum) return;
  if (operation.reads.size() < 2 || operation.writes.empty())
    refuse(place("is_sum"), "needs two reads and a write",
           std::to_string(operation.reads.size()) + " and " + std::to_string(operation.writes.size()));
  const auto extents = [&](int32_t tensor) -> const auto& { return graph.tensors[tensor].sizes; };
  const int32_t result = operation.writes[0];
  if (extents(operation.reads[0]) != extents(result) || extents(operation.reads[1]) != extents(result))
    refuse(place("is_sum"), "needs equal sizes",
           name(operation.reads[0]) + ", " + name(operation.reads[1]) + " and " + name(result) + " of unequal ones");
}

void require_operations(const Graph& graph) {
  require_names("operations", graph.operations);
  double total_us = 0;
  for (size_t i = 0; i < graph.operations.size(); ++i) {
    const double duration_us = graph.operations[i].duration_us;
    const auto place = [&] { return where("operations", i, graph.operations[i]) + ": duration_us"; };
    if (!std::isfinite(duration_us) || duration_us < 0)
      refuse(place(), "must be finite and 0 or more", std::to_string(duration_us));
    total_us += duration_us;
    if (!std::isfinite(total_us)) refuse(place(), "of all operations together must be finite", "infinity");
    require_operation(graph, i);
  }
}

// What has been written of each storage, from the front of the graph to the back.
class Written {
 public:
  explicit Written(const Graph& graph)
      : graph_(graph),
        is_whole_(graph.storages.size()),
        is_written_(graph.tensors.size()),
        position_(graph.tensors.size()),
        of_storage_(graph.storages.size()),
        details_(graph.storages.size()) {
    for (size_t i = 0; i < graph.storages.size(); ++i) {
      const StorageKind kind = graph.storages[i].kind;
      is_whole_[i] = kind == StorageKind::kParameter || kind == StorageKind::kInput;
    }
    for (size_t i = 0; i < graph.tensors.size(); ++i) {
      std::vector<const Tensor*>& tensors = of_storage_[graph.tensors[i].storage];
      position_[i] = static_cast<int32_t>(tensors.size());
      tensors.push_back(&graph.tensors[i]);
    }
  }

  void add(int32_t tensor) {
    const int32_t storage = graph_.tensors[tensor].storage;
    if (is_whole_[storage] || is_written_[tensor]) return;
    is_written_[tensor] = true;
    is_whole_[storage] = covers_storage(graph_.tensors[tensor], graph_.storages[storage].size_bytes);
    if (!is_whole_[storage]) details(storage).bytes.add(position_[tensor]);
  }
  bool covers(int32_t tensor) {
    const int32_t storage = graph_.tensors[tensor].storage;
    if (is_whole_[storage] || is_written_[tensor]) return true;
    is_written_[tensor] = details(storage).bytes.covers(position_[tensor]);
    return is_written_[tensor];
  }
  bool overlap(int32_t a, int32_t b) {
    if (a == b) return !is_empty(graph_.tensors[a]);
    return details(graph_.tensors[a].storage).boxes.overlap(position_[a], position_[b]);
  }

 private:
  // Only for storages that are written or read in parts.
  struct Details {
    explicit Details(std::span<const Tensor* const> tensors) : boxes(tensors), bytes(boxes) {}
    StorageBoxes boxes;
    ByteSet bytes;
  };
  Details& details(int32_t storage) {
    if (!details_[storage]) details_[storage] = std::make_unique<Details>(of_storage_[storage]);
    return *details_[storage];
  }

  const Graph& graph_;
  std::vector<bool> is_whole_;
  std::vector<bool> is_written_;  // per tensor: every byte of it, as far as known
  std::vector<int32_t> position_;
  std::vector<std::vector<const Tensor*>> of_storage_;
  std::vector<std::unique_ptr<Details>> details_;
};

void require_order(const Graph& graph) {
  Written written(graph);
  for (size_t i = 0; i < graph.operations.size(); ++i) {
    const Operation& operation = graph.operations[i];
    const auto place = [&] { return where("operations", i, operation); };
    for (size_t k = 0; k < operation.reads.size(); ++k) {
      if (!written.covers(operation.reads[k]))
        refuse(place() + ": " + element("reads", k), "must have been written wholly by operations before this one",
               "\"" + graph.tensors[operation.reads[k]].name + "\"");
    }
    for (size_t k = 0; k < operation.writes.size(); ++k) {
      const int32_t tensor = operation.writes[k];
      for (size_t j = 0; j < k; ++j) {
        if (graph.tensors[tensor].storage == graph.tensors[operation.writes[j]].storage &&
            written.overlap(tensor, operation.writes[j]))
          refuse(place() + ": " + element("writes", k), "must not overlap another write of the operation",
                 "\"" + graph.tensors[tensor].name + "\" over \"" + graph.tensors[operation.writes[j]].name + "\"");
      }
    }
    for (const int32_t tensor : operation.writes) written.add(tensor);
  }
}

// Two lanes of 64 bits over a stream of words; every value goes in with its length or count before it.
class Digest {
 public:
  void add(int64_t value) {
    const auto word = static_cast<uint64_t>(value);
    a_ = mix(a_ ^ word) + 0x9e3779b97f4a7c15u;
    b_ = mix(std::rotl(b_, 23) + word * 0xd6e8feb86659fd93u);
  }
  void add(double value) { add(std::bit_cast<int64_t>(value == 0 ? 0.0 : value)); }
  void add(const std::string& text) {
    add(static_cast<int64_t>(text.size()));
    for (size_t i = 0; i < text.size(); i += 8) {
      uint64_t word = 0;
      for (size_t k = i; k < std::min(i + 8, text.size()); ++k)
        word |= static_cast<uint64_t>(static_cast<unsigned char>(text[k])) << (8 * (k - i));
      add(static_cast<int64_t>(word));
    }
  }
  template <class Integer>
  void add(const std::vector<Integer>& values) {
    add(static_cast<int64_t>(values.size()));
    for (const Integer value : values) add(static_cast<int64_t>(value));
  }
  std::string text() const {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string result;
    for (const uint64_t lane : {mix(a_ + b_), mix(b_)}) {
      for (int shift = 60; shift >= 0; shift -= 4) result += kDigits[(lane >> shift) & 15];
    }
    return result;
  }

 private:
  static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  uint64_t a_ = 0x243f6a8885a308d3u;
  uint64_t b_ = 0x13198a2e03707344u;
};

}  // namespace

void require_valid(const Graph& graph) {
  require_storages(graph);
  require_tensors(graph);
  require_operations(graph);
  require_order(graph);
}

std::string fingerprint(const Graph& graph) {
  Digest digest;
  digest.add(int64_t{1});  // the version of this list of fields
  digest.add(graph.durations_from);
  digest.add(static_cast<int64_t>(graph.storages.size()));
  for (const Storage& storage : graph.storages) {
    digest.add(storage.name);
    digest.add(storage.size_bytes);
    digest.add(static_cast<int64_t>(storage.kind));
    digest.add(int64_t{storage.is_output});
  }
  digest.add(static_cast<int64_t>(graph.tensors.size()));
  for (const Tensor& tensor : graph.tensors) {
    digest.add(tensor.name);
    digest.add(int64_t{tensor.storage});
    digest.add(tensor.offset_bytes);
    digest.add(tensor.sizes);
    digest.add(tensor.strides_bytes);
    digest.add(tensor.element_bytes);
  }
  digest.add(static_cast<int64_t>(graph.operations.size()));
  for (const Operation& operation : graph.operations) {
    digest.add(operation.name);
    digest.add(operation.target);
    digest.add(operation.duration_us);
    digest.add(operation.workspace_bytes);
    digest.add(operation.reads);
    digest.add(operation.writes);
    digest.add(static_cast<int64_t>(operation.inplace.size()));
    for (const InplacePair pair : operation.inplace) {
      digest.add(int64_t{pair.read});
      digest.add(int64_t{pair.write});
    }
    digest.add(operation.accumulates);
    digest.add(operation.mutates);
    digest.add(int64_t{operation.is_sum});
    digest.add(int64_t{operation.is_random});
    digest.add(int64_t{operation.is_backward});
    digest.add(int64_t{operation.patch});
  }
  // Behind all else, so that a graph without measurements has the digest that it always had.
  for (size_t i = 0; i < graph.storages.size(); ++i) {
    const std::optional<Compression>& compression = graph.storages[i].compression;
    if (!compression) continue;
    digest.add(static_cast<int64_t>(i));
    digest.add(compression->ratio);
    digest.add(int64_t{compression->element_bytes});
  }
  return digest.text();
}

}  // namespace splitkern::memory
