"""Objectives without a clip: GPG, and DRO, which pulls the log-ratio back instead."""

from __future__ import annotations

from dataclasses import dataclass

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Objective, between, scalars


@dataclass(frozen=True)
class GPG(Objective):
    """loss = -A logp; the gradient is -A. `old_logp` enters the statistics alone.

    Source: Chu et al. 2025, "GPG: a simple and strong reinforcement learning baseline" (arXiv 2504.02546).
    """

    rule = rules.GPG

    def scalars(self) -> tuple[float, ...]:
        return scalars()


@dataclass(frozen=True)
class DRO(Objective):
    """loss = -(A logp - beta / 2 D^2), D = logp - old_logp; the gradient is -A + beta D.

    Args:
        beta: weight of the quadratic pull; the field has no common default.

    Raises:
        ValueError: beta not positive.

    Source: Richemond et al. 2024, "Offline regularised reinforcement learning" (arXiv 2405.19107), as in verl.
    """

    beta: float
    rule = rules.DRO

    def __post_init__(self) -> None:
        between("DRO: beta", self.beta, 0.0)

    def scalars(self) -> tuple[float, ...]:
        return scalars(a=self.beta)
