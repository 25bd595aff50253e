"""The Triton kernels of a step: NVIDIA and AMD GPUs, and any CPU under TRITON_INTERPRET=1 (slow, for tests).

    tensor_table -> place -> norm_kernel -> prologue_kernel -> update_kernel

One launch each whatever the number of tensors (norm and update: one a combination of dtypes in a batch). Every address
and scalar is read from the tables of device_table.py, so nothing is read back to the host. The equations carry the
names of csrc/update_math.h and reference_step.py.

Kernels change their operands in place, so nothing here is autotuned: a trial run would be an optimizer step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_clip_adam.backends import host_table, native
from fused_clip_adam.backends.device_table import GROUP_SCALARS as _GROUP_WORDS
from fused_clip_adam.backends.device_table import ROW as _ROW_WORDS
from fused_clip_adam.backends.device_table import SCALARS as _SCALAR_WORDS
from fused_clip_adam.backends.device_table import DeviceTables, Launch, place, tensor_square_sums
from fused_clip_adam.backends.reference_step import ALIGN_BLOCK as _ALIGN_BLOCK
from fused_clip_adam.backends.reference_step import ALIGN_ELEMENT as _ALIGN_ELEMENT
from fused_clip_adam.backends.reference_step import ATAN2 as _ATAN2
from fused_clip_adam.backends.reference_step import CAUTIOUS as _CAUTIOUS
from fused_clip_adam.backends.reference_step import DAMP as _DAMP
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
    "grad_square_sums",
    "place",
    "prologue",
    "tensor_square_sums",
    "tensor_table",
    "unavailable",
    "update_",
]

ON_DEVICE = True
"""The kernels advance `step` and read a learning rate where they are: on the device."""

tensor_table = host_table.tensor_table if native.unavailable() else native.tensor_table

# ---------------------------------------------------------------- layouts: csrc/table.h, device_table.py

ROW = tl.constexpr(_ROW_WORDS)
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ = (tl.constexpr(slot) for slot in range(5))
STEP, STEP_IS_F64, BIAS_WEIGHTS, NUMEL = (tl.constexpr(column) for column in range(5, 9))
FLAT, STRIDED_AT, GROUP = (tl.constexpr(column) for column in range(12, 15))
GROUP_SCALARS = tl.constexpr(_GROUP_WORDS)
LR_ADDRESS, LR_IS_F64 = tl.constexpr(13), tl.constexpr(14)
SCALARS = tl.constexpr(_SCALAR_WORDS)
DAMP = tl.constexpr(_DAMP)
ALIGN_BLOCK, ALIGN_ELEMENT, CAUTIOUS = map(tl.constexpr, (_ALIGN_BLOCK, _ALIGN_ELEMENT, _CAUTIOUS))
GRAMS, ATAN2 = tl.constexpr(_GRAMS), tl.constexpr(_ATAN2)

# ---------------------------------------------------------------- the update of one element


@triton.jit
def same_sign(x, y):  # x * y > 0 without the underflow
    return ((x > 0) & (y > 0)) | ((x < 0) & (y < 0))


@triton.jit
def scaled_grad(param, grad, s, COUPLED: tl.constexpr):
    """g <- S g (+ l2 p)"""
    grad_factor, l2 = s[0], s[10]
    g = grad * grad_factor
    if COUPLED:
        g = g + l2 * param
    return g


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
):
    """m' = a m + b g ; v' = beta2 v + (1 - beta2) g g
    u  = d / W1 / (sqrt(v') / sqrt(W2) + eps), at most max_update ; p <- decay p - lr u
    """
    _grad_factor, a, b, beta2, one_minus_beta2, inv_w1, inv_sqrt_w2, eps, lr, decay, _l2, max_update = s
    g = scaled_grad(param, grad, s, COUPLED)
    m = exp_avg
    bg = b * g
    m_new = a * m + bg
    v_new = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    v_used = v_new
    if AMSGRAD:
        v_used = tl.where(max_exp_avg_sq > v_new, max_exp_avg_sq, v_new)

    d = m_new
    if RULE == ALIGN_BLOCK:
        d = tl.where(keep, m_new, bg)
    if RULE == ALIGN_ELEMENT:
        d = tl.where(same_sign(m, g), m_new, bg)
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
    return param, m_new, v_new, v_used


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


# ---------------------------------------------------------------- one tile


@triton.jit
def squares_of(grad, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """g^2 in float64; where VECTOR, summed over each run of VECTOR, which one thread holds: fewer sums to keep."""
    value = grad.to(tl.float64)
    if VECTOR:
        return tl.sum(tl.reshape(value * value, [TILE // VECTOR, VECTOR]), axis=1)
    else:
        return value * value


@triton.jit
def momentum_dot_tile(
    addresses,
    first,
    stop,
    record_ptr,
    dims,
    s,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    T: tl.constexpr,
    COUPLED: tl.constexpr,
    STRIDED: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """m g in float64, where products of float32 are exact, per element; 0 from `stop` on."""
    param_at, grad_at, exp_avg_at, _exp_avg_sq_at, _max_exp_avg_sq_at = addresses
    lane, mask = tile_mask(first, stop, first, TILE, 0)
    param = 0.0
    if COUPLED:
        pointer = slot_pointer(param_at, PARAM, first, lane, record_ptr, dims, P_TYPE, STRIDED, VECTOR)
        param = load_tile(pointer, mask, T, VECTOR)
    pointer = slot_pointer(grad_at, GRAD, first, lane, record_ptr, dims, G_TYPE, STRIDED, VECTOR)
    grad = load_tile(pointer, mask, T, VECTOR)
    pointer = slot_pointer(exp_avg_at, EXP_AVG, first, lane, record_ptr, dims, S_TYPE, STRIDED, VECTOR)
    exp_avg = load_tile(pointer, mask, T, VECTOR)
    return exp_avg.to(tl.float64) * scaled_grad(param, grad, s, COUPLED).to(tl.float64)


@triton.jit
def momentum_dot(
    addresses,
    start,
    whole,
    stop,
    record_ptr,
    dims,
    s,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    T: tl.constexpr,
    COUPLED: tl.constexpr,
    STRIDED: tl.constexpr,
    TILE: tl.constexpr,
    TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """sum m g over a block longer than a tile; all of it up to `whole` is aligned."""
    dot = tl.zeros([TILE], tl.float64)
    for first in range(bound(start), bound(whole), TILE):
        dot += momentum_dot_tile(
            addresses, first, whole, record_ptr, dims, s, P_TYPE, G_TYPE, S_TYPE, T, COUPLED, STRIDED, TILE, VECTOR
        )
    total = tl.sum(dot)
    dot = tl.zeros([TAIL], tl.float64)
    for first in range(bound(whole), bound(stop), TAIL):
        dot += momentum_dot_tile(
            addresses, first, stop, record_ptr, dims, s, P_TYPE, G_TYPE, S_TYPE, T, COUPLED, STRIDED, TAIL, 0
        )
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
    keep,
    sum_squares,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    T: tl.constexpr,
    RULE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    COUPLED: tl.constexpr,
    GATHER: tl.constexpr,
    STRIDED: tl.constexpr,
    TILE: tl.constexpr,
    GATE: tl.constexpr,
    PADDED: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Updates a tile in place, up to `stop`; returns `sum_squares`, plus the squares of its raw gradients where GATHER.

    GATE > 0: every GATE lanes are one block of ALIGN_BLOCK, and `keep` is found here.
    """
    param_at, grad_at, exp_avg_at, exp_avg_sq_at, max_exp_avg_sq_at = addresses
    lane, mask = tile_mask(first, stop, block, TILE, PADDED)
    param_ptr = slot_pointer(param_at, PARAM, first, lane, record_ptr, dims, P_TYPE, STRIDED, VECTOR)
    grad_ptr = slot_pointer(grad_at, GRAD, first, lane, record_ptr, dims, G_TYPE, STRIDED, VECTOR)
    exp_avg_ptr = slot_pointer(exp_avg_at, EXP_AVG, first, lane, record_ptr, dims, S_TYPE, STRIDED, VECTOR)
    exp_avg_sq_ptr = slot_pointer(exp_avg_sq_at, EXP_AVG_SQ, first, lane, record_ptr, dims, S_TYPE, STRIDED, VECTOR)
    param = load_tile(param_ptr, mask, T, VECTOR)
    grad = load_tile(grad_ptr, mask, T, VECTOR)
    exp_avg = load_tile(exp_avg_ptr, mask, T, VECTOR)
    exp_avg_sq = load_tile(exp_avg_sq_ptr, mask, T, VECTOR)
    max_exp_avg_sq = exp_avg_sq
    if AMSGRAD:
        slot = MAX_EXP_AVG_SQ
        max_ptr = slot_pointer(max_exp_avg_sq_at, slot, first, lane, record_ptr, dims, S_TYPE, STRIDED, VECTOR)
        max_exp_avg_sq = load_tile(max_ptr, mask, T, VECTOR)

    if GATE:
        product = exp_avg.to(tl.float64) * scaled_grad(param, grad, s, COUPLED).to(tl.float64)
        dot = tl.sum(tl.reshape(product, [TILE // GATE, GATE]), axis=1)
        keep = tl.reshape(tl.broadcast_to((dot > 0)[:, None], [TILE // GATE, GATE]), [TILE])
    param, exp_avg, exp_avg_sq, max_exp_avg_sq = update_element(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, s, keep, RULE, AMSGRAD, COUPLED
    )
    store_tile(param_ptr, param, mask, P_TYPE, VECTOR)
    store_tile(exp_avg_ptr, exp_avg, mask, S_TYPE, VECTOR)
    store_tile(exp_avg_sq_ptr, exp_avg_sq, mask, S_TYPE, VECTOR)
    if AMSGRAD:
        store_tile(max_ptr, max_exp_avg_sq, mask, S_TYPE, VECTOR)
    if GATHER:
        sum_squares += squares_of(grad, TILE, VECTOR)
    return sum_squares


# ---------------------------------------------------------------- phase 1: sums of squares


@triton.jit(do_not_specialize=["fixed_ptr", "fresh_ptr", "partials_ptr", "chunks_at", "first_chunk", "chunk_size"])
def norm_kernel(
    fixed_ptr,  # int64: rows, records, chunks
    fresh_ptr,  # int64: addresses of gradients
    partials_ptr,  # float64, one a chunk: receives sum g^2 of raw gradients
    chunks_at,  # where in fixed_ptr the chunks begin
    first_chunk,
    chunk_size,
    G_TYPE: tl.constexpr,
    T: tl.constexpr,
    STRIDED: tl.constexpr,
    TILE: tl.constexpr,  # elements at a time where all is aligned
    TAIL: tl.constexpr,  # elements at a time elsewhere
    VECTOR: tl.constexpr,  # elements of an aligned access
):
    chunk = first_chunk + tl.program_id(0).to(tl.int64)
    row = tl.load(fixed_ptr + chunks_at + 2 * chunk)
    begin = tl.load(fixed_ptr + chunks_at + 2 * chunk + 1)
    row_ptr = fixed_ptr + row * ROW
    end = tl.minimum(begin + chunk_size, tl.load(row_ptr + NUMEL))
    grad_at = tl.load(fresh_ptr + row)
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
    tl.store(partials_ptr + chunk, total + tl.sum(sum_squares))


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
        "clip_factors_ptr",
    ]
)
def prologue_kernel(
    fixed_ptr,  # int64: rows first
    fresh_ptr,  # int64: addresses of gradients, then group_scalars as their bits
    scalars_ptr,  # float64 [rows, SCALARS]: receives skip, unscale, then the fields of StepScalars
    rows,
    square_sums_ptr,  # float64 [sums] or None
    sums,
    grad_scale_ptr,  # or None
    found_inf_ptr,  # or None
    observed_ptr,  # [2]: suppressed and total mass, or None
    grad_square_sum_ptr,  # float64: in, the previous step's; out, this step's, or 0 where the update gathers it
    steps_skipped_ptr,  # int64
    clip_factors_ptr,  # float64 [rows] or None
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
        group_at = fresh_ptr + rows + tl.load(row_ptr + GROUP, mask=mask, other=0) * GROUP_SCALARS
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
        max_update = tl.load(group_ptr + 12, mask=mask, other=0.0)
        lr_address = tl.load(group_at + LR_ADDRESS, mask=mask, other=0)
        lr_is_f64 = tl.load(group_at + LR_IS_F64, mask=mask, other=0) != 0
        there = lr_address != 0
        lr_f32 = tl.load(lr_address.to(tl.pointer_type(tl.float32)), mask=there & ~lr_is_f64, other=0.0)
        lr_f64 = tl.load(lr_address.to(tl.pointer_type(tl.float64)), mask=there & lr_is_f64, other=0.0)
        lr = tl.where(there, tl.where(lr_is_f64, lr_f64, lr_f32.to(tl.float64)), lr)

        # make_control: no previous step, or one whose norm was not finite, says nothing about this one.
        known = previous_norm - previous_norm == 0.0
        lagged_clip = tl.where(known, clip_coefficient(previous_norm, max_norm), 1.0)
        clip = tl.where(lagged_norm != 0.0, lagged_clip, clip_coefficient(norm, max_norm))
        clip = tl.where(max_norm >= 0.0, clip, 1.0)
        grad_factor = sign * unscale * clip
        if clip_factors_ptr is not None:
            grad_factor *= tl.load(clip_factors_ptr + row, mask=mask, other=1.0)

        # MomentumBrake: a = beta1 (1 - strength c); b = 1 - a, or 1 - beta1 with W1 as plain Adam keeps it.
        brake = brake_mode != 0.0
        damp = brake_mode == DAMP
        a = tl.where(brake, beta1 * (1.0 - strength * c), beta1)
        b = tl.where(damp, 1.0 - beta1, 1.0 - a)
        w1_a = tl.where(damp, beta1, a)
        w1_b = 1.0 - w1_a
        one_minus_beta2 = (1.0 - beta2) * tl.where(brake, 1.0 - hold_v * c, 1.0)
        beta2_used = tl.where(brake, 1.0 - one_minus_beta2, beta2)

        # advance: the step and the bias weights, in place
        advancing = mask & (skip == 0)
        step_is_f64 = tl.load(row_ptr + STEP_IS_F64, mask=mask, other=0) != 0
        step_at = tl.load(row_ptr + STEP, mask=mask, other=0)
        step_f32_ptr = step_at.to(tl.pointer_type(tl.float32))
        step_f64_ptr = step_at.to(tl.pointer_type(tl.float64))
        step_f32 = tl.load(step_f32_ptr, mask=advancing & ~step_is_f64, other=0.0) + 1.0
        step_f64 = tl.load(step_f64_ptr, mask=advancing & step_is_f64, other=0.0) + 1.0
        tl.store(step_f32_ptr, step_f32, mask=advancing & ~step_is_f64)
        tl.store(step_f64_ptr, step_f64, mask=advancing & step_is_f64)
        step = tl.where(step_is_f64, step_f64, step_f32.to(tl.float64))
        weights_at = tl.load(row_ptr + BIAS_WEIGHTS, mask=mask, other=0)
        weighed = advancing & (weights_at != 0)
        w = weights_at.to(tl.pointer_type(tl.float64))
        w1 = w1_a * tl.load(w, mask=weighed, other=0.0) + w1_b
        w2 = beta2_used * tl.load(w + 1, mask=weighed, other=0.0) + one_minus_beta2
        tl.store(w, w1, mask=weighed)
        tl.store(w + 1, w2, mask=weighed)
        w1 = tl.where(weighed, w1, one_minus_power(beta1, step))
        w2 = tl.where(weighed, w2, one_minus_power(beta2, step))

        out = scalars_ptr + row * SCALARS
        tl.store(out, skip.to(tl.float64) + tl.zeros([ROWS], tl.float64), mask=mask)
        tl.store(out + 1, unscale + tl.zeros([ROWS], tl.float64), mask=mask)
        tl.store(out + 2, grad_factor, mask=mask)
        tl.store(out + 3, a, mask=mask)
        tl.store(out + 4, b, mask=mask)
        tl.store(out + 5, beta2_used, mask=mask)
        tl.store(out + 6, one_minus_beta2, mask=mask)
        tl.store(out + 7, 1.0 / w1, mask=mask)
        tl.store(out + 8, 1.0 / tl.sqrt(w2), mask=mask)
        tl.store(out + 9, eps, mask=mask)
        tl.store(out + 10, lr, mask=mask)
        tl.store(out + 11, tl.where(coupled, 1.0, 1.0 - lr * weight_decay), mask=mask)
        tl.store(out + 12, tl.where(coupled, weight_decay, 0.0), mask=mask)
        tl.store(out + 13, max_update, mask=mask)


# ---------------------------------------------------------------- phase 3: one pass over memory


@triton.jit(
    do_not_specialize=[
        "fixed_ptr",
        "fresh_ptr",
        "scalars_ptr",
        "partials_ptr",
        "finished_ptr",
        "grad_square_sum_ptr",
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
    scalars_ptr,  # float64 [rows, SCALARS], of prologue_kernel
    partials_ptr,  # float64, one a chunk: scratch of GATHER
    finished_ptr,  # int32, 0 between launches: programs that have written their partial sum
    grad_square_sum_ptr,  # float64: receives the sum of squares of unscaled gradients (GATHER)
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
    GATHER: tl.constexpr,
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
    grad_at = tl.load(fresh_ptr + row)
    exp_avg_at = tl.load(row_ptr + EXP_AVG)
    exp_avg_sq_at = tl.load(row_ptr + EXP_AVG_SQ)
    max_exp_avg_sq_at = tl.load(row_ptr + MAX_EXP_AVG_SQ)
    addresses = (param_at, grad_at, exp_avg_at, exp_avg_sq_at, max_exp_avg_sq_at)
    # Blocks are runs of the logical order, so memory order will do only where the two agree.
    record_ptr, dims = record_of(fixed_ptr, row_ptr, RULE != ALIGN_BLOCK, STRIDED)
    s = (
        tl.load(scalars + 2).to(T),  # grad_factor
        tl.load(scalars + 3).to(T),  # a
        tl.load(scalars + 4).to(T),  # b
        tl.load(scalars + 5).to(T),  # beta2
        tl.load(scalars + 6).to(T),  # one_minus_beta2
        tl.load(scalars + 7).to(T),  # inv_w1
        tl.load(scalars + 8).to(T),  # inv_sqrt_w2
        tl.load(scalars + 9).to(T),  # eps
        tl.load(scalars + 10).to(T),  # lr
        tl.load(scalars + 11).to(T),  # decay
        tl.load(scalars + 12).to(T),  # l2
        tl.load(scalars + 13).to(T),  # max_update
    )
    aligned = (param_at | grad_at | exp_avg_at | exp_avg_sq_at | max_exp_avg_sq_at) % 16 == 0
    aligned = aligned & (dims == 0)
    # Aligned tiles first; then what is left, in units of a block where one tile cannot hold it, else in one go.
    whole = begin
    if not PADDED and (GATE or not BLOCKWISE):
        whole = tl.where(aligned & (begin % VECTOR == 0), begin + (end - begin) // TILE * TILE, begin)
    squares = tl.zeros([TILE // VECTOR], tl.float64)
    for first in range(bound(begin), bound(whole), TILE):
        squares = update_tile(
            addresses, first, whole, block, record_ptr, dims, s, True, squares,
            P_TYPE, G_TYPE, S_TYPE, T, RULE, AMSGRAD, COUPLED, GATHER, STRIDED, TILE, GATE, 0, VECTOR,
        )  # fmt: skip
    sum_squares = tl.sum(squares)
    unit = chunk_size
    stride = TAIL
    if BLOCKWISE:
        unit = block
    if PADDED:
        stride = TAIL // PADDED * block
    for start in range(bound(whole), bound(end), bound(unit)):
        stop = tl.minimum(start + unit, end)
        whole = start
        keep = True
        if BLOCKWISE:
            if not GATE:
                whole = tl.where(aligned & (start % VECTOR == 0), start + (stop - start) // TILE * TILE, start)
            dot = momentum_dot(
                addresses, start, whole, stop, record_ptr, dims, s,
                P_TYPE, G_TYPE, S_TYPE, T, COUPLED, STRIDED, TILE, TAIL, VECTOR,
            )  # fmt: skip
            keep = dot > 0  # all-zero momentum: nothing to drop, either answer gives d = b g
            tl.debug_barrier()  # every thread has read the old momentum before one of them writes it
            if not GATE:
                squares = tl.zeros([TILE // VECTOR], tl.float64)
                for first in range(bound(start), bound(whole), TILE):
                    squares = update_tile(
                        addresses, first, whole, block, record_ptr, dims, s, keep, squares,
                        P_TYPE, G_TYPE, S_TYPE, T, RULE, AMSGRAD, COUPLED, GATHER, STRIDED, TILE, 0, 0, VECTOR,
                    )  # fmt: skip
                sum_squares += tl.sum(squares)
        tail_squares = tl.zeros([TAIL], tl.float64)
        for first in range(bound(whole), bound(stop), bound(stride)):
            tail_squares = update_tile(
                addresses, first, stop, block, record_ptr, dims, s, keep, tail_squares,
                P_TYPE, G_TYPE, S_TYPE, T, RULE, AMSGRAD, COUPLED, GATHER, STRIDED, TAIL, TAIL_GATE, PADDED, 0,
            )  # fmt: skip
        sum_squares += tl.sum(tail_squares)

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
_TAIL = 2 * _THREADS
"""Elements of a tile outside the aligned path, two a thread: unaligned accesses take one element each. Blocks longer
than a tile, or than this one where they are not a power of two, read m and g twice, the second time from a cache."""
_MOST_REGISTERS = {8: 255, 4: 128, 2: 128}
"""Of the update on NVIDIA, by the same: 16 warps a multiprocessor, 8 of float64. Left alone, ptxas spills some bytes to
reach 64. AMD has no such option."""
_PROLOGUE_ROWS, _PROLOGUE_SUMS, _PROLOGUE_WARPS = 256, 2048, 8
"""One program does it all: a row a thread, and enough partial sums at a time that 1e9 elements take 30 reads."""


def _update_shape(dtypes: tuple[int, int, int], overshoot: int, block: int) -> dict[str, int]:
    """The constants of update_kernel that follow from sizes."""
    widest = max(BYTES[code] for code in dtypes)
    tile, gate = _THREADS * _UPDATE_ACCESSES[widest] * (16 // widest), 0
    power = 1 << (block - 1).bit_length()
    if overshoot == _ALIGN_BLOCK and block <= (tile if power == block else _TAIL):
        gate = power
    padded = gate if gate != block else 0
    shape = {"TILE": tile, "TAIL": _TAIL, "GATE": gate, "PADDED": padded, "VECTOR": 16 // widest, "num_warps": _WARPS}
    return shape if torch.version.hip else {**shape, "maxnreg": _MOST_REGISTERS[widest]}


def _norm(placed: DeviceTables, launch: Launch) -> None:
    grad = launch.dtypes[1]
    launch_kernel(
        norm_kernel,
        launch.chunks,
        placed.device,
        placed.fixed,
        placed.fresh,
        placed.partials,
        placed.chunks_at,
        launch.first_chunk,
        launch.chunk_size,
        G_TYPE=TYPES[grad],
        T=TYPES[0 if grad == 0 else 1],
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
        _norm(placed, launch)
    return placed.partials


def prologue(
    placed: DeviceTables,
    square_sums: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    observed: Tensor | None,
    grad_square_sum: Tensor,
    steps_skipped: Tensor,
    skip_nonfinite: bool,
    clip_factors: Tensor | None,
) -> None:
    """Phase 2, see reference_step.py. Steps and bias weights advance here; scalars go to `placed.scalars`."""
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
        clip_factors,
        SKIP_NONFINITE=skip_nonfinite,
        ROWS=_PROLOGUE_ROWS,
        SUMS=_PROLOGUE_SUMS,
        num_warps=_PROLOGUE_WARPS,
        enable_fp_fusion=False,
    )


def update_(
    placed: DeviceTables,
    control: None,
    batch: int,
    coupled: bool,
    amsgrad: bool,
    overshoot: int,
    block: int,
    grad_square_sum: Tensor | None,
) -> None:
    """Phase 3, see reference_step.py. 28 B per float32 element, amsgrad 36; 14 where all storage is 16-bit."""
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
            placed.scalars,
            placed.partials,
            placed.finished,
            placed.partials if grad_square_sum is None else grad_square_sum,
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
            GATHER=grad_square_sum is not None,
            STRIDED=launch.strided,
            enable_fp_fusion=False,
            **_update_shape(launch.dtypes, overshoot, block),
        )
