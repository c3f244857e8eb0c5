// The name under which library.cpp registers the operators. In a source of its own (namespace.cpp), so that a test that
// loads several builds at once compiles that one line anew, with SPLITKERN_HOST_NAMESPACE, and not torch's headers.
#pragma once

namespace splitkern::host_execution {

extern const char* const kNamespace;

}  // namespace splitkern::host_execution
