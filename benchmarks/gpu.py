"""Optimizer step and losses on a GPU: ours against its peers in alternation, and against the card's copy bandwidth.

    python -m benchmarks.gpu [--device cuda|cpu] [--quick] [--budget-s N] [cases...]

Results go to `results/<device>/<case>.json`, each as soon as it is measured. `--quick` takes small sizes and few
rounds; it and `--device cpu` (a dry run: every line but the clock's) write nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import gpu_harness, gpu_offload
from benchmarks.gpu_harness import COPY, FRACTION, Copy, CpuClock, DeviceClock, HostClock
from benchmarks.gpu_peers import (
    CHUNKS,
    COMPILED,
    EAGER,
    ENTROPY_COEF,
    FUSED,
    LIGER,
    MASTERS,
    OURS,
    PEERS,
    TRICK,
    Batch,
    Forward,
    LossPeer,
    build_rule,
    exact_loss,
    fits,
    loss_peers,
    moved_bytes,
    rules,
    unavailable_reason,
)
from benchmarks.harness import RESULTS, Target, alternate, summarize, write_json
from benchmarks.peers import Work, check_same_work, faster_norm_foreach, too_many_shapes

MAX_NORM = 1.0  # far below the norm of the random gradients: the clip acts in every step
CEILING_TARGET = 0.92
# The step that a rule is to be within 5% of: those that need no more bytes, and those that need norms.
RULE_TARGETS = {"align": "plain", "cautious": "plain", "SPAM": "plain", "brake": "plain"}
RULE_TARGETS |= {"per tensor": "clip", "ZClip": "clip"}
WITHIN = 0.95
CLIP_TARGETS = {FUSED: 1.2, TRICK: 1.05}
FULL_SIZE_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5}
SAMPLES = 65536  # elements of each tensor compared at full size, at most
SCORES_TARGET = 0.9  # of the copy's bandwidth
LOGITS_TARGET = 0.8  # of the copy's bandwidth: within 1.25 times of the floor
SMALL_LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}  # bfloat16 rounds a gradient by 2^-9 at most
LOSS_TOLERANCE = 1e-2  # the same twice, or a few tokens whose ratio is next to a bound
COMPILE_S = 10.0  # a loss whose share of the time is less goes without torch.compile, which may take twice as long
ROUNDS, HOST_ROUNDS, WARMUP, QUICK_ROUNDS = 60, 15, 3, 3

Shapes = list[tuple[int, ...]]
Clock = DeviceClock | CpuClock

# ---------------------------------------------------------------- shapes


def one_tensor(elements: int, quick: bool) -> Shapes:
    return [(4_000 if quick else elements,)]


def many_small(elements: int, quick: bool) -> Shapes:
    return [(64,)] * 40 if quick else [(1024,)] * 2000


def qwen2(elements: int, quick: bool) -> Shapes:
    """The 290 parameters of Qwen2-0.5B: 24 layers, tied embedding; `quick`: widths divided by 128."""
    divisor = 128 if quick else 1
    hidden, mlp, keys, vocabulary = (size // divisor for size in (896, 4864, 128, 151936))
    attention = [(hidden, hidden), (hidden,), *[(keys, hidden), (keys,)] * 2, (hidden, hidden)]
    layer = [*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *layer * 24, (hidden,)]


def llama3_eighth(elements: int, quick: bool) -> Shapes:
    """One of 8 shards of the 291 parameters of Llama-3-8B: an eighth of the rows of each; `quick`: widths / 512."""
    divisor = 512 if quick else 1
    hidden, mlp, keys, vocabulary = (size // divisor for size in (4096, 14336, 1024, 128256))
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer = [*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp), (hidden,), (hidden,)]
    whole = [(vocabulary, hidden), *layer * 32, (hidden,), (vocabulary, hidden)]
    return [(max(rows // 8, 1), *rest) for rows, *rest in whole]


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """Shapes, dtypes and clip of a step; `rules_of`: a backend whose rules are compared instead of peers."""

    title: str
    shapes: Callable[[int, bool], Shapes]
    max_norm: float | None = None
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None
    targets: dict[str, float] = field(default_factory=dict)  # peer -> least ratio of its time to ours
    ceiling_target: float | None = None
    rules_of: str | None = None
    weight: float = 1.0  # its share of the time, relative to the others

    @property
    def states(self) -> torch.dtype:
        return self.state_dtype or self.dtype


@dataclass(frozen=True)
class LossCase:
    """Loss, gradient and statistics from log-probabilities (`kind` "ppo", "gspo") or logits ("logits", which is PPO's).

    [B, T] tokens; from logits each sequence has a position more, which is masked: so it is in training, and Liger
    takes no other.
    """

    title: str
    kind: str
    entropy_coef: float = 0.0
    targets: dict[str, float] = field(default_factory=dict)
    ceiling_target: float | None = None
    rules_of: None = None
    weight: float = 2.0

    @property
    def from_logits(self) -> bool:
        return self.kind == "logits"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.from_logits else torch.float32


@dataclass(frozen=True)
class ScoreCase:
    """The single-pass policy step on float32 parameters, from scores of `score_dtype`."""

    title: str
    samples: int
    score_dtype: torch.dtype
    targets: dict[str, float] = field(default_factory=dict)
    ceiling_target: float | None = SCORES_TARGET
    rules_of: None = None
    max_norm: None = None
    weight: float = 1.0
    dtype: torch.dtype = torch.float32

    @property
    def bytes_each(self) -> int:
        import fused_clip_adam as fca

        return fca.theory.bytes_per_element(grad=self.score_dtype.itemsize, samples=self.samples)


AnyCase = Case | LossCase | ScoreCase | gpu_offload.OffloadCase


def _cases() -> dict[str, AnyCase]:
    """In the order of their weight: the time may not do for all."""
    bfloat16 = torch.bfloat16
    mixed = {"dtype": bfloat16, "state_dtype": torch.float32}
    plain = {
        "step-one-tensor": Case("float32, one tensor", one_tensor, ceiling_target=CEILING_TARGET),
        "step-llama3-8b-shard": Case("float32, shapes of Llama-3-8B sharded by 8", llama3_eighth),
        "step-qwen2-0.5b": Case("float32, shapes of Qwen2-0.5B", qwen2),
        "step-2000-tensors": Case("float32, tensors of 1,024", many_small),
        "step-bfloat16": Case("bfloat16 (p, g, m, v), one tensor", one_tensor, dtype=bfloat16),
        "step-bfloat16-float32-states": Case("bfloat16 (p, g), float32 (m, v), one tensor", one_tensor, **mixed),
    }
    targeted = ("step-one-tensor", "step-llama3-8b-shard", "step-qwen2-0.5b")
    clipped = {
        f"{name}-clip": replace(
            case,
            title=f"{case.title}, global-norm clip",
            max_norm=MAX_NORM,
            targets=CLIP_TARGETS if name in targeted else {},
        )
        for name, case in plain.items()
    }
    unclipped = {name: replace(case, title=f"{case.title}, no clip") for name, case in plain.items()}
    by_rule = {
        f"step-rules-{backend}": Case(f"float32, one tensor, rules of backend={backend}", one_tensor, rules_of=backend)
        for backend in OURS.values()
    }
    logits = LossCase("PPO from logits", "logits", targets={LIGER: 1.0}, ceiling_target=LOGITS_TARGET)
    scores = {
        f"scores-{samples}{suffix}": ScoreCase(f"policy step from {samples} samples' {kind} scores", samples, dtype)
        for samples, suffix, kind, dtype in (
            (8, "", "float32", torch.float32),
            (64, "", "float32", torch.float32),
            (64, "-bfloat16", "bfloat16", bfloat16),
        )
    }
    with_bonus = replace(logits, title="PPO from logits with entropy bonus", entropy_coef=ENTROPY_COEF, targets={})
    return {
        "step-one-tensor-clip": clipped.pop("step-one-tensor-clip"),
        "step-one-tensor": unclipped.pop("step-one-tensor"),
        "objective-logits": logits,
        "step-rules-cuda": by_rule.pop("step-rules-cuda"),
        **scores,
        **gpu_offload.CASES,
        **clipped,
        "objective-logits-entropy": with_bonus,
        "objective-ppo": LossCase("PPO loss, gradient and statistics", "ppo"),
        "objective-gspo": LossCase("GSPO loss, gradient and statistics", "gspo"),
        **by_rule,
        **unclipped,
    }


CASES = _cases()

# ---------------------------------------------------------------- the memory of a case


class Tensors:
    """Parameters, moments and gradients that all candidates share, one after another.

    Bytes an element at float32: p, m, v, the original gradients and two sets that rotate: 24 (28 with amsgrad's
    third moment). 1e9 elements and the copy's 4 GiB leave room for the temporaries of foreach on 80 GB.
    """

    def __init__(self, case: Case, shapes: Shapes, device: str):
        self.generator = torch.Generator(device).manual_seed(0)
        self.params = [torch.nn.Parameter(torch.empty(s, device=device, dtype=case.dtype)) for s in shapes]
        moments = 3 if case.rules_of else 2
        self.states = [
            tuple(torch.zeros_like(p, dtype=case.states, requires_grad=False) for _ in range(moments))
            for p in self.params
        ]
        self.originals = [torch.empty_like(p, requires_grad=False).normal_(generator=self.generator)
                          for p in self.params]  # fmt: skip
        self.elements = sum(p.numel() for p in self.params)
        # Small tensors rotate among more sets: each finds its gradients at addresses it has not used just before.
        sets = 2 if self.elements > 2**24 else 4
        self.grads = [[g.clone() for g in self.originals] for _ in range(sets)]
        self._turn = 0

    def next_gradients(self) -> None:
        """Untimed, before each step: the next set, as a backward pass would leave it."""
        self._turn = (self._turn + 1) % len(self.grads)
        now = self.grads[self._turn]
        torch._foreach_copy_(now, self.originals)  # peers that clip have scaled them
        for p, g in zip(self.params, now, strict=True):
            p.grad = g

    @torch.no_grad()
    def restart(self) -> None:
        """The first step's parameters and moments."""
        self.generator.manual_seed(1)
        for p, moments in zip(self.params, self.states, strict=True):
            p.normal_(generator=self.generator).mul_(0.02)
            for moment in moments:
                moment.zero_()

    def sample(self) -> torch.Tensor:
        """Elements spread over every tensor, its last ones too: float64, on the host."""
        parts = []
        for p in self.params:
            flat = p.detach().reshape(-1)
            parts += [flat[:: max(flat.numel() // SAMPLES, 1)], flat[-64:]]
        return torch.cat(parts).cpu().double()


def check_full_size(tensors: Tensors, candidates: dict[str, Callable], reference: str, allowed: float) -> dict:
    """One step of each from the same start, at the size that is timed: the update's deviation from `reference`'s.

    A first step moves every element, whatever the rule; a kernel that left some out would look fast.

    Raises:
        AssertionError: a candidate deviates by more than `allowed`.
    """
    tensors.restart()
    start = tensors.sample()
    after = {}
    for name in [reference, *[name for name in candidates if name != reference]]:
        tensors.restart()
        tensors.next_gradients()
        candidates[name]()
        after[name] = tensors.sample()
    update = (after[reference] - start).norm()
    assert update > 0, f"{reference} moved nothing"
    deviations = {name: float((x - after[reference]).norm() / update) for name, x in after.items()}
    for name, deviation in deviations.items():
        assert deviation <= allowed, f"{name} is off by {deviation:.1e} > {allowed:.0e} at full size"
    return deviations


# ---------------------------------------------------------------- the memory of a loss


class Tokens:
    """Batches of [B, T] tokens in turn: four, so that a call finds its inputs where the last one did not."""

    def __init__(self, shape: tuple[int, int], device: str, spread: float = 0.2, sets: int = 4):
        self.shape, self.elements, self.turn = shape, math.prod(shape), 0
        self.size = f"{shape[0]:,} x {shape[1]:,}"
        self.batches = [self._make(torch.Generator().manual_seed(i), device, spread) for i in range(sets)]

    def _make(self, generator: torch.Generator, device: str, spread: float) -> Batch:
        sequences, length = self.shape
        logp = torch.randn(self.shape, generator=generator).abs().neg()
        off_policy = torch.randn(self.shape, generator=generator) + torch.randn((sequences, 1), generator=generator)
        old_logp = logp + spread * off_policy  # a part of it a sequence has in common, for GSPO to clip
        advantages = torch.randn((sequences, 1), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (sequences, 1), generator=generator)
        mask = torch.arange(length) < lengths
        return {
            "logp": logp.to(device).requires_grad_(),
            "old_logp": old_logp.to(device),
            "advantages": advantages.to(device).expand(self.shape),
            "mask": mask.to(device),
        }

    @property
    def leaf(self) -> torch.Tensor:
        return self.batches[self.turn]["logp"]

    def next(self) -> None:
        """Untimed, before each call."""
        self.turn = (self.turn + 1) % len(self.batches)

    def parts(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """What of a gradient is compared, on the host; each part by its own norm."""
        return [grad.cpu().double()]


class Logits:
    """One batch of logits [B, T + 1, V] and what they are put back from: 2.5 GB each at full size.

    Ratios are near 1, so that every row has a gradient: one that was clipped away is not read twice by ours.
    """

    def __init__(self, shape: tuple[int, int, int], device: str, spread: float = 0.05):
        sequences, length, vocabulary = shape
        self.shape, self.elements, self.turn = shape, math.prod(shape), 0
        self.size = f"{sequences * length:,} x {vocabulary:,}"
        generator = torch.Generator(device).manual_seed(0)
        at = {"device": device, "generator": generator}
        full = (sequences, length + 1)
        self.values = torch.empty((*full, vocabulary), dtype=torch.bfloat16, device=device).normal_(generator=generator)
        tokens = torch.randint(vocabulary, full, **at)
        logp = torch.stack([self._logp(x, y) for x, y in zip(self.values, tokens, strict=True)])
        mask = torch.ones(full, dtype=torch.bool, device=device)
        mask[:, length:] = False
        self.leaf = self.values.clone().requires_grad_()
        self.batches = [
            {
                "logits": self.leaf,
                "tokens": tokens,
                "old_logp": logp + spread * torch.randn(full, **at),
                "advantages": torch.randn(sequences, **at),
                "mask": mask,
            }
        ]

    @staticmethod
    def _logp(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[T] of [T, V], a few rows at a time."""
        parts = zip(logits.split(256), tokens.unsqueeze(1).split(256), strict=True)
        return torch.cat([torch.log_softmax(x, -1, dtype=torch.float32).gather(1, y) for x, y in parts]).squeeze(1)

    @torch.no_grad()
    def next(self) -> None:
        """Untimed, before each call: the logits that the last backward pass has overwritten."""
        self.leaf.copy_(self.values)

    def parts(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """Of every row: at its token, which dwarfs all else, and at some others, the last one too."""
        rows, tokens = grad.flatten(0, 1), self.batches[0]["tokens"].view(-1, 1)
        every = max(rows.numel() // (16 * SAMPLES), 1)
        columns = torch.arange(0, rows.shape[1], every, device=rows.device)
        columns = torch.cat([columns, torch.full_like(columns[:1], rows.shape[1] - 1)])
        others = rows[:, columns].masked_fill(columns == tokens, 0.0)
        return [x.cpu().double() for x in (rows.gather(1, tokens), others)]


def step_of(peer: LossPeer, data: Tokens | Logits) -> Callable[[], tuple]:
    """One measured call: loss and statistics, then the gradient with respect to log-probabilities or logits."""
    forwards: list[Forward] = [peer.build(batch) for batch in data.batches]

    def step() -> tuple:
        loss, stats = forwards[data.turn]()
        return loss, stats, *torch.autograd.grad(loss, data.leaf)

    return step


def check_losses(
    data: Tokens | Logits, steps: dict[str, Callable], expected: tuple, allowed: float
) -> dict[str, float]:
    """Compares each candidate's loss, statistics and gradient with `expected`: (loss, statistics, parts of a gradient).

    Returns:
        name -> greatest relative deviation of a part of the gradient.

    Raises:
        AssertionError: a candidate computes something else, so that its time does not count.
    """
    loss, stats, parts = expected
    # In float32 a ratio next to a bound may fall on its other side: a few tokens in a million.
    flips = 5.0 if data.elements > 10_000 else 0.5
    deviations = {}
    for name, step in steps.items():
        data.turn = 0
        if isinstance(data, Logits):
            data.next()
        own_loss, own_stats, grad = step()
        errors = [float((x - y).norm() / y.norm()) for x, y in zip(data.parts(grad), parts, strict=True)]
        deviations[name] = max(errors)
        assert deviations[name] <= allowed, f"{name}: gradient off by {deviations[name]:.1e} > {allowed:.0e}"
        for key, own, exact in (("loss", own_loss.detach(), loss.detach()), *_named(own_stats, stats)):
            own, exact = float(own), float(exact)
            slack = flips if key.startswith("clipped") else 1e-6 if key == "loss" else 1e-2 + 1e-7 * data.elements
            close = math.isclose(own, exact, rel_tol=1e-3, abs_tol=slack)
            assert close, f"{name}: {key} is {own}, not {exact}"
    return deviations


def _named(stats: object, wanted: dict) -> list[tuple]:
    """(name, own, wanted) of the statistics that both have."""
    own = stats if isinstance(stats, dict) else stats.to_dict()
    return [(key, own[key], wanted[key]) for key in own.keys() & wanted.keys()]


# ---------------------------------------------------------------- measuring


def elements_that_fit(device: str, per_element: int = 60) -> int:
    """1e9, or less where the card is smaller: gradients, moments and foreach's temporaries take up to 60 B each."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 2**40
    return next(n for n in (1_000_000_000, 250_000_000, 100_000_000, 10_000_000) if n * per_element < free or n < 2e7)


@dataclass(frozen=True)
class Comparison:
    """What is timed: candidates that were found to do the same work, the baseline first.

    Args:
        moved: name -> bytes of a call, None where no closed count is claimed.
        before: untimed, before every call.
        unavailable: name -> why not.
        facts: for the result file.
    """

    title: str
    elements: int
    candidates: dict[str, Callable]
    moved: dict[str, int | None]
    before: Callable[[], None]
    unavailable: dict[str, str]
    facts: dict


def measure(case: AnyCase, device: str, quick: bool, budget_s: float, progress: Callable[[str], None]) -> dict:
    """Candidates -> same work checked, small and at full size -> device times and host times, in alternation.

    Raises:
        AssertionError: a candidate of ours does other work than it should.
        RuntimeError: no backend of ours can run here.
    """
    if isinstance(case, gpu_offload.OffloadCase):  # whose step is the host's too
        return gpu_offload.measure(case, device, quick, budget_s, progress)
    begin = time.perf_counter()
    clock = gpu_harness.make_clock(device)
    say = lambda text: progress(f"{case.title}: {text}")  # noqa: E731
    kinds = {Case: compare_steps, LossCase: compare_losses, ScoreCase: compare_scores}
    compare = kinds[type(case)]
    compared = compare(case, device, quick, budget_s, clock, say)
    baseline = next(iter(compared.candidates))
    copy = Copy(compared.moved[baseline], device)
    timed = {**compared.candidates, COPY: copy}
    left = max(budget_s - (time.perf_counter() - begin), 1.0)
    how = {"baseline": baseline, "before": compared.before, "watch_cores": False, "progress": say}
    measured = alternate(
        timed,
        QUICK_ROUNDS if quick else ROUNDS,
        warmup=1 if quick else WARMUP,
        budget_s=0.75 * left,
        timed=clock,
        **how,
    )
    on_host = alternate(
        compared.candidates,
        QUICK_ROUNDS if quick else HOST_ROUNDS,
        warmup=1,
        budget_s=0.25 * left,
        timed=HostClock(clock.synchronize),
        **how,
    )
    rows = summarize(measured, {**compared.moved, COPY: copy.bytes}, COPY, FRACTION)
    bytes_per_second = copy.bytes / measured.time(COPY).p50
    for name, row in rows.items():
        row["predicted_seconds"] = None if row["bytes"] is None else row["bytes"] / bytes_per_second
        row["rounds_host_was_late"] = clock.late_rounds(timed[name], measured.rounds)
        row["host_seconds"] = on_host.time(name)._asdict() if name in compared.candidates else None
    return {
        "title": compared.title,
        "baseline": baseline,
        "rules_of": case.rules_of,
        "elements": compared.elements,
        "dtype": str(case.dtype).removeprefix("torch."),
        **compared.facts,
        "clock": clock.name,
        "rounds": measured.rounds,
        "host_rounds": on_host.rounds,
        "ceiling": gpu_harness.describe_copy(measured, copy),
        "candidates": rows,
        "unavailable": compared.unavailable,
        "targets": [] if quick else [target.to_dict() for target in _targets(case, baseline, rows)],
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device == "cuda" else None,
        "case_seconds": round(time.perf_counter() - begin, 1),
    }


def compare_steps(
    case: Case, device: str, quick: bool, budget_s: float, clock: Clock, say: Callable[[str], None]
) -> Comparison:
    elements = elements_that_fit(device)
    if case.rules_of and budget_s < 10:
        elements = min(elements, 250_000_000)
    shapes = case.shapes(elements, quick)

    say("same work, small")
    names, unavailable, deviations = _usable(case, device, shapes)
    say("tensors")
    tensors = Tensors(case, shapes, device)
    work = Work(max_norm=case.max_norm, state_dtype=case.state_dtype, states=tensors.states)
    if case.max_norm is not None:
        tensors.next_gradients()
        norm_foreach = faster_norm_foreach(tensors.params, timed=clock, watch_cores=False)
        work = replace(work, norm_foreach=norm_foreach)
    builders = (
        {name: functools.partial(build_rule, backend=case.rules_of, options=rules()[name]) for name in names}
        if case.rules_of
        else {name: PEERS[name].build for name in names}
    )
    candidates = {name: build(tensors.params, work) for name, build in builders.items()}

    say("same work, full size")
    reference = next((name for name in (FUSED, MASTERS) if name in names), names[0])
    at_full_size = check_full_size(tensors, candidates, reference, FULL_SIZE_TOLERANCE[case.dtype])
    return Comparison(
        title=f"{case.title} (tensors: {len(shapes):,}, elements: {tensors.elements:,})",
        elements=tensors.elements,
        candidates=candidates,
        moved={name: _moved(name, case, tensors.elements) for name in names},
        before=tensors.next_gradients,
        unavailable=unavailable,
        facts={
            "tensors": len(shapes),
            "state_dtype": str(case.states).removeprefix("torch."),
            "max_norm": case.max_norm,
            "norms_taken_with_foreach": work.norm_foreach if case.max_norm is not None else None,
            "same_work_deviation": deviations,
            "full_size_deviation": at_full_size,
        },
    )


def compare_losses(
    case: LossCase, device: str, quick: bool, budget_s: float, clock: Clock, say: Callable[[str], None]
) -> Comparison:
    say("same work, small")
    peers = loss_peers(case.kind, case.entropy_coef, case.dtype.itemsize)
    names, unavailable, deviations = _usable_losses(case, peers, device)
    if case.entropy_coef:
        unavailable[LIGER] = "has no entropy bonus"

    say("tensors")
    data = make_data(case, device, quick)
    facts: dict = {"shape": data.shape, "entropy_coef": case.entropy_coef}
    if isinstance(data, Logits):
        by_rows = {rows: loss_peers(case.kind, case.entropy_coef, rows=rows)[EAGER] for rows in CHUNKS}
        steps = {str(rows): step_of(peer, data) for rows, peer in by_rows.items()}
        how = {"before": data.next, "timed": clock, "watch_cores": False}
        measured = alternate(steps, 2 if quick else 5, warmup=1, baseline=str(CHUNKS[0]), **how)
        facts["rows_of_torch_eager"] = min(CHUNKS, key=lambda rows: measured.time(str(rows)).p50)
        peers[EAGER] = by_rows[facts["rows_of_torch_eager"]]

    if quick or budget_s < COMPILE_S:
        unavailable[COMPILED] = "left out of --quick: it compiles" if quick else "left out: no time to compile"
    else:
        say("compiling the torch peer")
        try:
            data.next()
            step_of(peers[COMPILED], data)()
            names.append(COMPILED)
        except Exception as error:  # whatever a missing compiler or an unsupported platform raises
            unavailable[COMPILED] = f"does not compile here ({type(error).__name__})"

    say("same work, full size")
    data.turn = 0
    if isinstance(data, Logits):  # float64 of these is 10 GB
        data.next()
        loss, stats, grad = step_of(peers[EAGER], data)()
    else:
        loss, stats, grad = exact_loss(case.kind, data.batches[0])
    expected = (loss, stats, data.parts(grad))
    del grad
    candidates, at_full_size, others = _agreeing(data, {name: peers[name] for name in names}, expected, LOSS_TOLERANCE)
    return Comparison(
        title=f"{case.title}, {data.size} {str(case.dtype).removeprefix('torch.')}",
        elements=data.elements,
        candidates=candidates,
        moved={name: peers[name].bytes_each and peers[name].bytes_each * data.elements for name in candidates},
        before=data.next,
        unavailable={**unavailable, **others},
        facts={**facts, "same_work_deviation": deviations, "full_size_deviation": at_full_size},
    )


EINSUM = "einsum, then ours"
SCORE_ELEMENTS = {8: 100_000_000, 64: 20_000_000}  # 3 and 5 GB of float32 scores: far beyond the L2


def compare_scores(
    case: ScoreCase, device: str, quick: bool, budget_s: float, clock: Clock, say: Callable[[str], None]
) -> Comparison:
    """The steps of ours that are possible here, and the gradient written first, by torch, for the first of them."""
    import fused_clip_adam as fca

    unavailable = {name: unavailable_reason(name, device) for name in OURS}
    backends = {name: backend for name, backend in OURS.items() if unavailable[name] is None}
    unavailable = {name: reason for name, reason in unavailable.items() if reason is not None}
    _require_ours(list(backends), unavailable)

    say("tensors")
    elements, B = 4_000 if quick else SCORE_ELEMENTS[case.samples], case.samples
    at = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    scores = torch.empty(B, elements, dtype=case.score_dtype, device=device).normal_(generator=at["generator"])
    start = torch.randn(elements, **at).mul_(0.02)
    p = torch.nn.Parameter(start.clone())
    moments = {"exp_avg": torch.zeros_like(start), "exp_avg_sq": torch.zeros_like(start)}
    logp, advantages = torch.randn(B, **at), torch.randn(B, **at)  # no ratio is clipped: every score is read

    def build(backend: str) -> fca.FusedClipAdamW:
        optimizer = fca.FusedClipAdamW([p], lr=1e-4, backend=backend)
        optimizer.state[p] = {"step": torch.zeros((), device=device), **moments}
        return optimizer

    def from_scores(backend: str) -> Callable[[], None]:
        optimizer = build(backend)
        return lambda: optimizer.step_from_scores([scores], logp, logp, advantages)

    def contracted(backend: str) -> Callable[[], None]:
        optimizer = build(backend)

        def step() -> None:
            weights = fca.dloss_dlogp(logp, logp, advantages, backend=backend)
            p.grad = torch.einsum("b,bn->n", weights.to(scores.dtype), scores).to(p.dtype)
            optimizer.step()

        return step

    candidates = {name: from_scores(backend) for name, backend in backends.items()}
    candidates[EINSUM] = contracted(next(iter(backends.values())))

    say("same work, full size")
    deviations, after = {}, {}
    with torch.no_grad():
        for name, step in candidates.items():
            p.copy_(start)
            for moment in moments.values():
                moment.zero_()
            step()
            after[name] = (p - start).double()
    for name, moved in after.items():
        deviations[name] = float((moved - after[EINSUM]).norm() / after[EINSUM].norm())
        # A first step moves by the sign of a gradient: where it is next to 0, bfloat16 weights of the peer turn it.
        allowed = 1e-2 if case.score_dtype == torch.float32 else 0.2
        assert deviations[name] <= allowed, f"{name} is off by {deviations[name]:.1e} > {allowed:.0e}"
    peer = case.bytes_each + 2 * case.score_dtype.itemsize + (0 if case.score_dtype == p.dtype else 8)
    return Comparison(
        title=f"{case.title} (tensors: 1, elements: {elements:,})",
        elements=elements,
        candidates=candidates,
        moved={name: elements * (peer if name == EINSUM else case.bytes_each) for name in candidates},
        before=lambda: None,  # scores and moments are far larger than the L2
        unavailable=unavailable,
        facts={"tensors": 1, "scores_of": B, "score_dtype": str(case.score_dtype).removeprefix("torch."),
               "full_size_deviation": deviations},
    )  # fmt: skip


def make_data(case: LossCase, device: str, quick: bool) -> Tokens | Logits:
    if not case.from_logits:
        return Tokens((8, 64) if quick else (256, 4096), device)
    if quick:
        return Logits((2, 3, 1000), device)
    # Two sets of logits, the gradients of who takes new memory, and float32 copies of some: up to 16 B an element.
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 2**40
    length = next(n for n in (1024, 512, 256, 128, 64) if 8 * n * 151_936 * 16 < free or n == 64)
    return Logits((8, length, 151_936), device)


def _usable_losses(
    case: LossCase, peers: dict[str, LossPeer], device: str
) -> tuple[list[str], dict[str, str], dict[str, float]]:
    """As `_usable`. torch.compile is checked at full size alone: it compiles for a shape."""
    spread = 0.3  # several tokens are clipped
    data = Logits((3, 6, 257), device, spread) if case.from_logits else Tokens((24, 61), device, spread, sets=1)
    loss, stats, grad = exact_loss(case.kind, data.batches[0], case.entropy_coef)
    unavailable = {name: unavailable_reason(name, device, of_loss=True) for name in peers if name != COMPILED}
    here = {name: peers[name] for name, reason in unavailable.items() if reason is None}
    _, deviations, others = _agreeing(data, here, (loss, stats, data.parts(grad)), SMALL_LOSS_TOLERANCE[case.dtype])
    unavailable = {name: reason for name, reason in unavailable.items() if reason is not None} | others
    _require_ours(list(deviations), unavailable)
    return list(deviations), unavailable, deviations


def _agreeing(
    data: Tokens | Logits, peers: dict[str, LossPeer], expected: tuple, allowed: float
) -> tuple[dict[str, Callable], dict[str, float], dict[str, str]]:
    """(steps of those that do the same work, their deviations, name -> why a peer does not); ours has to."""
    steps: dict[str, Callable] = {}
    deviations: dict[str, float] = {}
    others: dict[str, str] = {}
    for name, peer in peers.items():
        try:
            step = step_of(peer, data)
            deviations |= check_losses(data, {name: step}, expected, allowed)
            steps[name] = step
        except Exception as error:
            if name in OURS:
                raise
            others[name] = _why_not_comparable(error)
    return steps, deviations, others


def _usable(
    case: Case, device: str, shapes: list[tuple[int, ...]]
) -> tuple[list[str], dict[str, str], dict[str, float]]:
    """(candidates, ours first; name -> why not; name -> deviation on a small case)."""
    if case.rules_of:
        name = {backend: name for name, backend in OURS.items()}[case.rules_of]
        if (reason := unavailable_reason(name, device)) is not None:
            raise RuntimeError(reason)
        return list(rules()), {}, {}
    names, unavailable, deviations = [], {}, {}
    for name in PEERS:
        if not fits(name, case.dtype, case.state_dtype, case.max_norm):
            continue
        if (reason := unavailable_reason(name, device) or too_many_shapes(name, shapes)) is not None:
            unavailable[name] = reason
            continue
        try:
            deviations |= check_same_work(
                [name], case.dtype, case.max_norm, peers=PEERS, device=device, state_dtype=case.state_dtype
            )
        except Exception as error:
            if name in OURS:
                raise
            unavailable[name] = _why_not_comparable(error)
            continue
        names.append(name)
    _require_ours(names, unavailable)
    return names, unavailable, deviations


def _why_not_comparable(error: Exception) -> str:
    return f"not comparable: {error if isinstance(error, AssertionError) else type(error).__name__}"


def _require_ours(names: list[str], unavailable: dict[str, str]) -> None:
    if not any(name in OURS for name in names):
        raise RuntimeError("; ".join(f"{name}: {unavailable[name]}" for name in OURS))


def _moved(name: str, case: Case, elements: int) -> int | None:
    dtypes = (case.dtype, case.dtype, case.states)
    if case.rules_of:
        import fused_clip_adam as fca

        own = {
            key: value for key, value in rules()[name].items() if key in ("amsgrad", "grad_clip", "overshoot", "reset")
        }
        return fca.theory.bytes_per_element(*(dtype.itemsize for dtype in dtypes), **own) * elements
    passes = PEERS[name].traffic if case.max_norm is None else PEERS[name].traffic_with_clip
    return None if passes is None else moved_bytes(passes, elements, *dtypes)


def _targets(case: Case | LossCase | ScoreCase, baseline: str, rows: dict[str, dict]) -> list[Target]:
    median = lambda name, what: rows[name][what]["p50"] if name in rows else None  # noqa: E731
    found = [Target(peer, "over_ours", least, median(peer, "over_ours")) for peer, least in case.targets.items()]
    if case.rules_of:
        for name, than in RULE_TARGETS.items():
            time, base = median(name, "over_ours"), median(than, "over_ours")
            found.append(Target(name, "speed_of_baseline", WITHIN, time and base and base / time))
    if case.ceiling_target is not None:
        found.append(Target(baseline, FRACTION, case.ceiling_target, median(baseline, FRACTION)))
    return found


# ---------------------------------------------------------------- what is shown


def table(result: dict) -> str:
    """A case's lines: ratio, ceiling, device and host times; a target says met or MISSED."""
    if result.get("offload"):
        return gpu_offload.table(result)
    ceiling = result["ceiling"]["gigabytes_per_second"]
    lines = [
        f"\n{result['title']}\n  [{result['rounds']} rounds, copy {ceiling:,.0f} GB/s, {result['case_seconds']:.0f} s]",
        f"  {'':28}{'time / ours':>12}  {'p20 - p80':<13}{'B/elt':>6}{'of copy':>9}{'ms':>9}{'predicted':>10}"
        f"{'host us':>9}  target",
    ]
    for name, row in sorted(result["candidates"].items(), key=lambda item: item[1]["over_ours"]["p50"]):
        ratio, spread, host = row["over_ours"], row[FRACTION], row["host_seconds"]
        moved = "" if row["bytes"] is None else f"{row['bytes'] / result['elements']:.0f}"
        predicted = "" if row["predicted_seconds"] is None else f"{row['predicted_seconds'] * 1e3:.3f}"
        notes = [target_text(t) for t in result["targets"] if t["candidate"] == name]
        if row["rounds_host_was_late"] * 2 > result["rounds"]:
            notes.append("the host held the device up")
        lines.append(
            f"  {name:28}{ratio['p50']:>11.2f}x  {ratio['p20']:.2f} - {ratio['p80']:<6.2f}{moved:>6}"
            f"{'' if spread is None else format(spread['p50'], '.0%'):>9}{row['seconds']['p50'] * 1e3:>9.3f}"
            f"{predicted:>10}{'' if host is None else format(host['p50'] * 1e6, '.0f'):>9}  {', '.join(notes)}".rstrip()
        )
    missing = [t for t in result["targets"] if t["candidate"] not in result["candidates"]]
    lines += [f"  {t['candidate']:28}{target_text(t)}" for t in missing]
    lines += [f"  {name:28}not measured: {reason}" for name, reason in result["unavailable"].items()]
    return "\n".join(lines)


def target_text(target: dict) -> str:
    of_copy = target["what"] == FRACTION
    least = f"{target['at_least']:.0%} of copy" if of_copy else f"{target['at_least']:.2f}x"
    return f">= {least} {({True: 'met', False: 'MISSED', None: 'not measured'})[target['met']]}"


def show_progress(text: str, last: list[float] = [0.0]) -> None:  # noqa: B006  (the last time it wrote)
    """A line in place on a terminal, else every five seconds."""
    in_place = sys.stderr.isatty()
    if not in_place and time.monotonic() - last[0] < 5:
        return
    last[0] = time.monotonic()
    sys.stderr.write(f"\r\033[K{text}" if in_place else f"{text}\n")
    sys.stderr.flush()


def run(names: list[str], device: str, quick: bool, budget_s: float, folder: Path | None) -> tuple[list[dict], dict]:
    """Measures cases within a time. Returns (results, name -> why there is none); writes them to `folder`, if given."""
    deadline = time.perf_counter() + budget_s
    machine = gpu_harness.info_of(device)
    results, failed = [], {}
    for i, name in enumerate(names):
        left = deadline - time.perf_counter()
        if left < 3 and results:
            failed[name] = "the time was up"
            continue
        try:
            share = CASES[name].weight / sum(CASES[later].weight for later in names[i:])
            result = measure(CASES[name], device, quick, left * share, show_progress)
        except Exception as error:  # the other cases may well run: say it, go on, and fail at the end
            first_line = (str(error) or "no message").splitlines()[0]
            failed[name] = f"{type(error).__name__}: {first_line}"
            print(f"\n{CASES[name].title}: FAILED, {failed[name]}", flush=True)
        else:
            results.append(result)
            print(table(result), flush=True)
            if folder is not None:
                write_json(folder, name, machine, result)
        gc.collect()  # optimizers are cycles
        if device == "cuda":
            with contextlib.suppress(RuntimeError):  # after a fault of a kernel every call fails, as the cases will say
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    return results, failed


def closing_line(results: list[dict], failed: dict) -> str:
    targets = [target for result in results for target in result["targets"]]
    missed = sum(target["met"] is False for target in targets)
    unknown = sum(target["met"] is None for target in targets)
    text = f"{len(results)} cases measured, {len(targets)} targets: {missed} MISSED"
    text += f", {unknown} not measured" if unknown else ""
    return text + (f"; {len(failed)} cases FAILED or left out: {', '.join(failed)}" if failed else "")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, no result files")
    parser.add_argument("--budget-s", type=float, default=200.0, help="seconds for all cases (200)")
    parser.add_argument("--check-targets", action="store_true", help="fail where a target is missed")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}")
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"unknown cases {sorted(unknown)}; accepted: {', '.join(CASES)}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"benchmarks.gpu: torch {torch.__version__} sees no GPU; --device cpu --quick is a dry run")
        return 2
    keep = options.device == "cuda" and not options.quick
    folder = RESULTS / gpu_harness.device_slug(torch.cuda.get_device_name(0)) if keep else None
    quick = options.quick or options.device == "cpu"
    results, failed = run(options.cases or list(CASES), options.device, quick, options.budget_s, folder)
    print("" if keep else "\nA dry or quick run: nothing was written, and these are not results.")
    print(closing_line(results, failed), flush=True)
    missed = any(target["met"] is False for result in results for target in result["targets"])
    return int(bool(failed) or (options.check_targets and missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
