"""Kills at points of the daemon's code, which processes of it carry out by themselves.

A point is before or after a call of a function, named as an importer would. The daemon has no line
for that: `fault_points/sitecustomize.py` is imported by its processes because it is first on their
path.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from tests.support import ROOT
from tests.torture.victims import Kill, Role, Victim

Program: TypeAlias = Literal["worker", "supervisor"]
When: TypeAlias = Literal["before", "after"]
Seat: TypeAlias = Literal["taken", "empty", "either"]


@dataclass(frozen=True)
class Point:
    """Where in the daemon's code something happens."""

    when: When
    target: str
    """Such as ``postcopyd.incoming.journal:Journal.write``. Of a generator each item is a call."""
    process: Program = "worker"
    """Which process has to come there."""
    seat: Seat = "taken"
    """Of the worker: empty where the one with the migration is dead and the next one has not heard
    yet that it takes its place. Then that one is the worker that can be killed."""
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


PACKAGE: Final = Point("before", "postcopyd.incoming.recipient:Recipient.take_package")
"""When the guest's package has come, and the guest begins to wait for this daemon."""
_PACKAGE_CAME: Final = "package"
_ROLES: Final[dict[Seat, tuple[Role, ...]]] = {
    "taken": ("worker",),
    "empty": ("successor",),
    "either": ("worker", "successor"),
}


def arm(directory: Path, kills: Sequence[tuple[Point, Victim | None]]) -> dict[str, str]:
    """Return the environment in which a daemon kills itself as it is told.

    :param kills: each is armed when the one before has happened; None for a victim kills nobody.
    """
    steps = [
        asdict(point)
        | {
            "victim": victim,
            "marker": f"killed-{number}",
            "after": f"killed-{number - 1}" if number else None,
        }
        for number, (point, victim) in enumerate(kills)
    ]
    # Wrapped last, so that it is first before the call.
    steps.append(asdict(PACKAGE) | {"victim": None, "marker": _PACKAGE_CAME, "after": None})
    file = directory / "kills.json"
    file.write_text(json.dumps(steps))
    modules = Path(__file__).with_name("fault_points")
    return {"PYTHONPATH": f"{modules}{os.pathsep}{ROOT}", "POSTCOPYD_KILLS": str(file)}


def happened(directory: Path) -> list[Kill]:
    """Which of the kills have happened, in their order."""
    return [_left(path) for path in sorted(directory.glob("killed-*"))]


def package_came(directory: Path) -> float:
    """When the package of the first guest came, seconds of the monotonic clock."""
    return _left(directory / _PACKAGE_CAME).at


def assert_killed(kills: Sequence[tuple[Point, Victim | None]], happened: Sequence[Kill]) -> None:
    """Each kill has happened to those whom it names: they lived, and had the role that it means."""
    assert len(happened) == len(kills), "the point was never reached"
    for (point, victim), kill in zip(kills, happened, strict=True):
        assert_whom(kill, victim, point.seat)


def assert_whom(kill: Kill, victim: Victim | None, seat: Seat = "taken") -> None:
    """A kill has found all whom it names alive, and nobody else."""
    leaders: list[Role] = [] if victim in ("worker", None) else ["supervisor"]
    workers = _ROLES[seat] if victim in ("worker", "both") else (None,)
    wanted = [Counter([*leaders, *([worker] if worker else [])]) for worker in workers]
    assert Counter(process.role for process in kill.victims) in wanted, (
        f"{victim} was to be killed, seat {seat}: it was {kill.victims}"
    )


def _left(path: Path) -> Kill:
    return Kill.of_json(json.loads(path.read_text()))
