"""Reset rules: when the optimizer forgets. A reset is decided on the device and costs no pass over memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fused_clip_adam.backends.scalars import FORGET_AFTER, FORGET_BEFORE
from fused_clip_adam.rules.rule import Rule, count, flag, within

if TYPE_CHECKING:
    from fused_clip_adam.group_step import GroupStep


class Reset(Rule):
    """Base of the rules accepted as `reset=`."""

    moments: bool
    counters: bool

    def _check(self) -> None:
        for name in ("moments", "counters"):
            flag(type(self).__name__, name, getattr(self, name))
        if not (self.moments or self.counters):
            raise ValueError(f"{type(self).__name__}: at least one of moments and counters must be True")

    def _reset_where(self, due: Tensor, forget: int = FORGET_BEFORE) -> dict[str, Tensor]:
        due = due.double()
        return {"forget": due * (forget if self.moments else 0), "restart": due * self.counters}


@dataclass(frozen=True)
class OnRollout(Reset):
    """Resets at every `opt.new_rollout()`.

    Args:
        moments: zero `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`).
        counters: restart the step count, and with it bias correction: Adam with local time. Kept moments are then
            divided by a small 1 - beta^step again, which acts as a temporary change of the learning rate.

    Raises:
        ValueError: neither is asked for.

    Source: Adam-Rel, Ellis et al. 2024 (arXiv 2412.17113) for the defaults; Asadi et al. 2023 (arXiv 2306.17833)
    with `moments=True` (the outer reset).
    """

    acts: ClassVar[bool] = False  # opt.new_rollout() does it all

    moments: bool = False
    counters: bool = True

    def __post_init__(self) -> None:
        self._check()


@dataclass(frozen=True)
class Periodic(Reset):
    """Resets in every `every`-th step, and lets the updates grow back over the `warmup` steps from there on.

    With s = 0 in the step that resets, the update is multiplied by phi = 1 - 0.99 (1 + cos(pi s / (warmup + 1))) / 2
    while s < warmup, else by 1; weight decay is not.

    Args:
        every: steps between resets, the first one in step `every`. warmup: steps, 0: none.
        moments: zero `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`) before the update of that step.
        counters: restart the step count, and with it bias correction. SPAM as published does not: right after a reset
            the moments are then small against their corrections, and updates overshoot (1.87 lr after the first reset
            with its defaults, more after later ones).
        late: the moments are zeroed after that step's update instead, which still reads the old ones while the
            counters have restarted: what the published code of Stable-SPAM does. Only to reproduce it.

    Steps are counted on the device: one that is skipped, or without gradients at lr = 0, does not count.

    State: `steps`, `since`, in the optimizer's state dict.

    Raises:
        ValueError, TypeError: a number outside its range; neither moments nor counters.

    Source: SPAM, Huang et al. 2025 (arXiv 2501.06842).
    """

    every: int = 500
    warmup: int = 150
    moments: bool = True
    counters: bool = True
    late: bool = False

    def __post_init__(self) -> None:
        count("Periodic", "every", self.every)
        count("Periodic", "warmup", self.warmup, 0)
        flag("Periodic", "late", self.late)
        self._check()

    @property
    def guarded(self) -> bool:  # type: ignore[override]
        return self.moments

    def memory(self, tensors: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"steps": ((), 0.0), "since": ((), math.inf)}

    def _now(self, step: GroupStep) -> tuple[Tensor, Tensor]:
        """(whether this step resets; steps since the last that did)"""
        due = torch.remainder(step.memory["steps"] + 1, self.every) == 0
        return due, torch.where(due, 0.0, step.memory["since"] + 1)

    def signals(self, step: GroupStep) -> dict[str, Tensor]:
        return self._reset_where(self._now(step)[0], FORGET_AFTER if self.late else FORGET_BEFORE)

    def apply(self, step: GroupStep) -> None:
        _, since = self._now(step)
        phi = 1 - 0.99 * (1 + torch.cos(math.pi * since.clamp(max=self.warmup) / (self.warmup + 1))) / 2
        step.multiply("lr", torch.where(since < self.warmup, phi, 1.0))

    def after(self, step: GroupStep) -> None:
        own = step.memory
        _, since = self._now(step)
        own["since"].copy_(torch.where(step.informative, since, own["since"]))
        own["steps"].add_(step.informative)


@dataclass(frozen=True)
class WhenClipped(Reset):
    """Resets before the step whose observed rollouts were clipped by more than a threshold.

    Args:
        threshold: of c = suppressed_mass / total_mass of the `ClipStats` handed to `opt.observe` since the last step,
            in [0, 1]: the share of the policy gradient that clipping took. Without any, nothing is reset.
        moments, counters: what is reset, as in `Periodic`.

    Raises:
        ValueError, TypeError: a number outside its range; neither moments nor counters.

    Source: this project.
    """

    needs_observed: ClassVar[bool] = True

    threshold: float
    moments: bool = True
    counters: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", within("WhenClipped", "threshold", self.threshold, 0.0, 1.0))
        self._check()

    @property
    def guarded(self) -> bool:  # type: ignore[override]
        return self.moments

    def signals(self, step: GroupStep) -> dict[str, Tensor]:
        return self._reset_where(step.suppressed > self.threshold)


RULES = (OnRollout, Periodic, WhenClipped)


def as_reset(value: Any) -> Reset | None:
    """`None` or a rule.

    Raises:
        TypeError: anything else.
    """
    if value is None or isinstance(value, RULES):
        return value
    raise TypeError(f"reset must be None or a Reset rule, got {value!r}")
