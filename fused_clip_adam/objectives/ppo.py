"""PPO, GRPO, DAPO (clip-higher), with dual clip and ratio cap; PPO-EWMA."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Inputs, Objective, between, clip_range, dual_bound, number, scalars


@dataclass(frozen=True)
class PPO(Objective):
    """loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); the gradient with respect to logp is -A r, or zero
    where A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low. Bounds are inclusive.

    Args:
        clip_low, clip_high: distances of the bounds from 1; (0.2, 0.28) is DAPO's clip-higher. Defaults: the paper's.
        dual_clip: c > 1; for A < 0 the loss is at most -c A, and the gradient is zero where r > c.
        ratio_cap: delta; the unclipped r is replaced by min(r, delta), TRL's `delta`.

    The gradient where |logp - old_logp| > 20 is that of 20: an unclipped token keeps pulling back.

    GRPO is this objective on `group_advantages`; Dr.GRPO on `group_advantages(scale="none")` with
    aggregation="constant"; StarPO-S is PPO(0.2, 0.28) under the mask of `top_variance_groups`.

    Raises:
        ValueError: a bound out of range.

    Source: Schulman et al. 2017 (arXiv 1707.06347); dual clip: Ye et al. 2020 (arXiv 1912.09729); clip-higher: DAPO
    (arXiv 2503.14476); ratio cap: INTELLECT-2 (arXiv 2505.07291), TRL.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio_cap: float | None = None
    rule = rules.PPO

    def __post_init__(self) -> None:
        clip_range("PPO", self.clip_low, self.clip_high)
        dual_bound("PPO", self.dual_clip)
        if self.ratio_cap is not None and not number("PPO: ratio_cap", self.ratio_cap) > 0.0:
            raise ValueError(f"PPO: ratio_cap must be positive, got {self.ratio_cap!r}")

    def scalars(self) -> tuple[float, ...]:
        return scalars(*clip_range("PPO", self.clip_low, self.clip_high), dual=self.dual_clip, cap=self.ratio_cap)


@dataclass(frozen=True)
class PPOEWMA(Objective):
    """PPO whose clip is tested against an averaged policy: loss = -A min(r, max_ratio), r to the policy that sampled;
    the gradient is -A min(r, max_ratio), or zero where A > 0 and rho > 1 + clip_high, or A < 0 and rho < 1 - clip_low,
    rho = exp(logp - ewma_logp). The loss is not clipped.

    Needs `ewma_logp=`: like logp; log-probabilities under the exponentially averaged policy.

    Args:
        clip_low, clip_high: distances of rho's bounds from 1. Defaults: the official code's.
        max_ratio: bound of the importance ratio r. Default: the official code's.

    Raises:
        ValueError: a bound out of range; clip_low of 1, whose logarithm is infinite.

    Source: Hilton et al. 2022, "Batch size-invariance for policy optimization" (arXiv 2110.00641), and its code.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    max_ratio: float = 100.0
    rule = rules.PPO_EWMA
    needs = ("ewma_logp",)

    def __post_init__(self) -> None:
        clip_range("PPOEWMA", self.clip_low, self.clip_high)
        if self.clip_low == 1.0:
            raise ValueError("PPOEWMA: clip_low must be below 1, got 1.0")
        between("PPOEWMA: max_ratio", self.max_ratio, 0.0)

    def scalars(self) -> tuple[float, ...]:
        return scalars(math.log1p(-self.clip_low), math.log1p(self.clip_high), cap=self.max_ratio)

    def prepare(self, inputs: Inputs) -> Inputs:
        return inputs.replace(aux=inputs.ewma_logp)
