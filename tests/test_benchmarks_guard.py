"""The regression guard on made-up results: a regression, noise, an improvement, what is missing; and committed ones.

What moved without ours is told apart: a peer, and who else took turns.
"""

import copy
import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import guard
from benchmarks.harness import RESULTS, Alternation, peers_of, summarize, variants_of

ROOT = Path(__file__).parent.parent
NOISE = (0.97, 0.99, 1.0, 1.01, 1.03)
STREAM = "stream (ceiling)"


def result(name: str = "step-one", ours: float = 1.0, noise=NOISE, alternations=None, **others: float) -> dict:
    """A result file's content, from made-up seconds of a candidate; `others`: name -> seconds, `_` for a blank."""
    seconds = {"ours": ours, "torch fused": 1.4, STREAM: 0.8} | {k.replace("_", " "): v for k, v in others.items()}
    measured = Alternation(
        {k: [v * f for f in (noise if k == "ours" else [1.0] * 5)] for k, v in seconds.items()}, "ours", 0.0, 0
    )
    return {
        "name": name,
        "machine": {"torch": "2.13.0", "packages": {"deepspeed": "0.19.8"}},
        "baseline": "ours",
        "candidates": summarize(measured, dict.fromkeys(seconds, 28), STREAM),
        "unavailable": {},
        **({} if alternations is None else {"alternations": alternations}),
    }


def verdicts(report: guard.Report) -> dict[str, str]:
    return {change.what: change.verdict for change in report.changes}


def compare(old: dict, new: dict) -> guard.Report:
    return guard.compare({old["name"]: old}, {new["name"]: new})


def test_a_slower_step_is_a_regression_against_peer_and_ceiling():
    report = compare(result(), result(ours=1.2))
    assert verdicts(report) == {"torch fused over ours": "REGRESSION", "ours, share of the ceiling": "REGRESSION"}
    assert all(change.slower == pytest.approx(1.2) for change in report.regressions)
    text = guard.text_of(report)
    assert "step-one: torch fused over ours" in text and "1.20 times as long: REGRESSION" in text
    assert "2 ratios of 1 cases compared: 2 regressions, 0 improvements, 0 the same" in text


def test_a_faster_step_is_an_improvement():
    report = compare(result(), result(ours=0.8))
    assert set(verdicts(report).values()) == {"improved"} and not report.regressions


def test_absolute_times_are_never_compared():
    old, new = result(), result(noise=(0.97, 0.99, 1.0, 1.01, 1.0300001))
    for row in new["candidates"].values():  # a machine of half the speed
        row["seconds"] = {key: 2 * value for key, value in row["seconds"].items()}
    assert set(verdicts(compare(old, new)).values()) == {"same"}


@pytest.mark.parametrize(
    "ours, noise",
    (
        (1.08, (1.0, 1.0, 1.0, 1.0, 1.0)),  # apart, but by less than a tenth
        (1.2, (0.7, 0.8, 1.0, 1.3, 1.5)),  # by more, but the spreads overlap
    ),
)
def test_little_and_noise_are_no_regression(ours, noise):
    assert set(verdicts(compare(result(noise=noise), result(ours=ours, noise=noise))).values()) == {"same"}


def test_a_rule_that_costs_more_is_a_regression():
    old, new = result(align=1.0), result(align=1.3)
    for own in (old, new):
        own["rules_of"] = "cpu"
        del own["candidates"]["torch fused"]
    report = compare(old, new)
    assert verdicts(report) == {"align over ours": "REGRESSION", "ours, share of the ceiling": "same"}
    assert verdicts(compare(new, old))["align over ours"] == "improved"


def test_a_rule_beside_a_plain_step_that_gained_is_no_regression():
    old, new = result(align=1.0), result(ours=0.8, align=1.0)
    for own in (old, new):
        own["rules_of"] = "cpu"
    assert verdicts(compare(old, new)) == {
        "align over ours": "the baseline moved",
        "torch fused over ours": "the baseline moved",  # among the rules a candidate is ours, too
        "ours, share of the ceiling": "improved",
    }
    assert verdicts(compare(new, old))["align over ours"] == "the baseline moved"


def test_a_peer_that_got_faster_or_slower_is_not_blamed_on_ours():
    old, new = result(), result(torch_fused=1.1)
    for before, after in ((old, new), (new, old)):
        report = compare(before, after)
        assert verdicts(report) == {"torch fused over ours": "the peer moved", "ours, share of the ceiling": "same"}
        assert not report.regressions
    text = guard.text_of(compare(old, new))
    assert "1.27 times as long: the peer moved" in text and "1 that moved while ours kept its share" in text
    slower = compare(old, result(ours=1.2, torch_fused=1.1))  # both: ours did get slower
    assert set(verdicts(slower).values()) == {"REGRESSION"}


def test_without_a_share_of_the_ceiling_the_ratio_is_all_there_is():
    old, new = result(), result(torch_fused=1.1)
    for own in (old, new):
        own["candidates"]["ours"]["fraction_of_stream"] = None
    assert verdicts(compare(old, new)) == {"torch fused over ours": "REGRESSION"}


@pytest.mark.parametrize("ours", (1.0, 1.3, 0.7))
def test_other_candidates_in_turn_are_named_and_not_counted(ours):
    case = "step-one-tensor"
    old, new = result(case, DeepSpeedCPUAdam=1.5), result(case, ours=ours, optimi=3.0)
    report = guard.compare({case: old}, {case: new}, "v1")
    assert set(verdicts(report).values()) == {"other candidates in turn"} and not report.regressions
    assert report.turns == [
        f"{case}: other candidates in turn (added: optimi and removed: DeepSpeedCPUAdam); "
        f'`make bench ARGS="--base v1 -k {case}"` compares'
    ]
    assert "2 among other candidates than then" in guard.text_of(report)
    assert "NOT COUNTED: step-one-tensor: other candidates" in guard.text_of(report)


def test_where_base_has_no_such_case_no_command_is_promised():
    (sentence,) = compare(result(optimi=3.0), result()).turns
    assert sentence.endswith("(removed: optimi); not comparable: measure HEAD again with the same candidates")


def test_turns_are_those_of_the_alternation_that_a_candidate_is_in():
    """A package more in the second alternation says nothing of the first, in which ours and torch's ways are."""
    first = ["ours", "torch fused", STREAM]
    old = result(alternations=[first, ["ours", "optimi", STREAM]], optimi=3.0)
    new = result(ours=1.3, alternations=[first, ["ours", "optimi", "torchao", STREAM]], optimi=3.0, torchao=2.0)
    assert verdicts(compare(old, new)) == {
        "torch fused over ours": "REGRESSION",
        "optimi over ours": "other candidates in turn",
        "ours, share of the ceiling": "REGRESSION",
    }
    assert ["added: torchao" in sentence for sentence in compare(old, new).turns] == [True]


def test_one_alternation_beside_two_is_another_set_of_candidates():
    first = ["ours", "torch fused", STREAM]
    new = result(ours=1.3, alternations=[first, ["ours", "optimi", STREAM]], optimi=3.0)
    report = compare(result(optimi=3.0), new)
    assert set(verdicts(report).values()) == {"other candidates in turn"}
    assert "removed: optimi; or removed: torch fused" in report.turns[0]


def test_a_share_from_other_turns_does_not_excuse_a_peers_ratio():
    """Ours' share is of the first alternation, optimi's ratio of the second, in which nobody else is new."""
    second = ["ours", "optimi", STREAM]
    old = result(alternations=[["ours", "torch fused", STREAM], second], optimi=3.0)
    new = result(alternations=[["ours", "torch fused", "torchao", STREAM], second], optimi=2.0, torchao=2.0)
    assert verdicts(compare(old, new))["optimi over ours"] == "REGRESSION"


def test_who_is_a_peer():
    own = result(**{"ours,_triton": 1.0, "einsum,_then_our_step": 2.0, "reads_alone_(ceiling)": 0.9})
    assert peers_of(own) == ["torch fused", "einsum, then our step"] and variants_of(own) == ["ours, triton"]
    rules = {"baseline": "ours", "rules_of": "cpu", "candidates": {"ours": 0, "align": 0, "clip_grad_norm_, AdamW": 0}}
    assert peers_of(rules) == ["clip_grad_norm_, AdamW"] and variants_of(rules) == ["align"]


def test_what_is_no_longer_measured_is_named():
    old, new = result(DeepSpeedCPUAdam=1.5), result(ours=1.01)
    new["unavailable"] = {"DeepSpeedCPUAdam": "not importable"}
    report = guard.compare({"step-one": old, "step-two": result("step-two")}, {"step-one": new})
    assert report.gone == [
        "step-one: DeepSpeedCPUAdam over ours is no longer measured (not importable)",
        "step-two: the case has no result any more",
    ]
    assert guard.text_of(report).count("GONE: ") == 2


def test_other_versions_and_files_of_another_day_are_said():
    old, new = result(), result(ours=1.01)
    new["machine"] = {"torch": "2.14.0", "packages": {"deepspeed": "0.20.0"}}
    text = guard.text_of(guard.compare({"a": old, "b": old}, {"a": new, "b": copy.deepcopy(old)}))
    assert "torch 2.13.0 -> 2.14.0, deepspeed 0.19.8 -> 0.20.0" in text and "Not measured anew: b." in text


def test_packages_that_came_or_went_are_said():
    old, new = result(), result(ours=1.01)
    new["machine"] = {"torch": "2.13.0", "packages": {"deepspeed": None, "torchao": "0.18.0", "apex": None}}
    assert compare(old, new).versions == ["deepspeed 0.19.8 -> not installed", "torchao not installed -> 0.18.0"]


# ---------------------------------------------------------------- from a commit


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with a committed result of a machine; gives a function that writes the working tree's."""

    def git(*command: str) -> None:
        named = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *named, *command], check=True, capture_output=True)

    def write(own: dict) -> Path:
        path = tmp_path / "benchmarks" / "results" / "cpu-made-up-2c" / f"{own['name']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own))
        return path.parent

    git("init", "--quiet")
    folder = write(result())
    git("add", "."), git("commit", "--quiet", "-m", "results")
    monkeypatch.setattr(guard, "ROOT", tmp_path)
    return folder, write


def test_exit_status_says_whether_there_is_a_regression(repository, capsys):
    folder, write = repository
    assert guard.main(["--results", str(folder)]) == 0
    assert "Not measured anew: step-one." in capsys.readouterr().out
    write(result(ours=1.3))
    assert guard.main(["--results", str(folder)]) == 1
    assert "REGRESSION" in capsys.readouterr().out
    write(result(ours=0.9))
    assert guard.main(["--results", str(folder)]) == 0


def test_results_elsewhere_are_looked_up_by_the_folders_name(repository, tmp_path_factory, capsys):
    elsewhere = tmp_path_factory.mktemp("artifact") / "cpu-made-up-2c"
    elsewhere.mkdir()
    (elsewhere / "step-one.json").write_text(json.dumps(result(ours=1.3)))
    assert guard.main(["--results", str(elsewhere)]) == 1
    assert "step-one: torch fused over ours" in capsys.readouterr().out


def test_a_machine_without_committed_results_is_said_and_passes(repository, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("cpu-of-another-kind")
    (other / "step-one.json").write_text(json.dumps(result(ours=9.0)))
    assert guard.main(["--results", str(other)]) == 0
    assert "HEAD has no results of this kind of machine" in capsys.readouterr().out


def test_an_unknown_commit_or_folder_is_refused(repository, capsys):
    folder, _ = repository
    for arguments, says in ((["--against", "nope"], "'nope' is no commit"), (["--results", "nowhere"], "make bench")):
        with pytest.raises(SystemExit, match="2"):
            guard.main(["--results", str(folder), *arguments])
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("[cg]pu-*")), ids=lambda p: p.name)
def test_committed_results_can_be_compared(folder):
    """Every result file gives ratios, all of which are found again, unchanged, in a file that repeats it."""
    for name, own in guard.results_in(folder).items():
        ratios = guard.ratios_of(own)
        assert ratios, name
        assert guard.compare({name: own}, {name: own}).not_measured_anew == [name]
        other = copy.deepcopy(own) | {"title": "measured anew"}
        report = guard.compare({name: own}, {name: other})
        assert len(report.changes) == len(ratios) and not report.regressions and not report.gone
