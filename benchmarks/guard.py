"""Whether ours got slower than it was, next to the others: `python -m benchmarks.guard`.

Result files of the working tree -> the last committed ones of the same kind of machine -> every ratio that is in both:
a peer's time over ours, a rule's over the plain step's, the share of the ceiling. Never an absolute time: what else the
machine did, or which of its siblings it is, would decide. A ratio that moved because the peer did, or that was taken
among other candidates, is named and not blamed on ours. Exit status 1 where there is a regression.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, Spread, device_slug, peers_of, variants_of

# What is worth a look. It is no bound on chance: medians of the same code on two days, or on two machines of a kind,
# have differed by more, so that the spreads have to be apart as well, and even then a verdict is a reason to look.
LEAST_CHANGE = 0.10
FRACTIONS = ("fraction_of_stream", "fraction_of_ceiling")  # of a result on a CPU, on a GPU
REGRESSION, IMPROVED, SAME = "REGRESSION", "improved", "same"
# Ours is as near to the ceiling as it was; what it is compared with, a peer or the step without the rule, is not.
PEER_MOVED, BASELINE_MOVED = "the peer moved", "the baseline moved"
OTHERS_IN_TURN = "other candidates in turn"
VERDICTS_SHOWN = (REGRESSION, IMPROVED, PEER_MOVED, BASELINE_MOVED)


@dataclass(frozen=True)
class Ratio:
    """One ratio of a result.

    Args:
        higher_is_better: for ours.
        of_ceiling: ours' own share of the ceiling, which what it is compared with has no part in; None: not known, and
            the ratio is all there is to judge by.
    """

    spread: Spread
    higher_is_better: bool
    of_ceiling: Spread | None = None

    @property
    def itself_of_ceiling(self) -> Ratio | None:
        return None if self.of_ceiling is None else Ratio(self.of_ceiling, True)


@dataclass(frozen=True)
class Change:
    """A ratio then and now; `turns_differ`: other candidates took turns with this one."""

    case: str
    what: str
    old: Ratio
    new: Ratio
    turns_differ: bool = False

    @property
    def slower(self) -> float:
        """How many times as long ours takes now, measured by what it is compared with."""
        quotient = self.old.spread.p50 / self.new.spread.p50
        return quotient if self.new.higher_is_better else 1 / quotient

    @property
    def verdict(self) -> str:
        # With other packages in turn, ours is colder (interpreter, dispatcher, caches): the same binary was measured at
        # 1.3 to 1.8 over torch's fused step on 2,000 tensors, by who else took turns. Neither "same" nor a regression
        # would mean anything.
        if self.turns_differ:
            return OTHERS_IN_TURN
        if not (moved := self._moved()):
            return SAME
        old, new = self.old.itself_of_ceiling, self.new.itself_of_ceiling
        if old is not None and new is not None and Change(self.case, self.what, old, new)._moved() != moved:
            return PEER_MOVED if self.new.higher_is_better else BASELINE_MOVED
        return REGRESSION if moved > 0 else IMPROVED

    def _moved(self) -> int:
        """1: against ours, -1: for it, 0: by too little to say."""
        apart = self.old.spread.p80 < self.new.spread.p20 or self.new.spread.p80 < self.old.spread.p20
        if not apart or max(self.slower, 1 / self.slower) <= 1 + LEAST_CHANGE:
            return 0
        return 1 if self.slower > 1 else -1


@dataclass
class Report:
    """What `compare` found; `gone`: sentences on cases and peers that are no longer measured."""

    changes: list[Change] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)  # sentences: a peer may have changed, not ours
    turns: list[str] = field(default_factory=list)  # sentences: who took turns in a case then and does not now, or anew
    not_measured_anew: list[str] = field(default_factory=list)

    def with_verdict(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]

    @property
    def regressions(self) -> list[Change]:
        return self.with_verdict(REGRESSION)


def compare(old: dict[str, dict], new: dict[str, dict], ref: str = "HEAD") -> Report:
    """Results by the name of their case, as committed in `ref` and as measured now."""
    report = Report()
    for case, before in old.items():
        if case not in new:
            report.gone.append(f"{case}: the case has no result any more")
        elif new[case] == before:
            report.not_measured_anew.append(case)
        else:
            _compare_case(case, before, new[case], report, ref)
    return report


def _compare_case(case: str, before: dict, after: dict, report: Report, ref: str) -> None:
    old, new = ratios_of(before), ratios_of(after)
    own_turns_differ = turns_with(before, before["baseline"]) != turns_with(after, after["baseline"])
    for what, ratio in old.items():
        if what in new:
            now = new[what]
            if own_turns_differ:  # the shares are not comparable, and cannot say who moved
                ratio, now = replace(ratio, of_ceiling=None), replace(now, of_ceiling=None)
            differ = turns_with(before, ratio_of(what, before)) != turns_with(after, ratio_of(what, after))
            report.changes.append(Change(case, what, ratio, now, differ))
        else:
            reason = after.get("unavailable", {}).get(what.removesuffix(" over ours"), "not in the new result")
            report.gone.append(f"{case}: {what} is no longer measured ({reason})")
    report.turns += _changed_turns(case, before, after, ref)
    for sentence in _changed_versions(before["machine"], after["machine"]):
        if sentence not in report.versions:
            report.versions.append(sentence)


def alternations_of(result: dict) -> list[list[str]]:
    """The candidates that took turns with each other; all of them where a result does not say otherwise."""
    return result.get("alternations") or [list(result["candidates"])]


def turns_with(result: dict, candidate: str) -> frozenset[str]:
    """Everyone in the alternation that a candidate's row is of: of several the first, as in a result's rows."""
    return frozenset(next((turns for turns in alternations_of(result) if candidate in turns), ()))


def ratio_of(what: str, result: dict) -> str:
    """The candidate that a ratio of `ratios_of` is of."""
    named = [name for name in result["candidates"] if what.startswith((f"{name} over ", f"{name}, share of "))]
    return max(named, key=len, default="")


def _changed_turns(case: str, before: dict, after: dict, ref: str) -> list[str]:
    """A sentence for every change of those who took turns: (added, removed), and what compares all the same."""
    changes = []
    for candidate in before["candidates"].keys() & after["candidates"].keys():
        old, new = turns_with(before, candidate), turns_with(after, candidate)
        change = (tuple(sorted(new - old)), tuple(sorted(old - new)))
        if any(change) and change not in changes:
            changes.append(change)
    added_and_removed = [
        " and ".join(f"{word} {', '.join(names)}" for word, names in zip(("added:", "removed:"), change) if names)
        for change in sorted(changes)
    ]
    how = _command_that_compares(case, before, ref)
    return [f"{case}: {OTHERS_IN_TURN} ({'; or '.join(added_and_removed)}); {how}"] if changes else []


def _command_that_compares(case: str, result: dict, ref: str) -> str:
    from benchmarks.base import CASES  # here: it brings the suite along

    if "gpu" in result["machine"] or case not in CASES:
        return f"not comparable: measure {ref} again with the same candidates"
    return f'`make bench ARGS="--base {ref} -k {case}"` compares'


def ratios_of(result: dict) -> dict[str, Ratio]:
    """Every ratio of a result that says how ours does, by what it compares."""
    if "curve" in result:
        points = ((point, f" at {result['x']} = {point['x']:,}") for point in result["points"])
        return {f"{what}{at}": ratio for point, at in points for what, ratio in _ratios_among(point, result).items()}
    return _ratios_among(result, result)


def _ratios_among(measured: dict, result: dict) -> dict[str, Ratio]:
    """Those of `measured["candidates"]`, under the baseline and the rules of `result`."""
    rows, baseline = measured["candidates"], result["baseline"]
    named, share = {**result, "candidates": rows}, _of_ceiling(rows[baseline])
    found = {f"{name} over ours": Ratio(Spread(**rows[name]["over_ours"]), True, share) for name in peers_of(named)}
    for name in variants_of(named):
        found[f"{name} over {baseline}"] = Ratio(Spread(**rows[name]["over_ours"]), False, _of_ceiling(rows[name]))
    if share is not None:
        found[f"{baseline}, share of the ceiling"] = Ratio(share, True)
    return found


def _of_ceiling(row: dict) -> Spread | None:
    found = [row[key] for key in FRACTIONS if row.get(key) is not None]
    return Spread(**found[0]) if found else None


def _changed_versions(old: dict, new: dict) -> list[str]:
    """What is not the version of then; a package that came or went, too."""
    packages = (old.get("packages", {}), new.get("packages", {}))
    pairs = {"torch": (old.get("torch"), new.get("torch"))}
    pairs |= {name: tuple(found.get(name) for found in packages) for name in {**packages[0], **packages[1]}}
    return [
        f"{name} {then or 'not installed'} -> {now or 'not installed'}"
        for name, (then, now) in pairs.items()
        if then != now
    ]


def text_of(report: Report) -> str:
    """The table of what changed, and sentences on the rest."""
    lines = []
    counted = {verdict: report.with_verdict(verdict) for verdict in VERDICTS_SHOWN}
    if any(counted.values()):
        lines.append(f"{'':62}{'committed':>22}{'now':>22}  ours takes")
    for change in (change for changes in counted.values() for change in changes):
        lines.append(
            f"{f'{change.case}: {change.what}':<62}{_show(change.old):>22}{_show(change.new):>22}"
            f"  {change.slower:.2f} times as long: {change.verdict}"
        )
    cases = len({change.case for change in report.changes})
    moved = len(counted[PEER_MOVED]) + len(counted[BASELINE_MOVED])
    apart = len(report.with_verdict(OTHERS_IN_TURN))
    lines.append(
        f"{len(report.changes)} ratios of {cases} cases compared: {len(report.regressions)} regressions, "
        f"{len(counted[IMPROVED])} improvements, {len(report.with_verdict(SAME))} the same (less than "
        f"{LEAST_CHANGE:.0%}, or within the spread)"
        + (f", {moved} that moved while ours kept its share of the ceiling" if moved else "")
        + (f", {apart} among other candidates than then, which says nothing of ours" if apart else "")
        + "."
    )
    if report.not_measured_anew:
        lines.append(f"Not measured anew: {', '.join(report.not_measured_anew)}.")
    lines += [f"GONE: {sentence}." for sentence in report.gone]
    lines += [f"NOT COUNTED: {sentence}." for sentence in report.turns]
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
    report = compare(old, results_in(folder), ref)
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
