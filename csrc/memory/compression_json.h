// The JSON of a compression, the same in graphs and plans: {"ratio": 1.8, "element_bytes": 2}, left out where there is
// none. Called by graph_json.cpp and plan_json.cpp.
#pragma once

#include <optional>

#include "memory/compression.h"
#include "memory/json.h"

namespace splitkern::memory {

inline void write_compression(JsonWriter& writer, const std::optional<Compression>& compression) {
  if (!compression) return;
  writer.key("compression")
      .begin_object()
      .field("ratio", compression->ratio)
      .field("element_bytes", compression->element_bytes)
      .end_object();
}

inline void read_compression(JsonFields& fields, std::optional<Compression>& out) {
  const JsonValue* const value = fields.find("compression");
  if (value == nullptr) return;
  const JsonNode node(fields.node(), "compression", *value);
  JsonFields own(node);
  Compression compression;
  own.read("ratio", compression.ratio);
  own.read("element_bytes", compression.element_bytes);
  own.finish();
  out = compression;
}

}  // namespace splitkern::memory
