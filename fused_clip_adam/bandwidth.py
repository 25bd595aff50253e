"""How fast this machine moves memory: the ceiling that a plan's seconds are counted against."""

from __future__ import annotations

import time

import torch

SIZE = 2**30
"""Bytes of all arrays together: more than any cache holds."""


def measure_bandwidth(device: str | torch.device = "cpu", *, size: int = SIZE, rounds: int = 10) -> float:
    """GB/s (1e9 bytes a second, reads plus writes) of the fastest of some rounds.

    A CPU runs the traffic of a step, read p, g, m, v and write p, m, v, by torch's threads; on a GPU one tensor is
    copied to another. They are the ceilings of this project's benchmarks.

    Args:
        device: "cpu", "cuda" (the current GPU) or one GPU. size: bytes of all arrays together.

    Raises:
        ValueError: another kind of device, size below 64 or no round. RuntimeError: no such GPU.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device}")
    if size < 64 or rounds < 1:
        raise ValueError(f"size must be at least 64 and rounds at least 1, got size={size!r}, rounds={rounds!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device=cuda: torch sees no GPU here")
    on_gpu = device.type == "cuda"
    # Ones, not zeros: untouched zeros may be one page read again and again.
    arrays = [torch.ones(size // (8 if on_gpu else 16), device=device) for _ in range(2 if on_gpu else 4)]
    moved = sum(each.nbytes for each in arrays) * (4 if on_gpu else 7) // 4
    best = min(_seconds(arrays, on_gpu, device) for _ in range(rounds + 1))  # the first wakes threads or the clock
    return moved / best / 1e9


def _seconds(arrays: list[torch.Tensor], on_gpu: bool, device: torch.device) -> float:
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    if on_gpu:
        arrays[0].copy_(arrays[1])
        torch.cuda.synchronize(device)
    else:
        p, g, m, v = arrays
        p.add_(g)
        m.mul_(1.0)
        v.mul_(1.0)
    return time.perf_counter() - start
