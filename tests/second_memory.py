"""CPU memory in the place of a device's, for offload="cpu" without a device: seen through copies that take their time.

While it is closed, its tensors hold NaN and what they are worth lies elsewhere, where only the copies of a link get at
it: a step that read or wrote it directly would show. Copies run early (at once), late (when something waits for them,
at the last moment that is allowed), or in a thread a direction, after delays; staging memory holds NaN until a copy
down has ended, and again after it has gone up. So a wait or a copy that is missing shows in the result.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time

import torch

from fused_clip_adam import offload
from fused_clip_adam.distributed import local

MODES = ("late", "early", "down early, up late", "down late, up early", "threads")
_LONGEST = 0.002


class Event:
    def __init__(self, name: str) -> None:
        self.name, self.done = name, threading.Event()


class Stream:
    """Copies in the order in which they were asked for."""

    def __init__(self, mode: str, seed: int) -> None:
        self.mode, self.pending, self.random = mode, [], random.Random(seed)
        self.ready = threading.Condition()
        if mode == "threads":
            threading.Thread(target=self._serve, daemon=True).start()

    def put(self, name: str, copy, after) -> Event:
        event = Event(name)
        with self.ready:
            self.pending.append((event, copy, after))
            self.ready.notify_all()
        if self.mode == "early":
            self.run_until(event)
        return event

    def run_until(self, event: Event) -> None:
        while not event.done.is_set():
            if self.mode == "threads":
                assert event.done.wait(20), f"{event.name} never ended"
            else:
                self._run_first(lambda: None)

    def _run_first(self, pause) -> None:
        event, copy, after = self.pending[0]
        if after is not None:
            stream, other = after
            stream.run_until(other)
        copy(pause)
        with self.ready:
            self.pending.pop(0)
        event.done.set()

    def _serve(self) -> None:
        while True:
            with self.ready:
                self.ready.wait_for(lambda: self.pending)
            self._run_first(lambda: time.sleep(self.random.random() * _LONGEST))


class SecondMemory:
    """`with SecondMemory(mode):` offload="cpu" takes tensors on the CPU for those of a device."""

    def __init__(self, mode: str = "late", seed: int = 0) -> None:
        down, up = {"late": ("late", "late"), "early": ("early", "early")}.get(mode, ("threads", "threads"))
        if mode.startswith("down"):
            down, up = (part.split()[1] for part in mode.split(", "))
        self.streams = {"down": Stream(down, seed), "up": Stream(up, seed + 1)}
        self.log: list[tuple] = []  # (what, ...) in the order of the calls
        self.copied = {"down": 0, "up": 0}  # bytes
        self.allocated: list[int] = []
        self._elsewhere: dict[int, torch.Tensor] = {}  # by address of a storage: its bytes
        self._joined: list[Event] = []
        self._left = dict(offload.LINKS)

    def __enter__(self) -> SecondMemory:
        offload.LINKS["cpu"] = lambda device: Link(self)
        return self

    def __exit__(self, *exception) -> None:
        offload.LINKS.clear()
        offload.LINKS.update(self._left)

    @contextlib.contextmanager
    def closed(self, *tensors):
        """Everything in the tensors' storages is out of reach but for copies; on leaving they are what the device's
        current stream would see after the copies it was made to wait for.
        """
        held = {}
        for tensor in tensors:
            own = local(tensor.detach())
            if own.numel():
                storage = own.untyped_storage()
                held[storage.data_ptr()] = _bytes_of(storage)
        self._elsewhere = {address: own.clone() for address, own in held.items()}
        for own in held.values():
            own.fill_(255)  # NaN in every floating dtype
        try:
            yield self
        finally:
            self._wait_for_joined()
            for address, own in held.items():
                own.copy_(self._elsewhere[address])
            self._elsewhere.clear()
            assert not self.pending(), f"not waited for: {self.pending()}"

    def _wait_for_joined(self) -> None:
        for event in self._joined:
            self.streams["up"].run_until(event)
        self._joined.clear()

    def pending(self) -> list[str]:
        return [event.name for stream in self.streams.values() for event, _, _ in list(stream.pending)]

    def step(self, opt) -> None:
        """The optimizer's step, while parameters and gradients are in the other memory only."""
        params = [p for group in opt.param_groups for p in group["params"]]
        with self.closed(*params, *[p.grad for p in params if p.grad is not None]):
            opt.step()

    def _real(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor is worth: where the memory is closed a view of it elsewhere."""
        own = self._elsewhere.get(tensor.untyped_storage().data_ptr())
        if own is None:
            return tensor
        flat = torch.empty(0, dtype=tensor.dtype)
        return flat.set_(own.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


class Link:
    """As CudaLink."""

    def __init__(self, memory: SecondMemory) -> None:
        self.memory = memory

    def allocate(self, size: int) -> torch.Tensor:
        self.memory.allocated.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)

    def start(self) -> None:
        self.memory.log.append(("start",))

    def down(self, pairs, after=None):
        pairs = [pair for pair in pairs if pair[0].numel()]

        def copy(pause) -> None:
            for source, target in pairs:
                target.fill_(float("nan"))
                pause()
                target.copy_(self.memory._real(source))

        return self._put("down", pairs, copy, after)

    def up(self, pairs):
        pairs = [pair for pair in pairs if pair[0].numel()]

        def copy(pause) -> None:
            for source, target in pairs:
                pause()
                self.memory._real(target).copy_(source)
                source.fill_(float("nan"))

        return self._put("up", pairs, copy, None)

    def _put(self, way: str, pairs, copy, after):
        size = sum(source.numel() * source.element_size() for source, _ in pairs)
        self.memory.copied[way] += size
        stream = self.memory.streams[way]
        self.memory.log.append((way, [target.data_ptr() for _, target in pairs]))
        return stream, stream.put(f"{way} of {size} bytes", copy, after)

    @staticmethod
    def wait(event) -> None:
        stream, own = event
        stream.run_until(own)

    def join(self, event) -> None:
        self.memory._joined.append(event[1])

    def settle(self) -> None:
        for stream in self.memory.streams.values():
            for event, _, _ in list(stream.pending):
                stream.run_until(event)


def _bytes_of(storage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))
