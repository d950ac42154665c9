"""The supervisor's copies of what must not be lost, and those of the service manager.

A descriptor that systemd keeps in its fd store (sd_notify(3), FDSTORE=1) outlives the supervisor as
well. Its name there is `OWNER/NAME`, and `OWNER/NAME#2` and so on of what takes its place: names
are all that it can be told to drop, and the new one is to be there before the old one goes.
A descriptor that it has already by another name, as a copy of it, systemd ignores: so it is told of
one of these names, and of another one when that is let go.
FDPOLL=0, because systemd drops what polls as hung up, and the pidfd of a VMM that has exited, or a
socket whose source has gone, does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Final, NamedTuple

from postcopyd.daemon.logging import get_logger
from postcopyd.daemon.notify import ServiceManager
from postcopyd.kernel import memory_file, open_files

_BETWEEN: Final = "/"
_NUMBER: Final = "#"
_NONE_TO_BE_HAD: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class _File(NamedTuple):
    """What two descriptors of one open file have in common, and some others."""

    owner: str
    device: int
    inode: int


class Holding:
    """Descriptors by owner and name. It owns them."""

    def __init__(self, manager: ServiceManager) -> None:
        """Hold nothing yet."""
        self._manager = manager
        self._held: dict[tuple[str, str], int] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        """Of what the service manager keeps by that name; 1 for the first one."""
        self._by_file: dict[_File, set[str]] = {}
        """Names of what is held. There may be thousands of one owner."""

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
                self._put(owner, name, descriptor)
                self._numbers[owner, name] = number

    def hold(self, owner: str, name: str, descriptor: int) -> None:
        """Hold `descriptor`, which is taken over, in the place of what was held so before.

        :raise OSError: if there is no descriptor for the service manager. It is closed then, and
            what was held stays, with the service manager too.
        """
        before = self._held.get((owner, name))
        if before is not None and open_files.is_same(before, descriptor):
            os.close(descriptor)
            return
        number = self._numbers.get((owner, name), 0) + 1
        try:
            others = self._names_of(owner, descriptor)
            if others and stat.S_ISREG(os.fstat(descriptor).st_mode):
                # A VMM that takes another's place may have the same memory file, and until it has
                # everything the names of both count (`postcopyd.incoming.replacing`).
                again = _opened_again(owner, descriptor)
                if again is not None:
                    os.close(descriptor)
                    descriptor, others = again, []
            kept_as = [other for other in others if (owner, other) in self._numbers]
            # What takes another's place is on its way from the other name to this one.
            stores = before is not None or not kept_as
            copy = os.dup(descriptor) if stores else -1
        except OSError:
            os.close(descriptor)
            raise
        if stores:
            self._manager.store(
                _stored_name(owner, name, number),
                copy,
                [
                    _stored_name(owner, other, self._numbers.pop((owner, other)))
                    for other in kept_as
                ],
            )
        self.release(owner, name)
        self._put(owner, name, descriptor)
        if stores:
            self._numbers[owner, name] = number

    def _names_of(self, owner: str, descriptor: int) -> list[str]:
        """Return by which names that owner has a copy of it held."""
        return [
            name
            for name in self._by_file.get(_file_of(owner, descriptor), ())
            if open_files.is_same(self._held[owner, name], descriptor)
        ]

    def _put(self, owner: str, name: str, descriptor: int) -> None:
        self._held[owner, name] = descriptor
        self._by_file.setdefault(_file_of(owner, descriptor), set()).add(name)

    def hold_until_the_end(self, owner: str, name: str, descriptor: int) -> None:
        """As `hold`, of what the service manager hands over at every start anyway."""
        self.release(owner, name)
        self._put(owner, name, descriptor)

    def release(self, owner: str, name: str) -> None:
        """Let go of it; nothing happens if it is not held."""
        descriptor = self._held.pop((owner, name), None)
        if descriptor is None:
            return
        file = _file_of(owner, descriptor)
        self._by_file[file].discard(name)
        if not self._by_file[file]:
            del self._by_file[file]
        number = self._numbers.pop((owner, name), None)
        if number is not None:
            stored = _stored_name(owner, name, number)
            for other in self._names_of(owner, descriptor):
                if (owner, other) not in self._numbers:
                    self._numbers[owner, other] = 1
                    # No new descriptor is needed: there might be none.
                    self._manager.store(_stored_name(owner, other, 1), descriptor, [stored])
                    return
            self._manager.unstore(stored)
        with contextlib.suppress(OSError):
            os.close(descriptor)

    def forget(self, owner: str) -> None:
        """Let go of all that is that owner's."""
        names = [name for held_by, name in self._held if held_by == owner]
        for name in names:
            number = self._numbers.pop((owner, name), None)
            if number is not None:
                self._manager.unstore(_stored_name(owner, name, number))
        for name in names:
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


def _opened_again(owner: str, descriptor: int) -> int | None:
    """Open a memory file once more; None if whoever made it keeps others from that.

    That is the loss of one migration, and no reason to end its worker.

    :raise OSError: if there is no descriptor for it.
    """
    try:
        return memory_file.open_again(descriptor)
    except OSError as error:
        if error.errno in _NONE_TO_BE_HAD:
            raise
        get_logger().warning(
            "the service manager keeps a memory file by one of its names only: if all of "
            "postcopyd is killed now, the migration may not be gone on with",
            migration=owner,
            reason=f"it cannot be opened again: {error.strerror}",
        )
        return None


def _file_of(owner: str, descriptor: int) -> _File:
    status = os.fstat(descriptor)
    return _File(owner, status.st_dev, status.st_ino)


def _stored_name(owner: str, name: str, number: int) -> str:
    """Return by which name the service manager keeps the `number`-th of that name."""
    return f"{owner}{_BETWEEN}{name}" + (f"{_NUMBER}{number}" if number > 1 else "")
