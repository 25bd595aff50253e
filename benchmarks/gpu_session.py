"""`make gpu`: build in place -> tests and compute-sanitizer -> benchmarks -> closing table, in ten minutes.

Every step has a limit that leaves the later ones their time; a step that runs into it is ended and counts as failed.
Tests and sanitizers share the machine, on all cores where pytest-xdist is installed; the benchmarks have it alone.
Needs the working tree, a Python with CUDA torch, Triton and pytest, and nvcc; nothing is installed or downloaded.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOTAL_S = 580.0
GPU_TESTS = ("tests/test_gpu_backends.py", "tests/test_on_gpu.py")
NOT_HERE = tuple(  # minutes, and a GPU changes nothing: CI has them
    f"tests/test_{name}.py"
    for name in (
        "cuda_compile",
        "triton_compile",
        "benchmarks_base",
        "benchmarks_guard",
        "benchmarks_peers",
        "benchmarks_suite",
        "docs_site",
        "numbers",
        "overshoot_study",
        "release",
        "wheels",
    )
)
OK, FAILED, SKIPPED, CUT = "ok", "FAILED", "skipped", "CUT OFF"


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, and those that no earlier step may take from it.

    Args:
        skip: why it does not run, or "".
        judge: what is wrong with the output of a command that returned 0, or "".
        needed: without it the later steps make no sense.
        beside: runs at the same time as the step before it; its output is shown when it has ended.
    """

    name: str
    command: Callable[[float], list[str]]  # from the seconds it has
    limit_s: float
    reserve_s: float = 0.0
    env: dict[str, str] = field(default_factory=dict)
    skip: str = ""
    judge: Callable[[str], str] = lambda output: ""
    needed: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Outcome:
    name: str
    verdict: str
    seconds: float
    what: str


def why_not() -> str:
    """Why this machine cannot run `make gpu`, in a sentence, or ""."""
    try:
        import torch
    except ImportError:
        return f"{Path(sys.executable).name} has no torch; name a Python that has it: make gpu GPU_PYTHON=python3.12"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU on this machine"
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        return "there is no CUDA toolkit (nvcc) on PATH or in CUDA_HOME to build the kernels with"
    return ""


def architecture() -> str:
    """The device's own, as TORCH_CUDA_ARCH_LIST wants it: building for others would take minutes."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def workers() -> list[str]:
    """Options of pytest that spread tests over half of the cores, where pytest-xdist is there: two runs at a time."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(len(os.sched_getaffinity(0)) // 2, 1))]


def steps(
    python: str, arch: str, sanitizer: str | None, present: Callable[[str], bool], dry: bool = False
) -> list[Step]:
    """The session. `dry`: no build, few tests, and the benchmarks' own dry run: every step but the device."""
    # The project's own options name a plugin that a machine may lack.
    pytest = [python, "-m", "pytest", "-q", "-o", "addopts=-ra -p no:cacheprovider -p no:benchmark --tb=short"]
    pytest += ["--continue-on-collection-errors", *([] if dry else workers())]
    gpu_tests = [path for path in GPU_TESTS if present(path)]
    rest = ["tests/test_theory.py"] if dry else ["tests", *[f"--ignore={path}" for path in (*gpu_tests, *NOT_HERE)]]
    bench = [python, "-m", "benchmarks.gpu", *(["--device", "cpu", "--quick", "step-one-tensor"] if dry else [])]
    build = {"FUSED_CLIP_ADAM_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": arch}
    quiet_setup = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    one_thread = {"OMP_NUM_THREADS": "1", "SAY_FAILURES": "1"}  # a worker: they are as many as cores
    small = ["--device", "cpu"] if dry else []

    def sanitized(tool: str, seconds: float) -> list[str]:
        options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no", "--launch-timeout", "120"]
        budget = 3 if dry else max(seconds - 40, 8)
        script = [python, "tests/sanitize_step.py", *small, "--budget-s", f"{budget:.0f}"]
        return [str(sanitizer), *options, *script]

    return [
        Step("build", lambda s: quiet_setup, 220, env=build, skip="dry run" if dry else "", needed=True),
        Step(
            "tests on the GPU",
            lambda s: [*pytest, *gpu_tests],
            200,
            env=one_thread,
            skip="" if gpu_tests and not dry else "dry run" if dry else "the test files are not there",
        ),
        *[
            Step(
                f"sanitizer, {tool}",
                lambda s, tool=tool: sanitized(tool, s),
                100,
                # torch's caching allocator would hide what lies between tensors.
                env={**one_thread, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                skip="" if sanitizer else "compute-sanitizer is not on PATH",
                judge=what_sanitizer_found,
                beside=True,
            )
            for tool in ("memcheck", "racecheck")
        ],
        Step("tests", lambda s: [*pytest, *rest], 200, env=one_thread, beside=True),
        Step("benchmarks", lambda s: [*bench, "--budget-s", f"{max(s - 25, 20):.0f}"], 260, reserve_s=170),
        Step(
            "tables and figures",
            lambda s: [python, "-m", "benchmarks.plot"],
            30,
            reserve_s=10,
            skip="dry run" if dry else "",
        ),
    ]


def what_sanitizer_found(output: str) -> str:
    """What compute-sanitizer reports: it has to say that nothing was found, and the script that it ran to the end."""
    if not re.search(r"^sanitize_step: \d+ cases", output, re.MULTILINE):
        return "the script did not run to its end"
    counts = re.findall(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed)", output)
    if not counts:
        return "compute-sanitizer printed no summary"
    found = sum(int(errors or hazards) for errors, hazards in counts)
    return f"{found} findings" if found else ""


def run(todo: list[Step], total_s: float = TOTAL_S) -> list[Outcome]:
    """Runs the steps one after another, but for those beside others; output is passed on as it comes."""
    begin, outcomes, broken = time.monotonic(), [], ""
    for first, step in enumerate(todo):
        if step.beside:
            continue  # it went with the one before
        group = [step]
        while first + len(group) < len(todo) and todo[first + len(group)].beside:
            group.append(todo[first + len(group)])
        # What later steps have reserved they keep, were it only to say that they had to be cut off.
        later = sum(s.reserve_s for s in todo[first + len(group) :] if not s.skip)
        left = total_s - (time.monotonic() - begin) - later
        running: list[concurrent.futures.Future[Outcome]] = []
        with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
            for i, member in enumerate(group):
                if skip := member.skip or broken:
                    running.append(concurrent.futures.Future())
                    running[-1].set_result(Outcome(member.name, SKIPPED, 0.0, skip))
                    print(f"\n== {member.name}: skipped, {skip}", flush=True)
                    continue
                limit = max(min(member.limit_s, left), 5.0)
                how = ", beside" if i else ""
                print(
                    f"\n== {member.name}{how} ({time.monotonic() - begin:.0f} s so far, at most {limit:.0f} s)",
                    flush=True,
                )
                running.append(pool.submit(_run_step, member, limit, live=i == 0))
        outcomes += [each.result() for each in running]
        for member, outcome in zip(group, outcomes[-len(group) :]):
            if member.needed and outcome.verdict in (FAILED, CUT):
                broken = f"{member.name} failed"
    return outcomes


def _run_step(step: Step, limit_s: float, live: bool = True) -> Outcome:
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            step.command(limit_s),
            cwd=ROOT,
            env=_environment(step.env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be ended with it
        )
    except OSError as error:
        return Outcome(step.name, FAILED, 0.0, f"{Path(step.command(limit_s)[0]).name}: {error.strerror}")
    read = bytearray()
    reader = threading.Thread(target=_pass_on, args=(process.stdout, read, live), daemon=True)
    reader.start()
    try:
        status = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        status, said = None, read.decode(errors="replace")  # what it says of being ended is no news
    except BaseException:  # an interrupt: what was started ends with us
        _end(process)
        raise
    if status is None:
        _end(process)
    reader.join(timeout=5)
    seconds, output = time.monotonic() - begin, read.decode(errors="replace")
    if not live:
        print(f"\n== {step.name}, its output\n{output}", flush=True)
    if status is None:
        return Outcome(step.name, CUT, seconds, f"after {limit_s:.0f} s; last: {_last_line(said)}")
    last = _last_line(output)
    if status != 0:
        return Outcome(step.name, FAILED, seconds, step.judge(output) or last or f"exit status {status}")
    wrong = step.judge(output)
    return Outcome(step.name, FAILED if wrong else OK, seconds, wrong or last)


def _end(process: subprocess.Popen) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):  # pytest names what failed when interrupted
        try:
            os.killpg(process.pid, number)  # the group that `start_new_session` made
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue
        return


def _pass_on(stream, read: bytearray, live: bool) -> None:
    while chunk := os.read(stream.fileno(), 65536):
        read += chunk
        if live:
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def _environment(more: dict[str, str]) -> dict[str, str]:
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **more}
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return {**env, "PYTHONPATH": os.pathsep.join(paths)}


def _last_line(output: str) -> str:
    lines = [line.strip("= \r") for line in output.splitlines() if line.strip("= \r")]
    return lines[-1] if lines else ""


def table(outcomes: list[Outcome], seconds: float) -> str:
    lines = [f"{'step':22}{'s':>6}  {'':9}"]
    lines += [f"{o.name:22}{o.seconds:>6.0f}  {o.verdict:9}{o.what}".rstrip() for o in outcomes]
    return "\n".join([*lines, f"{'total':22}{seconds:>6.0f}"])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="every step without a GPU: no build, tiny benchmarks")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="seconds for everything")
    options = parser.parse_args(arguments)
    if not options.dry and (reason := why_not()):
        print(f"make gpu: {reason}.", file=sys.stderr)
        return 2
    begin = time.monotonic()
    # An emulated library serves machines without a GPU; here it would be measured in place of the one just built.
    if not options.dry:
        os.environ.pop("FUSED_CLIP_ADAM_CUDA_LIBRARY", None)
        os.environ.pop("TRITON_INTERPRET", None)
    todo = steps(
        sys.executable,
        "" if options.dry else architecture(),
        shutil.which("compute-sanitizer"),
        lambda path: (ROOT / path).exists(),
        options.dry,
    )
    outcomes = run(todo, options.total_s)
    print(f"\n{table(outcomes, time.monotonic() - begin)}", flush=True)
    return int(any(outcome.verdict in (FAILED, CUT) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
