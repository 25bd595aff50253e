"""What the runs say: every method's paired differences from AdamW, by task."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from benchmarks.overshoot.loop import Record
from benchmarks.overshoot.methods import METHODS
from benchmarks.overshoot.study import PLAIN, STEP, Key, Plan, Runs, best_exponent, protocol
from benchmarks.overshoot.tasks import TASKS

LEVEL = 0.05
COMPARED = ("auc", "final", "held_out", "overshoot", "kl", "clipped")
MEANS = (*COMPARED, "steps")
DECAY = "lr decay"
CONTROLLED = ("align",)
"""Methods that are compared with their controls, too."""


class Paired(NamedTuple):
    """Differences of pairs: mean, standard error, 95% interval, p of a two-sided t-test.

    Pairs of which one is not finite do not count, which `n` shows; of fewer than two, all but `n` is NaN, and p is 1.
    Where all differences are equal, p is 1 if they are 0, else 0.
    """

    mean: float
    se: float
    low: float
    high: float
    p: float
    n: int

    @classmethod
    def of(cls, ours: list[float], theirs: list[float]) -> Paired:
        differences = [d for a, b in zip(ours, theirs, strict=True) if math.isfinite(d := a - b)]
        n = len(differences)
        if n < 2:
            return cls(*[math.nan] * 4, 1.0, n)
        mean, se = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n)
        if se == 0.0:
            return cls(mean, 0.0, mean, mean, float(mean == 0.0), n)
        half = t_quantile(0.975, n - 1) * se
        return cls(mean, se, mean - half, mean + half, 2 * t_tail(abs(mean) / se, n - 1), n)


def t_tail(t: float, df: int) -> float:
    """P(T > t) for t >= 0, of Student's distribution."""
    import mpmath  # torch brings it

    return float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True)) / 2


def t_quantile(probability: float, df: int) -> float:
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 1 - probability else (low, middle)
    return low


def holm(p: list[float]) -> list[float]:
    """Holm's adjustment: what each p is worth among all of them."""
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        worst = max(worst, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = worst
    return adjusted


def summarize(runs: Runs, plan: Plan) -> dict:
    """Per task: AdamW's means, and every other method's paired differences from it.

    Raises:
        SystemExit: runs are missing.
    """
    try:
        tasks = {task: _task(runs, plan, task) for task in plan.tasks}
    except KeyError as missing:
        raise SystemExit(
            f"the study is not complete, {missing.args[0]} is missing: python -m benchmarks.overshoot"
        ) from None
    return {
        "machine": runs.machine(),
        "protocol": protocol(),
        "runs": len(runs.records),
        "cpu_hours": round(sum(record.cpu_s for record in runs.records.values()) / 3600, 2),
        "level": LEVEL,
        "tasks": tasks,
    }


def _task(runs: Runs, plan: Plan, task: str) -> dict:
    def read(key: Key) -> Record:
        return runs.records[key]

    plain = best_exponent(task, PLAIN, plan, 0, read)

    def records(method: str, exponent: int) -> list[Record]:
        return [read(Key(task, method, exponent, seed)) for seed in plan.held_out_seeds(task)]

    baseline = records(PLAIN, plain)
    rows, own = [], {}
    for method in plan.methods:
        exponent = best_exponent(task, method, plan, plain, read)
        own[method] = records(method, exponent)
        row = {
            "method": method,
            "group": METHODS[method].group,
            "lr": _lr(task, exponent),
            "bracketed": abs(exponent) < plan.reach,
            "means": _means(own[method]),
            "search": _search(runs, plan, task, method),
            "failed": sum(r.failed for key, r in runs.records.items() if (key.task, key.method) == (task, method)),
        }
        if method != PLAIN:
            row["own_lr"] = _differences(own[method], baseline)
            row["adamw_lr"] = _differences(records(method, plain), baseline)
        rows.append(row)
    for row in rows:
        if DECAY in own and row["method"] != DECAY:
            row["auc_minus_lr_decay"] = _differences(own[row["method"]], own[DECAY])["auc"]
    others = [row for row in rows if row["method"] != PLAIN]
    for row, p in zip(others, holm([row["own_lr"]["auc"]["p"] for row in others])):
        row["p_holm"] = p
        gain = row["own_lr"]["auc"]["mean"]
        row["verdict"] = "not shown" if p >= LEVEL else "better" if gain > 0 else "worse"
    controls = [
        {
            "method": method,
            "control": name,
            "own_lr": _differences(own[method], own[name]),
            "adamw_lr": _differences(records(method, plain), records(name, plain)),
        }
        for method in CONTROLLED
        for name in plan.methods
        if METHODS[name].controls == method and method in plan.methods
    ]
    hot = []
    for factor in plan.hot:
        for method in [name for name in plan.hot_methods if name in plan.methods]:
            here = records(method, plain + factor)
            row = {"method": method, "times_best_lr": STEP**factor, "means": _means(here)}
            if method != PLAIN:
                row["same_lr"] = _differences(here, records(PLAIN, plain + factor))
            hot.append(row)
    # What a difference as uncertain as most has to be, to be called one where it is the largest of all.
    errors = [row["own_lr"]["auc"]["se"] for row in others]
    seeds = len(plan.held_out_seeds(task))
    detectable = t_quantile(1 - LEVEL / 2 / max(1, len(others)), seeds - 1) * (
        statistics.median(errors) if errors else 0
    )
    return {
        "batches": max(2, TASKS[task].setting.rollouts // plan.shorten),
        "tuning_seeds": len(plan.tuning_seeds(task)),
        "seeds": seeds,
        "detectable": detectable,
        "methods": rows,
        "controls": controls,
        "hot": hot,
    }


def _lr(task: str, exponent: int) -> float:
    return TASKS[task].setting.lr * STEP**exponent


def _search(runs: Runs, plan: Plan, task: str, method: str) -> list[dict]:
    """What the search for a learning rate saw: means over the tuning seeds at every learning rate it tried."""
    seen = sorted(
        {key.exponent for key in runs.records if key[:2] == (task, method) and key.seed in plan.tuning_seeds(task)}
    )
    found = []
    for exponent in seen:
        at = [runs.records[Key(task, method, exponent, seed)] for seed in plan.tuning_seeds(task)]
        found.append({"lr": _lr(task, exponent), **{name: _mean(at, name) for name in COMPARED}})
    return found


def _mean(records: list[Record], name: str) -> float:
    """Over the runs in which it is finite."""
    values = [value for record in records if math.isfinite(value := getattr(record, name))]
    return statistics.fmean(values) if values else math.nan


def _means(records: list[Record]) -> dict:
    kept = [record.kept for record in records if record.kept is not None]
    curve = [statistics.fmean(points) for points in zip(*(record.curve for record in records))]
    means = {name: _mean(records, name) for name in MEANS}
    return {**means, "kept": statistics.fmean(kept) if kept else None, "curve": curve}


def _differences(ours: list[Record], theirs: list[Record]) -> dict:
    def column(records: list[Record], name: str) -> list[float]:
        return [getattr(record, name) for record in records]

    return {name: Paired.of(column(ours, name), column(theirs, name))._asdict() for name in COMPARED}
