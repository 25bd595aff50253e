"""Rules of the optimizer against the step without them, in alternation: what a rule costs beside the bytes it moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import fused_clip_adam as fca
from benchmarks import stream
from benchmarks.harness import BASELINE, REPLAY, Target, alternate, conditions_of, summarize

pytestmark = pytest.mark.benchmark(timer=REPLAY)
SECONDS_A_CASE = 16

STREAM = stream.NAME
WITHIN = 0.95  # the baseline's time over a rule's, at least


@dataclass(frozen=True)
class Case:
    """`baseline` and each of `rules`: options of FusedClipAdamW; `targeted`: who has to reach the baseline's speed."""

    title: str
    baseline: dict
    rules: dict[str, dict]
    targeted: tuple[str, ...]


CASES = {
    "rules-one-pass": Case(
        "rules that need no more bytes, against none (ours)",
        {},
        {
            "align": dict(overshoot="align"),
            "cautious": dict(overshoot="cautious"),
            "grams": dict(overshoot="grams"),
            "SPAM": fca.presets.spam(every=7, warmup=3),
            "brake": dict(overshoot="brake"),
            "align tensor, lagged": dict(overshoot=fca.AlignedMomentum("tensor", lag=True)),
        },
        ("align", "cautious", "SPAM", "brake"),
    ),
    "rules-norm": Case(
        "rules that need norms, against the global-norm clip (ours)",
        dict(grad_clip=1.0),
        {
            "per tensor": dict(grad_clip=fca.PerTensorNorm(1.0)),
            "AutoClip": fca.presets.autoclip(),
            "ZClip": fca.presets.zclip(),
            "AdaGC": fca.presets.adagc(),
            "AGC": fca.presets.agc(),
            "StableAdamW": fca.presets.stable_adamw(),
            "Stable-SPAM": fca.presets.stable_spam(every=7),
            "cautious, rescaled": dict(overshoot=fca.Cautious(rescale=True)),
            "align tensor": dict(overshoot="align-tensor"),
        },
        ("per tensor", "AutoClip", "ZClip", "AdaGC"),
    ),
}


def bytes_of(options: dict, elements: int) -> int:
    rules = {name: options[name] for name in ("grad_clip", "overshoot", "reset") if name in options}
    return fca.theory.bytes_per_element(**rules) * elements


def measure(case: Case, quick: bool, progress: Callable[[str], None]) -> tuple[dict, dict[str, list[float]]]:
    """Candidates in alternation on the same parameters, gradients and moments: 1 GB at 50M, as much for the stream."""
    rows, columns = (1_000, 1_000) if quick else (12_500, 4_000)
    elements = rows * columns
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(rows, columns, generator=generator)
    p = torch.nn.Parameter(torch.randn(rows, columns, generator=generator).mul_(0.02))
    p.grad = grad
    moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    stats = fca.ClipStats(torch.rand(14, generator=generator))

    def build(options: dict) -> Callable[[], None]:
        optimizer = fca.FusedClipAdamW([p], lr=1e-4, weight_decay=0.01, **options)
        optimizer.state[p] = {"step": torch.zeros(()), **moments}

        def step() -> None:
            if options.get("overshoot") == "brake":
                optimizer.observe(stats)
            optimizer.step()

        return step

    options = {BASELINE: case.baseline, **case.rules}
    candidates = {name: build(own) for name, own in options.items()}
    moved = {name: bytes_of(own, elements) for name, own in options.items()}
    ceiling, unavailable = stream.add_ceiling(candidates, moved, elements)

    def touch_gradients() -> None:
        grad.mul_(1.0)  # as after a backward pass, each finds its gradients just written
        if ceiling is not None:
            ceiling.g.mul_(1.0)

    measured = alternate(
        candidates,
        5 if quick else 21,
        before=touch_gradients,
        budget_s=2 if quick else 12,
        progress=lambda text: progress(f"{case.title}: {text}"),
    )
    table = summarize(measured, moved, None if ceiling is None else STREAM)
    speeds = {name: 1 / table[name]["over_ours"]["p50"] for name in case.targeted}
    result = {
        "title": f"{case.title} (tensors: 1, elements: {elements:,})",
        "baseline": BASELINE,
        "rules_of": "cpu",
        "elements": elements,
        "tensors": 1,
        "dtype": "float32",
        **conditions_of(measured),
        "ceiling": None if ceiling is None else ceiling.describe(measured.time(STREAM).p50),
        "candidates": table,
        "unavailable": unavailable,
        "targets": []
        if quick
        else [Target(name, "speed_of_baseline", WITHIN, speed).to_dict() for name, speed in speeds.items()],
    }
    return result, measured.seconds


@pytest.mark.parametrize(
    ("name", "candidate"), [(name, candidate) for name, case in CASES.items() for candidate in (BASELINE, *case.rules)]
)
def test_rules(name, candidate, measure_once, benchmark, assert_targets):
    """A row of pytest-benchmark's table; its group is the case, timed in alternation."""
    result, seconds = measure_once(name)
    benchmark.group = name
    REPLAY.replay(benchmark, seconds[candidate])
    assert_targets(result, candidate)
