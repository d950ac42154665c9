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


@dataclass
class Tally:
    """What came of the cases of one matrix; printed at the end of the run."""

    matrix: str
    outcomes: Counter[str] = field(default_factory=Counter)
    pauses: list[float] = field(default_factory=list)
    """Seconds of the guest's longest pause in each case, where it was measured."""

    def lines(self) -> list[str]:
        """Return what to print."""
        cases = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.items())
        lines = [f"{self.matrix}: {cases}"]
        if self.pauses:
            lines.append(
                f"  longest pause of the guest: p50 {median(self.pauses) * 1000:.0f} ms, "
                f"max {max(self.pauses) * 1000:.0f} ms"
            )
        return lines
