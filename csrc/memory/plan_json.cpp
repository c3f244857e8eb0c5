#include "memory/plan_json.h"

#include <algorithm>
#include <vector>

#include "memory/compression_json.h"
#include "memory/errors.h"
#include "memory/json.h"

namespace splitkern::memory {
namespace {

constexpr std::string_view kFormat = "splitkern.plan";
// 2: copies may be compressed. Plans without such copies are written as before.
constexpr int64_t kVersion = 2;

// In the order of the enumerations.
const std::vector<std::string_view> kPools = {"device", "parameters", "host"};
const std::vector<std::string_view> kCopyKinds = {"offload", "prefetch"};

void write_budget(JsonWriter& writer, std::string_view name, int64_t bytes) {
  writer.key(name);
  if (bytes == kUnlimited)
    writer.write_null();
  else
    writer.write(bytes);
}

void write(JsonWriter& writer, const Limits& limits) {
  writer.begin_object();
  write_budget(writer, "device_bytes", limits.device_bytes);
  write_budget(writer, "host_bytes", limits.host_bytes);
  writer.field("offload_gbps", limits.offload_gbps)
      .field("prefetch_gbps", limits.prefetch_gbps)
      .field("copy_latency_us", limits.copy_latency_us)
      .field("alignment_bytes", limits.alignment_bytes)
      .end_object();
}

void write(JsonWriter& writer, const PlanStorage& storage) {
  writer.begin_object().field("size_bytes", storage.size_bytes).field("members", storage.members);
  write_compression(writer, storage.compression);
  writer.end_object();
}

void write(JsonWriter& writer, const FusedSum& fused) {
  writer.begin_object().field("sum", fused.sum).field("producer", fused.producer).end_object();
}

void write(JsonWriter& writer, const Instance& instance) {
  writer.begin_object()
      .field("operation", instance.operation)
      .field("is_recomputation", instance.is_recomputation)
      .field("accumulate", instance.accumulate)
      .end_object();
}

void write(JsonWriter& writer, const Boundary& boundary) {
  writer.begin_object().field("waits", boundary.waits).field("issues", boundary.issues).end_object();
}

void write(JsonWriter& writer, const Residency& residency) {
  writer.begin_object()
      .field("storage", residency.storage)
      .field("pool", name_of(residency.pool))
      .field("offset_bytes", residency.offset_bytes)
      .field("size_bytes", residency.size_bytes)
      .field("begin", residency.begin)
      .field("end", residency.end)
      .end_object();
}

void write(JsonWriter& writer, const Copy& copy) {
  writer.begin_object()
      .field("kind", name_of(copy.kind))
      .field("storage", copy.storage)
      .field("source", copy.source)
      .field("destination", copy.destination)
      .field("issue", copy.issue)
      .field("wait", copy.wait)
      .field("after", copy.after);
  if (copy.compressed) writer.field("compressed", copy.compressed);
  writer.end_object();
}

void write(JsonWriter& writer, const Predicted& predicted) {
  writer.begin_object()
      .field("step_us", predicted.step_us)
      .field("compute_us", predicted.compute_us)
      .field("recompute_us", predicted.recompute_us)
      .field("stall_us", predicted.stall_us)
      .field("device_peak_bytes", predicted.device_peak_bytes)
      .field("parameters_peak_bytes", predicted.parameters_peak_bytes)
      .field("host_peak_bytes", predicted.host_peak_bytes)
      .field("device_lower_bound_bytes", predicted.device_lower_bound_bytes)
      .field("host_lower_bound_bytes", predicted.host_lower_bound_bytes)
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

void read_budget(JsonFields& fields, std::string_view name, int64_t& bytes) {
  const JsonValue* value = fields.find(name);
  if (value == nullptr) return;
  const JsonNode node(fields.node(), name, *value);
  if (value->is_null())
    bytes = kUnlimited;
  else if (std::holds_alternative<int64_t>(value->content))
    read_json(node, bytes);
  else
    node.refuse("an integer, or null for no limit");
}

}  // namespace

void read_json(const JsonNode& node, Pool& out) {
  out = static_cast<Pool>(read_json_name(node, kPools));
}

void read_json(const JsonNode& node, CopyKind& out) {
  out = static_cast<CopyKind>(read_json_name(node, kCopyKinds));
}

void read_json(const JsonNode& node, Limits& out) {
  JsonFields fields(node);
  read_budget(fields, "device_bytes", out.device_bytes);
  read_budget(fields, "host_bytes", out.host_bytes);
  fields.read("offload_gbps", out.offload_gbps);
  fields.read("prefetch_gbps", out.prefetch_gbps);
  fields.read("copy_latency_us", out.copy_latency_us);
  fields.read("alignment_bytes", out.alignment_bytes);
  fields.finish();
}

void read_json(const JsonNode& node, PlanStorage& out) {
  JsonFields fields(node);
  fields.read("size_bytes", out.size_bytes);
  fields.read("members", out.members);
  read_compression(fields, out.compression);
  fields.finish();
}

void read_json(const JsonNode& node, FusedSum& out) {
  JsonFields fields(node);
  fields.read("sum", out.sum);
  fields.read("producer", out.producer);
  fields.finish();
}

void read_json(const JsonNode& node, Instance& out) {
  JsonFields fields(node);
  fields.read("operation", out.operation);
  fields.read("is_recomputation", out.is_recomputation);
  fields.read("accumulate", out.accumulate);
  fields.finish();
}

void read_json(const JsonNode& node, Boundary& out) {
  JsonFields fields(node);
  fields.read("waits", out.waits);
  fields.read("issues", out.issues);
  fields.finish();
}

void read_json(const JsonNode& node, Residency& out) {
  JsonFields fields(node);
  fields.read("storage", out.storage);
  fields.read("pool", out.pool);
  fields.read("offset_bytes", out.offset_bytes);
  fields.read("size_bytes", out.size_bytes);
  fields.read("begin", out.begin);
  fields.read("end", out.end);
  fields.finish();
}

void read_json(const JsonNode& node, Copy& out) {
  JsonFields fields(node);
  fields.read("kind", out.kind);
  fields.read("storage", out.storage);
  fields.read("source", out.source);
  fields.read("destination", out.destination);
  fields.read("issue", out.issue);
  fields.read("wait", out.wait);
  fields.read("after", out.after);
  fields.read("compressed", out.compressed);
  fields.finish();
}

void read_json(const JsonNode& node, Predicted& out) {
  JsonFields fields(node);
  fields.read("step_us", out.step_us);
  fields.read("compute_us", out.compute_us);
  fields.read("recompute_us", out.recompute_us);
  fields.read("stall_us", out.stall_us);
  fields.read("device_peak_bytes", out.device_peak_bytes);
  fields.read("parameters_peak_bytes", out.parameters_peak_bytes);
  fields.read("host_peak_bytes", out.host_peak_bytes);
  fields.read("device_lower_bound_bytes", out.device_lower_bound_bytes);
  fields.read("host_lower_bound_bytes", out.host_lower_bound_bytes);
  fields.finish();
}

std::string_view name_of(Pool pool) {
  const auto index = static_cast<size_t>(pool);
  if (index >= kPools.size()) throw InvalidArgument("a pool must be below 3, got " + std::to_string(index));
  return kPools[index];
}

std::string_view name_of(CopyKind kind) {
  const auto index = static_cast<size_t>(kind);
  if (index >= kCopyKinds.size()) throw InvalidArgument("a copy kind must be below 2, got " + std::to_string(index));
  return kCopyKinds[index];
}

std::string to_json(const Plan& plan) {
  const bool has_compression =
      std::ranges::any_of(plan.storages, [](const PlanStorage& storage) { return storage.compression.has_value(); }) ||
      std::ranges::any_of(plan.copies, &Copy::compressed);
  JsonWriter writer;
  writer.begin_object()
      .field("format", kFormat)
      .field("version", has_compression ? kVersion : 1)
      .field("graph_fingerprint", plan.graph_fingerprint)
      .field("strategy", plan.strategy)
      .new_line()
      .key("limits");
  write(writer, plan.limits);
  writer.new_line().key("predicted");
  write(writer, plan.predicted);
  write_list(writer, "storages", plan.storages);
  write_list(writer, "fused", plan.fused);
  write_list(writer, "instances", plan.instances);
  write_list(writer, "boundaries", plan.boundaries);
  write_list(writer, "residencies", plan.residencies);
  write_list(writer, "copies", plan.copies);
  writer.end_object();
  return writer.take();
}

Plan plan_from_json(std::string_view text) {
  const JsonValue document = parse_json(text);
  const JsonNode node(text, document);
  JsonFields fields(node);
  read_json_header(fields, kFormat, kVersion);
  Plan plan;
  fields.read("graph_fingerprint", plan.graph_fingerprint);
  fields.read("strategy", plan.strategy);
  fields.read("limits", plan.limits);
  fields.read("predicted", plan.predicted);
  fields.read("storages", plan.storages);
  fields.read("fused", plan.fused);
  fields.read("instances", plan.instances);
  fields.read("boundaries", plan.boundaries);
  fields.read("residencies", plan.residencies);
  fields.read("copies", plan.copies);
  fields.finish();
  return plan;
}

}  // namespace splitkern::memory
