"""`python -m benchmarks.overshoot`: the study, from where it was left. `--quick`: does everything run? In 5 minutes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.overshoot import report
from benchmarks.overshoot.methods import METHODS
from benchmarks.overshoot.study import FILES, FOLDER, PLAIN, QUICK, Plan, default_jobs, run_all
from benchmarks.overshoot.tasks import TASKS


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overshoot", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four methods, short runs, two seeds: does it run?")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="by default language, cartpole and bandit")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="by default all; AdamW always takes part")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes, each with one thread")
    parser.add_argument("--output", type=Path, help="folder of the runs; not for a part of the study: the results'")
    parser.add_argument(
        "--fresh", action="store_true", help="delete the folder's runs first, instead of going on from them"
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    plan = QUICK if options.quick else Plan()
    if options.tasks:
        plan = replace(plan, tasks=tuple(task for task in TASKS if task in options.tasks))
    if options.methods:
        plan = replace(plan, methods=tuple(name for name in METHODS if name in (PLAIN, *options.methods)))
    whole = plan == Plan()
    if options.output is None:
        options.output = FOLDER if whole else ROOT / "build" / "overshoot" / ("quick" if options.quick else "part")
    options.output = options.output.resolve()
    if options.output == FOLDER and not whole:
        parser.error("--output: the folder of the results takes the whole study only")
    return options, plan


def main(arguments: list[str] | None = None) -> int:
    options, plan = parse(arguments)
    published = options.output == FOLDER
    if published:
        report.check_readme()  # before an hour of runs, not after
    if options.fresh:
        for name in FILES:
            (options.output / name).unlink(missing_ok=True)
    runs = run_all(plan, options.output, options.jobs, lambda text: print(f"  {text}", flush=True))
    report.write(runs, plan, options.output, published)
    return 0


if __name__ == "__main__":
    sys.exit(main())
