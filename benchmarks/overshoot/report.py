"""The study's report: what follows from the summary by the registered rules: page, figures, advice in README.

`python -m benchmarks.overshoot.report` makes all of them again from the committed `runs.jsonl`.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.overshoot import figures
from benchmarks.overshoot.study import FOLDER, PLAIN, Plan, Runs
from benchmarks.overshoot.summary import COMPARED, summarize

PAGE = ROOT / "docs" / "overshoot_study.md"
FIGURES = ROOT / "docs" / "figures"


def recommended(summary: dict, group: str = "correction") -> list[str]:
    """Methods that are better than AdamW on at least two tasks and worse on none."""
    verdicts = _verdicts(summary, group)
    return [name for name, found in verdicts.items() if found.count("better") >= 2 and "worse" not in found]


def _verdicts(summary: dict, group: str) -> dict[str, list[str]]:
    """Method -> its verdict on every task, in the order of the tasks."""
    found: dict[str, list[str]] = {}
    for task in summary["tasks"].values():
        for row in task["methods"]:
            if row["group"] == group:
                found.setdefault(row["method"], []).append(row["verdict"])
    return found


def specific(task: dict, method: str = "align") -> tuple[bool, bool] | None:
    """Whether a method's learning, and its overshoot, are better than those of all its controls; None: no controls."""
    controls = [row for row in task["controls"] if row["method"] == method]
    if not controls:
        return None
    learning = all(row["own_lr"]["auc"]["low"] > 0 for row in controls)
    overshoot = all(row["adamw_lr"]["overshoot"]["high"] < 0 for row in controls)
    return learning, overshoot


def advice(summary: dict, link: str = "docs/overshoot_study.md") -> str:
    """What README and documentation say of the corrections: sentences that follow from the summary."""
    tasks = list(summary["tasks"])
    count = len(tasks)
    seeds = sorted({task["seeds"] for task in summary["tasks"].values()})
    text = [
        f"The default is plain AdamW. A [study]({link}), registered before it was run, compares every correction "
        f"with it on {count} small tasks ({', '.join(tasks)}), each at its own best learning rate, over {seeds[0]} to "
        f"{seeds[-1]} held-out seeds, by the area under the learning curve."
    ]
    chosen = recommended(summary)
    if chosen:
        text.append(f"Better on at least two tasks and worse on none: {', '.join(map(_code, chosen))}.")
    else:
        text.append("No correction was better on two of them, so that none is recommended.")
    text.append(_sentence_of(summary, "correction", "better", "Better", but=chosen))
    text.append(_sentence_of(summary, "correction", "worse", "Worse", but=[]))
    text.append(_sentence_of(summary, "known", "better", "Better, of what one would try anyway"))
    text.append(_sentence_of(summary, "known", "worse", "Worse, of what one would try anyway"))
    shown = {name: specific(task) for name, task in summary["tasks"].items()}
    shown = {name: both for name, both in shown.items() if both is not None}
    if shown:
        learning = [name for name, both in shown.items() if both[0]]
        overshoot = [name for name, both in shown.items() if both[1]]
        text.append(
            "Against a random gate that keeps as much of the momentum, and momentum merely scaled by that much, "
            f"`align` learned faster on {_of(learning, shown)} and overshot less on {_of(overshoot, shown)}."
        )
    text.append("Nothing here has been shown on a large language model.")
    return " ".join(sentence for sentence in text if sentence)


def _sentence_of(summary: dict, group: str, verdict: str, lead: str, but: list[str] = ()) -> str:
    found = {}
    for name, verdicts in _verdicts(summary, group).items():
        where = [task for task, own in zip(summary["tasks"], verdicts) if own == verdict]
        if where and name not in but:
            found.setdefault(tuple(where), []).append(name)
    parts = [f"{', '.join(map(_code, names))} on {', '.join(where)}" for where, names in found.items()]
    return f"{lead}: {'; '.join(parts)}." if parts else ""


def _of(names: list[str], among: dict) -> str:
    return f"{len(names)} of {len(among)} tasks" + (f" ({', '.join(names)})" if names else "")


def _code(name: str) -> str:
    return f"`{name}`"


# ---------------------------------------------------------------- the page

GENERATED_START = "<!-- study: python -m benchmarks.overshoot.report writes this"
GENERATED_END = "<!-- end of study -->"


def page(summary: dict) -> str:
    """docs/overshoot_study.md: what follows, figures, a table a task, controls, hot learning rates, limits."""
    machine = summary["machine"]
    parts = [
        "# What the corrections do: a study",
        f"{GENERATED_START} -->",
        f"*{summary['runs']:,} runs, {summary['cpu_hours']:.1f} hours of one CPU core ({machine['cpu']}, torch "
        f"{machine['torch']}), {machine['date']}, commit {machine['commit']}. `make study` runs it again, from where "
        "it was left; `make study-quick` is a trial in under five minutes; `python -m benchmarks.overshoot.report` "
        "makes this page and its figures from the committed runs.*",
        "Question, tasks, methods, procedure and rules of judgement were "
        "[committed before the first run](../benchmarks/overshoot/PREREGISTRATION.md). "
        "Negative results are results: nothing is left out.",
        "## What follows",
        advice(summary, "#tables"),
        _decay_sentence(summary),
        "![learning and overshoot, minus AdamW's, by method and task](figures/overshoot_study.svg)",
        "## Is it alignment?",
        "`random gate` keeps as many blocks of momentum as `align` would, but others; `scaled momentum` multiplies all "
        "of it by the share that `align` would keep. `align` minus its control, mean and 95% interval: learning with "
        "each at its own best learning rate, overshoot at AdamW's.",
        _control_table(summary),
        "## When the learning rate is too high",
        "Differences from AdamW at the same learning rate, which is a multiple of AdamW's best.",
        "![differences from AdamW at higher learning rates](figures/overshoot_study_hot.svg)",
        _hot_table(summary),
        "## Tables",
        "`auc`: mean reward while learning. Differences are the method's minus AdamW's, paired by seed, with 95% "
        "intervals; p is of a paired t-test of `auc`, Holm-adjusted over the methods of the task; below "
        f"{summary['level']:g} it is a verdict. Overshoot and KL in nats per token, after the last epoch on a batch.",
        *(_task_section(name, task) for name, task in summary["tasks"].items()),
        "## Limits",
        "Small tasks, one of them with text and none with a pretrained model; one clip range and one number of epochs "
        "a task; constant learning rates unless the method decays them, in steps of two; options of the rules not "
        "tuned. A difference that is not shown may be there and small. Overshoot at a method's own best learning rate "
        "is confounded with that learning rate: compare it at AdamW's.",
        GENERATED_END,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _decay_sentence(summary: dict) -> str:
    """How the recommended corrections compare with a decaying learning rate."""
    parts = []
    for name in recommended(summary):
        for task, found in summary["tasks"].items():
            row = next(row for row in found["methods"] if row["method"] == name)
            if "auc_minus_lr_decay" in row:
                parts.append(f"`{name}` {_signed(row['auc_minus_lr_decay'])} on {task}")
    return f"Minus `lr decay`: {'; '.join(parts)}." if parts else ""


def _task_section(name: str, task: dict) -> str:
    plain = next(row for row in task["methods"] if row["method"] == PLAIN)
    lines = [
        f"### {name}",
        "",
        f"{task['batches']} batches of rollouts, {task['seeds']} held-out seeds; learning rates chosen with "
        f"{task['tuning_seeds']} others. AdamW: lr {plain['lr']:.2g}, "
        + ", ".join(f"{quantity.replace('_', '-')} {plain['means'][quantity]:.3f}" for quantity in COMPARED)
        + ".",
        "",
        "| method | best lr | auc | p | verdict | held-out | overshoot | overshoot at AdamW's lr | KL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in task["methods"]:
        if "own_lr" not in row:
            continue
        own = row["own_lr"]
        lr = f"{row['lr']:.2g}" + ("" if row["bracketed"] else " (edge)")
        cells = [row["method"], lr, _signed(own["auc"]), f"{row['p_holm']:.3f}", row["verdict"]]
        cells += [_signed(own["held_out"]), _signed(own["overshoot"]), _signed(row["adamw_lr"]["overshoot"])]
        cells += [_signed(own["kl"])]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"{row['method']} {row['failed']}" for row in task["methods"] if row["failed"]]
    if failed:
        lines += ["", f"Runs whose weights ceased to be finite: {', '.join(failed)}."]
    return "\n".join(lines)


def _control_table(summary: dict) -> str:
    lines = ["| task | control | auc | overshoot | specific |", "|---|---|---|---|---|"]
    for name, task in summary["tasks"].items():
        for row in task["controls"]:
            learning, overshoot = specific(task, row["method"])
            verdict = f"learning: {'yes' if learning else 'no'}, overshoot: {'yes' if overshoot else 'no'}"
            own, same = row["own_lr"]["auc"], row["adamw_lr"]["overshoot"]
            lines.append(f"| {name} | {row['control']} | {_signed(own)} | {_signed(same)} | {verdict} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _hot_table(summary: dict) -> str:
    lines = ["| task | lr / AdamW's best | method | auc | held-out | overshoot |", "|---|---|---|---|---|---|"]
    for name, task in summary["tasks"].items():
        for row in task["hot"]:
            same = row["same_lr"]
            cells = [name, f"{row['times_best_lr']:g}", row["method"]]
            cells += [_signed(same[quantity]) for quantity in ("auc", "held_out", "overshoot")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _signed(spread: dict) -> str:
    return f"{spread['mean']:+.4f} ({spread['low']:+.4f} to {spread['high']:+.4f})"


def readme_with(text: str, summary: dict) -> str:
    """The README's text with the study's advice between its markers."""
    head, rest = text.split(GENERATED_START)
    marker, rest = rest.split("\n", 1)
    tail = rest.split(GENERATED_END)[1]
    return f"{head}{GENERATED_START}{marker}\n{textwrap.fill(advice(summary), 120)}\n{GENERATED_END}{tail}"


def terminal_table(summary: dict) -> str:
    lines = []
    for name, task in summary["tasks"].items():
        lines.append(
            f"\n  {name + ', ' + str(task['seeds']) + ' seeds':<26}{'lr':>8}{'auc - AdamW':>13}{'95% interval':>21}"
        )
        lines[-1] += f"{'p':>7}{'overshoot':>11}"
        for row in task["methods"]:
            text = f"  {row['method']:<26}{row['lr']:>8.2g}"
            if "own_lr" in row:
                auc = row["own_lr"]["auc"]
                interval = f"{auc['low']:+.4f} to {auc['high']:+.4f}"
                text += f"{auc['mean']:>+13.4f}{interval:>21}{row['p_holm']:>7.3f}"
            else:
                text += f"{row['means']['auc']:>13.4f}{'itself':>21}{'':7}"
            text += f"{row['means']['overshoot']:>11.4f}"
            verdict = row.get("verdict", "not shown")
            lines.append(text if verdict == "not shown" else f"{text}  {verdict}")
    return "\n".join(lines)


def write(runs: Runs, plan: Plan, folder: Path, page: bool) -> dict:
    """`summary.json` and figures in the folder; of the whole study (`page`) those in docs/, page, advice."""
    summary = summarize(runs, plan)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    where = FIGURES if page else folder
    figures.draw_differences(summary, where / "overshoot_study.svg")
    figures.draw_hot(summary, where / "overshoot_study_hot.svg")
    if page:
        write_page(summary)
    print(terminal_table(summary))
    print(f"\n  {advice(summary)}\n\n  wrote {'docs/overshoot_study.md, README.md and ' if page else ''}summary.json")
    return summary


def write_page(summary: dict) -> None:
    PAGE.write_text(page(summary))
    readme = ROOT / "README.md"
    readme.write_text(readme_with(readme.read_text(), summary))


def main() -> int:
    write(Runs.read(FOLDER), Plan(), FOLDER, page=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
