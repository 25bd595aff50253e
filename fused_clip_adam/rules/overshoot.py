"""Overshoot rules: what becomes of momentum that no longer agrees with the gradient.

All of them change only the emitted direction (or the beta1 of one step); `exp_avg` and `exp_avg_sq` stay what plain
AdamW would store. `kernel_code` and `brake_code` are the numbers csrc/update_math.h knows the rules by.

A rule shapes one or more parts of an update: its "momentum" (beta1 of the step), its "direction", its "size". Rules of
different parts can be given together, as a tuple.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

_MAX_BLOCK = 2**48
"""More than a tensor can hold, and sums of two of them stay far inside int64."""


class Overshoot:
    """Base of the rules accepted as `overshoot=`."""

    kernel_code: ClassVar[int] = 0  # 0: the element's equation stays AdamW's
    parts: ClassVar[tuple[str, ...]] = ("direction",)


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
class Grams(Overshoot):
    """Takes the size of the update from Adam and its sign from the gradient: u = sign(g) |u|; 0 where g is 0.

    Source: Cao et al. 2024 (arXiv 2412.17107).
    """

    kernel_code: ClassVar[int] = 4


@dataclass(frozen=True)
class UpdateClamp(Overshoot):
    """Bounds the update of every element, in units of the learning rate: |u| <= max_update.

    Args:
        max_update: the bound; positive. Adam's own u is about 1 while gradients keep their size, and reaches
            (1 - beta1) / sqrt(1 - beta2), 3.2 with the defaults, where one is far larger than those before.
        mode: "clip" cuts u off at the bound, as AdaBound does with a constant bound of the step. "atan2" replaces the
            quotient: u = max_update 2/pi atan2(m / W1, sqrt(v / W2)), which needs no eps (`eps` is not read) and does
            not change when all gradients are scaled. Adam-atan2's published constant 1.27 is max_update = 1.27 pi/2.

    "clip" goes with every other rule, "atan2" with those that leave the direction alone.

    Raises:
        ValueError: `max_update` is not a positive finite number, or an unknown mode.

    Source: "clip": Luo et al. 2019, AdaBound (arXiv 1902.09843). "atan2": Everett et al. 2024 (arXiv 2407.05872).
    """

    max_update: float = 1.0
    mode: str = "clip"

    def __post_init__(self) -> None:
        bound = self.max_update
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0.0 < bound < math.inf:
            raise ValueError(f"UpdateClamp: max_update must be a positive finite number, got {bound!r}")
        if self.mode not in ("clip", "atan2"):
            raise ValueError(f'UpdateClamp: mode must be "clip" or "atan2", got {self.mode!r}')
        object.__setattr__(self, "max_update", float(bound))

    @property
    def kernel_code(self) -> int:  # type: ignore[override]
        return 5 if self.mode == "atan2" else 0

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("direction", "size") if self.mode == "atan2" else ("size",)


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

    parts: ClassVar[tuple[str, ...]] = ("momentum",)

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


RULES = (AlignedMomentum, Cautious, Grams, MomentumBrake, UpdateClamp)
_NAMES = {
    "align": AlignedMomentum(),
    "align-element": AlignedMomentum(block="element"),
    "cautious": Cautious(),
    "grams": Grams(),
    "brake": MomentumBrake(),
}


def as_overshoot(value: Any) -> Overshoot | tuple[Overshoot, ...] | None:
    """`None`, a rule's short name, a rule, or a tuple of them, as a rule or a tuple of several.

    Raises:
        ValueError: an unknown name, or two rules that shape the same part of an update. TypeError: anything else.
    """
    if value is None or isinstance(value, RULES):
        return value
    if isinstance(value, str):
        if value in _NAMES:
            return _NAMES[value]
        raise ValueError(f"overshoot={value!r} is unknown in this version; accepted: {sorted(_NAMES)} or a rule")
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"overshoot must be None, a name, an Overshoot rule or a tuple of them, got {value!r}")
    rules: tuple[Overshoot, ...] = ()
    for each in value:
        rules += overshoot_rules(as_overshoot(each))
    owner: dict[str, Overshoot] = {}
    for rule in rules:
        for part in rule.parts:
            if part in owner:
                raise ValueError(f"overshoot: {owner[part]} and {rule} both shape the {part} of an update; give one")
            owner[part] = rule
    return rules if len(rules) > 1 else rules[0] if rules else None


def overshoot_rules(value: Overshoot | tuple[Overshoot, ...] | None) -> tuple[Overshoot, ...]:
    """What `as_overshoot` returned, as a tuple."""
    return () if value is None else value if isinstance(value, tuple) else (value,)
