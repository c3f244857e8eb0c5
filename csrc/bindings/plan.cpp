// splitkern._core: plans, and the limits they are made for.
#include "memory/plan.h"

#include "bindings/value_types.h"
#include "memory/plan_json.h"

namespace splitkern::bindings {

using namespace memory;

namespace {

void define_limits(py::module_& module) {
  const Limits defaults;
  py::class_<Limits>(
      module, "Limits",
      "The machine and the budgets that a plan is made for.\n\n"
      "Raises:\n    InvalidArgument: a negative or not finite limit, an alignment that is no power of two.")
      .def(py::init([](std::optional<int64_t> device_bytes, std::optional<int64_t> host_bytes, double offload_gbps,
                       double prefetch_gbps, double copy_latency_us, int64_t alignment_bytes) {
             const Limits made{from_optional(device_bytes),
                               from_optional(host_bytes),
                               offload_gbps,
                               prefetch_gbps,
                               copy_latency_us,
                               alignment_bytes};
             require_valid(made);
             return made;
           }),
           py::kw_only(), py::arg("device_bytes") = py::none(), py::arg("host_bytes") = py::none(),
           py::arg("offload_gbps") = defaults.offload_gbps, py::arg("prefetch_gbps") = defaults.prefetch_gbps,
           py::arg("copy_latency_us") = defaults.copy_latency_us, py::arg("alignment_bytes") = defaults.alignment_bytes)
      .def_property_readonly(
          "device_bytes", [](const Limits& self) { return to_optional(self.device_bytes); },
          "Budget of the device and parameters pools together; None: unlimited.")
      .def_property_readonly(
          "host_bytes", [](const Limits& self) { return to_optional(self.host_bytes); },
          "Budget of the pinned host pool; None: unlimited.")
      .def_readonly("offload_gbps", &Limits::offload_gbps, "Device to host, 10⁹ bytes per second; 0: no copies.")
      .def_readonly("prefetch_gbps", &Limits::prefetch_gbps, "Host to device, 10⁹ bytes per second.")
      .def_readonly("copy_latency_us", &Limits::copy_latency_us, "Added to every copy, microseconds.")
      .def_readonly("alignment_bytes", &Limits::alignment_bytes, "Of every offset and size.")
      .def(
          "__eq__", [](const Limits& left, const Limits& right) { return left == right; }, py::is_operator())
      .def("__repr__", [](const Limits& self) {
        std::ostringstream text;
        text << "Limits(device_bytes=" << std::string(py::repr(py::cast(to_optional(self.device_bytes))))
             << ", host_bytes=" << std::string(py::repr(py::cast(to_optional(self.host_bytes))))
             << ", offload_gbps=" << self.offload_gbps << ", prefetch_gbps=" << self.prefetch_gbps
             << ", copy_latency_us=" << self.copy_latency_us << ", alignment_bytes=" << self.alignment_bytes << ")";
        return text.str();
      });
}

}  // namespace

void define_plan(py::module_& module) {
  define_limits(module);
  py::native_enum<Pool>(module, "PoolKind", "enum.Enum", "Which memory a residency lies in.")
      .value("DEVICE", Pool::kDevice, "general purpose")
      .value("PARAMETERS", Pool::kParameters, "device: parameters, buffers, their gradients, inputs")
      .value("HOST", Pool::kHost, "pinned host memory")
      .finalize();
  py::native_enum<CopyKind>(module, "CopyKind", "enum.Enum", "Direction of a copy.")
      .value("OFFLOAD", CopyKind::kOffload, "device to host")
      .value("PREFETCH", CopyKind::kPrefetch, "host to device")
      .finalize();

  define_value_type<PlanStorage>(module, "PlanStorage", "Graph storages that share bytes one after the other.",
                                 Field{"size_bytes", &PlanStorage::size_bytes, "The largest member's."},
                                 Field{"members", &PlanStorage::members, "Graph storages, in order of first write."},
                                 Field{"compression", &PlanStorage::compression,
                                       "A member's, where copies are compressed; None: they are plain."});
  define_value_type<Instance>(
      module, "Instance", "An operation of the graph, run for the first time or again.",
      Field{"operation", &Instance::operation, "Position in the graph's operations."},
      Field{"is_recomputation", &Instance::is_recomputation, "Whether it has run before."},
      Field{"accumulate", &Instance::accumulate, "Whether it adds to what its accumulating write's place holds."});
  define_value_type<Residency>(
      module, "Residency", "Bytes of a pool that belong to a storage from boundary `begin` until boundary `end`.",
      Field{"storage", &Residency::storage, "Position in the plan's storages; -1: workspace of instance `begin`."},
      Field{"pool", &Residency::pool, "Which memory."}, Field{"offset_bytes", &Residency::offset_bytes, "In the pool."},
      Field{"size_bytes", &Residency::size_bytes, "Aligned."},
      Field{"begin", &Residency::begin, "First boundary: after its waits."},
      Field{"end", &Residency::end, "Boundary by whose waits the bytes are free."});
  define_value_type<Copy>(module, "Copy", "An offload or prefetch.", Field{"kind", &Copy::kind, "Direction."},
                          Field{"storage", &Copy::storage, "Position in the plan's storages."},
                          Field{"source", &Copy::source, "Residency that is read."},
                          Field{"destination", &Copy::destination, "Residency that is written."},
                          Field{"issue", &Copy::issue, "Boundary at which it is issued."},
                          Field{"wait", &Copy::wait, "Boundary at which the compute stream waits for it."},
                          Field{"after", &Copy::after, "Copies of the other stream that it waits for."},
                          Field{"compressed", &Copy::compressed, "Whether zeros are left out on the link."});
  define_value_type<Boundary>(module, "Boundary", "What happens before an instance is launched.",
                              Field{"waits", &Boundary::waits, "Copies that the compute stream waits for, first."},
                              Field{"issues", &Boundary::issues, "Copies that are issued then, in order."});
  define_value_type<FusedSum>(module, "FusedSum", "A sum that the producer of one operand computes in place.",
                              Field{"sum", &FusedSum::sum, "Operation without an instance."},
                              Field{"producer", &FusedSum::producer, "Operation whose instance accumulates."});
  define_value_type<Predicted>(
      module, "Predicted", "What a plan costs, by its graph's durations and its limits' bandwidths.",
      Field{"step_us", &Predicted::step_us, "The step with stalls, microseconds."},
      Field{"compute_us", &Predicted::compute_us, "The captured operations alone, microseconds."},
      Field{"recompute_us", &Predicted::recompute_us, "Recomputations, microseconds."},
      Field{"stall_us", &Predicted::stall_us, "The compute stream waits for copies, microseconds."},
      Field{"device_peak_bytes", &Predicted::device_peak_bytes, "Highest end of an occupied address."},
      Field{"parameters_peak_bytes", &Predicted::parameters_peak_bytes, "Highest end of an occupied address."},
      Field{"host_peak_bytes", &Predicted::host_peak_bytes, "Highest end of an occupied address."},
      Field{"device_lower_bound_bytes", &Predicted::device_lower_bound_bytes, "Largest sum of live bytes."},
      Field{"host_lower_bound_bytes", &Predicted::host_lower_bound_bytes, "Largest sum of live bytes."});

  py::class_<Plan> plan(module, "Plan", py::dynamic_attr(),
                        "Where every storage lies at any moment of a step, and which copies move it. Made by `plan`.");
  plan.def(py::init([](std::string graph_fingerprint, std::string strategy, Limits limits,
                       std::vector<PlanStorage> storages, std::vector<FusedSum> fused, std::vector<Instance> instances,
                       std::vector<Boundary> boundaries, std::vector<Residency> residencies, std::vector<Copy> copies,
                       Predicted predicted) {
             return Plan{std::move(graph_fingerprint),
                         std::move(strategy),
                         limits,
                         std::move(storages),
                         std::move(fused),
                         std::move(instances),
                         std::move(boundaries),
                         std::move(residencies),
                         std::move(copies),
                         predicted};
           }),
           py::kw_only(), py::arg("graph_fingerprint"), py::arg("strategy"), py::arg("limits"), py::arg("storages"),
           py::arg("fused"), py::arg("instances"), py::arg("boundaries"), py::arg("residencies"), py::arg("copies"),
           py::arg("predicted"))
      .def_readonly("graph_fingerprint", &Plan::graph_fingerprint, "Of the graph that it is made for.")
      .def_readonly("strategy", &Plan::strategy, "The strategy whose decisions it holds.")
      .def_readonly("limits", &Plan::limits, "What it was made for.")
      .def_readonly("predicted", &Plan::predicted, "What it costs.")
      .def(
          "__eq__", [](const Plan& left, const Plan& right) { return left == right; }, py::is_operator())
      .def("__setattr__",
           [](const py::object&, const std::string& attribute, const py::object&) {
             throw py::attribute_error("Plan is frozen: \"" + attribute + "\" cannot be set");
           })
      .def("__repr__",
           [](const Plan& self) {
             std::ostringstream text;
             text << "Plan(strategy=" << std::string(py::repr(py::cast(self.strategy))) << ", " << self.instances.size()
                  << " instances, " << self.copies.size() << " copies, device peak " << self.predicted.device_peak_bytes
                  << " bytes, step " << self.predicted.step_us << " us)";
             return text.str();
           })
      .def(
          "to_json", [](const Plan& self) { return to_json(self); }, "The plan as versioned JSON.")
      .def_static(
          "from_json",
          [](const std::string& text) {
            py::gil_scoped_release unlocked;
            return plan_from_json(text);
          },
          py::arg("text"),
          "Reads what `to_json` wrote; whether the plan is right is for `validate` to say.\n\n"
          "Raises:\n    ParseError: malformed text, with line and column.")
      .def(py::pickle([](const Plan& self) { return to_json(self); },
                      [](const std::string& text) { return plan_from_json(text); }));
  define_tuple(plan, Field{"storages", &Plan::storages, "Every graph storage is a member of exactly one."});
  define_tuple(plan, Field{"fused", &Plan::fused, "Sums that are not executed."});
  define_tuple(plan, Field{"instances", &Plan::instances, "In execution order."});
  define_tuple(plan, Field{"boundaries", &Plan::boundaries, "One more than instances."});
  define_tuple(plan, Field{"residencies", &Plan::residencies, "Of all pools."});
  define_tuple(plan, Field{"copies", &Plan::copies, "Of both directions."});
}

}  // namespace splitkern::bindings
