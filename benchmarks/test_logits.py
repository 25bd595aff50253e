"""The PPO loss from logits with its gradient, entropy bonus and statistics: time, and memory beside the logits."""

from __future__ import annotations

import contextlib
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import stream
from benchmarks.harness import (
    BASELINE,
    REPLAY,
    ROOT,
    Target,
    alternate,
    bytes_per_element,
    conditions_of,
    summarize,
)
from benchmarks.peers import GPU_ONLY, LIGER
from benchmarks.test_objective import CLIP_HIGH, CLIP_LOW, EAGER, STREAM, ppo_in_torch

pytestmark = pytest.mark.benchmark(timer=REPLAY)
SECONDS_A_CASE = 30

OUT_OF_PLACE = "ours, new gradient"
CANDIDATES = [BASELINE, OUT_OF_PLACE, EAGER, STREAM]
NAME = "objective-logits"
ROWS, VOCABULARY = 512, 151_936
ENTROPY_COEF = 0.01
# Least traffic: read the logits, read them again for the gradient, write it.
FLOOR_BYTES_PER_LOGIT = 12
LEAST_OVER_EAGER, MOST_MEMORY = 2.0, 1.1


def size_of(quick: bool) -> tuple[int, int]:
    """Rows and vocabulary."""
    return (16, 4_000) if quick else (ROWS, VOCABULARY)


def loss_in_torch(logits, tokens, old_logp, advantages) -> torch.Tensor:
    """Log-softmax, gather, entropy, then the loss and the statistics of benchmarks/test_objective.py."""
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss, _ = ppo_in_torch(logp, old_logp, advantages, torch.ones_like(tokens, dtype=torch.bool))
    return loss - ENTROPY_COEF * entropy.mean()


def loss_of_ours(logits, tokens, old_logp, advantages, inplace: bool = True) -> torch.Tensor:
    import fused_clip_adam as fca

    objective = fca.PPO(clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
    options = dict(objective=objective, entropy_coef=ENTROPY_COEF, inplace_backward=inplace)
    return fca.policy_loss_from_logits(logits, tokens, old_logp, advantages, **options)[0]


LOSSES: dict[str, Callable] = {
    BASELINE: loss_of_ours,
    OUT_OF_PLACE: lambda *batch: loss_of_ours(*batch, inplace=False),
    EAGER: loss_in_torch,
}


def make_batch(rows: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """(logits, tokens, old_logp, advantages); old_logp near the log-probabilities, so that some tokens clip."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((1, rows, vocabulary), generator=generator)
    tokens = torch.randint(vocabulary, (1, rows), generator=generator)
    at_token = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    log_sum = torch.stack([row.logsumexp(-1) for row in logits[0]]).unsqueeze(0)  # by row: nothing of the logits' size
    old_logp = at_token - log_sum + 0.2 * torch.randn((1, rows), generator=generator)
    return logits, tokens, old_logp, torch.randn((1, rows), generator=generator)


def peak_over_logits(candidate: str, rows: int, vocabulary: int) -> float:
    """Peak memory of one forward and backward, the logits included, in units of their size; in a process of its own.

    The lesser of two: what the system counts as resident has once been 1.43 where it is 1.00 otherwise.
    """
    code = f"from benchmarks import test_logits as t; t.print_peak({candidate!r}, {rows}, {vocabulary})"

    def once() -> float:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    return min(once(), once())


def print_peak(candidate: str, rows: int, vocabulary: int) -> None:
    """What the process of `peak_over_logits` runs."""

    def peak_bytes() -> int:
        with contextlib.suppress(OSError):  # Linux, where ru_maxrss starts at the parent's
            return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    small, *rest = make_batch(2, 64)
    LOSSES[candidate](small.requires_grad_(), *rest).backward()  # libraries, threads and buffers of the first call
    before = peak_bytes()
    logits, *rest = make_batch(rows, vocabulary)
    LOSSES[candidate](logits.requires_grad_(), *rest).backward()
    print((peak_bytes() - before) / (logits.numel() * logits.element_size()))


def measure(quick: bool, progress: Callable[[str], None]) -> tuple[dict, dict[str, list[float]]]:
    """Same results checked -> peak memory of each -> candidates in alternation -> result and the seconds behind it."""
    rows, vocabulary = size_of(quick)
    deviations = check_same_results()
    progress("logits: peak memory")
    peaks = {name: peak_over_logits(name, rows, vocabulary) for name in ([BASELINE] if quick else LOSSES)}
    logits, *rest = make_batch(rows, vocabulary)
    values = logits.clone()
    logits.requires_grad_()

    def restore() -> None:
        logits.grad = None
        with torch.no_grad():
            logits.copy_(values)

    candidates: dict[str, Callable] = {
        name: (lambda loss=loss: loss(logits, *rest).backward()) for name, loss in LOSSES.items()
    }
    moved: dict[str, int | None] = {name: None for name in LOSSES}
    moved[BASELINE] = moved[OUT_OF_PLACE] = FLOOR_BYTES_PER_LOGIT * logits.numel()
    unavailable: dict[str, str] = {LIGER: GPU_ONLY}
    ceiling = None
    if (reason := stream.unavailable_reason()) is not None:
        unavailable[STREAM] = reason
    else:
        ceiling = stream.Stream(logits.numel() * FLOOR_BYTES_PER_LOGIT // bytes_per_element("update"))
        candidates[STREAM] = ceiling
        moved[STREAM] = ceiling.bytes
    measured = alternate(
        candidates,
        5 if quick else 10,
        before=restore,
        budget_s=2 if quick else 15,
        progress=lambda text: progress(f"logits: {text}"),
    )
    summary = summarize(measured, moved, STREAM if ceiling is not None else None)
    targets = [Target(EAGER, "over_ours", LEAST_OVER_EAGER, summary[EAGER]["over_ours"]["p50"])]
    memory = ", ".join(f"{name} {peak:.2f}" for name, peak in peaks.items())
    result = {
        "title": f"PPO loss from logits, gradient, entropy bonus and statistics, {rows} x {vocabulary:,}",
        "baseline": BASELINE,
        "elements": logits.numel(),
        "dtype": "float32",
        **conditions_of(measured),
        "ceiling": None if ceiling is None else ceiling.describe(measured.time(STREAM).p50),
        "same_work_deviation": deviations,
        "peak_memory_over_logits": peaks,
        "notes": [f"peak memory of a forward and backward pass over the logits' own: {memory}"],
        "candidates": summary,
        "unavailable": unavailable,
        "targets": [] if quick else [target.to_dict() for target in targets],
    }
    return result, measured.seconds


def check_same_results() -> dict[str, float]:
    """Compares loss and gradient on a small case with the torch form in float64.

    Raises:
        AssertionError: a candidate computes something else, so that its time does not count.
    """
    logits, *rest = make_batch(24, 3_001)
    exact = logits.double().requires_grad_()
    expected = loss_in_torch(exact, *(x.double() if x.is_floating_point() else x for x in rest))
    expected.backward()
    deviations = {}
    for name, loss_of in LOSSES.items():
        values = logits.clone().requires_grad_()
        loss = loss_of(values, *rest)
        loss.backward()
        deviations[name] = float((values.grad - exact.grad).norm() / exact.grad.norm())
        assert deviations[name] < 1e-5, f"{name}: gradient off by {deviations[name]:.1e}"
        torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    return deviations


@pytest.fixture(scope="module")
def measured(quick, progress, publish):
    result, seconds = measure(quick, progress)
    publish(NAME, result)
    return result, seconds


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_logits(measured, candidate, benchmark, assert_targets):
    """A row of pytest-benchmark's table; the candidates were timed in alternation."""
    result, seconds = measured
    if candidate in result["unavailable"]:
        pytest.skip(f"{candidate}: {result['unavailable'][candidate]}")
    benchmark.group = NAME
    REPLAY.replay(benchmark, seconds[candidate])
    assert_targets(result, candidate)


def test_memory(measured, quick):
    """In place nothing of the logits' size is allocated. The small case of --quick has no bearing on it."""
    peak = measured[0]["peak_memory_over_logits"][BASELINE]
    assert quick or peak <= MOST_MEMORY, peak
