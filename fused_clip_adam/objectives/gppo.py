"""PPO whose clipped tokens keep a bounded gradient: GPPO, CE-GPPO, AEPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import (
    Inputs,
    Objective,
    at_least_zero,
    clip_range,
    dual_bound,
    number,
    scalars,
)


@dataclass(frozen=True)
class GPPO(Objective):
    """PPO with dual clip, and the gradient at the bound beyond it: -A (1 + clip_high) where A > 0 and r > 1 +
    clip_high, -A (1 - clip_low) where A < 0 and r < 1 - clip_low, 0 where A < 0 and r > dual_clip, else -A r.

    The closed form has no quotient r / stop_gradient(r), which is NaN where r underflows.

    Args:
        clip_low, clip_high: distances of the bounds from 1; DAPO's, as in the golden table of the official code.
        dual_clip: c > 1, or None.

    Raises:
        ValueError: a bound out of range.

    Source: Klear-Reasoner (arXiv 2508.07629) and its code.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    rule = rules.GPPO

    def __post_init__(self) -> None:
        clip_range(type(self).__name__, self.clip_low, self.clip_high)
        dual_bound(type(self).__name__, self.dual_clip)

    def _scalars(self, grad_low: float, grad_high: float, value_low: float, value_high: float) -> tuple[float, ...]:
        low, high = clip_range(type(self).__name__, self.clip_low, self.clip_high)
        return scalars(low, high, self.dual_clip, a=grad_low, b=grad_high, c=value_low, d=value_high)

    def scalars(self) -> tuple[float, ...]:
        return self._scalars(1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class CEGPPO(GPPO):
    """GPPO whose clipped losses and gradients are weighted: by beta_low below the range, by beta_high above it.

    Args:
        clip_low, clip_high, dual_clip: as `GPPO`.
        beta_low: 0.25; the official runs take 0.5 for 1.5B and 0.75 for 7B parameters. beta_high: 1.

    Raises:
        ValueError: a bound out of range, a negative beta.

    Source: CE-GPPO (arXiv 2509.20712) and its code.
    """

    beta_low: float = 0.25
    beta_high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero("CEGPPO: beta_low", self.beta_low)
        at_least_zero("CEGPPO: beta_high", self.beta_high)

    def scalars(self) -> tuple[float, ...]:
        return self._scalars(self.beta_low, self.beta_high, self.beta_low, self.beta_high)


@dataclass(frozen=True)
class AEPO(GPPO):
    """PPO with dual clip on A' = A (1 + entropy_scale z), whose gains keep the gradient -A' (1 + clip_high) above the
    range. z = (H - mean) / (std + 1e-8) of the unmasked tokens' entropies, population std, detached.

    Needs `entropy=`: like logp; `policy_loss_from_logits` supplies its own. `process_group=` shares mean and std.

    Args:
        clip_low, clip_high, dual_clip: as `GPPO`.
        entropy_scale: weight of z. Default: the forks' of its code.

    Raises:
        ValueError: a bound out of range, an entropy_scale that is not finite.

    Source: Agentic Entropy-Balanced Policy Optimization (arXiv 2510.14545), as in its forks.
    """

    entropy_scale: float = 0.2
    needs = ("entropy",)
    accepts = ("process_group",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(number("AEPO: entropy_scale", self.entropy_scale)) < float("inf"):
            raise ValueError(f"AEPO: entropy_scale must be finite, got {self.entropy_scale!r}")

    def scalars(self) -> tuple[float, ...]:
        return self._scalars(0.0, 1.0, 1.0, 1.0)

    def prepare(self, inputs: Inputs) -> Inputs:
        valid = inputs.counted()
        H, A = inputs.entropy.to(inputs.dtype), inputs.advantages.to(inputs.dtype)
        sums = torch.stack([valid.sum(dtype=torch.float64), torch.where(valid, H, 0.0).sum(dtype=torch.float64)])
        if inputs.process_group is not None:
            torch.distributed.all_reduce(sums, group=inputs.process_group)
        tokens = sums[0].clamp(min=1.0)
        away = H - (sums[1] / tokens).to(H)  # around the mean: no cancellation in the squares
        square = torch.where(valid, away, 0.0).square().sum(dtype=torch.float64)
        if inputs.process_group is not None:
            torch.distributed.all_reduce(square, group=inputs.process_group)
        std = (square / tokens).sqrt() + 1e-8
        # A token whose entropy is not finite is left out by its advantage: `away` makes it NaN.
        return inputs.replace(advantages=A * (1 + (self.entropy_scale / std).to(H) * away))
