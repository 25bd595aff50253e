"""Which code runs a step or an objective: one table, one function that chooses.

A backend is a module with the functions `tensor_table`, `grad_square_sum`, `prologue`, `update_` (the three phases of
a step, see optimizer.py) and `policy_loss`; their arguments and buffers are described in reference_step.py and
reference_objective.py.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

from fused_clip_adam.backends import native, reference

NAMES = ("auto", "cpu", "cuda", "triton", "reference")

DEVICES = {"cpu": ("cpu",), "reference": ("cpu", "cuda", "any other torch device")}
"""The devices each backend of this version claims; the README's support table is made from it."""


def check_name(backend: str) -> str:
    """The name itself.

    Raises:
        ValueError: not a backend. RuntimeError: a backend that cannot run here; says why and what to do.
    """
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r} is unknown; accepted: {', '.join(NAMES)}")
    if backend in ("cuda", "triton"):
        raise RuntimeError(
            f'backend="{backend}" is not part of this version: its kernels have not landed. '
            'On a GPU use backend="reference" (plain torch operations) for now.'
        )
    if backend == "cpu" and native.unavailable():
        raise RuntimeError(f'backend="cpu" cannot run: {native.unavailable()}')
    return backend


@functools.cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=4)


def choose(backend: str, device_type: str) -> ModuleType:
    """The backend module for tensors on a device; "auto" prefers the native kernels.

    Raises:
        RuntimeError: no backend for that device under this choice; says what to ask for.
    """
    if backend == "reference":
        return reference
    if device_type != "cpu":
        raise RuntimeError(
            f'backend="{backend}" has no kernel for {device_type} tensors in this version; accepted there: '
            'backend="reference" (plain torch operations, several passes over memory).'
        )
    reason = native.unavailable()
    if not reason:
        return native
    if backend == "cpu":
        raise RuntimeError(f'backend="cpu" cannot run: {reason}')
    _say_once(f"fused_clip_adam: the native CPU kernels are missing, using the reference backend: {reason}")
    return reference
