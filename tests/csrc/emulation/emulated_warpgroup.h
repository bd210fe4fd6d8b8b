// The wrappers of csrc/common/device/cluster.cuh and warpgroup.cuh, carried out by machine.h.
//
// Products are carried out where they are waited for, so what touches sums or operands in between shows. That operands in
// shared memory are there is looked at where a product is started, too.
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

// A block's shared memory begins 1 KB behind a multiple of 16 MB.
class SharedMatrix {
 public:
  SharedMatrix(uint32_t offset, uint32_t leading, uint32_t stride)
      : bits_(matrix_descriptor(uint32_t(emulation::block_of_cluster()) << 24 | (kStart + offset), leading, stride)) {}

  SharedMatrix at(uint32_t bytes) const {
    SharedMatrix result = *this;
    result.bits_ = bits_ >> 32 << 32 | descriptor_at(uint32_t(bits_), bytes);
    return result;
  }

  // What the instruction makes of the descriptor: bytes from the start of the block's shared memory.
  uint32_t offset() const { return field(0) - kStart; }
  uint32_t leading() const { return field(16); }
  uint32_t stride() const { return field(32); }

 private:
  static constexpr uint32_t kStart = 1024;
  uint32_t field(int first) const { return uint32_t(bits_ >> first & 0x3fff) << 4; }

  uint64_t bits_;
};

inline void show_copies_to_multiplies() { emulation::fence_for_tensor_cores(); }

// The 16-byte chunk at an address, of which so many bytes are read, where the swizzle of 128 bytes puts it: bits 4 to 6 are exchanged by bits 7 to 9.
inline const uint16_t* swizzled_chunk(uint32_t address, int thread, uint32_t bytes) {
  return reinterpret_cast<const uint16_t*>(
      emulation::read_shared_by_tensor_cores(address ^ (address >> 7 & 7) << 4, bytes, thread));
}

// One wgmma as a warp sees it: 16 rows of the left operand, all of the right one.
struct Product {
  float* sum;
  int columns;
  bool add, left_in_registers, right_by_rows, is_bfloat16;
  uint32_t registers[4];
  SharedMatrix left, right;

  float value(uint16_t bits) const { return is_bfloat16 ? to_float(Bfloat16{bits}) : to_float(Float16{bits}); }
};

struct ProductsOfThread {
  bool begun = false;
  std::vector<Product> open;                 // not committed
  std::vector<std::vector<Product>> groups;  // under way, oldest first
};

inline ProductsOfThread& own_products() {
  static std::vector<ProductsOfThread> all(2048);
  return all[size_t(emulation::thread_of_cluster())];
}

template <int kSteps>
void pin_operand(uint32_t (&)[kSteps][4]) {}

template <int kTiles>
void begin_multiplies(float (&)[kTiles][4]) {
  own_products().begun = true;
}

inline void commit_multiplies() {
  ProductsOfThread& own = own_products();
  own.groups.push_back(std::move(own.open));
  own.open = {};
  own.begun = false;
}

// Operands of 64 rows or columns, k along the rows of 128 bytes: row r and eight k from 8 c on.
inline const uint16_t* chunk_of_row(const SharedMatrix& m, int r, int c, int thread, uint32_t bytes = 16) {
  return swizzled_chunk(m.offset() + uint32_t(r / 8) * m.stride() + uint32_t(r % 8) * 128 + uint32_t(c) * 16,
                        thread, bytes);
}

// Operands with k across the rows of 128 bytes, which hold 64 columns: row k and eight columns from 8 c on.
inline const uint16_t* chunk_of_columns(const SharedMatrix& m, int k, int c, int thread, uint32_t bytes = 16) {
  return swizzled_chunk(m.offset() + uint32_t(c / 8) * m.leading() + uint32_t(k / 8) * m.stride() + uint32_t(k % 8) * 128 +
                            uint32_t(c % 8) * 16,
                        thread, bytes);
}

// This lane's share of what its warp reads, a byte of each chunk, which comes as a whole.
inline void look_at_operands(const Product& product) {
  const int thread = thread_x(), lane = thread % 32, warp = thread / 32 % 4;
  for (int c = 0; c < 2 && lane < 16 && !product.left_in_registers; ++c)
    chunk_of_row(product.left, 16 * warp + lane, c, thread, 1);
  for (int n = lane; n < product.columns && product.right_by_rows; n += 32)
    for (int c = 0; c < 2; ++c) chunk_of_row(product.right, n, c, thread, 1);
  for (int c = lane / 16; c < product.columns / 8 && !product.right_by_rows; c += 2)
    chunk_of_columns(product.right, lane % 16, c, thread, 1);
}

inline void start_product(const Product& product) {
  ProductsOfThread& own = own_products();
  if (!own.begun) emulation::fail("wgmma by thread %d without a fence before it", thread_x());
  look_at_operands(product);
  own.open.push_back(product);
}

inline void multiply_together(void* const (&lanes)[32]) {
  const int first_thread = thread_x() / 32 * 32, warp = thread_x() / 32 % 4;
  // The oldest group is waited for.
  const auto list = [&](int lane) -> std::vector<Product>& {
    return static_cast<ProductsOfThread*>(lanes[lane])->groups.front();
  };
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
    if (!product.right_by_rows) {
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

template <int kPending, int kTiles>
void wait_multiplies(float (&)[kTiles][4]) {
  ProductsOfThread& own = own_products();
  if (!own.open.empty()) emulation::fail("thread %d waits for products that it has not committed", thread_x());
  while (own.groups.size() > kPending) {
    emulation::warp_instruction("wgmma", &own, multiply_together);
    // Another thread may have carried them out for all.
    sync_warp();
    own.groups.erase(own.groups.begin());
  }
}

// A left operand in registers has none in shared memory.
template <class T, int kTiles, class Left>
Product product_of(float (&sum)[kTiles][4], const Left& left, const SharedMatrix& right, bool add, bool right_by_rows) {
  Product product{&sum[0][0], 8 * kTiles, add, !std::is_same_v<Left, SharedMatrix>, right_by_rows,
                  std::is_same_v<T, Bfloat16>, {}, right, right};
  if constexpr (std::is_same_v<Left, SharedMatrix>)
    product.left = left;
  else
    std::memcpy(product.registers, left, sizeof(product.registers));
  return product;
}

template <class T, int kTiles>
void multiply_rows(float (&sum)[kTiles][4], const SharedMatrix& left, const SharedMatrix& right, bool add) {
  start_product(product_of<T>(sum, left, right, add, true));
}

template <class T>
void multiply_rows(float (&sum)[4][4], const uint32_t (&left)[4], const SharedMatrix& right, bool add) {
  start_product(product_of<T>(sum, left, right, add, true));
}

template <class T>
void multiply_columns(float (&sum)[32][4], const uint32_t (&left)[4], const SharedMatrix& right) {
  start_product(product_of<T>(sum, left, right, true, false));
}

}  // namespace dgemma::hw
