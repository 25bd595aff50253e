"""The benchmark suite as a whole: cases and estimates, progress, what `make bench` prints, figures and tables."""

import ast
import importlib
import json
import re
import shutil
import types
from pathlib import Path

import pytest

from benchmarks import conftest, guard, harness, plot, report, run
from benchmarks.peers import PACKAGES
from benchmarks.progress import EVERY_S, Progress, minutes

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("test_*.py"))

# ---------------------------------------------------------------- the ten minutes


def module(name: str):
    return importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_how_long_a_case_takes(name):
    assert 1 <= module(name).SECONDS_A_CASE <= 60


def test_make_bench_ends_within_ten_minutes():
    """By the estimates of all cases that the packages here allow; an estimate is the budget and making the tensors."""
    seconds = {}
    for name in MODULES:
        cases = getattr(module(name), "CASES", {name: None}).values()
        here = [case for case in cases if getattr(case, "unavailable", None) is None]
        seconds[name] = module(name).SECONDS_A_CASE * len(here)
    assert sum(seconds.values()) <= 600, seconds


def test_estimates_are_in_the_readme_of_the_benchmarks():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    for name in MODULES:
        cases = len(getattr(module(name), "CASES", [name]))
        row = re.search(rf"^\| `{name}` \| (\d+) \| (\d+) s \|", text, re.MULTILINE)
        assert row, f"benchmarks/README.md has no row of {name}: | `{name}` | {cases} | ... s |"
        assert (int(row[1]), int(row[2])) == (cases, module(name).SECONDS_A_CASE), name


# ---------------------------------------------------------------- progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def progress_of(estimates: dict, in_place: bool) -> tuple[Progress, list[str], Clock]:
    lines, clock = [], Clock()
    return Progress(estimates, in_place=in_place, write=lines.append, clock=clock), lines, clock


def test_progress_says_which_case_of_how_many_and_what_is_left():
    show, lines, clock = progress_of({"a": 60.0, "b": 120.0, "c": 120.0}, in_place=False)
    show.begin("a")
    assert lines == ["[case 1 of 3, about 5 min left] a\n"]
    clock.now += 120  # twice as long as estimated: so will the others
    show.begin("b")
    assert lines[-1] == "[case 2 of 3, about 8 min left] b\n"
    clock.now += 240
    show.begin("c")
    clock.now += 200
    assert show.seconds_left() == pytest.approx(40)
    clock.now += 1000
    assert show.seconds_left() == 0
    show.begin("c")
    assert len(lines) == 3, "the same case again"


def test_a_log_has_a_line_now_and_then_and_a_terminal_one_line():
    show, lines, clock = progress_of({"a": 60.0, "b": 60.0}, in_place=False)
    show.begin("a")
    for _ in range(25):
        clock.now += 1
        show("some rounds")
    assert len(lines) == 1 + int(25 // EVERY_S) and all(line.endswith("some rounds\n") for line in lines[1:])
    show, lines, clock = progress_of({"a": 60.0, "b": 60.0}, in_place=True)
    show.begin("a")
    show("some rounds")
    assert lines[-1] == "\r\033[K[case 1 of 2, about 2 min left] some rounds" and len(lines) == 2


def test_minutes():
    assert [minutes(s) for s in (0, 44, 46, 89, 91, 600)] == [
        "under a minute",
        "under a minute",
        "about 1 min",
        "about 1 min",
        "about 2 min",
        "about 10 min",
    ]


def test_a_quick_run_shows_every_case_and_writes_nothing(capfd):
    """Of the smallest module, through the command; the cases are counted among those selected."""
    before = {path: path.read_bytes() for path in harness.RESULTS.rglob("*.json")}
    assert run.main(["--quick", "-k", "test_rules"]) == 0
    out, err = capfd.readouterr()
    assert "[case 1 of 2, under a minute left] test_rules, rules-one-pass" in err
    assert "[case 2 of 2, under a minute left] test_rules, rules-norm" in err
    assert "--quick: sizes fit in the caches" in out
    assert {path: path.read_bytes() for path in harness.RESULTS.rglob("*.json")} == before


def test_case_of_a_module_without_cases_is_the_module():
    def item(module, **params):
        return types.SimpleNamespace(module=module, callspec=types.SimpleNamespace(params=params))

    logits, scores = item(module("test_logits"), candidate="ours"), item(module("test_scores"), name="scores-8")
    assert (conftest.case_of(logits), conftest.case_of(scores)) == ("test_logits", "test_scores, scores-8")
    assert conftest.runs_here(logits) and conftest.runs_here(scores)
    cases = {"integration-made-up": types.SimpleNamespace(unavailable="not importable")}
    elsewhere = item(types.SimpleNamespace(CASES=cases), name="integration-made-up")
    assert not conftest.runs_here(elsewhere)


# ---------------------------------------------------------------- after a full run


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """`make bench` without the measuring: what pytest would have written is already there, drawing is left out."""
    monkeypatch.setattr(run.pytest, "main", lambda arguments: pytest.ExitCode.OK)
    monkeypatch.setattr(plot, "main", lambda arguments: None)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "device_slug", lambda: "cpu-made-up")

    def told(regressions: bool):
        change = guard.Change("a case", "a peer over ours", ratio(1.4), ratio(1.0 if regressions else 1.4))
        monkeypatch.setattr(guard, "check", lambda folder: guard.Report([change]))

    def ratio(middle: float) -> guard.Ratio:
        return guard.Ratio(harness.Spread(middle - 0.01, middle, middle + 0.01), True)

    (tmp_path / "cpu-made-up").mkdir()
    return told


@pytest.mark.parametrize("arguments, status", (([], 0), (["--check-regressions"], 1)))
def test_a_regression_is_reported_and_fails_on_request(measured, arguments, status):
    measured(regressions=True)
    assert run.main(arguments) == status
    measured(regressions=False)
    assert run.main(arguments) == 0


def test_without_a_result_there_is_nothing_to_report(measured, tmp_path, capsys):
    (tmp_path / "cpu-made-up").rmdir()
    assert run.main([]) == 0 and run.main(["--check-regressions"]) == 1
    assert "no result was written" in capsys.readouterr().out


# ---------------------------------------------------------------- result files


def test_machine_states_the_version_of_every_measured_package():
    packages = harness.machine_info()["packages"]
    assert {"deepspeed", "torch-optimi", "torchao", "bitsandbytes", "flashoptim", "trl", "transformers"} <= set(
        packages
    )
    assert packages["torch-optimi"] == harness._version("torch-optimi")
    assert all(version is None or re.match(r"\d", version) for version in packages.values())


# ---------------------------------------------------------------- tables and figures


def slowed(result: dict, peer: str, ratio: float) -> dict:
    """The same with a peer at another ratio to ours."""
    again = json.loads(json.dumps(result))
    again["candidates"][peer]["over_ours"] = {"p20": ratio - 0.01, "p50": ratio, "p80": ratio + 0.01}
    return again


@pytest.fixture(scope="module")
def own() -> tuple[Path, list[dict]]:
    return plot.newest_results()


def curve(ratios: dict[int, float]) -> dict:
    """A result file of a scaling curve, from the ratio of its peer at each size."""

    def row(over_ours: float) -> dict:
        spread = {key: over_ours for key in ("p20", "p50", "p80")}
        share = {key: 0.5 / over_ours for key in spread}
        times = {key: 1e-3 * over_ours for key in spread}
        return {
            "seconds": times,
            "over_ours": spread,
            "bytes": 1000,
            "fraction_of_stream": share,
            "work_of_ceiling": share,
        }

    points = [
        {
            "x": x,
            "elements": x,
            "ceiling": {"gigabytes_per_second": 50.0},
            "candidates": {"ours": row(1.0), "torch fused": row(ratio), "stream (ceiling)": row(0.5)},
        }
        for x, ratio in ratios.items()
    ]
    return {
        "name": "scaling-elements",
        "title": "step: elements",
        "machine": plot.newest_results()[1][0]["machine"],
        "baseline": "ours",
        "curve": "step with a clip, one tensor",
        "x": "elements",
        "candidates": points[-1]["candidates"],
        "points": points,
        "unavailable": {},
        "targets": [],
    }


def test_every_case_in_which_a_peer_wins_is_named(own):
    _, results = own
    cases = plot.compared(results)
    peers = {result["name"]: harness.peers_of(result) for result in cases}
    all_slower = [slowed(result, peer, 1.5) for result in cases for peer in peers[result["name"]][:1]]
    for result in all_slower:
        for peer in peers[result["name"]]:
            result["candidates"][peer]["over_ours"] = {"p20": 1.4, "p50": 1.5, "p80": 1.6}
    assert report.slower_sentence(all_slower) == "No peer was faster than ours in any case."
    for i, result in enumerate(all_slower):
        peer = peers[result["name"]][-1]
        sentence = report.slower_sentence([*all_slower[:i], slowed(result, peer, 0.87), *all_slower[i + 1 :]])
        other_work = r"(, which does other work,)?"
        named = rf"{re.escape(report.label(peer, result))}{other_work} 0\.87 \(0\.86 to 0\.88\) in "
        assert re.search(named + re.escape(f"*{report.short_title(result)}*"), sentence)
        assert sentence.count("*") == 2


def test_points_of_a_curve_at_which_a_peer_wins_are_named(own):
    _, results = own
    sentence = report.slower_sentence([*results, curve({1024: 0.7, 4096: 0.9, 16384: 1.0, 65536: 1.2})])
    faster, alike = sentence.split(" No difference to be told: ")
    assert faster.endswith("in *step with a clip, one tensor* at 1,024 (0.70), 4,096 (0.90) elements.")
    assert alike.endswith("in *step with a clip, one tensor* at 16,384 elements.")


@pytest.mark.parametrize(
    "p20, p50, p80, verdict",
    (
        (1.01, 1.02, 1.03, "faster"),
        (0.99, 1.02, 1.03, "no difference"),
        (0.97, 0.999, 1.2, "no difference"),
        (1.0, 1.0, 1.0, "no difference"),
        (0.97, 0.98, 0.99, "slower"),
    ),
)
def test_a_verdict_takes_the_whole_spread_and_is_the_same_in_the_sentence_and_the_figures(own, p20, p50, p80, verdict):
    spread = {"p20": p20, "p50": p50, "p80": p80}
    assert plot.verdict_on(spread) == verdict
    colours = {"faster": plot.FASTER, "slower": plot.SLOWER, "no difference": plot.NO_DIFFERENCE}
    assert plot._colour(spread) == colours[verdict]
    (result,) = [json.loads(json.dumps(r)) for r in own[1] if r["name"] == "step-one-tensor-clip"]
    result["candidates"] = {name: result["candidates"][name] for name in ("ours", "torch fused")}
    result["candidates"]["torch fused"]["over_ours"] = spread
    sentence = report.slower_sentence([result])
    assert sentence.startswith("Faster than ours") == (verdict == "slower")
    assert ("No difference to be told: " in sentence) == (verdict == "no difference")


def test_other_work_is_never_the_fastest_other_way_and_is_marked_in_figures(own, tmp_path):
    (result,) = [r for r in own[1] if r["name"] == "step-8-bit-moments"]
    assert result["other_work"] and all(name not in report.usual_rows([result])[-1] for name in result["other_work"])
    for name in result["other_work"]:
        assert plot.shown_name(name, result) == f"{name} (other work)"
    pytest.importorskip("matplotlib")
    drawn = plot.draw([result], tmp_path / "overview.svg").read_text()
    assert all(f"{name} (other work)" in drawn for name in result["other_work"])


def test_torchaos_private_class_is_called_so(own, tmp_path):
    (result,) = [json.loads(json.dumps(r)) for r in own[1] if r["name"] == "step-one-tensor"]
    result["candidates"]["torchao"] = result["candidates"]["torch fused"]
    assert PACKAGES["torchao"].optimizer == "_AdamW"
    assert "| torchao _AdamW |" in report.peer_rows([result])[0]
    pytest.importorskip("matplotlib")
    assert "torchao _AdamW" in plot.draw([result], tmp_path / "overview.svg").read_text()
    assert "torchao _AdamW" in plot.draw_throughput([result], tmp_path / "throughput.svg").read_text()


@pytest.mark.parametrize(
    "what, value, least, says",
    (
        ("over_ours", 1.784, 2.0, "1.78x, wanted 2.00x."),
        ("over_ours", 0.99887, 1.0, "0.999x, wanted 1.000x."),
        ("fraction_of_stream", 0.7708, 0.85, "77.1% of the stream, wanted 85.0% of the stream."),
        ("speed_of_baseline", 0.93, 0.95, "0.93x the speed without it, wanted 0.95x the speed without it."),
        ("agreement", 0.735, 0.85, "73.5% agreement of prediction and measurement, wanted 85.0% agreement of"),
    ),
)
def test_a_missed_target_is_named_with_its_value_on_a_cpu_too(own, what, value, least, says):
    (result,) = [json.loads(json.dumps(r)) for r in own[1] if r["name"] == "step-one-tensor"]
    met = harness.Target("ours", "over_ours", 1.0, 1.0)
    result["targets"] = [met.to_dict(), harness.Target("torch fused", what, least, value).to_dict()]
    sentence = report.targets_sentence([result])
    assert sentence.startswith("Targets: 1 of 2 met. MISSED: AdamW(fused), float32, one tensor, no clip: ")
    assert says in sentence
    for text in (report.readme_section(own[0], [result]), report.cpu_section(own[0], [result])):
        assert sentence in text


def test_every_kind_of_target_has_a_form(own):
    targets = [t["what"] for results in (own[1], *plot.gpu_results().values()) for r in results for t in r["targets"]]
    assert set(targets) <= set(report.UNITS)


def test_versions_and_dates_are_those_of_all_results():
    def of(name, date, **packages):
        return {
            "name": name,
            "machine": {"threads": 2, "torch": "2.13", "date": date, "commit": "c", "packages": packages},
        }

    results = [
        of("a", "2026-11-27 18:00 UTC", trl="1.0", apex=None),
        of("b", "2026-11-27 19:00 UTC", trl="1.0", apex="2.0"),
        of("c", "2026-11-26 09:00 UTC", trl="1.1", apex=None),
    ]
    assert report._packages(results) == " Packages: trl 1.0 (1.1 in c), apex 2.0."
    assert report._conditions(results) == "2 threads, torch 2.13, 2026-11-26 09:00 to 2026-11-27 19:00 UTC; commit c."
    assert plot.dates_of(results[:1]) == "2026-11-27 18:00 UTC"


def test_who_has_no_kernel_on_a_cpu_is_said_as_peers_has_it(own):
    forms = report.WITHOUT_CPU_KERNEL
    assert all(not any(o.get("triton") or o.get("fused") for o in PACKAGES[name].cpu) for name in forms)
    there = [name for name in forms if any(name in result["candidates"] for result in own[1])]
    (line,) = report._forms(own[1]) or [""]
    assert all(f"{name} ({forms[name]})" in line for name in there)
    assert report._forms([curve({1024: 0.7})]) == []


def test_axis_of_the_curves_holds_every_point(tmp_path):
    from benchmarks.scaling_plot import draw_scaling, lowest_of

    slow = curve({1024: 70.0, 65536: 1.2})  # 0.5 / 70 of the ceiling
    assert lowest_of([slow]) == 0.003 and lowest_of([curve({1024: 2.0})]) == 0.1
    assert 0 < lowest_of([curve({1024: 1e6})]) < 0.5e-6, "below all ticks"
    pytest.importorskip("matplotlib")
    drawn = draw_scaling([slow], tmp_path / "scaling.svg").read_text()
    assert "50 GB/s at the last point" in drawn


def test_readme_has_every_case_of_the_newest_results_and_a_command_for_every_figure(own):
    folder, results = own
    section = report.readme_section(folder, results)
    for result in plot.compared(results):
        assert f"| {result['title']} | " in section
    figures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)\n\n`(make [\w -]+)`[^\n]*`python -m benchmarks.plot`", section)
    assert [Path(path).stem for path, _ in figures] == list(plot.figures_of(folder, results))
    assert {"overview", "throughput"} <= {Path(path).stem for path, _ in figures}
    assert all((ROOT / path).exists() for path, _ in figures)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for _, command in figures for target in command.split()[1:])


def test_command_of_a_figure_is_the_one_that_measures_all_of_its_rows(own):
    _, results = own
    (step,) = [result for result in results if result["name"] == "step-one-tensor"]
    alone = {**step, "candidates": {k: v for k, v in step["candidates"].items() if k not in PACKAGES}}
    with_package = {**alone, "candidates": {**alone["candidates"], "optimi": step["candidates"]["torch fused"]}}
    assert report.command_for([alone]) == "make bench"
    assert report.command_for([alone, with_package]) == "make bench-full"
    in_trainer = {**alone, "measured_by": "make bench-trainers"}
    assert report.command_for([in_trainer, with_package]) == "make bench-trainers bench-full"
    assert {report.command_for(own) for own in plot.gpu_results().values()} == {"make gpu"}


def test_page_has_every_result_and_paths_from_its_own_folder(own):
    page = report.page_with(*own)
    for result in own[1]:
        title = result["curve"] if result.get("curve") else result["title"]
        assert title in page
    for path in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", page):
        assert (ROOT / "docs" / path).exists()
    for line in page.split("\n\n"):
        widths = {row.count("|") for row in line.splitlines() if row.startswith("|")}
        assert len(widths) <= 1, "a row has too few or too many cells"


def test_curves_are_drawn_and_listed_where_there_are_some_and_else_left_out(own, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    cpu, _ = own
    shutil.copytree(cpu, tmp_path / cpu.name, ignore=shutil.ignore_patterns("*.svg", "scaling-*"))
    (tmp_path / "README.md").write_text(f"{report.START} -->\n{report.END}\n")
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    plot.main([])
    assert "no curve was measured, so that there is no scaling.svg" in capsys.readouterr().out
    assert "scaling.svg" not in (tmp_path / "README.md").read_text()
    (tmp_path / cpu.name / "scaling-elements.json").write_text(json.dumps(curve({1024: 0.7, 65536: 1.2})))
    plot.main([])
    assert "scaling.svg" in capsys.readouterr().out and (tmp_path / cpu.name / "scaling.svg").stat().st_size > 5000
    readme, page = (tmp_path / "README.md").read_text(), (tmp_path / report.PAGE).read_text()
    assert f"({cpu.name}/scaling.svg)" in readme and f"(../{cpu.name}/scaling.svg)" in page
    assert "| 65,536 | 1.20 (1.20 to 1.20) | 50% |" in page and "0.70" in readme


def test_throughput_shows_each_step_beside_the_ceiling_of_its_run(own, tmp_path):
    pytest.importorskip("matplotlib")
    _, results = own
    drawn = plot.draw_throughput(results, tmp_path / "throughput.svg").read_text()  # the texts stand in its comments
    steps = [result for result in plot.compared(results) if result["name"].startswith("step-")]
    assert steps
    for result in steps:
        assert (
            harness.short_title(result) in drawn
            and f"ceiling {result['ceiling']['gigabytes_per_second']:,.0f}" in drawn
        )
        for name in harness.peers_of(result):
            row = result["candidates"][name]
            if row["bytes"] is not None:
                ratio, moved = row["over_ours"]["p50"], row["bytes"] / result["elements"]
                assert f"{moved:.0f} B an element, {ratio:.2f}x the time" in drawn
    again = plot.draw_throughput(results, tmp_path / "again.svg").read_text()
    assert again == drawn, "the same results give the same file"
    assert plot.draw_throughput([r for r in results if r not in steps], tmp_path / "none.svg") is None
    assert not (tmp_path / "none.svg").exists()


def test_nothing_in_the_suite_reads_a_clock_but_the_harness_and_the_progress():
    """A time taken elsewhere would not be in alternation. The GPU and the workers have clocks of their own."""
    allowed = {"harness.py", "progress.py", "base_worker.py", "base.py", "run.py"}
    allowed |= {path.name for path in (ROOT / "benchmarks").glob("gpu*.py")}
    for path in (ROOT / "benchmarks").glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert path.name in allowed or not names & {"perf_counter", "perf_counter_ns", "process_time"}, path.name
