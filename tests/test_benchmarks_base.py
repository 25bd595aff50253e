"""`python -m benchmarks.run --base REF`: two versions in processes of their own, in alternation, nothing left."""

import itertools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fused_clip_adam as fca
from benchmarks import base, base_worker, harness, run, test_step
from benchmarks.harness import Alternation
from fused_clip_adam.backends import native

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "fused_clip_adam" / "_C.abi3.so"

in_a_checkout = pytest.mark.skipif(
    not (ROOT / ".git").exists() or not LIBRARY.exists(), reason="needs the repository and its CPU library"
)


def is_gone(folder: Path) -> bool:
    """From the disk, with what git knew of it. Other tests and people may have worktrees of their own meanwhile."""
    return not folder.parent.exists() and str(folder) not in base.git("worktree", "list", "--porcelain")


@pytest.fixture
def built_as_here(monkeypatch):
    """Instead of a minute of compiling: HEAD gets this checkout's package, `edit` appended to its first file.

    Gives a list that receives the folders of the worktrees.
    """

    def instead(edit: str = "") -> list[Path]:
        folders = []

        def copy(folder: Path, progress) -> None:
            folders.append(folder)
            package = folder / "fused_clip_adam"
            shutil.rmtree(package)
            shutil.copytree(ROOT / "fused_clip_adam", package, ignore=shutil.ignore_patterns("__pycache__"))
            first = package / "__init__.py"
            first.write_text(first.read_text() + edit)

        monkeypatch.setattr(base, "build", copy)
        return folders

    return instead


# ---------------------------------------------------------------- verdicts


def row(*ratios: float) -> base.Row:
    return base.Row("a case", Alternation({base.BASE: list(ratios), base.TREE: [1.0] * len(ratios)}, base.TREE, 0.0, 0))


@pytest.mark.parametrize(
    "ratios, verdict",
    (
        ((1.30, 1.31, 1.32, 1.33, 1.34), "faster"),
        ((0.70, 0.71, 0.72, 0.73, 0.74), "slower"),
        ((0.80, 0.90, 1.20, 1.40, 1.50), "same"),  # the spread holds 1
        ((1.021, 1.022, 1.023, 1.024, 1.025), "same"),  # does not, but is next to it
        ((0.975, 0.976, 0.977, 0.978, 0.979), "same"),
    ),
)
def test_verdict(ratios, verdict):
    assert row(*ratios).verdict == verdict
    assert verdict in base.table([row(*ratios)], "v1").splitlines()[-1]


def test_fail_slower_counts_the_working_trees_time_over_the_bases():
    slow = row(*[0.8] * 5)  # 25% longer
    assert slow.slower_by(20) and not slow.slower_by(30)
    assert not row(*[1.25] * 5).slower_by(0) and not row(0.5, 0.6, 1.0, 1.5, 2.0).slower_by(0)


def test_a_case_that_was_not_compared_is_in_the_table_with_its_reason():
    missing = base.Row("from logits", why_not="the base lacks it (AttributeError: policy_loss_from_logits)")
    assert missing.verdict == "not compared" and not missing.slower_by(0)
    assert base.table([missing], "v1").splitlines()[-1].split(maxsplit=2)[-1] == f"not compared: {missing.why_not}"


def test_steps_are_those_of_the_benchmarks():
    same_work = {name: case for name, case in test_step.CASES.items() if not case.other_work}
    assert len(same_work) >= 6 and set(same_work) < set(base.CASES)
    for name, case in same_work.items():
        options = base.CASES[name].options(True)
        assert options["shapes"] == case.shapes(True) and options["max_norm"] == case.max_norm
        assert getattr(torch, options["dtype"]) == case.dtype
    assert base.SECONDS_A_CASE * len(base.CASES) < 180


# ---------------------------------------------------------------- the worker


SMALL = {
    "step": {"shapes": [[300, 7], [5]], "dtype": "float32", "max_norm": 1.0},
    "objective": {"shape": [6, 40]},
    "logits": {"rows": 5, "vocabulary": 300},
}


@pytest.mark.skipif(bool(native.unavailable()), reason="the cpu library is not built here")
@pytest.mark.parametrize("kind", base_worker.BUILDERS)
def test_worker_runs_every_kind_and_its_sample_tells_what_it_computes(kind):
    worker = base_worker.Worker()
    answer = worker.answer({"do": "build", "kind": kind, "options": SMALL[kind]})
    sample = torch.tensor(answer["sample"])
    assert sample.isfinite().all() and sample.norm() > 0
    assert worker.answer({"do": "run"})["seconds"] > 0
    again = base_worker.Worker().answer({"do": "build", "kind": kind, "options": SMALL[kind]})
    assert again == answer, "two versions of one code would not be found to do the same work"


@pytest.mark.skipif(bool(native.unavailable()), reason="the cpu library is not built here")
def test_sample_of_a_step_is_that_of_torch():
    built = base_worker.build_step(**SMALL["step"])
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) for shape in SMALL["step"]["shapes"]]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).mul_(0.02)) for s in SMALL["step"]["shapes"]]
    start = [base_worker._some(p).clone() for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1).step()
    built.before()
    built.call()
    moved = torch.cat([base_worker._some(p) - before for p, before in zip(params, start, strict=True)])
    torch.testing.assert_close(built.sample(), moved, rtol=1e-4, atol=1e-7)


def test_a_worker_imports_its_own_version_and_sleeps_while_the_other_is_timed(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_CLIP_ADAM_LIBRARY", "elsewhere.so")  # would give both versions the same kernels
    environment = base.worker_environment(tmp_path)
    assert environment["PYTHONPATH"] == str(tmp_path) and environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    assert "FUSED_CLIP_ADAM_LIBRARY" not in environment


def test_worker_says_what_a_version_lacks(monkeypatch):
    monkeypatch.delattr(fca, "policy_loss_from_logits")
    answer = base_worker.Worker().answer({"do": "build", "kind": "logits", "options": SMALL["logits"]})
    assert "policy_loss_from_logits" in answer["failed"]


def test_cores_used_by_workers_are_not_the_others():
    """What a busy child uses counts as others' unless it is named, and then as the measurement's own."""
    if harness._cpu_seconds() is None:
        pytest.skip("the kernel does not say what other processes use")
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        used, until = 0.0, time.monotonic() + 60  # a busy machine may not let it run at once
        while used < 0.3 and time.monotonic() < until:
            time.sleep(0.1)
            unnamed = harness._cpu_seconds().own
            used = harness._cpu_seconds([child.pid]).own - unnamed
        assert used >= 0.3
    finally:
        child.kill()
        child.wait()
    assert harness._cpu_seconds([child.pid]) is None, "a worker that ended is not taken for one that used nothing"


# ---------------------------------------------------------------- the whole


@in_a_checkout
def test_the_same_code_is_compared_and_nothing_is_left(built_as_here, capfd):
    folders = built_as_here()
    assert run.main(["--base", "HEAD", "--quick", "-k", "step-2000"]) == 0
    out = capfd.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("float32, tensors of 1,024")]
    assert line.split()[-1] in ("same", "faster", "slower", "busy)") and "not compared" not in line
    (folder,) = folders
    assert is_gone(folder)


SLOW = """
_fast = policy_loss
def policy_loss(*args, **kwargs):
    import time
    time.sleep({s})
    return _fast(*args, **kwargs)
del policy_loss_from_logits
"""


@in_a_checkout
def test_a_slow_base_is_seen_and_one_that_lacks_a_case_is_listed(built_as_here, capfd):
    built_as_here(SLOW.format(s=0.1))
    assert run.main(["--base", "HEAD", "--quick", "-k", "objective", "--fail-slower", "5"]) == 0
    out = capfd.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("PPO loss, gradient")]
    assert line.split("x  ")[-1].split()[4] == "faster"
    (line,) = [line for line in out.splitlines() if line.startswith("PPO loss from logits")]
    assert "not compared: the base lacks it" in line and "policy_loss_from_logits" in line


@in_a_checkout
def test_a_slow_working_tree_fails_on_request(built_as_here, monkeypatch, capfd):
    built_as_here()
    slept = itertools.count()

    def slow(version) -> float:
        next(slept)
        return real(version) + (0.1 if version.name == base.TREE else 0.0)

    real = base.Version.run
    monkeypatch.setattr(base.Version, "run", slow)
    assert run.main(["--base", "HEAD", "--quick", "-k", "objective-ppo", "--fail-slower", "5"]) == 1
    assert "slower by more than 5%: PPO loss, gradient" in capfd.readouterr().out and next(slept) >= 10


WRONG = """
_right = policy_loss
def policy_loss(*args, **kwargs):
    loss, stats = _right(*args, **kwargs)
    return 1.01 * loss, stats
"""


@in_a_checkout
def test_a_base_that_computes_something_else_is_not_timed(built_as_here, capfd):
    built_as_here(WRONG)
    assert run.main(["--base", "HEAD", "--quick", "-k", "objective-ppo"]) == 0
    assert "not compared: the base does other work: its result is 1.0e-02 away" in capfd.readouterr().out


@in_a_checkout
@pytest.mark.parametrize(
    "edit, says",
    (
        ("raise RuntimeError('no good')\n", "the base does not import: RuntimeError: no good"),
        ("import os\nos._exit(3)\n", "the process of the base ended in 'version' (status 3)"),
    ),
)
def test_a_base_that_does_not_run_is_a_sentence(built_as_here, capfd, edit, says):
    folders = built_as_here(edit)
    assert run.main(["--base", "HEAD", "--quick", "-k", "objective-ppo"]) == 2
    assert says in capfd.readouterr().err and is_gone(*folders)


@in_a_checkout
def test_an_unknown_commit_and_a_wrong_selection_are_sentences(capfd):
    assert run.main(["--base", "no-such-branch"]) == 2
    assert "--base no-such-branch: no such commit" in capfd.readouterr().err
    assert run.main(["--base", "HEAD", "-k", "nothing-like-it"]) == 2
    assert "no case has this in its name" in capfd.readouterr().err


@in_a_checkout
def test_a_base_that_does_not_compile_is_a_sentence_with_the_output():
    with base.worktree("HEAD") as folder:
        (folder / "setup.py").write_text("raise SystemExit('the compiler said no')")
        with pytest.raises(base.BaseError, match=r"(?s)does not build.*the compiler said no"):
            base.build(folder, lambda text: None)
    assert is_gone(folder)


@in_a_checkout
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_an_interrupted_comparison_leaves_no_worktree_and_no_process(number):
    """In a process of its own, which hangs in the build and is then told to stop."""
    code = (
        "import signal, time; from benchmarks import base\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background job has not
        "def hang(folder, progress):\n"
        "    print(folder, flush=True)\n"
        "    time.sleep(60)\n"
        "base.build = hang\n"
        "base.main('HEAD', quick=True)\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    folder = Path(running.stdout.readline().strip())
    assert folder.is_dir()
    running.send_signal(number)
    assert running.wait(120) != 0
    running.stdout.close()
    assert is_gone(folder)


def test_options_that_do_not_go_together_are_refused(capsys):
    refused = (["--fail-slower", "3"], ["--base", "HEAD", "--check-targets"], ["--quick", "--check-regressions"])
    for arguments in refused:
        with pytest.raises(SystemExit, match="2"):
            run.main(arguments)
    said = capsys.readouterr().err
    assert "--fail-slower needs --base" in said and "--base goes with" in said and "leave out --quick" in said
