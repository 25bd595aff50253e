"""Options, progress and the closing table of the benchmarks."""

from __future__ import annotations

import functools

import pytest

from benchmarks.harness import table, why_no_result, write_result
from benchmarks.progress import Progress, to_stderr

RESULTS = pytest.StashKey[list]()
PROGRESS = pytest.StashKey[Progress]()
QUICK_S = 4.0  # a case of --quick


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


def case_of(item: pytest.Item) -> str:
    """What a row is measured with: a case of a module with `CASES`, or else the whole module."""
    module, name = item.module.__name__.rpartition(".")[2], _name_of(item)
    return module if name is None else f"{module}, {name}"


def _name_of(item: pytest.Item) -> str | None:
    return item.callspec.params.get("name") if hasattr(item, "callspec") else None


def runs_here(item: pytest.Item) -> bool:
    """False of a case that is skipped, because what it needs is not installed."""
    case = getattr(item.module, "CASES", {}).get(_name_of(item))
    return getattr(case, "unavailable", None) is None


def pytest_collection_finish(session):
    """Knows the cases of this run and, by their modules' `SECONDS_A_CASE`, about how long each takes."""
    quick, here = session.config.getoption("--quick"), filter(runs_here, session.items)
    estimates = {case_of(item): QUICK_S if quick else float(item.module.SECONDS_A_CASE) for item in here}
    capture = session.config.pluginmanager.getplugin("capturemanager")

    def past_the_capture(text: str) -> None:
        with capture.global_and_fixture_disabled():
            to_stderr(text)

    session.config.stash[PROGRESS] = Progress(estimates, write=past_the_capture)


def pytest_runtest_setup(item):
    if runs_here(item):
        item.config.stash[PROGRESS].begin(case_of(item))


@pytest.fixture(scope="session")
def progress(request) -> Progress:
    """Shows a text, and which case of how many it is of, past pytest's capture."""
    return request.config.stash[PROGRESS]


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
