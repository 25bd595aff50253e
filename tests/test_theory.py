"""Closed forms against their published values and against sums."""

import math

import pytest

from fused_clip_adam import theory

# betas, total coast, R_5: arXiv 2601.05002 at T -> infinity, eps = 0.
PUBLISHED = [
    ((0.9, 0.999), 9.045, 0.5920),
    ((0.9, 0.95), 12.052, 0.6713),
    ((0.9, 0.99), 9.475, 0.6055),
    ((0.95, 0.999), 19.192, 0.7757),
]


@pytest.mark.parametrize("betas, coast, fifth", PUBLISHED)
def test_published_values(betas, coast, fifth):
    assert theory.total_coast(*betas) == pytest.approx(coast, abs=5e-4)  # printed with three decimals
    assert theory.residual_ratio(5, *betas) == pytest.approx(fifth, abs=5e-5)
    total = math.fsum(theory.residual_ratio(k, *betas) for k in range(1, 3000))
    assert total == pytest.approx(theory.total_coast(*betas), rel=1e-9)


def test_finite_history_tends_to_the_infinite_one():
    assert theory.residual_ratio(3, history=1e5) == pytest.approx(theory.residual_ratio(3), rel=1e-12)
    assert theory.residual_ratio(0, history=4) == 1.0


@pytest.mark.parametrize("arguments", (dict(k=-1), dict(k=1, history=0), dict(k=1, beta1=1.0), dict(k=1, beta2=-0.1)))
def test_refusals(arguments):
    with pytest.raises(ValueError):
        theory.residual_ratio(**arguments)


@pytest.mark.parametrize("betas", ((0.99, 0.9), (1.0, 0.999), (0.5, 1.0)))
def test_coast_without_end_is_refused(betas):
    with pytest.raises(ValueError, match="beta1"):
        theory.total_coast(*betas)
