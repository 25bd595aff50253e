"""GMPO: the geometric mean of clipped token ratios."""

from __future__ import annotations

from dataclasses import dataclass

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Objective, at_least_zero, scalars


@dataclass(frozen=True)
class GMPO(Objective):
    """loss = -A s, s = exp(mean over the sequence of c), D = logp - old_logp, c = min(D, clip_high) where A > 0,
    max(D, -clip_low) where A < 0. The gradient of a sequence is the sum over its tokens of a w (-A s), over its length;
    it reaches the tokens whose D is not clipped. Bounds are inclusive and in log space.

    The default aggregation is "sequence-mean": each sequence counts once, as in the paper. Needs [B, T] input, or
    packed input with `sequence_ids`.

    Args:
        clip_low, clip_high: bounds of -D and D; the paper's (e^-0.4, e^0.4).

    Raises:
        ValueError: a bound negative or not finite.

    Source: Zhao et al. 2025 (arXiv 2507.20673); verl's "geo_mean".
    """

    clip_low: float = 0.4
    clip_high: float = 0.4
    rule = rules.GMPO
    default_aggregation = "sequence-mean"

    def __post_init__(self) -> None:
        at_least_zero("GMPO: clip_low", self.clip_low)
        at_least_zero("GMPO: clip_high", self.clip_high)

    def scalars(self) -> tuple[float, ...]:
        return scalars(-self.clip_low, self.clip_high)
