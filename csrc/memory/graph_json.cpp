#include "memory/graph_json.h"

#include <algorithm>
#include <vector>

#include "memory/compression_json.h"
#include "memory/errors.h"
#include "memory/json.h"

namespace splitkern::memory {
namespace {

constexpr std::string_view kFormat = "splitkern.graph";
// 2: storages may have a compression. Graphs without one are written as before.
constexpr int64_t kVersion = 2;

// In the order of StorageKind.
const std::vector<std::string_view> kKinds = {"parameter", "gradient", "input", "activation"};

void write(JsonWriter& writer, const Storage& storage) {
  writer.begin_object()
      .field("name", storage.name)
      .field("size_bytes", storage.size_bytes)
      .field("kind", name_of(storage.kind))
      .field("is_output", storage.is_output);
  write_compression(writer, storage.compression);
  writer.end_object();
}

void write(JsonWriter& writer, const Tensor& tensor) {
  writer.begin_object()
      .field("name", tensor.name)
      .field("storage", tensor.storage)
      .field("offset_bytes", tensor.offset_bytes)
      .field("sizes", tensor.sizes)
      .field("strides_bytes", tensor.strides_bytes)
      .field("element_bytes", tensor.element_bytes)
      .end_object();
}

void write(JsonWriter& writer, const Operation& operation) {
  writer.begin_object()
      .field("name", operation.name)
      .field("target", operation.target)
      .field("duration_us", operation.duration_us)
      .field("workspace_bytes", operation.workspace_bytes)
      .field("reads", operation.reads)
      .field("writes", operation.writes)
      .key("inplace")
      .begin_array();
  for (const InplacePair pair : operation.inplace) writer.write(std::vector<int32_t>{pair.read, pair.write});
  writer.end_array()
      .field("accumulates", operation.accumulates)
      .field("mutates", operation.mutates)
      .field("is_sum", operation.is_sum)
      .field("is_random", operation.is_random)
      .field("is_backward", operation.is_backward)
      .field("patch", operation.patch)
      .field("segment", operation.segment)
      .field("module", operation.module)
      .end_object();
}

template <class T>
void write_list(JsonWriter& writer, std::string_view name, const std::vector<T>& items) {
  writer.new_line().key(name).begin_array();
  for (const T& item : items) {
    writer.new_line();
    write(writer, item);
  }
  writer.end_array();
}

}  // namespace

void read_json(const JsonNode& node, StorageKind& out) {
  out = static_cast<StorageKind>(read_json_name(node, kKinds));
}

void read_json(const JsonNode& node, Storage& out) {
  JsonFields fields(node);
  fields.read("name", out.name);
  fields.read("size_bytes", out.size_bytes);
  fields.read("kind", out.kind);
  fields.read("is_output", out.is_output);
  read_compression(fields, out.compression);
  fields.finish();
}

void read_json(const JsonNode& node, Tensor& out) {
  JsonFields fields(node);
  fields.read("name", out.name);
  fields.read("storage", out.storage);
  fields.read("offset_bytes", out.offset_bytes);
  fields.read("sizes", out.sizes);
  fields.read("strides_bytes", out.strides_bytes);
  fields.read("element_bytes", out.element_bytes);
  fields.finish();
}

void read_json(const JsonNode& node, InplacePair& out) {
  const JsonValue::Array& items = require_array(node);
  if (items.size() != 2) node.refuse("an array [read, write]");
  read_json(JsonNode(node, 0, items[0]), out.read);
  read_json(JsonNode(node, 1, items[1]), out.write);
}

void read_json(const JsonNode& node, Operation& out) {
  JsonFields fields(node);
  fields.read("name", out.name);
  fields.read("target", out.target);
  fields.read("duration_us", out.duration_us);
  fields.read("workspace_bytes", out.workspace_bytes);
  fields.read("reads", out.reads);
  fields.read("writes", out.writes);
  fields.read("inplace", out.inplace);
  fields.read("accumulates", out.accumulates);
  fields.read("mutates", out.mutates);
  fields.read("is_sum", out.is_sum);
  fields.read("is_random", out.is_random);
  fields.read("is_backward", out.is_backward);
  fields.read("patch", out.patch);
  fields.read("segment", out.segment);
  fields.read("module", out.module);
  fields.finish();
}

std::string_view name_of(StorageKind kind) {
  const auto index = static_cast<size_t>(kind);
  if (index >= kKinds.size()) throw InvalidArgument("a storage kind must be below 4, got " + std::to_string(index));
  return kKinds[index];
}

std::string to_json(const Graph& graph) {
  const bool has_compression =
      std::ranges::any_of(graph.storages, [](const Storage& storage) { return storage.compression.has_value(); });
  JsonWriter writer;
  writer.begin_object()
      .field("format", kFormat)
      .field("version", has_compression ? kVersion : 1)
      .field("name", graph.name)
      .field("durations_from", graph.durations_from);
  write_list(writer, "storages", graph.storages);
  write_list(writer, "tensors", graph.tensors);
  write_list(writer, "operations", graph.operations);
  writer.end_object();
  return writer.take();
}

Graph graph_from_json(std::string_view text) {
  const JsonValue document = parse_json(text);
  const JsonNode node(text, document);
  JsonFields fields(node);
  read_json_header(fields, kFormat, kVersion);
  Graph graph;
  fields.read("name", graph.name);
  fields.read("durations_from", graph.durations_from);
  fields.read("storages", graph.storages);
  fields.read("tensors", graph.tensors);
  fields.read("operations", graph.operations);
  fields.finish();
  return graph;
}

}  // namespace splitkern::memory
