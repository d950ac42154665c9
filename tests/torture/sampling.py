"""How much of a matrix a run goes through, and what came of it.

The matrices of this folder have more cases than a test run has time for. `make test` takes a
sample, another one each time; `make torture` takes them all. The seed is printed, and `--seed`
repeats a run.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True)
class Sampling:
    """What this run is to go through."""

    full: bool
    """True for every case, as `make torture` wants it."""
    seed: int

    def count(self, usual: int, full: int) -> int:
        """Return how many cases to take: `usual` of them, or all `full`."""
        return full if self.full else usual

    def numbers(self, matrix: str) -> random.Random:
        """Return the random numbers of a matrix, which are the same for the same seed."""
        return random.Random(f"{self.seed} {matrix}")


@dataclass(frozen=True)
class Goal:
    """How long a guest may have to wait, seconds. It is printed, and fails no test."""

    p50: float
    longest: float


@dataclass
class Tally:
    """What came of the cases of one matrix; printed at the end of the run."""

    matrix: str
    outcomes: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    """How many came when, where that is told."""
    pauses: list[float] = field(default_factory=list)
    """Seconds of the guest's longest pause in each case, where it was measured."""
    goal: Goal | None = None

    def lines(self) -> list[str]:
        """Return what to print."""
        lines = [f"{self.matrix}: {_counts(self.outcomes)}"]
        if self.kills:
            lines.append(f"  kills: {_counts(self.kills)}")
        if self.goal is not None and not self.pauses:
            lines.append("  no case was under a guest")
        if self.pauses:
            p50, longest = median(self.pauses), max(self.pauses)
            pauses = f"p50 {p50 * 1000:.0f} ms, max {longest * 1000:.0f} ms"
            if self.goal is None:
                lines.append(f"  longest pause of the guest: {pauses}")
            else:
                lines.append(f"  longest pause in the {len(self.pauses)} under a guest: {pauses}")
                lines.append(
                    f"  goal: p50 <= {self.goal.p50 * 1000:.0f} ms {_yes(p50 <= self.goal.p50)}, "
                    f"max <= {self.goal.longest * 1000:.0f} ms "
                    f"{_yes(longest <= self.goal.longest)}"
                )
        return lines


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counter.items())


def _yes(it_is: bool) -> str:
    return "yes" if it_is else "no"
