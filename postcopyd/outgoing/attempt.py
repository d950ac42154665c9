"""One connection of an outgoing migration, from its first byte to the destination's confirmation.

The order of the messages is the order of the calls in `begin` (qemu-wire, 5.2) and `resume` (5.3).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import msgspec
from bitarray import bitarray

from postcopyd.outgoing.bandwidth import Bandwidth
from postcopyd.outgoing.connection import Connection, ConnectionLost, Stream
from postcopyd.outgoing.image import MemoryImage
from postcopyd.outgoing.postcopy import PostcopyPages
from postcopyd.outgoing.precopy import SentPages, send_pass
from postcopyd.outgoing.records import RamRecords
from postcopyd.outgoing.recovery import Recovery
from postcopyd.outgoing.report import Account, Phase
from postcopyd.outgoing.schedule import SendSchedule
from postcopyd.outgoing.standing import Standing
from postcopyd.ram.discard_plan import discard_plan
from postcopyd.wire import stream_writer
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.return_path import (
    PageRequest,
    Pong,
    ReceivedBitmap,
    ResumeAck,
    ReturnMessage,
    ReturnPathReader,
    Shut,
    SwitchoverAck,
)
from postcopyd.wire.stream_format import TARGET_PAGE_SIZE

_SECTION_ID: Final = 2
"""Of the section "ram": any number, the same one for a whole migration."""
_FIRST_PING: Final = 1
_BEFORE_PACKAGE: Final = 2
_BEHIND_PACKAGE: Final = 4
"""The values of a QEMU's PINGs; 3 is inside of the package (qemu-wire, 4.1)."""
_CONFIRMED_WITHIN: Final = 30.0
"""Seconds of silence after the end of the stream that break the connection. It may be that of a
proxy whose own to the destination has broken. A destination that only is not done yet, because its
VMM takes long to load, does not mind that we come back."""


class DestinationFailed(Exception):
    """The destination has said that it failed."""


class Cargo(msgspec.Struct, frozen=True):
    """What goes over: the same on every connection."""

    image: MemoryImage
    package: bytes
    """The command PACKAGED with the package."""
    machine: str
    precopy_passes: int
    bandwidth: Bandwidth
    stop_guest: Callable[[], Awaitable[None]] | None
    break_after: float
    """Seconds of silence that break the connection where an answer is due."""


class Attempt:
    """One connection. Either `begin` or `resume` is awaited once, then `close` is called."""

    def __init__(
        self,
        connection: Stream,
        cargo: Cargo,
        standing: Standing,
        account: Account,
        enter: Callable[[Phase, int], None],
    ) -> None:
        """Take over `connection`.

        :param standing: what is known when this connection is made; kept up to date.
        :param enter: called at each new phase, with the bytes of memory that it is about.
        :raise OSError: if the socket, closed then, is no stream socket that can be set up.
        """
        self._cargo = cargo
        self._standing = standing
        self._account = account
        self._enter = enter
        self._entries = [block.entry for block in cargo.image.blocks]
        self._numbers = {entry.name: number for number, entry in enumerate(self._entries)}
        self._return_path = ReturnPathReader(self._entries)
        self._recovery: Recovery | None = None
        self._schedule: SendSchedule | None = None
        self._postcopy: PostcopyPages | None = None
        self._package_end: int | None = None
        """At how many bytes of this connection the package ends."""
        self._acknowledged = False
        self._shut = False
        self._silence: asyncio.Timeout | None = None
        self._may_be_silent_for = 0.0
        self.answered = False
        """True once the destination has said anything."""
        self.progressed = False
        """True once it has shown that something has arrived that was not there before."""
        self._connection = Connection(connection, self._receive, cargo.break_after)

    @property
    def bytes_sent(self) -> int:
        """Bytes that the kernel has taken."""
        return self._connection.bytes_sent

    @property
    def remaining(self) -> int | None:
        """Bytes of memory that have not been handed out; None before that is known."""
        return self._schedule.remaining if self._schedule is not None else None

    @property
    def unsent(self) -> list[bitarray] | None:
        """For each block one bit a host page, 1 where it has not been handed out; None as above."""
        return self._schedule.unsent() if self._schedule is not None else None

    def close(self) -> None:
        """Close the connection, and note how far it has come. Idempotent."""
        self._connection.close()
        standing = self._standing
        standing.package_sent |= self._package_sent
        if self._postcopy is not None:
            standing.all_sent = self._postcopy.ended

    # -- a connection that begins anew -----------------------------------------------------------

    async def begin(self) -> None:
        """Send everything; return when the destination has confirmed that it has it.

        Nothing of the guest goes out before the destination has answered. One that refuses us, over
        TLS by an alert behind our handshake, shall not do so when it may have the package.

        :raise ConnectionLost: if the connection breaks.
        :raise ProtocolError: if the destination breaks the protocol of the return path.
        :raise DestinationFailed: if it says that it has failed.
        :raise OSError: if the image's files cannot be read.
        :raise Exception: what `stop_guest` raised.
        """
        cargo, connection, counts = self._cargo, self._connection, self._account.counts
        writer = stream_writer.StreamWriter(_SECTION_ID)
        records = RamRecords(writer, counts)
        setup = (
            stream_writer.configuration(cargo.machine),
            stream_writer.open_return_path(),
            stream_writer.ping(_FIRST_PING),
            stream_writer.advise(cargo.image.page_sizes, TARGET_PAGE_SIZE),
            writer.ram_start(self._entries),
        )
        await connection.send([[b"".join(setup)]])
        async with self._no_silence(cargo.break_after):
            await connection.until(lambda: self.answered)
        sent = [SentPages(block) for block in cargo.image.blocks]
        counts.precopy_passes = 0
        # A guest that is stopped already waits for the package, not for a pass before it.
        for _ in range(0 if self._standing.guest_stopped else cargo.precopy_passes):
            self._enter(Phase.PRECOPY, cargo.image.length)
            await connection.send(
                send_pass(sent, records, cargo.bandwidth, time.monotonic, self._looked_at)
            )
            counts.precopy_passes += 1
        self._enter(Phase.SWITCHOVER, cargo.image.length)
        await self._stop_guest()
        stale = await self._compare(sent)
        discards = [
            stream_writer.discard(block.name, ranges)
            for block, pages in zip(cargo.image.blocks, stale, strict=True)
            for ranges in discard_plan(pages, block.page_size)
        ]
        await connection.send([[b"".join((*discards, stream_writer.ping(_BEFORE_PACKAGE)))]])
        writer.forget_block()
        schedule, postcopy = self._prepare_postcopy(stale, records)
        counts.postcopy_bytes = schedule.remaining
        self._package_end = connection.bytes_sent + len(cargo.package)
        await connection.send([[cargo.package, stream_writer.ping(_BEHIND_PACKAGE)]])
        self._account.package_sent()
        await self._send_pages(schedule, postcopy)

    async def _stop_guest(self) -> None:
        if not self._standing.guest_stopped:
            if self._cargo.stop_guest is not None:
                await self._cargo.stop_guest()
            self._standing.guest_stopped = True

    async def _compare(self, sent: list[SentPages]) -> list[bitarray]:
        """Return for each block which host pages the destination has not got as they are now."""
        stale: list[bitarray] = []
        behind = 0
        for pages in sent:
            for looked_at, found in pages.find_stale():
                self._looked_at(behind + looked_at)
                if found is not None:
                    stale.append(found)
                await asyncio.sleep(0)
            behind += pages.block.length
        return stale

    # -- a connection that resumes ---------------------------------------------------------------

    async def resume(self, unsent: list[bitarray] | None) -> None:
        """Ask what the destination has, send the rest; return when it has confirmed everything.

        :param unsent: for each block the host pages that were never sent, to count those that are
            sent again; None if none was sent.
        :raise Exception: as `begin`.
        """
        connection, standing = self._connection, self._standing
        recovery = self._recovery = Recovery(self._entries)
        async with self._no_silence(self._cargo.break_after):
            await connection.send([[recovery.requests()]])
            await connection.until(lambda: recovery.complete or self._shut)
            if self._shut:
                return
            missing = recovery.missing()
            self._count_again(missing, unsent)
            self._note_progress(missing)
            records = RamRecords(stream_writer.StreamWriter(_SECTION_ID), self._account.counts)
            schedule, postcopy = self._prepare_postcopy(missing, records)
            await connection.send([[stream_writer.postcopy_resume()]])
            await connection.until(lambda: self._acknowledged)
        standing.all_sent = False
        await self._send_pages(schedule, postcopy)

    def _count_again(self, missing: list[bitarray], unsent: list[bitarray] | None) -> None:
        for number, pages in enumerate(missing):
            again = pages & ~unsent[number] if unsent is not None else bitarray()
            factor = self._entries[number].page_size // TARGET_PAGE_SIZE
            self._account.counts.pages_again += again.count() * factor

    def _note_progress(self, missing: list[bitarray]) -> None:
        received = sum(len(pages) - pages.count() for pages in missing)
        self.progressed = received > self._standing.received
        self._standing.received = received

    # -- pages and the end -----------------------------------------------------------------------

    def _prepare_postcopy(
        self, dirty: list[bitarray], records: RamRecords
    ) -> tuple[SendSchedule, PostcopyPages]:
        """Have everything ready that could fail, then allow requests."""
        blocks, connection = self._cargo.image.blocks, self._connection
        schedule = SendSchedule(dirty, [block.page_size for block in blocks])
        self._postcopy = PostcopyPages(
            blocks,
            schedule,
            records,
            self._cargo.bandwidth,
            time.monotonic,
            self._account.counts,
            crowded=lambda: connection.crowded,
            # A destination that has the end can complete, and then nobody is left to ask whether
            # the package has arrived.
            may_end=lambda: self._standing.package_arrived,
        )
        self._schedule = schedule
        return schedule, self._postcopy

    async def _send_pages(self, schedule: SendSchedule, postcopy: PostcopyPages) -> None:
        self._enter(Phase.POSTCOPY, schedule.remaining)
        await self._connection.send(postcopy.batches())
        self._enter(Phase.CLOSING, 0)
        async with self._no_silence(_CONFIRMED_WITHIN):
            await self._connection.until(lambda: self._shut)

    def _looked_at(self, count: int) -> None:
        self._account.phase_bytes = count

    # -- the return path -------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _no_silence(self, seconds: float) -> AsyncIterator[None]:
        """Lose the connection if the destination says nothing for so long."""
        self._may_be_silent_for = seconds
        try:
            async with asyncio.timeout(seconds) as self._silence:
                yield
        except TimeoutError:
            raise ConnectionLost(
                f"the destination took the connection and said nothing for {seconds:g} s"
            ) from None
        finally:
            self._silence = None

    def _receive(self, data: memoryview) -> None:
        self.answered = True
        if self._silence is not None and not self._silence.expired():
            now = asyncio.get_running_loop().time()
            self._silence.reschedule(now + self._may_be_silent_for)
        for message in self._return_path.feed(data):
            self._take(message)

    def _take(self, message: ReturnMessage) -> None:
        match message:
            case PageRequest(block, offset, length):
                self._take_request(block, offset, length)
            case Shut(0):
                self._take_confirmation()
            case Shut(status):
                raise DestinationFailed(
                    f"the destination reports failure (SHUT with status {status})"
                )
            case Pong(value):
                if value > _BEFORE_PACKAGE and self._package_sent:
                    self._package_arrived()
            case SwitchoverAck():
                pass
            case ReceivedBitmap(block, bitmap) if self._recovery is not None:
                self._package_arrived()
                self._recovery.take(block, bitmap)
            case ResumeAck() if self._recovery is not None and self._schedule is not None:
                self._acknowledged = True
            case _:
                raise ProtocolError(f"{type(message).__name__} outside of a recovery", None)

    def _take_request(self, block: str, offset: int, length: int) -> None:
        if self._schedule is None or not (self._package_sent or self._recovery is not None):
            raise ProtocolError(
                f"a request for {offset:#x} of block {block!r} before the package was sent", None
            )
        self._package_arrived()
        self._account.counts.requests += 1
        number = self._numbers[block]
        page_size = self._entries[number].page_size
        if self._schedule.request(number, offset // page_size, length // page_size):
            self._connection.wake()

    def _take_confirmation(self) -> None:
        # A destination that has completed meanwhile may say so in place of a bitmap.
        ended = self._postcopy.ended if self._postcopy is not None else self._standing.all_sent
        if not ended:
            raise ProtocolError("SHUT 0 before everything was sent", None)
        self._shut = True

    @property
    def _package_sent(self) -> bool:
        """Whether the kernel has taken the whole package, on this connection."""
        return self._package_end is not None and self._connection.bytes_sent >= self._package_end

    def _package_arrived(self) -> None:
        if not self._standing.package_arrived:
            self._standing.package_arrived = self._standing.package_sent = True
            self.progressed = True
            self._connection.wake()  # it may be the end that waits for it
