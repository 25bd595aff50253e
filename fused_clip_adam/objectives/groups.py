"""Which elements belong together, and their sums: no host read, one fixed order, so that runs repeat bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Groups:
    """A partition of n elements into groups of one size that lie side by side, or by equal ids.

    With ids the number of groups stays on the device; what `reduce` returns then has n slots, of which the first
    `number` are groups, in ascending order of their ids, and the rest hold the reduction of nothing.

    Args:
        n: elements.
        size: elements of a group; divides n.
        ids: int64 or int32 [n], any values, any order; in the place of `size`.
        device: the elements' device; needed without `ids`.
    """

    def __init__(self, n: int, *, size: int = 0, ids: Tensor | None = None, device: torch.device | None = None) -> None:
        self.ids = ids
        if ids is None:
            self.shape = (n // max(size, 1), size)
            self.number = torch.full((), self.shape[0], dtype=torch.int64, device=device)
            return
        sorted_ids, self.order = ids.sort(stable=True)
        first = torch.ones_like(sorted_ids, dtype=torch.bool)
        first[1:] = sorted_ids[1:] != sorted_ids[:-1]
        slots = first.cumsum(0) - 1
        self.slot = torch.empty_like(slots).scatter_(0, self.order, slots)
        self.offsets = torch.searchsorted(slots, torch.arange(n + 1, device=ids.device))
        self.number = first.sum()

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """[n] -> [groups]; `how` is "sum" or "min"."""
        if self.ids is None:
            x = x.reshape(self.shape)
            return x.sum(1) if how == "sum" else x.amin(1)
        # Each group's elements follow each other, so that no atomic addition decides the order of a sum.
        return torch.segment_reduce(x[self.order], how, offsets=self.offsets, unsafe=True)

    def spread(self, x: Tensor) -> Tensor:
        """[groups] -> [n], to every member."""
        return x.unsqueeze(1).expand(self.shape).reshape(-1) if self.ids is None else x[self.slot]


def check_ids(name: str, ids: Any, like: Tensor) -> Tensor:
    """The ids as int64, one per element of the 1-D tensor `like`."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.shape != like.shape or ids.device != like.device:
        raise ValueError(f"{name} must be {list(like.shape)} on {like.device}, got {list(ids.shape)} on {ids.device}")
    return ids.detach().long()


def arithmetic(tensor: Tensor) -> torch.dtype:
    """The dtype that results take: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
