"""Parameter groups -> batches: parallel lists of tensors of one group, device and dtype, ready for a backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_clip_adam.distributed import Spread, is_spread, local, local_gradient, spread_of

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (torch.nn.Parameter, Tensor)


@dataclasses.dataclass
class Batch:
    """Tensors of one parameter group that share device, dtypes and placement. Lists are parallel; `max_exp_avg_sqs` and
    `bias_weights` may be empty.
    """

    group: int
    device: torch.device
    spread: Spread | None = None  # how DTensors lie over ranks; the tensors below are this rank's parts
    positions: list[int] = dataclasses.field(default_factory=list)  # of the parameters in their group
    owners: list[Tensor] = dataclasses.field(default_factory=list)  # the parameters as the optimizer knows them
    params: list[Tensor] = dataclasses.field(default_factory=list)
    grads: list[Tensor] = dataclasses.field(default_factory=list)
    exp_avgs: list[Tensor] = dataclasses.field(default_factory=list)
    exp_avg_sqs: list[Tensor] = dataclasses.field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = dataclasses.field(default_factory=list)
    steps: list[Tensor] = dataclasses.field(default_factory=list)
    bias_weights: list[Tensor] = dataclasses.field(default_factory=list)

    def tensors(self) -> tuple:
        """The arguments of a backend's `tensor_table`."""
        return (
            self.params,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.max_exp_avg_sqs,
            self.steps,
            self.bias_weights,
            self.group,
        )


def collect(
    param_groups: list[dict[str, Any]], given: dict[Tensor, Tensor] | None = None, stacked: bool = False
) -> list[Batch]:
    """Batches of every parameter that has a gradient, in group order; states are not yet attached.

    Args:
        given: the gradients by parameter, in the place of `.grad`. stacked: they are stacks of samples (samples.py,
            which has checked their dtypes).

    Raises:
        TypeError: sparse, complex or non-floating tensors, or a dtype pair the kernels do not know.
        ValueError: meta tensors, or a gradient on another device than its parameter.
    """
    batches: dict[tuple, Batch] = {}
    for index, group in enumerate(param_groups):
        last: tuple = ()
        batch = None
        for position, owner in enumerate(group["params"]):
            grad = owner.grad if given is None else given.get(owner)
            if grad is None:
                continue
            p, where = owner, None
            plain = type(grad) is Tensor and type(owner) in _PLAIN  # what nearly all are, told without a call
            if not plain and (is_spread(owner) or is_spread(grad)):
                p, grad = local(owner), local_gradient(_name(index, position), owner, grad)
                where = (owner.device_mesh, owner.placements)
            # Everything a kind of tensor can be refused for is in `kind`, so it is checked once a kind, and a model of
            # one kind pays one comparison a parameter.
            kind = (type(p), p.dtype, grad.dtype, p.device, grad.device, grad.layout, where)
            if kind != last:
                batch = batches.get((index, *kind))
                last = kind
                if batch is None:
                    _check_kind(_name(index, position), p, grad, stacked)
                    spread = None if where is None else spread_of(_name(index, position), owner)
                    batch = batches[(index, *kind)] = Batch(group=index, device=p.device, spread=spread)
            batch.positions.append(position)
            batch.owners.append(owner)
            batch.params.append(p)
            batch.grads.append(grad)
    return list(batches.values())


def attach_states(
    batch: Batch,
    state: dict[Tensor, Any],
    amsgrad: bool,
    weigh: bool,
    on_device: bool,
    new_state: Callable[[Tensor], dict[str, Any]],
    added: list[tuple[dict, Any]],
) -> None:
    """Fills a batch's state lists, creating what is missing; `added` receives (dict, key) of every new entry.

    Args:
        weigh: the group varies its betas, so every parameter needs `bias_weights`. They are also used where a
            parameter has them from before: 1 - beta^step would no longer be its true weight.
        on_device: the kernels advance `step` themselves; one that a checkpoint left on the host is moved.
    """
    states = [state.get(p) for p in batch.owners]
    for i, own in enumerate(states):
        if not own:
            p = batch.owners[i]
            states[i] = state[p] = new_state(p)
            added.append((state, p))
        elif amsgrad and "max_exp_avg_sq" not in own:
            own["max_exp_avg_sq"] = torch.zeros_like(own["exp_avg_sq"])
            added.append((own, "max_exp_avg_sq"))
        own = states[i]
        if on_device and own["step"].device != batch.device:
            own["step"] = own["step"].to(batch.device)
    batch.exp_avgs = [own["exp_avg"] for own in states]
    batch.exp_avg_sqs = [own["exp_avg_sq"] for own in states]
    batch.steps = [own["step"] for own in states]
    if amsgrad:
        batch.max_exp_avg_sqs = [own["max_exp_avg_sq"] for own in states]
    if batch.spread is not None:
        for moments in (batch.exp_avgs, batch.exp_avg_sqs, batch.max_exp_avg_sqs):
            moments[:] = map(local, moments)
    if weigh or any("bias_weights" in own for own in states):
        # The optimizer fills in the missing ones: it knows the betas.
        batch.bias_weights = [own.get("bias_weights") for own in states]


def _name(group: int, position: int) -> str:
    return f'param_groups[{group}]["params"][{position}]'


def _check_kind(name: str, p: Tensor, grad: Tensor, stacked: bool) -> None:
    if is_traceable_wrapper_subclass(p):
        raise TypeError(f"{name} is a {type(p).__name__}; accepted: plain tensors and DTensors")
    if p.device.type == "meta" or grad.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and holds no data; materialise it before step()")
    if grad.layout is not torch.strided:
        raise TypeError(f"{name} has a sparse gradient ({grad.layout}); accepted: dense (see torch.optim.SparseAdam)")
    if p.layout is not torch.strided:
        raise TypeError(f"{name} has layout {p.layout}; accepted: dense (torch.strided)")
    if p.dtype not in FLOATING:
        raise TypeError(f"{name} is {p.dtype}; accepted: float64, float32, bfloat16, float16")
    if not stacked and grad.dtype not in (p.dtype, torch.float32):
        raise TypeError(f"{name} is {p.dtype} with a {grad.dtype} gradient; accepted: {p.dtype} or torch.float32")
    if grad.device != p.device:
        raise ValueError(f"{name} is on {p.device} but its gradient on {grad.device}")
