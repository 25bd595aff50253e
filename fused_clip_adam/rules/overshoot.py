"""Overshoot rules: what becomes of momentum that no longer agrees with the gradient.

All of them change only the emitted direction (or the beta1 of one step); `exp_avg` and `exp_avg_sq` stay what plain
AdamW would store. `kernel_code` and `brake_code` are the numbers csrc/update_math.h knows the rules by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

_MAX_BLOCK = 2**48
"""More than a tensor can hold, and sums of two of them stay far inside int64."""


class Overshoot:
    """Base of the rules accepted as `overshoot=`."""

    kernel_code: ClassVar[int] = 0


@dataclass(frozen=True)
class AlignedMomentum(Overshoot):
    """Emits k a m + b g: the old momentum is used only where it points the way of the gradient.

    k = 1 if the sum of m g over the block is positive, else 0. A block whose gradient is zero does not move, so the
    coast after clipping is removed exactly.

    Args:
        block: number of consecutive elements (row-major, from each tensor's start) that share one k, or "element".

    Raises:
        ValueError: `block` is neither an int from 1 to 2^48 nor "element".

    Source: this project; evidence in the README. Per element it is the gate of Cautious (arXiv 2411.16085) applied to
    the old momentum only.
    """

    block: int | str = 1024

    def __post_init__(self) -> None:
        if self.block == "element":
            return
        if isinstance(self.block, bool) or not isinstance(self.block, int) or not 1 <= self.block <= _MAX_BLOCK:
            raise ValueError(f'AlignedMomentum: block must be an int from 1 to 2^48 or "element", got {self.block!r}')

    @property
    def kernel_code(self) -> int:  # type: ignore[override]
        return 2 if self.block == "element" else 1


@dataclass(frozen=True)
class Cautious(Overshoot):
    """Emits nothing where the new momentum and the gradient disagree in sign: u = u [m' g > 0].

    The mask is not rescaled: dividing by its mean, as published, multiplies the step by up to 100 where few gradients
    are non-zero, which is just what clipping causes.

    Source: Liang et al. 2024, C-AdamW (arXiv 2411.16085).
    """

    kernel_code: ClassVar[int] = 3


@dataclass(frozen=True)
class MomentumBrake(Overshoot):
    """Lowers beta1 by the share of the policy gradient that clipping suppressed: a = beta1 (1 - strength c).

    c = suppressed_mass / total_mass of the `ClipStats` handed to `opt.observe` since the last step; 0 where none was.

    Args:
        strength: in [0, 1]; 1 removes the momentum of a fully clipped step.
        mode: "renormalise" gives the gradient the weight that momentum lost (b = 1 - a); "damp" does not
            (b = 1 - beta1, bias correction as in Adam).
        hold_v: in [0, 1); slows the second moment as well, 1 - beta2 becomes (1 - beta2)(1 - hold_v c). Not 1: a
            fully clipped first step would leave the second moment no weight to divide by.

    State: `bias_weights`, float64 [2] per parameter: the running (W1, W2) that replace 1 - beta^step.

    Raises:
        ValueError: a number outside its range, or an unknown mode.

    Source: this project.
    """

    strength: float = 0.5
    mode: str = "renormalise"
    hold_v: float = 0.0

    def __post_init__(self) -> None:
        if not (isinstance(self.strength, (int, float)) and 0.0 <= self.strength <= 1.0):
            raise ValueError(f"MomentumBrake: strength must be in [0, 1], got {self.strength!r}")
        if not (isinstance(self.hold_v, (int, float)) and 0.0 <= self.hold_v < 1.0):
            raise ValueError(f"MomentumBrake: hold_v must be in [0, 1), got {self.hold_v!r}")
        if self.mode not in ("renormalise", "damp"):
            raise ValueError(f'MomentumBrake: mode must be "renormalise" or "damp", got {self.mode!r}')

    @property
    def brake_code(self) -> int:
        return 1 if self.mode == "renormalise" else 2


def as_overshoot(value: Any) -> Overshoot | None:
    """`None`, a rule's short name or a rule, as a rule.

    Raises:
        ValueError: an unknown name. TypeError: neither of the three.
    """
    if value is None or isinstance(value, (AlignedMomentum, Cautious, MomentumBrake)):
        return value
    if isinstance(value, str):
        names = {
            "align": AlignedMomentum(),
            "align-element": AlignedMomentum(block="element"),
            "cautious": Cautious(),
            "brake": MomentumBrake(),
        }
        if value in names:
            return names[value]
        raise ValueError(f"overshoot={value!r} is unknown in this version; accepted: {sorted(names)} or a rule")
    raise TypeError(f"overshoot must be None, a name or an Overshoot rule, got {value!r}")
