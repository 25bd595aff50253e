"""The overshoot study does what its pre-registration says: controls, search, statistics, resuming."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

import fused_clip_adam as fca
from benchmarks.overshoot import __main__ as command
from benchmarks.overshoot import figures, gate_overlap, methods, report, study, summary
from benchmarks.overshoot.loop import CLIP, excess, run
from benchmarks.overshoot.methods import BLOCK, METHODS, Optimizer, gate_of_align
from benchmarks.overshoot.study import FOLDER, PLAIN, Key, Plan, Runs, climb
from benchmarks.overshoot.tasks import TASKS

SETTING = TASKS["bandit"].setting


def trained(options, gate, steps=6, seed=0):
    """Weights after some steps on a small regression, and the share kept."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 70), torch.nn.Tanh(), torch.nn.Linear(70, 5))
    x, y = torch.randn(64, 30), torch.randn(64, 5)
    optimizer = Optimizer(list(model.parameters()), 1e-2, options, gate, seed)
    logp = torch.zeros(4)
    stats = fca.clip_stats(logp, logp, torch.ones(4))
    for i in range(steps):
        optimizer.step((model(x[8 * i : 8 * i + 16]) - y[8 * i : 8 * i + 16]).square().mean(), stats)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer.kept


def test_the_controls_gate_is_that_of_the_kernel():
    """align's gate, taken by the controls' way of gating, is AlignedMomentum: so what they alter is the gate alone."""
    by_kernel, _ = trained({"overshoot": fca.AlignedMomentum(BLOCK)}, None)
    by_gate, kept = trained({}, lambda aligned, random: aligned)
    plain, _ = trained({}, None)
    assert 0.0 < kept < 1.0, "the gate never acts here"
    # Adding back what a plain step took rounds twice more per step, each 2^-24 of a weight below 1.
    torch.testing.assert_close(by_gate, by_kernel, rtol=0, atol=6 * 2 * 2.0**-24)
    assert float((by_kernel - plain).abs().max()) > 1e-3


def test_a_gate_that_keeps_everything_is_plain_adamw():
    everything, _ = trained({}, lambda aligned, random: [torch.ones_like(k) for k in aligned])
    plain, _ = trained({}, None)
    torch.testing.assert_close(everything, plain, rtol=0, atol=0)


def test_the_random_gate_keeps_as_much():
    random = torch.Generator().manual_seed(1)
    lengths = [BLOCK * 5 + 100, BLOCK * 3, 100, 100, 37]
    aligned = [
        torch.cat([torch.full((len(b),), float(torch.rand(()) < 0.5)) for b in torch.zeros(n).split(BLOCK)])
        for n in lengths
    ]
    differ = 0
    for _ in range(20):
        dealt = methods._shuffled(aligned, random)
        assert [len(k) for k in dealt] == lengths
        for length in (BLOCK, 100, 37):
            before, after = (
                sum(float(b[0]) for k in gates for b in k.split(BLOCK) if len(b) == length)
                for gates in (aligned, dealt)
            )
            assert before == after
        assert all(bool((b == b[0]).all()) for k in dealt for b in k.split(BLOCK))
        differ += any(not torch.equal(a, b) for a, b in zip(aligned, dealt))
    assert differ > 10
    (half,) = methods._averaged([torch.tensor([1.0, 0.0, 0.0, 1.0])], random)
    assert half.tolist() == [0.5] * 4


def test_gate_of_align():
    m, g = torch.ones(2 * BLOCK + 1), torch.ones(2 * BLOCK + 1)
    g[BLOCK : 2 * BLOCK] = -1.0
    g[-1], m[-1] = -1.0, 0.0  # no momentum: kept
    k = gate_of_align(m, g)
    assert k[:BLOCK].eq(1).all() and k[BLOCK : 2 * BLOCK].eq(0).all() and k[-1] == 1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name):
    """On the bandit, in a tenth of its batches, better than chance, which is a reward of 0.1; and twice the same."""
    first, second = (run("bandit", METHODS[name], SETTING.lr, 0, shorten=3) for _ in range(2))
    assert replace(first, cpu_s=0) == replace(second, cpu_s=0)
    assert first.held_out > 0.2 and not first.failed and math.isfinite(first.overshoot), first
    assert (first.kept is not None) == (METHODS[name].gate is not None)
    if name not in (PLAIN, "KL stop"):
        assert first.auc != run("bandit", METHODS[PLAIN], SETTING.lr, 0, shorten=3).auc, f"{name} changes nothing"


def test_kl_stop_stops():
    full, stopped = (run("bandit", METHODS[name], 4 * SETTING.lr, 0, shorten=6) for name in (PLAIN, "KL stop"))
    assert stopped.steps < full.steps and stopped.kl < full.kl


@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_and_repeats(name, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.overshoot.tasks.WARM_STARTS", tmp_path)
    if name in ("cartpole", "acrobot"):
        pytest.importorskip("gymnasium")
    method = METHODS["align"]
    first = run(name, method, TASKS[name].setting.lr, 3, shorten=12)
    again = run(name, method, TASKS[name].setting.lr, 3, shorten=12)  # language: now from the file of the warm start
    assert replace(first, cpu_s=0) == replace(again, cpu_s=0)
    other = run(name, method, TASKS[name].setting.lr, 4, shorten=12)
    assert other.overshoot != first.overshoot
    assert 0.0 <= first.auc <= 1.0 and 0.0 <= first.held_out <= 1.2


def test_language_rewards_the_right_answer():
    task = TASKS["language"].__new__(TASKS["language"])
    task.random = torch.Generator().manual_seed(0)
    prompts, answers = task._prompts(3)
    assert prompts.shape == (3, 7) and (prompts[:, -1] == task.EQUALS).all()
    assert torch.equal(answers[:, :6].flip(1), prompts[:, :6]) and (answers[:, 6] == task.END).all()


def test_a_run_that_fails_is_counted_not_raised(monkeypatch):
    monkeypatch.setattr(Optimizer, "set_lr", lambda self, lr: None)
    failed = run("bandit", METHODS[PLAIN], 1e38, 0, shorten=6)
    assert failed.failed and failed.held_out == 0.0 and failed.curve[-1] == 0.0


def test_excess_looks_where_the_advantage_looks():
    D = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.1, 9.0])
    A = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 0.0])
    expected = [0.5 - math.log1p(CLIP), 0.0, 0.0, math.log1p(-CLIP) + 0.5, 0.0, 0.0]
    torch.testing.assert_close(excess(D, A), torch.tensor(expected))


@pytest.mark.parametrize("top", [-5, -2, 0, 3, 5])
def test_climb_finds_the_top_and_brackets_it(top):
    asked = []

    def value(e):
        asked.append(e)
        return -abs(e - top)

    assert climb(value, 0, 5) == top
    assert {e for e in (top - 1, top + 1) if abs(e) <= 5} <= set(asked) and all(abs(e) <= 5 for e in asked)
    assert climb(lambda e: 0.0, 2, 5) == 2, "a plateau is not left"


def test_statistics_against_known_numbers():
    # t tables: P(T > 2.262) = 0.025 at 9 degrees of freedom, P(T > 1.895) = 0.05 at 7, P(T > 1) = 0.25 at 1.
    assert summary.t_tail(2.262157, 9) == pytest.approx(0.025, abs=1e-7)
    assert summary.t_tail(1.894579, 7) == pytest.approx(0.05, abs=1e-7)
    assert summary.t_tail(1.0, 1) == pytest.approx(0.25)
    assert summary.t_quantile(0.975, 9) == pytest.approx(2.262157, abs=1e-5)
    # Student's sleep data (1908): 10 pairs, mean 1.58, t = 4.0621, p = 0.002833.
    drug1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    drug2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    paired = summary.Paired.of(drug2, drug1)
    assert (paired.mean, paired.n) == (pytest.approx(1.58), 10) and paired.p == pytest.approx(0.002833, abs=1e-6)
    assert paired.mean / paired.se == pytest.approx(4.0621, abs=1e-4)
    assert (paired.low, paired.high) == (pytest.approx(0.7001, abs=1e-4), pytest.approx(2.4599, abs=1e-4))
    assert summary.Paired.of([1.0, 1.0], [1.0, 1.0]).p == 1.0 and summary.Paired.of([2.0, 2.0], [1.0, 1.0]).p == 0.0
    assert summary.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert summary.holm([0.6, 0.7]) == [1.0, 1.0]
    # A run that failed at once has no overshoot: its pair does not count, and the others do.
    some = summary.Paired.of([math.nan, 2.0, 3.0, math.inf], [1.0, 1.0, 1.0, 1.0])
    assert (some.n, some.mean) == (2, 1.5) and summary.Paired.of([math.nan], [1.0])[-2:] == (1.0, 0)


def spread(mean, half=0.01):
    return {"mean": mean, "se": half / 2, "low": mean - half, "high": mean + half, "p": 0.5, "n": 8}


def found(verdicts, against_controls=(0.0, 0.0)):
    """A task's summary in which methods got these verdicts, and align these differences from both controls."""
    everything = {name: spread(0.0) for name in summary.COMPARED}
    rows = [
        {
            "method": name,
            "group": METHODS[name].group,
            "lr": 1e-3,
            "bracketed": True,
            "means": dict.fromkeys(summary.MEANS, 0.5) | {"kept": None, "curve": []},
            "search": [{"lr": lr, **dict.fromkeys(summary.COMPARED, lr)} for lr in (1e-3, 2e-3)],
            "failed": 0,
        }
        | ({} if name == PLAIN else {"own_lr": everything, "adamw_lr": everything, "p_holm": 0.5, "verdict": verdict})
        | ({} if name == "lr decay" else {"auc_minus_lr_decay": spread(0.0123)})
        for name, verdict in {PLAIN: None, **verdicts}.items()
    ]
    auc, overshoot = (everything | {name: spread(x)} for name, x in zip(("auc", "overshoot"), against_controls))
    controls = [
        {"method": "align", "control": name, "own_lr": auc, "adamw_lr": overshoot}
        for name in ("random gate", "scaled momentum")
    ]
    hot = [{"method": "align", "times_best_lr": 2.0, "same_lr": everything, "means": rows[0]["means"]}]
    hot.append({"method": PLAIN, "times_best_lr": 2.0, "means": rows[0]["means"]})
    sizes = {"batches": 9, "tuning_seeds": 3, "seeds": 8, "detectable": 0.01}
    return {**sizes, "methods": rows, "controls": controls, "hot": hot}


def summary_of(**tasks):
    machine = {"cpu": "a CPU", "torch": "2", "date": "today", "commit": "none"}
    return {"machine": machine, "runs": 1, "cpu_hours": 1.0, "level": 0.05, "tasks": tasks}


def test_advice_follows_the_registered_rules():
    none = dict.fromkeys(("lr decay", "align", "cautious", "Grams"), "not shown")
    nothing = report.advice(summary_of(a=found(none), b=found(none)))
    assert "none is recommended" in nothing and "0 of 2 tasks" in nothing and "large language model" in nothing
    twice = none | {"align": "better"}
    both = summary_of(a=found(twice, (0.1, -0.1)), b=found(twice | {"Grams": "better"}, (0.1, 0.1)), c=found(none))
    assert report.recommended(both) == ["align"]
    text = report.advice(both)
    assert "slower on none: `align`" in text and "Faster: `Grams` on b" in text
    assert "learned faster on 2 of 3 tasks (a, b) and overshot less on 1 of 3 tasks (a)" in text
    assert "`align` +0.0123" in text, "recommended, but not compared with lr decay"
    once_worse = summary_of(a=found(twice), b=found(twice), c=found(none | {"align": "worse", "lr decay": "better"}))
    assert report.recommended(once_worse) == []
    text = report.advice(once_worse)
    assert "Slower: `align` on c" in text and "faster: `lr decay` on c" in text and "Faster: `align` on a, b" in text


def test_advice_says_what_a_high_learning_rate_does():
    cold, warm = found({"align": "worse"}), found({"align": "worse"})
    warm["hot"].append({**warm["hot"][0], "times_best_lr": 4.0, "same_lr": {"auc": spread(0.1)}})
    assert "At 4 times" not in report.advice(summary_of(a=cold)) and "At 2 times" not in report.advice(
        summary_of(a=cold)
    )
    text = report.advice(summary_of(a=cold, b=warm, c=warm))
    assert "At 4 times AdamW's best learning rate, faster than AdamW there: `align` on b, c." in text


def test_advice_of_one_blunt_task():
    task = found({"align": "not shown"}) | {"detectable": 0.2}
    text = report.advice(summary_of(a=task))
    assert "1 small task (a)" in text and "over 8 held-out seeds" in text and "of 1 task " in text
    assert "On a nothing below 0.2 could have been told, where AdamW has 0.5." in text


def test_specific_needs_both_controls():
    task = found({"align": "better"}, (0.1, -0.1))
    assert report.specific(task) == (True, True)
    task["controls"][1] = task["controls"][1] | {"own_lr": {"auc": spread(0.0)}}
    assert report.specific(task) == (False, True)
    assert report.specific(task | {"controls": []}) is None


def test_page_and_figures_show_every_method(tmp_path):
    pytest.importorskip("matplotlib")
    names = {name: "not shown" for name in METHODS if name != PLAIN}
    made = summary_of(language=found(names), bandit=found(names | {"Grams": "worse"}))
    page = report.page(made, {"tasks": {"bandit": {"same_gate": 0.25, "elements_that_differ": 0.5}}})
    assert "25% of the steps on bandit, where 50% of the elements differ" in page
    assert "lr decay" not in str(report.page(summary_of(a=found({"align": "worse"})))).split("## Tables")[0]
    for name in names:
        assert page.count(f"| {name} | 0.001 |") == 2, name
        assert name in report.terminal_table(made)
    for draw in (figures.draw_differences, figures.draw_frontier, figures.draw_hot):
        path = draw(made, tmp_path / f"{draw.__name__}.svg")
        assert path.read_bytes() == draw(made, tmp_path / "again.svg").read_bytes(), "not the same file twice"
    drawn = (tmp_path / "draw_differences.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in [*names, "worse"])
    text = f"before\n{report.GENERATED_START} -->\nold\n{report.GENERATED_END}\nafter"
    assert "old" not in report.readme_with(text, made) and report.readme_with(text, made).endswith("after")


SMALL = Plan(tasks=("bandit",), methods=(PLAIN, "align", "random gate"), seeds=2, reach=1, hot=(), shorten=15)


def test_a_study_resumes_where_it_was_killed(tmp_path):
    """Its runs, and so its summary, are the same; nothing is run twice; a torn last line is run again."""
    whole = study.run_all(SMALL, tmp_path / "whole", 1, lambda text: None)
    lines = (tmp_path / "whole" / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "runs.jsonl").write_text("".join(lines[:5]) + lines[5][:40])  # as a kill leaves it
    resumed = study.run_all(SMALL, tmp_path / "resumed", 2, lambda text: None)
    assert whole.records.keys() == resumed.records.keys()
    for key, record in whole.records.items():
        assert replace(record, cpu_s=0) == replace(resumed.records[key], cpu_s=0), key
    kept = [json.loads(line)["cpu_s"] for line in lines[:5]]
    assert [record.cpu_s for key, record in sorted(resumed.records.items())][:5] == kept, "the first five ran again"
    tables = [summary.summarize(runs, SMALL)["tasks"] for runs in (whole, resumed)]
    assert tables[0] == tables[1]
    assert json.loads((tmp_path / "whole" / "machine.json").read_text())["torch"] == torch.__version__
    rows = {row["method"]: row for row in tables[0]["bandit"]["methods"]}
    assert rows[PLAIN].keys().isdisjoint({"own_lr", "verdict"}) and rows["random gate"]["means"]["kept"] > 0
    assert {c["control"] for c in tables[0]["bandit"]["controls"]} == {"random gate"}


def test_time_left_is_what_other_methods_took():
    record = run("bandit", METHODS[PLAIN], 1e-3, 0, shorten=15)
    plan, runs = replace(SMALL, methods=(PLAIN, "align", "Grams")), Runs(FOLDER)
    for seed in range(10):
        runs.records[Key("bandit", PLAIN, 0, seed)] = replace(record, cpu_s=60.0)
    assert "not known" in study.minutes_left(runs, plan, set(), 1)
    assert study.minutes_left(runs, plan, {("bandit", PLAIN)}, 1) == "about 20 min left"
    for seed in range(4):
        runs.records[Key("bandit", "align", 0, seed)] = replace(record, cpu_s=60.0)
    assert study.minutes_left(runs, plan, {("bandit", PLAIN)}, 2) == "about 8 min left"
    assert study.minutes_left(runs, plan, {("bandit", name) for name in plan.methods}, 2) == "all ready"


def test_runs_of_another_protocol_are_refused(tmp_path):
    Runs(tmp_path / "runs.jsonl").add(Key("bandit", PLAIN, 0, 0), run("bandit", METHODS[PLAIN], 1e-3, 0, shorten=15))
    text = (tmp_path / "runs.jsonl").read_text()
    with pytest.raises(SystemExit, match=r"protocol or length.*--fresh"):
        Runs.read(tmp_path, shorten=2)
    (tmp_path / "runs.jsonl").write_text(text.replace(study.protocol(), "another"))
    with pytest.raises(SystemExit, match=r"another protocol.*--fresh"):
        Runs.read(tmp_path)


def test_command_keeps_parts_out_of_the_results():
    assert command.parse([])[0].output == FOLDER
    for part in (["--quick"], ["--tasks", "bandit"], ["--methods", "align"]):
        assert FOLDER not in (command.parse(part)[0].output, *command.parse(part)[0].output.parents)
        with pytest.raises(SystemExit):
            command.parse([*part, "--output", str(FOLDER)])
    assert command.parse(["--tasks", "bandit", "bandit"])[1].tasks == ("bandit",)
    whole = command.parse(["--tasks", "bandit", "language", "cartpole", "--methods", *reversed(METHODS)])
    assert whole[1] == Plan() and whole[0].output == FOLDER
    with pytest.raises(SystemExit):
        command.parse(["--jobs", "0"])


def test_fresh_deletes_its_own_files_only(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_all", lambda plan, folder, jobs, show: Runs.read(folder, plan.shorten))
    monkeypatch.setattr(report, "write", lambda *arguments: None)
    (tmp_path / "runs.jsonl").write_text("{")
    (tmp_path / "thesis.txt").write_text("years")
    command.main(["--quick", "--fresh", "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_studies_of_one_folder_are_refused(tmp_path):
    with study._alone(tmp_path), pytest.raises(SystemExit, match="another process"):
        study.run_all(SMALL, tmp_path, 1, lambda text: None)


def test_a_readme_without_a_place_for_the_advice_is_refused_before_the_runs(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("nothing")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(command, "run_all", lambda *arguments: pytest.fail("ran first"))
    with pytest.raises(SystemExit, match=r"README[.]md needs"):
        command.main([])


def test_an_incomplete_study_says_what_is_missing():
    with pytest.raises(SystemExit, match=r"not complete.*bandit"):
        summary.summarize(Runs(FOLDER), SMALL)


def test_gate_overlap_tells_the_random_gate_from_aligns():
    found = gate_overlap.overlap("bandit", shorten=6)
    assert 0.0 < found["same_gate"] < 1.0 and 0.0 < found["elements_that_differ"] < 0.5


REGISTERED = (FOLDER.parent.parent / "overshoot" / "PREREGISTRATION.md").read_text()


def test_what_is_run_is_what_was_registered():
    plan = Plan()
    named = set(re.findall(r"`([^`]+)`", REGISTERED.split("## Methods")[1].split("## Procedure")[0]))
    assert {name for name in METHODS if name not in named} == set()
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| (\d+) epochs x (\d+) \| (\d+) \| (\d+) / (\d+) \|$", REGISTERED, re.MULTILINE
    )
    assert {row[0] for row in rows} == set(plan.tasks)
    for name, *numbers in rows:
        setting = TASKS[name].setting
        registered = (setting.epochs, setting.minibatches, setting.rollouts, setting.tuning, setting.held_out)
        assert registered == tuple(map(int, numbers)), name
    for task in plan.tasks:
        assert not set(plan.tuning_seeds(task)) & set(plan.held_out_seeds(task))
        assert len(plan.held_out_seeds(task)) >= 5
    assert (plan.reach, plan.hot) == (5, (1, 2))


def test_published_results_follow_from_the_runs():
    runs, plan = Runs.read(FOLDER), Plan()
    published = json.loads((FOLDER / "summary.json").read_text())
    made = json.loads(json.dumps(summary.summarize(runs, plan)))
    assert made["tasks"].keys() == published["tasks"].keys()
    assert close(made["tasks"], published["tasks"]), "run python -m benchmarks.overshoot.report"
    assert published["runs"] == len(runs.records)
    assert report.PAGE.read_text() == report.page(published, report.read_overlap())
    readme = (report.ROOT / "README.md").read_text()
    assert report.readme_with(readme, published) == readme


def close(a, b):
    """Equal but for rounding in the last digits, which another platform's libm may do otherwise."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-9, abs=1e-12, nan_ok=True) if isinstance(a, float) else a == b
