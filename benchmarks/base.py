"""An earlier commit against the working tree, in alternation in one run: `python -m benchmarks.run --base REF`.

A git worktree of REF in a temporary folder -> its CPU library, built there by this environment -> a process for each
version (`base_worker.py`) -> each case built in both, checked to do the same work -> calls in alternation, so that both
see the same noise -> a table of REF's time over the working tree's. The worktree goes at the end, whatever ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import test_logits, test_objective, test_step
from benchmarks.harness import ROOT, Alternation, Spread, alternate
from benchmarks.peers import SAME_WORK_TOLERANCE
from benchmarks.progress import Progress

BASE, TREE = "base", "working tree"
WORKER = Path(__file__).with_name("base_worker.py")
LEAST_CHANGE = 0.03  # a median nearer to 1 is called the same
SECONDS_A_CASE = 16.0


class BaseError(Exception):
    """The comparison cannot be made; says why and, where there is something, what to do."""


@dataclass(frozen=True)
class Case:
    """`options`: whether quick -> arguments of the builder `kind` of base_worker.py; `rounds` to take."""

    title: str
    kind: str
    options: Callable[[bool], dict]
    rounds: int
    dtype: torch.dtype = torch.float32


def _step(case: test_step.Case) -> Case:
    def options(quick: bool) -> dict:
        dtype = str(case.dtype).removeprefix("torch.")
        return {"shapes": case.shapes(quick), "dtype": dtype, "max_norm": case.max_norm}

    return Case(case.title, "step", options, 2 * case.rounds, case.dtype)  # two candidates: time for twice the rounds


CASES = {
    **{name: _step(case) for name, case in test_step.CASES.items() if not case.other_work},
    test_objective.NAME: Case(
        "PPO loss, gradient and statistics", "objective", lambda quick: {"shape": test_objective.shape_of(quick)}, 60
    ),
    test_logits.NAME: Case(
        "PPO loss from logits, in place",
        "logits",
        lambda quick: dict(zip(("rows", "vocabulary"), test_logits.size_of(quick), strict=True)),
        12,
    ),
}


@dataclass(frozen=True)
class Row:
    """A case's outcome: `ratio` is the base's time over the working tree's, or `why_not` says why there is none."""

    title: str
    measured: Alternation | None = None
    why_not: str | None = None

    @property
    def ratio(self) -> Spread | None:
        return None if self.measured is None else self.measured.ratio(BASE, TREE)

    @property
    def verdict(self) -> str:
        """Of the working tree: "same" where the spread holds 1 or the median is within `LEAST_CHANGE` of it."""
        if self.ratio is None:
            return "not compared"
        low, middle, high = self.ratio
        if low <= 1 <= high or abs(middle - 1) < LEAST_CHANGE:
            return "same"
        return "faster" if middle > 1 else "slower"

    def slower_by(self, percent: float) -> bool:
        """Whether the working tree takes more than `percent` longer than the base."""
        return self.verdict == "slower" and 1 / self.ratio.p50 > 1 + percent / 100


# ---------------------------------------------------------------- the base's files and library


def git(*arguments: str, root: Path = ROOT) -> str:
    """What git prints.

    Raises:
        BaseError: git failed; with what it said.
    """
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise BaseError(f"an earlier commit needs git, which does not run here ({error.strerror})") from error
    if done.returncode != 0:
        raise BaseError(f"git {arguments[0]}: {done.stderr.strip() or 'failed'}")
    return done.stdout.strip()


@contextlib.contextmanager
def worktree(ref: str, root: Path = ROOT) -> Iterator[Path]:
    """A checkout of `ref` in a temporary folder, for as long as the context lasts.

    Raises:
        BaseError: `ref` is no commit of this repository, or has no setup.py.
    """
    try:
        commit = git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", root=root)
    except BaseError as error:
        raise BaseError(f"--base {ref}: no such commit, branch or tag in this repository") from error
    parent = Path(tempfile.mkdtemp(prefix="fused-clip-adam-base-"))
    folder = parent / "base"
    try:
        git("worktree", "add", "--quiet", "--detach", str(folder), commit, root=root)
        if not (folder / "setup.py").exists():
            raise BaseError(f"--base {ref}: that commit has no setup.py to build from")
        yield folder
    finally:
        with contextlib.suppress(BaseError):  # where it was not even made
            git("worktree", "remove", "--force", str(folder), root=root)
        shutil.rmtree(parent, ignore_errors=True)


def build(folder: Path, progress: Callable[[str], None]) -> None:
    """Builds the CPU library of a checkout in place.

    Raises:
        BaseError: it does not build; with the last lines of the output.
    """
    scripts = str(Path(sys.executable).parent)  # ninja is there
    environment = worker_environment(folder) | {
        "FUSED_CLIP_ADAM_BUILD": "cpu",
        "PATH": os.pathsep.join((scripts, os.environ.get("PATH", ""))),
    }
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        running = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        start = time.monotonic()
        try:
            while running.poll() is None:
                progress(f"building the base's CPU library, a minute or two: {time.monotonic() - start:.0f} s")
                time.sleep(0.5)
        finally:
            running.kill()
            running.wait()
        output.seek(0)
        text = output.read()
    if running.returncode != 0 or not list((folder / "fused_clip_adam").glob("_C*.so")):
        raise BaseError("the base does not build in this environment:\n" + "\n".join(text.splitlines()[-15:]))


# ---------------------------------------------------------------- a process for each version


def worker_environment(folder: Path) -> dict[str, str]:
    """This process's, with the package of `folder` first, and threads that sleep while they wait.

    By default an OpenMP team spins for a while after its last parallel loop: of one version while the other is timed.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FUSED_CLIP_ADAM_")}
    return kept | {
        "PYTHONPATH": str(folder),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


class Version:
    """A version of the package in a process of its own; `run` is one timed call of the case that is built."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            cwd=tempfile.gettempdir(),  # neither version's folder: what is imported is what PYTHONPATH says
            env=worker_environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C ends this process, which then ends them
        )
        self.info = self._ask(do="version")
        if (reason := self.info.get("failed")) is not None:
            raise BaseError(f"the {name} does not import: {reason}")
        if Path(self.info["folder"]).resolve() != folder.resolve():
            raise BaseError(f"the {name} was to come from its own folder, but another installation came first")

    @property
    def pid(self) -> int:
        return self._process.pid

    def build(self, case: Case, quick: bool) -> dict:
        """{"sample": numbers that tell what it computes} or {"failed": reason}."""
        return self._ask(do="build", kind=case.kind, options=case.options(quick))

    def drop(self) -> None:
        self._ask(do="drop")

    def run(self) -> float:
        """Seconds of one call, on the worker's clock."""
        answer = self._ask(do="run")
        if (reason := answer.get("failed")) is not None:
            raise BaseError(f"a call of the {self.name} failed: {reason}")
        return answer["seconds"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def _ask(self, **request) -> dict:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise BaseError(
                f"the process of the {self.name} ended in {request['do']!r} (status {self._process.wait()})"
            )
        return json.loads(line)


@contextlib.contextmanager
def versions(base: Path, tree: Path = ROOT) -> Iterator[dict[str, Version]]:
    """The processes of both, ended at the end."""
    started: dict[str, Version] = {}
    try:
        for name, folder in ((BASE, base), (TREE, tree)):
            started[name] = Version(name, folder)
        yield started
    finally:
        for version in started.values():
            version.close()


# ---------------------------------------------------------------- the comparison


def compare(case: Case, pair: dict[str, Version], quick: bool, progress: Callable[[str], None]) -> Row:
    """Built in both -> same work -> alternation.

    Raises:
        BaseError: the working tree's own version fails.
    """
    samples = {}
    for name, version in pair.items():
        progress(f"{case.title}: building it in the {name}")
        answer = version.build(case, quick)
        if (reason := answer.get("failed")) is not None:
            if name == TREE:
                raise BaseError(f"{case.title}: the {name} fails: {reason}")
            return Row(case.title, why_not=f"the base lacks it ({reason})")
        samples[name] = torch.tensor(answer["sample"], dtype=torch.float64)
    apart = float((samples[BASE] - samples[TREE]).norm() / samples[TREE].norm())
    if not apart <= SAME_WORK_TOLERANCE[case.dtype]:
        return Row(case.title, why_not=f"the base does other work: its result is {apart:.1e} away")
    measured = alternate(
        {name: version.run for name, version in pair.items()},
        5 if quick else case.rounds,
        baseline=TREE,
        budget_s=2 if quick else SECONDS_A_CASE - 4,
        progress=lambda text: progress(f"{case.title}: {text}"),
        timed=lambda run: run(),
        workers=[version.pid for version in pair.values()],
    )
    for version in pair.values():
        version.drop()
    return Row(case.title, measured)


def table(rows: list[Row], ref: str) -> str:
    lines = [f"time of {ref} over the working tree's, paired rounds; above 1 the working tree is faster", ""]
    lines.append(f"{'':<70}{'ratio':>8}  {'p20 - p80':<15}{'rounds':>7}  the working tree is")
    for row in rows:
        if row.ratio is None:
            lines.append(f"{row.title:<70}not compared: {row.why_not}")
            continue
        busy = "" if row.measured.quiet else "  (other processes were busy)"
        lines.append(
            f"{row.title:<70}{row.ratio.p50:>7.3f}x  {f'{row.ratio.p20:.3f} - {row.ratio.p80:.3f}':<15}"
            f"{row.measured.rounds:>7}  {row.verdict}{busy}"
        )
    return "\n".join(lines)


def selected(pattern: str | None) -> dict[str, Case]:
    cases = {name: case for name, case in CASES.items() if pattern is None or pattern in name}
    if not cases:
        raise BaseError(f"-k {pattern}: no case has this in its name; there are {', '.join(CASES)}")
    return cases


def run(ref: str, *, quick: bool = False, pattern: str | None = None) -> list[Row]:
    """Every case of `ref` against the working tree.

    Raises:
        BaseError: see the functions above.
    """
    cases = selected(pattern)
    show = Progress({"build": 90.0, **dict.fromkeys(cases, 3.0 if quick else SECONDS_A_CASE)})
    rows = []
    with worktree(ref) as folder:
        show.begin("build")
        build(folder, show)
        with versions(folder) as pair:
            for name, case in cases.items():
                show.begin(name)
                rows.append(compare(case, pair, quick, show))
        show.end()
    return rows


def main(ref: str, *, quick: bool = False, pattern: str | None = None, fail_slower: float | None = None) -> int:
    """Prints the table; 1 where a case is slower by more than `fail_slower` percent, 2 where it cannot be made."""

    def ended(signum, frame) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, ended)  # so that the worktree goes then, too, as it does on Ctrl-C
    try:
        rows = run(ref, quick=quick, pattern=pattern)
    except BaseError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    print("\n" + table(rows, ref))
    if quick:
        print("\n--quick: sizes fit in the caches and rounds are few; these are not results.")
    if fail_slower is None:
        return 0
    slower = [row.title for row in rows if row.slower_by(fail_slower)]
    if slower:
        print(f"\nslower by more than {fail_slower:g}%: {'; '.join(slower)}")
    return 1 if slower else 0
