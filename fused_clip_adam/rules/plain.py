"""Rules as plain data, so that a state dict holds no class of ours and `torch.load(weights_only=True)` reads it."""

from __future__ import annotations

import dataclasses
from typing import Any

KEYS = ("grad_clip", "overshoot", "reset")
"""The parameter-group keys that hold rules."""


def to_plain(rule: Any) -> dict[str, Any] | list[dict[str, Any]]:
    """`AlignedMomentum(block=1024)` -> `{"rule": "AlignedMomentum", "block": 1024}`; a list of them for several."""
    if isinstance(rule, tuple):
        return [to_plain(each) for each in rule]
    return {"rule": type(rule).__name__, **dataclasses.asdict(rule)}


def is_plain(value: Any) -> bool:
    """Whether `to_plain` wrote it."""
    return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(each, dict) for each in value))


def from_plain(key: str, value: dict[str, Any] | list[dict[str, Any]]) -> Any:
    """The rule, or tuple of rules, that `to_plain` wrote for a group's `key`.

    Raises:
        ValueError: the name is no rule of this version for that key.
    """
    from fused_clip_adam.rules import grad_clip, overshoot, reset

    if isinstance(value, list):
        return tuple(from_plain(key, each) for each in value)
    known = {
        "grad_clip": grad_clip.RULES,
        "overshoot": (*overshoot.RULES, overshoot.FisherUpdate),
        "reset": reset.RULES,
    }[key]
    fields = dict(value)
    name = fields.pop("rule", None)
    for rule in known:
        if rule.__name__ == name:
            return rule(**fields)
    raise ValueError(f"{key} rule {name!r} is unknown; accepted: {[rule.__name__ for rule in known]}")
