"""The ceiling of a run: a hand-written stream with the step's traffic (stream.cpp), built on the spot."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import alternate, bytes_per_element

NAME = "stream (ceiling)"
SOURCE = Path(__file__).with_name("stream.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]


def unavailable_reason() -> str | None:
    """Why the stream cannot be built here, or None if it can."""
    return None if shutil.which("g++") else "no g++ to build stream.cpp with"


class Stream:
    """One call reads p, g, m, v and writes p, m, v once, in the variant that was fastest here just now.

    Args:
        elements: float32 elements of each of the four arrays.
        tuning_rounds: rounds in which the variants are timed against one another, in alternation.
    """

    def __init__(self, elements: int, tuning_rounds: int = 5):
        self.elements = elements
        self.bytes = bytes_per_element("update") * elements
        # torch allocations, like the optimizers': a ceiling for the same page size and alignment.
        self.p, self.g, self.m, self.v = (torch.ones(elements) for _ in range(4))
        variants = {name: run for name, run in self._variants().items() if run() == 0}
        measured = alternate(variants, tuning_rounds, baseline=next(iter(variants)))
        self.variant = min(variants, key=lambda name: measured.time(name).p50)
        self._run = variants[self.variant]
        self.tried = {name: round(measured.ratio(name, self.variant).p50, 3) for name in variants}

    def __call__(self) -> None:
        self._run()

    def describe(self, seconds: float) -> dict:
        """For a result file: what the ceiling was, given the median seconds of a call."""
        return {
            "variant": self.variant,
            "gigabytes_per_second": round(self.bytes / seconds / 1e9, 2),
            "time_over_fastest_variant": self.tried,
        }

    def _variants(self) -> dict[str, Callable[[], int]]:
        library = _library()
        pointers = [x.data_ptr() for x in (self.p, self.g, self.m, self.v)]
        rest = (*pointers, self.elements, torch.get_num_threads())
        return {
            library.stream_name(i).decode(): functools.partial(library.stream_run, i, *rest)
            for i in range(library.stream_variants())
        }


class Reads:
    """One call reads a buffer once and writes nothing: the ceiling of a step that mostly reads."""

    def __init__(self, size: int):
        self.bytes = size // 4 * 4
        self.x = torch.ones(size // 4)

    def __call__(self) -> None:
        _library().stream_read(self.x.data_ptr(), self.x.numel(), torch.get_num_threads())


def add_ceiling(
    candidates: dict[str, Callable], moved: dict[str, int], elements: int
) -> tuple[Stream | None, dict[str, str]]:
    """Puts the stream among the candidates of a run, and its bytes among theirs. Returns it, or None and why not."""
    if (reason := unavailable_reason()) is not None:
        return None, {NAME: reason}
    ceiling = Stream(elements)
    candidates[NAME], moved[NAME] = ceiling, ceiling.bytes
    return ceiling, {}


@functools.cache
def _library() -> ctypes.CDLL:
    # A second or two, once a run; in a folder of its own each time, so that nothing stale is ever loaded.
    with tempfile.TemporaryDirectory(prefix="stream-") as folder:
        path = Path(folder) / "stream.so"
        subprocess.run(["g++", *FLAGS, str(SOURCE), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    floats = ctypes.c_void_p
    library.stream_read.restype = ctypes.c_float
    library.stream_read.argtypes = [floats, ctypes.c_int64, ctypes.c_int]
    library.stream_name.restype = ctypes.c_char_p
    library.stream_run.argtypes = [ctypes.c_int, floats, floats, floats, floats, ctypes.c_int64, ctypes.c_int]
    return library
