"""Draws the newest results and puts them into the README.

`python -m benchmarks.plot [--png]` -> `results/<device>/overview.svg` and the table between the README's markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.harness import BASELINE, RESULTS, ROOT

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
    right.set_xlabel("bytes/s of ours over the stream's")

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_caption(results), fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return path


README_START, README_END = "<!-- results: python -m benchmarks.plot writes this", "<!-- end of results -->"
README_PEERS = {  # column -> the names it may have in a result, in order of preference
    "clip_grad_norm_ + AdamW(fused), or AdamW(fused) without clip": ("torch fused",),
    "AdamW(fused), clip by grad_scale": ("torch fused, grad_scale",),
    "DeepSpeedCPUAdam": ("DeepSpeedCPUAdam",),
    "torch eager": ("torch eager",),
    "torch.compile": ("torch.compile",),
}


def readme_table(results: list[dict]) -> str:
    """Markdown: per case the peers' time over ours and the fraction of the stream's bandwidth."""
    machine = max((result["machine"] for result in results), key=lambda m: m["date"])
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}; commit "
        f"{', '.join(sorted({result['machine']['commit'] for result in results}))}. A peer's time over ours, median of "
        "paired rounds (p20 to p80): above 1 ours is faster.",
        "",
        f"| case | {' | '.join(README_PEERS)} | bytes/s of the stream's |",
        "|---|" + "---|" * (len(README_PEERS) + 1),
    ]
    for result in results:
        cells = [result["title"]]
        for names in README_PEERS.values():
            found = [result["candidates"][name]["over_ours"] for name in names if name in result["candidates"]]
            cells.append(f"{found[0]['p50']:.2f} ({found[0]['p20']:.2f} to {found[0]['p80']:.2f})" if found else "")
        fraction = result["candidates"][BASELINE]["fraction_of_stream"]
        cells.append("" if fraction is None else f"{fraction['p50']:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def readme_with(text: str, results: list[dict], figure: str) -> str:
    """The README's text with the results between its markers."""
    head, rest = text.split(README_START)
    marker, rest = rest.split("\n", 1)
    tail = rest.split(README_END)[1]
    block = f"{readme_table(results)}\n\n![ratios to peers and share of the ceiling]({figure})"
    return f"{head}{README_START}{marker}\n{block}\n{README_END}{tail}"


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
    figure = draw(results, folder / f"overview{suffix}").relative_to(ROOT).as_posix()
    (ROOT / "README.md").write_text(readme_with((ROOT / "README.md").read_text(), results, figure))
    print(f"drew {figure} and wrote the README's results")


if __name__ == "__main__":
    main(sys.argv[1:])
