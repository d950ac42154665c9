"""Which worker has which migration: what the supervisor knows, and decides, without any I/O.

A name belongs to the worker that has claimed it, from before its first descriptor is made until
nothing of it is held any more: so no two workers ever have a running migration of one name,
whichever of them dies in between. What the workers list beside that is for people: where a
migration stands, and those that have ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from postcopyd.daemon.channel import Refusal, Standing


class Place(NamedTuple):
    """A migration as one worker lists it."""

    worker: int
    name: str


class _Listing(msgspec.Struct, frozen=True):
    state: str
    standing: Standing


class Directory:
    """Names, their workers, and what these say of them."""

    def __init__(self, workers: int, *, migrations: int, ended: int) -> None:
        """Know nothing yet.

        :param migrations: how many there may be at a time, those that have ended not counted.
        :param ended: how many that have ended stay listed.
        """
        self._workers = workers
        self._migrations = migrations
        self._most_ended = ended
        self._claims: dict[str, int] = {}
        self._listings: dict[Place, _Listing] = {}
        self._stale: dict[int, set[str]] = {}
        """Worker -> what its predecessor has listed and it has not yet."""
        self._to_be_forgotten: set[Place] = set()
        """Those of which that was said already."""

    # -- claims ------------------------------------------------------------------------------

    def spread(self, names: Iterable[str]) -> None:
        """Give each worker some of the migrations that a killed daemon has left.

        Who had them does not matter: none of its processes lives.
        """
        for number, name in enumerate(sorted(names)):
            self._claims[name] = number % self._workers

    def claim(self, worker: int, name: str) -> Refusal | None:
        """Let a name be a worker's; return why not."""
        if name in self._claims:
            return "name-taken"
        if len(self._claims) - len(self._of("unreadable")) >= self._migrations:
            return "too-many-migrations"
        self._claims[name] = worker
        return None

    def owns(self, worker: int, name: str) -> bool:
        """Tell whether the name is that worker's."""
        return self._claims.get(name) == worker

    def give_up(self, worker: int, name: str) -> bool:
        """Let the name be nobody's; tell whether it was that worker's."""
        if not self.owns(worker, name):
            return False
        del self._claims[name]
        return True

    # -- what the workers list ---------------------------------------------------------------

    def note(self, worker: int, name: str, state: str, standing: Standing) -> list[Place]:
        """Note how a migration stands.

        :return: those that have ended and are to be forgotten from now on.
        """
        self._stale.get(worker, set()).discard(name)
        place = Place(worker, name)
        before = self._listings.get(place)
        if before is not None and before.standing != standing:
            self.strike(worker, name)  # the order is that in which they have ended
        self._listings[place] = _Listing(state, standing)
        ended = [other for other, it in self._listings.items() if it.standing == "ended"]
        excess = ended[: max(0, len(ended) - self._most_ended)]
        excess += [
            other
            for other in ended
            if other.name == name and not self._may_list(other) and other not in excess
        ]
        excess = [other for other in excess if other not in self._to_be_forgotten]
        self._to_be_forgotten.update(excess)
        return excess

    def strike(self, worker: int, name: str) -> None:
        """Note that a worker has no migration of that name any more."""
        self._listings.pop(Place(worker, name), None)
        self._to_be_forgotten.discard(Place(worker, name))

    # -- workers that come and go ------------------------------------------------------------

    def died(self, worker: int, held: set[str]) -> None:
        """Keep of a worker what its successor can go on with.

        :param held: the names of which anything is held.
        """
        for name, owner in list(self._claims.items()):
            if owner == worker and name not in held:
                del self._claims[name]
        self._stale[worker] = {place.name for place in self._listings if place.worker == worker}

    def ready(self, worker: int) -> None:
        """Forget what a worker's predecessor has listed and it does not."""
        for name in self._stale.pop(worker, set()):
            self.strike(worker, name)

    # -- what can be asked -------------------------------------------------------------------

    def of(self, worker: int) -> set[str]:
        """Return the names that are a worker's."""
        return {name for name, owner in self._claims.items() if owner == worker}

    def where(self, name: str) -> int | None:
        """Return who has the migration of that name, ended or not; None for nobody."""
        if name in self._claims:
            return self._claims[name]
        return next((place.worker for place in self._listings if place.name == name), None)

    def owner_of(self, name: str) -> int | None:
        """Return who has the migration of that name, if it has not ended."""
        return self._claims.get(name)

    def number_of(self, worker: int) -> int:
        """Return how many migrations a worker has that have not ended."""
        return sum(owner == worker for owner in self._claims.values())

    def waiting(self) -> list[str]:
        """Return those that wait for a VMM."""
        return self._of("waiting")

    def under_way(self) -> list[str]:
        """Return those that have not ended, and then those that nobody can go on with."""
        under_way = [place.name for place, it in self._listings.items() if _is_under_way(it)]
        return under_way + self._of("unreadable")

    def summary(self) -> str:
        """Return in a few words how many migrations there are, and where they are."""
        states = Counter(it.state for it in self._listings.values() if _is_under_way(it))
        number = sum(states.values())
        summary = "no migration is under way"
        if number:
            detail = ", ".join(f"{count} {state}" for state, count in states.items())
            summary = f"{number} migration{'s' if number > 1 else ''} under way: {detail}"
        if unreadable := self._of("unreadable"):
            summary += f"; held, and not to be read: {', '.join(unreadable)}"
        return summary

    def _may_list(self, place: Place) -> bool:
        """Tell whether it is not another worker that has that name now."""
        return self._claims.get(place.name, place.worker) == place.worker

    def _of(self, standing: Standing) -> list[str]:
        return [place.name for place, it in self._listings.items() if it.standing == standing]


def _is_under_way(listing: _Listing) -> bool:
    return listing.standing in ("waiting", "running")
