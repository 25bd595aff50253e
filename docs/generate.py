"""Writes docs/objectives.md from the objectives' own fields and docstrings: python docs/generate.py

tests/test_docs.py compares the file with `page()` and runs every cell of its table.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import fused_clip_adam as fca
from fused_clip_adam import backends
from fused_clip_adam.backends.reference_objective import SEQUENCE_RATIO

PAGE = Path(__file__).with_name("objectives.md")
LINE = 120

INTRODUCTION = """# Objectives

Every objective goes through the same functions: `policy_loss`, `dloss_dlogp`, `clip_stats` and, from logits,
`policy_loss_from_logits`. D = logp - old_logp, r = exp(D), A the advantage. All of them read `logp`, `old_logp`,
`advantages`, and optionally `mask`, `weights`, `ref_logp` and, for packed input, `sequence_ids`; the table lists what
one needs or accepts beyond these. An input that an objective does not read is refused.

The token equations are written once in C++ ([objective_math.h](../csrc/objective_math.h), CPU and CUDA), once in Triton
([triton_objective.py](../fused_clip_adam/backends/triton_objective.py)) and once in plain torch
([reference_objective.py](../fused_clip_adam/backends/reference_objective.py)), under the same names.
"""


def objectives() -> list[type]:
    """Every public objective, PPO first."""
    found = [x for x in (getattr(fca, name) for name in fca.__all__) if inspect.isclass(x)]
    found = [x for x in found if issubclass(x, fca.Objective) and x is not fca.Objective]
    return sorted(found, key=lambda cls: (cls is not fca.PPO, cls.__name__.lower()))


def level(cls: type) -> str:
    if cls.rule in SEQUENCE_RATIO:
        return "sequence's ratio"
    return "sequence's weight" if cls is fca.VESPO else "token"


def table() -> str:
    """Markdown: objective x inputs x default aggregation x backend."""
    names = list(backends.DEVICES)
    lines = [
        f"| objective | acts on | needs | accepts | aggregation by default | {' | '.join(names)} |",
        "|---|" * 1 + "---|" * (4 + len(names)),
    ]
    for cls in objectives():
        needs, accepts = (", ".join(f"`{x}`" for x in which) for which in (cls.needs, cls.accepts))
        cells = [f"`{cls.__name__}`", level(cls), needs, accepts, cls.default_aggregation, *["yes"] * len(names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def signature(cls: type) -> str:
    fields = [
        field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default!r}"
        for field in dataclasses.fields(cls)
    ]
    return f"{cls.__name__}({', '.join(fields)})"


def section(cls: type) -> str:
    """The docstring as Markdown: its sections become bold leads."""
    text = inspect.getdoc(cls)
    text = re.sub(r"^(Args|Raises|Source)(, [^:\n]+)?:", r"**\1\2.**", text, flags=re.MULTILINE)
    text = re.sub(r"^ {4,}", "", text, flags=re.MULTILINE)
    return f"## {cls.__name__}\n\n`{signature(cls)}`\n\n{text}"


def page() -> str:
    parts = [INTRODUCTION.rstrip(), table(), *(section(cls) for cls in objectives())]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
