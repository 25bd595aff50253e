"""What the runs say: every method's paired differences from AdamW, by task."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from benchmarks.harness import machine_info
from benchmarks.overshoot.loop import Record
from benchmarks.overshoot.methods import METHODS
from benchmarks.overshoot.study import PLAIN, STEP, Key, Plan, Runs, best_exponent, protocol
from benchmarks.overshoot.tasks import TASKS

LEVEL = 0.05
COMPARED = ("auc", "final", "held_out", "overshoot", "kl", "clipped")
DECAY = "lr decay"
CONTROLLED = ("align",)
"""Methods that are compared with their controls, too."""


class Paired(NamedTuple):
    """Differences of pairs: mean, standard error, 95% interval, p of a two-sided t-test.

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
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        n, mean = len(differences), statistics.fmean(differences)
        se = statistics.stdev(differences) / math.sqrt(n)
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
    """Per task: AdamW's means, and every other method's paired differences from it."""
    return {
        "machine": machine_info(),
        "protocol": protocol(),
        "runs": len(runs.records),
        "cpu_hours": round(sum(record.cpu_s for record in runs.records.values()) / 3600, 2),
        "level": LEVEL,
        "tasks": {task: _task(runs, plan, task) for task in plan.tasks},
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
            "failed": sum(record.failed for record in own[method]),
        }
        if method != PLAIN:
            row["own_lr"] = _differences(own[method], baseline)
            row["adamw_lr"] = _differences(records(method, plain), baseline)
        rows.append(row)
    for row in rows:
        if DECAY in own and row["method"] != DECAY:
            row["auc_over_lr_decay"] = Paired.of(
                _column(own[row["method"]], "auc"), _column(own[DECAY], "auc")
            )._asdict()
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
    hot = [
        {
            "method": method,
            "times_best_lr": STEP**factor,
            "same_lr": _differences(records(method, plain + factor), records(PLAIN, plain + factor)),
            "means": _means(records(method, plain + factor)),
        }
        for factor in plan.hot
        for method in plan.hot_methods
        if method in plan.methods and method != PLAIN
    ]
    return {
        "batches": max(2, TASKS[task].setting.rollouts // plan.shorten),
        "tuning_seeds": len(plan.tuning_seeds(task)),
        "seeds": len(plan.held_out_seeds(task)),
        "methods": rows,
        "controls": controls,
        "hot": hot,
    }


def _lr(task: str, exponent: int) -> float:
    return TASKS[task].setting.lr * STEP**exponent


def _column(records: list[Record], name: str) -> list[float]:
    return [getattr(record, name) for record in records]


def _means(records: list[Record]) -> dict:
    means = {name: statistics.fmean(_column(records, name)) for name in COMPARED}
    kept = [record.kept for record in records if record.kept is not None]
    curve = [statistics.fmean(points) for points in zip(*(record.curve for record in records))]
    return {**means, "kept": statistics.fmean(kept) if kept else None, "curve": curve}


def _differences(ours: list[Record], theirs: list[Record]) -> dict:
    return {name: Paired.of(_column(ours, name), _column(theirs, name))._asdict() for name in COMPARED}
