// Checks of the validator on one plan that uses everything: copies, a recomputation, an in-place chain, a fused sum,
// workspace, a mutation. Every mutant of it is refused with its reason, and the brute-force judge agrees.
#include "memory/validator.h"

#include <functional>
#include <string>
#include <vector>

#include "memory/native/interpreter.h"
#include "memory/native/random_plans.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

constexpr int64_t kBytes = 16;

// Indices of the graph's storages and of the tensors, which are the whole storages.
enum : int32_t { kWeight, kImages, kMean, kA, kB, kC, kD, kLoss, kFirst, kProduct, kGrad };
enum : int32_t { kConv, kRelu, kNorm, kRelu2, kLossOp, kBack, kBack2, kSum };

Graph small_step() {
  Graph graph;
  const auto add_storage = [&](const char* name, StorageKind kind, bool is_output = false) {
    graph.storages.push_back({name, kBytes, kind, is_output});
    Tensor tensor;
    tensor.name = name;
    tensor.storage = static_cast<int32_t>(graph.storages.size()) - 1;
    tensor.sizes = {4};
    tensor.strides_bytes = {4};
    tensor.element_bytes = 4;
    graph.tensors.push_back(tensor);
  };
  add_storage("weight", StorageKind::kParameter);
  add_storage("images", StorageKind::kInput);
  add_storage("running_mean", StorageKind::kParameter);
  add_storage("a", StorageKind::kActivation);
  add_storage("b", StorageKind::kActivation);
  add_storage("c", StorageKind::kActivation);
  add_storage("d", StorageKind::kActivation);
  add_storage("loss", StorageKind::kActivation, true);
  add_storage("first", StorageKind::kActivation);
  add_storage("product", StorageKind::kActivation);
  add_storage("grad", StorageKind::kGradient);
  const auto add = [&](const char* name, std::vector<int32_t> reads, std::vector<int32_t> writes) -> Operation& {
    Operation operation;
    operation.name = name;
    operation.target = name;
    operation.duration_us = 10;
    operation.reads = std::move(reads);
    operation.writes = std::move(writes);
    graph.operations.push_back(operation);
    return graph.operations.back();
  };
  add("conv", {kImages, kWeight}, {kA});
  add("relu", {kA}, {kB}).inplace = {{0, 0}};
  add("norm", {kB, kMean}, {kC, kMean}).mutates = {1};
  add("relu2", {kC}, {kD}).inplace = {{0, 0}};
  add("loss", {kD}, {kLoss}).workspace_bytes = 24;
  add("back", {kLoss, kB}, {kFirst});
  add("back2", {kLoss, kA}, {kProduct}).accumulates = {0};
  add("sum", {kFirst, kProduct}, {kGrad}).is_sum = true;
  return graph;
}

// Planned storages, and residencies.
enum : int32_t { kPWeight, kPImages, kPMean, kPA, kPB, kPChain, kPLoss, kPGrad };
enum : int32_t { kRWeight, kRImages, kRMean, kRGrad, kRA1, kRA2, kRAHost, kRB1, kRB2, kRChain, kRLoss, kRWorkspace };

// Instances: conv relu norm relu2 loss relu-again back back2. `a` is offloaded under relu and norm, and comes back for
// the second relu; b is dropped and made again.
Plan full_plan(const Graph& graph) {
  Plan plan;
  plan.graph_fingerprint = fingerprint(graph);
  plan.limits = {.device_bytes = 200, .host_bytes = 16, .offload_gbps = 1, .prefetch_gbps = 1, .alignment_bytes = 16};
  for (const std::vector<int32_t>& members : std::vector<std::vector<int32_t>>{
           {kWeight}, {kImages}, {kMean}, {kA}, {kB}, {kC, kD}, {kLoss}, {kFirst, kProduct, kGrad}})
    plan.storages.push_back({kBytes, members});
  plan.fused = {{kSum, kBack2}};
  plan.instances = {{kConv, false, false},   {kRelu, false, false}, {kNorm, false, false}, {kRelu2, false, false},
                    {kLossOp, false, false}, {kRelu, true, false},  {kBack, false, false}, {kBack2, false, true}};
  plan.residencies = {
      {kPWeight, Pool::kParameters, 0, 16, 0, 8},
      {kPImages, Pool::kParameters, 16, 16, 0, 8},
      {kPMean, Pool::kParameters, 32, 16, 0, 8},
      {kPGrad, Pool::kParameters, 48, 16, 0, 8},
      {kPA, Pool::kDevice, 0, 16, 0, 3},
      {kPA, Pool::kDevice, 0, 16, 3, 8},
      {kPA, Pool::kHost, 0, 16, 1, 5},
      {kPB, Pool::kDevice, 16, 16, 1, 3},
      {kPB, Pool::kDevice, 32, 16, 5, 7},
      {kPChain, Pool::kDevice, 32, 16, 2, 5},
      {kPLoss, Pool::kDevice, 16, 16, 4, 8},
      {-1, Pool::kDevice, 48, 32, 4, 5},
  };
  plan.copies = {{CopyKind::kOffload, kPA, kRA1, kRAHost, 1, 3, {}},
                 {CopyKind::kPrefetch, kPA, kRAHost, kRA2, 3, 5, {}}};
  plan.boundaries.resize(9);
  plan.boundaries[1].issues = {0};
  plan.boundaries[3] = {.waits = {0}, .issues = {1}};
  plan.boundaries[5].waits = {1};
  random_plans::predict(plan);
  return plan;
}

// The prefetch is issued before the compute stream has waited for the offload, into other bytes.
Plan early_plan(const Graph& graph) {
  Plan plan = full_plan(graph);
  plan.residencies[kRA2].offset_bytes = 96;
  plan.residencies[kRA2].begin = 2;
  plan.copies[1].issue = 2;
  plan.copies[1].after = {0};
  plan.boundaries[2].issues = {1};
  plan.boundaries[3].issues = {};
  random_plans::predict(plan);
  return plan;
}

void set_wait(Plan& plan, int32_t copy, int32_t boundary) {
  std::erase(plan.boundaries[plan.copies[copy].wait].waits, copy);
  plan.copies[copy].wait = boundary;
  plan.boundaries[boundary].waits.push_back(copy);
}
void set_issue(Plan& plan, int32_t copy, int32_t boundary) {
  std::erase(plan.boundaries[plan.copies[copy].issue].issues, copy);
  plan.copies[copy].issue = boundary;
  plan.boundaries[boundary].issues.push_back(copy);
}

struct Mutant {
  const char* name;
  std::function<void(Plan&)> change;
  Reason reason;
  std::vector<std::string> parts;  // of the text
  bool keep_figures = false;       // the predicted bytes stay what they were
};

void require_refused(const Graph& graph, const Plan& base, const std::vector<Mutant>& mutants) {
  check::require(find_violations(graph, base).empty(), "the plan itself is refused");
  check::require(interpreter::judge(graph, base, 1).is_valid, "the judge refuses the plan itself");
  for (const Mutant& mutant : mutants) {
    Plan plan = base;
    mutant.change(plan);
    if (!mutant.keep_figures) random_plans::predict(plan);
    const std::vector<Violation> found = find_violations(graph, plan);
    check::require(!found.empty(), std::string(mutant.name) + ": accepted");
    check::require(found.size() == 1, std::string(mutant.name) + ": more than one violation");
    check::require(found[0].reason == mutant.reason,
                   std::string(mutant.name) + ": refused for \"" + std::string(to_string(found[0].reason)) +
                       "\", expected \"" + std::string(to_string(mutant.reason)) + "\": " + found[0].text);
    for (const std::string& part : mutant.parts) {
      check::require(found[0].text.find(part) != std::string::npos,
                     std::string(mutant.name) + ": \"" + found[0].text + "\" lacks \"" + part + "\"");
    }
    check::require(!interpreter::judge(graph, plan, 1).is_valid, std::string(mutant.name) + ": the judge accepts it");
  }
}

}  // namespace

CHECK_NAMED(validator_accepts, "validator: accepts plans with copies, repetition, chains and fused sums") {
  const Graph graph = small_step();
  validate(graph, full_plan(graph));
  validate(graph, early_plan(graph));
  check::require(interpreter::judge(graph, full_plan(graph), 1).is_valid, "the judge refuses the full plan");
  check::require(interpreter::judge(graph, early_plan(graph), 1).is_valid, "the judge refuses the early plan");
  // What is there to the end may end with the step or say that it lasts.
  Plan plan = full_plan(graph);
  for (const int32_t r : {kRWeight, kRImages, kRMean, kRGrad, kRLoss}) plan.residencies[r].end = 9;
  validate(graph, plan);
}

CHECK_NAMED(validator_form, "validator: refuses wrong form, with the reason") {
  const Graph graph = small_step();
  require_refused(
      graph, full_plan(graph),
      {
          {"other graph",
           [](Plan& p) { p.graph_fingerprint += "0"; },
           Reason::kOtherGraph,
           {"another graph", "fingerprint"}},
          {"limits", [](Plan& p) { p.limits.alignment_bytes = 24; }, Reason::kLimits, {"power of two", "24"}},
          {"negative time", [](Plan& p) { p.predicted.stall_us = -1; }, Reason::kPrediction, {"-1"}},
          {"member out of range",
           [](Plan& p) { p.storages[0].members = {11}; },
           Reason::kIndex,
           {"member 11", "0 to 10"}},
          {"member twice", [](Plan& p) { p.storages[kPB].members = {kB, kA}; }, Reason::kMembership, {"\"a\""}},
          {"member nowhere", [](Plan& p) { p.storages[kPChain].members = {kC}; }, Reason::kMembership, {"\"d\""}},
          {"no members", [](Plan& p) { p.storages.push_back({}); }, Reason::kMembership, {"storage 8"}},
          {"two that are there before",
           [](Plan& p) {
             p.storages[kPWeight].members = {kWeight, kImages};
             p.storages[kPImages].members = {};
             p.storages[kPImages].size_bytes = 0;
           },
           Reason::kMembership,
           {"\"weight\"", "\"images\""}},
          {"storage smaller", [](Plan& p) { p.storages[kPA].size_bytes = 8; }, Reason::kSize, {"storage 3", "16"}},
          {"residency smaller",
           [](Plan& p) { p.residencies[kRA2].size_bytes = 0; },
           Reason::kSize,
           {"residency 5", "16"}},
          {"size unaligned", [](Plan& p) { p.residencies[kRA2].size_bytes = 24; }, Reason::kSize, {"24"}, true},
          {"size overflows",
           [](Plan& p) {
             p.residencies[kRA2].offset_bytes = 32;
             p.residencies[kRA2].size_bytes = INT64_MAX - 15;
           },
           Reason::kSize,
           {"2^63"},
           true},
          {"offset unaligned",
           [](Plan& p) { p.residencies[kRLoss].offset_bytes = 24; },
           Reason::kAlignment,
           {"24", "16"}},
          {"offset negative", [](Plan& p) { p.residencies[kRLoss].offset_bytes = -16; }, Reason::kAlignment, {"-16"}},
          {"operation out of range", [](Plan& p) { p.instances[2].operation = 8; }, Reason::kIndex, {"instance 2"}},
          {"two instances swapped",
           [](Plan& p) { std::swap(p.instances[3], p.instances[4]); },
           Reason::kOrder,
           {"relu2"}},
          {"first run said to be the second",
           [](Plan& p) { std::swap(p.instances[1].is_recomputation, p.instances[5].is_recomputation); },
           Reason::kOrder,
           {"before the first"}},
          {"operation missing", [](Plan& p) { p.instances[7] = {kRelu, true, false}; }, Reason::kOrder, {"back2"}},
          {"operation twice", [](Plan& p) { p.instances[5].is_recomputation = false; }, Reason::kOrder, {"instance 5"}},
          {"mutation again",
           [](Plan& p) { p.instances[5] = {kNorm, true, false}; },
           Reason::kRepetition,
           {"mutating", "norm"}},
          {"sum executed", [](Plan& p) { p.instances[7] = {kSum, false, false}; }, Reason::kFused, {"sum"}},
          {"does not accumulate", [](Plan& p) { p.instances[7].accumulate = false; }, Reason::kFused, {"back2"}},
          {"accumulates without a sum", [](Plan& p) { p.instances[6].accumulate = true; }, Reason::kFused, {"back"}},
          {"fused, no sum", [](Plan& p) { p.fused[0].sum = kLossOp; }, Reason::kFused, {"loss"}},
          {"fused twice", [](Plan& p) { p.fused.push_back(p.fused[0]); }, Reason::kFused, {"twice"}},
          {"fused out of range", [](Plan& p) { p.fused[0].producer = -1; }, Reason::kIndex, {"-1"}},
          {"boundary too many", [](Plan& p) { p.boundaries.emplace_back(); }, Reason::kBoundaries, {"10", "9"}},
          {"wait dropped", [](Plan& p) { p.boundaries[5].waits.clear(); }, Reason::kWait, {"copy 1", "never"}},
          {"wait doubled", [](Plan& p) { p.boundaries[5].waits.push_back(1); }, Reason::kWait, {"once more"}},
          {"wait elsewhere", [](Plan& p) { p.copies[1].wait = 6; }, Reason::kWait, {"boundary 5", "copy 1"}},
          {"wait with its issue", [](Plan& p) { set_wait(p, 1, 3); }, Reason::kWait, {"copy 1"}},
          {"wait out of range", [](Plan& p) { p.boundaries[5].waits = {2}; }, Reason::kIndex, {"copy 2"}},
          {"issue dropped", [](Plan& p) { p.boundaries[3].issues.clear(); }, Reason::kWait, {"copy 1", "not issued"}},
          {"issue doubled", [](Plan& p) { p.boundaries[4].issues.push_back(0); }, Reason::kIssue, {"copy 0"}},
          {"issue elsewhere", [](Plan& p) { p.copies[1].issue = 4; }, Reason::kIssue, {"boundary 3", "copy 1"}},
          {"endpoints swapped",
           [](Plan& p) { std::swap(p.copies[0].source, p.copies[0].destination); },
           Reason::kEndpoints,
           {"copy 0"}},
          {"endpoint of another", [](Plan& p) { p.copies[1].destination = kRB2; }, Reason::kEndpoints, {"copy 1"}},
          {"kind", [](Plan& p) { p.copies[1].kind = CopyKind::kOffload; }, Reason::kEndpoints, {"copy 1"}},
          {"endpoint out of range", [](Plan& p) { p.copies[1].destination = 12; }, Reason::kIndex, {"12"}},
          {"after itself", [](Plan& p) { p.copies[1].after = {1}; }, Reason::kAfter, {"copy 1"}},
          {"after a later one", [](Plan& p) { p.copies[0].after = {1}; }, Reason::kAfter, {"earlier"}},
          {"after out of range", [](Plan& p) { p.copies[1].after = {7}; }, Reason::kIndex, {"7"}},
          {"no link", [](Plan& p) { p.limits.prefetch_gbps = 0; }, Reason::kLink, {"prefetch_gbps"}},
          {"ends before it begins", [](Plan& p) { p.residencies[kRB2].end = 5; }, Reason::kLifetime, {"residency 8"}},
          {"after the step", [](Plan& p) { p.residencies[kRLoss].end = 10; }, Reason::kLifetime, {"[0, 9]"}},
          {"parameter leaves", [](Plan& p) { p.residencies[kRWeight].end = 7; }, Reason::kPool, {"\"weight\""}},
          {"gradient comes late", [](Plan& p) { p.residencies[kRGrad].begin = 6; }, Reason::kPool, {"\"first\""}},
          {"gradient among activations",
           [](Plan& p) {
             p.residencies[kRGrad].pool = Pool::kDevice;
             p.residencies[kRGrad].offset_bytes = 112;
           },
           Reason::kPool,
           {"\"first\""}},
          {"activation among parameters",
           [](Plan& p) {
             p.residencies[kRLoss].pool = Pool::kParameters;
             p.residencies[kRLoss].offset_bytes = 64;
           },
           Reason::kPool,
           {"residency 10"}},
          {"pool out of range",
           [](Plan& p) { p.residencies[kRLoss].pool = static_cast<Pool>(3); },
           Reason::kIndex,
           {"pool 3"},
           true},
          {"workspace missing", [](Plan& p) { p.residencies.pop_back(); }, Reason::kWorkspace, {"24", "instance 4"}},
          {"workspace smaller",
           [](Plan& p) { p.residencies[kRWorkspace].size_bytes = 16; },
           Reason::kWorkspace,
           {"24"}},
          {"workspace longer",
           [](Plan& p) { p.residencies[kRWorkspace].end = 6; },
           Reason::kWorkspace,
           {"one instance"}},
          {"workspace of another",
           [](Plan& p) {
             p.residencies[kRWorkspace].begin = 3;
             p.residencies[kRWorkspace].end = 4;
           },
           Reason::kWorkspace,
           {"instance 4"}},
          {"workspace twice",
           [](Plan& p) {
             p.residencies.push_back(p.residencies[kRWorkspace]);
             p.residencies.back().offset_bytes = 80;
           },
           Reason::kWorkspace,
           {"second"}},
      });
}

CHECK_NAMED(validator_addresses, "validator: refuses overlaps, budgets and figures, with the reason") {
  const Graph graph = small_step();
  require_refused(
      graph, full_plan(graph),
      {
          {"an offset shifted",
           [](Plan& p) { p.residencies[kRLoss].offset_bytes = 32; },
           Reason::kOverlap,
           {"residency 10", "residency 9", "boundary 4"}},
          {"larger than its gap",
           [](Plan& p) { p.residencies[kRA2].size_bytes = 32; },
           Reason::kOverlap,
           {"residency 5"}},
          {"inside a larger one",
           [](Plan& p) {
             p.residencies[kRWorkspace].offset_bytes = 0;
             p.residencies[kRWorkspace].size_bytes = 64;
           },
           Reason::kOverlap,
           {"workspace"}},
          {"ends one boundary later", [](Plan& p) { p.residencies[kRB1].end = 5; }, Reason::kOverlap, {"boundary 4"}},
          {"parameters overlap",
           [](Plan& p) { p.residencies[kRMean].offset_bytes = 16; },
           Reason::kOverlap,
           {"running_mean"}},
          {"device budget", [](Plan& p) { p.limits.device_bytes = 143; }, Reason::kBudget, {"80", "64", "143"}},
          {"host budget", [](Plan& p) { p.limits.host_bytes = 15; }, Reason::kBudget, {"16", "15"}},
          {"device peak", [](Plan& p) { --p.predicted.device_peak_bytes; }, Reason::kPrediction, {"79", "80"}, true},
          {"parameters peak",
           [](Plan& p) { p.predicted.parameters_peak_bytes = 0; },
           Reason::kPrediction,
           {"64"},
           true},
          {"host peak", [](Plan& p) { p.predicted.host_peak_bytes = 32; }, Reason::kPrediction, {"32", "16"}, true},
          {"device bound",
           [](Plan& p) { p.predicted.device_lower_bound_bytes += 1; },
           Reason::kPrediction,
           {"lower"},
           true},
          {"host bound", [](Plan& p) { p.predicted.host_lower_bound_bytes = 0; }, Reason::kPrediction, {"host"}, true},
      });
  // Just held: 80 and 64 bytes.
  Plan plan = full_plan(graph);
  plan.limits.device_bytes = 144;
  validate(graph, plan);
}

CHECK_NAMED(validator_execution, "validator: refuses wrong timing and wrong values, with the reason") {
  const Graph graph = small_step();
  require_refused(
      graph, full_plan(graph),
      {
          {"a residency begins late",
           [](Plan& p) { p.residencies[kRChain].begin = 3; },
           Reason::kNotResident,
           {"instance 2", "\"c\"", "boundary 2"}},
          {"a residency ends early",
           [](Plan& p) { p.residencies[kRB2].end = 6; },
           Reason::kNotResident,
           {"instance 6", "\"b\""}},
          {"a wait later",
           [](Plan& p) { set_wait(p, 1, 6); },
           Reason::kOutside,
           {"copy 1", "residency 6", "boundary 5"}},
          {"a wait later, the host's bytes kept",
           [](Plan& p) {
             set_wait(p, 1, 6);
             p.residencies[kRAHost].end = 6;
           },
           Reason::kBeforeArrival,
           {"instance 5", "copy 1"}},
          {"the offload may still run",
           [](Plan& p) { set_wait(p, 0, 4); },
           Reason::kOutside,
           {"copy 0", "residency 4"}},
          {"an offload begins after its source",
           [](Plan& p) { set_issue(p, 1, 2); },
           Reason::kOutside,
           {"copy 1", "residency 5"}},
          {"an offload before the value is there",
           [](Plan& p) {
             set_issue(p, 0, 0);
             p.residencies[kRAHost].begin = 0;
           },
           Reason::kBeforeDeparture,
           {"instance 0", "copy 0"}},
          {"host bytes given up", [](Plan& p) { p.residencies[kRAHost].end = 4; }, Reason::kOutside, {"residency 6"}},
          {"host bytes lost in between",
           [](Plan& p) {
             p.residencies.push_back(p.residencies[kRAHost]);
             p.residencies[kRAHost].end = 3;
             p.residencies.back().begin = 3;
             p.copies[1].source = static_cast<int32_t>(p.residencies.size()) - 1;
           },
           Reason::kWrongValue,
           {"instance 5", "\"a\"", "nothing", "conv"}},
          {"dropped and never made again",
           [](Plan& p) {
             p.instances.erase(p.instances.begin() + 5);
             p.boundaries.erase(p.boundaries.begin() + 6);
             for (Residency& r : p.residencies) {
               if (r.begin > 5) --r.begin;
               if (r.end > 5) --r.end;
             }
             p.residencies[kRAHost].end = 5;
             p.residencies[kRB2].end = 6;
           },
           Reason::kWrongValue,
           {"\"b\"", "nothing", "relu"}},
          {"a residency cut in two",
           [](Plan& p) {
             p.residencies.push_back(p.residencies[kRChain]);
             p.residencies[kRChain].end = 3;
             p.residencies.back().begin = 3;
           },
           Reason::kWrongValue,
           {"instance 3", "\"c\"", "norm"}},
          {"on the device twice",
           [](Plan& p) {
             p.residencies.push_back(p.residencies[kRChain]);
             p.residencies.back().offset_bytes = 96;
           },
           Reason::kSeveralDevice,
           {"instance 2", "\"c\""}},
          {"an output given up", [](Plan& p) { p.residencies[kRLoss].end = 7; }, Reason::kNotResident, {"\"loss\""}},
          {"relu in place, its input still needed",
           [](Plan& p) {
             p.storages[kPA].members = {kA, kB};
             p.storages[kPB].members = {kLoss};
             p.storages[kPLoss].members = {kD};
             p.storages[kPChain].members = {kC};
             p.residencies[kRA1].end = 3;
             p.residencies[kRLoss].storage = kPB;
             p.residencies[kRB1].storage = kPLoss;
             p.residencies[kRB1].begin = 3;
             p.residencies[kRB1].end = 5;
             p.residencies[kRB1].offset_bytes = 112;
             p.residencies[kRB2].storage = kPLoss;
           },
           Reason::kBeforeDeparture,
           {"instance 1", "copy 0"}},
          {"a chain where the operation does not allow it",
           [](Plan& p) {
             p.storages[kPB].members = {kB, kC};
             p.storages[kPChain].members = {kD};
             p.residencies[kRB1].end = 4;
             p.residencies[kRChain].begin = 3;
             p.residencies[kRLoss].offset_bytes = 16;
           },
           Reason::kInplace,
           {"instance 2", "\"c\"", "\"b\""}},
          {"the wrong producer",
           [](Plan& p) {
             p.fused[0].producer = kBack;
             p.instances[6].accumulate = true;
             p.instances[7].accumulate = false;
           },
           Reason::kFused,
           {"sum", "back"}},
          {"a fused sum whose operands lie apart",
           [](Plan& p) {
             p.storages[kPGrad].members = {kProduct, kGrad};
             p.storages[kPB].members = {kB, kFirst};
             p.residencies[kRB2].end = 8;
           },
           Reason::kFused,
           {"same storage"}},
      });
  require_refused(graph, early_plan(graph),
                  {
                      {"an after dropped",
                       [](Plan& p) { p.copies[1].after.clear(); },
                       Reason::kBeforeArrival,
                       {"copy 1", "reads", "copy 0"}},
                      {"an offload over what is being fetched",
                       [](Plan& p) {
                         p.copies.push_back({CopyKind::kOffload, kPA, kRA1, kRAHost, 2, 3, {}});
                         p.boundaries[2].issues = {1, 2};
                         p.boundaries[3].waits = {0, 2};
                       },
                       Reason::kBeforeDeparture,
                       {"copy 2", "writes", "copy 1", "reading"}},
                      {"the offload's wait later, its source's bytes kept",
                       [](Plan& p) {
                         set_wait(p, 0, 5);
                         p.residencies[kRA1].end = 5;
                         p.copies[1].after.clear();
                       },
                       Reason::kBeforeArrival,
                       {"copy 1", "copy 0"}},
                  });
}

CHECK_NAMED(validator_redundant, "validator: accepts what only looks wrong, as the judge does") {
  const Graph graph = small_step();
  // Nobody waits for the offload before the prefetch is waited for; by then it is done, as the prefetch was after it.
  Plan plan = early_plan(graph);
  set_wait(plan, 0, 6);
  plan.residencies[kRA1].end = 5;
  plan.residencies[kRLoss].offset_bytes = 80;
  random_plans::predict(plan);
  validate(graph, plan);
  check::require(interpreter::judge(graph, plan, 1).is_valid, "the judge refuses it");
  // Fetched twice: the second copy is behind the first in its stream, and so behind the offload too.
  plan = early_plan(graph);
  plan.copies.push_back({CopyKind::kPrefetch, kPA, kRAHost, kRA2, 2, 5, {}});
  plan.boundaries[2].issues = {1, 2};
  plan.boundaries[5].waits = {1, 2};
  validate(graph, plan);
  check::require(interpreter::judge(graph, plan, 1).is_valid, "the judge refuses the second prefetch");
  // An `after` that a wait makes superfluous.
  plan = full_plan(graph);
  plan.copies[1].after = {0};
  validate(graph, plan);
  // A recomputation that nobody needs.
  plan.instances.insert(plan.instances.begin() + 2, {kRelu, true, false});
  plan.boundaries.insert(plan.boundaries.begin() + 2, Boundary{});
  for (Residency& r : plan.residencies) {
    if (r.begin >= 2) ++r.begin;
    if (r.end >= 2) ++r.end;
  }
  plan.boundaries[4].issues = {1};
  for (size_t b = 0; b < plan.boundaries.size(); ++b) {
    for (const int32_t c : plan.boundaries[b].issues) plan.copies[c].issue = static_cast<int32_t>(b);
    for (const int32_t c : plan.boundaries[b].waits) plan.copies[c].wait = static_cast<int32_t>(b);
  }
  random_plans::predict(plan);
  validate(graph, plan);
  check::require(interpreter::judge(graph, plan, 1).is_valid, "the judge refuses the superfluous recomputation");
}

CHECK_NAMED(validator_reports, "validator: what an InvalidPlan says, and how many violations") {
  const Graph graph = small_step();
  Plan plan = full_plan(graph);
  std::swap(plan.residencies[kRLoss].storage, plan.residencies[kRB1].storage);
  const std::vector<Violation> all = find_violations(graph, plan, 100);
  check::require(all.size() > 1, "more than one violation");
  check::equal(find_violations(graph, plan, 2).size(), 2, "violations asked for");
  check::refuses([&] { validate(graph, plan); },
                 {"the plan is not valid", std::string(to_string(all[0].reason)), all[0].text});
  try {
    validate(graph, plan);
  } catch (const InvalidPlan& error) {
    check::require(error.reason == all[0].reason && error.violations.size() == 1, "reason of the exception");
  }
  check::refuses([&] { find_violations(graph, plan, 0); }, {"most", "0"});
  Graph broken = graph;
  broken.operations[0].reads[0] = 99;
  check::refuses([&] { find_violations(broken, plan); }, {"99"});
}

CHECK_NAMED(validator_two_results, "validator: two results of one instance must not lie on each other") {
  Graph graph;
  graph.storages = {{"kept", 16, StorageKind::kActivation, true}, {"unused", 16, StorageKind::kActivation, false}};
  graph.tensors = {{"kept", 0, 0, {16}, {1}, 1}, {"unused", 1, 0, {16}, {1}, 1}};
  Operation operation;
  operation.name = operation.target = "op";
  operation.writes = {1, 0};  // the last one stays, if an operation writes one after the other
  graph.operations = {operation};
  Plan plan;
  plan.graph_fingerprint = fingerprint(graph);
  plan.limits.alignment_bytes = 16;
  plan.storages = {{16, {0, 1}}};
  plan.instances = {{0, false, false}};
  plan.boundaries.resize(2);
  plan.residencies = {{0, Pool::kDevice, 0, 16, 0, 1}};
  random_plans::predict(plan);
  check::require(!interpreter::judge(graph, plan, 1).is_valid, "the judge accepts it");
  check::require(find_violations(graph, plan).at(0).reason == Reason::kInplace, "reason");
  plan.storages = {{16, {0}}, {16, {1}}};
  plan.residencies.push_back({1, Pool::kDevice, 16, 16, 0, 1});
  random_plans::predict(plan);
  validate(graph, plan);
}

CHECK_NAMED(validator_uncovered, "validator: bytes of a parameter that no tensor names must stay") {
  Graph graph;
  graph.storages = {{"buffer", 32, StorageKind::kParameter, false}, {"a", 16, StorageKind::kActivation, true}};
  Tensor half{"half", 0, 0, {16}, {1}, 1};
  Tensor a{"a", 1, 0, {16}, {1}, 1};
  graph.tensors = {half, a};
  Operation operation;
  operation.name = operation.target = "op";
  operation.writes = {1};
  graph.operations = {operation};
  Plan plan;
  plan.graph_fingerprint = fingerprint(graph);
  plan.limits.alignment_bytes = 16;
  plan.storages = {{32, {0, 1}}};
  plan.instances = {{0, false, false}};
  plan.boundaries.resize(2);
  plan.residencies = {{0, Pool::kParameters, 0, 32, 0, 1}};
  random_plans::predict(plan);
  check::require(!interpreter::judge(graph, plan, 1).is_valid, "the judge accepts it");
  check::require(find_violations(graph, plan).at(0).reason == Reason::kFinalValue, "reason");
  // The other half is named by nobody: an activation there destroys it all the same.
  graph.tensors[1].sizes = {4};
  graph.tensors[0].offset_bytes = 16;
  plan.graph_fingerprint = fingerprint(graph);
  check::require(find_violations(graph, plan).at(0).reason == Reason::kFinalValue, "reason where no tensor is");
}
