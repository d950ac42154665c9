"""One outgoing migration: what a QEMU source does with postcopy-ram, and comes back after breaks.

What happens on one connection is in `attempt.py`; here one connection follows the other until the
destination has confirmed that it has everything.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from bitarray import bitarray

from postcopyd.outgoing.attempt import Attempt, Cargo, DestinationFailed
from postcopyd.outgoing.bandwidth import Bandwidth
from postcopyd.outgoing.comeback import Comeback, Reconnect, Secure
from postcopyd.outgoing.connection import (
    BREAK_AFTER,
    LONGEST_BREAK,
    SHORTEST_BREAK,
    ConnectionLost,
    PeerClosed,
    Stream,
)
from postcopyd.outgoing.image import MemoryImage
from postcopyd.outgoing.report import Account, Phase, Report
from postcopyd.outgoing.standing import Standing, Way
from postcopyd.outgoing.tls import NotTrusted
from postcopyd.wire import stream_writer
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.package import parse_package
from postcopyd.wire.stream_format import NAME_LIMIT

_PROGRESS_SECONDS: Final = 0.1
_PACKAGED_HEADER: Final = 9
"""Bytes of the command PACKAGED in front of the package itself."""


class Settings(msgspec.Struct, frozen=True):
    """How to migrate."""

    machine: str = "postcopyd-image"
    """Machine type name in the configuration, 1 to 255 bytes. A QEMU destination compares it."""
    precopy_passes: int = 0
    """Passes over the memory before the switchover; 0 sends everything after it."""
    max_bandwidth: int | None = None
    """Bytes a second for all that nobody has asked for; None for as many as will go."""
    break_after: float = BREAK_AFTER
    """Seconds, 1 to 3600, without an answer after which a connection counts as broken."""
    retry_for: float | None = None
    """Seconds that an outage may last, 0 not to come back; None as `Comeback` says."""


class MigrationFailed(Exception):
    """The migration did not complete; the text says why and what that means for the guest."""

    def __init__(self, reason: str, after_package: bool) -> None:
        """Say why.

        :param after_package: True if the package was sent, all of it: the guest must not go on
            here, the destination may be running it. Otherwise nothing is lost.
        """
        super().__init__(reason, after_package)
        self.reason = reason
        self.after_package = after_package

    def __str__(self) -> str:
        return self.reason


class OutgoingMigration:
    """Sends one memory image to one destination, which then runs the guest.

    The image, and what another connection has to know, stay as they are until the destination has
    confirmed that it has everything.
    """

    def __init__(
        self,
        image: MemoryImage,
        device_state: bytes = b"",
        settings: Settings | None = None,
        *,
        stop_guest: Callable[[], Awaitable[None]] | None = None,
        progress: Callable[[Report], None] | None = None,
        jitter: random.Random | None = None,
    ) -> None:
        """Prepare to send `image`, which stays the caller's to close.

        :param device_state: device sections as QEMU writes them, one behind the other.
        :param stop_guest: awaited once, at the first switchover; when it returns nobody may write
            to the image's files any more. None if nobody does anyway.
        :param progress: called about ten times a second and at each new phase, and no more once it
            has raised: that nobody can be told is no reason to lose a guest.
        :param jitter: spreads the tries to come back.
        :raise ValueError: if a setting is out of range, or `device_state` cannot be device
            sections: a destination would find that out when there is no way back.
        """
        settings = settings or Settings()
        if not 0 < len(settings.machine.encode()) <= NAME_LIMIT:
            raise ValueError(f"machine name {settings.machine!r} must have 1 to {NAME_LIMIT} bytes")
        if settings.precopy_passes < 0:
            raise ValueError(f"{settings.precopy_passes} pre-copy passes: at least 0 are possible")
        if not SHORTEST_BREAK <= settings.break_after <= LONGEST_BREAK:
            raise ValueError(
                f"a break after {settings.break_after:g} s: {SHORTEST_BREAK:g} to "
                f"{LONGEST_BREAK:g} are possible"
            )
        if settings.retry_for is not None and not settings.retry_for >= 0:
            raise ValueError(f"{settings.retry_for:g} s to come back: at least 0 are possible")
        self._settings = settings
        self._cargo = Cargo(
            image,
            _checked_package(device_state),
            settings.machine,
            settings.precopy_passes,
            Bandwidth(settings.max_bandwidth),
            stop_guest,
            settings.break_after,
        )
        self._progress = progress
        self._progress_timer: asyncio.TimerHandle | None = None
        self._account = Account(time.monotonic)
        self._standing = Standing()
        self._jitter = jitter or random.Random()  # noqa: S311 - no secret
        self._attempt: Attempt | None = None
        self._running = False
        self._bytes_before = 0
        """Bytes that earlier connections have sent."""
        self._pages_before = 0
        """Pages that had been sent when the migration began anew last."""
        self._unsent: list[bitarray] | None = None

    async def run(
        self,
        connection: socket.socket,
        reconnect: Reconnect | None = None,
        secure: Secure | None = None,
    ) -> Report:
        """Migrate over `connection`, TCP or a Unix stream socket, which is taken over.

        :param reconnect: makes another connection to the same destination after a break; raises
            `ConnectionLost` if it cannot. None to fail with the first break.
        :param secure: makes the TLS handshake on each connection. A break in it is one like others.
        :return: the final report, when the destination has confirmed that it has everything.
        :raise MigrationFailed: if that does not come to pass.
        :raise OSError: if the image's files cannot be read.
        :raise RuntimeError: if it was called before.
        :raise Exception: what `stop_guest` raised.
        """
        if self._running:
            raise RuntimeError("an outgoing migration runs once")
        self._running = True
        account = self._account = Account(time.monotonic)
        comeback = None
        if reconnect is not None:
            comeback = Comeback(
                reconnect,
                secure,
                self._settings.retry_for,
                self._jitter,
                self._standing,
                account,
                self._enter,
            )
        try:
            self._report_progress()
            await self._connections(await self._first(connection, secure, comeback), comeback)
        except (ConnectionLost, ProtocolError, DestinationFailed) as error:
            failure = account.failure = self._explain(_what(error))
            raise MigrationFailed(failure, self._standing.package_sent) from error
        except asyncio.CancelledError:
            account.failure = self._explain("cancelled")
            raise
        except OSError as error:
            account.failure = self._explain(_what(error))
            raise
        except BaseException as error:
            account.failure = self._explain(f"{type(error).__name__}: {error}")
            raise
        finally:
            if self._progress_timer is not None:
                self._progress_timer.cancel()
            self._enter(Phase.FAILED if account.failure else Phase.COMPLETED)
        return self.report()

    def report(self) -> Report:
        """Tell how it stands."""
        account, attempt = self._account, self._attempt
        account.bytes_sent = self._bytes_before
        if attempt is not None:
            account.bytes_sent += attempt.bytes_sent
            if account.phase is Phase.POSTCOPY and attempt.remaining is not None:
                account.phase_bytes = account.phase_total - attempt.remaining
        return account.report()

    # -- one connection after the other ----------------------------------------------------------

    async def _first(
        self, connection: socket.socket, secure: Secure | None, comeback: Comeback | None
    ) -> Stream:
        if secure is None:
            return connection
        try:
            return await secure(connection)
        except ConnectionLost as error:
            if comeback is None or self._is_final(error):
                raise
            return await comeback.connection(_what(error), 0.0, progressed=False)

    async def _connections(self, connection: Stream, comeback: Comeback | None) -> None:
        while True:
            way, began = self._standing.way, time.monotonic()
            attempt = self._attempt = Attempt(
                connection, self._cargo, self._standing, self._account, self._enter
            )
            try:
                await self._go(attempt, way)
                return
            except (ConnectionLost, ProtocolError, DestinationFailed) as error:
                broken: Exception = error
            finally:
                attempt.close()
            self._standing.ended(way, isinstance(broken, PeerClosed) and not attempt.answered)
            if comeback is None or self._is_final(broken):
                raise broken
            self._bytes_before += attempt.bytes_sent
            self._unsent = attempt.unsent or self._unsent
            self._attempt = None
            lasted = time.monotonic() - began if attempt.answered else 0.0
            connection = await comeback.connection(_what(broken), lasted, attempt.progressed)

    def _is_final(self, broken: Exception) -> bool:
        """Tell whether there is nothing to come back to."""
        standing = self._standing
        if isinstance(broken, DestinationFailed):
            # A package that was on its way may never have got there: the guest would be nowhere.
            return not standing.package_sent or standing.package_arrived
        # Before the package a destination that makes mistakes is better left alone, and one that
        # does not believe us will not do so in a minute.
        return isinstance(broken, ProtocolError | NotTrusted) and not standing.package_sent

    async def _go(self, attempt: Attempt, way: Way) -> None:
        counts = self._account.counts
        if way is Way.RESUME:
            await attempt.resume(self._unsent)
            return
        pages = counts.pages + counts.zero_pages
        counts.pages_again += pages - self._pages_before
        self._pages_before = pages
        self._enter(Phase.SETUP)
        await attempt.begin()

    # -- what is told ----------------------------------------------------------------------------

    def _enter(self, phase: Phase, total: int = 0) -> None:
        self._account.enter(phase, total)
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            try:
                self._progress(self.report())
            except Exception:  # nobody looks any more, or nobody can be shown anything
                self._progress = None

    def _report_progress(self) -> None:
        self._tell()
        if self._progress is not None:
            self._progress_timer = asyncio.get_running_loop().call_later(
                _PROGRESS_SECONDS, self._report_progress
            )

    def _explain(self, what: str) -> str:
        """Return what went wrong, where it did, and what that means for the guest."""
        phase = self._account.phase.value
        if self._account.phase is Phase.RECONNECTING:
            phase += f", broken in {self._account.broken_in.value}"
        return f"{what} (phase {phase}; {self._standing.means})"


def _what(error: Exception) -> str:
    if isinstance(error, ProtocolError):
        return f"the destination broke the protocol of the return path: {error}"
    if isinstance(error, OSError):
        return f"{error.filename or 'the memory image'}: {error.strerror or error}"
    return str(error)


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
