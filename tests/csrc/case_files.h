// A case of an emulated kernel: a folder with `case`, lines of a name and numbers, and one file per tensor.
//
// Every tensor is allocated at its exact size, so AddressSanitizer sees what lies outside.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "emulation/machine.h"
#include "params.h"

namespace dgemma {

class Case {
 public:
  explicit Case(std::string folder) : folder_(std::move(folder)) {
    std::ifstream file(folder_ + "/case");
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      std::string name;
      words >> name;
      numbers_[name].assign(std::istream_iterator<double>(words), {});
    }
    if (numbers_.empty()) emulation::fail("%s/case cannot be read", folder_.c_str());
  }

  bool has(const std::string& name) const { return numbers_.count(name) != 0; }
  double number(const std::string& name) const { return numbers_.at(name).at(0); }
  int64_t integer(const std::string& name) const { return int64_t(number(name)); }

  // The bytes of a tensor, or nullptr where the case has no such file.
  template <class T>
  const T* tensor(const std::string& name) {
    std::ifstream file(folder_ + "/" + name, std::ios::binary);
    if (!file) return nullptr;
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    char* memory = allocate(bytes.size(), 0);
    std::memcpy(memory, bytes.data(), bytes.size());
    return reinterpret_cast<const T*>(memory);
  }

  // `NAME` holds whether there is one value per row; the values are in the file of that name.
  template <class T>
  RowParameter<T> row_parameter(const std::string& name) {
    RowParameter<T> parameter;
    if (!has(name)) return parameter;
    parameter.pointer = tensor<T>(name);
    parameter.stride = integer(name);
    return parameter;
  }

  // Memory that a kernel writes; every byte starts as 0xff, which is NaN as a float. `save` stores it.
  template <class T>
  T* output(const std::string& name, int64_t count) {
    outputs_.push_back({name, size_t(count) * sizeof(T), allocate(size_t(count) * sizeof(T), 0xff)});
    return reinterpret_cast<T*>(outputs_.back().memory);
  }

  void save() const {
    for (const Output& output : outputs_)
      std::ofstream(folder_ + "/" + output.name, std::ios::binary).write(output.memory, int64_t(output.bytes));
  }

 private:
  struct Output {
    std::string name;
    size_t bytes;
    char* memory;
  };
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };

  char* allocate(size_t bytes, int fill) {
    char* memory = static_cast<char*>(std::malloc(bytes));
    std::memset(memory, fill, bytes);
    alive_.emplace_back(memory);
    return memory;
  }

  std::string folder_;
  std::map<std::string, std::vector<double>> numbers_;
  std::vector<std::unique_ptr<char, Free>> alive_;
  std::vector<Output> outputs_;
};

}  // namespace dgemma
