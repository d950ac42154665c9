"""What a migration leaves behind when its process is killed: descriptors, by name.

Another process holds a copy of each of them (a `Keeper`), and hands them to the successor, which
goes on from these alone. So everything that must survive is in the memory behind a descriptor that
is kept before it matters: the page map, the staging, the journal. What changes later is memory, and
no descriptor has to travel in a hurry.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Protocol

JOURNAL = "journal"
"""The name of what is left first and taken back first: without it nothing is to be gone on with."""


class Keeper(Protocol):
    """Who holds copies. Both calls return at once and do not fail: what cannot be kept is not."""

    def keep(self, name: str, descriptor: int) -> None:
        """Hold a copy of `descriptor`, in the place of what was held by that name before."""

    def release(self, name: str) -> None:
        """Let go of what is held by that name; nothing happens if nothing is."""

    def forget(self) -> None:
        """Let go of everything."""

    async def settled(self) -> None:
        """Return when what was to be kept so far outlives us; too early where that takes long."""


class Estate:
    """The descriptors of one migration that a successor needs, and those of a predecessor."""

    def __init__(
        self, keeper: Keeper | None = None, inherited: Mapping[str, int] | None = None
    ) -> None:
        """Begin with what a predecessor has left.

        :param keeper: None where nobody takes over: in the event loop of a library user.
        :param inherited: taken over; `keeper` holds copies of them already.
        """
        self._keeper = keeper
        self._inherited = dict(inherited or {})
        self._left = set(self._inherited)

    @property
    def inherited(self) -> Mapping[str, int]:
        """What a predecessor has left and nobody has taken yet."""
        return self._inherited

    def leaves(self, name: str) -> bool:
        """Tell whether something is left by that name, by us or by a predecessor."""
        return name in self._left

    def left(self, prefix: str) -> list[str]:
        """Return what is left by names that begin so, by us or by a predecessor."""
        return [name for name in self._left if name.startswith(prefix)]

    def take(self, name: str) -> int | None:
        """Return what a predecessor has left by that name, which is the caller's then."""
        return self._inherited.pop(name, None)

    def open(self, name: str, make: Callable[[], int]) -> int:
        """Return what a predecessor has left by that name, or else make and keep it.

        :raise OSError: if `make` does.
        """
        descriptor = self.take(name)
        if descriptor is None:
            descriptor = make()
            self.keep(name, descriptor)
        return descriptor

    def keep(self, name: str, descriptor: int) -> None:
        """Leave `descriptor` to a successor; it stays the caller's.

        Not again what `leaves` tells of: for an instant nobody would hold it.
        """
        self._left.add(name)
        if self._keeper is not None:
            self._keeper.keep(name, descriptor)

    def release(self, name: str) -> None:
        """Leave nothing by that name any more."""
        self.forget(name)
        if self._keeper is not None:
            self._keeper.release(name)

    def forget(self, name: str) -> None:
        """Close what a predecessor has left by that name: it is made anew, and kept then.

        Until then it is held on, but nobody goes on from it.
        """
        self._left.discard(name)
        descriptor = self.take(name)
        if descriptor is not None:
            os.close(descriptor)

    async def settled(self) -> None:
        """Return when all that was left so far outlives this process and who keeps it."""
        if self._keeper is not None:
            await self._keeper.settled()

    def settle(self) -> None:
        """Leave nothing any more: what it was for has ended. Idempotent."""
        self.close()
        self._left.clear()
        if self._keeper is not None:
            self._keeper.release(JOURNAL)
            self._keeper.forget()

    def close(self) -> None:
        """Close what a predecessor has left and nobody wanted. Idempotent."""
        while self._inherited:
            _, descriptor = self._inherited.popitem()
            with contextlib.suppress(OSError):
                os.close(descriptor)
