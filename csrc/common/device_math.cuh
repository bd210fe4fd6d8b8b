// exp and tanh of the kernels.
#pragma once

#include "hardware.cuh"
#include "statistics.h"

namespace dgemma {

constexpr float kLog2E = 1.44269504089f;

// e^d for d <= 0; exactly 0 where the result would not be a normal number; NaN stays.
DGEMMA_DEVICE float exp_device(float d) { return hw::exp2_fast(d * kLog2E); }

// tanh within a few ulp of the result, also for small x. The hardware's own tanh has 11 bits.
DGEMMA_DEVICE float tanh_device(float x) {
  const float magnitude = fabsf(x);
  // 1 - 2 / (e^2x + 1) loses digits below one half, where the series takes over.
  const float large = 1.0f - 2.0f * hw::reciprocal_fast(hw::exp2_fast(magnitude * (2 * kLog2E)) + 1.0f);
  const float w = x * x;
  // Minimax fit of (tanh x - x) / x^3 on |x| < 0.55; relative error of tanh below 5e-9.
  float p = w * -0x1.9b3046p-8f + 0x1.593d08p-6f;
  p = p * w - 0x1.b9287ap-5f;
  p = p * w + 0x1.110d26p-3f;
  p = p * w - 0x1.55554ap-2f;
  const float small = x + x * (w * p);
  return magnitude < 0.55f ? small : copysignf(large, x);
}

// scale * tanh(u) where |u| < 1: an odd polynomial, a minimax fit of relative error 4.7e-9. Its last product is rounded
// by itself: in one instruction with what a caller subtracts, equal numbers would have a difference other than 0.
DGEMMA_DEVICE float scaled_tanh_near_0(float u, float scale) {
  const float w = u * u;
  float p = fmaf(scale * -0x1.77dc2p-12f, w, scale * 0x1.2da484p-9f);
  p = fmaf(p, w, scale * -0x1.04609ep-7f);
  p = fmaf(p, w, scale * 0x1.600986p-6f);
  p = fmaf(p, w, scale * -0x1.b9622p-5f);
  p = fmaf(p, w, scale * 0x1.110be2p-3f);
  p = fmaf(p, w, scale * -0x1.55553cp-2f);
  return hw::multiply_rounded(u, fmaf(p, w, scale));
}

// scale * tanh(u) for any u; 1 - 2 / (e^2u + 1) cancels near 0, where the polynomial takes its place.
DGEMMA_DEVICE float scaled_tanh(float u, float scale) {
  const float far = fmaf(hw::reciprocal_fast(hw::exp2_fast(u * (2 * kLog2E)) + 1.0f), -2.0f * scale, scale);
  return fabsf(u) < 0.7f ? scaled_tanh_near_0(u, scale) : far;
}

}  // namespace dgemma
