"""What is made of the lines that the checker of the Linux guest prints."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from tests.interop.heartbeat import HeartbeatMonitor, reading

BEAT = "HB {} iterations=70 bad={} waits=3 wait_us=900 max_wait_us=400 late_us=20\n"


class Console:
    """The guest's end of the console, and what is read at the other."""

    def __init__(self, guest: socket.socket, monitor: HeartbeatMonitor) -> None:
        self.monitor = monitor
        self._guest = guest

    def prints(self, text: str) -> None:
        self._guest.sendall(text.encode())

    async def beats(self, count: int) -> None:
        """Return when so many have come in all."""
        async with asyncio.timeout(5):
            while (missing := count - len(self.monitor.beats)) > 0:
                await self.monitor.next(missing)


@pytest.fixture
async def console() -> AsyncIterator[Console]:
    ours, guest = socket.socketpair()
    with guest:
        async with reading(ours) as monitor:
            yield Console(guest, monitor)


async def test_a_heartbeat_has_all_its_figures(console: Console) -> None:
    console.prints(BEAT.format(17, 0))
    await console.beats(1)
    (beat,) = console.monitor.beats
    assert (beat.count, beat.iterations, beat.bad, beat.waits) == (17, 70, 0, 3)
    assert (beat.wait_us, beat.max_wait_us, beat.late_us) == (900, 400, 20)
    console.monitor.assert_no_bad_page()


async def test_a_line_whose_begin_stayed_on_the_source_is_left_out(console: Console) -> None:
    console.prints(BEAT.format(5, 0)[20:])
    console.prints(BEAT.format(6, 0))
    await console.beats(1)
    assert [beat.count for beat in console.monitor.beats] == [6]


async def test_the_checker_is_ready_when_it_says_so(console: Console) -> None:
    console.prints("REA")
    assert not console.monitor.is_ready
    console.prints("DY\n")
    async with asyncio.timeout(5):
        await console.monitor.ready()


@pytest.mark.parametrize(
    "lines",
    ["BAD page=7 word=0 expected=01 found=02\n" + BEAT.format(1, 0), BEAT.format(1, 1)],
    ids=["found here", "found on the source"],
)
async def test_a_bad_page_is_never_forgotten(console: Console, lines: str) -> None:
    console.prints(lines)
    await console.beats(1)
    with pytest.raises(AssertionError, match=r"BAD page=7|bad=1"):
        console.monitor.assert_no_bad_page()


async def test_a_guest_that_says_nothing_has_not_shown_that_it_is_whole(console: Console) -> None:
    with pytest.raises(AssertionError, match="no heartbeat"):
        console.monitor.assert_no_bad_page()


async def test_the_last_lines_are_kept_for_the_message_of_a_failure(console: Console) -> None:
    console.prints("".join(BEAT.format(count, 0) for count in range(100)))
    await console.beats(100)
    lines = console.monitor.last_lines().split(" | ")
    assert lines[-1].startswith("HB 99 ")
    assert len(lines) == 12
