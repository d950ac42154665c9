"""What comes of a soak."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """What was done, and what came of it."""

    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    """Of migrations."""
    faults: Counter[str] = field(default_factory=Counter)
    """What has happened to them, by kind; what was only planned does not count."""
    checks: Counter[str] = field(default_factory=Counter)
    """What was looked at beside the end that each must have."""
    wrong: list[str] = field(default_factory=list)
    begin: dict[str, int] = field(default_factory=dict)
    end: dict[str, int] = field(default_factory=dict)
    """What the daemon takes."""

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "seed": self.seed,
            "outcomes": dict(self.outcomes),
            "faults": dict(self.faults),
            "checks": dict(self.checks),
            "wrong": self.wrong,
            "begin": self.begin,
            "end": self.end,
        }

    def line(self) -> str:
        """Say in a line how far it is."""
        return (
            f"{self.outcomes.total()} migrations, {self.faults.total()} faults, "
            f"{len(self.wrong)} wrong"
        )

    def show(self) -> None:
        """Print it for people."""
        print(f"seed {self.seed}")
        for title, counter in (
            ("migrations", self.outcomes),
            ("faults", self.faults),
            ("checks", self.checks),
        ):
            print(f"{title}:", ", ".join(f"{n} {what}" for what, n in sorted(counter.items())))
        for name, before in self.begin.items():
            print(f"{name}: {before} at the begin, {self.end.get(name)} in the end")
        for what in self.wrong:
            print(f"wrong: {what}")
