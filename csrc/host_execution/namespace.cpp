// Names the operators of this build: "splitkern_host" or, for a test, what SPLITKERN_HOST_NAMESPACE says.
#include "namespace.h"

#ifndef SPLITKERN_HOST_NAMESPACE
#define SPLITKERN_HOST_NAMESPACE "splitkern_host"
#endif

namespace splitkern::host_execution {

const char* const kNamespace = SPLITKERN_HOST_NAMESPACE;

}  // namespace splitkern::host_execution
