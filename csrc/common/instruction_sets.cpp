#include "instruction_sets.h"

#include <stdexcept>

namespace dgemma {
namespace {

struct Entry {
  const char* name;
  InstructionSet set;
  bool supported;
};

const Entry* entries(int& count) {
#if defined(__x86_64__)
  static const Entry all[] = {
      {"avx512", InstructionSet::kAvx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {"avx2", InstructionSet::kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {"plain", InstructionSet::kPlain, true},
  };
#else
  static const Entry all[] = {{"plain", InstructionSet::kPlain, true}};
#endif
  count = int(sizeof all / sizeof *all);
  return all;
}

}  // namespace

std::string host_instruction_sets() {
  int count = 0;
  const Entry* all = entries(count);
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (!all[i].supported) continue;
    if (!names.empty()) names += ' ';
    names += all[i].name;
  }
  return names;
}

InstructionSet instruction_set(const char* op, const std::string& name) {
  int count = 0;
  const Entry* all = entries(count);
  for (int i = 0; i < count; ++i)
    if (all[i].supported && (name.empty() || name == all[i].name)) return all[i].set;
  throw std::invalid_argument(std::string(op) + ": instruction set '" + name + "' is not among those of this CPU (" +
                              host_instruction_sets() + ")");
}

}  // namespace dgemma
