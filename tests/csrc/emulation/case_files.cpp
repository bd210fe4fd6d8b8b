#include "case_files.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace dgemma {

struct Case::Contents {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  struct Output {
    std::string name;
    size_t bytes;
    char* memory;
  };

  std::string folder;
  std::map<std::string, std::vector<double>> numbers;
  std::vector<std::unique_ptr<char, Free>> alive;
  std::vector<Output> outputs;

  char* allocate(size_t bytes, int fill) {
    char* memory = static_cast<char*>(std::malloc(bytes));
    std::memset(memory, fill, bytes);
    alive.emplace_back(memory);
    return memory;
  }
};

Case::Case(const char* folder) : contents_(new Contents) {
  contents_->folder = folder;
  std::ifstream file(contents_->folder + "/case");
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    words >> name;
    contents_->numbers[name].assign(std::istream_iterator<double>(words), {});
  }
  if (contents_->numbers.empty()) emulation::fail("%s/case cannot be read", folder);
}

Case::~Case() { delete contents_; }

bool Case::has(const char* name, const char* suffix) const {
  return contents_->numbers.count(std::string(name) + suffix) != 0;
}

double Case::number(const char* name, int at, const char* suffix) const {
  return contents_->numbers.at(std::string(name) + suffix).at(size_t(at));
}

void Case::save() const {
  for (const Contents::Output& output : contents_->outputs)
    std::ofstream(contents_->folder + "/" + output.name, std::ios::binary).write(output.memory, int64_t(output.bytes));
}

const void* Case::read(const char* name, const char* suffix) {
  std::ifstream file(contents_->folder + "/" + name + suffix, std::ios::binary);
  if (!file) return nullptr;
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  char* memory = contents_->allocate(bytes.size(), 0);
  std::memcpy(memory, bytes.data(), bytes.size());
  return memory;
}

void* Case::allocate_output(const char* name, int64_t bytes) {
  contents_->outputs.push_back({name, size_t(bytes), contents_->allocate(size_t(bytes), 0xff)});
  return contents_->outputs.back().memory;
}

}  // namespace dgemma
