"""offload="cpu": moments and step on the host, for parameters on a device.

gradients, parameters -> (copies down) -> staging -> the host's kernels, in place -> (copies up) -> parameters

The tensors of a step are cut into buckets. While the kernels work on one bucket, the next ones come down on one stream
and the last one goes up on another; the device's current stream waits for the last copy up, the host does not. What the
kernels are given is staging memory: `Offloaded` is a backend of the step like backends/native.py, whose functions wait
for a bucket, call the host's and send the bucket back.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_clip_adam.backends import scalars
from fused_clip_adam.backends.host_table import check_tensors, is_dense

BUCKET_BYTES = 32 * 2**20
"""Of the gradients and parameters of a bucket, which has at least one tensor: a millisecond of a fast link."""
HOST = torch.device("cpu")
_BACKENDS = ("auto", "cpu", "reference")
_ALIGNMENT = 64  # bytes between the beginnings of staged tensors: a cache line, and the widest vector

Pairs = Iterable[tuple[Tensor, Tensor]]


class CudaLink:
    """Copies between a CUDA device and pinned memory, each way on a stream of its own, in the order of the calls.

    No tensor need be kept for the copies (`record_stream`): the host waits for every copy down before it returns to who
    owns the gradients, and the stream that may reuse a parameter's memory waits for the copy up.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._down, self._up = (torch.cuda.Stream(device) for _ in range(2))

    def allocate(self, size: int) -> Tensor:
        with torch.cuda.device(self.device):  # pinned by the context that is there, on no other device
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def start(self) -> None:
        """Copies from now on come after all that the device's current stream has been given."""
        current = torch.cuda.current_stream(self.device)
        self._down.wait_stream(current)
        self._up.wait_stream(current)

    def down(self, pairs: Pairs, after: Any = None) -> Any:
        """Starts copies to the host, `after` an event if there is one. Returns the event of their end."""
        return self._copy(self._down, pairs, after)

    def up(self, pairs: Pairs) -> Any:
        return self._copy(self._up, pairs, None)

    @staticmethod
    def _copy(stream: torch.cuda.Stream, pairs: Pairs, after: Any) -> torch.cuda.Event:
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            return stream.record_event()

    @staticmethod
    def wait(event: torch.cuda.Event) -> None:
        """The host waits."""
        event.synchronize()

    def join(self, event: torch.cuda.Event) -> None:
        """The device's current stream waits."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self) -> None:
        """The host waits until no copy is under way."""
        self._down.synchronize()
        self._up.synchronize()


LINKS: dict[str, Any] = {"cuda": CudaLink}
"""By type of device, what copies to it and from it."""


def check_offload(offload: Any, backend: str, capturable: Any, differentiable: Any) -> str | None:
    """The value itself.

    Raises:
        ValueError: unknown, or beside options that say where else the step is.
    """
    if offload is None:
        return None
    if offload != "cpu":
        raise ValueError(f'offload must be None or "cpu", got {offload!r}')
    if backend not in _BACKENDS:
        raise ValueError(f'backend={backend!r} does not go with offload="cpu"; accepted: {", ".join(_BACKENDS)}')
    if capturable:
        raise ValueError('capturable=True steps on the device, offload="cpu" on the host; give one of the two')
    if differentiable:
        raise ValueError('differentiable=True runs torch\'s own update where the parameters are, without offload="cpu"')
    return offload


def is_away(device: torch.device) -> bool:
    """Whether a parameter there has to be copied."""
    return device.type != "cpu" or device.type in LINKS


def check_reach(name: str, device: torch.device) -> None:
    """Raises:
    RuntimeError: nothing copies to that device.
    """
    if is_away(device) and device.type not in LINKS:
        raise RuntimeError(f'{name} is on {device}; accepted with offload="cpu": cpu, {", ".join(LINKS)}')


@dataclasses.dataclass(eq=False)
class Bucket:
    """Consecutive tensors of a batch. Pairs are (of the device, staged)."""

    link: Any  # None: the tensors are the host's own
    lists: list[list[Tensor]]  # the arguments of `tensor_table`, cut to it
    group: int
    first: int  # its first tensor among those of the batch
    units: slice  # its output rows among those of the batch
    slot: int = 0
    grads: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    params: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    grads_copied: Any = None  # events; None: not staged
    params_copied: Any = None

    def wait(self, params: bool) -> None:
        if self.link is not None:
            self.link.wait(self.grads_copied)
            if params:
                self.link.wait(self.params_copied)


@dataclasses.dataclass
class Slot:
    """Staging memory that buckets use in turn."""

    tenant: Bucket | None = None
    sent: Any = None  # the event of the last copy up from it


@dataclasses.dataclass
class Placed:
    """A step's buckets, in the order of their batches, and what the host's backend has made of them, a table each."""

    host: Any
    buckets: list[Bucket]
    of_batches: list[range]  # of each batch: its buckets
    slots: list[Slot]


class Offloaded:
    """The host's backend for tensors of other devices; see the module. Its buffers serve one step after another."""

    def __init__(self) -> None:
        self._backend: Any = None
        self._keeps = False
        self._links: dict[torch.device, Any] = {}
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def use(self, backend: Any, keeps_gradients: bool) -> Offloaded:
        """Itself, for a step with a backend of CPU tensors.

        Args:
            keeps_gradients: they are read more than once, so that all of them are staged for the whole step.
        """
        if keeps_gradients != self._keeps:
            self._settle()
            self._buffers.clear()
        self._backend, self._keeps = backend, keeps_gradients
        return self

    @property
    def staging_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())

    # ------------------------------------------------------------ before the first copy

    def tensor_table(
        self, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, bias_weights, group, samples=-1
    ) -> tuple[list[list[Tensor]], int]:
        """Checks a batch's tensors where they are."""
        lists = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, bias_weights]
        for name, tensors in zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "bias_weights"), lists[2:]):
            for tensor in tensors:
                if tensor.device != HOST:
                    raise RuntimeError(
                        f'a state {name} is on {tensor.device}; with offload="cpu" states are on the CPU and stay '
                        "there: something else has moved it, such as a trainer's own offloading"
                    )
        check_tensors(*lists, group)
        return lists, group

    def place(self, tables, group_scalars, blocks, kept, device, capturable, samples=None) -> Placed:
        """Cuts the batches into buckets, and makes the tables of what is staged of them."""
        self._settle()
        buckets: list[Bucket] = []
        of_batches = []
        for lists, group in tables:
            own = self._cut(lists, group)
            of_batches.append(range(len(buckets), len(buckets) + len(own)))
            buckets += own
        # A second slot for the bucket that comes down while the kernels are at the first. Where gradients are staged
        # elsewhere, a third for the one that goes up; else the next gradients come down meanwhile.
        slots = [Slot() for _ in range(3 if self._keeps else 2)]
        self._stage([bucket for bucket in buckets if bucket.link is not None], len(slots))
        own_tables = []
        for bucket in buckets:
            lists = list(bucket.lists)
            if bucket.link is not None:
                lists[:2] = [[staged for _, staged in pairs] for pairs in (bucket.params, bucket.grads)]
            own_tables.append(self._backend.tensor_table(*lists, bucket.group))
        placed = self._backend.place(own_tables, group_scalars, blocks, None, HOST, False, None)
        for link in self._links.values():
            link.start()
        return Placed(placed, buckets, of_batches, slots)

    def _cut(self, lists: list[list[Tensor]], group: int) -> list[Bucket]:
        params, grads = lists[:2]
        link = self._link_to(params[0].device)
        sizes = [_padded(p) + _padded(g) for p, g in zip(params, grads)]
        rows = [(p.shape[0] if p.dim() > 1 else 1) if p.numel() else 0 for p in params]
        row_ends = [0, *itertools.accumulate(rows)]
        ends, size = [], 0
        for i, own in enumerate(sizes):
            if link is not None and size and own and size + own > BUCKET_BYTES:
                ends.append(i)
                size = 0
            size += own
        return [
            Bucket(link, [own[begin:end] for own in lists], group, begin, slice(row_ends[begin], row_ends[end]))
            for begin, end in itertools.pairwise([0, *ends, len(params)])
        ]

    def _link_to(self, device: torch.device) -> Any:
        if is_away(device) and device not in self._links:
            self._links[device] = LINKS[device.type](device)
        return self._links.get(device)

    def _stage(self, buckets: list[Bucket], slots: int) -> None:
        """Gives every bucket its staging memory: of its slot, and of its own for gradients that are kept."""
        wanted: dict[tuple[str, int], int] = {}
        keys = []
        for number, bucket in enumerate(buckets):
            bucket.slot = number % slots
            own = (("params", bucket.slot), ("grads", number if self._keeps else bucket.slot))
            for key, tensors in zip(own, bucket.lists):
                wanted[key] = max(wanted.get(key, 0), sum(map(_padded, tensors)))
            keys.append(own)
        for key, size in wanted.items():
            held = self._buffers.get(key)
            if held is None or held.numel() < size:
                self._buffers.pop(key, None)  # before the new one is there
                self._buffers[key] = buckets[0].link.allocate(size)
        for bucket, (of_params, of_grads) in zip(buckets, keys):
            bucket.params = _staged(bucket.lists[0], self._buffers[of_params])
            bucket.grads = _staged(bucket.lists[1], self._buffers[of_grads])

    # ------------------------------------------------------------ the phases of a step, see reference_step.py

    def grad_square_sums(self, placed: Placed) -> Tensor:
        def sums_of(at: int) -> Tensor:
            return self._backend.grad_square_sums(placed.host._replace(tables=[placed.host.tables[at]]))

        return torch.cat(self._of_buckets(placed, range(len(placed.buckets)), False, sums_of))

    def by_tensor(self, placed: Placed, sums: Tensor) -> Tensor:
        return self._backend.by_tensor(placed.host, sums)

    def new_dots(self, placed: Placed, rows: int) -> Tensor:
        return self._backend.new_dots(placed.host, rows)

    def prologue(self, placed: Placed, *signals: Any) -> Tensor:
        return self._backend.prologue(placed.host, *signals)

    def reduce(self, placed: Placed, values, batch, first, kind, coupled, spiked, unit_factors) -> Tensor:
        def sums_of(at: int) -> Tensor:
            bucket = placed.buckets[at]
            factors = None if unit_factors is None else unit_factors[bucket.units]
            return self._backend.reduce(placed.host, values, at, first + bucket.first, kind, coupled, spiked, factors)

        reads_params = coupled or kind == scalars.FADAM_SQUARES
        return torch.cat(self._of_buckets(placed, placed.of_batches[batch], reads_params, sums_of))

    def unit_sums(self, placed: Placed, batch: int) -> Tensor:
        return torch.cat(
            self._of_buckets(
                placed, placed.of_batches[batch], True, lambda at: self._backend.unit_sums(placed.host, at)
            )
        )

    def update_(
        self,
        placed: Placed,
        values: Tensor,
        batch: int,
        first: int,
        coupled: bool,
        amsgrad: bool,
        overshoot: int,
        block: int,
        guarded: bool,
        unit_factors: Tensor | None,
        momentum_dots: Tensor | None,
        grad_square_sum: Tensor | None,
    ) -> None:
        """Updates the host's tensors, and sends the parameters up; the device's current stream waits for the last."""
        if values[first, 0] != 0:  # skipped: nothing changes, so nothing need be copied
            return

        def update_of(at: int) -> None:
            bucket = placed.buckets[at]
            self._backend.update_(
                placed.host,
                values,
                at,
                first + bucket.first,
                coupled,
                amsgrad,
                overshoot,
                block,
                guarded,
                None if unit_factors is None else unit_factors[bucket.units],
                momentum_dots,
                grad_square_sum,
            )
            if bucket.link is not None:
                sent = bucket.link.up([(staged, p) for p, staged in bucket.params])
                placed.slots[bucket.slot].sent = sent
                if at == own[-1]:  # all of a batch are of one device
                    bucket.link.join(sent)

        own = placed.of_batches[batch]
        self._of_buckets(placed, own, True, update_of, beyond=True)

    # ------------------------------------------------------------ copies

    def _of_buckets(
        self, placed: Placed, own: range, params: bool, call: Callable[[int], Any], beyond: bool = False
    ) -> list[Any]:
        """`call` of each bucket in turn, which is there by then, while the next ones are under way.

        Args:
            params: the call reads parameters, not only gradients. beyond: the next batches' buckets come next.
        """
        ahead = len(placed.slots) - 1 if params or not self._keeps else len(own)
        known = range(own.start, len(placed.buckets) if beyond else own.stop)
        out = []
        try:
            for at in own:
                for each in known[at - own.start : at - own.start + ahead + 1]:
                    self._bring(placed, placed.buckets[each], params)
                placed.buckets[at].wait(params)
                out.append(call(at))
        except BaseException:
            self._settle()
            raise
        return out

    def _bring(self, placed: Placed, bucket: Bucket, params: bool) -> None:
        """Starts the copies that a bucket lacks. Whose slot it takes is done with by then, but for its copy up."""
        if bucket.link is None:
            return
        slot = placed.slots[bucket.slot]
        if slot.tenant is not bucket and (params or not self._keeps):
            if slot.tenant is not None:
                slot.tenant.params_copied = None
                if not self._keeps:
                    slot.tenant.grads_copied = None
            slot.tenant = bucket
        if bucket.grads_copied is None:
            bucket.grads_copied = bucket.link.down(bucket.grads)
        if params and bucket.params_copied is None:
            bucket.params_copied = bucket.link.down(bucket.params, after=slot.sent)

    def _settle(self) -> None:
        for link in self._links.values():
            link.settle()


def _padded(tensor: Tensor) -> int:
    """Bytes of a tensor's staging memory."""
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _staged(tensors: Sequence[Tensor], buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(tensor, its place in a buffer): in its own order of elements, so that a copy is one of plain bytes; row by row
    where the tensor has holes.
    """
    pairs, at = [], 0
    for tensor in tensors:
        flat = buffer[at : at + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        staged = flat.as_strided(tensor.shape, tensor.stride()) if is_dense(tensor) else flat.view(tensor.shape)
        pairs.append((tensor.detach(), staged))
        at += _padded(tensor)
    return pairs
