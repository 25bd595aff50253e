"""offload="cpu" on a GPU: the overlapped step against copies and step one after another, and against three ceilings.

A step cannot be faster than its copies down, its copies up, or the host's memory: each is timed alone, in the same
alternation. The fraction of the ceiling is the longest of the three over the step's time, in the same round. With a
clip the gradients come down before the parameters may, so that no step reaches it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

import fused_clip_adam as fca
from benchmarks.gpu_harness import FRACTION
from benchmarks.harness import Spread, Target, alternate, summarize, wall_seconds
from fused_clip_adam import offload

OURS, SERIAL = "ours, offload", "gradients down, step, parameters up"
DOWN, UP, STREAM = "down (ceiling)", "up (ceiling)", "host stream (ceiling)"
CEILINGS = (DOWN, UP, STREAM)
ROUNDS, WARMUP, QUICK_ROUNDS = 20, 2, 3
SHAPES, QUICK_SHAPES = [(2048, 1024)] * 64, [(64, 32)] * 8  # two matrices a bucket


@dataclass(frozen=True)
class OffloadCase:
    """float32 parameters and gradients on the device, moments and step on the host."""

    title: str
    max_norm: float | None = None
    targets: dict[str, float] = field(default_factory=lambda: {SERIAL: 1.3})
    ceiling_target: None = None
    rules_of: None = None
    weight: float = 1.0

    @property
    def host_bytes(self) -> int:
        """An element's, through the host's memory, but for the copies' own."""
        return fca.theory.bytes_per_element(grad_clip=self.max_norm)


CASES = {
    "offload": OffloadCase('float32, offload="cpu", no clip'),
    "offload-clip": OffloadCase('float32, offload="cpu", global-norm clip', max_norm=1.0),
}


class AtOnce:
    """For a dry run on the CPU, which is its own device: copies that are done when they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def allocate(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    @staticmethod
    def down(pairs, after=None) -> None:
        for source, target in pairs:
            target.copy_(source)

    up = down

    def start(self) -> None:
        pass

    settle = start

    def wait(self, event: None) -> None:
        pass

    join = wait


@contextlib.contextmanager
def reachable(device: str) -> Iterator[None]:
    """The CPU too, where it stands for the device."""
    kept = dict(offload.LINKS)
    if device == "cpu":
        offload.LINKS["cpu"] = AtOnce
    try:
        yield
    finally:
        offload.LINKS.clear()
        offload.LINKS.update(kept)


class Tensors:
    """Parameters and gradients on the device, pinned copies of both on the host, and what a stream there moves."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda shape: torch.empty(shape, device=device).normal_(generator=generator)  # noqa: E731
        self.params = [torch.nn.Parameter(draw(shape).mul_(0.02)) for shape in shapes]
        for p in self.params:
            p.grad = draw(p.shape)
        pinned = {"device": "cpu", "pin_memory": device == "cuda"}
        self.host_params, self.host_grads = ([torch.empty(s, **pinned) for s in shapes] for _ in range(2))
        self.elements = sum(p.numel() for p in self.params)
        self.streamed = [torch.ones(self.elements, device="cpu") for _ in range(4)]
        self.start = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def restart(self) -> None:
        for p, start in zip(self.params, self.start, strict=True):
            p.copy_(start)

    @torch.no_grad()
    def down(self, params: bool = True) -> None:
        for p, own, grad in zip(self.params, self.host_params, self.host_grads, strict=True):
            grad.copy_(p.grad, non_blocking=True)
            if params:
                own.copy_(p, non_blocking=True)

    @torch.no_grad()
    def up(self) -> None:
        for p, own in zip(self.params, self.host_params, strict=True):
            p.copy_(own, non_blocking=True)

    def stream(self, clip: bool) -> None:
        """Reads p, g, m, v and writes p, m, v; with a clip reads g once more."""
        p, g, m, v = self.streamed
        if clip:
            g.sum()
        p.add_(g)
        m.mul_(1.0)
        v.mul_(1.0)


def serial_step(tensors: Tensors, synchronize: Callable[[], None], options: dict) -> Callable[[], None]:
    """Parameters kept on the host beside the moments; gradients down, our step on the CPU, parameters up."""
    tensors.down()
    synchronize()
    params = [torch.nn.Parameter(own) for own in tensors.host_params]
    for p, grad in zip(params, tensors.host_grads, strict=True):
        p.grad = grad
    optimizer = fca.FusedClipAdamW(params, **options)

    def step() -> None:
        tensors.down(params=False)
        synchronize()
        optimizer.step()
        tensors.up()

    return step


class StepClock:
    """Seconds from an idle device to an idle device: host and device share the work of a step."""

    name = "perf_counter, the device idle before and after"

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize

    def __call__(self, step: Callable[[], object]) -> float:
        self.synchronize()

        def whole() -> None:
            step()
            self.synchronize()

        return wall_seconds(whole)


def measure(case: OffloadCase, device: str, quick: bool, budget_s: float, progress: Callable[[str], None]) -> dict:
    """Both ways -> same work checked -> seconds, in alternation with the ceilings.

    Raises:
        AssertionError: they do not do the same work.
    """
    begin = time.perf_counter()
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = StepClock(synchronize)
    progress(f"{case.title}: tensors")
    tensors = Tensors(QUICK_SHAPES if quick else SHAPES, device)
    n, options = tensors.elements, {"lr": 1e-4, "grad_clip": case.max_norm}
    with reachable(device):
        ours = fca.FusedClipAdamW(tensors.params, offload="cpu", **options)
        candidates = {OURS: ours.step, SERIAL: serial_step(tensors, synchronize, options)}
        progress(f"{case.title}: same work")
        deviations = check_same_work(tensors, candidates, synchronize)
        timed = {
            **candidates,
            DOWN: tensors.down,
            UP: tensors.up,
            STREAM: lambda: tensors.stream(case.max_norm is not None),
        }
        measured = alternate(
            timed,
            QUICK_ROUNDS if quick else ROUNDS,
            warmup=1 if quick else WARMUP,
            baseline=OURS,
            budget_s=max(budget_s - (time.perf_counter() - begin), 1.0),
            timed=clock,
            watch_cores=False,
            progress=lambda text: progress(f"{case.title}: {text}"),
        )
        staging = ours._offloaded.staging_bytes
    moved = {OURS: None, SERIAL: None, DOWN: 8 * n, UP: 4 * n, STREAM: case.host_bytes * n}
    rows = summarize(measured, moved, None, FRACTION)
    longest = [max(times) for times in zip(*(measured.seconds[name] for name in CEILINGS), strict=True)]
    for name in candidates:
        own = measured.seconds[name]
        rows[name][FRACTION] = Spread.of([most / s for most, s in zip(longest, own, strict=True)])._asdict()
    targets = [Target(name, "over_ours", least, rows[name]["over_ours"]["p50"]) for name, least in case.targets.items()]
    return {
        "title": f"{case.title} (tensors: {len(tensors.params)}, elements: {n:,})",
        "baseline": OURS,
        "rules_of": None,
        "offload": True,
        "elements": n,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "bytes_per_element": {"down": 8, "up": 4, "host": case.host_bytes},
        "staging_bytes": staging,
        "bucket_bytes": offload.BUCKET_BYTES,
        "same_work_deviation": deviations,
        "clock": clock.name,
        "rounds": measured.rounds,
        "gigabytes_per_second": {name: round(moved[name] / rows[name]["seconds"]["p50"] / 1e9, 1) for name in CEILINGS},
        "candidates": rows,
        "unavailable": {},
        "targets": [] if quick else [target.to_dict() for target in targets],
        "case_seconds": round(time.perf_counter() - begin, 1),
    }


def check_same_work(
    tensors: Tensors, candidates: dict[str, Callable[[], object]], synchronize: Callable[[], None]
) -> dict[str, float]:
    """One first step of each from the same parameters: the update's deviation from the first one's.

    Raises:
        AssertionError: it is not 0. Both are the same kernels on the same numbers.
    """
    after = {}
    for name, step in candidates.items():
        tensors.restart()
        step()
        synchronize()
        after[name] = [p.detach().clone() for p in tensors.params]
    first, *_ = after.values()
    assert all(not torch.equal(x, y) for x, y in zip(first, tensors.start, strict=True)), "a tensor has not moved"
    deviations = {
        name: max(float((x - y).abs().max()) for x, y in zip(own, first, strict=True)) for name, own in after.items()
    }
    for name, deviation in deviations.items():
        assert deviation == 0.0, f"{name} is off by {deviation:.1e}"
    return deviations


def table(result: dict) -> str:
    """A case's lines: time over ours, the longest ceiling over the time; a target says met or MISSED."""
    lines = [
        f"\n{result['title']}\n  [{result['rounds']} rounds, {result['threads']} threads, "
        f"{result['staging_bytes'] / 2**20:,.0f} MiB staged, {result['case_seconds']:.0f} s]",
        f"  {'':38}{'time / ours':>12}  {'p20 - p80':<13}{'of longest':>10}{'ms':>9}{'GB/s':>7}  target",
    ]
    for name, row in result["candidates"].items():
        ratio, fraction = row["over_ours"], row[FRACTION]
        rate = result["gigabytes_per_second"].get(name)
        notes = [
            f">= {t['at_least']:.2f}x {'met' if t['met'] else 'MISSED'}"
            for t in result["targets"]
            if t["candidate"] == name
        ]
        lines.append(
            f"  {name:38}{ratio['p50']:>11.2f}x  {ratio['p20']:.2f} - {ratio['p80']:<6.2f}"
            f"{'' if fraction is None else format(fraction['p50'], '.0%'):>10}{row['seconds']['p50'] * 1e3:>9.2f}"
            f"{'' if rate is None else format(rate, '.0f'):>7}  {', '.join(notes)}".rstrip()
        )
    return "\n".join(lines)
