"""Advantages from the rewards of a prompt's samples: GRPO, Dr.GRPO, DCPO's smoothing; StarPO-S's choice of prompts.

    rewards [n] -> per group, float64: mean, unbiased variance -> advantages [n]

All of it stays on the rewards' device; nothing is read by the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_clip_adam.objectives.groups import Groups, arithmetic, check_ids
from fused_clip_adam.objectives.losses import check_tensor
from fused_clip_adam.objectives.objective import number

SCALES = ("std", "none")
MOST = 2.0**500  # larger float64 rewards are read as this: sums of squares stay finite


class _Moments(NamedTuple):
    finite: Tensor
    """bool [n]: rewards that are numbers; the others take no part."""
    count: Tensor
    """float64 [groups]: of the finite rewards, as the next two."""
    mean: Tensor
    """Infinite where there is none."""
    variance: Tensor
    """Unbiased; 0 for fewer than two rewards."""


def _moments(x: Tensor, groups: Groups) -> _Moments:
    finite = x.isfinite()
    # From the group's least reward: equal rewards then deviate by exactly 0, whatever their sum rounds to.
    least = groups.reduce(torch.where(finite, x, torch.inf), "min")
    above = torch.where(finite, x - groups.spread(least), 0.0)
    count = groups.reduce(finite.double(), "sum")
    mean_above = groups.reduce(above, "sum") / count.clamp(min=1.0)
    squares = torch.where(finite, above - groups.spread(mean_above), 0.0).square()
    variance = groups.reduce(squares, "sum") / (count - 1.0).clamp(min=1.0)
    return _Moments(finite, count, least + mean_above, variance)


def _z_scores(x: Tensor, mean: Tensor, std: Tensor, eps: float = 0.0) -> Tensor:
    """(x - mean) / (std + eps); 0 where std is."""
    return torch.where(std > 0, (x - mean) / (std + eps), 0.0)


def _check(rewards: Tensor) -> Tensor:
    check_tensor("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be [n], one per sample, got shape {list(rewards.shape)}")
    x = rewards.detach().double()
    return torch.where(x.isfinite(), x.clamp(-MOST, MOST), x)


def _like(rewards: Tensor, advantages: Tensor) -> Tensor:
    dtype = arithmetic(rewards)
    return advantages.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


def _groups(groups: int | Tensor, rewards: Tensor) -> Groups:
    if isinstance(groups, Tensor) and groups.dim() > 0:
        return Groups(rewards.numel(), ids=check_ids("groups", groups, rewards))
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups must be a group's size or a tensor of ids, got {groups!r}")
    if groups < 1 or rewards.numel() % groups:
        raise ValueError(f"groups must be at least 1 and divide the number of rewards {rewards.numel()}, got {groups}")
    return Groups(rewards.numel(), size=groups, device=rewards.device)


@torch.no_grad()
def group_advantages(rewards: Tensor, groups: int | Tensor, *, scale: str = "std", eps: float = 1e-4) -> Tensor:
    """A = (R - mean) / (std + eps) within each group (GRPO), or A = R - mean (Dr.GRPO).

    std is the unbiased one (n - 1), as in TRL and verl; the paper writes std without saying which and publishes no
    code. A sample whose reward is not finite takes no part in its group's statistics and gets 0, as do the samples of
    a group of equal rewards and the only sample of a group (verl gives the latter its reward).

    Args:
        rewards: [n], one per sample, float64, float32, bfloat16 or float16; arithmetic in float64.
        groups: the size of a group, for samples of a prompt that lie side by side; or int64/int32 [n], a group's
            samples sharing an id (any values, any order, groups of any size).
        scale: "std", or "none" for Dr.GRPO.
        eps: added to std, in units of the reward; TRL 1e-4, verl 1e-6, 0 for none.

    Returns:
        [n], float32 (float64 for float64 rewards): `advantages` [B] of `policy_loss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range.

    Source: GRPO: Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; Dr.GRPO: Liu et al. 2025 (arXiv 2503.20783).
    """
    x = _check(rewards)
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; accepted: {', '.join(SCALES)}")
    if not 0.0 <= number("eps", eps) < float("inf"):
        raise ValueError(f"eps must be at least 0 and finite, got {eps!r}")
    groups = _groups(groups, x)
    finite, _, mean, variance = _moments(x, groups)
    mean, std = groups.spread(mean), groups.spread(variance.sqrt())
    advantages = x - mean if scale == "none" else _z_scores(x, mean, std, float(eps))
    return _like(rewards, torch.where(finite, advantages, 0.0))


class SmoothedAdvantage:
    """DCPO's advantages, which mix a prompt's present rewards with those of all the times it was sampled before.

    With i the number of times including this one, A_new the z-scores by this call's mean and std and A_tot those by
    the cumulative ones: s1 = A_tot / i + (1 - 1/i) A_new, s2 = A_new / i + (1 - 1/i) A_tot, and A is the one of smaller
    magnitude. So a prompt whose samples all got the same reward today still gives a gradient. std is the unbiased one,
    without an epsilon; where it is 0 the z-scores are 0. The first time A is A_new.

    The state, on the device: per prompt, `times` int64, `mean` and `variance` float64 [num_prompts], with
    variance = ((i - 1) variance + v + ((i - 1)/i) (m - mean)^2) / i for a call's mean m and variance v: every call
    weighs the same, whatever the number of its samples. Equal rewards have a variance of exactly 0, and rewards that
    never change keep it: as published, in float32, eight rewards of 0.1 have the std 8e-9 and advantages of -0.94.

    Args:
        num_prompts: rows of the state, one per prompt of the data set.
        device: where the state lies and the rewards will.

    Raises:
        TypeError, ValueError: num_prompts is not a positive integer.

    Source: Yang et al. 2025, DCPO (arXiv 2509.02333) and its code.
    """

    def __init__(self, num_prompts: int, *, device: torch.device | str | None = None) -> None:
        if not isinstance(num_prompts, int) or isinstance(num_prompts, bool):
            raise TypeError(f"num_prompts must be an integer, got {num_prompts!r}")
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        self.times = torch.zeros(num_prompts, dtype=torch.int64, device=device)
        self.mean = torch.zeros(num_prompts, dtype=torch.float64, device=device)
        self.variance = torch.zeros(num_prompts, dtype=torch.float64, device=device)

    @torch.no_grad()
    def __call__(self, rewards: Tensor, prompts: Tensor) -> Tensor:
        """The advantages of one batch of samples; the state then includes it.

        Args:
            rewards: [n], one per sample, float64, float32, bfloat16 or float16. One that is not finite takes no part
                and gets 0; a prompt without a finite reward keeps its state.
            prompts: int64 or int32 [n]; each sample's row of the state. All samples of a prompt belong in one call.

        Returns:
            [n], float32 (float64 for float64 rewards).

        Raises:
            TypeError, ValueError: as `group_advantages`.
            IndexError: a prompt outside the state (on a GPU torch's device-side assertion). The state is unchanged.
        """
        x = _check(rewards)
        if x.device != self.times.device:
            raise ValueError(f"rewards is on {x.device}, the state on {self.times.device}")
        prompts = check_ids("prompts", prompts, x)
        rows = torch.where(prompts < 0, len(self.times), prompts)  # torch would count from the end
        try:
            times, mean, variance = self.times[rows], self.mean[rows], self.variance[rows]
        except IndexError:
            raise IndexError(f"prompts must be at least 0 and below num_prompts = {len(self.times)}") from None

        groups = Groups(x.numel(), ids=prompts)
        finite, count, new_mean, new_variance = _moments(x, groups)
        seen, new_mean, new_variance = (groups.spread(y) for y in (count > 0, new_mean, new_variance))
        i = (times + 1).double()
        step = new_mean - mean
        total_variance = ((i - 1) * variance + new_variance + (i - 1) / i * step.square()) / i
        total_mean = mean + step / i

        new = _z_scores(x, new_mean, new_variance.sqrt())
        total = _z_scores(x, total_mean, total_variance.sqrt())
        s1 = total / i + (1 - 1 / i) * new
        s2 = new / i + (1 - 1 / i) * total
        advantages = torch.where(s1.abs() < s2.abs(), s1, s2)

        # The members of a group write the same value to its row.
        self.times[rows] = times + seen
        self.mean[rows] = torch.where(seen, total_mean, mean)
        self.variance[rows] = torch.where(seen, total_variance, variance)
        return _like(rewards, torch.where(finite, advantages, 0.0))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of `times`, `mean`, `variance`."""
        return {name: getattr(self, name).clone() for name in ("times", "mean", "variance")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies the values of a `state_dict` from any device.

        Raises:
            ValueError: other names, shapes or dtypes; the state is unchanged.
        """
        own = {name: getattr(self, name) for name in ("times", "mean", "variance")}
        if not isinstance(state, dict) or state.keys() != own.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state must hold {', '.join(own)}, got {got}")
        for name, x in own.items():
            got: Any = state[name]
            if not isinstance(got, Tensor) or got.shape != x.shape or got.dtype != x.dtype:
                shown = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else repr(got)
                raise ValueError(f"state: {name} must be {x.dtype} {list(x.shape)}, got {shown}")
        for name, x in own.items():
            x.copy_(state[name])


@torch.no_grad()
def top_variance_groups(rewards: Tensor, groups: int | Tensor, keep: float = 0.25) -> Tensor:
    """StarPO-S: which samples belong to the prompts whose rewards vary most.

    Kept are the floor(keep * groups) groups of the largest standard deviation, at least one. Among equals, the group
    that comes first (with ids: of the smallest id). Rewards that are not finite take no part.

    Use: `mask & kept.unsqueeze(1)` as the mask of `policy_loss` [B, T], and the rest does not count as tokens or
    sequences' lengths; as `weights=kept.float()` it adds nothing to the loss but counts.

    Args:
        rewards, groups: as `group_advantages`.
        keep: share of the groups, in (0, 1].

    Returns:
        bool [n].

    Raises:
        TypeError, ValueError: as `group_advantages`.

    Source: Wang et al. 2025, RAGEN (arXiv 2504.20073) and its code.
    """
    x = _check(rewards)
    if not 0.0 < number("keep", keep) <= 1.0:
        raise ValueError(f"keep must be in (0, 1], got {keep!r}")
    groups = _groups(groups, x)
    # In float32, for the same rewards in another order to tie. Slots beyond the last group are 0 and come last.
    order = _moments(x, groups).variance.sqrt().float().argsort(descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    wanted = (groups.number.double() * float(keep) + 1e-9).floor().clamp(min=1.0)  # 0.29 * 100 is below 29
    return groups.spread(ranks < wanted)
