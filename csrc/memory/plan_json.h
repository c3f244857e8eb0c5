// Plans as JSON, version 1 ("format": "splitkern.plan"): the fields of Plan by their names, enumerations in lower case,
// an unlimited budget as null. Called by the bindings and the command line.
#pragma once

#include <string>
#include <string_view>

#include "memory/plan.h"

namespace splitkern::memory {

std::string_view name_of(Pool pool);      // "device", "parameters" or "host"
std::string_view name_of(CopyKind kind);  // "offload" or "prefetch"

// Every field is written; one line for each element of a list. Equal plans give equal texts. Throws InvalidArgument
// where a number is not finite, a text not UTF-8 or an enumeration's value unknown.
std::string to_json(const Plan& plan);

// Fields that are left out have their default; unknown ones are refused. Throws ParseError. Whether the plan is right
// for a graph is for the validator to say.
Plan plan_from_json(std::string_view text);

}  // namespace splitkern::memory
