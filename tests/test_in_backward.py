"""step_in_backward: the step of a whole backward pass, tensors by tensors, and what it must refuse."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import bitwise_equal
from ranks import worlds
from torch import nn

import fused_clip_adam as fca

PER_TENSOR = {
    "plain": {},
    "clip lagged": dict(grad_clip=fca.GlobalNorm(0.05, lag=True)),
    "per tensor": dict(grad_clip=fca.PerTensorNorm(0.02)),
    "agc": dict(grad_clip=fca.AGC(0.01)),
    "spike clip, periodic": dict(grad_clip=fca.SpikeClip(theta=2.0, start=2), reset=fca.Periodic(every=4, warmup=3)),
    "stable spam": dict(grad_clip=fca.StableSpamClip(total_steps=20)),
    "stable spam as published": dict(
        grad_clip=fca.StableSpamClip(total_steps=20, shared_counter=True), reset=fca.Periodic(every=3, warmup=2)
    ),
    "stable adamw": dict(grad_clip=fca.UpdateRMS()),
    "align": dict(overshoot=fca.AlignedMomentum(block=16)),
    "align element": dict(overshoot="align-element"),
    "align tensor": dict(overshoot="align-tensor"),
    "align tensor lagged": dict(overshoot=fca.AlignedMomentum(block="tensor", lag=True)),
    "cautious": dict(overshoot=fca.Cautious(rescale=True)),
    "grams, brake": dict(overshoot=("grams", fca.MomentumBrake(0.7), fca.UpdateClamp(0.5))),
    "median": dict(overshoot=fca.MedianMomentum(1e-3)),
    "when clipped": dict(reset=fca.WhenClipped(0.35)),
    "amsgrad": dict(amsgrad=True, maximize=True),
    "adam": dict(cls=fca.FusedClipAdam, weight_decay=0.1),
    "fadam": dict(cls=fca.FusedFAdam),
}
# These read the step before's norm, and so do their counterparts in an ordinary step.
STEPS = 9


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 40), nn.Linear(40, 11)
    )


def batch(step: int, rank: int = 0) -> torch.Tensor:
    return torch.randint(11, (16,), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model: nn.Module, step: int, rank: int = 0) -> torch.Tensor:
    tokens = batch(step, rank)
    return nn.functional.cross_entropy(model(tokens), (tokens * 3 + 1) % 11) * (20.0 if step == 5 else 1.0)


def stats(step: int) -> fca.ClipStats:
    buffer = torch.zeros(14)
    buffer[4], buffer[5] = 0.1 * (step % 6), 1.0
    return fca.ClipStats(buffer)


def make_optimizer(model: nn.Module, cls=fca.FusedClipAdamW, backend="cpu", **options):
    params = list(model.parameters())
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 3e-3}]
    return cls(groups, lr=1e-2, backend=backend, **options)


def everything(model: nn.Module, opt) -> list[torch.Tensor]:
    opt.state_dict()
    out = [p.detach() for p in model.parameters()]
    for p in model.parameters():
        out += [value for _, value in sorted(opt.state[p].items())]
    for _, rules in sorted(opt._memory.items()):
        out += [value for _, own in sorted(rules.items()) for _, value in sorted(own["tensors"].items())]
    return [*out, opt.step_count_skipped]


def train(in_backward: bool, steps: int = STEPS, accumulate: int = 1, how: dict | None = None, **options):
    model = make_model()
    opt = make_optimizer(model, **options)
    if in_backward:
        fca.step_in_backward(model, opt, accumulation_steps=accumulate, **(how or {}))
    norms = []
    for step in range(steps):
        opt.observe(stats(step))
        for micro in range(accumulate):
            (loss_of(model, step, micro) / accumulate).backward()
        assert not in_backward or accumulate > 1 or how is None or how["bucket_bytes"] or not any_gradient(model)
        opt.step()
        opt.zero_grad()
        norms.append(opt.grad_norm)
    return model, opt, torch.stack(norms)


def any_gradient(model: nn.Module) -> bool:
    return any(p.grad is not None for p in model.parameters())


# 0: every tensor by itself; 3,000: some together, the last ones in step(); 2^40: all of them in step().
@pytest.mark.parametrize("bucket_bytes", [0, 3_000, 2**40])
@pytest.mark.parametrize("name", PER_TENSOR)
def test_it_is_the_ordinary_step_bit_for_bit(name, bucket_bytes):
    model, opt, norms = train(False, **PER_TENSOR[name])
    got_model, got_opt, got_norms = train(True, how=dict(bucket_bytes=bucket_bytes), **PER_TENSOR[name])
    if name == "clip lagged":
        # The norm is a float64 sum in another order, so a factor may differ by an ulp of float64, and a float32 product
        # of it, once in some 2^29, by one of float32: of a parameter below 2, 2^-23 a step.
        for got, expected in zip(everything(got_model, got_opt), everything(model, opt)):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=STEPS * 2.0**-23)
    else:
        assert bitwise_equal(everything(got_model, got_opt), everything(model, opt))
    torch.testing.assert_close(got_norms, norms, rtol=1e-7, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cuda", "triton"])
@pytest.mark.parametrize("name", ["plain", "stable spam", "align tensor lagged", "grams, brake"])
def test_every_backend(name, backend):
    options = dict(PER_TENSOR[name], backend=backend)
    model, opt, _ = train(False, **options)
    got_model, got_opt, _ = train(True, how=dict(bucket_bytes=3_000), **options)
    assert bitwise_equal(everything(got_model, got_opt), everything(model, opt))


def test_global_norm_takes_the_step_before():
    model, opt, _ = train(False, grad_clip=fca.GlobalNorm(0.05, lag=True))
    got_model, got_opt, _ = train(True, how=dict(bucket_bytes=0, previous_norm=True), grad_clip=0.05)
    for got, expected in zip(everything(got_model, got_opt), everything(model, opt)):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=STEPS * 2.0**-23)
    assert not bitwise_equal(
        [p.detach() for p in got_model.parameters()], [p.detach() for p in train(False)[0].parameters()]
    ), "nothing was clipped"


@pytest.mark.parametrize("bucket_bytes", [0, 3_000])
@pytest.mark.parametrize("rule", [fca.ZClip(warmup=3, max_norm=0.1), fca.AutoClip(50.0), fca.AutoClip(50.0, history=4)])
def test_statistics_of_norms_see_every_step_once(rule, bucket_bytes):
    _, opt, norms = train(True, how=dict(bucket_bytes=bucket_bytes, previous_norm=True), grad_clip=rule)
    own = opt._memory[0][type(rule).__name__]["tensors"]
    seen = norms[:-1]  # each from the next step on, so not the last
    if isinstance(rule, fca.ZClip):
        assert float(own["count"]) == len(seen)
        torch.testing.assert_close(own["norms"], seen[:3].double(), rtol=1e-6, atol=0)
    else:
        kept = seen if rule.history is None else seen[-rule.history :]
        got = own["norms"][own["norms"].isfinite()]
        torch.testing.assert_close(got.sort().values, kept.double().sort().values, rtol=1e-6, atol=0)
        assert own["norms"].numel() <= 300


def test_adagc_is_exact_after_its_start():
    rule = fca.AdaGC(start=2, ratio=1.01, max_norm=1e6)  # the first steps are not clipped, whatever the norm
    model, opt, _ = train(False, grad_clip=rule)
    got_model, got_opt, _ = train(True, how=dict(bucket_bytes=0, previous_norm=True), grad_clip=rule)
    assert bitwise_equal(everything(got_model, got_opt), everything(model, opt))


@pytest.mark.parametrize("bucket_bytes", [0, 3_000])
def test_accumulation(bucket_bytes):
    model, opt, _ = train(False, accumulate=3, grad_clip=fca.PerTensorNorm(0.02))
    got = train(True, accumulate=3, how=dict(bucket_bytes=bucket_bytes), grad_clip=fca.PerTensorNorm(0.02))
    assert bitwise_equal(everything(got[0], got[1]), everything(model, opt))


def test_a_parameter_that_fewer_passes_reach_is_stepped_in_step():
    def run(in_backward):
        model = make_model()
        opt = make_optimizer(model)
        if in_backward:
            fca.step_in_backward(model, opt, bucket_bytes=0, accumulation_steps=2)
        for step in range(3):
            loss_of(model, step).backward()
            model[4].weight.square().sum().backward()  # reaches one tensor only
            opt.step()
            opt.zero_grad()
        return everything(model, opt)

    assert bitwise_equal(run(True), run(False))


def test_gradients_are_freed_as_they_appear():
    torch.manual_seed(0)
    width, layers = 64, 24
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    alive = []

    def peak(in_backward):
        alive.clear()
        hooks = [
            p.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(q.grad.nbytes for q in model.parameters() if q.grad is not None))
            )
            for p in model.parameters()
        ]
        opt = fca.FusedClipAdamW(model.parameters())
        handle = fca.step_in_backward(model, opt, bucket_bytes=2 * width * width * 4) if in_backward else None
        model(torch.ones(2, width)).sum().backward()
        opt.step()
        if handle is not None:
            handle.remove()
        opt.zero_grad()
        for hook in hooks:
            hook.remove()
        return max(alive)

    every = sum(p.nbytes for p in model.parameters())
    assert peak(False) == every
    assert peak(True) <= 3 * width * (width + 1) * 4  # the bucket, and the layer that fills it
    assert not any_gradient(model)


@pytest.mark.parametrize("bucket_bytes", [0, 3_000, 2**40])
def test_grad_scaler(bucket_bytes):
    def run(in_backward):
        model = make_model()
        opt = make_optimizer(model, grad_clip=fca.PerTensorNorm(0.02))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        if in_backward:
            fca.step_in_backward(model, opt, bucket_bytes=bucket_bytes, scaler=scaler)
        scales = []
        for step in range(STEPS):
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            scales.append(scaler.get_scale())
        return everything(model, opt), scales

    (got, got_scales), (expected, scales) = run(True), run(False)
    assert got_scales == scales and scales[-1] > 2.0**10
    assert bitwise_equal(got, expected)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_that_is_not_finite_leaves_its_bucket_out(scaled):
    model = make_model()
    opt = make_optimizer(model, skip_nonfinite=not scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    fca.step_in_backward(model, opt, bucket_bytes=0, scaler=scaler)
    poisoned = model[1].weight
    poisoned.register_hook(lambda g: g * float("inf"))
    before = {p: p.detach().clone() for p in model.parameters()}
    loss = loss_of(model, 0)
    (scaler.scale(loss) if scaled else loss).backward()
    scaler.step(opt) if scaled else opt.step()
    for p in model.parameters():
        assert torch.equal(p.detach(), before[p]) == (p is poisoned)
    assert float(opt.state[poisoned]["step"]) == 0 and float(opt.state[model[4].weight]["step"]) == 1
    assert int(opt.step_count_skipped) == 1 and not opt.grad_norm.isfinite()
    if scaled:
        scaler.update()
        assert scaler.get_scale() == 2.0**9


def test_checkpoints_do_not_show_how_the_steps_were_taken():
    model, opt, _ = train(True, steps=4, how=dict(bucket_bytes=3_000), **PER_TENSOR["stable spam"])
    other_model, other = copy.deepcopy(model), None
    other = make_optimizer(other_model, **PER_TENSOR["stable spam"])
    other.load_state_dict(opt.state_dict())
    opt._backward_step.remove()
    for step in range(4, 7):
        for m, o in ((model, opt), (other_model, other)):
            loss_of(m, step).backward()
            o.step()
            o.zero_grad()
    assert bitwise_equal(everything(model, opt), everything(other_model, other))


def test_remove_and_with():
    model = make_model()
    opt = make_optimizer(model)
    with fca.step_in_backward(model, opt) as handle:
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="between backward"):
            handle.remove()
        opt.step()
    loss_of(model, 1).backward()
    assert any_gradient(model)
    opt.step()
    assert all(float(opt.state[p]["step"]) == 2 for p in model.parameters())


def test_a_tied_parameter_is_stepped_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 11), nn.Linear(11, 11, bias=False))
    model[1].weight = model[0].weight
    expected = copy.deepcopy(model)
    for own, in_backward in ((model, True), (expected, False)):
        opt = fca.FusedClipAdamW(own.parameters(), lr=0.1)
        if in_backward:
            fca.step_in_backward(own, opt, bucket_bytes=0)
        for step in range(3):
            loss_of(own, step).backward()
            opt.step()
            opt.zero_grad()
    assert torch.equal(model[0].weight, expected[0].weight)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("rule", [1.0, fca.ZClip(), fca.AutoClip(), fca.AdaGC()])
def test_rules_that_read_this_steps_norm_are_named(rule):
    model = make_model()
    with pytest.raises(ValueError, match="previous_norm=True"):
        fca.step_in_backward(model, make_optimizer(model, grad_clip=rule))
    fca.step_in_backward(model, make_optimizer(model, grad_clip=rule), previous_norm=True)


def test_a_rule_that_is_set_later_is_named_before_anything_is_changed():
    model = make_model()
    opt = make_optimizer(model)
    fca.step_in_backward(model, opt, bucket_bytes=0)
    opt.param_groups[0]["grad_clip"] = 1.0
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="previous_norm=True"):
        loss_of(model, 0).backward()
    assert bitwise_equal([p.detach() for p in model.parameters()], before) and not opt.state
    opt.param_groups[0]["grad_clip"] = None
    opt.zero_grad()
    loss_of(model, 0).backward()
    opt.step()
    assert len(opt.state) == len(before)


def test_what_is_refused():
    model = make_model()
    opt = make_optimizer(model)
    cases = [
        (TypeError, "model must be", dict(model=[], optimizer=opt)),
        (TypeError, "optimizer must be one of fused_clip_adam", dict(optimizer=torch.optim.AdamW(model.parameters()))),
        (ValueError, "no parameter of the model", dict(model=make_model(), optimizer=opt)),
        (ValueError, "bucket_bytes", dict(optimizer=opt, bucket_bytes=-1)),
        (ValueError, "accumulation_steps", dict(optimizer=opt, accumulation_steps=0)),
        (TypeError, "previous_norm", dict(optimizer=opt, previous_norm="yes")),
        (TypeError, "scaler", dict(optimizer=opt, scaler=1024.0)),
        (ValueError, "all tensors at once", dict(optimizer=make_optimizer(model, grad_clip=fca.InducedMetric()))),
        (ValueError, "differentiable", dict(optimizer=fca.FusedClipAdamW(model.parameters(), differentiable=True))),
    ]
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            fca.step_in_backward(**{"model": model, **call})
    handle = fca.step_in_backward(model, opt)
    with pytest.raises(RuntimeError, match="already"):
        fca.step_in_backward(model, opt)
    with pytest.raises(RuntimeError, match="step_in_backward is on"):
        opt.step_from_gradients([p.detach()[None] for p in model.parameters()])
    handle.remove()
    fca.step_in_backward(model, opt)


def test_a_second_gradient_and_a_late_observe_are_refused():
    model = make_model()
    opt = make_optimizer(model, overshoot="brake")
    fca.step_in_backward(model, opt, bucket_bytes=0)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="before backward"):
        opt.observe(stats(1))
    with pytest.raises(RuntimeError, match="second gradient"):
        loss_of(model, 0).backward()


def test_an_unannounced_scaler_is_refused():
    model = make_model()
    opt = make_optimizer(model)
    fca.step_in_backward(model, opt)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="scaler="):
        scaler.step(opt)


# ---------------------------------------------------------------- several ranks


def on_ranks(name: str, in_backward: bool, bucket_bytes: int) -> list[torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    for layer in (model[1], model[4]):
        fully_shard(layer)
    fully_shard(model)
    opt = make_optimizer(model, **PER_TENSOR[name])
    if in_backward:
        fca.step_in_backward(model, opt, bucket_bytes=bucket_bytes)
    for step in range(5):
        opt.observe(stats(step))
        loss_of(model, step, dist.get_rank()).backward()
        assert not in_backward or bucket_bytes or not any_gradient(model)
        opt.step()
        opt.zero_grad()
    return [p.full_tensor().detach() for p in model.parameters()]


def on_ranks_wrapped() -> str:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(make_model())
    try:
        fca.step_in_backward(model, make_optimizer(model))
    except TypeError as error:
        return str(error)
    return ""


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("bucket_bytes", [0, 3_000])
@pytest.mark.parametrize("name", ["plain", "per tensor", "agc", "stable spam", "align tensor lagged", "grams, brake"])
def test_shards_of_fsdp2(name, bucket_bytes):
    expected = worlds(2).run(on_ranks, name, False, 0)
    got = worlds(2).run(on_ranks, name, True, bucket_bytes)
    for rank in range(2):
        assert bitwise_equal(got[rank], expected[rank])


@pytest.mark.xdist_group("ranks")
def test_ddp_is_refused():
    assert all("fully_shard" in message for message in worlds(2).run(on_ranks_wrapped))


def test_peak_memory_of_a_process():
    # 8 layers of 1,024 x 1,024: 34 MB of gradients, of which a bucket of 8 MiB is a quarter.
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import step_in_backward as example

    assert example.memory("ordinary step", 8, 1024, 8) > 0.9
    assert example.memory("in backward", 8, 1024, 8) < 0.55
