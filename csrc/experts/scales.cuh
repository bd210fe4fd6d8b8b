// The scales of quantised weights.
#pragma once

#include "copies.cuh"

namespace dgemma {

// The fp32 scales of a lane's rows of FP8 weights, two of each of the warp's two times 16, for a stage. Sixteen rows
// that begin at a multiple of 16 lie in one block.
struct ExpertsScales {
  const float* scale;
  int offset[2];
  int half_step, step;  // to eight rows further on, and from a stage to the next

  // row(i): of the expert's matrix, the first of the two.
  template <class Row>
  DGEMMA_DEVICE_MEMBER void begin(const ExpertsMatrix& matrix, int expert, const ExpertsSides& sides, Row row) {
    constexpr int kBlock = kExpertsScaleBlock;
    const auto blocks_of = [](int count) DGEMMA_INLINE { return (count + kBlock - 1) / kBlock; };
    const int blocks = blocks_of(sides.depth);
    const int64_t of_expert = matrix.scale_by_row ? sides.rows : blocks_of(sides.rows) * blocks;
    scale = static_cast<const float*>(matrix.scale) + expert * of_expert;
    half_step = matrix.scale_by_row ? 8 : 0;
    step = matrix.scale_by_row ? 0 : 1;
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) offset[i] = matrix.scale_by_row ? row(i) : row(i) / kBlock * blocks;
  }

  DGEMMA_DEVICE_MEMBER void load(float (&values)[2][2], int stage) const {
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half) values[i][half] = scale[offset[i] + half * half_step + stage * step];
    }
  }
};

// The two e4m3 scales of a lane's chunk in each of its rows of NVFP4 weights, which are loaded a stage ahead.
struct ExpertsGroupScales {
  const unsigned char* scale;  // of the lane's chunk in the expert's first row
  int offset[2], half_step;
  int column, depth;           // of the lane's chunk in the first stage
  uint32_t next[2][2];

  template <class Row>
  DGEMMA_DEVICE_MEMBER void begin(const ExpertsMatrix& matrix, int expert, const ExpertsSides& sides, Row row) {
    depth = sides.depth;
    column = hw::thread_x() % 4 * 32;
    const int row_bytes = depth / 16;
    scale = static_cast<const unsigned char*>(matrix.scale) + int64_t(expert) * sides.rows * row_bytes + column / 16;
    half_step = 8 * row_bytes;
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) offset[i] = row(i) * row_bytes;
    load_next(0);
  }

  DGEMMA_DEVICE_MEMBER void load_next(int stage) {
    constexpr int kColumns = ExpertsFormat<WeightFormat::kNvfp4>::kColumns;
    const bool inside = stage * kColumns + column < depth;
    const unsigned char* from = scale + stage * (kColumns / 16);
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half)
        next[i][half] = inside ? *reinterpret_cast<const uint16_t*>(from + offset[i] + half * half_step) : 0;
    }
  }
};

struct NoScales {
  template <class Row>
  DGEMMA_DEVICE_MEMBER void begin(const ExpertsMatrix&, int, const ExpertsSides&, Row) {}
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
