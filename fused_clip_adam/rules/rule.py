"""What a rule may do in a step. The base classes of the three kinds (GradClip, Overshoot, Reset) inherit from here.

A rule never touches a parameter: in torch operations on the device, without a host read, it changes the scalars that
the kernels read (backends/scalars.py), through the `GroupStep` it is given (group_step.py). In the order of a step:

    signals -> (prologue) -> apply -> (update) -> after
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from fused_clip_adam.group_step import GroupStep


class Rule:
    """Base of every rule. `ClassVar`s and properties say what the step must prepare for it."""

    stage: ClassVar[int] = 0  # `apply` runs for rules of stage 0 of all groups, then for those of stage 1, ...
    per_tensor: ClassVar[bool] = False  # reads sums over single tensors: they have to be on one device
    needs_norm: bool = False  # this step's norm before the update
    of_all: ClassVar[bool] = False  # what it reads is the norm over all gradients of the step, not only of each tensor
    sums_all: ClassVar[bool] = False  # sums over all tensors' gradients and moments before the update
    needs_max: ClassVar[bool] = False  # and the largest |g| of every tensor
    extra_reads: tuple[str, ...] = ()  # what a pass of its own reads: "param", "grad", "exp_avg", "exp_avg_sq"
    needs_observed: ClassVar[bool] = False  # what objectives have clipped, of all ranks
    needs_dots: bool = False  # sums of m g, gathered by the update
    guarded: bool = False  # writes one of the scalars from `forget` on
    weighs: bool = False  # varies a beta, so that every parameter needs `bias_weights`

    @property
    def acts(self) -> bool:
        """Whether any of the three methods of a step has something to do."""
        return True

    @property
    def needs_total_only(self) -> bool:
        """Whether the norm over all gradients is all that it needs of them before the update."""
        return self.needs_norm and self.of_all and not self.per_tensor

    def memory(self, tensors: int) -> dict[str, tuple[tuple[int, ...], float]]:
        """What the rule remembers: name -> (shape, first value), float64. `tensors`: parameters of the group."""
        return {}

    def of_parameters(self) -> list[str]:
        """The names in `memory` that have one number for each parameter."""
        one, two = self.memory(1), self.memory(2)
        return [name for name in one if one[name][0] != two[name][0]]

    def signals(self, step: GroupStep) -> dict[str, Tensor]:
        """Columns of `group_signals`, float64 or bool, 0-d."""
        return {}

    def apply(self, step: GroupStep) -> None:
        """Changes the step's scalars."""

    def after(self, step: GroupStep) -> None:
        """Takes into memory what the update has found; `step.informative` says whether it is to."""


# ---------------------------------------------------------------- numbers a rule accepts


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def positive(rule: str, name: str, value: Any) -> float:
    if not is_number(value) or not 0.0 < value < math.inf:
        raise ValueError(f"{rule}: {name} must be a positive finite number, got {value!r}")
    return float(value)


def within(rule: str, name: str, value: Any, least: float, most: float) -> float:
    if not is_number(value) or not least <= value <= most:
        raise ValueError(f"{rule}: {name} must be in [{least:g}, {most:g}], got {value!r}")
    return float(value)


def fraction(rule: str, name: str, value: Any) -> float:
    if not is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"{rule}: {name} must be in [0, 1), got {value!r}")
    return float(value)


def count(rule: str, name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 2**31:
        raise ValueError(f"{rule}: {name} must be an int of at least {least}, got {value!r}")
    return value


def flag(rule: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{rule}: {name} must be a bool, got {value!r}")
    return value


def parts_of(rules: tuple, argument: str, whole: str) -> None:
    """Raises:
    ValueError: two rules of a tuple shape the same part.
    """
    owner: dict[str, Any] = {}
    for rule in rules:
        for part in rule.parts:
            if part in owner:
                raise ValueError(f"{argument}: {owner[part]} and {rule} both shape the {part} of {whole}; give one")
            owner[part] = rule
