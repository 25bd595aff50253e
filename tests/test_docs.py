"""The README says what the code does: its example runs, and every cell of its support table is tried."""

import re
import sys
from pathlib import Path

import pytest
import torch

import fused_clip_adam as fca
from fused_clip_adam import backends

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import generate as docs  # noqa: E402

README = (ROOT / "README.md").read_text()


def support_rows() -> list[tuple[str, str, str]]:
    """(name, backend, claim) of every cell; a row may name several."""
    table = README.split("<!-- support table")[1].split("<!-- end of support table")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0]]
    rows = [[cell.strip() for cell in line] for line in lines[2:]]
    names = [(name, row) for row in rows for name in re.findall(r"`([^`]+)`", row[0])]
    return [(name, header[i], row[i]) for name, row in names for i in range(1, len(header))]


def device_of(backend: str) -> str:
    """Where a backend can be tried here: on a GPU, or on the CPU (tests/cuda_on_cpu, Triton's interpreter)."""
    if backend in ("cpu", "reference"):
        return "cpu"
    if reason := backends._unavailable(backend):
        pytest.skip(reason)
    return "cuda" if torch.cuda.is_available() else "cpu"


def step_with(cls=fca.FusedClipAdamW, **options):
    p = torch.nn.Parameter(torch.ones(8, device=device_of(options["backend"])))
    opt = cls([p], **options)
    p.grad = torch.ones_like(p)
    opt.new_rollout()
    opt.step()
    assert bool((p < 1).all()), "the step moved nothing"


FLOW = torch.linspace(-1.0, 1.0, 6)
INPUTS = {  # what objectives need beyond the common inputs
    "entropy": torch.linspace(0.1, 2.0, 6).view(2, 3),
    "ewma_logp": torch.full((2, 3), -1.05),
    "mu": FLOW.view(2, 3, 1),
    "mu_old": FLOW.view(2, 3, 1) * 0.9,
    "sigma_t": 0.7,
    "dt": 0.1,
}
CONSTRUCTED = {fca.DRO: fca.DRO(0.1), fca.GRPOGuard: fca.GRPOGuard(0.2, 0.2)}  # without defaults of their own


def objective_with(cls, backend):
    device = device_of(backend)
    objective = CONSTRUCTED[cls] if cls in CONSTRUCTED else cls()
    extra = {name: x.to(device) if isinstance(x := INPUTS[name], torch.Tensor) else x for name in cls.needs}
    logp = torch.full((2, 3), -1.0, device=device, requires_grad=True)
    A = torch.tensor([1.0, 0.5], device=device)
    loss, stats = fca.policy_loss(logp, logp.detach() + 0.1, A, objective=objective, backend=backend, **extra)
    loss.backward()
    assert stats.to_dict()["tokens"] == 6 and bool(logp.grad.isfinite().all()) and bool(logp.grad.any())


def from_logits_with(backend):
    logits = torch.randn(2, 3, 5, device=device_of(backend)).requires_grad_()
    tokens = torch.ones(2, 3, dtype=torch.long, device=logits.device)
    A = torch.ones(2, device=logits.device)
    loss, stats = fca.policy_loss_from_logits(logits, tokens, None, A, entropy_coef=0.1, backend=backend)
    loss.backward()
    logp, _ = fca.logp_from_logits(logits.detach(), tokens, backend=backend)
    torch.testing.assert_close(logp, logits.detach().log_softmax(-1)[..., 1])
    assert stats.to_dict()["tokens"] == 6 and bool(logits.grad.any())


def logp_on(backend):
    return (torch.zeros(2, 3, device=device_of(backend)),) * 2 + (torch.ones(2, device=device_of(backend)),)


def stacked_on(backend):
    device = device_of(backend)
    p = torch.nn.Parameter(torch.ones(5, 3, device=device))
    return p, fca.FusedClipAdamW([p], backend=backend), torch.randn(4, 5, 3, device=device)


def step_from_scores_with(backend, **options):
    p, opt, scores = stacked_on(backend)
    logp = torch.zeros(4, device=p.device)
    opt.step_from_scores([scores], logp, logp, torch.randn(4, device=p.device), **options)
    assert not torch.equal(p.detach().cpu(), torch.ones(5, 3))


def step_from_gradients_with(backend):
    p, opt, gradients = stacked_on(backend)
    opt.step_from_gradients([gradients])
    assert not torch.equal(p.detach().cpu(), torch.ones(5, 3))


def step_in_backward_with(backend):
    model = torch.nn.Linear(5, 3, device=device_of(backend))
    before = model.weight.detach().clone()
    opt = fca.FusedClipAdamW(model.parameters(), backend=backend)
    fca.step_in_backward(model, opt, bucket_bytes=0)
    model(torch.ones(2, 5, device=before.device)).sum().backward()
    assert model.weight.grad is None and not torch.equal(model.weight.detach(), before)


# Plain torch on any device, or no computation at all.
WITHOUT_BACKEND = {
    "ClipStats",
    "MicroBatchGradients",
    "Objective",
    "OvershootMonitor",
    "Plan",
    "RolloutStats",
    "SmoothedAdvantage",
    "__version__",
    "group_advantages",
    "per_sample_scores",
    "plan",
    "presets",
    "rollout_weights",
    "theory",
    "top_variance_groups",
}

TRY = {
    "FusedClipAdamW": lambda b: step_with(backend=b),
    "FusedClipAdam": lambda b: step_with(fca.FusedClipAdam, backend=b),
    "FusedFAdam": lambda b: step_with(fca.FusedFAdam, backend=b),
    "GlobalNorm": lambda b: step_with(backend=b, grad_clip=fca.GlobalNorm(1.0)),
    "GlobalNorm(lag=True)": lambda b: step_with(backend=b, grad_clip=fca.GlobalNorm(1.0, lag=True)),
    "PerTensorNorm": lambda b: step_with(backend=b, grad_clip=fca.PerTensorNorm(1.0)),
    "AutoClip": lambda b: step_with(backend=b, grad_clip=fca.AutoClip()),
    "ZClip": lambda b: step_with(backend=b, grad_clip=fca.ZClip()),
    "AdaGC": lambda b: step_with(backend=b, grad_clip=fca.AdaGC()),
    "AGC": lambda b: step_with(backend=b, grad_clip=fca.AGC()),
    "SpikeClip": lambda b: step_with(backend=b, grad_clip=fca.SpikeClip()),
    "StableSpamClip": lambda b: step_with(backend=b, grad_clip=fca.StableSpamClip(total_steps=10)),
    "UpdateRMS": lambda b: step_with(backend=b, grad_clip=fca.UpdateRMS()),
    "InducedMetric": lambda b: step_with(backend=b, grad_clip=fca.InducedMetric()),
    "AlignedMomentum": lambda b: step_with(backend=b, overshoot=fca.AlignedMomentum()),
    'AlignedMomentum(block="element")': lambda b: step_with(backend=b, overshoot=fca.AlignedMomentum("element")),
    'AlignedMomentum(block="tensor")': lambda b: step_with(backend=b, overshoot="align-tensor"),
    'AlignedMomentum(block="tensor", lag=True)': lambda b: step_with(
        backend=b, overshoot=fca.AlignedMomentum("tensor", lag=True)
    ),
    "Cautious(rescale=True)": lambda b: step_with(backend=b, overshoot=fca.Cautious(rescale=True)),
    "MedianMomentum": lambda b: step_with(backend=b, overshoot=fca.MedianMomentum(0.1)),
    "Cautious": lambda b: step_with(backend=b, overshoot=fca.Cautious()),
    "Grams": lambda b: step_with(backend=b, overshoot=fca.Grams()),
    "UpdateClamp": lambda b: step_with(backend=b, overshoot=fca.UpdateClamp()),
    'UpdateClamp(mode="atan2")': lambda b: step_with(backend=b, overshoot=fca.UpdateClamp(mode="atan2")),
    "MomentumBrake": lambda b: step_with(backend=b, overshoot=fca.MomentumBrake()),
    "OnRollout": lambda b: step_with(backend=b, reset=fca.OnRollout()),
    "Periodic": lambda b: step_with(backend=b, reset=fca.Periodic(every=1, warmup=0)),
    "WhenClipped": lambda b: step_with(backend=b, reset=fca.WhenClipped(0.5)),
    **{
        f"presets.{name}": lambda b, name=name: step_with(backend=b, **getattr(fca.presets, name)())
        for name in fca.presets.__all__
    },
    "FusedClipAdamW.step_from_scores": lambda b: step_from_scores_with(b),
    "FusedClipAdamW.step_from_gradients": step_from_gradients_with,
    "step_from_scores(max_sample_norm=, noise_multiplier=)": lambda b: step_from_scores_with(
        b, max_sample_norm=0.1, noise_multiplier=0.5
    ),
    "step_in_backward": step_in_backward_with,
    "skip_nonfinite": lambda b: step_with(backend=b, skip_nonfinite=True),
    "state_dtype=torch.float32": lambda b: step_with(backend=b, state_dtype=torch.float32),
    **{cls.__name__: lambda b, cls=cls: objective_with(cls, b) for cls in docs.objectives()},
    "clip_stats": lambda b: fca.clip_stats(*logp_on(b), backend=b).to_dict(),
    "dloss_dlogp": lambda b: fca.dloss_dlogp(*logp_on(b), backend=b),
    "policy_loss_from_logits": from_logits_with,
    "logp_from_logits": from_logits_with,
}


@pytest.mark.parametrize("name, backend, claim", support_rows())
def test_support_table(name, backend, claim):
    assert claim in ("yes", "no")
    if claim == "yes":
        TRY[name](backend)
    else:
        device_of(backend)
        with pytest.raises(RuntimeError, match="reference"):
            TRY[name](backend)


def test_support_table_is_complete():
    rows = support_rows()
    assert {backend for _, backend, _ in rows} == set(backends.DEVICES)
    assert {name for name, _, _ in rows} == set(TRY)
    public = set(fca.__all__) - {"policy_loss", *WITHOUT_BACKEND}  # policy_loss is what runs the objectives
    assert public <= {name.split("(")[0] for name in TRY}, public


def test_objectives_page_is_generated():
    assert docs.PAGE.read_text() == docs.page(), "run python docs/generate.py"


@pytest.mark.parametrize("cls", docs.objectives())
def test_objective_says_where_it_comes_from(cls):
    assert "Source:" in cls.__doc__ and re.search("loss =|gradient|PPO|GSPO", cls.__doc__)
    documented = cls.__doc__ + cls.__mro__[1].__doc__
    for field in cls.__dataclass_fields__:
        assert field in documented or f"{field.split('_')[0]}_*" in documented, field


def test_a_backend_that_cannot_run_says_why():
    for backend in ("cuda", "triton"):
        if reason := backends._unavailable(backend):
            assert "install" in reason
            with pytest.raises(RuntimeError, match="cannot run"):
                fca.FusedClipAdamW([torch.nn.Parameter(torch.ones(1))], backend=backend)


def test_first_example_runs(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(example, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("loss")
    assert "clipped 0%" in lines[0] and "clipped 0%" not in lines[-1], "the example does not show clipping"


def test_second_example_runs_after_the_first(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(example, "README.md", "exec"), names)
    assert "clip" in capsys.readouterr().out and (tmp_path / "overshoot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "document",
    (
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"),
        *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
    ),
)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document} links to {target}"


def test_readme_results_are_those_of_the_result_files():
    from benchmarks import plot, report

    assert report.readme_with(README, *plot.newest_results()) == README, "run python -m benchmarks.plot"


def test_results_page_is_that_of_the_result_files():
    from benchmarks import plot, report

    assert (ROOT / report.PAGE).read_text() == report.page_with(*plot.newest_results()), "run python -m benchmarks.plot"


def test_no_name_is_undocumented():
    for name in fca.__all__:
        if name != "__version__":
            assert (getattr(fca, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_trainer_matrix():
    page = (ROOT / "docs" / "trainers.md").read_text()
    table = page.split("<!-- trainer matrix")[1].split("<!-- end of trainer matrix")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert lines[0] == ["trainer", "optimizer", "loss", "statistics", "checkpoint"]
    tested = 0
    for name, *cells in lines[2:]:
        assert len(cells) == 4, name
        for cell in cells:
            if not cell.startswith("["):
                assert re.fullmatch(r"as the loop|no hook|not run here( \(in a fork\))?", cell), (name, cell)
                continue
            file, test = re.fullmatch(r"\[yes\]\(\.\./(tests/\w+\.py)#(test_\w+)\)", cell).groups()
            assert f"def {test}(" in (ROOT / file).read_text(), (name, cell)
            tested += 1
    assert tested >= 28
