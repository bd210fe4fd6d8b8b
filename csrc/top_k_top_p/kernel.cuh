// The least logit of a row that top-k and top-p keep, by a search: no sort, no memory besides the row.
//
// With W(v) the weight of the logits above v, a filter keeps the logits v with W(v) <= target. For top-k a logit weighs
// 1 and the target is k - 1, for top-p it weighs e^x and the target is the share p of all. W falls as v rises, so the
// cutoff lies where it crosses the target, and each walk over the row finds W at several places at once. Sums are made
// in one order, in which adding a logit never lowers one: W falls in fp32, too.
#pragma once

#include <type_traits>

#include "../common/device/qualifiers.cuh"
#include "../common/exponents.cuh"
#include "../common/hardware.cuh"
#include "../common/ordering.h"
#include "../params.h"
#include "config.h"

namespace dgemma {

constexpr int kPivots = kTopKTopPPivots;
constexpr int kWarps = kTopKTopPThreads / hw::kWarp;
static_assert(hw::kWarp % kPivots == 0 && hw::kWarp % kWarps == 0, "a lane has a pivot, and reads of a warp");

// The largest number below x; -inf below itself.
DGEMMA_DEVICE float below(float x) {
  // Behind the order of 0 stands -0, which is no smaller.
  const uint32_t order = order_of(x) - (x == 0.0f ? 2 : 1);
  return x == -INFINITY ? x : score_of(~order);
}

// NaN if there is one among them.
template <class T>
DGEMMA_DEVICE float largest_of(const hw::Words4& words) {
  if constexpr (sizeof(T) == 4) {
    return hw::larger_or_nan(hw::larger_or_nan(element<T>(words, 0), element<T>(words, 1)),
                             hw::larger_or_nan(element<T>(words, 2), element<T>(words, 3)));
  } else {
    const hw::Words4 both{{hw::larger_pair_or_nan<T>(hw::larger_pair_or_nan<T>(words.word[0], words.word[1]),
                                                     hw::larger_pair_or_nan<T>(words.word[2], words.word[3])),
                           0, 0, 0}};
    return hw::larger_or_nan(element<T>(both, 0), element<T>(both, 1));
  }
}

template <class T>
DGEMMA_DEVICE float smallest_of(const hw::Words4& words) {
  if constexpr (sizeof(T) == 4) {
    return fminf(fminf(element<T>(words, 0), element<T>(words, 1)), fminf(element<T>(words, 2), element<T>(words, 3)));
  } else {
    const hw::Words4 both{{hw::smaller_pair<T>(hw::smaller_pair<T>(words.word[0], words.word[1]),
                                               hw::smaller_pair<T>(words.word[2], words.word[3])),
                           0, 0, 0}};
    return fminf(element<T>(both, 0), element<T>(both, 1));
  }
}

// What a thread looks at at a time.
template <class T>
struct Vector {
  static constexpr int kCount = 16 / sizeof(T);
  hw::Words4 words;
  DGEMMA_DEVICE_MEMBER float operator[](int i) const { return element<T>(words, i); }
  DGEMMA_DEVICE_MEMBER float largest() const { return largest_of<T>(words); }
  DGEMMA_DEVICE_MEMBER float smallest() const { return smallest_of<T>(words); }
};

struct Single {
  static constexpr int kCount = 1;
  float value;
  DGEMMA_DEVICE_MEMBER float operator[](int) const { return value; }
  DGEMMA_DEVICE_MEMBER float largest() const { return value; }
  DGEMMA_DEVICE_MEMBER float smallest() const { return value; }
};

// A row as the block's threads read it: vectors of 16 bytes from an aligned address on, and by single threads the few
// logits before the first and behind the last.
template <class T>
struct Row {
  static constexpr int kElements = Vector<T>::kCount;

  const T* logits;
  int vocab, head, vectors;

  DGEMMA_DEVICE_MEMBER Row(const TopKTopPParams& params, uint32_t row)
      : logits(row_of_logits<T>(params, row)), vocab(int(params.vocab)) {
    const int before = int(-reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
    head = before < vocab ? before : vocab;
    vectors = (vocab - head) / kElements;
  }

  DGEMMA_DEVICE_MEMBER hw::Words4 vector(int index) const {
    return index < vectors ? hw::load_streaming(logits + head + int64_t{index} * kElements)
                           : hw::Words4{{0, 0, 0, 0}};
  }

  // Gives this thread's vectors and its single logit to the visitor.
  template <class Visitor>
  DGEMMA_DEVICE_MEMBER void read(Visitor& visitor) const {
    const int thread = hw::thread_x();
    hw::Words4 ahead[kTopKTopPAhead];
    DGEMMA_UNROLL
    for (int i = 0; i < kTopKTopPAhead; ++i) ahead[i] = vector(thread + i * kTopKTopPThreads);
    DGEMMA_NO_UNROLL
    for (int index = thread; index < vectors; index += kTopKTopPThreads) {
      const Vector<T> next{ahead[0]};
      DGEMMA_UNROLL
      for (int i = 1; i < kTopKTopPAhead; ++i) ahead[i - 1] = ahead[i];
      ahead[kTopKTopPAhead - 1] = vector(index + kTopKTopPAhead * kTopKTopPThreads);
      visitor(next);
    }
    const int behind = vectors * kElements;
    if (thread < vocab - behind) visitor(Single{to_float(logits[thread < head ? thread : behind + thread])});
  }
};

// What the threads' largest logits are searched as: a row of a logit a thread.
struct OwnLargest {
  float value;

  template <class Visitor>
  DGEMMA_DEVICE_MEMBER void read(Visitor& visitor) const {
    visitor(Single{value});
  }
};

struct Count {
  using Sum = int;
  DGEMMA_DEVICE_MEMBER int operator()(float) const { return 1; }
};

// e^x by that of the row's largest logit. None passes 1, whatever a formula rounds beside that one.
template <class Exponent>
struct Mass {
  using Sum = float;
  Exponent exponent;

  // 0 for what does not count, by a bound: a choice would be a branch around the exponent of each logit.
  DGEMMA_DEVICE_MEMBER float operator()(float x, bool counts = true) const {
    return hw::exp2_fast(fminf(exponent(x), counts ? 0.0f : -300.0f));
  }
};

// What a walk finds: weights, and the ends of where it looked.
template <class Sum>
struct Tally {
  Sum sums[kPivots];
  float least, most;

  DGEMMA_DEVICE_MEMBER Tally() : least(INFINITY), most(-INFINITY) {
    DGEMMA_UNROLL
    for (int i = 0; i < kPivots; ++i) sums[i] = 0;
  }
};

// The first walk: the ends of the row.
struct Ends : Tally<int> {
  template <class Logits>
  DGEMMA_DEVICE_MEMBER void operator()(const Logits& logits) {
    least = fminf(least, logits.smallest());
    most = hw::larger_or_nan(most, logits.largest());
  }
};

// The walk that adds up the mass from a logit on.
template <class Weight>
struct Whole : Tally<float> {
  Weight weight;
  float from;

  DGEMMA_DEVICE_MEMBER Whole(const Weight& weight, float from) : weight(weight), from(from) {}

  template <class Logits>
  DGEMMA_DEVICE_MEMBER void operator()(const Logits& logits) {
    if (logits.largest() < from) return;
    float sum = 0.0f;
    DGEMMA_UNROLL
    for (int i = 0; i < Logits::kCount; ++i) sum += weight(logits[i], logits[i] >= from);
    sums[0] += sum;
  }
};

// A walk of the search: the weight above each pivot, and the ends of what lies in (low, high]. Most vectors have
// nothing above `low` and are passed over.
template <class Weight>
struct Walk : Tally<typename Weight::Sum> {
  using Sum = typename Weight::Sum;
  Weight weight;
  float low, high, pivots[kPivots];

  // From the pivot of each lane.
  DGEMMA_DEVICE_MEMBER Walk(const Weight& weight, float low, float high, float pivot)
      : weight(weight), low(low), high(high) {
    DGEMMA_UNROLL
    for (int i = 0; i < kPivots; ++i) pivots[i] = hw::shuffle(pivot, i);
  }

  // A vector's own sums come first: a long sum of equal numbers would round each time the same way.
  template <class Logits>
  DGEMMA_DEVICE_MEMBER void operator()(const Logits& logits) {
    if (logits.largest() <= low) return;
    Sum sums[kPivots];
    DGEMMA_UNROLL
    for (int j = 0; j < kPivots; ++j) sums[j] = 0;
    DGEMMA_UNROLL
    for (int i = 0; i < Logits::kCount; ++i) {
      const float x = logits[i];
      const Sum own = weight(x);
      DGEMMA_UNROLL
      for (int j = 0; j < kPivots; ++j) sums[j] = x > pivots[j] ? sums[j] + own : sums[j];
      this->least = x > low ? fminf(this->least, x) : this->least;
      this->most = x <= high ? fmaxf(this->most, x) : this->most;
    }
    DGEMMA_UNROLL
    for (int j = 0; j < kPivots; ++j) this->sums[j] += sums[j];
  }
};

// Sums over groups of kCount lanes, one in each: half of them go to the other half of the group, again and again.
template <class Sum, int kCount>
DGEMMA_DEVICE Sum spread(const Sum (&sums)[kCount]) {
  constexpr int kHalf = kCount / 2;
  const bool upper = hw::thread_x() & kHalf;
  Sum kept[kHalf];
  DGEMMA_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    const Sum low = sums[i], high = sums[i + kHalf];
    kept[i] = (upper ? high : low) + hw::shuffle_xor(upper ? low : high, kHalf);
  }
  if constexpr (kHalf == 1)
    return kept[0];
  else
    return spread(kept);
}

// Of the block, in all its threads: the sum of pivot `lane % kPivots`, and the ends.
template <class Sum>
struct Found {
  Sum sum;
  float least, most;
};

// Walks write their halves of shared memory by turns, so that one barrier does for both.
template <class Sum>
DGEMMA_DEVICE Found<Sum> found_by_block(const Tally<Sum>& tally, int& turn) {
  const int lane = hw::thread_x() % hw::kWarp, warp = hw::thread_x() / hw::kWarp;
  const uint32_t start = uint32_t(turn) * kTopKTopPWalkBytes;
  const hw::Shared<uint32_t> least{start}, most{start + kWarps * 4};
  const hw::Shared<Sum> sums{start + kWarps * 8};
  turn ^= 1;

  Sum sum = spread(tally.sums);
  DGEMMA_UNROLL
  for (int mask = kPivots; mask < hw::kWarp; mask *= 2) sum += hw::shuffle_xor(sum, mask);
  // The order of the largest one by its complement: NaN is 0 there, and stays.
  const uint32_t first = hw::smallest_of_warp(order_of(tally.least));
  const uint32_t last = hw::smallest_of_warp(~order_of(tally.most));
  if (lane < kPivots) sums.store(warp * kPivots + lane, sum);
  if (lane == 0) {
    least.store(warp, first);
    most.store(warp, last);
  }
  hw::sync_block();

  // By every warp for itself, in the same order.
  sum = 0;
  DGEMMA_UNROLL
  for (int i = 0; i < kWarps * kPivots; i += hw::kWarp) sum += sums.load(i + lane);
  DGEMMA_UNROLL
  for (int mask = kPivots; mask < hw::kWarp; mask *= 2) sum += hw::shuffle_xor(sum, mask);
  return {sum, score_of(~hw::smallest_of_warp(least.load(lane % kWarps))),
          score_of(hw::smallest_of_warp(most.load(lane % kWarps)))};
}

// The pivot of this lane in an interval: spread evenly by value, which most rows take the fewest walks with, and one in
// the middle of all fp32 numbers in between, so that no row takes more than 32.
DGEMMA_DEVICE float pivot_of_lane(float low, float high, bool first) {
  const int number = hw::thread_x() % kPivots;
  const float share = float(number + 1) / kPivots;
  const float from = fmaxf(low, -kLargestFloat), to = fminf(high, kLargestFloat);
  const float even = from * (1.0f - share) + to * share;
  const uint32_t start = order_of(low), middle = start + (order_of(high) - start) / 2;
  // The first walk finds whether the cutoff lies above `low` at all.
  return number < kPivots - 1 ? even : first ? low : score_of(~middle);
}

// The least logit v in (low, high] with W(v) <= target, or `otherwise` where W(low) is not above the target either.
// W(high) is 0.
template <class Weight, class Source>
DGEMMA_DEVICE float least_kept(const Source& source, const Weight& weight, typename Weight::Sum target, float low,
                               float high, float otherwise, int& turn) {
  using Sum = typename Weight::Sum;
  bool first = true;
  while (true) {
    const float pivot = pivot_of_lane(low, high, first);
    Walk<Weight> walk(weight, low, high, pivot);
    source.read(walk);
    const Found<Sum> found = found_by_block(walk, turn);
    if (first && hw::shuffle(found.sum, kPivots - 1) <= target) return otherwise;
    first = false;
    if (found.least >= found.most) return found.least;
    const bool above = found.sum > target;
    const uint32_t last = ~hw::smallest_of_warp(~order_of(above ? pivot : low));
    const uint32_t next = hw::smallest_of_warp(order_of(above ? high : pivot));
    low = fmaxf(below(found.least), score_of(~last));
    high = fminf(found.most, score_of(~next));
  }
}

// The cutoff of a filter, at least `floor`, a logit of the row, which has none above `most`. That of the threads'
// largest logits alone is not above it: what they weigh is part of what the row weighs. It takes no memory, and most
// rows have few logits above it.
template <class Weight, class T>
DGEMMA_DEVICE float cutoff_of(const Row<T>& row, float largest, const Weight& weight, typename Weight::Sum target,
                              float floor, float most, int& turn) {
  const float near = least_kept(OwnLargest{largest}, weight, target, below(floor), most, floor, turn);
  return least_kept(row, weight, target, below(near), most, floor, turn);
}

// That of top-p, of the mass of the logits from `from` on.
template <class T, class Exponent>
DGEMMA_DEVICE float cutoff_of_share(const Row<T>& row, float largest, const Exponent& exponent, float share,
                                    float from, float floor, float most, int& turn) {
  const Mass<Exponent> mass{exponent};
  Whole<Mass<Exponent>> whole(mass, from);
  row.read(whole);
  const float all = hw::shuffle(found_by_block(whole, turn).sum, 0);
  return cutoff_of(row, largest, mass, share * all, floor, most, turn);
}

template <class T>
DGEMMA_KERNEL DGEMMA_BOUNDS(kTopKTopPThreads, 1) top_k_top_p_kernel(const TopKTopPParams params) {
  const int64_t index = hw::block_x();
  const Row<T> row(params, uint32_t(index));
  int turn = 0;

  Ends own;
  row.read(own);
  const Found<int> ends = found_by_block(own, turn);
  const float least = ends.least, most = ends.most;

  const float given = of_row(params.temperature, index), temperature = given == 0.0f ? 1.0f : given;
  const Exponents exponents{params.softcap > 0 ? 1.0f / params.softcap : 0.0f, exponent_rate(temperature)};
  const AnyCapped any(exponents, params.softcap, most);
  const float x = (exponents.capped() ? any.reference : most) / temperature;
  float cutoff = -INFINITY;
  // Not for NaN.
  if (fabsf(x) <= kLargestFloat) {
    float floor = least;
    if (params.top_k > 0 && params.top_k <= params.vocab)
      cutoff = floor = cutoff_of(row, own.most, Count{}, int(params.top_k - 1), least, most, turn);
    if (params.top_p < 1.0f) {
      const auto cutoff_by = [&](const auto& exponent) DGEMMA_INLINE {
        return cutoff_of_share(row, own.most, exponent, params.top_p, params.top_k_first ? floor : least, floor, most,
                               turn);
      };
      const float relative = fmaxf(fabsf(least), fabsf(most)) * exponents.inverse_softcap;
      if (!exponents.capped())
        cutoff = cutoff_by(Uncapped{exponents.rate, most});
      else if (exponents.polynomial() && relative < 1.0f)
        cutoff = cutoff_by(capped_below_1(exponents, most));
      else
        cutoff = cutoff_by(any);
    }
  }
  if (hw::thread_x() == 0) params.cutoff[index] = cutoff;
}

}  // namespace dgemma
