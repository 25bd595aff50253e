"""One step as the rules of a parameter group see it: sums over its tensors in, scalars of its tensors out.

    rule.apply(step) -> step.sums(...), step.norms(), ... -> step.multiply("lr", ...), step.set("theta", ...)

A value of the group is float64 on the device: 0-d, or one number a parameter, [n], NaN where one has no gradient.
In the backend's buffers tensors stand in the order of the batches; the translation is here and nowhere else. Nothing is
read by the host.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused_clip_adam.backends import scalars
from fused_clip_adam.batches import Batch
from fused_clip_adam.distributed import Ranks, Spread, moved


@dataclasses.dataclass
class Part:
    """One device's share of a step."""

    device: torch.device
    backend: Any
    batches: list[Batch] = dataclasses.field(default_factory=list)
    coupled: list[bool] = dataclasses.field(default_factory=list)  # of each batch: weight decay enters the gradient
    spiked: list[bool] = dataclasses.field(default_factory=list)  # of each batch: a rule brings spikes down
    grad_square_sum: Any = None
    steps_skipped: Any = None
    gathered: dict[Spread | None, Tensor] = dataclasses.field(default_factory=dict)
    """What the update pass adds its gradients' squares to, by how tensors lie over ranks."""
    placed: Any = None
    square_sums: Any = None  # of phase 1: its own, as the backend gives them
    summed_by_tensor: bool = False  # `square_sums` are one number a tensor on every backend
    maxima: Any = None  # float64 [rows], of phase 1: the largest |g| of each tensor
    samples: Any = None  # PlacedSamples, where the step's gradient is made of them
    previous_norm: bool = False  # the step's own norm is not known: clips take that of the step before
    scalars: Any = None  # float64 [rows, WIDTH], of the prologue
    unit_factors: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # by batch
    dots: Any = None  # the update's sums of m g
    held: list[Tensor] = dataclasses.field(default_factory=list)

    @property
    def on_device(self) -> bool:
        return getattr(self.backend, "ON_DEVICE", False)

    @property
    def firsts(self) -> list[int]:
        """Of each batch, its first row in the buffers of the backend."""
        firsts, at = [], 0
        for batch in self.batches:
            firsts.append(at)
            at += len(batch.params)
        return firsts

    @property
    def rows(self) -> int:
        return sum(len(batch.params) for batch in self.batches)

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor itself, alive until the step's kernels have been launched."""
        self.held.append(tensor)
        return tensor

    def sum_by_tensor(self) -> None:
        """Phase 1 where a rule needs the largest |g| of every tensor, or the gradient is made of samples: it comes with
        the sums of squares.
        """
        both = torch.cat([self.reduce(scalars.SQUARES_MAX, at) for at in range(len(self.batches))])
        self.square_sums, self.maxima = both[:, 0].contiguous(), both[:, 1]
        self.summed_by_tensor = True

    def sum_by_spread(self) -> list[tuple[Spread | None, Tensor]]:
        """The sums of squares of phase 1, added up: float64 0-d for each way in which tensors lie over ranks."""
        spreads = [batch.spread for batch in self.batches]
        if not spreads:
            return []
        if all(spread == spreads[0] for spread in spreads):
            return [(spreads[0], self.square_sums.sum())]
        own = self.square_sums if self.summed_by_tensor else self.backend.by_tensor(self.placed, self.square_sums)
        firsts = [*self.firsts, self.rows]
        return [(spread, own[firsts[at] : firsts[at + 1]].sum()) for at, spread in enumerate(spreads)]

    def reduce(self, kind: int, at: int, effective: bool = False) -> Tensor:
        """float64 [rows of the batch, 2], see `reduce` of backends/reference_step.py."""
        as_seen = (self.coupled[at], self.spiked[at], self.unit_factors.get(at))
        options = as_seen if effective else (False, False, None)
        return self.backend.reduce(self.placed, self.scalars, at, self.firsts[at], kind, *options)


@dataclasses.dataclass
class StepFacts:
    """What all groups share."""

    parts: list[Part]
    ranks: Ranks | None = None  # None: all there is, is here
    live: Tensor | None = None  # bool: the step is not skipped; known after the prologue
    norm: Tensor | None = None  # float64 0-d, unscaled, over all gradients; None where no rule needs it
    previous: bool = False  # `norm` is of the step before
    usable: Tensor | None = None  # bool: the norm is finite, not zero, and found_inf does not skip the step
    unscale: Tensor | float = 1.0  # |1 / grad_scale|
    suppressed: Tensor | None = None  # c of the observed ClipStats
    totals: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # by kind of reduction, over all gradients


@dataclasses.dataclass
class Layout:
    """Constants of one batch on its device, uploaded when they change."""

    key: tuple[list[int], list[int]]  # positions and element counts, on the host
    positions: Tensor | None  # of its tensors in the group: int64, or None for 0, 1, 2, ...
    numels: Tensor  # float64, at least 1


def layout(batch: Batch, kept: Layout | None) -> Layout:
    """`kept`, if it is this batch's, else a new one."""
    key = (batch.positions, [max(p.numel(), 1) for p in batch.owners])
    if kept is not None and kept.key == key and kept.numels.device == batch.device:
        return kept
    positions, numels = (torch.tensor(own, dtype=torch.int64, device="cpu") for own in key)
    if key[0] == list(range(len(key[0]))):
        positions = None
    on_device = [None if own is None else moved(own, batch.device) for own in (positions, numels.double())]
    return Layout(key, *on_device)


class GroupStep:
    """See the module. `memory` is that of the rule at hand."""

    def __init__(
        self, facts: StepFacts, index: int, group: dict[str, Any], layout_of: Callable[[Part, int], Layout]
    ) -> None:
        self.facts = facts
        self.index = index
        self.tensors = len(group["params"])
        self.weight_decay = float(group["weight_decay"])
        self.decay_after = bool(group.get("decay_after_update"))
        self.memory: dict[str, Tensor] = {}
        self.rule: Any = None
        """The rule at hand."""
        self.reset: Tensor | None = None
        """bool 0-d: this step forgets the moments."""
        self.informative: Tensor | None = None
        """bool 0-d, in `after`: the step was not skipped, and was none of zero gradients at lr = 0."""
        self._layout_of = layout_of

    # ------------------------------------------------------------ what is known

    @property
    def norm(self) -> Tensor:
        return self.facts.norm

    @property
    def usable(self) -> Tensor:
        """bool 0-d: the norm that the rule at hand reads is finite and not zero, and the step is not skipped."""
        if self.facts.previous and self.rule.needs_total_only:
            return self.live & self.norm.isfinite() & (self.norm > 0)
        return self.facts.usable

    @property
    def unscale(self) -> Tensor | float:
        return self.facts.unscale

    @property
    def suppressed(self) -> Tensor:
        return self.facts.suppressed

    @property
    def live(self) -> Tensor:
        """bool 0-d: the step is not skipped."""
        return self.facts.live

    @property
    def numels(self) -> Tensor:
        """Elements of each tensor, on all ranks, at least 1: [n]."""
        return self._gathered([self._layout_of(part, at).numels for part, at, _ in self._own()])

    # ------------------------------------------------------------ sums over tensors

    def norms(self) -> Tensor:
        """The norm of each tensor's gradient, unscaled: [n]."""
        return self._of_all_ranks(self._rows_of("square_sums", by_tensor=True)).sqrt() * self.unscale

    def largest(self) -> Tensor:
        """The largest |g| of each tensor, unscaled: [n]."""
        return self._of_all_ranks(self._rows_of("maxima"), largest=True) * self.unscale

    def dots(self) -> Tensor:
        """The sum of m g of each tensor, as the update has found it: [n]."""
        return self._of_all_ranks(self._rows_of("dots", by_tensor=True))

    def sums(self, kind: int, effective: bool = False) -> Tensor:
        """A reduction over each tensor, from the scalars as they are now: [n, 2].

        Args:
            kind: see backends/scalars.py. effective: of the gradient as the update will see it, with its L2 term, if
                the group has one, the factors of its output rows and without its spikes.
        """
        return self._of_all_ranks([part.reduce(kind, at, effective) for part, at, _ in self._own()], tail=(2,))

    def total(self, kind: int) -> Tensor:
        """The first sum of a reduction, over all gradients of the optimizer: 0-d."""
        if kind not in self.facts.totals:
            own = [
                (batch.spread, part.reduce(kind, at, effective=True)[:, 0].sum())
                for part in self.facts.parts
                for at, batch in enumerate(part.batches)
            ]
            self.facts.totals[kind] = over_everything(own, self.facts.ranks, self.device)
        return self.facts.totals[kind]

    def scale_rows(self, factors: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Scales the gradient of every output row by `factors(gradient norms, parameter norms)`, float64 [rows]."""
        own = list(self._own())
        sums = [part.backend.unit_sums(part.placed, at) for part, at, _ in own]
        if self.facts.ranks is not None:
            batches = [batch for _, _, batch in own]
            sums = self.facts.ranks.by_row(self.index, list(zip(batches, sums)), self.device)
        for (part, at, _), squares in zip(own, sums):
            norms = squares.sqrt()
            part.unit_factors[at] = factors(norms[:, 0] * self.unscale, norms[:, 1])

    # ------------------------------------------------------------ scalars of tensors

    def get(self, name: str) -> Tensor:
        """A copy of a column of scalars: [n]."""
        return self._gathered([self._column(part, at, name).clone() for part, at, _ in self._own()])

    def multiply(self, name: str, value: Tensor) -> None:
        for part, at, _ in self._own():
            self._column(part, at, name).mul_(self._scattered(value, part, at))

    def set(self, name: str, value: Tensor | float) -> None:
        for part, at, _ in self._own():
            column = self._column(part, at, name)
            if isinstance(value, Tensor):
                column.copy_(self._scattered(value, part, at))
            else:
                column.fill_(value)

    # ------------------------------------------------------------ order of the batches <-> order of the group

    @property
    def device(self) -> torch.device:
        return self.facts.parts[0].device

    def _own(self) -> Iterator[tuple[Part, int, Batch]]:
        for part in self.facts.parts:
            for at, batch in enumerate(part.batches):
                if batch.group == self.index:
                    yield part, at, batch

    def _column(self, part: Part, at: int, name: str) -> Tensor:
        first = part.firsts[at]
        return part.scalars[first : first + len(part.batches[at].params), scalars.COLUMN[name]]

    def _rows_of(self, name: str, by_tensor: bool = False) -> list[Tensor]:
        out = []
        for part, at, batch in self._own():
            values = getattr(part, name)
            if by_tensor and not (name == "square_sums" and part.summed_by_tensor):
                values = part.backend.by_tensor(part.placed, values)
            out.append(values[part.firsts[at] : part.firsts[at] + len(batch.params)])
        return out

    def _of_all_ranks(self, of_batches: list[Tensor], largest: bool = False, tail: tuple[int, ...] = ()) -> Tensor:
        """Sums, or the greatest, over the parts that ranks have of each tensor: [n, *tail]."""
        own = self._gathered(of_batches, tail)
        if self.facts.ranks is None:
            return own
        present = {position for _, _, batch in self._own() for position in batch.positions}
        missing = [] if len(present) == self.tensors else sorted(set(range(self.tensors)) - present)
        return self.facts.ranks.by_tensor(self.index, own, missing, largest)

    def _gathered(self, of_batches: list[Tensor], tail: tuple[int, ...] = ()) -> Tensor:
        whole = len(of_batches) == 1 and of_batches[0].shape[0] == self.tensors
        if whole and all(self._layout_of(part, at).positions is None for part, at, _ in self._own()):
            return of_batches[0]
        out = torch.full((self.tensors, *tail), math.nan, dtype=torch.float64, device=self.device)
        for (part, at, _), own in zip(self._own(), of_batches):
            positions = self._layout_of(part, at).positions
            if positions is None:
                out[: own.shape[0]] = own
            else:
                out.index_copy_(0, positions, own)
        return out

    def _scattered(self, value: Tensor, part: Part, at: int) -> Tensor:
        value = moved(value, part.device)
        positions = self._layout_of(part, at).positions if value.dim() else None
        if positions is not None:
            return value.index_select(0, positions)
        return value[: len(part.batches[at].params)] if value.dim() else value


def over_everything(sums: list[tuple[Spread | None, Tensor]], ranks: Ranks | None, device: torch.device) -> Tensor:
    """The sum over all devices and, where there are any, ranks: float64 0-d, on `device`. `sums`: see `Ranks.total`."""
    if ranks is not None:
        return ranks.total(sums, device)
    return torch.stack([moved(own, device) for _, own in sums]).sum()
