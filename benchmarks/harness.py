"""Timing in alternation, bytes moved, and result files that cannot show an absolute time alone.

Cores and memory bus are shared with whatever else runs on the machine, so the seconds of one candidate mean
little: what is compared is the ratio of two candidates timed one right after the other, many times, in the
same process.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
BASELINE = "ours"
MIN_ROUNDS = 5  # a budget never cuts a comparison shorter than this: p20 and p80 of fewer say nothing

# A block of rounds in which other processes used more of the cores than this is set aside. It is not only
# noise: with one core taken, a thread team waits for the scheduler at every barrier, and a candidate with a
# barrier a tensor looks 100 times slower than it is, so that the ratios are wrong as well. The choice looks
# at the others' use, never at the times.
QUIET = 0.15
BLOCK_S = 0.25  # rounds are judged in blocks of at least this: the kernel counts CPU time in ticks of 10 ms

# Whose versions a result states beside torch's, None where they are not installed: peers and trainers under comparison.
MEASURED_PACKAGES = (
    "deepspeed",
    "torch-optimi",
    "torchao",
    "bitsandbytes",
    "flashoptim",
    "liger-kernel",
    "apex",
    "transformer_engine",
    "transformers",
    "accelerate",
    "trl",
    "stable-baselines3",
    "torchrl",
    "tensordict",
    "rsl-rl-lib",
    "lightning",
    "verl",
)

# Reads plus writes of arrays with one entry an element; times the entry's width these are the bytes moved.
# Caches larger than the tensors would save some of them; the tensors measured here are larger than the caches
# or say otherwise.
ARRAY_PASSES = {
    "update": 7,  # read p, g, m, v; write p, m, v
    "norm, update": 8,  # read g once more, first
    "norm, scale, update": 10,  # clip_grad_norm_: read g; read g and write g; then the update
    "norm, update writing g": 9,  # grad_scale: the update divides g and writes it back
    "copy": 2,
}


def bytes_per_element(method: str, width: int = 4) -> int:
    """Bytes an element that `method` moves at least.

    Args:
        method: a key of `ARRAY_PASSES`.
        width: bytes of one entry of parameter, gradient and both moments; 4 for float32, 2 for bfloat16.

    Returns:
        float32: 28 for "update", 32 for "norm, update", 36 for "norm, update writing g", 40 for "norm, scale,
        update".
    """
    return ARRAY_PASSES[method] * width


class Spread(NamedTuple):
    """Median with the 20th and 80th percentile; the spread is the noise of a shared machine."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(deciles[1], deciles[4], deciles[7])


@dataclass(frozen=True)
class Alternation:
    """What `alternate` measured: `seconds[name][r]` is the time of candidate `name` in round r."""

    seconds: dict[str, list[float]]
    baseline: str
    others_cpu_share: float | None  # of all cores, by other processes; median of the blocks; None: not known
    rounds_set_aside: int  # because other processes used more than `QUIET`

    @property
    def rounds(self) -> int:
        return len(self.seconds[self.baseline])

    @property
    def quiet(self) -> bool:
        return self.others_cpu_share is None or self.others_cpu_share <= QUIET

    def time(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, baseline: str | None = None) -> Spread:
        """Time of `name` over the baseline's, paired round by round: above 1 the baseline is the faster."""
        return Spread.of(
            [a / b for a, b in zip(self.seconds[name], self.seconds[baseline or self.baseline], strict=True)]
        )


def wall_seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 2,
    baseline: str = BASELINE,
    before: Callable[[], object] | None = None,
    budget_s: float | None = None,
    progress: Callable[[str], None] = lambda text: None,
    timed: Callable[[Callable[[], object]], float] = wall_seconds,
    watch_cores: bool = True,
    workers: Sequence[int] = (),
) -> Alternation:
    """Times the candidates in turn, one call each a round: warm-up -> rounds -> quiet rounds -> paired times.

    Each round has its own order, drawn from the round's number, so that nobody always runs first or always inherits
    the caches of the same neighbour. What else takes turns matters all the same: with other packages' work in between,
    a step of many tensors finds interpreter, dispatcher and caches colder. Compare ratios of the same candidates only.

    If fewer than `MIN_ROUNDS` were quiet when the budget is spent, all rounds are kept and the result is not `quiet`.

    Args:
        candidates: name -> callable without arguments; one call is one measurement.
        rounds: quiet rounds to take, at least 2.
        warmup: untimed calls of each candidate, which also allocate its state.
        baseline: the candidate that the others' times are divided by.
        before: called, untimed, before every call (warm-up too); puts shared inputs back.
        budget_s: stop once this many seconds are spent and `MIN_ROUNDS` rounds taken; None: stop after
            `rounds` rounds, quiet or not.
        progress: receives a short text now and then.
        timed: runs a candidate once and returns its seconds; by default on the host's clock.
        watch_cores: set rounds aside in which other processes used the cores; False: every round counts, as on
            a GPU, where they do not matter.
        workers: ids of processes that run candidates: what they use of the cores is not the others'.

    Raises:
        ValueError: `baseline` is not among the candidates, or `rounds` is below 2.
    """
    if baseline not in candidates:
        raise ValueError(f"baseline {baseline!r} is not among the candidates {list(candidates)}")
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2 to give a spread, got {rounds}")
    names = list(candidates)

    def call(name: str) -> float:
        if before is not None:
            before()
        return timed(candidates[name])

    for name in names:
        for _ in range(warmup):
            call(name)
        progress(f"warmed up {name}")

    taken: list[_Block] = []
    with _no_garbage_collection():
        start = time.perf_counter()
        while _rounds_in(quiet := [block for block in taken if block.quiet]) < rounds:
            elapsed = time.perf_counter() - start
            spent = _rounds_in(taken) >= rounds if budget_s is None else elapsed > budget_s
            if spent and _rounds_in(taken) >= min(MIN_ROUNDS, rounds):
                break
            cpu_before = _cpu_seconds(workers) if watch_cores else None
            block, block_start = [], time.perf_counter()
            while not block or (watch_cores and time.perf_counter() - block_start < BLOCK_S):
                r = _rounds_in(taken) + len(block)
                order = random.Random(r).sample(names, len(names))
                block.append({name: call(name) for name in order})
            taken.append(_Block(block, _others_share(cpu_before, _cpu_seconds(workers) if watch_cores else None)))
            progress(f"{_rounds_in(taken)} rounds taken, {rounds} quiet ones wanted")
    kept = quiet if _rounds_in(quiet) >= min(MIN_ROUNDS, rounds) else taken
    shares = [block.others_share for block in kept if block.others_share is not None]
    return Alternation(
        seconds={name: [times[name] for block in kept for times in block.rounds] for name in names},
        baseline=baseline,
        others_cpu_share=round(statistics.median(shares), 3) if shares else None,
        rounds_set_aside=_rounds_in(taken) - _rounds_in(kept),
    )


class _Block(NamedTuple):
    """Consecutive rounds (candidate -> seconds) and the share of all cores other processes used meanwhile."""

    rounds: list[dict[str, float]]
    others_share: float | None

    @property
    def quiet(self) -> bool:
        return self.others_share is None or self.others_share <= QUIET


def _rounds_in(blocks: list[_Block]) -> int:
    return sum(len(block.rounds) for block in blocks)


@contextlib.contextmanager
def _no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _CpuSeconds(NamedTuple):
    """Since boot: all cores busy (time stolen by the host included) and idle; this process and its workers busy."""

    busy: float
    idle: float
    own: float


def _cpu_seconds(workers: Sequence[int] = ()) -> _CpuSeconds | None:
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        # The name, in parentheses, may hold spaces; user and system time are the 12th and 13th field after it.
        stats = [Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split() for worker in workers]
    except (OSError, ValueError):  # not Linux
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = fields
    tick, own = os.sysconf("SC_CLK_TCK"), os.times()
    busy = user + nice + system + irq + softirq + steal
    of_workers = sum(int(stat[11]) + int(stat[12]) for stat in stats) / tick
    return _CpuSeconds(busy / tick, (idle + iowait) / tick, own.user + own.system + of_workers)


def _others_share(start: _CpuSeconds | None, end: _CpuSeconds | None) -> float | None:
    if start is None or end is None:
        return None
    busy, idle, own = (b - a for a, b in zip(start, end, strict=True))
    return max(0.0, busy - own) / max(busy + idle, 1e-9)


def machine_info() -> dict:
    """What a result depends on: processor, threads, versions, commit, date. No paths, no host name."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "transparent_hugepages": _transparent_hugepages(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_clip_adam": _package_version(),
        "packages": {package: _version(package) for package in MEASURED_PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def device_slug() -> str:
    """Folder name for the results of this kind of machine, as `cpu-intel-xeon-2.50ghz-2c`."""
    model = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@", " ", _cpu_model().lower())
    words = re.findall(r"[a-z0-9.]+", model)
    return "-".join(["cpu", *words, f"{os.cpu_count()}c"])


def write_result(name: str, payload: dict) -> Path:
    """Writes `payload` with the machine as `results/<device>/<name>.json` and returns its path.

    Raises:
        ValueError: it is no result (see `why_no_result`).
    """
    if (reason := why_no_result(payload)) is not None:
        raise ValueError(f"{name}: {reason}")
    return write_json(RESULTS / device_slug(), name, machine_info(), payload)


def write_json(folder: Path, name: str, machine: dict, payload: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"name": name, "machine": machine, **payload}, indent=1) + "\n")
    return path


def why_no_result(payload: dict) -> str | None:
    """Why a measurement may be looked at but not be kept, or None."""
    if not payload["quiet"]:
        return "too busy a machine"
    if payload["ceiling"] is None:
        return "no ceiling measured in the same run"
    for measured in (payload, *payload.get("points", ())):
        for candidate, row in measured["candidates"].items():
            if missing := {"seconds", "over_ours", "bytes"} - row.keys():
                return f"{candidate} comes without {sorted(missing)}"
    return None


class ReplayClock:
    """Shows times already taken to pytest-benchmark, whose own timing would run one candidate after another.

    Used as its timer, with a function that does nothing: each round asks for the time twice, and the answers
    differ by the seconds that `alternate` measured.
    """

    __name__ = "ReplayClock"  # pytest-benchmark prints its timer's name

    def replay(self, benchmark, seconds: list[float]) -> None:
        self._ticks = iter([tick for taken in seconds for tick in (0.0, taken)])
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    def __call__(self) -> float:
        return next(self._ticks)


REPLAY = ReplayClock()


def is_ceiling(name: str) -> bool:
    """Whether a candidate only moves memory: not a competitor."""
    return name.endswith("(ceiling)") or name == "torch copy_"


def short_title(result: dict) -> str:
    """A result's title without its sizes."""
    return result["title"].split(" (tensors")[0]


def peers_of(result: dict) -> list[str]:
    """The candidates that are somebody else's way: neither ceilings nor ours in another backend, form or rule."""
    return [name for name in result["candidates"] if not is_ceiling(name) and not _is_ours(result, name)]


def variants_of(result: dict) -> list[str]:
    """The candidates that are ours beside the baseline: another backend, another form, or the baseline with a rule."""
    others = [name for name in result["candidates"] if not is_ceiling(name) and name != result["baseline"]]
    return [name for name in others if _is_ours(result, name)]


def _is_ours(result: dict, name: str) -> bool:
    # Among the rules, which are named after themselves, torch's own way stands under its function's name.
    by_name = name == result["baseline"] or name.startswith(BASELINE)
    return by_name or bool(result.get("rules_of") and not name.startswith("clip_grad_norm_"))


def summarize(
    measured: Alternation, moved_bytes: Mapping[str, int | None], stream: str | None, fraction="fraction_of_stream"
) -> dict[str, dict]:
    """One row a candidate for a result file: times, ratio to ours, bytes moved, fraction of the ceiling.

    Args:
        measured: the alternation.
        moved_bytes: candidate -> bytes that one call moves, None where no closed count is claimed.
        stream: the candidate whose bytes a second are the ceiling, None where it could not be built.
        fraction: the key of that fraction.
    """
    rows = {}
    for name in measured.seconds:
        moved = moved_bytes[name]
        row = {
            "seconds": measured.time(name)._asdict(),
            "over_ours": measured.ratio(name)._asdict(),
            "bytes": moved,
            fraction: None,
        }
        if moved is not None and stream is not None:
            # Paired as well: the ceiling of a round is what the stream reached in that round.
            size = moved / moved_bytes[stream]
            times = zip(measured.seconds[name], measured.seconds[stream], strict=True)
            row[fraction] = Spread.of([size * ceiling / own for own, ceiling in times])._asdict()
        rows[name] = row
    return rows


@dataclass(frozen=True)
class Target:
    """A figure that a case should reach; `value` is the measured median."""

    candidate: str
    what: str  # "over_ours": the peer's time over ours; "speed_of_baseline": ours over the candidate's; or a fraction
    at_least: float
    value: float | None

    @property
    def met(self) -> bool | None:
        """None where the candidate could not be measured."""
        return None if self.value is None else self.value >= self.at_least

    def to_dict(self) -> dict:
        return {**asdict(self), "met": self.met}


def table(results: list[dict]) -> str:
    """The closing table: a line a candidate, times never without their ratio to ours."""
    lines = [
        f"{'':34}{'time / ours':>12}  {'p20 - p80':<15}{'B/elt':>6}{'of stream':>11}{'ms (p50)':>11}  target",
    ]
    for result in results:
        lines.append(f"\n{result['title']}\n  [{_conditions(result)}]")
        targets = result["targets"] if why_no_result(result) is None else []  # neither met nor missed
        for name, row in sorted(result["candidates"].items(), key=lambda item: item[1]["over_ours"]["p50"]):
            ratio, stream = row["over_ours"], row["fraction_of_stream"]
            moved = "" if row["bytes"] is None else f"{row['bytes'] / result['elements']:.0f}"
            fraction = "" if stream is None else f"{stream['p50']:.0%}"
            spread = f"{ratio['p20']:.2f} - {ratio['p80']:.2f}"
            lines.append(
                f"  {name:32}{ratio['p50']:>11.2f}x  {spread:<15}{moved:>6}{fraction:>11}"
                f"{row['seconds']['p50'] * 1e3:>11.2f}  {_targets_text(targets, name)}".rstrip()
            )
        lines += [f"  {name:32}not measured: {reason}" for name, reason in result["unavailable"].items()]
        lines += [f"  {note}" for note in result.get("notes", ())]
        lines += _point_lines(result)
    return "\n".join(lines)


def _point_lines(result: dict) -> list[str]:
    """A line a point of a curve: the peers' times over ours, and ours of the stream."""
    lines = []
    for point in result.get("points", ()):
        rows, baseline = point["candidates"], result["baseline"]
        ratios = [f"{name} {rows[name]['over_ours']['p50']:.2f}x" for name in peers_of({**result, **point})]
        if (fraction := rows[baseline]["fraction_of_stream"]) is not None:
            ratios.append(f"{baseline} {fraction['p50']:.0%} of stream")
        lines.append(f"  {point['x']:>11,} {result['x']}: {', '.join(ratios)}")
    return lines


def _conditions(result: dict) -> str:
    share = result["others_cpu_share"]
    text = f"{result['rounds']} rounds, {result['rounds_set_aside']} set aside"
    if share is not None:
        text += f", other processes used {share:.0%} of the cores"
    reason = why_no_result(result)
    return text if reason is None else f"{text}: NOT A RESULT, {reason}"


def conditions_of(measured: Alternation) -> dict:
    """How quiet the machine was, for a result file."""
    return {
        "rounds": measured.rounds,
        "rounds_set_aside": measured.rounds_set_aside,
        "others_cpu_share": measured.others_cpu_share,
        "quiet": measured.quiet,
    }


def _targets_text(targets: list[dict], candidate: str) -> str:
    texts = []
    for target in targets:
        if target["candidate"] == candidate:
            of_stream = target["what"] == "fraction_of_stream"
            least = f"{target['at_least']:.0%} of stream" if of_stream else f"{target['at_least']:.2f}x"
            texts.append(f">= {least} {'met' if target['met'] else 'MISSED'}")
    return ", ".join(texts)


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else (platform.processor() or platform.machine())


def _transparent_hugepages() -> str | None:
    with contextlib.suppress(OSError):
        active = re.search(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())
        return active.group(1) if active else None
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_version() -> str | None:
    """The imported package's own word first: a tree used in place has no installed metadata, or stale."""
    try:
        import fused_clip_adam
    except ImportError:
        return None
    return getattr(fused_clip_adam, "__version__", None) or _version("fused_clip_adam")


def commit() -> str:
    """The checked-out commit; where only the files were sent, what the sender says in FUSED_CLIP_ADAM_COMMIT."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        # Result files are written by the run itself: they do not make the measured code another code.
        changed = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FUSED_CLIP_ADAM_COMMIT", "none")
    return f"{head}, with uncommitted changes" if changed else head
