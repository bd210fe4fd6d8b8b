#include <pybind11/stl.h>

#include <array>

#include "../bindings.h"
#include "philox.h"

namespace dgemma {

void register_random(pybind11::module_& m) {
  m.def(
      "philox4x32",
      [](const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
        const PhiloxWords words =
            philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
        return std::array<uint32_t, 4>{words.word[0], words.word[1], words.word[2], words.word[3]};
      },
      pybind11::arg("counter"), pybind11::arg("key"), "Ten rounds of Philox 4x32, as every kernel here draws.");
}

}  // namespace dgemma
