"""A network that is dead, and a destination that lives and does not read."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct

import pytest

from postcopyd.outgoing.connection import Connection, ConnectionLost
from postcopyd.outgoing.liveness import INFO_LENGTH, Liveness
from tests.outgoing.destination import LIMIT, tcp_pair

PIECE = bytes(1 << 16)
_SO_ATTACH_FILTER = 26
_DROP = struct.pack("=HBBI", 0x06, 0, 0, 0)
"""One instruction: BPF_RET | BPF_K, nothing of the packet is kept (linux/filter.h)."""


def die(connection: socket.socket) -> None:
    """Have the kernel drop every segment that comes to `connection`: nobody answers any more."""
    program = ctypes.create_string_buffer(_DROP, len(_DROP))
    length_and_place = struct.pack("@HP", 1, ctypes.addressof(program))
    connection.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, length_and_place)


def info(*, probes: int = 0, unacked: int = 0, last_ack: int = 0) -> bytes:
    """What the kernel tells of a connection, as far as it is looked at."""
    values = bytearray(INFO_LENGTH)
    values[3] = probes
    struct.pack_into("=I", values, 24, unacked)
    struct.pack_into("=I", values, 56, last_ack)
    return bytes(values)


def test_who_is_asked_nothing_owes_no_answer() -> None:
    liveness = Liveness()
    for now in range(100):
        assert liveness.unanswered(info(last_ack=now * 1000), float(now)) == 0.0


@pytest.mark.parametrize("asked", [{"unacked": 1}, {"probes": 2}])
def test_an_answer_is_owed_from_the_time_of_the_question(asked: dict[str, int]) -> None:
    liveness = Liveness()
    assert liveness.unanswered(info(last_ack=50_000), 100.0) == 0.0
    assert liveness.unanswered(info(last_ack=50_000, **asked), 100.0) == 0.0
    assert liveness.unanswered(info(last_ack=53_000, **asked), 103.0) == 3.0
    assert liveness.unanswered(info(last_ack=55_000), 105.0) == 0.0
    assert liveness.unanswered(info(last_ack=56_000, **asked), 106.0) == 0.0


def test_every_acknowledgement_is_an_answer() -> None:
    liveness = Liveness()
    for now in range(100):
        assert liveness.unanswered(info(last_ack=300, unacked=9), float(now)) <= 0.3


async def test_a_dead_network_is_noticed_while_data_is_on_its_way() -> None:
    near, far = tcp_pair()
    with far:
        connection = Connection(near, lambda _: None, break_after=1.0)
        die(far)
        began = asyncio.get_running_loop().time()
        with pytest.raises(ConnectionLost, match="no answer from the destination's host for 1 s"):
            async with asyncio.timeout(LIMIT):
                await connection.send([[PIECE]])
                await connection.until(lambda: False)
        assert 0.9 < asyncio.get_running_loop().time() - began < 5
        connection.close()


async def test_a_dead_network_is_noticed_while_nothing_is_to_be_sent() -> None:
    near, far = tcp_pair()
    with far:
        connection = Connection(near, lambda _: None, break_after=1.0)
        die(far)
        with pytest.raises(ConnectionLost, match=r"no answer from|timed out"):
            async with asyncio.timeout(LIMIT):
                await connection.until(lambda: False)
        connection.close()


async def test_a_destination_that_reads_nothing_for_long_is_not_dead() -> None:
    near, far = tcp_pair()
    far.setblocking(False)
    loop = asyncio.get_running_loop()
    with far:
        connection = Connection(near, lambda _: None, break_after=1.0)
        sending = asyncio.ensure_future(connection.send([[PIECE] * 64]))
        done, _ = await asyncio.wait({sending}, timeout=3.5)
        assert not done, "the connection was full, and alive"
        received = 0
        async with asyncio.timeout(LIMIT):
            while received < 64 * len(PIECE):
                received += len(await loop.sock_recv(far, 1 << 20))
            await sending
        connection.close()
