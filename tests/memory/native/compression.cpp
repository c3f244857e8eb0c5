// Checks of compression in graph, planner and validator: only what was measured is compressed, and counted with it; the
// host has room for the worst case.
#include "memory/compression.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "memory/errors.h"
#include "memory/graph_json.h"
#include "memory/liveness.h"
#include "memory/native/graphs.h"
#include "memory/plan_json.h"
#include "memory/planner.h"
#include "memory/schedule.h"
#include "memory/simulator.h"
#include "memory/storage_assignment.h"
#include "memory/strategies/strategy.h"
#include "memory/validator.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

Graph step() {
  graphs::Net net;
  net.batch = 4;
  net.rows = net.columns = 32;
  net.flops_per_us = 1e4;  // slow enough for the link to hide something
  return graphs::training_step(net);
}

Graph measured(Graph graph, double ratio, int32_t element_bytes = 4) {
  for (Storage& storage : graph.storages) {
    if (storage.kind == StorageKind::kActivation && storage.size_bytes % element_bytes == 0)
      storage.compression = Compression{ratio, element_bytes};
  }
  return graph;
}

// A link that is the bottleneck, and a budget that needs it.
Limits tight(const Graph& graph) {
  const Plan kept = plan(graph, {}, {.strategy = "none"});
  return {.device_bytes = kept.predicted.parameters_peak_bytes + kept.predicted.device_peak_bytes * 6 / 10,
          .offload_gbps = 5,
          .prefetch_gbps = 5,
          .copy_latency_us = 0.1};
}

int64_t compressed_copies(const Plan& plan) {
  return std::ranges::count_if(plan.copies, &Copy::compressed);
}

Plan proven(const Graph& graph, const Limits& limits, const std::string& strategy = "hmms-paper") {
  Plan made = plan(graph, limits, {.strategy = strategy});
  validate(graph, made);
  const Timeline timeline = simulate(graph, made);
  check::require(std::abs(timeline.step_us - made.predicted.step_us) <= 1e-6 * timeline.step_us,
                 strategy + ": the predicted step is the simulated one");
  return made;
}

}  // namespace

CHECK_NAMED(compression_only_measured, "compression: only what was measured, by a margin, is compressed") {
  const Graph plain = step();
  Limits limits = tight(plain);
  limits.device_bytes = kUnlimited;
  for (const std::string strategy : {"layerwise", "hmms-paper"}) {
    const Plan before = proven(plain, limits, strategy);
    check::require(!before.copies.empty(), strategy + " copies something");
    check::equal(compressed_copies(before), 0, strategy + ": compressed copies without a measurement");
    // The margin.
    check::equal(compressed_copies(proven(measured(plain, 1.1), limits, strategy)), 0, strategy + " at 1.1");
    const Plan all = proven(measured(plain, kLeastCompressionRatio), limits, strategy);
    check::equal(compressed_copies(all), std::ssize(all.copies), strategy + " at the least ratio");
    // A slot of 8 bytes is no place for a compressed buffer.
    Limits unaligned = limits;
    unaligned.alignment_bytes = 8;
    check::equal(compressed_copies(proven(measured(plain, 2), unaligned, strategy)), 0, strategy + ", unaligned");
  }
  // One storage alone.
  Graph one = plain;
  const Plan before = proven(plain, limits, "layerwise");
  const int32_t planned = before.copies[0].storage;
  for (const int32_t member : before.storages[static_cast<size_t>(planned)].members)
    one.storages[static_cast<size_t>(member)].compression = Compression{2, 4};
  const Plan after = proven(one, limits, "layerwise");
  for (const Copy& copy : after.copies)
    check::equal(copy.compressed, copy.storage == planned, "whether a copy of storage " + std::to_string(copy.storage));
}

CHECK_NAMED(compression_counts, "compression: the link carries less, the host slot takes the worst case") {
  const Graph plain = step();
  const Graph graph = measured(plain, 2);
  Limits limits = tight(plain);
  check::require(
      proven(graph, limits, "default").predicted.step_us <= proven(plain, limits, "default").predicted.step_us,
      "the default is no slower with fewer bytes");
  limits.device_bytes = kUnlimited;
  const Plan slow = proven(plain, limits, "layerwise");
  const Plan fast = proven(graph, limits, "layerwise");
  check::require(fast.predicted.step_us < slow.predicted.step_us,
                 "with half the bytes " + std::to_string(fast.predicted.step_us) + " us, without " +
                     std::to_string(slow.predicted.step_us));
  const Liveness live = analyse(graph, assign_storages(graph), limits);
  Scheduler scheduler(graph, live, limits);
  const Problem problem{.graph = graph, .live = live, .limits = limits, .device_bytes = kUnlimited};
  const Schedule& schedule =
      scheduler.run(layerwise_decisions(problem), CopyPolicy::kLayerwise, kUnlimited, kUnlimited);
  check::require(std::abs(schedule.step_us - fast.predicted.step_us) <= 1e-6 * schedule.step_us,
                 "decisions rest on the same times: " + std::to_string(schedule.step_us) + " us");
  check::equal(schedule.host_live_bytes, fast.predicted.host_lower_bound_bytes, "live bytes on the host");
  const Timeline timeline = simulate(graph, fast);
  int64_t seen = 0;
  for (size_t index = 0; index < fast.copies.size(); ++index) {
    const Copy& copy = fast.copies[index];
    if (!copy.compressed) continue;
    ++seen;
    const PlanStorage& storage = fast.storages[static_cast<size_t>(copy.storage)];
    const auto size_bytes = static_cast<double>(storage.size_bytes);
    check::require(storage.compression == Compression{2, 4}, "the storage says how it was measured");
    const double copied_us = timeline.copies[index].end_us - timeline.copies[index].begin_us;
    check::require(std::abs(copied_us - (0.1 + size_bytes / 2 / 5e3)) < 1e-6, "duration of a copy");
    const Residency& host =
        fast.residencies[static_cast<size_t>(copy.kind == CopyKind::kOffload ? copy.destination : copy.source)];
    // Header, a bit for each element in whole slots of 4096 bytes, and the elements.
    const int64_t room = 128 + (storage.size_bytes + 4095) / 4096 * 128 + (storage.size_bytes + 15) / 16 * 16;
    check::equal(host.size_bytes, (room + 511) / 512 * 512, "bytes of the host slot");
  }
  check::require(seen > 0, "there are compressed copies");
}

CHECK_NAMED(compression_host_budget, "compression: where its slots do not fit the host, plain ones may") {
  const Graph plain = step();
  Limits limits = tight(plain);
  limits.device_bytes = kUnlimited;
  const Plan before = proven(plain, limits, "layerwise");
  limits.host_bytes = before.predicted.host_peak_bytes;
  const Plan after = proven(measured(plain, 2), limits, "layerwise");
  check::equal(compressed_copies(after), 0, "compressed copies");
  check::require(after.predicted.host_peak_bytes <= limits.host_bytes, "the host budget is kept");
  limits.host_bytes = before.predicted.host_peak_bytes - 512;
  check::refuses([&] { plan(measured(plain, 2), limits, {.strategy = "layerwise"}); },
                 {"host", std::to_string(before.predicted.host_peak_bytes)});
}

CHECK_NAMED(compression_proof, "compression: the validator refuses compressed copies that are not measured or fit") {
  const Graph graph = measured(step(), 2);
  Limits limits = tight(graph);
  limits.device_bytes = kUnlimited;
  const Plan right = proven(graph, limits, "layerwise");
  const Copy& first = right.copies[0];
  const auto storage = static_cast<size_t>(first.storage);
  const auto host = static_cast<size_t>(first.destination);
  const auto refused = [&](const std::string& name, const std::function<void(Plan&)>& change) {
    Plan plan = right;
    change(plan);
    const std::vector<Violation> found = find_violations(graph, plan);
    check::require(!found.empty() && found[0].reason == Reason::kCompressed,
                   name + ": " + (found.empty() ? "accepted" : found[0].text));
  };
  refused("no compression", [&](Plan& plan) { plan.storages[storage].compression.reset(); });
  refused("another ratio", [&](Plan& plan) { plan.storages[storage].compression->ratio = 3; });
  refused("other elements", [&](Plan& plan) { plan.storages[storage].compression->element_bytes = 8; });
  refused("out compressed, back plain", [&](Plan& plan) {
    for (Copy& copy : plan.copies)
      if (copy.kind == CopyKind::kPrefetch && copy.storage == first.storage) copy.compressed = false;
  });
  refused("no room", [&](Plan& plan) {
    plan.residencies[host].size_bytes = right.storages[storage].size_bytes / 512 * 512 + 512;
  });
  Graph other = graph;
  for (Storage& one : other.storages) one.compression.reset();
  Plan unmeasured = right;
  unmeasured.graph_fingerprint = fingerprint(other);
  check::refuses([&] { validate(other, unmeasured); }, {"compress", "measured"});
}

CHECK_NAMED(compression_of_graphs, "compression: rules, fingerprint and text of a graph with measurements") {
  const Graph plain = step();
  const Graph graph = measured(plain, 2);
  require_valid(graph);
  check::require(fingerprint(graph) != fingerprint(plain), "a measurement changes the fingerprint");
  check::require(fingerprint(graph) != fingerprint(measured(plain, 2.5)), "so does another ratio");
  check::require(fingerprint(graph) != fingerprint(measured(plain, 2, 2)), "and another element size");
  check::require(to_json(plain).find("\"version\": 1,") != std::string::npos, "without a measurement it is version 1");
  check::require(to_json(graph).find("\"version\": 2,") != std::string::npos, "with one it is version 2");
  check::require(graph_from_json(to_json(graph)) == graph, "it reads back equal");
  Limits limits = tight(graph);
  const Plan made = proven(graph, limits, "default");
  check::require(plan_from_json(to_json(made)) == made, "so does its plan");

  const auto refused = [&](const std::function<void(Compression&, Storage&)>& change,
                           const std::vector<std::string>& parts) {
    Graph broken = plain;
    Storage& storage = broken.storages.back();
    storage.compression = Compression{2, 4};
    change(*storage.compression, storage);
    check::refuses([&] { require_valid(broken); }, parts);
  };
  refused([](Compression& c, Storage&) { c.ratio = 0; }, {"compression.ratio", "above 0", "0"});
  refused([](Compression& c, Storage&) { c.ratio = NAN; }, {"compression.ratio", "nan"});
  refused([](Compression& c, Storage&) { c.element_bytes = 3; }, {"compression.element_bytes", "1, 2, 4 or 8", "3"});
  refused([](Compression&, Storage& s) { s.size_bytes += 1; }, {"compression.element_bytes", "divide", "4"});
  check::refuses(
      [] { graph_from_json(R"({"format":"splitkern.graph","version":2,"storages":[{"compression":{"rate":2}}]})"); },
      {"rate"});
}
