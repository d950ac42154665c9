"""A source whose connection breaks, at any byte: real sockets, a real destination, real memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Final

import pytest
from msgspec.structs import replace

from postcopyd.incoming.settings import Settings as IncomingSettings
from postcopyd.incoming.states import State
from postcopyd.outgoing import attempt, comeback
from postcopyd.outgoing.connecting import connect, way_back
from postcopyd.outgoing.image import BlockFile, MemoryImage
from postcopyd.outgoing.report import Phase, Report
from postcopyd.outgoing.source import MigrationFailed, OutgoingMigration, Settings
from postcopyd.wire import stream_writer
from postcopyd.wire.address import Address
from postcopyd.wire.messages import BlockEntry
from tests.cutting_relay import Cut, CuttingRelay, How
from tests.incoming.engine import DEVICE_STATE, MACHINE, SECTION, image
from tests.incoming.guest import HUGE, PAGE
from tests.outgoing.destination import LIMIT
from tests.outgoing.real_destination import RealDestination

PAGES = 64
CONTENT = image(PAGES)
PACKAGE = len(stream_writer.package(DEVICE_STATE))
BEFORE_PACKAGE = sum(
    map(
        len,
        (
            stream_writer.configuration(MACHINE),
            stream_writer.open_return_path(),
            stream_writer.ping(1),
            stream_writer.advise(PAGE, PAGE),
            stream_writer.StreamWriter(SECTION).ram_start([BlockEntry("pc.ram", PAGE, PAGE)]),
            stream_writer.discard("pc.ram", [(0, 1)]),
            stream_writer.ping(2),
        ),
    )
)
"""Bytes in front of the package if there is no pre-copy."""
ALL = BEFORE_PACKAGE + PACKAGE
ANSWER = 8
"""Bytes of a PONG, and of SHUT."""
TWO_PONGS = 2 * ANSWER
"""What a destination answers that has not got the package."""
IN_THE_PAGES = 100_000
HOWS: Final[tuple[How, ...]] = ("reset", "close", "half-close")
SLOWLY = Settings(MACHINE, max_bandwidth=2_000_000)
"""The destination answers while pages are on their way."""
CLOSED_AT_ONCE = Cut(forward=0, how="close")
MakeBlock = Callable[..., BlockFile]


class Run:
    """One migration through a relay, and what came of it."""

    def __init__(self, destination: RealDestination, relay: CuttingRelay) -> None:
        self.destination = destination
        self.relay = relay
        self.reports: list[Report] = []
        self.guest_stops = 0
        self.on_report: Callable[[Report], None] = lambda _: None

    async def migrate(
        self,
        block: BlockFile,
        settings: Settings | None = None,
        reconnect: Callable[[], Awaitable[socket.socket]] | None = None,
    ) -> Report:
        with MemoryImage([block]) as memory:
            migration = OutgoingMigration(
                memory,
                DEVICE_STATE,
                settings or Settings(MACHINE),
                stop_guest=self._stop_guest,
                progress=self._progress,
                jitter=random.Random(1),
            )
            address = Address("tcp", host="127.0.0.1", port=self.relay.port)
            connection = await connect(address)
            async with asyncio.timeout(LIMIT):
                return await migration.run(connection, reconnect or way_back(connection, address))

    def _progress(self, report: Report) -> None:
        self.reports.append(report)
        self.on_report(report)

    async def _stop_guest(self) -> None:
        self.guest_stops += 1

    @property
    def breaks(self) -> list[str]:
        """Why there was no connection, one after the other."""
        return list(dict.fromkeys(report.broken for report in self.reports if report.broken))

    async def check(self, content: bytes = CONTENT) -> None:
        """The guest runs at the destination, once, and has all its memory."""
        destination = self.destination
        async with asyncio.timeout(LIMIT):
            await destination.migration.wait()
        assert destination.migration.state is State.END
        assert destination.guests_that_ran == 1
        assert "run" in destination.vmm.told
        assert self.guest_stops == 1
        assert await destination.vmm.guest.content() == content


@contextlib.asynccontextmanager
async def through_relay(
    cuts: Iterable[Cut], pages: int = PAGES, page_size: int = PAGE
) -> AsyncIterator[Run]:
    """A destination, and a relay in front of it."""
    settings = IncomingSettings(close_timeout=1.0)
    async with (
        RealDestination(pages, page_size, settings).listening() as destination,
        CuttingRelay(destination.port, cuts).listening() as relay,
    ):
        yield Run(destination, relay)


async def arrives(
    make_block: MakeBlock, cuts: Iterable[Cut], settings: Settings | None = None
) -> tuple[Run, Report]:
    """Migrate with these cuts, check the memory, and return what was told."""
    async with through_relay(cuts) as run:
        report = await run.migrate(make_block("pc.ram", CONTENT), settings)
        await run.check()
    assert report.phase is Phase.COMPLETED
    return run, report


async def fails(
    make_block: MakeBlock, cuts: Iterable[Cut], settings: Settings
) -> tuple[Run, MigrationFailed]:
    """Migrate with these cuts; return how it failed."""
    async with through_relay(cuts) as run:
        with pytest.raises(MigrationFailed) as failed:
            await run.migrate(make_block("pc.ram", CONTENT), settings)
    return run, failed.value


async def lengths(make_block: MakeBlock, settings: Settings | None = None) -> tuple[int, int]:
    """How many bytes a migration without a break sends forward and backward."""
    run, _ = await arrives(make_block, [], settings)
    return run.relay.passed[0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("precopy_passes", [0, 1])
async def test_a_break_at_any_byte_costs_nothing_but_time(
    make_block: MakeBlock, seed: int, precopy_passes: int
) -> None:
    settings = Settings(MACHINE, precopy_passes)
    forward, backward = await lengths(make_block, settings)
    numbers = random.Random(seed)
    for _ in range(4):
        if numbers.random() < 0.7:
            cut = Cut(forward=numbers.randrange(forward), how=numbers.choice(HOWS[:2]))
        else:
            # Of the confirmation nothing is left out here: see the tests of the end.
            cut = Cut(backward=numbers.randrange(backward - ANSWER), how=numbers.choice(HOWS))
        _, report = await arrives(make_block, [cut], settings)
        assert report.reconnects >= 1, cut


@pytest.mark.parametrize("seed", range(4))
async def test_breaks_may_follow_each_other_also_while_it_is_coming_back(
    make_block: MakeBlock, seed: int
) -> None:
    numbers = random.Random(seed)
    cuts = []
    for _ in range(12):
        # The short ones are within the questions and answers of a connection that resumes.
        cut = Cut(forward=numbers.choice((numbers.randrange(1, 40), numbers.randrange(20_000))))
        if numbers.random() < 0.4:
            cut = Cut(backward=numbers.randrange(1, 4 * ANSWER))
        cuts.append(cut)
    run, report = await arrives(make_block, cuts, SLOWLY)
    assert run.relay.connections > 6
    assert report.reconnects == run.relay.connections - 1


async def test_at_every_byte_of_the_package_and_around_it(make_block: MakeBlock) -> None:
    for place in range(BEFORE_PACKAGE - 10, ALL + 20, 4):
        await arrives(make_block, [Cut(forward=place)])


# -- before the package --------------------------------------------------------------------------


async def test_a_guest_that_was_stopped_is_neither_stopped_again_nor_kept_waiting_by_a_pass(
    make_block: MakeBlock,
) -> None:
    settings = Settings(MACHINE, precopy_passes=1)
    forward, _ = await lengths(make_block, settings)
    # All pages go in the pass; behind it there are PING 2, the package, PING 4 and the end.
    run, report = await arrives(make_block, [Cut(forward=forward - PACKAGE - 60)], settings)
    assert len(run.destination.vmms) == 2
    assert report.precopy_passes == 0
    assert report.postcopy_bytes == len(CONTENT)
    assert report.pages_again == PAGES


async def test_a_break_in_pre_copy_begins_it_anew(make_block: MakeBlock) -> None:
    settings = Settings(MACHINE, precopy_passes=2, max_bandwidth=2_000_000)
    run, report = await arrives(make_block, [Cut(forward=50_000)], settings)
    assert len(run.destination.vmms) == 2
    assert report.precopy_passes == 2
    assert 0 < report.pages_again <= PAGES


@pytest.mark.parametrize("retry_for", [0.0, 0.3])
async def test_when_the_time_to_come_back_is_over_before_the_package_the_guest_can_go_on_here(
    make_block: MakeBlock, retry_for: float
) -> None:
    cuts = [Cut(forward=100), *[CLOSED_AT_ONCE] * 100]
    settings = Settings(MACHINE, 1, retry_for=retry_for)
    run, failed = await fails(make_block, cuts, settings)
    assert not failed.after_package
    assert "the guest can go on here" in str(failed)
    assert ("no way back" in str(failed)) == (run.relay.connections > 1) or retry_for
    assert (run.relay.connections == 1) == (not retry_for)
    assert run.destination.guests_that_ran == 0


async def test_a_destination_that_says_that_it_has_failed_is_believed(
    make_block: MakeBlock,
) -> None:
    # Its stream ends, its way back does not: it says so.
    cuts = [Cut(forward=IN_THE_PAGES, how="half-close")]
    settings = Settings(MACHINE, precopy_passes=1, max_bandwidth=1_000_000)
    run, failed = await fails(make_block, cuts, settings)
    assert "reports failure (SHUT with status 1)" in str(failed)
    assert not failed.after_package
    assert run.relay.connections == 1


# -- in doubt: the package was sent, and no answer has come -------------------------------------


async def test_a_destination_that_never_got_the_package_is_sent_it_anew(
    make_block: MakeBlock,
) -> None:
    run, report = await arrives(make_block, [Cut(forward=BEFORE_PACKAGE + 1)])
    assert len(run.destination.vmms) == 2, "the other one has nothing to resume"
    assert run.relay.connections == report.reconnects + 1 == 3
    assert report.pages_again <= PAGES


async def test_a_destination_that_has_failed_before_it_got_the_package_is_sent_it_anew(
    make_block: MakeBlock,
) -> None:
    # It says that it has failed when the package is on its way already.
    run, _ = await arrives(make_block, [Cut(forward=BEFORE_PACKAGE - 3, how="half-close")])
    assert len(run.destination.vmms) == 2
    assert any("reports failure (SHUT with status 1)" in what for what in run.breaks)


async def test_a_destination_that_has_the_package_refuses_a_second_one(
    make_block: MakeBlock,
) -> None:
    # Something on the way closes the connection that would resume: it looks like a refusal.
    cuts = [Cut(backward=TWO_PONGS), CLOSED_AT_ONCE]
    run, report = await arrives(make_block, cuts)
    assert run.relay.connections == report.reconnects + 1 == 4, "resume, anew, resume"
    assert len(run.destination.vmms) == 1


async def test_the_end_is_not_sent_before_the_package_is_known_to_have_arrived(
    make_block: MakeBlock,
) -> None:
    settings = Settings(MACHINE, precopy_passes=1)
    _, backward = await lengths(make_block, settings)
    assert backward == 5 * ANSWER
    run, _ = await arrives(make_block, [Cut(backward=TWO_PONGS, how="half-close")], settings)
    assert run.destination.migration.report().bytes_received > 0
    phases = [report.phase for report in run.reports]
    assert Phase.CLOSING not in phases[: phases.index(Phase.RECONNECTING)]


# -- behind the package --------------------------------------------------------------------------


async def test_what_was_lost_on_the_way_is_sent_again_and_counted(make_block: MakeBlock) -> None:
    run, report = await arrives(make_block, [Cut(forward=IN_THE_PAGES)], SLOWLY)
    here = (IN_THE_PAGES - ALL) // (PAGE + 8)
    assert 0 < report.pages_again < PAGES - here + 5
    assert report.pages + report.zero_pages == PAGES + report.pages_again
    assert report.reconnects == 1
    assert run.breaks[0] == "the connection was lost: Connection reset by peer"


async def test_a_half_closed_connection_is_a_break(make_block: MakeBlock) -> None:
    _, report = await arrives(make_block, [Cut(forward=IN_THE_PAGES, how="half-close")], SLOWLY)
    assert report.reconnects == 1


async def test_a_destination_that_closes_at_once_is_tried_until_it_does_not(
    make_block: MakeBlock,
) -> None:
    run, report = await arrives(
        make_block, [Cut(forward=IN_THE_PAGES), *[CLOSED_AT_ONCE] * 5], SLOWLY
    )
    assert report.reconnects == 6
    waits = [report.retry_seconds for report in run.reports if report.retry_seconds is not None]
    assert waits[0] == 0, "the guest waits"
    assert max(waits) > 0.05


async def test_a_destination_that_takes_the_connection_and_is_silent_is_left_after_a_while(
    make_block: MakeBlock,
) -> None:
    async with through_relay([Cut(forward=IN_THE_PAGES)]) as run:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            ports = iter([silent.getsockname()[1], run.relay.port])

            async def reconnect() -> socket.socket:
                return await connect(Address("tcp", host="127.0.0.1", port=next(ports)))

            block = make_block("pc.ram", CONTENT)
            report = await run.migrate(block, replace(SLOWLY, break_after=1.0), reconnect)
        await run.check()
    assert "the destination took the connection and said nothing for 1 s" in run.breaks
    assert report.reconnects == 2


async def test_who_is_always_silent_is_not_tried_for_longer_than_was_said(
    make_block: MakeBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comeback, "_STEADY_SECONDS", 0.5)
    block = make_block("pc.ram", CONTENT)
    with socket.create_server(("127.0.0.1", 0)) as server, MemoryImage([block]) as memory:
        address = Address("tcp", host="127.0.0.1", port=server.getsockname()[1])
        connection = await connect(address)
        migration = OutgoingMigration(memory, settings=Settings(break_after=1.0, retry_for=1.5))
        async with asyncio.timeout(LIMIT):
            with pytest.raises(MigrationFailed, match="said nothing for 1 s; no way back in"):
                await migration.run(connection, way_back(connection, address))


async def test_the_guest_gets_what_it_waits_for_through_all_breaks(make_block: MakeBlock) -> None:
    async with through_relay([Cut(forward=20_000)] * 5) as run:
        reading: list[asyncio.Future[bytes]] = []

        def read_when_it_runs(_: Report) -> None:
            if run.destination.guests_that_ran and not reading:
                reading.append(asyncio.ensure_future(run.destination.vmm.guest.content()))

        run.on_report = read_when_it_runs
        # Nothing comes but what is asked for.
        settings = Settings(MACHINE, max_bandwidth=1)
        report = await run.migrate(make_block("pc.ram", CONTENT), settings)
        await run.check()
        assert await reading[0] == CONTENT
    assert report.requests_answered > PAGES // 2
    assert run.relay.connections > 5


async def test_half_a_huge_page_is_sent_again_as_a_whole(
    make_block: MakeBlock, huge_pages: Callable[[int], None]
) -> None:
    huge_pages(6)
    content = image(3, HUGE)
    async with through_relay([Cut(forward=HUGE), Cut(forward=HUGE)], 3, HUGE) as run:
        settings = Settings(MACHINE, max_bandwidth=50_000_000)
        report = await run.migrate(make_block("pc.ram", content, HUGE), settings)
        await run.check(content)
    assert report.reconnects >= 2


async def test_when_the_time_to_come_back_is_over_behind_the_package_the_guest_has_left(
    make_block: MakeBlock,
) -> None:
    cuts = [Cut(forward=IN_THE_PAGES), *[CLOSED_AT_ONCE] * 100]
    _, failed = await fails(make_block, cuts, replace(SLOWLY, retry_for=0.3))
    assert failed.after_package
    assert str(failed).startswith("the connection was lost: Connection reset by peer; no way back")
    assert "(phase reconnecting, broken in postcopy; the package had been sent" in str(failed)
    assert "the guest must not go on here" in str(failed)


# -- the end -------------------------------------------------------------------------------------


async def test_a_break_between_the_end_and_its_confirmation(make_block: MakeBlock) -> None:
    forward, _ = await lengths(make_block)
    async with through_relay([Cut(forward=forward)]) as run:
        vmm = run.destination.vmm
        vmm.may_load.clear()

        def load_when_it_is_back(report: Report) -> None:
            if report.reconnects:
                vmm.may_load.set()

        run.on_report = load_when_it_is_back
        report = await run.migrate(make_block("pc.ram", CONTENT), Settings(MACHINE))
        await run.check()
    assert report.reconnects == 1


@pytest.mark.parametrize("lost", range(1, ANSWER + 1))
async def test_a_confirmation_that_was_lost_is_said_again(make_block: MakeBlock, lost: int) -> None:
    _, backward = await lengths(make_block)
    _, report = await arrives(make_block, [Cut(backward=backward - lost)])
    assert report.reconnects == 1
    assert report.pages_again == 0


async def test_a_confirmation_that_a_proxy_has_kept_to_itself_is_asked_for_after_a_while(
    make_block: MakeBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the connection open, so nothing else would tell that nobody is behind it."""
    _, backward = await lengths(make_block)
    monkeypatch.setattr(attempt, "_CONFIRMED_WITHIN", 0.3)
    async with through_relay([Cut(backward=backward - ANSWER, how="stay")]) as run:
        report = await run.migrate(make_block("pc.ram", CONTENT))
        await run.check()
    assert run.breaks == ["the destination took the connection and said nothing for 0.3 s"]
    assert (report.reconnects, report.pages_again) == (1, 0)


@pytest.mark.parametrize("retry_for", [0.2, None])
async def test_without_a_confirmation_it_is_no_success_and_ends_where_nobody_listens_any_more(
    make_block: MakeBlock, monkeypatch: pytest.MonkeyPatch, retry_for: float | None
) -> None:
    monkeypatch.setattr(comeback, "_SECONDS", 0.3)
    _, backward = await lengths(make_block)
    async with through_relay([Cut(backward=backward - 1)]) as run:

        async def reconnect() -> socket.socket:
            while run.destination.listener.fileno() >= 0:
                await asyncio.sleep(0.01)
            return await connect(Address("tcp", host="127.0.0.1", port=run.destination.port))

        block = make_block("pc.ram", CONTENT)
        with pytest.raises(MigrationFailed) as failed:
            await run.migrate(block, Settings(MACHINE, retry_for=retry_for), reconnect)
    assert run.destination.migration.state is State.END
    assert failed.value.after_package
    assert "Connection refused" in str(failed.value)
    assert (
        "everything was sent, the destination may have completed: ask it; "
        "the guest must not go on here" in str(failed.value)
    )
