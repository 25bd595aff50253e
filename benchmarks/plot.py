"""Draws the newest results, `python -m benchmarks.plot [--png]` -> `results/<device>/overview.svg`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.harness import BASELINE, RESULTS

# Ceilings are not competitors; the second panel shows how near ours comes to them.
CEILINGS = ("stream (ceiling)", "torch copy_")
FASTER, SLOWER, FRACTION = "#2a6f97", "#c8553d", "#5b8c5a"
LONGEST_BAR = 8.0  # unfused peers run off the scale: their bar is cut and the number tells


def newest_results() -> tuple[Path, list[dict]]:
    """The folder of the device that was measured last, and its results."""
    files = sorted(RESULTS.glob("*/*.json"))
    if not files:
        raise SystemExit("no results to draw: run `python -m benchmarks.run` first")
    results = [(path.parent, json.loads(path.read_text())) for path in files]
    folder = max(results, key=lambda item: item[1]["machine"]["date"])[0]
    return folder, [result for parent, result in results if parent == folder]


def draw(results: list[dict], path: Path) -> Path:
    """Left: the peers' time over ours, p20 to p80; right: the bandwidth ours reaches, of the stream's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "fused_clip_adam", "font.size": 9})  # the same file from the same results
    rows: list[tuple[str, dict | None]] = []  # a heading has no data
    for result in results:
        rows.append((result["title"], None))
        peers = [(k, v) for k, v in result["candidates"].items() if k not in (BASELINE, *CEILINGS)]
        rows += sorted(peers, key=lambda item: item[1]["over_ours"]["p50"])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 0.5 + 0.22 * len(rows)), width_ratios=(2.2, 1), layout="constrained"
    )
    for y, (label, row) in enumerate(rows):
        if row is None:
            left.text(0.05, y, label, va="center", fontweight="bold", fontsize=8, backgroundcolor="white")
            continue
        low, middle, high = (row["over_ours"][key] for key in ("p20", "p50", "p80"))
        length = min(middle, LONGEST_BAR)
        left.barh(y, length, color=FASTER if middle >= 1 else SLOWER, height=0.7)
        if high <= LONGEST_BAR:
            left.plot([low, high], [y, y], color="black", linewidth=1)
        left.text(max(length, min(high, LONGEST_BAR)) + 0.08, y, f"{middle:.2f}x", va="center", fontsize=8)
    left.axvline(1, color="black", linewidth=0.8, linestyle=":")
    labelled = [(y, label) for y, (label, row) in enumerate(rows) if row is not None]
    left.set_yticks([y for y, _ in labelled], [label for _, label in labelled], fontsize=8)
    left.set(xlim=(0, LONGEST_BAR + 0.9), ylim=(len(rows) - 0.4, -0.8))
    left.set_xlabel("time over ours, median of paired rounds, p20 to p80 (right of 1: ours is faster)")

    fractions = [(r["title"], r["candidates"][BASELINE]["fraction_of_stream"]) for r in results]
    fractions = [(title, spread) for title, spread in fractions if spread is not None]
    for y, (_, spread) in enumerate(fractions):
        right.barh(y, spread["p50"], color=FRACTION, height=0.6)
        right.plot([spread["p20"], spread["p80"]], [y, y], color="black", linewidth=1)
        right.text(max(spread["p50"], spread["p80"]) + 0.02, y, f"{spread['p50']:.0%}", va="center", fontsize=8)
    right.set_yticks(
        range(len(fractions)), [title.replace(" (tensors", "\n(tensors") for title, _ in fractions], fontsize=7
    )
    right.axvline(1, color="black", linewidth=0.8, linestyle=":")
    right.set(xlim=(0, 1.25), ylim=(len(fractions) - 0.4, -0.6))
    right.set_xlabel("bytes a second of ours over the stream's")

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_caption(results), fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return path


def _caption(results: list[dict]) -> str:
    machine = max((result["machine"] for result in results), key=lambda m: m["date"])
    commits = ", ".join(sorted({result["machine"]["commit"] for result in results}))
    return (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"fused_clip_adam {machine['fused_clip_adam']} (commit {commits}), {machine['date']}"
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--png", action="store_true", help="a PNG instead of the SVG")
    suffix = ".png" if parser.parse_args(arguments).png else ".svg"
    folder, results = newest_results()
    print(f"drew {draw(results, folder / f'overview{suffix}').relative_to(RESULTS.parent)}")


if __name__ == "__main__":
    main(sys.argv[1:])
