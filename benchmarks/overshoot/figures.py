"""The study's figures, from its summary: differences from AdamW by method and task, and at higher learning rates."""

from __future__ import annotations

from pathlib import Path

COLOURS = {"known": "#b8860b", "control": "#8a949e", "correction": "#2a6f97"}
INK, OTHER = "#22303c", "#c8553d"
LINES = {"align": "#2a6f97", "random gate": "#8a949e", "lr decay": "#b8860b"}


def draw_differences(summary: dict, path: Path) -> Path:
    """A column a task; above the learning curve's area, below the overshoot: mean difference, 95% interval."""
    plt = _pyplot()
    tasks = summary["tasks"]
    names = [row["method"] for row in next(iter(tasks.values()))["methods"] if "own_lr" in row]
    figure, axes = plt.subplots(2, len(tasks), figsize=(4.1 * len(tasks), 10.5), layout="constrained", squeeze=False)
    for column, (task, found) in enumerate(tasks.items()):
        rows = [row for row in found["methods"] if "own_lr" in row]
        for axis, quantity in zip(axes[:, column], ("auc", "overshoot")):
            for y, row in enumerate(rows):
                colour = COLOURS[row["group"]]
                if quantity == "overshoot":
                    _interval(axis, y + 0.22, row["adamw_lr"][quantity], colour, hollow=True)
                _interval(axis, y - (0.22 if quantity == "overshoot" else 0), row["own_lr"][quantity], colour)
                if quantity == "auc" and row["verdict"] != "not shown":
                    axis.text(1.01, y, row["verdict"], transform=axis.get_yaxis_transform(), va="center", fontsize=7)
            axis.axvline(0, color=INK, linewidth=0.8, linestyle=":")
            axis.set_ylim(len(rows) - 0.5, -0.6)
            axis.set_yticks(range(len(names)), names if column == 0 else [""] * len(names), fontsize=8)
            for label, row in zip(axis.get_yticklabels(), rows):
                label.set_color(COLOURS[row["group"]])
        axes[0, column].set_title(f"{task}, {found['seeds']} seeds", loc="left", fontsize=10, fontweight="bold")
        axes[0, column].set_xlabel("area under the learning curve, minus AdamW's")
        axes[1, column].set_xlabel("overshoot (nats per token), minus AdamW's")
    handles = [plt.Line2D([], [], color=colour, marker="o", label=name) for name, colour in COLOURS.items()]
    handles += [plt.Line2D([], [], color=INK, marker="o", linestyle="", label="at its own best lr")]
    handles += [plt.Line2D([], [], color=INK, marker="o", mfc="white", linestyle="", label="at AdamW's best lr")]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return _save(plt, figure, path)


def draw_hot(summary: dict, path: Path) -> Path:
    """Differences from AdamW at the same learning rate, at AdamW's best and at multiples of it."""
    plt = _pyplot()
    tasks = summary["tasks"]
    figure, axes = plt.subplots(2, len(tasks), figsize=(3.8 * len(tasks), 5.6), layout="constrained", squeeze=False)
    for column, (task, found) in enumerate(tasks.items()):
        best = {row["method"]: row["adamw_lr"] for row in found["methods"] if "adamw_lr" in row}
        for axis, quantity in zip(axes[:, column], ("auc", "overshoot")):
            multiples = {1.0}
            for i, (name, colour) in enumerate(LINES.items()):
                if name not in best:
                    continue
                points = [(1.0, best[name][quantity])]
                points += [(h["times_best_lr"], h["same_lr"][quantity]) for h in found["hot"] if h["method"] == name]
                multiples |= {times for times, _ in points}
                x = [times * 1.03 ** (i - 1) for times, _ in points]
                bars = [[p["mean"] - p["low"] for _, p in points], [p["high"] - p["mean"] for _, p in points]]
                axis.errorbar(x, [p["mean"] for _, p in points], bars, color=colour, marker="o", capsize=2, label=name)
            axis.axhline(0, color=INK, linewidth=0.8, linestyle=":")
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted(multiples), [f"{times:g}x" for times in sorted(multiples)])
        axes[0, column].set_title(f"{task}, {found['seeds']} seeds", loc="left", fontsize=10, fontweight="bold")
        axes[1, column].set_xlabel("learning rate, of AdamW's best")
    axes[0, 0].set_ylabel("area under the learning curve,\nminus AdamW's")
    axes[1, 0].set_ylabel("overshoot (nats per token),\nminus AdamW's")
    if axes[0, 0].get_legend_handles_labels()[0]:
        axes[0, 0].legend(frameon=False, fontsize=8)
    return _save(plt, figure, path)


def draw_frontier(summary: dict, path: Path) -> Path:
    """Area under the learning curve over overshoot, both axes of each task its own; a line joins learning rates."""
    plt = _pyplot()
    tasks = summary["tasks"]
    named = {"AdamW": INK, **LINES, "scaled momentum": OTHER}
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.1 * len(tasks), 3.9), layout="constrained", squeeze=False)
    for axis, (task, found) in zip(axes[0], tasks.items()):
        for row in sorted(
            found["methods"], key=lambda row: list(named).index(row["method"]) if row["method"] in named else -1
        ):
            colour = named.get(row["method"])
            points = sorted(row["search"], key=lambda point: point["lr"])
            style = {
                "color": colour,
                "marker": "o",
                "linewidth": 1.6,
                "markersize": 4,
                "label": row["method"],
                "zorder": 3,
            }
            if colour is None:
                style = {"color": "#d5dae0", "linewidth": 0.8, "zorder": 1}
            axis.plot([point["overshoot"] for point in points], [point["auc"] for point in points], **style)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(plt.NullFormatter())
        axis.set_title(f"{task}, {found['tuning_seeds']} tuning seeds", loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel("overshoot, nats per token")
    axes[0, 0].set_ylabel("area under the learning curve")
    handles = axes[0, 0].get_legend_handles_labels()[0] + [plt.Line2D([], [], color="#d5dae0", label="all others")]
    axes[0, -1].legend(handles=handles, frameon=False, fontsize=8)
    return _save(plt, figure, path)


def _interval(axis, y: float, spread: dict, colour: str, hollow: bool = False) -> None:
    axis.plot([spread["low"], spread["high"]], [y, y], color=colour, linewidth=1.2)
    axis.plot(spread["mean"], y, "o", color=colour, mfc="white" if hollow else colour, markersize=4)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "fused_clip_adam", "font.size": 9})  # the same file from the same results
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "text.color": INK})
    return plt


def _save(plt, figure, path: Path) -> Path:
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return path
