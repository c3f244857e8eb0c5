// Everything that can be seen without executing the plan. Each group of checks makes the indices safe that the next
// ones use, so a group that finds something ends the stage.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "memory/validator/stages.h"

namespace splitkern::memory::validation {
namespace {

class FormCheck {
 public:
  FormCheck(const Graph& graph, const Plan& plan, Findings& findings)
      : graph_(graph), plan_(plan), findings_(findings) {}

  void run() {
    using Group = void (FormCheck::*)();
    for (const Group group : {&FormCheck::check_origin, &FormCheck::check_storages, &FormCheck::check_fused,
                              &FormCheck::check_instances, &FormCheck::check_residencies, &FormCheck::check_places,
                              &FormCheck::check_copies, &FormCheck::check_boundaries}) {
      (this->*group)();
      if (findings_.any()) return;
    }
  }

 private:
  template <class Items>
  static bool in_range(int64_t index, const Items& items) {
    return index >= 0 && index < static_cast<int64_t>(items.size());
  }
  template <class Items>
  static std::string allowed(const Items& items) {
    return "; allowed are 0 to " + std::to_string(static_cast<int64_t>(items.size()) - 1);
  }

  void check_origin() {
    const std::string expected = fingerprint(graph_);
    if (plan_.graph_fingerprint != expected) {
      findings_.add(Reason::kOtherGraph, "the plan was made for another graph: it has fingerprint \"",
                    plan_.graph_fingerprint, "\", this graph has \"", expected, "\"");
      return;
    }
    try {
      require_valid(plan_.limits);
    } catch (const InvalidArgument& error) {
      findings_.add(Reason::kLimits, error.what());
    }
    // Boundaries are numbered in 32 bits, one more than instances; so is everything that is counted here.
    constexpr size_t kMost = std::numeric_limits<int32_t>::max() - 2;
    for (const size_t size : {plan_.storages.size(), plan_.fused.size(), plan_.instances.size(),
                              plan_.residencies.size(), plan_.copies.size()}) {
      if (size > kMost) findings_.add(Reason::kIndex, "the plan has a list of ", size, " entries, at most ", kMost);
    }
    const Predicted& predicted = plan_.predicted;
    for (const double us : {predicted.step_us, predicted.compute_us, predicted.recompute_us, predicted.stall_us}) {
      if (!std::isfinite(us) || us < 0)
        findings_.add(Reason::kPrediction, "predicted times must be 0 or more, got ", us);
    }
  }

  // The kinds whose storages stay in the parameters pool during the whole step.
  bool is_fixed(const PlanStorage& storage) const {
    return std::ranges::any_of(storage.members,
                               [&](int32_t m) { return graph_.storages[m].kind != StorageKind::kActivation; });
  }
  static bool is_there_before(const Storage& storage) {
    return storage.size_bytes > 0 && (storage.kind == StorageKind::kParameter || storage.kind == StorageKind::kInput);
  }

  void check_storages() {
    std::vector<int32_t> home(graph_.storages.size(), -1);
    for (size_t p = 0; p < plan_.storages.size(); ++p) {
      const PlanStorage& storage = plan_.storages[p];
      if (storage.members.empty()) findings_.add(Reason::kMembership, "storage ", p, " has no members");
      int64_t largest = 0;
      int32_t first_there = -1;
      for (const int32_t member : storage.members) {
        if (!in_range(member, graph_.storages)) {
          findings_.add(Reason::kIndex, "storage ", p, " has member ", member, allowed(graph_.storages));
          return;
        }
        if (home[member] >= 0) {
          findings_.add(Reason::kMembership, findings_.graph_storage(member), " is a member of storage ", home[member],
                        " and of storage ", p);
        }
        home[member] = static_cast<int32_t>(p);
        largest = std::max(largest, graph_.storages[member].size_bytes);
        if (!is_there_before(graph_.storages[member])) continue;
        if (first_there >= 0) {
          findings_.add(Reason::kMembership, findings_.graph_storage(member), " and ",
                        findings_.graph_storage(first_there),
                        " are both there before the step and cannot share storage ", p);
        }
        first_there = member;
      }
      if (storage.size_bytes != largest) {
        findings_.add(Reason::kSize, "storage ", p, " has ", storage.size_bytes, " bytes, its largest member has ",
                      largest);
      }
    }
    for (size_t s = 0; s < home.size(); ++s) {
      if (home[s] < 0)
        findings_.add(Reason::kMembership, findings_.graph_storage(s), " is not a member of any planned storage");
    }
  }

  void check_fused() {
    is_fused_.assign(graph_.operations.size(), false);
    is_producer_.assign(graph_.operations.size(), false);
    for (const FusedSum& fused : plan_.fused) {
      if (!in_range(fused.sum, graph_.operations) || !in_range(fused.producer, graph_.operations)) {
        findings_.add(Reason::kIndex, "a fused sum has operations ", fused.sum, " and ", fused.producer,
                      allowed(graph_.operations));
        return;
      }
      const Operation& sum = graph_.operations[fused.sum];
      if (!sum.is_sum || sum.reads.size() != 2 || sum.writes.size() != 1)
        findings_.add(Reason::kFused, findings_.operation(fused.sum), " is fused and not a sum of two tensors");
      if (sum.is_random || !sum.mutates.empty())
        findings_.add(Reason::kFused, findings_.operation(fused.sum), " is fused, but random or a mutation");
      if (is_fused_[fused.sum]) findings_.add(Reason::kFused, findings_.operation(fused.sum), " is fused twice");
      is_fused_[fused.sum] = true;
      is_producer_[fused.producer] = true;
    }
  }

  void check_instances() {
    std::vector<bool> has_run(graph_.operations.size(), false);
    int64_t next = 0;
    const auto skip_fused = [&] {
      while (in_range(next, graph_.operations) && is_fused_[next]) ++next;
    };
    skip_fused();
    for (size_t i = 0; i < plan_.instances.size(); ++i) {
      const Instance& instance = plan_.instances[i];
      if (!in_range(instance.operation, graph_.operations)) {
        findings_.add(Reason::kIndex, "instance ", i, " has operation ", instance.operation,
                      allowed(graph_.operations));
        return;
      }
      const Operation& operation = graph_.operations[instance.operation];
      if (is_fused_[instance.operation])
        findings_.add(Reason::kFused, findings_.instance(i), " is a fused sum and must have no instance");
      if (instance.accumulate && !is_producer_[instance.operation])
        findings_.add(Reason::kFused, findings_.instance(i), " accumulates, but no sum is fused into it");
      if (instance.is_recomputation) {
        if (!has_run[instance.operation])
          findings_.add(Reason::kOrder, findings_.instance(i), " is a recomputation before the first execution");
        if (operation.is_random || !operation.mutates.empty()) {
          findings_.add(Reason::kRepetition, findings_.instance(i), " is a recomputation of a ",
                        operation.is_random ? "random" : "mutating", " operation");
        }
        continue;
      }
      if (!instance.accumulate && is_producer_[instance.operation])
        findings_.add(Reason::kFused, findings_.instance(i), " has a sum fused into it and does not accumulate");
      if (instance.operation != next) {
        findings_.add(Reason::kOrder, findings_.instance(i), " is not the next operation of the captured order, ",
                      in_range(next, graph_.operations) ? findings_.operation(next) : "there is none left");
        return;
      }
      has_run[instance.operation] = true;
      ++next;
      skip_fused();
    }
    if (in_range(next, graph_.operations)) findings_.add(Reason::kOrder, findings_.operation(next), " has no instance");
    if (plan_.boundaries.size() != plan_.instances.size() + 1) {
      findings_.add(Reason::kBoundaries, "there are ", plan_.boundaries.size(), " boundaries, ", plan_.instances.size(),
                    " instances need ", plan_.instances.size() + 1);
    }
  }

  void check_residencies() {
    const int64_t alignment = plan_.limits.alignment_bytes;
    const auto last = static_cast<int32_t>(plan_.instances.size());
    for (size_t r = 0; r < plan_.residencies.size(); ++r) {
      const Residency& residency = plan_.residencies[r];
      if (residency.storage != -1 && !in_range(residency.storage, plan_.storages)) {
        findings_.add(Reason::kIndex, "residency ", r, " has storage ", residency.storage,
                      "; allowed are -1 for workspace and 0 to ", plan_.storages.size() - 1);
        return;
      }
      if (static_cast<uint8_t>(residency.pool) > static_cast<uint8_t>(Pool::kHost)) {
        findings_.add(Reason::kIndex, "residency ", r, " has pool ", static_cast<int>(residency.pool),
                      "; allowed are 0 to 2");
        return;
      }
      // The step is over at boundary `last`: what is still there then may say so by ending after it.
      if (residency.begin < 0 || residency.begin >= residency.end || residency.end > last + 1) {
        findings_.add(Reason::kLifetime, findings_.residency(r), " must begin before it ends, within [0, ", last + 1,
                      "]");
      }
      if (residency.offset_bytes < 0 || residency.offset_bytes % alignment != 0) {
        findings_.add(Reason::kAlignment, findings_.residency(r), " has offset ", residency.offset_bytes,
                      ", which must be a multiple of ", alignment, ", 0 or more");
      }
      if (residency.size_bytes < 0 || residency.size_bytes % alignment != 0 ||
          residency.size_bytes > std::numeric_limits<int64_t>::max() - std::max<int64_t>(residency.offset_bytes, 0)) {
        findings_.add(Reason::kSize, findings_.residency(r), " has size ", residency.size_bytes,
                      ", which must be a multiple of ", alignment, ", 0 or more, and end below 2^63");
      }
      if (residency.storage >= 0 && residency.size_bytes < plan_.storages[residency.storage].size_bytes) {
        findings_.add(Reason::kSize, findings_.residency(r), " is smaller than its storage, which has ",
                      plan_.storages[residency.storage].size_bytes, " bytes");
      }
    }
  }

  // Which storages and workspaces have residencies, in which pools.
  void check_places() {
    const auto last = static_cast<int32_t>(plan_.instances.size());
    std::vector<int32_t> workspace(plan_.instances.size(), -1);
    std::vector<std::vector<int32_t>> of_storage(plan_.storages.size());
    for (size_t r = 0; r < plan_.residencies.size(); ++r) {
      const Residency& residency = plan_.residencies[r];
      const auto index = static_cast<int32_t>(r);
      if (residency.storage >= 0) {
        of_storage[residency.storage].push_back(index);
        continue;
      }
      if (residency.pool != Pool::kDevice || residency.begin >= last || residency.end != residency.begin + 1) {
        findings_.add(Reason::kWorkspace, findings_.residency(r),
                      " must be on the device during the one instance that it begins with");
        continue;
      }
      const int64_t needed = graph_.operations[plan_.instances[residency.begin].operation].workspace_bytes;
      if (workspace[residency.begin] >= 0) {
        findings_.add(Reason::kWorkspace, findings_.residency(r), " is a second workspace of ",
                      findings_.instance(residency.begin));
      }
      if (residency.size_bytes < needed) {
        findings_.add(Reason::kWorkspace, findings_.residency(r), " is smaller than the ", needed, " bytes that ",
                      findings_.instance(residency.begin), " needs");
      }
      workspace[residency.begin] = index;
    }
    for (size_t i = 0; i < workspace.size(); ++i) {
      const int64_t needed = graph_.operations[plan_.instances[i].operation].workspace_bytes;
      if (needed > 0 && workspace[i] < 0)
        findings_.add(Reason::kWorkspace, findings_.instance(i), " needs ", needed, " bytes of workspace and has none");
    }
    for (size_t p = 0; p < of_storage.size(); ++p) {
      const std::vector<int32_t>& all = of_storage[p];
      if (is_fixed(plan_.storages[p])) {
        const bool stays = all.size() == 1 && plan_.residencies[all[0]].pool == Pool::kParameters &&
                           plan_.residencies[all[0]].begin == 0 && plan_.residencies[all[0]].end >= last;
        if (!stays && plan_.storages[p].size_bytes > 0) {
          findings_.add(Reason::kPool, findings_.storage(p), " holds a parameter, input or gradient and must have one",
                        " residency, in the parameters pool, during the whole step; it has ", all.size(),
                        all.empty() ? "" : ", first " + findings_.residency(all[0]));
        }
        continue;
      }
      for (const int32_t r : all) {
        if (plan_.residencies[r].pool != Pool::kParameters) continue;
        findings_.add(Reason::kPool, findings_.residency(r),
                      " is in the parameters pool, which is for parameters, inputs and gradients");
      }
    }
  }

  void check_copies() {
    std::vector<int32_t> first_of(plan_.residencies.size(), -1);  // on the host: copies to and from it
    for (size_t c = 0; c < plan_.copies.size(); ++c) {
      const Copy& copy = plan_.copies[c];
      if (!in_range(copy.storage, plan_.storages) || !in_range(copy.source, plan_.residencies) ||
          !in_range(copy.destination, plan_.residencies) || !in_range(copy.issue, plan_.boundaries) ||
          !in_range(copy.wait, plan_.boundaries) ||
          static_cast<uint8_t>(copy.kind) > static_cast<uint8_t>(CopyKind::kPrefetch)) {
        findings_.add(Reason::kIndex, "copy ", c, " has kind ", static_cast<int>(copy.kind), ", storage ", copy.storage,
                      ", source ", copy.source, ", destination ", copy.destination, ", issue ", copy.issue, ", wait ",
                      copy.wait, ": one is out of range");
        continue;
      }
      const bool offload = copy.kind == CopyKind::kOffload;
      const Residency& source = plan_.residencies[copy.source];
      const Residency& destination = plan_.residencies[copy.destination];
      if (source.storage != copy.storage || destination.storage != copy.storage ||
          source.pool != (offload ? Pool::kDevice : Pool::kHost) ||
          destination.pool != (offload ? Pool::kHost : Pool::kDevice)) {
        findings_.add(Reason::kEndpoints, findings_.copy(c), " goes from ", findings_.residency(copy.source), " to ",
                      findings_.residency(copy.destination), ", which must be its storage's, ",
                      offload ? "on the device and on the host" : "on the host and on the device");
      }
      if ((offload ? plan_.limits.offload_gbps : plan_.limits.prefetch_gbps) == 0) {
        findings_.add(Reason::kLink, findings_.copy(c), " needs ", offload ? "offload_gbps" : "prefetch_gbps",
                      " above 0");
      }
      if (copy.wait <= copy.issue) {
        findings_.add(Reason::kWait, findings_.copy(c),
                      " must be waited for after the boundary that issues it: a boundary waits first, then issues");
      }
      int32_t& first = first_of[offload ? copy.destination : copy.source];
      if (first < 0) first = static_cast<int32_t>(c);
      if (copy.compressed != plan_.copies[first].compressed) {
        findings_.add(Reason::kCompressed, findings_.copy(c), copy.compressed ? " is" : " is not",
                      " compressed, unlike ", findings_.copy(first), " of the same bytes on the host");
      }
      if (copy.compressed) check_compressed(static_cast<int32_t>(c), offload ? copy.destination : copy.source);
    }
  }

  void check_compressed(int32_t c, int32_t host) {
    const PlanStorage& storage = plan_.storages[plan_.copies[c].storage];
    const bool is_measured = std::ranges::any_of(storage.members, [&](int32_t m) {
      const Storage& member = graph_.storages[m];
      return storage.compression && member.compression == storage.compression &&
             member.size_bytes == storage.size_bytes;
    });
    if (!is_measured) {
      findings_.add(Reason::kCompressed, findings_.copy(c), " is compressed, but the storage's compression is not ",
                    "what was measured of a member of its size");
      return;
    }
    const Residency& slot = plan_.residencies[host];
    const int64_t room_bytes = compressed_room_bytes(storage.size_bytes, storage.compression->element_bytes);
    if (slot.size_bytes < room_bytes) {
      findings_.add(Reason::kCompressed, findings_.residency(host), " is smaller than the ", room_bytes, " bytes that ",
                    findings_.copy(c), " may need");
    }
    if (slot.offset_bytes % kCompressedAlignment != 0) {
      findings_.add(Reason::kCompressed, findings_.residency(host), " has offset ", slot.offset_bytes,
                    ", which must be a multiple of ", kCompressedAlignment, " for ", findings_.copy(c));
    }
  }

  void check_boundaries() {
    enum class State : uint8_t { kNew, kIssued, kWaited };
    std::vector<State> state(plan_.copies.size(), State::kNew);
    for (size_t b = 0; b < plan_.boundaries.size(); ++b) {
      for (const int32_t c : plan_.boundaries[b].waits) {
        if (!in_range(c, plan_.copies)) {
          findings_.add(Reason::kIndex, "boundary ", b, " waits for copy ", c, allowed(plan_.copies));
          return;
        }
        if (plan_.copies[c].wait != static_cast<int32_t>(b) || state[c] != State::kIssued) {
          findings_.add(Reason::kWait, "boundary ", b, " waits for ", findings_.copy(c),
                        state[c] == State::kNew      ? ", which is not issued yet"
                        : state[c] == State::kWaited ? " once more"
                                                     : "");
        }
        state[c] = State::kWaited;
      }
      for (const int32_t c : plan_.boundaries[b].issues) {
        if (!in_range(c, plan_.copies)) {
          findings_.add(Reason::kIndex, "boundary ", b, " issues copy ", c, allowed(plan_.copies));
          return;
        }
        if (plan_.copies[c].issue != static_cast<int32_t>(b) || state[c] != State::kNew) {
          findings_.add(Reason::kIssue, "boundary ", b, " issues ", findings_.copy(c),
                        state[c] == State::kNew ? "" : " once more");
        }
        for (const int32_t other : plan_.copies[c].after) {
          if (!in_range(other, plan_.copies)) {
            findings_.add(Reason::kIndex, findings_.copy(c), " is after copy ", other, allowed(plan_.copies));
          } else if (plan_.copies[other].kind == plan_.copies[c].kind || state[other] == State::kNew) {
            findings_.add(Reason::kAfter, findings_.copy(c), " is after ", findings_.copy(other),
                          ", which must be of the other stream and issued earlier");
          }
        }
        state[c] = State::kIssued;
      }
    }
    for (size_t c = 0; c < state.size(); ++c) {
      if (state[c] == State::kNew) findings_.add(Reason::kIssue, findings_.copy(c), " is never issued");
      if (state[c] == State::kIssued) findings_.add(Reason::kWait, findings_.copy(c), " is never waited for");
    }
  }

  const Graph& graph_;
  const Plan& plan_;
  Findings& findings_;
  std::vector<bool> is_fused_;     // per operation: a sum that has no instance
  std::vector<bool> is_producer_;  // per operation: a sum is fused into it
};

}  // namespace

void check_form(const Graph& graph, const Plan& plan, Findings& findings) {
  FormCheck(graph, plan, findings).run();
}

}  // namespace splitkern::memory::validation
