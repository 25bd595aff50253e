"""The Triton kernels of a step: NVIDIA and AMD GPUs, and any CPU under TRITON_INTERPRET=1 (slow, for tests).

    tensor_table -> place -> norm_kernel -> prologue_kernel -> (reduce_kernel, unit_kernel: sums for rules) ->
    update_kernel

One launch each whatever the number of tensors (but for the prologue: one a combination of dtypes in a batch). Every
address and scalar is read from the tables of device_table.py, so nothing is read back to the host. The equations carry
the names of csrc/update_math.h and reference_step.py.

Kernels change their operands in place, so nothing here is autotuned: a trial run would be an optimizer step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_clip_adam.backends import host_table, native
from fused_clip_adam.backends import scalars as columns
from fused_clip_adam.backends.device_table import (
    _FEWEST_UNITS,
    _MOST_UNITS,
    _UNIT_SPAN,
    DeviceTables,
    Launch,
    by_tensor,
    new_dots,
    place,
    rows_of_pairs,
)
from fused_clip_adam.backends.device_table import ROW as _ROW_WORDS
from fused_clip_adam.backends.device_table import SAMPLE as _SAMPLE_COLUMN
from fused_clip_adam.backends.device_table import SAMPLES as _SAMPLES_COLUMN
from fused_clip_adam.backends.device_table import UNIT as _UNIT_COLUMN
from fused_clip_adam.backends.reference_step import ALIGN_BLOCK as _ALIGN_BLOCK
from fused_clip_adam.backends.reference_step import ALIGN_ELEMENT as _ALIGN_ELEMENT
from fused_clip_adam.backends.reference_step import ATAN2 as _ATAN2
from fused_clip_adam.backends.reference_step import CAUTIOUS as _CAUTIOUS
from fused_clip_adam.backends.reference_step import DAMP as _DAMP
from fused_clip_adam.backends.reference_step import FADAM as _FADAM
from fused_clip_adam.backends.reference_step import GRAMS as _GRAMS
from fused_clip_adam.backends.triton_math import (
    BYTES,
    TYPES,
    bound,
    divide,
    launch_kernel,
    load_as,
    square_root,
    store_as,
    sum_in_order,
    tl,
    triton,
    unavailable,
)

__all__ = [
    "ON_DEVICE",
    "by_tensor",
    "grad_square_sums",
    "new_dots",
    "place",
    "prologue",
    "reduce",
    "sample_square_sums",
    "tensor_table",
    "unavailable",
    "unit_sums",
    "update_",
]

ON_DEVICE = True
"""The kernels advance `step` and read a learning rate where they are: on the device."""

tensor_table = host_table.tensor_table if native.unavailable() else native.tensor_table

# ---------------------------------------------------------------- layouts: csrc/table.h, scalars.py, device_table.py

ROW = tl.constexpr(_ROW_WORDS)
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ = (tl.constexpr(slot) for slot in range(5))
STEP, STEP_IS_F64, BIAS_WEIGHTS, NUMEL = (tl.constexpr(column) for column in range(5, 9))
FLAT, STRIDED_AT, GROUP = (tl.constexpr(column) for column in range(12, 15))
UNIT = tl.constexpr(_UNIT_COLUMN)
COUNT, APART = tl.constexpr(_SAMPLES_COLUMN), tl.constexpr(_SAMPLE_COLUMN)
UNIT_SPAN, FEWEST_UNITS, MOST_UNITS = map(tl.constexpr, (_UNIT_SPAN, _FEWEST_UNITS, _MOST_UNITS))
GROUP_SCALARS = tl.constexpr(len(columns.GROUP_SCALARS))
LR_ADDRESS, LR_IS_F64 = (tl.constexpr(columns.GROUP_SCALARS.index(name)) for name in ("lr_address", "lr_is_f64"))
GROUP_SIGNALS = tl.constexpr(len(columns.GROUP_SIGNALS))
SCALARS = tl.constexpr(columns.WIDTH)
FORGET_BEFORE, FORGET_AFTER = tl.constexpr(columns.FORGET_BEFORE), tl.constexpr(columns.FORGET_AFTER)
DAMP = tl.constexpr(_DAMP)
ALIGN_BLOCK, ALIGN_ELEMENT, CAUTIOUS = map(tl.constexpr, (_ALIGN_BLOCK, _ALIGN_ELEMENT, _CAUTIOUS))
GRAMS, ATAN2, FADAM = map(tl.constexpr, (_GRAMS, _ATAN2, _FADAM))
SQUARES_MAX, DOT, AGREE = map(tl.constexpr, (columns.SQUARES_MAX, columns.DOT, columns.AGREE))
RMS, METRIC, TAU_SQUARES = map(tl.constexpr, (columns.RMS, columns.METRIC, columns.TAU_SQUARES))
FADAM_SQUARES = tl.constexpr(columns.FADAM_SQUARES)
PLAIN, STACKED, NOISED = map(tl.constexpr, range(3))
"""SAMPLES of a kernel: gradients; stacks of samples to be summed up; and noise on the sums."""
AT_ONCE = tl.constexpr(4)  # samples whose loads are in flight together
ULP_32, ANGLE_32 = tl.constexpr(2.0**-32), tl.constexpr(2 * math.pi * 2.0**-32)

# ---------------------------------------------------------------- the update of one element


@triton.jit
def same_sign(x, y):  # x * y > 0 without the underflow
    return ((x > 0) & (y > 0)) | ((x < 0) & (y < 0))


@triton.jit
def load_scalars(scalars_ptr, T: tl.constexpr, GUARDED: tl.constexpr):
    """StepScalars of a row in the arithmetic type; the last seven, the guards, only where they are looked at."""
    s = (
        tl.load(scalars_ptr + 2).to(T),  # 0: grad_factor
        tl.load(scalars_ptr + 3).to(T),  # a
        tl.load(scalars_ptr + 4).to(T),  # b
        tl.load(scalars_ptr + 5).to(T),  # beta2
        tl.load(scalars_ptr + 6).to(T),  # one_minus_beta2
        tl.load(scalars_ptr + 7).to(T),  # 5: inv_w1
        tl.load(scalars_ptr + 8).to(T),  # inv_sqrt_w2
        tl.load(scalars_ptr + 9).to(T),  # eps
        tl.load(scalars_ptr + 10).to(T),  # lr
        tl.load(scalars_ptr + 11).to(T),  # decay
        tl.load(scalars_ptr + 12).to(T),  # 10: l2
        tl.load(scalars_ptr + 13).to(T),  # max_update
    )
    if GUARDED:
        guards = (
            tl.load(scalars_ptr + 14).to(T),  # 12: forget
            tl.load(scalars_ptr + 15).to(T),  # keep
            tl.load(scalars_ptr + 16).to(T),  # theta
            tl.load(scalars_ptr + 17).to(T),  # 15: spike_floor
            tl.load(scalars_ptr + 18).to(T),  # tau
            tl.load(scalars_ptr + 19).to(T),  # tau_factor
            tl.load(scalars_ptr + 20).to(T),  # prox
        )
        return s + guards
    else:
        return s


@triton.jit
def scaled_grad(param, grad, s, COUPLED: tl.constexpr, GUARDED: tl.constexpr):
    """g <- S g (+ l2 p), where GUARDED with what lies above tau brought down first"""
    grad_factor, l2 = s[0], s[10]
    if GUARDED:
        tau, tau_factor = s[16], s[17]
        grad = tl.where(tl.abs(grad) > tau, grad * tau_factor, grad)
    g = grad * grad_factor
    if COUPLED:
        g = g + l2 * param
    return g


@triton.jit
def seen_grad(param, grad, v, s, COUPLED: tl.constexpr, GUARDED: tl.constexpr):
    """The gradient as the update sees it: `scaled_grad`, where GUARDED with a spike brought down. v: the old one."""
    g = scaled_grad(param, grad, s, COUPLED, GUARDED)
    if GUARDED:
        theta, spike_floor = s[14], s[15]
        limit = theta * v  # NaN where theta is infinite and v 0: no spike
        most = square_root(limit)
        spike = (g * g > limit) & (v > spike_floor)
        g = tl.where(spike, tl.where(g < 0.0, -most, most), g)
    return g


@triton.jit
def moved_momentum(m, g, s, GUARDED: tl.constexpr):
    """m' = a m + b g, where GUARDED and clamp(g - m, -prox, prox)"""
    a, b = s[1], s[2]
    m_new = a * m + b * g
    if GUARDED:
        prox = s[18]
        away = g - m
        m_new += tl.where(away < -prox, -prox, tl.where(away > prox, prox, away))
    return m_new


@triton.jit
def momentum_dot(m, g):
    """What an element adds to the sum m g that decides whether its momentum is kept, float64. Where m is not 0, a
    negative number too small for anything else: the sum is then 0 only where all of m is.
    """
    return m.to(tl.float64) * g.to(tl.float64) - tl.where(m != 0.0, 1e-300, 0.0)


@triton.jit
def atan2_right(y, x):
    """atan2(y, x) for x >= 0: the rational of update_math.h."""
    size = tl.abs(y)
    steep = size > x
    less, more = tl.where(steep, x, size), tl.where(steep, size, x)
    upper = less > 0.66 * more
    numerator = tl.where(upper, less - more, less)
    denominator = tl.where(upper, less + more, more)
    w = divide(numerator, tl.where(denominator > 0.0, denominator, 1.0))
    z = w * w
    p = z * -8.750608600031904122785e-1 + -1.615753718733365076637e1
    p = p * z + -7.500855792314704667340e1
    p = p * z + -1.228866684490136173410e2
    p = p * z + -6.485021904942025371773e1
    q = z + 2.485846490142306297962e1
    q = q * z + 1.650270098316988542046e2
    q = q * z + 4.328810604912902668951e2
    q = q * z + 4.853903996359136964868e2
    q = q * z + 1.945506571482613964425e2
    small = w + w * divide(z * p, q)
    angle = tl.where(upper, 0.78539816339744830962 + small, small)
    turned = tl.where(steep, 1.57079632679489661923 - angle, angle)
    return tl.where(y < 0.0, -turned, turned)


@triton.jit
def update_element(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    s,
    keep,
    RULE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    COUPLED: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """m' = a m + b g ; v' = beta2 v + (1 - beta2) g g
    u  = d / W1 / (sqrt(v') / sqrt(W2) + eps), at most max_update ; p <- decay p - lr u
    """
    a, b, beta2, one_minus_beta2 = s[1], s[2], s[3], s[4]
    inv_w1, inv_sqrt_w2, eps, lr, decay, max_update = s[5], s[6], s[7], s[8], s[9], s[11]
    m = exp_avg
    v = exp_avg_sq
    v_max = max_exp_avg_sq
    if GUARDED:
        before = s[12] == FORGET_BEFORE
        m = tl.where(before, 0.0, m)
        v = tl.where(before, 0.0, v)
        v_max = tl.where(before, 0.0, v_max)
    g = seen_grad(param, grad, v, s, COUPLED, GUARDED)
    # bg and m_new before v_new: in the order of update_math.h ptxas needs up to 11 registers more.
    bg = b * g
    m_new = moved_momentum(m, g, s, GUARDED)
    v_new = beta2 * v + one_minus_beta2 * g * g
    v_used = v_new
    if AMSGRAD:
        v_used = tl.where(v_max > v_new, v_max, v_new)
    if RULE == FADAM:  # inv_w1 clips the natural gradient, inv_sqrt_w2 is the weight of the natural decay
        base = square_root(v_used) + eps
        m_new = a * m + b * (divide(g, base) * inv_w1)
        u = m_new + inv_sqrt_w2 * divide(param, base)
    else:
        d = m_new
        if RULE == ALIGN_BLOCK:
            d = tl.where(keep, m_new, bg)
        if RULE == ALIGN_ELEMENT:
            d = tl.where(same_sign(m, g), m_new, bg)
        if GUARDED:
            keep_tensor = s[13]
            d = tl.where(keep_tensor != 0.0, d, bg)
        size = square_root(v_used) * inv_sqrt_w2
        if RULE == ATAN2:
            u = max_update * (0.63661977236758134308 * atan2_right(d * inv_w1, size))  # 2 / pi
        else:
            u = divide(d * inv_w1, size + eps)
            u = tl.where(u < -max_update, -max_update, u)
            u = tl.where(u > max_update, max_update, u)
        if RULE == CAUTIOUS:
            u = tl.where(same_sign(m_new, g), u, 0.0)
        if RULE == GRAMS:
            u = tl.where(g > 0.0, tl.abs(u), tl.where(g < 0.0, -tl.abs(u), 0.0))

    param = param * decay - lr * u
    if GUARDED:
        after = s[12] == FORGET_AFTER
        m_new = tl.where(after, 0.0, m_new)
        v_new = tl.where(after, 0.0, v_new)
        v_used = tl.where(after, 0.0, v_used)
    return param, m_new, v_new, v_used


# ---------------------------------------------------------------- reductions of one element


@triton.jit
def summand(
    param, grad, exp_avg, exp_avg_sq, s, KIND: tl.constexpr, COUPLED: tl.constexpr, READS_EXP_AVG_SQ: tl.constexpr
):
    """What an element adds to the two sums of a reduction, float64, see update_math.h; 0.0 where there is no second.
    That of SQUARES_MAX is a maximum, of the type of `grad`.
    """
    y = 0.0
    if KIND == SQUARES_MAX:
        raw = grad.to(tl.float64)
        x, y = raw * raw, tl.abs(grad)
    elif KIND == TAU_SQUARES:
        clipped = scaled_grad(param, grad, s, COUPLED, True).to(tl.float64)
        x = clipped * clipped
    else:
        beta2, one_minus_beta2, inv_sqrt_w2, eps = s[3], s[4], s[6], s[7]
        before = s[12] == FORGET_BEFORE
        m = tl.where(before, 0.0, exp_avg)
        if READS_EXP_AVG_SQ:
            v = tl.where(before, 0.0, exp_avg_sq)
            g = seen_grad(param, grad, v, s, COUPLED, True)
        else:  # no rule brings spikes down
            g = scaled_grad(param, grad, s, COUPLED, True)
        if KIND == DOT:
            x = m.to(tl.float64) * g.to(tl.float64)
        elif KIND == AGREE:
            x = tl.where(same_sign(moved_momentum(m, g, s, True), g), 1.0, 0.0).to(tl.float64)
        else:
            root = square_root(beta2 * v + one_minus_beta2 * g * g)
            if KIND == FADAM_SQUARES:
                base = root + eps
                h, w = divide(g, base).to(tl.float64), divide(param, base).to(tl.float64)
                x, y = h * h, w * w
            else:
                size = root * inv_sqrt_w2
                if KIND == RMS:  # g^2 / max(size, eps)^2: eps^2 may be too small for float32
                    ratio = divide(g, tl.where(size > eps, size, eps)).to(tl.float64)
                    x = ratio * ratio
                else:
                    tl.static_assert(KIND == METRIC)
                    x = g.to(tl.float64) * g.to(tl.float64) / (size + eps).to(tl.float64)
    return x, y


# ---------------------------------------------------------------- where elements lie


@triton.jit
def tile_mask(first, stop, block, TILE: tl.constexpr, PADDED: tl.constexpr):
    """A tile's elements counted from `first`: consecutive, or, where PADDED, each block on PADDED lanes.

    int32 is enough within a tile, and half the registers. Returns also which lanes hold an element before `stop`.
    """
    lane = tl.arange(0, TILE)
    left = tl.minimum(stop - first, TILE).to(tl.int32)
    if PADDED:
        within = lane % PADDED
        lane = lane // PADDED * block.to(tl.int32) + within
        return lane, (within < block) & (lane < left)
    else:
        return lane, lane < left


@triton.jit
def strided_offset(index, record_ptr, dims, slot):
    """Offset in elements of row-major `index`: record_ptr -> ndim sizes, then ndim strides of every slot.

    dims = 0 stands for memory order: the index is the offset.
    """
    rest = index
    offset = index * 0
    for k in range(bound(dims)):
        d = dims - 1 - k
        size = tl.load(record_ptr + d)
        offset += rest % size * tl.load(record_ptr + dims * (1 + slot) + d)
        rest = rest // size
    return offset + rest  # beyond the last dimension nothing is left, except with dims = 0


@triton.jit
def slot_pointer(
    address,
    slot,
    first,  # int64: the tile's first element
    lane,  # int32: elements from there
    record_ptr,
    dims,
    S: tl.constexpr,
    STRIDED: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Pointers to a tile of a slot. VECTOR > 0: the caller has checked that runs of VECTOR elements are aligned."""
    base = address.to(tl.pointer_type(S))
    if STRIDED and not VECTOR:
        return base + strided_offset(first + lane.to(tl.int64), record_ptr, dims, slot)
    else:
        # One 64-bit sum a tile: the lanes' constants then fit into the instructions' own offsets.
        base += first
        if VECTOR:
            base = tl.multiple_of(base, VECTOR * (S.primitive_bitwidth // 8))
        return base + lane


@triton.jit
def load_tile(pointer, mask, T: tl.constexpr, VECTOR: tl.constexpr):
    if VECTOR:
        return load_as(tl.load(pointer), T)
    return load_as(tl.load(pointer, mask=mask, other=0.0), T)


@triton.jit
def store_tile(pointer, x, mask, S: tl.constexpr, VECTOR: tl.constexpr):
    if VECTOR:
        tl.store(pointer, store_as(x, S))
    else:
        tl.store(pointer, store_as(x, S), mask=mask)


@triton.jit
def record_of(fixed_ptr, row_ptr, MEMORY_ORDER: tl.constexpr, STRIDED: tl.constexpr):
    """The stride record of a row and its dimensions; dims = 0 where tensors are read in memory order."""
    dims = tl.full([], 0, tl.int64)
    at = dims
    if STRIDED:
        at = tl.load(row_ptr + STRIDED_AT)
        direct = at == 0
        if MEMORY_ORDER:
            direct = direct | (tl.load(row_ptr + FLAT) != 0)
        dims = tl.where(direct, 0, tl.load(fixed_ptr + at))
    return fixed_ptr + at + 1, dims


# ---------------------------------------------------------------- a gradient that samples make up: csrc/samples.h


@triton.jit
def normal_pair(seed, tensor, pair):
    """The standard normals of elements 2 pair and 2 pair + 1 of a tensor: Box-Muller on Philox4x32-10, in float64."""
    x, y, _, _ = tl.philox(
        seed, pair.to(tl.uint32), (pair >> 32).to(tl.uint32), tensor.to(tl.uint32), (tensor >> 32).to(tl.uint32)
    )
    size = tl.sqrt(-2.0 * tl.log((x.to(tl.float64) + 1.0) * ULP_32))
    # The angle is y 2^-32 turns: the nearest quarter turn is taken off exactly, so that two polynomials (fdlibm's) will
    # do. libdevice's sine and cosine keep a table on the stack, for angles that do not occur here.
    turned = y + 0x20000000
    t = ((turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float64) * ANGLE_32
    z = t * t
    p = z * 1.58969099521155010221e-10 + -2.50507602534068634195e-8
    p = p * z + 2.75573137070700676789e-6
    p = p * z + -1.98412698298579493134e-4
    p = p * z + 8.33333333332248946124e-3
    p = p * z + -1.66666666666666324348e-1
    q = z * -1.13596475577881948265e-11 + 2.08757232129817482790e-9
    q = q * z + -2.75573143513906633035e-7
    q = q * z + 2.48015872894767294178e-5
    q = q * z + -1.38888888888741095749e-3
    q = q * z + 4.16666666666666019037e-2
    sine, cosine = size * (t + t * z * p), size * (1.0 - (0.5 * z - z * z * q))
    quarter = turned >> 30
    swapped = (quarter & 1) != 0
    first, second = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    first = tl.where((quarter == 1) | (quarter == 2), -first, first)
    return first, tl.where(quarter >= 2, -second, second)


@triton.jit
def standard_normal(seed, tensor, first, lane, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Of elements `first` + `lane` of a tensor. VECTOR: these are TILE of them in a row, and `first` is even."""
    if VECTOR:
        even, odd = normal_pair(seed, tensor, first // 2 + tl.arange(0, TILE // 2))
        return tl.interleave(even, odd)
    else:
        index = first + lane
        even, odd = normal_pair(seed, tensor, index // 2)
        return tl.where(index % 2 == 0, even, odd)


@triton.jit
def source_of(fresh_ptr, row_ptr, row, weights_ptr, seed_ptr, noise, G_TYPE: tl.constexpr, SAMPLES: tl.constexpr):
    """Where a row's gradient lies, and what it is made of there; and a multiple of 16 if all of that is aligned."""
    address = tl.load(fresh_ptr + row)
    if SAMPLES:
        apart = tl.load(row_ptr + APART)
        seed = row
        if SAMPLES == NOISED:
            seed = tl.load(seed_ptr)
        source = (address, tl.load(row_ptr + COUNT), apart, weights_ptr, seed, noise, row)
        return source, address | apart * (G_TYPE.primitive_bitwidth // 8)
    else:
        return (address,), address


@triton.jit
def load_grad(
    pointer,  # to a tile of the gradient, or of the first sample
    mask,
    source,
    first,
    lane,
    T: tl.constexpr,
    SAMPLES: tl.constexpr,
    TILE: tl.constexpr,  # elements that lie in a row, all there where VECTOR; 0: `mask` tells
    VECTOR: tl.constexpr,
):
    """A tile of the raw gradient: sum_b w_b S_b in the order of the samples, and noise. One of weight 0 is not read."""
    WHOLE: tl.constexpr = VECTOR if TILE else 0
    if not SAMPLES:
        return load_tile(pointer, mask, T, WHOLE)
    else:
        _address, count, apart, weights_ptr, seed, noise, tensor = source
        if SAMPLES == NOISED:
            own = (noise * standard_normal(seed, tensor, first, lane, TILE, WHOLE)).to(T)
            if not WHOLE:
                own = tl.where(mask, own, 0.0)
        grad = tl.zeros(lane.shape, T)
        always = tl.full([], True, tl.int1)  # the interpreter takes a comparison for the type of what is compared
        for b in range(0, bound(count), AT_ONCE):
            weights, values = (), ()
            for k in tl.static_range(AT_ONCE):
                weight = tl.load(weights_ptr + b + k, mask=b + k < count, other=0.0)
                offset = (b + k) * apart
                there = always & (weight != 0.0)
                if VECTOR:
                    offset = tl.multiple_of(offset, VECTOR)
                if not WHOLE:
                    there = mask & there
                weights += (weight.to(T),)
                values += (tl.load(pointer + offset, mask=there, other=0.0),)
            for k in tl.static_range(AT_ONCE):
                grad += weights[k] * load_as(values[k], T)
        if SAMPLES == NOISED:
            grad += own
        return grad


# ---------------------------------------------------------------- one tile


@triton.jit
def sums_of_runs(x, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Where VECTOR, sums over each run of VECTOR elements, which one thread holds: fewer sums to keep."""
    if VECTOR:
        return tl.sum(tl.reshape(x, [TILE // VECTOR, VECTOR]), axis=1)
    else:
        return x


@triton.jit
def squares_of(grad, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """g^2 in float64, as `sums_of_runs`."""
    value = grad.to(tl.float64)
    return sums_of_runs(value * value, TILE, VECTOR)


@triton.jit
def scaled_units(
    grad,
    first,  # int64: the tile's first element
    lane,  # int32: elements from there, fewer than TILE where `mask` has them
    mask,
    factors_ptr,  # float64, one an output row of the tensor
    unit,  # int64: elements of an output row
    T: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The raw gradient times the factors of its output rows."""
    row = first // unit
    # As in tile_mask int32 is enough: of an output row longer than the tile only where it ends is of interest.
    left = tl.minimum((row + 1) * unit - first, TILE).to(tl.int32)
    width = tl.minimum(unit, TILE).to(tl.int32)
    return grad * load_tile(factors_ptr + row + (lane + (width - left)) // width, mask, T, VECTOR)


@triton.jit
def block_dot_tile(
    addresses,
    first,
    stop,
    record_ptr,
    dims,
    s,
    factors_ptr,
    unit,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    T: tl.constexpr,
    COUPLED: tl.constexpr,
    GUARDED: tl.constexpr,
    UNITS: tl.constexpr,
    SAMPLES: tl.constexpr,
    STRIDED: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """m g in float64, where products of float32 are exact, per element; 0 from `stop` on."""
    param_at, source, exp_avg_at, exp_avg_sq_at, _max_exp_avg_sq_at = addresses
    lane, mask = tile_mask(first, stop, first, TILE, 0)
    param, exp_avg_sq = 0.0, 0.0
    if COUPLED:
        pointer = slot_pointer(param_at, PARAM, first, lane, record_ptr, dims, P_TYPE, STRIDED, VECTOR)
        param = load_tile(pointer, mask, T, VECTOR)
    pointer = slot_pointer(source[0], GRAD, first, lane, record_ptr, dims, G_TYPE, STRIDED, VECTOR)
    grad = load_grad(pointer, mask, source, first, lane, T, SAMPLES, TILE, VECTOR)
    pointer = slot_pointer(exp_avg_at, EXP_AVG, first, lane, record_ptr, dims, S_TYPE, STRIDED, VECTOR)
    exp_avg = load_tile(pointer, mask, T, VECTOR)
    if GUARDED:  # a spike is one against v
        pointer = slot_pointer(exp_avg_sq_at, EXP_AVG_SQ, first, lane, record_ptr, dims, S_TYPE, STRIDED, VECTOR)
        exp_avg_sq = load_tile(pointer, mask, T, VECTOR)
    if UNITS:
        grad = scaled_units(grad, first, lane, mask, factors_ptr, unit, T, TILE, VECTOR)
    return exp_avg.to(tl.float64) * seen_grad(param, grad, exp_avg_sq, s, COUPLED, GUARDED).to(tl.float64)


@triton.jit
def block_dot(
    addresses,
    start,
    whole,
    stop,
    record_ptr,
    dims,
    s,
    factors_ptr,
    unit,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    T: tl.constexpr,
    COUPLED: tl.constexpr,
    GUARDED: tl.constexpr,
    UNITS: tl.constexpr,
    SAMPLES: tl.constexpr,
    STRIDED: tl.constexpr,
    TILE: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """sum m g over a block longer than a tile; all of it up to `whole` is aligned."""
    dot = tl.zeros([TILE], tl.float64)
    for first in range(bound(start), bound(whole), TILE):
        dot += block_dot_tile(
            addresses, first, whole, record_ptr, dims, s, factors_ptr, unit,
            P_TYPE, G_TYPE, S_TYPE, T, COUPLED, GUARDED, UNITS, SAMPLES, STRIDED, TILE, VECTOR,
        )  # fmt: skip
    total = tl.sum(dot)
    dot = tl.zeros([TAIL], tl.float64)
    for first in range(bound(whole), bound(stop), TAIL):
        dot += block_dot_tile(
            addresses, first, stop, record_ptr, dims, s, factors_ptr, unit,
            P_TYPE, G_TYPE, S_TYPE, T, COUPLED, GUARDED, UNITS, SAMPLES, STRIDED, TAIL, 0,
        )  # fmt: skip
    return total + tl.sum(dot)


@triton.jit
def update_tile(
    addresses,
    first,
    stop,
    block,
    record_ptr,
    dims,
    s,
    factors_ptr,
    unit,
    keep,
    sum_squares,
    sum_dots,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    T: tl.constexpr,
    RULE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    COUPLED: tl.constexpr,
    GUARDED: tl.constexpr,
    UNITS: tl.constexpr,
    DOTS: tl.constexpr,
    GATHER: tl.constexpr,
    SAMPLES: tl.constexpr,
    STRIDED: tl.constexpr,
    TILE: tl.constexpr,
    GATE: tl.constexpr,
    PADDED: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Updates a tile in place, up to `stop`; returns `sum_squares`, plus the squares of its raw gradients where GATHER,
    and `sum_dots`, plus m g before the update where DOTS.

    GATE > 0: every GATE lanes are one block of ALIGN_BLOCK, and `keep` is found here.
    """
    param_at, source, exp_avg_at, exp_avg_sq_at, max_exp_avg_sq_at = addresses
    lane, mask = tile_mask(first, stop, block, TILE, PADDED)
    param_ptr = slot_pointer(param_at, PARAM, first, lane, record_ptr, dims, P_TYPE, STRIDED, VECTOR)
    grad_ptr = slot_pointer(source[0], GRAD, first, lane, record_ptr, dims, G_TYPE, STRIDED, VECTOR)
    exp_avg_ptr = slot_pointer(exp_avg_at, EXP_AVG, first, lane, record_ptr, dims, S_TYPE, STRIDED, VECTOR)
    exp_avg_sq_ptr = slot_pointer(exp_avg_sq_at, EXP_AVG_SQ, first, lane, record_ptr, dims, S_TYPE, STRIDED, VECTOR)
    param = load_tile(param_ptr, mask, T, VECTOR)
    grad = load_grad(grad_ptr, mask, source, first, lane, T, SAMPLES, TILE, VECTOR)
    exp_avg = load_tile(exp_avg_ptr, mask, T, VECTOR)
    exp_avg_sq = load_tile(exp_avg_sq_ptr, mask, T, VECTOR)
    max_exp_avg_sq = exp_avg_sq
    if AMSGRAD:
        slot = MAX_EXP_AVG_SQ
        max_ptr = slot_pointer(max_exp_avg_sq_at, slot, first, lane, record_ptr, dims, S_TYPE, STRIDED, VECTOR)
        max_exp_avg_sq = load_tile(max_ptr, mask, T, VECTOR)

    raw = grad
    if UNITS:
        grad = scaled_units(grad, first, lane, mask, factors_ptr, unit, T, TILE, VECTOR)
    if DOTS:
        m = exp_avg
        v = exp_avg_sq
        if GUARDED:
            before = s[12] == FORGET_BEFORE
            m = tl.where(before, 0.0, m)
            v = tl.where(before, 0.0, v)
        product = momentum_dot(m, seen_grad(param, grad, v, s, COUPLED, GUARDED))
        if not VECTOR:
            product = tl.where(mask, product, 0.0)
        sum_dots += sums_of_runs(product, TILE, VECTOR)
    if GATE:
        product = exp_avg.to(tl.float64) * seen_grad(param, grad, exp_avg_sq, s, COUPLED, GUARDED).to(tl.float64)
        dot = tl.sum(tl.reshape(product, [TILE // GATE, GATE]), axis=1)
        keep = tl.reshape(tl.broadcast_to((dot > 0)[:, None], [TILE // GATE, GATE]), [TILE])
    param, exp_avg, exp_avg_sq, max_exp_avg_sq = update_element(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, s, keep, RULE, AMSGRAD, COUPLED, GUARDED
    )
    store_tile(param_ptr, param, mask, P_TYPE, VECTOR)
    store_tile(exp_avg_ptr, exp_avg, mask, S_TYPE, VECTOR)
    store_tile(exp_avg_sq_ptr, exp_avg_sq, mask, S_TYPE, VECTOR)
    if AMSGRAD:
        store_tile(max_ptr, max_exp_avg_sq, mask, S_TYPE, VECTOR)
    if GATHER:
        sum_squares += squares_of(raw, TILE, VECTOR)
    return sum_squares, sum_dots


# ---------------------------------------------------------------- phase 1: sums of squares


@triton.jit(
    do_not_specialize=[
        "fixed_ptr", "fresh_ptr", "weights_ptr", "partials_ptr", "chunks_at", "first_chunk", "chunks", "chunk_size"
    ]
)  # fmt: skip
def norm_kernel(
    fixed_ptr,  # int64: rows, records, chunks
    fresh_ptr,  # int64: addresses of gradients
    weights_ptr,  # float64, one a sample (SAMPLES)
    partials_ptr,  # float64, one a chunk: receives sum g^2 of raw gradients; or one a chunk and sample, of the samples
    chunks_at,  # where in fixed_ptr the chunks begin
    first_chunk,
    chunks,
    chunk_size,
    G_TYPE: tl.constexpr,
    T: tl.constexpr,
    SAMPLES: tl.constexpr,  # a program takes one sample of a chunk
    STRIDED: tl.constexpr,
    TILE: tl.constexpr,  # elements at a time where all is aligned
    TAIL: tl.constexpr,  # elements at a time elsewhere
    VECTOR: tl.constexpr,  # elements of an aligned access
):
    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    if SAMPLES:
        sample = tl.program_id(0).to(tl.int64) // chunks
        chunk -= sample * chunks
    row = tl.load(fixed_ptr + chunks_at + 2 * chunk)
    begin = tl.load(fixed_ptr + chunks_at + 2 * chunk + 1)
    row_ptr = fixed_ptr + row * ROW
    end = tl.minimum(begin + chunk_size, tl.load(row_ptr + NUMEL))
    grad_at = tl.load(fresh_ptr + row)
    partial_ptr = partials_ptr + chunk
    if SAMPLES:
        grad_at += sample * tl.load(row_ptr + APART) * (G_TYPE.primitive_bitwidth // 8)
        end = tl.where(tl.load(weights_ptr + sample) != 0.0, end, begin)  # of no weight: not read
        partial_ptr = partials_ptr + chunk * tl.load(row_ptr + COUNT) + sample
    record_ptr, dims = record_of(fixed_ptr, row_ptr, True, STRIDED)

    aligned = (grad_at % 16 == 0) & (begin % VECTOR == 0) & (dims == 0)
    whole = tl.where(aligned, begin + (end - begin) // TILE * TILE, begin)
    sum_squares = tl.zeros([TILE // VECTOR], tl.float64)
    for first in range(bound(begin), bound(whole), TILE):
        lane, mask = tile_mask(first, whole, first, TILE, 0)
        pointer = slot_pointer(grad_at, GRAD, first, lane, record_ptr, dims, G_TYPE, STRIDED, VECTOR)
        sum_squares += squares_of(load_tile(pointer, mask, T, VECTOR), TILE, VECTOR)
    total = tl.sum(sum_squares)
    sum_squares = tl.zeros([TAIL], tl.float64)
    for first in range(bound(whole), bound(end), TAIL):
        lane, mask = tile_mask(first, end, first, TAIL, 0)
        pointer = slot_pointer(grad_at, GRAD, first, lane, record_ptr, dims, G_TYPE, STRIDED, 0)
        sum_squares += squares_of(load_tile(pointer, mask, T, 0), TAIL, 0)
    tl.store(partial_ptr, total + tl.sum(sum_squares))


# ---------------------------------------------------------------- phase 2: every scalar of a step, float64


@triton.jit
def one_minus_power(beta, step):
    """1 - beta^step without the cancellation: -expm1(x), x = step log(beta), by its series near 0.

    Relative error below 1e-15; 1 - pow(beta, step) loses log2(1 / (1 - beta)) bits at small steps.
    """
    x = step * tl.log(beta)
    near = tl.where(x > -0.5, x, 0.0)
    series = 1.0 + near * 0.0
    for k in tl.static_range(17):  # |x|^18 / 19! < 2^-74
        series = 1.0 + series * near / (18 - k)
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))


@triton.jit
def clip_coefficient(norm, max_norm):
    coefficient = max_norm / (norm + 1e-6)
    return tl.where(coefficient > 1.0, 1.0, coefficient)  # a NaN norm stays NaN


@triton.jit(
    do_not_specialize=[
        "fixed_ptr",
        "fresh_ptr",
        "scalars_ptr",
        "rows",
        "square_sums_ptr",
        "sums",
        "grad_scale_ptr",
        "found_inf_ptr",
        "observed_ptr",
        "grad_square_sum_ptr",
        "steps_skipped_ptr",
        "group_signals_ptr",
    ]
)
def prologue_kernel(
    fixed_ptr,  # int64: rows first
    fresh_ptr,  # int64: addresses of gradients, then group_scalars as their bits
    scalars_ptr,  # float64 [rows, SCALARS]: receives the columns of scalars.py
    rows,
    square_sums_ptr,  # float64 [sums] or None
    sums,
    grad_scale_ptr,  # or None
    found_inf_ptr,  # or None
    observed_ptr,  # [2]: suppressed and total mass, or None
    grad_square_sum_ptr,  # float64: in, the previous step's; out, this step's, or 0 where the update gathers it
    steps_skipped_ptr,  # int64
    group_signals_ptr,  # float64 [groups, GROUP_SIGNALS] or None
    SKIP_NONFINITE: tl.constexpr,
    ROWS: tl.constexpr,  # rows at a time
    SUMS: tl.constexpr,  # partial sums at a time
):
    unscale = tl.full([], 1.0, tl.float64)
    if grad_scale_ptr is not None:
        unscale = 1.0 / tl.load(grad_scale_ptr).to(tl.float64)
    skip = tl.full([], 0.0, tl.float64) != 0.0
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0
    previous = tl.load(grad_square_sum_ptr)
    previous_norm = tl.sqrt(previous)
    norm = previous_norm
    if square_sums_ptr is not None:
        norm = tl.sqrt(sum_in_order(square_sums_ptr, sums, SUMS)) * tl.abs(unscale)
        tl.store(grad_square_sum_ptr, tl.where(skip, previous, norm * norm))
        if SKIP_NONFINITE:
            skip = skip | (norm - norm != 0.0)
    else:
        tl.store(grad_square_sum_ptr, tl.where(skip, previous, 0.0))
    tl.store(steps_skipped_ptr, tl.load(steps_skipped_ptr) + skip.to(tl.int64))

    # c = suppressed_mass / total_mass, in [0, 1]; 0 where nothing usable was observed.
    c = tl.full([], 0.0, tl.float64)
    if observed_ptr is not None:
        ratio = tl.load(observed_ptr).to(tl.float64) / tl.load(observed_ptr + 1).to(tl.float64)
        c = tl.where(ratio > 0.0, tl.where(ratio < 1.0, ratio, 1.0), 0.0)  # NaN (0/0) compares false

    for first in range(0, bound(rows), ROWS):
        row = first + tl.arange(0, ROWS)
        mask = row < rows
        row_ptr = fixed_ptr + row * ROW
        group = tl.load(row_ptr + GROUP, mask=mask, other=0)
        group_at = fresh_ptr + rows + group * GROUP_SCALARS
        group_ptr = group_at.to(tl.pointer_type(tl.float64))
        beta1 = tl.load(group_ptr, mask=mask, other=0.5)
        beta2 = tl.load(group_ptr + 1, mask=mask, other=0.5)
        max_norm = tl.load(group_ptr + 2, mask=mask, other=-1.0)
        lagged_norm = tl.load(group_ptr + 3, mask=mask, other=0.0)
        sign = tl.load(group_ptr + 4, mask=mask, other=1.0)
        brake_mode = tl.load(group_ptr + 5, mask=mask, other=0.0)
        strength = tl.load(group_ptr + 6, mask=mask, other=0.0)
        hold_v = tl.load(group_ptr + 7, mask=mask, other=0.0)
        lr = tl.load(group_ptr + 8, mask=mask, other=0.0)
        eps = tl.load(group_ptr + 9, mask=mask, other=0.0)
        weight_decay = tl.load(group_ptr + 10, mask=mask, other=0.0)
        coupled = tl.load(group_ptr + 11, mask=mask, other=0.0) != 0.0
        eps_early = tl.load(group_ptr + 12, mask=mask, other=0.0) != 0.0
        decay_after = tl.load(group_ptr + 13, mask=mask, other=0.0) != 0.0
        max_update = tl.load(group_ptr + 14, mask=mask, other=0.0)
        lr_address = tl.load(group_at + LR_ADDRESS, mask=mask, other=0)
        lr_is_f64 = tl.load(group_at + LR_IS_F64, mask=mask, other=0) != 0
        there = lr_address != 0
        lr_f32 = tl.load(lr_address.to(tl.pointer_type(tl.float32)), mask=there & ~lr_is_f64, other=0.0)
        lr_f64 = tl.load(lr_address.to(tl.pointer_type(tl.float64)), mask=there & lr_is_f64, other=0.0)
        lr = tl.where(there, tl.where(lr_is_f64, lr_f64, lr_f32.to(tl.float64)), lr)

        forget = tl.zeros([ROWS], tl.float64)
        restart = forget != 0.0
        if group_signals_ptr is not None:
            signals = group_signals_ptr + group * GROUP_SIGNALS
            forget = tl.load(signals, mask=mask, other=0.0)
            restart = tl.load(signals + 1, mask=mask, other=0.0) != 0.0
            beta1 = beta1 * tl.load(signals + 2, mask=mask, other=1.0)

        # make_control: no previous step, or one whose norm was not finite, says nothing about this one.
        known = previous_norm - previous_norm == 0.0
        lagged_clip = tl.where(known, clip_coefficient(previous_norm, max_norm), 1.0)
        clip = tl.where(lagged_norm != 0.0, lagged_clip, clip_coefficient(norm, max_norm))
        clip = tl.where(max_norm >= 0.0, clip, 1.0)
        grad_factor = sign * unscale * clip

        # MomentumBrake: a = beta1 (1 - strength c); b = 1 - a, or 1 - beta1 with W1 as plain Adam keeps it.
        brake = brake_mode != 0.0
        damp = brake_mode == DAMP
        a = tl.where(brake, beta1 * (1.0 - strength * c), beta1)
        b = tl.where(damp, 1.0 - beta1, 1.0 - a)
        w1_a = tl.where(damp, beta1, a)
        w1_b = 1.0 - w1_a
        one_minus_beta2 = (1.0 - beta2) * tl.where(brake, 1.0 - hold_v * c, 1.0)
        beta2_used = tl.where(brake, 1.0 - one_minus_beta2, beta2)

        # advance: the step and the bias weights, in place, from 0 where counters restart
        advancing = mask & (skip == 0)
        step_is_f64 = tl.load(row_ptr + STEP_IS_F64, mask=mask, other=0) != 0
        step_at = tl.load(row_ptr + STEP, mask=mask, other=0)
        step_f32_ptr = step_at.to(tl.pointer_type(tl.float32))
        step_f64_ptr = step_at.to(tl.pointer_type(tl.float64))
        step_f32 = tl.load(step_f32_ptr, mask=advancing & ~step_is_f64, other=0.0)
        step_f64 = tl.load(step_f64_ptr, mask=advancing & step_is_f64, other=0.0)
        step_f32 = tl.where(restart, 0.0, step_f32) + 1.0
        step_f64 = tl.where(restart, 0.0, step_f64) + 1.0
        tl.store(step_f32_ptr, step_f32, mask=advancing & ~step_is_f64)
        tl.store(step_f64_ptr, step_f64, mask=advancing & step_is_f64)
        step = tl.where(step_is_f64, step_f64, step_f32.to(tl.float64))
        weights_at = tl.load(row_ptr + BIAS_WEIGHTS, mask=mask, other=0)
        weighed = advancing & (weights_at != 0)
        w = weights_at.to(tl.pointer_type(tl.float64))
        w1 = w1_a * tl.where(restart, 0.0, tl.load(w, mask=weighed, other=0.0)) + w1_b
        w2 = beta2_used * tl.where(restart, 0.0, tl.load(w + 1, mask=weighed, other=0.0)) + one_minus_beta2
        tl.store(w, w1, mask=weighed)
        tl.store(w + 1, w2, mask=weighed)
        w1 = tl.where(weighed, w1, one_minus_power(w1_a, step))
        w2 = tl.where(weighed, w2, one_minus_power(beta2, step))

        inv_sqrt_w2 = 1.0 / tl.sqrt(w2)
        decay = tl.where(coupled, 1.0, 1.0 - lr * weight_decay)
        zero = tl.zeros([ROWS], tl.float64)

        out = scalars_ptr + row * SCALARS
        tl.store(out, zero + skip.to(tl.float64), mask=mask)
        tl.store(out + 1, zero + unscale, mask=mask)
        tl.store(out + 2, grad_factor, mask=mask)
        tl.store(out + 3, a, mask=mask)
        tl.store(out + 4, b, mask=mask)
        tl.store(out + 5, beta2_used, mask=mask)
        tl.store(out + 6, one_minus_beta2, mask=mask)
        tl.store(out + 7, 1.0 / w1, mask=mask)
        tl.store(out + 8, inv_sqrt_w2, mask=mask)
        tl.store(out + 9, tl.where(eps_early, eps * inv_sqrt_w2, eps), mask=mask)
        tl.store(out + 10, tl.where(decay_after, lr * decay, lr), mask=mask)
        tl.store(out + 11, decay, mask=mask)
        tl.store(out + 12, tl.where(coupled, weight_decay, 0.0), mask=mask)
        tl.store(out + 13, max_update, mask=mask)
        # The guards as they change nothing: rules write over them.
        tl.store(out + 14, forget, mask=mask)
        tl.store(out + 15, zero + 1.0, mask=mask)  # keep
        tl.store(out + 16, zero + float("inf"), mask=mask)  # theta
        tl.store(out + 17, zero, mask=mask)  # spike_floor
        tl.store(out + 18, zero + float("inf"), mask=mask)  # tau
        tl.store(out + 19, zero + 1.0, mask=mask)  # tau_factor
        tl.store(out + 20, zero, mask=mask)  # prox


# ---------------------------------------------------------------- between prologue and update: sums for rules


@triton.jit
def reduce_tile(
    addresses,
    first,
    stop,
    record_ptr,
    dims,
    s,
    factors_ptr,
    unit,
    x,
    y,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    T: tl.constexpr,
    KIND: tl.constexpr,
    COUPLED: tl.constexpr,
    UNITS: tl.constexpr,
    READS_PARAM: tl.constexpr,
    READS_EXP_AVG: tl.constexpr,
    READS_EXP_AVG_SQ: tl.constexpr,
    SAMPLES: tl.constexpr,
    STRIDED: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """`x` and `y` with what the elements of a tile, up to `stop`, add to them."""
    param_at, source, exp_avg_at, exp_avg_sq_at = addresses
    lane, mask = tile_mask(first, stop, first, TILE, 0)
    pointer = slot_pointer(source[0], GRAD, first, lane, record_ptr, dims, G_TYPE, STRIDED, VECTOR)
    grad = load_grad(pointer, mask, source, first, lane, T, SAMPLES, TILE, VECTOR)
    param, exp_avg, exp_avg_sq = 0.0, 0.0, 0.0
    if READS_PARAM:
        pointer = slot_pointer(param_at, PARAM, first, lane, record_ptr, dims, P_TYPE, STRIDED, VECTOR)
        param = load_tile(pointer, mask, T, VECTOR)
    if READS_EXP_AVG:
        pointer = slot_pointer(exp_avg_at, EXP_AVG, first, lane, record_ptr, dims, S_TYPE, STRIDED, VECTOR)
        exp_avg = load_tile(pointer, mask, T, VECTOR)
    if READS_EXP_AVG_SQ:
        pointer = slot_pointer(exp_avg_sq_at, EXP_AVG_SQ, first, lane, record_ptr, dims, S_TYPE, STRIDED, VECTOR)
        exp_avg_sq = load_tile(pointer, mask, T, VECTOR)
    if UNITS:
        grad = scaled_units(grad, first, lane, mask, factors_ptr, unit, T, TILE, VECTOR)
    own_x, own_y = summand(param, grad, exp_avg, exp_avg_sq, s, KIND, COUPLED, READS_EXP_AVG_SQ)
    if not VECTOR:  # past the end 0 / eps may be 0 / 0
        own_x = tl.where(mask, own_x, 0.0)
    x += sums_of_runs(own_x, TILE, VECTOR)
    if KIND == SQUARES_MAX:
        own_y = tl.where(own_y > 0.0, own_y, 0.0)  # a NaN is no maximum; the sum of squares tells
        if VECTOR:
            own_y = tl.max(tl.reshape(own_y, [TILE // VECTOR, VECTOR]), axis=1)
        y = tl.where(own_y > y, own_y, y)
    if KIND == FADAM_SQUARES:
        if not VECTOR:
            own_y = tl.where(mask, own_y, 0.0)
        y += sums_of_runs(own_y, TILE, VECTOR)
    return x, y


@triton.jit(
    do_not_specialize=[
        "fixed_ptr",
        "fresh_ptr",
        "scalars_ptr",
        "unit_factors_ptr",
        "unit_starts_ptr",
        "weights_ptr",
        "seed_ptr",
        "noise",
        "pairs_ptr",
        "chunks_at",
        "first_chunk",
        "chunk_size",
    ]
)
def reduce_kernel(
    fixed_ptr,  # int64: rows, records, chunks
    fresh_ptr,  # int64: addresses of gradients
    scalars_ptr,  # float64 [rows, SCALARS]; SQUARES_MAX makes nothing of them
    unit_factors_ptr,  # of update_kernel (UNITS)
    unit_starts_ptr,
    weights_ptr,  # of update_kernel (SAMPLES)
    seed_ptr,
    noise: tl.float64,
    pairs_ptr,  # float64, two a chunk: receives the two sums
    chunks_at,  # where in fixed_ptr the chunks begin
    first_chunk,
    chunk_size,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    T: tl.constexpr,  # of the arithmetic
    KIND: tl.constexpr,
    COUPLED: tl.constexpr,
    UNITS: tl.constexpr,
    READS_PARAM: tl.constexpr,
    READS_EXP_AVG: tl.constexpr,
    READS_EXP_AVG_SQ: tl.constexpr,
    SAMPLES: tl.constexpr,
    STRIDED: tl.constexpr,
    TILE: tl.constexpr,  # elements at a time where all is aligned
    TAIL: tl.constexpr,  # elements at a time elsewhere
    VECTOR: tl.constexpr,  # elements of an aligned access
):
    Y_TYPE: tl.constexpr = T if KIND == SQUARES_MAX else tl.float64

    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    row = tl.load(fixed_ptr + chunks_at + 2 * chunk)
    begin = tl.load(fixed_ptr + chunks_at + 2 * chunk + 1)
    row_ptr = fixed_ptr + row * ROW
    end = tl.minimum(begin + chunk_size, tl.load(row_ptr + NUMEL))
    source, read = source_of(fresh_ptr, row_ptr, row, weights_ptr, seed_ptr, noise, G_TYPE, SAMPLES)
    param_at = tl.load(row_ptr + PARAM)
    exp_avg_at = tl.load(row_ptr + EXP_AVG)
    exp_avg_sq_at = tl.load(row_ptr + EXP_AVG_SQ)
    addresses = (param_at, source, exp_avg_at, exp_avg_sq_at)
    record_ptr, dims = record_of(fixed_ptr, row_ptr, not UNITS and SAMPLES != NOISED, STRIDED)
    s = load_scalars(scalars_ptr + row * SCALARS, T, True)
    factors_ptr = unit_factors_ptr
    unit = begin
    if UNITS:
        factors_ptr += tl.load(unit_starts_ptr + row)
        unit = tl.load(row_ptr + UNIT)

    if READS_PARAM:
        read = read | param_at
    if READS_EXP_AVG:
        read = read | exp_avg_at
    if READS_EXP_AVG_SQ:
        read = read | exp_avg_sq_at
    aligned = (read % 16 == 0) & (begin % VECTOR == 0) & (dims == 0)
    whole = tl.where(aligned, begin + (end - begin) // TILE * TILE, begin)
    x = tl.zeros([TILE // VECTOR], tl.float64)
    y = tl.zeros([TILE // VECTOR], Y_TYPE)
    for first in range(bound(begin), bound(whole), TILE):
        x, y = reduce_tile(
            addresses, first, whole, record_ptr, dims, s, factors_ptr, unit, x, y,
            P_TYPE, G_TYPE, S_TYPE, T, KIND, COUPLED, UNITS, READS_PARAM, READS_EXP_AVG, READS_EXP_AVG_SQ,
            SAMPLES, STRIDED, TILE, VECTOR,
        )  # fmt: skip
    tail_x = tl.zeros([TAIL], tl.float64)
    tail_y = tl.zeros([TAIL], Y_TYPE)
    for first in range(bound(whole), bound(end), TAIL):
        tail_x, tail_y = reduce_tile(
            addresses, first, end, record_ptr, dims, s, factors_ptr, unit, tail_x, tail_y,
            P_TYPE, G_TYPE, S_TYPE, T, KIND, COUPLED, UNITS, READS_PARAM, READS_EXP_AVG, READS_EXP_AVG_SQ,
            SAMPLES, STRIDED, TAIL, 0,
        )  # fmt: skip
    tl.store(pairs_ptr + 2 * chunk, tl.sum(x) + tl.sum(tail_x))
    if KIND == SQUARES_MAX:
        tl.store(pairs_ptr + 2 * chunk + 1, tl.maximum(tl.max(y), tl.max(tail_y)).to(tl.float64))
    else:
        tl.store(pairs_ptr + 2 * chunk + 1, tl.sum(y) + tl.sum(tail_y))


@triton.jit
def unit_squares(
    source,  # of source_of, or an address alone
    slot,
    first,  # int64: the first output row
    rows,  # int64: how many there are from there
    unit,  # int64: elements of each; not past int32 where ROWS > 1
    record_ptr,
    dims,
    S: tl.constexpr,
    T: tl.constexpr,
    SAMPLES: tl.constexpr,
    STRIDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    VECTOR: tl.constexpr,  # > 0: the caller has checked that output rows begin and end at aligned runs of so many
):
    """Sums of squares of up to ROWS output rows of a slot: float64 [ROWS]."""
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    there = row < tl.minimum(rows, ROWS).to(tl.int32)
    width = unit.to(tl.int32)  # of no use with one row
    if VECTOR:
        width = tl.multiple_of(width, VECTOR)
    lane = col[None, :] + (row * width if ROWS > 1 else row)[:, None]
    sums = tl.zeros([ROWS, COLS], tl.float64)
    for begin in range(0, bound(unit), COLS):
        left = tl.minimum(unit - begin, COLS).to(tl.int32)
        if VECTOR:
            left = tl.multiple_of(left, VECTOR)
        mask = there[:, None] & (col < left)[None, :]
        pointer = slot_pointer(source[0], slot, first * unit + begin, lane, record_ptr, dims, S, STRIDED, VECTOR)
        value = load_grad(pointer, mask, source, first * unit + begin, lane, T, SAMPLES, 0, VECTOR).to(tl.float64)
        sums += value * value
    return tl.sum(sums, axis=1)


@triton.jit
def store_unit_squares(
    out_ptr,  # float64: two numbers an output row; receives one of them
    source,
    read,  # a multiple of 16 if all that lies there is aligned
    slot,
    first,
    rows,
    unit,
    record_ptr,
    dims,
    S: tl.constexpr,
    T: tl.constexpr,
    SAMPLES: tl.constexpr,
    STRIDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    VECTOR: tl.constexpr = 128 // S.primitive_bitwidth
    if (read % 16 == 0) & (unit % VECTOR == 0) & (dims == 0):
        sums = unit_squares(
            source, slot, first, rows, unit, record_ptr, dims, S, T, SAMPLES, STRIDED, ROWS, COLS, VECTOR
        )
    else:
        sums = unit_squares(source, slot, first, rows, unit, record_ptr, dims, S, T, SAMPLES, STRIDED, ROWS, COLS, 0)
    row = tl.arange(0, ROWS)
    tl.store(out_ptr + 2 * row, sums, mask=row < rows)


@triton.jit(
    do_not_specialize=[
        "fixed_ptr", "fresh_ptr", "starts_ptr", "chunks_ptr", "weights_ptr", "seed_ptr", "noise", "out_ptr",
        "first_chunk",
    ]
)  # fmt: skip
def unit_kernel(
    fixed_ptr,  # int64: rows, records
    fresh_ptr,  # int64: addresses of gradients
    starts_ptr,  # int64 [rows]: a tensor's first output row among those of its batch
    chunks_ptr,  # int64, two a chunk: row, its first output row
    weights_ptr,  # of update_kernel (SAMPLES)
    seed_ptr,
    noise: tl.float64,
    out_ptr,  # float64, two an output row: receives sums of squares of raw gradients and of parameters
    first_chunk,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    T: tl.constexpr,
    SAMPLES: tl.constexpr,
    STRIDED: tl.constexpr,
    ROWS: tl.constexpr,  # output rows at a time, where a chunk has several
    COLS: tl.constexpr,  # elements of each at a time
):
    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    row = tl.load(chunks_ptr + 2 * chunk)
    begin = tl.load(chunks_ptr + 2 * chunk + 1)
    row_ptr = fixed_ptr + row * ROW
    unit = tl.load(row_ptr + UNIT)
    rows = tl.load(row_ptr + NUMEL) // unit
    param_at = tl.load(row_ptr + PARAM)
    source, read = source_of(fresh_ptr, row_ptr, row, weights_ptr, seed_ptr, noise, G_TYPE, SAMPLES)
    record_ptr, dims = record_of(fixed_ptr, row_ptr, False, STRIDED)
    out_ptr += 2 * tl.load(starts_ptr + row)
    if unit > UNIT_SPAN:
        store_unit_squares(
            out_ptr + 2 * begin, source, read, GRAD, begin, rows - begin, unit, record_ptr, dims,
            G_TYPE, T, SAMPLES, STRIDED, 1, ROWS * COLS,
        )  # fmt: skip
        store_unit_squares(
            out_ptr + 2 * begin + 1, (param_at,), param_at, PARAM, begin, rows - begin, unit, record_ptr, dims,
            P_TYPE, T, PLAIN, STRIDED, 1, ROWS * COLS,
        )  # fmt: skip
    else:
        at_once = tl.minimum(tl.maximum(UNIT_SPAN // unit, FEWEST_UNITS), MOST_UNITS)  # as device_table.units_at_once
        end = tl.minimum(begin + at_once, rows)
        for first in range(bound(begin), bound(end), ROWS):
            store_unit_squares(
                out_ptr + 2 * first, source, read, GRAD, first, end - first, unit, record_ptr, dims,
                G_TYPE, T, SAMPLES, STRIDED, ROWS, COLS,
            )  # fmt: skip
            store_unit_squares(
                out_ptr + 2 * first + 1, (param_at,), param_at, PARAM, first, end - first, unit, record_ptr, dims,
                P_TYPE, T, PLAIN, STRIDED, ROWS, COLS,
            )  # fmt: skip


# ---------------------------------------------------------------- phase 3: one pass over memory


@triton.jit(
    do_not_specialize=[
        "fixed_ptr",
        "fresh_ptr",
        "scalars_ptr",
        "partials_ptr",
        "finished_ptr",
        "grad_square_sum_ptr",
        "unit_factors_ptr",
        "unit_starts_ptr",
        "weights_ptr",
        "seed_ptr",
        "noise",
        "dots_ptr",
        "chunks_at",
        "first_chunk",
        "chunks",
        "chunk_size",
        "block",
    ]
)
def update_kernel(
    fixed_ptr,  # int64: rows, records, chunks
    fresh_ptr,  # int64: addresses of gradients
    scalars_ptr,  # float64 [rows, SCALARS], of prologue_kernel, as rules have changed it
    partials_ptr,  # float64, one a chunk: scratch of GATHER
    finished_ptr,  # int32, 0 between launches: programs that have written their partial sum
    grad_square_sum_ptr,  # float64: receives the sum of squares of unscaled gradients (GATHER)
    unit_factors_ptr,  # float64, one an output row of the batch: a factor of its gradient (UNITS)
    unit_starts_ptr,  # int64 [rows]: a tensor's first output row there (UNITS)
    weights_ptr,  # float64, one a sample (SAMPLES)
    seed_ptr,  # int64, of the noise (SAMPLES == NOISED)
    noise: tl.float64,  # its standard deviation
    dots_ptr,  # float64, one a chunk: receives sum m g before the update (DOTS)
    chunks_at,  # where in fixed_ptr the chunks begin
    first_chunk,
    chunks,
    chunk_size,
    block,  # elements that share a gate (ALIGN_BLOCK)
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    T: tl.constexpr,  # of the arithmetic
    RULE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    COUPLED: tl.constexpr,
    GUARDED: tl.constexpr,  # scalars from `forget` on are looked at
    UNITS: tl.constexpr,
    DOTS: tl.constexpr,
    GATHER: tl.constexpr,
    SAMPLES: tl.constexpr,
    STRIDED: tl.constexpr,
    TILE: tl.constexpr,  # elements at a time where all is aligned
    TAIL: tl.constexpr,  # elements at a time elsewhere
    GATE: tl.constexpr,  # lanes of a block, if an aligned tile holds whole blocks; 0: no blocks, or longer ones
    PADDED: tl.constexpr,  # GATE where that is more than the block's elements, else 0
    VECTOR: tl.constexpr,  # elements of an aligned access
):
    BLOCKWISE: tl.constexpr = RULE == ALIGN_BLOCK and (GATE == 0 or GATE > TAIL)
    TAIL_GATE: tl.constexpr = 0 if BLOCKWISE else GATE

    # Backwards: the norm pass has just left the end of the gradients in the L2 cache.
    chunk = first_chunk + (chunks - 1 - tl.program_id(0)).to(tl.int64)
    row = tl.load(fixed_ptr + chunks_at + 2 * chunk)
    begin = tl.load(fixed_ptr + chunks_at + 2 * chunk + 1)
    row_ptr = fixed_ptr + row * ROW
    scalars = scalars_ptr + row * SCALARS
    if tl.load(scalars) != 0.0:  # one decision for the whole step: no program waits for another
        return
    end = tl.minimum(begin + chunk_size, tl.load(row_ptr + NUMEL))
    param_at = tl.load(row_ptr + PARAM)
    source, read = source_of(fresh_ptr, row_ptr, row, weights_ptr, seed_ptr, noise, G_TYPE, SAMPLES)
    exp_avg_at = tl.load(row_ptr + EXP_AVG)
    exp_avg_sq_at = tl.load(row_ptr + EXP_AVG_SQ)
    max_exp_avg_sq_at = tl.load(row_ptr + MAX_EXP_AVG_SQ)
    addresses = (param_at, source, exp_avg_at, exp_avg_sq_at, max_exp_avg_sq_at)
    # Blocks, output rows and noise follow the logical order: memory order will do only where the two agree.
    record_ptr, dims = record_of(fixed_ptr, row_ptr, RULE != ALIGN_BLOCK and not UNITS and SAMPLES != NOISED, STRIDED)
    s = load_scalars(scalars, T, GUARDED)
    factors_ptr = unit_factors_ptr
    unit = begin
    if UNITS:
        factors_ptr += tl.load(unit_starts_ptr + row)
        unit = tl.load(row_ptr + UNIT)
    aligned = (param_at | read | exp_avg_at | exp_avg_sq_at | max_exp_avg_sq_at) % 16 == 0
    aligned = aligned & (dims == 0)
    # Aligned tiles first; then what is left, in units of a block where one tile cannot hold it, else in one go.
    whole = begin
    if not PADDED and (GATE or not BLOCKWISE):
        whole = tl.where(aligned & (begin % VECTOR == 0), begin + (end - begin) // TILE * TILE, begin)
    squares = tl.zeros([TILE // VECTOR], tl.float64)
    dots = tl.zeros([TILE // VECTOR], tl.float64)
    for first in range(bound(begin), bound(whole), TILE):
        squares, dots = update_tile(
            addresses, first, whole, block, record_ptr, dims, s, factors_ptr, unit, True, squares, dots,
            P_TYPE, G_TYPE, S_TYPE, T, RULE, AMSGRAD, COUPLED, GUARDED, UNITS, DOTS, GATHER,
            SAMPLES, STRIDED, TILE, GATE, 0, VECTOR,
        )  # fmt: skip
    sum_squares = tl.sum(squares)
    sum_dots = tl.sum(dots)
    span = chunk_size
    stride = TAIL
    if BLOCKWISE:
        span = block
    if PADDED:
        stride = TAIL // PADDED * block
    for start in range(bound(whole), bound(end), bound(span)):
        stop = tl.minimum(start + span, end)
        whole = start
        keep = True
        if BLOCKWISE:
            if not GATE:
                whole = tl.where(aligned & (start % VECTOR == 0), start + (stop - start) // TILE * TILE, start)
            dot = block_dot(
                addresses, start, whole, stop, record_ptr, dims, s, factors_ptr, unit,
                P_TYPE, G_TYPE, S_TYPE, T, COUPLED, GUARDED, UNITS, SAMPLES, STRIDED, TILE, TAIL, VECTOR,
            )  # fmt: skip
            keep = dot > 0  # all-zero momentum: nothing to drop, either answer gives d = b g
            tl.debug_barrier()  # every thread has read the old momentum before one of them writes it
            if not GATE:
                squares = tl.zeros([TILE // VECTOR], tl.float64)
                dots = tl.zeros([TILE // VECTOR], tl.float64)
                for first in range(bound(start), bound(whole), TILE):
                    squares, dots = update_tile(
                        addresses, first, whole, block, record_ptr, dims, s, factors_ptr, unit, keep, squares, dots,
                        P_TYPE, G_TYPE, S_TYPE, T, RULE, AMSGRAD, COUPLED, GUARDED, UNITS, DOTS, GATHER,
                        SAMPLES, STRIDED, TILE, 0, 0, VECTOR,
                    )  # fmt: skip
                sum_squares += tl.sum(squares)
                sum_dots += tl.sum(dots)
        tail_squares = tl.zeros([TAIL], tl.float64)
        tail_dots = tl.zeros([TAIL], tl.float64)
        for first in range(bound(whole), bound(stop), bound(stride)):
            tail_squares, tail_dots = update_tile(
                addresses, first, stop, block, record_ptr, dims, s, factors_ptr, unit, keep, tail_squares, tail_dots,
                P_TYPE, G_TYPE, S_TYPE, T, RULE, AMSGRAD, COUPLED, GUARDED, UNITS, DOTS, GATHER,
                SAMPLES, STRIDED, TAIL, TAIL_GATE, PADDED, 0,
            )  # fmt: skip
        sum_squares += tl.sum(tail_squares)
        sum_dots += tl.sum(tail_dots)

    if DOTS:
        tl.store(dots_ptr + chunk, sum_dots)
    if GATHER:
        tl.store(partials_ptr + chunk, sum_squares)
        tl.debug_barrier()
        # acq_rel: the last program to arrive sees every partial sum, and adds them in their order.
        if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == chunks - 1:
            total = sum_in_order(partials_ptr + first_chunk, chunks, 1024)
            unscale = tl.load(scalars + 1)
            tl.store(grad_square_sum_ptr, tl.load(grad_square_sum_ptr) + total * unscale * unscale)
            tl.store(finished_ptr, 0)


# ---------------------------------------------------------------- launches

_WARPS = 4
_THREADS = _WARPS * (64 if torch.version.hip else 32)
_UPDATE_ACCESSES = {8: 1, 4: 2, 2: 1}
"""16-byte accesses of a thread to each stream in an aligned tile, by the bytes of the widest storage type: four streams
in flight, and few enough registers for 16 warps a multiprocessor (tests/registers_triton.json)."""
_NORM_ACCESSES = 4
"""The same of the norm, which has one stream."""
_REDUCE_ACCESSES = 2
"""The same of a reduction that has two or three, or several samples at a time."""
_TAIL = 2 * _THREADS
"""Elements of a tile outside the aligned path, two a thread: unaligned accesses take one element each. Blocks longer
than a tile, or than this one where they are not a power of two, read m and g twice, the second time from a cache."""
_UNIT_ROWS, _UNIT_ELEMENTS = 8, 8
"""Output rows of a tile of unit_kernel, of which every chunk of short ones has that many, and elements a thread."""
_MOST_REGISTERS = {8: 255, 4: 128, 2: 128}
"""Of the update on NVIDIA, by the same: 16 warps a multiprocessor, 8 of float64. Left alone, ptxas spills some bytes to
reach 64. AMD has no such option."""
_MOST_CROWDED = (168, 255, 255)
"""The same where the update sums m g or has both output rows and blocks, where it makes noise, where it sums up samples
for blocks longer than a tile; where two or three of these come together: at fewer some of those spill. 12 and 8 warps a
multiprocessor. The first also of a reduction of samples, which spills some bytes if left alone."""
_PROLOGUE_ROWS, _PROLOGUE_SUMS, _PROLOGUE_WARPS = 256, 2048, 8
"""One program does it all: a row a thread, and enough partial sums at a time that 1e9 elements take 30 reads."""


def _update_shape(
    dtypes: tuple[int, int, int], overshoot: int, block: int, units: bool, dots: bool, samples: int
) -> dict[str, int]:
    """The constants of update_kernel that follow from sizes."""
    widest = max(BYTES[code] for code in dtypes)
    tile, gate = _THREADS * _UPDATE_ACCESSES[widest] * (16 // widest), 0
    power = 1 << (block - 1).bit_length()
    if overshoot == _ALIGN_BLOCK and block <= (tile if power == block else _TAIL):
        gate = power
    padded = gate if gate != block else 0
    shape = {"TILE": tile, "TAIL": _TAIL, "GATE": gate, "PADDED": padded, "VECTOR": 16 // widest, "num_warps": _WARPS}
    if torch.version.hip:
        return shape
    align = overshoot == _ALIGN_BLOCK
    crowded = (dots or (units and align)) + (samples == 2) + (samples > 0 and align and not gate)
    return {**shape, "maxnreg": max(_MOST_REGISTERS[widest], (0, *_MOST_CROWDED)[crowded])}


def _norm(placed: DeviceTables, launch: Launch, partials: Tensor, samples: Any = None) -> None:
    """`samples`: PlacedSamples where the sums are of single samples."""
    grad = launch.dtypes[1]
    launch_kernel(
        norm_kernel,
        launch.chunks * (1 if samples is None else samples.count),
        placed.device,
        placed.fixed,
        placed.fresh,
        partials if samples is None else samples.weights,
        partials,
        placed.chunks_at,
        launch.first_chunk,
        launch.chunks,
        launch.chunk_size,
        G_TYPE=TYPES[grad],
        T=TYPES[0 if grad == 0 else 1],
        SAMPLES=samples is not None,
        STRIDED=launch.strided,
        TILE=_THREADS * _NORM_ACCESSES * (16 // BYTES[grad]),
        TAIL=_TAIL,
        VECTOR=16 // BYTES[grad],
        num_warps=_WARPS,
        # Squares of float32 are exact in float64, so that a fused multiply-add changes no bit and halves the work.
        enable_fp_fusion=grad != 0,
    )


def grad_square_sums(placed: DeviceTables) -> Tensor:
    """Phase 1, see reference_step.py: float64 [chunks]. Reads each gradient once."""
    for launch in placed.launches:
        _norm(placed, launch, placed.partials)
    return placed.partials


def sample_square_sums(placed: DeviceTables) -> Tensor:
    """See reference_step.py. Reads each score once."""
    own = placed.samples
    sums = torch.empty(placed.partials.numel(), own.count, dtype=torch.float64, device=placed.device)
    for launch in placed.launches if own.count else ():
        _norm(placed, launch, sums, own)
    return sums.sum(0)


def _samples_of(placed: DeviceTables) -> tuple[tuple, int]:
    """Arguments (weights, seed, noise) of the kernels that read gradients, and their SAMPLES."""
    own = placed.samples
    if own is None:
        return (placed.partials, placed.fixed, 0.0), 0
    noised = own.seed is not None
    return (own.weights, own.seed if noised else placed.fixed, own.noise), 1 + noised


def prologue(
    placed: DeviceTables,
    group_signals: Tensor | None,
    square_sums: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    observed: Tensor | None,
    grad_square_sum: Tensor,
    steps_skipped: Tensor,
    skip_nonfinite: bool,
) -> Tensor:
    """Phase 2, see reference_step.py. Steps and bias weights advance here."""
    launch_kernel(
        prologue_kernel,
        1,
        placed.device,
        placed.fixed,
        placed.fresh,
        placed.scalars,
        placed.rows,
        square_sums,
        0 if square_sums is None else square_sums.numel(),
        grad_scale,
        found_inf,
        observed,
        grad_square_sum,
        steps_skipped,
        group_signals,
        SKIP_NONFINITE=skip_nonfinite,
        ROWS=_PROLOGUE_ROWS,
        SUMS=_PROLOGUE_SUMS,
        num_warps=_PROLOGUE_WARPS,
        enable_fp_fusion=False,
    )
    return placed.scalars


def _streams(kind: int, coupled: bool, spiked: bool) -> dict[str, bool]:
    """What a reduction reads beside the gradient."""
    of_momentum = kind in (columns.DOT, columns.AGREE)
    return {
        "READS_PARAM": coupled or kind == columns.FADAM_SQUARES,
        "READS_EXP_AVG": of_momentum,
        # A spike is one against v.
        "READS_EXP_AVG_SQ": kind in (columns.RMS, columns.METRIC, columns.FADAM_SQUARES) or (spiked and of_momentum),
    }


def reduce(
    placed: DeviceTables,
    values: Tensor | None,
    batch: int,
    first: int,
    kind: int,
    coupled: bool,
    spiked: bool,
    unit_factors: Tensor | None,
) -> Tensor:
    """See reference_step.py. 4 B per float32 element (g), and 4 more for each other tensor that `summand` reads."""
    streams = _streams(kind, coupled, spiked)
    samples, stacked = _samples_of(placed)
    for launch in placed.launches:
        if launch.batch != batch:
            continue
        param, grad, state = launch.dtypes
        arithmetic = grad if kind == columns.SQUARES_MAX and placed.samples is None else param
        read = [code for code, name in zip((param, state, state), streams) if streams[name]]
        widest = max(BYTES[code] for code in (grad, *read))
        accesses = _NORM_ACCESSES if not read and placed.samples is None else _REDUCE_ACCESSES
        launch_kernel(
            reduce_kernel,
            launch.chunks,
            placed.device,
            placed.fixed,
            placed.fresh,
            placed.scalars if values is None else values,
            placed.partials if unit_factors is None else unit_factors,
            placed.fixed if unit_factors is None else placed.units().starts,
            *samples,
            placed.pairs,
            placed.chunks_at,
            launch.first_chunk,
            launch.chunk_size,
            P_TYPE=TYPES[param],
            G_TYPE=TYPES[grad],
            S_TYPE=TYPES[state],
            T=TYPES[0 if arithmetic == 0 else 1],
            KIND=kind,
            COUPLED=coupled,
            UNITS=unit_factors is not None,
            **streams,
            SAMPLES=stacked,
            STRIDED=launch.strided,
            TILE=_THREADS * accesses * (16 // widest),
            TAIL=_TAIL,
            VECTOR=16 // widest,
            num_warps=_WARPS,
            enable_fp_fusion=False,
            **({"maxnreg": _MOST_CROWDED[0]} if stacked and not torch.version.hip else {}),
        )
    return rows_of_pairs(placed, batch, first, kind == columns.SQUARES_MAX)


def unit_sums(placed: DeviceTables, batch: int) -> Tensor:
    """See reference_step.py. Reads each gradient and each parameter once."""
    units = placed.units()
    samples, stacked = _samples_of(placed)
    out = torch.empty(units.totals[batch], 2, dtype=torch.float64, device=placed.device)
    for launch in units.launches[batch]:
        param, grad, _ = launch.dtypes
        same = [own for own in placed.launches if own.batch == batch and own.dtypes == launch.dtypes]
        launch_kernel(
            unit_kernel,
            launch.chunks,
            placed.device,
            placed.fixed,
            placed.fresh,
            units.starts,
            units.chunks,
            *samples,
            out,
            launch.first_chunk,
            P_TYPE=TYPES[param],
            G_TYPE=TYPES[grad],
            T=TYPES[0 if param == 0 else 1],
            SAMPLES=stacked,
            STRIDED=any(own.strided for own in same),
            ROWS=_UNIT_ROWS,
            COLS=_THREADS * _UNIT_ELEMENTS // _UNIT_ROWS,
            num_warps=_WARPS,
            enable_fp_fusion=False,
            # Left alone, ptxas spills 4 bytes of gradients' on sm_80.
            **({} if stacked or torch.version.hip else {"maxnreg": 96}),
        )
    return out


def update_(
    placed: DeviceTables,
    values: Tensor,
    batch: int,
    first: int,
    coupled: bool,
    amsgrad: bool,
    overshoot: int,
    block: int,
    guarded: bool,
    unit_factors: Tensor | None,
    momentum_dots: Tensor | None,
    grad_square_sum: Tensor | None,
) -> None:
    """Phase 3, see reference_step.py. 28 B per float32 element, amsgrad 36; 14 where all storage is 16-bit."""
    units, dots = unit_factors is not None, momentum_dots is not None
    samples, stacked = _samples_of(placed)
    for launch in placed.launches:
        if launch.batch != batch:
            continue
        param, grad, state = launch.dtypes
        launch_kernel(
            update_kernel,
            launch.chunks,
            placed.device,
            placed.fixed,
            placed.fresh,
            values,
            placed.partials,
            placed.finished,
            placed.partials if grad_square_sum is None else grad_square_sum,
            placed.partials if unit_factors is None else unit_factors,
            placed.fixed if unit_factors is None else placed.units().starts,
            *samples,
            placed.partials if momentum_dots is None else momentum_dots,
            placed.chunks_at,
            launch.first_chunk,
            launch.chunks,
            launch.chunk_size,
            block,
            P_TYPE=TYPES[param],
            G_TYPE=TYPES[grad],
            S_TYPE=TYPES[state],
            T=TYPES[0 if param == 0 else 1],
            RULE=overshoot,
            AMSGRAD=amsgrad,
            COUPLED=coupled,
            GUARDED=guarded,
            UNITS=units,
            DOTS=dots,
            GATHER=grad_square_sum is not None,
            SAMPLES=stacked,
            STRIDED=launch.strided,
            enable_fp_fusion=False,
            **_update_shape(launch.dtypes, overshoot, block, units, dots, stacked),
        )
