#include "memory/validator/findings.h"

namespace splitkern::memory::validation {
namespace {

template <class Items>
bool in_range(int64_t index, const Items& items) {
  return index >= 0 && index < static_cast<int64_t>(items.size());
}
const char* name(Pool pool) {
  switch (pool) {
    case Pool::kDevice:
      return "device";
    case Pool::kParameters:
      return "parameters";
    case Pool::kHost:
      return "host";
  }
  return "unknown pool";
}

}  // namespace

std::string Findings::operation(int64_t index) const {
  return "operation " + std::to_string(index) + " \"" + graph_.operations[index].name + "\"";
}
std::string Findings::instance(int64_t index) const {
  const Instance& instance = plan_.instances[index];
  std::string text = "instance " + std::to_string(index);
  if (!in_range(instance.operation, graph_.operations)) return text;
  return text + " (" + (instance.is_recomputation ? "again " : "") + operation(instance.operation) + ")";
}
std::string Findings::graph_storage(int64_t index) const {
  return "graph storage " + std::to_string(index) + " \"" + graph_.storages[index].name + "\"";
}
std::string Findings::storage(int64_t index) const {
  std::string text = "storage " + std::to_string(index);
  if (!in_range(index, plan_.storages) || plan_.storages[index].members.empty()) return text;
  const int32_t first = plan_.storages[index].members.front();
  return in_range(first, graph_.storages) ? text + " \"" + graph_.storages[first].name + "\"" : text;
}
std::string Findings::tensor(int64_t index) const {
  return "tensor \"" + graph_.tensors[index].name + "\"";
}
std::string Findings::residency(int64_t index) const {
  const Residency& residency = plan_.residencies[index];
  std::ostringstream text;
  text << "residency " << index << " (" << (residency.storage < 0 ? "workspace" : storage(residency.storage)) << ", "
       << name(residency.pool) << " bytes from " << residency.offset_bytes << ", " << residency.size_bytes
       << " of them, boundaries [" << residency.begin << ", " << residency.end << "))";
  return text.str();
}
std::string Findings::copy(int64_t index) const {
  const Copy& copy = plan_.copies[index];
  std::ostringstream text;
  text << "copy " << index << " (" << (copy.kind == CopyKind::kOffload ? "offload" : "prefetch") << " of "
       << storage(copy.storage) << ", issued at boundary " << copy.issue << ", waited for at " << copy.wait << ")";
  return text.str();
}

}  // namespace splitkern::memory::validation
