"""A small destination: it keeps what it is sent, asks for pages, and confirms at the end."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from postcopyd.outgoing.report import Report
from postcopyd.outgoing.source import OutgoingMigration
from postcopyd.wire import messages
from postcopyd.wire.package import parse_package
from postcopyd.wire.return_path import ReturnPathWriter
from postcopyd.wire.stream_reader import StreamReader

PAGE = 4096
LIMIT = 20.0
"""Seconds after which a wait is a failure."""


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection over loopback, the source's first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Small, and before the handshake: what queues at the receiver is not ours to bound.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


class Destination:
    """The far end of `connection`. Whatever the source does wrong is an assertion."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.stream = bytearray()
        """Every byte, as it came."""
        self.writer = ReturnPathWriter()
        self.memory: dict[str, bytearray] = {}
        self.page_sizes: dict[str, int] = {}
        self.device_state: bytes | None = None
        self.machine = ""
        self.arrived: list[tuple[str, int]] = []
        """(block, offset) of each target page behind the package, in order."""
        self.discarded: list[tuple[str, tuple[tuple[int, int], ...]]] = []
        self.on_message: Callable[[messages.Message], None] = lambda _: None
        """Called with each message when it has been acted on."""
        self.confirm = True
        """Whether to send SHUT 0 at the end."""
        self._missing: set[tuple[str, int]] | None = None
        self._reader = StreamReader()

    async def run(self) -> None:
        """Receive until the end, confirm it, and see the source close."""
        await self.receive_until(lambda: self._reader.ended)
        self._reader.connection_lost()
        assert not self._missing, f"{len(self._missing or ())} pages have not come"
        if self.confirm:
            self.say(self.writer.shut(0))
            assert await self._receive() == b""

    async def receive_until(self, done: Callable[[], bool]) -> None:
        """Receive until `done()`, which is asked whenever something was received."""
        while not done():
            data = await self._receive()
            assert data, "the source closed the connection"
            self.stream += data
            for message in self._reader.feed(data):
                self._take(message)
                self.on_message(message)

    async def _receive(self) -> bytes:
        async with asyncio.timeout(LIMIT):
            return await asyncio.get_running_loop().sock_recv(self.connection, 64 << 10)

    def say(self, message: bytes) -> None:
        """Send `message` on the return path."""
        assert self.connection.send(message) == len(message)

    def request(self, block: str, offset: int) -> None:
        """Ask for a host page."""
        self.say(self.writer.request_pages(block, offset, self.page_sizes[block]))

    def contents(self) -> dict[str, bytes]:
        return {name: bytes(memory) for name, memory in self.memory.items()}

    def _take(self, message: messages.Message) -> None:
        match message:
            case messages.Configuration():
                self.machine = message.machine
            case messages.Ping():
                self.say(self.writer.pong(message.value))
            case messages.BlockList():
                for block in message.blocks:
                    # Not zeros: what never comes is to be seen.
                    self.memory[block.name] = bytearray(b"\xa5") * block.length
                    self.page_sizes[block.name] = block.page_size
                self._missing = {
                    (block.name, offset)
                    for block in message.blocks
                    for offset in range(0, block.length, PAGE)
                }
            case messages.Pages():
                for place, offset in enumerate(message.offsets):
                    self._place(message.block, offset, message.payload(place))
            case messages.ZeroPages():
                for offset in message.offsets:
                    self._place(message.block, offset, bytes(PAGE))
            case messages.Discard():
                self.discarded.append((message.block, message.ranges))
                self._forget(message)
            case messages.Package():
                self.device_state = parse_package(message.data).device_state

    def _place(self, block: str, offset: int, content: bytes | memoryview) -> None:
        assert self._missing is not None
        if self.device_state is not None:
            assert (block, offset) in self._missing, f"{block} {offset:#x} came twice"
            self.arrived.append((block, offset))
        self._missing.discard((block, offset))
        self.memory[block][offset : offset + PAGE] = content

    def _forget(self, message: messages.Discard) -> None:
        assert self._missing is not None
        for start, length in message.ranges:
            self._missing.update(
                (message.block, offset) for offset in range(start, start + length, PAGE)
            )
            self.memory[message.block][start : start + length] = b"\xa5" * length


async def migrate(
    migration: OutgoingMigration, near: socket.socket, destination: Destination
) -> Report:
    """Let both ends run to a good end."""
    receiving = asyncio.ensure_future(destination.run())
    try:
        async with asyncio.timeout(LIMIT):
            report = await migration.run(near)
            await receiving
    finally:
        receiving.cancel()
    return report


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Check that as many descriptors are open behind the block as in front of it."""
    before = os.listdir("/proc/self/fd")
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)
