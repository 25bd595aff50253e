"""What an objective tells a backend: the token rule, its bounds, and whether the ratio is a token's or a sequence's."""

from __future__ import annotations

import math
from typing import Any, ClassVar

INFINITY = math.inf


class Objective:
    """Base of the objectives. `token_rule` is the number csrc/objective_math.h knows the rule by."""

    token_rule: ClassVar[int]
    sequence_ratio: ClassVar[bool] = False

    def bounds(self) -> tuple[float, float, float, float]:
        """(low, high, dual, cap) of the ratio; absent bounds are 0 (low) or infinite."""
        raise NotImplementedError


def number(name: str, value: Any) -> float:
    """The value as a Python float.

    Raises:
        TypeError: not a number; names the argument.
    """
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be a number, got {value!r}")


def clip_range(name: str, clip_low: float, clip_high: float) -> tuple[float, float]:
    """(1 - clip_low, 1 + clip_high).

    Raises:
        TypeError: not numbers. ValueError: clip_low outside [0, 1], clip_high negative or infinite, or NaN.
    """
    clip_low = number(f"{name}: clip_low", clip_low)
    clip_high = number(f"{name}: clip_high", clip_high)
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"{name}: clip_low must be in [0, 1], got {clip_low!r}")
    if not 0.0 <= clip_high < INFINITY:
        raise ValueError(f"{name}: clip_high must be at least 0 and finite, got {clip_high!r}")
    return 1.0 - clip_low, 1.0 + clip_high
