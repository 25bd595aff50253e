"""One optimizer step on a GPU: ours against its peers in alternation, and against the card's own copy bandwidth.

    python -m benchmarks.gpu [--device cuda|cpu] [--quick] [--budget-s N] [cases...]

Results go to `results/<device>/<case>.json`, each as soon as it is measured. `--quick` takes small sizes and few
rounds; it and `--device cpu` (a dry run: every line but the clock's) write nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import gpu_harness
from benchmarks.gpu_harness import COPY, FRACTION, Copy, HostClock
from benchmarks.gpu_peers import (
    FUSED,
    MASTERS,
    OURS,
    PEERS,
    TRICK,
    build_rule,
    fits,
    moved_bytes,
    rules,
    unavailable_reason,
)
from benchmarks.harness import RESULTS, Target, alternate, summarize, write_json
from benchmarks.peers import Work, check_same_work, faster_norm_foreach

MAX_NORM = 1.0  # far below the norm of the random gradients: the clip acts in every step
CEILING_TARGET = 0.92
CLIP_TARGETS = {FUSED: 1.2, TRICK: 1.05}
FULL_SIZE_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5}
SAMPLES = 65536  # elements of each tensor compared at full size, at most
ROUNDS, HOST_ROUNDS, WARMUP, QUICK_ROUNDS = 60, 15, 3, 3

Shapes = list[tuple[int, ...]]

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
    """Shapes, dtypes and clip of a comparison; `rules_of`: a backend whose rules are compared instead of peers."""

    title: str
    shapes: Callable[[int, bool], Shapes]
    max_norm: float | None = None
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None
    targets: dict[str, float] = field(default_factory=dict)  # peer -> least ratio of its time to ours
    ceiling_target: float | None = None
    rules_of: str | None = None

    @property
    def states(self) -> torch.dtype:
        return self.state_dtype or self.dtype


def _cases() -> dict[str, Case]:
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
    return {
        "step-one-tensor-clip": clipped.pop("step-one-tensor-clip"),
        "step-one-tensor": unclipped.pop("step-one-tensor"),
        "step-rules-cuda": by_rule.pop("step-rules-cuda"),
        **clipped,
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


# ---------------------------------------------------------------- measuring


def elements_that_fit(device: str, per_element: int = 60) -> int:
    """1e9, or less where the card is smaller: gradients, moments and foreach's temporaries take up to 60 B each."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 2**40
    return next(n for n in (1_000_000_000, 250_000_000, 100_000_000, 10_000_000) if n * per_element < free or n < 2e7)


def measure(case: Case, device: str, quick: bool, budget_s: float, progress: Callable[[str], None]) -> dict:
    """Candidates -> same work checked, small and at full size -> device times and host times, in alternation.

    Raises:
        AssertionError: a candidate of ours does other work than it should.
        RuntimeError: no backend of ours can run here.
    """
    begin = time.perf_counter()
    elements = elements_that_fit(device)
    if case.rules_of and budget_s < 10:
        elements = min(elements, 250_000_000)
    shapes = case.shapes(elements, quick)
    clock = gpu_harness.make_clock(device)
    say = lambda text: progress(f"{case.title}: {text}")  # noqa: E731

    say("same work, small")
    names, unavailable, deviations = _usable(case, device)
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
    baseline = names[0]
    reference = next((name for name in (FUSED, MASTERS) if name in names), baseline)
    at_full_size = check_full_size(tensors, candidates, reference, FULL_SIZE_TOLERANCE[case.dtype])

    moved = {name: _moved(name, case, tensors.elements) for name in names}
    copy = Copy(moved[baseline], device)
    timed = {**candidates, COPY: copy}
    left = max(budget_s - (time.perf_counter() - begin), 1.0)
    how = {"baseline": baseline, "before": tensors.next_gradients, "watch_cores": False, "progress": say}
    measured = alternate(
        timed,
        QUICK_ROUNDS if quick else ROUNDS,
        warmup=1 if quick else WARMUP,
        budget_s=0.75 * left,
        timed=clock,
        **how,
    )
    on_host = alternate(
        candidates,
        QUICK_ROUNDS if quick else HOST_ROUNDS,
        warmup=1,
        budget_s=0.25 * left,
        timed=HostClock(clock.synchronize),
        **how,
    )
    rows = summarize(measured, {**moved, COPY: copy.bytes}, COPY, FRACTION)
    bytes_per_second = copy.bytes / measured.time(COPY).p50
    for name, row in rows.items():
        row["predicted_seconds"] = None if row["bytes"] is None else row["bytes"] / bytes_per_second
        row["rounds_host_was_late"] = clock.late_rounds(timed[name], measured.rounds)
        row["host_seconds"] = on_host.time(name)._asdict() if name in candidates else None
    return {
        "title": f"{case.title} (tensors: {len(shapes):,}, elements: {tensors.elements:,})",
        "baseline": baseline,
        "rules_of": case.rules_of,
        "elements": tensors.elements,
        "tensors": len(shapes),
        "dtype": str(case.dtype).removeprefix("torch."),
        "state_dtype": str(case.states).removeprefix("torch."),
        "max_norm": case.max_norm,
        "norms_taken_with_foreach": work.norm_foreach if case.max_norm is not None else None,
        "clock": clock.name,
        "rounds": measured.rounds,
        "host_rounds": on_host.rounds,
        "ceiling": gpu_harness.describe_copy(measured, copy),
        "same_work_deviation": deviations,
        "full_size_deviation": at_full_size,
        "candidates": rows,
        "unavailable": unavailable,
        "targets": [] if quick else [target.to_dict() for target in _targets(case, baseline, rows)],
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device == "cuda" else None,
        "case_seconds": round(time.perf_counter() - begin, 1),
    }


def _usable(case: Case, device: str) -> tuple[list[str], dict[str, str], dict[str, float]]:
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
        if (reason := unavailable_reason(name, device)) is not None:
            unavailable[name] = reason
            continue
        try:
            deviations |= check_same_work(
                [name], case.dtype, case.max_norm, peers=PEERS, device=device, state_dtype=case.state_dtype
            )
        except Exception as error:
            if name in OURS:
                raise
            unavailable[name] = (
                f"not comparable: {error if isinstance(error, AssertionError) else type(error).__name__}"
            )
            continue
        names.append(name)
    if not any(name in OURS for name in names):
        raise RuntimeError("; ".join(f"{name}: {unavailable[name]}" for name in OURS))
    return names, unavailable, deviations


def _moved(name: str, case: Case, elements: int) -> int | None:
    dtypes = (case.dtype, case.dtype, case.states)
    if case.rules_of:
        return moved_bytes("update", elements, *dtypes, moments=3 if name == "amsgrad" else 2)
    passes = PEERS[name].passes if case.max_norm is None else PEERS[name].passes_with_clip
    return None if passes is None else moved_bytes(passes, elements, *dtypes)


def _targets(case: Case, baseline: str, rows: dict[str, dict]) -> list[Target]:
    median = lambda name, what: rows[name][what]["p50"] if name in rows else None  # noqa: E731
    found = [Target(peer, "over_ours", least, median(peer, "over_ours")) for peer, least in case.targets.items()]
    if case.ceiling_target is not None:
        found.append(Target(baseline, FRACTION, case.ceiling_target, median(baseline, FRACTION)))
    return found


# ---------------------------------------------------------------- what is shown


def table(result: dict) -> str:
    """A case's lines: ratio, ceiling, device and host times; a target says met or MISSED."""
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
            result = measure(CASES[name], device, quick, left / (len(names) - i), show_progress)
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
