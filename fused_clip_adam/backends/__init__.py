"""Which code runs a step or an objective: one table, one function that chooses.

A backend of the step is a module with `tensor_table`, `place`, `grad_square_sums`, `prologue`, `update_`, the phases of
a step, see optimizer.py; one of the objectives has `policy_loss`, `bound_sums`, `logits_forward`, `logits_backward`.
Their arguments and buffers are described in reference_step.py and reference_objective.py.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

NAMES = ("auto", "cpu", "cuda", "triton", "reference")

_STEP = {"cpu": "native", "cuda": "cuda", "triton": "triton_step", "reference": "reference"}
_OBJECTIVE = {"cpu": "native", "cuda": "cuda_objective", "triton": "triton_objective", "reference": "reference"}

DEVICES = {
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "reference": ("cpu", "cuda", "any other torch device"),
}
"""The devices on which each backend runs; the README's support table is tested against it."""


def _module(name: str, modules: dict[str, str] = _STEP) -> ModuleType:
    """Imported when first asked for: Triton takes a second to import, and loading a library can fail."""
    return importlib.import_module(f"fused_clip_adam.backends.{modules[name]}")


def _unavailable(name: str) -> str:
    return _module(name).unavailable() if name != "reference" else ""


def check_name(backend: str) -> str:
    """The name itself.

    Raises:
        ValueError: not a backend. RuntimeError: a backend that cannot run here; says why and what to do.
    """
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r} is unknown; accepted: {', '.join(NAMES)}")
    if backend != "auto" and (reason := _unavailable(backend)):
        raise RuntimeError(f'backend="{backend}" cannot run: {reason}')
    return backend


@functools.cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=5)


def choose_step(backend: str, device_type: str) -> ModuleType:
    """The module that runs the optimizer for tensors on a device; see `_choose`."""
    return _module(_choose(backend, device_type))


def choose_objective(backend: str, device_type: str) -> ModuleType:
    """The module that runs the objectives for tensors on a device; see `_choose`."""
    return _module(_choose(backend, device_type), _OBJECTIVE)


def _choose(backend: str, device_type: str) -> str:
    """The backend for tensors on a device.

    "auto" takes the compiled kernels of the device, then Triton (on a GPU) or the reference, and says why once.

    Raises:
        RuntimeError: no backend for that device under this choice; says what to ask for.
    """
    if backend == "auto":
        return _first_available({"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton")}, device_type)
    if device_type not in _devices(backend):
        raise RuntimeError(
            f'backend="{backend}" has no kernel for {device_type} tensors; accepted there: '
            f"{', '.join(name for name in DEVICES if device_type in _devices(name))}"
        )
    return backend


def _devices(name: str) -> tuple[str, ...]:
    """The device types of a backend here and now: test tools run GPU kernels on the CPU."""
    if name == "reference":
        return ("cpu", "cuda", "xpu", "mps", "hpu", "privateuseone")
    if name == "cuda" and not _unavailable("cuda"):
        return _module("cuda").devices()
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return ("cpu",)
    return DEVICES[name]


def _first_available(order: dict[str, tuple[str, ...]], device_type: str) -> str:
    if device_type not in order:
        raise RuntimeError(
            f'backend="auto" has no kernel for {device_type} tensors; accepted there: backend="reference" (plain torch '
            "operations, several passes over memory)"
        )
    reasons = []
    for name in order[device_type]:
        if not (reason := _unavailable(name)):
            if reasons:
                _say_once(f"fused_clip_adam: using the {name} backend, because {'; '.join(reasons)}")
            return name
        reasons.append(f"the {name} kernels cannot run: {reason}")
    raise RuntimeError(f'no kernel for {device_type} tensors: {"; ".join(reasons)}. backend="reference" needs none')
