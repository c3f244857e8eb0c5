// Checks of liveness and of the scheduler: boundaries and times of small steps, worked out by hand, and its own books
// against those of the simulator.
#include "memory/schedule.h"

#include <algorithm>
#include <cmath>

#include "graphs.h"
#include "memory/liveness.h"
#include "memory/storage_assignment.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

constexpr int64_t kBytes = 1000;

// Forward a1 ... an, each from the one before; backward in reverse order, each step reads its own a and the gradient of
// the step behind it. 10 µs each.
struct Chain {
  explicit Chain(int length) : builder("chain") {
    int32_t value = builder.value("images", kBytes, StorageKind::kInput);
    for (int index = 1; index <= length; ++index) {
      const int32_t next = builder.value("a" + std::to_string(index), kBytes);
      builder.operation("f" + std::to_string(index), "aten.f", {value}, {next}, 10);
      values.push_back(next);
      value = next;
    }
    int32_t gradient = -1;
    for (int index = length; index >= 1; --index) {
      const int32_t next = builder.value("g" + std::to_string(index - 1), kBytes,
                                         index == 1 ? StorageKind::kGradient : StorageKind::kActivation);
      std::vector<int32_t> reads = {values[index - 1]};
      if (gradient >= 0) reads.push_back(gradient);
      builder.operation("b" + std::to_string(index), "aten.b", reads, {next}, 10).is_backward = true;
      gradient = next;
    }
  }

  Liveness liveness(const Limits& limits) const {
    require_valid(builder.graph);
    return analyse(builder.graph, assign_storages(builder.graph), limits);
  }
  int32_t storage(int index) const { return builder.graph.tensors[values[index - 1]].storage; }
  Graph& graph() { return builder.graph; }

  graphs::Builder builder;
  std::vector<int32_t> values;
};

void near(double actual, double expected, const std::string& what) {
  check::require(std::abs(actual - expected) < 1e-9,
                 what + " is " + std::to_string(actual) + ", expected " + std::to_string(expected));
}

std::string names_of(const Graph& graph, const Liveness& live, const Schedule& schedule) {
  std::string names;
  for (const Step& step : schedule.instances) {
    names += (names.empty() ? "" : " ") + graph.operations[live.operations[step.step]].name +
             (step.is_recomputation ? "'" : "");
  }
  return names;
}

void same(const std::string& actual, const std::string& expected) {
  check::require(actual == expected, "got \"" + actual + "\", expected \"" + expected + "\"");
}

std::string episodes_of(const Schedule& schedule, int32_t storage) {
  std::string text;
  for (const Episode& episode : schedule.episodes) {
    if (episode.storage == storage)
      text += "[" + std::to_string(episode.begin) + "," + std::to_string(episode.end) + ")";
  }
  return text;
}

// 5 µs for kBytes at 0.2 GB/s.
Limits limits_of(double gbps) {
  return {.offload_gbps = gbps, .prefetch_gbps = gbps, .alignment_bytes = 1};
}

}  // namespace

CHECK_NAMED(schedule_keep, "schedule: everything kept") {
  Chain chain(3);
  const Limits limits = limits_of(0);
  const Liveness live = chain.liveness(limits);
  check::equal(live.turn, 3, "turn");
  check::equal(live.resident_bytes, 2 * kBytes, "resident bytes");
  Scheduler scheduler(chain.graph(), live, limits);
  const std::vector<Decision> keep(live.storages(), Decision::kKeep);
  const Schedule& schedule = scheduler.run(keep, CopyPolicy::kBudget, 4 * kBytes, 0);
  check::require(schedule.feasible, "it fits 4 values");
  check::equal(schedule.device_live_bytes, 4 * kBytes, "live bytes");
  same(episodes_of(schedule, chain.storage(1)), "[0,6)");
  same(episodes_of(schedule, chain.storage(3)), "[2,4)");
  near(schedule.step_us, 60, "step");
  const Schedule& short_of = scheduler.run(keep, CopyPolicy::kBudget, 4 * kBytes - 1, 0);
  check::require(!short_of.feasible, "and no byte less");
  check::equal(short_of.shortage_bytes, 1, "shortage");
  check::equal(short_of.short_at, 3, "where");
}

CHECK_NAMED(schedule_recompute,
            "schedule: what is computed again comes right before its reader, with all that it needs") {
  Chain chain(4);
  const Limits limits = limits_of(0);
  const Liveness live = chain.liveness(limits);
  Scheduler scheduler(chain.graph(), live, limits);
  std::vector<Decision> decisions(live.storages(), Decision::kKeep);
  decisions[chain.storage(2)] = Decision::kRecompute;
  const Schedule& one = scheduler.run(decisions, CopyPolicy::kBudget, kUnlimited, 0);
  same(names_of(chain.graph(), live, one), "f1 f2 f3 f4 b4 b3 f2' b2 b1");
  same(episodes_of(one, chain.storage(2)), "[1,3)[6,8)");
  near(one.recompute_us, 10, "recomputation");
  near(one.step_us, 90, "step");

  decisions[chain.storage(1)] = Decision::kRecompute;
  decisions[chain.storage(3)] = Decision::kRecompute;
  const Schedule& chained = scheduler.run(decisions, CopyPolicy::kBudget, kUnlimited, 0);
  same(names_of(chain.graph(), live, chained), "f1 f2 f3 f4 b4 f1' f2' f3' b3 b2 b1");
  same(episodes_of(chained, chain.storage(1)), "[0,2)[5,11)");
  same(episodes_of(chained, chain.storage(3)), "[2,4)[7,9)");
}

CHECK_NAMED(schedule_transients, "schedule: an operand that nothing saves is computed again too, and goes at once") {
  // a = h(t), t = f(images): t dies in the forward pass.
  graphs::Builder builder;
  const int32_t images = builder.value("images", kBytes, StorageKind::kInput);
  const int32_t transient = builder.value("t", kBytes);
  const int32_t saved = builder.value("a", kBytes);
  const int32_t last = builder.value("z", kBytes);
  const int32_t gradient = builder.value("g", kBytes, StorageKind::kGradient);
  builder.operation("f", "aten.f", {images}, {transient}, 10);
  builder.operation("h", "aten.h", {transient}, {saved}, 10);
  builder.operation("z", "aten.z", {saved}, {last}, 10);
  builder.operation("b", "aten.b", {saved, last}, {gradient}, 10).is_backward = true;
  const Limits limits = limits_of(0);
  const Liveness live = analyse(builder.graph, assign_storages(builder.graph), limits);
  const int32_t a = builder.graph.tensors[saved].storage;
  near(live.recompute_us[a], 20, "cost with the operand");
  Scheduler scheduler(builder.graph, live, limits);
  std::vector<Decision> decisions(live.storages(), Decision::kKeep);
  decisions[a] = Decision::kRecompute;
  const Schedule& schedule = scheduler.run(decisions, CopyPolicy::kBudget, kUnlimited, 0);
  same(names_of(builder.graph, live, schedule), "f h z f' h' b");
  same(episodes_of(schedule, builder.graph.tensors[transient].storage), "[0,2)[3,5)");

  // With f random there is no way back.
  builder.graph.operations[0].is_random = true;
  const Liveness random = analyse(builder.graph, assign_storages(builder.graph), limits);
  check::require(!random.recomputable[a] && random.recomputable[builder.graph.tensors[last].storage],
                 "a cannot be computed again, z can");
}

CHECK_NAMED(schedule_no_repetition, "schedule: what updates a buffer is not repeated") {
  graphs::Net net;
  net.layers = {{}, {}};
  net.batch_norm_mutates = true;
  const Graph graph = graphs::training_step(net);
  const Liveness live = analyse(graph, assign_storages(graph), {});
  for (int32_t step = 0; step < live.steps(); ++step) {
    const Operation& operation = graph.operations[live.operations[step]];
    if (operation.mutates.empty()) continue;
    check::require(!live.repeatable[step], operation.name + " is not repeatable");
    for (const Access& access : live.accesses[step])
      check::require(!access.writes || !live.recomputable[access.storage], "nor is what it writes");
  }
  net.batch_norm_mutates = false;
  const Graph apart = graphs::training_step(net);
  const Liveness can = analyse(apart, assign_storages(apart), {});
  check::require(std::ranges::any_of(can.recomputable, [](char is) { return is != 0; }), "apart, it is");
}

CHECK_NAMED(schedule_joined, "schedule: what a later write of the storage spoils cannot be read again") {
  // f reads x, then x is overwritten in place by r, whose result y is saved in the same planned storage.
  graphs::Builder builder;
  const int32_t images = builder.value("images", kBytes, StorageKind::kInput);
  const int32_t x = builder.value("x", kBytes);
  const int32_t from_x = builder.value("from x", kBytes);
  const int32_t y = builder.value("y", kBytes);
  const int32_t z = builder.value("z", kBytes);
  const int32_t gradient = builder.value("g", kBytes, StorageKind::kGradient);
  builder.operation("x", "aten.x", {images}, {x}, 10);
  builder.operation("f", "aten.f", {x}, {from_x}, 10);
  builder.operation("r", "relu", {x}, {y}, 10);
  builder.may_overwrite({0});
  builder.operation("z", "aten.z", {y, from_x}, {z}, 10);
  builder.operation("b", "aten.b", {y, from_x, z}, {gradient}, 10).is_backward = true;
  const Limits limits = limits_of(0);
  const Liveness live = analyse(builder.graph, assign_storages(builder.graph), limits);
  const int32_t shared = live.assignment.storage_of[builder.graph.tensors[y].storage];
  check::equal(live.assignment.storage_of[builder.graph.tensors[x].storage], shared, "storage of x and y");
  const int32_t spoiled = live.assignment.storage_of[builder.graph.tensors[from_x].storage];
  check::require(!live.recomputable[spoiled], "x is gone when f would run again");
  check::require(live.recomputable[shared], "x and y themselves can be computed again");
  Scheduler scheduler(builder.graph, live, limits);
  std::vector<Decision> decisions(live.storages(), Decision::kKeep);
  decisions[shared] = Decision::kRecompute;
  same(names_of(builder.graph, live, scheduler.run(decisions, CopyPolicy::kBudget, kUnlimited, 0)), "x f r z x' r' b");
}

CHECK_NAMED(schedule_offload, "schedule: an offload leaves when it is final, the prefetch arrives just in time") {
  Chain chain(3);
  const auto transfer_at = [&](double gbps, double step_us) {
    const Limits limits = limits_of(gbps);
    const Liveness live = chain.liveness(limits);
    Scheduler scheduler(chain.graph(), live, limits);
    std::vector<Decision> decisions(live.storages(), Decision::kKeep);
    decisions[chain.storage(1)] = Decision::kOffload;
    const Schedule& schedule = scheduler.run(decisions, CopyPolicy::kBudget, kUnlimited, kUnlimited);
    check::require(schedule.feasible, "feasible");
    near(schedule.step_us, step_us, "step at " + std::to_string(gbps) + " GB/s");
    check::equal(schedule.transfers.size(), 1, "transfers");
    const Transfer& transfer = schedule.transfers[0];
    return std::to_string(transfer.offload_issue) + " " + std::to_string(transfer.offload_wait) + " " +
           std::to_string(transfer.prefetch_issue) + " " + std::to_string(transfer.prefetch_wait);
  };
  // a1 is written by instance 0, read by 1, needed by 5 at 50 µs. 5 µs: offloaded from 10 to 15, back from 40 to 45.
  same(transfer_at(0.2, 60), "1 2 4 5");
  // 20 µs: from 10 to 30, back from 30 to 50.
  same(transfer_at(0.05, 60), "1 3 3 5");
  // 50 µs: out at 60, waited for at boundary 4 from 40 on; back at 110, when instance 4 has ended at 70.
  same(transfer_at(0.02, 120), "1 4 4 5");
}

CHECK_NAMED(schedule_budget, "schedule: bytes that are needed are waited for, a prefetch waits for room") {
  Chain chain(4);
  // Offloads take 20 µs each. Steps: f1 f2 f3 f4 b4 b3 b2 b1.
  const Limits limits = limits_of(0.05);
  const Liveness live = chain.liveness(limits);
  Scheduler scheduler(chain.graph(), live, limits);
  std::vector<Decision> decisions(live.storages(), Decision::kKeep);
  decisions[chain.storage(1)] = decisions[chain.storage(2)] = Decision::kOffload;
  // Unlimited: a1 out from 10 to 30, a2 from 30 to 50; from 50 on both come back, needed at 70 and 60.
  const Schedule free = scheduler.run(decisions, CopyPolicy::kBudget, kUnlimited, kUnlimited);
  near(free.step_us, 100, "step without a budget");
  // Boundary 5: a3, the gradients on both sides, and a2 on its way back.
  check::equal(free.least_device_bytes, 4 * kBytes, "least bytes");
  const Schedule& tight = scheduler.run(decisions, CopyPolicy::kBudget, free.least_device_bytes, kUnlimited);
  check::require(tight.feasible && tight.device_live_bytes <= 4 * kBytes, "it keeps the budget");
  check::require(tight.step_us >= free.step_us, "and is no faster");
  check::equal(tight.host_live_bytes, 2 * kBytes, "bytes on the host");
  const Schedule& host = scheduler.run(decisions, CopyPolicy::kBudget, kUnlimited, 2 * kBytes - 1);
  check::require(!host.feasible && host.short_on_host && host.shortage_bytes == 1, "the host is one byte short");
}

CHECK_NAMED(schedule_layerwise, "schedule: layer by layer, offload and prefetch beside one layer each") {
  Chain chain(4);
  for (Operation& operation : chain.graph().operations) operation.module = operation.name;
  const Limits limits = limits_of(0.05);  // 20 µs
  const Liveness live = chain.liveness(limits);
  Scheduler scheduler(chain.graph(), live, limits);
  std::vector<Decision> decisions(live.storages(), Decision::kKeep);
  decisions[chain.storage(1)] = Decision::kOffload;
  const Schedule& schedule = scheduler.run(decisions, CopyPolicy::kLayerwise, kUnlimited, kUnlimited);
  // f2 reads a1 last: out beside it, 10 to 30, so f3 starts 10 µs late; b1 is instance 7, back beside b2.
  const Transfer& transfer = schedule.transfers[0];
  check::equal(transfer.offload_issue, 1, "issue of the offload");
  check::equal(transfer.offload_wait, 2, "wait for it");
  check::equal(transfer.prefetch_issue, 6, "issue of the prefetch");
  check::equal(transfer.prefetch_wait, 7, "wait for it");
  near(schedule.step_us, 80 + 10 + 10, "step");
}

CHECK_NAMED(schedule_hidden,
            "schedule: the paper's offloads end where the link has had its time, whatever the budget") {
  Chain chain(4);
  const Limits limits = limits_of(0.05);  // 20 µs
  const Liveness live = chain.liveness(limits);
  Scheduler scheduler(chain.graph(), live, limits);
  std::vector<Decision> decisions(live.storages(), Decision::kKeep);
  decisions[chain.storage(1)] = decisions[chain.storage(2)] = Decision::kOffload;
  const Schedule& schedule = scheduler.run(decisions, CopyPolicy::kHidden, kUnlimited, kUnlimited);
  check::equal(schedule.transfers[0].offload_wait, 3, "end of the first offload, 30 µs");
  check::equal(schedule.transfers[1].offload_wait, 5, "end of the second, 50 µs");
  // Needed at boundaries 7 (70 µs) and 6: back from 50 to 70, and from 30 to 50 before that, but out only at 5.
  check::equal(schedule.transfers[0].prefetch_issue, 5, "issue of the first prefetch");
  check::equal(schedule.transfers[1].prefetch_issue, 5, "issue of the second");
  near(schedule.step_us, 80 + 10 + 10, "step");
}
