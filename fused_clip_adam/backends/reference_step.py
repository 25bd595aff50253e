"""The optimizer step as equations. Same names, same order as csrc/update_math.h.

The phases of a step, for one batch (tensors of one device and dtype in one parameter group):

    tensor_table     -> a batch's tensors, checked
    place            -> the tables of all batches where the kernels read them
    grad_square_sums -> sums of squares of the raw gradients, float64 (tensor_square_sums: by tensor)
    prologue         -> `control`: the scalars of every group, float64
    update_          -> parameters and moments, in place, batch by batch

Arithmetic is float32, float64 for float64 parameters; scalars are prepared in float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

RENORMALISE, DAMP = 1, 2
NONE, ALIGN_BLOCK, ALIGN_ELEMENT, CAUTIOUS, GRAMS, ATAN2 = range(6)


@dataclasses.dataclass
class Table:
    """A batch. Lists are parallel; `max_exp_avg_sqs` and `bias_weights` may be empty."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    bias_weights: list[Tensor]
    group: int


def tensor_table(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, bias_weights, group) -> Table:
    """Checks a batch's tensors and returns them as a `Table`.

    Raises:
        RuntimeError: a shape or dtype that does not fit, or an expanded (self-overlapping) tensor to be written.
    """
    table = Table(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, bias_weights, group)
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs}
    for i, p in enumerate(params):
        tensors = {"params": p, "grads": grads[i], **{k: v[i] for k, v in states.items() if v}}
        for name, tensor in tensors.items():
            if tensor.shape != p.shape:
                raise RuntimeError(f"{name}[{i}] must have the shape of params[{i}]")
            if tensor.dtype not in (p.dtype, torch.float32):
                raise RuntimeError(
                    f"{name}[{i}] is {tensor.dtype}; accepted for a {p.dtype} parameter: the same, or float32"
                )
            if name in states and tensor.dtype != exp_avgs[i].dtype:
                raise RuntimeError(f"{name}[{i}] is {tensor.dtype} but exp_avgs[{i}] is {exp_avgs[i].dtype}")
            if name != "grads" and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape)):
                raise RuntimeError(
                    f"{name}[{i}] has elements that share memory (an expanded view?); it cannot be updated in place"
                )
    return table


class Placed(NamedTuple):
    """The tables and scalars of a step where the kernels read them; here, and for the CPU kernels, where they lie."""

    tables: list
    group_scalars: Tensor


def place(tables: list, group_scalars: Tensor, blocks: list[int], kept: Any, device: Any, capturable: bool) -> Placed:
    """The tables of a device's batches as they are. The GPU backends copy them, see device_table.py."""
    return Placed(tables, group_scalars)


class Control(NamedTuple):
    """What the prologue decides. groups: float64 [groups, 9]. clip_factors: float64 [all tensors] or None."""

    groups: Tensor
    clip_factors: Tensor | None

    def factors_of(self, placed: Placed, batch: int, rows: Callable[[Any], int]) -> Tensor | None:
        """A batch's own clip factors; `rows`: how many tensors a table has."""
        if self.clip_factors is None:
            return None
        first = sum(rows(table) for table in placed.tables[:batch])
        return self.clip_factors[first : first + rows(placed.tables[batch])]


def grad_square_sums(placed: Placed) -> Tensor:
    """sum g^2 over raw gradients: float64 [tensors of all batches], to be added up."""
    return torch.stack([g.double().square().sum() for table in placed.tables for g in table.grads])


def tensor_square_sums(placed: Placed, square_sums: Tensor) -> Tensor:
    """What `grad_square_sums` gave, by tensor: float64 [tensors of all batches]."""
    return square_sums


def prologue(
    placed: Placed,
    square_sums: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    observed: Tensor | None,
    grad_square_sum: Tensor,
    steps_skipped: Tensor,
    skip_nonfinite: bool,
    clip_factors: Tensor | None,
) -> Control:
    """All scalars of a step, on the device, without a host read.

    Args:
        placed: its group_scalars, float64 [groups, 15]: beta1, beta2, max_norm (< 0: no clip), lag, sign
            (-1: maximize), brake mode, strength, hold_v, lr, eps, weight_decay, coupled, max_update (infinite:
            unbounded); the last two belong to the GPU backends.
        square_sums: float64 [n] of raw gradients, to be added up, or None where no rule needs the norm before the
            update.
        grad_scale, found_inf: as torch.amp.GradScaler hands them over, or None.
        observed: float32 [2], suppressed and total mass, or None.
        grad_square_sum: float64 0-d. In: the previous step's sum (for lag). Out: this step's where `square_sums` is
            given, else 0 for the update pass to add to; unchanged where found_inf skips the step.
        steps_skipped: int64 0-d, counted up where the step is skipped.
        clip_factors: float64 [tensors of all batches], from clip rules other than the global norm's, or None.

    Returns:
        control; its groups: skip, grad_factor, unscale, a, b, beta2, 1 - beta2, w1_a, w1_b.
    """
    group = placed.group_scalars.to(grad_square_sum.device)
    beta1, beta2, max_norm, lag, sign, brake_mode, strength, hold_v = group.unbind(1)[:8]
    one = torch.ones((), dtype=torch.float64, device=group.device)

    unscale = one / grad_scale.double().reshape(()) if grad_scale is not None else one
    skip = (
        found_inf.reshape(()) != 0 if found_inf is not None else torch.zeros((), dtype=torch.bool, device=group.device)
    )
    previous_norm = grad_square_sum.sqrt()
    norm = previous_norm
    if square_sums is not None:
        norm = square_sums.sum().sqrt() * unscale.abs()
        grad_square_sum.copy_(torch.where(skip, grad_square_sum, norm * norm))
        if skip_nonfinite:
            skip = skip | ~norm.isfinite()
    else:
        grad_square_sum.copy_(torch.where(skip, grad_square_sum, 0.0))
    steps_skipped += skip

    c = torch.zeros((), dtype=torch.float64, device=group.device)
    if observed is not None:
        suppressed, total = observed.double().unbind()
        c = (suppressed / total).nan_to_num(0.0, 1.0, 0.0).clamp(0.0, 1.0)

    # Clip coefficient: min(1, max_norm / (norm + 1e-6)); a lagged norm that says nothing does not scale.
    used_norm = torch.where(lag != 0, torch.where(previous_norm.isfinite(), previous_norm, 0.0), norm)
    clip = max_norm / (used_norm + 1e-6)
    clip = torch.where(clip > 1, 1.0, clip)
    clip = torch.where(max_norm < 0, 1.0, clip)

    # Brake: a = beta1 (1 - strength c); b = 1 - a, or 1 - beta1 with W1 as plain Adam keeps it.
    brake, damp = brake_mode != 0, brake_mode == DAMP
    a = torch.where(brake, beta1 * (1 - strength * c), beta1)
    b = torch.where(damp, 1 - beta1, 1 - a)
    w1_a = torch.where(damp, beta1, a)
    one_minus_beta2 = torch.where(brake, (1 - beta2) * (1 - hold_v * c), 1 - beta2)
    beta2 = torch.where(brake, 1 - one_minus_beta2, beta2)
    columns = (skip.double(), sign * unscale * clip, unscale, a, b, beta2, one_minus_beta2, w1_a, 1 - w1_a)
    return Control(torch.stack([column.expand_as(beta1) for column in columns], dim=1), clip_factors)


def block_gate(m: Tensor, g: Tensor, block: int) -> Tensor:
    """k per element, True where sum m g over the element's block of consecutive elements is positive."""
    block = min(block, max(m.numel(), 1))
    products = (m.double() * g.double()).reshape(-1)
    padding = -products.numel() % block
    sums = torch.nn.functional.pad(products, (0, padding)).reshape(-1, block).sum(1)
    return (sums > 0).repeat_interleave(block)[: products.numel()].reshape(m.shape)


def adam_element(p, g, m, v, v_max, *, S, a, b, beta2, one_minus_beta2, W1, W2, lr, eps, decay, l2, max_update, rule,
                 block):  # fmt: skip
    """One step of the update, elementwise; returns new p, m, v, v_max.

    g <- S g (+ l2 p) ; m' = a m + b g ; v' = beta2 v + (1 - beta2) g g
    u  = d / W1 / (sqrt(v') / sqrt(W2) + eps), at most max_update ; p <- decay p - lr u
    """
    g = g * S
    if l2:
        g = g + l2 * p
    m_new = a * m + b * g
    v_new = beta2 * v + one_minus_beta2 * g * g
    v_used = v_new if v_max is None else torch.maximum(v_max, v_new)

    d = m_new
    if rule == ALIGN_BLOCK:
        d = torch.where(block_gate(m, g, block), m_new, b * g)
    elif rule == ALIGN_ELEMENT:
        d = torch.where(m.sign() * g.sign() > 0, m_new, b * g)
    size = v_used.sqrt() * (1 / W2**0.5)
    if rule == ATAN2:
        u = max_update * (2 / math.pi * torch.atan2(d * (1 / W1), size))
    else:
        u = (d * (1 / W1) / (size + eps)).clamp(-max_update, max_update)
    if rule == CAUTIOUS:
        u = torch.where(m_new.sign() * g.sign() > 0, u, torch.zeros_like(u))
    elif rule == GRAMS:
        u = g.sign() * u.abs()
    return p * decay - lr * u, m_new, v_new, None if v_max is None else v_used


def update_(
    placed: Placed,
    control: Control,
    batch: int,
    coupled: bool,
    amsgrad: bool,
    overshoot: int,
    block: int,
    grad_square_sum: Tensor | None,
) -> None:
    """Updates a batch in place; changes nothing where `control` says skip.

    `grad_square_sum`, where given, receives the batch's sum of squares of unscaled gradients.
    """
    table = placed.tables[batch]
    skip, S, unscale, a, b, beta2_used, one_minus_beta2, w1_a, w1_b = control.groups[table.group].tolist()
    if skip:
        return
    beta1, beta2, _, _, _, _, _, _, lr, eps, weight_decay, _, max_update = placed.group_scalars[table.group].tolist()[
        :13
    ]
    factors = control.factors_of(placed, batch, lambda table: len(table.params))
    for i, p in enumerate(table.params):
        step = table.steps[i]
        step += 1
        if table.bias_weights:
            W = table.bias_weights[i]
            W[0] = w1_a * W[0] + w1_b
            W[1] = beta2_used * W[1] + one_minus_beta2
            W1, W2 = W.tolist()
        else:
            W1, W2 = 1 - beta1 ** step.item(), 1 - beta2 ** step.item()
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        v_max = table.max_exp_avg_sqs[i] if amsgrad else None
        state = (table.exp_avgs[i], table.exp_avg_sqs[i], v_max)
        new = adam_element(
            p.to(dtype),
            table.grads[i].to(dtype),
            *(None if x is None else x.to(dtype) for x in state),
            S=S if factors is None else S * float(factors[i]),
            a=a,
            b=b,
            beta2=beta2_used,
            one_minus_beta2=one_minus_beta2,
            W1=W1,
            W2=W2,
            lr=lr,
            eps=eps,
            decay=1.0 if coupled else 1 - lr * weight_decay,
            l2=weight_decay if coupled else 0.0,
            max_update=max_update,
            rule=overshoot,
            block=block,
        )
        for old, value in zip((p, *state), new):
            if old is not None:
                old.copy_(value)
    if grad_square_sum is not None:
        total = sum((g.double().square().sum() for g in table.grads), torch.zeros((), dtype=torch.float64))
        grad_square_sum += total.to(grad_square_sum.device) * unscale**2
