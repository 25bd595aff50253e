"""The README says what the code does: its example runs, and every cell of its support table is tried."""

import re
from pathlib import Path

import pytest
import torch

import fused_clip_adam as fca
from fused_clip_adam import backends

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def support_rows() -> list[tuple[str, str, str]]:
    """(name, backend, claim) of every cell."""
    table = README.split("<!-- support table")[1].split("<!-- end of support table")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0]]
    rows = [[cell.strip() for cell in line] for line in lines[2:]]
    return [(row[0].strip("`"), header[i], row[i]) for row in rows for i in range(1, len(header))]


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


def objective_with(objective, backend):
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    loss, stats = fca.policy_loss(logp, logp.detach() - 0.1, torch.ones(2), objective=objective, backend=backend)
    loss.backward()
    assert stats.to_dict()["tokens"] == 6 and bool(logp.grad.isfinite().all())


LOGP = (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))
TRY = {
    "FusedClipAdamW": lambda b: step_with(backend=b),
    "FusedClipAdam": lambda b: step_with(fca.FusedClipAdam, backend=b),
    "GlobalNorm": lambda b: step_with(backend=b, grad_clip=fca.GlobalNorm(1.0)),
    "GlobalNorm(lag=True)": lambda b: step_with(backend=b, grad_clip=fca.GlobalNorm(1.0, lag=True)),
    "AlignedMomentum": lambda b: step_with(backend=b, overshoot=fca.AlignedMomentum()),
    'AlignedMomentum(block="element")': lambda b: step_with(backend=b, overshoot=fca.AlignedMomentum("element")),
    "Cautious": lambda b: step_with(backend=b, overshoot=fca.Cautious()),
    "MomentumBrake": lambda b: step_with(backend=b, overshoot=fca.MomentumBrake()),
    "OnRollout": lambda b: step_with(backend=b, reset=fca.OnRollout()),
    "skip_nonfinite": lambda b: step_with(backend=b, skip_nonfinite=True),
    "state_dtype=torch.float32": lambda b: step_with(backend=b, state_dtype=torch.float32),
    "PPO": lambda b: objective_with(fca.PPO(), b),
    "GSPO": lambda b: objective_with(fca.GSPO(), b),
    "CISPO": lambda b: objective_with(fca.CISPO(), b),
    "clip_stats": lambda b: fca.clip_stats(*LOGP, backend=b).to_dict(),
    "dloss_dlogp": lambda b: fca.dloss_dlogp(*LOGP, backend=b),
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
    assert {backend for _, backend, _ in rows} == set(backends.STEP_DEVICES)
    assert {name for name, _, _ in rows} == set(TRY)
    named = {name.split("(")[0] for name in TRY}
    public = {n for n in fca.__all__ if n not in ("ClipStats", "theory", "__version__", "policy_loss")}
    assert public <= named | {"clip_stats", "dloss_dlogp"}, public - named


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


@pytest.mark.parametrize("document", ("README.md", "CONTRIBUTING.md", "benchmarks/README.md"))
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document} links to {target}"


def test_readme_results_are_those_of_the_result_files():
    from benchmarks import plot

    folder, results = plot.newest_results()
    figure = (folder / "overview.svg").relative_to(ROOT).as_posix()
    assert plot.readme_with(README, results, figure) == README, "run python -m benchmarks.plot"


def test_no_name_is_undocumented():
    for name in fca.__all__:
        if name != "__version__":
            assert (getattr(fca, name).__doc__ or "").strip(), f"{name} has no docstring"
