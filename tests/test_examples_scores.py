"""The examples that train by scores, in short runs: their files, their table, and that they learn."""

import copy
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_clip_adam as fca

for extra in ("matplotlib", "gymnasium", "transformers"):
    pytest.importorskip(extra)
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import grpo_task  # noqa: E402
import gspo_sequences  # noqa: E402
import ppo_control  # noqa: E402


def run_quick(name, output, *arguments):
    """(what it printed, what it recorded), of the script as a user runs it."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", "--output", str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figure = (output / f"{name}.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and len(figure) > 10_000
    return done.stdout, json.loads((output / f"{name}.json").read_text())


# ---------------------------------------------------------------- control


def test_control_learns(tmp_path):
    printed, record = run_quick("ppo_control", tmp_path / "new")
    cartpole, acrobot = record["runs"]
    assert (cartpole["env"], acrobot["env"]) == ("CartPole-v1", "Acrobot-v1")
    assert "CartPole-v1     mean" in printed and "Acrobot-v1      mean" in printed
    assert len(cartpole["evaluation"]) == len(acrobot["evaluation"]) == 100
    # A policy that does not learn has about 22, and -499 or so.
    assert statistics.fmean(cartpole["evaluation"]) > 60
    assert statistics.fmean(acrobot["evaluation"]) > -400
    assert cartpole["curve"][-1][1] > 1.5 * cartpole["curve"][0][1]
    assert 0 < cartpole["clip_fraction"] < 0.3  # the clip is at work


def options(*arguments):
    return ppo_control.parse_options(["--quick", "--env", "CartPole-v1", *arguments])


def test_control_by_scores_is_ppo():
    """On one rollout, the same minibatches by scores and by backward() move the policy alike."""
    by_scores, ordinary = (ppo_control.Run("CartPole-v1", 3, options(*more)) for more in ((), ("--ordinary",)))
    before = copy.deepcopy(by_scores.policy)
    torch.manual_seed(4)
    rollout = by_scores.collect()
    shares = []
    for run in (by_scores, ordinary):
        torch.manual_seed(5)
        shares.append(run.improve(rollout))
    assert shares[0] == pytest.approx(shares[1], abs=1e-3) and shares[0] > 0
    for start, p, q in zip(*(module.state_dict().values() for module in (before, by_scores.policy, ordinary.policy))):
        assert float((p - q).norm()) < 0.02 * float((p - start).norm())


def test_advantages_of_control():
    """Generalised advantages against their sum, episode by episode; a cut episode goes on by the critic's value."""
    run = ppo_control.Run("CartPole-v1", 0, options())
    with torch.no_grad():
        run.critic[-1].bias.fill_(3.0)  # so that a forgotten bootstrap shows
    played = []
    step = run.envs.step

    def recorded(actions):
        states, rewards, ended, cut, info = step(actions)
        cut = cut | (len(played) % 7 == 6) & ~ended  # as if a time limit had struck
        finals = [info["final_obs"][i] if ended[i] else states[i] for i in range(len(ended))]
        played.append((rewards, ended, cut, finals))
        return states, rewards, ended, cut, {"final_obs": finals}

    run.envs.step = recorded
    rollout = run.collect()
    T, n = run.task.horizon, run.task.envs
    with torch.no_grad():
        values = run.critic(rollout.states).view(T, n)
        following = run.critic(torch.tensor(played_states(played)).float()).squeeze(-1)
    assert sum(ended.sum() for _, ended, _, _ in played) > 0
    for i in range(n):
        for t in (0, 5, 100):
            expected, weight = 0.0, 1.0
            for k in range(t, T):
                rewards, ended, cut, _ = played[k]
                after = 0.0 if ended[i] else float(following[k, i])
                expected += weight * (rewards[i] + ppo_control.GAMMA * after - float(values[k, i]))
                weight *= ppo_control.GAMMA * ppo_control.LAMBDA
                if ended[i] or cut[i]:
                    break
            target = float(rollout.targets.view(T, n)[t, i])
            assert target - float(values[t, i]) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert float(rollout.advantages.mean()) == pytest.approx(0, abs=1e-4)
    assert float(rollout.advantages.std()) == pytest.approx(1, abs=1e-3)


def played_states(played):
    return [[state.tolist() for state in finals] for *_, finals in played]


def test_control_refuses():
    with pytest.raises(SystemExit):
        options("--seeds", "0")


# ---------------------------------------------------------------- sequences


def test_sequences_learn(tmp_path):
    printed, record = run_quick("gspo_sequences", tmp_path / "new")
    rewards = [rollout["reward"] for rollout in record["rollouts"]]
    assert len(rewards) == 4 and len(record["steps"]) == 4 * gspo_sequences.STEPS_PER_ROLLOUT
    assert rewards[-1] > rewards[0] + 0.04
    assert "held-out prompts entirely right" in printed
    clipped = [step["clipped"] for step in record["steps"]]
    assert clipped[0] == 0 and max(clipped) > 0.3  # every ratio starts at 1


def test_a_row_is_a_completion():
    """Scores of sequences against autograd: tokens after <eos> count nothing, and prompts are no actions."""
    tokenizer = grpo_task.make_tokenizer()
    model = grpo_task.make_model(tokenizer, hidden_size=16).eval()
    model.set_attn_implementation("eager")
    rollout, seen = gspo_sequences.roll_out(model, tokenizer, grpo_task.make_rows(2, seed=0))
    tokens, mask = rollout["tokens"], rollout["mask"]
    assert tokens.shape[0] == 2 * gspo_sequences.GROUP and 0 <= seen["reward"] <= 1
    completions = tokens[:, -mask.shape[1] :]
    for own, counted in zip(completions.tolist(), mask.tolist()):
        ends = own.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in own else len(own)
        assert counted == [True] * ends + [False] * (len(own) - ends)
    assert not mask.all()
    scores, logp = fca.per_sample_scores(model, gspo_sequences.log_probs, tokens, mask, chunk_size=5)
    torch.testing.assert_close(logp, rollout["old_logp"], rtol=1e-4, atol=1e-5)
    assert not logp[~mask].any()
    params = list(model.parameters())
    for b in range(0, len(tokens), 5):
        logits = model(input_ids=tokens[b : b + 1]).logits[0, grpo_task.DIGITS : -1]
        own = -torch.nn.functional.cross_entropy(logits, completions[b], reduction="none")[mask[b]].sum()
        for p, g in zip(params, torch.autograd.grad(own, params)):
            torch.testing.assert_close(scores[p][b], g, rtol=1e-3, atol=1e-5)
