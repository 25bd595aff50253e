"""The compiled CPU kernels: loads the library once and exposes its operators under the backend's function names."""

from __future__ import annotations

import os
import pathlib

import torch
from torch import Tensor

from fused_clip_adam.backends.reference_step import Placed, by_tensor, place

__all__ = [
    "Placed",
    "bound_sums",
    "by_tensor",
    "capability",
    "grad_square_sums",
    "logits_backward",
    "logits_forward",
    "new_dots",
    "place",
    "policy_loss",
    "prologue",
    "reduce",
    "sample_square_sums",
    "tensor_table",
    "unit_sums",
    "update_",
]

_reason = ""


def load_library(path: pathlib.Path, missing: str) -> str:
    """Loads a library of operators; returns why it could not, or "". `missing`: why it may not exist and what to do."""
    if not path.exists():
        return f"{path.name} is missing: {missing}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the library {path.name} does not load under torch {torch.__version__}: {error}"
    return ""


def _load() -> str:
    """Loads the library; returns why it could not, or ""."""
    path = pathlib.Path(__file__).parent.parent / "_C.abi3.so"
    if other := os.environ.get("FUSED_CLIP_ADAM_LIBRARY"):  # a sanitizer build, or a path that does not exist
        path = pathlib.Path(other)
    return load_library(
        path,
        "the package was installed without a C++ compiler. Install one (g++ or clang++), "
        "then, in a checkout: pip install --no-build-isolation --force-reinstall --no-deps .",
    )


_reason = _load()


def unavailable() -> str:
    """Why the native kernels cannot run here, or ""."""
    return _reason


def capability() -> str:
    """The instruction set the loops run on: "avx512", "avx2" or "baseline" (env FUSED_CLIP_ADAM_CPU_ISA lowers it)."""
    return torch.ops.fused_clip_adam.cpu_capability(True)


def grad_square_sums(placed: Placed) -> Tensor:
    """Phase 1, see reference_step.py."""
    return torch.cat([_grad_square_sums(table) for table in placed.tables])


def new_dots(placed: Placed, rows: int) -> Tensor:
    """See reference_step.py."""
    return torch.zeros(rows, dtype=torch.float64, device="cpu")


def prologue(placed: Placed, *signals) -> Tensor:
    """Phase 2, see reference_step.py."""
    control = _prologue(placed.group_scalars, *signals)
    own = [_tensor_scalars(table, placed.group_scalars, control) for table in placed.tables]
    return own[0] if len(own) == 1 else torch.cat(own)


def sample_square_sums(placed: Placed) -> Tensor:
    """See reference_step.py."""
    return sum(_sample_square_sums(table, placed.samples.weights) for table in placed.tables)


def _samples_of(placed: Placed, first: int) -> tuple:
    """What makes a gradient of the samples of a batch: the last arguments of the operators that read one."""
    own = placed.samples
    return () if own is None else (own.weights, own.seed, own.noise, first)


def _rows_of(placed: Placed, values: Tensor | None, batch: int, first: int) -> Tensor | None:
    return None if values is None else values[first : first + int(placed.tables[batch][0])]


def reduce(
    placed: Placed,
    values: Tensor | None,
    batch: int,
    first: int,
    kind: int,
    coupled: bool,
    spiked: bool,
    unit_factors: Tensor | None,
) -> Tensor:
    """See reference_step.py."""
    rows = _rows_of(placed, values, batch, first)
    own = (kind, coupled, spiked, unit_factors)
    return _reduce(placed.tables[batch], rows, *own, *_samples_of(placed, first))


def unit_sums(placed: Placed, batch: int) -> Tensor:
    """See reference_step.py."""
    first = sum(int(table[0]) for table in placed.tables[:batch])
    return _unit_sums(placed.tables[batch], *_samples_of(placed, first))


def update_(
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
    """Phase 3, see reference_step.py."""
    rows = _rows_of(placed, values, batch, first)
    dots = _rows_of(placed, momentum_dots, batch, first)
    options = (coupled, amsgrad, overshoot, block, guarded, unit_factors)
    _update_(placed.tables[batch], rows, *options, dots, grad_square_sum, *_samples_of(placed, first))


if not _reason:
    # Overloads, not packets: resolving an overload costs microseconds a call.
    tensor_table = torch.ops.fused_clip_adam.tensor_table.default
    _grad_square_sums = torch.ops.fused_clip_adam.grad_square_sums.default
    _prologue = torch.ops.fused_clip_adam.prologue.default
    _tensor_scalars = torch.ops.fused_clip_adam.tensor_scalars.default
    _reduce = torch.ops.fused_clip_adam.reduce.default
    _unit_sums = torch.ops.fused_clip_adam.unit_sums.default
    _sample_square_sums = torch.ops.fused_clip_adam.sample_square_sums.default
    _update_ = torch.ops.fused_clip_adam.update_.default
    policy_loss = torch.ops.fused_clip_adam.policy_loss.default
    bound_sums = torch.ops.fused_clip_adam.bound_sums.default
    logits_forward = torch.ops.fused_clip_adam.logits_forward.default
    logits_backward = torch.ops.fused_clip_adam.logits_backward.default
