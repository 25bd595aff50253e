"""Draws the curves of benchmarks/test_scaling.py."""

from __future__ import annotations

import textwrap
from pathlib import Path

from benchmarks.harness import is_ceiling

TICKS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)  # of the ceiling


def draw_scaling(results: list[dict], path: Path) -> Path | None:
    """A panel a curve: of the time of each candidate, the share in which the stream moves what ours has to move.

    The ceiling is 1 and, unlike bytes a second, a candidate that moves more for the same work is lower. Medians, with
    bands from p20 to p80; the lines of a panel were timed in alternation. A hollow point is of a peer that cannot be
    told from ours there.

    Args:
        results: of one machine; those without "curve" are left out.
        path: of an SVG or PNG.

    Returns:
        `path`, or None where there is no curve to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from benchmarks.plot import FASTER, FRACTION, SLOWER, commits_of, dates_of  # here: plot.py draws with this module

    curves = [result for result in results if "curve" in result]
    if not curves:
        return None
    colours = {}  # of a candidate in every panel: ours is blue, the others in the order in which they appear
    for result in curves:
        for name in result["candidates"]:
            if not is_ceiling(name) and name != result["baseline"]:
                colours.setdefault(name, len(colours))
    palette = (SLOWER, FRACTION, "#d99a2b", "#7a5c99", "#6b6b6b")
    colours = {name: palette[i % len(palette)] for name, i in colours.items()}

    plt.rcParams.update({"svg.hashsalt": "fused_clip_adam", "font.size": 9})  # the same file from the same results
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.4 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, result in zip(panels.flat, curves):
        _draw_curve(axes, result, {**colours, result["baseline"]: FASTER})
    for axes in panels.flat[len(curves) :]:
        axes.set_axis_off()
    panels.flat[0].set_ylim(lowest_of(curves), 2)  # of all: they share the axis
    for axes in panels[:, 0]:
        axes.set_ylabel("speed of the same work,\nof the stream's (ceiling)")
    named = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            named.setdefault(label, handle)
    named = dict(sorted(named.items(), key=lambda item: (is_ceiling(item[0]), item[0] != curves[0]["baseline"])))
    if len(curves) < panels.size:
        panels.flat[len(curves)].legend(named.values(), named.keys(), loc="center left", frameon=False)
    else:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)
    machine = max((result["machine"] for result in curves), key=lambda machine: machine["date"])
    figure.suptitle(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit {commits_of(curves)}, "
        f"{dates_of(curves)}\nhollow: no difference to ours to be told",
        fontsize=9,
    )
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return path


def lowest_of(curves: list[dict]) -> float:
    """The floor of the axis: the highest of the ticks that every point and every band is above."""
    points = [point for result in curves for point in result["points"] if point["ceiling"] is not None]
    rows = [row for point in points for name, row in point["candidates"].items() if not is_ceiling(name)]
    least = min((row["work_of_ceiling"]["p20"] for row in rows), default=1.0)
    return max((tick for tick in TICKS if tick < least), default=least / 2)


def _draw_curve(axes, result: dict, colours: dict[str, str]) -> None:
    from benchmarks.plot import verdict_on  # as above

    points = [point for point in result["points"] if point["ceiling"] is not None]
    sizes = [point["x"] for point in points]
    for name in sorted(result["candidates"], key=lambda name: name == result["baseline"]):  # ours over the others
        if is_ceiling(name):
            continue
        low, middle, high = (
            [point["candidates"][name]["work_of_ceiling"][key] for point in points] for key in ("p20", "p50", "p80")
        )
        verdicts = [verdict_on(point["candidates"][name]["over_ours"]) for point in points]
        told = [name == result["baseline"] or verdict != "no difference" for verdict in verdicts]
        axes.plot(sizes, middle, linewidth=1.6, color=colours[name], label=name)
        axes.scatter(sizes, middle, s=12, color=colours[name], zorder=3)
        alike = [(x, y) for x, y, one in zip(sizes, middle, told) if not one]  # over ours, which they lie on
        if alike:
            axes.scatter(*zip(*alike), s=26, facecolors="white", edgecolors=colours[name], zorder=4)
        axes.fill_between(sizes, low, high, color=colours[name], alpha=0.2, linewidth=0)
    axes.axhline(1, color="black", linewidth=0.9, linestyle=":", label="stream (ceiling)")
    if points:
        rate = points[-1]["ceiling"]["gigabytes_per_second"]
        axes.annotate(
            f"{rate:.0f} GB/s at the last point",
            (sizes[-1], 1),
            (0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=7,
        )
    axes.set_xscale("log", base=10 if sizes and sizes[-1] >= 1000 else 2)
    axes.set(yscale="log", xlabel=result["x"])
    axes.set_yticks(TICKS, [f"{tick:.0%}" if tick >= 0.01 else f"{tick * 100:g}%" for tick in TICKS])
    axes.minorticks_off()
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_title(textwrap.fill(result["curve"], 46, break_on_hyphens=False), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
