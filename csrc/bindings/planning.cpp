// splitkern._core: what makes plans, plays them and proves them.
#include <pybind11/numpy.h>

#include <span>

#include "bindings/value_types.h"
#include "memory/planner.h"
#include "memory/replacement.h"
#include "memory/simulator.h"
#include "memory/storage_assignment.h"
#include "memory/validator.h"

namespace splitkern::bindings {

using namespace memory;

void define_planning(py::module_& module) {
  const PlanOptions defaults;
  module.def("strategy_names", &strategy_names, "The names that `plan` takes as strategy.");
  module.def(
      "plan",
      [](const Graph& graph, const Limits& limits, const std::string& strategy, int64_t search_effort,
         int64_t placement_effort) {
        PlanOptions options;
        options.strategy = strategy;
        options.search_effort = search_effort;
        options.placement_effort = placement_effort;
        return plan(graph, limits, options);
      },
      py::arg("graph"), py::arg("limits"), py::kw_only(), py::arg("strategy") = defaults.strategy,
      py::arg("search_effort") = defaults.search_effort, py::arg("placement_effort") = defaults.placement_effort,
      py::call_guard<py::gil_scoped_release>(),
      "Plans a step under limits: what is kept, offloaded or recomputed, when, and at which address.\n\n"
      "The same arguments give the same plan everywhere. The plan is not validated here: see `validate`.\n\n"
      "Args:\n    graph: the step.\n    limits: budgets and bandwidths.\n    strategy: one of `strategy_names()`.\n"
      "    search_effort: about how often the search may schedule all operations.\n"
      "    placement_effort: work spent on addresses where simple rules do not reach the lower bound.\n\n"
      "Raises:\n    InvalidArgument: limits, strategy or effort break a rule.\n"
      "    Infeasible: no plan of this strategy fits; names the pool and the smallest budget that would do.");

  module.def(
      "with_sizes",
      [](const Graph& graph, const py::array_t<int64_t, py::array::c_style>& numbers) {
        const std::span<const int64_t> values(numbers.data(), static_cast<size_t>(numbers.size()));
        py::gil_scoped_release unlocked;
        return with_sizes(graph, values);
      },
      py::arg("graph"), py::arg("numbers"),
      "The graph with other sizes; `validate` says whether the result keeps the rules of a graph.\n\n"
      "Args:\n    graph: the step.\n    numbers: int64; bytes of every storage, then of every tensor its offset, sizes "
      "and strides, in bytes.\n\n"
      "Raises:\n    InvalidArgument: numbers are not as many as that.");
  module.def("place_again", &place_again, py::arg("graph"), py::arg("plan"), py::arg("limits"), py::kw_only(),
             py::arg("placement_effort") = defaults.placement_effort, py::call_guard<py::gil_scoped_release>(),
             "A plan's decisions at other sizes: residencies, addresses and predictions are made anew.\n\n"
             "The plan is not validated here: see `validate`.\n\n"
             "Args:\n    graph: differs from the plan's in sizes alone.\n    plan: whose decisions are kept.\n"
             "    limits: budgets and bandwidths.\n    placement_effort: as of `plan`; the search stops where a pool "
             "fits.\n\n"
             "Raises:\n    InvalidArgument: the plan names what it or the graph does not have.\n"
             "    Infeasible: a pool needs more than its budget; names the pool and what it needs.");

  define_value_type<Span>(module, "Span", "When something runs, microseconds from the step's begin.",
                          Field{"begin_us", &Span::begin_us, "Begin."}, Field{"end_us", &Span::end_us, "End."});
  py::class_<Timeline> timeline(module, "Timeline", py::dynamic_attr(),
                                "A plan played on three streams: compute, offload, prefetch. Made by `simulate`.");
  timeline.def_readonly("step_us", &Timeline::step_us, "Until compute has finished and waited for the last copies.")
      .def_readonly("compute_us", &Timeline::compute_us, "The captured operations alone.")
      .def_readonly("recompute_us", &Timeline::recompute_us, "Recomputations.")
      .def_readonly("stall_us", &Timeline::stall_us, "The compute stream waits for copies.");
  define_tuple(timeline, Field{"instances", &Timeline::instances, "A span for every instance."});
  define_tuple(timeline, Field{"copies", &Timeline::copies, "A span for every copy."});
  define_tuple(timeline, Field{"stalls_us", &Timeline::stalls_us, "Per boundary."});
  module.def("simulate", &simulate, py::arg("graph"), py::arg("plan"), py::call_guard<py::gil_scoped_release>(),
             "Plays a plan with the graph's durations and the limits' bandwidths; the host is taken to be ahead.\n\n"
             "Raises:\n    InvalidArgument: the plan names what it or the graph does not have.");

  define_value_type<StorageAssignment>(
      module, "StorageAssignment", "Which storages of the graph share bytes one after the other.",
      Field{"storages", &StorageAssignment::storages, "Planned storages."},
      Field{"storage_of", &StorageAssignment::storage_of, "Planned storage of every graph storage."},
      Field{"fused", &StorageAssignment::fused, "Sums that the producer of an operand computes in place."});
  const AssignmentOptions rules;
  module.def(
      "assign_storages",
      [](const Graph& graph, bool inplace, bool sums, bool accumulation) {
        return assign_storages(graph, {inplace, sums, accumulation});
      },
      py::arg("graph"), py::kw_only(), py::arg("inplace") = rules.inplace, py::arg("sums") = rules.sums,
      py::arg("accumulation") = rules.accumulation, py::call_guard<py::gil_scoped_release>(),
      "Merges the storages of in-place operations, summed errors and accumulated weight gradients.\n\n"
      "Args:\n    graph: the step.\n    inplace: merge across in-place operations other than sums.\n"
      "    sums: merge sums into the operand that dies.\n    accumulation: let producers add in place.");

  py::class_<Violation>(module, "Violation", "One thing that a plan does wrong.")
      .def_property_readonly(
          "reason", [](const Violation& self) { return std::string(to_string(self.reason)); },
          "Short name of the rule that is broken.")
      .def_readonly("text", &Violation::text, "What is wrong where.")
      .def("__repr__", [](const Violation& self) {
        return "Violation(" + std::string(to_string(self.reason)) + ": " + self.text + ")";
      });
  module.def("find_violations", &find_violations, py::arg("graph"), py::arg("plan"), py::kw_only(), py::arg("most") = 1,
             py::call_guard<py::gil_scoped_release>(),
             "The first violations of a plan, at most `most`; none proves the plan right for every timing.");
  module.def("validate", &validate, py::arg("graph"), py::arg("plan"), py::call_guard<py::gil_scoped_release>(),
             "Proves a plan right.\n\nRaises:\n    InvalidPlan: it is not; `reason` and `violations` say why.");
}

}  // namespace splitkern::bindings
