"""Gradient clipping rules: norms of this step's gradients -> the factor by which each tensor's gradient is scaled.

`GlobalNorm` is computed inside the prologue kernel. The others are a handful of torch operations on numbers between the
norm and the prologue, on the gradients' device and without a host read; what they remember (`memory`) lies there too.
A step that carries no information, whose norm is 0 or not finite or which `found_inf` skips, leaves it unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Memory = dict[str, Tensor]


class GradClip:
    """Base of the rules accepted as `grad_clip=`."""

    in_prologue: ClassVar[bool] = False  # the prologue kernel computes the factor itself
    per_tensor: ClassVar[bool] = False  # reads the norm of every tensor, not only the global one
    lag: bool = False  # True: does not need this step's norm before the update

    def memory(self, tensors: int) -> dict[str, tuple[tuple[int, ...], float]]:
        """What the rule remembers: name -> (shape, first value), float64. `tensors`: parameters of the group."""
        return {}

    def factors(self, norm: Tensor, norms: Tensor, memory: Memory, usable: Tensor) -> Tensor:
        """The factors of a step; takes its norms into `memory`, in place, where `usable`.

        Args:
            norm: float64 0-d, over all gradients of the optimizer, unscaled.
            norms: float64 [n], of the group's tensors (`per_tensor`); NaN where a parameter has no gradient.
            usable: bool 0-d.

        Returns:
            float64, 0-d or [n].
        """
        raise NotImplementedError


def _coefficient(norm: Tensor, bound: Tensor | float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_: min(1, bound / (norm + 1e-6)); a NaN norm stays NaN."""
    coefficient = bound / (norm + 1e-6)
    return torch.where(coefficient > 1.0, 1.0, coefficient)


def _positive(rule: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
        raise ValueError(f"{rule}: {name} must be a positive finite number, got {value!r}")
    return float(value)


def _within(rule: str, name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{rule}: {name} must be in [{least:g}, {most:g}], got {value!r}")
    return float(value)


def _count(rule: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**31:
        raise ValueError(f"{rule}: {name} must be an int of at least 1, got {value!r}")
    return value


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

    in_prologue: ClassVar[bool] = True

    max_norm: float
    lag: bool = False

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
        object.__setattr__(self, "max_norm", _positive("PerTensorNorm", "max_norm", self.max_norm))

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

    percentile: float = 10.0
    history: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "percentile", _within("AutoClip", "percentile", self.percentile, 0, 100))
        if self.history is not None:
            _count("AutoClip", "history", self.history)

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

    alpha: float = 0.97
    z_threshold: float = 2.5
    max_norm: float | None = 1.0
    warmup: int = 25
    mode: str = "adaptive"
    clip_factor: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not (isinstance(self.alpha, (int, float)) and 0.0 <= self.alpha < 1.0):
            raise ValueError(f"ZClip: alpha must be in [0, 1), got {self.alpha!r}")
        for name in ("z_threshold", "clip_factor", *(() if self.max_norm is None else ("max_norm",))):
            object.__setattr__(self, name, _positive("ZClip", name, getattr(self, name)))
        object.__setattr__(self, "eps", _within("ZClip", "eps", self.eps, 0.0, 1.0))
        _count("ZClip", "warmup", self.warmup)
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

    per_tensor: ClassVar[bool] = True

    ratio: float = 1.04
    beta: float = 0.99
    start: int = 100
    max_norm: float = 1.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("ratio", "max_norm"):
            object.__setattr__(self, name, _positive("AdaGC", name, getattr(self, name)))
        if not (isinstance(self.beta, (int, float)) and 0.0 <= self.beta < 1.0):
            raise ValueError(f"AdaGC: beta must be in [0, 1), got {self.beta!r}")
        object.__setattr__(self, "eps", _within("AdaGC", "eps", self.eps, 0.0, 1.0))
        _count("AdaGC", "start", self.start)

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


RULES = (GlobalNorm, PerTensorNorm, AutoClip, ZClip, AdaGC)


def as_grad_clip(value: Any) -> GradClip | None:
    """`None`, a number (the largest global norm) or a rule, as a rule.

    Raises:
        TypeError: anything else. ValueError: the number is not positive.
    """
    if value is None or isinstance(value, RULES):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return GlobalNorm(value)
    raise TypeError(f"grad_clip must be None, a positive number or a GradClip rule, got {value!r}")
