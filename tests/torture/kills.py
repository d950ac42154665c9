"""Kills at points of the daemon's code, which processes of it carry out by themselves.

A point is before or after a call of a function, named as an importer would. The daemon has no line
for that: `fault_points/sitecustomize.py` is imported by its processes because it is first on their
path.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Process = Literal["worker", "supervisor"]
Victim = Literal["worker", "supervisor", "both"]
VICTIMS: tuple[Victim, ...] = ("worker", "supervisor", "both")


@dataclass(frozen=True)
class Point:
    """Where in the daemon's code something happens."""

    when: Literal["before", "after"]
    target: str
    """Such as ``postcopyd.incoming.journal:Journal.write``. Of a generator each item is a call."""
    process: Process = "worker"
    """Which process has to come there."""
    count: int = 1
    """Which call of one process it is."""
    mentions: str = ""
    """What `repr` of its arguments has to have in it, for a call to count."""
    called_by: str = ""
    """Qualified name of the function that has to call it, for a call to count."""

    def resolve(self) -> object:
        """Return the function.

        :raise AttributeError: if there is none of that name.
        """
        module, _, path = self.target.partition(":")
        found: object = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        return found


def arm(directory: Path, kills: Sequence[tuple[Point, Victim | None]]) -> dict[str, str]:
    """Return the environment in which a daemon kills itself as it is told.

    :param kills: each is armed when the one before has happened; None for a victim kills nobody.
    """
    file = directory / "kills.json"
    file.write_text(json.dumps([asdict(point) | {"victim": victim} for point, victim in kills]))
    modules = Path(__file__).with_name("fault_points")
    return {"PYTHONPATH": str(modules), "POSTCOPYD_KILLS": str(file)}


def happened(directory: Path) -> int:
    """How many of the kills have happened."""
    return len(list(directory.glob("killed-*")))
