"""The optimizer step as equations. Same names, same order as csrc/update_math.h.

The phases of a step, for one batch (tensors of one device and dtype in one parameter group):

    tensor_table     -> a batch's tensors, checked
    place            -> the tables of all batches where the kernels read them
    grad_square_sums -> sums of squares of the raw gradients, float64 (by_tensor: of each)
    prologue         -> scalars of every tensor, float64, see scalars.py; rules change them, from the sums of
                        `reduce` and `unit_sums` if they need any
    update_          -> parameters and moments, in place, batch by batch

Arithmetic is float32, float64 for float64 parameters; scalars are prepared in float64.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_clip_adam.backends import scalars

RENORMALISE, DAMP = 1, 2
NONE, ALIGN_BLOCK, ALIGN_ELEMENT, CAUTIOUS, GRAMS, ATAN2, FADAM = range(7)


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
    stacks: list[Tensor] = dataclasses.field(default_factory=list)  # of samples, whose gradients `grads` are by now
    gradients_formed: bool = False


def tensor_table(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, bias_weights, group, samples: int = -1
) -> Table:
    """Checks a batch's tensors and returns them as a `Table`.

    Args:
        samples: where not negative, every gradient is a stack of so many samples, [samples, *shape].

    Raises:
        RuntimeError: a shape or dtype that does not fit, or an expanded (self-overlapping) tensor to be written.
    """
    table = Table(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, bias_weights, group)
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs}
    for i, p in enumerate(params):
        tensors = {"params": p, "grads": grads[i], **{k: v[i] for k, v in states.items() if v}}
        if samples >= 0 and tensors.pop("grads").shape != (samples, *p.shape):
            raise RuntimeError(f"grads[{i}] must be a stack of {samples} samples of the shape of params[{i}]")
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
    samples: Any = None  # PlacedSamples of samples.py


def place(
    tables: list,
    group_scalars: Tensor,
    blocks: list[int],
    kept: Any,
    device: Any,
    capturable: bool,
    samples: Any = None,
) -> Placed:
    """The tables of a device's batches as they are. The GPU backends copy them, see device_table.py."""
    return Placed(tables, group_scalars, samples)


def _with_gradients(placed: Placed, batch: int) -> Table:
    """A batch whose `grads` are gradients: of samples they are formed when first read, the weights then final."""
    table = placed.tables[batch]
    if placed.samples is None or table.gradients_formed:
        return table
    first = sum(len(earlier.params) for earlier in placed.tables[:batch])
    table.stacks, table.gradients_formed = table.grads, True
    table.grads = [
        gradient_of(p, stack, placed.samples, first + i) for i, (p, stack) in enumerate(zip(table.params, table.stacks))
    ]
    return table


def gradient_of(p: Tensor, stack: Tensor, samples: Any, tensor: int) -> Tensor:
    """g = sum_b w_b S_b + noise, in the arithmetic type. `tensor`: of the parameter among all of the step."""
    keep = samples.weights != 0
    g = torch.tensordot(samples.weights[keep], stack[keep].double(), dims=1)
    g = g.to(torch.float64 if p.dtype == torch.float64 else torch.float32)
    if samples.seed is not None:
        g = g + (samples.noise * standard_normal(int(samples.seed), tensor, p.numel())).to(g).reshape(p.shape)
    return g


def sample_square_sums(placed: Placed) -> Tensor:
    """The sum of squares of every sample over all tensors: float64 [samples]; 0 for those of weight 0."""
    count = placed.samples.count
    stacks = [s.double().reshape(count, math.prod(s.shape[1:])) for table in placed.tables for s in table.grads]
    squares = torch.stack([stack.square().sum(1) for stack in stacks]).sum(0)
    return torch.where(placed.samples.weights != 0, squares, 0.0)


def standard_normal(seed: int, tensor: int, n: int) -> Tensor:
    """The noise of a tensor's elements, float64 [n]: Box-Muller on Philox4x32-10, as csrc/samples.h."""
    pair = torch.arange((n + 1) // 2, dtype=torch.int64, device="cpu")
    low, high = 0xFFFFFFFF, 32
    x = [pair & low, pair >> high, torch.full_like(pair, tensor & low), torch.full_like(pair, tensor >> high)]
    key = [seed & low, (seed >> high) & low]
    for _ in range(10):
        (p_high, p_low), (q_high, q_low) = _product(0xD2511F53, x[0]), _product(0xCD9E8D57, x[2])
        x = [q_high ^ x[1] ^ key[0], q_low, p_high ^ x[3] ^ key[1], p_low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    u, angle = (x[0].double() + 1) * 2.0**-32, 2 * math.pi * (x[1].double() * 2.0**-32)
    size = (-2 * u.log()).sqrt()
    return torch.stack([size * angle.cos(), size * angle.sin()], dim=1).reshape(-1)[:n]


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(upper, lower) 32 bits of a b, which int64 cannot hold whole."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # each below 2^48
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def grad_square_sums(placed: Placed) -> Tensor:
    """sum g^2 over raw gradients: float64 [tensors of all batches], to be added up."""
    return torch.stack([g.double().square().sum() for table in placed.tables for g in table.grads])


def by_tensor(placed: Placed, sums: Tensor) -> Tensor:
    """What `grad_square_sums` or `update_` (momentum_dots) gave, by tensor: float64 [tensors of all batches]."""
    return sums


def new_dots(placed: Placed, rows: int) -> Tensor:
    """Where `update_` leaves sums of m g; `rows`: tensors of all batches."""
    first = placed.tables[0].params[0]
    return torch.zeros(rows, dtype=torch.float64, device=first.device)


def prologue(
    placed: Placed,
    group_signals: Tensor | None,
    square_sums: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    observed: Tensor | None,
    grad_square_sum: Tensor,
    steps_skipped: Tensor,
    skip_nonfinite: bool,
) -> Tensor:
    """All scalars of a step, on the device, without a host read; every tensor's step and bias weights advance.

    Args:
        placed: its group_scalars, float64 [groups, 17], see scalars.py.
        group_signals: float64 [groups, 3], see scalars.py, or None where no rule resets.
        square_sums: float64 [n] of raw gradients, to be added up, or None where no rule needs the norm before the
            update.
        grad_scale, found_inf: as torch.amp.GradScaler hands them over, or None.
        observed: float32 [2], suppressed and total mass, or None.
        grad_square_sum: float64 0-d. In: the previous step's sum (for lag). Out: this step's where `square_sums` is
            given, else 0 for the update pass to add to; unchanged where found_inf skips the step.
        steps_skipped: int64 0-d, counted up where the step is skipped.

    Returns:
        scalars, float64 [tensors of all batches, 24], see scalars.py.
    """
    group = placed.group_scalars.to(grad_square_sum.device)
    beta1, beta2, max_norm, lag, sign, brake_mode, strength, hold_v = group.unbind(1)[:8]
    one = torch.ones((), dtype=torch.float64, device=group.device)
    forget = restart = torch.zeros_like(beta1)
    if group_signals is not None:
        forget, restart, beta1_factor = group_signals.unbind(1)
        beta1 = beta1 * beta1_factor

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
    columns += (forget, restart)
    control = torch.stack([column.expand_as(beta1) for column in columns], dim=1)
    none = torch.zeros(0, scalars.WIDTH, dtype=torch.float64, device="cpu")
    return torch.cat([none, *(tensor_scalars(table, group, control) for table in placed.tables)]).to(group.device)


def tensor_scalars(table: Table, group_scalars: Tensor, control: Tensor) -> Tensor:
    """The scalars of each tensor of a batch, whose step and bias weights advance: float64 [tensors, 24]."""
    group = dict(zip(scalars.GROUP_SCALARS, group_scalars[table.group].tolist()))
    signals = dict(zip(scalars.CONTROL, control[table.group].tolist()))
    rows = []
    for i, step in enumerate(table.steps):
        if signals["skip"]:
            rows.append([1.0] + [0.0] * (scalars.WIDTH - 1))
            continue
        if signals["restart"]:
            step.zero_()
        step += 1
        if table.bias_weights:
            W = table.bias_weights[i]
            if signals["restart"]:
                W.zero_()
            W[0] = signals["w1_a"] * W[0] + signals["w1_b"]
            W[1] = signals["beta2"] * W[1] + signals["one_minus_beta2"]
            W1, W2 = W.tolist()
        else:
            W1, W2 = 1 - signals["w1_a"] ** step.item(), 1 - group["beta2"] ** step.item()
        coupled, lr = group["coupled"], group["lr"]
        decay = 1.0 if coupled else 1 - lr * group["weight_decay"]
        own = {
            **{
                name: signals[name] for name in ("skip", "unscale", "grad_factor", "a", "b", "beta2", "one_minus_beta2")
            },
            "inv_w1": 1 / W1,
            "inv_sqrt_w2": 1 / W2**0.5,
            "eps": group["eps"] / W2**0.5 if group["eps_early"] else group["eps"],
            "lr": lr * decay if group["decay_after"] else lr,
            "decay": decay,
            "l2": group["weight_decay"] if coupled else 0.0,
            "max_update": group["max_update"],
            "forget": signals["forget"],
            "keep": 1.0,
            "theta": math.inf,
            "spike_floor": 0.0,
            "tau": math.inf,
            "tau_factor": 1.0,
            "prox": 0.0,
        }
        rows.append([own[name] for name in scalars.SCALARS] + [0.0] * (scalars.WIDTH - len(scalars.SCALARS)))
    return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(-1, scalars.WIDTH)


def block_gate(m: Tensor, g: Tensor, block: int) -> Tensor:
    """k per element, True where sum m g over the element's block of consecutive elements is positive."""
    block = min(block, max(m.numel(), 1))
    products = (m.double() * g.double()).reshape(-1)
    padding = -products.numel() % block
    sums = torch.nn.functional.pad(products, (0, padding)).reshape(-1, block).sum(1)
    return (sums > 0).repeat_interleave(block)[: products.numel()].reshape(m.shape)


def scaled_grad(p: Tensor, g: Tensor, s: dict[str, float]) -> Tensor:
    """g <- S g (+ l2 p), with what lies above tau brought down first"""
    if s["tau"] != math.inf:
        g = torch.where(g.abs() > s["tau"], g * s["tau_factor"], g)
    g = g * s["grad_factor"]
    return g + s["l2"] * p if s["l2"] else g


def remembered(x: Tensor | None, s: dict[str, float]) -> Tensor | None:
    """A moment as the step finds it: zero where it is forgotten first."""
    return torch.zeros_like(x) if x is not None and s["forget"] == scalars.FORGET_BEFORE else x


def seen_grad(p: Tensor, g: Tensor, v: Tensor, s: dict[str, float]) -> Tensor:
    """The gradient as the update sees it: `scaled_grad` with spikes brought down. v: exp_avg_sq before."""
    g = scaled_grad(p, g, s)
    if s["theta"] == math.inf:
        return g
    most = (s["theta"] * v).sqrt()
    return torch.where((g * g > s["theta"] * v) & (v > s["spike_floor"]), torch.where(g < 0, -most, most), g)


def moved_momentum(m: Tensor, g: Tensor, s: dict[str, float]) -> Tensor:
    """m' = a m + b g, and clamp(g - m, -prox, prox)"""
    m_new = s["a"] * m + s["b"] * g
    return m_new + (g - m).clamp(-s["prox"], s["prox"]) if s["prox"] else m_new


def scaled_units(p: Tensor, g: Tensor, factors: Tensor) -> Tensor:
    """The gradient times a factor of each output row."""
    if g.numel() == 0:
        return g
    return (g.reshape(p.shape[0] if p.dim() > 1 else 1, -1) * factors.to(g.dtype)[:, None]).reshape(g.shape)


def momentum_dot(m: Tensor, g: Tensor) -> Tensor:
    """sum m g, less a number too small for anything else where m is not 0: the sum is 0 only where all of m is."""
    return (m.double() * g.double() - 1e-300 * (m != 0).double()).sum()


def update_element(p, g, m, v, v_max, s, rule, block):
    """One step of the update, elementwise; returns new p, m, v, v_max.

    g <- S g (+ l2 p) ; m' = a m + b g ; v' = beta2 v + (1 - beta2) g g
    u  = d / W1 / (sqrt(v') / sqrt(W2) + eps), at most max_update ; p <- decay p - lr u
    """
    m, v, v_max = (remembered(x, s) for x in (m, v, v_max))
    g = seen_grad(p, g, v, s)
    v_new = s["beta2"] * v + s["one_minus_beta2"] * g * g
    v_used = v_new if v_max is None else torch.maximum(v_max, v_new)
    root = v_used.sqrt()
    if rule == FADAM:  # inv_w1 clips the natural gradient, inv_sqrt_w2 is the weight of the natural decay
        base = root + s["eps"]
        m_new = s["a"] * m + s["b"] * (g / base * s["inv_w1"])
        u = m_new + s["inv_sqrt_w2"] * (p / base)
    else:
        bg = s["b"] * g
        m_new = moved_momentum(m, g, s)
        d = m_new
        if rule == ALIGN_BLOCK:
            d = torch.where(block_gate(m, g, block), m_new, bg)
        elif rule == ALIGN_ELEMENT:
            d = torch.where(m.sign() * g.sign() > 0, m_new, bg)
        if not s["keep"]:
            d = bg
        size = root * s["inv_sqrt_w2"]
        if rule == ATAN2:
            u = s["max_update"] * (2 / math.pi * torch.atan2(d * s["inv_w1"], size))
        else:
            u = (d * s["inv_w1"] / (size + s["eps"])).clamp(-s["max_update"], s["max_update"])
        if rule == CAUTIOUS:
            u = torch.where(m_new.sign() * g.sign() > 0, u, torch.zeros_like(u))
        elif rule == GRAMS:
            u = g.sign() * u.abs()
    p = p * s["decay"] - s["lr"] * u
    state = (m_new, v_new, None if v_max is None else v_used)
    if s["forget"] == scalars.FORGET_AFTER:
        state = tuple(None if x is None else torch.zeros_like(x) for x in state)
    return p, *state


def summand(kind: int, p, g, m, v, s) -> tuple[Tensor, Tensor | None]:
    """What each element adds to the sums of a reduction; the second of SQUARES_MAX is a maximum. See update_math.h."""
    if kind == scalars.SQUARES_MAX:
        return g.double().square(), g.double().abs()
    if kind == scalars.TAU_SQUARES:
        return scaled_grad(p, g, s).double().square(), None
    m, v = remembered(m, s), remembered(v, s)
    g = seen_grad(p, g, v, s)
    if kind == scalars.DOT:
        return m.double() * g.double(), None
    if kind == scalars.AGREE:
        return (moved_momentum(m, g, s).sign() * g.sign() > 0).double(), None
    root = (s["beta2"] * v + s["one_minus_beta2"] * g * g).sqrt()
    if kind == scalars.FADAM_SQUARES:
        base = root + s["eps"]
        return (g / base).double().square(), (p / base).double().square()
    size = root * s["inv_sqrt_w2"]
    if kind == scalars.RMS:
        return (g / size.clamp(min=s["eps"])).double().square(), None
    return g.double().square() / (size + s["eps"]).double(), None


def _arithmetic(p: Tensor, *tensors: Tensor | None) -> tuple:
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return tuple(None if x is None else x.to(dtype) for x in (p, *tensors))


def reduce(
    placed: Placed,
    values: Tensor | None,
    batch: int,
    first: int,
    kind: int,
    coupled: bool,
    spiked: bool,
    unit_factors: Tensor | None,
) -> Tensor:
    """Sums over the elements of each tensor of a batch: float64 [tensors, 2], see `summand`.

    Args:
        values: the prologue's, [tensors of all batches, 24]; None for SQUARES_MAX. first: the batch's first row there.
        kind: see scalars.py. coupled: weight decay is an L2 term of the gradient.
        spiked: False promises that no rule brings spikes down, so that `exp_avg_sq` need not be read for them.
        unit_factors: as of `update_`. The sums are over the gradient that it sees.
    """
    table, out = _with_gradients(placed, batch), []
    factors = _by_tensor(table, unit_factors)
    for i, p in enumerate(table.params):
        s = {} if values is None else _row(values, first + i)
        s = s if coupled else {**s, "l2": 0.0}
        own_p, g, *moments = _arithmetic(p, table.grads[i], table.exp_avgs[i], table.exp_avg_sqs[i])
        g = g if factors is None else scaled_units(p, g, factors[i])
        x, y = summand(kind, own_p, g, *moments, s)
        if y is None:
            second = torch.zeros_like(x.sum())
        elif kind == scalars.SQUARES_MAX:
            second = y.amax() if y.numel() else torch.zeros_like(x.sum())
        else:
            second = y.sum()
        out.append(torch.stack([x.sum(), second]))
    return torch.stack(out)


def unit_sums(placed: Placed, batch: int) -> Tensor:
    """Sums of squares over each output row of a batch's tensors, gradients and parameters: float64 [output rows, 2].

    An output row is one index of the first dimension; a tensor of fewer than two dimensions is one.
    """
    table = _with_gradients(placed, batch)
    pairs = [(_units(g).square().sum(1), _units(p).square().sum(1)) for g, p in zip(table.grads, table.params)]
    return torch.cat([torch.stack(pair, dim=1) for pair in pairs])


def _units(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return x.new_empty((0, 1), dtype=torch.float64)
    return x.double().reshape(x.shape[0] if x.dim() > 1 else 1, -1)


def _by_tensor(table: Table, unit_factors: Tensor | None) -> tuple[Tensor, ...] | None:
    if unit_factors is None:
        return None
    return unit_factors.split([(p.shape[0] if p.dim() > 1 else 1) if p.numel() else 0 for p in table.params])


def _row(values: Tensor, row: int) -> dict[str, float]:
    return dict(zip(scalars.SCALARS, values[row].tolist()))


def update_(
    placed: Placed,
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
    """Updates a batch in place; changes nothing where its scalars say skip.

    Args:
        values: the prologue's, as rules have changed it: [tensors of all batches, 24]. first: the batch's first row.
        overshoot, block: which rule shapes the update, and elements that share a gate.
        guarded: False promises that every column from `forget` on is as the prologue wrote it, and no reset.
        unit_factors: float64 [output rows of the batch], or None: a factor of the gradient of each.
        momentum_dots: of `new_dots`, or None: receives sum m g of each tensor, before the update.
        grad_square_sum: float64 0-d, or None: the batch's sum of squares of unscaled gradients is added.
    """
    table = placed.tables[batch]
    if not table.params or values[first, 0]:
        return
    table = _with_gradients(placed, batch)
    factors = _by_tensor(table, unit_factors)
    for i, p in enumerate(table.params):
        s = _row(values, first + i)
        grad, v_max = table.grads[i], table.max_exp_avg_sqs[i] if amsgrad else None
        state = (table.exp_avgs[i], table.exp_avg_sqs[i], v_max)
        own_p, g, *own_state = _arithmetic(p, grad, *state)
        if factors is not None:
            g = scaled_units(p, g, factors[i])
        if momentum_dots is not None:
            m, v = (remembered(x, s) for x in own_state[:2])
            momentum_dots[first + i] = momentum_dot(m, seen_grad(own_p, g, v, s))
        new = update_element(own_p, g, *own_state, s, overshoot, block)
        for old, value in zip((p, *state), new):
            if old is not None:
                old.copy_(value)
    if grad_square_sum is not None:
        total = sum((g.double().square().sum() for g in table.grads), torch.zeros((), dtype=torch.float64))
        grad_square_sum += total.to(grad_square_sum.device) * float(values[first, 1]) ** 2
