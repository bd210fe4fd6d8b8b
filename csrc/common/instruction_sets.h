// Which of the builds of a host file this CPU runs.
#pragma once

#include <string>

namespace dgemma {

enum class InstructionSet { kPlain, kAvx2, kAvx512 };

// The instruction sets that this CPU can run, best first.
std::string host_instruction_sets();

// The one named, or the best for an empty name; `op` is for the message where it is not there.
InstructionSet instruction_set(const char* op, const std::string& name);

}  // namespace dgemma
