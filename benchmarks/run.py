"""Runs the benchmarks, prints the closing table, draws the figures: `python -m benchmarks.run`.

Other options are pytest's, as `-k one-tensor`. With `--base REF` an earlier commit against the working tree instead.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small sizes, few rounds, nothing written: does everything run?")
    add("--check-targets", action="store_true", help="fail where a median misses its target")
    add("--check-regressions", action="store_true", help="fail where ours got slower than in the committed results")
    add("-k", metavar="TEXT", help="only cases with this in their name (without --base: an expression of pytest's)")
    add("--base", metavar="REF", help="compare the working tree with this commit, in alternation; writes nothing")
    add("--fail-slower", metavar="PERCENT", type=float, help="with --base: fail where a case is slower by more")
    options, of_pytest = parser.parse_known_args(arguments)
    if options.base is not None:
        if of_pytest or options.check_targets or options.check_regressions:
            parser.error(f"--base goes with --quick, -k and --fail-slower alone, got {' '.join(arguments)}")
        from benchmarks import base

        return base.main(options.base, quick=options.quick, pattern=options.k, fail_slower=options.fail_slower)
    if options.fail_slower is not None:
        parser.error("--fail-slower needs --base REF: against the committed results there is --check-regressions")
    if options.quick and (options.check_targets or options.check_regressions):
        parser.error("--check-targets and --check-regressions need the full sizes: leave out --quick")
    return measure(options, of_pytest)


def measure(options: argparse.Namespace, of_pytest: list[str]) -> int:
    """All cases -> their table and result files -> figures -> beside the committed results."""
    passed = ["--quick"] * options.quick + ["--check-targets"] * options.check_targets
    passed += ["-k", options.k] if options.k is not None else []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as unused:
        # pytest-benchmark's own table is left out here: the closing table shows the same times next to their
        # ratios.
        quiet = ["-q", "-p", "no:cacheprovider", "--benchmark-quiet", f"--benchmark-storage=file://{unused}"]
        status = pytest.main([str(FOLDER), f"--rootdir={FOLDER.parent}", *quiet, *passed, *of_pytest])
    if options.quick or status != pytest.ExitCode.OK:
        return int(status)
    from benchmarks import guard, plot
    from benchmarks.harness import RESULTS, device_slug

    folder = RESULTS / device_slug()
    if not folder.is_dir():
        print("no result was written: the machine was too busy, or no ceiling could be measured")
        return 1 if options.check_regressions else 0
    plot.main([])
    report = guard.check(folder)
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes")
    return 1 if options.check_regressions and report is not None and report.regressions else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
