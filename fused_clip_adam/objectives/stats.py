"""ClipStats: what the objective saw and suppressed, in one small device buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

FIELDS = (
    "tokens",
    "clipped_low",
    "clipped_high",
    "clipped_dual",
    "suppressed_mass",
    "total_mass",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "ratio_sum",
    "ratio_sq_sum",
    "ratio_min",
    "ratio_max",
    "nonfinite",
)
"""Order of the buffer; csrc/objective_math.h holds the same."""


class DeviceStats:
    """Sums over tokens, and their least and greatest ratio, in one float32 buffer on the tokens' device; each name of
    `fields` is a 0-d view of it.

    A subclass sets `fields`, with "tokens", "ratio_min" and "ratio_max" among them; all others must be sums.
    """

    __slots__ = ("buffer",)
    fields: ClassVar[tuple[str, ...]]

    def __init__(self, buffer: Tensor) -> None:
        if buffer.shape != (len(self.fields),) or buffer.dtype != torch.float32:
            raise ValueError(
                f"{type(self).__name__}: buffer must be float32 [{len(self.fields)}], got {buffer.dtype} "
                f"{list(buffer.shape)}"
            )
        self.buffer = buffer

    def __getattr__(self, name: str) -> Tensor:
        if name in self.fields:
            return self.buffer[self.fields.index(name)]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; fields: {', '.join(self.fields)}")

    def __add__(self, other: Self) -> Self:
        """Statistics of both: sums add, ratio_min and ratio_max merge. On the device."""
        if type(other) is not type(self):
            return NotImplemented
        merged = (self.buffer + other.buffer).nan_to_num_()
        merged[self.fields.index("ratio_min")] = torch.minimum(self.ratio_min, other.ratio_min)
        merged[self.fields.index("ratio_max")] = torch.maximum(self.ratio_max, other.ratio_max)
        return type(self)(merged)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(device={self.buffer.device})"

    def __getstate__(self) -> Tensor:
        return self.buffer

    def __setstate__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def clone(self) -> Self:
        """A copy with its own buffer."""
        return type(self)(self.buffer.clone())

    def all_reduce(self, group=None) -> Self:
        """Merges over the ranks of a process group, in place; returns itself.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            name = type(self).__name__
            raise RuntimeError(f"{name}.all_reduce: torch.distributed is not initialised (init_process_group)")
        least, greatest = self.ratio_min.clone(), self.ratio_max.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=group)
        self.ratio_min.zero_()
        dist.all_reduce(self.buffer, op=dist.ReduceOp.SUM, group=group)
        self.buffer.nan_to_num_()
        self.ratio_min.copy_(least)
        self.ratio_max.copy_(greatest)
        return self

    def to_dict(self) -> dict[str, float]:
        """Python floats by field name: the only call that reads the device. Without tokens, ratio_min is 0."""
        values = dict(zip(self.fields, self.buffer.tolist()))
        if values["tokens"] == 0:
            values["ratio_min"] = 0.0
        return values


class ClipStats(DeviceStats):
    """Statistics of one or several calls of an objective; each name of `FIELDS` is a 0-d view of the buffer.

    D = logp - old_logp, r the ratio the objective clips (the sequence's for GSPO), A the advantage, a the token's
    aggregation weight:

    - `tokens`: tokens that counted (unmasked and finite); `nonfinite`: unmasked tokens with a non-finite input,
      treated as masked.
    - `clipped_low`: A < 0 and r below the lower bound; `clipped_high`: A > 0 and r above the upper one;
      `clipped_dual`: A < 0 and r above the dual bound.
    - `total_mass` = sum a r |A|; `suppressed_mass`: the part of it whose gradient is zero.
    - `kl_k1` = sum -D, `kl_k2` = sum D^2 / 2, `kl_k3` = sum exp(D) - 1 - D: estimates of KL(old, new) times `tokens`.
    - `ratio_sum`, `ratio_sq_sum` (for the effective sample size), `ratio_min`, `ratio_max`. With no token the last
      two hold float32's largest number and 0, the identities of their merges.

    Counts are float32: exact up to 2^24 tokens, values saturate at float32's largest number and are never NaN.

    Args:
        buffer: float32 [14] in the order of `FIELDS`.

    Raises:
        ValueError: another shape or dtype.
    """

    __slots__ = ()
    fields = FIELDS
