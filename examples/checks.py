"""What the executable checks beside it share: a verdict of measured numbers, and the look of a figure."""

import math
from dataclasses import dataclass
from pathlib import Path

INK, BLUE, RED, TEAL, GOLD, GREY = "#22303c", "#2f6db5", "#c8553d", "#1d8a7a", "#b8860b", "#8a949e"


@dataclass(frozen=True)
class Check:
    """A measured number and what it must be: at most, or at least, a bound. NaN is neither."""

    name: str
    value: float
    relation: str
    bound: float

    @property
    def holds(self):
        return {"<=": self.value <= self.bound, ">=": self.value >= self.bound}[self.relation]


def verdict(checks):
    """Prints one line per check; returns the exit status, 0 where all hold."""
    width = max(len(check.name) for check in checks)
    print(f"\n  {'':<{width}}  {'measured':>10}  {'required':>12}")
    for check in checks:
        required = f"{check.relation} {check.bound:.3g}"
        print(f"  {check.name:<{width}}  {check.value:>10.3g}  {required:>12}  {'ok' if check.holds else 'FAILS'}")
    failed = sum(not check.holds for check in checks)
    print(f"\n  {len(checks) - failed} of {len(checks)} hold.")
    return 1 if failed else 0


def largest(numbers):
    """The largest number; NaN where there is one, which max would lose."""
    numbers = list(numbers)
    return math.nan if any(math.isnan(number) for number in numbers) else max(numbers)


def new_figure(columns, width=10.5, height=4.4):
    """A figure with one row of axes, each with the house's colours and a light grid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": "#9aa5b1",
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6eaee",
            "axes.axisbelow": True,
            "legend.frameon": False,
        }
    )
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def save(figure, path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"  Wrote {path}.")
