"""What an objective tells a backend: the token rule, its scalars, and what it makes of the inputs beforehand."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_clip_adam.backends.reference_objective import NEEDS_SEQUENCE, ratio

INFINITY = math.inf


@dataclass(frozen=True)
class Sequences:
    """Which sequence a token belongs to. Row layout: a row each, and the tensors are None.

    Packed layout: `ids` int64 [N]; `order` int64 [N], the tokens sorted by sequence; `offsets` int64 [count + 1], where
    each sequence starts in that order. `distinct`: None, or a 0-d tensor with the number of sequences where `count` is
    only a bound for it (known on the device alone).
    """

    count: int
    ids: Tensor | None = None
    order: Tensor | None = None
    offsets: Tensor | None = None
    distinct: Tensor | None = None


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call as [rows, cols]; `logp` is the only one that may carry a graph.

    `aux` and `bounds` are what the rule asked for (csrc/objective_math.h); `slope`: d logp here / d logp of the call,
    None for 1. The others are the call's own, see `policy_loss`.
    """

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor | None
    weights: Tensor | None
    ref_logp: Tensor | None
    entropy: Tensor | None
    old_probs: Tensor | None
    ewma_logp: Tensor | None
    sequences: Sequences
    generator: torch.Generator | None
    process_group: Any
    flow: dict[str, Any]
    backend: ModuleType
    aux: Tensor | None = None
    bounds: Tensor | None = None
    slope: Tensor | None = None

    def replace(self, **changes: Any) -> Inputs:
        return dataclasses.replace(self, **changes)

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic: float64 for float64 logp, else float32."""
        return torch.float64 if self.logp.dtype == torch.float64 else torch.float32

    def counted(self) -> Tensor:
        """bool [rows, cols]: the tokens that the kernels will count: unmasked, and every input finite."""
        total = self.logp.detach().to(self.dtype) - self.old_logp.to(self.dtype)
        for x in (self.advantages, self.weights, self.ref_logp, self.entropy):
            total = total if x is None else total + 0 * x  # 0 * x is 0 where x is finite, else NaN
        valid = total.isfinite()
        return valid if self.mask is None else valid & self.mask

    def ratio(self, valid: Tensor) -> Tensor:
        """exp(D), 1 where not `valid`."""
        return ratio(torch.where(valid, self.logp.detach().to(self.dtype) - self.old_logp.to(self.dtype), 0.0))


class Objective:
    """Base of the objectives.

    `rule` is the number csrc/objective_math.h knows the token equations by; `default_aggregation` what
    `policy_loss(aggregation=None)` takes; `needs` and `accepts` name keyword inputs of `policy_loss` beyond the common
    ones, required and optional.
    """

    rule: ClassVar[int]
    default_aggregation: ClassVar[str] = "token-mean"
    needs: ClassVar[tuple[str, ...]] = ()
    accepts: ClassVar[tuple[str, ...]] = ()
    by_sequence: ClassVar[bool] = False
    """`prepare` reads the sequences."""
    weighs_by_sequence: ClassVar[bool] = False
    """With one advantage a sequence, d loss / d logp is the same for all tokens of it that count."""
    weights_per_token: ClassVar[bool] = False
    """`weights` of a whole sequence have no meaning here."""

    @property
    def needs_sequences(self) -> bool:
        return self.by_sequence or self.rule in NEEDS_SEQUENCE

    def scalars(self) -> tuple[float, ...]:
        """Eight numbers: low, high, dual, cap, a, b, c, d of the rule; see `scalars` below."""
        raise NotImplementedError

    def prepare(self, inputs: Inputs) -> Inputs:
        """What must be known of the whole batch before the token equations; on the device, without reading it."""
        return inputs


def scalars(
    low: float = 0.0,
    high: float = INFINITY,
    dual: float | None = None,
    cap: float | None = None,
    a: float = 0.0,
    b: float = 0.0,
    c: float = 0.0,
    d: float = 0.0,
) -> tuple[float, ...]:
    """The scalars of a rule as floats; absent bounds are infinite."""
    dual, cap = (INFINITY if x is None else x for x in (dual, cap))
    return tuple(float(x) for x in (low, high, dual, cap, a, b, c, d))


# ---------------------------------------------------------------- checks


def number(name: str, value: Any) -> float:
    """The value as a Python float.

    Raises:
        TypeError: not a number; names the argument.
    """
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
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


def dual_bound(name: str, dual_clip: float | None) -> None:
    """
    Raises:
        TypeError: not a number. ValueError: not greater than 1.
    """
    if dual_clip is not None and not number(f"{name}: dual_clip", dual_clip) > 1.0:
        raise ValueError(f"{name}: dual_clip must be greater than 1, got {dual_clip!r}")


def between(name: str, value: float, least: float, most: float = INFINITY) -> float:
    """The value as a float, finite and in (least, most].

    Raises:
        TypeError: not a number. ValueError: outside.
    """
    x = number(name, value)
    if not (least < x <= most and x < INFINITY):
        accepted = f"above {least:g}" + (" and finite" if most == INFINITY else f", at most {most:g}")
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return x


def at_least_zero(name: str, value: float) -> float:
    """The value as a float, finite and not negative.

    Raises:
        TypeError: not a number. ValueError: outside.
    """
    x = number(name, value)
    if not 0.0 <= x < INFINITY:
        raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")
    return x
