"""GRPO with sharded parameters (FSDP2) that may be stopped at any time, killed even, and goes on as if it had not been.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2_checkpoint.py
    python examples/fsdp2_checkpoint.py      # one process, nothing sharded

Every few rollouts the model, the optimizer (moments, and what its rules remember), the random numbers and the place in
the data are saved with torch.distributed.checkpoint, in a folder that gets its name when it is complete. Started again
with the same --folder, the run goes on from the newest. On as many processes as before it is the uninterrupted run bit
for bit, which the digest at the end shows; on another number it is the same run too, up to the order in which floats
are added up, since all processes draw the same random numbers and each takes its share.

torchrun starts the processes again by itself with --max-restarts. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 then: new
processes may otherwise be given the addresses of the dead (torch 2.13; pytorch#135712).

The task: reverse a string of digits. The policy is a small network that sees all of it and chooses every digit of the
answer at once; the reward is the share of right digits. Half a minute on two CPU cores.
"""

import argparse
import hashlib
import itertools
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_clip_adam as fca

DIGITS, SYMBOLS = 5, 6
PROMPTS, SAMPLES, EPOCHS = 32, 8, 2  # prompts of a rollout, answers to each, steps on each rollout


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=150, help="in all, those before a stop included (default: 150)")
    parser.add_argument("--every", type=int, default=10, help="rollouts between two checkpoints (default: 10)")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints that stay, the newest (default: 2)")
    parser.add_argument("--background", action="store_true", help="save in a thread while training goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("demo_out/fsdp2_checkpoint"), help="of the checkpoints")
    options = parser.parse_args(arguments)
    for name in ("rollouts", "every", "keep"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


# ---------------------------------------------------------------- checkpoints


def complete(parent):
    """The complete checkpoints in a folder, oldest first. torch writes `.metadata` last; the name comes after it."""
    found = [path.parent for path in parent.glob("step-*/.metadata")]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


class Checkpoints:
    """Numbered folders that are complete from the moment they have their name, and until they have lost it.

    Args:
        folder: their parent, which every process sees under this path.
        keep: how many stay.
        background: save in a thread. The state is copied first, so that training may go on at once.
    """

    UNFINISHED = "unfinished-"

    def __init__(self, folder, keep, background):
        self.folder, self.keep, self.background = folder, keep, background
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        # A thread needs a group of its own: calls of two threads on one group would meet each other's.
        self.group = dist.new_group(backend="gloo") if background and dist.is_initialized() else None
        self.saving = None  # (future, number) of the save in flight
        if self.first:
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in folder.glob(f"{self.UNFINISHED}*"):
                shutil.rmtree(left_over)

    def newest(self):
        """The folder to go on from, or None. Process 0 decides for all."""
        found = [complete(self.folder)[-1:]]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        return found[0][0] if found[0] else None

    def save(self, number, state):
        self.wait()
        path = self.folder / f"{self.UNFINISHED}{number:08d}"
        if self.background:
            self.saving = dcp.async_save(state, checkpoint_id=path, process_group=self.group), number
        else:
            dcp.save(state, checkpoint_id=path)
            self._publish(number)

    def look(self):
        """Gives the save in flight its name if it is complete."""
        if self.saving is not None and self.saving[0].done():
            self.wait()

    def wait(self):
        """Until the save in flight, if there is one, is complete."""
        if self.saving is not None:
            future, number = self.saving
            future.result()
            self.saving = None
            self._publish(number)

    def _publish(self, number):
        if not self.first:
            return
        final = self.folder / f"step-{number:08d}"
        if final.exists():  # without `.metadata`, else the run would have started after it
            self._remove(final)
        os.replace(self.folder / f"{self.UNFINISHED}{number:08d}", final)
        descriptor = os.open(self.folder, os.O_RDONLY)
        os.fsync(descriptor)  # the new name must be on the disk before older checkpoints go
        os.close(descriptor)
        for old in complete(self.folder)[: -self.keep]:
            self._remove(old)

    def _remove(self, folder):
        nameless = folder.with_name(f"{self.UNFINISHED}{folder.name}")
        os.replace(folder, nameless)
        shutil.rmtree(nameless)


# ---------------------------------------------------------------- the run


class Data:
    """Prompts in a random order, each once before any comes again, and the random numbers of the whole run."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.prompts = torch.cartesian_prod(*[torch.arange(SYMBOLS)] * DIGITS)
        self._shuffle()

    def _shuffle(self):
        self.order, self.position = torch.randperm(len(self.prompts), generator=self.generator), 0

    def next_prompts(self):
        if self.position + PROMPTS > len(self.order):
            self._shuffle()
        self.position += PROMPTS
        return self.prompts[self.order[self.position - PROMPTS : self.position]]

    def noise(self):
        """Gumbel noise of a rollout's samples, [prompts, samples, digits, symbols]."""
        uniform = torch.rand(PROMPTS, SAMPLES, DIGITS, SYMBOLS, generator=self.generator)
        return -(-uniform.clamp(min=1e-12).log()).log()

    def state_dict(self):
        return {"generator": self.generator.get_state(), "order": self.order, "position": self.position}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.order, self.position = state["order"], state["position"]


class Policy(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 16)
        self.body = nn.Sequential(nn.Linear(16 * DIGITS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, DIGITS * SYMBOLS)

    def forward(self, prompts):
        return self.head(self.body(self.embedding(prompts).flatten(1)))


class Run:
    def __init__(self, options):
        torch.manual_seed(options.seed)
        self.options = options
        self.size, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        if PROMPTS % self.size:
            raise ValueError(f"{PROMPTS} prompts a rollout do not divide among {self.size} processes")
        self.policy = Policy()
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (self.size,))
            for module in (self.policy.body, self.policy):
                fully_shard(module, mesh=mesh)
        named = list(self.policy.named_parameters())
        self.optimizer = fca.FusedClipAdamW(
            [
                {"params": [p for name, p in named if name.endswith("weight")]},
                {"params": [p for name, p in named if not name.endswith("weight")], "weight_decay": 0.0},
            ],
            lr=3e-3,
            grad_clip=fca.ZClip(warmup=10),
            overshoot="brake",
        )
        self.data = Data(options.seed)
        self.done, self.rewards = 0, []

    def log_probs(self, prompts):
        """Of every symbol, [prompts, digits, symbols]."""
        return self.policy(prompts).unflatten(1, (DIGITS, SYMBOLS)).log_softmax(-1)

    def rollout(self):
        """One rollout and the steps on it."""
        share = slice(self.rank * PROMPTS // self.size, (self.rank + 1) * PROMPTS // self.size)
        prompts, noise = self.data.next_prompts()[share], self.data.noise()[share]
        with torch.no_grad():
            logp = self.log_probs(prompts).unsqueeze(1).expand_as(noise)
        answers = (logp + noise).argmax(-1)  # Gumbel noise: a sample of the policy
        old_logp = logp.gather(-1, answers.unsqueeze(-1)).flatten(0, 1).squeeze(-1)
        rewards = (answers == prompts.flip(1).unsqueeze(1)).float().mean(-1).flatten()
        advantages = fca.group_advantages(rewards, SAMPLES)
        answers = answers.flatten(0, 1).unsqueeze(-1)
        for _ in range(EPOCHS):
            logp = self.log_probs(prompts).repeat_interleave(SAMPLES, 0).gather(-1, answers).squeeze(-1)
            loss, stats = fca.policy_loss(logp, old_logp, advantages)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.observe(stats)
            self.optimizer.step()
        total = rewards.mean()
        if self.size > 1:
            dist.all_reduce(total)
        self.rewards.append(total.item() / self.size)
        self.done += 1

    def state(self):
        model, optimizer = get_state_dict(self.policy, self.optimizer)
        progress = {"seed": self.options.seed, "done": self.done, "rewards": list(self.rewards)}
        return {"model": model, "optimizer": optimizer, "data": self.data.state_dict(), "progress": progress}

    def load(self, folder):
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        progress = state["progress"]
        if progress["seed"] != self.options.seed:
            raise ValueError(
                f"{folder} is of --seed {progress['seed']}, not {self.options.seed}; give another --folder"
            )
        set_state_dict(
            self.policy, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.data.load_state_dict(state["data"])
        self.done, self.rewards = progress["done"], progress["rewards"]

    def digest(self):
        """sha256 of all parameters and all that the optimizer knows, in process 0; None in others."""
        model, optimizer = get_state_dict(
            self.policy, self.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if self.rank:
            return None
        hashed = hashlib.sha256()
        add_to(hashed, "", {"model": model, "optimizer": optimizer})
        return hashed.hexdigest()


def add_to(hashed, name, value):
    if isinstance(value, torch.Tensor):
        hashed.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        hashed.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            add_to(hashed, f"{name}.{key}", value[key])
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            add_to(hashed, f"{name}.{i}", each)
    else:
        hashed.update(f"{name} {value!r}".encode())


def train(options):
    run = Run(options)
    checkpoints = Checkpoints(options.folder, options.keep, options.background)
    say = print if run.rank == 0 else lambda *_, **__: None
    if (newest := checkpoints.newest()) is not None:
        run.load(newest)
        say(f"  going on after rollout {run.done}, from {newest}", flush=True)
    started = time.perf_counter()
    while run.done < options.rollouts:
        run.rollout()
        checkpoints.look()
        if run.done % options.every == 0 or run.done == options.rollouts:
            checkpoints.save(run.done, run.state())
            say(f"  rollout {run.done:>5}  reward {run.rewards[-1]:.3f}", flush=True)
    checkpoints.wait()
    say(f"  {run.size} process(es), {time.perf_counter() - started:.0f} s")
    print_table(run.rewards, say)
    digest = run.digest()  # a call of all processes
    say(f"  digest of parameters and optimizer: {digest}")


def print_table(rewards, say):
    say(f"\n  rollouts        mean reward (chance: {1 / SYMBOLS:.3f})")
    bounds = [len(rewards) * i // 5 for i in range(6)]
    for start, end in itertools.pairwise(bounds):
        if start < end:
            say(f"  {start + 1:>5} - {end:<5}   {sum(rewards[start:end]) / (end - start):.3f}")


def main(arguments=None):
    options = parse_options(arguments)
    # torch says that it saves from one process where there is one.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    joined = "RANK" in os.environ and not dist.is_initialized()
    if joined:
        dist.init_process_group("gloo")
    train(options)
    if joined:
        dist.destroy_process_group()
    return 0


def leave(status):
    """Ends the process without taking Python down: gloo's threads may still be letting go of tensors, which would end
    in an abort of a run that is complete (torch 2.13 on Python < 3.14).
    """
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
