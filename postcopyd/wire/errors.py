"""The exceptions of the codecs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

_Message = TypeVar("_Message")


class ProtocolError(Exception):
    """A peer sent something that it must not send, or stopped in the middle.

    The text says what was wrong and, where it is known, at which byte of the connection.
    """

    def __init__(self, what: str, position: int | None = None) -> None:
        """Name the mistake.

        :param position: number of the byte, counted from 0 at the start of the connection, at
            which the wrong message or record begins; None when it is not about one place.
        """
        super().__init__(what, position)
        self.what = what
        self.position = position

    def __str__(self) -> str:
        if self.position is None:
            return self.what
        return f"at byte {self.position}: {self.what}"


class NotAStream(ProtocolError):
    """What has connected does not begin as a migration does, so nothing has begun here."""


class NothingToResume(NotAStream):
    """A source wants to resume what has not begun here. It may begin anew on another connection."""


def messages_then_error(messages: Iterable[_Message], error: ProtocolError) -> Iterator[_Message]:
    """Give the messages in front of a mistake, then raise it.

    What came whole counts, however the bytes were split: a device package must not be lost to a
    mistake behind it, because its source cannot take the guest back.
    """
    yield from messages
    raise error
