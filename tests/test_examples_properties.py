"""The executable checks in examples/: small runs, their numbers, and that they fail where a property does not hold."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_clip_adam as fca

pytest.importorskip("matplotlib")  # each check ends in its figure
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import checks  # noqa: E402
import coast_after_clip  # noqa: E402
import prefix_bias  # noqa: E402
import reward_scale  # noqa: E402

SMALL_COAST = ["--tokens", "6", "--vocabulary", "8", "--steps-after", "12"]
SMALL_SCALE = ["--rollouts", "8", "--decades", "2", "--large-eps", "1e-2"]
SMALL_PREFIX = ["--group", "8", "--spreads", "3", "--draws", "8", "--steps", "20"]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


# ---------------------------------------------------------------- what they share


def test_verdict(capsys):
    good, bad = checks.Check("good", 1.0, "<=", 1.0), checks.Check("bad", 0.5, ">=", 1.0)
    assert checks.verdict([good]) == 0
    assert checks.verdict([good, bad]) == 1
    assert "1 of 2 hold" in capsys.readouterr().out
    assert not checks.Check("NaN", math.nan, "<=", 1.0).holds and not checks.Check("NaN", math.nan, ">=", 1.0).holds
    assert checks.largest([1.0, 3.0, 2.0]) == 3.0 and math.isnan(checks.largest([1.0, math.nan]))


# ---------------------------------------------------------------- coast


def test_coast_after_the_clip(tmp_path):
    path = tmp_path / "coast.png"
    assert coast_after_clip.main([*SMALL_COAST, "--output", str(path)]) == 0 and is_png(path)
    options = coast_after_clip.parse_options([*SMALL_COAST, "--budget", "1.5"])
    runs, verdicts = coast_after_clip.measure(options)
    assert all(check.holds for check in verdicts) and len(verdicts) == 9

    plain, _ = runs["AdamW"]
    T = plain.T
    assert plain.ratios[T - 1] <= 1.28 < plain.ratios[T] and plain.c == 1.0
    for k in (1, 5, 12):  # by hand, eps aside
        A = 0.9**k * (1 - 0.9**T) / (1 - 0.9 ** (T + k))
        B = 0.999**k * (1 - 0.999**T) / (1 - 0.999 ** (T + k))
        assert plain.residuals[k].tolist() == pytest.approx([A / math.sqrt(B)] * 6, rel=1e-5)
    assert plain.ratios[-1] > 1.4  # the clip allowed 1.28

    brake, _ = runs["brake 0.5"]
    A = 0.45**3 * (1 - 0.9**T) / (1 - 0.45**3 * 0.9**T)
    B = 0.999**3 * (1 - 0.999**T) / (1 - 0.999 ** (T + 3))
    assert brake.T == T and brake.residuals[3].tolist() == pytest.approx([A / math.sqrt(B)] * 6, rel=1e-5)
    (held,) = (coast for name, (coast, _) in runs.items() if "1.5 updates" in name)
    assert float(held.residuals[1:].sum(0).max()) == pytest.approx(1.5, rel=1e-2)  # 12 steps of it
    for name in coast_after_clip.STOPPING:
        assert not runs[name][0].residuals[1:].any()


def test_coast_check_fails_on_another_formula(tmp_path, monkeypatch):
    # Without bias correction: what R_k is after a long history, and not after a few steps.
    wrong = lambda k, beta1, beta2, **_: (beta1 / math.sqrt(beta2)) ** k  # noqa: E731
    monkeypatch.setattr(fca.theory, "residual_ratio", wrong)
    assert coast_after_clip.main([*SMALL_COAST, "--output", str(tmp_path / "coast.png")]) == 1


def test_coast_check_refuses_what_it_cannot_measure(monkeypatch):
    monkeypatch.setattr(coast_after_clip, "LONGEST_RISE", 20)
    with pytest.raises(SystemExit, match="no token was clipped"):
        coast_after_clip.run(None, coast_after_clip.parse_options([*SMALL_COAST, "--lr", "1e-8"]))


# ---------------------------------------------------------------- reward scale


def test_reward_scale(tmp_path):
    path = tmp_path / "scale.png"
    assert reward_scale.main([*SMALL_SCALE, "--output", str(path)]) == 0 and is_png(path)


@pytest.fixture(scope="module")
def task():
    return reward_scale.Task(reward_scale.parse_options(SMALL_SCALE))


def test_an_update_without_eps_is_blind_to_a_power_of_two(task):
    setting = reward_scale.Setting(1e-2, 1e-8, atan2=True)
    one, scaled = task.train(setting), task.train(setting, 2.0**-9)
    assert torch.equal(one.parameters, scaled.parameters) and one.change(one) == 0.0
    assert float((one.parameters[-1] - one.parameters[0]).norm()) > 0.1
    assert scaled.norms == pytest.approx([norm / 2**9 for norm in one.norms], rel=1e-12)


def test_a_scale_is_another_eps_and_another_lr(task):
    adamw = reward_scale.Setting(1e-2, 1e-4)
    base = task.train(adamw)
    scaled = task.train(adamw, 0.01, base.rollouts)
    assert adamw.at_scale_one(0.01).eps == pytest.approx(1e-2)
    assert base.change(scaled) > 0.3
    assert scaled.change(task.train(reward_scale.Setting(1e-2, 1e-2), 1.0, base.rollouts)) < 1e-11
    sgd = reward_scale.Setting(0.5)
    base = task.train(sgd)
    # The first step of SGD is s times that at s = 1.
    first = [task.train(sgd, s, base.rollouts).parameters[1] - base.parameters[0] for s in (1.0, 3.0)]
    torch.testing.assert_close(first[1], 3 * first[0], rtol=1e-12, atol=1e-14)


def test_reward_scale_check_fails_where_its_large_eps_is_small(tmp_path):
    options = [*SMALL_SCALE[:-1], "2e-12", "--output", str(tmp_path / "scale.png")]
    assert reward_scale.main(options) == 1


# ---------------------------------------------------------------- prefix


def test_prefix_bias(tmp_path):
    path = tmp_path / "prefix.png"
    assert prefix_bias.main([*SMALL_PREFIX, "--output", str(path)]) == 0 and is_png(path)


def test_prefix_gradient_is_the_covariance():
    # Two tokens in common, own lengths 1, 2, 4, 8; the first two samples won.
    lengths = torch.tensor([1, 2, 4, 8])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    logits = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([1, 2])
    group = prefix_bias.Group(logits, tokens, torch.full((4, 8), -0.7, dtype=torch.float64), lengths, advantages)
    b = {
        "sequence-mean": (1 / 3 + 1 / 4 - 1 / 6 - 1 / 10) / 4,
        prefix_bias.HALVES: (2 / 7 - 2 / 16) / 2,  # a half has 7 tokens, the other 16
        **dict.fromkeys(prefix_bias.UNIFORM, 0.0),
    }
    probability = logits.detach().softmax(-1)
    assert set(b) == set(prefix_bias.WEIGHTINGS)
    for weighting, value in b.items():
        gradient = group.gradient(weighting)
        expected = -value * (torch.eye(3, dtype=torch.float64)[tokens] - probability)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    # Beyond the clip the winners drop out: b = -r * 2 / (their own weights' count), here over all 23 tokens.
    gradient = group.gradient("token-mean", 1.5)
    expected = 1.5 * 2 / 23 * (torch.eye(3, dtype=torch.float64)[tokens] - probability)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert group.bias("sequence-mean") == pytest.approx(
        (1 / 3 + 1 / 4 - 1 / 6 - 1 / 10) / (1 / 3 + 1 / 4 + 1 / 6 + 1 / 10), rel=1e-12
    )


def test_training_moves_the_prefix_under_unequal_weights_only():
    options = prefix_bias.parse_options([*SMALL_PREFIX, "--steps", "100", "--lr", "0.03"])
    uniform, lengths = prefix_bias.train("constant", options)
    biased, _ = prefix_bias.train("sequence-mean", options)
    assert len(uniform) == 100 and uniform[0] == biased[0] == pytest.approx(-math.log(16))
    assert abs(uniform[-1] - uniform[0]) < 1e-9 and biased[-1] > biased[0] + 0.1
    assert sum(lengths[-10:]) < 0.8 * sum(lengths[:10])  # it learns all the same


def test_prefix_check_fails_under_wrong_weights(tmp_path, monkeypatch):
    right = prefix_bias.Group.weights
    wrong = lambda group, weighting: right(group, "token-mean" if weighting == "sequence-mean" else weighting)  # noqa: E731
    monkeypatch.setattr(prefix_bias.Group, "weights", wrong)
    assert prefix_bias.main([*SMALL_PREFIX, "--output", str(tmp_path / "prefix.png")]) == 1


def test_a_check_runs_as_a_script(tmp_path):
    path = tmp_path / "new" / "prefix.png"
    command = [sys.executable, str(EXAMPLES / "prefix_bias.py"), *SMALL_PREFIX, "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 of 8 hold" in done.stdout and is_png(path)
    done = subprocess.run([*command, "--group", "5"], capture_output=True, text=True)
    assert done.returncode == 2 and "must be even" in done.stderr
