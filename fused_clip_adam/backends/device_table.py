"""The tensors of a step as the GPU kernels read them: tables on the device, kept from step to step.

host tables (rows of addresses, see csrc/table.h) -> `fixed` and `fresh` on the device -> views per launch

    fixed   int64: rows, stride records, chunks. Uploaded when a parameter, a state or a shape changes.
    fresh   int64: the gradients' addresses, then group_scalars. Uploaded, by one pinned asynchronous copy, when one
            of them changes; a step whose gradients stay where they were uploads nothing.

A chunk is (row, first element): the work of one thread block. Chunks depend on shapes alone, so that sums are taken in
the same order on every device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fused_clip_adam.backends import scalars

ROW = 18
"""int64 words of a row: struct Row of csrc/table.h."""
GRAD, NUMEL, DTYPES, STRIDED, GROUP, UNIT, SAMPLES, SAMPLE = 1, 8, slice(9, 12), 13, 14, 15, 16, 17
"""Columns of a row."""
GROUP_SCALARS = len(scalars.GROUP_SCALARS)

_CHUNK_SMALL, _CHUNK_LARGE, _LARGE = 4096, 16384, 2**24
"""Elements of a chunk, and the total from which the larger one leaves enough blocks to fill a device."""
_UNIT_SPAN, _FEWEST_UNITS, _MOST_UNITS = 4096, 8, 512
"""A chunk of output rows has about so many elements, but at least and at most so many rows; longer rows are alone."""
_SPARES = 4
"""Pinned buffers kept ready for CUDA-graph captures: pinned memory cannot be allocated while one is under way."""

_read_by_graphs: list = []
"""What captured graphs read at every replay. A graph does not say when it dies, so this is kept for good."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """What one norm or update launch needs to know on the host: tensors of one batch with the same dtypes."""

    batch: int
    dtypes: tuple[int, int, int]  # of param, grad, states: enum DType of csrc/table.h
    first_chunk: int  # chunks and partial sums of a launch lie side by side
    chunks: int
    chunk_size: int
    elements: int
    strided: bool  # some tensor is not C-contiguous


@dataclasses.dataclass(frozen=True)
class UnitLaunch:
    """The output rows of one batch's tensors with the same dtypes."""

    dtypes: tuple[int, int, int]
    first_chunk: int
    chunks: int


@dataclasses.dataclass(frozen=True)
class Units:
    """Output rows, for rules that bound each. Built when first asked for: other rules need none of it."""

    starts: Tensor  # int64 [rows], on the device: a tensor's first output row among those of its batch
    totals: list[int]  # of each batch
    chunks: Tensor  # int64 [n, 2], on the device: (row, its first output row here)
    launches: list[list[UnitLaunch]]  # of each batch


def units_at_once(unit: int) -> int:
    """Output rows in a chunk, where each has `unit` elements: csrc/cuda/reduce.cu and triton_step.py do the same."""
    return 1 if unit > _UNIT_SPAN else min(_MOST_UNITS, max(_FEWEST_UNITS, _UNIT_SPAN // max(unit, 1)))


class DeviceTables:
    """Tables of all batches on one device, and the scratch buffers of a step."""

    def __init__(self, head: Tensor, counts: list[int], blocks: list[int], fresh_words: int, device: torch.device):
        self.device = device
        self.rows = sum(counts)
        self.counts = counts
        self.groups = (fresh_words - self.rows) // GROUP_SCALARS
        self.launches, chunks = _make_launches(head, counts, blocks)
        self.chunks_at = head.numel()
        """Where in `fixed` the chunks begin, in words: two a chunk, in the order of the launches."""
        self._host_chunks = chunks
        fixed = torch.cat([head, chunks])
        self.fixed = _upload(fixed, torch.empty_like(fixed, device=device))
        self.fresh = torch.empty(fresh_words, dtype=torch.int64, device=device)
        self.partials = torch.zeros(chunks.numel() // 2, dtype=torch.float64, device=device)
        self.pairs = torch.zeros(chunks.numel() // 2, 2, dtype=torch.float64, device=device)
        """The sums of a reduction, by chunk."""
        self.dots = torch.zeros(chunks.numel() // 2, dtype=torch.float64, device=device)
        """The update's sums of m g, by chunk."""
        self.scalars = torch.zeros(self.rows, scalars.WIDTH, dtype=torch.float64, device=device)
        self.finished = torch.zeros(1, dtype=torch.int32, device=device)
        self.samples: Any = None
        """Of this step: PlacedSamples, or None."""
        self.captured = False
        self._segments: tuple[Tensor, Tensor] | None = None
        self._units: Units | None = None
        self._key = (head, counts, blocks, fresh_words)
        self._spares: list[Tensor] = []
        self._last_fresh: Tensor | None = None

    def matches(self, head: Tensor, counts: list[int], blocks: list[int], fresh_words: int) -> bool:
        """Whether the tables on the device are those of this step, but for the contents of `fresh`."""
        own, *rest = self._key
        return rest == [counts, blocks, fresh_words] and torch.equal(own, head)

    def segments(self) -> tuple[Tensor, Tensor]:
        """(rows, how many chunks they have), of every tensor with elements: int64, uploaded when first asked for."""
        if self._segments is None:
            chunks = self._host_chunks
            # Chunks of a tensor lie side by side, but tensors in the order of the launches.
            rows, lengths = torch.unique_consecutive(chunks.view(-1, 2)[:, 0], return_counts=True)
            self._segments = tuple(_upload(x, torch.empty_like(x, device=self.device)) for x in (rows, lengths))
        return self._segments

    def units(self) -> Units:
        """The output rows of the tensors, see `Units`."""
        if self._units is None:
            head, counts, _, _ = self._key
            self._units = _make_units(head, counts, self.device)
        return self._units

    def upload_fresh(self, fresh: Tensor, capturable: bool) -> None:
        """One asynchronous copy, or none where nothing changed. Captured, it is repeated by every replay."""
        if _is_capturing(self.device):
            if not self._spares:
                raise RuntimeError(
                    f"more than {_SPARES} CUDA-graph captures of one optimizer without a step outside a capture "
                    "between them; run one"
                )
            staged = self._spares.pop()
            staged.copy_(fresh)
            _read_by_graphs.append((self, staged))
            self.captured = True
            self.fresh.copy_(staged, non_blocking=True)
            return
        if capturable and self.device.type != "cpu":
            while len(self._spares) < _SPARES:
                self._spares.append(torch.empty(fresh.numel(), dtype=torch.int64, pin_memory=True))
        # A replayed graph has written its own: what is on the device is known only where nothing was captured.
        if not self.captured and self._last_fresh is not None and torch.equal(self._last_fresh, fresh):
            return
        _upload(fresh, self.fresh)
        self._last_fresh = fresh


def place(
    tables: list[Tensor],
    group_scalars: Tensor,
    blocks: list[int],
    kept: DeviceTables | None,
    device: torch.device,
    capturable: bool,
    samples: Any = None,
) -> DeviceTables:
    """The tables of a step on the device: `kept`, refreshed, where it still describes the same tensors.

    Args:
        tables: host tables of this device's batches, from `tensor_table`.
        group_scalars: float64 [groups, 17] on the host.
        blocks: per batch, a number of elements that chunks must be a multiple of.
        kept: what the previous step got.
        capturable: a CUDA graph may be captured later; keeps buffers ready for it.
        samples: PlacedSamples (samples.py) where the gradients are stacks of samples, else None.

    Raises:
        RuntimeError: under CUDA-graph capture, where the tables have to be built first.
    """
    counts, head, grads = _combine(tables)
    fresh = torch.cat([grads, group_scalars.view(torch.int64).reshape(-1)])
    key = (head, counts, list(blocks), fresh.numel())
    if kept is None or not kept.matches(*key):
        if _is_capturing(device):
            raise RuntimeError(
                "a CUDA graph is being captured, but this optimizer has not yet taken a step with these parameters and "
                "states outside a capture; take one (or a few) first, as torch.cuda.graph's documentation advises"
            )
        kept = DeviceTables(*key, device)
    kept.upload_fresh(fresh, capturable)
    kept.samples = samples
    return kept


def by_tensor(placed: DeviceTables, sums: Tensor, maximum: bool = False) -> Tensor:
    """What the kernels gave by chunk, float64 [chunks], by tensor: float64 [rows]. See reference_step.py."""
    rows, lengths = placed.segments()
    folded = torch.segment_reduce(sums, "max" if maximum else "sum", lengths=lengths, unsafe=True)
    return sums.new_zeros(placed.rows).index_copy_(0, rows, folded)


def rows_of_pairs(placed: DeviceTables, batch: int, first: int, maximum: bool) -> Tensor:
    """What a reduction left in `pairs`, of a batch's tensors: float64 [rows of the batch, 2]."""
    x, y = placed.pairs.unbind(1)
    both = [by_tensor(placed, x.contiguous()), by_tensor(placed, y.contiguous(), maximum)]
    return torch.stack(both, dim=1)[first : first + placed.counts[batch]]


def new_dots(placed: DeviceTables, rows: int) -> Tensor:
    """Where the update leaves its sums of m g: float64 [chunks]. See reference_step.py."""
    return placed.dots


def _combine(tables: list[Tensor]) -> tuple[list[int], Tensor, Tensor]:
    """(rows of each table; rows of all, then their stride records; the gradients' addresses, taken out of the rows)."""
    counts = [int(words[0]) for words in tables]
    per_table = [words[1 : 1 + n * ROW].view(n, ROW) for words, n in zip(tables, counts)]
    records = [words[1 + n * ROW :] for words, n in zip(tables, counts)]
    rows = torch.cat(per_table)
    grads = rows[:, GRAD].clone()
    rows[:, GRAD] = 0
    first, record_at = 0, rows.numel()
    for n, record in zip(counts, records):
        if record.numel():  # offsets counted from word 0 of a table of its own
            column = rows[first : first + n, STRIDED]
            column += (column != 0) * (record_at - (1 + n * ROW))
        first += n
        record_at += record.numel()
    return counts, torch.cat([rows.reshape(-1), *records]), grads


def _make_launches(head: Tensor, counts: list[int], blocks: list[int]) -> tuple[list[Launch], Tensor]:
    """The launches of a step, and their chunks: int64, (row, first element) one after another."""
    rows = head[: sum(counts) * ROW].view(-1, ROW)
    launches: list[Launch] = []
    chunks: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    first_chunk = first = 0
    for batch, (n, block) in enumerate(zip(counts, blocks)):
        own = rows[first : first + n]
        for kind in torch.unique(own[:, DTYPES], dim=0):
            members = (own[:, DTYPES] == kind).all(1).nonzero().squeeze(1)
            numels = own[members, NUMEL]
            elements = int(numels.sum())
            size = _CHUNK_LARGE if elements >= _LARGE else _CHUNK_SMALL
            size = -(-size // block) * block
            per_row = (numels + size - 1).div(size, rounding_mode="floor")
            count = int(per_row.sum())
            if count == 0:
                continue
            begins = (torch.arange(count) - torch.repeat_interleave(per_row.cumsum(0) - per_row, per_row)) * size
            chunks.append(torch.stack([torch.repeat_interleave(members + first, per_row), begins], dim=1).reshape(-1))
            strided = bool((own[members, STRIDED] != 0).any())
            launches.append(Launch(batch, tuple(kind.tolist()), first_chunk, count, size, elements, strided))
            first_chunk += count
        first += n
    return launches, torch.cat(chunks)


def _make_units(head: Tensor, counts: list[int], device: torch.device) -> Units:
    rows = head[: sum(counts) * ROW].view(-1, ROW)
    starts, totals, chunks, launches = [], [], [torch.empty(0, 2, dtype=torch.int64)], []
    first = first_chunk = 0
    for n in counts:
        own = rows[first : first + n]
        units = own[:, NUMEL] // own[:, UNIT].clamp(min=1)
        starts.append(units.cumsum(0) - units)
        totals.append(int(units.sum()))
        of_batch = []
        for kind in torch.unique(own[:, DTYPES], dim=0):
            own_chunks = first_chunk
            for member in (own[:, DTYPES] == kind).all(1).nonzero().squeeze(1).tolist():
                begins = torch.arange(0, int(units[member]), units_at_once(int(own[member, UNIT])))
                chunks.append(torch.stack([torch.full_like(begins, first + member), begins], dim=1))
                first_chunk += begins.numel()
            if first_chunk > own_chunks:
                of_batch.append(UnitLaunch(tuple(kind.tolist()), own_chunks, first_chunk - own_chunks))
        launches.append(of_batch)
        first += n
    host = (torch.cat(starts), torch.cat(chunks))
    uploaded = [_upload(own, torch.empty_like(own, device=device)) for own in host]
    return Units(uploaded[0], totals, uploaded[1], launches)


def _upload(host: Tensor, target: Tensor) -> Tensor:
    if target.device.type == "cpu":
        return target.copy_(host)
    return target.copy_(host.pin_memory(), non_blocking=True)  # torch keeps the pinned block until the copy is done


def _is_capturing(device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
