"""The planner: its memory is that of real steps, its arithmetic that of the byte table, its shares those measured."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys

import pytest
import torch
from cases import RULES

import fused_clip_adam as fca
from benchmarks import harness
from fused_clip_adam import __main__ as cli
from fused_clip_adam import bandwidth, in_backward, offload, planner, theory
from fused_clip_adam.planner import parse_count, parse_rules, plan

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


# ---------------------------------------------------------------- memory, against real steps


def stepped_model(dtype, grad_dtype=None, **options) -> tuple[torch.nn.Module, fca.FusedClipAdamW]:
    """A model after one real backward pass and step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(13, 31), torch.nn.Tanh(), torch.nn.Linear(31, 7, bias=False)).to(dtype)
    if grad_dtype is not None:
        for p in model.parameters():
            p.grad_dtype = grad_dtype
    opt = fca.FusedClipAdamW(model.parameters(), **options)
    model(torch.randn(5, 13, dtype=dtype)).square().sum().backward()
    opt.step()
    return model, opt


def bytes_of(model, opt) -> planner.Memory:
    params = list(model.parameters())
    return planner.Memory(
        parameters=sum(p.nbytes for p in params),
        gradients=sum(p.grad.nbytes for p in params),
        **{name: sum(own[name].nbytes for own in opt.state.values() if name in own) for name in MOMENTS},
    )


def elements(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("amsgrad", (False, True))
@pytest.mark.parametrize("state_dtype", (None, F32))
@pytest.mark.parametrize("dtype, grad_dtype", ((F32, None), (BF16, None), (BF16, F32), (F16, None), (F16, F32)))
def test_memory_is_that_of_a_real_step(dtype, grad_dtype, state_dtype, amsgrad):
    model, opt = stepped_model(dtype, grad_dtype, state_dtype=state_dtype, amsgrad=amsgrad)
    own = plan(elements(model), dtype=dtype, grad_dtype=grad_dtype, state_dtype=state_dtype, amsgrad=amsgrad).ours
    assert own.device == bytes_of(model, opt)
    assert own.host.total == 0
    assert own.device.total == sum(
        each.nbytes
        for p in model.parameters()
        for each in (p, p.grad, *(state for name, state in opt.state[p].items() if name in MOMENTS))
    )


@pytest.mark.parametrize("name", RULES)
def test_rules_add_only_what_the_plan_says_it_leaves_out(name):
    options = RULES[name]
    model, opt = stepped_model(F32, **options)
    asked = {key: options[key] for key in ("amsgrad", "grad_clip", "overshoot", "reset") if key in options}
    found = plan(elements(model), **asked)
    assert found.ours.device == bytes_of(model, opt)
    left_out = {"step": 8, "bias_weights": 16}
    remembered = tuple(f"{name}_" for name in fca.__all__)  # by a rule, about a parameter: a number
    for state in opt.state.values():
        for key, value in state.items():
            size = value.nbytes if isinstance(value, torch.Tensor) else 8
            assert key in MOMENTS or size <= (8 if key.startswith(remembered) else left_out[key])
    named = (*[f"`{key}`" for key in left_out], "what rules remember")
    assert any(all(text in note for text in named) for note in found.notes)


@pytest.mark.parametrize("score_dtype, amsgrad", ((F32, False), (BF16, True)))
def test_memory_of_a_real_step_from_scores(score_dtype, amsgrad):
    params = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))]
    opt = fca.FusedClipAdamW(params, amsgrad=amsgrad)
    scores = [torch.ones(6, *p.shape, dtype=score_dtype) for p in params]
    opt.step_from_scores(scores, torch.zeros(6), torch.zeros(6), torch.ones(6))
    assert all(p.grad is None for p in params)
    own = plan(19, scores=6, grad_dtype=score_dtype, amsgrad=amsgrad).ours.device
    moments = {name: sum(each[name].nbytes for each in opt.state.values() if name in each) for name in MOMENTS}
    expected = dict(parameters=19 * 4, scores=sum(each.nbytes for each in scores), **moments)
    assert own == planner.Memory(**expected)


@pytest.mark.parametrize("sharding", ("zero1", "fsdp"))
def test_memory_of_a_real_shard(sharding):
    """The first of 4 ranks, whose shard is rounded up: 1,003 elements in 251, 251, 251 and 250."""
    flat = torch.nn.Parameter(torch.randn(1003).to(BF16))
    flat.grad = torch.ones_like(flat)
    shard = torch.nn.Parameter(flat.detach().chunk(4)[0].clone())
    shard.grad = flat.grad.chunk(4)[0].clone()
    opt = fca.FusedClipAdamW([shard], state_dtype=F32)
    opt.step()
    whole = shard if sharding == "fsdp" else flat
    moments = {name: opt.state[shard][name].nbytes for name in MOMENTS[:2]}
    expected = planner.Memory(parameters=whole.nbytes, gradients=whole.grad.nbytes, **moments)
    found = plan(1003, gpus=4, sharding=sharding, dtype="bf16", state_dtype="fp32")
    assert (found.ours.device, found.stepped, found.shards) == (expected, 251, 4)
    assert found.usual.device == expected


def test_hybrid_sharding_spreads_a_replica_over_fewer_ranks():
    found = plan("70B", gpus=64, sharding="fsdp", replicas=8, dtype="bf16")
    assert (found.shards, found.stepped) == (8, 8_750_000_000)
    assert found.ours.device.total == 8 * 8_750_000_000
    assert found.ours == plan("70B", gpus=8, sharding="fsdp", dtype="bf16").ours
    assert plan("70B", gpus=64, dtype="bf16").ours == plan("70B", dtype="bf16").ours  # DDP divides nothing


def test_gradients_that_step_in_backward_keeps():
    options = dict(dtype="bf16", in_backward=True)
    found = plan("1B", **options)
    assert found.ours.device.gradients == 32 * 2**20
    assert found.usual.device.gradients == 2 * 10**9
    assert plan("1B", **options, bucket_bytes=2**19).ours.device.gradients == 2**19
    assert plan("1B", **options, bucket_bytes=2**19, largest_tensor="1M").ours.device.gradients == 2**19 + 2_000_000
    assert plan("1B", **options, bucket_bytes=0, largest_tensor="1M").ours.device.gradients == 2_000_000
    assert plan(1000, **options).ours.device.gradients == 2000  # never more than there is
    # A bucket counts whole tensors, of which a rank has its part.
    shard = plan("1B", **options, gpus=8, sharding="fsdp", largest_tensor="8M").ours
    assert shard.device.gradients == 4 * 2**20 + 2_000_000


@pytest.mark.parametrize("bucket_bytes", (0, 16_384, 40_000, 10**6))
def test_gradients_of_a_real_backward_pass(monkeypatch, bucket_bytes):
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(9)])
    opt = fca.FusedClipAdamW(model.parameters())
    alive = []
    flush = in_backward.BackwardStep._flush

    def watched(self, params):
        alive.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        flush(self, params)

    monkeypatch.setattr(in_backward.BackwardStep, "_flush", watched)
    fca.step_in_backward(model, opt, bucket_bytes=bucket_bytes)
    model(torch.randn(2, 64)).square().sum().backward()
    opt.step()
    found = plan(9 * 64 * 64, in_backward=True, bucket_bytes=bucket_bytes, largest_tensor=64 * 64)
    most = found.ours.device.gradients
    assert most - 4 * 64 * 64 <= max(alive) <= most
    assert all(p.grad is None for p in model.parameters())


def test_previous_norm_saves_the_read_of_a_norm_over_all():
    options = dict(in_backward=True, previous_norm=True)
    assert plan(10, **options, grad_clip=fca.ZClip()).ours.bytes_per_element == 28
    assert plan(10, **options, grad_clip=(1.0, fca.UpdateRMS())).ours.bytes_per_element == 36
    assert plan(10, **options, grad_clip=fca.AdaGC()).ours.bytes_per_element == 32  # every tensor's own
    assert plan(10, in_backward=True, grad_clip=fca.PerTensorNorm(1.0)).ours.bytes_per_element == 32
    assert plan(10, in_backward=True, skip_nonfinite=True).ours.bytes_per_element == 32


def test_offload_moves_moments_and_step_to_the_host():
    options = dict(dtype="bf16", state_dtype="fp32", amsgrad=True)
    own = plan(1000, **options, offload="cpu", host_bandwidth=60.0, link_bandwidth=2.0).ours
    assert own.device == planner.Memory(parameters=2000, gradients=2000)
    assert own.host == planner.Memory(exp_avg=4000, exp_avg_sq=4000, max_exp_avg_sq=4000, staging=4000)
    assert [(each.where, each.bytes_per_element, each.ceiling, each.stage) for each in own.passes] == [
        ("link", 4, 2.0, 0),
        ("host", 30, 60.0, 0),
        ("link", 2, 2.0, 0),
    ]
    assert own.seconds == pytest.approx(4 / 2 * 1e-6)  # all of it overlaps
    assert (own.bytes_per_element, own.bytes) == (30, 30_000)  # through memory
    # The usual stays where it was, all of it on the device.
    usual = plan(1000, **options, offload="cpu").usual
    assert usual == plan(1000, **options).usual
    assert usual.device.total == own.device.total + own.host.total - own.host.staging


def test_offload_brings_gradients_down_before_the_update_where_they_are_read_twice():
    speeds = dict(offload="cpu", host_bandwidth=4.0, link_bandwidth=8.0)
    own = plan(1000, grad_clip=1.0, **speeds).ours
    assert [(each.where, each.bytes_per_element, each.stage) for each in own.passes] == [
        ("link", 4, 0),
        ("host", 4, 0),
        ("link", 4, 1),
        ("host", 28, 1),
        ("link", 4, 1),
    ]
    assert own.seconds == pytest.approx((4 / 4 + 28 / 4) * 1e-6)
    assert plan(1000, grad_clip=1.0, offload="cpu", host_bandwidth=100.0, link_bandwidth=1.0).ours.seconds == (
        pytest.approx(8e-6)
    )
    assert plan(1000, grad_clip=fca.AGC(), **speeds).ours.passes[0].bytes_per_element == 8  # and parameters


class HostLink:
    """Copies between CPU tensors: the step of parameters that are away, without a GPU."""

    def __init__(self, device):
        self.down = self.up = self.copy

    @staticmethod
    def allocate(size):
        return torch.empty(size, dtype=torch.uint8)

    @staticmethod
    def copy(pairs, after=None):
        for source, target in pairs:
            target.copy_(source)

    def start(self): ...

    def wait(self, event): ...

    def join(self, event): ...

    def settle(self): ...


@pytest.mark.parametrize("tensors", (2, 12))
@pytest.mark.parametrize("options", ({}, dict(grad_clip=1.0), dict(grad_clip=fca.AGC()), dict(skip_nonfinite=True)))
def test_staging_of_a_real_offloaded_step(monkeypatch, options, tensors):
    """4 KiB of gradient and parameter a tensor in buckets of 12 KiB: all fit in one bucket, or four are needed."""
    monkeypatch.setitem(offload.LINKS, "cpu", HostLink)
    monkeypatch.setattr(offload, "BUCKET_BYTES", 12 * 1024)
    monkeypatch.setattr(planner, "BUCKET_BYTES", 12 * 1024)
    params = [torch.nn.Parameter(torch.randn(16, 32)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = fca.FusedClipAdamW(params, offload="cpu", **options)
    opt.step()
    own = plan(tensors * 512, offload="cpu", **options).ours.host
    assert own.staging == opt._offloaded.staging_bytes
    assert own.exp_avg == sum(each["exp_avg"].nbytes for each in opt.state.values())


def test_staging_holds_the_largest_tensor():
    options = dict(dtype="bf16", offload="cpu")
    assert plan("8B", **options).ours.host.staging == 2 * offload.BUCKET_BYTES
    assert plan("8B", **options, largest_tensor="1B").ours.host.staging == 2 * 4 * 10**9
    assert plan("8B", **options, largest_tensor="8B").ours.host.staging == 4 * 8 * 10**9
    kept = plan("8B", **options, grad_clip=1.0).ours.host.staging
    assert kept == 2 * 8 * 10**9 + 3 * offload.BUCKET_BYTES // 2
    assert plan("8B", **options, in_backward=True, bucket_bytes=2**20).ours.host.staging == 2**21


# ---------------------------------------------------------------- bytes and seconds


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtypes", ((F32, F32), (BF16, BF16), (BF16, F32)))
def test_bytes_are_those_of_the_byte_table(name, dtypes):
    dtype, state_dtype = dtypes
    options = {key: own for key, own in RULES[name].items() if key in ("amsgrad", "grad_clip", "overshoot", "reset")}
    own = plan(1000, dtype=dtype, state_dtype=None if state_dtype == dtype else F32, **options).ours
    widths = (dtype.itemsize, dtype.itemsize, state_dtype.itemsize)
    assert own.bytes_per_element == theory.bytes_per_element(*widths, **options)
    assert own.bytes == 1000 * own.bytes_per_element


@pytest.mark.parametrize(
    "expected, options",
    (
        (28, {}),
        (32, dict(skip_nonfinite=True)),
        (32, dict(grad_clip=1.0)),
        (32, dict(grad_clip=1.0, skip_nonfinite=True)),
        (36, dict(amsgrad=True)),
        (28 + 7 * 4, dict(scores=8)),
        (28 + 7 * 4 + 8 * 4, dict(scores=8, max_sample_norm=1.0)),
        (28 + 7 * 4 + 2 * 8 * 4, dict(scores=8, max_sample_norm=1.0, grad_clip=1.0)),
    ),
)
def test_bytes_of_known_settings(expected, options):
    assert plan(10, **options).ours.bytes_per_element == expected


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_the_usual_is_the_sum_of_its_passes(dtype):
    clipped, plain = plan(10, dtype=dtype, grad_clip=1.0).usual, plan(10, dtype=dtype).usual
    assert clipped.bytes_per_element == harness.bytes_per_element("norm, scale, update", dtype.itemsize)
    assert plain.bytes_per_element == harness.bytes_per_element("update", dtype.itemsize)
    assert (clipped.name, plain.name) == ("clip_grad_norm_ + AdamW(fused)", "AdamW(fused)")
    assert plan(10, grad_clip=1.0).usual.bytes_per_element == 40
    assert plan(10, amsgrad=True).usual.bytes_per_element == 36
    # 8 scores read and g written, then 3 g of the clip and the update.
    assert plan(10, scores=8, grad_dtype="bf16", grad_clip=1.0).usual.bytes_per_element == 16 + 4 + 12 + 28
    assert plan(10, scores=8, grad_dtype="bf16").usual.device.gradients == 40


def test_seconds_are_bytes_over_bandwidth():
    own = plan("1B", grad_clip=1.0, bandwidth=4000.0).ours
    assert own.seconds == pytest.approx(32 / 4000)
    shares = planner.OURS["cuda"]["fp32", "fp32", "fp32"]
    assert own.expected_seconds == pytest.approx((4 / shares.before + 28 / shares.update) / 4000)
    sharded = plan("1B", gpus=8, sharding="zero1", grad_clip=1.0, bandwidth=4000.0).ours
    assert sharded.seconds == pytest.approx(own.seconds / 8)
    # At the published peak, of which a copy reaches a part.
    peak = plan("1B", grad_clip=1.0, device="h200").ours
    assert peak.seconds == pytest.approx(32 / 4800)
    assert peak.expected_seconds == pytest.approx(own.expected_seconds * 4000 / 4800 / planner.COPY_OF_PEAK)
    assert plan("1B", device="h200", bandwidth=4000.0, grad_clip=1.0).ours == own


def test_what_is_not_known_is_none():
    own = plan("1B", grad_clip=1.0)
    assert (own.ours.seconds, own.ours.expected_seconds, own.usual.seconds) == (None, None, None)
    unmeasured = plan("1B", dtype="fp16", bandwidth=1000.0)
    assert unmeasured.ours.seconds == pytest.approx(14e-3)
    assert unmeasured.ours.expected_seconds is None
    without_link = plan("1B", offload="cpu", host_bandwidth=100.0)
    assert without_link.ours.seconds is None
    assert any("link_bandwidth=" in note and "host_bandwidth=" not in note for note in without_link.notes)


# ---------------------------------------------------------------- what has been measured


def result(folder: str, case: str) -> dict:
    return json.loads((harness.RESULTS / folder / f"{case}.json").read_text())


def of_ceiling(found: dict, candidate: str) -> float:
    row = found["candidates"][candidate]
    return (row.get("fraction_of_ceiling") or row["fraction_of_stream"])["p50"]


GPU, CPU = "gpu-nvidia-h200", "cpu-intel-xeon-2c"
DTYPES = {
    "step-one-tensor": dict(),
    "step-bfloat16": dict(dtype="bf16"),
    "step-bfloat16-float32-states": dict(dtype="bf16", state_dtype="fp32"),
}
UPDATES = [
    *[(GPU, case, "ours, cuda", "cuda") for case in DTYPES],
    *[(GPU, case, "ours, triton", "rocm") for case in DTYPES],
    *[(CPU, case, "ours", "cpu") for case in list(DTYPES)[:2]],
]
USUALS = [(GPU, case, "cuda") for case in list(DTYPES)[:2]] + [(CPU, case, "cpu") for case in list(DTYPES)[:2]]


def predicted_share(plan_of: planner.Plan, method: str) -> float:
    """Of the ceiling, over all passes."""
    own = getattr(plan_of, method)
    return own.seconds / own.expected_seconds


@pytest.mark.parametrize("folder, case, candidate, device", UPDATES)
def test_shares_of_the_update_are_those_of_the_result_files(folder, case, candidate, device):
    found = plan("1B", **DTYPES[case], device=device, bandwidth=1.0)
    assert predicted_share(found, "ours") == pytest.approx(of_ceiling(result(folder, case), candidate), abs=0.01)


@pytest.mark.parametrize("folder, case, candidate, device", UPDATES)
def test_shares_with_a_clip_are_near_the_result_files(folder, case, candidate, device):
    # `before` is one number for a pass that is a few percent of the time; on the GPU it is 1 where more was reached.
    found = plan("1B", **DTYPES[case], grad_clip=1.0, device=device, bandwidth=1.0)
    measured = of_ceiling(result(folder, f"{case}-clip"), candidate)
    assert predicted_share(found, "ours") == pytest.approx(measured, rel=0.11)


@pytest.mark.parametrize("clip", (False, True))
@pytest.mark.parametrize("folder, case, device", USUALS)
def test_shares_of_the_usual_are_those_of_the_result_files(folder, case, device, clip):
    found = plan("1B", **DTYPES[case], grad_clip=1.0 if clip else None, device=device, bandwidth=1.0)
    measured = of_ceiling(result(folder, f"{case}{'-clip' * clip}"), "torch fused")
    assert predicted_share(found, "usual") == pytest.approx(measured, abs=0.02)


@pytest.mark.parametrize(
    "case, candidate, options",
    (
        ("planner-float32", "amsgrad", dict(amsgrad=True)),
        ("planner-bfloat16", "align", dict(dtype="bf16", overshoot="align")),
        ("planner-bfloat16", "float32 moments", dict(dtype="bf16", state_dtype="fp32")),
        (
            "planner-bfloat16",
            "float32 moments, global norm",
            dict(dtype="bf16", state_dtype="fp32", grad_clip=1.0),
        ),
        (
            "planner-bfloat16",
            "float32 moments, align",
            dict(dtype="bf16", state_dtype="fp32", overshoot="align"),
        ),
    ),
)
def test_shares_of_the_cpu_are_those_of_the_planners_own_benchmark(case, candidate, options):
    found = plan("1B", **options, device="cpu", bandwidth=1.0)
    assert predicted_share(found, "ours") == pytest.approx(of_ceiling(result(CPU, case), candidate), abs=0.02)


def test_a_gate_with_amsgrad_where_only_each_was_measured_is_not_known():
    options = dict(dtype="bf16", device="cpu", bandwidth=1.0)
    assert plan("1B", **options, amsgrad=True).ours.expected_seconds is None
    gated = dict(device="cpu", bandwidth=1.0, overshoot="align")
    plain = plan("1B", device="cpu", bandwidth=1.0).ours
    assert plan("1B", **gated).ours == plain  # in fp32 the gate takes no longer
    assert plan("1B", **gated, amsgrad=True).ours == plan("1B", amsgrad=True, device="cpu", bandwidth=1.0).ours
    assert plan("1B", **options, overshoot="align-element").ours == plan("1B", **options).ours


@pytest.mark.parametrize("case, device", (("step-rules-cuda", "cuda"), ("step-rules-triton", "rocm")))
def test_shares_of_amsgrad_are_those_of_the_result_files(case, device):
    found = plan("1B", amsgrad=True, device=device, bandwidth=1.0)
    assert predicted_share(found, "ours") == pytest.approx(of_ceiling(result(GPU, case), "amsgrad"), abs=0.01)


@pytest.mark.parametrize("case, dtype", (("scores-64", "fp32"), ("scores-64-bfloat16", "bf16")))
def test_shares_of_scores_are_those_of_the_result_files(case, dtype):
    options = dict(scores=64, grad_dtype=dtype, device="cpu", bandwidth=1.0)
    found = result(CPU, case)
    assert predicted_share(plan("1B", **options), "ours") == pytest.approx(of_ceiling(found, "ours"), abs=0.01)
    bounded = predicted_share(plan("1B", **options, max_sample_norm=1.0), "ours")
    assert bounded == pytest.approx(of_ceiling(found, "ours, max_sample_norm"), abs=0.02)


def test_share_of_the_published_peak_that_a_copy_reached():
    copies = [json.loads(path.read_text()) for path in (harness.RESULTS / GPU).glob("step-*-clip.json")]
    large = sorted(own["ceiling"]["gigabytes_per_second"] for own in copies if own["elements"] > 10**8)
    assert large[len(large) // 2] / planner.DEVICES["h200"].peak == pytest.approx(planner.COPY_OF_PEAK, abs=0.005)


def test_prediction_of_a_sharded_llama_on_the_gpu_that_measured_it():
    measured = result(GPU, "step-llama3-8b-shard-clip")
    found = plan(8_030_261_248, gpus=8, sharding="fsdp", grad_clip=1.0, device="h200")
    assert found.stepped == measured["elements"]
    ours, usual = (measured["candidates"][name]["seconds"]["p50"] for name in ("ours, cuda", "torch fused"))
    assert found.ours.expected_seconds == pytest.approx(ours, rel=0.05)
    assert found.usual.expected_seconds == pytest.approx(usual, rel=0.05)


# ---------------------------------------------------------------- what a user writes


@pytest.mark.parametrize(
    "text, value",
    (
        ("70e9", 70 * 10**9),
        ("70B", 70 * 10**9),
        ("7b", 7 * 10**9),
        ("0.5B", 500_000_000),
        ("494M", 494_000_000),
        ("1.7e6", 1_700_000),
        ("1,234_567", 1_234_567),
        ("5k", 5_000),
        ("2T", 2 * 10**12),
        (" 12 ", 12),
        (12, 12),
        (7e9, 7 * 10**9),
    ),
)
def test_counts_are_read(text, value):
    assert parse_count("params", text) == value
    assert isinstance(parse_count("params", text), int)


@pytest.mark.parametrize(
    "text", ("", "B", "0", "-7B", "1.5", "1e99", "1e999999999", "inf", "nan", "7G", "7 B B", "0x10", math.nan, math.inf)
)
def test_counts_that_are_none(text):
    with pytest.raises(ValueError, match="params must be a whole number from 1 to 1e18"):
        parse_count("params", text)


@pytest.mark.parametrize("value", (None, True, [7]))
def test_counts_of_another_kind(value):
    with pytest.raises(TypeError, match="params must be a number or a text"):
        parse_count("params", value)


@pytest.mark.parametrize(
    "argument, text, value",
    (
        ("grad_clip", "none", None),
        ("grad_clip", "1.0", fca.GlobalNorm(1.0)),
        ("grad_clip", "2", fca.GlobalNorm(2.0)),
        ("grad_clip", "ZClip()", fca.ZClip()),
        ("grad_clip", " ZClip(0.9, warmup = 50, max_norm=None) ", fca.ZClip(0.9, warmup=50, max_norm=None)),
        ("grad_clip", "(1.0, SpikeClip(theta=50.0))", (fca.GlobalNorm(1.0), fca.SpikeClip(50.0))),
        ("grad_clip", "GlobalNorm(1.0, lag=True)", fca.GlobalNorm(1.0, lag=True)),
        ("overshoot", "align", fca.AlignedMomentum()),
        ("overshoot", "align-tensor", fca.AlignedMomentum("tensor")),
        ("overshoot", "AlignedMomentum(block=256)", fca.AlignedMomentum(256)),
        ("overshoot", "AlignedMomentum('element')", fca.AlignedMomentum("element")),
        ("overshoot", "align, UpdateClamp(1.0)", (fca.AlignedMomentum(), fca.UpdateClamp(1.0))),
        ("overshoot", "'align-element', UpdateClamp(1.0)", (fca.AlignedMomentum("element"), fca.UpdateClamp(1.0))),
        ("reset", "Periodic(every=500)", fca.Periodic(500)),
        ("reset", "OnRollout()", fca.OnRollout()),
    ),
)
def test_rules_are_read(argument, text, value):
    assert parse_rules(argument, text) == value


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_read_as_python_shows_it(name):
    as_rule = {argument: own[1] for argument, own in planner._RULES.items()}
    for argument in as_rule.keys() & RULES[name].keys():
        rule = as_rule[argument](RULES[name][argument])
        assert parse_rules(argument, repr(rule)) == rule


@pytest.mark.parametrize(
    "argument, text, message",
    (
        ("grad_clip", "", "cannot be read"),
        ("grad_clip", "ZClip(", "cannot be read"),
        ("grad_clip", "-1.0", "max_norm must be a positive number"),
        ("grad_clip", "ZClip", r"written with brackets, ZClip\(\.\.\.\)"),
        ("grad_clip", "zclip()", "'zclip' is no rule of grad_clip; accepted: GlobalNorm"),
        ("grad_clip", "Cautious()", "'Cautious' is no rule of grad_clip"),
        ("grad_clip", "align", "grad_clip must be None, a positive number"),
        ("grad_clip", "ZClip(warmup=0)", "warmup must be an int of at least 1"),
        ("grad_clip", "ZClip(rate=2)", "unexpected keyword argument 'rate'"),
        ("grad_clip", "ZClip(**{})", "without a name"),
        ("grad_clip", "(1.0, ZClip())", "both shape the gradient"),
        ("overshoot", "algin", "overshoot='algin' is unknown"),
        ("overshoot", "align-tensors", "overshoot='align-tensors' is unknown"),
        ("overshoot", "align-tensor, UpdateClamp()", "neither a number, a text"),
        ("overshoot", "AlignedMomentum(block=2**8)", "neither a number, a text"),
        ("reset", "500", "reset must be None or a Reset rule"),
        ("reset", "Periodic()" + " " * 1000 + "+1", "longer than 1000 characters"),
        ("grad_clip", "__import__('os').getcwd()", "is no rule of grad_clip"),
        ("grad_clip", "ZClip(warmup=__import__('os').getpid())", "neither a number, a text"),
        ("grad_clip", "ZClip.__init__", "neither a number, a text"),
        ("grad_clip", "[ZClip() for x in (1,)]", "neither a number, a text"),
        ("grad_clip", "fca.ZClip()", "'fca.ZClip' is no rule of grad_clip"),
        ("grad_clip", "(" * 300 + ")" * 300, "cannot be read"),
    ),
)
def test_rules_that_cannot_be_read(argument, text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_rules(argument, text)
    assert str(error.value).startswith(f"{argument}=")


@pytest.mark.parametrize(
    "options, message",
    (
        (dict(params="many"), "params must be a whole number"),
        (dict(gpus=0), "gpus must be an int of at least 1, got 0"),
        (dict(gpus=2.0), "gpus must be an int"),
        (dict(sharding="zero3"), "sharding='zero3' is unknown; accepted: none, zero1, fsdp"),
        (dict(gpus=8, replicas=2), "replicas=2 goes with sharding="),
        (dict(gpus=8, sharding="fsdp", replicas=3), "replicas=3 must divide gpus=8"),
        (dict(gpus=8, sharding="fsdp", replicas=0), "replicas must be an int of at least 1"),
        (dict(dtype="int8"), "dtype must be one of bf16, fp16, fp32 here, got 'int8'"),
        (dict(dtype=torch.float64), "dtype must be one of bf16, fp16, fp32"),
        (dict(grad_dtype="bf16"), "grad_dtype must be one of fp32 here, got 'bf16'"),
        (dict(dtype="bf16", grad_dtype="fp16"), "grad_dtype must be one of bf16, fp32 here"),
        (dict(state_dtype="bf16"), "state_dtype must be one of fp32 here"),
        (dict(grad_clip=-1.0), "max_norm must be a positive number"),
        (dict(overshoot="gate"), "overshoot='gate' is unknown"),
        (dict(bucket_bytes=8), "bucket_bytes=8 goes with in_backward=True only"),
        (dict(previous_norm=True), "previous_norm=True goes with in_backward=True only"),
        (dict(largest_tensor="1M"), "largest_tensor='1M' goes with in_backward=True or offload only"),
        (dict(in_backward=True, bucket_bytes=-1), "bucket_bytes must be an int of at least 0, got -1"),
        (dict(in_backward=True, bucket_bytes=0), "bucket_bytes=0 keeps one tensor's gradient: give largest_tensor"),
        (dict(in_backward=True, largest_tensor="2B"), "largest_tensor='2B' has more elements than params"),
        (dict(in_backward=True, largest_tensor="big"), "largest_tensor must be a whole number"),
        (dict(in_backward=True, gpus=8), 'in_backward=True goes with sharding="fsdp" or gpus=1'),
        (dict(in_backward=True, gpus=8, sharding="zero1"), 'in_backward=True goes with sharding="fsdp" or gpus=1'),
        (dict(in_backward=True, grad_clip=fca.InducedMetric()), "InducedMetric.* needs the gradients of all tensors"),
        (dict(offload="nvme"), "offload must be None or \"cpu\", got 'nvme'"),
        (dict(offload="cpu", device="cpu", bandwidth=9.0), "nothing is left to offload"),
        (dict(scores=0), "scores must be an int of at least 1"),
        (dict(scores=4, in_backward=True), "scores=4 does not go with in_backward: no gradient is made"),
        (dict(scores=4, offload="cpu"), "scores=4 does not go with offload"),
        (dict(scores=4, gpus=2, sharding="fsdp"), "scores=4 does not go with sharding"),
        (dict(max_sample_norm=1.0), "max_sample_norm=1.0 goes with scores only"),
        (dict(scores=4, max_sample_norm=-1.0), "max_sample_norm must be a positive finite number"),
        (dict(device="v100"), "device='v100' is unknown; accepted: a100, h100"),
        (dict(device="cpu"), "device='cpu' has no published bandwidth; give bandwidth="),
        (dict(bandwidth=0.0), "bandwidth must be a positive finite number, got 0.0"),
        (dict(bandwidth=math.inf), "bandwidth must be a positive finite number, got inf"),
        (dict(host_bandwidth=100.0), "host_bandwidth=100.0 goes with offload="),
        (dict(link_bandwidth=50.0), "link_bandwidth=50.0 goes with offload="),
        (dict(offload="cpu", link_bandwidth=math.nan), "link_bandwidth must be a positive finite number"),
    ),
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"params": "1B", **options})


@pytest.mark.parametrize("rule", (1.0, fca.ZClip(), fca.AutoClip(), fca.AdaGC(), fca.InducedMetric()))
def test_step_in_backward_refuses_the_same_rules(rule):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError) as planned:
        plan("1B", in_backward=True, grad_clip=rule)
    with pytest.raises(ValueError) as real:
        fca.step_in_backward(model, fca.FusedClipAdamW(model.parameters(), grad_clip=rule))
    assert str(planned.value).split(": ", 1)[1] == str(real.value).split(": ", 1)[1]


@pytest.mark.parametrize("name", ("amsgrad", "skip_nonfinite", "in_backward", "previous_norm"))
def test_flags_are_bools(name):
    with pytest.raises(TypeError, match=f"{name} must be a bool, got 1"):
        plan("1B", **{name: 1})


def test_the_optimizer_refuses_the_same_dtypes():
    """What `plan` does not accept is no setting of the optimizer either."""
    with pytest.raises(ValueError, match=r"state_dtype must be None or torch\.float32"):
        fca.FusedClipAdamW([torch.nn.Parameter(torch.ones(2))], state_dtype=BF16)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad_dtype = BF16
    p.grad = torch.ones(2, dtype=BF16)
    with pytest.raises(TypeError, match=r"accepted: torch\.float32"):
        fca.FusedClipAdamW([p]).step()


# ---------------------------------------------------------------- the command line

COMMAND = ["plan", "--params", "70B", "--gpus", "64", "--sharding", "fsdp", "--dtype", "bf16", "--state-dtype", "fp32"]
FULL = [*COMMAND, "--grad-clip", "ZClip()", "--overshoot", "align, UpdateClamp(1.0)", "--device", "h100"]


def printed(capsys, *arguments: str) -> str:
    assert cli.main([*arguments]) == 0
    return capsys.readouterr().out


def test_the_command_prints_memory_bytes_and_seconds():
    command = [sys.executable, "-m", "fused_clip_adam", *FULL]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = {" ".join(line.split()[:-1]): line.split()[-1] for line in done.stdout.splitlines() if line.strip()}
    shard = 70e9 / 64 / 2**30
    assert f"  device parameters{2 * shard:>23.2f} GiB" in done.stdout
    assert f"  device exp_avg_sq{4 * shard:>23.2f} GiB" in done.stdout
    assert f"  device total{12 * shard:>28.2f} GiB" in done.stdout
    assert "1,093,750,000 elements" in done.stdout
    assert any(line.startswith("update 22") for line in lines)
    assert any(line.startswith("all 24 24.45 GiB 7.84 ms") for line in lines)  # 24 B over 3,350 GB/s
    assert any(line.startswith("all 28 28.52 GiB") for line in lines)
    assert "ZClip(alpha=0.97" in done.stdout
    assert "Communication (all-reduce, reduce-scatter, all-gather) is not modelled." in done.stdout
    assert done.stderr == ""


def test_json_is_the_plan(capsys):
    options = dict(gpus=64, sharding="fsdp", dtype="bf16", state_dtype="fp32", device="h100")
    rules = dict(grad_clip=fca.ZClip(), overshoot=("align", fca.UpdateClamp(1.0)))
    found = json.loads(printed(capsys, *FULL, "--json"))
    assert found == plan("70B", **options, **rules).to_dict()
    assert found["ours"]["device"]["total"] == 12 * 1_093_750_000
    assert found["ours"]["expected_seconds"] == pytest.approx(
        sum(own["expected_seconds"] for own in found["ours"]["passes"])
    )


FLAGS = ("--amsgrad", "--in-backward", "--previous-norm")


def test_every_option_reaches_the_plan(capsys):
    arguments = {
        "--gpus": ("4", dict(gpus=4)),
        "--sharding": ("fsdp", dict(sharding="fsdp")),
        "--replicas": ("2", dict(replicas=2)),
        "--dtype": ("bf16", dict(dtype="bf16")),
        "--grad-dtype": ("fp32", dict(grad_dtype="fp32")),
        "--state-dtype": ("fp32", dict(state_dtype="fp32")),
        "--reset": ("Periodic(9)", dict(reset=fca.Periodic(9))),
        "--bucket-bytes": ("25000", dict(bucket_bytes=25000)),
        "--largest-tensor": ("10k", dict(largest_tensor=10_000)),
        "--offload": ("cpu", dict(offload="cpu")),
        "--device": ("h200", dict(device="h200")),
        "--bandwidth": ("4000", dict(bandwidth=4000.0)),
        "--host-bandwidth": ("300", dict(host_bandwidth=300.0)),
        "--link-bandwidth": ("50", dict(link_bandwidth=50.0)),
    }
    flags = {"amsgrad": True, "in_backward": True, "previous_norm": True}
    written = [each for name, (text, _) in arguments.items() for each in (name, text)]
    options = {key: value for _, own in arguments.values() for key, value in own.items()}
    found = json.loads(printed(capsys, "plan", "--params", "1M", *FLAGS, *written, "--json"))
    assert found == plan("1M", **options, **flags).to_dict()
    written = ("--scores", "8", "--max-sample-norm", "2", "--skip-nonfinite", "--grad-dtype", "bf16")
    found = json.loads(printed(capsys, "plan", "--params", "1M", *written, "--json"))
    expected = plan("1M", scores=8, max_sample_norm=2.0, skip_nonfinite=True, grad_dtype="bf16")
    assert found == expected.to_dict()
    known = {"params", "grad_clip", "overshoot", *options, *flags, "scores", "max_sample_norm", "skip_nonfinite"}
    assert known == set(plan.__kwdefaults__) | {"params"}  # a new argument of `plan` needs an option, and a place here


def test_the_table_shows_host_and_link(capsys):
    out = printed(capsys, "plan", "--params", "1B", "--offload", "cpu", "--link-bandwidth", "50")
    assert "host staging" in out
    assert "gradients and parameters down (link)" in out
    assert "update (host)" in out
    assert "host: none given (host_bandwidth=)" in out


@pytest.mark.parametrize("extra, expected", (((), "cpu"), (("--offload", "cpu"), "host")))
def test_measure_gives_a_positive_bandwidth(capsys, monkeypatch, extra, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = json.loads(printed(capsys, "plan", "--params", "1M", *extra, "--measure", "--json"))
    update = next(own for own in found["ours"]["passes"] if own["name"] == "update")
    assert update["where"] == ("host" if expected == "host" else "device")
    assert 0 < update["ceiling"] < 1e5
    assert update["share"] == planner.OURS["cpu"]["fp32", "fp32", "fp32"].update


def test_bandwidth_counts_seven_passes_over_four_arrays(monkeypatch):
    seconds = iter([9.0, 2.0, 4.0])
    monkeypatch.setattr(bandwidth, "_seconds", lambda arrays, on_gpu, device: next(seconds))
    assert bandwidth.measure_bandwidth("cpu", size=16_000, rounds=2) == pytest.approx(28 * 1000 / 2.0 / 1e9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bandwidth_of_a_gpu():
    assert 50 < bandwidth.measure_bandwidth("cuda") < 50_000


@pytest.mark.parametrize(
    "arguments, error, message",
    (
        (dict(device="mps"), ValueError, "device must be cpu or cuda, got mps"),
        (dict(size=8), ValueError, "size must be at least 64"),
        (dict(rounds=0), ValueError, "rounds at least 1"),
    ),
)
def test_bandwidth_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        bandwidth.measure_bandwidth(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    (
        ((), "required: COMMAND"),
        (("plan",), "required: --params"),
        (("plan", "--params", "x"), "params must be a whole number"),
        (("plan", "--params", "1B", "--gpus", "two"), "argument --gpus: invalid int value: 'two'"),
        (("plan", "--params", "1B", "--gpus", "-1"), "gpus must be an int of at least 1, got -1"),
        (("plan", "--params", "1B", "--grad-clip", "Zclip()"), "'Zclip' is no rule of grad_clip"),
        (("plan", "--params", "1B", "--overshoot", "align-"), "overshoot='align-'"),
        (("plan", "--params", "1B", "--state-dtype", "bf16"), "state_dtype must be one of fp32"),
        (("plan", "--params", "1B", "--measure", "--bandwidth", "9"), "and so does --bandwidth 9.0"),
        (("plan", "--params", "1B", "--measure", "cpu", "--device", "h100"), "and so does --device h100"),
        (("plan", "--params", "1B", "--measure", "cpu", "--replicas", "2"), "replicas=2 goes with sharding="),
        (
            ("plan", "--params", "1B", "--offload", "cpu", "--measure", "--host-bandwidth", "9"),
            "and so does --host-bandwidth 9.0",
        ),
        (("plan", "--params", "1B", "--measure", "tpu"), "invalid choice: 'tpu'"),
    ),
)
def test_the_command_refuses_with_a_sentence(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(cli, "measure_bandwidth", lambda device: pytest.fail("measured before the check"))
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_measuring_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["plan", "--params", "1B", "--measure", "cuda"])
    assert "device=cuda: torch sees no GPU here" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for argument in plan.__kwdefaults__:
        assert f"--{argument.replace('_', '-')}" in out
    assert "Communication is not modelled" in out


def test_examples_of_the_help_run(capsys):
    joined = cli._EXAMPLES.replace("\\\n", " ")
    commands = [line.strip() for line in joined.splitlines() if line.strip().startswith("python -m fused_clip_adam ")]
    assert len(commands) == 5
    for command in commands:
        if "--measure" not in command:
            assert "memory of a rank" in printed(capsys, *shlex.split(command)[3:])
