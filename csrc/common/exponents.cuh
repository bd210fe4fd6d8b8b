// Rows of logits, and the exponents of 2 that softcap and temperature make of them.
#pragma once

#include <type_traits>

#include "device/qualifiers.cuh"
#include "device_math.cuh"

namespace dgemma {

// Where row `row` of at most 2^31 - 1 begins.
template <class T, class Params>
DGEMMA_HD const T* row_of_logits(const Params& params, uint32_t row) {
  const T* logits = static_cast<const T*>(params.logits);
  if (params.rows0 == 1) return logits + row * params.stride1;
  const uint32_t inner = uint32_t(params.rows1), outer = row / inner;
  return logits + int64_t{outer} * params.stride0 + int64_t{row - outer * inner} * params.stride1;
}

// Element `i` of a vector as fp32.
template <class T>
DGEMMA_DEVICE float element(const hw::Words4& words, int i) {
  if constexpr (sizeof(T) == 4) {
    return float_from_bits(words.word[i]);
  } else if constexpr (std::is_same_v<T, Bfloat16>) {
    const uint32_t word = words.word[i / 2];
    return float_from_bits(i % 2 ? word & 0xffff0000u : word << 16);
  } else {
    return to_float(T{uint16_t(words.word[i / 2] >> (i % 2 * 16))});
  }
}

struct Extremes {
  float max{-INFINITY}, magnitude{0.0f};

  DGEMMA_DEVICE_MEMBER void add(float largest, float smallest) {
    max = fmaxf(max, largest);
    magnitude = fmaxf(magnitude, fmaxf(largest, -smallest));
  }
};

// The largest logit and the largest magnitude of a lane's vectors. 16-bit logits are compared two at a time.
template <class T, int kVectors>
DGEMMA_DEVICE Extremes extremes_of(const hw::Words4 (&words)[kVectors]) {
  Extremes result;
  if constexpr (sizeof(T) == 4) {
    DGEMMA_UNROLL
    for (int i = 0; i < kVectors * 4; ++i) {
      const float x = element<T>(words[i / 4], i % 4);
      result.max = fmaxf(result.max, x);
      result.magnitude = fmaxf(result.magnitude, fabsf(x));
    }
  } else {
    hw::Words4 both{{words[0].word[0], words[0].word[0], 0, 0}};
    DGEMMA_UNROLL
    for (int i = 1; i < kVectors * 4; ++i) {
      both.word[0] = hw::larger_pair<T>(both.word[0], words[i / 4].word[i % 4]);
      both.word[1] = hw::smaller_pair<T>(both.word[1], words[i / 4].word[i % 4]);
    }
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) result.add(element<T>(both, i), element<T>(both, i + 2));
  }
  return result;
}

// Beyond it a temperature is the limit of a one-hot distribution.
constexpr float kLargestRate = 1e30f;

DGEMMA_DEVICE float exponent_rate(float temperature) { return fminf(kLog2E / temperature, kLargestRate); }

// What every formula of a row's exponents is made from.
struct Exponents {
  float inverse_softcap;  // 0: no softcap
  float rate;             // log2(e) / temperature

  DGEMMA_DEVICE_MEMBER bool capped() const { return inverse_softcap > 0; }

  // Whether the exponents of finite logits below the softcap are a polynomial of the logits themselves, as they are
  // unless softcap or temperature are so small or large that its coefficients, the last of which has the twelfth power
  // of the softcap in it, are no normal numbers.
  DGEMMA_DEVICE_MEMBER bool polynomial() const {
    const float square = inverse_softcap * inverse_softcap, sixth = square * square * square;
    const float last = rate * sixth * sixth;
    return rate > 1e-30f && rate < kLargestRate && last > 1e-34f && last < 1e30f;
  }
};

// Exponents without a softcap, of logits whose differences are finite.
struct Uncapped {
  float rate, max;

  DGEMMA_DEVICE_MEMBER float operator()(float x) const { return (x - max) * rate; }
};

// Exponents of logits below the softcap: an odd polynomial whose coefficients have the softcap and the temperature in
// them. Its last product is rounded by itself: in one instruction with the subtraction the largest logit would not
// have exponent 0.
template <int kTerms>
struct Capped {
  float coefficient[kTerms], reference;

  DGEMMA_DEVICE_MEMBER Capped(const float (&fit)[kTerms], const Exponents& exponents, float max) {
    float factor = exponents.rate;
    DGEMMA_UNROLL
    for (int i = 0; i < kTerms; ++i) {
      coefficient[i] = fit[i] * factor;
      factor *= exponents.inverse_softcap * exponents.inverse_softcap;
    }
    reference = 0.0f;
    reference = (*this)(max);
  }

  DGEMMA_DEVICE_MEMBER float operator()(float x) const {
    const float w = x * x;
    float p = coefficient[kTerms - 1];
    DGEMMA_UNROLL
    for (int i = kTerms - 2; i >= 0; --i) p = fmaf(p, w, coefficient[i]);
    return hw::multiply_rounded(x, p) - reference;
  }
};

// Minimax fits of tanh(u) / u by powers of u^2.
// |u| < 0.5, relative error 1.3e-8.
DGEMMA_DEVICE Capped<5> capped_below_half(const Exponents& exponents, float max) {
  const float fit[] = {1.0f, -0x1.5554a4p-2f, 0x1.10e438p-3f, -0x1.b20fdcp-5f, 0x1.18bd7p-6f};
  return {fit, exponents, max};
}
// |u| < 1, relative error 5e-8.
DGEMMA_DEVICE Capped<7> capped_below_1(const Exponents& exponents, float max) {
  const float fit[] = {0x1.fffffep-1f, -0x1.55540ap-2f, 0x1.10e672p-3f, -0x1.b5eb82p-5f,
                       0x1.4c6e52p-6f, -0x1.968b5ap-8f, 0x1.10e5bep-10f};
  return {fit, exponents, max};
}

// Exponents of any logits under a softcap. The difference is one of capped logits, finite whatever softcap and
// temperature are, and only then becomes an exponent.
struct AnyCapped {
  float inverse_softcap, softcap, rate, reference;

  DGEMMA_DEVICE_MEMBER AnyCapped(const Exponents& exponents, float softcap, float peak)
      : inverse_softcap(exponents.inverse_softcap), softcap(softcap), rate(exponents.rate), reference(capped(peak)) {}

  DGEMMA_DEVICE_MEMBER float capped(float x) const { return scaled_tanh(x * inverse_softcap, softcap); }
  DGEMMA_DEVICE_MEMBER float operator()(float x) const { return (capped(x) - reference) * rate; }
};

}  // namespace dgemma
