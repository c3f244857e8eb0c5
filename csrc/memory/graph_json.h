// Graphs as JSON, version 1 ("format": "splitkern.graph"): the fields of Graph by their names, kinds in lower case,
// in-place pairs as [read, write]. Called by the bindings, the command line and whoever stores a captured step.
#pragma once

#include <string>
#include <string_view>

#include "memory/graph.h"

namespace splitkern::memory {

// "parameter", "gradient", "input" or "activation".
std::string_view name_of(StorageKind kind);

// Every field is written; one line for each storage, tensor and operation. Equal graphs give equal texts. Throws
// InvalidArgument where a number is not finite, a name not UTF-8 or a kind unknown.
std::string to_json(const Graph& graph);

// Fields that are left out have their default; unknown ones are refused. Throws ParseError. Whether the graph is valid
// is for require_valid to say.
Graph graph_from_json(std::string_view text);

}  // namespace splitkern::memory
