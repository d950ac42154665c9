"""A stream connection: what is in front of a page that a fault waits for, and who has the turn."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import uvloop

from postcopyd.incoming.stream import StreamConnection
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Message, Pages
from postcopyd.wire.stream_reader import StreamReader
from postcopyd.wire.stream_writer import StreamWriter
from tests.support import LIMIT
from tests.wire.streams import PAGE, RAM, SECTION_ID, page_content, until_pages


def connection_over(ours: socket.socket, fault_window: int) -> StreamConnection:
    return StreamConnection(
        asyncio.get_running_loop(),
        ours,
        StreamReader(),
        deliver=lambda message: None,
        faults_first=lambda: None,
        lost=lambda error: None,
        fault_window=fault_window,
    )


TcpPair: TypeAlias = tuple[socket.socket, socket.socket]


@pytest.fixture
def tcp_pair() -> Iterator[TcpPair]:
    """Our end, and the source's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    yield ours, source
    ours.close()
    source.close()


@pytest.fixture
def tcp(tcp_pair: TcpPair) -> socket.socket:
    return tcp_pair[0]


def buffer_of(connection: socket.socket) -> int:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


async def test_a_tcp_stream_queues_no_more_than_its_window_before_a_requested_page(
    tcp: socket.socket,
) -> None:
    before = buffer_of(tcp)
    stream = connection_over(tcp, 200_000)
    assert buffer_of(tcp) == 2 * 200_000  # the kernel doubles it for its own accounts
    assert buffer_of(tcp) != before
    stream.close()


async def test_the_buffer_has_room_for_three_segments_however_small_the_window(
    tcp: socket.socket,
) -> None:
    segment = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    stream = connection_over(tcp, 4096)
    assert buffer_of(tcp) >= 3 * segment - 2
    stream.close()


async def test_a_unix_stream_is_left_as_it_is() -> None:
    ours, source = socket.socketpair()
    before = buffer_of(ours)
    stream = connection_over(ours, 4096)
    assert buffer_of(ours) == before
    stream.close()
    source.close()


# -- whose turn it is -------------------------------------------------------------------------


class Recording(socket.socket):
    """A socket that notes when it is told to acknowledge at once."""

    def __init__(self, made: socket.socket) -> None:
        super().__init__(made.family, made.type, made.proto, made.detach())
        self.told: list[int] = []

    def setsockopt(self, *arguments: Any) -> None:
        if arguments[:2] == (socket.IPPROTO_TCP, socket.TCP_QUICKACK):
            self.told.append(arguments[2])
        super().setsockopt(*arguments)


class Delivered:
    """What a connection has delivered, and the looks at the faults and the turns in between."""

    def __init__(
        self,
        ours: socket.socket,
        *,
        urgent: bool = False,
        lost: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.log: list[int | str] = []
        """Numbers of pages; "look"; "turn"."""
        self.pages = 0
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        self.stream = StreamConnection(
            self._loop,
            ours,
            StreamReader(),
            deliver=self._deliver,
            faults_first=lambda: self.log.append("look"),
            lost=lost,
            fault_window=1 << 20,
            urgent=urgent,
        )

    def _deliver(self, message: Message) -> None:
        if isinstance(message, Pages):
            self.pages += len(message)
            self.log.append(len(message))

    def _turn(self) -> None:
        self.log.append("turn")
        if not self._done.is_set():
            self._loop.call_soon(self._turn)

    async def until(self, pages: int) -> None:
        """Receive until so many pages have been delivered, noting the turns of the event loop."""
        self.stream.resume()
        self._loop.call_soon(self._turn)
        async with asyncio.timeout(LIMIT):
            while self.pages < pages:
                await asyncio.sleep(0)
        self._done.set()
        self.stream.close()


async def delivered_of(
    pages: int, prepare: Callable[[StreamConnection], None]
) -> tuple[Delivered, list[int | str]]:
    """Receive neighbouring pages from a source that is ahead; return the log of it as well."""
    ours, source = socket.socketpair()
    for end, option in ((ours, socket.SO_RCVBUF), (source, socket.SO_SNDBUF)):
        end.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
    delivered = Delivered(ours)
    prepare(delivered.stream)
    with source:
        sending = asyncio.create_task(send(source, neighbours(pages)))
        await delivered.until(pages)
        await sending
    return delivered, delivered.log


def pages_of(log: list[int | str]) -> list[int]:
    """How many pages each message had."""
    return [entry for entry in log if isinstance(entry, int)]


def most_between(what: str, log: list[int | str]) -> int:
    """Most pages that were delivered between two of these."""
    most = count = 0
    for entry in log:
        count = 0 if entry == what else count + entry if isinstance(entry, int) else count
        most = max(most, count)
    return most


def neighbours(count: int) -> bytes:
    """A stream up to its first `count` pages, which are neighbours."""
    ram = StreamWriter(SECTION_ID)
    begin = until_pages(ram)
    headers = ram.page_headers(RAM.name, [page * PAGE for page in range(count)])
    return begin + b"".join(header + page_content(page) for page, header in enumerate(headers))


async def send(source: socket.socket, data: bytes) -> None:
    source.setblocking(False)
    async with asyncio.timeout(LIMIT):
        await asyncio.get_running_loop().sock_sendall(source, data)


@pytest.mark.parametrize(
    ("prepare", "at_once", "between_looks", "a_turn"),
    [
        (lambda stream: None, 128, 128, 4 * 128),
        (lambda stream: stream.go_carefully(), 16, 16, 4 * 16),
        (lambda stream: stream.go_gently(True), 16, 16, 16),
    ],
    ids=["in a hurry", "while the guest faults", "while others need their turns"],
)
async def test_what_comes_before_a_fault_and_in_a_turn_is_bounded(
    prepare: Callable[[StreamConnection], None], at_once: int, between_looks: int, a_turn: int
) -> None:
    delivered, log = await delivered_of(1000, prepare)
    assert max(pages_of(log)) <= at_once
    assert most_between("look", log) <= between_looks
    assert most_between("turn", log) <= a_turn
    assert sum(pages_of(log)) == delivered.pages == 1000


async def test_what_comes_past_a_preempt_channel_is_received_ahead_and_still_looked_between() -> (
    None
):
    def prepare(stream: StreamConnection) -> None:
        stream.requests_come_elsewhere()
        stream.go_carefully()

    _, log = await delivered_of(1000, prepare)
    assert most_between("look", log) <= 16
    assert most_between("turn", log) > 4 * 16


async def test_a_guest_that_faults_no_more_gets_the_rest_quickly() -> None:
    _, log = await delivered_of(3000, lambda stream: stream.go_carefully())
    assert pages_of(log)[0] <= 16
    assert max(pages_of(log)) > 64


@pytest.mark.parametrize("urgent", [True, False])
async def test_only_what_is_waited_for_is_acknowledged_at_once(urgent: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = socket.create_connection(listener.getsockname())
        ours = Recording(listener.accept()[0])
    delivered = Delivered(ours, urgent=urgent)
    with source:
        sending = asyncio.create_task(send(source, neighbours(4)))
        await delivered.until(4)
        await sending
    assert set(ours.told) == ({1} if urgent else set())


async def test_a_unix_stream_has_nothing_to_acknowledge() -> None:
    first, source = socket.socketpair()
    ours = Recording(first)
    delivered = Delivered(ours, urgent=True)
    with source:
        await send(source, neighbours(4))
        await delivered.until(4)
    assert not ours.told


@pytest.mark.parametrize("pages", [1, 2000], ids=["little is there", "more than a turn is there"])
def test_a_reset_behind_what_is_there_is_noticed(tcp_pair: TcpPair, pages: int) -> None:
    """libuv reports a reset once: together with the bytes before it, if they are there by then."""
    uvloop.run(notice_a_reset(*tcp_pair, pages))


async def notice_a_reset(ours: socket.socket, source: socket.socket, pages: int) -> None:
    lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
    delivered = Delivered(ours, lost=lost.set_result)
    delivered.stream.resume()
    data = neighbours(100 + pages)
    rest = pages * (PAGE + 8)
    await send(source, data[:-rest])
    async with asyncio.timeout(LIMIT):
        while delivered.pages < 100:
            await asyncio.sleep(0)
    source.send(data[-rest:])  # and the event loop does not look meanwhile
    source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    source.close()
    async with asyncio.timeout(LIMIT):
        assert isinstance(await lost, OSError | ProtocolError)
    delivered.stream.close()
