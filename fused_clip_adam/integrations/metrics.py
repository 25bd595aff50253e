"""What trainers log of `ClipStats`. No trainer is imported here."""

from __future__ import annotations


def shares(seen: dict[str, float]) -> dict[str, float]:
    """From `ClipStats.to_dict()`: numbers that do not grow with the tokens, and `nonfinite`.

    `suppressed_mass`: share of the advantage mass whose gradient the clip removed. `ess`: effective sample size of the
    ratios, 1 = on policy. `nonfinite`: tokens left out because they were not finite.
    """
    tokens = max(seen["tokens"], 1.0)
    return {
        "suppressed_mass": seen["suppressed_mass"] / max(seen["total_mass"], 1e-12),
        "ess": seen["ratio_sum"] ** 2 / max(seen["ratio_sq_sum"] * tokens, 1e-12),
        "nonfinite": seen["nonfinite"],
    }
