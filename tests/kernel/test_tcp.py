"""When a TCP connection counts as dead."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from postcopyd.kernel import tcp
from tests.silent import make_deaf, make_forgotten, tcp_pair
from tests.support import wait_until


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = tcp_pair()
    with ours, theirs:
        yield ours, theirs


def options(connection: socket.socket) -> tuple[int, int, int]:
    """Seconds: of silence before the first probe, between probes, and until the end."""
    idle, interval, timeout = (
        connection.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
    )
    return idle, interval, timeout // 1000


@pytest.mark.parametrize("within", [2, 3, 5, 6, 7, 10, 29, 33, 60, 99, 3600])
def test_the_last_probe_falls_on_the_end_of_the_time_and_others_come_before(
    pair: tuple[socket.socket, socket.socket], within: int
) -> None:
    ours, _ = pair
    tcp.notice_break(ours, within)
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    idle, interval, timeout = options(ours)
    assert timeout == within
    assert (within - idle) % interval == 0
    assert (within - idle) // interval >= min(5, within - 1)


def test_a_connection_that_is_not_tcp_is_left_as_it_is() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        tcp.notice_break(ours, 2)
        tcp.probe_each_second(ours)
        assert tcp.standing(ours) is None
        assert not ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_whose_host_answers_is_not_silent(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    tcp.notice_break(ours, 3600)
    for _ in range(2):
        tcp.probe_each_second(ours)
        wait_until(lambda: standing(ours).silent >= 0.9)
        wait_until(lambda: standing(ours).silent < 0.1)
    assert standing(ours).unanswered == 0
    assert not standing(ours).closed


def test_whose_host_does_not_answer_is_silent(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    tcp.notice_break(ours, 3600)
    make_deaf(theirs)
    tcp.probe_each_second(ours)
    wait_until(lambda: standing(ours).unanswered >= 2)
    assert standing(ours).silent >= 1.9
    assert not standing(ours).closed


def test_who_is_not_known_there_any_more_learns_it_by_asking(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    tcp.notice_break(ours, 3600)
    make_forgotten(theirs)
    tcp.probe_each_second(ours)
    wait_until(lambda: standing(ours).closed)


def standing(connection: socket.socket) -> tcp.Standing:
    found = tcp.standing(connection)
    assert found is not None
    return found
