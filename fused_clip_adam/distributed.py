"""How an optimizer's tensors lie over the ranks of torch.distributed, and sums over all of them.

A parameter is a plain tensor, of which every rank has all (DDP), or a DTensor (FSDP2, tensor parallelism), whose local
shard goes to the kernels as it is. `Spread` is how DTensors are cut up; `Ranks` adds up over the ranks that hold other
parts, once each. All collectives are on small float64 tensors on the parameters' device, in the same order on every
rank; the host waits for none of them (where the backend does not, as NCCL; gloo does).
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Where the parts of a DTensor are: its mesh, and its placement on each dimension of the mesh."""

    mesh: Any
    placements: tuple

    @functools.cached_property
    def cuts(self) -> list[tuple[int, int]]:
        """(dimension of the mesh, dimension of the tensor) for each that cuts the tensor among more than one rank."""
        return [
            (at, own.dim)
            for at, own in enumerate(self.placements)
            if hasattr(own, "dim") and not own.is_replicate() and self.mesh.size(at) > 1
        ]


def is_spread(tensor: Any) -> bool:
    """Whether it is a DTensor. Where nothing has imported them there are none, and importing them takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def spread_of(name: str, p: Tensor) -> Spread:
    """Raises:
    TypeError: a placement that is no part of a tensor. ValueError: a mesh without this rank.
    """
    if any(own.is_partial() for own in p.placements):
        raise TypeError(f"{name} is a DTensor with placements {p.placements}; accepted: Shard, Replicate")
    if p.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{name} is on {p.device_mesh}, which this rank is not part of; give the optimizer the parameters of this "
            "rank only, and shard_group= if others hold the rest"
        )
    return Spread(p.device_mesh, tuple(p.placements))


def local(tensor: Any) -> Any:
    """What this rank has of a tensor: the shard of a DTensor, which it shares memory with; any other as it is."""
    if not is_spread(tensor):
        return tensor
    own = tensor.to_local()
    return own.wait() if type(own).__name__ == "AsyncCollectiveTensor" else own


def local_gradient(name: str, p: Tensor, grad: Tensor) -> Tensor:
    """The part of a gradient that belongs to this rank's part of a parameter; reduced first where it is a partial sum.

    Raises:
        TypeError: one of the two is no DTensor. ValueError: they are on different meshes.
    """
    if not is_spread(p):
        raise TypeError(f"{name} is a {type(p).__name__}, its gradient a DTensor; accepted: a plain tensor")
    if not is_spread(grad):
        raise TypeError(f"{name} is a DTensor, its gradient a {type(grad).__name__}; accepted: a DTensor")
    if grad.device_mesh != p.device_mesh:
        raise ValueError(f"{name} is on {p.device_mesh}, its gradient on {grad.device_mesh}")
    if grad.placements != p.placements:
        spread_of(name, p)  # refuses a parameter that is a partial sum, into which nothing can be redistributed
        grad = grad.redistribute(placements=p.placements)
    return local(grad)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for the copy, but for one to the host, which may read it at once."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "cpu")


def group_name(argument: str, group: Any) -> str | None:
    """The name of a process group, by which it is found again after a copy or pickling; None for None.

    Raises:
        TypeError: neither None, a process group nor a DeviceMesh. ValueError: a mesh of several dimensions.
    """
    if group is None:
        return None
    if dist.is_available():
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"{argument} must be a mesh of one dimension, got {group}")
            group = group.get_group()
        if isinstance(group, dist.ProcessGroup):
            return group.group_name
    raise TypeError(f"{argument} must be None, a ProcessGroup or a DeviceMesh, got {type(group).__name__}")


def _named(argument: str, name: str | None) -> Any:
    if name is None:
        return None
    try:
        return dist.distributed_c10d._resolve_process_group(name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RuntimeError(f"{argument}: the process group {name!r} does not exist in this process ({error})") from None


class Ranks:
    """Sums over the ranks of one optimizer's tensors.

    Args:
        param_groups: the optimizer's. Every rank has the same DTensors, in the same order.
        shard_group: name of a group whose ranks hold other parameters, or None.
        data_group: name of a group whose ranks have seen other data, or None: the largest mesh of the parameters.
        on_host: the sums are on the CPU, wherever the parameters are.

    Raises:
        TypeError, ValueError: as `spread_of`. RuntimeError: a group has no backend for the device of the sums.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        shard_group: str | None,
        data_group: str | None,
        on_host: bool = False,
    ) -> None:
        self.shard_group = _named("shard_group", shard_group)
        self.data_group = _named("data_group", data_group)
        self._of = [list(group["params"]) for group in param_groups]
        self._positions: list[dict[Spread, list[int]]] = []  # of every group's DTensors in it
        self._indices: dict[tuple, Tensor] = {}
        self._rows: dict[tuple[int, Spread], tuple] = {}  # see _rows_of
        devices: dict[Any, set[str]] = {}
        last: tuple = ()
        spread: Spread | None = None
        self.spreads: dict[Spread, None] = {}  # in the order in which they appear
        for index, group in enumerate(param_groups):
            own: dict[Spread, list[int]] = {}
            self._positions.append(own)
            for position, p in enumerate(group["params"]):
                if not is_spread(p):
                    continue
                if (key := (p.device_mesh, p.placements)) != last:
                    spread, last = spread_of(f'param_groups[{index}]["params"][{position}]', p), key
                    self.spreads[spread] = None
                own.setdefault(spread, []).append(position)
                devices.setdefault(spread, set()).add(local(p).device.type)
        self._meshes = list(dict.fromkeys(own.mesh for own in self.spreads))
        self._widest = max(self._meshes, key=lambda mesh: mesh.size(), default=None)
        if on_host:
            of_meshes = [mesh.get_group(at) for mesh in self._meshes for at in range(mesh.ndim)]
            for group in (*of_meshes, self.shard_group, self.data_group):
                self._check_backend(group, {"cpu"}, 'with offload="cpu" sums are')
            return
        for spread, types in devices.items():
            for at, _ in spread.cuts:
                self._check_backend(spread.mesh.get_group(at), types, "parameters are")
        types = {local(p).device.type for params in self._of for p in params}
        for group in (self.shard_group, self.data_group):
            self._check_backend(group, types, "parameters are")

    @staticmethod
    def _check_backend(group: Any, types: set[str], what: str) -> None:
        known = {device.type for device in getattr(group, "_device_types", ())}
        for device_type in sorted(types - known if known else ()):
            raise RuntimeError(
                f"{what} on {device_type}, but their process group has a backend for {sorted(known)} only; "
                'initialise it for both, as init_process_group("cpu:gloo,cuda:nccl")'
            )

    def is_of(self, param_groups: list[dict[str, Any]]) -> bool:
        """Whether the parameters are still those it was made for: the objects, which keep their placements."""
        return len(param_groups) == len(self._of) and all(
            len(group["params"]) == len(own) and all(p is q for p, q in zip(group["params"], own))
            for group, own in zip(param_groups, self._of)
        )

    # ------------------------------------------------------------ over everything

    def total(self, sums: Iterable[tuple[Spread | None, Tensor]], device: torch.device) -> Tensor:
        """The sum over all tensors of all ranks, each part once: float64 0-d, on `device`.

        Args:
            sums: (how the tensors lie, their sum on this rank), float64 0-d.
        """
        by_spread: dict[Spread | None, Tensor] = {}
        for spread, value in sums:
            before = by_spread.get(spread)
            by_spread[spread] = value if before is None else before + moved(value, before.device)
        out = by_spread.pop(None, None)
        out = torch.zeros((), dtype=torch.float64, device=device) if out is None else moved(out, device)
        for spread in self.spreads:
            value = by_spread.get(spread)
            value = torch.zeros_like(out) if value is None else value.clone()
            out = out + moved(self._over(spread, value), device)
        if self.shard_group is not None:
            _all_reduce(out := out.clone(), self.shard_group)
        return out

    def anywhere(self, flag: Tensor) -> Tensor:
        """A number that is not zero where it is not zero on any rank."""
        flag = flag.detach().to(torch.float32, copy=True)
        for mesh in self._meshes:
            for at in range(mesh.ndim):
                _all_reduce(flag, mesh.get_group(at))
        if self.shard_group is not None:
            _all_reduce(flag, self.shard_group)
        return flag

    def of_all_data(self, mass: Tensor | None, device: torch.device) -> Tensor:
        """`ClipStats`' masses, float32 [2], of what all ranks have seen; zeros stand for a rank that has seen none.

        Ranks with the same data (tensor parallelism) count several times, which their quotient does not show.
        """
        how = {"copy": True, "non_blocking": device.type != "cpu"}  # what is on the host may be read at once
        mass = torch.zeros(2, device=device) if mass is None else mass.to(device, **how)
        if self.data_group is not None:
            _all_reduce(mass, self.data_group)
        elif self._widest is not None:
            for at in range(self._widest.ndim):
                _all_reduce(mass, self._widest.get_group(at))
        return mass

    # ------------------------------------------------------------ by tensor

    def by_tensor(self, group: int, values: Tensor, missing: list[int], largest: bool = False) -> Tensor:
        """A number of every tensor of a parameter group, [n, ...], over its parts on all ranks.

        Args:
            missing: positions without a gradient here, whose values are NaN and stay so.
            largest: the greatest instead of the sum.
        """
        for spread, positions in self._positions[group].items():
            if not spread.cuts:
                continue
            whole = len(positions) == len(self._of[group])
            at = None if whole else self._index(("group", group, spread), lambda own=positions: own, values.device)
            own = values.clone() if whole else values.index_select(0, at)
            if missing:  # another rank may have one
                gone = torch.zeros(len(values), dtype=torch.bool, device="cpu")
                gone[missing] = True
                gone = moved(gone, values.device)
                gone = (gone if whole else gone.index_select(0, at)).reshape(-1, *[1] * (own.dim() - 1))
                own.masked_fill_(gone, 0.0)
            self._over(spread, own, largest)
            if missing:
                own.masked_fill_(gone, float("nan"))
            values = own if whole else values.index_copy(0, at, own)
        return values

    def by_row(self, group: int, own: list[tuple[Any, Tensor]], device: torch.device) -> list[Tensor]:
        """Sums of every output row of the tensors of a parameter group, over the parts that ranks have of each row.

        Args:
            own: the group's batches here and their sums, float64 [rows, 2]. A rank may have none: others have them.
            device: of the sums where there are none.

        Returns:
            The same sums, of all ranks.
        """
        out = [values for _, values in own]
        for spread in self._positions[group]:
            rows, cuts = self._rows_of(group, spread)
            if not cuts:
                continue
            here: list[tuple[int, Tensor]] = []  # of which of `own`, the places of its rows
            every = torch.zeros(sum(rows.values()), 2, dtype=torch.float64, device=device)
            for i, (batch, values) in enumerate(own):
                if batch.spread == spread:
                    # A rank may have nothing of a row, and then has no place for it in `values`.
                    present = [at for at, p in zip(batch.positions, batch.params) if p.numel() > 0]
                    here.append((i, self._places(group, spread, present, values.device)))
                    every = moved(every, values.device).index_copy_(0, here[-1][1], values)
            for at, cut in cuts:
                places = self._places(group, spread, cut, every.device)
                sums = every.index_select(0, places)
                _all_reduce(sums, spread.mesh.get_group(at))
                every.index_copy_(0, places, sums)
            for i, places in here:
                out[i] = moved(every, places.device).index_select(0, places)
        return out

    def _rows_of(self, group: int, spread: Spread) -> tuple[dict[int, int], list[tuple[int, list[int]]]]:
        """Of a group's tensors that lie so: their output rows here, by position; and (dimension of the mesh, positions)
        of those whose rows it cuts. A cut along the first dimension leaves the rows of a matrix whole; a vector is one.
        """
        if (group, spread) not in self._rows:
            of = [(at, local(self._of[group][at])) for at in self._positions[group][spread]]
            rows = {at: p.shape[0] if p.dim() > 1 else 1 for at, p in of}
            cuts = [(on, [at for at, p in of if dim > 0 or p.dim() < 2]) for on, dim in spread.cuts]
            self._rows[group, spread] = rows, [(on, cut) for on, cut in cuts if cut]
        return self._rows[group, spread]

    def _places(self, group: int, spread: Spread, chosen: list[int], device: torch.device) -> Tensor:
        """Of the rows of the chosen positions, among those of all: int64."""

        def of_rows() -> list[int]:
            rows, use = self._rows_of(group, spread)[0], set(chosen)
            ends = itertools.accumulate(rows.values())
            return [row for (at, n), end in zip(rows.items(), ends) if at in use for row in range(end - n, end)]

        return self._index(("rows", group, spread, tuple(chosen)), of_rows, device)

    def _over(self, spread: Spread, value: Tensor, largest: bool = False) -> Tensor:
        """In place, over the ranks that hold other parts."""
        for at, _ in spread.cuts:
            _all_reduce(value, spread.mesh.get_group(at), largest)
        return value

    def _index(self, key: tuple, positions: Callable[[], list[int]], device: torch.device) -> Tensor:
        key = (*key, device)
        if key not in self._indices:
            own = torch.tensor(positions(), dtype=torch.int64, device="cpu")
            self._indices[key] = moved(own, device)
        return self._indices[key]


def _all_reduce(value: Tensor, group: Any, largest: bool = False) -> None:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
