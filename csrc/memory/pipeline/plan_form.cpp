#include "memory/pipeline/plan_form.h"

#include <string>
#include <vector>

#include "memory/errors.h"

namespace splitkern::memory {
namespace {

// Positions of a vector, from plans that nobody may have checked.
void require_index(int32_t index, size_t count, const std::string& what) {
  if (index < 0 || static_cast<size_t>(index) >= count)
    throw InvalidArgument(what + " must be in [0, " + std::to_string(count) + "), got " + std::to_string(index));
}

std::string numbered(const char* what, size_t index) {
  return std::string(what) + " " + std::to_string(index);
}

const unsigned char* address_of(const Residency& residency, const Arenas& arenas) {
  const void* const arena = residency.pool == Pool::kDevice ? arenas.device
                            : residency.pool == Pool::kHost ? arenas.host
                                                            : arenas.parameters;
  return static_cast<const unsigned char*>(arena) + residency.offset_bytes;
}

}  // namespace

void require_well_formed(const Plan& plan, const Arenas& arenas) {
  const size_t instances = plan.instances.size();
  if (plan.boundaries.size() != instances + 1)
    throw InvalidArgument("a plan of " + std::to_string(instances) + " instances must have one boundary more, got " +
                          std::to_string(plan.boundaries.size()));

  for (size_t index = 0; index < plan.residencies.size(); ++index) {
    const Residency& residency = plan.residencies[index];
    const std::string name = numbered("residency", index);
    if (residency.storage != -1) require_index(residency.storage, plan.storages.size(), name + ": storage");
    const int64_t arena_bytes = residency.pool == Pool::kDevice ? arenas.device_bytes
                                : residency.pool == Pool::kHost ? arenas.host_bytes
                                                                : arenas.parameters_bytes;
    if (residency.offset_bytes < 0 || residency.size_bytes < 0 || residency.offset_bytes > arena_bytes ||
        residency.size_bytes > arena_bytes - residency.offset_bytes)
      throw InvalidArgument(name + ": " + std::to_string(residency.size_bytes) + " bytes at offset " +
                            std::to_string(residency.offset_bytes) + " must lie inside an arena of " +
                            std::to_string(arena_bytes) + " bytes");
    if (residency.begin < 0 || residency.begin >= residency.end || static_cast<size_t>(residency.end) > instances + 1)
      throw InvalidArgument(name + ": begin and end must be increasing boundaries in [0, " +
                            std::to_string(instances + 1) + "], got " + std::to_string(residency.begin) + " and " +
                            std::to_string(residency.end));
  }

  for (size_t index = 0; index < plan.copies.size(); ++index) {
    const Copy& copy = plan.copies[index];
    const std::string name = numbered("copy", index);
    require_index(copy.storage, plan.storages.size(), name + ": storage");
    const int64_t size_bytes = plan.storages[static_cast<size_t>(copy.storage)].size_bytes;
    const bool offload = copy.kind == CopyKind::kOffload;
    const auto require_end = [&](int32_t residency, Pool pool, const char* which) {
      require_index(residency, plan.residencies.size(), name + ": " + which);
      const Residency& found = plan.residencies[static_cast<size_t>(residency)];
      if (found.pool != pool)
        throw InvalidArgument(name + ": " + which + " of " + (offload ? "an offload" : "a prefetch") +
                              " must be in the " + (pool == Pool::kHost ? "host" : "device") + " pool, but residency " +
                              std::to_string(residency) + " is not");
      if (found.storage != copy.storage || found.size_bytes < size_bytes || size_bytes < 0)
        throw InvalidArgument(name + ": " + which + " must hold storage " + std::to_string(copy.storage) + " of " +
                              std::to_string(size_bytes) + " bytes, but residency " + std::to_string(residency) +
                              " holds storage " + std::to_string(found.storage) + " in " +
                              std::to_string(found.size_bytes) + " bytes");
    };
    require_end(copy.source, offload ? Pool::kDevice : Pool::kHost, "source");
    require_end(copy.destination, offload ? Pool::kHost : Pool::kDevice, "destination");
    if (!copy.compressed) continue;
    const std::optional<Compression>& compression = plan.storages[static_cast<size_t>(copy.storage)].compression;
    if (!compression || !is_codable(size_bytes, compression->element_bytes))
      throw InvalidArgument(name + ": is compressed, but storage " + std::to_string(copy.storage) +
                            " has no compression with elements that make up its " + std::to_string(size_bytes) +
                            " bytes");
    const int32_t host = offload ? copy.destination : copy.source;
    const int64_t room_bytes = compressed_room_bytes(size_bytes, compression->element_bytes);
    if (plan.residencies[static_cast<size_t>(host)].size_bytes < room_bytes)
      throw InvalidArgument(name + ": residency " + std::to_string(host) + " must have room for the " +
                            std::to_string(room_bytes) + " bytes that any values may take compressed, got " +
                            std::to_string(plan.residencies[static_cast<size_t>(host)].size_bytes));
    for (const int32_t residency : {copy.source, copy.destination}) {
      const Residency& at = plan.residencies[static_cast<size_t>(residency)];
      const auto alignment =
          static_cast<uintptr_t>(residency == host ? kCompressedAlignment : compression->element_bytes);
      if (reinterpret_cast<uintptr_t>(address_of(at, arenas)) % alignment != 0)
        throw InvalidArgument(name + ": residency " + std::to_string(residency) + " must lie at a multiple of " +
                              std::to_string(alignment) + " bytes for a compressed copy");
    }
  }

  // In the order of the boundaries: what is waited for has been issued, so that no wait can last for ever.
  std::vector<char> issued(plan.copies.size(), 0);
  for (size_t boundary = 0; boundary < plan.boundaries.size(); ++boundary) {
    const std::string name = numbered("boundary", boundary);
    for (const int32_t copy : plan.boundaries[boundary].waits) {
      require_index(copy, plan.copies.size(), name + ": wait");
      if (!issued[static_cast<size_t>(copy)])
        throw InvalidArgument(name + ": waits for copy " + std::to_string(copy) +
                              ", which must have been issued at an earlier boundary");
    }
    for (const int32_t copy : plan.boundaries[boundary].issues) {
      require_index(copy, plan.copies.size(), name + ": issue");
      if (issued[static_cast<size_t>(copy)])
        throw InvalidArgument(name + ": issues copy " + std::to_string(copy) + " a second time");
      for (const int32_t earlier : plan.copies[static_cast<size_t>(copy)].after) {
        require_index(earlier, plan.copies.size(), numbered("copy", static_cast<size_t>(copy)) + ": after");
        if (!issued[static_cast<size_t>(earlier)])
          throw InvalidArgument("copy " + std::to_string(copy) + ": comes after copy " + std::to_string(earlier) +
                                ", which must have been issued earlier");
      }
      issued[static_cast<size_t>(copy)] = 1;
    }
  }
  for (size_t copy = 0; copy < issued.size(); ++copy) {
    if (!issued[copy])
      throw InvalidArgument(numbered("copy", copy) + ": must be issued at a boundary, but no boundary lists it");
  }
}

}  // namespace splitkern::memory
