"""Runs every benchmark, prints the closing table and draws the figure: `python -m benchmarks.run`.

Options are pytest's; `--quick` is a smoke run that writes nothing, `--check-targets` fails where a target is
missed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as unused:
        # pytest-benchmark's own table is left out here: the closing table shows the same times next to their
        # ratios.
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--benchmark-quiet",
            f"--benchmark-storage=file://{unused}",
        ]
        status = pytest.main([str(FOLDER), f"--rootdir={FOLDER.parent}", *options, *arguments])
    if status == pytest.ExitCode.OK and "--quick" not in arguments:
        from benchmarks import plot

        plot.main([])
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
