// The update equations, one element and one scalar at a time. Host and device, no torch, no CUDA headers.
//
// Everything a backend computes for the optimizer is written here once for CPU and CUDA, with the local names of
// fused_clip_adam/backends/reference_step.py, so that the two can be read line by line.
#pragma once

#include <cmath>
#include <cstdint>

#include "storage.h"
#include "table.h"

namespace fca {

// Which overshoot rule shapes the emitted direction; FADAM is an update of its own. The numbers are the contract with
// rules/overshoot.py.
enum class Overshoot : int64_t {
  NONE = 0,
  ALIGN_BLOCK = 1,
  ALIGN_ELEMENT = 2,
  CAUTIOUS = 3,
  GRAMS = 4,
  ATAN2 = 5,
  FADAM = 6
};

// What a reduction takes of each element, see `summand`. The numbers are the contract with reference_step.py.
enum class Sum : int64_t { SQUARES_MAX = 0, DOT = 1, AGREE = 2, RMS = 3, METRIC = 4, TAU_SQUARES = 5, FADAM = 6 };

// When a step forgets the moments: before its update, or, as one published code does it, after.
enum class Forget : int64_t { NO = 0, BEFORE = 1, AFTER = 2 };

// How the brake lowers beta1. The numbers are the contract with rules/overshoot.py.
enum class Brake : int64_t { NONE = 0, RENORMALISE = 1, DAMP = 2 };

// ---------------------------------------------------------------- prologue: scalars of a group, in float64

// What one parameter group asks for. Field order is the column order of the float64 tensor `group_scalars`.
struct GroupScalars {
  double beta1, beta2;
  double max_norm;     // < 0: the group is not clipped
  double lagged_norm;  // 1: compare the previous step's norm
  double sign;         // -1 for maximize
  double brake_mode, brake_strength, brake_hold_v;
  double lr, eps, weight_decay;
  double coupled;      // 1: weight decay is an L2 term of the gradient (Adam), 0: decoupled (AdamW)
  double eps_early;    // 1: eps is added before bias correction, sqrt(v) + eps
  double decay_after;  // 1: decoupled decay multiplies the updated parameter
  double max_update;   // of an element, in units of the learning rate; infinite: unbounded
  int64_t lr_address;  // of a 0-d learning rate on the device, which then replaces `lr`; else 0
  int64_t lr_is_f64;
};
constexpr int64_t kGroupScalars = sizeof(GroupScalars) / sizeof(double);

// What rules decide for a group on the device, step by step. Field order is the column order of `group_signals`.
struct GroupSignals {
  double forget;        // enum Forget
  double restart;       // 1: counters start anew with this step
  double beta1_factor;  // beta1 of this step, over the group's
};
constexpr int64_t kGroupSignals = sizeof(GroupSignals) / sizeof(double);
constexpr GroupSignals kNoSignals = {0.0, 0.0, 1.0};

// What follows for a group from the step's norm and signals. Field order is the column order of `control`.
struct Control {
  double skip;             // 1: change nothing
  double grad_factor;      // sign * unscale * clip coefficient
  double unscale;          // 1 / grad_scale, for the norm the update pass gathers
  double a, b;             // exp_avg <- a * exp_avg + b * g
  double beta2;            // after hold_v
  double one_minus_beta2;  // 1 - beta2, formed in float64
  double w1_a, w1_b;       // W1 <- w1_a * W1 + w1_b
  double forget, restart;  // of GroupSignals
};
constexpr int64_t kControl = sizeof(Control) / sizeof(double);

// torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)); a NaN norm stays NaN, as there.
FCA_INLINE double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

// c = suppressed_mass / total_mass of the observed ClipStats, in [0, 1]; 0 where nothing usable was observed.
FCA_INLINE double suppressed_fraction(double suppressed_mass, double total_mass) {
  const double c = suppressed_mass / total_mass;
  return c > 0.0 ? (c < 1.0 ? c : 1.0) : 0.0;  // NaN (0/0) compares false
}

FCA_INLINE Control make_control(const GroupScalars& group, const GroupSignals& signals, double unscale, double norm,
                                double previous_norm, double c, bool skip) {
  const double beta1 = group.beta1 * signals.beta1_factor;
  Control out;
  out.forget = signals.forget;
  out.restart = signals.restart;
  out.skip = skip ? 1.0 : 0.0;
  out.unscale = unscale;
  double clip = 1.0;
  if (group.max_norm >= 0.0) {
    if (group.lagged_norm != 0.0) {
      // No previous step, or one whose norm was not finite, says nothing about this one.
      const bool known = previous_norm - previous_norm == 0.0;
      clip = known ? clip_coefficient(previous_norm, group.max_norm) : 1.0;
    } else {
      clip = clip_coefficient(norm, group.max_norm);
    }
  }
  out.grad_factor = group.sign * unscale * clip;

  // MomentumBrake: a = beta1 (1 - strength c); b = 1 - a, or 1 - beta1 with W1 as plain Adam keeps it.
  const int64_t mode = static_cast<int64_t>(group.brake_mode);
  const bool brake = mode != static_cast<int64_t>(Brake::NONE);
  const bool damp = mode == static_cast<int64_t>(Brake::DAMP);
  out.a = brake ? beta1 * (1.0 - group.brake_strength * c) : beta1;
  out.b = damp ? 1.0 - beta1 : 1.0 - out.a;
  out.w1_a = damp ? beta1 : out.a;
  out.w1_b = 1.0 - out.w1_a;
  out.one_minus_beta2 = (1.0 - group.beta2) * (brake ? 1.0 - group.brake_hold_v * c : 1.0);
  out.beta2 = brake ? 1.0 - out.one_minus_beta2 : group.beta2;
  return out;
}

// ---------------------------------------------------------------- prologue: scalars of a tensor

// Scalars of one tensor in the arithmetic type. All are prepared in float64 and rounded once. Rules change them between
// prologue and update (fused_clip_adam/group_step.py), which is all that the kernels know of rules.
template <typename T>
struct StepScalars {
  T grad_factor, a, b, beta2, one_minus_beta2;
  T inv_w1, inv_sqrt_w2;  // 1 / W1, 1 / sqrt(W2)
  T eps;
  T lr;     // of the update: the group's times every factor
  T decay;  // 1 - lr * weight_decay (decoupled), else 1
  T l2;     // weight_decay added to the gradient (coupled), else 0
  T max_update;
  // From here on read only where GUARDED.
  T forget;              // enum Forget
  T keep;                // 0: the old momentum is not emitted (align, tensor)
  T theta, spike_floor;  // g^2 > theta v and v > spike_floor: a spike, brought down to sqrt(theta v); theta inf: none
  T tau, tau_factor;     // raw |g| > tau: times tau_factor; tau inf: none
  T prox;                // added to m': clamp(g - m, -prox, prox)
};

// The scalars of one tensor as the prologue leaves them: a row of the float64 tensor `scalars`. Field order is the
// order of names in fused_clip_adam/backends/scalars.py.
struct TensorScalars {
  double skip;     // 1: change nothing
  double unscale;  // for the norm that the update gathers
  StepScalars<double> step;
  double unused[3];
};
constexpr int64_t kTensorScalars = sizeof(TensorScalars) / sizeof(double);
static_assert(kTensorScalars == 24, "WIDTH of fused_clip_adam/backends/scalars.py");

// Advances the step and bias weights of a tensor and returns its scalars. The weights are 1 - beta^step, or the
// recurrence W <- a W + b where beta1 or beta2 varies from step to step.
FCA_INLINE TensorScalars advance(const Row& row, const GroupScalars& group, const Control& control, double lr) {
  double step;
  const bool restart = control.restart != 0.0;
  if (row.step_is_f64) {
    double& own = *reinterpret_cast<double*>(row.step);
    step = own = (restart ? 0.0 : own) + 1.0;
  } else {
    float& own = *reinterpret_cast<float*>(row.step);
    step = own = (restart ? 0.0f : own) + 1.0f;
  }
  double w1, w2;
  if (row.bias_weights != 0) {
    double* w = reinterpret_cast<double*>(row.bias_weights);
    w1 = w[0] = control.w1_a * (restart ? 0.0 : w[0]) + control.w1_b;
    w2 = w[1] = control.beta2 * (restart ? 0.0 : w[1]) + control.one_minus_beta2;
  } else {
    w1 = 1.0 - std::pow(control.w1_a, step);
    w2 = 1.0 - std::pow(group.beta2, step);
  }
  TensorScalars out = {};
  out.skip = control.skip;
  out.unscale = control.unscale;
  StepScalars<double>& s = out.step;
  s.grad_factor = control.grad_factor;
  s.a = control.a;
  s.b = control.b;
  s.beta2 = control.beta2;
  s.one_minus_beta2 = control.one_minus_beta2;
  s.inv_w1 = 1.0 / w1;
  s.inv_sqrt_w2 = 1.0 / std::sqrt(w2);
  s.eps = group.eps_early != 0.0 ? group.eps * s.inv_sqrt_w2 : group.eps;
  s.decay = group.coupled != 0.0 ? 1.0 : 1.0 - lr * group.weight_decay;
  s.lr = group.decay_after != 0.0 ? lr * s.decay : lr;
  s.l2 = group.coupled != 0.0 ? group.weight_decay : 0.0;
  s.max_update = group.max_update;
  s.forget = control.forget;
  s.keep = 1.0;
  s.theta = s.tau = HUGE_VAL;
  s.spike_floor = 0.0;
  s.tau_factor = 1.0;
  s.prox = 0.0;
  return out;
}

template <typename T>
FCA_INLINE StepScalars<T> rounded(const StepScalars<double>& s) {
  return {static_cast<T>(s.grad_factor),
          static_cast<T>(s.a),
          static_cast<T>(s.b),
          static_cast<T>(s.beta2),
          static_cast<T>(s.one_minus_beta2),
          static_cast<T>(s.inv_w1),
          static_cast<T>(s.inv_sqrt_w2),
          static_cast<T>(s.eps),
          static_cast<T>(s.lr),
          static_cast<T>(s.decay),
          static_cast<T>(s.l2),
          static_cast<T>(s.max_update),
          static_cast<T>(s.forget),
          static_cast<T>(s.keep),
          static_cast<T>(s.theta),
          static_cast<T>(s.spike_floor),
          static_cast<T>(s.tau),
          static_cast<T>(s.tau_factor),
          static_cast<T>(s.prox)};
}

// ---------------------------------------------------------------- update: one element

template <typename T>
FCA_INLINE bool same_sign(T x, T y) {  // x * y > 0 without the underflow
  return (x > T(0) && y > T(0)) || (x < T(0) && y < T(0));
}

// g <- S g (+ l2 p), where GUARDED with what lies above tau brought down first
template <typename T, bool GUARDED>
FCA_INLINE T scaled_grad(T param, T grad, const StepScalars<T>& s, bool coupled) {
  if (GUARDED) grad = std::fabs(grad) > s.tau ? grad * s.tau_factor : grad;
  const T g = grad * s.grad_factor;
  return coupled ? g + s.l2 * param : g;
}

// The gradient as the update sees it: `scaled_grad`, where GUARDED with a spike brought down. v: exp_avg_sq before.
template <typename T, bool GUARDED>
FCA_INLINE T seen_grad(T param, T grad, T v, const StepScalars<T>& s, bool coupled) {
  const T g = scaled_grad<T, GUARDED>(param, grad, s, coupled);
  if (!GUARDED) return g;
  const T bound = s.theta * v;  // NaN where theta is infinite and v 0: no spike
  const T most = std::sqrt(bound);
  const bool spike = g * g > bound && v > s.spike_floor;
  return spike ? (g < T(0) ? -most : most) : g;
}

// m' = a m + b g, where GUARDED and clamp(g - m, -prox, prox)
template <typename T, bool GUARDED>
FCA_INLINE T moved_momentum(T m, T g, const StepScalars<T>& s) {
  T m_new = s.a * m + s.b * g;
  if (GUARDED) {
    T away = g - m;
    away = away < -s.prox ? -s.prox : away;
    m_new += away > s.prox ? s.prox : away;
  }
  return m_new;
}

// What an element adds to the sum m g that decides whether its momentum is kept. Where m is not 0, a negative number
// too small for anything else: the sum is then 0 only where all of m is.
template <typename T>
FCA_INLINE double momentum_dot(T m, T g) {
  return static_cast<double>(m) * static_cast<double>(g) - (m != T(0) ? 1e-300 : 0.0);
}

// atan2(y, x) for x >= 0. The smaller of |y| and x over the larger is brought below 0.66 by atan z = pi/4 + atan((z -
// 1) / (z + 1)); there z + z^3 P(z^2) / Q(z^2) is exact to 2e-16. Source of the rational: Cephes (Moshier), atan.
template <typename T>
FCA_INLINE T atan2_right(T y, T x) {
  const T size = std::fabs(y);
  const bool steep = size > x;
  const T less = steep ? x : size, more = steep ? size : x;
  const bool upper = less > T(0.66) * more;
  const T numerator = upper ? less - more : less, denominator = upper ? less + more : more;
  const T w = numerator / (denominator > T(0) ? denominator : T(1)), z = w * w;
  T p = T(-8.750608600031904122785e-1);
  p = p * z + T(-1.615753718733365076637e1);
  p = p * z + T(-7.500855792314704667340e1);
  p = p * z + T(-1.228866684490136173410e2);
  p = p * z + T(-6.485021904942025371773e1);
  T q = z + T(2.485846490142306297962e1);
  q = q * z + T(1.650270098316988542046e2);
  q = q * z + T(4.328810604912902668951e2);
  q = q * z + T(4.853903996359136964868e2);
  q = q * z + T(1.945506571482613964425e2);
  const T angle = (upper ? T(0.78539816339744830962) : T(0)) + (w + w * (z * p / q));
  const T turned = steep ? T(1.57079632679489661923) - angle : angle;
  return y < T(0) ? -turned : turned;
}

// m' = a m + b g ; v' = beta2 v + (1 - beta2) g g
// u  = d / W1 / (sqrt(v') / sqrt(W2) + eps), at most max_update ; p <- decay p - lr u
// d is m' unless a rule drops the old momentum: `keep` for a block, the sign of m g for an element.
// A rule shapes what is emitted; the stored m' and v' are always plain AdamW's.
// `rule` and `coupled` are constants where the caller's are.
// FORGETS: `forget` is looked at here; the CPU's loops do it themselves, a tile at a time.
template <typename T, bool AMSGRAD, bool GUARDED, bool FORGETS = GUARDED>
FCA_INLINE void update_element(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq, const StepScalars<T>& s,
                               Overshoot rule, bool coupled, bool keep) {
  T m = exp_avg, v = exp_avg_sq, v_max = AMSGRAD ? max_exp_avg_sq : T(0);
  if (FORGETS) {
    const bool before = s.forget == T(1);
    m = before ? T(0) : m;
    v = before ? T(0) : v;
    v_max = before ? T(0) : v_max;
  }
  const T g = seen_grad<T, GUARDED>(param, grad, v, s, coupled);
  const T v_new = s.beta2 * v + s.one_minus_beta2 * g * g;
  const T root = std::sqrt(AMSGRAD ? (v_max > v_new ? v_max : v_new) : v_new);
  T m_new, u;
  if (rule == Overshoot::FADAM) {  // inv_w1 clips the natural gradient, inv_sqrt_w2 is the weight of the natural decay
    const T base = root + s.eps;
    m_new = s.a * m + s.b * (g / base * s.inv_w1);
    u = m_new + s.inv_sqrt_w2 * (param / base);
  } else {
    const T bg = s.b * g;
    m_new = moved_momentum<T, GUARDED>(m, g, s);
    T d = m_new;
    if (rule == Overshoot::ALIGN_BLOCK) d = keep ? m_new : bg;
    if (rule == Overshoot::ALIGN_ELEMENT) d = same_sign(m, g) ? m_new : bg;
    if (GUARDED) d = s.keep != T(0) ? d : bg;
    const T size = root * s.inv_sqrt_w2;
    if (rule == Overshoot::ATAN2) {
      u = s.max_update * (T(0.63661977236758134308) * atan2_right(d * s.inv_w1, size));  // 2 / pi
    } else {
      u = d * s.inv_w1 / (size + s.eps);
      u = u < -s.max_update ? -s.max_update : u;
      u = u > s.max_update ? s.max_update : u;
    }
    if (rule == Overshoot::CAUTIOUS) u = same_sign(m_new, g) ? u : T(0);
    if (rule == Overshoot::GRAMS) u = g > T(0) ? std::fabs(u) : (g < T(0) ? -std::fabs(u) : T(0));
  }
  const bool after = FORGETS && s.forget == T(2);
  exp_avg = after ? T(0) : m_new;
  exp_avg_sq = after ? T(0) : v_new;
  if (AMSGRAD) max_exp_avg_sq = after ? T(0) : (v_max > v_new ? v_max : v_new);
  param = param * s.decay - s.lr * u;
}

// ---------------------------------------------------------------- reductions: one element

// Which tensors `summand` reads beside the gradient.
FCA_INLINE bool reads_param(Sum kind) { return kind == Sum::FADAM; }
FCA_INLINE bool reads_exp_avg(Sum kind) { return kind == Sum::DOT || kind == Sum::AGREE; }
FCA_INLINE bool reads_exp_avg_sq(Sum kind, bool spiked) {  // spiked: a rule brings down what is a spike against v
  return kind == Sum::RMS || kind == Sum::METRIC || kind == Sum::FADAM ||
         (spiked && (kind == Sum::DOT || kind == Sum::AGREE));
}

struct Summand {
  double x, y;
};

// What an element adds to the two sums of a reduction; the second of SQUARES_MAX is a maximum. g is what the update
// sees of the gradient, but for TAU_SQUARES, which is part of finding that out. Guards that no rule has set let all
// through.
//   SQUARES_MAX  raw g^2, raw |g|          DOT    m g                        AGREE  1 where m' g > 0
//   RMS          g^2 / max(v' / W2, eps^2) METRIC g^2 / (sqrt(v' / W2) + eps)
//   TAU_SQUARES  (g after tau)^2           FADAM  (g / base)^2, (p / base)^2, base = sqrt(v') + eps
template <typename T>
FCA_INLINE Summand summand(Sum kind, bool coupled, T param, T grad, T exp_avg, T exp_avg_sq, const StepScalars<T>& s) {
  if (kind == Sum::SQUARES_MAX) {
    const double raw = static_cast<double>(grad);
    return {raw * raw, std::fabs(raw)};
  }
  if (kind == Sum::TAU_SQUARES) {
    const double clipped = static_cast<double>(scaled_grad<T, true>(param, grad, s, coupled));
    return {clipped * clipped, 0.0};
  }
  const bool before = s.forget == T(1);
  const T m = before ? T(0) : exp_avg, v = before ? T(0) : exp_avg_sq;
  const T g = seen_grad<T, true>(param, grad, v, s, coupled);
  if (kind == Sum::DOT) return {static_cast<double>(m) * static_cast<double>(g), 0.0};
  if (kind == Sum::AGREE) return {same_sign(moved_momentum<T, true>(m, g, s), g) ? 1.0 : 0.0, 0.0};
  const T v_new = s.beta2 * v + s.one_minus_beta2 * g * g;
  const T root = std::sqrt(v_new);
  if (kind == Sum::FADAM) {
    const T base = root + s.eps;
    const double h = static_cast<double>(g / base), w = static_cast<double>(param / base);
    return {h * h, w * w};
  }
  const T size = root * s.inv_sqrt_w2;
  if (kind == Sum::RMS) {  // g^2 / max(size, eps)^2: eps^2 may be too small for float32
    const double ratio = static_cast<double>(g / (size > s.eps ? size : s.eps));
    return {ratio * ratio, 0.0};
  }
  return {static_cast<double>(g) * static_cast<double>(g) / static_cast<double>(size + s.eps), 0.0};
}

}  // namespace fca
