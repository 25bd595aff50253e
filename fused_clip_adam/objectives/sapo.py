"""SAPO: a soft gate in the place of the clip."""

from __future__ import annotations

from dataclasses import dataclass

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Objective, between, scalars


@dataclass(frozen=True)
class SAPO(Objective):
    """loss = -A (4 / tau) sigmoid(tau (r - 1)); the gradient is -4 A r s (1 - s), s = sigmoid(tau (r - 1)): -A at r =
    1, and fading to both sides. No token counts as clipped. tau (r - 1) is held within [-80, 80], where s (1 - s) <
    2e-35.

    Args:
        tau_pos: tau where A > 0. tau_neg: elsewhere; larger, so that losses fade sooner. Defaults: the paper's.

    Raises:
        ValueError: a tau not positive.

    Source: SAPO (arXiv 2511.20347), as in TRL and verl.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05
    rule = rules.SAPO

    def __post_init__(self) -> None:
        between("SAPO: tau_pos", self.tau_pos, 0.0)
        between("SAPO: tau_neg", self.tau_neg, 0.0)

    def scalars(self) -> tuple[float, ...]:
        return scalars(a=self.tau_pos, b=self.tau_neg)
