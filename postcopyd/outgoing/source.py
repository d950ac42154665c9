"""One outgoing migration: what a QEMU source does with postcopy-ram (qemu-wire, 5.2).

The order of the messages is the order of the calls in `OutgoingMigration._migrate`.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from bitarray import bitarray

from postcopyd.outgoing.bandwidth import Bandwidth
from postcopyd.outgoing.connection import Connection, ConnectionLost
from postcopyd.outgoing.image import MemoryImage
from postcopyd.outgoing.postcopy import PostcopyPages
from postcopyd.outgoing.precopy import SentPages, send_pass
from postcopyd.outgoing.records import RamRecords
from postcopyd.outgoing.report import Account, Phase, Report
from postcopyd.outgoing.schedule import SendSchedule
from postcopyd.ram.discard_plan import discard_plan
from postcopyd.wire import stream_writer
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.package import parse_package
from postcopyd.wire.return_path import (
    PageRequest,
    Pong,
    ReturnMessage,
    ReturnPathReader,
    Shut,
    SwitchoverAck,
)
from postcopyd.wire.stream_format import NAME_LIMIT, TARGET_PAGE_SIZE

_SECTION_ID: Final = 2
"""Of the section "ram": any number, the same one for a whole migration."""
_PROGRESS_SECONDS: Final = 0.1
_PACKAGED_HEADER: Final = 9
"""Bytes of the command PACKAGED in front of the package itself."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to migrate."""

    machine: str = "postcopyd-image"
    """Machine type name in the configuration, 1 to 255 bytes. A QEMU destination compares it."""
    precopy_passes: int = 0
    """Passes over the memory before the switchover; 0 sends everything after it."""
    max_bandwidth: int | None = None
    """Bytes a second for all that nobody has asked for; None for as many as will go."""


class MigrationFailed(Exception):
    """The migration did not complete; the text says why and what that means for the guest."""

    def __init__(self, reason: str, after_package: bool) -> None:
        """Say why.

        :param after_package: True if the package was, or may have been, sent: the guest must not
            go on here, the destination may be running it. Otherwise nothing is lost.
        """
        super().__init__(reason, after_package)
        self.reason = reason
        self.after_package = after_package

    def __str__(self) -> str:
        return self.reason


class OutgoingMigration:
    """Sends one memory image to one destination, which then runs the guest.

    The image, and what another connection would have to know, stay as they are until the
    destination has confirmed that it has everything.
    """

    def __init__(
        self,
        image: MemoryImage,
        device_state: bytes = b"",
        settings: Settings | None = None,
        *,
        stop_guest: Callable[[], Awaitable[None]] | None = None,
        progress: Callable[[Report], None] | None = None,
    ) -> None:
        """Prepare to send `image`, which stays the caller's to close.

        :param device_state: device sections as QEMU writes them, one behind the other.
        :param stop_guest: awaited at the switchover; when it returns nobody may write to the
            image's files any more. None if nobody does anyway.
        :param progress: called about ten times a second and at each new phase; must not raise.
        :raise ValueError: if a setting is out of range, or `device_state` cannot be device
            sections: a destination would find that out when there is no way back.
        """
        settings = settings or Settings()
        if not 0 < len(settings.machine.encode()) <= NAME_LIMIT:
            raise ValueError(f"machine name {settings.machine!r} must have 1 to {NAME_LIMIT} bytes")
        if settings.precopy_passes < 0:
            raise ValueError(f"{settings.precopy_passes} pre-copy passes: at least 0 are possible")
        self._settings = settings
        self._image = image
        self._bandwidth = Bandwidth(settings.max_bandwidth)
        self._package = _checked_package(device_state)
        self._stop_guest = stop_guest
        self._progress = progress
        self._progress_timer: asyncio.TimerHandle | None = None
        self._entries = [block.entry for block in image.blocks]
        self._numbers = {block.name: number for number, block in enumerate(image.blocks)}
        self._return_path = ReturnPathReader(self._entries)
        self._account = Account(time.monotonic)
        self._sent = [SentPages(block) for block in image.blocks]
        self._schedule: SendSchedule | None = None
        self._postcopy: PostcopyPages | None = None
        self._connection: Connection | None = None
        self._shut = False

    async def run(self, connection: socket.socket) -> Report:
        """Migrate over `connection`, a connected TCP or Unix stream socket, which is taken over.

        :return: the final report, when the destination has confirmed that it has everything.
        :raise MigrationFailed: if that does not come to pass.
        :raise OSError: if the image's files cannot be read.
        :raise RuntimeError: if it was called before.
        :raise Exception: what `stop_guest` raised.
        """
        if self._connection is not None:
            raise RuntimeError("an outgoing migration runs once")
        self._account = Account(time.monotonic)
        try:
            self._connection = Connection(connection, self._receive)
            self._report_progress()
            await self._migrate(self._connection)
        except (ConnectionLost, ProtocolError) as error:
            what = str(error)
            if isinstance(error, ProtocolError):
                what = f"the destination broke the protocol of the return path: {what}"
            failure = self._account.failure = self._explain(what)
            raise MigrationFailed(failure, self._schedule is not None) from error
        except asyncio.CancelledError:
            self._account.failure = self._explain("cancelled")
            raise
        except BaseException as error:
            self._account.failure = self._explain(f"{type(error).__name__}: {error}")
            raise
        finally:
            if self._connection is not None:
                self._connection.close()
            if self._progress_timer is not None:
                self._progress_timer.cancel()
            self._enter(Phase.FAILED if self._account.failure else Phase.COMPLETED)
        return self.report()

    def report(self) -> Report:
        """Tell how it stands."""
        account = self._account
        if self._connection is not None:
            account.bytes_sent = self._connection.bytes_sent
        if account.phase is Phase.POSTCOPY and self._schedule is not None:
            account.phase_bytes = account.phase_total - self._schedule.remaining
        return account.report()

    # -- the stream ------------------------------------------------------------------------------

    async def _migrate(self, connection: Connection) -> None:
        writer = stream_writer.StreamWriter(_SECTION_ID)
        records = RamRecords(writer, self._account.counts)
        setup = (
            stream_writer.configuration(self._settings.machine),
            stream_writer.open_return_path(),
            stream_writer.ping(1),
            stream_writer.advise(self._image.page_sizes, TARGET_PAGE_SIZE),
            writer.ram_start(self._entries),
        )
        await connection.send([[b"".join(setup)]])
        for _ in range(self._settings.precopy_passes):
            self._enter(Phase.PRECOPY, self._image.length)
            await connection.send(
                send_pass(self._sent, records, self._bandwidth, time.monotonic, self._looked_at)
            )
            self._account.counts.precopy_passes += 1
        self._enter(Phase.SWITCHOVER, self._image.length)
        stale = await self._stop_guest_and_compare()
        discards = [
            stream_writer.discard(block.name, ranges)
            for block, pages in zip(self._image.blocks, stale, strict=True)
            for ranges in discard_plan(pages, block.page_size)
        ]
        await connection.send([[b"".join((*discards, stream_writer.ping(2)))]])
        writer.forget_block()
        postcopy = self._prepare_postcopy(stale, records, connection)
        await connection.send([[self._package, stream_writer.ping(4)]])
        self._account.package_sent()
        self._enter(Phase.POSTCOPY, self._account.counts.postcopy_bytes)
        await connection.send(postcopy.batches())
        self._enter(Phase.CLOSING)
        await connection.until(lambda: self._shut)

    async def _stop_guest_and_compare(self) -> list[bitarray]:
        """Return for each block which host pages the destination has not got as they are now."""
        if self._stop_guest is not None:
            await self._stop_guest()
        stale: list[bitarray] = []
        behind = 0
        for sent in self._sent:
            for looked_at, found in sent.find_stale():
                self._looked_at(behind + looked_at)
                if found is not None:
                    stale.append(found)
                await asyncio.sleep(0)
            behind += sent.block.length
        return stale

    def _prepare_postcopy(
        self, stale: list[bitarray], records: RamRecords, connection: Connection
    ) -> PostcopyPages:
        """Have everything ready that could fail, then allow requests: the package is next."""
        page_sizes = [block.page_size for block in self._image.blocks]
        schedule = SendSchedule(stale, page_sizes)
        counts = self._account.counts
        counts.postcopy_bytes = schedule.remaining
        self._postcopy = PostcopyPages(
            self._image.blocks,
            schedule,
            records,
            self._bandwidth,
            time.monotonic,
            counts,
            lambda: connection.crowded,
        )
        self._schedule = schedule
        return self._postcopy

    # -- the return path -------------------------------------------------------------------------

    def _receive(self, data: memoryview) -> None:
        for message in self._return_path.feed(data):
            self._take(message)

    def _take(self, message: ReturnMessage) -> None:
        match message:
            case PageRequest(block, offset, length):
                self._take_request(block, offset, length)
            case Shut(0):
                if self._postcopy is None or not self._postcopy.ended:
                    raise ProtocolError("SHUT 0 before everything was sent", None)
                self._shut = True
            case Shut(status):
                raise ConnectionLost(f"the destination reports failure (SHUT with status {status})")
            case Pong() | SwitchoverAck():
                pass
            case _:
                raise ProtocolError(f"{type(message).__name__} outside of a recovery", None)

    def _take_request(self, block: str, offset: int, length: int) -> None:
        if self._schedule is None:
            raise ProtocolError(
                f"a request for {offset:#x} of block {block!r} before the package was sent", None
            )
        self._account.counts.requests += 1
        number = self._numbers[block]
        page_size = self._entries[number].page_size
        if self._schedule.request(number, offset // page_size, length // page_size):
            assert self._connection is not None
            self._connection.wake()

    # -- helpers ---------------------------------------------------------------------------------

    def _looked_at(self, count: int) -> None:
        self._account.phase_bytes = count

    def _enter(self, phase: Phase, total: int = 0) -> None:
        self._account.enter(phase, total)
        if self._progress is not None:
            self._progress(self.report())

    def _report_progress(self) -> None:
        if self._progress is not None:
            self._progress(self.report())
            self._progress_timer = asyncio.get_running_loop().call_later(
                _PROGRESS_SECONDS, self._report_progress
            )

    def _explain(self, what: str) -> str:
        """Return what went wrong, where it did, and what that means for the guest."""
        if self._schedule is None:
            then = "the package had not been sent: the guest can go on here"
        else:
            then = "the package had been sent: the guest must not go on here"
        return f"{what} (phase {self._account.phase.value}; {then})"


def _checked_package(device_state: bytes) -> bytes:
    """Return the command PACKAGED with the package.

    :raise ValueError: if a destination could not take it apart again.
    """
    package = stream_writer.package(device_state)
    try:
        contents = parse_package(package[_PACKAGED_HEADER:])
    except ProtocolError as error:
        raise ValueError(f"the device state is not made of device sections: {error}") from None
    if contents.device_state != device_state:
        raise ValueError("the device state ends with a PING, which does not belong there")
    return package
