"""Whether ours got slower than it was, next to the others: `python -m benchmarks.guard`.

Result files of the working tree -> the last committed ones of the same kind of machine -> every ratio that is in both:
a peer's time over ours, a rule's over the plain step's, the share of the ceiling. Never an absolute time: what else the
machine did, or which of its siblings it is, would decide. Exit status 1 where there is a regression.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, Spread, device_slug, peers_of, variants_of

LEAST_CHANGE = 0.10  # medians of the same code on two days, or two machines of a kind, differ by less
FRACTIONS = ("fraction_of_stream", "fraction_of_ceiling")  # of a result on a CPU, on a GPU


@dataclass(frozen=True)
class Ratio:
    """One ratio of a result; `higher_is_better`: for ours."""

    spread: Spread
    higher_is_better: bool
    of_ceiling: Spread | None = None  # a variant's own share of the ceiling, which the baseline has no part in


@dataclass(frozen=True)
class Change:
    case: str
    what: str
    old: Ratio
    new: Ratio

    @property
    def slower(self) -> float:
        """How many times as long ours takes now, measured by what it is compared with."""
        quotient = self.old.spread.p50 / self.new.spread.p50
        return quotient if self.new.higher_is_better else 1 / quotient

    @property
    def verdict(self) -> str:
        apart = self.old.spread.p80 < self.new.spread.p20 or self.new.spread.p80 < self.old.spread.p20
        if not apart or max(self.slower, 1 / self.slower) <= 1 + LEAST_CHANGE or self._only_the_baseline_moved():
            return "same"
        return "REGRESSION" if self.slower > 1 else "improved"

    def _only_the_baseline_moved(self) -> bool:
        """A rule costs more beside a plain step that became faster, but itself is as fast as before; or the reverse."""
        old, new = self.old.of_ceiling, self.new.of_ceiling
        if old is None or new is None:
            return False
        return new.p50 >= old.p50 if self.slower > 1 else new.p50 <= old.p50


@dataclass
class Report:
    """What `compare` found; `gone`: sentences on cases and peers that are no longer measured."""

    changes: list[Change] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)  # sentences: a peer may have changed, not ours
    not_measured_anew: list[str] = field(default_factory=list)

    def with_verdict(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]

    @property
    def regressions(self) -> list[Change]:
        return self.with_verdict("REGRESSION")


def compare(old: dict[str, dict], new: dict[str, dict]) -> Report:
    """Results by the name of their case, as committed and as measured now."""
    report = Report()
    for case, before in old.items():
        if case not in new:
            report.gone.append(f"{case}: the case has no result any more")
        elif new[case] == before:
            report.not_measured_anew.append(case)
        else:
            _compare_case(case, before, new[case], report)
    return report


def _compare_case(case: str, before: dict, after: dict, report: Report) -> None:
    old, new = ratios_of(before), ratios_of(after)
    for what, ratio in old.items():
        if what in new:
            report.changes.append(Change(case, what, ratio, new[what]))
        else:
            reason = after.get("unavailable", {}).get(what.removesuffix(" over ours"), "not in the new result")
            report.gone.append(f"{case}: {what} is no longer measured ({reason})")
    for sentence in _changed_versions(before["machine"], after["machine"]):
        if sentence not in report.versions:
            report.versions.append(sentence)


def ratios_of(result: dict) -> dict[str, Ratio]:
    """Every ratio of a result that says how ours does, by what it compares."""
    if "curve" in result:
        points = ((point, f" at {result['x']} = {point['x']:,}") for point in result["points"])
        return {f"{what}{at}": ratio for point, at in points for what, ratio in _ratios_among(point, result).items()}
    return _ratios_among(result, result)


def _ratios_among(measured: dict, result: dict) -> dict[str, Ratio]:
    """Those of `measured["candidates"]`, under the baseline and the rules of `result`."""
    rows, baseline = measured["candidates"], result["baseline"]
    named = {**result, "candidates": rows}
    found = {f"{name} over ours": Ratio(Spread(**rows[name]["over_ours"]), True) for name in peers_of(named)}
    for name in variants_of(named):
        found[f"{name} over {baseline}"] = Ratio(Spread(**rows[name]["over_ours"]), False, _of_ceiling(rows[name]))
    if (share := _of_ceiling(rows[baseline])) is not None:
        found[f"{baseline}, share of the ceiling"] = Ratio(share, True)
    return found


def _of_ceiling(row: dict) -> Spread | None:
    found = [row[key] for key in FRACTIONS if row.get(key) is not None]
    return Spread(**found[0]) if found else None


def _changed_versions(old: dict, new: dict) -> list[str]:
    pairs = {"torch": (old.get("torch"), new.get("torch"))}
    pairs |= {name: (then, new.get("packages", {}).get(name)) for name, then in old.get("packages", {}).items()}
    return [f"{name} {then} -> {now}" for name, (then, now) in pairs.items() if then != now and then and now]


def text_of(report: Report) -> str:
    """The table of what changed, and sentences on the rest."""
    lines = []
    moved = report.regressions + report.with_verdict("improved")
    if moved:
        lines.append(f"{'':62}{'committed':>22}{'now':>22}  ours takes")
    for change in moved:
        lines.append(
            f"{f'{change.case}: {change.what}':<62}{_show(change.old):>22}{_show(change.new):>22}"
            f"  {change.slower:.2f} times as long: {change.verdict}"
        )
    cases = len({change.case for change in report.changes})
    lines.append(
        f"{len(report.changes)} ratios of {cases} cases compared: {len(report.regressions)} regressions, "
        f"{len(report.with_verdict('improved'))} improvements, {len(report.with_verdict('same'))} the same (less than "
        f"{LEAST_CHANGE:.0%}, or within the spread)."
    )
    if report.not_measured_anew:
        lines.append(f"Not measured anew: {', '.join(report.not_measured_anew)}.")
    lines += [f"GONE: {sentence}." for sentence in report.gone]
    if report.versions:
        lines.append(f"Other versions than then, which may be why a ratio moved: {', '.join(report.versions)}.")
    return "\n".join(lines)


def _show(ratio: Ratio) -> str:
    return f"{ratio.spread.p50:.2f} ({ratio.spread.p20:.2f} - {ratio.spread.p80:.2f})"


# ---------------------------------------------------------------- where results lie


def results_in(folder: Path) -> dict[str, dict]:
    """Results of a folder by the name of their case."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def committed_results(folder: Path, ref: str) -> dict[str, dict]:
    """The same as a commit has it; empty where it has no such folder.

    Args:
        folder: of the working tree; one that lies elsewhere is looked up by its name in benchmarks/results.
        ref: a commit, branch or tag.

    Raises:
        ValueError: `ref` is no commit of this repository.
    """
    inside = folder.resolve()
    inside = inside.relative_to(ROOT) if inside.is_relative_to(ROOT) else Path("benchmarks/results") / folder.name

    def git(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)

    if git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}").returncode != 0:
        raise ValueError(f"{ref!r} is no commit of this repository")
    listed = git("ls-tree", "--name-only", ref, f"{inside.as_posix()}/").stdout.splitlines()
    paths = [Path(name) for name in listed if name.endswith(".json")]
    return {path.stem: json.loads(git("show", f"{ref}:{path.as_posix()}").stdout) for path in paths}


def check(folder: Path, ref: str = "HEAD") -> Report | None:
    """Prints the comparison of a folder with what `ref` has of it; None where that has no results of such a machine."""
    print(f"\nResults of {folder.name} beside those of {ref}, ratios only:")
    old = committed_results(folder, ref)
    if not old:
        print(f"{ref} has no results of this kind of machine: nothing to compare with.")
        return None
    report = compare(old, results_in(folder))
    print(text_of(report))
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="a results folder; by default this machine's")
    parser.add_argument("--against", default="HEAD", metavar="REF", help="the commit to compare with (HEAD)")
    options = parser.parse_args(arguments)
    folder = options.results or RESULTS / device_slug()
    if not folder.is_dir():
        parser.error(f"there are no results in {folder.name}: run `make bench` first")
    try:
        report = check(folder, options.against)
    except ValueError as error:
        parser.error(str(error))
    return 1 if report is not None and report.regressions else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
