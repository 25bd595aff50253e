"""The PPO objective with its gradient and statistics: `fca.policy_loss` against the same written in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import stream
from benchmarks.harness import BASELINE, REPLAY, Target, alternate, bytes_per_element, conditions_of, summarize

pytestmark = pytest.mark.benchmark(timer=REPLAY)
SECONDS_A_CASE = 40  # with compiling the peer

STREAM = "stream (ceiling)"
EAGER = "torch eager"
COMPILED = "torch.compile"
CANDIDATES = [BASELINE, EAGER, COMPILED, STREAM]
NAME = "objective-ppo"
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
LEAST_OVER = {EAGER: 3.0, COMPILED: 1.5}  # their time over ours
# Least traffic of loss, gradient and statistics: read logp, old_logp (float32), mask (bool); write dlogp.
FLOOR_BYTES_PER_TOKEN = 4 + 4 + 1 + 4


def shape_of(quick: bool) -> tuple[int, int]:
    """Sequences and tokens of each."""
    return (32, 512) if quick else (256, 4096)


def ppo_in_torch(logp, old_logp, advantages, mask) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO with clip-higher and token-mean, and the statistics of `ClipStats`, as a trainer writes them.

    Masked tokens are finite here and the ratio cannot overflow, so the guards that a trainer would need are
    left out; they would only slow this peer down.
    """
    weight = mask.to(logp.dtype)
    tokens = weight.sum()
    log_ratio = logp - old_logp
    ratio = torch.exp(log_ratio)
    loss_per_token = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)
    loss = (loss_per_token * weight).sum() / tokens
    with torch.no_grad():
        positive = advantages > 0
        clipped_low = (advantages < 0) & (ratio < 1 - CLIP_LOW) & mask
        clipped_high = positive & (ratio > 1 + CLIP_HIGH) & mask
        mass = ratio * advantages.abs() * weight / tokens
        kept_ratio = ratio * weight
        stats = {
            "tokens": tokens,
            "clipped_low": clipped_low.sum(),
            "clipped_high": clipped_high.sum(),
            "suppressed_mass": torch.where(clipped_low | clipped_high, mass, 0.0).sum(),
            "total_mass": mass.sum(),
            "kl_k1": -(log_ratio * weight).sum(),
            "kl_k2": 0.5 * (log_ratio.square() * weight).sum(),
            "kl_k3": ((ratio - 1 - log_ratio) * weight).sum(),
            "ratio_sum": kept_ratio.sum(),
            "ratio_sq_sum": kept_ratio.square().sum(),
            "ratio_min": ratio.masked_fill(~mask, torch.inf).min(),
            "ratio_max": kept_ratio.max(),
            "nonfinite": (~torch.isfinite(ratio) & mask).sum(),
        }
    return loss, stats


def ours(logp, old_logp, advantages, mask):
    """fused_clip_adam's one pass over the tokens."""
    import fused_clip_adam as fca

    return fca.policy_loss(
        logp, old_logp, advantages, mask=mask, objective=fca.PPO(clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
    )


def make_batch(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Sequences of half to all of the length, log-ratios of 0.2, so that some tokens clip."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(shape, generator=generator).abs().neg()
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), generator=generator)
    return {
        "logp": logp.requires_grad_(),
        "old_logp": logp.detach() + 0.2 * torch.randn(shape, generator=generator),
        "advantages": torch.randn((shape[0], 1), generator=generator).expand(shape),
        "mask": torch.arange(shape[1]) < lengths,
    }


def forward_backward(objective: Callable, batch: dict[str, torch.Tensor]) -> Callable[[], tuple]:
    """One measured call: it starts without a gradient, as in a training step."""

    def step() -> tuple:
        batch["logp"].grad = None
        loss, stats = objective(**batch)
        loss.backward()
        return loss, stats

    return step


def measure(quick: bool, progress: Callable[[str], None]) -> tuple[dict, dict[str, list[float]]]:
    """Same results checked -> candidates in alternation -> result and the seconds behind it."""
    shape = shape_of(quick)
    batch = make_batch(shape)
    tokens = batch["logp"].numel()
    unavailable: dict[str, str] = {}
    candidates = {BASELINE: forward_backward(ours, batch), EAGER: forward_backward(ppo_in_torch, batch)}
    if quick:
        unavailable[COMPILED] = "left out of --quick: compiles for half a minute"
    else:
        progress("objective: compiling the torch peer")
        compiled = forward_backward(torch.compile(ppo_in_torch), batch)
        try:
            compiled()
            candidates[COMPILED] = compiled
        except Exception as error:  # whatever a missing compiler or an unsupported platform raises
            unavailable[COMPILED] = f"does not compile here ({type(error).__name__})"
    deviations = check_same_results(candidates, batch)
    moved = {name: FLOOR_BYTES_PER_TOKEN * tokens if name == BASELINE else None for name in candidates}

    ceiling = None
    if (reason := stream.unavailable_reason()) is not None:
        unavailable[STREAM] = reason
    else:
        # The same bytes as the objective's floor, in arrays that stay in the caches between calls as far as the
        # objective's do: a ceiling for this call, not for the memory bus.
        ceiling = stream.Stream(tokens * FLOOR_BYTES_PER_TOKEN // bytes_per_element("update"))
        candidates[STREAM] = ceiling
        moved[STREAM] = ceiling.bytes

    measured = alternate(
        candidates,
        5 if quick else 30,
        budget_s=2 if quick else 10,
        progress=lambda text: progress(f"objective: {text}"),
    )
    summary = summarize(measured, moved, STREAM if ceiling is not None else None)
    targets = [
        Target(peer, "over_ours", least, summary[peer]["over_ours"]["p50"] if peer in summary else None)
        for peer, least in LEAST_OVER.items()
    ]
    result = {
        "title": f"PPO loss, gradient and statistics, {shape[0]} x {shape[1]} tokens",
        "baseline": BASELINE,
        "elements": tokens,
        "dtype": "float32",
        **conditions_of(measured),
        "ceiling": None if ceiling is None else ceiling.describe(measured.time(STREAM).p50),
        "same_work_deviation": deviations,
        "candidates": summary,
        "unavailable": unavailable,
        "targets": [] if quick else [target.to_dict() for target in targets],
    }
    return result, measured.seconds


def check_same_results(candidates: dict[str, Callable[[], tuple]], batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Compares loss, every statistic and the gradient with the eager form's in float64.

    Raises:
        AssertionError: a candidate computes something else, so that its time does not count.
    """
    exact_batch = {key: x.detach().double() if x.is_floating_point() else x for key, x in batch.items()}
    exact_batch["logp"].requires_grad_()
    exact_loss, exact_stats = forward_backward(ppo_in_torch, exact_batch)()
    exact_grad = exact_batch["logp"].grad
    deviations = {}
    for name, step in candidates.items():
        loss, stats = step()
        grad_error = (batch["logp"].grad - exact_grad).norm() / exact_grad.norm()
        deviations[name] = float(grad_error)
        # A float32 ratio next to a bound may fall on its other side: a few tokens in a million.
        assert grad_error < 1e-2, f"{name}: gradient off by {grad_error:.1e}"
        torch.testing.assert_close(loss.detach().double(), exact_loss.detach(), rtol=1e-4, atol=1e-6)
        values = stats if isinstance(stats, dict) else stats.to_dict()
        for key, exact in exact_stats.items():
            actual = torch.as_tensor(float(values[key]), dtype=torch.float64)
            torch.testing.assert_close(
                actual,
                exact.double(),
                rtol=1e-3,
                atol=5.0 if key.startswith("clipped") else 1e-2,
                msg=lambda text, key=key, name=name: f"{name}, {key}: {text}",
            )
    return deviations


@pytest.fixture(scope="module")
def measured(quick, progress, publish):
    result, seconds = measure(quick, progress)
    publish(NAME, result)
    return result, seconds


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_objective(measured, candidate, benchmark, assert_targets):
    """A row of pytest-benchmark's table; the candidates were timed in alternation."""
    result, seconds = measured
    if candidate in result["unavailable"]:
        pytest.skip(f"{candidate}: {result['unavailable'][candidate]}")
    benchmark.group = NAME
    REPLAY.replay(benchmark, seconds[candidate])
    assert_targets(result, candidate)
