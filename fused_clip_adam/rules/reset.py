"""Reset rules: when the optimizer forgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Reset:
    """Base of the rules accepted as `reset=`."""


@dataclass(frozen=True)
class OnRollout(Reset):
    """Resets at every `opt.new_rollout()`.

    Args:
        moments: zero `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`).
        counters: restart the step count, and with it bias correction: Adam with local time. Kept moments are then
            divided by a small 1 - beta^step again, which acts as a temporary change of the learning rate.

    Raises:
        ValueError: neither is asked for.

    Source: Adam-Rel, Ellis et al. 2024 (arXiv 2412.17113) for the defaults; Asadi et al. 2023 (arXiv 2306.17833)
    with `moments=True`.
    """

    moments: bool = False
    counters: bool = True

    def __post_init__(self) -> None:
        if not (self.moments or self.counters):
            raise ValueError("OnRollout: at least one of moments and counters must be True")


def as_reset(value: Any) -> Reset | None:
    """`None` or a rule.

    Raises:
        TypeError: anything else.
    """
    if value is None or isinstance(value, OnRollout):
        return value
    raise TypeError(f"reset must be None or a Reset rule, got {value!r}")
