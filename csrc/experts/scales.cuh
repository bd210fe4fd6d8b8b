// The scales of quantised weights, loaded a stage ahead.
#pragma once

#include "copies.cuh"

namespace dgemma {

// The fp32 scales of a lane's rows of FP8 weights, two of each of the warp's two times 16, for a stage.
struct ExpertsScales {
  const float* scale;
  int offset[2][2];
  int step;  // from a stage to the next
  float next[2][2];

  // row(i, half): of the expert's matrix.
  template <class Row>
  DGEMMA_DEVICE_MEMBER void begin(const ExpertsMatrix& matrix, int expert, const ExpertsSides& sides, Row row) {
    const int blocks = matrix.scale_by_row ? 1 : (sides.depth + 127) / 128;
    const int64_t of_expert = matrix.scale_by_row ? sides.rows : (sides.rows + 127) / 128 * blocks;
    scale = static_cast<const float*>(matrix.scale) + expert * of_expert;
    step = matrix.scale_by_row ? 0 : 1;
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half)
        offset[i][half] = matrix.scale_by_row ? row(i, half) : row(i, half) / 128 * blocks;
    }
    load(0);
  }

  DGEMMA_DEVICE_MEMBER void load(int stage) {
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half) next[i][half] = scale[offset[i][half] + stage * step];
    }
  }
};

// The two e4m3 scales of a lane's chunk in each of its rows of NVFP4 weights, for a stage.
struct ExpertsGroupScales {
  const unsigned char* scale;
  int offset[2][2];
  int column, depth;  // of the lane's chunk in the first stage
  uint32_t next[2][2];

  template <class Row>
  DGEMMA_DEVICE_MEMBER void begin(const ExpertsMatrix& matrix, int expert, const ExpertsSides& sides, Row row) {
    depth = sides.depth;
    column = hw::thread_x() % 4 * 32;
    scale = static_cast<const unsigned char*>(matrix.scale) + int64_t(expert) * sides.rows * (depth / 16);
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half) offset[i][half] = (row(i, half) * depth + column) / 16;
    }
    load(0);
  }

  DGEMMA_DEVICE_MEMBER void load(int stage) {
    constexpr int kColumns = ExpertsFormat<WeightFormat::kNvfp4>::kColumns;
    const bool inside = stage * kColumns + column < depth;
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half)
        next[i][half] =
            inside ? *reinterpret_cast<const uint16_t*>(scale + offset[i][half] + stage * (kColumns / 16)) : 0;
    }
  }
};

struct NoScales {
  template <class Row>
  DGEMMA_DEVICE_MEMBER void begin(const ExpertsMatrix&, int, const ExpertsSides&, Row) {}
  DGEMMA_DEVICE_MEMBER void load(int) {}
};

template <WeightFormat kFormat>
struct ExpertsScalesOf {
  using Type = NoScales;
};
template <>
struct ExpertsScalesOf<WeightFormat::kFp8> {
  using Type = ExpertsScales;
};
template <>
struct ExpertsScalesOf<WeightFormat::kNvfp4> {
  using Type = ExpertsGroupScales;
};

}  // namespace dgemma
