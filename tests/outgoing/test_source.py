"""A whole outgoing migration over real sockets, read by two independent readers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postcopyd.outgoing.image import BlockFile, MemoryImage
from postcopyd.outgoing.report import Phase, Report
from postcopyd.outgoing.source import OutgoingMigration, Settings
from postcopyd.wire.messages import Message, Package, Pages, ZeroPages
from postcopyd.wire.stream_writer import device_section, ping
from tests.outgoing.destination import Destination, migrate, no_descriptor_left, tcp_pair
from tests.outgoing.raw_stream import RawStream

PAGE = 4096
HUGE = 2 << 20
DEVICES = device_section(5, "timer", b"\x00" * 24) + device_section(6, "cpu", b"registers")
Pair = tuple[socket.socket, socket.socket]
MakeBlock = Callable[..., BlockFile]


def distinct(pages: int, seed: int = 1) -> bytes:
    """Pages of which no two are alike and none is zero."""
    return b"".join(
        (seed.to_bytes(2, "big") + page.to_bytes(6, "big")) * (PAGE // 8)
        for page in range(1, pages + 1)
    )


def overwrite(block: BlockFile, offset: int, content: bytes) -> None:
    with block.path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


async def test_without_pre_copy_the_messages_are_those_of_a_real_source(
    pair: Pair, make_block: MakeBlock
) -> None:
    near, far = pair
    blocks = [make_block("pc.ram", distinct(300)), make_block("/rom@etc/acpi", distinct(3, 2))]
    destination = Destination(far)
    with MemoryImage(blocks) as image:
        await migrate(OutgoingMigration(image, DEVICES), near, destination)

    raw = RawStream(bytes(destination.stream))
    assert raw.names() == [
        "CONFIGURATION",
        "OPEN_RETURN_PATH",
        "PING 1",
        "ADVISE",
        "START",
        "DISCARD",
        "PING 2",
        "PACKAGED",
        "PING 4",
        "PART",
        "END",
        "EOF",
    ]
    assert raw.all_of("CONFIGURATION") == ["postcopyd-image"]
    assert raw.all_of("ADVISE") == [(PAGE, PAGE)]
    assert raw.all_of("START") == [[("pc.ram", 300 * PAGE), ("/rom@etc/acpi", 3 * PAGE)]]
    # Never sent: one range each, the whole block (qemu-wire, 2).
    assert raw.all_of("DISCARD") == [
        ("pc.ram", [(0, 300 * PAGE)]),
        ("/rom@etc/acpi", [(0, 3 * PAGE)]),
    ]
    package = raw.all_of("PACKAGED")[0]
    assert package == (
        bytes.fromhex("0800040000") + DEVICES + bytes.fromhex("0800020004000000030800050000")
    )
    assert destination.device_state == DEVICES
    assert destination.contents() == {block.name: block.path.read_bytes() for block in blocks}


async def test_records_name_their_block_once_and_again_when_post_copy_begins(
    pair: Pair, make_block: MakeBlock
) -> None:
    near, far = pair
    block = make_block("pc.ram", distinct(40))

    async def stop_guest() -> None:
        overwrite(block, 0, b"changed")

    destination = Destination(far)
    with MemoryImage([block]) as image:
        migration = OutgoingMigration(
            image, settings=Settings(precopy_passes=1), stop_guest=stop_guest
        )
        await migrate(migration, near, destination)

    raw = RawStream(bytes(destination.stream))
    before, behind = raw.records(postcopy=False), raw.records(postcopy=True)
    assert [record.named for record in before] == [True] + [False] * 39
    assert [(record.offset, record.named) for record in behind] == [(0, True)]


async def test_pages_that_changed_are_discarded_in_twelves_and_sent_again(
    pair: Pair, make_block: MakeBlock
) -> None:
    near, far = pair
    blocks = [make_block("a", distinct(200)), make_block("clean", distinct(20, 2))]

    async def stop_guest() -> None:
        for page in range(64):
            overwrite(blocks[0], page * 2 * PAGE, b"changed at the last moment")

    destination = Destination(far)
    with MemoryImage(blocks) as image:
        migration = OutgoingMigration(
            image, settings=Settings(precopy_passes=2), stop_guest=stop_guest
        )
        report = await migrate(migration, near, destination)

    raw = RawStream(bytes(destination.stream))
    discards = raw.all_of("DISCARD")
    assert [(name, len(ranges)) for name, ranges in discards] == [("a", 12)] * 5 + [("a", 4)]
    assert [part for _, ranges in discards for part in ranges] == [
        (page * 2 * PAGE, PAGE) for page in range(64)
    ]
    assert [record.offset for record in raw.records(postcopy=True)] == [
        page * 2 * PAGE for page in range(64)
    ]
    assert len(raw.records(postcopy=False)) == 220, "what did not change is not sent in pass 2"
    assert report.postcopy_bytes == 64 * PAGE
    assert destination.contents() == {block.name: block.path.read_bytes() for block in blocks}


async def test_every_pass_is_a_section_and_a_later_one_sends_what_changed(
    pair: Pair, make_block: MakeBlock
) -> None:
    near, far = pair
    block = make_block("ram", distinct(10))
    done = 0

    def progress(report: Report) -> None:
        nonlocal done
        if report.phase is Phase.PRECOPY and report.precopy_passes > done:
            done = report.precopy_passes
            if done == 1:
                overwrite(block, 7 * PAGE, b"changed between the passes")

    destination = Destination(far)
    with MemoryImage([block]) as image:
        migration = OutgoingMigration(image, settings=Settings(precopy_passes=3), progress=progress)
        report = await migrate(migration, near, destination)

    raw = RawStream(bytes(destination.stream))
    parts = raw.all_of("PART")
    assert [[record.offset // PAGE for record in part] for part in parts] == [
        list(range(10)),
        [7],
        [],
    ]
    assert raw.all_of("DISCARD") == []
    assert report.precopy_passes == 3
    assert report.postcopy_bytes == 0
    assert destination.contents() == {"ram": block.path.read_bytes()}


async def test_one_changed_byte_of_a_huge_page_sends_all_its_512_pages_in_order(
    pair: Pair, make_block: MakeBlock
) -> None:
    near, far = pair
    small = make_block("small", distinct(8))
    huge = make_block("huge", distinct(3 * 512, 2), HUGE)

    async def stop_guest() -> None:
        overwrite(small, 3 * PAGE, b"x")
        overwrite(huge, HUGE + 77 * PAGE, b"x")

    destination = Destination(far)
    with MemoryImage([small, huge]) as image:
        migration = OutgoingMigration(
            image, settings=Settings(precopy_passes=1), stop_guest=stop_guest
        )
        await migrate(migration, near, destination)

    raw = RawStream(bytes(destination.stream), huge={"huge": HUGE})
    assert raw.all_of("ADVISE") == [(0x201000, PAGE)]
    assert raw.all_of("DISCARD") == [("small", [(3 * PAGE, PAGE)]), ("huge", [(HUGE, HUGE)])]
    behind = [record for record in raw.records(postcopy=True) if record.block == "huge"]
    assert [record.offset for record in behind] == list(range(HUGE, 2 * HUGE, PAGE))
    assert destination.contents() == {
        "small": small.path.read_bytes(),
        "huge": huge.path.read_bytes(),
    }


@pytest.mark.parametrize("passes", [0, 1])
async def test_zero_pages_and_holes_cost_nine_bytes_and_holes_stay_holes(
    pair: Pair, tmp_path: Path, passes: int
) -> None:
    near, far = pair
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.truncate(400 * PAGE)
        file.seek(100 * PAGE)
        file.write(distinct(1) + bytes(2 * PAGE) + distinct(1))
    allocated = path.stat().st_blocks
    destination = Destination(far)
    with MemoryImage([BlockFile("ram", path)]) as image:
        migration = OutgoingMigration(image, settings=Settings(precopy_passes=passes))
        report = await migrate(migration, near, destination)

    raw = RawStream(bytes(destination.stream))
    records = raw.records(postcopy=not passes)
    assert [record.offset for record in records] == list(range(0, 400 * PAGE, PAGE))
    assert [record.offset // PAGE for record in records if record.content] == [100, 103]
    assert (report.pages, report.zero_pages) == (2, 398)
    assert path.stat().st_blocks == allocated
    assert destination.contents() == {"ram": path.read_bytes()}


def asks_after_package(destination: Destination, wanted: list[tuple[str, int]]) -> None:
    """Ask for one page after the other, each when the one before has come."""
    left = list(wanted)
    waiting_for: list[tuple[str, int]] = []

    def on_message(message: Message) -> None:
        if not isinstance(message, Package | Pages | ZeroPages) or destination.device_state is None:
            return
        if waiting_for and waiting_for[0] not in destination.arrived:
            return
        waiting_for.clear()
        while left:
            block, offset = left.pop(0)
            if (block, offset) not in destination.arrived:
                waiting_for.append((block, offset))
                destination.request(block, offset)
                return

    destination.on_message = on_message


async def test_requests_are_answered_at_once_while_the_bandwidth_forbids_everything_else(
    pair: Pair, make_block: MakeBlock
) -> None:
    near, far = pair
    block = make_block("ram", distinct(50))
    wanted = [("ram", page * PAGE) for page in reversed(range(50))]
    destination = Destination(far)
    asks_after_package(destination, wanted)
    with MemoryImage([block]) as image:
        # One byte a second: the scan would take days.
        migration = OutgoingMigration(image, settings=Settings(max_bandwidth=1))
        report = await migrate(migration, near, destination)

    first, *rest = destination.arrived
    assert first == ("ram", 0), "the scan has sent one page before it ran into its limit"
    assert rest == wanted[:-1]
    assert (report.requests, report.requests_answered) == (49, 49)


async def test_behind_a_requested_page_the_scan_goes_on(pair: Pair, make_block: MakeBlock) -> None:
    near, far = pair
    pages = 8192
    block = make_block("ram", distinct(pages))
    destination = Destination(far)
    asks_after_package(destination, [("ram", 6000 * PAGE)])
    with MemoryImage([block]) as image:
        report = await migrate(OutgoingMigration(image), near, destination)

    order = [offset // PAGE for _, offset in destination.arrived]
    place = order.index(6000)
    assert report.requests_answered == 1
    assert 0 < place < 5999
    assert order[place:] == [*range(6000, pages), *range(place, 6000)]


async def test_what_waits_in_front_of_a_request_is_bounded(make_block: MakeBlock) -> None:
    near, far = tcp_pair()
    receive_buffer = far.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    pages = 4096
    block = make_block("ram", distinct(pages))
    destination = Destination(far)
    with far, MemoryImage([block]) as image:
        migration = OutgoingMigration(image)
        sending = asyncio.ensure_future(migration.run(near))
        await destination.receive_until(lambda: destination.device_state is not None)
        # Take nothing until the source cannot get rid of anything any more.
        sent, turns = 0, 0
        while turns < 1000:
            await asyncio.sleep(0)
            turns = turns + 1 if migration.report().bytes_sent == sent else 0
            sent = migration.report().bytes_sent
        assert sent < block.path.stat().st_size // 2
        destination.request("ram", (pages - 1) * PAGE)
        await destination.run()
        await sending

    place = destination.arrived.index(("ram", (pages - 1) * PAGE))
    # What the receiver has room for, what the kernel takes beyond what it has sent (and what it
    # rounds that up to, one segment), and one batch that is half sent.
    assert place * PAGE < receive_buffer + (128 << 10) + (64 << 10) + (256 << 10)


async def test_the_report_follows_the_phases(pair: Pair, make_block: MakeBlock) -> None:
    near, far = pair
    block = make_block("ram", distinct(20) + bytes(4 * PAGE))
    reports: list[Report] = []
    destination = Destination(far)
    with MemoryImage([block]) as image:
        migration = OutgoingMigration(
            image, settings=Settings(precopy_passes=1), progress=reports.append
        )
        report = await migrate(migration, near, destination)

    phases = [report.phase for report in reports]
    assert list(dict.fromkeys(phases)) == [
        phase for phase in Phase if phase not in (Phase.RECONNECTING, Phase.FAILED)
    ]
    assert report == migration.report()
    assert report.phase is Phase.COMPLETED
    assert report.failure is None
    assert report.bytes_sent == len(destination.stream)
    assert (report.pages, report.zero_pages) == (20, 4)
    assert report.switchover_seconds is not None
    assert 0 < report.switchover_seconds < report.seconds


async def test_nothing_stays_open_behind_a_migration(make_block: MakeBlock) -> None:
    block = make_block("ram", distinct(20))
    with no_descriptor_left():
        near, far = tcp_pair()
        with far, MemoryImage([block]) as image:
            await migrate(OutgoingMigration(image), near, Destination(far))


async def test_a_migration_runs_once(pair: Pair, make_block: MakeBlock) -> None:
    near, far = pair
    destination = Destination(far)
    with MemoryImage([make_block("ram", distinct(2))]) as image:
        migration = OutgoingMigration(image)
        await migrate(migration, near, destination)
        with pytest.raises(RuntimeError, match="runs once"):
            await migration.run(far)


@pytest.mark.parametrize(
    ("device_state", "settings_", "complaint"),
    [
        (b"raw registers", Settings(), "not made of device sections"),
        (DEVICES[:-1], Settings(), "no footer"),
        (DEVICES + ping(3), Settings(), "ends with a PING"),
        (b"", Settings(machine=""), "1 to 255 bytes"),
        (b"", Settings(machine="x" * 256), "1 to 255 bytes"),
        (b"", Settings(precopy_passes=-1), "-1 pre-copy passes"),
        (b"", Settings(max_bandwidth=0), "bandwidth of 0"),
    ],
)
def test_what_no_destination_could_take_is_refused_before_anything_is_sent(
    make_block: MakeBlock, device_state: bytes, settings_: Settings, complaint: str
) -> None:
    with (
        MemoryImage([make_block("ram", distinct(1))]) as image,
        pytest.raises(ValueError, match=complaint),
    ):
        OutgoingMigration(image, device_state, settings_)


page_content = st.one_of(
    st.just(bytes(PAGE)), st.binary(min_size=1, max_size=8).map(lambda b: b.ljust(PAGE, b"\1"))
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    blocks=st.lists(st.lists(page_content, min_size=1, max_size=80), min_size=1, max_size=3),
    passes=st.integers(0, 2),
    changes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 79), page_content), max_size=20),
    requests=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 79)), max_size=20),
    over_unix=st.booleans(),
)
async def test_the_destination_has_the_memory_of_the_stopped_guest_whatever_happens(
    make_block: MakeBlock,
    blocks: list[list[bytes]],
    passes: int,
    changes: list[tuple[int, int, bytes]],
    requests: list[tuple[int, int]],
    over_unix: bool,
) -> None:
    files = [make_block(f"b{n}", b"".join(pages)) for n, pages in enumerate(blocks)]

    async def stop_guest() -> None:
        for number, page, content in changes:
            if number < len(blocks) and page < len(blocks[number]):
                overwrite(files[number], page * PAGE, content)

    near, far = socket.socketpair() if over_unix else tcp_pair()
    destination = Destination(far)
    asks_after_package(
        destination,
        [(f"b{n}", p * PAGE) for n, p in requests if n < len(blocks) and p < len(blocks[n])],
    )
    with far, MemoryImage(files) as image:
        migration = OutgoingMigration(
            image, settings=Settings(precopy_passes=passes), stop_guest=stop_guest
        )
        await migrate(migration, near, destination)
    assert destination.contents() == {file.name: file.path.read_bytes() for file in files}
    raw = RawStream(bytes(destination.stream))
    sent = [(record.block, record.offset) for record in raw.records(postcopy=True)]
    assert len(sent) == len(set(sent))
