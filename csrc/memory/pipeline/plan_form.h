// What a plan must be for the copy pipeline to be safe: nothing outside the arenas, no wait that lasts for ever. Called
// by the pipeline's constructor; whether the plan is right is the validator's to say.
#pragma once

#include "memory/copy_pipeline.h"

namespace splitkern::memory {

// Throws InvalidArgument with the first thing that is wrong.
void require_well_formed(const Plan& plan, const Arenas& arenas);

}  // namespace splitkern::memory
