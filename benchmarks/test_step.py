"""One optimizer step: ours against each peer in alternation, and against the memory ceiling of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks import stream
from benchmarks.harness import (
    BASELINE,
    REPLAY,
    Target,
    alternate,
    bytes_per_element,
    conditions_of,
    summarize,
)
from benchmarks.peers import (
    PEERS,
    Work,
    at_best,
    check_same_work,
    faster_norm_foreach,
    fits,
    too_many_shapes,
    unavailable_reason,
)

pytestmark = pytest.mark.benchmark(timer=REPLAY)
SECONDS_A_CASE = 18

STREAM = stream.NAME
COPY = "torch copy_"
DEEPSPEED = "DeepSpeedCPUAdam"
CEILINGS = [STREAM, COPY]
MAX_NORM = 1.0  # far below the norm of the random gradients: the clip acts in every step
STREAM_TARGET = 0.85


def one_tensor(quick: bool) -> list[tuple[int, ...]]:
    return [(1_000_000 if quick else 50_000_000,)]


def a_third(quick: bool) -> list[tuple[int, ...]]:
    """Of the elements of `one_tensor`: moments of 8 bits take CPUs long."""
    return [(500_000 if quick else 16_000_000,)]


def many_small(quick: bool) -> list[tuple[int, ...]]:
    return [(1024,)] * (200 if quick else 2000)


def qwen2_quarter(quick: bool) -> list[tuple[int, ...]]:
    """The 290 parameters of Qwen2-0.5B (24 layers, tied embedding), widths divided by 4; `quick`: by 32."""
    divisor = 32 if quick else 4
    hidden, mlp, keys, vocabulary = (size // divisor for size in (896, 4864, 128, 151936))
    attention = [(hidden, hidden), (hidden,), *[(keys, hidden), (keys,)] * 2, (hidden, hidden)]
    layer = [*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *layer * 24, (hidden,)]


@dataclass(frozen=True)
class Case:
    """Shapes, dtype and clip of a comparison.

    Args:
        targets: peer -> least ratio of its time to ours.
        other_work: with the peers whose step is another than AdamW's; else with those whose step is the same.
    """

    title: str
    shapes: Callable[[bool], list[tuple[int, ...]]]
    dtype: torch.dtype
    max_norm: float | None
    rounds: int
    targets: dict[str, float]
    stream_target: float | None = None
    other_work: bool = False

    @property
    def peers(self) -> list[str]:
        if self.other_work:
            return [BASELINE, "torch fused", *(name for name, peer in PEERS.items() if peer.other_work)]
        return [
            name
            for name, peer in PEERS.items()
            if not peer.other_work and (self.max_norm is not None or not peer.only_with_clip)
        ]


CASES = {
    "step-one-tensor-clip": Case(
        "float32, one tensor, global-norm clip",
        one_tensor,
        torch.float32,
        MAX_NORM,
        15,
        {"torch fused": 1.4, "torch fused, grad_scale": 1.1},
        STREAM_TARGET,
    ),
    "step-one-tensor": Case(
        "float32, one tensor, no clip",
        one_tensor,
        torch.float32,
        None,
        15,
        {"torch fused": 1.0, "DeepSpeedCPUAdam": 1.0},
        STREAM_TARGET,
    ),
    "step-2000-tensors-clip": Case(
        "float32, tensors of 1,024, global-norm clip",
        many_small,
        torch.float32,
        MAX_NORM,
        60,
        {"torch fused": 2.0},
    ),
    "step-qwen2-shapes-clip": Case(
        "float32, shapes of Qwen2-0.5B with smaller widths, global-norm clip",
        qwen2_quarter,
        torch.float32,
        MAX_NORM,
        20,
        {},
    ),
    "step-bfloat16-clip": Case(
        "bfloat16 (p, g, m, v), one tensor, global-norm clip",
        one_tensor,
        torch.bfloat16,
        MAX_NORM,
        15,
        {},
    ),
    "step-bfloat16": Case(
        "bfloat16 (p, g, m, v), one tensor, no clip",
        one_tensor,
        torch.bfloat16,
        None,
        15,
        {},
    ),
    "step-8-bit-moments": Case(
        "float32, one tensor, no clip, beside moments of 8 bits",
        a_third,
        torch.float32,
        None,
        11,
        {},
        other_work=True,
    ),
}


def measure(case: Case, quick: bool, progress: Callable[[str], None]) -> tuple[dict, dict[str, list[float]]]:
    """Same work checked -> settings chosen -> candidates in alternation -> result and the seconds behind it.

    Peak memory at 50M float32: 600 MB a candidate for p, m, v, 800 MB the stream, 400 MB the gradients and
    their copy, 600 MB of temporaries in the unfused peers: below 6 GB with torch's alone, below 9 with all packages.
    """
    generator = torch.Generator().manual_seed(0)
    shapes, width = case.shapes(quick), case.dtype.itemsize
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    reasons = {name: _left_out(name, case, shapes, quick) for name in case.peers}
    unavailable = {name: reason for name, reason in reasons.items() if reason is not None}
    names = [name for name in case.peers if name not in unavailable]
    deviations = check_same_work(names, case.dtype, case.max_norm)

    master = [torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes]
    grads = [g.clone() for g in master]
    start = [torch.randn(shape, generator=generator).mul_(0.02).to(case.dtype) for shape in shapes]

    def params() -> list[torch.nn.Parameter]:
        copies = [torch.nn.Parameter(p.clone()) for p in start]
        for p, g in zip(copies, grads, strict=True):
            p.grad = g  # one set of gradients for all: the same memory, put back before each step
        return copies

    work = Work(max_norm=case.max_norm)
    if case.max_norm is not None:
        work = replace(work, norm_foreach=faster_norm_foreach(params()))
    best = {name: at_best(PEERS[name], "cpu", params, work) for name in names}
    steps = {name: peer.build(params(), work) for name, (peer, _) in best.items()}
    moved = {name: _moved_bytes(name, case, elements) for name in names}

    ceiling, ceilings = None, {}
    if (reason := stream.unavailable_reason()) is not None:
        unavailable |= {name: reason for name in CEILINGS}
    else:
        ceiling = stream.Stream(elements * width // 4)  # a float32 stream of the same bytes
        ceilings = {STREAM: ceiling, COPY: lambda: ceiling.p.copy_(ceiling.g)}
        moved |= {STREAM: ceiling.bytes, COPY: bytes_per_element("copy") * ceiling.elements}

    def put_back_gradients() -> None:
        # As after a backward pass, each finds its gradients just written; the stream's g is touched likewise.
        for g, original in zip(grads, master, strict=True):
            g.copy_(original)
        if ceiling is not None:
            ceiling.g.mul_(1.0)

    # Two alternations, ours and the ceilings in both: the slow among the other packages leave the first few rounds, and
    # their work in between makes ours colder than it is beside torch's ways, for which one would take it.
    others = [name for name in names if PEERS[name].package is not None and name != DEEPSPEED]
    turns = [[name for name in names if name not in others], *([[BASELINE, *others]] if others else [])]
    taken = [
        alternate(
            {name: steps[name] for name in own} | ceilings,
            5 if quick else case.rounds,
            before=put_back_gradients,
            budget_s=2 if quick else 12,
            progress=lambda text: progress(f"{case.title}: {text}"),
        )
        for own in turns
    ]
    rows, seconds = {}, {}
    for measured in reversed(taken):  # what is in both is of the first
        rows |= summarize(measured, moved, STREAM if ceiling is not None else None)
        seconds |= measured.seconds
    rows = {name: rows[name] for name in [*names, *ceilings]}
    measured = taken[0]
    result = {
        "title": f"{case.title} (tensors: {len(shapes):,}, elements: {elements:,})",
        "baseline": BASELINE,
        "elements": elements,
        "tensors": len(shapes),
        "dtype": str(case.dtype).removeprefix("torch."),
        "max_norm": case.max_norm,
        "norms_taken_with_foreach": work.norm_foreach if case.max_norm is not None else None,
        **conditions_of(measured),
        "quiet": all(each.quiet for each in taken),
        "alternations": [list(each.seconds) for each in taken],
        "ceiling": None if ceiling is None else ceiling.describe(measured.time(STREAM).p50),
        "same_work_deviation": deviations,
        "other_work": {name: PEERS[name].other_work for name in names if PEERS[name].other_work},
        "settings": {name: options for name, (_, options) in best.items() if options},
        "candidates": rows,
        "unavailable": unavailable,
        "notes": [f"{name}: {PEERS[name].other_work}" for name in names if PEERS[name].other_work],
        "targets": [] if quick else [target.to_dict() for target in _targets(case, rows)],
    }
    return result, seconds


def _left_out(name: str, case: Case, shapes: list[tuple[int, ...]], quick: bool) -> str | None:
    peer = PEERS[name]
    if name == "torch for-loop" and len(shapes) == 1:
        return "one tensor: the same operations as foreach"
    if quick and peer.package is not None and peer.package.compiles:
        return "left out of --quick: it compiles"
    if not fits(peer, case.dtype, None, case.max_norm):
        return f"keeps moments in {peer.states} only"
    return unavailable_reason(name) or too_many_shapes(name, shapes)


def _moved_bytes(name: str, case: Case, elements: int) -> int | None:
    traffic = PEERS[name].traffic if case.max_norm is None else PEERS[name].traffic_with_clip
    return None if traffic is None else bytes_per_element(traffic, case.dtype.itemsize) * elements


def _targets(case: Case, rows: dict[str, dict]) -> list[Target]:
    targets = [
        Target(peer, "over_ours", least, _median(rows, peer, "over_ours")) for peer, least in case.targets.items()
    ]
    if case.stream_target is not None:
        fraction = _median(rows, BASELINE, "fraction_of_stream")
        targets.append(Target(BASELINE, "fraction_of_stream", case.stream_target, fraction))
    return targets


def _median(rows: dict[str, dict], candidate: str, what: str) -> float | None:
    spread = rows.get(candidate, {}).get(what)
    return None if spread is None else spread["p50"]


@pytest.mark.parametrize(
    ("name", "candidate"),
    [(name, candidate) for name, case in CASES.items() for candidate in [*case.peers, *CEILINGS]],
)
def test_step(name, candidate, measure_once, benchmark, assert_targets):
    """A row of pytest-benchmark's table; its group is the case, timed in alternation."""
    result, seconds = measure_once(name)
    if candidate in result["unavailable"]:
        pytest.skip(f"{candidate}: {result['unavailable'][candidate]}")
    benchmark.group = name
    REPLAY.replay(benchmark, seconds[candidate])
    assert_targets(result, candidate)
