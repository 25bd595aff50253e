"""How much of align's gate the random gate leaves in place: `python -m benchmarks.overshoot.gate_overlap`.

Where nearly all blocks are kept, or a block is the only one of its length, dealing them out anew changes little. One
run of each task, at its own learning rate, on a seed that no other run has -> `gate_overlap.json` beside the runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace

import torch

from benchmarks.harness import machine_info
from benchmarks.overshoot.loop import run
from benchmarks.overshoot.methods import METHODS
from benchmarks.overshoot.study import FOLDER, Plan
from benchmarks.overshoot.tasks import TASKS

PATH = FOLDER / "gate_overlap.json"
SEED = 800


def overlap(task: str, shorten: int = 1) -> dict[str, float]:
    """Of the steps with a momentum: the share with the same gate, and the mean share of elements that differ."""
    control = METHODS["random gate"]
    differing: list[float] = []

    def watched(aligned: list[torch.Tensor], random: torch.Generator) -> list[torch.Tensor]:
        dealt = control.gate(aligned, random)
        differing.append(sum(float((a != b).sum()) for a, b in zip(aligned, dealt)) / sum(map(len, aligned)))
        return dealt

    run(task, replace(control, gate=watched), TASKS[task].setting.lr, SEED, shorten)
    return {
        "same_gate": sum(share == 0 for share in differing) / len(differing),
        "elements_that_differ": sum(differing) / len(differing),
    }


def measure(tasks: Iterable[str] = Plan().tasks) -> dict:
    return {"machine": machine_info(), "seed": SEED, "tasks": {task: overlap(task) for task in tasks}}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(f"no arguments, got {sys.argv[1:]}")
    PATH.write_text(json.dumps(measure(), indent=1) + "\n")
    print(PATH.read_text())
