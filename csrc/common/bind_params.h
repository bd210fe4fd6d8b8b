// Helpers for params structs as Python objects: pointers are ints there.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "../params.h"

namespace dgemma {

template <class Class, class Owner, class T>
void pointer_field(Class& bound, const char* name, T* Owner::* field) {
  bound.def_property(
      name, [field](const Owner& self) { return reinterpret_cast<uintptr_t>(self.*field); },
      [field](Owner& self, uintptr_t address) { self.*field = reinterpret_cast<T*>(address); });
}

// Set as (address, stride, value): address 0 means the value.
template <class Class, class Owner, class T>
void row_parameter_field(Class& bound, const char* name, RowParameter<T> Owner::* field) {
  bound.def_property(
      name,
      [field](const Owner& self) {
        const auto& parameter = self.*field;
        return pybind11::make_tuple(reinterpret_cast<uintptr_t>(parameter.pointer), parameter.stride, parameter.value);
      },
      [field](Owner& self, const pybind11::tuple& value) {
        (self.*field).pointer = reinterpret_cast<const T*>(value[0].cast<uintptr_t>());
        (self.*field).stride = value[1].cast<int64_t>();
        (self.*field).value = value[2].cast<T>();
      });
}

template <class Class, class Owner, class Enum>
void enum_field(Class& bound, const char* name, Enum Owner::* field) {
  bound.def_property(
      name, [field](const Owner& self) { return int(self.*field); },
      [field](Owner& self, int value) { self.*field = static_cast<Enum>(value); });
}

}  // namespace dgemma
