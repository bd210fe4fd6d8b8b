// The wrappers of csrc/common/hardware.cuh and csrc/common/device/, carried out by machine.h.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/numeric.h"
#include "machine.h"

#define DGEMMA_KERNEL inline void

namespace dgemma::hw {

constexpr int kWarp = 32;

struct alignas(16) Words4 {
  uint32_t word[4];
};

inline int thread_x() { return emulation::thread_index(); }
inline int block_threads() { return emulation::block_size(); }
inline int64_t block_x() { return emulation::block_index().x; }
inline int64_t block_y() { return emulation::block_index().y; }
inline int64_t block_z() { return emulation::block_index().z; }

inline void sync_block() { emulation::barrier(); }
inline int sync_count(bool predicate) { return emulation::barrier_count(predicate); }
inline void sync_warp() { emulation::warp_barrier(); }

template <class T>
struct ShuffleLane {
  T value, result;
  int source;  // lane
};

template <class T>
T shuffle_from(T value, int source) {
  ShuffleLane<T> own{value, value, source};
  emulation::warp_instruction("a shuffle", &own, [](void* const(&lanes)[32]) {
    for (void* lane : lanes) {
      auto* to = static_cast<ShuffleLane<T>*>(lane);
      if (to->source >= 0) to->result = static_cast<ShuffleLane<T>*>(lanes[to->source % 32])->value;
    }
  });
  return own.result;
}

template <class T>
T shuffle(T value, int lane) {
  return shuffle_from(value, lane);
}
template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle_from(value, (thread_x() % 32) ^ mask);
}
template <class T>
T shuffle_up(T value, int delta) {
  return shuffle_from(value, thread_x() % 32 - delta);
}

inline uint32_t ballot(bool predicate) {
  struct Lane {
    bool predicate;
    uint32_t result;
  } own{predicate, 0};
  emulation::warp_instruction("a ballot", &own, [](void* const(&lanes)[32]) {
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= uint32_t(static_cast<Lane*>(lanes[i])->predicate) << i;
    for (void* lane : lanes) static_cast<Lane*>(lane)->result = mask;
  });
  return own.result;
}
struct ValueLane {
  uint32_t value, result;
};
inline uint32_t lanes_equal(uint32_t value) {
  ValueLane own{value, 0};
  emulation::warp_instruction("a match", &own, [](void* const(&lanes)[32]) {
    for (void* lane : lanes)
      for (int i = 0; i < 32; ++i) {
        auto* to = static_cast<ValueLane*>(lane);
        to->result |= uint32_t(static_cast<ValueLane*>(lanes[i])->value == to->value) << i;
      }
  });
  return own.result;
}
inline uint32_t smallest_of_warp(uint32_t value) {
  ValueLane own{value, 0};
  emulation::warp_instruction("a minimum", &own, [](void* const(&lanes)[32]) {
    uint32_t smallest = 0xffffffffu;
    for (void* lane : lanes)
      if (static_cast<ValueLane*>(lane)->value < smallest) smallest = static_cast<ValueLane*>(lane)->value;
    for (void* lane : lanes) static_cast<ValueLane*>(lane)->result = smallest;
  });
  return own.result;
}
inline int count_bits(uint32_t mask) { return __builtin_popcount(mask); }
inline int find_first_set(uint32_t mask) { return __builtin_ffs(int(mask)); }
inline int count_leading_zeros(uint32_t mask) { return mask ? __builtin_clz(mask) : 32; }
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t numbers) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> (numbers >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return result;
}

template <class T>
struct Shared {
  uint32_t offset;

  uint32_t at(int index) const { return offset + uint32_t(index) * uint32_t(sizeof(T)); }
  T load(int index) const {
    T value;
    std::memcpy(&value, emulation::read_shared(at(index), sizeof(T), thread_x()), sizeof(T));
    return value;
  }
  void store(int index, T value) const {
    std::memcpy(emulation::write_shared(at(index), sizeof(T), thread_x()), &value, sizeof(T));
  }
};

inline Words4 load_streaming(const void* address) { return *static_cast<const Words4*>(address); }

template <class T, class Choose>
uint32_t choose_pair(uint32_t a, uint32_t b, Choose choose) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const T first{uint16_t(a >> shift)}, second{uint16_t(b >> shift)};
    const float x = to_float(first), y = to_float(second);
    result |= uint32_t((choose(x, y) ? first : second).bits) << shift;
  }
  return result;
}
template <class T>
uint32_t larger_pair(uint32_t a, uint32_t b) {
  return choose_pair<T>(a, b, [](float x, float y) { return std::isnan(y) || x > y; });
}
template <class T>
uint32_t smaller_pair(uint32_t a, uint32_t b) {
  return choose_pair<T>(a, b, [](float x, float y) { return std::isnan(y) || x < y; });
}
template <class T>
uint32_t larger_pair_or_nan(uint32_t a, uint32_t b) {
  return choose_pair<T>(a, b, [](float x, float y) { return std::isnan(x) || x > y; });
}

inline float exp2_fast(float x) {
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0.0f : result;
}
inline float multiply_rounded(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline float smaller_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b); }
inline float larger_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

inline void copy_async_16(uint32_t offset, const void* source, bool valid) {
  emulation::start_copy(offset, source, valid);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void wait_copies() {
  emulation::wait_copies(kPending);
}

struct MatrixLane {
  uint32_t offset;
  uint32_t* fragment;
};

// Row r of matrix i lies at the offset that lane 8 i + r gives. Lane l receives the values (l / 4, 2 (l % 4)) and
// (l / 4, 2 (l % 4) + 1) of each matrix, or of its transpose.
template <bool kTransposed>
void load_matrices_together(void* const (&lanes)[32]) {
  const int first_thread = thread_x() / 32 * 32;
  // Eight rows of 16 bytes fill the 32 banks once, where no two of them meet in one.
  for (int i = 0; i < 4; ++i) {
    uint32_t banks = 0;
    for (int r = 0; r < 8; ++r) banks |= 1u << static_cast<MatrixLane*>(lanes[8 * i + r])->offset / 16 % 8;
    if (banks != 0xff) emulation::fail("ldmatrix of thread %d's warp: rows of matrix %d share banks", thread_x(), i);
  }
  uint16_t matrices[4][8][8];
  for (int lane = 0; lane < 32; ++lane)
    std::memcpy(matrices[lane / 8][lane % 8],
                emulation::read_shared(static_cast<MatrixLane*>(lanes[lane])->offset, 16, first_thread + lane), 16);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint16_t low = kTransposed ? matrices[i][column][row] : matrices[i][row][column];
      const uint16_t high = kTransposed ? matrices[i][column + 1][row] : matrices[i][row][column + 1];
      static_cast<MatrixLane*>(lanes[lane])->fragment[i] = low | uint32_t(high) << 16;
    }
}

inline void load_matrices(uint32_t (&fragment)[4], uint32_t offset) {
  MatrixLane own{offset, fragment};
  emulation::warp_instruction("ldmatrix", &own, load_matrices_together<false>);
}
inline void load_matrices_transposed(uint32_t (&fragment)[4], uint32_t offset) {
  MatrixLane own{offset, fragment};
  emulation::warp_instruction("ldmatrix.trans", &own, load_matrices_together<true>);
}

template <class T>
float half_of(uint32_t pair, int which) {
  return to_float(T{uint16_t(pair >> (16 * which))});
}

// Fragments of mma.m16n8k16, as the PTX ISA has them, with g = lane / 4 and t = lane % 4:
// a[r] holds row g + 8 (r % 2), columns 2t + 8 (r / 2) and the next; b[r] rows 2t + 8 r and the next, column g;
// sum[j] row g + 8 (j / 2), column 2t + j % 2.
template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
  } own{sum, a, {b0, b1}};
  emulation::warp_instruction("mma", &own, [](void* const(&lanes)[32]) {
    float left[16][16], right[8][16];
    for (int lane = 0; lane < 32; ++lane) {
      const Lane& l = *static_cast<Lane*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r)
        for (int h = 0; h < 2; ++h) left[g + r % 2 * 8][2 * t + r / 2 * 8 + h] = half_of<T>(l.a[r], h);
      for (int r = 0; r < 2; ++r)
        for (int h = 0; h < 2; ++h) right[g][2 * t + r * 8 + h] = half_of<T>(l.b[r], h);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) {
        const int row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + j % 2;
        float& target = static_cast<Lane*>(lanes[lane])->sum[j];
        double total = target;
        for (int k = 0; k < 16; ++k) total += double(left[row][k]) * double(right[column][k]);
        target = float(total);
      }
  });
}

template <class T>
uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, Bfloat16>)
    return to_bfloat16(low).bits | uint32_t(to_bfloat16(high).bits) << 16;
  else
    return to_float16(low).bits | uint32_t(to_float16(high).bits) << 16;
}

template <class T>
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  return pack<T>(half_of<T>(a, 0) * half_of<T>(b, 0), half_of<T>(a, 1) * half_of<T>(b, 1));
}

}  // namespace dgemma::hw
