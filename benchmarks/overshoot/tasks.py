"""What the study trains: a small transformer that reverses digits, CartPole, Acrobot, a contextual bandit.

A task is made anew for every run from a seed, which fixes the initial policy, the data and the random numbers of
sampling: two methods with the same seed start from the same weights and see the same prompts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fused_clip_adam as fca
from benchmarks.harness import ROOT

EXAMPLES = ROOT / "examples"  # the control tasks are those of its ppo_control.py
WARM_STARTS = ROOT / "build" / "overshoot"


class Rollout(NamedTuple):
    """What a policy did, and what it is told about it.

    Args:
        inputs: tensors whose rows are samples; `log_prob` takes them.
        old_logp: [N] or [N, T], of the policy that acted.
        advantages: [N].
        mask: like `old_logp`, True where a token counts; None: all do.
        reward: what the policy earned, the quantity of the learning curve.
        targets: [N], what a critic should have said; None: there is no critic.
    """

    inputs: tuple[Tensor, ...]
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor | None
    reward: float
    targets: Tensor | None = None


@dataclass(frozen=True)
class Setting:
    """Sizes of a task.

    Args:
        rollouts: batches of rollouts in a run.
        epochs, minibatches: passes over a batch, and optimizer steps in a pass.
        lr: where the search for the best learning rate begins.
        tau: of `MedianMomentum`: a tenth of the root mean square of the clipped gradient in AdamW's pilot runs.
        kl_stop: the k3 per token at which "KL stop" leaves a batch: half of what AdamW's pilot runs end a batch with.
        tuning, held_out: how many seeds choose a learning rate, and how many measure at it.
    """

    rollouts: int
    epochs: int
    minibatches: int
    lr: float
    tau: float
    kl_stop: float
    tuning: int
    held_out: int

    @property
    def steps_per_rollout(self) -> int:
        return self.epochs * self.minibatches


class Language:
    """GRPO: reverse six digits and end. Reward: the share of tokens in their place. Held out: answers right, greedy.

    A causal transformer of 85k parameters, warm-started on a teacher that writes six digits in ten at random. 32
    prompts of 8 completions a batch.
    """

    setting = Setting(14, 4, 4, lr=2e-3, tau=5e-5, kl_stop=0.03, tuning=3, held_out=8)
    DIGITS, EQUALS, END = 6, 10, 11
    PROMPTS, GROUP = 32, 8
    WIDTH, LAYERS, HEADS = 64, 2, 4
    WARM_STEPS, WARM_BATCH, WARM_LR, SLIP = 30, 128, 2e-3, 0.6

    def __init__(self, seed: int):
        self.seed = seed
        self.random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.policy = Transformer(self.END + 1, 2 * self.DIGITS + 2, self.WIDTH, self.LAYERS, self.HEADS)
        self._warm_start()

    def collect(self) -> Rollout:
        prompts, answers = (x.repeat_interleave(self.GROUP, 0) for x in self._prompts(self.PROMPTS))
        tokens, logp = self._complete(prompts, greedy=False)
        written = tokens[:, self.DIGITS + 1 :]
        ends = (written == self.END).long()
        after_end = ends.cumsum(1) > ends
        rewards = ((written == answers) & ~after_end).float().mean(1)
        return Rollout((tokens,), logp, fca.group_advantages(rewards, self.GROUP), ~after_end, float(rewards.mean()))

    def log_prob(self, tokens: Tensor) -> Tensor:
        logits = self.policy(tokens[:, :-1])[:, self.DIGITS :]
        return logits.log_softmax(-1).gather(-1, tokens[:, self.DIGITS + 1 :, None]).squeeze(-1)

    @torch.no_grad()
    def held_out(self) -> float:
        self.random.manual_seed(10**6 + self.seed)
        prompts, answers = self._prompts(512)
        tokens, _ = self._complete(prompts, greedy=True)
        return float((tokens[:, self.DIGITS + 1 :] == answers).all(1).float().mean())

    def _prompts(self, count: int) -> tuple[Tensor, Tensor]:
        """([count, digits and "="], [count, digits reversed and the end])"""
        digits = torch.randint(10, (count, self.DIGITS), generator=self.random)
        prompts = torch.cat([digits, torch.full((count, 1), self.EQUALS)], 1)
        return prompts, torch.cat([digits.flip(1), torch.full((count, 1), self.END)], 1)

    @torch.no_grad()
    def _complete(self, tokens: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
        logps = []
        for _ in range(self.DIGITS + 1):
            logp = self.policy(tokens)[:, -1].log_softmax(-1)
            new = logp.argmax(-1, keepdim=True) if greedy else _sample(logp, self.random)
            logps.append(logp.gather(1, new))
            tokens = torch.cat([tokens, new], 1)
        return tokens, torch.cat(logps, 1)

    def _warm_start(self) -> None:
        """From a file where this seed has been warm-started before, so that all methods start from the same bits."""
        sizes = (self.DIGITS, self.WIDTH, self.LAYERS, self.WARM_STEPS, self.WARM_BATCH, self.WARM_LR, self.SLIP)
        path = WARM_STARTS / f"warm-{'-'.join(map(str, sizes))}-seed-{self.seed}.pt"
        if not path.exists():
            optimizer = torch.optim.AdamW(self.policy.parameters(), self.WARM_LR, betas=(0.9, 0.95), weight_decay=0.0)
            for _ in range(self.WARM_STEPS):
                prompts, answers = self._prompts(self.WARM_BATCH)
                slips = torch.rand(answers[:, :-1].shape, generator=self.random) < self.SLIP
                random = torch.randint(10, slips.shape, generator=self.random)
                answers[:, :-1] = torch.where(slips, random, answers[:, :-1])
                optimizer.zero_grad()
                (-self.log_prob(torch.cat([prompts, answers], 1)).mean()).backward()
                optimizer.step()
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{id(self)}")
            torch.save(self.policy.state_dict(), partial)
            partial.replace(path)  # whole or not at all, whoever else writes it
        self.policy.load_state_dict(torch.load(path))
        self.random.manual_seed(2 * 10**6 + self.seed)  # the same prompts with and without the file


def _sample(logp: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(logp.exp(), 1, generator=generator)


class Transformer(nn.Module):
    """Causal, pre-norm, learned positions: tokens [N, T] -> logits [N, T, vocabulary]."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, heads, 3 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[:T]
        return self.head(self.blocks(x, self.mask[:T, :T], is_causal=True))


class Control:
    """PPO with a critic, which keeps its own learning rate. Reward: mean return of the episodes that ended in a batch.

    Held out: mean return of new episodes, actions sampled. Both as (return - worst) / (best - worst).
    """

    name: str
    worst: float
    best: float
    setting: Setting
    environments: int
    horizon: int
    EPISODES = 32

    def __init__(self, seed: int):
        if str(EXAMPLES) not in sys.path:
            sys.path.insert(0, str(EXAMPLES))
        import ppo_control

        self.seed, self._example = seed, ppo_control
        task = replace(ppo_control.TASKS[self.name], envs=self.environments, horizon=self.horizon)
        self._run = ppo_control.Run(self.name, seed, argparse.Namespace(overshoot="none", backend="cpu"), task)
        self.policy = self._run.policy
        self._reward = 0.0

    def collect(self) -> Rollout:
        self._run.finished.clear()
        seen = self._run.collect()
        if self._run.finished:  # else none has ended: what the last batch earned
            self._reward = self._share(statistics.fmean(self._run.finished))
        return Rollout(
            (seen.states, seen.actions), seen.old_logp, seen.advantages, None, self._reward, targets=seen.targets
        )

    def log_prob(self, states: Tensor, actions: Tensor) -> Tensor:
        return self._example.log_prob(self.policy, states, actions)

    def learn_value(self, rollout: Rollout, rows: Tensor) -> None:
        self._run.step_critic(rollout.inputs[0][rows], rollout.targets[rows])

    def held_out(self) -> float:
        returns = self._example.evaluate(self.policy, self.name, 10**6 + 1000 * self.seed, self.EPISODES)
        return self._share(statistics.fmean(returns))

    def _share(self, value: float) -> float:
        return (value - self.worst) / (self.best - self.worst)


class CartPole(Control):
    name, worst, best = "CartPole-v1", 0.0, 500.0
    environments, horizon = 8, 128
    setting = Setting(24, 8, 4, lr=2e-3, tau=2e-4, kl_stop=0.003, tuning=4, held_out=12)


class Acrobot(Control):
    name, worst, best = "Acrobot-v1", -500.0, -60.0
    environments, horizon = 16, 128
    setting = Setting(20, 8, 4, lr=2e-3, tau=2e-4, kl_stop=0.004, tuning=4, held_out=12)


class Bandit:
    """A contextual bandit: 16 numbers in, 10 arms, one of them right with probability 0.8 as a hidden network has it.

    Reward: 1 for the arm that a draw names, else 0. Held out: how often the most likely arm is the hidden network's.
    """

    setting = Setting(30, 4, 4, lr=4e-3, tau=4e-4, kl_stop=0.05, tuning=4, held_out=16)
    INPUTS, ARMS, HIDDEN, CONTEXTS, RELIABLE = 16, 10, 64, 512, 0.8

    def __init__(self, seed: int):
        self.seed = seed
        self.random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.policy = nn.Sequential(
            nn.Linear(self.INPUTS, self.HIDDEN),
            nn.Tanh(),
            nn.Linear(self.HIDDEN, self.HIDDEN),
            nn.Tanh(),
            nn.Linear(self.HIDDEN, self.ARMS),
        )
        self._hidden = (torch.randn(self.INPUTS, 32), torch.randn(32, self.ARMS))

    def collect(self) -> Rollout:
        contexts, best = self._contexts(self.CONTEXTS)
        with torch.no_grad():
            logp = self.policy(contexts).log_softmax(-1)
        arms = _sample(logp, self.random)
        slips = torch.rand(len(best), generator=self.random) > self.RELIABLE
        named = torch.where(slips, torch.randint(self.ARMS, best.shape, generator=self.random), best)
        rewards = (arms.squeeze(1) == named).float()
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        return Rollout((contexts, arms), logp.gather(1, arms).squeeze(1), advantages, None, float(rewards.mean()))

    def log_prob(self, contexts: Tensor, arms: Tensor) -> Tensor:
        return self.policy(contexts).log_softmax(-1).gather(1, arms).squeeze(1)

    @torch.no_grad()
    def held_out(self) -> float:
        self.random.manual_seed(10**6 + self.seed)
        contexts, best = self._contexts(4096)
        return float((self.policy(contexts).argmax(-1) == best).float().mean())

    def _contexts(self, count: int) -> tuple[Tensor, Tensor]:
        contexts = torch.randn(count, self.INPUTS, generator=self.random)
        first, second = self._hidden
        return contexts, (torch.tanh(contexts @ first / self.INPUTS**0.5) @ second).argmax(-1)


TASKS = {"language": Language, "cartpole": CartPole, "acrobot": Acrobot, "bandit": Bandit}
