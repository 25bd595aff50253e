"""DCPO: clip bounds from the token's own old probability."""

from __future__ import annotations

from dataclasses import dataclass

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.dppo import log_old_probability
from fused_clip_adam.objectives.objective import Inputs, Objective, at_least_zero, dual_bound, scalars


@dataclass(frozen=True)
class DCPO(Objective):
    """PPO with dual clip and bounds that widen for rare tokens; with q the token's old probability,
    low = 1/2 + 1/2 sqrt(max(0, 1 - 4 clip_low / q)), high = min(1/2 + 1/2 sqrt(1 + 4 clip_high / q), max(dual_clip,
    10)). Where q is zero (below e^-103, the end of float32) low = 1 and high is at its maximum.

    `old_probs=` (optional): like logp; q, where it is not exp(old_logp).

    Args:
        clip_low, clip_high: epsilons of the bounds. dual_clip: c > 1. Defaults: the official code's.

    Raises:
        ValueError: a bound out of range.

    Source: DCPO (arXiv 2509.02333) and its code. Its advantages: `SmoothedAdvantage`.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 10.0
    rule = rules.DCPO
    accepts = ("old_probs",)

    def __post_init__(self) -> None:
        at_least_zero("DCPO: clip_low", self.clip_low)
        at_least_zero("DCPO: clip_high", self.clip_high)
        dual_bound("DCPO", self.dual_clip)

    def scalars(self) -> tuple[float, ...]:
        return scalars(dual=self.dual_clip, a=self.clip_low, b=self.clip_high, c=max(self.dual_clip, 10.0))

    def prepare(self, inputs: Inputs) -> Inputs:
        return log_old_probability(inputs)
