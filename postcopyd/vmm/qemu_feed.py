"""The channel through which a QEMU is fed: a socket pair, one end of which it reads."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Final

from postcopyd.incoming.vmm import DeviceLoad
from postcopyd.vmm.qemu_monitor import MonitorFailure, QemuMonitor
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.feed import FEED_END, FeedWriter
from postcopyd.wire.return_path import ReturnPathReader, Shut

_NAME: Final = "postcopyd-feed"
"""By which QEMU knows its end until it uses it."""
_RECEIVE: Final = 4096
_LONGEST_ANSWER: Final = 1 << 16
"""Bytes; a QEMU that says more than that before it has ended is none that is known."""


class FeedFailure(Exception):
    """QEMU has not loaded what it was fed; the text says what is known of why."""


class FeedRefused(Exception):
    """QEMU does not read its end; it waits as before. The text says why."""


class Feed:
    """One feed of one QEMU."""

    def __init__(self, monitor: QemuMonitor, connection: socket.socket, within: float) -> None:
        """Take over our end; `offer_feed` makes one."""
        self._monitor = monitor
        self._connection = connection
        self._within = within
        self._answers = ReturnPathReader(())

    async def _begin(self, keep_process: bool) -> None:
        arguments: dict[str, object] = {"uri": f"fd:{_NAME}"}
        if keep_process:
            arguments["exit-on-error"] = False
        try:
            await self._monitor.execute("migrate-incoming", arguments, within=self._within)
        except MonitorFailure as error:
            raise FeedRefused(str(error)) from error

    async def load(
        self, load: DeviceLoad, rest: AsyncIterator[bytes] | None = None, *, keep_process: bool
    ) -> None:
        """Feed, and return when QEMU says that it has loaded. For as long as it takes.

        :param rest: device state that follows `load.device_state`, and its end; None when that is
            complete.
        :param keep_process: have QEMU stay alive when it rejects what it is fed, so that it can be
            asked why. Not known to versions before 9.1.
        :raise FeedFailure: if it has not loaded.
        :raise FeedRefused: if it has not begun to.
        """
        # What is fed waits in the socket already when QEMU begins to read; but for the end, without
        # which it cannot run: one that does not answer in time may begin to read all the same.
        begun = asyncio.Event()
        feeding = asyncio.create_task(self._feed(load, rest, begun))
        try:
            await self._begin(keep_process)
            begun.set()
            status = await self._status()
        finally:
            feeding.cancel()
            # What it was told last explains why it hung up; that it did is known already.
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await feeding
        if status is None:
            raise FeedFailure("it has closed its incoming channel")
        if status:
            raise FeedFailure("it rejects the device state")

    async def _feed(
        self, load: DeviceLoad, rest: AsyncIterator[bytes] | None, begun: asyncio.Event
    ) -> None:
        writer = FeedWriter(
            load.configuration, [(block.name, block.length) for block in load.blocks]
        )
        await self._send(writer.head())
        # Devices load while the last pages of ROMs and video memory come.
        await self._send(load.device_state)
        await load.collected.wait()
        for piece in writer.pages([(block.name, block.content) for block in load.blocks]):
            await self._send(piece)
        await begun.wait()
        if rest is None:
            load.given()
            await self._send(FEED_END)
        else:
            async for data in rest:
                await self._send(data)

    async def _send(self, piece: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._connection, piece)

    async def _status(self) -> int | None:
        """Wait for how the load ends; None if QEMU does not say."""
        loop = asyncio.get_running_loop()
        received = 0
        while received < _LONGEST_ANSWER:
            try:
                data = await loop.sock_recv(self._connection, _RECEIVE)
                messages = list(self._answers.feed(data)) if data else []
            except (OSError, ProtocolError):
                return None
            if not data:
                return None
            received += len(data)
            for message in messages:
                if isinstance(message, Shut):
                    return message.status
        return None

    def close(self) -> None:
        """Close our end. Idempotent."""
        self._connection.close()


async def withdraw_feed(monitor: QemuMonitor, within: float) -> None:
    """Have QEMU forget its end of a feed, if it has one that it has not used.

    :param within: seconds for its answer.
    """
    with contextlib.suppress(MonitorFailure):
        await monitor.execute("closefd", {"fdname": _NAME}, within=within)


async def offer_feed(monitor: QemuMonitor, within: float) -> Feed:
    """Give QEMU one end of a socket pair, which it does not use before `Feed.begin`.

    :param within: seconds for each of QEMU's answers.
    :raise MonitorFailure: if QEMU does not take it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    try:
        with theirs:
            await monitor.give(theirs.fileno(), _NAME, within=within)
    except BaseException:
        ours.close()
        raise
    return Feed(monitor, ours, within)
