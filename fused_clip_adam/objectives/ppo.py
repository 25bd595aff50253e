"""PPO, GRPO, DAPO (clip-higher), with dual clip and ratio cap."""

from __future__ import annotations

from dataclasses import dataclass

from fused_clip_adam.objectives.objective import INFINITY, Objective, clip_range, number


@dataclass(frozen=True)
class PPO(Objective):
    """loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); the gradient with respect to logp is -A r, or zero
    where A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low. Bounds are inclusive.

    Args:
        clip_low, clip_high: distances of the bounds from 1; (0.2, 0.28) is DAPO's clip-higher.
        dual_clip: c > 1; for A < 0 the loss is at most -c A, and the gradient is zero where r > c.
        ratio_cap: delta; the unclipped r is replaced by min(r, delta), TRL's `delta`.

    The gradient where |logp - old_logp| > 20 is that of 20: an unclipped token keeps pulling back.

    Raises:
        ValueError: a bound out of range.

    Source: Schulman et al. 2017 (arXiv 1707.06347); dual clip: Ye et al. 2020 (arXiv 1912.09729); clip-higher: DAPO
    (arXiv 2503.14476); ratio cap: INTELLECT-2 (arXiv 2505.07291), TRL.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio_cap: float | None = None
    token_rule = 0

    def __post_init__(self) -> None:
        clip_range("PPO", self.clip_low, self.clip_high)
        if self.dual_clip is not None and not number("PPO: dual_clip", self.dual_clip) > 1.0:
            raise ValueError(f"PPO: dual_clip must be greater than 1, got {self.dual_clip!r}")
        if self.ratio_cap is not None and not number("PPO: ratio_cap", self.ratio_cap) > 0.0:
            raise ValueError(f"PPO: ratio_cap must be positive, got {self.ratio_cap!r}")

    def bounds(self) -> tuple[float, float, float, float]:
        low, high = clip_range("PPO", self.clip_low, self.clip_high)
        dual = INFINITY if self.dual_clip is None else float(self.dual_clip)
        return low, high, dual, INFINITY if self.ratio_cap is None else float(self.ratio_cap)
