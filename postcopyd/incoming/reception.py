"""What each message of a source's stream does, on both channels."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from postcopyd.incoming import events
from postcopyd.incoming.arrival import Arrival
from postcopyd.incoming.course import Course
from postcopyd.incoming.farewell import Farewell
from postcopyd.incoming.recipient import MAIN, PREEMPT, Recipient
from postcopyd.incoming.source_link import SourceLink
from postcopyd.incoming.states import AFTER_SWITCHOVER, State, check_message
from postcopyd.incoming.switchover import Switchover
from postcopyd.incoming.tasks import Tasks
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import (
    Advise,
    BlockList,
    Configuration,
    DeviceState,
    Discard,
    EndOfStream,
    Message,
    Opaque,
    OpenReturnPath,
    Package,
    Pages,
    Ping,
    PostcopyResume,
    PreemptEnd,
    RamSectionEnd,
    ReceivedBitmapRequest,
    SwitchoverStart,
    ZeroPages,
)


class Reception:
    """Carries out what one stream says; the next stream has its own."""

    def __init__(
        self,
        course: Course,
        recipient: Recipient,
        switchover: Switchover,
        arrival: Arrival,
        farewell: Farewell,
        tasks: Tasks,
        *,
        vmm_timeout: float,
        return_path_open: bool,
        trace: Callable[[events.Event], None],
        go_on: Callable[[], None],
        resume: Callable[[], None],
        ended: Callable[[], None],
        placed_behind_the_end: Callable[[], None],
    ) -> None:
        """Wait for `begin`.

        :param vmm_timeout: seconds that the source waits for the VMM.
        :param return_path_open: true when the source has come back, and does not open it again.
        :param trace: told of what happens once.
        :param go_on: told when a source that has come back knows what is here.
        :param resume: told when the stream need not stand still any more.
        :param ended: told when nothing follows on the main stream, or on the preempt channel.
        :param placed_behind_the_end: told of every message that comes behind the main stream.
        """
        self._course = course
        self._recipient = recipient
        self._switchover = switchover
        self._arrival = arrival
        self._farewell = farewell
        self._tasks = tasks
        self._vmm_timeout = vmm_timeout
        self.return_path_open = return_path_open
        self._trace = trace
        self._go_on = go_on
        self._resume = resume
        self._ended = ended
        self._placed_behind_the_end = placed_behind_the_end
        self._link: SourceLink
        self._over = False
        self._told: set[str] = set()
        """Blocks of which this source knows what is here."""

    def begin(self, link: SourceLink) -> None:
        """Receive from `link`, whose messages come here."""
        self._link = link
        link.resume()

    def stop(self) -> None:
        """Go on with nothing that is under way: the link is another's, or none."""
        self._over = True

    def deliver(self, message: Message) -> None:
        """Act on one message of the main stream.

        :raise ProtocolError: if it is not legal here or contradicts the VMM.
        :raise OSError: if there is no memory to keep it.
        """
        state = self._course.state
        if state is State.RUNNING and type(message) is Pages:
            self._place(message, MAIN)  # the hot path
            return
        if state is State.PAUSED and isinstance(message, ReceivedBitmapRequest):
            self._course.step(State.RECOVER)
        check_message(self._course.state, message, self._link.main.reader.position)
        match message:
            case Pages() | ZeroPages():
                if state in AFTER_SWITCHOVER:
                    self._place(message, MAIN)
                else:
                    self._recipient.keep(message)
            case RamSectionEnd() | SwitchoverStart():
                pass
            case Configuration():
                self._recipient.configure(message)
            case OpenReturnPath():
                self.return_path_open = True
            case Ping():
                self._pong(message.value)
            case Advise():
                self._aside(self._prepare(message))
            case BlockList():
                self._recipient.take_block_list(message)
                self._link.blocks_known(message.blocks)
            case Discard():
                self._take_discard(message)
            case Package():
                self._take_package(message)
            case DeviceState():
                self._converge()
            case Opaque():
                self._aside(self._recipient.loading.feed(bytes(message.data)))
            case EndOfStream():
                self._take_end_of_stream()
            case ReceivedBitmapRequest():
                self._tell_what_is_here(message.block)
            case PostcopyResume():
                self._go_on()
            case _:
                raise ProtocolError(f"{type(message).__name__} is not supported", None)

    def deliver_urgent(self, message: Message) -> None:
        """Act on one message of the preempt channel. As `deliver`."""
        if self._course.state not in AFTER_SWITCHOVER:
            raise ProtocolError(
                f"the preempt channel brings pages in state {self._course.state.value}", None
            )
        match message:
            case Pages() | ZeroPages():
                self._place(message, PREEMPT)
            case PreemptEnd():
                if self._recipient.in_a_host_page(PREEMPT):
                    raise ProtocolError(
                        "the preempt channel ends in the middle of a host page", None
                    )
                self._link.preempt_ended()
                self._ended()
            case _:
                raise ProtocolError(f"{type(message).__name__} on the preempt channel", None)
        if self._arrival.stream_ended:
            self._placed_behind_the_end()

    def _place(self, message: Pages | ZeroPages, channel: int) -> None:
        link = self._link
        if not self._recipient.place(message, channel):
            link.pause()
        if self._recipient.waiting:
            link.main.go_carefully()

    def _pong(self, value: int) -> None:
        if not self.return_path_open:
            raise ProtocolError(f"PING {value} came before a return path was opened", None)
        self._link.send(self._link.writer.pong(value))

    async def _prepare(self, message: Advise) -> None:
        """Wait for the VMM and make it ready."""
        try:
            async with asyncio.timeout(self._vmm_timeout):
                await self._recipient.attached.wait()
        except TimeoutError:
            raise ProtocolError(
                f"no VMM has handed over its memory within {self._vmm_timeout:g} s", None
            ) from None
        await self._recipient.prepare(message, self.return_path_open)
        self._course.step(State.ADVISE)

    def _tell_what_is_here(self, block: str) -> None:
        if block in self._told:
            raise ProtocolError(f"it asks twice what is here of block {block!r}", None)
        self._told.add(block)
        bitmap = self._recipient.received_bitmap(block)
        self._link.send(self._link.writer.received_bitmap(block, bitmap), asked_for=True)

    def _take_discard(self, message: Discard) -> None:
        if self._course.state is State.ADVISE:
            self._require_block_list("a discard")
            self._switchover.begin()
            self._aside(self._switchover.first_discard(message))
        else:
            self._recipient.discard(message)

    def _require_block_list(self, before: str) -> None:
        if not self._recipient.has_block_list:
            raise ProtocolError(f"{before} came before the list of RAM blocks", None)

    def _take_package(self, message: Package) -> None:
        self._require_block_list("the device package")
        self._recipient.take_package(message)
        self._link.package_came = True
        # From here on the source cannot take the guest back: every error is a pause.
        self._switchover.begin()
        self._course.step(State.LISTENING)
        self._trace(events.PackageReceived(len(message.data)))
        self._aside(self._switchover.listen())

    def _converge(self) -> None:
        self._require_block_list("the device state")
        self._switchover.begin()
        self._farewell.keep(self._link.connection)
        self._switchover.converge()

    def _take_end_of_stream(self) -> None:
        link = self._link
        if self._recipient.in_a_host_page(MAIN):
            raise ProtocolError("the stream ends in the middle of a host page", None)
        link.main.pause()
        self._farewell.keep(link.connection)
        link.urgent_first()  # what came before the end is not to be forgotten behind it
        if self._over:
            return  # it was wrong, or nothing follows it
        self._arrival.stream_ended = True
        link.main_ended()
        self._ended()

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` while the stream stands still, then go on with it."""
        self._link.pause()

        async def work_and_resume() -> None:
            await work
            if not self._over:
                self._resume()

        self._tasks.begin(work_and_resume())
