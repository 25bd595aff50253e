"""Clocks of a device, the flush of its L2, and what a result says about the card.

A timed step on a GPU:

    gradients put back -> L2 flushed -> sleep kernel -> event -> the step's kernels -> event

The sleep keeps the device busy until the host has issued the whole step, so that the time between the events is the
device's own; what the host needs is measured apart (`HostClock`). `CpuClock` stands in for the first on a machine
without a GPU: the same calls, times that mean nothing.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.harness import ROOT, Alternation

FRACTION = "fraction_of_ceiling"
COPY = "copy (ceiling)"
COPY_LIMIT = 4 * 2**30  # bytes that the copy moves at most: enough for its full speed, and memory is short at 1e9
MEASURED_SOURCES = ("fused_clip_adam/**/*.py", "csrc/**/*", "setup.py")

Step = Callable[[], object]


class DeviceClock:
    """Device seconds of a step, by CUDA events, with a cold L2 and a full queue.

    Args:
        cuda: `torch.cuda`, or what a test puts in its place.
    """

    name = "CUDA events, L2 flushed, the host ahead of the device"
    longest_sleep_s = 0.03
    first_sleep_s = 0.002

    def __init__(self, cuda=torch.cuda, device: str = "cuda"):
        self.cuda = cuda
        l2 = getattr(cuda.get_device_properties(0), "L2_cache_size", 0) or 2**26
        self.written, self.read = (torch.zeros(3 * l2 // 4, device=device) for _ in range(2))
        self.sum = torch.zeros((), device=device)
        self._sleep_s: dict[Step, float] = {}
        self.late: dict[Step, list[bool]] = {}
        self.cycles_per_s = self._calibrate()

    def __call__(self, step: Step) -> float:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        self.cuda._sleep(int(self.cycles_per_s * self._sleep_s.get(step, self.first_sleep_s)))
        start.record()
        begin = time.perf_counter()
        step()
        host_s = time.perf_counter() - begin
        end.record()
        late = start.query()  # the device was there before the host had finished: it may have waited
        self.cuda.synchronize()
        self.late.setdefault(step, []).append(late)
        self._sleep_s[step] = min(1.5 * host_s + 0.0002, self.longest_sleep_s)
        return start.elapsed_time(end) / 1e3

    def flush(self) -> None:
        """Writes more than the L2 holds, then reads as much: what was written does not drain into the timed step."""
        self.written.zero_()
        torch.sum(self.read, dim=0, out=self.sum)

    def late_rounds(self, step: Step, rounds: int) -> int:
        """In how many of the last `rounds` timings the host was behind, so that the time may contain its own."""
        return sum(self.late.get(step, [])[-rounds:])

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def _calibrate(self) -> float:
        cycles = 10_000_000
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first raises the clock
            start.record()
            self.cuda._sleep(cycles)
            end.record()
            self.cuda.synchronize()
        return cycles / max(start.elapsed_time(end) / 1e3, 1e-6)


class CpuClock:
    """Stands in for DeviceClock where the "device" is the CPU: a dry run of every line but the clock's own."""

    name = "perf_counter (dry run)"

    def __init__(self):
        self.written = torch.zeros(2**16)

    def __call__(self, step: Step) -> float:
        self.flush()
        return harness.wall_seconds(step)

    def flush(self) -> None:
        self.written.zero_()

    def late_rounds(self, step: Step, rounds: int) -> int:
        return 0

    def synchronize(self) -> None:
        pass


class HostClock:
    """Host seconds until a step returns, the device idle when it starts: what a small model pays."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize

    def __call__(self, step: Step) -> float:
        self.synchronize()
        seconds = harness.wall_seconds(step)
        self.synchronize()
        return seconds


def make_clock(device: str) -> DeviceClock | CpuClock:
    return DeviceClock() if device == "cuda" else CpuClock()


class Copy:
    """The ceiling: one tensor copied to another, as many bytes as our step moves, at most `COPY_LIMIT`."""

    def __init__(self, moved: int, device: str):
        count = max(min(moved, COPY_LIMIT) // 8, 1)  # float32, read and written
        self.source, self.target = (torch.zeros(count, device=device) for _ in range(2))
        self.bytes = 8 * count

    def __call__(self) -> None:
        self.target.copy_(self.source)


def describe_copy(measured: Alternation, copy: Copy) -> dict:
    """For a result file: what the ceiling was."""
    seconds = measured.time(COPY)
    return {
        "variant": "torch copy_ of one float32 tensor, reads plus writes",
        "bytes": copy.bytes,
        "seconds": seconds._asdict(),
        "gigabytes_per_second": round(copy.bytes / seconds.p50 / 1e9, 1),
    }


def machine_info() -> dict:
    """What a GPU result depends on: card, driver, versions, commit, date. No paths, no host name."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    properties = torch.cuda.get_device_properties(0)
    inherited = harness.machine_info()
    kept = ("cpu", "cores", "system", "python", "torch", "fused_clip_adam", "packages", "commit", "date")
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
        **driver_info(),
        "cuda": torch.version.cuda,
        "nvcc": nvcc_version(),
        "triton": triton_version,
        **{key: inherited[key] for key in kept},
        "sources": sources_digest(),
    }


def driver_info() -> dict:
    """Driver, highest clocks and power limit as nvidia-smi states them; None where it does not."""
    fields = {
        "driver": "driver_version",
        "sm_clock_max": "clocks.max.sm",
        "memory_clock_max": "clocks.max.mem",
        "power_limit": "power.limit",
    }
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
        values = [value.strip() for value in line.split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        values = []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else dict.fromkeys(fields)


def nvcc_version() -> str | None:
    """The release of the compiler on PATH, which may be older or newer than torch's CUDA."""
    if (nvcc := shutil.which("nvcc")) is None:
        return None
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    return match.group(1) if match else None


def sources_digest(root: Path = ROOT) -> str:
    """A short hash of the measured code: says which code it was where only files were sent, without history."""
    digest = hashlib.sha256()
    for pattern in MEASURED_SOURCES:
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def device_slug(name: str) -> str:
    """Folder name for the results of a card: `gpu-nvidia-h100-80gb-hbm3`."""
    return "-".join(["gpu", *re.findall(r"[a-z0-9.]+", name.lower())])


def info_of(device: str) -> dict:
    """`machine_info`, or for a dry run what there is."""
    return machine_info() if device == "cuda" else {"gpu": None, "system": platform.system()}
