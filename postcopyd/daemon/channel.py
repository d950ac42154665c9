"""What supervisor and worker say to each other: one packet a message, descriptors beside it.

What a worker has sent is the supervisor's even if the worker is killed in the next instant: packet
and descriptors lie in the socket.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
from collections.abc import Iterator
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

CONTROL: Final = "control"
HANDOFF: Final = "handoff"
"""The daemon's own listening sockets."""

Standing: TypeAlias = Literal["waiting", "running", "ended", "unreadable"]
"""Of a migration: it waits for a VMM, it has one, it has ended, or nobody can go on with it."""
Refusal: TypeAlias = Literal["name-taken", "too-many-migrations", "out-of-resources"]
Passed: TypeAlias = Literal["request", "vmm"]
"""What a connection that is passed on brings: a request of the control API, or a VMM's handoff
(`postcopyd.vmm.handoff`)."""

_PACKET: Final = 160 << 10
"""Longest message, bytes: it has to fit the socket's buffer."""
_PATIENCE: Final = 2
"""Seconds that sending may take: guests wait meanwhile."""
_MOST_DESCRIPTORS: Final = 1
_ROOM: Final = socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)


_Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=255, pattern=r"\A[A-Za-z0-9._-]*\Z")]
_Line: TypeAlias = Annotated[str, msgspec.Meta(max_length=4096, pattern=r"\A[^\n]*\Z")]
"""They go on to the service manager, in whose protocol a line is an order (sd_notify(3))."""


class _Message(msgspec.Struct, frozen=True, tag_field="message", forbid_unknown_fields=True):
    pass


class Held(_Message, frozen=True, tag="held"):
    """From either: a descriptor comes along; of which migration it is, and its name there.

    To a worker it is what a predecessor has left, to the supervisor what is to be held.
    """

    owner: _Name
    """The name of a migration; empty for what is the daemon's own."""
    name: _Name


class Released(_Message, frozen=True, tag="released"):
    """From a worker: nothing needs to be held by that name any more."""

    owner: _Name
    name: _Name


class Forgotten(_Message, frozen=True, tag="forgotten"):
    """From a worker: nothing of that migration needs to be held any more."""

    owner: _Name


class Settle(_Message, frozen=True, tag="settle"):
    """From a worker: everything that was said before is to outlive us all; `Settled` follows."""


class Settled(_Message, frozen=True, tag="settled"):
    """To a worker: it does, the service manager has got it. In the order of the questions."""


class Begin(_Message, frozen=True, tag="begin"):
    """To a worker: it has got all that is its own, and does its part of the work from now on."""

    configuration: msgspec.Raw
    manager_keeps: bool
    """True if a service manager holds copies, too: then who finds the supervisor dead makes room
    for its successor."""
    number: int
    """Which of the workers it is, counted from 0: that is the front."""
    workers: int
    """How many there are."""
    first: bool
    """True if no worker of that number has been ready before."""


class Stop(_Message, frozen=True, tag="stop"):
    """To a worker: end what can be ended. `Ended` follows."""


class Ended(_Message, frozen=True, tag="ended"):
    """From a worker that was told to stop: all its migrations have ended."""


class End(_Message, frozen=True, tag="end"):
    """To a worker: those of all others have ended as well; go."""


class Leave(_Message, frozen=True, tag="leave"):
    """To a worker: end as if killed, and leave the migrations to a successor that is to come."""


class Reload(_Message, frozen=True, tag="reload"):
    """To a worker that is ready: read anew what may change while it runs. `Reloaded` follows."""


class Reloaded(_Message, frozen=True, tag="reloaded"):
    """From a worker: it has."""


class Ready(_Message, frozen=True, tag="ready"):
    """From a worker: it does the daemon's work, and goes on with all that it was handed."""


class Alive(_Message, frozen=True, tag="alive"):
    """From a worker: its event loop goes round."""


class CannotStart(_Message, frozen=True, tag="cannot-start"):
    """From a worker: it cannot do the daemon's work, and another one could not either."""

    reason: Annotated[str, msgspec.Meta(max_length=4096)]


# -- which migrations there are, and where ---------------------------------------------------------


class Listed(_Message, frozen=True, tag="listed"):
    """From a worker: it has a migration of that name, which stands so now."""

    name: _Name
    state: _Line
    standing: Standing


class Unlisted(_Message, frozen=True, tag="unlisted"):
    """From a worker: it has none of that name any more."""

    name: _Name


class Forget(_Message, frozen=True, tag="forget"):
    """To a worker: let the migration of that name, if it has ended, not be listed any more."""

    name: _Name


class Claim(_Message, frozen=True, tag="claim"):
    """From a worker: it wants to create a migration of that name. `Claimed` follows."""

    name: _Name


class Claimed(_Message, frozen=True, tag="claimed"):
    """To a worker: the name is its own until it says `Forgotten`, or is refused."""

    name: str
    refusal: Refusal | None


class Where(_Message, frozen=True, tag="where"):
    """From the front: who has the migration of that name? `There` follows."""

    token: int
    name: str | None
    """None for all those that wait for a VMM."""


class There(_Message, frozen=True, tag="there"):
    """To the front: how it was when all that the workers had said was heard."""

    token: int
    worker: int | None
    """Who has the migration, or has it listed as ended; None for nobody."""
    owner: int | None
    """Who has it, if it has not ended."""
    ready: dict[int, int]
    """The workers that work -> how many migrations each has that have not ended."""
    waiting: tuple[str, ...]
    """Some of the migrations that wait for a VMM."""
    number_waiting: int


class PassOn(_Message, frozen=True, tag="pass-on"):
    """From the front: a connection comes along, for another worker.

    It is closed if that one is not there, or does not read.
    """

    worker: int
    what: Passed


class Handed(_Message, frozen=True, tag="handed"):
    """To a worker: that connection, unless it had no descriptor to spare to take it with."""

    what: Passed


Message: TypeAlias = (
    Held
    | Released
    | Forgotten
    | Settle
    | Settled
    | Begin
    | Stop
    | Leave
    | Ended
    | End
    | Reload
    | Reloaded
    | Ready
    | Alive
    | CannotStart
    | Listed
    | Unlisted
    | Forget
    | Claim
    | Claimed
    | Where
    | There
    | PassOn
    | Handed
)

_decoder = msgspec.json.Decoder(Message)


class Channel:
    """One end. Nothing is sent or received but by the caller's own calls."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connected Unix socket of sequential packets."""
        self._connection = connection
        self._connection.setblocking(True)
        patience = struct.pack("ll", _PATIENCE, 0)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """Return two connected sockets, close-on-exec."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def fileno(self) -> int:
        """Return the descriptor, -1 when closed."""
        return self._connection.fileno()

    def send(
        self, message: Message, descriptor: int | None = None, *, at_once: bool = False
    ) -> None:
        """Send; waits a while if the other end has much to read.

        :param at_once: do not wait.
        :raise OSError: if there is no other end any more (EPIPE, ECONNRESET), or it does not read
            (EAGAIN).
        """
        packet = msgspec.json.encode(message)
        rights = []
        if descriptor is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        flags = socket.MSG_NOSIGNAL | (socket.MSG_DONTWAIT if at_once else 0)
        self._connection.sendmsg([packet], rights, flags)

    def received(self) -> Iterator[tuple[Message, int | None]]:
        """Give what has come, without waiting; a descriptor is the caller's then.

        :raise EOFError: when the other end has gone and everything was given, or has sent an empty
            packet, which looks the same.
        :raise ValueError: if something else than a message has come, or not with the descriptor
            that belongs to it. One that got lost (this process has too many) must not pass for
            one that never was: what it is for would be given up. But for a connection that is
            handed over: its other end notices, and who had it passed on tells its client.
        """
        reset = False
        while True:
            try:
                packet, ancillary, _, _ = self._connection.recvmsg(
                    _PACKET, _ROOM, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return
            except ConnectionResetError:
                # The other end had not read everything. The kernel says so once, and first; what
                # it had sent itself comes all the same.
                if reset:
                    raise EOFError from None
                reset = True
                continue
            descriptors = array.array("i")
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors.frombytes(content)
            try:
                message = _decoded(packet, len(descriptors))
            except BaseException:
                for descriptor in descriptors:
                    os.close(descriptor)
                raise
            yield message, descriptors[0] if descriptors else None

    def wait(self) -> None:
        """Return when something has come, or the other end has gone."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.poll()

    def close(self) -> None:
        """Close it. Idempotent."""
        self._connection.close()


def _decoded(packet: bytes, descriptors: int) -> Message:
    if not packet:
        raise EOFError
    try:
        message: Message = _decoder.decode(packet)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    lost = isinstance(message, Handed) and not descriptors
    if descriptors != isinstance(message, Held | PassOn | Handed) and not lost:
        name = message.__struct_config__.tag
        raise ValueError(f"a message {name!r} came with {descriptors} descriptors")
    return message
