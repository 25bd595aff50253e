"""Shared settings of the suite: one seed a test, hypothesis without a deadline, and GPU kernels without a GPU.

Where there is no GPU, backend="cuda" is the library that tests/cuda_on_cpu compiles from the same sources, and Triton
interprets its kernels: both then take CPU tensors, so that every test of a backend runs everywhere.
"""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from fast_interpreter import fast_interpreter

sys.path.insert(0, str(Path(__file__).parent / "cuda_on_cpu"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60, database=None)
hypothesis.settings.load_profile("suite")

if not torch.cuda.is_available():
    import build as cuda_on_cpu

    os.environ.setdefault("TRITON_INTERPRET", "1")
    if "FUSED_CLIP_ADAM_CUDA_LIBRARY" not in os.environ and cuda_on_cpu.compiler():
        os.environ["FUSED_CLIP_ADAM_CUDA_LIBRARY"] = str(cuda_on_cpu.build())


class _SayFailuresAtOnce:
    """Names a failed test when it fails: a run that is cut off has no summary (SAY_FAILURES=1, set by `make gpu`)."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.config.pluginmanager.get_plugin("terminalreporter").write_line(f"\nFAILED {report.nodeid}")


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, help="only each N-th test, in the order of collection")


def pytest_collection_modifyitems(config, items):
    if (n := config.getoption("--every")) > 1:
        config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % n])
        items[:] = items[::n]


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist, which reports to the process that prints
    if os.environ.get("SAY_FAILURES") == "1" and not is_worker:
        config.pluginmanager.register(_SayFailuresAtOnce(config))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _fast_interpreter():
    with fast_interpreter():
        yield
