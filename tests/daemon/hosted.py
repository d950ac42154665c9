"""A registry in the test's own event loop, with VMMs and sources that come to it."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from postcopyd.daemon import sockets
from postcopyd.daemon.config import Configuration, Limits
from postcopyd.daemon.entry import Entry
from postcopyd.daemon.registry import Claims, Registry
from postcopyd.vmm.client import Block, Destination
from postcopyd.wire import stream_writer
from postcopyd.wire.address import Address
from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.return_path import ReturnPathWriter
from tests.support import LIMIT, belongings

PAGE = 4096
LENGTH = 16 * PAGE
BLOCK = BlockEntry("pc.ram", LENGTH, PAGE)


class Vmm:
    """A VMM of this process. Its memory is not touched before all of it is there."""

    def __init__(self, handoff: Path, name: str, listen: str | None = None) -> None:
        """Hand over; blocks."""
        self._block = Block.anonymous(BLOCK.name, LENGTH)
        try:
            self.destination = Destination(
                handoff, name, [self._block], listen=listen, timeout=LIMIT
            )
        except BaseException:
            self._block.close()
            raise

    async def leave(self) -> None:
        """Go away, as a process that ends."""
        # The kernel lets nobody unmap watched memory before whoever watches has been told of it,
        # and that is done in this process's own event loop.
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self.destination.close()
        self._block.close()


_ALL_IS_WELL: Final = ReturnPathWriter().shut(0)


class Source:
    """A source's connection to a migration, as far as the test takes it."""

    def __init__(self, listen: str) -> None:
        address = Address.parse(listen)
        if address.kind == "unix":
            self.connection = socket.socket(socket.AF_UNIX)
            self.connection.connect(address.path)
        else:
            self.connection = socket.create_connection((address.host, address.port))
        self.connection.setblocking(False)
        self._writer = stream_writer.StreamWriter(2)

    async def send(self, *parts: bytes) -> None:
        async with asyncio.timeout(LIMIT):
            await asyncio.get_running_loop().sock_sendall(self.connection, b"".join(parts))

    async def begin(self, blocks: Sequence[BlockEntry] = (BLOCK,)) -> None:
        """All that comes before the package."""
        self._blocks = blocks
        await self.send(
            stream_writer.configuration("test"),
            stream_writer.open_return_path(),
            stream_writer.ping(1),
            stream_writer.advise(PAGE, PAGE),
            self._writer.ram_start(blocks),
        )

    async def send_package(self) -> None:
        """The package, without device state."""
        discards = [stream_writer.discard(it.name, [(0, it.length)]) for it in self._blocks]
        await self.send(*discards, stream_writer.package(b""))

    async def finish(self) -> None:
        """All memory, as zero pages, and the end."""
        await self.send(
            self._writer.ram_end(),
            self._writer.zero_pages(BLOCK.name, range(0, LENGTH, PAGE)),
            self._writer.ram_footer(),
            stream_writer.END_OF_STREAM,
        )

    async def hear_the_end(self) -> None:
        """Return when we have been told that all is well, and have nothing to read any more."""
        heard = b""
        async with asyncio.timeout(LIMIT):
            while not heard.endswith(_ALL_IS_WELL):
                received = await asyncio.get_running_loop().sock_recv(self.connection, 4096)
                assert received, "the destination has closed the connection"
                heard += received

    def close(self) -> None:
        self.connection.close()


def held() -> Counter[str]:
    """What this process holds, without the threads that the event loop keeps for later."""
    held = belongings()
    del held["thread"]
    return held


async def closed(connection: socket.socket) -> None:
    """Return when the other end has closed `connection`."""
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(LIMIT):
        try:
            while await loop.sock_recv(connection, 4096):
                pass
        except ConnectionResetError:
            pass


class Hosted:
    """A registry and its common handoff socket."""

    def __init__(
        self, directory: Path, limits: Limits | None = None, claims: Claims | None = None
    ) -> None:
        self.directory = directory
        self.handoff = directory / "handoff.sock"
        self.records = directory / "records"
        """Where lists of what is missing go; not there yet."""
        self.configuration = Configuration(
            handoff=str(self.handoff),
            records=str(self.records),
            limits=limits or Limits(migrations=3, ended=2),
        )
        self.changes = 0
        self._changed = asyncio.Event()
        self.registry = Registry(self.configuration, self._on_change, claims=claims)

    def start(self) -> None:
        self._socket = sockets.open_unix_listener(str(self.handoff), 0o600, "")
        self._listener = self.registry.handoff_listener(self._socket)
        self._listener.start()

    async def take_no_more_vmms(self) -> None:
        await self._listener.close()

    async def stop(self) -> None:
        await self.take_no_more_vmms()
        await self.registry.stop(wait=False)

    def _on_change(self) -> None:
        self.changes += 1
        self._changed.set()

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Return when `predicate` holds, which must come with a change of the registry."""
        async with asyncio.timeout(LIMIT):
            while not predicate():
                self._changed.clear()
                await self._changed.wait()

    async def reach(self, entry: Entry, state: str) -> None:
        """Return when the migration is in that state."""
        await self.until(lambda: entry.state.value == state)

    async def listening(self, name: str) -> tuple[Vmm, Entry, Source]:
        """A migration whose package has come: its VMM has its device state, but not loaded it."""
        vmm = await self.vmm(name)
        entry = self.registry.get(name)
        source = Source(entry.listen[0])
        loading = asyncio.create_task(
            asyncio.to_thread(vmm.destination.wait_for_device_state, LIMIT)
        )
        await source.begin()
        await source.send_package()
        assert await loading == b""
        await self.reach(entry, "listening")
        return vmm, entry, source

    async def vmm(self, name: str, listen: str | None = None, path: Path | None = None) -> Vmm:
        """Have a VMM hand over its memory."""
        return await asyncio.to_thread(Vmm, path or self.handoff, name, listen)
