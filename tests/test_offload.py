"""offload="cpu" with a second CPU memory in the place of a device's (second_memory.py): the CPU's step, bit for bit.

Every expectation is the same optimizer without `offload`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
import pickle
import types

import pytest
import torch
import torch.distributed as dist
from cases import EPS, RULES, bitwise_equal, make_grads, make_params, make_stats, results
from ranks import worlds
from second_memory import MODES, SecondMemory
from test_hostile import PARAMETERS, STATES, give_grad, ones, raw, snapshot
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

import fused_clip_adam as fca
from fused_clip_adam import distributed, offload
from fused_clip_adam.backends import native

BUCKET = 3000  # bytes: the small tensors share buckets, the larger ones have one each
STEPS = 4


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(offload, "BUCKET_BYTES", BUCKET)
    torch.set_num_threads(1)


def take_step(opt, memory: SecondMemory | None) -> None:
    if memory is None:
        opt.step()
    else:
        memory.step(opt)


def build(memory: SecondMemory | None, params, cls=fca.FusedClipAdamW, **options):
    own = [p.clone().requires_grad_() for p in params]
    how = {"lr": 0.01, "weight_decay": 0.1, "offload": None if memory is None else "cpu"}
    return cls(own, **{**how, **options}), own


def train(opt, params, grads, memory: SecondMemory | None, begin: int = 0) -> list[torch.Tensor]:
    """Steps with statistics; everything that they write."""
    for step, now in enumerate(grads[begin:], begin):
        for p, g in zip(params, now):
            p.grad = g.clone()
        opt.observe(make_stats(step))
        take_step(opt, memory)
    opt.state_dict()  # brings what rules remember of parameters into their states
    kept = [own["tensors"] for group in opt._memory.values() for _, own in sorted(group.items())]
    remembered = [own[key] for own in kept for key in sorted(own)]
    return [*results(opt, params), opt.grad_norm, opt.step_count_skipped, *remembered]


def both(params, grads, mode: str, cls=fca.FusedClipAdamW, **options) -> tuple[list, list, SecondMemory]:
    """(with offload, without, the memory)"""
    with SecondMemory(mode) as memory:
        opt, own = build(memory, params, cls, **options)
        away = train(opt, own, grads, memory)
        assert memory.copied["up"] > 0
    return away, train(*build(None, params, cls, **options), grads, None), memory


# ---------------------------------------------------------------- the same step


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_dtype(rule, dtype):
    params = make_params(dtype)
    mode = MODES[(list(RULES).index(rule) + list(EPS).index(dtype)) % len(MODES)]
    away, here, _ = both(params, make_grads(params, STEPS), mode, **RULES[rule])
    assert bitwise_equal(away, here)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", ("adamw", "clip", "agc", "spike", "stable spam", "align tensor", "amsgrad reset"))
def test_every_order_of_copies(rule, mode):
    params = make_params(torch.float32)
    for cls in (fca.FusedClipAdamW, fca.FusedClipAdam):  # the L2 term of which reads parameters in its sums
        away, here, _ = both(params, make_grads(params, STEPS), mode, cls, **RULES[rule])
        assert bitwise_equal(away, here)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fadam(dtype, mode):
    params = make_params(dtype)
    away, here, _ = both(params, make_grads(params, STEPS), mode, fca.FusedFAdam, grad_clip=0.7)
    assert bitwise_equal(away, here)


@pytest.mark.parametrize("rule", ("adamw", "agc", "align tensor lagged", "three rules"))
def test_reference_backend(rule):
    params = make_params(torch.float32)
    away, here, _ = both(params, make_grads(params, STEPS), "late", backend="reference", **RULES[rule])
    assert bitwise_equal(away, here)


@pytest.mark.parametrize("size", (1, 700, 2**30))
@pytest.mark.parametrize("rule", ("clip lagged", "update rms", "cautious rescaled"))
def test_any_cut_into_buckets(monkeypatch, rule, size):
    monkeypatch.setattr(offload, "BUCKET_BYTES", size)
    params = make_params(torch.float32)
    away, here, memory = both(params, make_grads(params, STEPS), "down early, up late", **RULES[rule])
    assert bitwise_equal(away, here)
    ups = sum(entry[0] == "up" for entry in memory.log)
    filled = sum(p.numel() > 0 for p in params)
    assert ups == STEPS * {1: filled, 2**30: 1}.get(size, ups / STEPS) and ups % STEPS == 0


def test_wide_states_and_gradients():
    """bfloat16 parameters with float32 gradients and moments."""
    params = make_params(torch.bfloat16)
    grads = [[g.float() for g in now] for now in make_grads(params, STEPS)]
    for p in params:
        p.grad_dtype = None

    def of(memory):
        own = [p.clone().requires_grad_() for p in params]
        for p in own:
            p.grad_dtype = None
        how = {"offload": None if memory is None else "cpu", "state_dtype": torch.float32, "overshoot": "align"}
        return train(fca.FusedClipAdamW(own, **how), own, grads, memory)

    with SecondMemory("threads") as memory:
        away = of(memory)
    assert bitwise_equal(away, of(None)) and memory.copied["down"] == 3 * memory.copied["up"]


def test_several_groups_dtypes_and_missing_gradients():
    params = [*make_params(torch.float32), *make_params(torch.float64, seed=3)]
    cut = len(params) // 3

    def of(memory):
        own = [p.clone().requires_grad_() for p in params]
        groups = [
            {"params": own[:cut], "lr": 0.1, "overshoot": "align"},
            {"params": own[cut : 2 * cut], "grad_clip": fca.AGC(0.05), "amsgrad": True},
            {"params": own[2 * cut :], "maximize": True, "lr": torch.tensor(0.02)},
        ]
        opt = fca.FusedClipAdamW(groups, grad_clip=0.5, offload=None if memory is None else "cpu")
        for step, now in enumerate(make_grads(params, 6)):
            for i, (p, g) in enumerate(zip(own, now)):
                p.grad = None if (i + step) % 4 == 0 else g.clone()
            take_step(opt, memory)
        return [*results(opt, own), opt.grad_norm]

    for mode in MODES:
        with SecondMemory(mode) as memory:
            assert bitwise_equal(of(memory), of(None))


def columns_apart(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, 2 * columns)[:, ::2]


LAYOUTS = {  # parameter, its gradient
    "transposed": lambda: (torch.randn(6, 5).t(), torch.randn(6, 5).t()),
    "transposed, its gradient not": lambda: (torch.randn(6, 5).t(), torch.randn(5, 6)),
    "gradient transposed": lambda: (torch.randn(6, 5), torch.randn(5, 6).t()),
    "channels last": lambda: [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(2)],
    "holes": lambda: (columns_apart(6, 5), torch.randn(6, 5)),
    "holes, transposed": lambda: (columns_apart(6, 5).t(), columns_apart(6, 5).t()),
    "holes in the gradient": lambda: (torch.randn(6, 5), columns_apart(6, 5)),
    "holes, an end": lambda: (torch.randn(9)[2:8:3], torch.randn(2)),
    "expanded gradient": lambda: (torch.randn(6, 5), torch.randn(()).expand(6, 5)),
    "gradient of expanded rows": lambda: (torch.randn(6, 5).t(), torch.randn(6).expand(5, 6)),
    "0-d": lambda: (torch.randn(()), torch.randn(())),
    "empty": lambda: (torch.randn(3, 0, 2), torch.randn(3, 0, 2)),
    "a length of one": lambda: (torch.randn(4, 1, 5).transpose(0, 1), torch.randn(1, 4, 5)),
}
ODD_RULES = {
    "plain": {},
    "blocks": dict(overshoot=fca.AlignedMomentum(block=7), grad_clip=0.5),
    "rows": dict(grad_clip=fca.AGC(0.05), overshoot="align-tensor", weight_decay=0.3),
    "spikes": dict(grad_clip=fca.SpikeClip(1.5, start=0), amsgrad=True),
}


@pytest.mark.parametrize("rule", ODD_RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, rule):
    def of(mode):
        torch.manual_seed(1)
        first, (odd, grad), last = torch.randn(5), LAYOUTS[layout](), torch.randn(7)
        params, grads = [first, odd, last], [torch.randn(5), grad, torch.randn(7)]
        around = raw(odd)
        with contextlib.nullcontext() if mode is None else SecondMemory(mode) as memory:
            own = [p.requires_grad_() for p in params]
            opt = fca.FusedClipAdamW(own, lr=0.1, offload=None if mode is None else "cpu", **ODD_RULES[rule])
            for _ in range(3):
                for p, g in zip(own, grads):
                    p.grad = g
                take_step(opt, memory)
                for g in grads:
                    g.copy_(g.roll(1, 0)) if g.dim() and g.is_contiguous() else None
        assert odd.numel() == 0 or raw(odd) != around
        strides = [own[name].stride() for own in map(opt.state.get, own) for name in ("exp_avg", "exp_avg_sq")]
        return results(opt, own), raw(odd), strides

    here = of(None)
    for mode in ("late", "early"):
        away = of(mode)
        assert bitwise_equal(away[0], here[0]) and away[1:] == here[1:]  # nothing in the holes has changed


def test_dense_tensors_are_staged_in_their_own_order_so_that_bytes_are_copied():
    dense = [torch.randn(6, 5).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(())]
    apart = [columns_apart(6, 5), torch.randn(1).expand(7), columns_apart(6, 5).t()]
    pairs = offload._staged([*dense, *apart], torch.empty(4000, dtype=torch.uint8))
    assert [staged.stride() for _, staged in pairs[:3]] == [tensor.stride() for tensor in dense]
    assert all(staged.is_contiguous() and staged.shape == tensor.shape for tensor, staged in pairs[3:])
    spans = [(s.data_ptr(), s.data_ptr() + s.numel() * 4) for _, s in pairs]
    assert all(end <= begin and begin % 4 == 0 for (_, end), (begin, _) in itertools.pairwise(spans))


def test_a_gradient_that_is_its_own_parameter_and_parameters_of_one_storage():
    def of(memory):
        base = torch.arange(1.0, 13.0)
        own = [base[:5].requires_grad_(), base[5:].detach().requires_grad_()]
        opt = fca.FusedClipAdamW(own, lr=0.1, grad_clip=3.0, offload=None if memory is None else "cpu")
        own[0].grad, own[1].grad = own[0].detach(), torch.ones(7)
        take_step(opt, memory)
        return [base, *results(opt, own)]

    for mode in MODES:
        with SecondMemory(mode) as memory:
            assert bitwise_equal(of(memory), of(None))


def test_parameters_are_copied_down_in_every_step():
    """Trainers write them, `.data` included, between steps."""

    def of(memory):
        opt, own = build(memory, make_params(torch.float32))
        for step, now in enumerate(make_grads(own, 3)):
            for p, g in zip(own, now):
                p.grad = g
                p.data = p.data * 0.5 if step == 1 else p.data
            take_step(opt, memory)
        return results(opt, own)

    with SecondMemory("late") as memory:
        assert bitwise_equal(of(memory), of(None))


@pytest.mark.parametrize("clip", (None, 1.0))
@pytest.mark.parametrize("guard", (True, False))
def test_scaled_gradients_and_skipped_steps(guard, clip):
    params = make_params(torch.float32)

    def of(memory):
        opt, own = build(memory, params, grad_clip=clip, skip_nonfinite=guard, overshoot="align")
        out = []
        for step, now in enumerate(make_grads(params, 5)):
            for p, g in zip(own, now):
                p.grad = 8.0 * g
            if step == 3 and guard:
                own[-1].grad[17] = math.inf
            opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(float(step == 1))
            take_step(opt, memory)
            out += [opt.grad_norm, opt.step_count_skipped.clone(), *results(opt, own)]
        assert int(opt.step_count_skipped) == 1 + guard
        return out

    for mode in ("late", "threads"):
        with SecondMemory(mode) as memory:
            assert bitwise_equal(of(memory), of(None))


def test_reset_and_new_rollout():
    params = make_params(torch.float32)

    def of(memory):
        opt, own = build(memory, params, reset=fca.OnRollout(), overshoot="brake")
        grads = make_grads(params, 6)
        train(opt, own, grads[:2], memory)
        opt.reset_momentum()
        train(opt, own, grads[:4], memory, begin=2)
        opt.new_rollout()
        return train(opt, own, grads, memory, begin=4)

    with SecondMemory("threads") as memory:
        assert bitwise_equal(of(memory), of(None))


def test_what_a_step_has_written_belongs_to_the_graph():
    with SecondMemory("early") as memory:
        p = ones(3)
        loss = (p * p).sum()
        p.grad = torch.ones(3)
        memory.step(fca.FusedClipAdamW([p], offload="cpu"))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_step_in_backward():
    def of(offloaded: bool):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
        options = dict(lr=0.01, grad_clip=fca.PerTensorNorm(0.1), offload="cpu" if offloaded else None)
        opt = fca.FusedClipAdamW(model.parameters(), **options)
        x = torch.randn(8, 16)
        with fca.step_in_backward(model, opt, bucket_bytes=500):
            for _ in range(4):
                model(x).square().mean().backward()
                opt.step()
        return [*results(opt, list(model.parameters())), opt.grad_norm]

    with SecondMemory("early") as memory:
        away = of(True)
    assert bitwise_equal(away, of(False)) and memory.copied["up"] > 0


def test_monitor():
    def rows(offloaded: bool):
        torch.manual_seed(0)
        p = torch.randn(40, 30).requires_grad_()
        opt = fca.FusedClipAdamW([p], lr=0.1, amsgrad=True, offload="cpu" if offloaded else None)
        monitor = fca.OvershootMonitor(opt)
        for step in range(4):
            p.grad = torch.randn(40, 30) * float(step < 2)
            opt.step()
        return monitor.rows()

    with SecondMemory("early"):
        away = rows(True)
    assert repr(away) == repr(rows(False))


# ---------------------------------------------------------------- where things are, and when


def test_states_are_the_hosts_and_nothing_is_copied_for_parameters_there():
    params = make_params(torch.float32)
    opt, own = build(None, params, offload="cpu", grad_clip=1.0)
    away = train(opt, own, make_grads(params, STEPS), None)
    here, hers = build(None, params, grad_clip=1.0)
    assert bitwise_equal(away, train(here, hers, make_grads(params, STEPS), None))
    assert opt._offloaded.staging_bytes == 0 and not opt._offloaded._links


def test_a_batch_of_the_hosts_beside_one_of_the_device(monkeypatch):
    """A device of each kind there is none here: the first batch of a step is taken for the host's own."""
    link_to = offload.Offloaded._link_to
    monkeypatch.setattr(
        offload.Offloaded, "_link_to", lambda self, device: None if self.first else link_to(self, device)
    )
    cut = offload.Offloaded._cut

    def cut_first(self, lists, group):
        self.first = group == 0
        return cut(self, lists, group)

    monkeypatch.setattr(offload.Offloaded, "_cut", cut_first)
    params = make_params(torch.float32)

    def of(memory):
        own = [p.clone().requires_grad_() for p in params]
        groups = [{"params": own[:4]}, {"params": own[4:]}]
        opt = fca.FusedClipAdamW(groups, lr=0.1, grad_clip=0.5, offload=None if memory is None else "cpu")
        for now in make_grads(params, 3):
            for p, g in zip(own, now):
                p.grad = g.clone()
            if memory is None:
                opt.step()
                continue
            with memory.closed(*own[4:], *[p.grad for p in own[4:]]):
                opt.step()
        return [*results(opt, own), opt.grad_norm]

    with SecondMemory("late") as memory:
        assert bitwise_equal(of(memory), of(None))
    assert memory.copied["up"] == 3 * bytes_of(params[4:])


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


CROSSINGS = {  # copies of the gradient down, of the parameter down, of the parameter up
    "plain": ({}, fca.FusedClipAdamW, (1, 1, 1)),
    "clip": (dict(grad_clip=1.0), fca.FusedClipAdamW, (1, 1, 1)),
    "sums over moments": (dict(overshoot="align-tensor", grad_clip=fca.UpdateRMS()), fca.FusedClipAdamW, (1, 1, 1)),
    "largest gradient": (fca.presets.stable_spam(), fca.FusedClipAdamW, (1, 1, 1)),
    "sums over parameters": (dict(grad_clip=fca.AGC()), fca.FusedClipAdamW, (1, 2, 1)),
    "L2 in a sum": (dict(overshoot="align-tensor"), fca.FusedClipAdam, (1, 2, 1)),
    "fadam": ({}, fca.FusedFAdam, (1, 2, 1)),
}


@pytest.mark.parametrize("case", CROSSINGS)
def test_bytes_over_the_link(case):
    options, cls, (grads_down, params_down, up) = CROSSINGS[case]
    params = [torch.randn(n, 7, dtype=torch.bfloat16) for n in (20, 31, 40, 50, 60, 70, 80, 90)]
    with SecondMemory("late") as memory:
        own = [p.clone().requires_grad_() for p in params]
        opt = cls(own, weight_decay=0.1, offload="cpu", **options)
        for p in own:
            p.grad_dtype = None
            p.grad = torch.randn(p.shape)  # float32: 4 bytes, a parameter's 2
        memory.step(opt)
    size = bytes_of(params)
    assert memory.copied == {"down": grads_down * 2 * size + params_down * size, "up": up * size}


@pytest.mark.parametrize("clip, down", ((None, 0), (1.0, 1)))
def test_a_skipped_step_copies_no_parameter(clip, down):
    with SecondMemory("late") as memory:
        opt, own = build(memory, make_params(torch.float32), grad_clip=clip)
        for p in own:
            p.grad = torch.ones_like(p)
        opt.found_inf = torch.ones(())
        memory.step(opt)
        assert memory.copied == {"down": down * bytes_of(own), "up": 0}


@pytest.mark.parametrize("clip", (None, 1.0))
def test_kernels_run_while_the_next_bucket_comes_down_and_the_last_goes_up(monkeypatch, clip):
    with SecondMemory("late") as memory:
        opt, own = build(memory, [torch.randn(400) for _ in range(5)], grad_clip=clip)
        for p in own:
            p.grad = torch.ones_like(p)
        update = native.update_
        monkeypatch.setattr(native, "update_", lambda *args: (memory.log.append(("update",)), update(*args))[1])
        memory.step(opt)
    told = " ".join(entry[0] for entry in memory.log)
    if clip is None:  # gradient and parameter
        first, other, last = "down down down down update up", "down down update up", "update up"
        assert told == " ".join(["start", first, other, other, other, last])
    else:
        first, other, last = "down down down update up", "down update up", "update up"
        assert told == " ".join(["start", "down " * 4 + "down", first, other, other, last, last])


def test_at_most_two_buckets_are_staged():
    params = [torch.randn(n) for n in (300, 10, 200, 340, 5, 350, 1000, 250)]  # 8 n bytes, of which a bucket has 3000
    with SecondMemory("threads") as memory:
        opt, own = build(memory, params)
        train(opt, own, make_grads(params, 5), memory)
        assert len(memory.allocated) == 4, "staging memory is made once"
        staged = opt._offloaded.staging_bytes
        assert sum(memory.allocated) == staged
        assert 8 * 1000 < staged <= BUCKET + 8 * 1000 + 128  # the largest tensor's is one of the two
        targets = {address for what, *rest in memory.log if what == "down" for address in rest[0]}
        spans = [(b.data_ptr(), b.data_ptr() + b.numel()) for b in opt._offloaded._buffers.values()]
        assert all(any(begin <= address < end for begin, end in spans) for address in targets)


def test_with_a_norm_all_gradients_are_staged_and_the_parameters_of_three_buckets():
    params = [torch.randn(n) for n in (300, 10, 200, 340, 5, 350, 1000, 250)]
    with SecondMemory("threads") as memory:
        opt, own = build(memory, params, grad_clip=1.0)
        train(opt, own, make_grads(params, 5), memory)
        padding = 64 * len(params)
        staged = opt._offloaded.staging_bytes
        assert sum(memory.allocated) == staged
        of_gradients, of_parameters = bytes_of(params) + padding, 4 * 1000 + 64 + 2 * BUCKET / 2
        assert bytes_of(params) <= staged <= of_gradients + of_parameters
        opt.param_groups[0]["grad_clip"] = None  # and no longer than that
        train(opt, own, make_grads(params, 1), memory)
        assert opt._offloaded.staging_bytes <= BUCKET + 8 * 1000 + 128


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "options, match",
    (
        (dict(offload="gpu"), 'offload must be None or "cpu"'),
        (dict(offload=True), 'offload must be None or "cpu"'),
        (dict(offload="cpu", backend="triton"), "does not go with offload"),
        (dict(offload="cpu", capturable=True), "capturable"),
        (dict(offload="cpu", differentiable=True), "differentiable"),
    ),
)
@pytest.mark.parametrize("cls", (fca.FusedClipAdamW, fca.FusedClipAdam))
def test_constructor_refuses(monkeypatch, cls, options, match):
    monkeypatch.setattr("fused_clip_adam.backends.check_name", lambda name: name)  # Triton may not be here
    with pytest.raises(ValueError, match=match):
        cls([ones(3)], **options)


def test_a_device_without_a_link_is_refused():
    offload.check_reach("p", torch.device("cuda", 1))
    offload.check_reach("p", torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r'p is on xpu:0; accepted with offload="cpu": cpu, cuda'):
        offload.check_reach("p", torch.device("xpu", 0))


@pytest.mark.parametrize("options", ({}, dict(grad_clip=1.0, overshoot="brake", amsgrad=True)), ids=("plain", "extras"))
@pytest.mark.parametrize("case", PARAMETERS)
def test_a_refused_parameter_is_not_copied_and_nothing_has_changed(case, options):
    def refuse(offloaded: bool) -> str:
        good, late = give_grad(ones(5), torch.ones(5)), ones(2)
        opt = fca.FusedClipAdamW([good], offload="cpu" if offloaded else None, **options)
        opt.step()
        opt.add_param_group({"params": PARAMETERS[case]()})
        opt.add_param_group({"params": [give_grad(late, torch.ones(2))]})
        before, log = snapshot(opt), list(memory.log)
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            opt.step()
        assert snapshot(opt) == before and memory.log == log
        return str(caught.value).splitlines()[0]

    with SecondMemory("early") as memory:
        assert refuse(True) == refuse(False)


@pytest.mark.parametrize("case", STATES)
def test_a_refused_state_is_not_copied_and_nothing_has_changed(case):
    with SecondMemory("early") as memory:
        params = [ones(3), ones(3)]
        opt = fca.FusedClipAdamW([{"params": [p]} for p in params], offload="cpu")
        for p in params:
            p.grad = torch.ones(3)
        opt.step()
        name, value = STATES[case]
        opt.state[params[1]][name] = value
        opt.param_groups[0]["amsgrad"] = True  # would add a state to the first parameter
        before, log = snapshot(opt), list(memory.log)
        with pytest.raises(RuntimeError, match=r"\[0\]"):
            opt.step()
        assert snapshot(opt) == before and memory.log == log


def test_a_state_that_something_else_has_moved_is_refused():
    with SecondMemory("early"):
        p = ones(3)
        p.grad = torch.ones(3)
        opt = fca.FusedClipAdamW([p], offload="cpu")
        opt.step()
        opt.state[p]["exp_avg_sq"] = opt.state[p]["exp_avg_sq"].to("meta")
        with pytest.raises(RuntimeError, match=r"exp_avg_sq is on meta.*offloading"):
            opt.step()


def test_settings_that_a_group_or_a_state_dict_brings_are_refused():
    with SecondMemory("early") as memory:
        p = ones(3)
        p.grad = torch.ones(3)
        opt = fca.FusedClipAdamW([p], offload="cpu")
        opt.param_groups[0]["capturable"] = True
        before = snapshot(opt)
        with pytest.raises(ValueError, match='"capturable"'):
            opt.step()
        assert snapshot(opt) == before and not memory.log


def test_capture_is_refused(monkeypatch):
    with SecondMemory("early") as memory:
        p = ones(3)
        p.grad = torch.ones(3)
        opt = fca.FusedClipAdamW([p], offload="cpu")
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"captured.*offload"):
            opt.step()
        assert not memory.log and p not in opt.state


def test_samples_are_refused():
    with SecondMemory("early"):
        p = ones(3)
        opt = fca.FusedClipAdamW([p], offload="cpu")
        with pytest.raises(TypeError, match="offload"):
            opt.step_from_gradients([torch.ones(2, 3)])
        with pytest.raises(TypeError, match="offload"):
            opt.step_from_scores([torch.ones(2, 3)], torch.zeros(2), torch.zeros(2), torch.ones(2))
    opt.step_from_gradients([torch.ones(2, 3)])  # on the host itself there is nothing to copy
    assert not torch.equal(p, torch.ones(3))


@pytest.mark.parametrize("mode", MODES)
def test_a_failure_leaves_no_copy_under_way_and_the_next_step_is_sound(monkeypatch, mode):
    params = [torch.randn(400) for _ in range(6)]
    update = native.update_
    with SecondMemory(mode) as memory:
        opt, own = build(memory, params)
        calls = []

        def fail(*args):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return update(*args)

        for p in own:
            p.grad = torch.ones_like(p)
        monkeypatch.setattr(native, "update_", fail)
        with pytest.raises(KeyboardInterrupt):
            memory.step(opt)  # which looks for copies
        monkeypatch.setattr(native, "update_", update)
        expected, theirs = build(None, params)
        for p, q in zip(own, theirs):  # the first two buckets have taken a step
            q.data.copy_(p)
            expected.state[q] = copy.deepcopy(opt.state[p])
            q.grad = p.grad.clone()
        memory.step(opt)
        expected.step()
        assert bitwise_equal(results(opt, own), results(expected, theirs))


# ---------------------------------------------------------------- checkpoints


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture
def no_state_to_the_device(monkeypatch):
    """torch's own move of a loaded state, which would take it through the device's memory."""

    def refuse(*args, **kwargs):
        raise AssertionError("a state went to the parameter's device")

    monkeypatch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy", staticmethod(refuse))


RESUMED = {
    "zclip": dict(grad_clip=fca.ZClip(warmup=1), overshoot="brake"),
    "adagc, wide": dict(grad_clip=fca.AdaGC(start=1), state_dtype=torch.float32, amsgrad=True),
    "fused": dict(fused=True, skip_nonfinite=True),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_to_the_bit(no_state_to_the_device, name, dtype):
    options = RESUMED[name]
    params = make_params(dtype)
    grads = make_grads(params, 6)
    with SecondMemory("threads") as memory:
        opt, own = build(memory, params, **options)
        uninterrupted = train(opt, own, grads, memory)
        opt, own = build(memory, params, **options)
        train(opt, own, grads[:3], memory)
        state = saved_and_loaded(opt.state_dict())
        after, hers = build(memory, [p.detach() for p in own], **options)
        after.load_state_dict(state)
        for p, q in zip(own, hers):
            assert list(after.state[q]) == list(opt.state[p]) and bitwise_equal(
                list(after.state[q].values()), list(opt.state[p].values())
            )
            for value in after.state[q].values():
                assert value.device == torch.device("cpu")
        assert bitwise_equal(train(after, hers, grads, memory, begin=3), uninterrupted)
        for own_state in state["state"].values():
            assert all(value.isfinite().all() for name, value in own_state.items() if name == "exp_avg")
        first = next(iter(after.state.values()))["exp_avg"]
        assert all(first.data_ptr() != s["exp_avg"].data_ptr() for s in state["state"].values())


@pytest.mark.parametrize("theirs", (torch.optim.AdamW, fca.FusedClipAdamW))
def test_checkpoints_go_in_from_and_out_to_optimizers_without_offload(theirs):
    params = make_params(torch.float32)
    grads = make_grads(params, 6)

    def plain(values):
        own = [p.detach().clone().requires_grad_() for p in values]
        return theirs(own, lr=0.01, weight_decay=0.1), own

    def steps(opt, own, now):
        for gradients in now:
            for p, g in zip(own, gradients):
                p.grad = g.clone()
            opt.step()

    opt, own = plain(params)
    steps(opt, own, grads[:2])
    with SecondMemory("late") as memory:
        away, hers = build(memory, [p.detach() for p in own])
        away.load_state_dict(opt.state_dict())
        here, his = build(None, [p.detach() for p in own])
        here.load_state_dict(opt.state_dict())
        assert bitwise_equal(train(away, hers, grads[:4], memory, begin=2), train(here, his, grads[:4], None, begin=2))
        out = saved_and_loaded(away.state_dict())
    back, last = plain(hers)
    back.load_state_dict(out)
    steps(back, last, grads[4:])
    assert all(int(own["step"]) == 6 for own in back.state.values())
    if theirs is fca.FusedClipAdamW:
        assert bitwise_equal(results(back, last), train(here, his, grads, None, begin=4)[: 4 * len(params)])


def test_a_state_dict_with_a_number_of_steps_and_one_that_does_not_fit():
    p, q = ones(3), ones(2)
    with SecondMemory("late"):
        opt = fca.FusedClipAdamW([p, q], offload="cpu")
        old = {"step": 5, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}  # of torch before 1.12
        opt.load_state_dict({"state": {0: old}, "param_groups": [{"params": [0, 1], **group_of(opt)}]})
        assert float(opt.state[p]["step"]) == 5 and opt.state[p]["exp_avg"].tolist() == [1.0] * 3 and q not in opt.state
        before = snapshot(opt)
        with pytest.raises(ValueError):
            opt.load_state_dict({"state": {}, "param_groups": [{"params": [0], **group_of(opt)}]})
        assert snapshot(opt) == before


@pytest.mark.parametrize("name", RESUMED)
def test_distributed_checkpoint_round_trip(no_state_to_the_device, name):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def steps(model, opt, generator):
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            opt.step()

    with SecondMemory("early"):
        model = torch.nn.Linear(40, 30)
        opt = fca.FusedClipAdamW(model.parameters(), offload="cpu", **RESUMED[name])
        steps(model, opt, torch.Generator().manual_seed(0))
        fresh = copy.deepcopy(model)
        other = fca.FusedClipAdamW(fresh.parameters(), offload="cpu", **RESUMED[name])
        set_optimizer_state_dict(fresh, other, get_optimizer_state_dict(model, opt))
        for m, o in ((model, opt), (fresh, other)):
            steps(m, o, torch.Generator().manual_seed(1))
            o.state_dict()
        assert bitwise_equal(results(opt, list(model.parameters())), results(other, list(fresh.parameters())))


def group_of(opt) -> dict:
    return {key: value for key, value in opt.param_groups[0].items() if key != "params"}


def test_copies_and_pickles():
    params = make_params(torch.float32)
    grads = make_grads(params, 4)
    with SecondMemory("threads") as memory:
        opt, own = build(memory, params, grad_clip=1.0)
        train(opt, own, grads[:2], memory)
        for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            hers = twin.param_groups[0]["params"]
            assert twin.offload == "cpu" and twin._offloaded.staging_bytes == 0
            train(twin, hers, grads, memory, begin=2)
        expected, theirs = build(None, params, grad_clip=1.0)
        train(expected, theirs, grads, None)
        assert bitwise_equal(results(twin, hers), results(expected, theirs))


# ---------------------------------------------------------------- DTensors

SHARDED = {
    "plain": {},
    "lagged": dict(grad_clip=fca.GlobalNorm(0.5, lag=True), skip_nonfinite=False),
    "zclip": dict(grad_clip=fca.ZClip(warmup=1), overshoot="brake"),
    "agc": dict(grad_clip=fca.AGC(0.05), overshoot="align-tensor"),
}
SHAPES = ((12, 64), (5, 8), (3,), (1,), (6, 4, 3), (409,))


def on_ranks(name: str, mode: str) -> bool:
    offload.BUCKET_BYTES = BUCKET
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    grads = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(4)]

    def place(i, x):
        return distribute_tensor(x, mesh, [Replicate() if i == 1 else Shard(0)])

    def of(memory):
        own = [Parameter(place(i, x.clone())) for i, x in enumerate(values)]
        opt = fca.FusedClipAdamW(own, lr=0.1, offload=None if memory is None else "cpu", **SHARDED[name])
        for step, now in enumerate(grads):
            for i, (p, g) in enumerate(zip(own, now)):
                p.grad = place(i, g)
            opt.observe(make_stats(step + rank))
            take_step(opt, memory)
        assert all(isinstance(opt.state[p]["exp_avg"], DTensor) for p in own)
        flat = [distributed.local(x) for x in results(opt, own)]
        return [x.detach() for x in flat] + [opt.grad_norm]

    with SecondMemory(mode) as memory:
        away = of(memory)
        assert memory.copied["up"] > 0
    return bitwise_equal(away, of(None))


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("mode", ("late", "threads"))
@pytest.mark.parametrize("name", SHARDED)
def test_shards(name, mode):
    assert worlds(2).run(on_ranks, name, mode) == [True, True]


def test_a_group_that_has_no_backend_of_the_host_is_refused():
    group = types.SimpleNamespace(_device_types=[torch.device("cuda")])
    with pytest.raises(RuntimeError, match=r"sums are on cpu, .* for \['cuda'\] only; .*cpu:gloo"):
        distributed.Ranks._check_backend(group, {"cpu"}, 'with offload="cpu" sums are')


# ---------------------------------------------------------------- CUDA's link, by its calls


class FakeCuda:
    """torch.cuda as CudaLink uses it: what was called, in order."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.names = iter(("down", "up"))
        self.active: list[str] = []

    def Stream(self, device):
        return self._stream(next(self.names))

    def current_stream(self, device):
        return self._stream("current")

    def _stream(self, name):
        return types.SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.log.append((name, "waits for", other.name)),
            wait_event=lambda event: self.log.append((name, "waits for", event.name)),
            record_event=lambda: types.SimpleNamespace(
                name=f"end of {name}", synchronize=lambda: self.log.append(("host", "waits for", f"end of {name}"))
            ),
            synchronize=lambda: self.log.append(("host", "waits for", name)),
        )

    @contextlib.contextmanager
    def stream(self, own):
        self.active.append(own.name)
        yield
        self.active.pop()


class FakeTensor:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def copy_(self, source, non_blocking: bool) -> None:
        assert non_blocking
        self.cuda.log.append((self.cuda.active[-1], "copies", f"{source.name} to {self.name}"))


def test_cuda_link_orders_its_copies(monkeypatch):
    cuda = FakeCuda()
    for name in ("Stream", "current_stream", "stream"):
        assert callable(getattr(torch.cuda, name))
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    link = offload.CudaLink(torch.device("cuda", 0))
    device, staged = FakeTensor(cuda, "device"), FakeTensor(cuda, "staged")
    monkeypatch.setattr(
        torch.cuda, "device", lambda own: contextlib.nullcontext(cuda.log.append(("device", own.index)))
    )
    monkeypatch.setattr(torch, "empty", lambda *size, **how: how)
    assert link.allocate(64) == {"dtype": torch.uint8, "device": "cpu", "pin_memory": True}
    assert cuda.log.pop() == ("device", 0)
    link.start()
    sent = link.up([(staged, device)])
    link.wait(link.down([(device, staged), (device, staged)], after=sent))
    link.join(sent)
    link.settle()
    assert cuda.log == [
        ("down", "waits for", "current"),
        ("up", "waits for", "current"),
        ("up", "copies", "staged to device"),
        ("down", "waits for", "end of up"),
        ("down", "copies", "device to staged"),
        ("down", "copies", "device to staged"),
        ("host", "waits for", "end of down"),
        ("current", "waits for", "end of up"),
        ("host", "waits for", "down"),
        ("host", "waits for", "up"),
    ]


def test_cuda_link_asks_torch_for_what_torch_has():
    assert all(
        hasattr(torch.cuda.Stream, name) for name in ("wait_stream", "wait_event", "record_event", "synchronize")
    )
    assert hasattr(torch.cuda.Event, "synchronize") and offload.LINKS["cuda"] is offload.CudaLink
