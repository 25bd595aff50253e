"""Trainings over several processes (gloo, 2 and 4): DDP, FSDP2, tensor parallelism, ZeRO; each against one process.

Models are float64 unless a test says otherwise. A sum over ranks then rounds in another order by some 1e-16 of a
gradient, and Adam, which divides by sqrt(v) + eps, makes at most lr 1e-16 / eps = 1e-10 a step of it. Six steps, and
what the next gradients make of the difference, stay below CLOSE; a wrong norm, gate or factor is off by 1e-4 and more.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from ranks import worlds
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fused_clip_adam as fca

pytestmark = pytest.mark.xdist_group("ranks")

CLOSE = 1e-8
STEPS, TOKENS, WORDS, WIDTH, HIDDEN = 6, 8, 9, 7, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.gain = nn.Parameter(torch.full((1,), 1.5))  # fewer elements than ranks

    def forward(self, x):
        return x + self.gain * self.down(torch.tanh(self.up(self.norm(x))))


class Policy(nn.Module):
    """Rows of 7 and 9 are cut unevenly; `extra` has a gradient in every second step only."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.extra = nn.Linear(WIDTH, 3)  # three rows for four ranks
        self.head = nn.Linear(WIDTH, WORDS)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, states, with_extra):
        x = self.embed(states)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return logits + self.extra(x).sum(-1, keepdim=True).tanh() * x[..., :1] if with_extra else logits


def policy(tie: bool = False, dtype=torch.float64) -> Policy:
    torch.manual_seed(1)
    return Policy(tie).to(dtype)


def rollout(step: int, rank: int = 0, world: int = 1) -> tuple[torch.Tensor, ...]:
    """states, actions, old log-probabilities, advantages: a rank's share of a step's tokens."""
    generator = torch.Generator().manual_seed(100 + step)
    states, actions = torch.randint(WORDS, (2, TOKENS), generator=generator)
    old_logp = -2.2 + 0.7 * torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    advantages = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    own = slice(TOKENS // world * rank, TOKENS // world * (rank + 1))
    return states[own], actions[own], old_logp[own], advantages[own]


def loss_of(model, step: int, rank: int = 0, world: int = 1):
    states, actions, old_logp, advantages = rollout(step, rank, world)
    logits = model(states, step % 2 == 0)
    logp = logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
    # PPO's loss times 3: norms on both sides of the clips below.
    loss, stats = fca.policy_loss(logp, old_logp.to(logp), advantages.to(logp))
    return 3.0 * loss, stats


OPTIONS = {
    "plain": {},
    "norm": dict(grad_clip=4.0, skip_nonfinite=True),
    "tensors": dict(grad_clip=(fca.AdaGC(start=2), fca.UpdateRMS()), overshoot="align-tensor"),
    "rows": dict(grad_clip=fca.AGC(0.02), overshoot=fca.Cautious(rescale=True)),
    "observed": dict(
        grad_clip=fca.ZClip(warmup=2), overshoot=fca.MomentumBrake(0.7), reset=fca.WhenClipped(0.3, counters=False)
    ),
}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def outcome(model, opt, norms) -> dict:
    """Everything a training leaves, whole, by name."""
    out = {"norms": torch.stack(norms)}
    for name, p in model.named_parameters():
        out[f"p {name}"] = whole(p.detach()).clone()
        out.update({f"{key} {name}": whole(value).clone() for key, value in opt.state.get(p, {}).items()})
    for group, rules in opt._memory.items():
        for rule, own in rules.items():
            out.update({f"{group} {rule} {key}": value.clone() for key, value in own["tensors"].items()})
    return out


def train(model, opt, rank=0, world=1, inner=None, micro=1, steps=range(STEPS)) -> dict:
    """`micro`: backward passes a step, of which FSDP2 reduces only the last."""
    norms = []
    for step in steps:
        for part in range(micro):
            if micro > 1:
                model.set_requires_gradient_sync(part == micro - 1)
            loss, stats = loss_of(model, step, rank * micro + part, world * micro)
            (loss / micro).backward()
            opt.observe(stats)
        opt.step()
        opt.zero_grad()
        norms.append(opt.grad_norm)
    return outcome(inner or model, opt, norms)


def assert_close(got: dict, expected: dict, close: float = CLOSE) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        # The norm is given as float32.
        atol = 1e-6 if key == "norms" else close
        torch.testing.assert_close(
            got[key], value, rtol=0, atol=atol, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


def assert_all_equal(results: list[dict]) -> None:
    for rank, result in enumerate(results):
        assert result.keys() == results[0].keys()
        for key, value in result.items():
            assert torch.equal(value.nan_to_num(7.0), results[0][key].nan_to_num(7.0)), (rank, key)


def optimizer_of(model, name: str, **more):
    return fca.FusedClipAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **OPTIONS[name], **more)


@functools.cache
def on_one(name: str, tie: bool = False, frozen: bool = False) -> dict:
    model = policy(tie)
    model.embed.requires_grad_(not frozen)
    return train(model, optimizer_of(model, name))


def test_the_reference_learns_and_every_option_changes_it():
    """Otherwise nothing here would tell one from another."""
    plain = on_one("plain")
    for name in OPTIONS:
        own = on_one(name)
        moved = (own["p head.weight"] - policy().head.weight.detach()).abs().max()
        assert moved > 1e-2
        assert name == "plain" or (own["p head.weight"] - plain["p head.weight"]).abs().max() > 1e-4
    assert plain["norms"].max() > 4.0 > plain["norms"].min()


# ---------------------------------------------------------------- one training, many ways to lay it out


def layout(recipe: str):
    """(model, the plain module in it, rank of the data, ranks of the data, micro-batches)"""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = inner = policy(tie=recipe == "tied")
    micro = 1
    if recipe == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=world == 2)
    elif recipe in ("root", "tied"):
        fully_shard(model)
    elif recipe in ("nested", "frozen", "offload", "accumulation"):
        model.embed.requires_grad_(recipe != "frozen")
        options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if recipe == "offload" else {}
        for module in (*model.blocks, model.extra, model):
            fully_shard(module, **options)
        micro = 2 if recipe == "accumulation" else 1
    elif recipe == "meta":
        with torch.device("meta"):
            model = inner = Policy().to(torch.float64)
        for module in (*model.blocks, model):
            fully_shard(module)
        model.to_empty(device="cpu")
        for p, full in zip(model.parameters(), policy().parameters()):
            p.data.copy_(distribute_tensor(full.detach(), p.device_mesh, p.placements))
    elif recipe == "columns":
        for block in model.blocks:
            fully_shard(block, shard_placement_fn=lambda p: Shard(1) if p.shape == (WIDTH, HIDDEN) else None)
        fully_shard(model)
    elif recipe == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
    elif recipe == "two meshes":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicas", "shards"))
        fully_shard(model.blocks[1], mesh=mesh)
        fully_shard(model)
    elif recipe in ("tensor parallel", "tensor parallel, fsdp", "tensor parallel block, fsdp"):
        fsdp = recipe != "tensor parallel"
        mesh = init_device_mesh("cpu", (world // 2, 2) if fsdp else (1, world), mesh_dim_names=("data", "tensor"))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in model.blocks[1:] if "block" in recipe else model.blocks:
            parallelize_module(block, mesh["tensor"], plan)
        if fsdp:
            for module in (*model.blocks, model):
                fully_shard(module, mesh=mesh["data"])
        rank, world = mesh["data"].get_local_rank(), mesh["data"].size()
    else:
        raise AssertionError(recipe)
    return model, inner, rank, world, micro


def laid_out(recipe: str) -> dict[str, dict]:
    out = {}
    for name in OPTIONS:
        model, inner, rank, world, micro = layout(recipe)
        more = {"data_group": dist.group.WORLD} if recipe == "ddp" else {}
        out[name] = train(model, optimizer_of(inner, name, **more), rank, world, inner, micro)
    return out


# Two processes where the way is what is tested, four where the geometry is.
RECIPES = [(2, recipe) for recipe in ("ddp", "frozen", "tied", "offload", "accumulation", "meta", "hsdp")]
RECIPES += [(4, recipe) for recipe in ("ddp", "root", "nested", "columns", "hsdp", "two meshes")]
RECIPES += [(4, "tensor parallel"), (4, "tensor parallel, fsdp"), (4, "tensor parallel block, fsdp")]


@pytest.mark.parametrize("size, recipe", RECIPES)
def test_training_is_that_of_one_process(size, recipe):
    results = worlds(size).run(laid_out, recipe)
    for name in OPTIONS:
        own = [result[name] for result in results]
        assert_all_equal(own)  # bit for bit, norms and memories included: replicas must not drift apart
        # ClipStats are float32: what is made of them moves beta1 by some 1e-7, and a parameter by lr times that.
        close = 1e-6 if name == "observed" else CLOSE
        assert_close(own[0], on_one(name, tie=recipe == "tied", frozen=recipe == "frozen"), close)


# ---------------------------------------------------------------- bfloat16 compute


def mixed() -> dict:
    world, rank = dist.get_world_size(), dist.get_rank()
    model = policy(dtype=torch.float32)
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.blocks, model):
        fully_shard(module, mp_policy=precision)
    opt = fca.FusedClipAdamW(model.parameters(), lr=1e-2, eps=1.0, grad_clip=4.0)
    gradients, norms = [], []
    for step in range(STEPS):
        loss, _ = loss_of(model, step, rank, world)
        loss.backward()
        gradients.append([None if p.grad is None else p.grad.full_tensor() for p in model.parameters()])
        opt.step()
        opt.zero_grad()
        norms.append(opt.grad_norm)
    return {"gradients": gradients, **outcome(model, opt, norms)}


def test_bfloat16_compute_and_float32_reduction():
    results = worlds(4).run(mixed)
    gradients = [result.pop("gradients") for result in results].pop()
    assert_all_equal(results)

    # The same gradients on one process: float64 sums in another order, so an ulp of a value below 4 a step.
    model = policy(dtype=torch.float32)
    opt = fca.FusedClipAdamW(model.parameters(), lr=1e-2, eps=1.0, grad_clip=4.0)
    norms = []
    for own in gradients:
        for p, grad in zip(model.parameters(), own):
            p.grad = grad
        opt.step()
        norms.append(opt.grad_norm)
    assert_close(results[0], outcome(model, opt, norms), STEPS * 4 * torch.finfo(torch.float32).eps)

    # The same training on one process. A tensor's gradient that is rounded to bfloat16 on four ranks instead of once is
    # off by some 2^-8 of its largest element, and with eps = 1 an update by at most lr times that.
    model = policy(dtype=torch.float32)
    opt = fca.FusedClipAdamW(model.parameters(), lr=1e-2, eps=1.0, grad_clip=4.0)
    largest = {}
    for step in range(STEPS):
        rounded = policy().to(torch.bfloat16)
        rounded.load_state_dict(model.state_dict())
        loss, _ = loss_of(rounded, step)
        loss.backward()
        for p, q in zip(model.parameters(), rounded.parameters()):
            p.grad = None if q.grad is None else q.grad.float()
            largest[p] = max(largest.get(p, 0.0), 0.0 if q.grad is None else q.grad.abs().max().item())
        opt.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            results[0][f"p {name}"], p.detach(), rtol=0, atol=STEPS * 1e-2 * 2.0**-8 * largest[p]
        )
    moved = (model.head.weight - policy(dtype=torch.float32).head.weight).abs().max()
    assert moved > 10 * STEPS * 1e-2 * 2.0**-8 * largest[model.head.weight]


# ---------------------------------------------------------------- beside torch


def beside_torch(options: dict) -> float:
    """The same gradients for torch's AdamW and ours: the largest difference, states included."""
    world, rank = dist.get_world_size(), dist.get_rank()
    models = [policy(dtype=torch.float32) for _ in range(2)]
    for model in models:
        for module in (*model.blocks, model):
            fully_shard(module)
    theirs = torch.optim.AdamW(models[0].parameters(), lr=1e-2, weight_decay=0.1, **options)
    ours = fca.FusedClipAdamW(models[1].parameters(), lr=1e-2, weight_decay=0.1, **options)
    most = 0.0
    for step in range(STEPS):
        loss, _ = loss_of(models[0], step, rank, world)
        loss.backward()
        for p, q in zip(models[0].parameters(), models[1].parameters()):
            q.grad = None if p.grad is None else p.grad.clone()
        theirs.step()
        ours.step()
        for p, q in zip(models[0].parameters(), models[1].parameters()):
            a, b = theirs.state.get(p, {}), ours.state.get(q, {})
            assert a.keys() == b.keys() and q.placements == p.placements
            for key, own in {**a, "p": p.detach()}.items():
                other = b.get(key, q.detach())
                assert type(own) is type(other) and own.dtype == other.dtype and own.device == other.device
                if isinstance(own, DTensor):
                    assert own.placements == other.placements
                difference = (whole(own) - whole(other)).abs()
                most = max(most, difference.max().item())
        theirs.zero_grad()
        ours.zero_grad()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return most


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"foreach": False, "amsgrad": True, "maximize": True}, {"fused": True}], ids=str
)
def test_extras_off_is_torchs_adamw(options):
    # Ours and torch's order the same operations differently: an ulp of a value below 4 a step.
    assert max(worlds(2).run(beside_torch, options)) <= STEPS * 4 * torch.finfo(torch.float32).eps


def clipped(by_torch: bool, recipe: str) -> dict:
    model, inner, rank, world, _ = layout(recipe)
    opt = optimizer_of(inner, "plain") if by_torch else optimizer_of(inner, "plain", grad_clip=1.0)
    norms = []
    for step in range(STEPS):
        loss, _ = loss_of(model, step, rank, world)
        loss.backward()
        if by_torch:
            norms.append(whole(nn.utils.clip_grad_norm_(inner.parameters(), 1.0)).float())
        opt.step()
        opt.zero_grad()
        if not by_torch:
            norms.append(opt.grad_norm)
    return outcome(inner, opt, norms)


@pytest.mark.parametrize("recipe", ["nested", "hsdp", "tensor parallel, fsdp"])
def test_grad_clip_is_clip_grad_norm(recipe):
    """And `grad_norm` what it returns."""
    if recipe == "tensor parallel, fsdp":  # torch's norm refuses parameters on two meshes
        expected = worlds(4).run(clipped, True, "nested")
    else:
        expected = worlds(4).run(clipped, True, recipe)
    for got in worlds(4).run(clipped, False, recipe):
        assert_close(got, expected[0])


# ---------------------------------------------------------------- what the ranks have observed


def observing(with_group: bool) -> dict:
    world, rank = dist.get_world_size(), dist.get_rank()
    inner = policy()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    group = dist.group.WORLD if with_group else None
    return train(model, optimizer_of(inner, "observed", data_group=group), rank, world, inner)


def test_ranks_that_brake_by_their_own_statistics_drift_apart():
    """What data_group is for: with it, see "ddp" above, they are one process bit for bit."""
    apart = worlds(2).run(observing, False)
    assert (apart[0]["p head.weight"] - apart[1]["p head.weight"]).abs().max() > 1e-3
    together = worlds(2).run(observing, True)
    assert_all_equal(together)


# ---------------------------------------------------------------- ZeroRedundancyOptimizer


def zero_of(params, **options) -> ZeroRedundancyOptimizer:
    groups = {"shard_group": dist.group.WORLD, "data_group": dist.group.WORLD}
    # Keyword arguments of its own it keeps in its param groups, where a process group cannot be saved.
    own = functools.partial(fca.FusedClipAdamW, **groups)
    return ZeroRedundancyOptimizer(params, optimizer_class=own, lr=1e-2, weight_decay=0.1, **options)


ZERO = {**OPTIONS, "autoclip": dict(grad_clip=fca.AutoClip(60.0))}


def zero_training(name: str) -> dict:
    world, rank = dist.get_world_size(), dist.get_rank()
    inner = policy()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    opt = zero_of(inner.parameters(), parameters_as_bucket_view=name in ("plain", "rows"), **ZERO[name])
    norms = []
    for step in range(STEPS):
        loss, stats = loss_of(model, step, rank, world)
        loss.backward()
        opt.optim.observe(stats)
        opt.step()
        opt.zero_grad()
        norms.append(opt.optim.grad_norm)
    return outcome(inner, opt.optim, norms)


@pytest.mark.parametrize("name", ZERO)
def test_zero_is_one_process(name):
    model = policy()
    opt = fca.FusedClipAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **ZERO[name])
    expected = train(model, opt)
    close = 1e-6 if name == "observed" else CLOSE
    states = {}
    for got in worlds(4).run(zero_training, name):
        of_all = {key for key in got if key.startswith("p ") or key == "norms" or " ZClip " in key or "AutoClip" in key}
        assert_close({key: got[key] for key in of_all}, {key: expected[key] for key in of_all}, close)
        own = {key: value for key, value in got.items() if key not in of_all and "AdaGC " not in key}
        assert not states.keys() & own.keys()  # every parameter has one owner
        states.update(own)
    assert len(states) == sum(len(own) for own in opt.state.values())
    assert_close(states, {key: expected[key] for key in states}, close)


class Small(nn.Module):
    """Two parameters for four ranks: two own nothing, and in every second step the bias's owner has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(2, dtype=torch.float64))

    def forward(self, x, with_bias):
        return x @ self.weight.T + (self.bias if with_bias else 0.0)


SMALL = {
    "zclip": dict(grad_clip=fca.ZClip(warmup=2)),
    "autoclip": dict(grad_clip=fca.AutoClip(60.0)),
    "adagc": dict(grad_clip=fca.AdaGC(start=2)),
    "lag": dict(grad_clip=fca.GlobalNorm(2.0, lag=True)),
    "metric": dict(grad_clip=(1.0, fca.InducedMetric())),
    "spam": fca.presets.spam(),
    "skip": dict(skip_nonfinite=True, overshoot="align-tensor"),
}


def small_training(name: str, rank: int = 0, world: int = 1, zero: bool = False) -> dict:
    inner = Small()
    model = DistributedDataParallel(inner, find_unused_parameters=True) if zero else inner
    if zero:
        opt = zero_of(inner.parameters(), **SMALL[name])
        local_opt = opt.optim
    else:
        opt = local_opt = fca.FusedClipAdamW(inner.parameters(), lr=1e-2, weight_decay=0.1, **SMALL[name])
    norms, skipped = [], []
    for step in range(8):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        x = x[8 // world * rank : 8 // world * (rank + 1)]
        (model(x, step % 2 == 0) - 1.0).square().mean().backward()
        if step == 5 and name == "skip":  # of a parameter of rank 0, which alone steps with it
            inner.weight.grad[0, 0] = float("nan")
        opt.step()
        opt.zero_grad()
        norms.append(local_opt.grad_norm.clone())
        skipped.append(local_opt.step_count_skipped.clone())
    if zero:
        local_opt.load_state_dict(local_opt.state_dict())  # also of nothing
    return {
        "norms": torch.stack(norms),
        "skipped": torch.stack(skipped),
        "weight": inner.weight.detach(),
        "bias": inner.bias.detach(),
    }


def small_zero(name: str) -> tuple[dict, int]:
    out = small_training(name, dist.get_rank(), dist.get_world_size(), zero=True)
    owned = zero_of(Small().parameters()).optim.param_groups[0]["params"]
    return out, len(owned)


@pytest.mark.parametrize("name", SMALL)
def test_zero_with_ranks_that_own_nothing_or_have_no_gradient(name):
    results = worlds(4).run(small_zero, name)
    assert [owned for _, owned in results] == [1, 1, 0, 0]
    expected = small_training(name)
    for got, _ in results:
        assert_close(got, expected)
    assert expected["skipped"].tolist() == [0] * 5 + [int(name == "skip")] * 3


def zero_checkpoint(by_rank: bool) -> tuple[dict, dict]:
    """(uninterrupted, saved and loaded after three steps)"""
    options = dict(grad_clip=fca.AdaGC(start=2)) if by_rank else OPTIONS["rows"]
    inner = policy()
    opt = zero_of(inner.parameters(), **options)

    def steps(model, opt, these):
        norms = []
        for step in these:
            loss_of(model, step)[0].backward()
            opt.step()
            opt.zero_grad()
            norms.append(opt.optim.grad_norm)
        return outcome(model, opt.optim, norms)

    steps(inner, opt, range(3))
    other = policy()
    other.load_state_dict(inner.state_dict())
    fresh = zero_of(other.parameters(), **options)
    if by_rank:
        fresh.optim.load_state_dict(opt.optim.state_dict())
    else:
        opt.consolidate_state_dict(to=0)
        sent = [opt.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(sent, src=0)
        fresh.load_state_dict(copy.deepcopy(sent[0]))  # on rank 0 it has the tensors of `opt` itself
    return steps(inner, opt, range(3, STEPS)), steps(other, fresh, range(3, STEPS))


@pytest.mark.parametrize("by_rank", [False, True])
def test_zero_checkpoints(by_rank):
    """Consolidated, as it is; what a rule remembers is in each rank's own `opt.optim.state_dict()` only."""
    for uninterrupted, resumed in worlds(2).run(zero_checkpoint, by_rank):
        assert_all_equal([uninterrupted, resumed])


def zero_with_keyword() -> str:
    with pytest.raises(TypeError) as error:
        options = dict(optimizer_class=fca.FusedClipAdamW, shard_group=dist.group.WORLD)
        ZeroRedundancyOptimizer(policy().parameters(), **options)
    return str(error.value)


def test_a_process_group_that_zero_would_try_to_save_is_refused():
    for message in worlds(2).run(zero_with_keyword):
        assert "shard_group belongs to the optimizer" in message and "functools.partial(FusedClipAdamW" in message


# ---------------------------------------------------------------- pipeline stages of shards


def stages() -> dict:
    """Two stages of two ranks: each cuts its own parameters, and the norm is over both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "shards"))
    stage = mesh["stages"].get_local_rank()
    params = staged_parameters()[stage::2]
    params = [nn.Parameter(distribute_tensor(p, mesh["shards"], [Shard(0)])) for p in params]
    opt = fca.FusedClipAdamW(params, lr=1e-2, grad_clip=fca.ZClip(warmup=2), shard_group=mesh["stages"])
    for step in range(STEPS):
        for p, g in zip(params, staged_gradients(step)[stage::2]):
            p.grad = distribute_tensor(g, mesh["shards"], [Shard(0)])
        opt.step()
    return {"norm": opt.grad_norm, **{f"{stage + 2 * i}": p.full_tensor().detach() for i, p in enumerate(params)}}


def staged_parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5, 2), (1,), (7,))]


def staged_gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(50 + step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in staged_parameters()]


def test_pipeline_stages_of_shards():
    params = [nn.Parameter(p) for p in staged_parameters()]
    opt = fca.FusedClipAdamW(params, lr=1e-2, grad_clip=fca.ZClip(warmup=2))
    for step in range(STEPS):
        for p, g in zip(params, staged_gradients(step)):
            p.grad = g
        opt.step()
    expected = {"norm": opt.grad_norm, **{str(i): p.detach() for i, p in enumerate(params)}}
    for got in worlds(4).run(stages):
        torch.testing.assert_close(got, {key: expected[key] for key in got}, rtol=1e-6, atol=CLOSE)


# ---------------------------------------------------------------- steps that are skipped


def skipping(scaled: bool) -> list:
    """inf in one rank's shard in step 2: (what the steps leave, the same without step 2, skipped, scales)"""
    world, rank = dist.get_world_size(), dist.get_rank()
    out, skipped, scales = [], [], []
    for with_bad in (True, False):
        model = policy(dtype=torch.float32)
        for module in (*model.blocks, model):
            fully_shard(module)
        opt = fca.FusedClipAdamW(model.parameters(), lr=1e-2, grad_clip=fca.ZClip(warmup=2), skip_nonfinite=not scaled)
        scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(5):
            if step == 2 and not with_bad:
                continue
            scaler.scale(loss_of(model, step, rank, world)[0]).backward()
            if step == 2 and rank == 1:
                model.head.weight.grad.to_local()[0, 0] = float("inf")
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            if with_bad:
                skipped.append(opt.step_count_skipped.item())
                scales.append(scaler.get_scale())
        out.append(outcome(model, opt, [torch.zeros(())]))
    return [*out, skipped, scales]


@pytest.mark.parametrize("scaled", [True, False], ids=["found_inf", "skip_nonfinite"])
def test_what_one_rank_finds_all_ranks_skip(scaled):
    for got, expected, skipped, scales in worlds(2).run(skipping, scaled):
        # Scales are powers of two, so a scaled gradient is the gradient, and a skipped step leaves nothing at all.
        assert_all_equal([expected, got])
        assert skipped == [0, 0, 1, 1, 1]
        assert scales == ([2.0**10] * 2 + [2.0**9] * 3 if scaled else [1.0] * 5)


def half_told() -> tuple:
    """torch's check asks the first gradient's placements whom to tell: here nobody."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [how])) for how in (Replicate(), Shard(0))]
    opt = fca.FusedClipAdamW(params, lr=1e-2)
    scaler = torch.amp.GradScaler(device="cpu")
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad = torch.ones_like(p)
    if dist.get_rank() == 1:
        params[1].grad.to_local()[0] = float("inf")
    scaler.step(opt)
    return [p.to_local().tolist() for p in params], opt.step_count_skipped.item()


def test_an_overflow_that_torch_tells_one_rank_of():
    for params, skipped in worlds(2).run(half_told):
        assert params == [[1.0] * 4, [1.0] * 2] and skipped == 1


# ---------------------------------------------------------------- a life of an optimizer


def life(sharded: bool) -> dict:
    """lr as a tensor, a scheduler, a group that joins, resets: on shards, or on one process."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if sharded else (1, 0)
    model = policy()
    if sharded:
        for module in (*model.blocks, model):
            fully_shard(module)
    lr = torch.tensor(1e-2, dtype=torch.float64)
    first, second = [model.embed.weight, *model.blocks.parameters()], [*model.extra.parameters()]
    opt = fca.FusedClipAdamW(first, lr=lr, grad_clip=4.0, overshoot="align-tensor", reset=fca.OnRollout(moments=True))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)
    norms = []
    for step in range(STEPS + 2):
        if step == 2:
            opt.add_param_group({"params": [*second, *model.head.parameters()], "grad_clip": fca.AdaGC(start=1)})
        if step == 4:
            opt.reset_momentum(counters=False)
        if step == 6:
            opt.new_rollout()
        loss_of(model, step, rank, world)[0].backward()
        opt.step()
        scheduler.step()
        model.zero_grad()
        norms.append(opt.grad_norm)
    return outcome(model, opt, norms)


def test_tensor_lr_scheduler_groups_and_resets():
    expected = life(False)
    assert expected["step embed.weight"] == 2  # since the rollout
    assert expected["step head.bias"] == 2 and expected["step extra.bias"] == 1
    for got in worlds(4).run(life, True):
        assert_close(got, expected)


def copies() -> list[bool]:
    """Copies of an optimizer, made of shards and of a share of the parameters, step as it does."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    out = []
    for spread in (True, False):
        make = lambda x: distribute_tensor(x, mesh, [Shard(0)]) if spread else x  # noqa: B023, E731
        params = [nn.Parameter(make(torch.arange(1.0, 4.0 + rank * (not spread)))) for _ in range(2)]
        group = None if spread else dist.group.WORLD
        opt = fca.FusedClipAdamW(params, grad_clip=fca.ZClip(warmup=2), shard_group=group, data_group=group)

        def step(opt, at):
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.full_like(p, 1.0 + at + rank)
            opt.step()
            return [whole(p.detach()).clone() for p in opt.param_groups[0]["params"]] + [opt.grad_norm]

        step(opt, 0)
        others = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
        for at in (1, 2):
            expected = step(opt, at)
            for other in others:
                out.append(all(map(torch.equal, step(other, at), expected)))
        state = io.BytesIO()
        torch.save(opt.state_dict(), state)
    return out


def test_copies_and_pickles():
    for same in worlds(2).run(copies):
        assert len(same) == 8 and all(same)


def watched(with_monitor: bool) -> tuple[dict, list, list]:
    world, rank = dist.get_world_size(), dist.get_rank()
    model = policy()
    for module in (*model.blocks, model):
        fully_shard(module)
    opt = optimizer_of(model, "norm")
    monitor = fca.OvershootMonitor(opt, fca.PPO(), block=4) if with_monitor else None
    norms, kept = [], []
    for step in range(STEPS):
        loss, stats = loss_of(model, step, rank, world)
        loss.backward()
        if with_monitor:
            monitor.observe(stats)
            counts = torch.zeros(2)
            for p in model.parameters():
                if p.grad is not None and p in opt.state:
                    products = (p.grad.to_local() * opt.state[p]["exp_avg"].to_local()).reshape(-1)
                    sums = torch.stack([block.sum() for block in products.split(4)]) if len(products) else products
                    counts += torch.tensor([(sums > 0).sum(), len(sums)])
            kept.append((counts[0] / counts[1]).item() if counts[1] else None)
        opt.step()
        opt.zero_grad()
        norms.append(opt.grad_norm)
    return outcome(model, opt, norms), monitor.rows() if with_monitor else [], kept


def test_a_monitor_measures_this_ranks_shards_and_changes_nothing():
    for (got, rows, kept), (expected, *_) in zip(worlds(4).run(watched, True), worlds(4).run(watched, False)):
        assert_all_equal([expected, got])
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert [row["skipped"] for row in rows] == [0] * STEPS and rows[0]["tokens"] == TOKENS // 4
        assert kept[0] is None and rows[0]["kept_blocks"] is None
        assert [row["kept_blocks"] for row in rows[1:]] == pytest.approx(kept[1:], abs=1e-6)
        assert 0.0 < rows[1]["kept_blocks"] < 1.0


# ---------------------------------------------------------------- which collectives a step issues


def collectives(recipe: str, name: str, scaled: bool = False) -> list[list]:
    """Of a step: (shape, dtype, operation, ranks) of each all_reduce; and how many collectives torch counts in all."""
    model, inner, rank, world, _ = layout(recipe)
    if name == "lag":
        opt = optimizer_of(inner, "plain", grad_clip=fca.GlobalNorm(1.0, lag=True))
    else:
        opt = optimizer_of(inner, name)
    real, out = dist.all_reduce, []
    for step in (0, 2):
        loss, stats = loss_of(model, step, rank, world)
        loss.backward()
        opt.observe(stats)
        if scaled:
            opt.grad_scale, opt.found_inf = torch.ones(()), torch.zeros(())
        calls = []

        def recorded(tensor, op=dist.ReduceOp.SUM, group=None):
            calls.append((tuple(tensor.shape), tensor.dtype, str(op), dist.get_world_size(group)))  # noqa: B023
            return real(tensor, op=op, group=group)

        dist.all_reduce = recorded
        try:
            with CommDebugMode() as counted:
                opt.step()
        finally:
            dist.all_reduce = real
        out.append([calls, counted.get_total_counts()])
        opt.zero_grad()
    return out


def sums(*shapes, ranks=4) -> list[tuple]:
    return [(shape, torch.float64, "RedOpType.SUM", ranks) for shape in shapes]


N = len(list(Policy().parameters()))
VECTORS = sum(p.dim() == 1 for p in Policy().parameters())  # one row each, which the cut goes through
COLLECTIVES = [
    ("ddp", "norm", False, []),
    ("nested", "plain", False, sums(())),
    ("nested", "lag", False, sums(())),
    ("nested", "norm", False, sums(())),
    ("nested", "norm", True, [((), torch.float32, "RedOpType.SUM", 4), *sums(())]),
    ("nested", "tensors", False, sums((), (N,), (N, 2), (N, 2))),  # norm; AdaGC; UpdateRMS; alignment
    ("nested", "rows", False, sums((VECTORS, 2), (N, 2), ())),  # AGC; the share of agreeing elements; norm
    ("nested", "observed", False, [((2,), torch.float32, "RedOpType.SUM", 4), *sums(())]),
    ("hsdp", "norm", False, sums((), ranks=2)),  # replicas have the same
    ("hsdp", "observed", False, [((2,), torch.float32, "RedOpType.SUM", 2)] * 2 + sums((), ranks=2)),
    ("two meshes", "norm", False, [*sums(()), *sums((), ranks=2)]),
]


@pytest.mark.parametrize("recipe, name, scaled, expected", COLLECTIVES)
def test_collectives_of_a_step(recipe, name, scaled, expected):
    results = worlds(4).run(collectives, recipe, name, scaled)
    for got in results:
        for calls, counted in got:
            # Of torch's own count, so nothing else is issued behind their back.
            assert calls == expected
            assert counted == len(expected)


# ---------------------------------------------------------------- blocks of a shard


def aligned(rows: int, columns: int, block: int) -> list[torch.Tensor]:
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(5)
    model = nn.Linear(columns, rows, bias=False, dtype=torch.float64)
    fully_shard(model)
    opt = fca.FusedClipAdamW(model.parameters(), lr=1e-2, overshoot=fca.AlignedMomentum(block=block))
    for step in range(STEPS):
        x, y = aligned_data(step, rows, columns)
        own = slice(8 // world * rank, 8 // world * (rank + 1))
        (model(x[own]) - y[own]).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return [model.weight.full_tensor().detach(), model.weight.to_local().detach()]


def aligned_data(step: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, columns, generator=generator, dtype=torch.float64)
    return x, torch.randn(8, rows, generator=generator, dtype=torch.float64)


def aligned_on_one(rows: int, columns: int, block: int, cuts: tuple[int, ...]) -> torch.Tensor:
    """`cuts`: rows of the shards, each of which is a parameter of its own."""
    torch.manual_seed(5)
    weight = nn.Linear(columns, rows, bias=False, dtype=torch.float64).weight.detach()
    parts = [nn.Parameter(part.clone()) for part in weight.split(cuts)]
    opt = fca.FusedClipAdamW(parts, lr=1e-2, overshoot=fca.AlignedMomentum(block=block))
    for step in range(STEPS):
        x, y = aligned_data(step, rows, columns)
        (x @ torch.cat(parts).T - y).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return torch.cat(parts).detach()


@pytest.mark.parametrize(
    "rows, columns, block, whole_blocks",
    [(8, 6, 4, True), (8, 6, 12, True), (5, 6, 12, True), (8, 6, 7, False), (5, 6, 8, False)],
)
def test_alignment_blocks_start_anew_with_every_shard(rows, columns, block, whole_blocks):
    """The step of one process where every shard's elements are whole blocks, and another where they are not."""
    cuts = tuple(len(part) for part in torch.arange(rows).chunk(4))  # as FSDP2
    by_shards, by_tensor = (aligned_on_one(rows, columns, block, own) for own in (cuts, (rows,)))
    for full, _ in worlds(4).run(aligned, rows, columns, block):
        torch.testing.assert_close(full, by_shards, rtol=0, atol=CLOSE)
    assert ((by_shards - by_tensor).abs().max() < CLOSE) == whole_blocks
    assert whole_blocks or (by_shards - by_tensor).abs().max() > 1e-4


# ---------------------------------------------------------------- a gradient that only one rank has


def alone(name: str) -> tuple[list[float], list[float], list[list[bool]]]:
    """(norms, square sums of what is here, which parameters moved) of four steps. In step 1 the last rank alone has
    gradients, of shards that the others have parts of; in step 2 each rank has none of one parameter.
    """
    mesh, rank, world = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank(), dist.get_world_size()
    full, placements = staged_parameters()[:2], [[Shard(0)], [Shard(1)]]
    params = [nn.Parameter(distribute_tensor(p, mesh, own)) for p, own in zip(full, placements)]
    opt = optimizer_of(nn.ParameterList(params), name)
    norms, squares, moved = [], [], []
    for step in range(4):
        for i, (p, g) in enumerate(zip(params, staged_gradients(step))):
            missing = (step == 1 and rank < world - 1) or (step == 2 and rank == i)
            grad = distribute_tensor(g, mesh, placements[i])  # also where it is not used: all ranks send it
            p.grad = None if missing else grad
        squares.append(sum(p.grad.to_local().square().sum().item() for p in params if p.grad is not None))
        before = [p.to_local().detach().clone() for p in params]
        opt.step()
        norms.append(opt.grad_norm.item())
        moved.append([not torch.equal(p.to_local(), old) for p, old in zip(params, before)])
    return norms, squares, moved


@pytest.mark.parametrize("name", OPTIONS)
def test_a_gradient_that_other_ranks_do_not_have(name):
    """They take the step with it, so that nobody waits for ever; the norm is of what there is."""
    results = worlds(2).run(alone, name)
    for step in range(4):
        norm = sum(squares[step] for _, squares, _ in results) ** 0.5
        assert [norms[step] for norms, *_ in results] == pytest.approx([norm] * 2, rel=1e-6)
    both, neither = [True, True], [False, False]
    assert [moved for *_, moved in results] == [[both, neither, [False, True], both], [both, both, [True, False], both]]


def pausing(way: str) -> dict:
    """Steps 1 and 4 have no gradient on any rank."""
    params = staged_parameters()[:2]
    if way == "shards":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        params = [distribute_tensor(p, mesh, [Shard(0)]) for p in params]
    params = [nn.Parameter(p) for p in params]
    own = params if way != "shares" else params[dist.get_rank() : dist.get_rank() + 1]
    rules = dict(grad_clip=(fca.ZClip(warmup=2), fca.SpikeClip(theta=2.0, start=1)), reset=fca.Periodic(3, warmup=1))
    opt = fca.FusedClipAdamW(own, lr=1e-2, shard_group=dist.group.WORLD if way == "shares" else None, **rules)
    for step in range(8):
        for p, g in zip(params, staged_gradients(step)):
            grad = distribute_tensor(g, mesh, [Shard(0)]) if way == "shards" else g
            p.grad = None if step in (1, 4) else grad
        opt.step()
    out = {f"p{i}": whole(p.detach()) for i, p in enumerate(params) if any(p is q for q in own)}
    for rule, memory in opt._memory[0].items():
        out.update({f"{rule} {key}": value for key, value in memory["tensors"].items()})
    return out


@pytest.mark.parametrize("way", ["shards", "shares"])
def test_a_step_without_any_gradient_does_not_count(way):
    expected = pausing("whole")
    assert expected["Periodic steps"] == 6.0
    for got in worlds(2).run(pausing, way):
        assert_close(got, {key: expected[key] for key in got})


# ---------------------------------------------------------------- what is refused


def refusals() -> dict[str, tuple[str, str]]:
    """Of each case the error, "changed" in front of it where the step had changed a parameter that came first."""
    world, rank = dist.get_world_size(), dist.get_rank()
    line = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (world, 1))
    foreign = dist.new_group(backend="cuda:gloo")  # of which a CPU's sums cannot be asked
    alone = dist.new_group([0])
    gone = dist.new_group()

    def spread(placement, mesh=line, size=4):
        return distribute_tensor(torch.ones(size), mesh, [placement] * mesh.ndim)

    def partial(size):
        return DTensor.from_local(torch.ones(size), line, [Partial()], run_check=False)

    def step(p, grad, **options):
        first, p = nn.Parameter(torch.ones(2)), nn.Parameter(p)
        first.grad, p.grad = torch.ones(2), grad
        opt = fca.FusedClipAdamW([first, p], **options)
        if options.get("shard_group") is gone:
            dist.destroy_process_group(gone)
        try:
            opt.step()
        except Exception as error:
            if not torch.equal(first, torch.ones(2)) or opt.state:
                raise AssertionError("changed") from error
            raise

    def from_scores(p, **options):
        p = nn.Parameter(p)
        opt = fca.FusedClipAdamW([p], **options)
        opt.step_from_scores([torch.ones(3, *p.shape)], torch.zeros(3), torch.zeros(3), torch.ones(3))

    def constructed(**options):
        fca.FusedClipAdamW([nn.Parameter(torch.ones(2))], **options)

    clipped = dict(reset=fca.WhenClipped(0.5))
    other_mesh = DTensor.from_local(torch.ones(11), DeviceMesh.from_group(foreign, "cpu"), [Shard(0)], run_check=False)
    one_rank = DTensor.from_local(torch.ones(3), DeviceMesh("cpu", [0]), [Replicate()], run_check=False)
    cases = {
        "partial": lambda: step(partial(3), torch.zeros_like(partial(3))),
        "partial, both": lambda: step(partial(3), partial(3)),
        "gradient on another mesh": lambda: step(spread(Shard(0)), spread(Shard(0), square)),
        "plain gradient": lambda: step(spread(Shard(0)), torch.ones(4)),
        "plain gradient, replicated": lambda: step(spread(Replicate()), torch.ones(4)),
        "DTensor gradient": lambda: step(torch.ones(4), spread(Shard(0))),
        "group without a backend": lambda: step(torch.ones(2), torch.ones(2), shard_group=foreign),
        "data group without a backend": lambda: step(torch.ones(2), torch.ones(2), data_group=foreign, **clipped),
        "mesh without a backend": lambda: step(other_mesh, torch.ones_like(other_mesh)),
        "group that is gone": lambda: step(torch.ones(2), torch.ones(2), shard_group=gone),
        "name": lambda: constructed(shard_group="world"),
        "number": lambda: constructed(data_group=3),
        "list": lambda: constructed(data_group=[dist.group.WORLD]),
        "two dimensions": lambda: constructed(shard_group=square),
        "two dimensions, data": lambda: constructed(data_group=square),
        "scores of shards": lambda: from_scores(spread(Shard(0))),
        "scores of a share": lambda: from_scores(torch.ones(2), shard_group=dist.group.WORLD),
        "in a param group": lambda: fca.FusedClipAdamW(
            [{"params": [nn.Parameter(torch.ones(2))], "data_group": dist.group.WORLD}]
        ),
    }
    if rank > 0:  # the first is in both
        cases["group of others"] = lambda: constructed(shard_group=alone)
        cases["mesh of others"] = lambda: step(one_rank, torch.zeros_like(one_rank))
    out = {}
    for name, call in cases.items():
        try:
            call()
            out[name] = ("nothing", "")
        except Exception as error:
            out[name] = (type(error).__name__, str(error))
    return out


REFUSED = {
    "partial": ("TypeError", "accepted: Shard, Replicate"),
    "partial, both": ("TypeError", "accepted: Shard, Replicate"),
    "gradient on another mesh": ("ValueError", 'param_groups[0]["params"][1] is on DeviceMesh'),
    "plain gradient": ("TypeError", "is a DTensor, its gradient a Tensor; accepted: a DTensor"),
    "plain gradient, replicated": ("TypeError", "is a DTensor, its gradient a Tensor; accepted: a DTensor"),
    "DTensor gradient": ("TypeError", "is a Parameter, its gradient a DTensor; accepted: a plain tensor"),
    "group without a backend": ("RuntimeError", "has a backend for ['cuda'] only"),
    "data group without a backend": ("RuntimeError", "has a backend for ['cuda'] only"),
    "mesh without a backend": ("RuntimeError", "has a backend for ['cuda'] only"),
    "group that is gone": ("RuntimeError", "shard_group: the process group"),
    "name": ("TypeError", "shard_group must be None, a ProcessGroup or a DeviceMesh, got str"),
    "number": ("TypeError", "data_group must be None, a ProcessGroup or a DeviceMesh, got int"),
    "list": ("TypeError", "data_group must be None, a ProcessGroup or a DeviceMesh, got list"),
    "two dimensions": ("ValueError", "shard_group must be a mesh of one dimension"),
    "two dimensions, data": ("ValueError", "data_group must be a mesh of one dimension"),
    "scores of shards": ("TypeError", "not with DTensors or shard_group"),
    "scores of a share": ("TypeError", "not with DTensors or shard_group"),
    "in a param group": ("TypeError", "data_group belongs to the optimizer"),
    "group of others": ("TypeError", "shard_group must be None, a ProcessGroup or a DeviceMesh"),
    "mesh of others": ("ValueError", "which this rank is not part of"),
}


def test_errors_before_anything_is_changed():
    results = worlds(2).run(refusals)
    assert results[1].keys() == REFUSED.keys()
    for got in results:
        for name, (kind, message) in got.items():
            assert kind == REFUSED[name][0] and REFUSED[name][1] in message, (name, kind, message)
