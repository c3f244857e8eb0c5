// splitkern._core: the graph of a training step.
#include "memory/graph.h"

#include "bindings/value_types.h"
#include "memory/graph_json.h"

namespace splitkern::bindings {

using namespace memory;

void define_graph(py::module_& module) {
  py::native_enum<StorageKind>(module, "StorageKind", "enum.Enum", "What a storage of the graph holds.")
      .value("PARAMETER", StorageKind::kParameter, "parameters and buffers")
      .value("GRADIENT", StorageKind::kGradient, "gradients of parameters")
      .value("INPUT", StorageKind::kInput, "images and labels")
      .value("ACTIVATION", StorageKind::kActivation, "all that the planner may move, drop or share")
      .finalize();

  define_value_type<Compression>(
      module, "Compression", "What the lossless coder made of a storage's real values: measured, never assumed.",
      Field{"ratio", &Compression::ratio, "Plain bytes over bytes on the link."},
      Field{"element_bytes", &Compression::element_bytes, "Of the elements whose zeros are left out: 1, 2, 4 or 8."});

  define_value_type<Storage>(
      module, "Storage", "One allocation of the step as captured, before the planner merges any.",
      Field{"name", &Storage::name, "Unique among the storages."},
      Field{"size_bytes", &Storage::size_bytes, "Bytes, not yet aligned."},
      Field{"kind", &Storage::kind, "What it holds."},
      Field{"is_output", &Storage::is_output, "Whether its last value must be there after the last operation."},
      Field{"compression", &Storage::compression, "Measured on its last value of the forward pass; None: not."});

  define_value_type<Tensor>(
      module, "Tensor", "A strided box of a storage; the patches of a joined tensor are boxes of one storage.",
      Field{"name", &Tensor::name, "Unique among the tensors."},
      Field{"storage", &Tensor::storage, "Position of its storage in the graph."},
      Field{"offset_bytes", &Tensor::offset_bytes, "Where its first element begins."},
      Field{"sizes", &Tensor::sizes, "Elements along each dimension; none: one element."},
      Field{"strides_bytes", &Tensor::strides_bytes, "Bytes from one element to the next along each dimension."},
      Field{"element_bytes", &Tensor::element_bytes, "Bytes of one element."});

  define_value_type<InplacePair>(module, "InplacePair",
                                 "A write that may lie where a read lies: positions in reads and writes.",
                                 Field{"read", &InplacePair::read, "Position in the operation's reads."},
                                 Field{"write", &InplacePair::write, "Position in the operation's writes."});

  define_value_type<Operation>(
      module, "Operation", "One operation of the step.",
      Field{"name", &Operation::name, "Unique among the operations."},
      Field{"target", &Operation::target, "What it computes, such as \"conv2d\"."},
      Field{"duration_us", &Operation::duration_us, "Microseconds on the device."},
      Field{"workspace_bytes", &Operation::workspace_bytes, "Device bytes that it needs only while it runs."},
      Field{"reads", &Operation::reads, "Positions of tensors."},
      Field{"writes", &Operation::writes, "Positions of tensors; each is wholly written."},
      Field{"inplace", &Operation::inplace, "Where a write may take the place of a read."},
      Field{"accumulates", &Operation::accumulates,
            "Positions in writes that it can add to what is there, instead of overwriting it."},
      Field{"mutates", &Operation::mutates,
            "Positions in writes that update what is there; the operation must run exactly once."},
      Field{"is_sum", &Operation::is_sum, "Whether it is writes[0] = reads[0] + reads[1]."},
      Field{"is_random", &Operation::is_random, "Whether it draws random numbers."},
      Field{"is_backward", &Operation::is_backward, "Whether it belongs to the backward pass."},
      Field{"patch", &Operation::patch, "The patch that it computes; -1 outside a split region."},
      Field{"segment", &Operation::segment, "The part of the network that it belongs to."},
      Field{"module", &Operation::module, "Qualified name of its module."});

  py::class_<Graph> graph(
      module, "Graph", py::dynamic_attr(),
      "A training step as the planner sees it: operations in execution order, tensors, storages.\n\n"
      "Raises:\n    InvalidArgument: the graph breaks a rule, which is named with the place.");
  graph
      .def(py::init([](std::string name, std::vector<Storage> storages, std::vector<Tensor> tensors,
                       std::vector<Operation> operations, std::string durations_from) {
             Graph made{std::move(name), std::move(storages), std::move(tensors), std::move(operations),
                        std::move(durations_from)};
             require_valid(made);
             return made;
           }),
           py::kw_only(), py::arg("name") = "", py::arg("storages"), py::arg("tensors"), py::arg("operations"),
           py::arg("durations_from") = "")
      .def_readonly("name", &Graph::name, "Of the network.")
      .def_readonly("durations_from", &Graph::durations_from, "How the durations were found: measured or estimated.")
      .def(
          "__eq__", [](const Graph& left, const Graph& right) { return left == right; }, py::is_operator())
      .def("__setattr__",
           [](const py::object&, const std::string& attribute, const py::object&) {
             throw py::attribute_error("Graph is frozen: \"" + attribute + "\" cannot be set");
           })
      .def("__repr__",
           [](const Graph& self) {
             std::ostringstream text;
             text << "Graph(name=" << std::string(py::repr(py::cast(self.name))) << ", " << self.operations.size()
                  << " operations, " << self.tensors.size() << " tensors, " << self.storages.size() << " storages)";
             return text.str();
           })
      .def_property_readonly("fingerprint", &fingerprint,
                             "A digest of all that a plan depends on; a plan carries its graph's.")
      .def(
          "to_json", [](const Graph& self) { return to_json(self); }, "The graph as versioned JSON.")
      .def_static(
          "from_json",
          [](const std::string& text) {
            py::gil_scoped_release unlocked;
            Graph made = graph_from_json(text);
            require_valid(made);
            return made;
          },
          py::arg("text"),
          "Reads what `to_json` wrote.\n\nRaises:\n    ParseError: malformed text, with line and column.\n"
          "    InvalidArgument: the graph breaks a rule.")
      .def(py::pickle([](const Graph& self) { return to_json(self); },
                      [](const std::string& text) { return graph_from_json(text); }));
  define_tuple(graph, Field{"storages", &Graph::storages, "As captured."});
  define_tuple(graph, Field{"tensors", &Graph::tensors, "Boxes of the storages."});
  define_tuple(graph, Field{"operations", &Graph::operations, "In execution order."});
}

}  // namespace splitkern::bindings
