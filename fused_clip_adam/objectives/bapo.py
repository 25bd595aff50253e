"""BAPO: clip bounds searched for a balance of gains and losses in the batch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_clip_adam.backends import reference_objective as rules
from fused_clip_adam.objectives.objective import Inputs, Objective, between, dual_bound, scalars

MOST_LEVELS = 64


@dataclass(frozen=True)
class BAPO(Objective):
    """PPO with dual clip and bounds found per batch. P = the sum over A >= 0 of min(r, high) A, N = the sum over A < 0
    of max(r, low) |A|; from (low_start, high_start), while P / (N + 1e-8) < target, low rises by low_step up to
    low_max, then high by high_step up to high_max.

    The published loop reads P / N on the host at every step. Here one pass sums P and N at every bound of the grid, and
    the search runs on the device over these few numbers. `process_group=` shares the sums, so that ranks agree.

    As published, raising `low` can only raise N: it lowers the quotient, and acts by clipping more losses.

    Args:
        target: least P / N. low_*, high_*: bounds of the ratio itself. dual_clip: c > 1, or None. Defaults: those of
            the official code's configuration (the paper's runs: target 0.4, low 0.6 to 0.9, high 1.2 to 3).

    Raises:
        ValueError: bounds out of order, steps not positive, more than 64 levels.

    Source: BAPO (arXiv 2510.18927), Algorithm 1, in the order of its code (low first).
    """

    target: float = 1.0
    low_start: float = 0.6
    low_max: float = 0.8
    low_step: float = 0.05
    high_start: float = 1.2
    high_max: float = 2.0
    high_step: float = 0.05
    dual_clip: float | None = 3.0
    rule = rules.PPO
    accepts = ("process_group",)

    def __post_init__(self) -> None:
        between("BAPO: target", self.target, 0.0)
        dual_bound("BAPO", self.dual_clip)
        for side in ("low", "high"):
            start = between(f"BAPO: {side}_start", getattr(self, f"{side}_start"), 0.0)
            most = between(f"BAPO: {side}_max", getattr(self, f"{side}_max"), 0.0)
            step = between(f"BAPO: {side}_step", getattr(self, f"{side}_step"), 0.0)
            if most < start:
                raise ValueError(f"BAPO: {side}_max must be at least {side}_start={start!r}, got {most!r}")
            if (most - start) / step > MOST_LEVELS - 1:
                raise ValueError(f"BAPO: {side}_step={step!r} makes more than {MOST_LEVELS} levels; take a larger one")

    def levels(self, side: str) -> list[float]:
        """The bounds the search may take: "low" or "high"."""
        start, most, step = (float(getattr(self, f"{side}_{what}")) for what in ("start", "max", "step"))
        count = math.ceil((most - start) / step - 1e-9)
        return [start] + [min(start + step * k, most) for k in range(1, count + 1)]

    def scalars(self) -> tuple[float, ...]:
        return scalars(self.low_start, self.high_start, self.dual_clip)

    def prepare(self, inputs: Inputs) -> Inputs:
        lows, highs = self.levels("low"), self.levels("high")
        given = (inputs.logp.detach(), inputs.old_logp, inputs.advantages, inputs.counted())
        sums = inputs.backend.bound_sums(*given, lows, highs)
        if inputs.process_group is not None:
            torch.distributed.all_reduce(sums, group=inputs.process_group)
        # State k: the first levels raise low, the others high.
        N = torch.cat([sums[: len(lows)], sums[len(lows) - 1 : len(lows)].expand(len(highs) - 1)])
        P = torch.cat([sums[len(lows) : len(lows) + 1].expand(len(lows)), sums[len(lows) + 1 :]])
        short = self.target > P / (N + 1e-8)
        first = (
            short.long().cumprod(0).sum().clamp(max=len(N) - 1)
        )  # states that fall short before the first that does not
        bounds = _states(tuple(lows), tuple(highs), sums.device).index_select(1, first.reshape(1)).squeeze(1)
        return inputs.replace(bounds=bounds)


@functools.lru_cache(maxsize=16)
def _states(lows: tuple[float, ...], highs: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 [2, states]: (low, high) of each state, made on the device so that no call waits for a copy."""
    pairs = [(low, highs[0]) for low in lows] + [(lows[-1], high) for high in highs[1:]]
    full = [torch.full((1,), x, dtype=torch.float64, device=device) for pair in zip(*pairs) for x in pair]
    return torch.cat(full).reshape(2, len(pairs))
