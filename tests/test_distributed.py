"""Tensors that lie over several ranks (gloo, 2 and 4 processes): the step that one process takes on whole tensors."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from no_sync import NoSync
from ranks import worlds
from test_clip_rules import NoHost
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

import fused_clip_adam as fca
from fused_clip_adam import backends

pytestmark = pytest.mark.xdist_group("ranks")

# [5, 8] leaves rank 3 of 4 without a row, [3] too; [12, 1024] keeps whole blocks of 1024 together.
SHAPES = ((12, 1024), (5, 8), (3,), (1,), (6, 4, 3), (4099,))

RULES = {
    "plain": {},
    "clip": dict(grad_clip=0.5),
    "clip lagged": dict(grad_clip=fca.GlobalNorm(0.5, lag=True)),
    "per tensor": dict(grad_clip=fca.PerTensorNorm(0.3)),
    "autoclip": dict(grad_clip=fca.AutoClip(50.0)),
    "zclip": dict(grad_clip=fca.ZClip(warmup=2)),
    "adagc": dict(grad_clip=fca.AdaGC(start=2)),
    "agc": dict(grad_clip=fca.AGC(0.05)),
    "spam": dict(grad_clip=(1.0, fca.SpikeClip(theta=2.0, start=2)), reset=fca.Periodic(every=3, warmup=2)),
    "stable spam": dict(grad_clip=fca.StableSpamClip(total_steps=20)),
    "stable adamw": dict(grad_clip=(1.0, fca.UpdateRMS())),
    "induced metric": dict(grad_clip=fca.InducedMetric()),
    "align": dict(overshoot=fca.AlignedMomentum(block=1)),
    "align element": dict(overshoot="align-element"),
    "align tensor": dict(overshoot="align-tensor", grad_clip=1.0),
    "align tensor lagged": dict(overshoot=fca.AlignedMomentum(block="tensor", lag=True)),
    "cautious": dict(overshoot=fca.Cautious(rescale=True)),
    "brake": dict(overshoot=fca.MomentumBrake(0.7), grad_clip=1.0),
    "median": dict(overshoot=fca.MedianMomentum(0.01)),
    "when clipped": dict(reset=fca.WhenClipped(0.3)),
    "amsgrad, skip": dict(amsgrad=True, skip_nonfinite=True, maximize=True),
    "wide states": dict(state_dtype=torch.float32, grad_clip=1.0),
}
CLASSES = {**{name: fca.FusedClipAdamW for name in RULES}, "fadam": fca.FusedFAdam}
STEPS = 6


def gradients(step: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    scale = 30.0 if step == 4 else 1.0
    out = [(scale * 0.3 * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]
    if step == 3:
        out[1].zero_()
    return out


def parameters(dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def stats_of(rank: int, step: int) -> fca.ClipStats:
    """Of one rank of four; of one of two, that of two of the four; of one process, of all."""
    buffer = torch.zeros(14)
    buffer[4], buffer[5] = 0.1 * rank * (step % 3), 1.0 + 0.5 * rank
    return fca.ClipStats(buffer)


def train(make, backend, name, rank=0, world=1, dtype=torch.float32, groups=1) -> dict:
    """`make`: a tensor -> the parameter or gradient that stands for it. Everything whole again in the end."""
    params = [Parameter(make(i, p)) for i, p in enumerate(parameters(dtype))]
    cut = len(params) // groups
    options = dict(RULES.get(name, {}), lr=1e-2, weight_decay=0.1, backend=backend)
    opt = CLASSES[name]([{"params": params[:cut]}, *([{"params": params[cut:]}] if groups > 1 else [])], **options)
    norms = []
    for step in range(STEPS):
        for i, (p, g) in enumerate(zip(params, gradients(step, dtype))):
            p.grad = make(i, g)
        for each in range(4 // world * rank, 4 // world * (rank + 1)):
            opt.observe(stats_of(each, step))
        opt.step()
        norms.append(opt.grad_norm.item())
    whole = lambda x: x.full_tensor() if isinstance(x, DTensor) else x  # noqa: E731
    out = {f"p{i}": whole(p.detach()) for i, p in enumerate(params)}
    for i, p in enumerate(params):
        out.update({f"{key}{i}": whole(value) for key, value in opt.state[p].items() if key[0].islower()})
    out["norms"] = torch.tensor(norms)
    for group, rules in opt._memory.items():
        for rule, own in rules.items():
            out.update({f"{group} {rule} {key}": value for key, value in own["tensors"].items()})
    return out


LAYOUTS = {
    "rows": lambda i: [Shard(0)],
    "mixed": lambda i: [Replicate()] if i in (1, 2) else [Shard(1)] if i in (0, 4) else [Shard(0)],
    "2d": lambda i: [Replicate(), Shard(0)],
    "rows, columns": lambda i: [Shard(0), Shard(1) if len(SHAPES[i]) > 1 else Replicate()],
    "rows twice": lambda i: [Shard(0), Shard(0)],
}


def on_ranks(layout, backend, name, dtype=torch.float32, groups=1):
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,) if len(LAYOUTS[layout](0)) == 1 else (2, world // 2))
    make = lambda i, x: distribute_tensor(x, mesh, LAYOUTS[layout](i))  # noqa: E731
    return train(make, backend, name, dist.get_rank(), world, dtype, groups)


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        # Sums of float64 in another order move a scalar of a step by some 1e-16, which rounds a float32 element
        # differently once in a while: an ulp of a parameter below 4 (2^-21) a step, and its moments' likewise.
        rtol, atol = {
            torch.float32: (1e-6, STEPS * 2.0**-21),
            torch.float64: (1e-12, 1e-12),
            torch.bfloat16: (STEPS * 2.0**-8, 0.0),  # one rounding of bfloat16 a step
        }.get(value.dtype, (0.0, 0.0))
        torch.testing.assert_close(
            got[key], value, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


@functools.cache
def on_one(backend, name, dtype=torch.float32, groups=1) -> dict:
    return train(lambda i, x: x.clone(), backend, name, dtype=dtype, groups=groups)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(  # a mesh of 2 x 1 cuts as one of 2 does
    "size, layout", [(2, "rows"), (2, "mixed"), (4, "rows"), (4, "2d"), (4, "rows, columns"), (4, "rows twice")]
)
def test_a_sharded_step_is_the_step_of_one_process(size, layout, name):
    expected = on_one("cpu", name)
    for got in worlds(size).run(on_ranks, layout, "cpu", name):
        assert_same(got, expected)


@pytest.mark.parametrize("backend", ["reference", "cuda", "triton"])
@pytest.mark.parametrize("name", ["clip lagged", "agc", "stable spam", "align tensor lagged", "brake", "fadam"])
def test_every_backend_takes_shards(name, backend):
    expected = on_one(backend, name)
    for got in worlds(2).run(on_ranks, "mixed", backend, name):
        assert_same(got, expected)


@pytest.mark.parametrize("name", ["clip", "adagc", "agc", "align tensor", "induced metric"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_two_groups(dtype, name):
    expected = on_one("cpu", name, dtype, groups=2)
    for got in worlds(2).run(on_ranks, "mixed", "cpu", name, dtype, groups=2):
        assert_same(got, expected)


def step_without_reading(layout, name) -> None:
    """Every torch operation of a step, with kernels that give numbers and read nothing."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [Parameter(distribute_tensor(p, mesh, LAYOUTS[layout](i))) for i, p in enumerate(parameters())]
    opt = CLASSES[name](params, lr=1e-2, **RULES.get(name, {}))
    opt.grad_scale, opt.found_inf = torch.full((), 4.0), torch.zeros(())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "choose_step", lambda *_: NoHost("no_host"))
        for step in range(2):
            for i, (p, g) in enumerate(zip(params, gradients(step))):
                p.grad = None if i == 2 else distribute_tensor(g, mesh, LAYOUTS[layout](i))
            opt.observe(stats_of(dist.get_rank(), step))
            with NoSync():
                opt.step()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("layout", ["rows", "mixed"])
def test_no_step_over_ranks_reads_the_device(layout, name):
    worlds(2).run(step_without_reading, layout, name)
