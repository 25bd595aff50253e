"""Gradient clipping rules: norms of this step's gradients -> the factor by which each tensor's gradient is scaled.

`GlobalNorm` is computed inside the prologue kernel. The others are a handful of torch operations on numbers between the
prologue and the update, on the gradients' device and without a host read; what they remember (`memory`) lies there too.
A step that carries no information, whose norm is 0 or not finite or which `found_inf` skips, leaves it unchanged.

Rules shape different parts of a step: its "gradient" (most of them), single "element"s of it, or the size of the
"update"; rules of different parts can be given together, as a tuple.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fused_clip_adam.backends import scalars
from fused_clip_adam.rules.rule import Rule, count, flag, fraction, is_number, parts_of, positive, within

if TYPE_CHECKING:
    from fused_clip_adam.group_step import GroupStep

Memory = dict[str, Tensor]


class GradClip(Rule):
    """Base of the rules accepted as `grad_clip=`."""

    in_prologue: ClassVar[bool] = False  # the prologue kernel computes the factor itself
    parts: ClassVar[tuple[str, ...]] = ("gradient",)
    lag: bool = False  # True: does not need this step's norm before the update
    needs_norm: bool = True

    @property
    def acts(self) -> bool:
        return not self.in_prologue

    def factors(self, norm: Tensor, norms: Tensor | None, memory: Memory, usable: Tensor) -> Tensor:
        """The factors of a step; takes its norms into `memory`, in place, where `usable`.

        Args:
            norm: float64 0-d, over all gradients of the optimizer, unscaled.
            norms: float64 [n], of the group's tensors (`per_tensor`); NaN where a parameter has no gradient.
            usable: bool 0-d.

        Returns:
            float64, 0-d or [n].
        """
        raise NotImplementedError

    def apply(self, step: GroupStep) -> None:
        norms = step.norms() if self.per_tensor else None
        step.multiply("grad_factor", self.factors(step.norm, norms, step.memory, step.usable))


def _coefficient(norm: Tensor, bound: Tensor | float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_: min(1, bound / (norm + 1e-6)); a NaN norm stays NaN."""
    coefficient = bound / (norm + 1e-6)
    return torch.where(coefficient > 1.0, 1.0, coefficient)


@dataclass(frozen=True)
class GlobalNorm(GradClip):
    """Scales the gradients by min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does.

    The norm is the L2 norm over all gradients of the optimizer (every parameter group), after unscaling by a
    GradScaler. A group without the rule is counted in the norm but not scaled.

    Args:
        max_norm: the largest norm, in the gradients' unit; positive.
        lag: False reads the gradients once more, before the update, for this step's norm. True compares the
            *previous* step's norm instead, gathered inside the update pass, so that the whole step is one pass over
            memory; the first step, and one after a non-finite norm, is not scaled. A spike is then clipped one step
            late: the step that carries it is not.

    Raises:
        ValueError: `max_norm` is not a positive number.

    Source: Pascanu et al. 2013 (arXiv 1211.5063), torch.nn.utils.clip_grad_norm_.
    """

    of_all: ClassVar[bool] = True
    in_prologue: ClassVar[bool] = True

    max_norm: float
    lag: bool = False

    @property
    def needs_norm(self) -> bool:  # type: ignore[override]
        return not self.lag

    def __post_init__(self) -> None:
        if not (isinstance(self.max_norm, (int, float)) and self.max_norm > 0 and not math.isnan(self.max_norm)):
            raise ValueError(f"GlobalNorm: max_norm must be a positive number, got {self.max_norm!r}")
        object.__setattr__(self, "max_norm", float(self.max_norm))


@dataclass(frozen=True)
class PerTensorNorm(GradClip):
    """Scales each parameter's gradient by min(1, max_norm / (its own norm + 1e-6)): component-wise clipping.

    Args:
        max_norm: the largest L2 norm of a tensor's gradient, in the gradients' unit; positive.

    Raises:
        ValueError: `max_norm` is not a positive number.

    Source: `torch.nn.utils.clip_grad_norm_` called for every parameter, as composable-recipe trainers do.
    """

    per_tensor: ClassVar[bool] = True

    max_norm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", positive("PerTensorNorm", "max_norm", self.max_norm))

    def factors(self, norm: Tensor, norms: Tensor, memory: Memory, usable: Tensor) -> Tensor:
        return _coefficient(norms, self.max_norm)


@dataclass(frozen=True)
class AutoClip(GradClip):
    """Clips the global norm at a percentile of the norms seen so far, this step's included.

    n -> history -> threshold = its percentile (linear interpolation) -> min(1, threshold / (n + 1e-6))

    Args:
        percentile: in [0, 100].
        history: how many norms are kept, the newest; None keeps all. Sorting them is the rule's cost, in every step: a
            few microseconds for thousands. With None the memory grows with training, which a CUDA graph cannot: give a
            number there.

    State: `norms` [history], `count`, `next`, in the optimizer's state dict.

    Raises:
        ValueError: a number outside its range.

    Source: Seetharaman et al. 2020 (arXiv 2007.14469).
    """

    of_all: ClassVar[bool] = True

    percentile: float = 10.0
    history: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "percentile", within("AutoClip", "percentile", self.percentile, 0, 100))
        if self.history is not None:
            count("AutoClip", "history", self.history)

    def memory(self, tensors: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"norms": ((self.history or 256,), math.inf), "count": ((), 0.0), "next": ((), 0.0)}

    def grown(self, memory: Memory, steps: int) -> Memory:
        """The memory with room for two more norms, where at most `steps` have been seen: `next` must not wrap."""
        norms = memory["norms"]
        if self.history is not None or steps + 1 < norms.numel():
            return memory
        return {**memory, "norms": torch.cat([norms, torch.full_like(norms, math.inf)])}

    def factors(self, norm: Tensor, norms: Tensor, memory: Memory, usable: Tensor) -> Tensor:
        kept, count, at = memory["norms"], memory["count"], memory["next"]
        place = torch.arange(kept.numel(), dtype=kept.dtype, device=kept.device) == at
        kept.copy_(torch.where(place & usable, norm, kept))
        count.copy_(torch.where(usable, (count + 1).clamp(max=kept.numel()), count))
        at.copy_(torch.where(usable, torch.remainder(at + 1, kept.numel()), at))
        ordered = kept.sort().values  # what is not yet there is infinite, and last
        position = (count - 1).clamp(min=0) * (self.percentile / 100)
        low = position.floor()
        low_value = ordered[low.long().reshape(1)].reshape(())
        high_value = ordered[torch.minimum(low + 1, (count - 1).clamp(min=0)).long().reshape(1)].reshape(())
        threshold = low_value + (high_value - low_value) * (position - low)
        threshold = torch.where(count > 0, threshold, math.inf)
        return _coefficient(norm, threshold)


@dataclass(frozen=True)
class ZClip(GradClip):
    """Clips the global norm where its z-score against moving statistics is too large.

    The first `warmup` norms are collected, and clipped at `max_norm`; they give mean mu and variance. After that
    z = (n - mu) / (sigma + eps); a spike, z > z_threshold, is brought down to
    clip_factor (mu + z_threshold sigma / (z / z_threshold)), mode "adaptive", to mu, "mean", or to
    mu + z_threshold sigma, "percentile"; and at most `max_norm` in any case. The statistics take in what the spike
    was brought down to.

    Args:
        alpha: of the moving averages, in [0, 1).
        z_threshold: positive.
        max_norm: also bounds what is no spike; None: no bound.
        warmup: steps, at least 1.
        mode: "adaptive", "mean" or "percentile".
        clip_factor: positive. eps: at least 0.

    State: `norms` [warmup], `count`, `mean`, `variance`, in the optimizer's state dict.

    Raises:
        ValueError: a number outside its range, or an unknown mode.

    Source: Kumar et al. 2025 (arXiv 2504.02507) and its published code.
    """

    of_all: ClassVar[bool] = True

    alpha: float = 0.97
    z_threshold: float = 2.5
    max_norm: float | None = 1.0
    warmup: int = 25
    mode: str = "adaptive"
    clip_factor: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        fraction("ZClip", "alpha", self.alpha)
        for name in ("z_threshold", "clip_factor", *(() if self.max_norm is None else ("max_norm",))):
            object.__setattr__(self, name, positive("ZClip", name, getattr(self, name)))
        object.__setattr__(self, "eps", within("ZClip", "eps", self.eps, 0.0, 1.0))
        count("ZClip", "warmup", self.warmup)
        if self.mode not in ("adaptive", "mean", "percentile"):
            raise ValueError(f'ZClip: mode must be "adaptive", "mean" or "percentile", got {self.mode!r}')

    def memory(self, tensors: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"norms": ((self.warmup,), 0.0), "count": ((), 0.0), "mean": ((), 0.0), "variance": ((), 0.0)}

    def factors(self, norm: Tensor, norms: Tensor, memory: Memory, usable: Tensor) -> Tensor:
        kept, count, mean, variance = (memory[name] for name in ("norms", "count", "mean", "variance"))
        warm = count < self.warmup
        place = torch.arange(self.warmup, dtype=kept.dtype, device=kept.device) == count
        kept.copy_(torch.where(place & usable, norm, kept))

        sigma = variance.sqrt()
        z = (norm - mean) / (sigma + self.eps)
        if self.mode == "adaptive":
            bound = self.clip_factor * (mean + self.z_threshold * sigma / (z / self.z_threshold))
        else:
            bound = mean if self.mode == "mean" else mean + self.z_threshold * sigma
        taken = torch.where((z > self.z_threshold) & ~warm, bound, norm)

        new_mean = self.alpha * mean + (1 - self.alpha) * taken
        new_variance = self.alpha * variance + (1 - self.alpha) * (taken - new_mean).square()
        last_of_warmup = count == self.warmup - 1
        new_mean = torch.where(warm, torch.where(last_of_warmup, kept.mean(), mean), new_mean)
        new_variance = torch.where(warm, torch.where(last_of_warmup, kept.var(correction=0), variance), new_variance)
        mean.copy_(torch.where(usable, new_mean, mean))
        variance.copy_(torch.where(usable, new_variance, variance))
        count.add_(usable)

        most = taken if self.max_norm is None else taken.clamp(max=self.max_norm)
        return torch.where(norm > most, most / (norm + 1e-6), 1.0)


@dataclass(frozen=True)
class AdaGC(GradClip):
    """Clips each parameter's gradient at a multiple of the moving average of its own norm.

    The first `start` steps clip the global norm n at `max_norm` (max_norm / (n + eps)) while gamma, of every tensor,
    is its smallest norm so far. After that a norm above ratio gamma is brought down to it, and
    gamma = beta gamma + (1 - beta) norm, with the norm brought down.

    Args:
        ratio: positive. beta: in [0, 1). start: steps, at least 1. max_norm: positive. eps: at least 0.

    State: `gamma` [parameters of the group], `count`, in the optimizer's state dict.

    Raises:
        ValueError: a number outside its range.

    Source: Wang et al. 2025 (arXiv 2502.11034).
    """

    of_all: ClassVar[bool] = True
    per_tensor: ClassVar[bool] = True

    ratio: float = 1.04
    beta: float = 0.99
    start: int = 100
    max_norm: float = 1.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("ratio", "max_norm"):
            object.__setattr__(self, name, positive("AdaGC", name, getattr(self, name)))
        fraction("AdaGC", "beta", self.beta)
        object.__setattr__(self, "eps", within("AdaGC", "eps", self.eps, 0.0, 1.0))
        count("AdaGC", "start", self.start)

    def memory(self, tensors: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"gamma": ((tensors,), math.inf), "count": ((), 0.0)}

    def factors(self, norm: Tensor, norms: Tensor, memory: Memory, usable: Tensor) -> Tensor:
        gamma, count = memory["gamma"], memory["count"]
        starting = count < self.start
        known = gamma.isfinite()  # a parameter whose first gradient comes late has no average yet
        limit = self.ratio * gamma
        spike = (norms > limit) & known
        late = torch.where(spike, limit / (norms + self.eps), 1.0)
        early = self.max_norm / (norm + self.eps)
        early = torch.where(early > 1.0, 1.0, early)

        moved = self.beta * gamma + (1 - self.beta) * torch.where(spike, limit, norms)
        moved = torch.where(known, moved, norms)
        new = torch.where(starting, torch.minimum(gamma, norms), moved)
        gamma.copy_(torch.where(usable & norms.isfinite() & (norms > 0), new, gamma))
        count.add_(usable)
        return torch.where(starting, early, late)


@dataclass(frozen=True)
class AGC(GradClip):
    """Adaptive gradient clipping: bounds the gradient of each output row by a share of the row's own norm.

    A row w, one index of the first dimension (a tensor of fewer than two dimensions is one row), with gradient g:
    where |g| > clipping max(|w|, eps), g is scaled by clipping max(|w|, eps) / max(|g|, 1e-6).

    Args:
        clipping: positive. eps: the least norm a row counts as, positive: rows that start at zero must be able to move.

    Raises:
        ValueError: a number is not positive.

    Costs one more read of parameters and gradients: 36 bytes an element in float32.

    Source: Brock et al. 2021 (arXiv 2102.06171).
    """

    needs_norm: ClassVar[bool] = False
    guarded: ClassVar[bool] = True  # the factors of rows
    extra_reads: ClassVar[tuple[str, ...]] = ("grad", "param")

    clipping: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("clipping", "eps"):
            object.__setattr__(self, name, positive("AGC", name, getattr(self, name)))

    def apply(self, step: GroupStep) -> None:
        step.scale_rows(self.row_factors)

    def row_factors(self, grad_norms: Tensor, param_norms: Tensor) -> Tensor:
        """float64 [output rows], from the same of unscaled gradients and of parameters."""
        most = self.clipping * param_norms.clamp(min=self.eps)
        return torch.where(grad_norms > most, most / grad_norms.clamp(min=1e-6), 1.0)


@dataclass(frozen=True)
class SpikeClip(GradClip):
    """Brings single gradients that are huge against their own history down: g^2 > theta v becomes theta v.

    v is `exp_avg_sq` before the step; the sign stays.

    Args:
        theta: positive.
        start: the first step that clips, and how many steps after a reset of the moments do not.
        freeze_zero: also clips where v is 0, to 0, as SPAM's published code does: an element whose gradient was zero
            since the last reset then stays frozen until the next. Only to reproduce it.

    Goes with one rule of each other part, as a tuple: (1.0, SpikeClip()).

    State: `steps`, `since`, in the optimizer's state dict.

    Raises:
        ValueError, TypeError: a number outside its range.

    Source: SPAM, Huang et al. 2025 (arXiv 2501.06842).
    """

    needs_norm: ClassVar[bool] = False
    guarded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("element",)

    theta: float = 5000.0
    start: int = 20
    freeze_zero: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", positive("SpikeClip", "theta", self.theta))
        count("SpikeClip", "start", self.start, 0)
        flag("SpikeClip", "freeze_zero", self.freeze_zero)

    def memory(self, tensors: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"steps": ((), 0.0), "since": ((), math.inf)}

    def _since(self, step: GroupStep) -> Tensor:
        return torch.where(step.reset, 0.0, step.memory["since"] + 1)

    def apply(self, step: GroupStep) -> None:
        active = (step.memory["steps"] + 1 >= self.start) & (self._since(step) >= self.start)
        step.set("theta", torch.where(active, self.theta, math.inf))
        step.set("spike_floor", -1.0 if self.freeze_zero else 0.0)

    def after(self, step: GroupStep) -> None:
        own = step.memory
        own["since"].copy_(torch.where(step.informative, self._since(step), own["since"]))
        own["steps"].add_(step.informative)


@dataclass(frozen=True)
class StableSpamClip(GradClip):
    """AdaClip, then AdaGN, for every tensor: large elements down to a moving maximum, then the norm to a moving one.

    M = theta M + (1 - theta) max|g| ;  tau = M / (1 - theta^t) ;  |g| > tau becomes g tau / max|g|
    n = |g| after that ;  A = g1 A + (1 - g1) n ;  B = gamma2 B + (1 - gamma2) n^2,  g1 = gamma1 sc
    c = A / (1 - g1^t) / (sqrt(B / (1 - gamma2^t)) + eps) ;  g becomes g c / n

    Args:
        gamma1, gamma2, theta: of the moving averages, in [0, 1). eps: at least 0.
        total_steps: the length of the run, over which sc = 0.5 + 0.25 (1 + cos(pi t / (total_steps + 1))) lowers gamma1
            and the optimizer's beta1 to half; None: sc = 1.
        shared_counter: a reset of the moments also restarts the averages' own count t, and beta1 that changes from step
            to step is bias-corrected as if it had always been what it is now, as in the published code: right after a
            reset a spike passes almost whole. Only to reproduce it; False keeps counts of their own.

    A tensor whose gradient is zero is left as it is. The update's size no longer depends on the gradients' unit.

    State: `max`, `mean`, `mean_square`, `gamma1_power`, `count` [parameters of the group], `steps`, in the optimizer's
    state dict.

    Costs two more reads of the gradients, one after the other: 36 bytes an element in float32.

    Raises:
        ValueError, TypeError: a number outside its range.

    Source: Huang et al. 2025 (arXiv 2502.17055).
    """

    per_tensor: ClassVar[bool] = True
    needs_max: ClassVar[bool] = True
    extra_reads: ClassVar[tuple[str, ...]] = ("grad",)
    guarded: ClassVar[bool] = True

    gamma1: float = 0.7
    gamma2: float = 0.9
    theta: float = 0.999
    eps: float = 1e-8
    total_steps: int | None = None
    shared_counter: bool = False

    def __post_init__(self) -> None:
        for name in ("gamma1", "gamma2", "theta"):
            object.__setattr__(self, name, fraction("StableSpamClip", name, getattr(self, name)))
        object.__setattr__(self, "eps", within("StableSpamClip", "eps", self.eps, 0.0, 1.0))
        if self.total_steps is not None:
            count("StableSpamClip", "total_steps", self.total_steps)
        flag("StableSpamClip", "shared_counter", self.shared_counter)

    @property
    def weighs(self) -> bool:  # type: ignore[override]
        return self.total_steps is not None and not self.shared_counter

    def memory(self, tensors: int) -> dict[str, tuple[tuple[int, ...], float]]:
        own = {name: ((tensors,), 0.0) for name in ("max", "mean", "mean_square", "count")}
        return {**own, "gamma1_power": ((tensors,), 1.0), "steps": ((), 0.0)}

    def _scale(self, step: GroupStep) -> Tensor:
        now = step.memory["steps"] + 1
        if self.total_steps is None:
            return torch.ones_like(now)
        return 0.5 + 0.25 * (1 + torch.cos(math.pi * now / (self.total_steps + 1)))

    def signals(self, step: GroupStep) -> dict[str, Tensor]:
        return {} if self.total_steps is None else {"beta1_factor": self._scale(step)}

    def apply(self, step: GroupStep) -> None:
        own = step.memory
        largest = step.largest()
        usable = step.usable & (largest > 0)  # NaN: a parameter without a gradient
        now = torch.where(usable, own["count"] + 1, own["count"])
        moving = torch.where(usable, self.theta * own["max"] + (1 - self.theta) * largest, own["max"])
        own["max"].copy_(moving)
        tau = moving / (1 - self.theta**now)
        step.set("tau", torch.where(usable, tau / step.unscale, math.inf))
        step.set("tau_factor", torch.where(usable, tau / largest, 1.0))

        norm = step.sums(scalars.TAU_SQUARES)[:, 0].sqrt()
        gamma1 = self.gamma1 * self._scale(step)
        mean = gamma1 * own["mean"] + (1 - gamma1) * norm
        square = self.gamma2 * own["mean_square"] + (1 - self.gamma2) * norm * norm
        # The weight of A: 1 - prod of gamma1, which is 1 - gamma1^t as long as gamma1 does not change.
        power = own["gamma1_power"] * gamma1
        weight = 1 - gamma1**now if self.shared_counter else 1 - power
        target = mean / weight / ((square / (1 - self.gamma2**now)).sqrt() + self.eps)
        step.multiply("grad_factor", torch.where(usable, target / norm, 1.0))
        for name, value in (("mean", mean), ("mean_square", square), ("gamma1_power", power), ("count", now)):
            own[name].copy_(torch.where(usable, value, own[name]))

    def after(self, step: GroupStep) -> None:
        own = step.memory
        own["steps"].add_(step.informative)
        if self.shared_counter:
            due = step.usable & step.reset & ~step.largest().isnan()  # NaN: a parameter without a gradient
            own["count"].copy_(torch.where(due, own["count"].clamp(max=1.0), own["count"]))


@dataclass(frozen=True)
class UpdateRMS(GradClip):
    """Divides the learning rate of every tensor by max(1, RMS), RMS = sqrt(mean(g^2 / max(v_hat, eps^2))).

    v_hat is the bias-corrected second moment that this step's gradient is already part of: RMS is about 1 while
    gradients keep their size, and large where they outgrow it. Weight decay follows the lowered learning rate.

    Goes with one rule of each other part, as a tuple.

    Costs one more read of gradients and second moments: 36 bytes an element in float32.

    Source: Wortsman et al. 2023, StableAdamW (arXiv 2304.13013).
    """

    stage: ClassVar[int] = 1
    per_tensor: ClassVar[bool] = True
    needs_norm: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("update",)
    extra_reads: ClassVar[tuple[str, ...]] = ("grad", "exp_avg_sq")

    def apply(self, step: GroupStep) -> None:
        rms = (step.sums(scalars.RMS, effective=True)[:, 0] / step.numels).sqrt()
        factor = torch.where(rms > 1.0, 1.0 / rms, torch.where(rms.isnan(), rms, 1.0))
        step.multiply("lr", factor)
        before = step.get("decay")
        after = 1.0 - (1.0 - before) * factor
        step.set("decay", after)
        if step.decay_after:  # lr has that form's factor in it
            step.multiply("lr", after / before)


@dataclass(frozen=True)
class InducedMetric(GradClip):
    """Divides the update by 1 + |EMA of xi sum g^2 / (sqrt(v_hat) + eps)|: a smooth clip by the loss surface's metric.

    The sum is over all gradients of the optimizer; v_hat is the bias-corrected second moment that this step's gradient
    is already part of. Weight decay is not scaled.

    Args:
        xi: positive. beta: of the moving average, in [0, 1), which is bias-corrected.

    State: `mean`, `count`, in the optimizer's state dict.

    Goes with one rule of each other part, as a tuple. Costs one more read of gradients and second moments: 36 bytes an
    element in float32.

    Raises:
        ValueError: a number outside its range.

    Source: arXiv 2509.03594, the RMS variant.
    """

    sums_all: ClassVar[bool] = True
    stage: ClassVar[int] = 1
    per_tensor: ClassVar[bool] = True
    needs_norm: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("update",)
    extra_reads: ClassVar[tuple[str, ...]] = ("grad", "exp_avg_sq")

    xi: float = 0.1
    beta: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "xi", positive("InducedMetric", "xi", self.xi))
        object.__setattr__(self, "beta", fraction("InducedMetric", "beta", self.beta))

    def memory(self, tensors: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"mean": ((), 0.0), "count": ((), 0.0)}

    def apply(self, step: GroupStep) -> None:
        own = step.memory
        trace = self.xi * step.total(scalars.METRIC)
        usable = step.live & trace.isfinite() & (trace > 0)
        own["mean"].copy_(torch.where(usable, self.beta * own["mean"] + (1 - self.beta) * trace, own["mean"]))
        own["count"].add_(usable)
        corrected = own["mean"] / (1 - self.beta ** own["count"].clamp(min=1))
        step.multiply("lr", 1 / (1 + corrected.abs()))


RULES = (GlobalNorm, PerTensorNorm, AutoClip, ZClip, AdaGC, AGC, SpikeClip, StableSpamClip, UpdateRMS, InducedMetric)


def as_grad_clip(value: Any) -> GradClip | tuple[GradClip, ...] | None:
    """`None`, a number (the largest global norm), a rule, or a tuple of them, as a rule or a tuple of several.

    Raises:
        TypeError: anything else. ValueError: the number is not positive, or two rules shape the same part of a step.
    """
    if value is None or isinstance(value, RULES):
        return value
    if is_number(value):
        return GlobalNorm(value)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"grad_clip must be None, a positive number, a GradClip rule or a tuple, got {value!r}")
    rules: tuple[GradClip, ...] = ()
    for each in value:
        rules += grad_clip_rules(as_grad_clip(each))
    parts_of(rules, "grad_clip", "a step")
    return rules if len(rules) > 1 else rules[0] if rules else None


def grad_clip_rules(value: GradClip | tuple[GradClip, ...] | None) -> tuple[GradClip, ...]:
    """What `as_grad_clip` returned, as a tuple."""
    return () if value is None else value if isinstance(value, tuple) else (value,)
