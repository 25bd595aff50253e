"""DPPO: tokens are dropped by how far their probability has moved, not by the ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Inputs, Objective, at_least_zero, between, scalars


def log_old_probability(inputs: Inputs) -> Inputs:
    """`aux` = log q: of `old_probs` if given (0 as e^-200, below all that the rules tell apart), else old_logp."""
    q = inputs.old_probs
    if q is None:
        return inputs.replace(aux=inputs.old_logp)
    log_q = (q.double() if inputs.logp.dtype == torch.float64 else q.float()).log()
    return inputs.replace(aux=torch.where(q == 0, -200.0, log_q))


@dataclass(frozen=True)
class DPPOTV(Objective):
    """loss = -A stop_gradient(min(r, max_ratio)) logp keep; the gradient is -A min(r, max_ratio) keep. With p, q the
    token's new and old probability, keep = p - q <= delta_high where A > 0, else p - q >= -delta_low.

    `old_probs=` (optional): like logp; q, where it is not exp(old_logp). A dropped token counts in `clipped_high` where
    A > 0 and in `clipped_low` where A < 0.

    Args:
        delta_low, delta_high: bounds of the change in probability. Defaults: verl's clip_ratio.
        max_ratio: bound of the importance ratio. Default: verl's clip_ratio_c as configured (its code falls back to
        20).

    Raises:
        ValueError: a bound out of range.

    Source: DPPO (arXiv 2602.04879), binary total variation, as in verl.
    """

    delta_low: float = 0.2
    delta_high: float = 0.2
    max_ratio: float = 3.0
    rule = rules.DPPO_TV
    accepts = ("old_probs",)

    def __post_init__(self) -> None:
        name = type(self).__name__
        at_least_zero(f"{name}: delta_low", self.delta_low)
        at_least_zero(f"{name}: delta_high", self.delta_high)
        between(f"{name}: max_ratio", self.max_ratio, 0.0)

    def scalars(self) -> tuple[float, ...]:
        return scalars(self.delta_low, self.delta_high, cap=self.max_ratio)

    def prepare(self, inputs: Inputs) -> Inputs:
        return log_old_probability(inputs)


@dataclass(frozen=True)
class DPPOKL(DPPOTV):
    """DPPO-TV with the divergence B = q ln(q / p) + (1 - q) ln((1 - q + 1e-8) / (1 - p + 1e-8)): where A > 0 a token is
    kept if B <= delta_high or p <= q, else if B <= delta_low or p >= q.

    Args, Raises, inputs: as `DPPOTV`, the deltas bounds of B.

    Source: DPPO (arXiv 2602.04879), binary KL, as in verl.
    """

    rule = rules.DPPO_KL
