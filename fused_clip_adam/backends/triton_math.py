"""What every file of Triton kernels shares: the import, storage <-> arithmetic, exact operations, loops, launches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    _import_error = ""
except ImportError as error:  # the module still imports, so that `unavailable` can say why
    _import_error = str(error)

    class _Absent:
        """Stands in for triton and triton.language in decorators and constants."""

        float64 = float32 = bfloat16 = float16 = None

        def jit(self, function=None, **options):
            return function if function is not None else lambda function: function

        def constexpr(self, value):
            return value

    triton = tl = _Absent()

__all__ = [
    "BYTES",
    "DTYPES",
    "INTERPRETED",
    "TYPES",
    "bound",
    "divide",
    "jit_kernel",
    "launch_kernel",
    "load_as",
    "square_root",
    "store_as",
    "sum_in_order",
    "tl",
    "triton",
    "unavailable",
]

INTERPRETED = tl.constexpr(bool(not _import_error and triton.knobs.runtime.interpret))
"""Read once, as triton.jit does when it decorates the kernels below."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""In the order of enum DType of csrc/table.h, as the next two."""
TYPES = (tl.float64, tl.float32, tl.bfloat16, tl.float16)
BYTES = (8, 4, 2, 2)


def unavailable() -> str:
    """Why the Triton kernels cannot run here and what to do, or ""."""
    if _import_error:
        return f"the package triton does not import ({_import_error}); on Linux: pip install triton"
    if INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA or ROCm device; install a torch build for your GPU and its driver "
            "(TRITON_INTERPRET=1, set before Python starts, runs the kernels slowly on CPU tensors)"
        )
    return ""


def jit_kernel(function: Callable) -> Any:
    """triton.jit for a kernel that is compiled once for all values, sizes and alignments of its arguments."""
    constants = [name for name, kind in function.__annotations__.items() if kind == "tl.constexpr"]
    arguments = [name for name in inspect.signature(function).parameters if name not in constants]
    return triton.jit(do_not_specialize=arguments)(function)


# ---------------------------------------------------------------- one element: storage <-> arithmetic


@triton.jit
def load_as(x, T: tl.constexpr):
    if INTERPRETED and x.dtype.is_bf16():  # kept there as its bits, which are truncated where they should be rounded
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(T)
    else:
        return x.to(T)


@triton.jit
def store_as(x, S: tl.constexpr):
    if INTERPRETED and S.is_bf16():
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(S)


@triton.jit
def divide(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)  # `/` is an approximation for float32. Triton 3.5 takes subnormal numbers for 0 in both


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


# ---------------------------------------------------------------- loops and sums


@triton.jit
def bound(x):
    """A scalar as the bound of a loop."""
    if INTERPRETED:
        # The interpreter's scalars are arrays of one element, which NumPy 2.4 and later no longer takes for integers.
        return x if isinstance(x, int) else x.handle.data.item()
    return x


@triton.jit
def sum_in_order(partials_ptr, n, TILE: tl.constexpr):
    """Sum of n float64 in an order that depends on n alone."""
    lane = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float64)
    for i in range(0, bound(n), TILE):
        # .cg: other programs have just written them, and the first-level cache of this one may not know.
        total += tl.load(partials_ptr + i + lane, mask=i + lane < n, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


# ---------------------------------------------------------------- launches


def launch_kernel(kernel, grid: int, device: torch.device, *arguments: Any, **options: Any) -> None:
    """Launches on the current stream of `device`.

    Raises:
        RuntimeError: names the kernel; whatever Triton raised is its cause.
    """
    try:
        if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
            with torch.cuda.device(device):
                kernel[(grid,)](*arguments, **options)
        else:
            kernel[(grid,)](*arguments, **options)
    except Exception as error:
        raise RuntimeError(f"Triton kernel {kernel.fn.__name__} could not be launched: {error}") from error
