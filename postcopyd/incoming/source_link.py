"""The connections of one source: the main stream, its return path, and the preempt channel.

Nothing in a stream names its connection, so the first bytes tell (qemu-wire, 5.4): who speaks as a
main stream does is that, also if another connection was there first and has said nothing; whatever
comes while there is one and begins with a RAM record is its preempt channel.
"""

from __future__ import annotations

import asyncio
import errno
import select
import socket
from collections.abc import Callable
from typing import Final

from postcopyd.incoming.connection import Connection, socket_of
from postcopyd.incoming.goodbye import Goodbye
from postcopyd.incoming.path import StreamPath, path_of
from postcopyd.incoming.probing import Probing
from postcopyd.incoming.return_path import ReturnPath
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.stream import StreamConnection, prepare
from postcopyd.kernel import tcp
from postcopyd.kernel.memory import HOST_PAGE_SIZE
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import BlockEntry, Message
from postcopyd.wire.preempt_reader import FIRST_BYTE, PreemptReader
from postcopyd.wire.return_path import ReturnPathWriter
from postcopyd.wire.stream_format import MAGIC, Section
from postcopyd.wire.stream_reader import ResumeState, StreamLimits, StreamReader

_SILENT_LIMIT: Final = 4
"""Connections beside the main one that have not said what they are."""

_SILENCE: Final = (errno.ETIMEDOUT, errno.EHOSTUNREACH)
"""How the kernel ends a connection whose other end does not answer; the second knows more."""


class SourceLink:
    """What connects us with one source. For one main stream; made when that has connected."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        connection: Connection,
        peer: str,
        *,
        deliver: Callable[[Message], None],
        deliver_urgent: Callable[[Message], None],
        faults_first: Callable[[], None],
        lost: Callable[[Exception], None],
        preempt_attached: Callable[[str], None],
        silence_ended: Callable[[], None],
        mistaken: Callable[[list[tuple[Connection, str]]], None],
        refused: Callable[[str, str], None],
        others_fault: Callable[[], bool],
        resume: ResumeState | None = None,
    ) -> None:
        """Take over the main connection; nothing is received before `resume`.

        :param deliver: called with each message of the main stream; may raise `ProtocolError` or
            `OSError`.
        :param deliver_urgent: the same for the preempt channel.
        :param faults_first: called between receives.
        :param lost: called once, when one of the connections stops or is wrong: both are of no use
            then, because the source closes both (qemu-wire, 5.4).
        :param preempt_attached: told when there is a preempt channel, and where it comes from.
        :param silence_ended: told when a connection that had not said what it is has gone.
        :param mistaken: given all connections when the main one is another than was thought; that
            one first.
        :param refused: told whose further connection was closed, and why.
        :param others_fault: asked whether other guests of this event loop wait for their turn.
        :param resume: what a source that comes back after a break does not say again.
        """
        self._loop = loop
        self._settings = settings
        self.connection = connection
        self.peer = peer
        self._deliver_urgent = deliver_urgent
        self._faults_first = faults_first
        self._lost = lost
        self._preempt_attached = preempt_attached
        self._silence_ended = silence_ended
        self._mistaken = mistaken
        self._refused = refused
        self._stream = StreamReader(StreamLimits(package=settings.package_limit), resume)
        self.main = StreamConnection(
            loop,
            connection,
            self._stream,
            deliver=deliver,
            faults_first=self.urgent_first,
            lost=self._end,
            fault_window=settings.fault_window,
            others_fault=others_fault,
        )
        self._return_path = ReturnPath(loop, connection, self._return_path_lost)
        self.preempt: StreamConnection | None = None
        self._preempt_ended = False
        self._silent: dict[int, tuple[Connection, str]] = {}
        self._blocks: tuple[BlockEntry, ...] = resume.blocks if resume else ()
        self._expected = 0
        """How many connections may be added soon."""
        self._patience: asyncio.TimerHandle | None = None
        self._returning: tuple[Connection, str] | None = None
        self._goodbye: Goodbye | None = None
        self._told: list[Connection] = []
        """Connections on which a source that had come back was told that all is well."""
        self._lost_silently: str | None = None
        self._main_ended = False
        self._urgent = False
        self._closed = False
        self.package_came = resume is not None
        """True once the source can only come back, not begin anew."""
        self.path: StreamPath | None = path_of(socket_of(connection))
        """Between which addresses the main stream goes; None if it does not go over IP."""
        self._probing = Probing(
            loop,
            self._connections,
            self.break_off,
            replaced=self._is_replaced,
            received=lambda: self.bytes_received,
            patience=settings.break_after,
        )
        tcp.notice_break(socket_of(connection), settings.break_after)

    @property
    def bytes_received(self) -> int:
        """Of both channels."""
        urgent = self.preempt.bytes_received if self.preempt else 0
        return self.main.bytes_received + urgent

    @property
    def package_begun(self) -> bool:
        """True once the source has begun to send its device package."""
        return self._stream.package_begun

    @property
    def reading(self) -> str | None:
        """What the main stream is in the middle of; None between two messages."""
        return self._stream.reading

    def resume_state(self) -> ResumeState:
        """Return what this source will not say again; once its RAM blocks are known."""
        return self._stream.resume_state()

    @property
    def writer(self) -> ReturnPathWriter:
        """Makes return path messages; each must be sent, in the order in which it was made."""
        return self._return_path.writer

    def send(self, message: bytes, *, asked_for: bool = False) -> None:
        """Send on the return path. As `ReturnPath.send`."""
        self._return_path.send(message, asked_for=asked_for)

    # -- further connections ---------------------------------------------------------------------

    def add(self, connection: Connection, peer: str) -> None:
        """Take over a connection beside the main one, which may be its preempt channel."""
        if (
            (self.preempt is not None and not self.package_came)
            or len(self._silent) >= _SILENT_LIMIT
            or not _same_origin(connection, self.connection)
        ):
            self._refuse(connection, peer)
            return
        prepare(connection, self._settings.fault_window)
        tcp.notice_break(socket_of(connection), self._settings.break_after)
        descriptor = connection.fileno()
        self._silent[descriptor] = (connection, peer)
        self._loop.add_reader(descriptor, self._look, descriptor)
        self._bear_silence()

    def expect(self, connection: socket.socket) -> Callable[[bool], None]:
        """Count with a connection whose handshake is under way; it may be a preempt channel, too.

        :return: to be called when it is added, or will not be: then with True if a source may have
            made it.
        """
        if not _same_origin(connection, self.connection):
            return lambda _: None
        self._expected += 1

        def over(lost: bool) -> None:
            self._expected -= 1
            if lost:
                self._lost_silently = "was lost in its handshake"
            if not self._closed:
                self._silence_ended()

        return over

    def blocks_known(self, blocks: tuple[BlockEntry, ...]) -> None:
        """Say what a preempt channel may bring. One that speaks before waits for this."""
        self._blocks = blocks
        for descriptor in self._silent:
            self._loop.add_reader(descriptor, self._look, descriptor)
            self._loop.call_soon(self._look, descriptor)  # what was decrypted is told of no more

    def _look(self, descriptor: int) -> None:
        """See by its first byte what a connection is."""
        if descriptor not in self._silent:
            return
        connection, peer = self._silent[descriptor]
        try:
            first = connection.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            first = b""
        self._loop.remove_reader(descriptor)
        if first and first[0] == FIRST_BYTE and not self._blocks:
            return
        del self._silent[descriptor]
        if not first:
            connection.close()  # it has gone without a word
            self._lost_silently = "has gone"
            self._silence_ended()
        elif first[0] == self._first_byte_of_main and self._main_is_silent():
            self._make_way(connection, peer)
        elif first[0] == Section.COMMAND and self.package_came:
            self._keep_returning(connection, peer)
        elif first[0] != FIRST_BYTE or self.preempt is not None:
            self._refuse(connection, peer)
        else:
            self._begin_preempt(connection, peer)

    @property
    def _first_byte_of_main(self) -> int:
        return Section.COMMAND if self.package_came else MAGIC[0]

    def _main_is_silent(self) -> bool:
        """Tell whether the main connection has said nothing; what it has may not be read yet."""
        if self.bytes_received:
            return False
        try:
            silent = not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:  # nothing is there yet, or it has broken
            return True
        if not silent:
            self._loop.call_soon(self.main.receive_waiting)  # what is decrypted is told of no more
        return silent

    def _make_way(self, connection: Connection, peer: str) -> None:
        """Give all connections away, because another one speaks as a main stream does.

        The one that was thought to be that has said nothing, so it is its preempt channel: a QEMU
        makes both nearly at the same time, and a TLS handshake that loses a packet is overtaken.
        """
        for descriptor in self._silent:
            self._loop.remove_reader(descriptor)
        others = list(self._silent.values())
        self._silent.clear()
        self.main.release()
        self._mistaken([(connection, peer), *others, (self.connection, self.peer)])

    def _keep_returning(self, connection: Connection, peer: str) -> None:
        """Keep a source that comes back before we have noticed that it was away.

        Only when the connection that we have breaks is that known to be true; until then it waits,
        so that nobody ends a good connection by opening another one. A dead one is found out soon:
        `Probing` says how.
        """
        if self._goodbye is not None:
            self._tell(connection, peer)
            return
        if self._returning is not None:
            before, earlier = self._returning
            before.close()
            self._refused(earlier, f"has been resumed once more since, by {peer}")
        self._returning = (connection, peer)
        self.probe()

    def _is_replaced(self) -> bool:
        """Tell whether a source that is back waits, and the one that we have could bring pages."""
        if self._returning is None:
            return False
        if _has_left(self._returning[0]):
            self._returning[0].close()
            self._returning = None
            return False
        if self._main_ended:
            return self.preempt is not None and not self.preempt.paused
        return not self.main.paused

    def take_returning(self) -> list[tuple[Connection, str]]:
        """Give away the connections of a source that has come back, the main one first, if any."""
        if self._returning is None:
            return []
        for descriptor in self._silent:
            self._loop.remove_reader(descriptor)
        # One that is silent yet is its preempt channel.
        returning = [self._returning, *self._silent.values()]
        self._returning = None
        self._silent.clear()
        return returning

    def _refuse(self, connection: Connection, peer: str) -> None:
        connection.close()
        self._refused(peer, f"already has a source: {self.peer}")

    def _begin_preempt(self, connection: Connection, peer: str) -> None:
        self.preempt = StreamConnection(
            self._loop,
            connection,
            PreemptReader(self._blocks, HOST_PAGE_SIZE),
            deliver=self._deliver_urgent,
            faults_first=self._faults_first,
            lost=self._preempt_lost,
            fault_window=self._settings.fault_window,
            urgent=True,
        )
        self.main.requests_come_elsewhere()
        self._preempt_attached(peer)
        if not self.main.paused:
            self.preempt.resume()

    def _preempt_lost(self, error: Exception) -> None:
        preempt = self.preempt
        assert preempt is not None
        if self._preempt_ended and isinstance(error, ConnectionResetError):
            preempt.pause()  # a 7.2 has said that nothing follows
            return
        self.break_off(error)

    @property
    def urgent_ended(self) -> bool:
        """True when nothing can come any more beside the main stream.

        A connection that has not said what it is yet may be a preempt channel whose first page is
        on its way, and no order is kept between that and the end of the main stream. When there is
        a preempt channel it is none: a source has one.
        """
        if self.preempt is not None:
            return self._preempt_ended
        return not self._silent and not self._expected

    @property
    def may_have_lost_pages(self) -> str | None:
        """What has become of a connection that may have been a preempt channel with a first page.

        What was on its way on a connection that breaks is lost, so nobody can tell. A source that
        notices closes everything, but one that has nothing urgent to send any more does not notice.

        :return: the end of a sentence about that connection; None if there was none.
        """
        return self._lost_silently if self.preempt is None else None

    def preempt_ended(self) -> None:
        """Say that the end of the preempt channel is delivered, and so all that was before it."""
        self._preempt_ended = True

    def main_ended(self) -> None:
        """Say that nothing follows on the main stream: who stays silent from now on has to go.

        Not before `break_after`, in which a page that is on its way comes or its connection is
        dead: a QEMU that has sent everything cannot come back (qemu-wire, 5.2), so what is waited
        for is given up late.
        """
        self._main_ended = True
        if self.main.ending is not None:
            self._end(self.main.ending)
        self._bear_silence()

    def _bear_silence(self) -> None:
        if self._main_ended and self._silent and self._patience is None:
            self._patience = self._loop.call_later(self._settings.break_after, self._drop_silent)

    def _drop_silent(self) -> None:
        self._patience = None
        for descriptor, (connection, _) in self._silent.items():
            self._loop.remove_reader(descriptor)
            connection.close()
        if self._silent:
            within = self._settings.break_after
            self._lost_silently = f"has said nothing for {within} s after the end of the stream"
        self._silent.clear()
        self._silence_ended()

    # -- is it still there? ----------------------------------------------------------------------

    def probe(self) -> None:
        """Find out within seconds if the source has gone."""
        self._probing.begin()

    def _connections(self) -> list[socket.socket]:
        preempt = self.preempt
        if preempt is None or self._preempt_ended:
            return [socket_of(self.connection)]
        return [socket_of(self.connection), socket_of(preempt.connection)]

    # -- receiving -------------------------------------------------------------------------------

    def urgent_first(self) -> None:
        """Between two receives of the main stream: what the guest waits for comes first."""
        if self.preempt is not None and not self._urgent:
            self._urgent = True
            try:
                self.preempt.receive_waiting()
            finally:
                self._urgent = False
        self._faults_first()

    def pause(self) -> None:
        """Deliver and receive nothing until `resume`."""
        self.main.pause()
        if self.preempt is not None:
            self.preempt.pause()

    def resume(self) -> None:
        """Deliver what is waiting, urgent pages first, then receive again."""
        self.resume_preempt()
        if not self._closed:
            self.main.resume()

    def resume_preempt(self) -> None:
        """As `resume`, for the preempt channel alone: the main stream has ended."""
        if self.preempt is not None:
            self.preempt.resume()

    # -- the end ---------------------------------------------------------------------------------

    def confirm(self) -> None:
        """Tell the source that all is well, wherever it is."""
        self._goodbye = Goodbye(self.connection)
        self.send(self.writer.shut(0))
        if self._returning is not None:
            connection, peer = self._returning
            self._returning = None
            self._tell(connection, peer)

    def _tell(self, connection: Connection, peer: str) -> None:
        assert self._goodbye is not None
        if len(self._told) >= _SILENT_LIMIT:
            self._refuse(connection, peer)
            return
        self._told.append(connection)
        self._goodbye.returned(connection)

    async def wait_for_close(self) -> None:
        """Return when the source has closed its connection, or had the time to, after `confirm`."""
        assert self._goodbye is not None
        await self._goodbye.wait_for_close(self._settings.close_timeout)

    def _return_path_lost(self, error: Exception) -> None:
        if self._main_ended:
            self._end(error)
        else:
            self.main.end_behind_what_is_here(error)

    def break_off(self, error: Exception) -> None:
        """Take the connections for lost; of the main one what has come is taken first.

        That is, as long as the package has not come, which may be there. After it whatever is lost
        is asked for anew.
        """
        if not self.package_came and not isinstance(error, ProtocolError):
            self.main.end_behind_what_is_here(error)
        else:
            self._end(error)

    def _end(self, error: Exception) -> None:
        if self._closed:
            return
        if isinstance(error, OSError) and error.errno in _SILENCE:
            within = self._settings.break_after
            error = TimeoutError(f"its host has been silent for {within} s ({error.strerror})")
        self._lost(error)

    def close(self) -> None:
        """Close all connections. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._patience is not None:
            self._patience.cancel()
        self._probing.stop()
        for descriptor, (connection, _) in self._silent.items():
            self._loop.remove_reader(descriptor)
            connection.close()
        self._silent.clear()
        if self._returning is not None:
            self._returning[0].close()
            self._returning = None
        for connection in self._told:
            connection.close()
        self._told.clear()
        if self.preempt is not None:
            self.preempt.close()
        self._return_path.close()
        self.main.close()


def _same_origin(one: Connection, other: Connection) -> bool:
    """Tell whether two connections come from the same host; those of this host do."""
    if one.family == socket.AF_UNIX:
        return True
    try:
        return bool(one.getpeername()[0] == other.getpeername()[0])
    except OSError:  # it has gone; the next look at it tells
        return True


def _has_left(connection: Connection) -> bool:
    """Tell whether the other end has closed `connection`, whatever is still to be read."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))
