"""What updating in backward saves: peak memory and time of a training step, with and without, on this CPU.

    python examples/step_in_backward.py [--layers 24] [--width 1024] [--batch 8] [--rounds 9]

A stack of linear layers whose gradients are as large as its parameters. Memory: by how much a step raises the largest
resident set of a process of its own, in shares of all gradients. Time: of backward and step together, the two in turns
in one process, median of the ratios.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import fused_clip_adam as fca

WAYS = ("ordinary step", "in backward")


def make(way: str, layers: int, width: int):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    opt = fca.FusedClipAdamW(model.parameters(), lr=1e-4, grad_clip=fca.PerTensorNorm(1.0), overshoot="align")
    handle = fca.step_in_backward(model, opt, bucket_bytes=8 * 2**20) if way == "in backward" else None
    return model, opt, handle


def train_step(model: nn.Module, opt: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    model(batch).square().mean().backward()
    opt.step()
    opt.zero_grad()


def largest_resident_set() -> int:
    """Bytes. Linux only: what getrusage says counts the process that started this one, too."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def measure_memory(way: str, layers: int, width: int, batch: int) -> float:
    """In this process: bytes a training step adds, over those of all gradients. The moments are there before."""
    model, opt, _ = make(way, layers, width)
    data = torch.ones(batch, width)
    for p in model.parameters():  # makes the moments, without a gradient's memory
        p.grad = torch.zeros(1).expand(p.shape)
    opt.step()
    opt.zero_grad()
    model(data).sum()  # what torch allocates once
    before = largest_resident_set()
    train_step(model, opt, data)
    return (largest_resident_set() - before) / sum(p.nbytes for p in model.parameters())


def memory(way: str, layers: int, width: int, batch: int) -> float:
    command = [sys.executable, __file__, "--measure", way, *map(str, ("--layers", layers, "--width", width))]
    out = subprocess.run([*command, "--batch", str(batch)], capture_output=True, text=True, check=True).stdout
    return float(out)


def seconds(layers: int, width: int, batch: int, rounds: int) -> dict[str, list[float]]:
    made = {way: make(way, layers, width) for way in WAYS}
    data = torch.ones(batch, width)
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for at in range(rounds + 1):
        for way in WAYS if at % 2 else WAYS[::-1]:
            start = time.perf_counter()
            train_step(*made[way][:2], data)
            taken[way].append(time.perf_counter() - start)
        print(f"\rround {at} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {way: own[1:] for way, own in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--measure", choices=WAYS, help="only the memory of one way, as a number")
    args = parser.parse_args()
    size = (args.layers, args.width, args.batch)
    if args.measure:
        print(measure_memory(args.measure, *size))
        return
    taken = seconds(*size, args.rounds)
    ratios = [own / base for own, base in zip(taken["in backward"], taken["ordinary step"])]
    print(f"{'':<16}{'peak, in gradients':>20}{'backward and step':>20}")
    for way in WAYS:
        ratio = 1.0 if way == "ordinary step" else statistics.median(ratios)
        print(f"{way:<16}{memory(way, *size):>20.2f}{ratio:>20.2f}")


if __name__ == "__main__":
    main()
