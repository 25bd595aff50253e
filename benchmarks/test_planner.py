"""Seconds that the planner predicts against steps of this CPU, at the bandwidth the stream has in the same round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import fused_clip_adam as fca
from benchmarks import peers, stream
from benchmarks.harness import (
    BASELINE,
    REPLAY,
    Alternation,
    Spread,
    Target,
    alternate,
    conditions_of,
    summarize,
)
from fused_clip_adam.planner import Plan, plan

pytestmark = pytest.mark.benchmark(timer=REPLAY)
SECONDS_A_CASE = 16

STREAM = stream.NAME
USUAL = "clip_grad_norm_, AdamW(fused)"
AGREES = 0.85  # the smaller of prediction and measurement over the larger, at least


@dataclass(frozen=True)
class Case:
    """`settings`: candidate -> options of both `plan` and FusedClipAdamW; the first is the baseline."""

    title: str
    dtype: torch.dtype
    settings: dict[str, dict]


CASES = {
    "planner-float32": Case(
        "predictions of the planner, float32",
        torch.float32,
        {
            BASELINE: {},
            "global norm": dict(grad_clip=1.0),
            "align": dict(overshoot="align"),
            "ZClip": dict(grad_clip=fca.ZClip()),
            "AdaGC": dict(grad_clip=fca.AdaGC()),
            "align tensor": dict(overshoot="align-tensor"),
            "amsgrad": dict(amsgrad=True),
            "amsgrad, global norm": dict(amsgrad=True, grad_clip=1.0),
        },
    ),
    "planner-bfloat16": Case(
        "predictions of the planner, bfloat16",
        torch.bfloat16,
        {
            BASELINE: {},
            "global norm": dict(grad_clip=1.0),
            "align": dict(overshoot="align"),
            "float32 moments": dict(state_dtype=torch.float32),
            "float32 moments, global norm": dict(state_dtype=torch.float32, grad_clip=1.0),
            "float32 moments, align": dict(state_dtype=torch.float32, overshoot="align"),
        },
    ),
}


def measure(case: Case, quick: bool, progress: Callable[[str], None]) -> tuple[dict, dict[str, list[float]]]:
    """Steps in alternation with the stream, on the same parameters, gradients and moments -> measured over predicted.

    Peak memory at 50M float32: 1.2 GB, and 800 MB the stream.
    """
    rows, columns = (1_000, 1_000) if quick else (12_500, 4_000)
    elements = rows * columns
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(rows, columns, generator=generator).to(case.dtype)
    p = torch.nn.Parameter(torch.randn(rows, columns, generator=generator).mul_(0.02).to(case.dtype))
    p.grad = original.clone()
    moments = {dtype: [torch.zeros_like(p, dtype=dtype) for _ in range(3)] for dtype in (case.dtype, torch.float32)}

    def build(options: dict) -> Callable[[], object]:
        optimizer = fca.FusedClipAdamW([p], lr=1e-4, weight_decay=0.01, **options)
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if options.get("amsgrad") else ()))
        own = moments[options.get("state_dtype", case.dtype)]
        optimizer.state[p] = {"step": torch.zeros(()), **dict(zip(names, own))}
        return optimizer.step

    plans = {name: planned(case, elements, own) for name, own in case.settings.items()}
    methods = {name: own.ours for name, own in plans.items()}
    candidates = {name: build(own) for name, own in case.settings.items()}
    work = peers.Work(
        max_norm=1.0, states=[tuple(moments[case.dtype])[:2]], norm_foreach=peers.faster_norm_foreach([p])
    )
    candidates[USUAL], methods[USUAL] = peers.torch_fused([p], work), plans["global norm"].usual
    moved = {name: own.bytes for name, own in methods.items()}

    same_bytes = elements * case.dtype.itemsize // 4  # as many as the stream's float32 elements
    ceiling, unavailable = stream.add_ceiling(candidates, moved, same_bytes)

    def put_back_gradients() -> None:
        p.grad.copy_(original)  # clip_grad_norm_ has scaled them; and as after a backward pass, they are just written
        if ceiling is not None:
            ceiling.g.mul_(1.0)

    measured = alternate(
        candidates,
        5 if quick else 21,
        before=put_back_gradients,
        budget_s=2 if quick else 12,
        progress=lambda text: progress(f"{case.title}: {text}"),
    )
    table, notes = summarize(measured, moved, None if ceiling is None else STREAM), []
    for name, method in methods.items() if ceiling is not None else ():
        row = table[name]
        row["over_ceiling"] = over(measured, name, method.seconds, ceiling.bytes)
        row["over_predicted"] = over(measured, name, method.expected_seconds, ceiling.bytes)
        if _predicted(row):
            own = row["over_predicted"]
            notes.append(f"{name} {own['p50']:.2f} ({own['p20']:.2f} to {own['p80']:.2f})")
    result = {
        "title": f"{case.title} (tensors: 1, elements: {elements:,})",
        "baseline": BASELINE,
        "rules_of": "cpu",
        "elements": elements,
        "tensors": 1,
        "dtype": str(case.dtype).removeprefix("torch."),
        **conditions_of(measured),
        "ceiling": None if ceiling is None else ceiling.describe(measured.time(STREAM).p50),
        "candidates": table,
        "unavailable": unavailable,
        "notes": [f"measured over predicted: {', '.join(notes)}"] if notes else [],
        "targets": [] if quick else [_target(*each).to_dict() for each in table.items() if _predicted(each[1])],
    }
    return result, measured.seconds


def planned(case: Case, elements: int, options: dict) -> Plan:
    """At 1 GB/s: what a round's stream moved divides its seconds."""
    return plan(elements, dtype=case.dtype, device="cpu", bandwidth=1.0, **options)


def over(measured: Alternation, name: str, seconds: float | None, moved: int) -> dict | None:
    """Times of a candidate over `seconds` at 1 GB/s, each at the bandwidth that the stream had in its round.

    `moved`: bytes of the stream.
    """
    if seconds is None:
        return None
    pairs = zip(measured.seconds[name], measured.seconds[STREAM], strict=True)
    return Spread.of([own / (seconds / (moved / ceiling / 1e9)) for own, ceiling in pairs])._asdict()


def _predicted(row: dict) -> bool:
    return row.get("over_predicted") is not None


def _target(name: str, row: dict) -> Target:
    ratio = row["over_predicted"]["p50"]
    return Target(name, "agreement", AGREES, min(ratio, 1 / ratio))


@pytest.mark.parametrize(
    ("name", "candidate"), [(name, candidate) for name, case in CASES.items() for candidate in (*case.settings, USUAL)]
)
def test_planner(name, candidate, measure_once, benchmark, assert_targets):
    """A row of pytest-benchmark's table; its group is the case, timed in alternation."""
    result, seconds = measure_once(name)
    benchmark.group = name
    REPLAY.replay(benchmark, seconds[candidate])
    assert_targets(result, candidate)
