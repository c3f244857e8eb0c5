// The pieces of the refusals of this folder's paths: a reason as a phrase, empty where there is none.
#pragma once

#include "conv.h"
#include "geometry.h"

namespace splitkern::kernels::sm90 {

std::string device_refusal(const DeviceTraits& traits);
std::string type_refusal(ElementType type);
std::string groups_refusal(int64_t channels, int64_t channels_per_group);
std::string pixels_refusal(const AxisWalk& rows, const AxisWalk& columns, int64_t images);

}  // namespace splitkern::kernels::sm90
