"""What the tests of several integrations have in common. No trainer is imported here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import fused_clip_adam as fca


class Counted(fca.FusedClipAdamW):
    """Notes what the trainer tells it."""

    def __init__(self, *args, **options):
        self.told = []
        super().__init__(*args, **options)

    def observe(self, stats):
        self.told.append(stats.to_dict())
        super().observe(stats)

    def new_rollout(self):
        self.told.append("rollout")
        super().new_rollout()

    def step(self, closure=None):
        self.told.append("step")
        return super().step(closure)


class Deaf(fca.FusedClipAdamW):
    """Is told nothing."""

    def observe(self, stats):
        pass


def same(one, other) -> bool:
    """Bit for bit, whatever is inside."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def records_of_two(file: str, folder: Path) -> list[dict]:
    """What two processes of torchrun, each running `file` with `folder` as its argument, have saved as {rank}.pt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, file, str(folder)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
