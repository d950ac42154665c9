"""The supervisor's copies of what must not be lost, and those of the service manager.

A descriptor that systemd keeps in its fd store (sd_notify(3), FDSTORE=1) outlives the supervisor as
well. Its name there is `OWNER/NAME`, and `OWNER/NAME#2` and so on of what takes its place: names
are all that it can be told to drop, and the new one is to be there before the old one goes.
FDPOLL=0, because systemd drops what polls as hung up, and the pidfd of a VMM that has exited, or a
socket whose source has gone, does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from postcopyd.daemon.notify import ServiceManager

_BETWEEN: Final = "/"
_NUMBER: Final = "#"


class Holding:
    """Descriptors by owner and name. It owns them."""

    def __init__(self, manager: ServiceManager) -> None:
        """Hold nothing yet."""
        self._manager = manager
        self._held: dict[tuple[str, str], int] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        """Of what the service manager keeps; 1 for the first of that name."""

    def take_over(self, stored: dict[str, int]) -> None:
        """Hold what the service manager has kept, which goes on keeping it.

        :param stored: by name there; those that are not of `OWNER/NAME` are closed.
        """
        for stored_name, descriptor in stored.items():
            owner, between, rest = stored_name.partition(_BETWEEN)
            name, _, number_text = rest.partition(_NUMBER)
            number = int(number_text) if number_text.isdecimal() else 1
            before = self._numbers.get((owner, name), 0)
            if not between:
                os.close(descriptor)
            elif number < before:  # a predecessor was killed while one took the other's place
                self._manager.unstore(stored_name)
                os.close(descriptor)
            else:
                self.release(owner, name)
                self._held[owner, name] = descriptor
                self._numbers[owner, name] = number

    def hold(self, owner: str, name: str, descriptor: int) -> None:
        """Hold `descriptor`, which is taken over, in the place of what was held so before."""
        number = self._numbers.get((owner, name), 0) + 1
        self._manager.store(_stored_name(owner, name, number), descriptor)
        self.release(owner, name)
        self._held[owner, name] = descriptor
        self._numbers[owner, name] = number

    def hold_until_the_end(self, owner: str, name: str, descriptor: int) -> None:
        """As `hold`, of what the service manager hands over at every start anyway."""
        self.release(owner, name)
        self._held[owner, name] = descriptor

    def release(self, owner: str, name: str) -> None:
        """Let go of it; nothing happens if it is not held."""
        descriptor = self._held.pop((owner, name), None)
        number = self._numbers.pop((owner, name), None)
        if number is not None:
            self._manager.unstore(_stored_name(owner, name, number))
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def forget(self, owner: str) -> None:
        """Let go of all that is that owner's."""
        for held_by, name in list(self._held):
            if held_by == owner:
                self.release(owner, name)

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        """Give owner, name and descriptor of everything that is held."""
        for (owner, name), descriptor in self._held.items():
            yield owner, name, descriptor

    def of(self, owner: str, name: str) -> int | None:
        """Return what is held, which stays here."""
        return self._held.get((owner, name))

    def close(self) -> None:
        """Close all copies of ours; what the service manager keeps it goes on keeping."""
        while self._held:
            with contextlib.suppress(OSError):
                os.close(self._held.popitem()[1])


def _stored_name(owner: str, name: str, number: int) -> str:
    """Return by which name the service manager keeps the `number`-th of that name."""
    return f"{owner}{_BETWEEN}{name}" + (f"{_NUMBER}{number}" if number > 1 else "")
