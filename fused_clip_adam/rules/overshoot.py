"""Overshoot rules: what becomes of momentum that no longer agrees with the gradient.

All but two change only the emitted direction or size: `exp_avg` and `exp_avg_sq` stay what plain AdamW would store.
`MomentumBrake` and `MedianMomentum` change how the moments move. `kernel_code` and `brake_code` are the numbers
csrc/update_math.h knows the rules by.

A rule shapes one or more parts of an update: its "momentum" (beta1 of the step), its "direction", its "size". Rules of
different parts can be given together, as a tuple.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fused_clip_adam.backends import scalars
from fused_clip_adam.rules.rule import Rule, flag, parts_of, positive

if TYPE_CHECKING:
    from fused_clip_adam.group_step import GroupStep

_MAX_BLOCK = 2**48
"""More than a tensor can hold, and sums of two of them stay far inside int64."""


class Overshoot(Rule):
    """Base of the rules accepted as `overshoot=`."""

    stage: ClassVar[int] = 2  # what they sum over depends on what the clip rules have made of the gradient
    kernel_code: ClassVar[int] = 0  # 0: the element's equation stays AdamW's
    parts: ClassVar[tuple[str, ...]] = ("direction",)
    acts: bool = False


@dataclass(frozen=True)
class AlignedMomentum(Overshoot):
    """Emits k a m + b g: the old momentum is used only where it points the way of the gradient.

    k = 1 if the sum of m g over the block is positive, else 0. A block whose gradient is zero does not move, so the
    coast after clipping is removed exactly.

    Args:
        block: number of consecutive elements (row-major, from each tensor's start; of a DTensor, from the start of this
            rank's shard) that share one k, or "element", or "tensor".
        lag: only with "tensor", which has to read m and g once more before the update (36 bytes an element in float32).
            True takes the sum of the *previous* step instead, gathered inside the update pass, so that the whole step
            is one pass; k is 1 in the first step. A change of direction then shows one step late.

    State: with `lag`, `keep` [parameters of the group], in the optimizer's state dict.

    Raises:
        ValueError: `block` is neither an int from 1 to 2^48 nor one of the names; lag without "tensor".

    Source: this project; docs/overshoot_study.md says what it did in training. Per element it is the gate of Cautious
    (arXiv 2411.16085) applied to the old momentum only.
    """

    block: int | str = 1024
    lag: bool = False

    def __post_init__(self) -> None:
        if flag("AlignedMomentum", "lag", self.lag) and self.block != "tensor":
            raise ValueError(f'AlignedMomentum: lag=True goes with block="tensor" only, got block={self.block!r}')
        if self.block in ("element", "tensor"):
            return
        if isinstance(self.block, bool) or not isinstance(self.block, int) or not 1 <= self.block <= _MAX_BLOCK:
            raise ValueError(
                f'AlignedMomentum: block must be an int from 1 to 2^48, "element" or "tensor", got {self.block!r}'
            )

    @property
    def kernel_code(self) -> int:  # type: ignore[override]
        return {"element": 2, "tensor": 0}.get(self.block, 1)

    @property
    def guarded(self) -> bool:  # type: ignore[override]
        return self.block == "tensor"

    acts = per_tensor = guarded

    @property
    def extra_reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("grad", "exp_avg") if self.block == "tensor" and not self.lag else ()

    @property
    def needs_dots(self) -> bool:  # type: ignore[override]
        return self.lag

    def memory(self, tensors: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"keep": ((tensors,), 1.0)} if self.lag else {}

    def apply(self, step: GroupStep) -> None:
        keep = step.memory["keep"] if self.lag else (step.sums(scalars.DOT, effective=True)[:, 0] > 0).double()
        step.set("keep", keep)

    def after(self, step: GroupStep) -> None:
        if self.lag:
            own, dots = step.memory["keep"], step.dots()
            seen = step.informative & ~dots.isnan()  # NaN: a parameter without a gradient
            own.copy_(torch.where(seen, (dots >= 0).double(), own))  # 0: all of m is, see momentum_dot


@dataclass(frozen=True)
class Cautious(Overshoot):
    """Emits nothing where the new momentum and the gradient disagree in sign: u = u [m' g > 0].

    Args:
        rescale: divides the update of a tensor by the mean of its mask (at least 1e-3), as published. Where few
            gradients are not zero, which is just what clipping causes, that multiplies the step: by 100 where 1% are.
            Costs one more read of m and g: 36 bytes an element in float32.

    Source: Liang et al. 2024, C-AdamW (arXiv 2411.16085).
    """

    kernel_code: ClassVar[int] = 3

    rescale: bool = False

    def __post_init__(self) -> None:
        flag("Cautious", "rescale", self.rescale)

    @property
    def per_tensor(self) -> bool:  # type: ignore[override]
        return self.rescale

    acts = per_tensor

    @property
    def extra_reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("grad", "exp_avg") if self.rescale else ()

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("direction", "size") if self.rescale else ("direction",)

    def apply(self, step: GroupStep) -> None:
        agreeing = step.sums(scalars.AGREE, effective=True)[:, 0] / step.numels
        step.multiply("lr", 1 / agreeing.clamp(min=1e-3))


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
        bound = positive("UpdateClamp", "max_update", self.max_update)
        if self.mode not in ("clip", "atan2"):
            raise ValueError(f'UpdateClamp: mode must be "clip" or "atan2", got {self.mode!r}')
        object.__setattr__(self, "max_update", bound)

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
    needs_observed: ClassVar[bool] = True
    weighs: ClassVar[bool] = True

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


@dataclass(frozen=True)
class MedianMomentum(Overshoot):
    """Moves the momentum by at most tau towards the gradient: m' = m + clamp(g - m, -tau, tau).

    The proximal step of an l1 distance, which follows the median of the gradients rather than their mean: a single
    outlier moves it no further than any other. beta1 is not read, and m' is not bias-corrected.

    Args:
        tau: in the gradients' unit; positive.

    Goes with rules that need no beta1: not with `AlignedMomentum`, `MomentumBrake`.

    Raises:
        ValueError: `tau` is not a positive finite number.

    Source: Schaipp et al. 2025 (arXiv 2402.12828), the stochastic proximal point method of the l1 distance.
    """

    stage: ClassVar[int] = 1  # before what sums over the new momentum
    parts: ClassVar[tuple[str, ...]] = ("momentum",)
    guarded: ClassVar[bool] = True
    acts: ClassVar[bool] = True

    tau: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", positive("MedianMomentum", "tau", self.tau))

    def apply(self, step: GroupStep) -> None:
        for name, value in (("a", 1.0), ("b", 0.0), ("prox", self.tau), ("inv_w1", 1.0)):
            step.set(name, value)


@dataclass(frozen=True)
class FisherUpdate(Overshoot):
    """What `FusedFAdam` gives its groups, whose docstring has the equations; b of step t is 1 - (1 - beta2) / W2."""

    parts: ClassVar[tuple[str, ...]] = ("momentum", "direction", "size")
    kernel_code: ClassVar[int] = 6
    acts: ClassVar[bool] = True
    per_tensor: ClassVar[bool] = True
    needs_norm: ClassVar[bool] = True
    extra_reads: ClassVar[tuple[str, ...]] = ("param", "grad", "exp_avg_sq")

    clip: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", positive("FusedFAdam", "clip", self.clip))

    def apply(self, step: GroupStep) -> None:
        one_minus_beta2 = step.get("one_minus_beta2") * step.get("inv_sqrt_w2").square()
        step.set("one_minus_beta2", one_minus_beta2)
        step.set("beta2", 1 - one_minus_beta2)
        grad_rms = step.norms() / step.unscale * step.get("grad_factor").abs() / step.numels.sqrt()
        step.multiply("eps", torch.where(grad_rms > 1.0, grad_rms, 1.0))
        natural_grad, natural_param = (step.sums(scalars.FADAM_SQUARES) / step.numels[:, None]).sqrt().unbind(1)
        step.set("inv_w1", self._factor(natural_grad))
        step.set("inv_sqrt_w2", step.weight_decay * self._factor(natural_param))
        step.set("decay", 1.0)

    def _factor(self, rms: Tensor) -> Tensor:
        return self.clip / torch.where(rms > 1.0, rms, torch.where(rms.isnan(), rms, 1.0))


RULES = (AlignedMomentum, Cautious, Grams, MedianMomentum, MomentumBrake, UpdateClamp)
_NAMES = {
    "align": AlignedMomentum(),
    "align-element": AlignedMomentum(block="element"),
    "align-tensor": AlignedMomentum(block="tensor"),
    "cautious": Cautious(),
    "grams": Grams(),
    "brake": MomentumBrake(),
}


def as_overshoot(value: Any) -> Overshoot | tuple[Overshoot, ...] | None:
    """`None`, a rule's short name, a rule, or a tuple of them, as a rule or a tuple of several.

    Raises:
        ValueError: an unknown name, or two rules that shape the same part of an update. TypeError: anything else.
    """
    if value is None or isinstance(value, (*RULES, FisherUpdate)):
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
    parts_of(rules, "overshoot", "an update")
    kinds = {type(rule): rule for rule in rules}
    if MedianMomentum in kinds and AlignedMomentum in kinds:
        raise ValueError(
            f"overshoot: {kinds[AlignedMomentum]} weighs momentum and gradient by beta1, which "
            f"{kinds[MedianMomentum]} has none of; give one"
        )
    return rules if len(rules) > 1 else rules[0] if rules else None


def overshoot_rules(value: Overshoot | tuple[Overshoot, ...] | None) -> tuple[Overshoot, ...]:
    """What `as_overshoot` returned, as a tuple."""
    return () if value is None else value if isinstance(value, tuple) else (value,)
