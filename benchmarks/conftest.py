"""Options, progress and the closing table of the benchmarks."""

from __future__ import annotations

import functools
import sys
import time

import pytest

from benchmarks.harness import table, why_no_result, write_result

RESULTS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("fused_clip_adam benchmarks")
    group.addoption("--quick", action="store_true", help="small sizes, few rounds, no result files: does it run?")
    group.addoption("--check-targets", action="store_true", help="fail where a median misses its target")


def pytest_configure(config):
    config.stash[RESULTS] = []
    if config.getoption("--quick") and config.getoption("--check-targets"):
        raise pytest.UsageError("--check-targets needs the full sizes: leave out --quick")


@pytest.fixture(scope="session")
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def progress(request):
    """Writes a line past pytest's capture: in place on a terminal, else every ten seconds."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    last = [0.0]

    def show(text: str) -> None:
        in_place = sys.__stderr__.isatty()
        if not in_place and time.monotonic() - last[0] < 10:
            return
        last[0] = time.monotonic()
        with capture.global_and_fixture_disabled():
            sys.__stderr__.write(f"\r\033[K{text}" if in_place else f"{text}\n")
            sys.__stderr__.flush()

    return show


@pytest.fixture(scope="session")
def publish(request, quick):
    """Takes a result into the closing table and, unless `--quick` or no valid result, into its file."""

    def accept(name: str, result: dict) -> None:
        request.config.stash[RESULTS].append(result)
        if not quick and why_no_result(result) is None:
            write_result(name, result)

    return accept


@pytest.fixture(scope="module")
def measure_once(request, quick, progress, publish):
    """Name of one of the module's `CASES` -> what its `measure` gives: result and seconds, when first asked for."""

    @functools.cache
    def run(name: str) -> tuple[dict, dict[str, list[float]]]:
        result, seconds = request.module.measure(request.module.CASES[name], quick, progress)
        publish(name, result)
        return result, seconds

    return run


@pytest.fixture
def assert_targets(request):
    """Fails, only under `--check-targets`, where the candidate misses a target of the result."""

    def check(result: dict, candidate: str) -> None:
        if request.config.getoption("--check-targets"):
            missed = [t for t in result["targets"] if t["candidate"] == candidate and not t["met"]]
            assert why_no_result(result) is None, f"{result['title']}: {why_no_result(result)}"
            assert not missed, f"{result['title']}: {missed}"

    return check


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[RESULTS]
    if results:
        terminalreporter.section("in alternation with ours, medians of paired rounds")
        terminalreporter.write_line(table(results))
        if config.getoption("--quick"):
            terminalreporter.write_line("\n--quick: sizes fit in the caches and rounds are few; these are not results.")
