"""The results as Markdown: the README's block, and docs/performance-results.md with every table.

Both are written by `python -m benchmarks.plot` and compared with the result files by tests/test_docs.py.
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks import plot
from benchmarks.harness import is_ceiling, peers_of, short_title, variants_of
from benchmarks.peers import PACKAGES
from benchmarks.plot import (
    COPY_FRACTION,
    FIGURES,
    KINDS,
    NAMES,
    OTHER_KIND,
    STREAM_FRACTION,
    commits_of,
    compared,
    curves,
    dates_of,
    kind_of,
    verdict_on,
)

START, END = "<!-- results: python -m benchmarks.plot writes this", "<!-- end of results -->"
PAGE = Path("docs/performance-results.md")
NO_GPU = "Not yet measured on a GPU."
# What most people would do instead, the first that a result has; else its first peer.
USUAL = ("torch fused", "torch eager", "einsum, then our step")
WITHOUT_CPU_KERNEL = {  # package of benchmarks/peers.py -> the form in which it takes part on a CPU
    "optimi": "torch operations, foreach or a loop, the faster",
    "flashoptim": "its kernels need a GPU; its unfused form",
    "bitsandbytes": "torch operations",
}
NO_CEILING = (
    "For losses and for steps from 64 samples on the stream is no ceiling: arithmetic or reads alone bound them, and "
    "their share of its bytes/s is no measure of what is left."
)


# ---------------------------------------------------------------- the README's block


def readme_with(text: str, folder: Path, results: list[dict], gpus: dict[Path, list[dict]] | None = None) -> str:
    """The README's text with the results between its markers.

    Args:
        text: the README.
        folder: of the CPU.
        results: in it.
        gpus: as `plot.gpu_results` gives, and gives here where left out.
    """
    gpus = plot.gpu_results() if gpus is None else gpus
    head, rest = text.split(START)
    marker, rest = rest.split("\n", 1)
    tail = rest.split(END)[1]
    sections = [gpu_section(own, _figure_lines(gpu, own)) for gpu, own in gpus.items()]
    block = "\n\n".join([readme_section(folder, results), *(sections or [NO_GPU])])
    return f"{head}{START}{marker}\n{block}\n{END}{tail}"


def readme_section(folder: Path, results: list[dict]) -> str:
    """The CPU's: machine, a row a case, who was faster, the figures and how to make them again."""
    return "\n\n".join(
        [
            f"### {_machine(results)['cpu']}",
            f"{_conditions(results)} A time over ours is the median of paired rounds (p20 to p80): above 1 ours is "
            f"faster. All peers, rules, curves and the planner's predictions: [{PAGE}]({PAGE.as_posix()}).",
            "\n".join(usual_rows(results)),
            NO_CEILING,
            slower_sentence(results),
            targets_sentence(results),
            *_figure_lines(folder, results),
        ]
    )


def usual_rows(results: list[dict]) -> list[str]:
    """A row a case: the usual way, the fastest of the others that do the same work, how near ours is to the ceiling."""
    lines = [
        "| case | the usual way: its time over ours | the fastest other way | bytes/s of the stream's |",
        "|---|---|---|---|",
    ]
    for result in compared(results):
        rows, other_work = result["candidates"], result.get("other_work", {})
        peers = [name for name in peers_of(result) if name not in other_work]
        usual = next((name for name in (*USUAL, *peers) if name in peers), None)
        others = [name for name in peers if name != usual]
        fastest = min(others, key=lambda name: rows[name]["over_ours"]["p50"], default=None)
        shown = ["" if name is None else f"{label(name, result)}: {_ratio(rows[name])}" for name in (usual, fastest)]
        lines.append(f"| {' | '.join([result['title'], *shown, _share(rows[result['baseline']])])} |")
    return lines


def slower_sentence(results: list[dict]) -> str:
    """Every case, and every point of a curve, in which a peer was faster, or no difference was to be told.

    Faster: the whole spread of its time over ours is below 1 (`plot.verdict_on`).
    """
    faster, alike = [], []
    for result in results:
        rows = result["candidates"]
        for name in () if result.get("curve") else peers_of(result):
            verdict = verdict_on(rows[name]["over_ours"])
            if verdict == "slower":
                other = ", which does other work," if name in result.get("other_work", {}) else ""
                faster.append(f"{label(name, result)}{other} {_ratio(rows[name])} in *{short_title(result)}*")
            elif verdict == "no difference":
                alike.append(f"{label(name, result)} in *{short_title(result)}*")
    for result in curves(results):
        for name in peers_of(result):
            spreads = {point["x"]: point["candidates"][name]["over_ours"] for point in result["points"]}
            verdicts = {x: verdict_on(spread) for x, spread in spreads.items()}
            where = f"{label(name, result)} in *{result['curve']}* at"
            if sizes := [f"{x:,} ({spreads[x]['p50']:.2f})" for x in spreads if verdicts[x] == "slower"]:
                faster.append(f"{where} {', '.join(sizes)} {result['x']}")
            if sizes := [f"{x:,}" for x in spreads if verdicts[x] == "no difference"]:
                alike.append(f"{where} {', '.join(sizes)} {result['x']}")
    said = f"Faster than ours: {'; '.join(faster)}." if faster else "No peer was faster than ours in any case."
    return f"{said} No difference to be told: {'; '.join(alike)}." if alike else said


def command_for(results: list[dict]) -> str:
    """What measures these results again, with everyone who took part."""
    if "gpu" in results[0]["machine"]:
        return "make gpu"
    packages = any(name in PACKAGES for result in results for name in result["candidates"])
    # The trainers' come first: what is last draws everything.
    before = "bench-trainers " if any(result.get("measured_by") for result in results) else ""
    return f"make {before}bench-full" if packages else f"make {before}bench"


def _figure_lines(folder: Path, results: list[dict], page: Path = Path("README.md")) -> list[str]:
    """The figures as a document names them, each with the command that gives it."""
    lines, command = [], command_for(results)
    for name, file in plot.figures_of(folder, results).items():
        target = os.path.relpath(file, (plot.ROOT / page).parent).replace(os.sep, "/")
        device = results[0]["machine"].get("gpu")
        lines.append(f"![{FIGURES[name]}{f', {device}' if device else ''}]({target})")
        lines.append(
            f"`{command}` measures and draws this; `python -m benchmarks.plot` draws it from the result files."
        )
    return lines


# ---------------------------------------------------------------- the page


def page_with(folder: Path, results: list[dict], gpus: dict[Path, list[dict]] | None = None) -> str:
    """docs/performance-results.md: the CPU's tables, figures and versions, then every GPU's."""
    gpus = plot.gpu_results() if gpus is None else gpus
    sections = [cpu_section(folder, results)]
    sections += [gpu_section(own, _figure_lines(gpu, own, PAGE), level="##") for gpu, own in gpus.items()]
    body = "\n\n".join(sections if gpus else [*sections, NO_GPU])
    return f"# Measured results\n\n{START} from benchmarks/results -->\n{body}\n{END}\n"


def cpu_section(folder: Path, results: list[dict]) -> str:
    blocks = [
        f"## {_machine(results)['cpu']}",
        f"{_conditions(results)}{_packages(results)}",
        "A time over ours is the median of paired rounds (p20 to p80): above 1 ours is faster. "
        + slower_sentence(results),
        targets_sentence(results),
        NO_CEILING,
        *_forms(results),
    ]
    for kind in (*KINDS.values(), OTHER_KIND):
        if own := [result for result in compared(results) if kind_of(result) == kind]:
            blocks += [f"### {kind}", "\n".join(peer_rows(own))]
            blocks += [f"{short_title(result)}: {note}." for result in own for note in result.get("notes", ())]
    if own := curves(results):
        blocks.append("### How it changes with size")
        for result in own:
            blocks += [f"{result['curve']}: time over ours.", "\n".join(curve_rows(result))]
    if own := [result for result in results if result.get("rules_of")]:
        blocks.append("### Rules, and the planner's predictions")
        for result in own:
            blocks.append(f"Time over the baseline's, {result['title']}:")
            blocks.append("\n".join(_rule_rows(result)))
            blocks += [f"{note[0].upper()}{note[1:]}." for note in result.get("notes", ())]
    blocks += _missing(results)
    blocks += ["### Figures", *_figure_lines(folder, results, PAGE)]
    return "\n\n".join(blocks)


def peer_rows(results: list[dict]) -> list[str]:
    """A row a case, a column for whoever took part anywhere."""
    columns = list(dict.fromkeys(name for r in results for name in (*peers_of(r), *variants_of(r))))
    lines = [
        f"| case | ms, ours | {' | '.join(NAMES.get(name, name) for name in columns)} | bytes/s of the stream's |",
        "|---|" + "---|" * (len(columns) + 2),
    ]
    for result in results:
        rows = result["candidates"]
        own = rows[result["baseline"]]
        cells = [result["title"], f"{own['seconds']['p50'] * 1e3:.3g}"]
        cells += [*(_ratio(rows.get(name)) for name in columns), _share(own)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def curve_rows(result: dict) -> list[str]:
    names = peers_of(result)
    lines = [f"| {result['x']} | {' | '.join(names)} | bytes/s of the stream's |", "|---|" + "---|" * (len(names) + 1)]
    for point in result["points"]:
        rows = point["candidates"]
        cells = [f"{point['x']:,}", *(_ratio(rows.get(name)) for name in names), _share(rows[result["baseline"]])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _missing(results: list[dict]) -> list[str]:
    """Who was not measured where, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result["unavailable"].items():
            found.setdefault((name, reason), []).append(short_title(result))
    if not found:
        return []
    rows = [f"- {NAMES.get(name, name)}: {reason} ({'; '.join(titles)})" for (name, reason), titles in found.items()]
    return ["### Not measured", "\n".join(rows)]


# ---------------------------------------------------------------- on a CPU


def label(name: str, result: dict) -> str:
    """A candidate as a reader who does not know the benchmarks may call it."""
    clips = result.get("max_norm") is not None or "clip" in result["name"]
    usual = "clip_grad_norm_ + AdamW(fused)" if clips else "AdamW(fused)"
    shown = {"torch fused": usual, "torch fused, grad_scale": "AdamW(fused), clip by grad_scale", **NAMES}
    return shown.get(name, name)


def _machine(results: list[dict]) -> dict:
    return max((result["machine"] for result in results), key=lambda m: m["date"])


def _conditions(results: list[dict]) -> str:
    threads, versions = (_each(key, results) for key in ("threads", "torch"))
    return f"{threads} threads, torch {versions}, {dates_of(results)}; commit {commits_of(results)}."


def _each(key: str, results: list[dict]) -> str:
    """What the machines of the results say of something: one value, as a rule."""
    return " and ".join(sorted({str(result["machine"][key]) for result in results}))


def _packages(results: list[dict]) -> str:
    """Versions of the packages that were there, of all results; where they differ, the results of the rarer version."""
    found: dict[str, dict[str, list[str]]] = {}
    for result in results:
        for name, version in result["machine"].get("packages", {}).items():
            if version is not None:
                found.setdefault(name, {}).setdefault(version, []).append(result["name"])
    texts = []
    for name, versions in found.items():
        most = max(versions, key=lambda version: len(versions[version]))
        others = [f"{version} in {', '.join(own)}" for version, own in sorted(versions.items()) if version != most]
        texts.append(f"{name} {most}" + (f" ({'; '.join(others)})" if others else ""))
    return f" Packages: {', '.join(texts)}." if texts else ""


def _forms(results: list[dict]) -> list[str]:
    """In what form packages took part that have no kernel of their own on a CPU."""
    there = {name for result in results for name in result["candidates"]}
    texts = [f"{name} ({form})" for name, form in WITHOUT_CPU_KERNEL.items() if name in there]
    return [f"Without a kernel of their own for a step on a CPU: {'; '.join(texts)}."] if texts else []


def _share(row: dict) -> str:
    fraction = row[STREAM_FRACTION]
    return "" if fraction is None else f"{fraction['p50']:.0%}"


def _rule_rows(result: dict) -> list[str]:
    rules = [name for name in result["candidates"] if name != result["baseline"] and not is_ceiling(name)]
    rows = [result["candidates"][rule] for rule in rules]
    moved = [f"{row['bytes'] / result['elements']:.0f}" for row in rows]
    base = result["candidates"][result["baseline"]]
    return [
        f"| rule | {' | '.join(rules)} |",
        "|---|" + "---|" * len(rules),
        f"| B/element ({base['bytes'] / result['elements']:.0f}) | {' | '.join(moved)} |",
        f"| time (1) | {' | '.join(map(_ratio, rows))} |",
    ]


# ---------------------------------------------------------------- on a GPU


GPU_PEERS = {  # column -> candidate of benchmarks/gpu_peers.py
    "clip_grad_norm_ + AdamW(fused), or AdamW(fused) without clip": "torch fused",
    "AdamW(fused), clip by grad_scale": "torch fused, grad_scale",
    "clip_grad_norm_ + AdamW(foreach), or without clip": "torch foreach",
    "AdamW(fused) on float32 copies": "torch fused, float32 copies",
    "ours, Triton": "ours, triton",
}


def gpu_section(results: list[dict], figures: list[str], level: str = "###") -> str:
    """A heading, a table of cases, a table of rules, the targets that were missed, the figures."""
    machine = _machine(results)
    on_device = [result for result in results if not result.get("offload")]
    copies = sorted(result["ceiling"]["gigabytes_per_second"] for result in on_device)
    steps_and_losses = compared(results)
    others = sorted(
        {name for r in steps_and_losses for name in (*peers_of(r), *variants_of(r))}
        - {*GPU_PEERS.values(), *(r["baseline"] for r in results)}
    )
    # A column for whoever took part anywhere; ours by Triton is one of them unless it is the baseline.
    columns = {**GPU_PEERS, **{NAMES.get(name, name): name for name in others}}
    columns = {
        column: name
        for column, name in columns.items()
        if any(name in r["candidates"] and name != r["baseline"] for r in steps_and_losses)
    }
    lines = [
        f"{level} {machine['gpu']}",
        "",
        f"Driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"{dates_of(results)}; commit {commits_of(results)}, sources "
        f"{', '.join(sorted({r['machine']['sources'] for r in results}))}.",
    ]
    if on_device:
        baseline = (steps_and_losses or on_device)[0]["baseline"]
        lines[-1] += (
            f" `{baseline}` in milliseconds on the device, its bytes/s of a copy's in the same run, and a peer's time "
            "over it, median of paired rounds (p20 to p80): above 1 ours is faster. "
            f"The copy moved {copies[len(copies) // 2]:,.0f} GB/s, reads plus writes (median of cases)."
        )
    if steps_and_losses:
        header = ["case", "ms", "bytes/s of the copy's", *columns, "host us, ours", "host us, AdamW(fused)"]
        lines += [
            "",
            f"| {' | '.join(header)} |",
            "|---|" + "---|" * (len(columns) + 4),
            *[f"| {' | '.join(_gpu_cells(result, columns))} |" for result in steps_and_losses],
        ]
    by_rule = [result for result in results if result["rules_of"]]
    if by_rule:
        rules = [name for name in by_rule[0]["candidates"] if name != by_rule[0]["baseline"] and not is_ceiling(name)]
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
    lines += ["", slower_sentence(results), "", host_sentence(results)] if steps_and_losses else []
    lines += ["", targets_sentence(results)]
    for figure in figures:
        lines += ["", figure]
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


def host_sentence(results: list[dict]) -> str:
    """Every case in which ours keeps the host longer than the device, and a peer keeps it less than ours does."""
    found = []
    for result in compared(results):
        rows = result["candidates"]
        own = rows[result["baseline"]]
        if own["host_seconds"] is None or own["host_seconds"]["p50"] <= own["seconds"]["p50"]:
            continue
        for name in peers_of(result):
            host = rows[name]["host_seconds"]
            if host is not None and host["p50"] < own["host_seconds"]["p50"]:
                both = " of ".join(f"{spread['p50'] * 1e6:,.0f}" for spread in (host, own["host_seconds"]))
                found.append(f"{label(name, result)} {both} us in *{short_title(result)}*")
    if not found:
        return "No peer took less host time than ours where the host takes longer than the device."
    return f"Less host time than ours, where the host takes longer than the device: {'; '.join(found)}."


UNITS = {  # of a target's `what`: how its value is said
    COPY_FRACTION: ("{}%", " of the copy", 100, 1),
    STREAM_FRACTION: ("{}%", " of the stream", 100, 1),
    "over_ours": ("{}x", "", 1, 2),
    "speed_of_baseline": ("{}x", " the speed without it", 1, 2),
    "agreement": ("{}%", " agreement of prediction and measurement", 100, 1),
}


def targets_sentence(results: list[dict]) -> str:
    """How many targets were met; each that was missed, by name."""
    missed, unknown, count = [], [], 0
    for result in results:
        for target in result["targets"]:
            count += 1
            value, least = _said(target)
            what = f"{label(target['candidate'], result)}, {short_title(result)}"
            if target["met"] is False:
                missed.append(f"MISSED: {what}: {value}, wanted {least}.")
            elif target["met"] is None:
                unknown.append(f"Not measured: {what}, wanted {least}.")
    met = count - len(missed) - len(unknown)
    return " ".join([f"Targets: {met} of {count} met.", *missed, *unknown])


def _said(target: dict) -> tuple[str, str]:
    """A target's value and what was wanted; with more digits where they would look the same and are not."""
    form, of_what, times, digits = UNITS[target["what"]]
    value, least = target["value"], target["at_least"]
    if value is None:
        return "", f"{form.format(f'{least * times:.{digits}f}')}{of_what}"
    while digits < 9 and value != least and f"{value * times:.{digits}f}" == f"{least * times:.{digits}f}":
        digits += 1
    return tuple(f"{form.format(f'{x * times:.{digits}f}')}{of_what}" for x in (value, least))


# ---------------------------------------------------------------- files


def write(folder: Path, results: list[dict], gpus: dict[Path, list[dict]]) -> list[Path]:
    """Writes the README's block and the page; returns both."""
    readme, page = plot.ROOT / "README.md", plot.ROOT / PAGE
    readme.write_text(readme_with(readme.read_text(), folder, results, gpus))
    page.parent.mkdir(exist_ok=True)
    page.write_text(page_with(folder, results, gpus))
    return [readme, page]
