"""torch's own OptimizerInfo machinery pointed at FusedClipAdamW and FusedClipAdam, extras off.

The inputs, error inputs and schedulers are torch's; every expectation is torch's class on the same numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal import common_optimizers as machinery
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_utils import TestCase

import fused_clip_adam as fca

TORCH = {fca.FusedClipAdamW: torch.optim.AdamW, fca.FusedClipAdam: torch.optim.Adam}
SCHEDULERS = next(info for info in machinery.optim_db if info.optim_cls is torch.optim.Adam).scheduler_inputs


def make_info(cls, inputs, errors) -> machinery.OptimizerInfo:
    return machinery.OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach", "differentiable", "fused"),
        supports_fused_on=("cpu",),
        has_capturable_arg=True,
        supports_complex=False,
    )


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


INFOS = [
    make_info(fca.FusedClipAdamW, machinery.optim_inputs_func_adamw, machinery.optim_error_inputs_func_adamw),
    make_info(fca.FusedClipAdam, machinery.optim_inputs_func_adam, machinery.optim_error_inputs_func_adam),
]

# torch lists tensor learning rates and betas for CUDA only; both classes take them on a CPU as well.
# Tensors in float64: torch forms 1 - beta^step in the tensors' own dtype, we always in float64.
CPU_INPUTS = [
    dict(lr=double(0.01)),
    dict(lr=double(0.01), betas=(double(0.9), double(0.99)), weight_decay=0.1),
    dict(weight_decay=0.1, amsgrad=True, maximize=True, eps=1e-3),
    dict(betas=(0.0, 0.0)),
]


@dataclasses.dataclass
class Bound:
    """Largest |ours - torch| over the largest magnitude of the tensor."""

    dtype: torch.dtype
    rtol: float


STEPS = 6
BOUNDS = [
    # At most 10 operations a step in another order, 2.2e-16 each, for 6 steps, amplified by m / sqrt(v) < 5.
    Bound(torch.float64, 1e-13),
    Bound(torch.float32, 1e-5),  # the same count at 6e-8
    # torch rounds every intermediate to 8 bits, 7 operations of 2^-9 a step, we only the result.
    Bound(torch.bfloat16, 3e-2),
]
DTYPES = [bound.dtype for bound in BOUNDS]
RTOL = {bound.dtype: bound.rtol for bound in BOUNDS}


def make_params(dtype: torch.dtype, contiguous: bool = True, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(10, 5), (10,), (), (0, 3), (3, 1, 2)]
    if contiguous:
        return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return [Parameter(torch.randn((*shape, 2), generator=generator).to(dtype)[..., 0]) for shape in shapes]


def set_grads(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(opt, params, steps=STEPS) -> None:
    for step in range(steps):
        set_grads(params, step)
        opt.step()


def all_kwargs(info) -> list[dict]:
    return [x.kwargs for x in info.optim_inputs_func(device="cpu")] + copy.deepcopy(CPU_INPUTS)


def advance(scheduler, loss: float) -> None:
    scheduler.step(*((loss,) if isinstance(scheduler, ReduceLROnPlateau) else ()))


def quadratic(params, x):
    return (params[0].mv(x) + params[1]).square().sum()


class TestOptimRenewed(TestCase):
    def assert_close(self, ours, theirs, rtol: float) -> None:
        self.assertEqual(ours.shape, theirs.shape)
        if ours.numel():
            scale = float(theirs.detach().double().abs().max())
            error = float((ours.detach().double() - theirs.detach().double()).abs().max())
            self.assertLessEqual(error, rtol * max(scale, 1e-6))

    def assert_same_training(self, opts, lists, rtol: float) -> None:
        for ours, theirs in zip(*lists):
            self.assert_close(ours, theirs, rtol)
            mine, state = opts[0].state[ours], opts[1].state[theirs]
            self.assertEqual(list(mine), list(state))
            for name in state:
                self.assertEqual(mine[name].dtype, state[name].dtype)
                self.assert_close(mine[name], state[name], rtol)

    @machinery.optims(INFOS)
    def test_error_inputs(self, device, dtype, optim_info):
        errors = optim_info.optim_error_inputs_func(device=device, dtype=dtype)
        self.assertTrue(errors)
        for error in errors:
            given = error.optimizer_error_input
            expected = self.assertWarnsRegex if issubclass(error.error_type, Warning) else self.assertRaisesRegex
            if error.error_on == machinery.OptimizerErrorEnum.CONSTRUCTION_ERROR:
                with expected(error.error_type, error.error_regex):
                    optim_info.optim_cls(given.params, **given.kwargs)
            else:
                opt = optim_info.optim_cls(given.params, **given.kwargs)
                with expected(error.error_type, error.error_regex):
                    opt.step()

    @machinery.optims(INFOS, dtypes=DTYPES)
    def test_every_input_matches_torch(self, device, dtype, optim_info):
        for kwargs in all_kwargs(optim_info):
            for contiguous in (True, False):
                lists = [make_params(dtype, contiguous) for _ in range(2)]
                classes = (optim_info.optim_cls, TORCH[optim_info.optim_cls])
                opts = [cls(params, **copy.deepcopy(kwargs)) for cls, params in zip(classes, lists)]
                for opt, params in zip(opts, lists):
                    train(opt, params)
                self.assert_same_training(opts, lists, RTOL[dtype])

    @machinery.optims(INFOS)
    def test_every_flag_changes_nothing_but_the_home_of_step(self, device, dtype, optim_info):
        flags = ({}, {"foreach": True}, {"fused": True}, {"capturable": True}, {"differentiable": True})
        for kwargs in ({"weight_decay": 0.1, "amsgrad": True}, {"lr": 0.1, "maximize": True}):
            results = []
            for flag in flags:
                params = make_params(dtype)
                if "differentiable" in flag:  # torch's differentiable update writes in place: no leaf can be given
                    params = [p.clone() for p in params]
                opt = optim_info.optim_cls(params, **kwargs, **flag)
                for step in range(STEPS):
                    with torch.no_grad():
                        params_now = opt.param_groups[0]["params"]
                        for p in params_now:
                            p.grad = None
                        set_grads(params_now, step)
                    opt.step()
                results.append(opt.param_groups[0]["params"])
            for flag, other in zip(flags[1:], results[1:]):
                for p, q in zip(results[0], other):
                    if flag == {"differentiable": True}:  # torch's own arithmetic
                        self.assert_close(q, p, RTOL[dtype])
                    else:
                        self.assertTrue(torch.equal(p, q), flag)

    @machinery.optims(INFOS)
    def test_goes_the_right_direction_with_every_scheduler(self, device, dtype, optim_info):
        for contiguous in (True, False):
            for makers in (*optim_info.scheduler_inputs, []):
                for kwargs in all_kwargs(optim_info):
                    params = make_params(dtype, contiguous)[:2]
                    x = torch.randn(5)
                    opt = optim_info.optim_cls(params, **kwargs)
                    schedulers = [make(opt) for make in makers]
                    first = quadratic(params, x).item()
                    for _ in range(20):
                        opt.zero_grad()
                        loss = quadratic(params, x)
                        loss.backward()
                        opt.step()
                        for scheduler in schedulers:
                            advance(scheduler, loss.item())
                    last = quadratic(params, x).item()
                    self.assertTrue(last > first if kwargs.get("maximize") else last < first, (kwargs, first, last))

    @machinery.optims(INFOS)
    def test_schedulers_give_torchs_learning_rates(self, device, dtype, optim_info):
        for makers in optim_info.scheduler_inputs:
            rates = []
            for cls in (optim_info.optim_cls, TORCH[optim_info.optim_cls]):
                params = make_params(dtype)
                opt = cls([{"params": params[:1]}, {"params": params[1:], "lr": 0.01}])
                schedulers = [make(opt) for make in makers]
                rates.append([])
                for step in range(STEPS):
                    set_grads(params, step)
                    opt.step()
                    for scheduler in schedulers:
                        advance(scheduler, 1.0)
                    rates[-1].append([group["lr"] for group in opt.param_groups])
            self.assertEqual(rates[0], rates[1])

    @machinery.optims(INFOS, dtypes=DTYPES)
    def test_state_dict_is_deterministic_and_resumes_bit_for_bit(self, device, dtype, optim_info):
        for kwargs in all_kwargs(optim_info):
            params = make_params(dtype)
            opt = optim_info.optim_cls(params, **kwargs)
            train(opt, params, 3)
            copies = [Parameter(p.detach().clone()) for p in params]
            other = optim_info.optim_cls(copies, **copy.deepcopy(kwargs))
            saved = copy.deepcopy(opt.state_dict())
            other.load_state_dict(saved)
            for ps, o in ((params, opt), (copies, other)):
                for step in range(3, 6):
                    set_grads(ps, step)
                    o.step()
            for p, q in zip(params, copies):
                self.assertTrue(torch.equal(p, q))
            self.assertEqual(opt.state_dict(), other.state_dict(), rtol=0, atol=0)
            self.assertNotEqual(float(saved["state"][0]["step"]), float(opt.state[params[0]]["step"]))

    @machinery.optims(INFOS)
    def test_older_state_dicts_load(self, device, dtype, optim_info):
        for missing in ("maximize", "foreach", "fused", "capturable", "differentiable", "amsgrad"):
            params = make_params(dtype)
            opt = optim_info.optim_cls(params)
            train(opt, params, 2)
            old = copy.deepcopy(opt.state_dict())
            for group in old["param_groups"]:
                del group[missing]
            for state in old["state"].values():
                state["step"] = float(state["step"])  # before torch 1.12 it was a number
            opt.load_state_dict(old)
            set_grads(params, 2)
            opt.step()
            self.assertEqual(opt.state[params[0]]["step"], torch.tensor(3.0))

    @machinery.optims(INFOS)
    def test_param_groups_are_separate_optimizers(self, device, dtype, optim_info):
        cls = optim_info.optim_cls
        settings = [{"lr": 0.1}, {"lr": 0.01, "weight_decay": 0.3}, {"betas": (0.5, 0.6), "amsgrad": True}]
        params, copies = make_params(dtype)[:3], make_params(dtype)[:3]
        opt = cls([{"params": [params[0]], **settings[0]}])
        for p, own in zip(params[1:], settings[1:]):
            opt.add_param_group({"params": p, **own})
        apart = [cls([p], **own) for p, own in zip(copies, settings)]
        for step in range(STEPS):
            set_grads(params, step)
            set_grads(copies, step)
            opt.step()
            for single in apart:
                single.step()
        for p, q in zip(params, copies):
            self.assertTrue(torch.equal(p, q))

    @machinery.optims(INFOS)
    def test_no_gradient_is_no_step(self, device, dtype, optim_info):
        for kwargs in all_kwargs(optim_info):
            params = make_params(dtype)
            before = [p.detach().clone() for p in params]
            opt = optim_info.optim_cls(params, **kwargs)
            opt.step()
            self.assertEqual(dict(opt.state), {})
            params[1].grad = torch.ones_like(params[1])  # the others stay as they are
            opt.step()
            self.assertEqual(list(opt.state), [params[1]])
            for i in (0, 2, 3, 4):
                self.assertTrue(torch.equal(params[i], before[i]))

    @machinery.optims(INFOS)
    def test_zero_gradients_move_nothing_but_decay(self, device, dtype, optim_info):
        for decay in (0.0, 0.5):
            params = make_params(dtype)
            theirs = [Parameter(p.detach().clone()) for p in params]
            opts = [
                cls(ps, lr=0.1, weight_decay=decay)
                for cls, ps in ((optim_info.optim_cls, params), (TORCH[optim_info.optim_cls], theirs))
            ]
            for ps, opt in zip((params, theirs), opts):
                for p in ps:
                    p.grad = torch.zeros_like(p)
                before = [p.detach().clone() for p in ps]
                opt.step()
                if decay == 0.0:
                    for p, old in zip(ps, before):
                        self.assertTrue(torch.equal(p, old))
            self.assert_same_training(opts, (params, theirs), RTOL[dtype])

    @machinery.optims(INFOS)
    def test_empty_parameters_get_a_state_and_hurt_nothing(self, device, dtype, optim_info):
        params = [Parameter(torch.empty(0)), Parameter(torch.ones(3)), Parameter(torch.empty(3, 0, 2))]
        opt = optim_info.optim_cls(params, grad_clip=1.0, overshoot="align")
        train(opt, params, 2)
        self.assertEqual(opt.state[params[0]]["step"], torch.tensor(2.0))
        self.assertTrue(bool((params[1] != 1).all()))

    @machinery.optims(INFOS)
    def test_hooks_fire_in_order(self, device, dtype, optim_info):
        seen: list[str] = []
        params = make_params(dtype)
        opt = optim_info.optim_cls(params)
        opt.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre"))
        opt.register_step_post_hook(lambda o, args, kwargs: seen.append("post"))
        opt.register_state_dict_pre_hook(lambda o: seen.append("save pre"))
        opt.register_state_dict_post_hook(lambda o, state: seen.append("save post"))
        opt.register_load_state_dict_pre_hook(lambda o, state: seen.append("load pre"))
        opt.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
        handles = [
            register_optimizer_step_pre_hook(lambda o, a, k: seen.append("global pre")),
            register_optimizer_step_post_hook(lambda o, a, k: seen.append("global post")),
        ]
        try:
            set_grads(params, 0)
            opt.step()
        finally:
            for handle in handles:
                handle.remove()
        opt.load_state_dict(opt.state_dict())
        steps = ["global pre", "pre", "post", "global post"]
        self.assertEqual(seen, [*steps, "save pre", "save post", "load pre", "load post"])

    @machinery.optims(INFOS)
    def test_a_load_pre_hook_may_replace_the_state_dict(self, device, dtype, optim_info):
        params = make_params(dtype)
        opt = optim_info.optim_cls(params, lr=0.5)
        train(opt, params, 2)
        good = copy.deepcopy(opt.state_dict())
        opt.register_load_state_dict_pre_hook(lambda o, state: good)
        opt.load_state_dict({"wrong": 1})
        self.assertEqual(opt.state_dict(), good, rtol=0, atol=0)

    @machinery.optims(INFOS)
    def test_deepcopy_and_pickle_continue_bit_for_bit(self, device, dtype, optim_info):
        for kwargs in all_kwargs(optim_info):
            params = make_params(dtype)
            opt = optim_info.optim_cls(params, **kwargs)
            train(opt, params, 2)
            public = {name for name in vars(opt) if not name.startswith("_")}
            copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
            set_grads(params, 7)
            opt.step()
            for other in copies:
                self.assertLessEqual(public, set(vars(other)))
                own = other.param_groups[0]["params"]
                set_grads(own, 7)
                other.step()
                for p, q in zip(params, own):
                    self.assertTrue(torch.equal(p, q))

    @machinery.optims(INFOS)
    def test_default_dtype_decides_the_dtype_of_step_as_in_torch(self, device, dtype, optim_info):
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        for default in (torch.float64, torch.float32, torch.bfloat16):
            torch.set_default_dtype(default)
            for fused in (None, True):
                lists = [make_params(dtype) for _ in range(2)]
                classes = (optim_info.optim_cls, TORCH[optim_info.optim_cls])
                opts = [cls(params, fused=fused) for cls, params in zip(classes, lists)]
                for opt, params in zip(opts, lists):
                    train(opt, params, 2)
                self.assert_same_training(opts, lists, RTOL[dtype])

    @machinery.optims(INFOS)
    def test_a_tensor_learning_rate_is_read_at_every_step(self, device, dtype, optim_info):
        params, theirs = make_params(dtype), make_params(dtype)
        opt = optim_info.optim_cls(params, lr=torch.tensor(0.1))
        other = TORCH[optim_info.optim_cls](theirs, lr=torch.tensor(0.1))
        for step in range(STEPS):
            for o, ps in ((opt, params), (other, theirs)):
                o.param_groups[0]["lr"].mul_(0.5)  # in place, as CUDA graphs need it
                set_grads(ps, step)
                o.step()
        self.assert_same_training((opt, other), (params, theirs), RTOL[dtype])

    @machinery.optims(INFOS)
    def test_defaults_and_param_groups_are_torchs(self, device, dtype, optim_info):
        params = make_params(dtype)
        opt, other = optim_info.optim_cls(params), TORCH[optim_info.optim_cls](params)
        self.assertEqual(opt.defaults, other.defaults)
        self.assertEqual(opt.param_groups, other.param_groups)
        self.assertEqual(list(opt.param_groups[0]), list(other.param_groups[0]))


instantiate_device_type_tests(TestOptimRenewed, globals(), only_for="cpu")

if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
