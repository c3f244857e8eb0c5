// Checks of the step simulator: times of small plans, worked out by hand.
#include "memory/simulator.h"

#include <cmath>

#include "native/check.h"

using namespace splitkern::memory;

namespace {

void near(double actual, double expected, const std::string& what) {
  check::require(std::abs(actual - expected) < 1e-9,
                 what + " is " + std::to_string(actual) + ", expected " + std::to_string(expected));
}

Graph operations(std::initializer_list<double> durations_us) {
  Graph graph;
  for (double duration_us : durations_us) {
    Operation operation;
    operation.name = "operation " + std::to_string(graph.operations.size());
    operation.duration_us = duration_us;
    graph.operations.push_back(std::move(operation));
  }
  return graph;
}

// One instance per operation, one storage of 4,000 bytes: 4 µs out, 2 µs back, and 1 µs of latency each.
Plan plan_of(const Graph& graph) {
  Plan plan;
  plan.limits = {.offload_gbps = 1, .prefetch_gbps = 2, .copy_latency_us = 1};
  plan.storages = {{.size_bytes = 4000, .members = {0}}};
  for (size_t index = 0; index < graph.operations.size(); ++index)
    plan.instances.push_back({.operation = static_cast<int32_t>(index)});
  plan.boundaries.resize(graph.operations.size() + 1);
  return plan;
}

void copy(Plan& plan, CopyKind kind, int32_t issue, int32_t wait, std::vector<int32_t> after = {}) {
  const int32_t index = static_cast<int32_t>(plan.copies.size());
  plan.copies.push_back({.kind = kind, .issue = issue, .wait = wait, .after = std::move(after)});
  plan.boundaries[issue].issues.push_back(index);
  plan.boundaries[wait].waits.push_back(index);
}

}  // namespace

CHECK_NAMED(simulator_streams, "simulator: three streams in order, waits before issues") {
  const Graph graph = operations({10, 2, 10});
  Plan plan = plan_of(graph);
  copy(plan, CopyKind::kOffload, 1, 3);   // 10 to 15
  copy(plan, CopyKind::kOffload, 1, 2);   // behind it on the stream, 15 to 20
  copy(plan, CopyKind::kPrefetch, 1, 3);  // beside them, 10 to 13
  const Timeline timeline = simulate(graph, plan);
  near(timeline.copies[0].begin_us, 10, "begin of the first offload");
  near(timeline.copies[0].end_us, 15, "its end");
  near(timeline.copies[1].begin_us, 15, "begin of the second");
  near(timeline.copies[1].end_us, 20, "its end");
  near(timeline.copies[2].end_us, 13, "end of the prefetch");
  near(timeline.stalls_us[2], 8, "stall at boundary 2");
  near(timeline.instances[2].begin_us, 20, "begin of the last instance");
  near(timeline.step_us, 30, "step");
  near(timeline.compute_us, 22, "compute");
  near(timeline.stall_us, 8, "stall");
}

CHECK_NAMED(simulator_issue_after_wait, "simulator: a copy begins after what its boundary waits for") {
  const Graph graph = operations({10, 1, 10});
  Plan plan = plan_of(graph);
  copy(plan, CopyKind::kOffload, 1, 2);   // 10 to 15: waited for from 11 to 15
  copy(plan, CopyKind::kPrefetch, 2, 3);  // issued behind that wait: 15 to 18
  const Timeline timeline = simulate(graph, plan);
  near(timeline.copies[1].begin_us, 15, "begin of the prefetch");
  near(timeline.step_us, 25, "step");
}

CHECK_NAMED(simulator_after, "simulator: a copy begins after copies of the other stream") {
  const Graph graph = operations({10, 1, 10});
  Plan plan = plan_of(graph);
  copy(plan, CopyKind::kOffload, 1, 3);
  copy(plan, CopyKind::kPrefetch, 1, 3, {0});
  near(simulate(graph, plan).copies[1].begin_us, 15, "begin of the prefetch");
}

CHECK_NAMED(simulator_recomputation, "simulator: recomputations are counted apart, a wait at the end delays the step") {
  const Graph graph = operations({10, 1});
  Plan plan = plan_of(graph);
  plan.instances = {{.operation = 0}, {.operation = 1}, {.operation = 0, .is_recomputation = true}};
  plan.boundaries.resize(4);
  copy(plan, CopyKind::kOffload, 2, 3);
  copy(plan, CopyKind::kOffload, 2, 3);
  const Timeline timeline = simulate(graph, plan);
  near(timeline.compute_us, 11, "compute");
  near(timeline.recompute_us, 10, "recomputation");
  near(timeline.step_us, 21, "step");
  plan.limits.offload_gbps = 0.5;
  near(simulate(graph, plan).step_us, 29, "step that waits at its end");
}

CHECK_NAMED(simulator_refusals, "simulator: what is refused") {
  const Graph graph = operations({10, 1});
  const Plan good = plan_of(graph);
  const auto refuses = [&](void (*spoil)(Plan&), const std::vector<std::string>& parts) {
    Plan plan = good;
    copy(plan, CopyKind::kOffload, 0, 1);
    spoil(plan);
    check::refuses([&] { simulate(graph, plan); }, parts);
  };
  refuses([](Plan& plan) { plan.boundaries.pop_back(); }, {"3 boundaries", "got 2"});
  refuses([](Plan& plan) { plan.boundaries[0].issues.clear(); }, {"boundary 1", "copy 0", "issued"});
  refuses([](Plan& plan) { plan.boundaries[0].issues[0] = 7; }, {"boundary 0", "copy 7", "there are 1"});
  refuses([](Plan& plan) { plan.boundaries[1].waits[0] = -1; }, {"boundary 1", "copy -1"});
  refuses([](Plan& plan) { plan.copies[0].storage = 3; }, {"storage 3"});
  refuses([](Plan& plan) { plan.copies[0].after = {0}; }, {"copy 0", "not issued earlier"});
  refuses([](Plan& plan) { plan.copies[0].after = {9}; }, {"copy 9"});
  refuses([](Plan& plan) { plan.instances[1].operation = 2; }, {"boundary 1", "operation 2", "there are 2"});
  refuses([](Plan& plan) { plan.limits.offload_gbps = 0; }, {"to the host", "no bandwidth"});
}
