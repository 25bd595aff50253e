"""Gradient clipping rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


class GradClip:
    """Base of the rules accepted as `grad_clip=`."""


@dataclass(frozen=True)
class GlobalNorm(GradClip):
    """Scales the gradients by min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does.

    The norm is the L2 norm over all gradients of the optimizer (every parameter group), after unscaling by a
    GradScaler. A group without the rule is counted in the norm but not scaled.

    Args:
        max_norm: the largest norm, in the gradients' unit; positive.
        lag: False reads the gradients once more, before the update, for this step's norm. True compares the
            *previous* step's norm instead, gathered inside the update pass, so that the whole step is one pass over
            memory; the first step, and one after a non-finite norm, is not scaled. A spike is then clipped one step
            late: the step that carries it is not.

    Raises:
        ValueError: `max_norm` is not a positive number.

    Source: Pascanu et al. 2013 (arXiv 1211.5063), torch.nn.utils.clip_grad_norm_.
    """

    max_norm: float
    lag: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.max_norm, (int, float)) and self.max_norm > 0 and not math.isnan(self.max_norm)):
            raise ValueError(f"GlobalNorm: max_norm must be a positive number, got {self.max_norm!r}")
        object.__setattr__(self, "max_norm", float(self.max_norm))


def as_grad_clip(value: Any) -> GradClip | None:
    """`None`, a number (the largest global norm) or a rule, as a rule.

    Raises:
        TypeError: anything else. ValueError: the number is not positive.
    """
    if value is None or isinstance(value, GlobalNorm):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return GlobalNorm(value)
    raise TypeError(f"grad_clip must be None, a positive number or a GradClip rule, got {value!r}")
