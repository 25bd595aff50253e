// The ratio-clip equations, one token at a time. Host and device, no torch, no CUDA headers.
//
// D = logp - old_logp, r = exp(D), A the advantage; `loss` is the token's loss and `grad` its d loss / d logp, both
// before the aggregation weight. Bounds are inclusive: r == bound keeps its gradient.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "storage.h"

namespace fca {

// The numbers are the contract with objectives/ (PPO and GSPO share a token rule; GSPO feeds it the sequence ratio).
enum class TokenRule : int64_t { PPO = 0, CISPO = 1 };
enum class KlEstimator : int64_t { NONE = 0, K1 = 1, K2 = 2, K3 = 3, K3_PLUS = 4 };

// Where a log-ratio enters exp it is first clamped to this: e^20 ~ 4.9e8 stays far from overflow in every sum below.
constexpr double kMaxLogRatio = 20.0;

// Both sides are evaluated: a loop of selects has no control flow, so that compilers vectorise it.
template <typename T>
FCA_INLINE T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}

// A condition as 1 or 0 of the arithmetic type: products and sums of these vectorise where chains of bools do not.
template <typename T>
FCA_INLINE T mask(bool condition) {
  return condition ? T(1) : T(0);
}

// clip(x, low, high); a NaN stays NaN.
template <typename T>
FCA_INLINE T clip(T x, T low, T high) {
  x = select(x < low, low, x);
  return select(x > high, high, x);
}

// Values past these become them, so that no later product or sum meets inf * 0 or inf - inf. 2^127 is finite in
// bfloat16 too and its sums run in float64; 2^960 leaves 2^63 tokens and a 1 / normalizer of 2^126 below float64's end.
FCA_INLINE float saturation(float) { return 0x1p127f; }
FCA_INLINE double saturation(double) { return 0x1p960; }

template <typename T>
FCA_INLINE T saturate(T x, T most = saturation(T())) {
  return clip(x, -most, most);
}

template <typename T>
FCA_INLINE T clamp_log_ratio(T d) {
  return clip(d, T(-kMaxLogRatio), T(kMaxLogRatio));
}

// exp for |x| <= 20 by range reduction to |f| <= ln2/2 and a Taylor polynomial: 2^n e^f, x = n ln2 + f.
// Branch-free, so that the token loop vectorises on every instruction set and gives the same bits on all of them.
// The remainder of the degree-7 (float) / degree-13 (double) polynomial is 5e-9 / 4e-18 of the value.
FCA_INLINE float exp_clamped(float x) {
  const float t = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: n sits in the low mantissa bits
  const float n = t - 12582912.0f;
  float f = x - n * 0.693145751953125f;  // ln2, high part: 16 bits, n * it is exact
  f = f - n * 1.42860682030941723212e-6f;
  float p = 1.0f / 5040;
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(t) << 23));
}

FCA_INLINE double exp_clamped(double x) {
  const double t = x * 1.4426950408889634074 + 6755399441055744.0;  // 1.5 * 2^52
  const double n = t - 6755399441055744.0;
  double f = x - n * 6.93147180369123816490e-01;  // ln2, high 32 bits
  f = f - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * f + 1.0 / 479001600.0;
  p = p * f + 1.0 / 39916800.0;
  p = p * f + 1.0 / 3628800.0;
  p = p * f + 1.0 / 362880.0;
  p = p * f + 1.0 / 40320.0;
  p = p * f + 1.0 / 5040.0;
  p = p * f + 1.0 / 720.0;
  p = p * f + 1.0 / 120.0;
  p = p * f + 1.0 / 24.0;
  p = p * f + 1.0 / 6.0;
  p = p * f + 0.5;
  p = p * f + 1.0;
  p = p * f + 1.0;
  return bit_cast<double>(bit_cast<uint64_t>(p) + (bit_cast<uint64_t>(t) << 52));
}

// Absent bounds are infinite (low: 0), so that no rule needs a branch for them.
template <typename T>
struct Bounds {
  T low, high, dual, cap;
};

template <typename T>
struct Token {
  T loss, grad;
  T clipped_low, clipped_high, clipped_dual;  // 1 or 0
};

template <typename T>
FCA_INLINE bool near_zero(T x) {
  const T half_ln2 = T(0.34657359027997264);  // the range the polynomial is made for
  return select(x < T(0), -x, x) <= half_ln2;
}

// e^x - 1 - x, from the polynomial itself near 0, where the difference would keep no digit of the exponential.
template <typename T>
FCA_INLINE T exp_beyond_linear(T x, T exp_x) {
  T q = sizeof(T) == 8 ? T(1.0 / 6227020800.0) : T(0);
  if (sizeof(T) == 8) {
    q = q * x + T(1.0 / 479001600.0);
    q = q * x + T(1.0 / 39916800.0);
    q = q * x + T(1.0 / 3628800.0);
    q = q * x + T(1.0 / 362880.0);
    q = q * x + T(1.0 / 40320.0);
  }
  q = q * x + T(1.0 / 5040.0);
  q = q * x + T(1.0 / 720.0);
  q = q * x + T(1.0 / 120.0);
  q = q * x + T(1.0 / 24.0);
  q = q * x + T(1.0 / 6.0);
  q = q * x + T(0.5);
  return select(near_zero(x), x * x * q, exp_x - T(1) - x);
}

// PPO:  loss = -min(min(r, cap) A, clip(r, low, high) A), for A < 0 also at most -dual A
//       grad = -A r K, K = 0 where A > 0, r > high | A < 0, r < low | A < 0, r > dual | r > cap
//       (cap < r <= high leaves A < 0 on the clipped branch, which still moves with r: K = 1)
template <typename T>
FCA_INLINE Token<T> ppo_token(T r, T A, const Bounds<T>& bound) {
  const T x = select(r > bound.cap, bound.cap, r) * A;
  const T y = clip(r, bound.low, bound.high) * A;
  const T loss = -select(x < y, x, y);
  const T most = -bound.dual * A;

  const T gain = mask<T>(A > T(0)), harm = mask<T>(A < T(0));
  const T low = harm * mask<T>(r < bound.low);
  const T high = gain * mask<T>(r > bound.high);
  const T dual = harm * mask<T>(r > bound.dual);
  const T inside = harm * mask<T>(r >= bound.low) * mask<T>(r <= bound.high);
  const T flat = low + high + dual + mask<T>(r > bound.cap) * (T(1) - inside);
  const T bounded = select(most < loss, most, loss);
  return {select(A < T(0), bounded, loss), select(flat > T(0), T(0), -A * r), low, high, dual};
}

// CISPO: loss = -sg(clip(r, low, high)) A logp ; grad = -A clip(r, low, high), never zero
template <typename T>
FCA_INLINE Token<T> cispo_token(T r, T A, T logp, const Bounds<T>& bound) {
  const T low = mask<T>(A < T(0)) * mask<T>(r < bound.low);
  const T high = mask<T>(A > T(0)) * mask<T>(r > bound.high);
  const T pull = saturate(A * clip(r, bound.low, bound.high));
  return {-pull * logp, -pull, low, high, T(0)};
}

// KL to a reference, x = logp - ref_logp: k1 = x ; k2 = x^2 / 2 ; k3 = e^-x - 1 + x with dk3 = 1 - e^-x ;
// k3+ has k3's value and k2's gradient.
template <typename T, KlEstimator KL>
FCA_INLINE void kl_token(T x, T& value, T& grad) {
  const T e = exp_clamped(clamp_log_ratio(-x));
  const T k3 = exp_beyond_linear(-x, e);
  const T slope = select(near_zero(x), x - k3, T(1) - e);
  value = KL == KlEstimator::K1 ? x : (KL == KlEstimator::K2 ? T(0.5) * x * x : k3);
  grad = KL == KlEstimator::K1 ? T(1) : (KL == KlEstimator::K3 ? slope : x);
}

}  // namespace fca
