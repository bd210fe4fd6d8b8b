// The wrappers of csrc/common/device/cluster.cuh and warpgroup.cuh, carried out by machine.h.
//
// Products are carried out where they are waited for, so what touches sums or operands in between shows.
#pragma once

#include <vector>

#include "common/device/matrix_descriptor.h"
#include "emulated_hardware.h"

namespace dgemma::hw {

inline void arrive_cluster() { emulation::arrive_cluster(); }
inline void wait_cluster() { emulation::wait_cluster(); }
inline void store_in_cluster(int block, uint32_t offset, Words4 value) {
  std::memcpy(emulation::write_in_cluster(block, offset, sizeof(value)), &value, sizeof(value));
}

struct SharedMatrix {
  uint32_t offset, leading, stride;

  // What the instruction makes of the descriptor. A block's shared memory begins 1 KB behind a multiple of 16 MB.
  SharedMatrix as_described() const {
    constexpr uint32_t kStart = 1024;
    const uint64_t bits = matrix_descriptor(uint32_t(emulation::block_of_cluster()) << 24 | (kStart + offset), leading, stride);
    const auto field = [bits](int first) { return uint32_t(bits >> first & 0x3fff) << 4; };
    return {field(0) - kStart, field(16), field(32)};
  }
};

inline void show_copies_to_multiplies() { emulation::fence_for_tensor_cores(); }

// The 16-byte chunk at an address, where the swizzle of 128 bytes puts it: bits 4 to 6 are exchanged by bits 7 to 9.
inline const uint16_t* swizzled_chunk(uint32_t address, int thread) {
  return reinterpret_cast<const uint16_t*>(
      emulation::read_shared_by_tensor_cores(address ^ (address >> 7 & 7) << 4, 16, thread));
}

// One wgmma as a warp sees it: 16 rows of the left operand, all of the right one.
struct Product {
  float* sum;
  int columns;
  bool add, left_in_registers, is_bfloat16;
  uint32_t registers[4];
  SharedMatrix left, right;

  float value(uint16_t bits) const { return is_bfloat16 ? to_float(Bfloat16{bits}) : to_float(Float16{bits}); }
};

struct ProductsOfThread {
  bool begun = false, committed = false;
  std::vector<Product> running;
};

inline ProductsOfThread& own_products() {
  static std::vector<ProductsOfThread> all(2048);
  return all[size_t(emulation::thread_of_cluster())];
}

template <int kTiles>
void begin_multiplies(float (&)[kTiles][4]) {
  own_products().begun = true;
}

inline void commit_multiplies() { own_products().committed = true; }

inline void start_product(const Product& product) {
  ProductsOfThread& own = own_products();
  if (!own.begun || own.committed) emulation::fail("wgmma by thread %d without a fence before it", thread_x());
  own.running.push_back(product);
}

// Operands of 64 rows or columns, k along the rows of 128 bytes: row r and eight k from 8 c on.
inline const uint16_t* chunk_of_row(const SharedMatrix& m, int r, int c, int thread) {
  return swizzled_chunk(m.offset + uint32_t(r / 8) * m.stride + uint32_t(r % 8) * 128 + uint32_t(c) * 16, thread);
}

// Operands with k across the rows of 128 bytes, which hold 64 columns: row k and eight columns from 8 c on.
inline const uint16_t* chunk_of_columns(const SharedMatrix& m, int k, int c, int thread) {
  return swizzled_chunk(m.offset + uint32_t(c / 8) * m.leading + uint32_t(k / 8) * m.stride + uint32_t(k % 8) * 128 +
                            uint32_t(c % 8) * 16,
                        thread);
}

inline void multiply_together(void* const (&lanes)[32]) {
  const int first_thread = thread_x() / 32 * 32, warp = thread_x() / 32 % 4;
  const auto list = [&](int lane) -> std::vector<Product>& { return static_cast<ProductsOfThread*>(lanes[lane])->running; };
  for (size_t i = 0; i < list(0).size(); ++i) {
    float left[16][16], right[256][16];
    const Product& product = list(0)[i];
    for (int lane = 0; lane < 32; ++lane) {
      if (list(lane).size() != list(0).size()) emulation::fail("lanes of thread %d's warp multiply differently", thread_x());
      if (!product.left_in_registers) continue;
      for (int r = 0; r < 4; ++r)
        for (int h = 0; h < 2; ++h)
          left[lane / 4 + r % 2 * 8][2 * (lane % 4) + r / 2 * 8 + h] =
              product.value(uint16_t(list(lane)[i].registers[r] >> (16 * h)));
    }
    for (int r = 0; r < 16 && !product.left_in_registers; ++r)
      for (int c = 0; c < 2; ++c)
        for (int j = 0; j < 8; ++j)
          left[r][8 * c + j] = product.value(chunk_of_row(product.left, 16 * warp + r, c, first_thread + r)[j]);
    if (product.left_in_registers) {
      for (int k = 0; k < 16; ++k)
        for (int c = 0; c < product.columns / 8; ++c)
          for (int j = 0; j < 8; ++j)
            right[8 * c + j][k] = product.value(chunk_of_columns(product.right, k, c, first_thread + k)[j]);
    } else {
      for (int n = 0; n < product.columns; ++n)
        for (int c = 0; c < 2; ++c)
          for (int j = 0; j < 8; ++j)
            right[n][8 * c + j] = product.value(chunk_of_row(product.right, n, c, first_thread + n % 32)[j]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* sum = list(lane)[i].sum;
      for (int tile = 0; tile < product.columns / 8; ++tile)
        for (int j = 0; j < 4; ++j) {
          const float* row = left[lane / 4 + j / 2 * 8];
          const float* column = right[8 * tile + lane % 4 * 2 + j % 2];
          double total = product.add ? sum[4 * tile + j] : 0.0;
          for (int k = 0; k < 16; ++k) total += double(row[k]) * double(column[k]);
          sum[4 * tile + j] = float(total);
        }
    }
  }
}

template <int kTiles>
void wait_multiplies(float (&)[kTiles][4]) {
  ProductsOfThread& own = own_products();
  if (!own.committed) emulation::fail("thread %d waits for products that it has not committed", thread_x());
  emulation::warp_instruction("wgmma", &own, multiply_together);
  // Another thread may have carried them out for all.
  sync_warp();
  own = {};
}

template <class T>
void multiply_rows(float (&sum)[8][4], const SharedMatrix& left, const SharedMatrix& right, bool add) {
  start_product({&sum[0][0], 64, add, false, std::is_same_v<T, Bfloat16>, {}, left.as_described(), right.as_described()});
}

template <class T>
void multiply_columns(float (&sum)[32][4], const uint32_t (&left)[4], const SharedMatrix& right) {
  start_product({&sum[0][0], 256, true, true, std::is_same_v<T, Bfloat16>, {left[0], left[1], left[2], left[3]}, {},
                 right.as_described()});
}

}  // namespace dgemma::hw
