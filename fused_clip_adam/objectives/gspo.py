"""GSPO: the PPO clip on a sequence's ratio."""

from __future__ import annotations

from dataclasses import dataclass

from fused_clip_adam.objectives.objective import INFINITY, Objective, clip_range


@dataclass(frozen=True)
class GSPO(Objective):
    """PPO's loss with s = exp(mean over the sequence of logp - old_logp) in the place of r.

    s is differentiated: every token of a sequence receives the sum over its tokens of a w (-A s K(s)), over its
    length. Needs [B, T] input, or packed input with `sequence_ids`.

    Args:
        clip_low, clip_high: distances of the bounds from 1; the defaults are the paper's.

    Raises:
        ValueError: a bound out of range.

    Source: Zheng et al. 2025 (arXiv 2507.18071), Eq. 5-7.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    token_rule = 0
    sequence_ratio = True

    def __post_init__(self) -> None:
        clip_range("GSPO", self.clip_low, self.clip_high)

    def bounds(self) -> tuple[float, float, float, float]:
        return (*clip_range("GSPO", self.clip_low, self.clip_high), INFINITY, INFINITY)
