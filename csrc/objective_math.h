// The ratio-clip equations, one token at a time. Host and device, no torch, no CUDA headers.
//
// D = logp - old_logp, r = exp(D) (the sequence's ratio for GSPO and GMPO), A the advantage; `loss` is the token's loss
// and `grad` its d loss / d logp, both before the aggregation weight. Bounds are inclusive: r == bound keeps its
// gradient. Sources and defaults are in the docstrings of fused_clip_adam/objectives/.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "storage.h"

namespace fca {

// The numbers are the contract with objectives/objective.py.
enum class Rule : int64_t {
  PPO = 0,
  CISPO = 1,
  SAPO = 2,
  GPG = 3,
  DRO = 4,
  DPPO_TV = 5,
  DPPO_KL = 6,
  GPPO = 7,
  DCPO = 8,
  ASPO = 9,
  PPO_EWMA = 10,
  KL_COV = 11,
  CLIP_COV = 12,
  VESPO = 13,
  GSPO = 14,
  GMPO = 15,
};
constexpr int64_t kRules = 16;

// The ratio of the rule is its sequence's, and a token's gradient a share of the sequence's.
FCA_INLINE constexpr bool has_sequence_ratio(Rule rule) { return rule == Rule::GSPO || rule == Rule::GMPO; }
// The rule reads a number gathered from the token's sequence first.
FCA_INLINE constexpr bool needs_sequence(Rule rule) { return has_sequence_ratio(rule) || rule == Rule::VESPO; }

enum class Aggregation : int64_t { TOKEN_MEAN = 0, SEQUENCE_MEAN = 1, SEQUENCE_SUM = 2, CONSTANT = 3 };
enum class KlEstimator : int64_t { NONE = 0, K1 = 1, K2 = 2, K3 = 3, K3_PLUS = 4 };

// The layout of ClipStats.buffer (objectives/stats.py holds the same order).
enum Stat : int {
  TOKENS,
  CLIPPED_LOW,
  CLIPPED_HIGH,
  CLIPPED_DUAL,
  SUPPRESSED_MASS,
  TOTAL_MASS,
  KL_K1,
  KL_K2,
  KL_K3,
  RATIO_SUM,
  RATIO_SQ_SUM,
  RATIO_MIN,
  RATIO_MAX,
  NONFINITE,
  kStats
};

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

// The same of what is never negative.
template <typename T>
FCA_INLINE T at_most(T x, T most = saturation(T())) {
  return select(x > most, most, x);
}

template <typename T>
FCA_INLINE T clamp_log_ratio(T d) {
  return clip(d, T(-kMaxLogRatio), T(kMaxLogRatio));
}

// exp for |x| <= 80 by range reduction to |f| <= ln2/2 and a Taylor polynomial: 2^n e^f, x = n ln2 + f.
// Branch-free, so that the token loop vectorises on every instruction set and gives the same bits on all of them.
// The remainder of the degree-7 (float) / degree-13 (double) polynomial is 5e-9 / 4e-18 of the value.
template <typename T>
struct ExpParts {
  T shifted, n, f;  // n sits in the low mantissa bits of `shifted`; where n is 0, f is x
  T q;              // (e^f - 1 - f) / f^2
};

FCA_INLINE ExpParts<float> exp_parts(float x) {
  const float t = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23
  const float n = t - 12582912.0f;
  float f = x - n * 0.693145751953125f;  // ln2, high part: 16 bits, so that n times it is exact
  f = f - n * 1.42860682030941723212e-6f;
  // Pairs first (Estrin): a third of the wait of Horner's chain, which a loop of long chains is bound by.
  const float f2 = f * f;
  const float q =
      (0.5f + f * (1.0f / 6)) + f2 * ((1.0f / 24 + f * (1.0f / 120)) + f2 * (1.0f / 720 + f * (1.0f / 5040)));
  return {t, n, f, q};
}

FCA_INLINE ExpParts<double> exp_parts(double x) {
  const double t = x * 1.4426950408889634074 + 6755399441055744.0;  // 1.5 * 2^52
  const double n = t - 6755399441055744.0;
  double f = x - n * 6.93147180369123816490e-01;  // ln2, high 32 bits
  f = f - n * 1.90821492927058770002e-10;
  double q = 1.0 / 6227020800.0;
  q = q * f + 1.0 / 479001600.0;
  q = q * f + 1.0 / 39916800.0;
  q = q * f + 1.0 / 3628800.0;
  q = q * f + 1.0 / 362880.0;
  q = q * f + 1.0 / 40320.0;
  q = q * f + 1.0 / 5040.0;
  q = q * f + 1.0 / 720.0;
  q = q * f + 1.0 / 120.0;
  q = q * f + 1.0 / 24.0;
  q = q * f + 1.0 / 6.0;
  q = q * f + 0.5;
  return {t, n, f, q};
}

FCA_INLINE float times_power_of_2(float x, float shifted) {
  return bit_cast<float>(bit_cast<uint32_t>(x) + (bit_cast<uint32_t>(shifted) << 23));
}
FCA_INLINE double times_power_of_2(double x, double shifted) {
  return bit_cast<double>(bit_cast<uint64_t>(x) + (bit_cast<uint64_t>(shifted) << 52));
}

template <typename T>
FCA_INLINE T exp_of(const ExpParts<T>& e) {
  return times_power_of_2((e.q * e.f + T(1)) * e.f + T(1), e.shifted);
}

template <typename T>
FCA_INLINE T exp_clamped(T x) {
  return exp_of(exp_parts(x));
}

// e^x, x clamped as a log-ratio is, and how far it lies beyond 1 + x: near 0, where the difference would keep no digit
// of the exponential, by the polynomial itself.
template <typename T>
struct RatioParts {
  T ratio, beyond_linear;
  bool near_zero;
};

template <typename T>
FCA_INLINE RatioParts<T> ratio_parts(T x) {
  const ExpParts<T> e = exp_parts(clamp_log_ratio(x));
  const T ratio = exp_of(e);
  const bool near_zero = e.n == T(0);
  return {ratio, select(near_zero, e.f * e.f * e.q, ratio - T(1) - x), near_zero};
}

// log for positive normal numbers: x = 2^e m, m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), by
// its series to s^9 (float, remainder 2e-9 of the value) and s^21 (double, 6e-19). Branch-free, as exp_clamped.
FCA_INLINE float log_positive(float x) {
  const int32_t shifted = static_cast<int32_t>(bit_cast<uint32_t>(x) - 0x3f3504f3u);
  const int32_t e = shifted >> 23;
  const float m = bit_cast<float>(bit_cast<uint32_t>(x) - (static_cast<uint32_t>(e) << 23));
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  float p = 1.0f / 9;
  p = p * z + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
  const float n = static_cast<float>(e);
  return n * 0.693145751953125f + (2.0f * s + (2.0f * s * z * p + n * 1.42860682030941723212e-6f));
}

FCA_INLINE double log_positive(double x) {
  const int64_t shifted = static_cast<int64_t>(bit_cast<uint64_t>(x) - 0x3fe6a09e667f3bcdull);
  const int64_t e = shifted >> 52;
  const double m = bit_cast<double>(bit_cast<uint64_t>(x) - (static_cast<uint64_t>(e) << 52));
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 1.0 / 21;
  p = p * z + 1.0 / 19;
  p = p * z + 1.0 / 17;
  p = p * z + 1.0 / 15;
  p = p * z + 1.0 / 13;
  p = p * z + 1.0 / 11;
  p = p * z + 1.0 / 9;
  p = p * z + 1.0 / 7;
  p = p * z + 1.0 / 5;
  p = p * z + 1.0 / 3;
  const double n = static_cast<double>(e);
  return n * 6.93147180369123816490e-01 + (2.0 * s + (2.0 * s * z * p + n * 1.90821492927058770002e-10));
}

// The scalars of a rule. Absent bounds are infinite (low: 0), so that no rule needs a branch for them. a to d: see the
// rules; objectives/ fills them.
template <typename T>
struct RuleScalars {
  T low, high, dual, cap, a, b, c, d;
};

// What a rule may read of a token. `aux` is the rule's own per-token input; `s` a number of the token's sequence.
template <typename T>
struct TokenInput {
  T r, D, A, logp, aux, s;
};

template <typename T>
struct Token {
  T loss, grad;
  T keep;                                     // 0: its sequence's gradient does not reach this token (GMPO)
  T clipped_low, clipped_high, clipped_dual;  // 1 or 0
};

// Probabilities and W weights: e^-80 ~ 2e-35 stands for all that is smaller.
template <typename T>
FCA_INLINE T probability(T log_p) {
  return exp_clamped(clip(log_p, T(-80), T(0)));
}

// PPO, and GSPO with the sequence's r:
//   loss = -min(min(r, cap) A, clip(r, low, high) A), for A < 0 also at most -dual A
//   grad = -A r K, K = 0 where A > 0, r > high | A < 0, r < low | A < 0, r > dual | r > cap
//   (cap < r <= high leaves A < 0 on the clipped branch, which still moves with r: K = 1)
template <typename T>
FCA_INLINE Token<T> ppo_token(T r, T A, T bound_low, T bound_high, T bound_dual, T bound_cap) {
  const T x = select(r > bound_cap, bound_cap, r) * A;
  const T y = clip(r, bound_low, bound_high) * A;
  const T loss = -select(x < y, x, y);
  const T most = -bound_dual * A;

  const T gain = mask<T>(A > T(0)), harm = mask<T>(A < T(0));
  const T under = mask<T>(r < bound_low), over = mask<T>(r > bound_high);
  const T low = harm * under;
  const T high = gain * over;
  const T dual = harm * mask<T>(r > bound_dual);
  const T inside = harm * (T(1) - under) * (T(1) - over);
  const T flat = low + high + dual + mask<T>(r > bound_cap) * (T(1) - inside);
  const T bounded = select(most < loss, most, loss);
  return {select(A < T(0), bounded, loss), select(flat > T(0), T(0), -A * r), T(1), low, high, dual};
}

// CISPO: loss = -sg(clip(r, low, high)) A logp ; grad = -A clip(r, low, high), never zero
template <typename T>
FCA_INLINE Token<T> cispo_token(T r, T A, T logp, const RuleScalars<T>& p) {
  const T low = mask<T>(A < T(0)) * mask<T>(r < p.low);
  const T high = mask<T>(A > T(0)) * mask<T>(r > p.high);
  const T pull = saturate(A * clip(r, p.low, p.high));
  return {-pull * logp, -pull, T(1), low, high, T(0)};
}

// SAPO: tau = a where A > 0, else b ; x = tau (r - 1) ; loss = -A 4 / tau sigmoid(x) ; grad = -4 A r sigmoid(x)
// sigmoid(-x)
template <typename T>
FCA_INLINE Token<T> sapo_token(T r, T A, const RuleScalars<T>& p) {
  const T tau = select(A > T(0), p.a, p.b);
  const T x = clip(tau * (r - T(1)), T(-80), T(80));
  const T e = exp_clamped(select(x < T(0), x, -x));
  const T gate = select(x < T(0), e, T(1)) / (T(1) + e);
  const T slope = e / ((T(1) + e) * (T(1) + e));
  return {-A * (T(4) / tau * gate), -A * (T(4) * r * slope), T(1), T(0), T(0), T(0)};
}

// GPG: loss = -A logp ; grad = -A
template <typename T>
FCA_INLINE Token<T> gpg_token(T A, T logp) {
  return {-saturate(A) * logp, -A, T(1), T(0), T(0), T(0)};
}

// DRO: loss = -(A logp - a / 2 D^2) ; grad = -A + a D
template <typename T>
FCA_INLINE Token<T> dro_token(T D, T A, T logp, const RuleScalars<T>& p) {
  const T linear = saturate(saturate(A) * logp), square = saturate(T(0.5) * p.a * D * D);
  return {square - linear, p.a * D - A, T(1), T(0), T(0), T(0)};
}

// DPPO: loss = -A sg(min(r, cap)) logp keep ; grad = -A min(r, cap) keep ; p, q the new and old probability
//   TV: keep = p - q <= high where A > 0, else p - q >= -low
//   KL: divergence = q ln(q / p) + (1 - q) ln((1 - q + 1e-8) / (1 - p + 1e-8))
//       keep = divergence <= high or p <= q where A > 0, else divergence <= low or p >= q
template <typename T, Rule RULE>
FCA_INLINE Token<T> dppo_token(T r, T A, T logp, T log_q, const RuleScalars<T>& p) {
  const T new_p = probability(logp), old_p = probability(log_q);
  T above, below;  // 1 where the step up, or down, has gone too far
  if constexpr (RULE == Rule::DPPO_TV) {
    above = mask<T>(new_p - old_p > p.high);
    below = mask<T>(new_p - old_p < -p.low);
  } else {
    const T rest = (T(1) - old_p + T(1e-8)) / (T(1) - new_p + T(1e-8));
    const T divergence = old_p * clip(log_q - logp, T(-80), T(80)) + (T(1) - old_p) * log_positive(rest);
    above = mask<T>(divergence > p.high) * mask<T>(new_p > old_p);
    below = mask<T>(divergence > p.low) * mask<T>(new_p < old_p);
  }
  const T high = mask<T>(A > T(0)) * above, low = mask<T>(A <= T(0)) * below;
  const T pull = select(high + low > T(0), T(0), saturate(A * select(r > p.cap, p.cap, r)));
  return {-pull * logp, -pull, T(1), mask<T>(A < T(0)) * low, high, T(0)};
}

// GPPO, CE-GPPO, AEPO: PPO with dual clip whose clipped tokens keep a bounded gradient
//   A < 0, r < low:  loss = -c low A,  grad = -a low A
//   A > 0, r > high: loss = -d high A, grad = -b high A
template <typename T>
FCA_INLINE Token<T> gppo_token(T r, T A, const RuleScalars<T>& p) {
  const T gain = mask<T>(A > T(0)), harm = mask<T>(A < T(0));
  const T low = harm * mask<T>(r < p.low), high = gain * mask<T>(r > p.high), dual = harm * mask<T>(r > p.dual);
  const T value = select(low > T(0), p.c * p.low, select(high > T(0), p.d * p.high, select(dual > T(0), p.dual, r)));
  const T slope = select(low > T(0), p.a * p.low, select(high > T(0), p.b * p.high, select(dual > T(0), T(0), r)));
  return {-A * value, -A * slope, T(1), low, high, dual};
}

// DCPO: PPO with dual clip and bounds from the old probability q (0 below e^-103, float32's least number)
//   low = 1/2 + 1/2 sqrt(max(0, 1 - 4 a / q)), 1 at q = 0 ; high = min(1/2 + 1/2 sqrt(1 + 4 b / q), c)
template <typename T>
FCA_INLINE Token<T> dcpo_token(T r, T A, T log_q, const RuleScalars<T>& p) {
  const T q = probability(log_q);
  const T below = T(1) - T(4) * p.a / q;
  const T low = T(0.5) + T(0.5) * std::sqrt(select(below < T(0), T(0), below));
  const T above = T(0.5) + T(0.5) * std::sqrt(T(1) + T(4) * p.b / q);
  const bool none = log_q < T(-103);
  const T high = select(none || above > p.c, p.c, above);
  return ppo_token(r, A, select(none, T(1), low), high, p.dual, p.cap);
}

// ASPO: e = a where aux (a low-entropy token), else b ; the weight of a gain is 1 / r
//   A >= 0: loss = -A / min(r, 1 + e), -dual A logp where 1 / r > dual ; grad = -A min(1 / r, dual), 0 where r > 1 + e
//   A < 0:  loss = -A max(r, 1 - e),   -dual A logp where r > dual     ; grad = -A min(r, dual),     0 where r < 1 - e
template <typename T>
FCA_INLINE Token<T> aspo_token(T r, T A, T logp, T aux, const RuleScalars<T>& p) {
  const T e = select(aux != T(0), p.a, p.b);
  const T low_bound = T(1) - e, high_bound = T(1) + e;
  const bool harm = A < T(0);
  const T low = mask<T>(harm) * mask<T>(r < low_bound), high = mask<T>(!harm) * mask<T>(r > high_bound);
  const T weight = select(harm, r, T(1) / r);
  const T clipped = select(harm, select(r < low_bound, low_bound, r), T(1) / select(r > high_bound, high_bound, r));
  const T dual = mask<T>(weight > p.dual);
  const T loss = select(dual > T(0), -saturate(p.dual * A) * logp, -A * clipped);
  const T grad = -A * select(dual > T(0), p.dual, weight);
  const T gain = mask<T>(A > T(0));
  return {loss, select(low + high > T(0), T(0), grad), T(1), low, gain * high, mask<T>(harm) * dual};
}

// PPO-EWMA: loss = -A min(r, cap) ; grad = that, 0 where A > 0, rho > high | A < 0, rho < low ; rho = logp - aux, aux
// the log-probability under the averaged policy, bounds logarithms
template <typename T>
FCA_INLINE Token<T> ppo_ewma_token(T r, T A, T logp, T aux, const RuleScalars<T>& p) {
  const T rho = logp - aux;
  const T low = mask<T>(A < T(0)) * mask<T>(rho < p.low), high = mask<T>(A > T(0)) * mask<T>(rho > p.high);
  const T loss = -A * select(r > p.cap, p.cap, r);
  return {loss, select(low + high > T(0), T(0), loss), T(1), low, high, T(0)};
}

// KL-Cov: loss = -A r + a |D| ; grad = -A r + a sgn D, the second terms where aux (a selected token)
template <typename T>
FCA_INLINE Token<T> kl_cov_token(T r, T D, T A, T aux, const RuleScalars<T>& p) {
  const T kappa = select(aux != T(0), p.a, T(0)), sign = mask<T>(D > T(0)) - mask<T>(D < T(0));
  const T pull = saturate(A * r);
  return {kappa * select(D < T(0), -D, D) - pull, kappa * sign - pull, T(1), T(0), T(0), T(0)};
}

// VESPO: ln W = clip(s, ln 1e-8, 20), s the sequence's sum ; phi = e^lambda W^k e^(-lambda W)
//   (k, lambda) = (a, b) where A >= 0, else (c, d) ; loss = -sg(phi) A logp ; grad = -phi A
template <typename T>
FCA_INLINE Token<T> vespo_token(T s, T A, T logp, const RuleScalars<T>& p) {
  const T log_w = clip(s, T(-18.420680743952367), T(20));
  const T k = select(A < T(0), p.c, p.a), lambda = select(A < T(0), p.d, p.b);
  const T log_phi = lambda + k * log_w - lambda * exp_clamped(log_w);
  const T phi = select(log_phi < T(-80), T(0), exp_clamped(clip(log_phi, T(-80), T(80))));
  const T pull = saturate(A * phi);
  return {-pull * logp, -pull, T(1), T(0), T(0), T(0)};
}

// GMPO: loss = -A s, s = exp of the sequence's mean of c ; grad reaches the tokens whose D is not clipped
template <typename T>
FCA_INLINE Token<T> gmpo_token(T r, T D, T A, const RuleScalars<T>& p) {
  const T gain = mask<T>(A > T(0)), harm = mask<T>(A < T(0));
  const T low = harm * mask<T>(D < p.low), high = gain * mask<T>(D > p.high);
  return {-A * r, -A * r, (gain + harm) - (low + high), low, high, T(0)};
}

// What a sequence sums over its tokens: GSPO, GMPO: the mean of it is the log of the ratio. VESPO: aux is the log of
// the rollout weight.
template <typename T, Rule RULE>
FCA_INLINE T sequence_term(T D, T A, T aux, const RuleScalars<T>& p) {
  if constexpr (RULE == Rule::VESPO) return clamp_log_ratio(D) + aux;
  if constexpr (RULE == Rule::GMPO) {
    const T up = select(D > p.high, p.high, D), down = select(D < p.low, p.low, D);
    return select(A > T(0), up, select(A < T(0), down, T(0)));
  }
  return D;
}

template <typename T, Rule RULE>
FCA_INLINE Token<T> token(const TokenInput<T>& t, const RuleScalars<T>& p) {
  if constexpr (RULE == Rule::CISPO) return cispo_token(t.r, t.A, t.logp, p);
  if constexpr (RULE == Rule::SAPO) return sapo_token(t.r, t.A, p);
  if constexpr (RULE == Rule::GPG) return gpg_token(t.A, t.logp);
  if constexpr (RULE == Rule::DRO) return dro_token(t.D, t.A, t.logp, p);
  if constexpr (RULE == Rule::DPPO_TV || RULE == Rule::DPPO_KL) return dppo_token<T, RULE>(t.r, t.A, t.logp, t.aux, p);
  if constexpr (RULE == Rule::GPPO) return gppo_token(t.r, t.A, p);
  if constexpr (RULE == Rule::DCPO) return dcpo_token(t.r, t.A, t.aux, p);
  if constexpr (RULE == Rule::ASPO) return aspo_token(t.r, t.A, t.logp, t.aux, p);
  if constexpr (RULE == Rule::PPO_EWMA) return ppo_ewma_token(t.r, t.A, t.logp, t.aux, p);
  if constexpr (RULE == Rule::KL_COV) return kl_cov_token(t.r, t.D, t.A, t.aux, p);
  if constexpr (RULE == Rule::VESPO) return vespo_token(t.s, t.A, t.logp, p);
  if constexpr (RULE == Rule::GMPO) return gmpo_token(t.r, t.D, t.A, p);
  Token<T> out = ppo_token(t.r, t.A, p.low, p.high, p.dual, p.cap);
  if constexpr (RULE == Rule::CLIP_COV) {  // PPO whose tokens with aux are dropped
    out.loss = select(t.aux != T(0), T(0), out.loss);
    out.grad = select(t.aux != T(0), T(0), out.grad);
  }
  return out;
}

// KL to a reference, x = logp - ref_logp: k1 = x ; k2 = x^2 / 2 ; k3 = e^-x - 1 + x with dk3 = 1 - e^-x ;
// k3+ has k3's value and k2's gradient.
template <typename T, KlEstimator KL>
FCA_INLINE void kl_token(T x, T& value, T& grad) {
  const RatioParts<T> e = ratio_parts(-x);
  const T k3 = e.beyond_linear, slope = select(e.near_zero, x - k3, T(1) - e.ratio);
  value = KL == KlEstimator::K1 ? x : (KL == KlEstimator::K2 ? T(0.5) * x * x : k3);
  grad = KL == KlEstimator::K1 ? T(1) : (KL == KlEstimator::K3 ? slope : x);
}

}  // namespace fca
