"""The study: every method at its own best learning rate, then on held-out seeds. Resumable, with progress.

`python -m benchmarks.overshoot` -> `runs.jsonl` (a line a run) -> `summary.json`, figures, a page.
PREREGISTRATION.md, committed before the runs, says what is compared and how; this file does it.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import RESULTS, ROOT, machine_info
from benchmarks.overshoot.loop import Record, run
from benchmarks.overshoot.methods import METHODS
from benchmarks.overshoot.tasks import TASKS

FOLDER = RESULTS / "overshoot"
FILES = ("runs.jsonl", "machine.json", "summary.json")
PLAIN = "AdamW"
STEP = 2.0  # between neighbours in the search for a learning rate
SOURCES = [f"benchmarks/overshoot/{name}.py" for name in ("tasks", "loop", "methods")] + ["examples/ppo_control.py"]


class Key(NamedTuple):
    """Which run: its learning rate is the task's `Setting.lr` times 2 to the exponent."""

    task: str
    method: str
    exponent: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """What is run.

    Args:
        tasks, methods: names.
        seeds: at most so many of each kind; None: as many as the task's `Setting` says.
        reach: the search goes at most so many factors of 2 from the task's own learning rate.
        hot: factors of 2 above AdamW's best learning rate, at which `hot_methods` are measured too.
        shorten: as in `loop.run`.
    """

    tasks: tuple[str, ...] = ("language", "cartpole", "bandit")
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int | None = None
    reach: int = 5
    hot: tuple[int, ...] = (1, 2)
    hot_methods: tuple[str, ...] = (PLAIN, "align", "random gate", "lr decay")
    shorten: int = 1

    def tuning_seeds(self, task: str) -> range:
        return range(_at_most(TASKS[task].setting.tuning, self.seeds))

    def held_out_seeds(self, task: str) -> range:
        """None of them is a tuning seed."""
        return range(100, 100 + _at_most(TASKS[task].setting.held_out, self.seeds))


def _at_most(count: int, bound: int | None) -> int:
    return count if bound is None else min(count, bound)


QUICK = Plan(methods=(PLAIN, "lr decay", "random gate", "align"), seeds=2, reach=1, hot=(1,), shorten=4)


@dataclass
class Runs:
    """The runs of a folder. A line of `runs.jsonl` is written at once when its run has ended, by whichever process."""

    path: Path
    records: dict[Key, Record] = field(default_factory=dict)
    shorten: int = 1

    @classmethod
    def read(cls, folder: Path, shorten: int = 1) -> Runs:
        """What is there so far. A last line that a killed process left unfinished does not count.

        Raises:
            SystemExit: there are runs of another protocol, or of another length.
        """
        runs = cls(folder / "runs.jsonl", shorten=shorten)
        for text in runs.path.read_text().splitlines() if runs.path.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if (line.pop("protocol"), line.pop("shorten", 1)) != (protocol(), shorten):
                raise SystemExit(f"{runs.path.name} has runs of another protocol or length: start anew with --fresh")
            key = Key(*(line.pop(name) for name in Key._fields))
            runs.records[key] = Record(**line)
        return runs

    def add(self, key: Key, record: Record) -> None:
        line = self._line(key, record)
        self.records[key] = Record(**{name: json.loads(line)[name] for name in asdict(record)})  # as it will be read
        with self.path.open("a") as file:
            file.write(line)

    def end_torn_line(self) -> None:
        """So that what is written next is not appended to what a killed process left unfinished."""
        if self.path.exists() and (text := self.path.read_bytes()) and not text.endswith(b"\n"):
            with self.path.open("a") as file:
                file.write("\n")

    def machine(self) -> dict:
        """Of the process that took the first runs, written when it began; without that file, this one's."""
        path = self.path.with_name("machine.json")
        return json.loads(path.read_text()) if path.exists() else machine_info()

    def note_machine(self) -> None:
        path = self.path.with_name("machine.json")
        if not path.exists():
            path.write_text(json.dumps(machine_info(), indent=1) + "\n")

    def write_sorted(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(self._line(key, self.records[key]) for key in sorted(self.records)))
        partial.replace(self.path)

    def _line(self, key: Key, record: Record) -> str:
        rounded = {name: round(x, 6) if isinstance(x, float) else x for name, x in asdict(record).items()}
        length = {} if self.shorten == 1 else {"shorten": self.shorten}
        return json.dumps({**key._asdict(), **rounded, "protocol": protocol(), **length}) + "\n"


@functools.cache
def protocol() -> str:
    """A hash of what decides the outcome of a run, comments and formatting aside."""
    trees = [ast.dump(ast.parse((ROOT / source).read_text())) for source in SOURCES]
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:12]


def climb(value_at: Callable[[int], float], start: int, reach: int) -> int:
    """The exponent whose value is above that of both its neighbours, found by going uphill from `start`.

    Only the edge of the range [-reach, reach] can be returned without a neighbour beyond it.
    """
    best = start
    while True:
        near = [e for e in (best - 1, best, best + 1) if abs(e) <= reach]
        top = max(near, key=lambda e: (value_at(e), e == best))
        if top == best:
            return best
        best = top


def best_exponent(task: str, method: str, plan: Plan, start: int, measure: Callable[[Key], Record]) -> int:
    """Of the learning rate with the highest mean area under the learning curve over the tuning seeds."""

    def mean_auc(exponent: int) -> float:
        return statistics.fmean(measure(Key(task, method, exponent, seed)).auc for seed in plan.tuning_seeds(task))

    return climb(mean_auc, start, plan.reach)


def run_cell(task: str, method: str, plan: Plan, plain_exponent: int, folder: Path) -> tuple[str, str, int]:
    """All runs of a method on a task that are not there yet. Returns its names and its best exponent.

    Args:
        plain_exponent: AdamW's best, where the search begins and where the method is measured as well.
    """
    runs = Runs.read(folder, plan.shorten)

    def measure(key: Key) -> Record:
        if key not in runs.records:
            lr = TASKS[task].setting.lr * STEP**key.exponent
            runs.add(key, run(task, METHODS[method], lr, key.seed, plan.shorten))
        return runs.records[key]

    best = best_exponent(task, method, plan, plain_exponent, measure)
    if method == PLAIN:
        plain_exponent = best
    exponents = {best, plain_exponent}
    if method in plan.hot_methods:
        exponents |= {plain_exponent + hot for hot in plan.hot}
    for exponent in sorted(exponents):
        for seed in plan.held_out_seeds(task):
            measure(Key(task, method, exponent, seed))
    return task, method, best


def run_all(plan: Plan, folder: Path, jobs: int, show: Callable[[str], None]) -> Runs:
    """AdamW on every task, then everything else, `jobs` processes at a time.

    Raises:
        SystemExit: another process takes runs of this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _run_all(plan, folder, jobs, show)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two studies would run the same things, and one would sort away what the other had just written."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"another process takes runs of {folder.name}") from None
        yield


def _run_all(plan: Plan, folder: Path, jobs: int, show: Callable[[str], None]) -> Runs:
    runs = Runs.read(folder, plan.shorten)
    runs.end_torn_line()
    runs.note_machine()
    cells = len(plan.tasks) * len(plan.methods)
    done: set[tuple[str, str]] = set()
    context = get_context("spawn")  # a forked process would inherit torch's threads in whatever state they are
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending = {pool.submit(run_cell, task, PLAIN, plan, 0, folder) for task in plan.tasks}
        try:
            while pending:
                finished, pending = wait(pending, timeout=20, return_when=FIRST_COMPLETED)
                news = []
                for future in finished:
                    task, method, best = future.result()
                    done.add((task, method))
                    if method == PLAIN:
                        rest = [name for name in plan.methods if name != PLAIN]
                        pending |= {pool.submit(run_cell, task, name, plan, best, folder) for name in rest}
                    news.append(f"{task}, {method}, best lr {TASKS[task].setting.lr * STEP**best:.2g}")
                left = minutes_left(Runs.read(folder, plan.shorten), plan, done, jobs)
                show(f"{len(done)} of {cells}, {left}{''.join(f'; {new}' for new in news)}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    runs = Runs.read(folder, plan.shorten)
    runs.write_sorted()
    return runs


def minutes_left(runs: Runs, plan: Plan, done: set[tuple[str, str]], jobs: int) -> str:
    """From what a task's runs took so far, and as many runs a method as the methods that are ready needed."""
    seconds: dict[str, list[float]] = {task: [] for task in plan.tasks}
    taken: dict[tuple[str, str], int] = {}
    for key, record in runs.records.items():
        if key.task in seconds:
            seconds[key.task].append(record.cpu_s)
            taken[key.task, key.method] = taken.get((key.task, key.method), 0) + 1
    pending = [(task, method) for task in plan.tasks for method in plan.methods if (task, method) not in done]
    if not pending:
        return "all ready"
    if not done or not all(seconds.values()):
        return "time left not known yet"
    left = 0.0
    for task, method in pending:
        needed = statistics.fmean([taken[cell] for cell in done if cell[0] == task] or [taken[cell] for cell in done])
        left += max(1.0, needed - taken.get((task, method), 0)) * statistics.fmean(seconds[task])
    return f"about {max(1, round(left / jobs / 60))} min left"


def default_jobs() -> int:
    return max(1, os.cpu_count() or 1)
