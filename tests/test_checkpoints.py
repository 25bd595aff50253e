"""Checkpoints of a sharded run (gloo, 1, 2 and 4 processes): what is loaded is what was saved, and goes on alike.

Models are sharded by `fully_shard` (FSDP2). Gradients are written by hand, the same for any number of processes, so
that a run differs from the same run on other processes only by the order of float64 sums.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import worlds
from torch import nn
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import fused_clip_adam as fca

pytestmark = pytest.mark.xdist_group("ranks")

RULES = {
    "plain": {},
    "clip": dict(grad_clip=0.5),
    "clip lagged": dict(grad_clip=fca.GlobalNorm(0.5, lag=True)),
    "zclip": dict(grad_clip=fca.ZClip(warmup=3)),
    "autoclip": dict(grad_clip=fca.AutoClip(50.0)),
    "autoclip, short": dict(grad_clip=fca.AutoClip(50.0, history=8)),
    "adagc, two groups": dict(grad_clip=fca.AdaGC(start=2)),
    "stable spam": dict(grad_clip=fca.StableSpamClip(total_steps=40)),
    "spam": dict(grad_clip=(1.0, fca.SpikeClip(theta=2.0, start=2)), reset=fca.Periodic(every=3, warmup=2)),
    "brake": dict(overshoot=fca.MomentumBrake(0.7, hold_v=0.5), grad_clip=1.0),
    "align tensor lagged": dict(overshoot=fca.AlignedMomentum(block="tensor", lag=True)),
    "skip": dict(skip_nonfinite=True),
    "amsgrad": dict(amsgrad=True, maximize=True),
    "bfloat16, wide states": dict(state_dtype=torch.float32, grad_clip=1.0, overshoot="brake"),
}
SAVED, END = 5, 9  # steps before the checkpoint, and in all
BAD_STEP = 3  # whose gradients are not finite under "skip"


# ---------------------------------------------------------------- a run


class Model(nn.Module):
    """[3] and [5, 6] leave ranks of four without a row. Names are not in the order of the alphabet; one is frozen."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.second = nn.Linear(6, 5)
        self.first = nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.table = nn.Parameter(torch.randn(4, 3, 5))


class Run:
    """A model, sharded or not, and its optimizer; `seed` decides what it starts from.

    Args:
        layout: None (one process has everything), "rows", "columns", "hybrid" (two replicas of two shards) or "ddp".
        groups: how parameter names are cut up into groups, as lists of patterns; None: what the rules say.
    """

    def __init__(self, name: str, layout: str | None, seed: int = 1, groups=None, cls=None, **more) -> None:
        self.name = name
        self.model = Model(seed)
        if name.startswith("bfloat16"):
            self.model.to(torch.bfloat16)
        if layout == "ddp":
            self.model = DistributedDataParallel(self.model)
            more = {"data_group": dist.group.WORLD, **more}
        elif layout is not None:
            world = dist.get_world_size()
            shape, names = ((2, world // 2), ("data", "shard")) if layout == "hybrid" else ((world,), ("shard",))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)

            def place(p):  # FSDP2 cuts other dimensions than the first evenly only
                return Shard(1) if layout == "columns" and p.dim() == 2 and p.shape[1] % world == 0 else None

            fully_shard(self.model.first, mesh=mesh, shard_placement_fn=place)
            fully_shard(self.model, mesh=mesh, shard_placement_fn=place)
        patterns = groups or ([["weight", "table"], ["bias", "frozen"]] if name.endswith("two groups") else [[""]])
        named = [[p for n, p in self.named() if any(own in n for own in wanted)] for wanted in patterns]
        options = dict(lr=1e-2, weight_decay=0.1, **(RULES[name] if cls is None else {}))
        self.opt = (cls or fca.FusedClipAdamW)([{"params": own} for own in named], **options | more)

    def named(self):
        """(name, parameter), named as without DDP."""
        return [(name.removeprefix("module."), p) for name, p in self.model.named_parameters()]

    def train(self, steps) -> Run:
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        for step in steps:
            generator = torch.Generator().manual_seed(100 + step)
            gradients = {name: torch.randn(p.shape, generator=generator) for name, p in self.named()}
            for name, p in self.named():
                if not p.requires_grad:
                    continue
                g = 0.3 * (30.0 if step == 4 else 1.0) * gradients[name]
                if self.name == "skip" and step == BAD_STEP and isinstance(self.opt, fca.FusedClipAdamW):
                    g[..., -1] = float("inf")
                g = g.to(p.dtype)
                if isinstance(p, DTensor):  # every rank has all of it, and keeps its part
                    g = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
                p.grad = g
            if hasattr(self.opt, "observe"):
                for part in range(4 // world * rank, 4 // world * (rank + 1)):
                    self.opt.observe(stats_of(part, step))
            self.opt.step()
            self.opt.zero_grad()
        return self


def stats_of(part: int, step: int) -> fca.ClipStats:
    """What one of four shares of the data clipped."""
    buffer = torch.zeros(14)
    buffer[4], buffer[5] = 0.1 * part * (step % 3), 1.0 + 0.5 * part
    return fca.ClipStats(buffer)


def whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def part(x: torch.Tensor) -> torch.Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach().clone()


def contents(run: Run, whole=whole) -> dict[str, torch.Tensor]:
    """Everything that a run is made of: parameters, states, what rules remember (by the parameter's name where it is of
    a parameter), the norm, the count of skipped steps. `whole`: of DTensors, or `part`, what this rank has of them.
    """
    names = {p: name for name, p in run.named()}
    out = {name: whole(p) for name, p in run.named()}
    for p, name in names.items():
        out.update({f"{name} {key}": whole(x) for key, x in run.opt.state.get(p, {}).items() if key[0].islower()})
    for index, rules in getattr(run.opt, "_memory", {}).items():
        group = run.opt.param_groups[index]["params"]
        for rule, own in rules.items():
            out[f"{index} {rule} steps, at most"] = torch.tensor(own["steps"])
            for key, value in own["tensors"].items():
                if key in ("gamma", "keep", "max", "mean_square", "gamma1_power") or value.shape == (len(group),):
                    out.update({f"{names[p]} {rule} {key}": one for p, one in zip(group, value.clone())})
                else:
                    out[f"{index} {rule} {key}"] = value.clone()
    if isinstance(run.opt, fca.FusedClipAdamW) and run.name not in ("plain", "amsgrad"):  # those save as torch does
        out["norm"], out["skipped"] = run.opt.grad_norm.clone(), run.opt.step_count_skipped.clone()
    return out


def assert_equal(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), f"{key}: {got[key]}, not {value}"


def assert_close(got: dict, expected: dict) -> None:
    """As after sums in another order. That moves a scalar of a step by some 1e-16, which rounds a float32 element
    differently once in a while: an ulp of a parameter below 4 (2^-21) a step, and its moments' likewise; or one
    rounding of bfloat16 a step.
    """
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        rtol, atol = {
            torch.float32: (1e-6, END * 2.0**-21),
            torch.float64: (1e-12, 1e-12),
            torch.bfloat16: (END * 2.0**-8, 0.0),
        }.get(value.dtype, (0.0, 0.0))
        torch.testing.assert_close(
            got[key], value, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


@functools.cache
def on_one(name: str, steps: int) -> dict:
    """The run of one process that is never stopped."""
    assert not dist.is_initialized()
    return contents(Run(name, None).train(range(steps)))


# ---------------------------------------------------------------- ways through a checkpoint


def save_files(run: Run, folder: str, **options) -> None:
    with single_process():  # without waiting for the disk, which is of no interest here
        dcp.save(state_of(run, **options), storage_writer=dcp.FileSystemWriter(folder, sync_files=False))


def state_of(run: Run, **options) -> dict:
    model, optimizer = get_state_dict(run.model, run.opt, options=StateDictOptions(**options))
    return {"model": model, "optimizer": optimizer}


def load_files(run: Run, folder: str, partial: bool = False, **options) -> None:
    state = state_of(run, **options)
    with single_process():
        dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=partial))
    set_state(run, state, **options)


def set_state(run: Run, state: dict, **options) -> None:
    set_state_dict(
        run.model,
        run.opt,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(**options),
    )


@contextlib.contextmanager
def single_process():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def through_torch_save(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Each saves a run and returns what loads it into another, any number of times.


def through_files(run: Run, folder: str, **options):
    save_files(run, folder, **options)
    return lambda other: load_files(other, folder, **options)


def through_memory(run: Run, folder: str, **options):
    return lambda other: set_state(other, state_of(run, **options), **options)


def through_whole(run: Run, folder: str, save: dict, load: dict):
    """What is whole passes through a file of torch.save; with cpu_offload only rank 0 has it."""
    save, load = StateDictOptions(full_state_dict=True, **save), StateDictOptions(full_state_dict=True, **load)
    model = get_model_state_dict(run.model, options=save)
    optimizer = get_optimizer_state_dict(run.model, run.opt, options=save)
    assert bool(model) == bool(optimizer) == (not save.cpu_offload or dist.get_rank() == 0)

    def into(other: Run) -> None:
        set_model_state_dict(other.model, through_torch_save(model), options=load)
        set_optimizer_state_dict(other.model, other.opt, through_torch_save(optimizer), options=load)

    return into


def through_plain(run: Run, folder: str):
    """Every rank its own file, without get_ and set_."""
    model, optimizer = run.model.state_dict(), run.opt.state_dict()

    def into(other: Run) -> None:
        other.model.load_state_dict(through_torch_save(model))
        other.opt.load_state_dict(through_torch_save(optimizer))

    return into


WAYS = {
    "files": through_files,
    "files, flat": functools.partial(through_files, flatten_optimizer_state_dict=True),
    "files, offloaded": functools.partial(through_files, cpu_offload=True),
    "memory": through_memory,
    "memory, flat": functools.partial(through_memory, flatten_optimizer_state_dict=True),
    "whole": functools.partial(through_whole, save={}, load={}),
    "whole, of rank 0": functools.partial(
        through_whole, save=dict(cpu_offload=True), load=dict(broadcast_from_rank0=True)
    ),
    "plain": through_plain,
}


@functools.cache
def saved_run(name: str, layout: str = "rows") -> Run:
    """A run that is saved in many ways, none of which may change it."""
    return Run(name, layout).train(range(SAVED))


@functools.cache
def uninterrupted(name: str) -> dict:
    return contents(Run(name, "rows").train(range(END)), part)


def check_resumed(name: str, way: str, folder: str) -> None:
    run = saved_run(name)
    saved = contents(run, part)
    into = WAYS[way](run, folder)
    for used in (0, 3):  # into what is new, and back to it from what has gone astray
        other = Run(name, "rows", seed=2, lr=0.5).train(range(100, 100 + used))
        into(other)
        assert_equal(contents(other, part), saved)
        assert_equal(contents(run, part), saved)
        assert_equal(contents(other.train(range(SAVED, END)), part), uninterrupted(name))
    assert name != "skip" or saved["skipped"] == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RULES)
def test_a_loaded_run_goes_on_bit_for_bit(name, way, tmp_path):
    worlds(2).run(check_resumed, name, way, str(tmp_path))


def check_waiting_statistics(folder: str) -> None:
    run, other = Run("brake", "rows").train(range(SAVED)), Run("brake", "rows", seed=2)
    run.opt.observe(stats_of(3 * dist.get_rank(), 4))
    WAYS["plain"](run, folder)(other)
    for each in (run, other):
        each.train(range(SAVED, SAVED + 1))
    assert_equal(contents(other, part), contents(run, part))
    without = contents(Run("brake", "rows").train(range(SAVED + 1)), part)
    assert not torch.equal(without["table"], contents(run, part)["table"])


def test_statistics_that_wait_for_the_next_step_are_in_a_rank_s_own_file(tmp_path):
    worlds(2).run(check_waiting_statistics, str(tmp_path))


def check_grown(way: str, folder: str) -> None:
    long, short = Run("autoclip", "rows").train(range(260)), saved_run("autoclip")
    rooms = [run.opt._memory[0]["AutoClip"]["tensors"]["norms"].numel() for run in (long, short)]
    assert rooms == [512, 256]
    into_long, into_short = WAYS[way](long, f"{folder}/long"), WAYS[way](short, f"{folder}/short")
    other = Run("autoclip", "rows", seed=2)
    into_long(other)
    assert_equal(contents(other, part), contents(long, part))
    into_short(other)
    assert_equal(contents(other, part), contents(short, part))
    assert_equal(contents(other.train(range(SAVED, END)), part), uninterrupted("autoclip"))


@pytest.mark.parametrize("way", WAYS)
def test_memory_that_has_grown_loads_where_it_has_not_and_back(way, tmp_path):
    worlds(2).run(check_grown, way, str(tmp_path))


# ---------------------------------------------------------------- other processes than before


CHAINS = {
    "2 -> 4 -> 1": (((2, "rows"), (4, "rows"), (1, None)), {}),
    "4 -> 2 -> 1, flat": (((4, "hybrid"), (2, "columns"), (1, None)), {"flatten_optimizer_state_dict": True}),
    "DDP -> FSDP2 -> 1": (((2, "ddp"), (4, "hybrid"), (1, None)), {}),
}


def go_on(name: str, layout: str | None, source: str | None, target: str, steps: range, **options) -> tuple:
    """(what was loaded, what it is after the steps), whole; saved at the end."""
    run = Run(name, layout, seed=1 if source is None else 2)
    if source is not None:
        load_files(run, source, **options)
    loaded = contents(run)
    run.train(steps)
    save_files(run, target, **options)
    return loaded, contents(run)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", RULES)
def test_a_run_goes_on_with_other_processes(name, chain, tmp_path):
    before, source = None, None
    worlds_and_layouts, options = CHAINS[chain]
    for (size, layout), steps in zip(worlds_and_layouts, (range(SAVED), range(SAVED, END - 2), range(END - 2, END))):
        target = str(tmp_path / str(steps.stop))
        run = worlds(size).run if size > 1 else lambda function, *args, **more: [function(*args, **more)]
        after = run(go_on, name, layout, source, target, steps, **options)
        for loaded, reached in after:
            if before is not None:
                assert_equal(loaded, before)
            assert_equal(reached, after[0][1])  # on every rank
        before, source = after[0][1], target
    assert_close(before, on_one(name, END))


def load_state(name: str, layout: str, folder: str) -> dict:
    run = Run(name, layout, seed=2)
    load_files(run, folder)
    return contents(run)


@pytest.mark.parametrize("name", ("plain", "clip", "autoclip", "adagc, two groups", "brake", "amsgrad"))
def test_a_checkpoint_may_become_a_file_of_torch_save_and_back(name, tmp_path):
    folder, file, back = str(tmp_path / "dcp"), tmp_path / "file.pt", str(tmp_path / "back")
    _, saved = worlds(2).run(go_on, name, "rows", None, folder, range(SAVED))[0]
    format_utils.dcp_to_torch_save(folder, file)
    run = Run(name, None, seed=2)
    set_state(run, torch.load(file, weights_only=True))
    assert_equal(contents(run), saved)
    assert_close(contents(run.train(range(SAVED, END))), on_one(name, END))
    format_utils.torch_save_to_dcp(file, back)
    for loaded in worlds(2).run(load_state, name, "rows", back):
        assert_equal(loaded, saved)


# ---------------------------------------------------------------- saving while training goes on


class SlowWriter(dcp.FileSystemWriter):
    """Writes when told to."""

    def __init__(self, path: str) -> None:
        super().__init__(path, sync_files=False)
        self.may_write = threading.Event()

    def write_data(self, plan, planner):
        assert self.may_write.wait(60)
        return super().write_data(plan, planner)


@functools.cache
def group_of_saves():
    """The thread that saves needs a group of its own: calls of two threads on one group would meet each other's."""
    return dist.new_group(backend="gloo")


def check_async(name: str, folder: str, **options) -> None:
    run = Run(name, "rows").train(range(SAVED))
    saved, writer = contents(run, part), SlowWriter(folder)
    done = dcp.async_save(state_of(run, **options), storage_writer=writer, process_group=group_of_saves())
    groups = run.opt.state_dict()["param_groups"]
    before = copy.deepcopy(groups)
    run.train(range(SAVED, END))
    run.opt.state_dict()  # which renews what is in the states of the parameters
    assert not done.done()
    assert len(tree_leaves(groups)) == len(tree_leaves(before))
    for value, old in zip(tree_leaves(groups), tree_leaves(before)):
        assert torch.equal(value, old) if isinstance(value, torch.Tensor) else value == old
    writer.may_write.set()
    done.result()
    assert_equal(contents(run, part), uninterrupted(name))
    other = Run(name, "rows", seed=2)
    load_files(other, folder, **options)
    assert_equal(contents(other, part), saved)
    assert_equal(contents(other.train(range(SAVED, END)), part), uninterrupted(name))


@pytest.mark.parametrize("name", ("plain", "zclip", "autoclip", "adagc, two groups", "brake", "skip"))
def test_an_asynchronous_save_holds_the_state_at_its_call(name, tmp_path):
    worlds(2).run(check_async, name, str(tmp_path), flatten_optimizer_state_dict=name == "zclip")


# ---------------------------------------------------------------- torch's AdamW


def check_from_torch(name: str, way: str, folder: str) -> None:
    theirs = Run(name, "rows", cls=torch.optim.AdamW, amsgrad=name == "amsgrad", maximize=name == "amsgrad")
    theirs.train(range(SAVED))
    expected, other = Run(name, "rows", seed=2, lr=0.5), Run(name, "rows", seed=3, lr=0.5)
    expected.model.load_state_dict(theirs.model.state_dict())
    expected.opt.load_state_dict(theirs.opt.state_dict())  # has nothing that torch has not
    if way == "files":
        save_files(theirs, folder)
        load_files(other, folder, partial=name not in ("plain", "amsgrad"))
    else:
        WAYS[way](theirs, folder)(other)
    saved = contents(theirs, part)
    for run in (expected, other):
        loaded = contents(run, part)
        assert_equal({key: loaded[key] for key in saved}, saved)
        run.train(range(SAVED, END))
    assert [g.get("grad_clip") for g in other.opt.param_groups] == [
        g.get("grad_clip") for g in expected.opt.param_groups
    ]
    got, wanted = contents(other, part), contents(expected, part)
    for each in (got, wanted):
        for key in [key for key in each if key.endswith("at most")]:  # one of them has taken a step to make its states
            del each[key]
    assert_equal(got, wanted)


FROM_TORCH = [(name, "files") for name in RULES if "bfloat16" not in name]
FROM_TORCH += [(name, way) for name in ("brake", "stable spam") for way in ("whole", "whole, of rank 0")]


@pytest.mark.parametrize(("name", "way"), FROM_TORCH)
def test_a_checkpoint_of_torchs_adamw_goes_on_under_every_rule(name, way, tmp_path):
    worlds(2).run(check_from_torch, name, way, str(tmp_path))


def check_to_torch(name: str, folder: str) -> None:
    ours = saved_run(name)
    save_files(ours, folder)
    theirs = Run(name, "rows", seed=2, cls=torch.optim.AdamW, lr=0.5, amsgrad=name == "amsgrad")
    load_files(theirs, folder)
    loaded, saved = contents(theirs, part), contents(ours, part)
    assert_equal(loaded, {key: saved[key] for key in loaded})
    assert theirs.opt.param_groups[0]["lr"] == 1e-2 and theirs.opt.param_groups[0]["maximize"] == (name == "amsgrad")
    theirs.train(range(SAVED, END))
    if name in ("plain", "amsgrad"):
        assert_close(contents(theirs, part), uninterrupted(name))


@pytest.mark.parametrize("name", [name for name in RULES if "bfloat16" not in name])
def test_torchs_adamw_loads_our_checkpoint(name, tmp_path):
    worlds(2).run(check_to_torch, name, str(tmp_path))


# ---------------------------------------------------------------- other parameter groups than before


CUTS = {
    "one": [[""]],
    "two": [["weight", "table"], ["bias", "frozen"]],
    "two others": [["bias", "table"], ["weight", "frozen"]],
    "four, in another order": [["table"], ["first"], ["frozen"], ["second"]],
}


def check_regrouped(name: str, saved_cut: str, cut: str, folder: str) -> None:
    run = Run(name, "rows", groups=CUTS[saved_cut]).train(range(SAVED))
    save_files(run, folder, flatten_optimizer_state_dict=True)
    other = Run(name, "rows", seed=2, lr=0.5, groups=CUTS[cut])
    load_files(other, folder, flatten_optimizer_state_dict=True)
    for steps in ((), range(SAVED, END)):
        for each in (run, other):
            each.train(steps)
        got, expected = contents(other, part), contents(run, part)
        # What is a parameter's own, and what is of the whole optimizer. That of a group is its first parameter's.
        of_groups = {key for key in {**got, **expected} if key[0].isdigit()}
        assert_equal(*({key: x for key, x in each.items() if key not in of_groups} for each in (got, expected)))
        assert any("gamma" in key or "AlignedMomentum" in key or "StableSpam" in key for key in got)


REGROUPED = [("one", "two"), ("two", "one"), ("two", "two others"), ("two", "four, in another order")]
REGROUPED += [("four, in another order", "two others")]


@pytest.mark.parametrize(("saved_cut", "cut"), REGROUPED)
@pytest.mark.parametrize("name", ("adagc, two groups", "stable spam", "align tensor lagged"))
def test_what_rules_remember_of_a_parameter_follows_it_into_another_group(name, saved_cut, cut, tmp_path):
    worlds(2).run(check_regrouped, name, saved_cut, cut, str(tmp_path))


# ---------------------------------------------------------------- killed


TESTS = Path(__file__).parent
ARGUMENTS = ("--rollouts", "12", "--every", "3")  # four checkpoints, of which two stay
NEWEST = {  # the rollout to go on after, by the moment of interrupted_run.py at which a process is killed
    "between the updates of a step": 6,
    "amid the writing of a file": 6,
    "amid the writing of a file, process 0": 6,
    "before .metadata": 6,
    "before the name": 6,
    "after the name": 9,
    "before old ones go": 9,
}


@pytest.fixture(scope="module")
def run_example():
    """`run_example(folder, size, ...)`: examples/fsdp2_checkpoint.py on new processes, see interrupted_run.run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "interrupted_run.py")]
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def run(folder, size=2, *arguments, **options) -> tuple[int, str]:
            call = {"arguments": [*ARGUMENTS, "--folder", str(folder), *arguments], "size": size, **options}
            process.stdin.write(json.dumps(call) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert answer["exit"] in (0, -signal.SIGKILL), answer["printed"]
            return answer["exit"], answer["printed"][0]

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def whole_run(run_example, tmp_path_factory):
    """`whole_run(size)`: what the uninterrupted run prints."""

    @functools.cache
    def run(size: int) -> str:
        done, printed = run_example(tmp_path_factory.mktemp("whole"), size)
        assert done == 0
        return printed

    return run


def digest(printed: str) -> str:
    found = re.search(r"digest of parameters and optimizer: ([0-9a-f]{64})\n", printed)
    assert found, printed
    return found[1]


def rewards(printed: str) -> list[float]:
    return [float(reward) for reward in re.findall(r"reward ([0-9.]+)", printed)]


def assert_tidy(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000009", "step-00000012"]


@pytest.mark.parametrize("moment", NEWEST)
def test_a_killed_run_goes_on_bit_for_bit(moment, run_example, whole_run, tmp_path):
    ended, printed = run_example(tmp_path, 2, moment=moment)
    assert ended == -signal.SIGKILL and "digest" not in printed
    ended, printed = run_example(tmp_path, 2)
    assert ended == 0 and f"going on after rollout {NEWEST[moment]}," in printed
    assert digest(printed) == digest(whole_run(2))
    assert_tidy(tmp_path)


@pytest.mark.parametrize("moment", ("between the updates of a step", "amid the writing of a file", "before the name"))
def test_a_run_that_saves_in_the_background_is_killed_and_goes_on_bit_for_bit(moment, run_example, whole_run, tmp_path):
    ended, _ = run_example(tmp_path, 2, "--background", moment=moment)
    assert ended == -signal.SIGKILL
    ended, printed = run_example(tmp_path, 2, "--background")
    # A step may be killed before or after the save of two rollouts ago is complete; a save waits for the one before.
    possible = (3, 6) if moment == "between the updates of a step" else (6,)
    assert ended == 0 and any(f"going on after rollout {number}," in printed for number in possible)
    assert digest(printed) == digest(whole_run(2))
    assert_tidy(tmp_path)


def test_one_process_killed_in_a_step_goes_on_bit_for_bit(run_example, whole_run, tmp_path):
    ended, _ = run_example(tmp_path, 1, moment="between the updates of a step")
    assert ended == -signal.SIGKILL
    ended, printed = run_example(tmp_path, 1)
    assert ended == 0 and "going on after rollout 6," in printed
    assert digest(printed) == digest(whole_run(1)) != digest(whole_run(2))
    assert_tidy(tmp_path)


def test_a_run_killed_at_any_time_again_and_again_goes_on_bit_for_bit(run_example, whole_run, tmp_path):
    for limit in (0.2, 0.5, 0.4, 0.8, 0.6, 0.3):  # seconds
        ended, printed = run_example(tmp_path, 2, limit=limit)
        if ended == 0:  # on a fast machine
            break
    else:
        _, printed = run_example(tmp_path, 2)
    assert digest(printed) == digest(whole_run(2))
    assert_tidy(tmp_path)


@pytest.mark.parametrize("size", (1, 4))
def test_a_killed_run_goes_on_with_other_processes(size, run_example, whole_run, tmp_path):
    run_example(tmp_path, 2, moment="between the updates of a step")
    _, printed = run_example(tmp_path, size)
    assert "going on after rollout 6," in printed
    # A sample that rounding tips over changes one of the 1280 digits of a rollout, and what comes after it a little.
    assert rewards(printed)[-2:] == pytest.approx(rewards(whole_run(2))[-2:], abs=0.02)
    assert rewards(whole_run(2))[-1] > rewards(whole_run(2))[0] + 0.1  # it learns


def test_the_example_refuses_a_folder_of_another_seed(run_example, tmp_path):
    run_example(tmp_path, 1, "--rollouts", "1")
    with pytest.raises(AssertionError, match=r"is of --seed 0, not 1; give another --folder"):
        run_example(tmp_path, 1, "--seed", "1")


def test_torchrun_restarts_a_killed_run(whole_run, tmp_path):
    """The whole of it, as a user runs it: torchrun starts the processes anew, and they find the newest checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--monitor-interval=0.1", str(TESTS / "interrupted_run.py"), "amid the writing of a file"]
    command += [str(tmp_path / "killed"), *ARGUMENTS, "--folder", str(tmp_path / "checkpoints")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see the example
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists() and done.stdout.count("going on after rollout 6,") == 1
    assert digest(done.stdout) == digest(whole_run(2))
    assert_tidy(tmp_path / "checkpoints")
