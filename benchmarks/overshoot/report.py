"""The study's report: what follows from the summary by the registered rules: page, figures, advice in README.

`python -m benchmarks.overshoot.report` makes all of them again from the committed `runs.jsonl`.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
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
    """What README and documentation say of the corrections: what follows from the summary, a paragraph and a list."""
    tasks = summary["tasks"]
    seeds = sorted({task["seeds"] for task in tasks.values()})
    chosen = recommended(summary)
    text = [
        f"The default is plain AdamW. A [study]({link}), registered before it was run, compares every correction with "
        f"it "
        f"on {_count(tasks)} ({', '.join(tasks)}), each at its own best learning rate, over "
        f"{' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} held-out seeds, by how fast a policy learned: "
        f"the "
        "area under the learning curve.",
        f"Faster on at least two tasks and slower on none: {', '.join(map(_code, chosen))}."
        if chosen
        else "No correction was faster on at least two tasks and slower on none, so that none is recommended.",
        _decay_sentence(summary),
        _sentence_of(summary, "correction", "better", "Faster", but=chosen),
        _sentence_of(summary, "correction", "worse", "Slower"),
        _sentence_of(summary, "known", "better", "Of what one would try anyway, faster"),
        _sentence_of(summary, "known", "worse", "Of what one would try anyway, slower"),
        *(
            f"On {name} nothing below {task['detectable']:.2g} could have been told, where AdamW has "
            f"{_plain(task)['means']['auc']:.2g}."
            for name, task in tasks.items()
            if _is_blunt(task)
        ),
        *_align_sentences(tasks),
        _hottest_sentence(tasks),
        "Nothing here has been shown on a large language model.",
    ]
    first, second, *rest = [sentence for sentence in text if sentence]
    return "\n".join([f"{first} {second}", "", *(f"- {sentence}" for sentence in rest)])


def _align_sentences(tasks: dict) -> list[str]:
    """What `align` does at AdamW's learning rate, and whether that is alignment."""
    at_adamws = {
        name: row["adamw_lr"] for name, task in tasks.items() for row in task["methods"] if row["method"] == "align"
    }
    both = {name: found for name, task in tasks.items() if (found := specific(task)) is not None}
    if not at_adamws or not both:
        return []
    less = [name for name, spread in at_adamws.items() if spread["overshoot"]["high"] < 0]
    slower = [name for name, spread in at_adamws.items() if spread["auc"]["high"] < 0]
    return [
        f"At AdamW's learning rate `align` overshot less on {_of(less, at_adamws)} and learned more slowly on "
        f"{_of(slower, at_adamws)}, as a smaller learning rate does.",
        "Against a random gate that keeps as much of the momentum, and momentum merely scaled by that much, it learned "
        f"faster on {_of([name for name, found in both.items() if found[0]], both)} and overshot less on "
        f"{_of([name for name, found in both.items() if found[1]], both)}.",
    ]


def _hottest_sentence(tasks: dict) -> str:
    """What beat AdamW at the highest learning rate at which both were measured."""
    times = max((row["times_best_lr"] for task in tasks.values() for row in task["hot"]), default=0.0)
    faster: dict[str, list[str]] = {}
    for name, task in tasks.items():
        for row in task["hot"]:
            if row["times_best_lr"] == times and row.get("same_lr", {}).get("auc", {}).get("low", 0.0) > 0:
                faster.setdefault(row["method"], []).append(name)
    by_place: dict[tuple[str, ...], list[str]] = {}
    for method, where in faster.items():
        by_place.setdefault(tuple(where), []).append(method)
    parts = [f"{', '.join(map(_code, methods))} on {', '.join(where)}" for where, methods in by_place.items()]
    lead = f"At {times:g} times AdamW's best learning rate, faster than AdamW there"
    return f"{lead}: {'; '.join(parts)}." if parts else ""


def _plain(task: dict) -> dict:
    return next(row for row in task["methods"] if row["method"] == PLAIN)


def _is_blunt(task: dict) -> bool:
    """Whether only a difference of a tenth of AdamW's own area, or more, would have been called one."""
    return task["detectable"] > 0.1 * _plain(task)["means"]["auc"]


def _count(tasks: dict) -> str:
    return f"{len(tasks)} small task{'s' if len(tasks) != 1 else ''}"


def _sentence_of(summary: dict, group: str, verdict: str, lead: str, but: Sequence[str] = ()) -> str:
    found = {}
    for name, verdicts in _verdicts(summary, group).items():
        where = [task for task, own in zip(summary["tasks"], verdicts) if own == verdict]
        if where and name not in but:
            found.setdefault(tuple(where), []).append(name)
    parts = [f"{', '.join(map(_code, names))} on {', '.join(where)}" for where, names in found.items()]
    return f"{lead}: {'; '.join(parts)}." if parts else ""


def _of(names: list[str], among: dict) -> str:
    which = f" ({', '.join(names)})" if names else ""
    return f"{len(names)} of {len(among)} task{'s' if len(among) != 1 else ''}{which}"


def _code(name: str) -> str:
    return f"`{name}`"


# ---------------------------------------------------------------- the page

GENERATED_START = "<!-- study: python -m benchmarks.overshoot.report writes this"
GENERATED_END = "<!-- end of study -->"


def page(summary: dict, overlap: dict | None = None) -> str:
    """docs/overshoot_study.md. `overlap`: what gate_overlap.py measured."""
    machine = summary["machine"]
    parts = [
        "# What the corrections do: a study",
        f"{GENERATED_START} -->",
        f"*{summary['runs']:,} runs, {summary['cpu_hours']:.1f} hours of one CPU core ({machine['cpu']}, torch "
        f"{machine['torch']}), {machine['date']}, commit {machine['commit']}. `make study` takes them, from where it "
        f"was "
        "left; `make study-quick` is a trial in under five minutes; `python -m benchmarks.overshoot.report` makes this "
        "page and its figures from the committed runs.*",
        "Question, tasks, methods, procedure and rules of judgement were "
        "[committed before the first run](../benchmarks/overshoot/PREREGISTRATION.md), with what was found since at "
        "its "
        "end. No method, task or run is left out.",
        "## What follows",
        advice(summary, "../benchmarks/overshoot/PREREGISTRATION.md"),
        "Slower and faster are of the learning curve; the policies that result may be ordered otherwise (`held-out` "
        "in the "
        "[tables](#tables)). The verdicts' chance of one false alarm is "
        f"{summary['level']:.0%} for each task, and so larger for all of them.",
        "![learning and overshoot, minus AdamW's, by method and task](figures/overshoot_study.svg)",
        "## Overshoot against learning",
        "A smaller learning rate overshoots less, too. A method that limits overshoot better than that lies above and "
        "to "
        "the left of AdamW's line; means over the tuning seeds, at every learning rate that the searches tried.",
        "![area under the learning curve over overshoot, a line a method](figures/overshoot_study_frontier.svg)",
        "## Is it alignment?",
        "`random gate` deals the gate that `align` would have set out to the blocks at random; `scaled momentum` "
        "multiplies "
        "all of the momentum by the share that `align` would keep. `align` minus its control, mean and 95% interval: "
        "learning with each at its own best learning rate, overshoot at AdamW's.",
        _control_table(summary),
        _overlap_sentence(overlap) if overlap else "",
        "## At multiples of AdamW's best learning rate",
        "AdamW's own means, and the others' differences from it at the same learning rate.",
        "![differences from AdamW at higher learning rates](figures/overshoot_study_hot.svg)",
        _hot_table(summary),
        "## Tables",
        "`auc`: mean reward while learning, 0 to 1. Differences are the method's minus AdamW's, paired by seed, with "
        "95% "
        "intervals; p is of a paired t-test of `auc`, Holm-adjusted over the methods of the task; below "
        f"{summary['level']:g} it is a verdict. Overshoot in nats per token, after the last epoch on a batch. (edge): "
        f"the "
        "best learning rate has no neighbour beyond it. The remaining quantities, AdamW's learning rate included, are "
        "in "
        "[summary.json](../benchmarks/results/overshoot/summary.json), every run in "
        "[runs.jsonl](../benchmarks/results/overshoot/runs.jsonl).",
        *(_task_section(name, task) for name, task in summary["tasks"].items()),
        "## Limits",
        "Small tasks, one of them with text and none with a pretrained model; one clip range and one number of epochs "
        "a "
        "task; learning rates in steps of two; options of the rules not tuned, nor the bound of `KL stop`, which is "
        "tight: "
        "see its steps. The intervals are over held-out seeds at the chosen learning rate and do not contain the "
        "choice, "
        "which on a noisy task is itself noise. A difference that is not shown may be there and be smaller than what "
        "the "
        "task can tell. Overshoot at a method's own best learning rate depends on that learning rate, and at AdamW's a "
        "method that shrinks updates looks better than it is: compare along the curves. On cartpole the reward is of "
        "the "
        "episodes that ended in a batch, and the clip hardly acts; the critic keeps its learning rate under `lr "
        "decay`, and "
        "stops with the policy under `KL stop`.",
        GENERATED_END,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _overlap_sentence(overlap: dict) -> str:
    """How much of align's gate the random gate leaves in place."""
    parts = [
        f"{found['same_gate']:.0%} of the steps on {task}, where {found['elements_that_differ']:.0%} of the elements "
        f"differ"
        for task, found in overlap["tasks"].items()
    ]
    return (
        "Where few blocks are gated, or a block is the only one of its length, the random gate is largely `align`'s "
        "own: "
        f"the same in {'; '.join(parts)} on average. The comparison with `scaled momentum` has no such overlap."
    )


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
    plain = _plain(task)
    lines = [
        f"### {name}",
        "",
        f"{task['batches']} batches of rollouts, {task['seeds']} held-out seeds; learning rates chosen with "
        f"{task['tuning_seeds']} others. AdamW: lr {plain['lr']:.2g}{_edge(plain)}, "
        + ", ".join(f"{quantity.replace('_', '-')} {plain['means'][quantity]:.3f}" for quantity in COMPARED)
        + f", {plain['means']['steps']:.0f} steps. The smallest difference of `auc` that a method as uncertain as most "
        f"could be told by: {task['detectable']:.4f}.",
        "",
        "| method | best lr | auc | p | verdict | auc - lr decay's | held-out | overshoot | overshoot at AdamW's lr | "
        "steps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in task["methods"]:
        if "own_lr" not in row:
            continue
        own, decayed = row["own_lr"], row.get("auc_minus_lr_decay")
        cells = [row["method"], f"{row['lr']:.2g}{_edge(row)}", _signed(own["auc"])]
        cells += [f"{row['p_holm']:.3f}", row["verdict"], "" if decayed is None else _signed(decayed)]
        cells += [_signed(own["held_out"]), _signed(own["overshoot"]), _signed(row["adamw_lr"]["overshoot"])]
        lines.append(f"| {' | '.join([*cells, format(row['means']['steps'], '.0f')])} |")
    failed = [f"{row['method']} {row['failed']}" for row in task["methods"] if row["failed"]]
    if failed:
        lines += ["", f"Runs whose weights ceased to be finite: {', '.join(failed)}."]
    return "\n".join(lines)


def _edge(row: dict) -> str:
    return "" if row["bracketed"] else " (edge)"


def _control_table(summary: dict) -> str:
    lines = ["| task | control | auc | overshoot |", "|---|---|---|---|"]
    for name, task in summary["tasks"].items():
        for row in task["controls"]:
            own, same = row["own_lr"]["auc"], row["adamw_lr"]["overshoot"]
            lines.append(f"| {name} | {row['control']} | {_signed(own)} | {_signed(same)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _hot_table(summary: dict) -> str:
    lines = ["| task | lr / AdamW's best | method | auc | held-out | overshoot |", "|---|---|---|---|---|---|"]
    for name, task in summary["tasks"].items():
        for row in task["hot"]:
            cells = [name, f"{row['times_best_lr']:g}", row["method"]]
            for quantity in ("auc", "held_out", "overshoot"):
                same = row.get("same_lr")
                cells.append(f"{row['means'][quantity]:.4f}" if same is None else _signed(same[quantity]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _signed(spread: dict) -> str:
    if spread["n"] < 2:
        return "not finite"
    return f"{spread['mean']:+.4f} ({spread['low']:+.4f} to {spread['high']:+.4f})"


def check_readme() -> None:
    """Raises:
    SystemExit: the README has no place for the advice.
    """
    text = (ROOT / "README.md").read_text()
    if text.count(GENERATED_START) != 1 or GENERATED_END not in text.split(GENERATED_START)[1]:
        raise SystemExit(f"README.md needs the lines {GENERATED_START} --> and {GENERATED_END}, once, in this order")


def readme_with(text: str, summary: dict) -> str:
    """The README's text with the study's advice between its markers."""
    head, rest = text.split(GENERATED_START)
    marker, rest = rest.split("\n", 1)
    tail = rest.split(GENERATED_END)[1]
    lines = [
        textwrap.fill(line, 120, subsequent_indent="  " * line.startswith("-"), break_on_hyphens=False)
        for line in advice(summary).split("\n")
    ]
    return "\n".join([f"{head}{GENERATED_START}{marker}", *lines, f"{GENERATED_END}{tail}"])


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


def write(runs: Runs, plan: Plan, folder: Path, published: bool) -> dict:
    """`summary.json` and figures in the folder; `published`: figures and page in docs/, the advice in the README."""
    if published:
        check_readme()
    summary = summarize(runs, plan)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    where = FIGURES if published else folder
    figures.draw_differences(summary, where / "overshoot_study.svg")
    figures.draw_frontier(summary, where / "overshoot_study_frontier.svg")
    figures.draw_hot(summary, where / "overshoot_study_hot.svg")
    print(terminal_table(summary))
    if published:
        PAGE.write_text(page(summary, read_overlap()))
        readme = ROOT / "README.md"
        readme.write_text(readme_with(readme.read_text(), summary))
        print(f"\n{textwrap.indent(advice(summary), '  ')}")
    also = "docs/overshoot_study.md, its figures, the advice in README.md and " if published else ""
    print(f"\n  wrote {also}summary.json")
    return summary


def read_overlap() -> dict | None:
    """What gate_overlap.py measured; None where it has not."""
    path = FOLDER / "gate_overlap.json"
    return json.loads(path.read_text()) if path.exists() else None


def main() -> int:
    if len(sys.argv) > 1:
        raise SystemExit(f"no arguments, got {sys.argv[1:]}: it writes the page, its figures and the README's advice")
    write(Runs.read(FOLDER), Plan(), FOLDER, published=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
