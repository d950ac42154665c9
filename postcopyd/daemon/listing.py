"""Tells the supervisor which migrations this worker has: each change, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from postcopyd.daemon.channel import Standing


class Listing(NamedTuple):
    """What is told of a migration."""

    state: str
    standing: Standing


class Listings:
    """What was told."""

    def __init__(
        self,
        listed: Callable[[str, str, Standing], None],
        unlisted: Callable[[str], None],
    ) -> None:
        """Begin with nothing.

        :param listed: tells how a migration stands: name, state and standing.
        :param unlisted: tells that there is none of that name any more.
        """
        self._listed = listed
        self._unlisted = unlisted
        self._told: dict[str, Listing] = {}

    def tell(self, now: Mapping[str, Listing]) -> None:
        """Tell what has changed."""
        for name in self._gone(now):
            del self._told[name]
            self._unlisted(name)
        for name, listing in now.items():
            if self._told.get(name) != listing:
                self._told[name] = listing
                self._listed(name, *listing)

    def _gone(self, now: Mapping[str, Listing]) -> Iterable[str]:
        return [name for name in self._told if name not in now]
