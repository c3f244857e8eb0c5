// Frozen Python classes of the memory library's structs: keyword-only construction with the struct's defaults,
// read-only attributes, equality, repr and pickling, all from one list of fields. Used by the other files of this
// folder.
#pragma once

#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "memory/errors.h"
#include "memory/limits.h"

namespace splitkern::bindings {

namespace py = pybind11;

template <class Owner, class Value>
struct Field {
  const char* name;
  Value Owner::* member;
  const char* documentation;
};
template <class Owner, class Value>
Field(const char*, Value Owner::*, const char*) -> Field<Owner, Value>;

// Field by field: "Storage(name='x', size_bytes=4)".
template <class Owner, class... Values>
std::string representation(const char* class_name, const Owner& value, const Field<Owner, Values>&... fields) {
  std::ostringstream text;
  text << class_name << "(";
  const char* separator = "";
  ((text << separator << fields.name << "=" << std::string(py::repr(py::cast(value.*fields.member))), separator = ", "),
   ...);
  text << ")";
  return text.str();
}

// Vectors of more than a handful of values become tuples that are made once per object: a loop over
// `graph.operations[i]` must not copy all of them in every turn. Tuples, because the object is frozen.
template <class Owner, class Value>
void define_tuple(py::class_<Owner>& type, const Field<Owner, std::vector<Value>>& field) {
  const std::string key = std::string("_") + field.name;
  type.def_property_readonly(
      field.name,
      [member = field.member, key](const py::object& self) -> py::tuple {
        py::dict kept = self.attr("__dict__");
        if (!kept.contains(key.c_str())) kept[key.c_str()] = py::tuple(py::cast(self.cast<const Owner&>().*member));
        return kept[key.c_str()];
      },
      field.documentation);
}

template <class Owner, class Value>
void define_field(py::class_<Owner>& type, const Field<Owner, Value>& field) {
  type.def_readonly(field.name, field.member, field.documentation);
}
template <class Owner, class Value>
void define_field(py::class_<Owner>& type, const Field<Owner, std::vector<Value>>& field) {
  define_tuple(type, field);
}

template <class Owner, class... Values>
py::class_<Owner> define_value_type(py::module_& module, const char* name, const char* documentation,
                                    const Field<Owner, Values>&... fields) {
  py::class_<Owner> type(module, name, py::dynamic_attr(), documentation);
  type.def(py::init([fields...](Values... values) {
             Owner made;
             ((made.*fields.member = std::move(values)), ...);
             return made;
           }),
           py::kw_only(), (py::arg(fields.name) = Owner{}.*fields.member)...);
  (define_field(type, fields), ...);
  if constexpr (std::equality_comparable<Owner>)
    type.def("__eq__", [](const Owner& left, const Owner& right) { return left == right; }, py::is_operator());
  type.def("__setattr__", [name](const py::object&, const std::string& attribute, const py::object&) {
    throw py::attribute_error(std::string(name) + " is frozen: \"" + attribute + "\" cannot be set");
  });
  type.def("__repr__", [name, fields...](const Owner& value) { return representation(name, value, fields...); });
  type.def(py::pickle([fields...](const Owner& value) { return py::make_tuple(value.*fields.member...); },
                      [fields...](const py::tuple& state) {
                        if (state.size() != sizeof...(Values)) throw py::value_error("a pickle of another version");
                        Owner made;
                        size_t position = 0;
                        ((made.*fields.member = state[position++].template cast<Values>()), ...);
                        return made;
                      }));
  return type;
}

// Python says None where C++ says kUnlimited.
inline int64_t from_optional(const std::optional<int64_t>& bytes) {
  return bytes.value_or(memory::kUnlimited);
}
inline std::optional<int64_t> to_optional(int64_t bytes) {
  return bytes == memory::kUnlimited ? std::nullopt : std::optional(bytes);
}

void define_graph(py::module_& module);
void define_plan(py::module_& module);
void define_planning(py::module_& module);
void define_placement(py::module_& module);
void define_pool(py::module_& module);
void define_pipeline(py::module_& module);

}  // namespace splitkern::bindings
