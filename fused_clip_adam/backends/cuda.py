"""The compiled CUDA kernels: loads their library once and launches them over the tables of device_table.py."""

from __future__ import annotations

import os
import pathlib

import torch
from torch import Tensor

from fused_clip_adam.backends import native, scalars
from fused_clip_adam.backends.device_table import DeviceTables, Launch, by_tensor, new_dots, place, rows_of_pairs

__all__ = [
    "ON_DEVICE",
    "by_tensor",
    "devices",
    "grad_square_sums",
    "new_dots",
    "place",
    "prologue",
    "reduce",
    "sample_square_sums",
    "tensor_table",
    "unavailable",
    "unit_sums",
    "update_",
]

ON_DEVICE = True
"""Steps, norms and scalars live on the device, where the kernels advance them; the host reads nothing."""

_HOW = "in a checkout, pip install --no-build-isolation --force-reinstall --no-deps ."


def _load() -> str:
    """Loads the library; returns why it could not, or ""."""
    path = pathlib.Path(__file__).parent.parent / "_C_cuda.abi3.so"
    other = os.environ.get("FUSED_CLIP_ADAM_CUDA_LIBRARY")  # tests/cuda_on_cpu, or another build
    if other:
        path = pathlib.Path(other)
    elif torch.version.cuda is None:
        then = "" if path.exists() else f", then: {_HOW}"
        return f"torch {torch.__version__} is not a CUDA build; install one that is{then}"
    missing = f"the package was installed without nvcc. With the CUDA toolkit on PATH: {_HOW}"
    if path.exists() and native.unavailable():  # its tables are made there
        return native.unavailable()
    return native.load_library(path, missing)


_reason = _load()


def unavailable() -> str:
    """Why the CUDA kernels cannot run here, or ""."""
    return _reason


def devices() -> tuple[str, ...]:
    """The device types the library was compiled for: "cuda", or "cpu" where tests/cuda_on_cpu emulates it."""
    return () if _reason else (("cpu",) if "emulated" in torch.ops.fused_clip_adam.cuda_build(True) else ("cuda",))


def _chunks_of(placed: DeviceTables, launch: Launch) -> tuple:
    """What every kernel over chunks is told first: the tables, and which chunks are its own."""
    return placed.fixed, placed.fresh, placed.chunks_at, launch.first_chunk, launch.chunks, launch.chunk_size


def grad_square_sums(placed: DeviceTables) -> Tensor:
    """Phase 1: float64 [chunks], one launch a batch. See reference_step.py."""
    for launch in placed.launches:
        _norm(
            *_chunks_of(placed, launch),
            launch.dtypes[1],
            placed.partials,
        )
    return placed.partials


def prologue(placed: DeviceTables, *signals) -> Tensor:
    """Phase 2: one launch, which also advances every step and writes `placed.scalars`. See reference_step.py."""
    _prologue(placed.fixed, placed.fresh, placed.rows, *signals, placed.scalars)
    return placed.scalars


def _samples_of(placed: DeviceTables) -> tuple:
    """(weights, seed, noise) of the samples that the gradients are made of."""
    own = placed.samples
    return (None, None, 0.0) if own is None else (own.weights, own.seed, own.noise)


def sample_square_sums(placed: DeviceTables) -> Tensor:
    """One launch a batch, and a sum over chunks in their order. See reference_step.py."""
    own = placed.samples
    sums = torch.zeros(placed.partials.numel(), own.count, dtype=torch.float64, device=placed.device)
    for launch in placed.launches:
        _sample_squares(
            *_chunks_of(placed, launch),
            launch.dtypes[1],
            own.weights,
            sums,
        )
    return sums.sum(0)


def reduce(
    placed: DeviceTables,
    values: Tensor | None,
    batch: int,
    first: int,
    kind: int,
    coupled: bool,
    spiked: bool,
    unit_factors: Tensor | None,
) -> Tensor:
    """One launch, and a few to fold its sums. See reference_step.py."""
    for launch in placed.launches:
        if launch.batch == batch:
            _reduce(
                *_chunks_of(placed, launch),
                *launch.dtypes,
                values,
                kind,
                coupled,
                spiked,
                unit_factors,
                None if unit_factors is None else placed.units().starts,
                *_samples_of(placed),
                placed.pairs,
            )
    return rows_of_pairs(placed, batch, first, maximum=kind == scalars.SQUARES_MAX)


def unit_sums(placed: DeviceTables, batch: int) -> Tensor:
    """One launch. See reference_step.py."""
    units = placed.units()
    sums = torch.empty(units.totals[batch], 2, dtype=torch.float64, device=placed.device)
    for launch in units.launches[batch]:
        _unit_sums(
            placed.fixed,
            placed.fresh,
            units.chunks,
            launch.first_chunk,
            launch.chunks,
            launch.dtypes[0],
            units.starts,
            *_samples_of(placed),
            sums,
        )
    return sums


def update_(
    placed: DeviceTables,
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
    """Phase 3: one launch. See reference_step.py."""
    for launch in placed.launches:
        if launch.batch == batch:
            _update(
                *_chunks_of(placed, launch),
                *launch.dtypes,
                values,
                coupled,
                amsgrad,
                overshoot,
                block,
                guarded,
                unit_factors,
                None if unit_factors is None else placed.units().starts,
                momentum_dots,
                grad_square_sum,
                *_samples_of(placed),
                placed.partials,
                placed.finished,
            )


if not _reason:
    tensor_table = native.tensor_table
    _norm = torch.ops.fused_clip_adam.cuda_norm.default
    _prologue = torch.ops.fused_clip_adam.cuda_prologue.default
    _reduce = torch.ops.fused_clip_adam.cuda_reduce.default
    _unit_sums = torch.ops.fused_clip_adam.cuda_unit_sums.default
    _sample_squares = torch.ops.fused_clip_adam.cuda_sample_squares.default
    _update = torch.ops.fused_clip_adam.cuda_update_.default
