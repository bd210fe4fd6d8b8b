// Which weights and rows a block of threads multiplies, and how they get into shared memory.
#pragma once

#include "../common/device/async_copy.cuh"
#include "../common/device/qualifiers.cuh"
#include "../common/hardware.cuh"
#include "config.h"
#include "places.h"

namespace dgemma {

// What a block of threads computes: columns of the result from `column` on, for the places begin ... end - 1.
struct ExpertsTile {
  int expert, begin, end;
  int column;
};

// An expert's matrix: rows, columns of the result, rows of the gate (0: it has none), columns.
struct ExpertsSides {
  int rows, columns, gate, depth;
};

template <bool kGated>
DGEMMA_DEVICE int column_of(const ExpertsTile& tile, int row) {
  return tile.column + (kGated ? row / 32 * 16 + row % 16 : row);
}

// The row of the expert's matrix.
template <bool kGated>
DGEMMA_DEVICE int matrix_row(const ExpertsTile& tile, int row, const ExpertsSides& sides) {
  return column_of<kGated>(tile, row) + (kGated && row % 32 >= 16 ? sides.gate : 0);
}

// Where a chunk of weights lies in its stage, by an exclusive or that brings what is read at once into different banks:
// by ldmatrix the same chunk of eight rows, else by eight lanes four chunks of two rows side by side.
template <WeightFormat kFormat, int kPairs>
DGEMMA_DEVICE uint32_t weight_place(int row, int chunk) {
  using Shape = ExpertsShape<kFormat, kPairs>;
  const int swizzled = kFormat == WeightFormat::kPlain ? chunk ^ (row & 7)
                       : kFormat == WeightFormat::kFp8 ? chunk ^ (row & 1) * 4
                                                       : chunk;
  return uint32_t(row) * Shape::kRowBytes + uint32_t(swizzled) * 16;
}

// As weight_place for rows of the other operand, of which a lane reads kValues / 8 chunks one after the other.
template <WeightFormat kFormat, int kPairs>
DGEMMA_DEVICE uint32_t pair_place(int pair, int chunk) {
  using Shape = ExpertsShape<kFormat, kPairs>;
  const int swizzled = kFormat == WeightFormat::kPlain ? chunk ^ (pair & 7)
                       : kFormat == WeightFormat::kFp8 ? chunk ^ (pair & 1)
                                                       : chunk ^ (chunk >> 3) ^ (pair & 1) * 2;
  return Shape::kPairsOffset + uint32_t(pair) * Shape::kPairBytes + uint32_t(swizzled) * 16;
}

// What one thread copies into a stage: its chunk of every so many rows of weights, and of every so many pairs.
template <class T, WeightFormat kFormat, int kPairs, bool kGated>
struct ExpertsCopies {
  using Shape = ExpertsShape<kFormat, kPairs>;
  static constexpr int kRowStep = kExpertsThreads / Shape::kChunks, kRowCopies = Shape::kRows / kRowStep;
  static constexpr int kPairStep = kExpertsThreads / Shape::kPairChunks, kPairCopies = kPairs / kPairStep;
  static_assert(kRowStep % 8 == 0 && kPairStep % 2 == 0 && (kPairStep % 8 == 0 || kFormat != WeightFormat::kPlain),
                "the rows of a thread lie alike in their stage");

  const unsigned char* weights;  // this chunk of the first of these rows
  uint32_t row_bytes, up_bytes;  // of a row, and from the gate's rows to those of up
  uint32_t valid;                // a bit for each of these rows, and from bit 16 on for each of these pairs
  const T* pairs;                // the first row
  uint32_t pair_chunk[kPairCopies];  // this chunk of their rows, in chunks from there on
  uint32_t row_place, pairs_place;
  int column, pair_column;       // of these chunks in the first stage
  int depth;                     // columns

  DGEMMA_DEVICE_MEMBER void begin(const ExpertsMatrix& matrix, const ExpertsTile& tile, const ExpertsSides& sides) {
    const int thread = hw::thread_x(), row = thread / Shape::kChunks, chunk = thread % Shape::kChunks;
    depth = sides.depth;
    row_bytes = uint32_t(depth / ExpertsFormat<kFormat>::kValues * 16);
    up_bytes = uint32_t(sides.gate) * row_bytes;
    column = chunk * ExpertsFormat<kFormat>::kValues;
    weights = static_cast<const unsigned char*>(matrix.weights) +
              (int64_t(tile.expert) * sides.rows + matrix_row<kGated>(tile, row, sides)) * row_bytes + chunk * 16;
    row_place = weight_place<kFormat, kPairs>(row, chunk);
    valid = 0;
    DGEMMA_UNROLL
    for (int i = 0; i < kRowCopies; ++i) {
      const bool exists = column_of<kGated>(tile, row + i * kRowStep) < sides.columns;
      valid |= uint32_t(exists) << i;
    }
  }

  // From the first of these rows to the one that lies `rows` further on in the stage, in the matrix.
  DGEMMA_DEVICE_MEMBER int64_t bytes_to(int rows) const {
    if (!kGated) return int64_t(rows) * row_bytes;
    // Steps of 16 rows lead from gate to up and back, those of 32 stay.
    return int64_t(rows / 32 * 16) * row_bytes + (rows % 32 != 0 ? up_bytes : 0);
  }

  // row_at(place): the row of the other operand that a place of the tile stands for.
  template <class RowAt>
  DGEMMA_DEVICE_MEMBER void begin_pairs(const void* data, int64_t stride, const ExpertsTile& tile, RowAt row_at) {
    const int thread = hw::thread_x(), pair = thread / Shape::kPairChunks, chunk = thread % Shape::kPairChunks;
    pair_column = chunk * 8;
    pairs = static_cast<const T*>(data);
    pairs_place = pair_place<kFormat, kPairs>(pair, chunk);
    DGEMMA_UNROLL
    for (int i = 0; i < kPairCopies; ++i) {
      const int place = tile.begin + pair + i * kPairStep;
      const bool exists = place < tile.end;
      valid |= uint32_t(exists) << (16 + i);
      pair_chunk[i] = (exists ? uint32_t(row_at(place) * stride / 8) : 0) + chunk;
    }
  }

  // Starts to fill a stage with columns stage * kColumns ...; what is not there becomes zeros.
  DGEMMA_DEVICE_MEMBER void fill(uint32_t buffer, int stage) const {
    const int first = stage * ExpertsFormat<kFormat>::kColumns;
    const bool inside = first + column < depth, pair_inside = first + pair_column < depth;
    const unsigned char* from = weights + int64_t(stage) * Shape::kRowBytes;
    DGEMMA_UNROLL
    for (int i = 0; i < kRowCopies; ++i)
      hw::copy_async_16(buffer + row_place + i * kRowStep * Shape::kRowBytes, from + bytes_to(i * kRowStep),
                        inside && (valid >> i & 1));
    DGEMMA_UNROLL
    for (int i = 0; i < kPairCopies; ++i)
      hw::copy_async_16(buffer + pairs_place + i * kPairStep * Shape::kPairBytes,
                        pairs + first + int64_t(pair_chunk[i]) * 8, pair_inside && (valid >> (16 + i) & 1));
  }
};

}  // namespace dgemma
