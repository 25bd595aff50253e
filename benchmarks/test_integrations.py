"""What the user of a trainer pays: a step of each trainer as it comes and with our loss and optimizer, in alternation.

Loss, backward pass, clip and step together, on the same inputs and from the same weights. The ceiling's time over ours
is the share of it all that the least traffic of an optimizer takes: no optimizer can save more.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import fused_clip_adam as fca
from benchmarks import stream
from benchmarks.harness import BASELINE, REPLAY, ROOT, alternate, conditions_of, summarize
from benchmarks.test_scores import largest_resident_set

pytestmark = pytest.mark.benchmark(timer=REPLAY)
SECONDS_A_CASE = 18

STREAM = stream.NAME
LR, CLIP = 1e-5, 0.05  # of both: small steps, since they are repeated on one batch; a clip that acts
EPS = 1e-3  # so large that weights show whether gradients were clipped: at 1e-8 Adam does not notice their scale
# Of the total update of three steps: seen 1e-5, from sums of the same terms in another order.
SAME_WEIGHTS = 1e-3


@dataclass(frozen=True)
class Comparison:
    """Candidates of a case, ours first, and the parameters that each trains."""

    steps: dict[str, Callable[[], object]]
    params: dict[str, list[torch.Tensor]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A trainer.

    Args:
        make: whether quick -> what is compared.
        candidates: ours and its own way.
        needs: module that has to be there; None: nothing but torch.
        install: the command that brings it.
    """

    title: str
    make: Callable[[bool], Comparison]
    candidates: tuple[str, ...]
    needs: str | None = None
    install: str | None = None

    @property
    def unavailable(self) -> str | None:
        """Why it is not measured here, or None."""
        if self.needs is None or importlib.util.find_spec(self.needs) is not None:
            return None
        return f"{self.needs} is not installed: {self.install}"


def example(name: str):
    """A module of examples/, which are programs and no package."""
    if (folder := str(ROOT / "examples")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


# ---------------------------------------------------------------- transformers and TRL

PLAIN_LOSS = "ours, the trainer's loss"
TRAINERS_OWN = "own loss and clip, AdamW(fused)"
TRAINING = dict(
    lr_scheduler_type="constant",
    learning_rate=LR,
    use_cpu=True,
    bf16=False,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)


def torch_adamw(params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, eps=EPS, weight_decay=0.0, fused=True)


def our_adamw(params) -> fca.FusedClipAdamW:
    return fca.FusedClipAdamW(params, lr=LR, eps=EPS, weight_decay=0.0, grad_clip=CLIP)


def make_qwen2(quick: bool):
    """Some 13M parameters; `quick`: 20k. The same weights each time."""
    task = example("grpo_task")
    tokenizer = task.make_tokenizer()
    torch.manual_seed(0)
    return task.make_model(tokenizer, *((16, 1) if quick else (512, 4))), tokenizer


def trainer_step(trainer, loss_of: Callable) -> Callable[[], None]:
    """What a transformers Trainer does between two batches, but for its callbacks and its log."""
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model

    def step() -> None:
        loss_of(model)
        norm = trainer._clip_grad_norm(model) if trainer.args.max_grad_norm > 0 else None
        trainer._get_grad_norm(model, grad_norm=norm)
        trainer.optimizer.step()
        model.zero_grad()

    return step


def compare_trl(quick: bool) -> Comparison:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from fused_clip_adam.integrations.trl import FusedGRPOTrainer

    task, rows, columns = example("grpo_task"), 8, example("grpo_task").COMPLETION_LENGTH

    def make(cls, optimizer):
        model, tokenizer = make_qwen2(quick)
        config = GRPOConfig(
            **TRAINING,
            output_dir=folder,
            per_device_train_batch_size=rows,
            num_generations=rows,
            max_completion_length=columns,
            gradient_checkpointing=False,
            max_grad_norm=CLIP if optimizer is torch_adamw else 0,
        )
        return cls(
            model=model,
            reward_funcs=task.reward,
            args=config,
            train_dataset=Dataset.from_list(task.make_rows(rows, seed=0)),
            processing_class=tokenizer,
            optimizers=(optimizer(model.parameters()), None),
        )

    def inputs_of(trainer) -> dict[str, torch.Tensor]:
        """As generation leaves them, with log-ratios of 0.2, so that some tokens clip."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, 13, (rows, task.DIGITS + 1 + columns), generator=generator)
        with torch.no_grad():
            logp, *_ = trainer._get_per_token_logps_and_entropies(
                trainer.model, tokens, torch.ones_like(tokens), columns
            )
        prompt, completion = tokens[:, :-columns], tokens[:, -columns:]
        return {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": completion,
            "completion_mask": torch.ones_like(completion),
            "advantages": torch.randn(rows, generator=generator),
            "num_items_in_batch": torch.tensor(float(completion.numel())),
            "old_per_token_logps": logp + 0.2 * torch.randn(logp.shape, generator=generator),
        }

    def stepping(trainer) -> Callable[[], None]:
        inputs = inputs_of(trainer)

        def forward_backward(model) -> None:
            model.train()
            trainer.accelerator.backward(trainer.compute_loss(model, inputs))
            for values in trainer._metrics["train"].values():  # which the log would empty
                values.clear()

        return trainer_step(trainer, forward_backward)

    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            BASELINE: make(FusedGRPOTrainer, our_adamw),
            PLAIN_LOSS: make(GRPOTrainer, our_adamw),
            TRAINERS_OWN: make(GRPOTrainer, torch_adamw),
        }
        return _of_trainers(trainers, stepping)


def compare_transformers(quick: bool) -> Comparison:
    from transformers import Trainer, TrainingArguments

    from fused_clip_adam.integrations.transformers import FusedTrainer

    def make(cls, optimizer):
        model, _ = make_qwen2(quick)
        arguments = TrainingArguments(
            **TRAINING, output_dir=folder, max_grad_norm=CLIP if optimizer is torch_adamw else 0
        )
        return cls(model=model, args=arguments, optimizers=(optimizer(model.parameters()), None))

    def stepping(trainer) -> Callable[[], None]:
        tokens = torch.randint(3, 13, (16, 14), generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": tokens, "labels": tokens}
        return trainer_step(trainer, lambda model: trainer.training_step(model, dict(inputs)))

    with tempfile.TemporaryDirectory() as folder:
        trainers = {BASELINE: make(FusedTrainer, our_adamw), TRAINERS_OWN: make(Trainer, torch_adamw)}
        return _of_trainers(trainers, stepping)


def _of_trainers(trainers: dict, stepping: Callable) -> Comparison:
    return Comparison(
        {name: stepping(trainer) for name, trainer in trainers.items()},
        {name: list(trainer.model.parameters()) for name, trainer in trainers.items()},
    )


# ---------------------------------------------------------------- step_in_backward

ORDINARY, TORCH, TORCH_HOOKS = "ours, backward then step", "torch fused, then step", "torch fused, in hooks"
WAYS = (BASELINE, ORDINARY, TORCH, TORCH_HOOKS)  # baseline: step_in_backward
BUCKET_BYTES = 8 * 2**20  # two layers; its default is for larger models


def make_stack(way: str, layers: int, width: int) -> tuple[nn.Module, Callable[[torch.Tensor], None]]:
    """Linear layers whose gradients are as large as they are; a training step of them, no clip: AdamW in each way."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    options = {"lr": LR, "weight_decay": 0.0}
    if way == TORCH_HOOKS:  # torch's own recipe: an optimizer a parameter, stepped as its gradient is there
        own = {p: torch.optim.AdamW([p], **options, fused=True) for p in model.parameters()}

        def at_once(p: torch.Tensor) -> None:
            own[p].step()
            own[p].zero_grad()

        for p in own:
            p.register_post_accumulate_grad_hook(at_once)
        return model, lambda batch: model(batch).square().mean().backward()
    optimizer = (
        torch.optim.AdamW(model.parameters(), **options, fused=True)
        if way == TORCH
        else fca.FusedClipAdamW(model.parameters(), **options)
    )
    if way == BASELINE:
        fca.step_in_backward(model, optimizer, bucket_bytes=BUCKET_BYTES)

    def step(batch: torch.Tensor) -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def grown(way: str, layers: int, width: int, batch: int) -> float:
    """By how many times all gradients the third step raises the largest resident set, in a process of its own.

    The ways with a gradient hold it after the backward pass; two steps before have made moments and buffers, and their
    gradients' memory has gone back to the system.
    """
    code = f"from benchmarks import test_integrations as t; t.print_grown({way!r}, {layers}, {width}, {batch})"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    return float(done.stdout.split()[-1])


def compare_in_backward(batch: int, quick: bool) -> Comparison:
    layers, width = (3, 64) if quick else (24, 1024)
    made = {way: make_stack(way, layers, width) for way in WAYS}
    data = torch.randn(batch, width, generator=torch.Generator().manual_seed(1))
    ways = (BASELINE,) if quick else WAYS
    peaks = {way: grown(way, layers, width, batch) for way in ways}
    return Comparison(
        {way: (lambda step=step: step(data)) for way, (_, step) in made.items()},
        {way: list(model.parameters()) for way, (model, _) in made.items()},
        [f"peak memory of a step over that of all gradients: {', '.join(f'{w} {p:.2f}' for w, p in peaks.items())}"],
    )


def print_grown(way: str, layers: int, width: int, batch: int) -> None:
    """What the process of `grown` runs. Linux: the largest resident set is started anew before the step."""
    model, step = make_stack(way, layers, width)
    data = torch.ones(batch, width)
    for _ in range(2):
        step(data)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = largest_resident_set()
    step(data)
    print((largest_resident_set() - before) / sum(p.nbytes for p in model.parameters()))


# ---------------------------------------------------------------- trainers of policies for control

PPO_OWN, RSL_OWN = "own PPO and clip, AdamW(fused)", "own PPO and clip, Adam"
LIGHTNING_OWN = "loss in torch, AdamW(fused)"
HIDDEN = 512


def compare_sb3(quick: bool) -> Comparison:
    """`train()` on a rollout: 4 epochs of 4 minibatches. SB3 clips on both sides: it takes the norm whatever the bound,
    so that a second one in the optimizer would only cost.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    from fused_clip_adam.integrations.stable_baselines3 import FusedPPO

    hidden, horizon = (16, 8) if quick else (HIDDEN, 64)

    def make(cls):
        ours = cls is FusedPPO
        adamw = {"weight_decay": 0.0, "eps": EPS, **({} if ours else {"fused": True})}
        model = cls(
            "MlpPolicy",
            make_vec_env("CartPole-v1", 4, seed=0),
            n_steps=horizon,
            batch_size=horizon,
            n_epochs=4,
            learning_rate=LR,
            max_grad_norm=CLIP,
            policy_kwargs={
                "net_arch": [hidden, hidden],
                "optimizer_class": fca.FusedClipAdamW if ours else torch.optim.AdamW,
                "optimizer_kwargs": adamw,
            },
            seed=0,
            device="cpu",
        )
        _, callback = model._setup_learn(4 * horizon)
        model.collect_rollouts(model.env, callback, model.rollout_buffer, horizon)
        return model

    def train(model) -> Callable[[], None]:
        def call() -> None:
            import numpy as np

            np.random.seed(0)  # SB3 shuffles with it: the same minibatches for each
            model.train()
            model.logger.name_to_value.clear()

        return call

    models = {BASELINE: make(FusedPPO), PPO_OWN: make(PPO)}
    return Comparison(
        {name: train(model) for name, model in models.items()},
        {name: list(model.policy.parameters()) for name, model in models.items()},
    )


def compare_rsl_rl(quick: bool) -> Comparison:
    """`update()` on a rollout: 4 epochs of 4 minibatches. rsl-rl clips actor and critic apart; here nothing is clipped,
    but each takes its norm.
    """
    reach = example("rsl_rl_reach")
    hidden, arms, bound = (16, 16, 1e9) if quick else (HIDDEN, 64, 1e9)

    def make(ours: bool):
        options = reach.parse_options(["--arms", str(arms), "--lr", str(LR), "--grad-clip", str(bound)])
        options.plain = not ours
        config = reach.configuration(options)
        config["algorithm"] |= {
            "num_learning_epochs": 4,
            "schedule": "fixed",
            "optimizer": "fused_clip_adam:FusedClipAdam",
        }
        if not ours:
            config["algorithm"]["optimizer"] = "adam"
        for network in ("actor", "critic"):
            config[network]["hidden_dims"] = [hidden, hidden]
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):  # rsl-rl prints its models
            runner = reach.OnPolicyRunner(reach.ReachEnv(arms, 0), config)
            runner.alg.update = dict  # a rollout and no step on it
            runner.learn(1)
        del runner.alg.update
        return runner.alg

    def update(alg) -> Callable[[], None]:
        def call() -> None:
            torch.manual_seed(0)  # rsl-rl shuffles with it
            alg.update()

        return call

    algorithms = {BASELINE: make(True), RSL_OWN: make(False)}
    return Comparison(
        {name: update(alg) for name, alg in algorithms.items()},
        {name: [*alg.actor.parameters(), *alg.critic.parameters()] for name, alg in algorithms.items()},
    )


def compare_torchrl(quick: bool) -> Comparison:
    """Loss, backward, clip and step on a batch of recorded samples."""
    os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss

    from fused_clip_adam.integrations.torchrl import FusedClipPPOLoss

    cells, rows = [16 if quick else HIDDEN] * 2, 64 if quick else 1024

    def make(cls, optimizer):
        torch.manual_seed(0)
        actor = ProbabilisticActor(
            TensorDictModule(MLP(8, 5, num_cells=cells), ["observation"], ["logits"]),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        loss = cls(actor, ValueOperator(MLP(8, 1, num_cells=cells), in_keys=["observation"]), entropy_coeff=0.01)
        batch = TensorDict({"observation": torch.randn(rows, 8)}, [rows])
        with torch.no_grad():
            batch = actor(batch)
        batch["advantage"], batch["value_target"] = torch.randn(rows, 1), torch.randn(rows, 1)
        batch["action_log_prob"] = batch["action_log_prob"] + 0.2 * torch.randn(rows)
        own = optimizer(loss.parameters())

        def step() -> None:
            losses = loss(batch)
            sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
            if isinstance(own, fca.FusedClipAdamW):
                own.observe(loss.stats)
            else:
                clip_grad_norm_(loss.parameters(), CLIP)
            own.step()
            own.zero_grad()

        return step, list(loss.parameters())

    made = {BASELINE: make(FusedClipPPOLoss, our_adamw), PPO_OWN: make(ClipPPOLoss, torch_adamw)}
    return Comparison({name: step for name, (step, _) in made.items()}, {name: p for name, (_, p) in made.items()})


def compare_lightning(quick: bool) -> Comparison:
    """`fit` for 40 batches of recorded samples, what it sets up included: 4 epochs."""
    import logging
    import warnings

    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    from fused_clip_adam.integrations.lightning import observe

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    hidden, rows = (16, 64) if quick else (HIDDEN, 256)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(10 * rows, 8, generator=generator),
        torch.randint(5, (10 * rows, 1), generator=generator),
        torch.randn(10 * rows, generator=generator),
    )

    class Policy(lightning.LightningModule):
        def __init__(self, optimizer):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 5)
            )
            self.own = optimizer(self.parameters())

        def training_step(self, batch, batch_idx):
            states, actions, advantages = batch
            logp = self.net(states).log_softmax(-1).gather(-1, actions).squeeze(-1)
            if not isinstance(self.own, fca.FusedClipAdamW):
                ratio = (logp - logp.detach()).exp()
                return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
            loss, stats = fca.policy_loss(logp, logp.detach(), advantages)
            observe(self.optimizers(), stats)
            return loss

        def configure_optimizers(self):
            return self.own

    def fit(policy: Policy) -> None:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=4,
            gradient_clip_val=None if isinstance(policy.own, fca.FusedClipAdamW) else CLIP,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on worker processes of the data loader
            trainer.fit(policy, DataLoader(data, batch_size=rows))

    policies = {BASELINE: Policy(our_adamw), LIGHTNING_OWN: Policy(torch_adamw)}
    return Comparison(
        {name: (lambda policy=policy: fit(policy)) for name, policy in policies.items()},
        {name: list(policy.parameters()) for name, policy in policies.items()},
    )


def compare_verl(quick: bool) -> Comparison:
    """An optimizer step with verl's registered losses and its own configuration, without its workers."""
    task = example("verl_policy_update")
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    import fused_clip_adam.integrations.verl  # noqa: F401  where the package is installed verl finds it by itself

    generator, rows = torch.Generator().manual_seed(1), 32
    tokens = torch.randint(task.DIGITS, (rows, 2 * task.LENGTH), generator=generator)
    advantages = torch.randn(rows, 1, generator=generator).expand(-1, task.LENGTH)
    drift = 0.2 * torch.randn(rows, task.LENGTH, generator=generator)

    def clip_of(params: list[torch.Tensor]) -> Callable:
        def clip(*_) -> None:
            clip_grad_norm_(params, CLIP)

        return clip

    def make(loss: str, optimizer):
        policy, _ = make_qwen2(quick)
        config = task.actor_config(loss, task.parse_options(["--lr", str(LR)]))
        with torch.no_grad():
            old = task.log_probs(policy, tokens) + drift
        own, loss_of = optimizer(policy.parameters()), get_policy_loss_fn(loss)
        if optimizer is torch_adamw:
            own.register_step_pre_hook(clip_of(list(policy.parameters())))
        return lambda: task.update(policy, own, loss_of, config, tokens, advantages, old), list(policy.parameters())

    made = {BASELINE: make("fused_ppo", our_adamw), TRAINERS_OWN: make("vanilla", torch_adamw)}
    return Comparison({name: step for name, (step, _) in made.items()}, {name: p for name, (_, p) in made.items()})


# ---------------------------------------------------------------- cases

IN_TRAINERS = "make bench-trainers"
CASES = {
    "integration-trl": Case(
        "TRL: an optimization step of GRPO, a small Qwen2, 8 completions",
        compare_trl,
        (BASELINE, PLAIN_LOSS, TRAINERS_OWN),
        "trl",
        "pip install trl",
    ),
    "integration-transformers": Case(
        "transformers: a step of Trainer, a small Qwen2, 16 rows of 14 tokens",
        compare_transformers,
        (BASELINE, TRAINERS_OWN),
        "transformers",
        "pip install transformers accelerate",
    ),
    "integration-in-backward-8": Case(
        "step_in_backward: backward and step of linear layers, 8 rows, buckets of 8 MiB",
        lambda quick: compare_in_backward(8, quick),
        WAYS,
    ),
    "integration-in-backward-256": Case(
        "step_in_backward: backward and step of linear layers, 256 rows, buckets of 8 MiB",
        lambda quick: compare_in_backward(256, quick),
        WAYS,
    ),
    "integration-sb3": Case(
        "Stable-Baselines3: train() of PPO on a rollout",
        compare_sb3,
        (BASELINE, PPO_OWN),
        "stable_baselines3",
        IN_TRAINERS,
    ),
    "integration-torchrl": Case(
        "torchrl: a step of ClipPPOLoss on a batch of samples",
        compare_torchrl,
        (BASELINE, PPO_OWN),
        "torchrl",
        IN_TRAINERS,
    ),
    "integration-rsl-rl": Case(
        "rsl-rl: update() of PPO on a rollout, no bound that is reached",
        compare_rsl_rl,
        (BASELINE, RSL_OWN),
        "rsl_rl",
        IN_TRAINERS,
    ),
    "integration-lightning": Case(
        "Lightning: fit() of 40 steps",
        compare_lightning,
        (BASELINE, LIGHTNING_OWN),
        "lightning",
        IN_TRAINERS,
    ),
    "integration-verl": Case(
        "verl: an optimizer step with its losses, a small Qwen2, 32 rows, without its workers",
        compare_verl,
        (BASELINE, TRAINERS_OWN),
        "verl",
        IN_TRAINERS,
    ),
}


def measure(case: Case, quick: bool, progress: Callable[[str], None]) -> tuple[dict, dict[str, list[float]]]:
    """Same weights after three steps checked -> candidates in alternation -> result and the seconds behind it."""
    progress(f"{case.title}: models")
    compared = case.make(quick)
    assert tuple(compared.steps) == case.candidates
    deviations = check_same_weights(compared)
    elements = sum(p.numel() for p in compared.params[BASELINE])
    candidates, moved = dict(compared.steps), dict.fromkeys(compared.steps)  # who counts the bytes of a forward pass?
    ceiling, unavailable = stream.add_ceiling(candidates, moved, elements)
    measured = alternate(
        candidates,
        5 if quick else 25,
        budget_s=1 if quick else 8,
        progress=lambda text: progress(f"{case.title}: {text}"),
    )
    rows = summarize(measured, moved, STREAM if ceiling is not None else None)
    result = {
        "title": f"{case.title} (elements: {elements:,})",
        "baseline": BASELINE,
        "integration": case.needs or "torch",
        "measured_by": IN_TRAINERS if case.install == IN_TRAINERS else None,
        "elements": elements,
        "dtype": "float32",
        **conditions_of(measured),
        "ceiling": None if ceiling is None else ceiling.describe(measured.time(STREAM).p50),
        "same_work_deviation": deviations,
        "candidates": rows,
        "unavailable": unavailable,
        "notes": compared.notes,
        "targets": [],
    }
    return result, measured.seconds


def check_same_weights(compared: Comparison, steps: int = 3) -> dict[str, float]:
    """Runs some steps of each and compares the weights with those of the trainer's own way, the last candidate.

    Raises:
        AssertionError: a candidate starts elsewhere, does not move, or moves elsewhere.
    """

    def weights() -> dict[str, torch.Tensor]:
        return {
            name: torch.cat([p.detach().double().flatten() for p in params]) for name, params in compared.params.items()
        }

    start = weights()
    for step in compared.steps.values():
        for _ in range(steps):
            step()
    end, reference = weights(), list(compared.steps)[-1]
    update = end[reference] - start[reference]
    assert update.norm() > 0, f"{reference} does not move"
    deviations = {}
    for name in compared.steps:
        assert torch.equal(start[name], start[reference]), f"{name} starts from other weights"
        deviations[name] = float((end[name] - end[reference]).norm() / update.norm())
        assert deviations[name] <= SAME_WEIGHTS, f"{name} does other work: off by {deviations[name]:.1e}"
    return deviations


@pytest.mark.parametrize(
    ("name", "candidate"),
    [(name, candidate) for name, case in CASES.items() for candidate in (*case.candidates, STREAM)],
)
def test_integration(name, candidate, measure_once, benchmark, assert_targets):
    """A row of pytest-benchmark's table; its group is the trainer, timed in alternation."""
    if (reason := CASES[name].unavailable) is not None:
        pytest.skip(reason)
    result, seconds = measure_once(name)
    if candidate in result["unavailable"]:
        pytest.skip(f"{candidate}: {result['unavailable'][candidate]}")
    benchmark.group = name
    REPLAY.replay(benchmark, seconds[candidate])
    assert_targets(result, candidate)
