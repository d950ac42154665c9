"""The source of a migration: it comes, is lost, comes back, and is asked for pages."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Final

from postcopyd.incoming import events
from postcopyd.incoming.arrival import Arrival
from postcopyd.incoming.company import Company
from postcopyd.incoming.connection import Connection
from postcopyd.incoming.course import Course
from postcopyd.incoming.ending import Ending
from postcopyd.incoming.farewell import Farewell
from postcopyd.incoming.idle_watch import IdleWatch
from postcopyd.incoming.path import PathGone, PathLoss
from postcopyd.incoming.reception import Reception
from postcopyd.incoming.recipient import Recipient, Refused
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.source_link import SourceLink
from postcopyd.incoming.standing import Standing
from postcopyd.incoming.states import AFTER_SWITCHOVER, State
from postcopyd.incoming.switchover import Switchover
from postcopyd.incoming.tasks import Tasks
from postcopyd.ram.block import RamBlock
from postcopyd.wire.errors import NotAStream, ProtocolError
from postcopyd.wire.stream_format import HEADER_LENGTH

_LONGEST_REQUEST: Final = 1 << 31
"""Bytes; the length in a request has 32 bits (qemu-wire, 4.2)."""


class Sourcing:
    """Keeps one migration in touch with its source, as long as there is one."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        course: Course,
        recipient: Recipient,
        switchover: Switchover,
        arrival: Arrival,
        farewell: Farewell,
        standing: Standing,
        tasks: Tasks,
        ending: Ending,
        company: Company,
        *,
        trace: Callable[[events.Event], None],
        request_pages: Callable[[list[tuple[RamBlock, range]]], None],
    ) -> None:
        """Wait for a source; the parts are those of the migration called `name`.

        :param trace: told of what happens once.
        :param request_pages: asks the source for pages.
        """
        self._name = name
        self._settings = settings
        self._course = course
        self._recipient = recipient
        self._switchover = switchover
        self._arrival = arrival
        self._farewell = farewell
        self._standing = standing
        self._tasks = tasks
        self._ending = ending
        self._company = company
        self._trace = trace
        self._request_pages = request_pages
        self._loop = asyncio.get_running_loop()
        self._reception: Reception | None = None
        self._path_loss = PathLoss(self._loop, settings.path_grace, self._path_over)
        self._idle = IdleWatch(
            self._loop,
            received=self._received_of_who_may_not_be_silent,
            may_be_silent=self._source_waits,
            idle=self._silent,
        )

    # -- it comes --------------------------------------------------------------------------------

    def attach(self, connection: Connection, peer: str) -> None:
        """Receive from `connection`, as the first of a source or beside the one there is.

        :raise Refused: if it is too late for one. `connection` then still is the caller's.
        """
        if self._standing.link is not None:
            self._standing.link.add(connection, peer)
            return
        if self._farewell.returned(connection):
            return
        if self._standing.waits_for_vmm:
            raise Refused(f"migration {self._name!r} waits for another VMM: retry that first")
        if self._course.state not in (State.NONE, State.PAUSED):
            raise Refused(
                f"migration {self._name!r} is {self._course.state.value}: it takes no stream"
            )
        self._path_loss.end()
        self._arrival.stream_ended = False
        self._reception = reception = Reception(
            self._course,
            self._recipient,
            self._switchover,
            self._arrival,
            self._farewell,
            self._tasks,
            vmm_timeout=self._settings.vmm_timeout,
            return_path_open=self._standing.resume is not None,
            trace=self._trace,
            go_on=self._go_on,
            resume=self.resume,
            ended=self.look_for_the_end,
            placed_behind_the_end=self._ending.come_if_all_is_here,
        )
        link = SourceLink(
            self._loop,
            self._settings,
            connection,
            peer,
            deliver=reception.deliver,
            deliver_urgent=reception.deliver_urgent,
            faults_first=self._recipient.read_faults,
            lost=self._stream_lost,
            preempt_attached=self._preempt_attached,
            silence_ended=self.look_for_the_end,
            mistaken=self._take_anew,
            refused=self._connection_refused,
            others_fault=self._company.others_fault,
            resume=self._standing.resume,
        )
        self._standing.connected(link, peer)
        self._trace(events.StreamAttached(peer))
        self._idle.begin(self._settings.first_byte_timeout, self._settings.idle_timeout)
        reception.begin(link)

    def expect(self, connection: socket.socket) -> Callable[[bool], None]:
        """Count with a connection that may be attached soon. As `SourceLink.expect`."""
        link = self._standing.link
        return link.expect(connection) if link is not None else lambda _: None

    def _take_anew(self, connections: list[tuple[Connection, str]]) -> None:
        """Take the connections of a source, in this order, in the place of what there is."""
        self.drop()
        for connection, peer in connections:
            try:
                self.attach(connection, peer)
            except Refused as error:
                connection.close()
                self._trace(events.ConnectionRefused(peer, str(error)))

    def _connection_refused(self, peer: str, why: str) -> None:
        self._trace(events.ConnectionRefused(peer, f"migration {self._name!r} {why}"))

    def _go_on(self) -> None:
        """Go on with a source that is back and knows what is here."""
        link, recipient = self._standing.link, self._recipient
        assert link is not None
        self._course.failure = None
        runs = recipient.loaded_at is not None
        self._course.step(State.RUNNING if runs else State.LISTENING)
        link.send(link.writer.resume_ack())
        if not runs:
            self._switchover.request_missing()
        recipient.filling.go_on()
        waited_for, around = recipient.filling.ask_again()
        self._request_pages([piece for asked in waited_for + around for piece in _pieces(*asked)])
        self._trace(events.Resumed(link.peer, len(waited_for)))

    # -- what comes, and its end -----------------------------------------------------------------

    def resume(self) -> None:
        """Go on with what comes, unless it has to wait.

        For another VMM, or until what is put off is placed: that lies where the next bytes go.
        """
        link = self._standing.link
        if link is None or self._standing.waits_for_vmm or self._recipient.stalled:
            return
        if self._arrival.stream_ended:
            link.resume_preempt()
        else:
            link.resume()

    def look_for_the_end(self) -> None:
        """Act on the end of a connection on which pages may have come, in good order or not."""
        link, recipient = self._standing.link, self._recipient
        if link is None or self._course.state not in AFTER_SWITCHOVER:
            return
        loss = self._arrival.loss(link)
        if loss is not None:
            self.lose(loss)
        elif self._arrival.stream_ended:
            if link.urgent_ended:
                recipient.loading.all_came()
            self._ending.come_if_all_is_here()

    def _preempt_attached(self, peer: str) -> None:
        self._standing.preempt = peer
        self._trace(events.PreemptAttached(peer))
        if self._arrival.stream_ended:
            self.resume()  # the main one does it no more

    # -- it is lost ------------------------------------------------------------------------------

    def _stream_lost(self, error: Exception) -> None:
        """React to a stream that stopped or is wrong."""
        assert self._standing.link is not None
        if self._course.state.ended or (self._arrival.stream_ended and self._ending.all_came()):
            return
        told = isinstance(error, ProtocolError | PathGone)
        reading = self._standing.link.reading
        within = f" in the middle of {reading}" if reading else ""
        peer = self._standing.peer
        reason = str(error) if told else f"the stream from {peer} broke{within}: {error}"
        if isinstance(error, NotAStream):
            self.drop()
            self._connection_refused(peer or "", f"has not begun: {error}")
        elif self._may_be_a_stranger():
            self.drop()
            self._trace(events.StreamDropped(peer or ""))
        else:
            self.lose(reason)

    def _may_be_a_stranger(self) -> bool:
        """Tell whether what is connected has not said enough to be known for the source.

        It may be a source whose package has never come here, which will begin anew, or somebody
        who is none. The migration is to be here for its source.
        """
        assert self._standing.link is not None
        least = {State.NONE: HEADER_LENGTH, State.PAUSED: 1}.get(self._course.state, 0)
        return self._standing.link.bytes_received < least

    def _path_over(self, reason: str) -> None:
        if self._standing.link is not None:
            self._standing.link.break_off(
                PathGone(
                    f"the network path to the source at {self._standing.peer} is gone: {reason}"
                )
            )

    def drop(self) -> None:
        """Close what connects us with the source, if anything does. Idempotent."""
        self._path_loss.stop_waiting()
        self._idle.end()
        link = self._standing.disconnected()
        if link is None:
            return
        assert self._reception is not None
        self._reception.stop()
        self._recipient.stream_lost()
        link.close()

    def lose(self, reason: str) -> None:
        """End it before the package, pause it after."""
        if self._course.state.ended:
            return
        if self._course.state.before_package:
            self._ending.fail(reason)
            return
        self._course.failure = reason
        returning = self._standing.link.take_returning() if self._standing.link is not None else []
        self.drop()
        self._farewell.release()
        if self._course.state is not State.PAUSED:
            self._course.step(State.PAUSED)
        self._trace(events.Paused(reason))
        self._take_anew(returning)

    def tell_that_it_failed(self) -> None:
        """In pre-copy SHUT 1 lets the source fail at once and go on (qemu-wire, 5.2)."""
        link, reception = self._standing.link, self._reception
        if link is not None and reception is not None and reception.return_path_open:
            link.send(link.writer.shut(1))

    # -- the network on the way ------------------------------------------------------------------

    @property
    def path_loss(self) -> str | None:
        """Why the network does not carry the stream; None if it does."""
        return self._path_loss.reason

    def path_lost(self, reason: str, for_good: bool) -> None:
        """Break the stream when the network has not carried it for `Settings.path_grace`.

        :param for_good: the stream can never go on, so it breaks at once.
        """
        if self._course.state.ended:
            return
        if reason != self._path_loss.reason:
            self._trace(events.PathLost(reason))
        self._path_loss.begin(reason, for_good)

    def path_back(self) -> None:
        """Be told that the network would carry the stream again."""
        if self._course.state.ended:
            return
        self._path_loss.end()
        self._trace(events.PathBack())
        if self._standing.link is not None:
            self._standing.link.probe()  # its other end may have given it up meanwhile

    # -- it says nothing -------------------------------------------------------------------------

    def _received_of_who_may_not_be_silent(self) -> int | None:
        """Give the bytes of a source that is to say something; after the package it need not.

        Unless it has come back only to be silent: it would be in another's way.
        """
        link = self._standing.link
        if link is None or self._course.state in AFTER_SWITCHOVER:
            return None
        return link.bytes_received

    def _silent(self, seconds: float) -> None:
        peer, silence = self._standing.peer or "", f"has sent nothing for {seconds:g} s"
        if self._may_be_a_stranger():
            self.drop()
            self._connection_refused(peer, f"waits for a source that speaks: this one {silence}")
        else:
            self.lose(f"the source at {peer} {silence}")

    def _source_waits(self) -> bool:
        """Tell whether the source waits for us, as one does whose pre-copy has converged."""
        assert self._standing.link is not None
        return self._standing.link.main.paused or self._course.state is State.CONVERGED


def _pieces(block: RamBlock, pages: range) -> Iterator[tuple[RamBlock, range]]:
    """Yield requests for `pages` that are short enough."""
    most = _LONGEST_REQUEST // block.page_size
    for start in range(pages.start, pages.stop, most):
        yield block, range(start, min(start + most, pages.stop))
