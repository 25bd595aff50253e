"""Advantages against loops over Python floats, at their edges, and without a host read."""

from __future__ import annotations

import copy
import itertools
import math
import statistics

import pytest
import torch
from cases import test_id
from hypothesis import given
from hypothesis import strategies as st
from no_sync import NoSync

import fused_clip_adam as fca

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Ten roundings of float64 in another order; a wrong n - 1, eps or weight is above 1e-4.
EXACT = dict(rtol=1e-11, atol=1e-11)

# ------------------------------------------------------------------------------------------ loops


def members(ids):
    """Per distinct id, in ascending order, the positions that hold it."""
    return [[j for j, other in enumerate(ids) if other == i] for i in sorted(set(ids))]


def moments(values):
    """(mean, unbiased std) of the finite ones; equal values have the std 0, as they would with exact sums."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return 0.0, 0.0
    mean = math.fsum(finite) / len(finite)
    return (mean, 0.0) if len(set(finite)) == 1 else (mean, statistics.stdev(finite))


def loop_advantages(rewards, ids, scale, eps):
    out = [0.0] * len(rewards)
    for group in members(ids):
        mean, std = moments([rewards[j] for j in group])
        for j in group:
            if math.isfinite(rewards[j]) and (std > 0 or scale == "none"):
                out[j] = (rewards[j] - mean) / (1.0 if scale == "none" else std + eps) if std > 0 else 0.0
    return out


def loop_smoothed(state, rewards, prompts):
    """One call on {prompt: (times, mean, variance)}, as the equations read."""
    out = [0.0] * len(rewards)
    for group in members(prompts):
        values = [rewards[j] for j in group if math.isfinite(rewards[j])]
        if not values:
            continue
        times, mean, variance = state.get(prompts[group[0]], (0, 0.0, 0.0))
        i = times + 1
        new_mean, new_std = moments(values)
        variance = ((i - 1) * variance + new_std**2 + (i - 1) / i * (new_mean - mean) ** 2) / i
        mean = mean + (new_mean - mean) / i
        state[prompts[group[0]]] = (i, mean, variance)
        for j in group:
            if math.isfinite(rewards[j]):
                new = (rewards[j] - new_mean) / new_std if new_std > 0 else 0.0
                total = (rewards[j] - mean) / math.sqrt(variance) if variance > 0 else 0.0
                out[j] = min((total / i + (1 - 1 / i) * new, new / i + (1 - 1 / i) * total), key=abs)
    return out


def loop_top(rewards, ids, keep):
    """Groups by float32 std, stably, the largest first."""
    groups = members(ids)
    stds = [torch.tensor(moments([rewards[j] for j in group])[1], dtype=torch.float64).float() for group in groups]
    order = sorted(range(len(groups)), key=lambda g: -stds[g].item())
    kept = set(order[: max(1, math.floor(keep * len(groups) + 1e-9))])
    out = [False] * len(rewards)
    for g in kept:
        for j in groups[g]:
            out[j] = True
    return out


WILD = (math.inf, -math.inf, math.nan)
values = st.one_of(st.floats(-3, 3, width=32), st.sampled_from((0.0, 1.0, 0.1, *WILD)))


@st.composite
def batches(draw):
    ids = draw(st.lists(st.integers(-2, 4), max_size=14))
    rewards = draw(st.lists(values, min_size=len(ids), max_size=len(ids)))
    # Differences whose squares float64 loses are no one's rewards; a z-score of them is the loop's rounding.
    return [0.0 if 0 < abs(r) < 1e-3 else r for r in rewards], ids


def tensors(rewards, ids, dtype=torch.float64):
    return torch.tensor(rewards, dtype=dtype), torch.tensor(ids, dtype=torch.int64)


def close_z(got, wanted, rewards, ids):
    """Nearly equal rewards magnify the roundings of their mean by mean / std."""
    for group in members(ids):
        mean, std = moments([rewards[j] for j in group])
        atol = 1e-11 + 1e-14 * abs(mean) / std if std > 0 else 1e-11
        for j in group:
            assert got[j].item() == pytest.approx(wanted[j], rel=1e-9, abs=atol)


# ------------------------------------------------------------------------------------------ group_advantages


@given(batches(), st.sampled_from(("std", "none")), st.sampled_from((0.0, 1e-6, 1e-4, 0.5)))
def test_group_advantages_are_the_loop(batch, scale, eps):
    got = fca.group_advantages(*tensors(*batch), scale=scale, eps=eps)
    close_z(got, loop_advantages(*batch, scale, eps), *batch)


@given(st.integers(1, 6), st.integers(0, 5), st.sampled_from(("std", "none")), st.randoms(use_true_random=False))
def test_sizes_are_ids_of_neighbours(size, count, scale, random):
    rewards = torch.tensor([random.choice((random.gauss(0, 1), 0.1, math.nan)) for _ in range(size * count)]).double()
    ids = torch.arange(count).repeat_interleave(size)
    order = torch.tensor(random.sample(range(size * count), size * count), dtype=torch.int64)
    by_size = fca.group_advantages(rewards, size, scale=scale)
    torch.testing.assert_close(by_size, fca.group_advantages(rewards, ids, scale=scale), **EXACT)
    shuffled = fca.group_advantages(rewards[order], (7 - 3 * ids)[order].int(), scale=scale)
    torch.testing.assert_close(shuffled, by_size[order], **EXACT)
    kept = fca.top_variance_groups(rewards, size, 0.5)
    assert torch.equal(kept, fca.top_variance_groups(rewards, ids, 0.5))


def test_group_advantages_are_those_of_trl_and_verl():
    """TRL: torch's std per row, eps 1e-4; verl: the same with 1e-6. Dr.GRPO: no division."""
    rewards = torch.randn(5, 8, dtype=torch.float64)
    centred = rewards - rewards.mean(1, keepdim=True)
    for eps in (1e-4, 1e-6):
        wanted = centred / (rewards.std(1, keepdim=True, unbiased=True) + eps)
        torch.testing.assert_close(fca.group_advantages(rewards.reshape(-1), 8, eps=eps), wanted.reshape(-1), **EXACT)
    torch.testing.assert_close(fca.group_advantages(rewards.reshape(-1), 8, scale="none"), centred.reshape(-1), **EXACT)


@pytest.mark.parametrize("scale", ("std", "none"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_groups_give_exactly_zero(dtype, scale):
    rewards = torch.tensor([0.1, 0.3, 0.7, 1e-30, 6e4, -1.1], dtype=dtype).repeat_interleave(7)
    for groups in (7, torch.arange(6).repeat_interleave(7)):
        assert not fca.group_advantages(rewards, groups, scale=scale, eps=0.0).any()
    assert not fca.group_advantages(rewards, 1, scale=scale, eps=0.0).any()
    rewards[::7] = math.nan
    assert not fca.group_advantages(rewards, 7, scale=scale, eps=0.0).any()


def test_rewards_that_are_not_finite_take_no_part():
    rewards = torch.tensor([1.0, math.nan, 3.0, -math.inf, math.nan, math.inf])
    got = fca.group_advantages(rewards, 3, scale="none")
    assert got.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    got = fca.group_advantages(rewards, 3, eps=0.0)
    torch.testing.assert_close(got, torch.tensor([-(0.5**0.5), 0.0, 0.5**0.5, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    """Narrow rewards are widened exactly; the result is float32, or float64 for float64."""
    rewards, ids = torch.randn(12).to(dtype), torch.arange(12) % 3
    out = torch.float64 if dtype == torch.float64 else torch.float32
    wide = fca.group_advantages(rewards.double(), ids)
    smoothed = fca.SmoothedAdvantage(3)(rewards, ids)
    assert fca.group_advantages(rewards, ids).dtype == smoothed.dtype == out
    assert torch.equal(fca.group_advantages(rewards, ids), wide.to(out))
    assert torch.equal(smoothed, fca.SmoothedAdvantage(3)(rewards.double(), ids).to(out))
    assert torch.equal(fca.top_variance_groups(rewards, ids), fca.top_variance_groups(rewards.double(), ids))


def test_huge_rewards_stay_finite():
    for dtype in (torch.float64, torch.float32):
        most = torch.finfo(dtype).max
        rewards = torch.tensor([most, -most, most, 0.0, 1.0, most], dtype=dtype)
        state = fca.SmoothedAdvantage(2)
        for scale, groups in itertools.product(("std", "none"), (3, 2, torch.tensor([0, 1, 0, 1, 0, 1]))):
            assert fca.group_advantages(rewards, groups, scale=scale, eps=0.0).isfinite().all()
        for _ in range(3):
            assert state(rewards, torch.tensor([0, 0, 1, 1, 0, 1])).isfinite().all()
        assert all(x.isfinite().all() for x in state.state_dict().values())


# ------------------------------------------------------------------------------------------ SmoothedAdvantage


@given(st.lists(batches(), max_size=5))
def test_smoothed_advantages_are_the_loop(calls):
    smoothed, state = fca.SmoothedAdvantage(7), {}
    for rewards, ids in calls:
        prompts = [i + 2 for i in ids]
        got = smoothed(*tensors(rewards, prompts))
        wanted = loop_smoothed(state, rewards, prompts)
        for j, prompt in enumerate(prompts):
            times, mean, variance = state.get(prompt, (0, 0.0, 0.0))
            # Roundings of the means over the smallest std that divides: today's, or the cumulative one.
            stds = (moments([rewards[k] for k in range(len(ids)) if prompts[k] == prompt])[1], math.sqrt(variance))
            least = min((s for s in stds if s > 0), default=1.0)
            assert got[j].item() == pytest.approx(wanted[j], rel=1e-9, abs=1e-11 + 1e-14 * 3 / least)
            assert smoothed.times[prompt] == times
            assert smoothed.mean[prompt].item() == pytest.approx(mean, rel=1e-11, abs=1e-13)
            assert smoothed.variance[prompt].item() == pytest.approx(variance, rel=1e-9, abs=1e-13)
    assert {p for p in range(7) if smoothed.times[p] > 0} == set(state)


def test_the_first_time_is_grpo_without_eps():
    rewards, prompts = torch.randn(12, dtype=torch.float64), torch.arange(3).repeat_interleave(4)
    got = fca.SmoothedAdvantage(3)(rewards, prompts)
    torch.testing.assert_close(got, fca.group_advantages(rewards, prompts, eps=0.0), **EXACT)


def test_equal_rewards_today_get_their_distance_from_the_past():
    smoothed, prompts = fca.SmoothedAdvantage(1), torch.zeros(4, dtype=torch.int64)
    smoothed(torch.tensor([0.0, 1.0, 0.0, 1.0]), prompts)
    got = smoothed(torch.ones(4), prompts)
    # Mean 0.75, variance (1/3 + 0 + 1/2 * 1/4) / 2 = 11/48, half of the z-score: i = 2.
    torch.testing.assert_close(got, torch.full((4,), 0.5 * 0.25 / (11 / 48) ** 0.5))


def test_unchanging_rewards_never_give_an_advantage():
    for value in (0.1, 0.3, 0.7, 1e-20, 123.456):
        smoothed, prompts = fca.SmoothedAdvantage(1), torch.zeros(8, dtype=torch.int64)
        for _ in range(20):
            assert not smoothed(torch.full((8,), value), prompts).any()
        assert smoothed.variance == 0 and smoothed.times == 20


def test_prompts_in_one_batch_do_not_meet():
    """A batch of three prompts gives what three batches give, in any order of the samples."""
    together, alone, ids = fca.SmoothedAdvantage(5), fca.SmoothedAdvantage(5), torch.tensor([4, 0, 3])
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        rewards = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        order = torch.randperm(18, generator=generator)
        got = together(rewards.reshape(-1)[order], ids.repeat_interleave(6)[order])
        wanted = torch.cat([alone(r, i.repeat(6)) for r, i in zip(rewards, ids)])
        torch.testing.assert_close(got, wanted[order], **EXACT)
    for name, x in together.state_dict().items():
        torch.testing.assert_close(x, alone.state_dict()[name], **EXACT)
    assert together.times.tolist() == [4, 0, 0, 4, 4]


def test_state_resumes_exactly():
    rewards, prompts = torch.randn(5, 12), torch.arange(12) % 4
    smoothed = fca.SmoothedAdvantage(4)
    for r in rewards[:3]:
        smoothed(r, prompts)
    state = smoothed.state_dict()
    resumed, copied = fca.SmoothedAdvantage(4), copy.deepcopy(smoothed)
    resumed.load_state_dict(state)
    for r in rewards[3:]:
        wanted = smoothed(r, prompts)
        assert torch.equal(resumed(r, prompts), wanted) and torch.equal(copied(r, prompts), wanted)
    assert state["times"].tolist() == [3] * 4  # a copy: the calls since have not changed it


def test_wrong_states_change_nothing():
    smoothed = fca.SmoothedAdvantage(2)
    smoothed(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
    before = smoothed.state_dict()
    for state, match in (
        ({}, "times, mean, variance"),
        (3, "times, mean, variance"),
        ({**before, "mean": torch.zeros(3, dtype=torch.float64)}, "mean"),
        ({**before, "variance": torch.zeros(2)}, "variance"),
        ({**before, "times": None}, "times"),
    ):
        with pytest.raises(ValueError, match=match):
            smoothed.load_state_dict(state)
    for prompts in ([0, 2], [-1, 0]):
        with pytest.raises(IndexError, match=r"prompts .* below num_prompts = 2"):
            smoothed(torch.zeros(2), torch.tensor(prompts))
    assert all(torch.equal(x, before[name]) for name, x in smoothed.state_dict().items())


# ------------------------------------------------------------------------------------------ top_variance_groups


@given(batches(), st.sampled_from((1e-3, 0.25, 0.29, 0.5, 1.0)))
def test_top_variance_groups_are_the_loop(batch, keep):
    got = fca.top_variance_groups(*tensors(*batch), keep)
    assert got.dtype == torch.bool and got.tolist() == loop_top(*batch, keep)


def test_ties_go_to_the_first_group():
    rewards = torch.tensor([0, 1, 0, 1, 0, 0, 0, 0, 1, 5, 5, 5.0])  # std of groups 0, 1, 2 of size 3 is the same
    assert fca.top_variance_groups(rewards, 3, 0.25).tolist() == [True] * 3 + [False] * 9
    assert fca.top_variance_groups(rewards, 3, 0.5).tolist() == [True] * 6 + [False] * 6
    ids = torch.tensor([9, 9, 9, 2, 2, 2, 5, 5, 5, 1, 1, 1])
    assert fca.top_variance_groups(rewards, ids, 0.25).tolist() == [False] * 3 + [True] * 3 + [False] * 6


def test_the_same_rewards_in_another_order_tie():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(9, generator=generator, dtype=torch.float64)
        both = torch.cat([first, first[torch.randperm(9, generator=generator)]])
        assert fca.top_variance_groups(both, 9, 0.5).tolist() == [True] * 9 + [False] * 9


@pytest.mark.parametrize("keep, groups, kept", [(0.25, 8, 2), (0.25, 7, 1), (0.29, 100, 29), (1e-9, 5, 1), (1, 5, 5)])
def test_number_of_groups_kept(keep, groups, kept):
    rewards = torch.rand(groups * 4)
    for by in (4, torch.arange(groups).repeat_interleave(4)):
        assert fca.top_variance_groups(rewards, by, keep).sum() == kept * 4


# ------------------------------------------------------------------------------------------ all of them


def test_nothing_is_read_by_the_host():
    rewards, ids = torch.randn(12), torch.arange(12) % 4
    smoothed = fca.SmoothedAdvantage(4)
    with NoSync():
        for groups in (3, ids):
            fca.group_advantages(rewards, groups)
            fca.group_advantages(rewards, groups, scale="none")
            fca.top_variance_groups(rewards, groups)
        smoothed(rewards, ids)
        smoothed.load_state_dict(smoothed.state_dict())
    for read in (lambda: rewards[0].item(), lambda: rewards[rewards > 0], lambda: ids.unique(), lambda: bool(ids[0])):
        with pytest.raises(AssertionError, match="host"), NoSync():
            read()


def test_no_gradient_and_no_change_of_the_inputs():
    rewards = torch.randn(12, requires_grad=True)
    ids = torch.arange(12) % 4
    before, version = rewards.detach().clone(), (rewards._version, ids._version)
    outputs = [fca.group_advantages(rewards, ids), fca.top_variance_groups(rewards, 3)]
    outputs.append(fca.SmoothedAdvantage(4)(rewards, ids))
    assert not any(x.requires_grad for x in outputs)
    assert torch.equal(rewards, before) and version == (rewards._version, ids._version)


def test_strided_rewards():
    wide = torch.randn(12, 3)
    for groups in (4, torch.arange(24)[::2] // 6):
        assert torch.equal(fca.group_advantages(wide[:, 1], groups), fca.group_advantages(wide[:, 1].clone(), groups))
    once = torch.tensor(0.5).expand(8)
    assert not fca.group_advantages(once, 4).any()


R, IDS = torch.zeros(6), torch.zeros(6, dtype=torch.int64)
ERRORS = [
    (fca.group_advantages, ([1.0], 1), {}, TypeError, "rewards"),
    (fca.group_advantages, (IDS, 1), {}, TypeError, "rewards"),
    (fca.group_advantages, (R.view(2, 3), 3), {}, ValueError, "rewards"),
    (fca.group_advantages, (R.to("meta"), 3), {}, ValueError, "rewards"),
    (fca.group_advantages, (R, 4), {}, ValueError, "groups"),
    (fca.group_advantages, (R, 0), {}, ValueError, "groups"),
    (fca.group_advantages, (R, True), {}, TypeError, "groups"),
    (fca.group_advantages, (R, 2.0), {}, TypeError, "groups"),
    (fca.group_advantages, (R, R), {}, TypeError, "groups"),
    (fca.group_advantages, (R, IDS[:5]), {}, ValueError, "groups"),
    (fca.group_advantages, (R, 3), dict(scale="batch"), ValueError, "scale.*std, none"),
    (fca.group_advantages, (R, 3), dict(eps=-1.0), ValueError, "eps"),
    (fca.group_advantages, (R, 3), dict(eps=math.nan), ValueError, "eps"),
    (fca.group_advantages, (R, 3), dict(eps="0"), TypeError, "eps"),
    (fca.top_variance_groups, (R, 3, 0.0), {}, ValueError, "keep"),
    (fca.top_variance_groups, (R, 3, 1.1), {}, ValueError, "keep"),
    (fca.top_variance_groups, (R, 3, "all"), {}, TypeError, "keep"),
    (fca.SmoothedAdvantage, (0,), {}, ValueError, "num_prompts"),
    (fca.SmoothedAdvantage, (2.0,), {}, TypeError, "num_prompts"),
    (fca.SmoothedAdvantage(2), (R, IDS[:2]), {}, ValueError, "prompts"),
    (fca.SmoothedAdvantage(2), (R, R), {}, TypeError, "prompts"),
    (fca.SmoothedAdvantage(2, device="meta"), (R, IDS), {}, ValueError, "rewards"),
]


@pytest.mark.parametrize("function, args, options, error, match", ERRORS, ids=test_id)
def test_wrong_arguments(function, args, options, error, match):
    with pytest.raises(error, match=match):
        function(*args, **options)
