"""Peers of the benchmarks, scaling curves and comparisons in trainers: descriptions, bytes, checks of the same work."""

import copy
import sys
import time
import types
from dataclasses import replace

import matplotlib
import pytest
import torch

import fused_clip_adam as fca
from benchmarks import gpu_peers, harness, peers, stream
from benchmarks import test_integrations as integrations
from benchmarks import test_scaling as scaling
from benchmarks import test_scores as scores
from benchmarks import test_step as step
from benchmarks.scaling_plot import draw_scaling

matplotlib.use("Agg")

# ---------------------------------------------------------------- peers


@pytest.mark.parametrize("name", peers.PACKAGES)
def test_description_of_a_package_is_complete(name):
    package = peers.PACKAGES[name]
    runs_on = {device for device in ("cpu", "cuda") if package.settings(device)}
    assert runs_on and set(package.one_pass_on) <= runs_on
    assert package.states in ("param", "float32", "8-bit") and package.compiles in (None, "once", "for every shape")
    assert (package.states == "8-bit") == (package.other_work is not None), "what is rounded to 8 bits is other work"
    assert peers.PEERS[name].package is package
    assert (name in gpu_peers.PEERS) == ("cuda" in runs_on and not package.other_work)
    for peer, device in ((peers.PEERS[name], "cpu"), (gpu_peers.PEERS.get(name), "cuda")):
        if peer is not None:
            assert (peer.traffic in harness.ARRAY_PASSES) == (device in package.one_pass_on)
            assert (peer.traffic_with_clip in harness.ARRAY_PASSES) == (device in package.one_pass_on)
            assert peer.states == package.states


@pytest.fixture
def absent(monkeypatch):
    """No package but torch's and ours can be imported."""
    peers.unavailable_reason.cache_clear()
    for package in peers.PACKAGES.values():
        monkeypatch.setitem(sys.modules, package.module, None)
    yield
    peers.unavailable_reason.cache_clear()


@pytest.mark.parametrize("name", ("step-one-tensor-clip", "step-bfloat16", "step-8-bit-moments"))
def test_every_peer_of_a_case_is_measured_or_listed_with_the_reason(absent, name):
    case = replace(step.CASES[name], shapes=lambda quick: [(64,), (3, 5)])
    result, _ = step.measure(case, True, lambda text: None)
    measured = set(result["candidates"]) - set(step.CEILINGS)
    assert measured | set(result["unavailable"]) == set(case.peers) and measured & set(peers.PACKAGES) == set()
    for package in set(case.peers) & set(peers.PACKAGES):
        reason = result["unavailable"][package]
        assert reason.startswith(("not importable", "runs on a GPU only", "keeps moments in", "left out of --quick"))
        assert f"  {package:32}not measured: {reason}" in harness.table([result])


def test_other_work_has_a_case_of_its_own_and_every_other_peer_is_in_the_others():
    for case in step.CASES.values():
        others = {name for name in case.peers if peers.PEERS[name].other_work}
        assert others == ({name for name in peers.PACKAGES if "8-bit" in name} if case.other_work else set())
    assert set(step.CASES["step-one-tensor-clip"].peers) | set(step.CASES["step-8-bit-moments"].peers) == set(
        peers.PEERS
    )


def made_up(monkeypatch, optimizer: type, **description) -> peers.Package:
    """A package whose module holds one optimizer, among the others as "made up"."""
    monkeypatch.setitem(sys.modules, "made_up_optimizers", types.SimpleNamespace(Made=optimizer))
    package = peers.Package("made_up_optimizers", "Made", **{"cpu": ({},), **description})
    monkeypatch.setitem(peers.PACKAGES, "made up", package)
    peers.unavailable_reason.cache_clear()
    return package


def test_a_package_that_is_broken_is_listed_without_the_words_of_its_error(monkeypatch):
    class Broken(torch.optim.AdamW):
        def step(self):
            raise OSError("/home/somebody/broken.so")

    made_up(monkeypatch, Broken)
    assert peers.unavailable_reason("made up") == "importable, but its step did not build or run (OSError)"
    made_up(monkeypatch, Broken, cpu=(), cuda=({},))
    assert peers.unavailable_reason("made up") == peers.GPU_ONLY
    made_up(monkeypatch, torch.optim.AdamW)
    assert peers.unavailable_reason("made up") is None
    assert peers.unavailable_reason("made up", "cuda") == "runs on a CPU only"
    peers.unavailable_reason.cache_clear()


def test_the_fastest_setting_is_taken(monkeypatch):
    class Sleeping(torch.optim.AdamW):
        def __init__(self, params, seconds, **options):
            super().__init__(params, **options)
            self.seconds = seconds

        def step(self):
            time.sleep(self.seconds)
            super().step()

    package = made_up(monkeypatch, Sleeping, cpu=tuple({"seconds": s} for s in (0.05, 0.001, 0.1)))

    def params() -> list[torch.nn.Parameter]:
        p = torch.nn.Parameter(torch.ones(8))
        p.grad = torch.ones(8)
        return [p]

    best, options = peers.at_best(peers.from_package(package, "cpu"), "cpu", params, peers.Work(max_norm=1.0))
    assert options == {"seconds": 0.001} and best.package is package
    own = params()
    begin = time.perf_counter()
    best.build(own, peers.Work(max_norm=1.0))()
    assert time.perf_counter() - begin < 0.05 and float(own[0].grad.norm()) == pytest.approx(1.0, rel=1e-4)


def test_a_package_that_compiles_for_every_shape_is_left_out_of_many():
    few, many = [(4,)] * 100, [(n,) for n in range(1, peers.MOST_SHAPES + 2)]
    assert peers.too_many_shapes("torchao", few) is None and peers.too_many_shapes("optimi", many) is None
    assert "here are 5" in peers.too_many_shapes("torchao", many)


def test_peers_do_the_work_of_a_case_or_are_left_out():
    bf16, f32 = torch.bfloat16, torch.float32
    fit = lambda *case: {name for name, peer in peers.PEERS.items() if peers.fits(peer, *case)}  # noqa: E731
    assert fit(f32, None, 1.0) == set(peers.PEERS)
    assert set(peers.PEERS) - fit(f32, None, None) == {"torch fused, grad_scale"}
    assert set(peers.PEERS) - fit(bf16, None, 1.0) == {"bitsandbytes", "apex", "TransformerEngine"}
    assert {"bitsandbytes", "ours"} <= fit(bf16, f32, 1.0) and "torchao" not in fit(bf16, f32, 1.0)


def off_by(relative: float, states: str) -> peers.Peer:
    """torch's loop with an update that is too large by `relative`."""

    def build(params, work):
        inner = peers.torch_for_loop(params, work)

        def step_() -> None:
            before = [p.detach().clone() for p in params]
            inner()
            with torch.no_grad():
                for p, old in zip(params, before):
                    p.add_(p - old, alpha=relative)

        return step_

    return peers.Peer(build, states=states)


@pytest.mark.parametrize("states, allowed, refused", (("param", 1e-7, 1e-3), ("8-bit", 1e-3, 0.1)))
def test_what_is_rounded_to_8_bits_may_deviate_more_and_nothing_else(states, allowed, refused):
    check = lambda relative: peers.check_same_work(  # noqa: E731
        ["x"], torch.float32, 1.0, peers={"x": off_by(relative, states)}
    )
    assert check(allowed)["x"] < 2 * allowed + 1e-6
    with pytest.raises(AssertionError, match="x does other work"):
        check(refused)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", [name for name, package in peers.PACKAGES.items() if package.compiles is None])
def test_packages_that_are_here_do_the_same_work(name, dtype):
    if not peers.fits(peers.PEERS[name], dtype, None, 1.0):
        pytest.skip("keeps moments of another dtype")
    if (reason := peers.unavailable_reason(name)) is not None:
        pytest.skip(reason)
    for options in peers.PACKAGES[name].cpu:
        build = lambda params, work, options=options: peers.PACKAGES[name].build(params, work, **options)  # noqa: E731
        for max_norm in (None, 1.0):
            peers.check_same_work([name], dtype, max_norm, peers={name: replace(peers.PEERS[name], build=build)})


# ---------------------------------------------------------------- scaling curves


def test_bytes_of_a_step_are_those_of_theory():
    for point, tensors in ((scaling.step_point([(4096,)]), 1), (scaling.step_point([(scaling.TENSOR,)] * 4), 4)):
        assert point.elements == 4096 and point.facts["tensors"] == tensors
        own = fca.theory.bytes_per_element(grad_clip=1.0) * 4096
        assert point.moved == {"ours": own, scaling.FUSED: own + 8 * 4096, scaling.TRICK: own + 4 * 4096}


@pytest.mark.parametrize("samples", (1, 4))
def test_bytes_of_a_step_from_scores_are_those_of_theory(samples, monkeypatch):
    monkeypatch.setattr(scaling, "LAYER", (8, 16))
    point = scaling.scores_point(samples)
    own = fca.theory.bytes_per_element(samples=samples) * 128
    assert point.moved == {"ours": own, **dict.fromkeys(scores.CONTRACTIONS, own + 8 * 128)}


def test_bytes_of_losses():
    point = scaling.logits_point(1024)
    assert (point.elements, point.moved) == (64 * 1024, {"ours": 12 * 64 * 1024, scaling.EAGER: None})
    point = scaling.tokens_point(1024)
    assert (point.elements, point.moved) == (1024, {"ours": 13 * 1024, scaling.EAGER: None})


def test_sizes_go_where_the_plan_wants_them():
    ends = {name: (case.sizes[0], case.sizes[-1]) for name, case in scaling.CASES.items()}
    assert ends == {
        "scaling-elements": (2**12, 2**26),
        "scaling-tensors": (1, 4096),
        "scaling-samples": (1, 128),
        "scaling-vocabulary": (1024, 151_936),
        "scaling-tokens": (1024, 2**20),
    }
    for case in scaling.CASES.values():
        assert list(case.sizes) == sorted(case.sizes) and set(case.quick_sizes) <= set(case.sizes)


def wrong_contraction(p, weights, own):
    scores.einsum(p, weights, own)
    p.grad[-1] = 0


def test_check_of_scores_finds_a_contraction_that_leaves_a_row_out(monkeypatch):
    assert set(scaling.check_scores()) == set(scaling.SCORE_CANDIDATES)
    monkeypatch.setitem(scores.CONTRACTIONS, scores.EINSUM, wrong_contraction)
    with pytest.raises(AssertionError, match="einsum, then our step: off by"):
        scaling.check_scores()


@pytest.fixture(scope="module")
def measured() -> dict:
    if (reason := stream.unavailable_reason()) is not None:
        pytest.skip(reason)
    case = replace(scaling.CASES["scaling-elements"], quick_sizes=(64, 4096))
    result, seconds = scaling.measure(case, True, lambda text: None)
    rows = (*case.candidates, scaling.STREAM)
    assert set(seconds) == {(size, name) for size in (64, 4096) for name in rows}
    return result


def test_a_curve_has_its_points_and_the_table_a_line_each(measured):
    assert [point["x"] for point in measured["points"]] == [64, 4096] and measured["x"] == "elements"
    assert measured["candidates"] is measured["points"][-1]["candidates"]
    for point in measured["points"]:
        for name in ("ours", scaling.STREAM):
            row = point["candidates"][name]
            wanted = row["fraction_of_stream"]
            # The stream takes whole elements of 28 bytes: of 64 times 32 bytes 0.2% less.
            assert row["work_of_ceiling"] == pytest.approx(wanted, rel=0.01), "both move what ours has to move"
        fused = point["candidates"][scaling.FUSED]
        assert fused["fraction_of_stream"]["p50"] == pytest.approx(fused["work_of_ceiling"]["p50"] * 40 / 32)
    text = harness.table([measured])
    for point in measured["points"]:
        ratio = point["candidates"][scaling.FUSED]["over_ours"]["p50"]
        assert f"  {point['x']:>11,} elements: torch fused {ratio:.2f}x, torch fused, grad_scale" in text


def test_a_curve_with_a_point_that_was_not_quiet_is_no_result(measured, monkeypatch):
    monkeypatch.setattr(scaling, "_measure_point", lambda case, size, *rest: (found[size], nothing, {}))
    nothing = types.SimpleNamespace(seconds={})
    points = copy.deepcopy(measured["points"])
    for point in points:
        point |= {"quiet": True, "others_cpu_share": 0.01}
    found = {point["x"]: point for point in points}
    case = replace(scaling.CASES["scaling-elements"], quick_sizes=(64, 4096))
    result, _ = scaling.measure(case, True, lambda text: None)
    assert harness.why_no_result(result) is None
    points[0] |= {"quiet": False, "others_cpu_share": 0.4}
    result, _ = scaling.measure(case, True, lambda text: None)
    assert harness.why_no_result(result) == "too busy a machine" and result["others_cpu_share"] == 0.4
    points[0] |= {"quiet": True}
    del points[0]["candidates"][scaling.FUSED]["bytes"]
    result, _ = scaling.measure(case, True, lambda text: None)
    assert harness.why_no_result(result) == "torch fused comes without ['bytes']"


def curve(title: str, peer: str, shares: dict[int, tuple[float, float]]) -> dict:
    """A result as a file has it, from (ours, the peer's) share of the ceiling at each size."""

    def spread(middle: float) -> dict:
        return {"p20": 0.9 * middle, "p50": middle, "p80": 1.1 * middle}

    def row(share: float, own: float) -> dict:
        return {"work_of_ceiling": spread(share), "over_ours": spread(own / share)}

    points = [
        {
            "x": x,
            "ceiling": {"gigabytes_per_second": 12.0},
            "candidates": {"ours": row(own, own), peer: row(other, own), "stream (ceiling)": row(1.0, own)},
        }
        for x, (own, other) in shares.items()
    ]
    machine = {"cpu": "a CPU", "threads": 2, "torch": "2.13", "commit": "0123456789ab", "date": "2026-01-01 00:00 UTC"}
    rows = points[-1]["candidates"]
    return {"curve": title, "x": "sizes", "baseline": "ours", "machine": machine, "points": points, "candidates": rows}


def test_figure_shows_every_curve_of_every_candidate(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    first = {1: (0.1, 0.2), 64: (0.4, 0.3), 4096: (0.9, 0.6)}
    results = [curve("one", "torch fused", first), curve("two", "torch eager", {8: (0.5, 0.05), 16: (0.6, 0.04)})]
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    path = draw_scaling([*results, {"no": "curve"}], tmp_path / "scaling.svg")
    assert path == tmp_path / "scaling.svg" and path.stat().st_size > 5000
    left, right = (axes for axes in drawn[0].axes if axes.lines)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in left.lines}
    assert lines["ours"] == ([1, 64, 4096], [0.1, 0.4, 0.9]) and lines["torch fused"][1] == [0.2, 0.3, 0.6]
    assert {line.get_label() for line in right.lines} == {"ours", "torch eager", "stream (ceiling)"}
    colours = {line.get_label(): line.get_color() for axes in (left, right) for line in axes.lines}
    assert len(set(colours.values())) == 4, "ours, two peers, the ceiling: in the same colour in every panel"
    assert [axes.get_xscale() for axes in (left, right)] == [axes.get_yscale() for axes in (left, right)] == ["log"] * 2
    again = draw_scaling(results, tmp_path / "again.svg")
    assert again.read_bytes() == path.read_bytes(), "the same file from the same results"
    assert draw_scaling([{"no": "curve"}], tmp_path / "none.svg") is None and not (tmp_path / "none.svg").exists()


# ---------------------------------------------------------------- trainers


def stacks(ways=integrations.WAYS) -> integrations.Comparison:
    data = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    made = {way: integrations.make_stack(way, 2, 16) for way in ways}
    return integrations.Comparison(
        {way: (lambda one=one: one(data)) for way, (_, one) in made.items()},
        {way: list(model.parameters()) for way, (model, _) in made.items()},
    )


def test_steps_in_backward_and_after_it_give_the_same_weights():
    assert set(integrations.check_same_weights(stacks())) == set(integrations.WAYS)


def test_check_of_weights_finds_a_lost_step_and_another_start():
    lost = stacks()
    calls = iter(range(100))
    one = lost.steps["ours"]
    lost.steps["ours"] = lambda: None if next(calls) == 1 else one()
    with pytest.raises(AssertionError, match="ours does other work"):
        integrations.check_same_weights(lost)
    elsewhere = stacks()
    with torch.no_grad():
        elsewhere.params["ours"][0][0, 0] += 1e-6
    with pytest.raises(AssertionError, match="ours starts from other weights"):
        integrations.check_same_weights(elsewhere)
    idle = stacks()
    idle.steps[integrations.TORCH_HOOKS] = lambda: None
    with pytest.raises(AssertionError, match="does not move"):
        integrations.check_same_weights(idle)


@pytest.mark.parametrize("name", ("integration-trl", "integration-transformers"))
def test_comparison_in_a_trainer_finds_a_lost_clip(name, monkeypatch):
    pytest.importorskip(integrations.CASES[name].needs)
    make = integrations.CASES[name].make
    integrations.check_same_weights(make(True))
    monkeypatch.setattr(
        integrations,
        "our_adamw",
        lambda params: fca.FusedClipAdamW(params, lr=integrations.LR, eps=integrations.EPS, weight_decay=0.0),
    )
    with pytest.raises(AssertionError, match="ours does other work"):
        integrations.check_same_weights(make(True))


def test_a_trainer_that_is_not_here_is_named_with_what_brings_it():
    case = replace(integrations.CASES["integration-sb3"], needs="no_such_trainer")
    assert case.unavailable == "no_such_trainer is not installed: make bench-trainers"
    assert integrations.CASES["integration-in-backward-8"].unavailable is None
    needed = {case.needs for case in integrations.CASES.values()}
    assert needed == {None, "trl", "transformers", "stable_baselines3", "torchrl", "rsl_rl", "lightning", "verl"}


def test_memory_of_gradients_is_that_of_all_of_them_or_of_a_bucket():
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    size = (6, 512, 4)  # 6 MB of gradients
    assert integrations.grown(integrations.TORCH, *size) > 0.8
    assert integrations.grown(integrations.TORCH_HOOKS, *size) < 0.5
