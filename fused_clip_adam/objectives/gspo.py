"""The PPO clip on a sequence's ratio: GSPO and LUSPO."""

from __future__ import annotations

from dataclasses import dataclass

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Objective, clip_range, scalars


@dataclass(frozen=True)
class GSPO(Objective):
    """PPO's loss with s = exp(mean over the sequence of logp - old_logp) in the place of r.

    s is differentiated: every token of a sequence receives the sum over its tokens of a w (-A s K(s)), over its
    length (as in TRL, OpenRLHF and NeMo-RL; verl's straight-through form agrees where a, w and A are constant in a
    sequence). Needs [B, T] input, or packed input with `sequence_ids`.

    Args:
        clip_low, clip_high: distances of the bounds from 1; the defaults are the paper's.

    Raises:
        ValueError: a bound out of range.

    Source: Zheng et al. 2025 (arXiv 2507.18071), Eq. 5-7.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    rule = rules.GSPO
    weighs_by_sequence = True

    def __post_init__(self) -> None:
        clip_range(type(self).__name__, self.clip_low, self.clip_high)

    def scalars(self) -> tuple[float, ...]:
        return scalars(*clip_range(type(self).__name__, self.clip_low, self.clip_high))


@dataclass(frozen=True)
class LUSPO(GSPO):
    """GSPO whose sequences weigh as much as they are long: aggregation "sequence-sum" is its default.

    Args, Raises: as `GSPO`; TRL gives it no clip range of its own.

    Source: LUSPO (arXiv 2602.05261), as in TRL.
    """

    default_aggregation = "sequence-sum"
