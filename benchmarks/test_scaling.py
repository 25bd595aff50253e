"""How the comparisons change with size: step over elements and tensors, scores over samples, losses over vocabulary and
tokens. A curve is one case; at each of its points ours, torch's best and the ceiling are timed in alternation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

import fused_clip_adam as fca
from benchmarks import peers, stream, test_logits, test_objective, test_scores
from benchmarks.harness import (
    BASELINE,
    REPLAY,
    Alternation,
    Spread,
    alternate,
    bytes_per_element,
    conditions_of,
    summarize,
)
from benchmarks.test_objective import EAGER

pytestmark = pytest.mark.benchmark(timer=REPLAY)
SECONDS_A_CASE = 25

STREAM = stream.NAME
FUSED, TRICK = "torch fused", "torch fused, grad_scale"
MAX_NORM = 1.0  # far below the norm of the random gradients: the clip acts in every step
TENSOR = 1024  # elements of each of many tensors
LAYER = (1024, 1024)  # the parameter of the scores
ROWS = 64  # of logits
LENGTH = 256  # tokens of a sequence
ROUNDS, QUICK_ROUNDS = 60, 5


@dataclass(frozen=True)
class Point:
    """What is timed at one size.

    Args:
        candidates: name -> callable, ours first.
        moved: candidate -> bytes of a call, None where no closed count is claimed.
        elements: that the bytes are counted by.
        before: called, untimed, before each call: puts inputs back.
        facts: for the result file.
    """

    candidates: dict[str, Callable[[], object]]
    moved: dict[str, int | None]
    elements: int
    before: Callable[[], object] | None = None
    facts: dict | None = None


@dataclass(frozen=True)
class Case:
    """A curve.

    Args:
        x: what varies; each of `sizes` is a value of it, of `quick_sizes` with --quick.
        candidates: ours and torch's, the same at each point.
        point: size -> what is timed there.
        check: raises where a candidate does other work; candidate -> deviation.
    """

    title: str
    x: str
    sizes: tuple[int, ...]
    quick_sizes: tuple[int, ...]
    candidates: tuple[str, ...]
    point: Callable[[int], Point]
    check: Callable[[], dict[str, float]]


# ---------------------------------------------------------------- step


def step_point(shapes: list[tuple[int, ...]]) -> Point:
    """With a global-norm clip; all share one set of gradients, put back before each call as after a backward pass."""
    generator = torch.Generator().manual_seed(0)
    master = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [g.clone() for g in master]
    start = [torch.randn(shape, generator=generator).mul_(0.02) for shape in shapes]

    def params() -> peers.Params:
        copies = [torch.nn.Parameter(p.clone()) for p in start]
        for p, g in zip(copies, grads, strict=True):
            p.grad = g
        return copies

    work = peers.Work(max_norm=MAX_NORM)
    work = replace(work, norm_foreach=peers.faster_norm_foreach(params()))
    elements = sum(g.numel() for g in grads)
    return Point(
        candidates={name: peers.PEERS[name].build(params(), work) for name in STEP_CANDIDATES},
        moved={name: bytes_per_element(peers.PEERS[name].traffic_with_clip) * elements for name in STEP_CANDIDATES},
        elements=elements,
        before=lambda: torch._foreach_copy_(grads, master),
        facts={"tensors": len(shapes), "norms_taken_with_foreach": work.norm_foreach, "max_norm": MAX_NORM},
    )


STEP_CANDIDATES = (BASELINE, FUSED, TRICK)


def check_step() -> dict[str, float]:
    return peers.check_same_work(list(STEP_CANDIDATES), torch.float32, MAX_NORM)


# ---------------------------------------------------------------- step from scores

SCORE_CANDIDATES = (BASELINE, *test_scores.CONTRACTIONS)


@dataclass(frozen=True)
class Scores:
    """One parameter and its scores of some samples, and a step for each of the candidates, on its own copy."""

    start: torch.Tensor
    scores: torch.Tensor
    logp: torch.Tensor
    advantages: torch.Tensor
    optimizers: dict[str, fca.FusedClipAdamW]

    @classmethod
    def make(cls, samples: int, shape: tuple[int, int], lr: float = 1e-4) -> Scores:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(shape, generator=generator).mul_(0.02)
        scores = torch.randn(samples, *shape, generator=generator)
        logp, advantages = (torch.randn(samples, generator=generator) for _ in range(2))
        optimizers = {name: fca.FusedClipAdamW([torch.nn.Parameter(start.clone())], lr=lr) for name in SCORE_CANDIDATES}
        return cls(start, scores, logp, advantages, optimizers)

    def steps(self) -> dict[str, Callable[[], object]]:
        """With log-probabilities as sampled: no ratio is clipped, so that every score is read."""
        how = ([self.scores], self.logp, self.advantages)
        own = self.optimizers[BASELINE]
        steps = {BASELINE: lambda: own.step_from_scores([self.scores], self.logp, self.logp, self.advantages)}
        for name, contract in test_scores.CONTRACTIONS.items():
            steps[name] = test_scores.contract_then_step(contract, self.optimizers[name], *how)
        return steps

    def parameter(self, name: str) -> torch.Tensor:
        return self.optimizers[name].param_groups[0]["params"][0].detach()


def scores_point(samples: int) -> Point:
    made = Scores.make(samples, LAYER)
    own, other = fca.theory.bytes_per_element(samples=samples), test_scores.contracted_bytes(samples)
    moved = {name: (own if name == BASELINE else other) * made.start.numel() for name in SCORE_CANDIDATES}
    return Point(made.steps(), moved, made.start.numel())


def check_scores() -> dict[str, float]:
    """Two steps of each against torch's AdamW in float64 on the weighted sum of the scores.

    Raises:
        AssertionError: an update deviates by more than the tolerance of steps.
    """
    made = Scores.make(5, (33, 65), lr=1e-2)
    steps, expected = made.steps(), torch.nn.Parameter(made.start.double())
    options = {name: made.optimizers[BASELINE].defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
    exact = torch.optim.AdamW([expected], **options)
    for _ in range(2):
        for step in steps.values():
            step()
        weights = -made.advantages.double() / len(made.advantages)  # of a mean over samples whose ratio is 1
        expected.grad = torch.einsum("b,b...->...", weights, made.scores.double())
        exact.step()
        made.advantages.copy_(made.advantages.flip(0) * 3)
    update = expected.detach() - made.start.double()
    deviations = {}
    for name in steps:
        error = made.parameter(name).double() - expected.detach()
        deviations[name] = float(error.norm() / update.norm())
        assert deviations[name] <= peers.SAME_WORK_TOLERANCE[torch.float32], f"{name}: off by {deviations[name]:.1e}"
    return deviations


# ---------------------------------------------------------------- losses

LOSS_CANDIDATES = (BASELINE, EAGER)


def logits_point(vocabulary: int) -> Point:
    """Loss, gradient over the logits, entropy bonus and statistics of `ROWS` tokens."""
    logits, *rest = test_logits.make_batch(ROWS, vocabulary)
    values = logits.clone()
    logits.requires_grad_()

    def restore() -> None:
        logits.grad = None
        with torch.no_grad():
            logits.copy_(values)

    def call(loss: Callable) -> Callable[[], object]:
        return lambda: loss(logits, *rest).backward()

    moved = {BASELINE: test_logits.FLOOR_BYTES_PER_LOGIT * logits.numel(), EAGER: None}
    candidates = {name: call(test_logits.LOSSES[name]) for name in LOSS_CANDIDATES}
    return Point(candidates, moved, logits.numel(), restore, {"rows": ROWS})


def check_logits() -> dict[str, float]:
    deviations = test_logits.check_same_results()
    return {name: deviations[name] for name in LOSS_CANDIDATES}


TOKEN_LOSSES = {BASELINE: test_objective.ours, EAGER: test_objective.ppo_in_torch}


def tokens_point(tokens: int) -> Point:
    """Loss, gradient and statistics from log-probabilities."""
    batch = test_objective.make_batch((tokens // LENGTH, LENGTH))
    candidates = {name: test_objective.forward_backward(loss, batch) for name, loss in TOKEN_LOSSES.items()}
    return Point(candidates, {BASELINE: test_objective.FLOOR_BYTES_PER_TOKEN * tokens, EAGER: None}, tokens)


def check_tokens() -> dict[str, float]:
    batch = test_objective.make_batch((8, LENGTH))
    candidates = {name: test_objective.forward_backward(loss, batch) for name, loss in TOKEN_LOSSES.items()}
    return test_objective.check_same_results(candidates, batch)


# ---------------------------------------------------------------- curves

CASES = {
    "scaling-elements": Case(
        "step of one float32 tensor, global-norm clip",
        "elements",
        tuple(2**k for k in range(12, 27, 2)),
        (2**12, 2**16),
        STEP_CANDIDATES,
        lambda elements: step_point([(elements,)]),
        check_step,
    ),
    "scaling-tensors": Case(
        "step of float32 tensors of 1,024, global-norm clip",
        "tensors",
        tuple(4**k for k in range(7)),
        (1, 64),
        STEP_CANDIDATES,
        lambda tensors: step_point([(TENSOR,)] * tensors),
        check_step,
    ),
    "scaling-samples": Case(
        "step from scores of a layer of 1,024 x 1,024",
        "samples",
        tuple(2**k for k in range(8)),
        (1, 4),
        SCORE_CANDIDATES,
        scores_point,
        check_scores,
    ),
    "scaling-vocabulary": Case(
        f"PPO loss from logits, gradient, entropy bonus and statistics of {ROWS} tokens",
        "vocabulary",
        (1024, 4096, 16_384, 65_536, 151_936),
        (1024, 4096),
        LOSS_CANDIDATES,
        logits_point,
        check_logits,
    ),
    "scaling-tokens": Case(
        "PPO loss from log-probabilities, gradient and statistics",
        "tokens",
        tuple(4**k for k in range(5, 11)),
        (1024, 4096),
        LOSS_CANDIDATES,
        tokens_point,
        check_tokens,
    ),
}


def measure(case: Case, quick: bool, progress: Callable[[str], None]) -> tuple[dict, dict]:
    """Same work checked -> each size in alternation -> result with a point a size, seconds by (size, candidate).

    A curve with a point that was not quiet is not quiet. What is true of one size only, the candidates' rows and the
    ceiling, is beside the points that of the last.
    """
    deviations = case.check()
    points, seconds, unavailable = [], {}, {}
    for size in case.quick_sizes if quick else case.sizes:
        found, measured, unavailable = _measure_point(case, size, quick, progress)
        points.append(found)
        seconds |= {(size, name): taken for name, taken in measured.seconds.items()}
    shares = [point["others_cpu_share"] for point in points if point["others_cpu_share"] is not None]
    last = points[-1]
    result = {
        "title": f"{case.title}: {case.x} from {points[0]['x']:,} to {last['x']:,}",
        "baseline": BASELINE,
        "curve": case.title,
        "x": case.x,
        "elements": last["elements"],
        "dtype": "float32",
        "rounds": min(point["rounds"] for point in points),
        "rounds_set_aside": sum(point["rounds_set_aside"] for point in points),
        "others_cpu_share": max(shares, default=None),
        "quiet": all(point["quiet"] for point in points),
        "ceiling": last["ceiling"],
        "same_work_deviation": deviations,
        "candidates": last["candidates"],
        "points": points,
        "unavailable": unavailable,
        "targets": [],
    }
    return result, seconds


def _measure_point(
    case: Case, size: int, quick: bool, progress: Callable[[str], None]
) -> tuple[dict, Alternation, dict[str, str]]:
    point = case.point(size)
    candidates, moved = dict(point.candidates), dict(point.moved)
    ceiling, unavailable = stream.add_ceiling(candidates, moved, moved[BASELINE] // bytes_per_element("update"))

    def before() -> None:
        point.before()
        if ceiling is not None:
            ceiling.g.mul_(1.0)  # as warm as what was just put back

    measured = alternate(
        candidates,
        QUICK_ROUNDS if quick else ROUNDS,
        before=None if point.before is None else before,
        budget_s=0.5 if quick else 3.0,
        progress=lambda text: progress(f"{case.title}, {size:,} {case.x}: {text}"),
    )
    rows = summarize(measured, moved, STREAM if ceiling is not None else None)
    for name, row in rows.items():
        row["work_of_ceiling"] = None if ceiling is None else _work_of_ceiling(measured, name, moved)._asdict()
    found = {
        "x": size,
        "elements": point.elements,
        **(point.facts or {}),
        **conditions_of(measured),
        "ceiling": None if ceiling is None else ceiling.describe(measured.time(STREAM).p50),
        "candidates": rows,
    }
    return found, measured, unavailable


def _work_of_ceiling(measured: Alternation, name: str, moved: dict[str, int | None]) -> Spread:
    """The time in which the stream moves what ours has to move, over a candidate's: 1 can hardly be passed by any.

    Unlike `fraction_of_stream` it counts the same bytes for all, so that who moves more for the same work is lower.
    """
    size = moved[BASELINE] / moved[STREAM]
    times = zip(measured.seconds[name], measured.seconds[STREAM], strict=True)
    return Spread.of([size * ceiling / own for own, ceiling in times])


def pytest_generate_tests(metafunc):
    if "size" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        rows = [
            (name, size, candidate)
            for name, case in CASES.items()
            for size in (case.quick_sizes if quick else case.sizes)
            for candidate in (*case.candidates, STREAM)
        ]
        metafunc.parametrize(("name", "size", "candidate"), rows)


def test_scaling(name, size, candidate, measure_once, benchmark, assert_targets):
    """A row of pytest-benchmark's table; its group is the size of a curve, timed in alternation."""
    result, seconds = measure_once(name)
    if candidate in result["unavailable"]:
        pytest.skip(f"{candidate}: {result['unavailable'][candidate]}")
    benchmark.group = f"{name}, {size:,}"
    REPLAY.replay(benchmark, seconds[size, candidate])
    assert_targets(result, candidate)
