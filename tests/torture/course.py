"""How a guest fared during which processes of its daemon were killed, and what is told of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from tests.torture.sampling import Goal, Tally
from tests.torture.victims import Kill, Victim

Phase: TypeAlias = Literal["before it ran", "while it ran", "after its end"]

_PHASES: Final[tuple[Phase, ...]] = ("before it ran", "while it ran", "after its end")
GOAL: Final = Goal(p50=0.25, longest=1.0)


@dataclass(frozen=True)
class Course:
    """One guest, all times on the monotonic clock."""

    package: float
    """When the daemon had its package: from then on the guest waits for it, and counts as one that
    runs."""
    began: float
    """When it could run its first instruction."""
    ended: float
    """When it had all its memory."""
    longest: float
    """Seconds that its longest access to its memory took."""
    kills: Sequence[Kill]

    def phases(self) -> list[Phase]:
        """What each kill that found anybody to kill has come upon."""
        return [self._phase(kill.at) for kill in self.kills if kill.victims]

    def _phase(self, at: float) -> Phase:
        if at < self.package:
            return "before it ran"
        return "while it ran" if at <= self.ended else "after its end"

    def pause(self) -> float | None:
        """Seconds of its longest wait, if it was there to wait when there was a kill."""
        if "while it ran" not in self.phases():
            return None
        not_yet = [
            self.began - kill.at
            for kill in self.kills
            if kill.victims and self.package <= kill.at < self.began
        ]
        return max(self.longest, *not_yet, 0.0)


def tally_of(tally: Callable[[str], Tally], matrix: str, victims: Sequence[Victim | None]) -> Tally:
    """Return the tally for those who are killed one after the other, or of the only one."""
    whom = victims[0] if len(victims) == 1 else "one after the other"
    found = tally(f"{matrix}, {whom} killed")
    found.goal = GOAL
    found.kills.update(dict.fromkeys(_PHASES, 0))
    return found


def note(course: Course, tally: Tally) -> None:
    """Count a case that ended as it has to."""
    tally.outcomes["ok"] += 1
    tally.kills.update(course.phases())
    missed = sum(not kill.victims for kill in course.kills)
    if missed:
        tally.kills["when nobody was there"] += missed
    pause = course.pause()
    if pause is not None:
        tally.pauses.append(pause)
