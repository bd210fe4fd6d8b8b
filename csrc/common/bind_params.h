// Helpers for params structs as Python objects. A tensor stands for its address and has to stay alive while the struct
// is used.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../params.h"

namespace dgemma {

// A method without arguments of a tensor. Names are interned once; by a C string every call would make a new one.
inline pybind11::object call_method(pybind11::handle object, PyObject* name) {
  PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), name);
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// Of an int, a tensor, or None.
inline uintptr_t address_of(pybind11::handle value) {
  static PyObject* const data_ptr = interned("data_ptr");
  if (value.is_none()) return 0;
  if (PyLong_Check(value.ptr())) return value.cast<uintptr_t>();
  return call_method(value, data_ptr).cast<uintptr_t>();
}

// Of a number; of a tensor, one value or a contiguous row of them; of (address, stride, value), where address 0 means
// the value; or of None.
template <class T>
RowParameter<T> row_parameter_of(pybind11::handle value) {
  static PyObject* const dim = interned("dim");
  RowParameter<T> parameter;
  if (value.is_none()) return parameter;
  if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) {
    parameter.value = value.cast<T>();
  } else if (PyTuple_Check(value.ptr())) {
    const auto parts = pybind11::reinterpret_borrow<pybind11::tuple>(value);
    parameter.pointer = reinterpret_cast<const T*>(parts[0].cast<uintptr_t>());
    parameter.stride = parts[1].cast<int64_t>();
    parameter.value = parts[2].cast<T>();
  } else {
    parameter.pointer = reinterpret_cast<const T*>(address_of(value));
    parameter.stride = call_method(value, dim).cast<int64_t>();
  }
  return parameter;
}

// A property of a params struct, and how it is set.
template <class Owner>
struct Field {
  std::string name;
  std::function<void(Owner&, pybind11::handle)> set;
};

template <class Class, class Owner, class Get, class Set>
Field<Owner> property_field(Class& bound, const char* name, Get get, Set set) {
  bound.def_property(name, get, [set](Owner& self, const pybind11::object& value) { set(self, value); });
  return {name, set};
}

template <class Class, class Owner, class T>
Field<Owner> number_field(Class& bound, const char* name, T Owner::* field) {
  return property_field<Class, Owner>(
      bound, name, [field](const Owner& self) { return self.*field; },
      [field](Owner& self, pybind11::handle value) { self.*field = value.cast<T>(); });
}

template <class Class, class Owner, class T>
Field<Owner> pointer_field(Class& bound, const char* name, T Owner::* field) {
  return property_field<Class, Owner>(
      bound, name, [field](const Owner& self) { return reinterpret_cast<uintptr_t>(self.*field); },
      [field](Owner& self, pybind11::handle value) { self.*field = reinterpret_cast<T>(address_of(value)); });
}

template <class Class, class Owner, class T>
Field<Owner> row_parameter_field(Class& bound, const char* name, RowParameter<T> Owner::* field) {
  return property_field<Class, Owner>(
      bound, name,
      [field](const Owner& self) {
        const auto& parameter = self.*field;
        return pybind11::make_tuple(reinterpret_cast<uintptr_t>(parameter.pointer), parameter.stride, parameter.value);
      },
      [field](Owner& self, pybind11::handle value) { self.*field = row_parameter_of<T>(value); });
}

template <class Class, class Owner, class Enum>
Field<Owner> enum_field(Class& bound, const char* name, Enum Owner::* field) {
  return property_field<Class, Owner>(
      bound, name, [field](const Owner& self) { return int(self.*field); },
      [field](Owner& self, pybind11::handle value) { self.*field = static_cast<Enum>(value.cast<int>()); });
}

// Makes the struct from nothing, or from a value for each field in this order, which `FIELDS` holds: one call for all of
// them, since setting properties one by one costs as much as a small kernel.
template <class Owner>
void made_of_fields(pybind11::class_<Owner>& bound, std::vector<Field<Owner>> fields) {
  pybind11::tuple names(fields.size());
  for (size_t i = 0; i < fields.size(); ++i) names[i] = fields[i].name;
  bound.attr("FIELDS") = names;
  bound.def(pybind11::init([fields = std::move(fields)](const pybind11::args& values) {
    Owner made;
    if (values.empty()) return made;
    if (values.size() != fields.size())
      throw pybind11::type_error(std::to_string(fields.size()) + " values expected, in the order of FIELDS, got " +
                                 std::to_string(values.size()));
    for (size_t i = 0; i < fields.size(); ++i) fields[i].set(made, values[i]);
    return made;
  }));
}

}  // namespace dgemma
