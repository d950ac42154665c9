"""The source's connection: what reaches the other end, in which order, and how it breaks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from postcopyd.outgoing.connection import Connection, ConnectionLost
from postcopyd.outgoing.records import Batch, Pause
from tests.outgoing.destination import LIMIT

Pair = tuple[socket.socket, socket.socket]


async def read_all(far: socket.socket, count: int) -> bytes:
    """Read `count` bytes."""
    data = bytearray()
    far.setblocking(False)
    async with asyncio.timeout(LIMIT):
        while len(data) < count:
            data += await asyncio.get_running_loop().sock_recv(far, 1 << 16)
    return bytes(data)


async def test_batches_arrive_whole_and_in_order_however_they_are_cut(pair: Pair) -> None:
    near, far = pair
    # More buffers than one sendmsg takes, more bytes than a socket buffers, and empty ones.
    batches: list[Batch | Pause] = [
        [bytes((batch,)) * (batch * 7 + number % 5) for number in range(3000)]
        for batch in range(60)
    ]
    batches += [[], [memoryview(b"end")]]
    expected = b"".join(buffer for batch in batches if isinstance(batch, list) for buffer in batch)
    connection = Connection(near, lambda _: None)
    reading = asyncio.ensure_future(read_all(far, len(expected)))
    await connection.send(list(batches))
    assert await reading == expected
    assert connection.bytes_sent == len(expected)
    connection.close()


async def test_a_batch_is_made_only_when_the_one_before_has_gone(pair: Pair) -> None:
    near, far = pair
    made = 0

    def batches() -> Iterator[Batch | Pause]:
        nonlocal made
        for _ in range(500):
            made += 1
            yield [bytes(100_000)]

    connection = Connection(near, lambda _: None)
    sending = asyncio.ensure_future(connection.send(batches()))
    before, turns = -1, 0
    while turns < 1000:  # until the socket takes no more
        await asyncio.sleep(0)
        turns = turns + 1 if connection.bytes_sent == before else 0
        before = connection.bytes_sent
    assert connection.bytes_sent <= made * 100_000 < connection.bytes_sent + 100_001
    assert made < 100
    assert len(await read_all(far, 500 * 100_000)) == 500 * 100_000
    await sending
    connection.close()


async def test_a_pause_ends_by_itself_and_earlier_when_woken(pair: Pair) -> None:
    near, far = pair
    received: list[bytes] = []

    def take(data: memoryview) -> None:
        received.append(bytes(data))
        connection.wake()

    def batches() -> Iterator[Batch | Pause]:
        yield Pause(0.001)
        yield [b"by itself"]
        while not received:
            yield Pause(3600.0)
        yield [b"woken"]

    connection = Connection(near, take)
    sending = asyncio.ensure_future(connection.send(batches()))
    assert await read_all(far, 9) == b"by itself"
    far.send(b"go on")
    assert await read_all(far, 5) == b"woken"
    await sending
    assert received == [b"go on"]
    connection.close()


async def test_waking_what_does_not_pause_changes_nothing(pair: Pair) -> None:
    near, far = pair
    connection = Connection(near, lambda _: None)
    connection.wake()
    await connection.send([[b"a"]])
    connection.wake()
    await connection.send([[b"b"]])
    assert await read_all(far, 2) == b"ab"
    connection.close()


async def test_a_peer_that_closes_is_told_to_whoever_sends_or_waits(pair: Pair) -> None:
    near, far = pair
    connection = Connection(near, lambda _: None)
    far.close()
    with pytest.raises(ConnectionLost, match="closed the connection"):
        await connection.until(lambda: False)
    with pytest.raises(ConnectionLost, match="closed the connection"):
        await connection.send([[b"too late"]])
    connection.close()


async def test_what_was_received_counts_although_the_peer_closed_behind_it(pair: Pair) -> None:
    near, far = pair
    received = bytearray()
    connection = Connection(near, received.extend)
    far.send(b"all is well")
    far.close()
    async with asyncio.timeout(LIMIT):
        await connection.until(lambda: bool(received))
    assert received == b"all is well"
    connection.close()


async def test_an_error_of_the_maker_of_batches_reaches_the_sender(pair: Pair) -> None:
    near, _ = pair

    def batches() -> Iterator[Batch | Pause]:
        yield [b"one"]
        raise RuntimeError("no second one")

    connection = Connection(near, lambda _: None)
    with pytest.raises(RuntimeError, match="no second one"):
        await connection.send(batches())
    connection.close()


async def test_an_error_of_the_receiver_reaches_the_sender(pair: Pair) -> None:
    near, far = pair

    def take(data: memoryview) -> None:
        raise RuntimeError(f"not to my taste: {bytes(data)!r}")

    connection = Connection(near, take)
    far.send(b"x")
    with pytest.raises(RuntimeError, match="not to my taste: b'x'"):
        await connection.send([Pause(3600.0)])
    connection.close()


async def test_the_last_words_of_a_peer_are_heard_although_sending_fails_first(pair: Pair) -> None:
    near, far = pair
    received = bytearray()
    connection = Connection(near, received.extend)
    far.send(b"this is why")
    far.close()
    # No turn of the event loop in between: it is sending that meets the closed connection.
    with pytest.raises(ConnectionLost):
        for _ in range(2):
            await connection.send([[b"x"]])
            await connection.until(lambda: bool(received))
    assert received == b"this is why"
    connection.close()


async def test_closing_twice_is_closing_once(pair: Pair) -> None:
    near, _ = pair
    connection = Connection(near, lambda _: None)
    connection.close()
    connection.close()
    assert near.fileno() == -1
