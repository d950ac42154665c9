"""One migration in this process: real engine, real memory, a source under the test's hand."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from postcopyd.incoming import events
from postcopyd.incoming.ending import ListMissing, list_nowhere
from postcopyd.incoming.estate import Estate, Keeper
from postcopyd.incoming.migration import IncomingMigration
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from postcopyd.incoming.vmm import DeviceLoad, FedBlock, GuestMemory, VmmFailure
from postcopyd.wire import stream_writer
from postcopyd.wire.messages import BlockEntry
from postcopyd.wire.return_path import PageRequest, Pong, ReturnMessage, ReturnPathReader, Shut
from tests.incoming.guest import LIMIT, PAGE, Guest
from tests.incoming.read_ahead import ReadAhead

MACHINE = "pc-q35-7.2"
LAST_BYTES = b"the end of the device state"
SECTION = 2
DEVICE_STATE = stream_writer.device_section(7, "timer", b"\0" * 24)


def image(pages: int, page_size: int = PAGE, seed: int = 1) -> bytes:
    """Content in which every fifth target page is zero and no two others are alike."""
    numbers = random.Random(seed)
    target_pages = pages * page_size // PAGE
    return b"".join(
        bytes(PAGE) if place % 5 == 4 else numbers.randbytes(PAGE) for place in range(target_pages)
    )


T = TypeVar("T", bound=events.Event)


class InProcessVmm:
    """A VMM of the engine's own process: what it was told is in `told`, in order."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.told: list[str] = []
        self.load: DeviceLoad | None = None
        self.contents: dict[str, bytes] = {}
        """Of the blocks that are not watched."""
        self.rest = b""
        self.machine = MACHINE
        self.asked_to_load = asyncio.Event()
        self.refuses_to_load = False
        self.fed_blocks: tuple[FedBlock, ...] = ()
        self.thread_names: dict[int, str] = {}
        self.process_id = os.getpid()
        self.description = "the test"
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.may_discard = asyncio.Event()
        self.may_discard.set()
        self.dead = asyncio.Event()
        self.refuses = ""
        self.closed = False
        self.has_run = False

    kind = "in-process"

    def facts(self) -> None:
        pass

    @property
    def descriptors(self) -> dict[str, int]:
        return self.memory.descriptors

    @property
    def memory(self) -> GuestMemory:
        return self.guest.memory

    async def advise(self) -> None:
        self._say("advise")

    async def discard(self) -> None:
        self._say("discard")
        await self.may_discard.wait()

    def listening(self) -> None:
        self._say("listening")

    def check_machine(self, machine: str) -> None:
        if machine != self.machine:
            raise VmmFailure(f"it is no {machine}")

    async def run(self, load: DeviceLoad) -> None:
        await load.collected.wait()
        self._take(load)
        self._say("run")
        self.asked_to_load.set()
        await self.may_load.wait()
        if self.refuses_to_load:
            raise VmmFailure("it was refused")

    async def run_converged(self, load: DeviceLoad, rest: AsyncIterator[bytes]) -> None:
        self._take(load)
        self._say("run converged")
        async for piece in rest:
            self.rest += piece
            if self.rest.endswith(LAST_BYTES):
                return

    async def complete(self, missing: int) -> None:
        self._say(f"complete without {missing} bytes" if missing else "complete")

    async def failed(self, reason: str) -> None:
        self._say("failed")

    async def gone(self) -> None:
        await self.dead.wait()

    def close(self) -> None:
        self.closed = True

    def _take(self, load: DeviceLoad) -> None:
        self.load = load
        self.contents = {block.name: bytes(block.content) for block in load.blocks}

    def _say(self, what: str) -> None:
        self.told.append(what)
        if what == self.refuses:
            raise VmmFailure(f"{what} was refused")


@dataclass
class Source:
    """The source's end of the connection; writes what the test says, reads the return path."""

    connection: socket.socket
    blocks: list[BlockEntry]
    writer: stream_writer.StreamWriter = field(
        default_factory=lambda: stream_writer.StreamWriter(SECTION)
    )
    messages: list[ReturnMessage] = field(default_factory=list)
    sent: int = 0
    """Bytes."""

    def __post_init__(self) -> None:
        self._reader = ReturnPathReader(self.blocks)

    def add_block(self, name: str, length: int) -> None:
        """Have one more RAM block, on pages of the common size."""
        self.blocks.append(BlockEntry(name, length, PAGE))
        self._reader = ReturnPathReader(self.blocks)

    async def send(self, *parts: bytes) -> None:
        data = b"".join(parts)
        async with asyncio.timeout(LIMIT):
            await asyncio.get_running_loop().sock_sendall(self.connection, data)
        self.sent += len(data)

    async def advise(self) -> None:
        sizes = 0
        for block in self.blocks:
            sizes |= block.page_size
        await self.send(
            stream_writer.configuration(MACHINE),
            stream_writer.open_return_path(),
            stream_writer.ping(1),
            stream_writer.advise(sizes, PAGE),
            self.writer.ram_start(self.blocks),
        )

    async def precopy(
        self, name: str, content: bytes | bytearray, offsets: list[int] | range
    ) -> None:
        await self.send(
            self.writer.ram_part(), self.pages(name, content, offsets), self.writer.ram_footer()
        )

    def pages(self, name: str, content: bytes | bytearray, offsets: list[int] | range) -> bytes:
        """Records for these offsets of `content`; zero pages as zero pages."""
        parts = []
        for offset in offsets:
            payload = content[offset : offset + PAGE]
            if any(payload):
                parts += [self.writer.page(name, offset), payload]
            else:
                parts.append(self.writer.zero_page(name, offset))
        return b"".join(parts)

    async def switch_over(
        self, discards: dict[str, list[tuple[int, int]]], state: bytes = DEVICE_STATE
    ) -> None:
        commands = [stream_writer.discard(name, ranges) for name, ranges in discards.items()]
        self.writer.forget_block()
        await self.send(
            *commands,
            stream_writer.ping(2),
            stream_writer.package(state),
            stream_writer.ping(4),
        )

    async def postcopy(
        self, name: str, content: bytes | bytearray, offsets: list[int] | range
    ) -> None:
        await self.precopy(name, content, offsets)

    async def end(self) -> None:
        await self.send(
            self.writer.ram_end(), self.writer.ram_footer(), stream_writer.END_OF_STREAM
        )

    async def wait_for(self, wanted: Callable[[ReturnMessage], bool]) -> ReturnMessage:
        """Return the first message that is `wanted`, of those that came and those to come."""
        looked_at = 0
        async with asyncio.timeout(LIMIT):
            while True:
                while looked_at < len(self.messages):
                    message = self.messages[looked_at]
                    looked_at += 1
                    if wanted(message):
                        return message
                data = await asyncio.get_running_loop().sock_recv(self.connection, 65536)
                assert data, f"the destination closed; it had said {self.messages}"
                self.messages += self._reader.feed(data)

    async def wait_for_request(self) -> PageRequest:
        """Return the next request for a page; it counts as taken."""
        message = await self.wait_for(lambda message: isinstance(message, PageRequest))
        assert isinstance(message, PageRequest)
        self.messages.remove(message)
        return message

    async def wait_for_pong(self, value: int) -> None:
        await self.wait_for(lambda message: message == Pong(value))

    async def wait_for_shut(self) -> Shut:
        message = await self.wait_for(lambda message: isinstance(message, Shut))
        assert isinstance(message, Shut)
        return message

    async def wait_for_close(self) -> bytes:
        """Return what came before the destination closed."""
        received = b""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(LIMIT):
            try:
                while data := await loop.sock_recv(self.connection, 65536):
                    received += data
            except ConnectionResetError:
                pass
        return received

    def close(self) -> None:
        self.connection.close()


class Engine:
    """A migration, its VMM and its source."""

    connection: type[ReadAhead] | None = None
    """What its ends of the connections are made into."""

    def __init__(
        self,
        guest: Guest,
        settings: Settings | None = None,
        keeper: Keeper | None = None,
        list_missing: ListMissing = list_nowhere,
    ) -> None:
        self.guest = guest
        self.events: list[events.Event] = []
        self._again: list[socket.socket] = []
        self._stepped = asyncio.Event()
        self.migration = IncomingMigration(
            "vm0", settings or Settings(), self._trace, Estate(keeper), list_missing
        )
        self.vmm = InProcessVmm(guest)
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._ours = self._made(ours)
        self.source = Source(theirs, [BlockEntry(guest.name, guest.length, guest.page_size)])

    def _trace(self, event: events.Event) -> None:
        self.events.append(event)
        self._stepped.set()

    def _made(self, ours: socket.socket) -> socket.socket:
        return ours if self.connection is None else self.connection(ours)

    def attach(self) -> None:
        self.migration.attach_vmm(self.vmm)
        self.attach_stream()

    def attach_stream(self) -> None:
        self.migration.attach_stream(self._ours, "the test")

    def use_no_stream(self) -> None:
        """Leave it to the test to attach one."""
        self._ours.close()

    def connect_again(self) -> socket.socket:
        """Connect once more, as a source does for its preempt channel; return the source's end."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._again.append(theirs)
        self.migration.attach_stream(self._made(ours), "the test again")
        return theirs

    async def reach(self, state: State) -> None:
        """Return when the migration is in `state`."""
        async with asyncio.timeout(LIMIT):
            while self.migration.state is not state:
                assert not self.migration.state.ended, self.migration.failure
                self._stepped.clear()
                await self._stepped.wait()

    async def told(self, kind: type[T]) -> T:
        """Return the first event of that kind, of those that came and those to come."""
        async with asyncio.timeout(LIMIT):
            while not (found := [event for event in self.events if isinstance(event, kind)]):
                self._stepped.clear()
                await self._stepped.wait()
        return found[0]

    async def finish(self) -> None:
        """Return when it has ended and let go of everything."""
        async with asyncio.timeout(LIMIT):
            await self.migration.wait()

    @property
    def vmms_lost(self) -> int:
        """How many VMMs did not load their devices."""
        return sum(isinstance(event, events.VmmLost) for event in self.events)

    @property
    def failures(self) -> list[events.Event]:
        kinds = (events.Failed, events.Paused)
        return [event for event in self.events if isinstance(event, kinds)]

    async def close(self) -> None:
        for connection in (self.source.connection, *self._again):
            connection.close()
        if not self.migration.state.ended:
            self.migration.cancel("the test is over", force=True)
        await self.finish()
        if self.migration.peer is None:
            self._ours.close()
        self.guest.close()
