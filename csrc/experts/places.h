// Where pairs lie once they are sorted by expert: what routing leaves for the products.
#pragma once

#include "config.h"

namespace dgemma {

struct ExpertsPlaces {
  int32_t* order = nullptr;  // [P]: pairs by expert, ascending within an expert; unwritten behind the last expert's
  int32_t* tiles = nullptr;  // [3, most]: a tile's expert (-1: unused), its first place, the end of its expert's places
  int64_t pairs = 0, most = 0;  // P; tiles that any routing can need
  int tile_pairs = 0;           // pairs of a tile
};

inline ExpertsPlaces experts_places(const ExpertsParams& p, const ExpertsWorkspace& workspace) {
  char* memory = static_cast<char*>(p.workspace);
  auto* order = reinterpret_cast<int32_t*>(memory + workspace.order);
  auto* tiles = reinterpret_cast<int32_t*>(memory + workspace.tile_list);
  return {order, tiles, workspace.pairs, workspace.most, workspace.tile_pairs};
}

}  // namespace dgemma
