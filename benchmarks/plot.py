"""Draws the newest results and puts them into the README.

`python -m benchmarks.plot [--png]` -> `results/<device>/overview.svg` and the tables between the README's markers: one
for the CPU measured last, one for every GPU there are results of.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT

# Ceilings are not competitors; the second panel shows how near ours comes to them.
CEILINGS = ("stream (ceiling)", "torch copy_", "copy (ceiling)")
STREAM_FRACTION, COPY_FRACTION = "fraction_of_stream", "fraction_of_ceiling"  # of a result on a CPU, on a GPU
FASTER, SLOWER, FRACTION = "#2a6f97", "#c8553d", "#5b8c5a"
LONGEST_BAR = 8.0  # unfused peers run off the scale: their bar is cut and the number tells


def newest_results(root: Path | None = None) -> tuple[Path, list[dict]]:
    """The folder of the CPU that was measured last, and its results."""
    results = [(path.parent, json.loads(path.read_text())) for path in sorted((root or RESULTS).glob("cpu-*/*.json"))]
    if not results:
        raise SystemExit("no results to draw: run `python -m benchmarks.run` first")
    folder = max(results, key=lambda item: item[1]["machine"]["date"])[0]
    return folder, [result for parent, result in results if parent == folder]


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


def draw(results: list[dict], path: Path) -> Path:
    """Left: the peers' time over ours, p20 to p80; right: the bandwidth ours reaches, of the stream's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "fused_clip_adam", "font.size": 9})  # the same file from the same results
    rows: list[tuple[str, dict | None]] = []  # a heading has no data
    for result in results:
        rows.append((result["title"], None))
        peers = [(k, v) for k, v in result["candidates"].items() if k not in (result["baseline"], *CEILINGS)]
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
        end = max(length, high) if high <= LONGEST_BAR else length
        left.text(end + 0.08, y, f"{middle:.2f}x", va="center", fontsize=8)
    left.axvline(1, color="black", linewidth=0.8, linestyle=":")
    labelled = [(y, label) for y, (label, row) in enumerate(rows) if row is not None]
    left.set_yticks([y for y, _ in labelled], [label for _, label in labelled], fontsize=8)
    left.set(xlim=(0, LONGEST_BAR + 0.9), ylim=(len(rows) - 0.4, -0.8))
    left.set_xlabel("time over ours, median of paired rounds, p20 to p80 (right of 1: ours is faster)")

    on_gpu = "gpu" in results[0]["machine"]
    fraction = COPY_FRACTION if on_gpu else STREAM_FRACTION
    fractions = [(r["title"], r["candidates"][r["baseline"]][fraction]) for r in results]
    fractions = [(title, spread) for title, spread in fractions if spread is not None]
    for y, (_, spread) in enumerate(fractions):
        right.barh(y, spread["p50"], color=FRACTION, height=0.6)
        right.plot([spread["p20"], spread["p80"]], [y, y], color="black", linewidth=1)
        right.text(max(spread["p50"], spread["p80"]) + 0.02, y, f"{spread['p50']:.0%}", va="center", fontsize=8)
    right.set_yticks(
        range(len(fractions)),
        [",\n".join(title.split(" (tensors")[0].rsplit(", ", 1)) for title, _ in fractions],
        fontsize=7,
    )
    right.axvline(1, color="black", linewidth=0.8, linestyle=":")
    right.set(xlim=(0, 1.25), ylim=(len(fractions) - 0.4, -0.6))
    right.set_xlabel(f"bytes/s of ours over\nthe {'copy' if on_gpu else 'stream'}'s")

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
    "scores contracted by einsum, then our step": ("einsum, then our step",),
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
    for result in _without_rules(results):
        cells = [result["title"]]
        for names in README_PEERS.values():
            found = [result["candidates"][name]["over_ours"] for name in names if name in result["candidates"]]
            cells.append(f"{found[0]['p50']:.2f} ({found[0]['p20']:.2f} to {found[0]['p80']:.2f})" if found else "")
        fraction = result["candidates"][result["baseline"]][STREAM_FRACTION]
        cells.append("" if fraction is None else f"{fraction['p50']:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{result['title']}: {note}." for result in results for note in result.get("notes", ())]
    for result in results:
        if result.get("rules_of"):
            lines += ["", f"Time over the baseline's, {result['title']}:", "", *_rule_rows(result)]
    return "\n".join(lines)


def _without_rules(results: list[dict]) -> list[dict]:
    """Comparisons with peers: those of rules with rules, and of steps on the host, have tables of their own."""
    return [result for result in results if not result.get("rules_of") and not result.get("offload")]


def _rule_rows(result: dict) -> list[str]:
    rules = [name for name in result["candidates"] if name not in (result["baseline"], *CEILINGS)]
    rows = [result["candidates"][rule] for rule in rules]
    moved = [f"{row['bytes'] / result['elements']:.0f}" for row in rows]
    base = result["candidates"][result["baseline"]]
    return [
        f"| rule | {' | '.join(rules)} |",
        "|---|" + "---|" * len(rules),
        f"| B/element ({base['bytes'] / result['elements']:.0f}) | {' | '.join(moved)} |",
        f"| time (1) | {' | '.join(map(_ratio, rows))} |",
    ]


README_GPU_PEERS = {  # column -> candidate of benchmarks/gpu_peers.py
    "clip_grad_norm_ + AdamW(fused), or AdamW(fused) without clip": "torch fused",
    "AdamW(fused), clip by grad_scale": "torch fused, grad_scale",
    "clip_grad_norm_ + AdamW(foreach), or without clip": "torch foreach",
    "AdamW(fused) on float32 copies": "torch fused, float32 copies",
    "ours, Triton": "ours, triton",
}
NO_GPU = "Not yet measured on a GPU."


def readme_gpu_section(results: list[dict], figure: str | None) -> str:
    """Markdown: a heading, a table of cases, a table of rules, and the targets that were missed."""
    machine = max((result["machine"] for result in results), key=lambda m: m["date"])
    on_device = [result for result in results if not result.get("offload")]
    copies = sorted(result["ceiling"]["gigabytes_per_second"] for result in on_device)
    compared = _without_rules(results)
    others = sorted(
        {name for r in compared for name in r["candidates"]}
        - {*README_GPU_PEERS.values(), *CEILINGS, *(r["baseline"] for r in results)}
    )
    # A column for whoever took part anywhere; ours by Triton is one of them unless it is the baseline.
    columns = {**README_GPU_PEERS, **{name: name for name in others}}
    columns = {
        column: name
        for column, name in columns.items()
        if any(name in r["candidates"] and name != r["baseline"] for r in compared)
    }
    lines = [
        f"### {machine['gpu']}",
        "",
        f"Driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"{machine['date']}; commit {', '.join(sorted({r['machine']['commit'] for r in results}))}, sources "
        f"{', '.join(sorted({r['machine']['sources'] for r in results}))}.",
    ]
    if on_device:
        lines[-1] += (
            f" `{(compared or on_device)[0]['baseline']}` in milliseconds on the device, its bytes/s of a copy's in "
            "the same run, and a peer's time over it, median of paired rounds (p20 to p80): above 1 ours is faster. "
            f"The copy moved {copies[len(copies) // 2]:,.0f} GB/s, reads plus writes (median of cases)."
        )
    if compared:
        header = ["case", "ms", "bytes/s of the copy's", *columns, "host us, ours", "host us, AdamW(fused)"]
        lines += [
            "",
            f"| {' | '.join(header)} |",
            "|---|" + "---|" * (len(columns) + 4),
            *[f"| {' | '.join(_gpu_cells(result, columns))} |" for result in compared],
        ]
    by_rule = [result for result in results if result["rules_of"]]
    if by_rule:
        rules = [name for name in by_rule[0]["candidates"] if name not in (by_rule[0]["baseline"], *CEILINGS)]
        lines += [
            "",
            "A rule's time over that of the same step without it, one tensor:",
            "",
            f"| rules | {' | '.join(rules)} |",
            "|---|" + "---|" * len(rules),
        ]
        for result in by_rule:
            cells = [_ratio(result["candidates"].get(rule)) for rule in rules]
            lines.append(f"| {result['rules_of']}, {result['elements']:,} elements | {' | '.join(cells)} |")
    if offloaded := [result for result in results if result.get("offload")]:
        lines += ["", *_offload_rows(offloaded)]
    lines += ["", _targets_sentence(results)]
    if figure is not None:
        lines += ["", f"![ratios to peers and share of the copy bandwidth, {machine['gpu']}]({figure})"]
    return "\n".join(lines)


def _offload_rows(results: list[dict]) -> list[str]:
    """Steps on the host: their time, what of it the longest ceiling takes, the serial way's, and the ceilings."""
    ceilings = list(results[0]["gigabytes_per_second"])
    peers = [name for name in results[0]["candidates"] if name not in (results[0]["baseline"], *ceilings)]
    names = [f"{name.removesuffix(' (ceiling)')}, GB/s" for name in ceilings]
    lines = [
        'Moments and step on the host, `offload="cpu"`: milliseconds from an idle device to an idle device, what of '
        "them the longest of the three ceilings takes alone, and the time of the same work without overlap over ours.",
        "",
        f"| case | ms | longest ceiling's share | {' | '.join([*peers, *names])} |",
        "|---|" + "---|" * (2 + len(peers) + len(names)),
    ]
    for result in results:
        own = result["candidates"][result["baseline"]]
        cells = [result["title"], f"{own['seconds']['p50'] * 1e3:.2f}", f"{own[COPY_FRACTION]['p50']:.0%}"]
        cells += [_ratio(result["candidates"].get(name)) for name in peers]
        cells += [f"{result['gigabytes_per_second'][name]:.0f}" for name in ceilings]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gpu_cells(result: dict, columns: dict[str, str]) -> list[str]:
    rows, baseline = result["candidates"], result["baseline"]
    own = rows[baseline]
    cells = [result["title"], f"{own['seconds']['p50'] * 1e3:.3f}", f"{own[COPY_FRACTION]['p50']:.0%}"]
    cells += ["" if name == baseline else _ratio(rows.get(name)) for name in columns.values()]
    for name in (baseline, "torch fused"):
        cells.append(f"{rows[name]['host_seconds']['p50'] * 1e6:.0f}" if name in rows else "")
    return cells


def _ratio(row: dict | None) -> str:
    if row is None:
        return ""
    spread = row["over_ours"]
    return f"{spread['p50']:.2f} ({spread['p20']:.2f} to {spread['p80']:.2f})"


def _targets_sentence(results: list[dict]) -> str:
    """How many targets were met; each that was missed, by name."""
    missed, unknown, count = [], [], 0
    for result in results:
        for target in result["targets"]:
            count += 1
            of_copy = target["what"] == COPY_FRACTION
            show = (lambda x: f"{x:.1%} of the copy") if of_copy else (lambda x: f"{x:.2f}x")
            what = f"{target['candidate']}, {result['title']}"
            if target["met"] is False:
                missed.append(f"MISSED: {what}: {show(target['value'])}, wanted {show(target['at_least'])}.")
            elif target["met"] is None:
                unknown.append(f"Not measured: {what}, wanted {show(target['at_least'])}.")
    met = count - len(missed) - len(unknown)
    return " ".join([f"Targets: {met} of {count} met.", *missed, *unknown])


def readme_with(text: str, results: list[dict], figure: str, gpus: dict[Path, list[dict]] | None = None) -> str:
    """The README's text with the results between its markers.

    Args:
        text: the README.
        results: of the CPU.
        figure: the CPU's, relative to the README.
        gpus: as `gpu_results` gives, and gives here where left out.
    """
    head, rest = text.split(README_START)
    marker, rest = rest.split("\n", 1)
    tail = rest.split(README_END)[1]
    sections = [
        readme_gpu_section(own, _drawn(folder)) for folder, own in (gpu_results() if gpus is None else gpus).items()
    ]
    block = f"{readme_table(results)}\n\n![ratios to peers and share of the ceiling]({figure})"
    block = "\n\n".join([block, *(sections or [NO_GPU])])
    return f"{head}{README_START}{marker}\n{block}\n{README_END}{tail}"


def _drawn(folder: Path) -> str | None:
    """A folder's figure, as the README names it; None where it has not been drawn."""
    for suffix in (".svg", ".png"):
        if (path := folder / f"overview{suffix}").exists():
            return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return None


def _caption(results: list[dict]) -> str:
    machine = max((result["machine"] for result in results), key=lambda m: m["date"])
    commits = ", ".join(sorted({result["machine"]["commit"] for result in results}))
    device = machine["gpu"] if "gpu" in machine else f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{device}, torch {machine['torch']}, "
        f"fused_clip_adam {machine['fused_clip_adam']} (commit {commits}), {machine['date']}"
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--png", action="store_true", help="a PNG instead of the SVG")
    suffix = ".png" if parser.parse_args(arguments).png else ".svg"
    folder, results = newest_results()
    figure = draw(_without_rules(results), folder / f"overview{suffix}").relative_to(ROOT).as_posix()
    gpus = gpu_results()
    for gpu_folder, own in gpus.items():
        if compared := _without_rules(own):
            draw(compared, gpu_folder / f"overview{suffix}")
    (ROOT / "README.md").write_text(readme_with((ROOT / "README.md").read_text(), results, figure, gpus))
    print(f"drew {figure}, {len(gpus)} GPU folders, and wrote the README's results")


if __name__ == "__main__":
    main(sys.argv[1:])
