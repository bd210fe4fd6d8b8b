// A case of an emulated kernel: a folder with `case`, lines of a name and numbers, and one file per tensor.
//
// Every tensor is allocated at its exact size, so AddressSanitizer sees what lies outside. Compiled once for all programs: a
// program with a planted bug compiles its kernel and little else, so this header asks for nothing of the standard library's.
#pragma once

#include <cstdint>

#include "machine.h"
#include "params.h"

namespace dgemma {

class Case {
 public:
  explicit Case(const char* folder);
  ~Case();
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  // The names of what belongs to a matrix are its own and a suffix.
  bool has(const char* name, const char* suffix = "") const;
  // The first number of the line, or a later one.
  double number(const char* name, int at = 0, const char* suffix = "") const;
  int64_t integer(const char* name, const char* suffix = "") const { return int64_t(number(name, 0, suffix)); }

  // The bytes of a tensor, or nullptr where the case has no such file.
  template <class T>
  const T* tensor(const char* name, const char* suffix = "") {
    return static_cast<const T*>(read(name, suffix));
  }

  // `NAME` holds whether there is one value per row; the values are in the file of that name.
  template <class T>
  RowParameter<T> row_parameter(const char* name) {
    RowParameter<T> parameter;
    if (!has(name)) return parameter;
    parameter.pointer = tensor<T>(name);
    parameter.stride = integer(name);
    return parameter;
  }

  // Memory that a kernel writes; every byte starts as 0xff, which is NaN as a float. `save` stores it.
  template <class T>
  T* output(const char* name, int64_t count) {
    return static_cast<T*>(allocate_output(name, count * int64_t(sizeof(T))));
  }

  void save() const;

 private:
  struct Contents;

  const void* read(const char* name, const char* suffix);
  void* allocate_output(const char* name, int64_t bytes);

  Contents* contents_;
};

}  // namespace dgemma
