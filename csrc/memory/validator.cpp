#include "memory/validator.h"

#include <utility>

#include "memory/validator/stages.h"

namespace splitkern::memory {
namespace {

std::string listed(const std::vector<Violation>& violations) {
  std::string text = "the plan is not valid:";
  for (const Violation& violation : violations)
    text += " " + std::string(to_string(violation.reason)) + ": " + violation.text + ";";
  text.pop_back();
  return text;
}

}  // namespace

std::string_view to_string(Reason reason) {
  switch (reason) {
    case Reason::kOtherGraph:
      return "other graph";
    case Reason::kLimits:
      return "limits";
    case Reason::kIndex:
      return "index";
    case Reason::kMembership:
      return "membership";
    case Reason::kSize:
      return "size";
    case Reason::kAlignment:
      return "alignment";
    case Reason::kOrder:
      return "order";
    case Reason::kRepetition:
      return "repetition";
    case Reason::kFused:
      return "fused";
    case Reason::kBoundaries:
      return "boundaries";
    case Reason::kIssue:
      return "issue";
    case Reason::kWait:
      return "wait";
    case Reason::kEndpoints:
      return "endpoints";
    case Reason::kAfter:
      return "after";
    case Reason::kLink:
      return "link";
    case Reason::kCompressed:
      return "compression";
    case Reason::kLifetime:
      return "lifetime";
    case Reason::kPool:
      return "pool";
    case Reason::kWorkspace:
      return "workspace";
    case Reason::kSeveralDevice:
      return "several on the device";
    case Reason::kOverlap:
      return "overlap";
    case Reason::kBudget:
      return "budget";
    case Reason::kPrediction:
      return "prediction";
    case Reason::kNotResident:
      return "not resident";
    case Reason::kOutside:
      return "outside its residency";
    case Reason::kBeforeArrival:
      return "before arrival";
    case Reason::kBeforeDeparture:
      return "before departure";
    case Reason::kInplace:
      return "in place";
    case Reason::kWrongValue:
      return "wrong value";
    case Reason::kFinalValue:
      return "final value";
    case Reason::kTooComplex:
      return "too complex";
  }
  return "unknown";
}

InvalidPlan::InvalidPlan(std::vector<Violation> violations)
    : InvalidArgument(listed(violations)), reason(violations.at(0).reason), violations(std::move(violations)) {}

std::vector<Violation> find_violations(const Graph& graph, const Plan& plan, int64_t most) {
  if (most < 1) throw InvalidArgument("most must be 1 or more, got " + std::to_string(most));
  require_valid(graph);
  validation::Findings findings(graph, plan, most);
  validation::check_form(graph, plan, findings);
  if (findings.any()) return findings.take();
  validation::check_addresses(plan, findings);
  if (findings.full()) return findings.take();
  validation::check_execution(graph, plan, validation::Clocks(plan), findings);
  return findings.take();
}

void validate(const Graph& graph, const Plan& plan) {
  std::vector<Violation> violations = find_violations(graph, plan);
  if (!violations.empty()) throw InvalidPlan(std::move(violations));
}

}  // namespace splitkern::memory
