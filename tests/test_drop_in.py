"""A drop-in for torch.optim.AdamW and Adam: dictionaries, checkpoints, GradScaler, schedulers, resets."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import CLASSES, bitwise_equal
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler

import fused_clip_adam as fca

# Ours and torch's float32 updates order the same ~10 operations differently: one ulp of a value below 4
# a step, for at most 12 steps.
ULPS = dict(rtol=0.0, atol=12 * 4 * torch.finfo(torch.float32).eps)

RULES = {
    "none": {},
    "clip": dict(grad_clip=0.5),
    "clip lagged": dict(grad_clip=fca.GlobalNorm(0.5, lag=True)),
    "zclip": dict(grad_clip=fca.ZClip(warmup=2)),
    "autoclip": dict(grad_clip=fca.AutoClip(50.0)),
    "adagc": dict(grad_clip=fca.AdaGC(start=2)),
    "align": dict(overshoot="align", grad_clip=1.0),
    "align element": dict(overshoot=fca.AlignedMomentum(block="element")),
    "cautious": dict(overshoot="cautious", skip_nonfinite=True),
    "brake": dict(overshoot=fca.MomentumBrake(0.7, mode="damp", hold_v=0.5)),
    "three": dict(overshoot=("grams", fca.MomentumBrake(0.7), fca.UpdateClamp(0.5))),
    "atan2": dict(overshoot=fca.UpdateClamp(1.0, mode="atan2")),
    "reset": dict(reset=fca.OnRollout(moments=True)),
    "amsgrad": dict(amsgrad=True, maximize=True),
}


def make_params(dtype=torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((7, 5), (1030,), ())]


def step(opt, at: int, scale: float = 1.0) -> None:
    """One training step on gradients and statistics that depend on `at` alone."""
    generator = torch.Generator().manual_seed(1000 + at)
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = scale * torch.randn(p.shape, generator=generator).to(p.dtype)
    if hasattr(opt, "observe"):
        opt.observe(stats(0.1 * (at % 10)))
    opt.step()


def stats(suppressed: float, total: float = 1.0) -> fca.ClipStats:
    buffer = torch.zeros(14)
    buffer[4], buffer[5] = suppressed, total
    return fca.ClipStats(buffer)


def train(opt, steps) -> None:
    for at in steps:
        step(opt, at)


def _own_state(opt, p) -> dict[str, Tensor]:
    """Without what a rule remembers of it, "Rule_name", which is as of the last state_dict(); `_memory` has it."""
    return {name: value for name, value in opt.state.get(p, {}).items() if name[0].islower()}


def everything(opt) -> list[Tensor]:
    out = [opt._books.grad_square_sum, opt.step_count_skipped]
    for group in opt.param_groups:
        for p in group["params"]:
            out += [p.detach(), *(v for _, v in sorted(_own_state(opt, p).items()))]
    for _, rules in sorted(opt._memory.items()):
        out += [value for _, own in sorted(rules.items()) for _, value in sorted(own["tensors"].items())]
    return [x.clone() for x in out]


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def clone_into(cls, opt, load=through_a_file, **options):
    """A new optimizer over copies of the parameters, with the state of `opt`."""
    groups = [[Parameter(p.detach().clone()) for p in g["params"]] for g in opt.param_groups]
    other = cls([{"params": params} for params in groups], **options)
    other.load_state_dict(load(opt.state_dict()))
    return other


# ---------------------------------------------------------------- same dictionaries


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("fused", (None, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_groups_defaults_and_states_are_torchs(name, fused, dtype):
    ours, theirs = (cls(make_params(dtype), fused=fused, amsgrad=True) for cls in CLASSES[name])
    assert ours.defaults == theirs.defaults
    for opt in (ours, theirs):
        train(opt, range(2))
    mine, state = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(state)
    assert mine["param_groups"] == state["param_groups"]
    assert list(mine["param_groups"][0]) == list(state["param_groups"][0])
    for index, own in state["state"].items():
        assert list(mine["state"][index]) == list(own)
        for key, value in own.items():
            other = mine["state"][index][key]
            assert (other.dtype, other.device, other.shape) == (value.dtype, value.device, value.shape)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("amsgrad", (False, True))
def test_a_run_may_change_to_torch_and_back(name, amsgrad):
    ours, theirs = CLASSES[name]
    options = dict(lr=0.01, weight_decay=0.1, amsgrad=amsgrad)
    whole = ours(make_params(), **options)
    train(whole, range(12))
    a = ours(make_params(), **options)
    train(a, range(4))
    b = clone_into(theirs, a, **options)
    assert bitwise_equal(tensors(b), tensors(a))
    train(b, range(4, 8))
    c = clone_into(ours, b, **options)
    assert bitwise_equal(tensors(c), tensors(b))
    train(c, range(8, 12))
    for p, q in zip(whole.param_groups[0]["params"], c.param_groups[0]["params"]):
        torch.testing.assert_close(p, q, **ULPS)


def tensors(opt) -> list[Tensor]:
    return [v for own in opt.state_dict()["state"].values() for _, v in sorted(own.items())]


@pytest.mark.parametrize("load", (through_a_file, copy.deepcopy), ids=("file", "memory"))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_resuming_is_bit_for_bit(dtype, rule, load):
    opt = fca.FusedClipAdamW(make_params(dtype), lr=0.01, **RULES[rule])
    train(opt, range(4))
    opt.observe(stats(0.25, 0.5))  # half a step: statistics that wait for it must survive
    other = clone_into(fca.FusedClipAdamW, opt, load, lr=0.5, **RULES[rule])
    for o in (opt, other):
        train(o, range(4, 7))
        o.new_rollout()
        train(o, range(7, 9))
    assert bitwise_equal(everything(other)[int(rule == "none") :], everything(opt)[int(rule == "none") :])


@pytest.mark.parametrize("rule", RULES)
def test_rules_travel_in_the_checkpoint_and_torch_reads_it(rule):
    opt = fca.FusedClipAdamW(make_params(), **RULES[rule])
    train(opt, range(3))
    rules = {k: opt.param_groups[0].get(k) for k in ("grad_clip", "overshoot", "reset")}
    other = clone_into(fca.FusedClipAdamW, opt)  # constructed without rules
    assert {k: other.param_groups[0].get(k) for k in rules} == rules
    theirs = clone_into(torch.optim.AdamW, opt)
    train(theirs, range(3, 5))
    back = clone_into(fca.FusedClipAdamW, theirs)
    assert {k: back.param_groups[0].get(k) for k in rules} == rules
    train(back, range(5, 6))


def test_a_constructed_rule_stays_where_the_checkpoint_names_none():
    theirs = torch.optim.AdamW(make_params())
    train(theirs, range(2))
    ours = clone_into(fca.FusedClipAdamW, theirs, overshoot="align", grad_clip=2.0)
    assert ours.param_groups[0]["overshoot"] == fca.AlignedMomentum()
    assert ours.param_groups[0]["grad_clip"] == fca.GlobalNorm(2.0)


@pytest.mark.parametrize("source", CLASSES["AdamW"])
def test_loading_shares_no_memory(source):
    opt = source(make_params())
    train(opt, range(2))
    other = clone_into(fca.FusedClipAdamW, opt, load=lambda state: state)
    before = [x.clone() for x in tensors(opt)]
    train(other, range(2, 4))
    assert bitwise_equal(tensors(opt), before)


def test_wide_states_survive_a_round_trip():
    opt = fca.FusedClipAdamW(make_params(torch.bfloat16), state_dtype=torch.float32, overshoot="brake")
    train(opt, range(3))
    other = clone_into(fca.FusedClipAdamW, opt, state_dtype=torch.float32)
    for state in other.state.values():
        assert {k: v.dtype for k, v in state.items()} == {
            "step": torch.float32,
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
            "bias_weights": torch.float64,  # bfloat16 would be wrong by 0.4%
        }
    assert bitwise_equal(tensors(opt), tensors(other))


def test_a_bad_checkpoint_changes_nothing():
    opt = fca.FusedClipAdamW(make_params(), overshoot="align")
    train(opt, range(2))
    good, before = opt.state_dict(), everything(opt)
    groups = good["param_groups"][0]
    bad = [
        {**good, "param_groups": []},
        {**good, "param_groups": [{**groups, "params": [0]}]},
        {**good, "param_groups": [{**groups, "overshoot": {"rule": "Unknown"}}]},
        {**good, "param_groups": [{**groups, "grad_clip": {"rule": "GlobalNorm", "max_norm": -1.0}}]},
        {**good, "param_groups": [{**groups, "overshoot": {"rule": "GlobalNorm", "max_norm": 1.0}}]},
    ]
    for state in bad:
        with pytest.raises(ValueError):
            opt.load_state_dict(state)
        assert bitwise_equal(everything(opt), before)
        assert opt.param_groups[0]["overshoot"] == fca.AlignedMomentum()


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))), ids=("copy", "pickle"))
def test_copies_continue_bit_for_bit(duplicate, rule):
    opt = fca.FusedClipAdamW(make_params(), **RULES[rule])
    train(opt, range(3))
    opt.observe(stats(0.5))
    other = duplicate(opt)
    for o in (opt, other):
        train(o, range(3, 6))
        o.add_param_group({"params": Parameter(torch.ones(3))})  # default rules must have survived
        train(o, range(6, 7))
    assert bitwise_equal(everything(opt), everything(other))
    assert [g.get("overshoot") for g in opt.param_groups] == [g.get("overshoot") for g in other.param_groups]


# ---------------------------------------------------------------- GradScaler and non-finite steps


def scaled_step(opt, scaler, scale_of_grad=1.0, unscale=False, at=0):
    generator = torch.Generator().manual_seed(at)
    scaler.scale(torch.ones(()))  # creates the scale
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape, generator=generator) * scaler.get_scale() * scale_of_grad
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("unscale", (False, True))
@pytest.mark.parametrize("rule", RULES)
def test_grad_scaler_steps_are_plain_steps(rule, unscale):
    opts = [fca.FusedClipAdamW(make_params(), **RULES[rule]) for _ in range(2)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for scale in (1024.0, 1.0)]
    for at in range(4):
        for opt, scaler in zip(opts, scalers):
            scaled_step(opt, scaler, unscale=unscale, at=at)
    assert bitwise_equal(everything(opts[0]), everything(opts[1]))  # powers of two scale without rounding
    assert not hasattr(opts[0], "grad_scale") and not hasattr(opts[0], "found_inf")


@pytest.mark.parametrize("unscale", (False, True))
@pytest.mark.parametrize("rule", RULES)
def test_an_overflow_skips_everything_and_is_counted(rule, unscale):
    opt = fca.FusedClipAdamW(make_params(), **RULES[rule])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled_step(opt, scaler, unscale=unscale)
    before, keys = everything(opt), [list(s) for s in opt.state.values()]
    opt.observe(stats(0.9))
    scaled_step(opt, scaler, scale_of_grad=float("inf"), unscale=unscale)
    after = everything(opt)
    assert int(after.pop(1)) == int(before.pop(1)) + 1
    assert bitwise_equal(after, before)  # the norm statistic (first) included: a lagged clip reads it next
    assert [list(s) for s in opt.state.values()] == keys
    assert scaler.get_scale() == 4.0


def test_a_preset_grad_scale_multiplies_the_scalers():
    # What makes torch's fused AdamW clip: the user sets opt.grad_scale, the scaler multiplies and deletes it.
    ours, theirs = fca.FusedClipAdamW(make_params()), torch.optim.AdamW(make_params(), fused=True)
    for opt in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        opt.grad_scale = torch.tensor(4.0)
        scaled_step(opt, scaler)
        assert not hasattr(opt, "grad_scale")
        scaled_step(opt, scaler, at=1)
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
        torch.testing.assert_close(p, q, **ULPS)


@pytest.mark.parametrize("bad", (float("inf"), float("-inf"), float("nan")))
@pytest.mark.parametrize("rule", RULES)
def test_skip_nonfinite_changes_nothing_and_counts(rule, bad):
    opt = fca.FusedClipAdamW(make_params(), **{**RULES[rule], "skip_nonfinite": True})
    for at in range(2):
        before = everything(opt)
        params = opt.param_groups[0]["params"]
        for p in params:
            p.grad = torch.ones_like(p)
        params[-1].grad.fill_(bad)
        opt.step()
        after = everything(opt)
        assert int(opt.step_count_skipped) == at + 1
        assert not opt.grad_norm.isfinite()
        # The first step makes the states; they are zero.
        for p in params:
            assert all(float(v.abs().sum()) == 0 for v in _own_state(opt, p).values()) or at
        if at:
            assert bitwise_equal(after[2:], before[2:])
        step(opt, 5)
        assert opt.grad_norm.isfinite()
        assert int(opt.step_count_skipped) == at + 1


# ---------------------------------------------------------------- schedulers, groups, closures, hooks

SCHEDULERS = {
    "step": lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.5),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=20, cycle_momentum=True),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.001, 0.1, step_size_up=3, cycle_momentum=True),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", CLASSES)
def test_schedulers_drive_it_as_torch(name, scheduler):
    ours, theirs = (cls(make_params(), weight_decay=0.1) for cls in CLASSES[name])
    for opt in (ours, theirs):
        schedule = SCHEDULERS[scheduler](opt)
        for at in range(10):
            step(opt, at)
            schedule.step()
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
        torch.testing.assert_close(p, q, **ULPS)


def test_reduce_on_plateau_and_a_tensor_rate_in_place():
    opt = fca.FusedClipAdamW(make_params(), lr=torch.tensor(0.1))
    schedule = lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)
    for at in range(3):
        step(opt, at)
        schedule.step(1.0)
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(0.025)


def test_amsgrad_may_be_switched_on_and_off():
    # torch raises KeyError at the switch; here the maximum starts there.
    opt = fca.FusedClipAdamW(make_params(), lr=0.01)
    train(opt, range(3))
    opt.param_groups[0]["amsgrad"] = True
    train(opt, range(3, 6))
    for own in opt.state.values():
        assert bool((own["max_exp_avg_sq"] >= own["exp_avg_sq"]).all())
    opt.param_groups[0]["amsgrad"] = False
    kept = [own["max_exp_avg_sq"].clone() for own in opt.state.values()]
    train(opt, range(6, 7))
    assert bitwise_equal([own["max_exp_avg_sq"] for own in opt.state.values()], kept)


def test_groups_added_later_have_their_own_rules_and_steps():
    params = make_params()
    opt = fca.FusedClipAdamW(params[:1], overshoot="align")
    train(opt, range(3))
    opt.add_param_group({"params": params[1:2], "overshoot": None, "grad_clip": 0.1, "lr": 0.5})
    opt.add_param_group({"params": params[2], "reset": fca.OnRollout(moments=True, counters=False)})
    train(opt, range(3, 5))
    assert [float(opt.state[p]["step"]) for p in params] == [5, 2, 2]
    found = [(g.get("overshoot"), g.get("grad_clip"), g.get("reset")) for g in opt.param_groups]
    align = fca.AlignedMomentum()
    assert found == [
        (align, None, None),
        (None, fca.GlobalNorm(0.1), None),
        (align, None, fca.OnRollout(moments=True, counters=False)),
    ]
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        opt.add_param_group({"params": params[0]})
    with pytest.raises(ValueError):
        opt.add_param_group({"params": Parameter(torch.ones(1)), "overshoot": "coast"})
    assert len(opt.param_groups) == 3


def test_a_closure_runs_with_gradients_and_its_loss_returns():
    p = Parameter(torch.ones(3))
    opt = fca.FusedClipAdamW([p])

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(opt.step(closure)) == 3.0
    assert float(opt.state[p]["step"]) == 1


def test_an_old_graph_notices_the_step():
    for cls in CLASSES["AdamW"]:
        p = Parameter(torch.ones(3))
        opt = cls([p])
        loss = p.square().sum()
        loss.backward(retain_graph=True)
        version = p._version
        opt.step()
        assert p._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_gradients_with_a_graph_of_their_own():
    p = Parameter(torch.ones(3))
    p.square().sum().backward(create_graph=True)
    fca.FusedClipAdamW([p]).step()
    assert p.grad.requires_grad and p.is_leaf and not p.isnan().any()


def test_a_module_trains_under_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.Linear(4, 1)
    model, opt = accelerator.prepare(model, fca.FusedClipAdamW(model.parameters(), lr=0.1, grad_clip=1.0))
    losses = []
    for _ in range(5):
        loss = model(torch.ones(2, 4)).square().mean()
        accelerator.backward(loss)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not opt.step_was_skipped


# ---------------------------------------------------------------- torch.distributed.checkpoint


@pytest.mark.parametrize("rule", RULES)
def test_distributed_checkpoint_round_trip(rule):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = torch.nn.Linear(4, 3)
    opt = fca.FusedClipAdamW(model.parameters(), **RULES[rule])
    train(opt, range(3))
    fresh = copy.deepcopy(model)
    other = fca.FusedClipAdamW(fresh.parameters(), **RULES[rule])
    set_optimizer_state_dict(fresh, other, get_optimizer_state_dict(model, opt))
    for o in (opt, other):
        train(o, range(3, 5))
    first = int(not opt.state_dict()["param_groups"][0].get("fused_clip_adam"))
    assert bitwise_equal(everything(opt)[first:], everything(other)[first:])


@pytest.mark.parametrize("rule", RULES)
def test_the_checkpoint_init_trap_moves_nothing(rule):
    # torch.distributed.checkpoint makes states by a step with zero gradients and lr = 0.
    opt = fca.FusedClipAdamW(make_params(), weight_decay=0.1, **RULES[rule])
    params = opt.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    opt.param_groups[0]["lr"] = torch.tensor(0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert bitwise_equal([p.detach() for p in params], before)
    assert float(opt.grad_norm) == 0.0 and int(opt.step_count_skipped) == 0
    for p in params:
        assert not any(v.any() for k, v in opt.state[p].items() if k.startswith(("exp_", "max_")))


# ---------------------------------------------------------------- statistics and resets


def test_micro_batches_add_up():
    opts = [fca.FusedClipAdamW(make_params(), overshoot=fca.MomentumBrake(0.9)) for _ in range(2)]
    for at in range(3):
        opts[0].observe(stats(0.5, 2.0))
        opts[0].observe(stats(0.25, 1.0))
        opts[1].observe(stats(0.5, 2.0) + stats(0.25, 1.0))
        for opt in opts:
            generator = torch.Generator().manual_seed(at)
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
            opt.step()
    assert bitwise_equal(everything(opts[0]), everything(opts[1]))
    with pytest.raises(TypeError, match="ClipStats"):
        opts[0].observe({"suppressed_mass": 1.0})


def test_statistics_are_used_once():
    opt = fca.FusedClipAdamW(make_params(), overshoot=fca.MomentumBrake(0.9))
    plain = fca.FusedClipAdamW(make_params())
    opt.observe(stats(0.5))
    for o in (opt, plain):
        for at in range(2):
            for p in o.param_groups[0]["params"]:
                p.grad = torch.full_like(p, at + 1.0)
            o.step()
    # a = 0.9 (1 - 0.9 * 0.5) at the first step only: m_2 = 0.9 m_1 + 0.1 * 2
    m = float(opt.state[opt.param_groups[0]["params"][2]]["exp_avg"])
    assert m == pytest.approx(0.9 * (1 - 0.9 * 0.55) + 0.2, rel=1e-6)


@pytest.mark.parametrize("moments", (True, False))
@pytest.mark.parametrize("counters", (True, False))
@pytest.mark.parametrize("rule", ("amsgrad", "brake"))
def test_reset_momentum_zeroes_what_it_says(rule, moments, counters):
    opt = fca.FusedClipAdamW(make_params(), **RULES[rule])
    train(opt, range(2))
    if not (moments or counters):
        with pytest.raises(ValueError, match="moments and counters"):
            opt.reset_momentum(moments=False, counters=False)
        return
    opt.reset_momentum(moments=moments, counters=counters)
    for state in opt.state.values():
        for name, value in state.items():
            zeroed = counters if name in ("step", "bias_weights") else moments
            assert bool(value.any()) != zeroed
    if moments and counters:  # as if it were new
        copies = [Parameter(p.detach().clone()) for p in opt.param_groups[0]["params"]]
        fresh = fca.FusedClipAdamW(copies, **RULES[rule])
        for o in (opt, fresh):
            train(o, range(2, 4))
        assert bitwise_equal(everything(opt), everything(fresh))


def test_a_new_rollout_resets_the_groups_that_ask():
    params = make_params()
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "reset": fca.OnRollout()},
        {"params": params[2:], "reset": fca.OnRollout(moments=True, counters=False)},
    ]
    opt = fca.FusedClipAdamW(groups)
    opt.new_rollout()  # before any step: nothing to forget
    train(opt, range(2))
    opt.new_rollout()
    steps, kept = zip(*[(float(opt.state[p]["step"]), bool(opt.state[p]["exp_avg"].any())) for p in params])
    assert steps == (2, 0, 2)
    assert kept == (True, True, False)
    train(opt, range(2, 3))
    assert all(bool(p.isfinite().all()) for p in params)


def test_a_compiled_training_step_breaks_where_torchs_fused_one_does():
    import torch._dynamo as dynamo

    def train(build, compiled: bool):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        opt = build(model.parameters())
        x = torch.randn(4, 8)

        def step():
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()

        dynamo.reset()
        if not compiled:
            breaks = dynamo.explain(step)().graph_break_count
            return breaks, [p.detach().clone() for p in model.parameters()]
        run = torch.compile(step, backend="aot_eager")
        for _ in range(3):
            run()
        return None, [p.detach().clone() for p in model.parameters()]

    ours, theirs = fca.FusedClipAdamW, lambda params: torch.optim.AdamW(params, fused=True)
    assert train(ours, False)[0] <= train(theirs, False)[0]
    for x, y in zip(train(ours, True)[1], train(theirs, True)[1]):
        assert float((x - y).abs().max()) <= 3 * torch.finfo(torch.float32).eps
    dynamo.reset()


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_a_step_does_not_keep_gradients_alive(backend):
    import weakref

    p = Parameter(torch.ones(3))
    opt = fca.FusedClipAdamW([p], backend=backend)
    p.grad = torch.ones(3)
    alive = weakref.ref(p.grad)
    opt.step()
    opt.zero_grad()
    assert alive() is None
