"""Closed forms: how far Adam's momentum carries a parameter after its gradient has become zero, and bytes moved.

Notation of a coast: T gradient steps, then k steps whose gradient is exactly zero. Distances are in units of the last
update before it. With `MomentumBrake`, c is the share of the policy gradient that clipping suppressed, the same in
each of the k steps and 0 in the T steps before.

Source: arXiv 2601.05002, App. D.2 (with k counted from the last non-zero gradient), generalised to finite T and eps;
the brake's part: this project, from the recurrences of its update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fused_clip_adam.rules import (
    MomentumBrake,
    SpikeClip,
    as_grad_clip,
    as_overshoot,
    as_reset,
    grad_clip_rules,
    overshoot_rules,
)
from fused_clip_adam.rules.rule import count

_CONVERGED = 1e-16  # a rest below this share of a sum does not change it in float64


def residual_ratio(
    k: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    *,
    history: float = math.inf,
    eps: float = 0.0,
    v_hat: float = 1.0,
    strength: float = 0.0,
    c: float = 1.0,
    mode: str = "renormalise",
    hold_v: float = 0.0,
) -> float:
    """R_k: the update k >= 0 steps after the gradient became exactly zero, over the last update before.

    R_k = A_k (sqrt(v_hat) + eps) / (sqrt(v_hat B_k) + eps), where with a = beta1 (1 - strength c) and
    b = 1 - (1 - beta2)(1 - hold_v c)

    A_k = a^k (1 - beta1^T) / (1 - w^k beta1^T), w = a ("renormalise") or beta1 ("damp"),
    B_k = b^k (1 - beta2^T) / (1 - b^k beta2^T).

    That is m <- a m and 1 - W1 <- w (1 - W1), the second moment likewise. Without a brake a = w = beta1, b = beta2.
    Decoupled weight decay leaves it unchanged. Never negative.

    Args:
        history: T, the gradient steps before; infinite for a long run.
        eps: the optimizer's eps; at 0 the result does not depend on `v_hat` or on what the gradients were.
        v_hat: the bias-corrected second moment at step T.
        strength, mode, hold_v: of `MomentumBrake`; 0 and 0 are plain AdamW.
        c: suppressed_mass / total_mass of each of the k steps; 1 where everything was clipped.

    Raises:
        ValueError: k < 0, history < 1, a beta outside [0, 1), a negative or infinite eps or v_hat, c outside [0, 1];
            the brake's numbers as `MomentumBrake`; beta2 = eps = 0, where the update divides by 0.
        OverflowError: beta1 > sqrt(beta2) and a k at which R_k exceeds float64.
    """
    if not k >= 0:
        raise ValueError(f"k must be at least 0, got {k!r}")
    return _coast(beta1, beta2, history, eps, v_hat, strength, c, mode, hold_v).ratio(k)


def coast_after(
    k: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    *,
    history: float = math.inf,
    eps: float = 0.0,
    v_hat: float = 1.0,
    strength: float = 0.0,
    c: float = 1.0,
    mode: str = "renormalise",
    hold_v: float = 0.0,
) -> float:
    """R_1 + ... + R_k: how far a parameter has coasted after k steps, in units of the last update.

    Args:
        k, beta1, ..., hold_v: as `residual_ratio`.

    Raises:
        As `residual_ratio`.
    """
    if not k >= 0:
        raise ValueError(f"k must be at least 0, got {k!r}")
    coast = _coast(beta1, beta2, history, eps, v_hat, strength, c, mode, hold_v)
    return math.fsum(coast.ratio(j) for j in range(1, k + 1))


def total_coast(
    beta1: float = 0.9,
    beta2: float = 0.999,
    *,
    history: float = math.inf,
    eps: float = 0.0,
    v_hat: float = 1.0,
    strength: float = 0.0,
    c: float = 1.0,
    mode: str = "renormalise",
    hold_v: float = 0.0,
) -> float:
    """Sum of R_k over k >= 1, in units of the last update.

    For a long history and eps = 0 it is a / (sqrt(b) - a), with a and b of `residual_ratio` (without a brake beta1 and
    beta2); otherwise summed term by term until a bound of the rest is below 1e-16 of the sum.

    Args:
        beta1, ..., hold_v: as `residual_ratio`.

    Raises:
        ValueError: as `residual_ratio`; eps = 0 and a^2 >= b, where the coast never ends.
    """
    coast = _coast(beta1, beta2, history, eps, v_hat, strength, c, mode, hold_v)
    total = coast.total()
    if total == math.inf:
        raise ValueError(
            f"the coast never ends: eps = 0 needs beta1 (1 - strength c) < sqrt(beta2), got {coast.a!r} for "
            f"beta1={beta1!r} and {math.sqrt(coast.b)!r} for beta2={beta2!r}"
        )
    return total


def required_strength(
    budget: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    *,
    history: float = math.inf,
    eps: float = 0.0,
    v_hat: float = 1.0,
    c: float = 1.0,
    mode: str = "renormalise",
    hold_v: float = 0.0,
) -> float:
    """The smallest `MomentumBrake` strength under which `total_coast` is at most `budget` updates.

    For a long history and eps = 0 it is (1 - sqrt(b) budget / ((1 + budget) beta1)) / c, or 0 if that is negative, in
    both modes. Otherwise it is found by bisection, which ends between two neighbouring float64: every R_k falls as the
    strength grows.

    Args:
        budget: the greatest coast that is allowed, in units of the last update; at least 0.
        beta1, ..., hold_v: as `residual_ratio`. A brake acts by strength times c: plan for the c you will see.

    Returns:
        A strength in [0, 1]; 0 where plain AdamW (with `hold_v`) keeps within the budget.

    Raises:
        ValueError: as `residual_ratio`; budget negative, infinite or NaN; a budget below what strength 1 leaves, which
            the message says.
    """
    if not 0.0 <= budget < math.inf:
        raise ValueError(f"budget must be a finite number of updates, at least 0, got {budget!r}")

    def coast(strength: float) -> _Coast:
        return _coast(beta1, beta2, history, eps, v_hat, strength, c, mode, hold_v)

    if coast(0.0).total(budget) <= budget:
        return 0.0
    least = coast(1.0).total()
    if least > budget:
        raise ValueError(
            f"budget={budget!r} is out of reach: at c={c!r} a brake of strength 1 still coasts {least:.6g} updates"
        )
    if coast(0.0).is_geometric:
        strength = (1 - math.sqrt(coast(0.0).b) * budget / ((1 + budget) * beta1)) / c
        return min(max(strength, 0.0), 1.0)
    fails, holds = 0.0, 1.0
    while True:
        middle = (fails + holds) / 2
        if not fails < middle < holds:
            return holds
        if coast(middle).total(budget) <= budget:
            holds = middle
        else:
            fails = middle


@dataclass(frozen=True)
class _Coast:
    """The numbers of one coast: m <- a m, v <- b v, 1 - W1 <- w (1 - W1), 1 - W2 <- b (1 - W2)."""

    a: float
    w: float
    b: float
    past1: float
    """1 - W1 when the gradient became zero: beta1^T."""
    past2: float
    root: float
    """sqrt(v_hat)"""
    eps: float

    @property
    def is_geometric(self) -> bool:
        return self.eps == 0 and self.past1 == 0 and self.past2 == 0

    def momentum(self, k: int) -> float:
        """A_k"""
        return self.a**k * (1 - self.past1) / (1 - self.w**k * self.past1)

    def ratio(self, k: int) -> float:
        correction = (1 - self.past2) / (1 - self.b**k * self.past2)
        if self.eps == 0:  # b^k alone would underflow long before the quotient does
            of_momentum = (1 - self.past1) / (1 - self.w**k * self.past1)
            return (self.a / math.sqrt(self.b)) ** k * of_momentum / math.sqrt(correction)
        size = self.root * math.sqrt(self.b**k * correction)
        return self.momentum(k) * (self.root + self.eps) / (size + self.eps)

    def rest(self, k: int) -> float:
        """At least the sum of R_j over j > k, by geometric series.

        A_(j+1) / A_j <= a, and sqrt(B_j / B_(j+1)) falls with j towards 1 / sqrt(b), which bounds the quotient of the
        denominators; so does, with eps, that no denominator is below eps.
        """
        bounds = [math.inf]
        growth = math.sqrt((1 - self.b ** (k + 1) * self.past2) / (1 - self.b**k * self.past2))
        if (q := self.a * growth) < (slowest := math.sqrt(self.b)):
            bounds.append(self.ratio(k) * q / (slowest - q))
        if self.eps > 0:
            bounds.append(self.momentum(k) * self.a / (1 - self.a) * (self.root + self.eps) / self.eps)
        return min(bounds)

    def total(self, limit: float = math.inf) -> float:
        """Sum of R_k over k >= 1; as soon as that is known to be above, or at most, `limit`: the sum so far."""
        if self.eps == 0 and self.a >= math.sqrt(self.b):
            return math.inf
        if self.is_geometric:
            return self.a / (math.sqrt(self.b) - self.a)
        terms, so_far, k = [], 0.0, 0
        while True:
            k += 1
            terms.append(self.ratio(k))
            so_far += terms[-1]
            rest = self.rest(k)
            if so_far > limit or so_far + rest <= limit < math.inf or rest <= _CONVERGED * so_far:
                return math.fsum(terms)


def _coast(
    beta1: float,
    beta2: float,
    history: float,
    eps: float,
    v_hat: float,
    strength: float,
    c: float,
    mode: str,
    hold_v: float,
) -> _Coast:
    """Checks the numbers and turns them into a coast's."""
    MomentumBrake(strength, mode, hold_v)  # its errors
    if not history >= 1:
        raise ValueError(f"history must be at least 1, got {history!r}")
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"betas must be in [0, 1), got beta1={beta1!r}, beta2={beta2!r}")
    for name, value in (("eps", eps), ("v_hat", v_hat)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    if not 0.0 <= c <= 1.0:
        raise ValueError(f"c must be in [0, 1], got {c!r}")
    a, b = beta1 * (1 - strength * c), 1 - (1 - beta2) * (1 - hold_v * c)
    if b == 0 and eps == 0:
        raise ValueError("beta2=0 needs eps > 0: without a gradient the second moment is 0, and divided by")
    w = a if mode == "renormalise" else beta1
    return _Coast(a, w, b, beta1**history, beta2**history, math.sqrt(v_hat), eps)


def bytes_per_element(
    param: int = 4,
    grad: int = 4,
    state: int = 4,
    *,
    norm: bool = False,
    amsgrad: bool = False,
    grad_clip: Any = None,
    overshoot: Any = None,
    reset: Any = None,
    samples: int | None = None,
    sample_norms: bool = False,
) -> int:
    """Bytes a step must move per parameter element, reading and writing.

    Reads p, g, m, v and writes p, m, v; a norm of this step's gradients reads g once more; amsgrad adds a state; a rule
    that sums over tensors before the update reads what it sums. Numbers by tensor or output row are not counted.

    Args:
        param, grad, state: widths in bytes of an element of each.
        norm: this step's norm is needed whatever the rules: `skip_nonfinite=True`, or a clip of another group.
        amsgrad, grad_clip, overshoot, reset: as `FusedClipAdamW`, any combination that it accepts.
        samples: of `step_from_scores`: a gradient is summed up from so many samples (those of weight 0 are not read)
            each time it is needed, and `grad` is the width of a score. None: `step()`.
        sample_norms: of `step_from_scores`: `max_sample_norm` is given.

    Raises:
        ValueError, TypeError: as `FusedClipAdamW`, for rules that do not go together.
    """
    clips, shapes = grad_clip_rules(as_grad_clip(grad_clip)), overshoot_rules(as_overshoot(overshoot))
    rules = (*clips, *shapes, *(() if as_reset(reset) is None else (reset,)))
    if samples is not None:
        grad *= count("bytes_per_element", "samples", samples, 0)
    width = {"param": param, "grad": grad, "exp_avg": state, "exp_avg_sq": state}
    total = 2 * param + grad + 4 * state + (2 * state if amsgrad else 0)
    if norm or any(rule.needs_norm for rule in rules):
        total += grad
    if sample_norms:
        total += grad
    spiked = any(isinstance(rule, SpikeClip) for rule in rules)
    for rule in rules:
        reads = set(rule.extra_reads)
        if "exp_avg" in reads and spiked:  # what is a spike shows beside v
            reads.add("exp_avg_sq")
        total += sum(width[name] for name in reads)
    return total
