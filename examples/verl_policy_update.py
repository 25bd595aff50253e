"""verl's policy update without its cluster: its configuration, its registry of losses, its optimizer, one small policy.

verl's own configuration files and command-line overrides make the actor's configuration; `get_policy_loss_fn` and
`build_optimizer` make of it the loss and the optimizer, as verl's workers do. A random two-layer Qwen2 learns by GRPO
to repeat a string of digits, which nobody shows it: four optimizer steps on every rollout, so that ratios move and the
clip acts. Every loss starts from the same weights. Half a minute for two losses on one CPU core.

    python examples/verl_policy_update.py --losses vanilla fused_ppo fused_gspo
    python examples/verl_policy_update.py --overshoot brake
"""

import argparse
import logging
import os
import statistics
import sys
import time
from copy import deepcopy

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network

import torch

OVERSHOOT_RULES = ["none", "align", "align-element", "cautious", "brake"]
DIGITS, LENGTH = 8, 4  # how many different digits there are, and how long a string is
PROMPTS, GROUP, EPOCHS = 32, 8, 4  # prompts of a rollout, responses to each, optimizer steps on it
LAST = 10  # rollouts that the table's numbers are means of
METRICS = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/suppressed_mass", "actor/ess")


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--losses", nargs="+", default=["vanilla", "fused_ppo"], help="loss_mode of each run (default: both PPO losses)"
    )
    parser.add_argument("--rollouts", type=int, default=60, help="of each run (default: 60)")
    parser.add_argument("--overshoot", choices=OVERSHOOT_RULES, default="none", help="momentum rule; none is AdamW")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and sampling (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few rollouts, little learning")
    options = parser.parse_args(arguments)
    if options.rollouts < LAST:
        parser.error(f"--rollouts must be at least {LAST}, got {options.rollouts}")
    if options.quick:
        options.rollouts = LAST
    return options


def actor_config(loss, options):
    """verl's ActorConfig, from its own files and the overrides that its command line would take."""
    import verl
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    rule = "null" if options.overshoot == "none" else options.overshoot
    overrides = [
        f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64",
        "actor_rollout_ref.actor.loss_agg_mode=token-mean",
        f"actor_rollout_ref.actor.optim.lr={options.lr}",
        "actor_rollout_ref.actor.optim.weight_decay=0.0",
        "actor_rollout_ref.actor.optim.optimizer_impl=fused_clip_adam.integrations.verl",
        "actor_rollout_ref.actor.optim.optimizer=FusedClipAdamW",
        f"actor_rollout_ref.actor.optim.override_optimizer_config={{grad_clip: 1.0, overshoot: {rule}}}",
        "actor_rollout_ref.actor.optim.clip_grad=inf",  # the optimizer clips
    ]
    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    with initialize_config_dir(folder, version_base=None):
        return omega_conf_to_dataclass(compose("ppo_trainer", overrides).actor_rollout_ref.actor)


def make_policy():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=DIGITS, max_position_embeddings=2 * LENGTH, tie_word_embeddings=False, **shape, **heads)
    )


def log_probs(policy, tokens):
    """log pi of the responses' tokens, [B, LENGTH]."""
    logits = policy(input_ids=tokens).logits[:, LENGTH - 1 : -1]
    return logits.log_softmax(-1).gather(-1, tokens[:, LENGTH:].unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def play(policy):
    """A rollout: (prompts and sampled responses [B, 2 LENGTH], share of digits that are the prompt's [B])."""
    tokens = torch.randint(DIGITS, (PROMPTS, LENGTH)).repeat_interleave(GROUP, 0)
    for _ in range(LENGTH):
        logits = policy(input_ids=tokens).logits[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    right = tokens[:, LENGTH:] == tokens[:, :LENGTH]
    return tokens, right.float().mean(1)


def update(policy, optimizer, loss_of, config, tokens, advantages, old_log_prob):
    """One optimizer step on a rollout, in micro-batches, each with verl's loss; the mean of their metrics."""
    mask = torch.ones_like(old_log_prob, dtype=torch.bool)
    counts = {"dp_size": 1, "batch_num_tokens": mask.numel(), "global_batch_size": len(mask), "loss_scale_factor": None}
    config.global_batch_info.update(counts)
    seen = []
    optimizer.zero_grad()
    for rows in torch.arange(len(tokens)).split(config.ppo_micro_batch_size_per_gpu):
        loss, metrics = loss_of(
            old_log_prob=old_log_prob[rows],
            log_prob=log_probs(policy, tokens[rows]),
            advantages=advantages[rows],
            response_mask=mask[rows],
            loss_agg_mode=config.loss_agg_mode,
            config=config,
            rollout_is_weights=None,
        )
        loss.backward()
        seen.append(metrics)
    optimizer.step()
    return {name: statistics.fmean(own[name] for own in seen) for name in seen[0]}


def train(loss, policy, options):
    """One run; says every tenth of it how far it is. Returns a record."""
    import numpy as np
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
    from verl.workers.config import build_optimizer

    torch.manual_seed(options.seed)
    config = actor_config(loss, options)
    loss_of, grpo = get_policy_loss_fn(loss), get_adv_estimator_fn("grpo")
    optimizer = build_optimizer(policy.parameters(), config.optim)
    groups = np.repeat(np.arange(PROMPTS), GROUP)
    started, rewards, metrics = time.perf_counter(), [], []
    for i in range(options.rollouts):
        tokens, reward = play(policy)
        scores = torch.zeros(len(tokens), LENGTH)
        scores[:, -1] = reward  # verl's advantages are of token-level rewards
        advantages, _ = grpo(token_level_rewards=scores, response_mask=torch.ones_like(scores), index=groups)
        with torch.no_grad():
            old_log_prob = log_probs(policy, tokens)
        for _ in range(EPOCHS):
            metrics.append(update(policy, optimizer, loss_of, config, tokens, advantages, old_log_prob))
        rewards.append(float(reward.mean()))
        if (i + 1) * 10 // options.rollouts > i * 10 // options.rollouts:
            now = f"reward {rewards[-1]:.2f}  clipped {metrics[-1]['actor/pg_clipfrac']:5.1%}"
            print(f"  {loss:<12} rollout {i + 1:>4} of {options.rollouts}  {now}", flush=True)
    last = metrics[-LAST * EPOCHS :]
    return {
        "loss": loss,
        "first": statistics.fmean(rewards[:LAST]),
        "reward": statistics.fmean(rewards[-LAST:]),
        "seconds": time.perf_counter() - started,
        **{name: statistics.fmean(own[name] for own in last) for name in METRICS if name in last[0]},
    }


def print_table(runs):
    print(f"\n  means of the last {LAST} rollouts; chance is {1 / DIGITS:.2f}")
    print(f"  {'':<12}{'reward':>8}{'at first':>10}{'clipped':>9}{'KL':>9}{'suppressed':>12}{'ESS':>7}{'seconds':>9}")
    for run in runs:
        clipped, kl, suppressed, ess = (run.get(name) for name in METRICS)
        cells = [
            f"{clipped:>9.1%}",
            f"{kl:>9.4f}",
            f"{'':>12}" if suppressed is None else f"{suppressed:>12.1%}",
            f"{'':>7}" if ess is None else f"{ess:>7.3f}",
        ]
        print(f"  {run['loss']:<12}{run['reward']:>8.2f}{run['first']:>10.2f}{''.join(cells)}{run['seconds']:>9.0f}")


def main(arguments=None):
    options = parse_options(arguments)
    logging.disable(logging.WARNING)  # verl says that it found no accelerator
    import fused_clip_adam.integrations.verl  # noqa: F401  where the package is installed verl finds it by itself

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    policy = make_policy()
    runs = [train(loss, deepcopy(policy), options) for loss in options.losses]
    print_table(runs)
    return runs


if __name__ == "__main__":
    main()
    sys.exit(0)
