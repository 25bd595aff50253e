"""The single-pass policy step against contracting the scores first, in alternation, and what it needs of memory."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fused_clip_adam as fca
from benchmarks import stream
from benchmarks.harness import BASELINE, REPLAY, ROOT, Target, alternate, conditions_of, summarize

pytestmark = pytest.mark.benchmark(timer=REPLAY)
SECONDS_A_CASE = 16

STREAM, READS = stream.NAME, "reads alone (ceiling)"
EINSUM, MATMUL = "einsum, then our step", "matmul into .grad, then our step"
ALIGN, BOUND = "ours, align", "ours, max_sample_norm"
FASTER = 1.3
# Of the stream's bandwidth, counting B s + 28 bytes an element as the plan does; 4 of them are the gradient's, which
# this step does not have: its own rows count B s + 24.
OF_STREAM = 0.8


@dataclass(frozen=True)
class Case:
    samples: int
    dtype: torch.dtype  # of the scores; parameters and moments are float32
    weighed: float = 1.0  # the share of samples whose weight is not 0: not clipped, and with an advantage

    @property
    def title(self) -> str:
        rest = "" if self.weighed == 1.0 else f", {1 - self.weighed:.0%} of them clipped or without advantage"
        return f"step from {self.samples} samples' scores, {str(self.dtype).removeprefix('torch.')}{rest}"


CASES = {
    "scores-8": Case(8, torch.float32),
    "scores-64": Case(64, torch.float32),
    "scores-64-half": Case(64, torch.float32, 0.5),
    "scores-64-bfloat16": Case(64, torch.bfloat16),
}


def shapes(quick: bool) -> list[tuple[int, ...]]:
    """An actor of 5M parameters, as a policy for control has: `quick`: 80k."""
    width = 256 if quick else 2048
    return [(width, width // 2), (width,), (width // 2, width), (width // 2,), (width // 4, width // 2), (18, width)]


def einsum(p: torch.nn.Parameter, weights: torch.Tensor, own: torch.Tensor) -> None:
    p.grad = torch.einsum("b,b...->...", weights, own).float()


def matmul(p: torch.nn.Parameter, weights: torch.Tensor, own: torch.Tensor) -> None:
    if p.grad is None:
        p.grad = torch.empty_like(p)
    torch.matmul(weights.unsqueeze(0), own.view(len(own), -1), out=p.grad.view(1, -1))


CONTRACTIONS = {EINSUM: einsum, MATMUL: matmul}


def contract_then_step(
    contract: Callable, optimizer: fca.FusedClipAdamW, scores: list[torch.Tensor], logp, advantages
) -> Callable[[], None]:
    """What does without `step_from_scores`: the scores contracted to the gradient, then a step."""
    params = optimizer.param_groups[0]["params"]

    def step() -> None:
        weights = fca.dloss_dlogp(logp, logp, advantages)
        for p, own in zip(params, scores):
            contract(p, weights.to(own.dtype), own)
        optimizer.step()

    return step


def contracted_bytes(samples: int, width: int = 4) -> int:
    """An element: scores of `width` bytes in, the gradient out (and converted), then the step."""
    return samples * width + 4 + (0 if width == 4 else 2 * width) + fca.theory.bytes_per_element()


def measure(case: Case, quick: bool, progress: Callable[[str], None]) -> tuple[dict, dict[str, list[float]]]:
    """Candidates in alternation on the same parameters and scores: 1.3 GB of them at B = 64, as much for the stream."""
    generator = torch.Generator().manual_seed(0)
    B = case.samples
    start = [torch.randn(shape, generator=generator).mul_(0.02) for shape in shapes(quick)]
    scores = [torch.randn(B, *p.shape, generator=generator).to(case.dtype) for p in start]
    elements = sum(p.numel() for p in start)
    logp = torch.randn(B, generator=generator)  # as sampled: no ratio is clipped, so that every score is read
    advantages = torch.randn(B, generator=generator)
    read = round(B * case.weighed)
    advantages[read:] = 0.0  # such as of a group of equal rewards

    def optimizer(**options) -> fca.FusedClipAdamW:
        return fca.FusedClipAdamW([torch.nn.Parameter(p.clone()) for p in start], lr=1e-4, **options)

    def from_scores(bound: float | None = None, **options) -> Callable[[], None]:
        own = optimizer(**options)
        return lambda: own.step_from_scores(scores, logp, logp, advantages, max_sample_norm=bound)

    def contracted(name: str) -> Callable[[], None]:
        return contract_then_step(CONTRACTIONS[name], optimizer(), scores, logp, advantages)

    candidates = {BASELINE: from_scores(), ALIGN: from_scores(overshoot="align"), EINSUM: contracted(EINSUM)}
    candidates[BOUND] = from_scores(1.0)
    if case.dtype == torch.float32:  # a product of bfloat16 has no float32 result to write into
        candidates[MATMUL] = contracted(MATMUL)
    width = case.dtype.itemsize
    moved = {name: fca.theory.bytes_per_element(grad=width, samples=read) * elements for name in (BASELINE, ALIGN)}
    moved[BOUND] = fca.theory.bytes_per_element(grad=width, samples=read, sample_norms=True) * elements
    for name in candidates.keys() - moved.keys():
        moved[name] = contracted_bytes(B, width) * elements
    ceiling, unavailable = stream.add_ceiling(candidates, moved, moved[BASELINE] // 28)
    if ceiling is not None:
        reads = stream.Reads((read * width + 12) * elements)
        candidates[READS], moved[READS] = reads, reads.bytes
    measured = alternate(
        candidates,
        5 if quick else 21,
        budget_s=2 if quick else 12,
        progress=lambda text: progress(f"{case.title}: {text}"),
    )
    table = summarize(measured, moved, None if ceiling is None else STREAM)
    targets, notes = [], []
    if not quick and case.dtype == torch.float32 and case.weighed == 1.0:
        fraction, own = table[BASELINE]["fraction_of_stream"], moved[BASELINE] / elements
        targets = [
            Target(EINSUM, "over_ours", FASTER, table[EINSUM]["over_ours"]["p50"]),
            Target(
                BASELINE,
                "fraction_of_stream",
                round(OF_STREAM * own / (own + 4), 3),
                None if fraction is None else fraction["p50"],
            ),
        ]
    if READS in table:
        share = measured.ratio(READS).p50
        notes.append(f"only to read what ours reads takes {share:.0%} of its time")
    if case is CASES["scores-8"]:
        notes += [f"{name} adds {grown(name):.2f} gradients to the peak of memory" for name in (BASELINE, EINSUM)]
    result = {
        "title": f"{case.title} (tensors: {len(start)}, elements: {elements:,})",
        "baseline": BASELINE,
        "scores_of": B,
        "elements": elements,
        "tensors": len(start),
        "dtype": str(case.dtype).removeprefix("torch."),
        **conditions_of(measured),
        "ceiling": None if ceiling is None else ceiling.describe(measured.time(STREAM).p50),
        "candidates": table,
        "unavailable": unavailable,
        "notes": notes,
        "targets": [target.to_dict() for target in targets],
    }
    return result, measured.seconds


# ---------------------------------------------------------------- memory


@functools.cache
def grown(candidate: str, elements: int = 25_000_000) -> float:
    """By how many gradients one step raises the largest resident set of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.test_scores", candidate, str(elements)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return float(out) / (4 * elements)


def grow(candidate: str, elements: int) -> int:
    """Bytes that the second of two steps on one parameter adds to the process's largest resident set."""
    p = torch.nn.Parameter(torch.zeros(elements))
    scores, logp = torch.ones(2, elements), torch.zeros(2)
    optimizer = fca.FusedClipAdamW([p])

    def step() -> None:
        if candidate == BASELINE:
            optimizer.step_from_scores([scores], logp, logp, torch.ones(2))
        else:
            p.grad = torch.einsum("b,b...->...", fca.dloss_dlogp(logp, logp, torch.ones(2)), scores)
            optimizer.step()

    p.grad = torch.zeros(1).expand(elements)
    optimizer.step()  # the moments are there
    p.grad = None
    before = largest_resident_set()
    step()
    return largest_resident_set() - before


def largest_resident_set() -> int:
    """Bytes, of this program alone: what getrusage says counts the process that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))


@pytest.mark.parametrize(
    ("name", "candidate"),
    [
        (name, candidate)
        for name, case in CASES.items()
        for candidate in (BASELINE, ALIGN, BOUND, EINSUM, MATMUL)
        if candidate != MATMUL or case.dtype == torch.float32
    ],
)
def test_scores(name, candidate, measure_once, benchmark, assert_targets):
    """A row of pytest-benchmark's table; its group is the case, timed in alternation."""
    result, seconds = measure_once(name)
    benchmark.group = name
    REPLAY.replay(benchmark, seconds[candidate])
    assert_targets(result, candidate)


if __name__ == "__main__":
    print(grow(sys.argv[1], int(sys.argv[2])))
