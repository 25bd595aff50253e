"""The Triton kernels of the ratio-clip objectives: NVIDIA and AMD GPUs, and any CPU under TRITON_INTERPRET=1.

    [sequence_kernel: length, log-ratio and gradient share of each sequence, where something needs them]
        -> token_kernel: loss and gradient of each token, partial sums -> finish_kernel: loss, scale, statistics
    bound_sums: level_kernel -> fold_kernel

The token equations carry the names of csrc/objective_math.h and reference_objective.py, and the operations of the
former in the same order: compiled without fused multiply-add, their results are its, bit for bit (but for the sign of
the zeros of masked tokens).

Partial sums are float64 and folded in an order that depends on the shape alone: no atomics, every run gives the same
bits. Nothing is read back to the host. Sizes, strides and scalars are arguments, rules and types are constants.
"""

# ruff: noqa: SIM109, SIM300  (Triton has no `in`; D, A and T are no constants)

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fused_clip_adam.backends import reference_objective as spec
from fused_clip_adam.backends.triton_logits import logits_backward, logits_forward
from fused_clip_adam.backends.triton_math import (
    DTYPES,
    TYPES,
    bound,
    divide,
    jit_kernel,
    launch_kernel,
    load_as,
    square_root,
    sum_in_order,
    tl,
    triton,
)

__all__ = ["bound_sums", "logits_backward", "logits_forward", "policy_loss"]

# ---------------------------------------------------------------- constants: csrc/objective_math.h

PPO, CISPO, SAPO, GPG, DRO, DPPO_TV, DPPO_KL, GPPO = (tl.constexpr(rule) for rule in range(8))
DCPO, ASPO, PPO_EWMA, KL_COV, CLIP_COV, VESPO, GSPO, GMPO = (tl.constexpr(rule) for rule in range(8, 16))
K1, K2, K3, K3_PLUS = (tl.constexpr(estimator) for estimator in range(1, 5))
TOKEN_MEAN, SEQUENCE_MEAN = tl.constexpr(spec.TOKEN_MEAN), tl.constexpr(spec.SEQUENCE_MEAN)
MAX_LOG_RATIO = tl.constexpr(spec.MAX_LOG_RATIO)
SATURATION_F32, SATURATION_F64 = (tl.constexpr(spec.SATURATION[dtype]) for dtype in (torch.float32, torch.float64))
_MOST_F32 = torch.finfo(torch.float32).max
MOST_F32, MOST_F64 = tl.constexpr(_MOST_F32), tl.constexpr(torch.finfo(torch.float64).max)

# ---------------------------------------------------------------- arithmetic of any rule


@triton.jit
def clip(x, low, high):
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def saturate(x):
    if x.dtype == tl.float64:
        return clip(x, -SATURATION_F64, SATURATION_F64)
    else:
        return clip(x, -SATURATION_F32, SATURATION_F32)


@triton.jit
def clamp_log_ratio(x):
    return clip(x, -MAX_LOG_RATIO, MAX_LOG_RATIO)


@triton.jit
def exp_parts(x):
    """(shifted, n, f, q): x = n ln2 + f, n in the low mantissa bits of `shifted`, q = (e^f - 1 - f) / f^2."""
    if x.dtype == tl.float64:
        t = x * 1.4426950408889634074 + 6755399441055744.0
        n = t - 6755399441055744.0
        f = x - n * 6.93147180369123816490e-01
        f = f - n * 1.90821492927058770002e-10
        q = f * (1.0 / 6227020800.0) + 1.0 / 479001600.0
        q = q * f + 1.0 / 39916800.0
        q = q * f + 1.0 / 3628800.0
        q = q * f + 1.0 / 362880.0
        q = q * f + 1.0 / 40320.0
        q = q * f + 1.0 / 5040.0
        q = q * f + 1.0 / 720.0
        q = q * f + 1.0 / 120.0
        q = q * f + 1.0 / 24.0
        q = q * f + 1.0 / 6.0
        q = q * f + 0.5
        return t, n, f, q
    else:
        t = x * 1.44269504088896341 + 12582912.0
        n = t - 12582912.0
        f = x - n * 0.693145751953125
        f = f - n * 1.42860682030941723212e-6
        f2 = f * f
        high = (1.0 / 24.0 + f * (1.0 / 120.0)) + f2 * (1.0 / 720.0 + f * (1.0 / 5040.0))
        q = (0.5 + f * (1.0 / 6.0)) + f2 * high
        return t, n, f, q


@triton.jit
def exp_of(t, f, q):
    p = (q * f + 1.0) * f + 1.0
    if p.dtype == tl.float64:
        return (p.to(tl.int64, bitcast=True) + (t.to(tl.int64, bitcast=True) << 52)).to(tl.float64, bitcast=True)
    else:
        return (p.to(tl.int32, bitcast=True) + (t.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exp_clamped(x):
    """2^n e^f, x = n ln2 + f, for |x| <= 80."""
    t, _n, f, q = exp_parts(x)
    return exp_of(t, f, q)


@triton.jit
def ratio_parts(x):
    """(e^x of the clamped x; that less 1 + x, by the polynomial itself near 0; whether it is near 0)."""
    t, n, f, q = exp_parts(clamp_log_ratio(x))
    ratio = exp_of(t, f, q)
    near_zero = n == 0.0
    return ratio, tl.where(near_zero, f * f * q, ratio - 1.0 - x), near_zero


@triton.jit
def log_positive(x):
    """n ln2 + 2 atanh(s), x = 2^n m, s = (m - 1) / (m + 1), for positive normal x."""
    if x.dtype == tl.float64:
        e = (x.to(tl.int64, bitcast=True) - 0x3FE6A09E667F3BCD) >> 52
        m = (x.to(tl.int64, bitcast=True) - (e << 52)).to(tl.float64, bitcast=True)
        s = (m - 1.0) / (m + 1.0)
        z = s * s
        p = z * (1.0 / 21) + 1.0 / 19
        p = p * z + 1.0 / 17
        p = p * z + 1.0 / 15
        p = p * z + 1.0 / 13
        p = p * z + 1.0 / 11
        p = p * z + 1.0 / 9
        p = p * z + 1.0 / 7
        p = p * z + 1.0 / 5
        p = p * z + 1.0 / 3
        n = e.to(tl.float64)
        return n * 6.93147180369123816490e-01 + (2.0 * s + (2.0 * s * z * p + n * 1.90821492927058770002e-10))
    else:
        e = (x.to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23
        m = (x.to(tl.int32, bitcast=True) - (e << 23)).to(tl.float32, bitcast=True)
        s = divide(m - 1.0, m + 1.0)
        z = s * s
        p = z * (1.0 / 9) + 1.0 / 7
        p = p * z + 1.0 / 5
        p = p * z + 1.0 / 3
        n = e.to(tl.float32)
        return n * 0.693145751953125 + (2.0 * s + (2.0 * s * z * p + n * 1.42860682030941723212e-6))


@triton.jit
def probability(log_p):
    return exp_clamped(clip(log_p, -80.0, 0.0))


# ---------------------------------------------------------------- the rules: (loss, grad, keep, low, high, dual)


@triton.jit
def ppo_token(r, A, bound_low, bound_high, bound_dual, bound_cap):
    """loss = -min(min(r, cap) A, clip(r, low, high) A), for A < 0 also at most -dual A ; grad = -A r K"""
    x = tl.where(r > bound_cap, bound_cap, r) * A
    y = clip(r, bound_low, bound_high) * A
    loss = -tl.where(x < y, x, y)
    most = -bound_dual * A

    gain, harm = A > 0.0, A < 0.0
    low = harm & (r < bound_low)
    high = gain & (r > bound_high)
    dual = harm & (r > bound_dual)
    outside = (A >= 0.0) | (r < bound_low) | (r > bound_high)
    flat = low | high | dual | ((r > bound_cap) & outside)
    bounded = tl.where(most < loss, most, loss)
    return tl.where(harm, bounded, loss), tl.where(flat, 0.0, -A * r), A == A, low, high, dual


@triton.jit
def cispo_token(r, A, logp, p):
    """loss = -sg(clip(r, low, high)) A logp ; grad = -A clip(r, low, high)"""
    p_low, p_high, _p_dual, _p_cap, _p_a, _p_b, _p_c, _p_d = p
    low = (A < 0.0) & (r < p_low)
    high = (A > 0.0) & (r > p_high)
    pull = saturate(A * clip(r, p_low, p_high))
    return -pull * logp, -pull, A == A, low, high, A != A


@triton.jit
def sapo_token(r, A, p):
    """tau = a where A > 0, else b ; x = tau (r - 1) ; loss = -A 4 / tau sigmoid(x) ; grad = -4 A r sigmoid(x)
    sigmoid(-x)
    """
    _p_low, _p_high, _p_dual, _p_cap, p_a, p_b, _p_c, _p_d = p
    tau = tl.where(A > 0.0, p_a, p_b)
    x = clip(tau * (r - 1.0), -80.0, 80.0)
    e = exp_clamped(tl.where(x < 0.0, x, -x))
    gate = divide(tl.where(x < 0.0, e, 1.0), 1.0 + e)
    slope = divide(e, (1.0 + e) * (1.0 + e))
    no = A != A
    return -A * (divide(tl.zeros_like(tau) + 4.0, tau) * gate), -A * (4.0 * r * slope), A == A, no, no, no


@triton.jit
def gpg_token(A, logp):
    """loss = -A logp ; grad = -A"""
    no = A != A
    return -saturate(A) * logp, -A, A == A, no, no, no


@triton.jit
def dro_token(D, A, logp, p):
    """loss = -(A logp - a / 2 D^2) ; grad = -A + a D"""
    _p_low, _p_high, _p_dual, _p_cap, p_a, _p_b, _p_c, _p_d = p
    linear = saturate(saturate(A) * logp)
    square = saturate(0.5 * p_a * D * D)
    no = A != A
    return square - linear, p_a * D - A, A == A, no, no, no


@triton.jit
def dppo_token(r, A, logp, log_q, p, RULE: tl.constexpr):
    """loss = -A sg(min(r, cap)) logp keep ; grad = -A min(r, cap) keep ; p, q the new and old probability
    TV: keep = p - q <= high where A > 0, else p - q >= -low
    KL: keep = divergence <= high or p <= q where A > 0, else divergence <= low or p >= q
    """
    p_low, p_high, _p_dual, p_cap, _p_a, _p_b, _p_c, _p_d = p
    new_p = probability(logp)
    old_p = probability(log_q)
    if RULE == DPPO_TV:
        above = new_p - old_p > p_high
        below = new_p - old_p < -p_low
    else:
        rest = divide(1.0 - old_p + 1e-8, 1.0 - new_p + 1e-8)
        divergence = old_p * clip(log_q - logp, -80.0, 80.0) + (1.0 - old_p) * log_positive(rest)
        above = (divergence > p_high) & (new_p > old_p)
        below = (divergence > p_low) & (new_p < old_p)
    high = (A > 0.0) & above
    low = (A <= 0.0) & below
    pull = tl.where(high | low, 0.0, saturate(A * tl.where(r > p_cap, p_cap, r)))
    return -pull * logp, -pull, A == A, (A < 0.0) & low, high, A != A


@triton.jit
def gppo_token(r, A, p):
    """PPO with dual clip whose clipped tokens keep a bounded gradient
    A < 0, r < low:  loss = -c low A,  grad = -a low A
    A > 0, r > high: loss = -d high A, grad = -b high A
    """
    p_low, p_high, p_dual, _p_cap, p_a, p_b, p_c, p_d = p
    gain, harm = A > 0.0, A < 0.0
    low = harm & (r < p_low)
    high = gain & (r > p_high)
    dual = harm & (r > p_dual)
    value = tl.where(low, p_c * p_low, tl.where(high, p_d * p_high, tl.where(dual, p_dual, r)))
    slope = tl.where(low, p_a * p_low, tl.where(high, p_b * p_high, tl.where(dual, 0.0, r)))
    return -A * value, -A * slope, A == A, low, high, dual


@triton.jit
def dcpo_token(r, A, log_q, p):
    """PPO, low = 1/2 + 1/2 sqrt(max(0, 1 - 4 a / q)), 1 at q = 0 ; high = min(1/2 + 1/2 sqrt(1 + 4 b / q), c)"""
    _p_low, _p_high, p_dual, p_cap, p_a, p_b, p_c, _p_d = p
    q = probability(log_q)
    below = 1.0 - divide(tl.zeros_like(q) + 4.0 * p_a, q)
    low = 0.5 + 0.5 * square_root(tl.where(below < 0.0, 0.0, below))
    above = 0.5 + 0.5 * square_root(1.0 + divide(tl.zeros_like(q) + 4.0 * p_b, q))
    none = log_q < -103.0
    high = tl.where(none | (above > p_c), p_c, above)
    return ppo_token(r, A, tl.where(none, 1.0, low), high, p_dual, p_cap)


@triton.jit
def aspo_token(r, A, logp, aux, p):
    """e = a where aux (a low-entropy token), else b ; the weight of a gain is 1 / r
    A >= 0: loss = -A / min(r, 1 + e), -dual A logp where 1 / r > dual ; grad = -A min(1 / r, dual), 0 where r > 1 + e
    A < 0:  loss = -A max(r, 1 - e),   -dual A logp where r > dual     ; grad = -A min(r, dual),     0 where r < 1 - e
    """
    _p_low, _p_high, p_dual, _p_cap, p_a, p_b, _p_c, _p_d = p
    e = tl.where(aux != 0.0, p_a, p_b)
    low_bound = 1.0 - e
    high_bound = 1.0 + e
    harm = A < 0.0
    low = harm & (r < low_bound)
    high = (A >= 0.0) & (r > high_bound)
    one = tl.zeros_like(r) + 1.0
    weight = tl.where(harm, r, divide(one, r))
    clipped = tl.where(
        harm, tl.where(r < low_bound, low_bound, r), divide(one, tl.where(r > high_bound, high_bound, r))
    )
    dual = weight > p_dual
    loss = tl.where(dual, -saturate(p_dual * A) * logp, -A * clipped)
    grad = -A * tl.where(dual, p_dual, weight)
    return loss, tl.where(low | high, 0.0, grad), A == A, low, (A > 0.0) & high, harm & dual


@triton.jit
def ppo_ewma_token(r, A, logp, aux, p):
    """loss = -A min(r, cap) ; grad = that, 0 where A > 0, rho > high | A < 0, rho < low ; rho = logp - aux"""
    p_low, p_high, _p_dual, p_cap, _p_a, _p_b, _p_c, _p_d = p
    rho = logp - aux
    low = (A < 0.0) & (rho < p_low)
    high = (A > 0.0) & (rho > p_high)
    loss = -A * tl.where(r > p_cap, p_cap, r)
    return loss, tl.where(low | high, 0.0, loss), A == A, low, high, A != A


@triton.jit
def kl_cov_token(r, D, A, aux, p):
    """loss = -A r + a |D| ; grad = -A r + a sgn D, the second terms where aux (a selected token)"""
    _p_low, _p_high, _p_dual, _p_cap, p_a, _p_b, _p_c, _p_d = p
    kappa = tl.where(aux != 0.0, p_a, 0.0)
    sign = tl.where(D > 0.0, 1.0, 0.0) - tl.where(D < 0.0, 1.0, 0.0)
    pull = saturate(A * r)
    no = A != A
    return kappa * tl.abs(D) - pull, kappa * sign - pull, A == A, no, no, no


@triton.jit
def vespo_token(s, A, logp, p):
    """ln W = clip(s, ln 1e-8, 20) ; phi = e^lambda W^k e^(-lambda W) ; loss = -sg(phi) A logp ; grad = -phi A
    (k, lambda) = (a, b) where A >= 0, else (c, d)
    """
    _p_low, _p_high, _p_dual, _p_cap, p_a, p_b, p_c, p_d = p
    log_w = clip(s, -18.420680743952367, 20.0)
    k = tl.where(A < 0.0, p_c, p_a)
    lam = tl.where(A < 0.0, p_d, p_b)
    log_phi = lam + k * log_w - lam * exp_clamped(log_w)
    phi = tl.where(log_phi < -80.0, 0.0, exp_clamped(clip(log_phi, -80.0, 80.0)))
    pull = saturate(A * phi)
    no = A != A
    return -pull * logp, -pull, A == A, no, no, no


@triton.jit
def gmpo_token(r, D, A, p):
    """loss = -A s, s = exp of the sequence's mean of c ; grad reaches the tokens whose D is not clipped"""
    p_low, p_high, _p_dual, _p_cap, _p_a, _p_b, _p_c, _p_d = p
    low = (A < 0.0) & (D < p_low)
    high = (A > 0.0) & (D > p_high)
    keep = ((A > 0.0) & (D <= p_high)) | ((A < 0.0) & (D >= p_low))
    return -A * r, -A * r, keep, low, high, A != A


@triton.jit
def sequence_term(D, A, aux, p, RULE: tl.constexpr):
    """What a sequence sums. GSPO, GMPO: the mean of it is the log of the ratio. VESPO: aux is the log of the weight."""
    p_low, p_high, _p_dual, _p_cap, _p_a, _p_b, _p_c, _p_d = p
    if RULE == VESPO:
        return clamp_log_ratio(D) + aux
    elif RULE == GMPO:
        up = tl.where(D > p_high, p_high, D)
        down = tl.where(D < p_low, p_low, D)
        return tl.where(A > 0.0, up, tl.where(A < 0.0, down, 0.0))
    else:
        return D


@triton.jit
def token(r, D, A, logp, aux, s, p, RULE: tl.constexpr):
    p_low, p_high, p_dual, p_cap, _p_a, _p_b, _p_c, _p_d = p
    if RULE == CISPO:
        return cispo_token(r, A, logp, p)
    elif RULE == SAPO:
        return sapo_token(r, A, p)
    elif RULE == GPG:
        return gpg_token(A, logp)
    elif RULE == DRO:
        return dro_token(D, A, logp, p)
    elif RULE == DPPO_TV or RULE == DPPO_KL:
        return dppo_token(r, A, logp, aux, p, RULE)
    elif RULE == GPPO:
        return gppo_token(r, A, p)
    elif RULE == DCPO:
        return dcpo_token(r, A, aux, p)
    elif RULE == ASPO:
        return aspo_token(r, A, logp, aux, p)
    elif RULE == PPO_EWMA:
        return ppo_ewma_token(r, A, logp, aux, p)
    elif RULE == KL_COV:
        return kl_cov_token(r, D, A, aux, p)
    elif RULE == VESPO:
        return vespo_token(s, A, logp, p)
    elif RULE == GMPO:
        return gmpo_token(r, D, A, p)
    else:
        loss, grad, keep, low, high, dual = ppo_token(r, A, p_low, p_high, p_dual, p_cap)
        if RULE == CLIP_COV:  # PPO whose tokens with aux are dropped
            loss = tl.where(aux != 0.0, 0.0, loss)
            grad = tl.where(aux != 0.0, 0.0, grad)
        return loss, grad, keep, low, high, dual


@triton.jit
def kl_token(x, KL: tl.constexpr):
    """x = logp - ref_logp: k1 = x ; k2 = x^2 / 2 ; k3 = e^-x - 1 + x ; k3+ has k3's value and k2's gradient."""
    if KL == K1:
        return x, tl.zeros_like(x) + 1.0
    elif KL == K2:
        return 0.5 * x * x, x
    else:
        e, k3, near_zero = ratio_parts(-x)
        slope = tl.where(near_zero, x - k3, 1.0 - e)
        return k3, slope if KL == K3 else x


# ---------------------------------------------------------------- tokens: where they lie, what counts


@triton.jit
def tile_of(tile, rows, cols, WIDE: tl.constexpr, TILE: tl.constexpr):
    """The rows and columns of a tile's tokens, and which exist: a piece of a row (WIDE), or as many rows as fit."""
    lane = tl.arange(0, TILE)
    if WIDE:
        tiles_a_row = (cols + TILE - 1) // TILE
        col = tile % tiles_a_row * TILE + lane
        return tile // tiles_a_row, col, col < cols
    else:
        width = cols.to(tl.int32)
        height = TILE // width
        row = tile * height + lane // width
        return row, (lane % width).to(tl.int64), (lane // width < height) & (row < rows)


@triton.jit
def read_token(pointer, row_stride, col_stride, row, col, there, T: tl.constexpr):
    return load_as(tl.load(pointer + (row * row_stride + col * col_stride), mask=there, other=0.0), T)


@triton.jit
def finite(x):
    return x - x == 0.0


@triton.jit
def classify(pointers, strides, row, col, there, T: tl.constexpr):
    """valid: unmasked and everything finite; bad: unmasked and not valid; then what a token has, 0 where not valid.

    x = logp - ref_logp. What is not given is 0, a weight 1.
    """
    logp_ptr, old_logp_ptr, advantages_ptr, mask_ptr, weights_ptr, aux_ptr, ref_logp_ptr, entropy_ptr = pointers
    unmasked = there
    if mask_ptr is not None:
        unmasked = there & (tl.load(mask_ptr + (row * strides[6] + col * strides[7]), mask=there, other=0) != 0)
    logp = read_token(logp_ptr, strides[0], strides[1], row, col, unmasked, T)
    old_logp = read_token(old_logp_ptr, strides[2], strides[3], row, col, unmasked, T)
    A = read_token(advantages_ptr, strides[4], strides[5], row, col, unmasked, T)
    D = logp - old_logp
    valid = unmasked & finite(D) & finite(A) & finite(logp)
    zero = tl.zeros_like(D)
    w, aux, x, H = zero + 1.0, zero, zero, zero
    if weights_ptr is not None:
        w = read_token(weights_ptr, strides[8], strides[9], row, col, unmasked, T)
        valid = valid & finite(w)
    if aux_ptr is not None:
        aux = read_token(aux_ptr, strides[10], strides[11], row, col, unmasked, T)
        valid = valid & finite(aux)
    if ref_logp_ptr is not None:
        x = logp - read_token(ref_logp_ptr, strides[12], strides[13], row, col, unmasked, T)
        valid = valid & finite(x)
    if entropy_ptr is not None:
        H = read_token(entropy_ptr, strides[14], strides[15], row, col, unmasked, T)
        valid = valid & finite(H)
    if weights_ptr is not None:
        w = tl.where(valid, w, 0.0)
    if aux_ptr is not None:
        aux = tl.where(valid, aux, 0.0)
    if ref_logp_ptr is not None:
        x = tl.where(valid, x, 0.0)
    if entropy_ptr is not None:
        H = tl.where(valid, H, 0.0)
    bad = unmasked & (valid == 0)
    return (
        valid,
        bad,
        tl.where(valid, logp, 0.0),
        saturate(tl.where(valid, D, 0.0)),
        tl.where(valid, A, 0.0),
        w,
        aux,
        x,
        H,
    )


@triton.jit
def rule_scalars(low, high, dual, cap, a, b, c, d, bounds_ptr, T: tl.constexpr):
    p_low = tl.full([], low, T)
    p_high = tl.full([], high, T)
    if bounds_ptr is not None:
        p_low = tl.load(bounds_ptr).to(T)
        p_high = tl.load(bounds_ptr + 1).to(T)
    rest = (tl.full([], dual, T), tl.full([], cap, T), tl.full([], a, T), tl.full([], b, T))
    return (p_low, p_high, rest[0], rest[1], rest[2], rest[3], tl.full([], c, T), tl.full([], d, T))


@triton.jit
def given_total(normalizer, normalizer_ptr):
    """The normalizer in float64, 0 for none."""
    if normalizer_ptr is not None:
        return tl.load(normalizer_ptr).to(tl.float64)
    else:
        return tl.full([], normalizer, tl.float64)


@triton.jit
def token_limit(total, T: tl.constexpr):
    """Where a token's loss and gradient saturate: times 1 / normalizer they must still be finite."""
    shrink = tl.where((total > 0.0) & (total < 1.0), total, 1.0)
    if T == tl.float64:
        return shrink * SATURATION_F64
    else:
        return (shrink * SATURATION_F32).to(T)


# ---------------------------------------------------------------- phase 1: what a sequence tells its tokens


@jit_kernel
def sequence_kernel(
    logp_ptr,  # the tensors of tokens: [rows, cols] of any strides, below
    old_logp_ptr,
    advantages_ptr,
    mask_ptr,  # uint8; this one and the rest: or None
    weights_ptr,
    aux_ptr,
    ref_logp_ptr,
    entropy_ptr,
    order_ptr,  # int64 [cols]: packed tokens sorted by sequence, or None: a row is a sequence
    offsets_ptr,  # int64 [sequences + 1]: where each begins in that order
    sequences_ptr,  # float64 [3, sequences]: receives 1 / length, s, share
    bounds_ptr,  # float64 [2]: replaces low and high, or None
    normalizer_ptr,  # 0-d: replaces normalizer, or None
    low: tl.float64,
    high: tl.float64,
    dual: tl.float64,
    cap: tl.float64,
    a: tl.float64,
    b: tl.float64,
    c: tl.float64,
    d: tl.float64,
    normalizer: tl.float64,
    sequences: tl.int64,
    cols: tl.int64,
    logp_row: tl.int64,
    logp_col: tl.int64,
    old_logp_row: tl.int64,
    old_logp_col: tl.int64,
    advantages_row: tl.int64,
    advantages_col: tl.int64,
    mask_row: tl.int64,
    mask_col: tl.int64,
    weights_row: tl.int64,
    weights_col: tl.int64,
    aux_row: tl.int64,
    aux_col: tl.int64,
    ref_logp_row: tl.int64,
    ref_logp_col: tl.int64,
    entropy_row: tl.int64,
    entropy_col: tl.int64,
    T: tl.constexpr,  # of the arithmetic
    RULE: tl.constexpr,
    AGGREGATION: tl.constexpr,
    SHARES: tl.constexpr,  # whether a gradient is wanted that a sequence shares
    TILE: tl.constexpr,  # tokens at a time
):
    pointers = (logp_ptr, old_logp_ptr, advantages_ptr, mask_ptr, weights_ptr, aux_ptr, ref_logp_ptr, entropy_ptr)
    strides = (
        logp_row, logp_col, old_logp_row, old_logp_col, advantages_row, advantages_col, mask_row, mask_col,
        weights_row, weights_col, aux_row, aux_col, ref_logp_row, ref_logp_col, entropy_row, entropy_col,
    )  # fmt: skip
    p = rule_scalars(low, high, dual, cap, a, b, c, d, bounds_ptr, T)
    limit = token_limit(given_total(normalizer, normalizer_ptr), T)
    sequence = tl.program_id(0).to(tl.int64)
    row = sequence
    begin = sequence * 0
    end = begin + cols
    if order_ptr is not None:
        row = sequence * 0
        begin = tl.load(offsets_ptr + sequence)
        end = tl.load(offsets_ptr + sequence + 1)

    counts = tl.zeros([TILE], tl.float64)
    terms = tl.zeros([TILE], tl.float64)
    for first in range(bound(begin), bound(end), TILE):
        col = first + tl.arange(0, TILE).to(tl.int64)
        there = col < end
        if order_ptr is not None:
            col = tl.load(order_ptr + col, mask=there, other=0)
        valid, _bad, _logp, D, A, _w, aux, _x, _H = classify(pointers, strides, row, col, there, T)
        counts += valid.to(tl.float64)
        if RULE >= VESPO:
            terms += sequence_term(D, A, aux, p, RULE).to(tl.float64)
    length = tl.sum(counts)
    length = tl.where(length > 1.0, length, 1.0)
    s = tl.sum(terms)
    if RULE != VESPO:
        s = s / length
    tl.store(sequences_ptr + sequence, 1.0 / length)
    tl.store(sequences_ptr + sequences + sequence, s)

    if SHARES:
        one = 1.0 / length
        s_of = s.to(T)
        r = exp_clamped(clamp_log_ratio(s_of))
        pulls = tl.zeros([TILE], tl.float64)
        for first in range(bound(begin), bound(end), TILE):
            col = first + tl.arange(0, TILE).to(tl.int64)
            there = col < end
            if order_ptr is not None:
                col = tl.load(order_ptr + col, mask=there, other=0)
            valid, _bad, logp, D, A, w, aux, _x, _H = classify(pointers, strides, row, col, there, T)
            _loss, grad, _keep, _low, _high, _dual = token(tl.zeros_like(D) + r, D, A, logp, aux, s_of, p, RULE)
            weight = tl.where(valid, 1.0, 0.0).to(T)
            if AGGREGATION == SEQUENCE_MEAN:
                weight = weight * one.to(T)
            pulls += clip(weight * w * saturate(grad), -limit, limit).to(tl.float64)
        tl.store(sequences_ptr + 2 * sequences + sequence, tl.sum(pulls) / length)


# ---------------------------------------------------------------- phase 2: tokens

TOKENS, CLIPPED_LOW, CLIPPED_HIGH, CLIPPED_DUAL, SUPPRESSED_MASS, TOTAL_MASS = map(tl.constexpr, range(6))
KL_K1, KL_K2, KL_K3, RATIO_SUM, RATIO_SQ_SUM, RATIO_MIN, RATIO_MAX, NONFINITE = map(tl.constexpr, range(6, 14))
_STATS = 14
STATS, STATS_AND_LOSS = tl.constexpr(_STATS), tl.constexpr(16)
"""Of ClipStats.buffer; a row of partial sums has the loss after them."""


@jit_kernel
def token_kernel(
    logp_ptr,  # as sequence_kernel
    old_logp_ptr,
    advantages_ptr,
    mask_ptr,
    weights_ptr,
    aux_ptr,
    ref_logp_ptr,
    entropy_ptr,
    ids_ptr,  # int64 [cols], of any stride: the sequence of packed tokens, or None
    sequences_ptr,  # float64 [3, sequences] of sequence_kernel, or None
    bounds_ptr,
    normalizer_ptr,
    grad_ptr,  # T [rows, cols], or None
    grad_entropy_ptr,  # T [rows, cols], or None
    partials_ptr,  # float64 [STATS + 1, programs]
    low: tl.float64,
    high: tl.float64,
    dual: tl.float64,
    cap: tl.float64,
    a: tl.float64,
    b: tl.float64,
    c: tl.float64,
    d: tl.float64,
    normalizer: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    programs: tl.int64,
    tiles: tl.int64,
    tiles_each: tl.int64,
    sequences: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    logp_row: tl.int64,
    logp_col: tl.int64,
    old_logp_row: tl.int64,
    old_logp_col: tl.int64,
    advantages_row: tl.int64,
    advantages_col: tl.int64,
    mask_row: tl.int64,
    mask_col: tl.int64,
    weights_row: tl.int64,
    weights_col: tl.int64,
    aux_row: tl.int64,
    aux_col: tl.int64,
    ref_logp_row: tl.int64,
    ref_logp_col: tl.int64,
    entropy_row: tl.int64,
    entropy_col: tl.int64,
    ids_col: tl.int64,
    T: tl.constexpr,
    RULE: tl.constexpr,
    AGGREGATION: tl.constexpr,
    KL: tl.constexpr,
    WIDE: tl.constexpr,  # whether a row holds a tile
    TILE: tl.constexpr,  # tokens at a time
):
    pointers = (logp_ptr, old_logp_ptr, advantages_ptr, mask_ptr, weights_ptr, aux_ptr, ref_logp_ptr, entropy_ptr)
    strides = (
        logp_row, logp_col, old_logp_row, old_logp_col, advantages_row, advantages_col, mask_row, mask_col,
        weights_row, weights_col, aux_row, aux_col, ref_logp_row, ref_logp_col, entropy_row, entropy_col,
    )  # fmt: skip
    p = rule_scalars(low, high, dual, cap, a, b, c, d, bounds_ptr, T)
    limit = token_limit(given_total(normalizer, normalizer_ptr), T)
    program = tl.program_id(0).to(tl.int64)
    first = program * tiles_each
    last = tl.minimum(first + tiles_each, tiles)
    zero = tl.full([], 0.0, tl.float64)
    count, lows, highs, duals, bads = zero, zero, zero, zero, zero
    suppressed_mass, total_mass, k1, k2, k3 = zero, zero, zero, zero, zero
    ratio_sum, ratio_sq_sum, ratio_max, loss_sum = zero, zero, zero, zero
    ratio_min = tl.full([], MOST_F32, tl.float64)

    for tile in range(bound(first), bound(last)):
        row, col, there = tile_of(tl.full([], tile, tl.int64), rows, cols, WIDE, TILE)
        valid, bad, logp, D, A, w, aux, x, H = classify(pointers, strides, row, col, there, T)
        weight = tl.where(valid, 1.0, 0.0).to(T)
        r, beyond_linear, _near_zero = ratio_parts(D)
        s = D
        share = D
        if sequences_ptr is not None:
            sequence = row + col * 0
            if ids_ptr is not None:
                sequence = tl.load(ids_ptr + col * ids_col, mask=there, other=0)
            if AGGREGATION == SEQUENCE_MEAN:
                weight = weight * tl.load(sequences_ptr + sequence, mask=there, other=0.0).to(T)
            if RULE >= VESPO:
                s = tl.load(sequences_ptr + sequences + sequence, mask=there, other=0.0).to(T)
            if RULE >= GSPO:
                r = exp_clamped(clamp_log_ratio(s))
                if grad_ptr is not None:
                    share = tl.load(sequences_ptr + 2 * sequences + sequence, mask=there, other=0.0).to(T)

        loss, grad, keep, clipped_low, clipped_high, clipped_dual = token(r, D, A, logp, aux, s, p, RULE)
        mass = saturate(weight * r * tl.abs(A))
        suppressed = tl.where((grad == 0.0) | (keep == 0), mass, 0.0)
        loss = clip(weight * w * saturate(loss), -limit, limit)
        if RULE >= GSPO:
            grad = tl.where(keep, share, 0.0)
        else:
            grad = clip(weight * w * saturate(grad), -limit, limit)
        if KL:
            value, slope = kl_token(x, KL)
            scaled = weight * tl.full([], kl_coef, T)
            loss = clip(loss + saturate(scaled * saturate(value)), -limit, limit)
            grad = clip(grad + saturate(scaled * saturate(slope)), -limit, limit)
        at = row * cols + col
        if entropy_ptr is not None:
            grad_entropy = -tl.full([], entropy_coef, T) * weight
            loss = clip(loss + saturate(grad_entropy * saturate(H)), -limit, limit)
            if grad_entropy_ptr is not None:
                tl.store(grad_entropy_ptr + at, tl.where(valid, grad_entropy, 0.0), mask=there)
        if grad_ptr is not None:
            tl.store(grad_ptr + at, tl.where(valid, grad, 0.0), mask=there)

        ratio = tl.where(valid, r, 0.0).to(tl.float64)
        count += tl.sum(valid.to(tl.float64))
        lows += tl.sum((clipped_low & valid).to(tl.float64))
        highs += tl.sum((clipped_high & valid).to(tl.float64))
        duals += tl.sum((clipped_dual & valid).to(tl.float64))
        suppressed_mass += tl.sum(suppressed.to(tl.float64))
        total_mass += tl.sum(mass.to(tl.float64))
        k1 += tl.sum(-D.to(tl.float64))
        k2 += tl.sum(saturate(0.5 * D * D).to(tl.float64))
        k3 += tl.sum(beyond_linear.to(tl.float64))
        ratio_sum += tl.sum(ratio)
        ratio_sq_sum += tl.sum(ratio * ratio)
        ratio_min = tl.minimum(ratio_min, tl.min(tl.where(valid, ratio, MOST_F32)))
        ratio_max = tl.maximum(ratio_max, tl.max(ratio))
        bads += tl.sum(bad.to(tl.float64))
        loss_sum += tl.sum(loss.to(tl.float64))

    out = partials_ptr + program
    tl.store(out + TOKENS * programs, count)
    tl.store(out + CLIPPED_LOW * programs, lows)
    tl.store(out + CLIPPED_HIGH * programs, highs)
    tl.store(out + CLIPPED_DUAL * programs, duals)
    tl.store(out + SUPPRESSED_MASS * programs, suppressed_mass)
    tl.store(out + TOTAL_MASS * programs, total_mass)
    tl.store(out + KL_K1 * programs, k1)
    tl.store(out + KL_K2 * programs, k2)
    tl.store(out + KL_K3 * programs, k3)
    tl.store(out + RATIO_SUM * programs, ratio_sum)
    tl.store(out + RATIO_SQ_SUM * programs, ratio_sq_sum)
    tl.store(out + RATIO_MIN * programs, ratio_min)
    tl.store(out + RATIO_MAX * programs, ratio_max)
    tl.store(out + NONFINITE * programs, bads)
    tl.store(out + STATS * programs, loss_sum)


# ---------------------------------------------------------------- phase 3: the partial sums, folded


@jit_kernel
def finish_kernel(
    partials_ptr,  # float64 [STATS + 1, programs] of token_kernel
    normalizer_ptr,  # 0-d, or None
    loss_ptr,  # T, 0-d
    scale_ptr,  # T, 0-d
    stats_ptr,  # float32 [STATS]
    normalizer: tl.float64,
    programs: tl.int64,
    sequences: tl.int64,
    T: tl.constexpr,
    AGGREGATION: tl.constexpr,
    TILE: tl.constexpr,  # partial sums at a time
):
    stat = tl.arange(0, STATS_AND_LOSS)
    k = stat[:, None]
    lane = tl.arange(0, TILE)[None, :]
    folded = tl.where(k == RATIO_MIN, MOST_F32, tl.zeros([STATS_AND_LOSS, TILE], tl.float64))
    for i in range(0, bound(programs), TILE):
        there = (k <= STATS) & (i + lane < programs)
        x = tl.load(partials_ptr + (k * programs + i + lane), mask=there, other=0.0)
        least = tl.where(there & (x < folded), x, folded)
        folded = tl.where(k == RATIO_MIN, least, tl.where(k == RATIO_MAX, tl.maximum(folded, x), folded + x))
    least = tl.min(folded, axis=1)
    greatest = tl.max(folded, axis=1)
    x = tl.where(stat == RATIO_MIN, least, tl.where(stat == RATIO_MAX, greatest, tl.sum(folded, axis=1)))

    total = given_total(normalizer, normalizer_ptr)
    if normalizer_ptr is None:
        count = tl.sum(tl.where(stat == TOKENS, x, 0.0))
        if AGGREGATION != TOKEN_MEAN:
            count = sequences.to(tl.float64)
        total = tl.where(total > 0.0, total, tl.where(count > 1.0, count, 1.0))
    scale = 1.0 / total
    loss = tl.sum(tl.where(stat == STATS, x, 0.0)) * scale
    x = tl.where((stat == SUPPRESSED_MASS) | (stat == TOTAL_MASS), x * scale, x)
    tl.store(stats_ptr + stat, clip(x, -MOST_F32, MOST_F32).to(tl.float32), mask=stat < STATS)
    most: tl.constexpr = MOST_F64 if tl.float64 == T else MOST_F32
    tl.store(loss_ptr, clip(loss, -most, most).to(T))
    tl.store(scale_ptr, scale.to(T))


# ---------------------------------------------------------------- BAPO: sums at each candidate bound


@jit_kernel
def level_kernel(
    logp_ptr,  # as sequence_kernel
    old_logp_ptr,
    advantages_ptr,
    mask_ptr,
    partials_ptr,  # float64 [levels, programs]
    levels,  # tuple: each level as three float32 whose sum it is, the lows first
    lows: tl.int64,
    programs: tl.int64,
    tiles: tl.int64,
    tiles_each: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    logp_row: tl.int64,
    logp_col: tl.int64,
    old_logp_row: tl.int64,
    old_logp_col: tl.int64,
    advantages_row: tl.int64,
    advantages_col: tl.int64,
    mask_row: tl.int64,
    mask_col: tl.int64,
    T: tl.constexpr,
    WIDE: tl.constexpr,
    LEVELS: tl.constexpr,
    AT_ONCE: tl.constexpr,  # levels of a program
    TILE: tl.constexpr,  # tokens at a time
):
    pointers = (logp_ptr, old_logp_ptr, advantages_ptr, mask_ptr, None, None, None, None)
    strides = (
        logp_row, logp_col, old_logp_row, old_logp_col, advantages_row, advantages_col, mask_row, mask_col,
        0, 0, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group = program // programs
    program = program % programs
    index = group * AT_ONCE + tl.arange(0, AT_ONCE)
    level = tl.zeros([AT_ONCE], tl.float64)
    for k in tl.static_range(LEVELS):
        exact = tl.full([], levels[3 * k], tl.float64) + tl.full([], levels[3 * k + 1], tl.float64)
        level = tl.where(index == k, exact + tl.full([], levels[3 * k + 2], tl.float64), level)
    level = level.to(T)[None, :]
    is_low = (index < lows)[None, :]

    first = program * tiles_each
    last = tl.minimum(first + tiles_each, tiles)
    sums = tl.zeros([AT_ONCE], tl.float64)
    for tile in range(bound(first), bound(last)):
        row, col, there = tile_of(tl.full([], tile, tl.int64), rows, cols, WIDE, TILE)
        _valid, _bad, _logp, D, A, _w, _aux, _x, _H = classify(pointers, strides, row, col, there, T)
        r = exp_clamped(clamp_log_ratio(D))[:, None]
        gain = tl.where(A > 0.0, A, 0.0)[:, None]
        loss = tl.where(A < 0.0, -A, 0.0)[:, None]
        below = tl.where(r < level, level, r) * loss
        above = tl.where(r > level, level, r) * gain
        sums += tl.sum(saturate(tl.where(is_low, below, above)).to(tl.float64), axis=0)
    tl.store(partials_ptr + index * programs + program, sums, mask=index < LEVELS)


@jit_kernel
def fold_kernel(partials_ptr, sums_ptr, programs: tl.int64, TILE: tl.constexpr):
    """One program a level."""
    k = tl.program_id(0).to(tl.int64)
    tl.store(sums_ptr + k, sum_in_order(partials_ptr + k * programs, programs, TILE))


# ---------------------------------------------------------------- launches

_TILE = {8: 256, 4: 512}
"""Tokens of a tile by the bytes of the arithmetic: some forty numbers of each are alive at a time."""
_WARPS = 4
_MOST_PROGRAMS = 4096
"""Of a pass: more than a GPU runs at once, few enough that one program folds their sums. Beyond, each takes several
tiles."""
_FINISH, _FINISH_WARPS = 256, 8
_FOLD = 1024
"""Partial sums at a time, of each of the 15 statistics or of one level."""
_LEVELS, _LEVEL_TILE = 32, 128
"""Candidate bounds and tokens of a tile of level_kernel: the 22 of BAPO's defaults in one pass over the tokens."""


def _tiles(rows: int, cols: int, tile: int) -> dict[str, int | bool]:
    """How a pass over [rows, cols] tokens is cut into tiles and programs."""
    wide = cols >= tile
    tiles = rows * -(-cols // tile) if wide else -(-rows // (tile // cols)) if cols else 0
    each = max(1, -(-tiles // _MOST_PROGRAMS))
    return {"wide": wide, "programs": -(-tiles // each), "tiles": tiles, "each": each}


def _three_floats(x: float) -> list[float]:
    """Three float32 whose sum is x: a tuple of arguments has no wider numbers."""
    parts = []
    x = max(-_MOST_F32, min(x, _MOST_F32))
    for _ in range(3):
        parts.append(struct.unpack("f", struct.pack("f", x))[0])
        x -= parts[-1]
    return parts


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride())]


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    aux: Tensor | None,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    sequence_ids: Tensor | None,
    sequence_order: Tensor | None,
    sequence_offsets: Tensor | None,
    num_sequences: int,
    rule: int,
    scalars: list[float],
    bounds: Tensor | None,
    aggregation: int,
    normalizer: float,
    normalizer_tensor: Tensor | None,
    kl_coef: float,
    kl_estimator: int,
    entropy_coef: float,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See reference_objective.py. Reads each input once, twice or three times with sequences; writes gradients once."""
    rows, cols = logp.shape
    device = logp.device
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    T = TYPES[DTYPES.index(dtype)]
    tile = _TILE[dtype.itemsize]
    with_entropy = want_grad and entropy is not None
    grad = torch.empty((rows, cols) if want_grad else (0, 0), dtype=dtype, device=device)
    grad_entropy = torch.empty((rows, cols) if with_entropy else (0, 0), dtype=dtype, device=device)
    loss, scale = torch.empty((), dtype=dtype, device=device), torch.empty((), dtype=dtype, device=device)
    stats = torch.empty(_STATS, dtype=torch.float32, device=device)

    mask = None if mask is None else mask.view(torch.uint8)
    tokens = (logp, old_logp, advantages, mask, weights, aux, ref_logp, entropy)
    numbers = [float(x) for x in (*scalars, normalizer)]
    constants = {"T": T, "RULE": rule, "AGGREGATION": aggregation}
    options = {"num_warps": _WARPS, "enable_fp_fusion": False}

    sequences = None
    if aggregation == spec.SEQUENCE_MEAN or rule in spec.NEEDS_SEQUENCE:
        sequences = torch.empty(3, num_sequences, dtype=torch.float64, device=device)
        if num_sequences:
            launch_kernel(
                sequence_kernel,
                num_sequences,
                device,
                *tokens,
                sequence_order,
                sequence_offsets,
                sequences,
                bounds,
                normalizer_tensor,
                *numbers,
                num_sequences,
                cols,
                *_strides(*tokens),
                **constants,
                SHARES=want_grad and rule in spec.SEQUENCE_RATIO,
                TILE=tile,
                **options,
            )
    cut = _tiles(rows, cols, tile)
    partials = torch.empty(_STATS + 1, cut["programs"], dtype=torch.float64, device=device)
    if cut["programs"]:
        launch_kernel(
            token_kernel,
            cut["programs"],
            device,
            *tokens,
            sequence_ids,
            sequences,
            bounds,
            normalizer_tensor,
            grad if want_grad else None,
            grad_entropy if with_entropy else None,
            partials,
            *numbers,
            float(kl_coef),
            float(entropy_coef),
            cut["programs"],
            cut["tiles"],
            cut["each"],
            num_sequences,
            rows,
            cols,
            *_strides(*tokens),
            0 if sequence_ids is None else sequence_ids.stride(0),
            **constants,
            KL=kl_estimator if ref_logp is not None else 0,
            WIDE=cut["wide"],
            TILE=tile,
            **options,
        )
    launch_kernel(
        finish_kernel,
        1,
        device,
        partials,
        normalizer_tensor,
        loss,
        scale,
        stats,
        float(normalizer),
        cut["programs"],
        num_sequences,
        T=T,
        AGGREGATION=aggregation,
        TILE=_FINISH,
        num_warps=_FINISH_WARPS,
        enable_fp_fusion=False,
    )
    return loss, grad, grad_entropy, scale, stats


def bound_sums(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    lows: list[float],
    highs: list[float],
) -> Tensor:
    """See reference_objective.py. Reads each input once for every 32 levels."""
    rows, cols = logp.shape
    code = DTYPES.index(torch.float64 if logp.dtype == torch.float64 else torch.float32)
    mask = None if mask is None else mask.view(torch.uint8)
    tokens = (logp, old_logp, advantages, mask)
    levels = len(lows) + len(highs)
    sums = torch.empty(levels, dtype=torch.float64, device=logp.device)
    cut = _tiles(rows, cols, _LEVEL_TILE)
    partials = torch.empty(levels, cut["programs"], dtype=torch.float64, device=logp.device)
    if levels and cut["programs"]:
        launch_kernel(
            level_kernel,
            cut["programs"] * -(-levels // _LEVELS),
            logp.device,
            *tokens,
            partials,
            tuple(part for level in (*lows, *highs) for part in _three_floats(level)),
            len(lows),
            cut["programs"],
            cut["tiles"],
            cut["each"],
            rows,
            cols,
            *_strides(*tokens),
            T=TYPES[code],
            WIDE=cut["wide"],
            LEVELS=levels,
            AT_ONCE=_LEVELS,
            TILE=_LEVEL_TILE,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    if levels:
        launch_kernel(
            fold_kernel,
            levels,
            logp.device,
            partials,
            sums,
            cut["programs"],
            TILE=_FOLD,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return sums
