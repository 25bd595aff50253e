"""The compiled CPU kernels: loads the library once and exposes its operators under the backend's function names."""

from __future__ import annotations

import os
import pathlib

import torch
from torch import Tensor

from fused_clip_adam.backends.reference_step import Control, Placed, place, tensor_square_sums

__all__ = [
    "Placed",
    "bound_sums",
    "capability",
    "grad_square_sums",
    "logits_backward",
    "logits_forward",
    "place",
    "policy_loss",
    "prologue",
    "tensor_square_sums",
    "tensor_table",
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
        "then: pip install --no-build-isolation --force-reinstall --no-deps fused_clip_adam",
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


def prologue(placed: Placed, *signals) -> Control:
    """Phase 2, see reference_step.py."""
    *others, clip_factors = signals
    return Control(_prologue(placed.group_scalars, *others), clip_factors)


def update_(placed: Placed, control: Control, batch: int, *options) -> None:
    """Phase 3, see reference_step.py."""
    factors = control.factors_of(placed, batch, lambda table: int(table[0]))
    _update_(placed.tables[batch], placed.group_scalars, control.groups, factors, *options)


if not _reason:
    # Overloads, not packets: resolving an overload costs microseconds a call.
    tensor_table = torch.ops.fused_clip_adam.tensor_table.default
    _grad_square_sums = torch.ops.fused_clip_adam.grad_square_sums.default
    _prologue = torch.ops.fused_clip_adam.prologue.default
    _update_ = torch.ops.fused_clip_adam.update_.default
    policy_loss = torch.ops.fused_clip_adam.policy_loss.default
    bound_sums = torch.ops.fused_clip_adam.bound_sums.default
    logits_forward = torch.ops.fused_clip_adam.logits_forward.default
    logits_backward = torch.ops.fused_clip_adam.logits_backward.default
