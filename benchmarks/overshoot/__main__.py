"""`python -m benchmarks.overshoot`: the study, from where it was left. `--quick`: does everything run? In 5 minutes."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.overshoot import report
from benchmarks.overshoot.methods import METHODS
from benchmarks.overshoot.study import FOLDER, PLAIN, QUICK, Plan, default_jobs, run_all
from benchmarks.overshoot.tasks import TASKS


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overshoot", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four methods, short runs, two seeds: does it run?")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="by default language, cartpole and bandit")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="by default all; AdamW always takes part")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes, each with one thread")
    parser.add_argument("--output", type=Path, help="folder of the runs; not for a part of the study: the results'")
    parser.add_argument("--fresh", action="store_true", help="delete the folder's runs first, instead of going on")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    plan = QUICK if options.quick else Plan()
    if options.tasks:
        plan = replace(plan, tasks=tuple(options.tasks))
    if options.methods:
        plan = replace(plan, methods=(PLAIN, *(name for name in options.methods if name != PLAIN)))
    if options.output is None:
        whole = plan == Plan()
        options.output = FOLDER if whole else ROOT / "build" / "overshoot" / ("quick" if options.quick else "part")
    return options, plan


def main(arguments: list[str] | None = None) -> int:
    options, plan = parse(arguments)
    if options.fresh and options.output.exists():
        shutil.rmtree(options.output)
    runs = run_all(plan, options.output, options.jobs, lambda text: print(f"  {text}", flush=True))
    report.write(runs, plan, options.output, page=options.output == FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
