"""The Triton kernels between logits and log-probabilities: NVIDIA and AMD GPUs, and CPUs under TRITON_INTERPRET=1.

    logits_forward: forward_kernel, one program a row: reads the row once; log-probability, entropy, softmax's constants
    logits_backward: backward_kernel, one program a row: reads the row once, writes d loss / d logits, there if asked

x the row, y its token, z = x / temperature, m = max z, S = sum e^(z - m): log p = (z - m) - log S.

float32 arithmetic for logits of 32 bits and fewer, whose exponentials are the GPU's approximation (relative error below
2^-22 + 2^-24 |z - m|, so the terms that count are good to the last bits); a row's sums meet in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_clip_adam.backends.triton_math import (
    BYTES,
    DTYPES,
    TYPES,
    bound,
    jit_kernel,
    launch_kernel,
    load_as,
    store_as,
    tl,
    triton,
)

__all__ = ["logits_backward", "logits_forward"]

LEAST = tl.constexpr(-1000.0)
"""Stands for a -inf that would meet 0: e^LEAST is 0 and LEAST * 0 is not NaN."""

LOWEST_F32, LOWEST_F64 = (tl.constexpr(torch.finfo(dtype).min) for dtype in (torch.float32, torch.float64))

# ---------------------------------------------------------------- where a row lies


@triton.jit
def row_offset(row, cols, row_stride, col_stride):
    return row // cols * row_stride + row % cols * col_stride


# ---------------------------------------------------------------- forward


@triton.jit
def load_column(row_ptr, first, there, k: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr):
    return tl.load(row_ptr + first * VECTOR + (tl.arange(0, TILE) * VECTOR + k), mask=there, other=float("-inf"))


@triton.jit
def load_columns(row_ptr, first, there, k: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """Elements k, k + STEP, k + 2 STEP ... of each run of VECTOR, one at a time and yet in one thread: [TILE, ...]."""
    if 2 * STEP == VECTOR:
        even = load_column(row_ptr, first, there, k, VECTOR, TILE)
        odd = load_column(row_ptr, first, there, k + STEP, VECTOR, TILE)
    else:
        even = load_columns(row_ptr, first, there, k, 2 * STEP, VECTOR, TILE)
        odd = load_columns(row_ptr, first, there, k + STEP, 2 * STEP, VECTOR, TILE)
    return tl.reshape(tl.join(even, odd), [TILE, VECTOR // STEP])


@triton.jit
def load_runs(row_ptr, runs, first, ALIGNED: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """[TILE, VECTOR]: the row's elements from run `first` on, -inf past the last whole run.

    Whether they come by 16 bytes or one at a time, each thread gets the same: the sums are the same bits.
    """
    there = tl.arange(0, TILE) < tl.minimum(runs - first, TILE).to(tl.int32)
    if ALIGNED:
        base = tl.multiple_of(row_ptr + first * VECTOR, 16)
        lane = (tl.arange(0, TILE) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
        return tl.load(base + lane, mask=there[:, None], other=float("-inf"))
    else:
        return load_columns(row_ptr, first, there, 0, 1, VECTOR, TILE)


@triton.jit
def accumulate(m, S, U, z, ENTROPY: tl.constexpr):
    """Takes z [N, K] into N running m = max z, S = sum e^(z - m), U = sum (z - m) e^(z - m)."""
    m_new = tl.maximum(m, tl.max(z, axis=1))
    step = tl.maximum(m - m_new, LEAST)
    shrink = tl.exp(step)
    t = z - m_new[:, None]
    e = tl.exp(t)
    if ENTROPY:
        U = shrink * (U + step * S) + tl.sum(tl.maximum(t, LEAST) * e, axis=1)
    S = shrink * S + tl.sum(e, axis=1)
    return m_new, S, U


@triton.jit
def fold(m, S, U, M):
    """The sums [N] of `accumulate` brought to a common M >= m and added up, in float64."""
    step = tl.maximum(m - M, LEAST)
    shrink = tl.exp(step)
    return tl.sum((shrink * S).to(tl.float64)), tl.sum((shrink * (U + step * S)).to(tl.float64))


@jit_kernel
def forward_kernel(
    logits_ptr,  # [rows // cols, cols, V]
    tokens_ptr,  # int64 [rows // cols, cols]
    mask_ptr,  # uint8 likewise, or None
    logp_ptr,  # T [rows]
    entropy_ptr,  # T [rows], or None
    softmax_ptr,  # T [2, rows]: m, log S; NaN where the row is not read or has none
    inv_temperature: tl.float64,
    rows: tl.int64,
    cols: tl.int64,
    V: tl.int64,
    logits_row: tl.int64,  # strides
    logits_col: tl.int64,
    tokens_row: tl.int64,
    tokens_col: tl.int64,
    mask_row: tl.int64,
    mask_col: tl.int64,
    T: tl.constexpr,  # of the arithmetic
    ALIGNED: tl.constexpr,  # whether every row begins at a multiple of 16 bytes
    VECTOR: tl.constexpr,  # logits in 16 bytes
    TILE: tl.constexpr,  # runs of VECTOR at a time
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(tokens_ptr + row_offset(row, cols, tokens_row, tokens_col))
    nan = tl.full([], float("nan"), T)
    answer = nan
    unread = (y < 0) | (y >= V)
    if mask_ptr is not None:
        masked = tl.load(mask_ptr + row_offset(row, cols, mask_row, mask_col)) == 0
        answer = tl.where(masked, 0.0, nan)
        unread = unread | masked
    if unread:
        tl.store(logp_ptr + row, answer)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, answer)
        tl.store(softmax_ptr + row, nan)
        tl.store(softmax_ptr + rows + row, nan)
        return
    scale = tl.full([], inv_temperature, T)
    row_ptr = logits_ptr + row_offset(row, cols, logits_row, logits_col)
    z_y = load_as(tl.load(row_ptr + y), T) * scale

    # A finite start: its distance to any z is not NaN, and its weight 0.
    lowest: tl.constexpr = LOWEST_F64 if tl.float64 == T else LOWEST_F32
    m = tl.full([TILE], lowest, T)
    S = tl.zeros([TILE], T)
    U = tl.zeros([TILE], T)
    runs = V // VECTOR
    for first in range(0, bound(runs), TILE):
        x = load_runs(row_ptr, runs, first, ALIGNED, VECTOR, TILE)
        m, S, U = accumulate(m, S, U, load_as(x, T) * scale, entropy_ptr is not None)
    index = runs * VECTOR + tl.arange(0, VECTOR)
    x = tl.load(row_ptr + index, mask=index < V, other=float("-inf"))
    m_rest = tl.full([VECTOR], lowest, T)
    zero = tl.zeros([VECTOR], T)
    z_rest = (load_as(x, T) * scale)[:, None]
    m_rest, S_rest, U_rest = accumulate(m_rest, zero, zero, z_rest, entropy_ptr is not None)

    M = tl.maximum(tl.max(m), tl.max(m_rest))
    S_sum, U_sum = fold(m, S, U, M)
    S_more, U_more = fold(m_rest, S_rest, U_rest, M)
    S_sum += S_more
    U_sum += U_more
    readable = S_sum > 0.0  # not of NaN or +inf in the row, nor where nothing is above -inf
    log_S = tl.log(S_sum)
    logp = (z_y.to(tl.float64) - M.to(tl.float64)) - log_S
    tl.store(logp_ptr + row, tl.where(readable, logp.to(T), nan))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(readable, (log_S - U_sum / S_sum).to(T), nan))
    tl.store(softmax_ptr + row, tl.where(readable, M, nan))
    tl.store(softmax_ptr + rows + row, tl.where(readable, log_S.to(T), nan))


# ---------------------------------------------------------------- backward


@triton.jit
def split_row(row_ptr, V, BYTES_EACH: tl.constexpr, VECTOR: tl.constexpr):
    """A row as elements up to the next 16 bytes, whole vectors, a rest: (where the vectors begin, how many)."""
    head = ((16 - row_ptr.to(tl.int64) % 16) % 16) // BYTES_EACH
    head = tl.minimum(head, V)
    return head, (V - head) // VECTOR


@triton.jit
def vectors_at(row_ptr, head, vectors, first, BYTES_EACH: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """Pointers [TILE, VECTOR] to the vectors from `first`, each aligned, and which [TILE, 1] exist."""
    lane = tl.arange(0, TILE)
    # One 64-bit sum a tile: the lanes' constants then fit into the instructions' own offsets.
    base = tl.multiple_of(row_ptr + (head + first * VECTOR), VECTOR * BYTES_EACH)
    left = tl.minimum(vectors - first, TILE).to(tl.int32)
    return base + (lane * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :], (lane < left)[:, None]


@triton.jit
def rest_at(V, head, vectors, first, VECTOR: tl.constexpr, TAIL: tl.constexpr):
    """Indices [TAIL] of the elements outside the vectors, from the `first` of those, and which exist."""
    lane = first + tl.arange(0, TAIL)
    covered = vectors * VECTOR
    return tl.where(lane < head, lane, lane + covered), lane < V - covered


@triton.jit
def logit_grad(x, chosen, g, h, m, log_S, H, scale, HAS_ENTROPY: tl.constexpr):
    """d = (g ([v == y] - p) - h p (log p + H)) / temperature"""
    log_p = (x * scale - m) - log_S
    p = tl.exp(log_p)
    d = g * (tl.where(chosen, 1.0, 0.0) - p)
    if HAS_ENTROPY:
        d -= h * (p * (tl.maximum(log_p, LEAST) + H))
    return d * scale


@jit_kernel
def backward_kernel(
    logits_ptr,  # [rows // cols, cols, V]
    tokens_ptr,  # int64 [rows // cols, cols]
    softmax_ptr,  # T [2, rows]: m, log S
    entropy_ptr,  # T [rows]
    grad_logp_ptr,  # T [rows // cols, cols]
    grad_entropy_ptr,  # likewise, or None
    out_ptr,  # as logits_ptr, or logits_ptr itself
    inv_temperature: tl.float64,
    rows: tl.int64,
    cols: tl.int64,
    V: tl.int64,
    logits_row: tl.int64,  # strides
    logits_col: tl.int64,
    tokens_row: tl.int64,
    tokens_col: tl.int64,
    grad_logp_row: tl.int64,
    grad_logp_col: tl.int64,
    grad_entropy_row: tl.int64,
    grad_entropy_col: tl.int64,
    out_row: tl.int64,
    out_col: tl.int64,
    S_TYPE: tl.constexpr,  # of the logits
    T: tl.constexpr,  # of the arithmetic
    BYTES_EACH: tl.constexpr,  # of a logit
    VECTOR: tl.constexpr,  # logits in 16 bytes
    TILE: tl.constexpr,  # vectors at a time
    TAIL: tl.constexpr,  # logits at a time outside of vectors
):
    # The last rows first: some of what the forward pass has read last is still in the L2.
    row = rows - 1 - tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_offset(row, cols, logits_row, logits_col)
    to_ptr = out_ptr + row_offset(row, cols, out_row, out_col)
    head, vectors = split_row(to_ptr, V, BYTES_EACH, VECTOR)
    g = tl.load(grad_logp_ptr + row_offset(row, cols, grad_logp_row, grad_logp_col))
    h = g * 0.0
    H = h
    if grad_entropy_ptr is not None:
        h = tl.load(grad_entropy_ptr + row_offset(row, cols, grad_entropy_row, grad_entropy_col))
        H = tl.load(entropy_ptr + row)
    m = tl.load(softmax_ptr + row)
    log_S = tl.load(softmax_ptr + rows + row)

    if ((g != 0.0) | (h != 0.0)) & (m - m + (log_S - log_S) == 0.0):
        scale = tl.full([], inv_temperature, T)
        y = tl.load(tokens_ptr + row_offset(row, cols, tokens_row, tokens_col))
        # Where the two rows differ in alignment, one element at a time.
        vectors = tl.where((row_ptr.to(tl.int64) - to_ptr.to(tl.int64)) % 16 == 0, vectors, 0)
        for first in range(0, bound(vectors), TILE):
            pointer, there = vectors_at(row_ptr, head, vectors, first, BYTES_EACH, VECTOR, TILE)
            x = load_as(tl.load(pointer, mask=there, other=0.0), T)
            lane = (tl.arange(0, TILE) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
            at = tl.maximum(tl.minimum(y - (head + first * VECTOR), TILE * VECTOR), -1).to(tl.int32)
            d = logit_grad(x, lane == at, g, h, m, log_S, H, scale, grad_entropy_ptr is not None)
            pointer, there = vectors_at(to_ptr, head, vectors, first, BYTES_EACH, VECTOR, TILE)
            tl.store(pointer, store_as(d, S_TYPE), mask=there)
        for first in range(0, bound(V - vectors * VECTOR), TAIL):
            index, there = rest_at(V, head, vectors, first, VECTOR, TAIL)
            x = load_as(tl.load(row_ptr + index, mask=there, other=0.0), T)
            d = logit_grad(x, index == y, g, h, m, log_S, H, scale, grad_entropy_ptr is not None)
            tl.store(to_ptr + index, store_as(d, S_TYPE), mask=there)
    else:
        for first in range(0, bound(vectors), TILE):
            pointer, there = vectors_at(to_ptr, head, vectors, first, BYTES_EACH, VECTOR, TILE)
            tl.store(pointer, store_as(tl.zeros([TILE, VECTOR], T), S_TYPE), mask=there)
        for first in range(0, bound(V - vectors * VECTOR), TAIL):
            index, there = rest_at(V, head, vectors, first, VECTOR, TAIL)
            tl.store(to_ptr + index, store_as(tl.zeros([TAIL], T), S_TYPE), mask=there)


# ---------------------------------------------------------------- launches

_LANES = 64 if torch.version.hip else 32
_ACCESSES = {"forward": {8: 2, 4: 4, 2: 4}, "backward": {8: 2, 4: 2, 2: 2}}
"""16-byte accesses of a thread in a tile, by the bytes of a logit: enough bytes in flight at four programs of 8 warps a
multiprocessor, and no register spilled."""
_TAIL = 256
"""Logits at a time outside of aligned 16 bytes: fewer than 16 of a row, or all where input and output lie apart."""
_WARPS = ((4 << 10, 1), (32 << 10, 4), (1 << 62, 8))
"""Warps of a program by the bytes of a row, up to: a row of 150,000 logits takes tens of tiles, one of 1,000 no idle
warps."""


def _shape(kernel: str, V: int, code: int) -> dict[str, int]:
    """The constants of a kernel that follow from sizes."""
    warps = next(warps for most, warps in _WARPS if V * BYTES[code] <= most)
    threads = warps * _LANES
    vector = 16 // BYTES[code]
    return {"VECTOR": vector, "TILE": threads * _ACCESSES[kernel][BYTES[code]], "num_warps": warps}


def _is_aligned(logits: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    steps = [stride for size, stride in zip(logits.shape[:2], logits.stride()) if size > 1]
    return all(address % 16 == 0 for address in (logits.data_ptr(), *(step * logits.itemsize for step in steps)))


def logits_forward(
    logits: Tensor, tokens: Tensor, mask: Tensor | None, inv_temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference_objective.py. Reads each row whose mask is set once."""
    B, cols, V = logits.shape
    code = DTYPES.index(logits.dtype)
    dtype = torch.float64 if code == 0 else torch.float32
    logp = torch.empty(B, cols, dtype=dtype, device=logits.device)
    entropy = torch.empty_like(logp) if want_entropy else logp.new_empty(0, 0)
    softmax = torch.empty(2, B, cols, dtype=dtype, device=logits.device)
    if B * cols:
        launch_kernel(
            forward_kernel,
            B * cols,
            logits.device,
            logits,
            tokens,
            None if mask is None else mask.view(torch.uint8),
            logp,
            entropy if want_entropy else None,
            softmax,
            float(inv_temperature),
            B * cols,
            cols,
            V,
            *logits.stride()[:2],
            *tokens.stride(),
            *((0, 0) if mask is None else mask.stride()),
            T=TYPES[0 if code == 0 else 1],
            ALIGNED=_is_aligned(logits),
            **_shape("forward", V, code),
            enable_fp_fusion=False,
        )
    return logp, entropy, softmax


def logits_backward(
    logits: Tensor,
    tokens: Tensor,
    softmax: Tensor,
    entropy: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    inv_temperature: float,
    out: Tensor,
) -> None:
    """See reference_objective.py. Reads a row once and writes it once; a row without a gradient is only written."""
    B, cols, V = logits.shape
    code = DTYPES.index(logits.dtype)
    if B * cols * V:
        launch_kernel(
            backward_kernel,
            B * cols,
            logits.device,
            logits,
            tokens,
            softmax.contiguous(),
            entropy.contiguous(),
            grad_logp,
            grad_entropy,
            out,
            float(inv_temperature),
            B * cols,
            cols,
            V,
            *logits.stride()[:2],
            *tokens.stride(),
            *grad_logp.stride(),
            *((0, 0) if grad_entropy is None else grad_entropy.stride()),
            *out.stride()[:2],
            S_TYPE=TYPES[code],
            T=TYPES[0 if code == 0 else 1],
            BYTES_EACH=BYTES[code],
            TAIL=_TAIL,
            **_shape("backward", V, code),
            enable_fp_fusion=False,
        )
