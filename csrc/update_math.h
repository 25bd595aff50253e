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

// Which overshoot rule shapes the emitted direction. The numbers are the contract with rules/overshoot.py.
enum class Overshoot : int64_t { NONE = 0, ALIGN_BLOCK = 1, ALIGN_ELEMENT = 2, CAUTIOUS = 3, GRAMS = 4, ATAN2 = 5 };

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
  double max_update;   // of an element, in units of the learning rate; infinite: unbounded
  int64_t lr_address;  // of a 0-d learning rate on the device, which then replaces `lr`; else 0
  int64_t lr_is_f64;
};
constexpr int64_t kGroupScalars = sizeof(GroupScalars) / sizeof(double);

// What follows for a group from the step's norm and signals. Field order is the column order of `control`.
struct Control {
  double skip;             // 1: change nothing
  double grad_factor;      // sign * unscale * clip coefficient
  double unscale;          // 1 / grad_scale, for the norm the update pass gathers
  double a, b;             // exp_avg <- a * exp_avg + b * g
  double beta2;            // after hold_v
  double one_minus_beta2;  // 1 - beta2, formed in float64
  double w1_a, w1_b;       // W1 <- w1_a * W1 + w1_b
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

FCA_INLINE Control make_control(const GroupScalars& group, double unscale, double norm, double previous_norm, double c,
                                bool skip) {
  Control out;
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
  out.a = brake ? group.beta1 * (1.0 - group.brake_strength * c) : group.beta1;
  out.b = damp ? 1.0 - group.beta1 : 1.0 - out.a;
  out.w1_a = damp ? group.beta1 : out.a;
  out.w1_b = 1.0 - out.w1_a;
  out.one_minus_beta2 = (1.0 - group.beta2) * (brake ? 1.0 - group.brake_hold_v * c : 1.0);
  out.beta2 = brake ? 1.0 - out.one_minus_beta2 : group.beta2;
  return out;
}

// ---------------------------------------------------------------- prologue: scalars of a tensor

// Scalars of one tensor in the arithmetic type. All are prepared in float64 and rounded once.
template <typename T>
struct StepScalars {
  T grad_factor, a, b, beta2, one_minus_beta2;
  T inv_w1, inv_sqrt_w2;  // 1 / W1, 1 / sqrt(W2)
  T eps, lr;
  T decay;  // 1 - lr * weight_decay (decoupled), else 1
  T l2;     // weight_decay added to the gradient (coupled), else 0
  T max_update;
};

// Advances the step and bias weights of a tensor and returns its scalars. The weights are 1 - beta^step, or the
// recurrence W <- a W + b where beta1 or beta2 varies from step to step.
FCA_INLINE StepScalars<double> advance(const Row& row, const GroupScalars& group, const Control& control, double lr) {
  double step;
  if (row.step_is_f64) {
    step = *reinterpret_cast<double*>(row.step) += 1.0;
  } else {
    step = *reinterpret_cast<float*>(row.step) += 1.0f;
  }
  double w1, w2;
  if (row.bias_weights != 0) {
    double* w = reinterpret_cast<double*>(row.bias_weights);
    w1 = w[0] = control.w1_a * w[0] + control.w1_b;
    w2 = w[1] = control.beta2 * w[1] + control.one_minus_beta2;
  } else {
    w1 = 1.0 - std::pow(group.beta1, step);
    w2 = 1.0 - std::pow(group.beta2, step);
  }
  StepScalars<double> s;
  s.grad_factor = control.grad_factor;
  s.a = control.a;
  s.b = control.b;
  s.beta2 = control.beta2;
  s.one_minus_beta2 = control.one_minus_beta2;
  s.inv_w1 = 1.0 / w1;
  s.inv_sqrt_w2 = 1.0 / std::sqrt(w2);
  s.eps = group.eps;
  s.lr = lr;
  s.decay = group.coupled != 0.0 ? 1.0 : 1.0 - lr * group.weight_decay;
  s.l2 = group.coupled != 0.0 ? group.weight_decay : 0.0;
  s.max_update = group.max_update;
  return s;
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
          static_cast<T>(s.max_update)};
}

// ---------------------------------------------------------------- update: one element

template <typename T>
FCA_INLINE bool same_sign(T x, T y) {  // x * y > 0 without the underflow
  return (x > T(0) && y > T(0)) || (x < T(0) && y < T(0));
}

// g <- S g (+ l2 p)
template <typename T, bool COUPLED>
FCA_INLINE T scaled_grad(T param, T grad, const StepScalars<T>& s) {
  const T g = grad * s.grad_factor;
  return COUPLED ? g + s.l2 * param : g;
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
template <typename T, Overshoot RULE, bool AMSGRAD, bool COUPLED>
FCA_INLINE void update_element(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq, const StepScalars<T>& s,
                               bool keep) {
  const T g = scaled_grad<T, COUPLED>(param, grad, s);
  const T m = exp_avg;
  const T bg = s.b * g;
  const T m_new = s.a * m + bg;
  const T v_new = s.beta2 * exp_avg_sq + s.one_minus_beta2 * g * g;
  T v_used = v_new;
  if (AMSGRAD) v_used = max_exp_avg_sq > v_new ? max_exp_avg_sq : v_new;

  T d = m_new;
  if (RULE == Overshoot::ALIGN_BLOCK) d = keep ? m_new : bg;
  if (RULE == Overshoot::ALIGN_ELEMENT) d = same_sign(m, g) ? m_new : bg;
  const T size = std::sqrt(v_used) * s.inv_sqrt_w2;
  T u;
  if (RULE == Overshoot::ATAN2) {
    u = s.max_update * (T(0.63661977236758134308) * atan2_right(d * s.inv_w1, size));  // 2 / pi
  } else {
    u = d * s.inv_w1 / (size + s.eps);
    u = u < -s.max_update ? -s.max_update : u;
    u = u > s.max_update ? s.max_update : u;
  }
  if (RULE == Overshoot::CAUTIOUS) u = same_sign(m_new, g) ? u : T(0);
  if (RULE == Overshoot::GRAMS) u = g > T(0) ? std::fabs(u) : (g < T(0) ? -std::fabs(u) : T(0));

  exp_avg = m_new;
  exp_avg_sq = v_new;
  if (AMSGRAD) max_exp_avg_sq = v_used;
  param = param * s.decay - s.lr * u;
}

}  // namespace fca
