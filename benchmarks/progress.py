"""Which case of how many runs, and about how long the rest takes: in place on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping

EVERY_S = 10.0  # in a log: seconds between lines, and before the first of them a case has its own


class Progress:
    """Shows texts behind "case i of n, about m minutes left".

    What is left is the estimates of the remaining cases, times what the cases done took over theirs.

    Args:
        estimates: case -> seconds it is expected to take, in the order of the run.
        in_place: one line that is written over, as on a terminal; None: whether stderr is one.
        write: receives the lines.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        estimates: Mapping[str, float],
        in_place: bool | None = None,
        write: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.estimates = dict(estimates)
        self.in_place = sys.__stderr__.isatty() if in_place is None else in_place
        self.write = write or to_stderr
        self.clock = clock
        self.taken: dict[str, float] = {}  # of the cases done
        self.case: str | None = None
        self._case_start = self._last = clock()

    def begin(self, case: str) -> None:
        """Says that `case` runs now, and so that the one before it is done. The same case again changes nothing."""
        if case == self.case:
            return
        self.end()
        self.case, self._case_start = case, self.clock()
        self._show(case)

    def end(self) -> None:
        """The last case is done."""
        if self.case is not None:
            self.taken[self.case] = self.clock() - self._case_start
            self.case = None

    def __call__(self, text: str) -> None:
        if self.in_place or self.clock() - self._last >= EVERY_S:
            self._show(text)

    def seconds_left(self) -> float:
        done = sum(self.estimates.get(case, 0.0) for case in self.taken)
        pace = sum(self.taken.values()) / done if done else 1.0
        left = sum(s for case, s in self.estimates.items() if case not in self.taken and case != self.case)
        if self.case is not None:
            left += max(0.0, self.estimates.get(self.case, 0.0) - (self.clock() - self._case_start) / max(pace, 1e-9))
        return left * pace

    def _show(self, text: str) -> None:
        self._last = self.clock()
        where = ""
        if self.case is not None and len(self.estimates) > 1:
            number = list(self.estimates).index(self.case) + 1 if self.case in self.estimates else "?"
            where = f"[case {number} of {len(self.estimates)}, {minutes(self.seconds_left())} left] "
        self.write(f"\r\033[K{where}{text}" if self.in_place else f"{where}{text}\n")


def minutes(seconds: float) -> str:
    return "under a minute" if seconds < 45 else f"about {max(1, round(seconds / 60))} min"


def to_stderr(text: str) -> None:
    with contextlib.suppress(ValueError):  # closed at the end of the interpreter
        sys.__stderr__.write(text)
        sys.__stderr__.flush()
