"""CISPO: the ratio is clipped as a weight; no token loses its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Objective, number, scalars


@dataclass(frozen=True)
class CISPO(Objective):
    """loss = -stop_gradient(clip(r, low, high)) A logp; the gradient with respect to logp is -A clip(r, low, high).

    Args:
        low: the lower bound of the ratio itself (not a distance from 1), or None for none (TRL, Liger).
        high: the upper bound of the ratio itself. Default: ScaleRL's (arXiv 2510.13786), as TRL documents.

    Raises:
        ValueError: bounds out of order or out of range.

    Source: MiniMax-M1 (arXiv 2506.13585), Eq. 4-5; upper bound alone as in TRL, both as in verl and NeMo-RL.
    """

    low: float | None = None
    high: float = 5.0
    rule = rules.CISPO

    def __post_init__(self) -> None:
        if not 0.0 < number("CISPO: high", self.high) < float("inf"):
            raise ValueError(f"CISPO: high must be positive and finite, got {self.high!r}")
        if self.low is not None and not 0.0 <= number("CISPO: low", self.low) <= self.high:
            raise ValueError(f"CISPO: low must be None or in [0, high], got {self.low!r}")

    def scalars(self) -> tuple[float, ...]:
        return scalars(0.0 if self.low is None else self.low, self.high)
