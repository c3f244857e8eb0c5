// The Python extension module splitkern._core: the memory library for Python. Here are the module and its exceptions;
// the classes are in csrc/bindings/. Knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/value_types.h"
#include "memory/copy_pipeline.h"
#include "memory/errors.h"
#include "memory/pool.h"
#include "memory/validator.h"

namespace py = pybind11;
using namespace splitkern::memory;

namespace {

PyObject* new_exception(py::module_& module, const char* name, PyObject* base, const char* documentation) {
  const std::string qualified = std::string("splitkern._core.") + name;
  PyObject* type = PyErr_NewExceptionWithDoc(qualified.c_str(), documentation, base, nullptr);
  if (type == nullptr) throw py::error_already_set();
  module.add_object(name, py::reinterpret_borrow<py::object>(type));
  return type;  // lives as long as the process
}

PyObject* invalid_argument = nullptr;
PyObject* parse_error = nullptr;
PyObject* infeasible = nullptr;
PyObject* invalid_plan = nullptr;
PyObject* out_of_memory = nullptr;
PyObject* copy_failed = nullptr;
PyObject* step_aborted = nullptr;

py::object make(PyObject* type, const std::exception& error) {
  return py::handle(type)(error.what());
}

void translate(std::exception_ptr pointer) {
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (const ParseError& error) {
    const py::object made = make(parse_error, error);
    made.attr("line") = error.line;
    made.attr("column") = error.column;
    PyErr_SetObject(parse_error, made.ptr());
  } catch (const Infeasible& error) {
    const py::object made = make(infeasible, error);
    made.attr("pool") = error.pool;
    made.attr("budget_bytes") = error.budget_bytes;
    made.attr("smallest_feasible_bytes") = error.smallest_feasible_bytes;
    PyErr_SetObject(infeasible, made.ptr());
  } catch (const OutOfMemory& error) {
    const py::object made = make(out_of_memory, error);
    made.attr("asked_bytes") = error.asked_bytes;
    made.attr("current_bytes") = error.current_bytes;
    made.attr("upstream_bytes") = error.upstream_bytes;
    made.attr("limit_bytes") = error.limit_bytes;
    made.attr("largest_free_bytes") = error.largest_free_bytes;
    PyErr_SetObject(out_of_memory, made.ptr());
  } catch (const CopyFailed& error) {
    const py::object made = make(copy_failed, error);
    made.attr("kind") = error.kind;
    made.attr("copy") = error.copy;
    made.attr("storage") = error.storage;
    made.attr("size_bytes") = error.size_bytes;
    PyErr_SetObject(copy_failed, made.ptr());
  } catch (const StepAborted& error) {
    PyErr_SetString(step_aborted, error.what());
  } catch (const InvalidPlan& error) {
    const py::object made = make(invalid_plan, error);
    made.attr("reason") = std::string(to_string(error.reason));
    made.attr("violations") = py::tuple(py::cast(error.violations));
    PyErr_SetObject(invalid_plan, made.ptr());
  } catch (const InvalidArgument& error) {
    PyErr_SetString(invalid_argument, error.what());
  }
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() =
      "The memory planner and pool of splitkern: graphs, plans, placement, validation. Bytes and microseconds.";
  module.attr("__version__") = SPLITKERN_VERSION;
  invalid_argument = new_exception(module, "InvalidArgument", PyExc_ValueError,
                                   "A graph, plan, limit or argument that breaks a rule of its type.");
  parse_error = new_exception(module, "ParseError", PyExc_ValueError,
                              "Text that cannot be read; `line` and `column` count from 1.");
  infeasible = new_exception(module, "Infeasible", PyExc_RuntimeError,
                             "No plan fits the budget: `pool`, `budget_bytes`, `smallest_feasible_bytes`.");
  invalid_plan = new_exception(module, "InvalidPlan", invalid_argument,
                               "A plan that was proven wrong: `reason`, and `violations` in order.");
  out_of_memory =
      new_exception(module, "OutOfMemory", PyExc_MemoryError,
                    "A pool cannot give what was asked for: `asked_bytes`, `current_bytes`, `upstream_bytes`, "
                    "`limit_bytes`, `largest_free_bytes`.");
  copy_failed = new_exception(module, "CopyFailed", PyExc_RuntimeError,
                              "An offload or prefetch did not arrive, or arrived changed: `kind`, `copy`, `storage`, "
                              "`size_bytes`. The pipeline is ready for the next step.");
  step_aborted = new_exception(module, "StepAborted", PyExc_RuntimeError, "`abort` ended the step.");
  py::register_local_exception_translator(&translate);

  using namespace splitkern::bindings;
  define_graph(module);
  define_plan(module);
  define_planning(module);
  define_placement(module);
  define_pool(module);
  define_pipeline(module);
}
