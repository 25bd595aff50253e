"""GRPO in Lightning: a LightningModule with a ratio-clipped objective, FusedClipAdamW and its callback.

A small policy learns to reverse six digits from rewards alone. It writes a group of answers to every prompt; the reward
is the share of digits in their place, the advantage what it is above the group's. Each set of answers serves several
steps, so that the ratio clip acts, and what it clipped goes to the optimizer. About ten seconds on one CPU core.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fused_clip_adam as fca
from fused_clip_adam.integrations.lightning import FusedClipCallback, observe

DIGITS, HIDDEN = 6, 128
PROMPTS, GROUP, BATCHES, PASSES = 64, 8, 4, 3  # per rollout: prompts, answers to each, minibatches, passes over them
LR, GRAD_CLIP = 3e-3, 0.1


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: 1000)")
    parser.add_argument("--overshoot", choices=["none", "align", "cautious", "brake"], default="brake")
    parser.add_argument("--clip", type=float, default=0.2, help="ratios stop at 1 - this and 1 + this (default: 0.2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="300 steps: a smoke run of a few seconds")
    options = parser.parse_args(arguments)
    if options.steps < BATCHES * PASSES:
        parser.error(f"--steps must be at least {BATCHES * PASSES}, a rollout's")
    if options.quick:
        options.steps = 300
    return options


class Rollouts(IterableDataset):
    """Minibatches of answers by the policy as it is when they are drawn."""

    def __init__(self, policy, seed):
        self.policy = policy
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        while True:
            rollout = self.policy.write(torch.randint(10, (PROMPTS, DIGITS), generator=self.generator), self.generator)
            for _ in range(PASSES):
                order = torch.randperm(PROMPTS * GROUP, generator=self.generator)
                for rows in order.chunk(BATCHES):
                    yield {name: x[rows] for name, x in rollout.items()}


class Policy(lightning.LightningModule):
    """Logits of every digit of the answer, [B, DIGITS, 10], from the prompt's digits, [B, DIGITS]."""

    def __init__(self, options):
        super().__init__()
        self.options = options
        self.net = nn.Sequential(nn.Linear(10 * DIGITS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10 * DIGITS))
        self.rewards = []

    def forward(self, prompts):
        return self.net(nn.functional.one_hot(prompts, 10).flatten(1).float()).view(-1, DIGITS, 10)

    def logp(self, prompts, answers):
        return self(prompts).log_softmax(-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def write(self, prompts, generator):
        prompts = prompts.repeat_interleave(GROUP, 0)
        probabilities = self(prompts).softmax(-1).flatten(0, 1)
        answers = torch.multinomial(probabilities, 1, generator=generator).view(-1, DIGITS)
        rewards = (answers == prompts.flip(1)).float().mean(1)
        self.rewards.append(float(rewards.mean()))
        return {
            "prompts": prompts,
            "answers": answers,
            "old_logp": self.logp(prompts, answers),
            "advantages": fca.group_advantages(rewards, GROUP),
        }

    def training_step(self, batch, batch_idx):
        loss, stats = fca.policy_loss(
            self.logp(batch["prompts"], batch["answers"]),
            batch["old_logp"],
            batch["advantages"],
            objective=fca.PPO(self.options.clip, self.options.clip),
        )
        observe(self.optimizers(), stats)
        self.log("clip_fraction", (stats.clipped_low + stats.clipped_high) / stats.tokens)
        return loss

    def configure_optimizers(self):
        overshoot = None if self.options.overshoot == "none" else self.options.overshoot
        return fca.FusedClipAdamW(self.parameters(), lr=LR, weight_decay=0.0, grad_clip=GRAD_CLIP, overshoot=overshoot)

    def train_dataloader(self):
        return DataLoader(Rollouts(self, self.options.seed + 1), batch_size=None)


@torch.no_grad()
def share_exact(policy, seed):
    """Of 512 new prompts, how many the policy's likeliest answer reverses without a slip."""
    prompts = torch.randint(10, (512, DIGITS), generator=torch.Generator().manual_seed(seed))
    return float((policy(prompts).argmax(-1) == prompts.flip(1)).all(1).float().mean())


class Record(lightning.Callback):
    """What was logged, at every `log_every_n_steps`."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def train(options, progress=True):
    """One run; returns the trained policy and what the table shows."""
    lightning.seed_everything(options.seed, verbose=False)
    policy, record = Policy(options), Record()
    before = share_exact(policy, options.seed + 2)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on worker processes of the data loader, which must not copy the policy
        trainer = lightning.Trainer(
            max_steps=options.steps,
            accelerator="cpu",
            callbacks=[FusedClipCallback(), record],
            log_every_n_steps=10,
            enable_progress_bar=progress,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
            default_root_dir=folder,
        )
        trainer.fit(policy)
    tenth = max(1, len(policy.rewards) // 10)
    return policy, {
        "reward": (statistics.fmean(policy.rewards[:tenth]), statistics.fmean(policy.rewards[-tenth:])),
        "exact": (before, share_exact(policy, options.seed + 2)),
        "clip_fraction": statistics.fmean(row["clip_fraction"] for row in record.rows),
        "grad_norm": statistics.fmean(row["grad_norm"] for row in record.rows),
        "skipped": record.rows[-1]["step_count_skipped"],
        "seconds": time.perf_counter() - started,
    }


def print_table(result, options):
    print(f"\n  {options.steps} steps, overshoot rule {options.overshoot}{'start':>22}{'end':>10}")
    for title, name in (("reward, share of digits right", "reward"), ("new prompts entirely right", "exact")):
        start, end = result[name]
        print(f"  {title:<42}{start:>10.3f}{end:>10.3f}")
    print(f"  {'clipped tokens, mean of all steps':<42}{result['clip_fraction']:>20.1%}")
    print(f"  {'gradient norm before clipping, mean':<42}{result['grad_norm']:>20.3f}")
    print(f"  {'steps skipped':<42}{result['skipped']:>20.0f}")
    print(f"  {'seconds':<42}{result['seconds']:>20.1f}")


def main(arguments=None):
    options = parse_options(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    _, result = train(options)
    print_table(result, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
