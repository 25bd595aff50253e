"""Draws the newest results and writes them into the README and docs/performance-results.md.

`python -m benchmarks.plot [--png]` reads the result files of the CPU that was measured last and of every GPU ->
`overview.svg`, `throughput.svg` and, where curves were measured, `scaling.svg` beside them -> the README's block of
results and the page with all of the tables (`report.py`). Nothing is measured; the same files give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, peers_of, short_title, variants_of

STREAM_FRACTION, COPY_FRACTION = "fraction_of_stream", "fraction_of_ceiling"  # of a result on a CPU, on a GPU
FASTER, SLOWER, NO_DIFFERENCE = "#2a6f97", "#c8553d", "#9a9a9a"  # ours, beside a peer: `verdict_on`
FRACTION, CEILING_LINE = "#5b8c5a", "#444444"
LONGEST_BAR = 8.0  # unfused peers run off the scale: their bar is cut and the number tells
# The kinds of cases, by the beginning of their names, in the order that they are shown in.
KINDS = {
    "step-": "The optimizer step",
    "objective-": "Losses",
    "scores-": "Steps from scores",
    "integration": "In trainers",
}
OTHER_KIND = "Beside each other"
NAMES = {"torchao": "torchao _AdamW"}  # a private class of torchao's: its public ones keep moments of fewer bits
# Figures of a results folder: file -> what it shows.
FIGURES = {
    "overview": "ratios to peers and share of the ceiling",
    "throughput": "throughput of ours and of the peers, and the ceiling of the same run",
    "scaling": "how the comparison changes with size",
}


def newest_results(root: Path | None = None) -> tuple[Path, list[dict]]:
    """The folder of the CPU that was measured last, and its results, kind by kind."""
    results = [(path.parent, json.loads(path.read_text())) for path in sorted((root or RESULTS).glob("cpu-*/*.json"))]
    if not results:
        raise SystemExit("no results to draw: run `python -m benchmarks.run` first")
    folder = max(results, key=lambda item: item[1]["machine"]["date"])[0]
    order = [*KINDS.values(), OTHER_KIND]
    own = [result for parent, result in results if parent == folder]
    return folder, sorted(own, key=lambda result: order.index(kind_of(result)))


def gpu_results(root: Path | None = None) -> dict[Path, list[dict]]:
    """Every GPU's folder and results, in the order of the cases."""
    from benchmarks.gpu import CASES

    found: dict[Path, list[dict]] = {}
    for path in (root or RESULTS).glob("gpu-*/*.json"):
        found.setdefault(path.parent, []).append(json.loads(path.read_text()))
    order = {name: i for i, name in enumerate(CASES)}
    return {
        folder: sorted(found[folder], key=lambda result: (order.get(result["name"], len(order)), result["name"]))
        for folder in sorted(found)
    }


def kind_of(result: dict) -> str:
    """The heading that a result stands under."""
    return next((kind for start, kind in KINDS.items() if result["name"].startswith(start)), OTHER_KIND)


def compared(results: list[dict]) -> list[dict]:
    """Comparisons with peers at one size; those of rules with rules, of steps on the host and curves stand apart."""
    apart = ("rules_of", "offload", "curve")
    return [result for result in results if not any(result.get(key) for key in apart)]


def curves(results: list[dict]) -> list[dict]:
    return [result for result in results if result.get("curve")]


def fraction_key(result: dict) -> str:
    return COPY_FRACTION if "gpu" in result["machine"] else STREAM_FRACTION


def verdict_on(spread: dict) -> str:
    """What a peer's time over ours says of ours: "faster" or "slower" where all from p20 to p80 says so."""
    if spread["p20"] > 1:
        return "faster"
    return "slower" if spread["p80"] < 1 else "no difference"


def _colour(spread: dict) -> str:
    return {"faster": FASTER, "slower": SLOWER, "no difference": NO_DIFFERENCE}[verdict_on(spread)]


def shown_name(name: str, result: dict) -> str:
    """A candidate as figures name it: with what is not plain from its own name."""
    return NAMES.get(name, name) + (" (other work)" if name in result.get("other_work", {}) else "")


def dates_of(results: list[dict]) -> str:
    """The day and hour of the results, or of the first and the last of them."""
    dates = sorted({result["machine"]["date"] for result in results})
    return dates[0] if len(dates) == 1 else f"{dates[0].removesuffix(' UTC')} to {dates[-1]}"


def commits_of(results: list[dict]) -> str:
    return ", ".join(sorted({result["machine"]["commit"] for result in results}))


def draw(results: list[dict], path: Path) -> Path:
    """Left: the peers' time over ours, p20 to p80; right: the bandwidth ours reaches, of the stream's."""
    plt = _pyplot()
    rows: list[tuple[str, dict | None, str]] = []  # a heading has no data; the colour of a bar
    for result in results:
        rows.append((result["title"], None, ""))
        found = {name: result["candidates"][name] for name in (*peers_of(result), *variants_of(result))}
        own = variants_of(result)
        for name, row in sorted(found.items(), key=lambda item: item[1]["over_ours"]["p50"]):
            rows.append((shown_name(name, result), row, FRACTION if name in own else _colour(row["over_ours"])))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 0.5 + 0.22 * len(rows)), width_ratios=(2.2, 1), layout="constrained"
    )
    for y, (label, row, colour) in enumerate(rows):
        if row is None:
            left.text(0.05, y, label, va="center", fontweight="bold", fontsize=8, backgroundcolor="white")
            continue
        low, middle, high = (row["over_ours"][key] for key in ("p20", "p50", "p80"))
        length = min(middle, LONGEST_BAR)
        left.barh(y, length, color=colour, height=0.7)
        if high <= LONGEST_BAR:
            left.plot([low, high], [y, y], color="black", linewidth=1)
        end = max(length, high) if high <= LONGEST_BAR else length
        left.text(end + 0.08, y, f"{middle:.2f}x", va="center", fontsize=8)
    left.axvline(1, color="black", linewidth=0.8, linestyle=":")
    labelled = [(y, label) for y, (label, row, _) in enumerate(rows) if row is not None]
    left.set_yticks([y for y, _ in labelled], [label for _, label in labelled], fontsize=8)
    left.set(xlim=(0, LONGEST_BAR + 0.9), ylim=(len(rows) - 0.4, -0.8))
    left.set_xlabel(
        "time over ours, median of paired rounds, p20 to p80 (right of 1: ours is faster)\n"
        "(green: ours in another form, blue: slower, red: faster, grey: no difference to be told)"
    )

    fraction = fraction_key(results[0])
    fractions = [(short_title(r), r["candidates"][r["baseline"]][fraction]) for r in results]
    fractions = [(title, spread) for title, spread in fractions if spread is not None]
    for y, (_, spread) in enumerate(fractions):
        right.barh(y, spread["p50"], color=FRACTION, height=0.6)
        right.plot([spread["p20"], spread["p80"]], [y, y], color="black", linewidth=1)
        right.text(max(spread["p50"], spread["p80"]) + 0.02, y, f"{spread['p50']:.0%}", va="center", fontsize=8)
    right.set_yticks(
        range(len(fractions)),
        ["\n".join(textwrap.wrap(title, 34)) for title, _ in fractions],
        fontsize=7,
    )
    right.axvline(1, color="black", linewidth=0.8, linestyle=":")
    right.set(xlim=(0, 1.25), ylim=(len(fractions) - 0.4, -0.6))
    right.set_xlabel(f"bytes/s of ours\nover the {'copy' if fraction == COPY_FRACTION else 'stream'}'s")

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, results, path)


def draw_throughput(results: list[dict], path: Path) -> Path | None:
    """Bytes a second that ours and each peer move in every case of a step, and the ceiling of the same run.

    By its own bytes each: who has to move more for the same work may be near the ceiling and late, so that every bar
    also says its bytes an element and its time over ours. Candidates without a closed count of bytes are left out.

    Returns:
        `path`, or None where there is no case of a step.
    """
    steps = [result for result in compared(results) if kind_of(result) == KINDS["step-"]]
    if not steps:
        return None
    plt = _pyplot()
    bars: list[tuple[str, dict | None, dict]] = []  # a heading has no row
    for result in steps:
        bars.append((short_title(result), None, result))
        names = [result["baseline"], *peers_of(result), *variants_of(result)]
        rows = [(name, result["candidates"][name]) for name in names]
        counted = [(name, row, result) for name, row in rows if row["bytes"] is not None]
        bars += sorted(counted, key=lambda bar: bar[1]["seconds"]["p50"])
    longest = max(
        *(result["ceiling"]["gigabytes_per_second"] for result in steps),
        *(row["bytes"] / row["seconds"]["p20"] / 1e9 for _, row, _ in bars if row is not None),
    )
    figure, axes = plt.subplots(figsize=(10, 0.8 + 0.22 * len(bars)), layout="constrained")
    for y, (label, row, result) in enumerate(bars):
        if row is None:
            axes.text(0, y, f" {label}", va="center", fontweight="bold", fontsize=8)
            ceiling = result["ceiling"]["gigabytes_per_second"]
            until = next((i for i in range(y + 1, len(bars)) if bars[i][1] is None), len(bars))
            axes.plot([ceiling, ceiling], [y + 0.5, until - 0.5], color=CEILING_LINE, linewidth=1.4)
            axes.text(ceiling, y + 0.1, f"ceiling {ceiling:,.0f}", va="center", ha="center", fontsize=7)
            continue
        low, middle, high = (row["bytes"] / row["seconds"][key] / 1e9 for key in ("p80", "p50", "p20"))
        own = label not in peers_of(result)
        axes.barh(y, middle, color=FRACTION if own else _colour(row["over_ours"]), height=0.7)
        axes.plot([low, high], [y, y], color="black", linewidth=1)
        text = f"{row['bytes'] / result['elements']:.0f} B an element"
        text += "" if label == result["baseline"] else f", {row['over_ours']['p50']:.2f}x the time"
        inside = low > longest / 3  # so that no text lies on the line of the ceiling
        axes.text(0 if inside else high, y, f"  {text}", va="center", fontsize=8, color="white" if inside else "black")
    labelled = [(y, shown_name(label, result)) for y, (label, row, result) in enumerate(bars) if row is not None]
    axes.set_yticks([y for y, _ in labelled], [label for _, label in labelled], fontsize=8)
    axes.set(xlim=(0, 1.08 * longest), ylim=(len(bars) - 0.4, -0.8))
    axes.set_xlabel(
        "GB/s: bytes that the method moves at least over its median time, p20 to p80\n"
        "(green: ours, blue: slower, red: faster, grey: no difference to be told)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, results, path)


def draw_all(folder: Path, results: list[dict], suffix: str = ".svg") -> list[Path]:
    """Every figure that the results of a folder give; what they do not give is left out."""
    drawn = []
    if compared(results):
        drawn.append(draw(compared(results), folder / f"overview{suffix}"))
        drawn.append(draw_throughput(results, folder / f"throughput{suffix}"))
    if curves(results):
        from benchmarks.scaling_plot import draw_scaling

        drawn.append(draw_scaling(curves(results), folder / f"scaling{suffix}"))
    return [path for path in drawn if path is not None]


def figures_of(folder: Path, results: list[dict]) -> dict[str, Path]:
    """The figures that lie in a folder and that its results give: name -> file."""
    given = {"overview": compared(results), "throughput": compared(results), "scaling": curves(results)}
    found = {}
    for name in FIGURES:
        files = [folder / f"{name}{suffix}" for suffix in (".svg", ".png")]
        if given[name] and (drawn := [file for file in files if file.exists()]):
            found[name] = drawn[0]
    return found


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "fused_clip_adam", "font.size": 9})  # the same file from the same results
    return plt


def _save(figure, results: list[dict], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.suptitle("\n".join(textwrap.wrap(_caption(results), 130)), fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return path


def _caption(results: list[dict]) -> str:
    machine = max((result["machine"] for result in results), key=lambda m: m["date"])
    device = machine["gpu"] if "gpu" in machine else f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{device}, torch {machine['torch']}, "
        f"fused_clip_adam {machine['fused_clip_adam']} (commit {commits_of(results)}), {dates_of(results)}"
    )


def main(arguments: list[str]) -> None:
    from benchmarks import report

    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--png", action="store_true", help="a PNG instead of the SVG")
    suffix = ".png" if parser.parse_args(arguments).png else ".svg"
    cpu = newest_results()
    for folder, results in (cpu, *gpu_results().items()):
        drawn = draw_all(folder, results, suffix)
        print(f"{folder.name}: drew {', '.join(path.name for path in drawn) or 'nothing'}")
        if not curves(results):
            print(f"{folder.name}: no curve was measured, so that there is no scaling{suffix}")
    for written in report.write(*cpu, gpu_results()):
        print(f"wrote {written.relative_to(ROOT).as_posix()}")


if __name__ == "__main__":
    main(sys.argv[1:])
