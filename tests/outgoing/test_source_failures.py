"""What a destination can do wrong, and what the source makes of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from postcopyd.outgoing.image import BlockFile, MemoryImage
from postcopyd.outgoing.report import Phase
from postcopyd.outgoing.source import MigrationFailed, OutgoingMigration, Settings
from postcopyd.wire.return_path import ReturnPathWriter
from tests.outgoing.destination import LIMIT, Destination, no_descriptor_left, tcp_pair

PAGE = 4096
MakeBlock = Callable[..., BlockFile]
Script = Callable[[Destination], Awaitable[None]]


async def package(destination: Destination) -> None:
    await destination.receive_until(lambda: destination.device_state is not None)


async def failure_of(
    make_block: MakeBlock,
    script: Script,
    settings: Settings | None = None,
    stop_guest: Callable[[], Awaitable[None]] | None = None,
) -> tuple[MigrationFailed, OutgoingMigration]:
    """Migrate 16 MiB to a destination that does what `script` says; return how it failed."""
    block = make_block("ram", b"\1" * (16 << 20))
    near, far = tcp_pair()
    with far, MemoryImage([block]) as image:
        migration = OutgoingMigration(image, settings=settings, stop_guest=stop_guest)
        destination = Destination(far)
        acting = asyncio.ensure_future(script(destination))
        with pytest.raises(MigrationFailed) as failed:
            async with asyncio.timeout(LIMIT):
                await migration.run(near)
        await acting
        assert near.fileno() == -1, "the connection is still open"
    report = migration.report()
    assert report.phase is Phase.FAILED
    assert report.failure == str(failed.value)
    return failed.value, migration


@pytest.fixture(params=["at once", "with the first pages"])
def before_package(request: pytest.FixtureRequest) -> Script:
    """Wait for a moment in front of the package."""

    async def wait(destination: Destination) -> None:
        if request.param == "with the first pages":
            await destination.receive_until(lambda: len(destination.stream) > 1 << 20)

    return wait


async def test_a_lost_connection_before_the_package_leaves_the_guest_here(
    make_block: MakeBlock, before_package: Script
) -> None:
    async def script(destination: Destination) -> None:
        await before_package(destination)
        destination.connection.close()

    failed, migration = await failure_of(make_block, script, Settings(precopy_passes=1))
    assert not failed.after_package
    assert "the guest can go on here" in str(failed)
    assert "closed the connection" in str(failed) or "was lost" in str(failed)
    assert migration.report().switchover_seconds is None


async def test_a_lost_connection_behind_the_package_says_that_the_guest_has_left(
    make_block: MakeBlock,
) -> None:
    async def script(destination: Destination) -> None:
        await package(destination)
        destination.connection.close()

    failed, _ = await failure_of(make_block, script)
    assert failed.after_package
    assert "phase postcopy; the package had been sent: the guest must not go on here" in str(failed)


async def test_a_connection_closed_before_everything_is_confirmed_is_a_failure(
    make_block: MakeBlock,
) -> None:
    async def script(destination: Destination) -> None:
        destination.confirm = False
        await destination.run()
        destination.connection.close()

    failed, _ = await failure_of(make_block, script)
    assert "the destination closed the connection (phase closing" in str(failed)


@pytest.mark.parametrize("status", [1, 0xFFFFFFFF])
async def test_a_destination_that_reports_failure_at_the_end_fails_the_migration(
    make_block: MakeBlock, status: int
) -> None:
    async def script(destination: Destination) -> None:
        destination.confirm = False
        await destination.run()
        destination.say(destination.writer.shut(status))

    failed, _ = await failure_of(make_block, script)
    assert f"reports failure (SHUT with status {status})" in str(failed)
    assert failed.after_package


async def test_a_destination_that_reports_failure_in_pre_copy_ends_it_there(
    make_block: MakeBlock,
) -> None:
    stopped = False

    async def stop_guest() -> None:
        nonlocal stopped
        stopped = True

    async def script(destination: Destination) -> None:
        await destination.receive_until(lambda: len(destination.stream) > 1 << 20)
        destination.say(destination.writer.shut(1))

    failed, _ = await failure_of(make_block, script, Settings(precopy_passes=1), stop_guest)
    assert "SHUT with status 1) (phase precopy" in str(failed)
    assert not stopped


writer = ReturnPathWriter()


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (b"\0\0\0\0", "unknown return path message 0"),
        (b"\0\x08\0\0", "unknown return path message 8"),
        (b"\0\1\0\3abc", "SHUT has 3 bytes"),
        (bytes.fromhex("0004000c") + bytes(12), "REQ_PAGES came before a REQ_PAGES_ID"),
        (ReturnPathWriter().request_pages("rom", 0, PAGE), "'rom', which is not being migrated"),
        (ReturnPathWriter().request_pages("ram", 16 << 20, PAGE), "beyond its length"),
        (ReturnPathWriter().request_pages("ram", 12, PAGE), "not whole host pages"),
        (writer.received_bitmap("ram", bytes(512)), "ReceivedBitmap outside of a recovery"),
        (writer.resume_ack(), "ResumeAck outside of a recovery"),
        (writer.shut(0), "SHUT 0 before everything was sent"),
    ],
)
async def test_a_destination_that_breaks_the_protocol_is_told_off_by_name(
    make_block: MakeBlock, message: bytes, complaint: str
) -> None:
    async def script(destination: Destination) -> None:
        await package(destination)
        destination.say(message)

    failed, _ = await failure_of(make_block, script)
    assert "the destination broke the protocol of the return path" in str(failed)
    assert complaint in str(failed)


async def test_a_request_before_the_package_is_refused(make_block: MakeBlock) -> None:
    async def script(destination: Destination) -> None:
        await destination.receive_until(lambda: "ram" in destination.memory)
        destination.request("ram", 5 * PAGE)

    failed, _ = await failure_of(make_block, script, Settings(precopy_passes=1))
    assert "a request for 0x5000 of block 'ram' before the package was sent" in str(failed)
    assert not failed.after_package


async def test_pongs_and_a_switchover_ack_are_taken_at_any_time(make_block: MakeBlock) -> None:
    near, far = tcp_pair()
    destination = Destination(far)
    destination.say(writer.pong(77) + writer.switchover_ack())
    with far, MemoryImage([make_block("ram", b"\1" * PAGE)]) as image:
        receiving = asyncio.ensure_future(destination.run())
        await OutgoingMigration(image).run(near)
        await receiving


async def test_nothing_of_the_guest_goes_to_who_has_not_answered(make_block: MakeBlock) -> None:
    stopped: list[str] = []

    async def stop_guest() -> None:
        stopped.append("stopped")

    near, far = tcp_pair()
    with far, MemoryImage([make_block("ram", b"\1" * PAGE)]) as image:
        migration = OutgoingMigration(image, b"", Settings(break_after=1), stop_guest=stop_guest)
        with pytest.raises(MigrationFailed, match="said nothing for 1 s") as failed:
            await migration.run(near)
        assert b"\1" * PAGE not in far.recv(1 << 20)
    assert not failed.value.after_package
    assert not stopped


async def test_a_guest_that_cannot_be_stopped_ends_it_with_that_error(
    make_block: MakeBlock,
) -> None:
    async def stop_guest() -> None:
        raise TimeoutError("the guest does not stop")

    near, far = tcp_pair()
    with far, MemoryImage([make_block("ram", b"\1" * PAGE)]) as image:
        migration = OutgoingMigration(image, stop_guest=stop_guest)
        running = asyncio.ensure_future(migration.run(near))
        with pytest.raises(TimeoutError, match="the guest does not stop"):
            await asyncio.gather(Destination(far).receive_until(running.done), running)
    assert migration.report().phase is Phase.FAILED
    assert near.fileno() == -1


async def test_a_migration_that_is_cancelled_leaves_nothing_open(make_block: MakeBlock) -> None:
    block = make_block("ram", b"\1" * (16 << 20))
    with no_descriptor_left():
        near, far = tcp_pair()
        with far, MemoryImage([block]) as image:
            migration = OutgoingMigration(image)
            running = asyncio.ensure_future(migration.run(near))
            await package(Destination(far))
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
    assert migration.report().phase is Phase.FAILED
    assert migration.report().failure == (
        "cancelled (phase postcopy; the package had been sent: the guest must not go on here)"
    )


async def test_a_socket_that_is_no_stream_is_refused_and_closed(make_block: MakeBlock) -> None:
    near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with near, MemoryImage([make_block("ram", b"\1" * PAGE)]) as image:
        with pytest.raises(OSError, match=r"not supported|not available"):
            await OutgoingMigration(image).run(near)
        assert near.fileno() == -1


async def test_a_peer_that_asks_for_everything_again_and_again_costs_no_memory(
    make_block: MakeBlock,
) -> None:
    near, far = socket.socketpair()
    pages = 64
    destination = Destination(far)
    with far, MemoryImage([make_block("ram", b"\1" * (pages * PAGE))]) as image:
        migration = OutgoingMigration(image, settings=Settings(max_bandwidth=1))
        running = asyncio.ensure_future(migration.run(near))
        await package(destination)
        for _ in range(20):
            destination.say(destination.writer.request_pages("ram", 0, pages * PAGE))
        await destination.run()
        report = await running
    assert report.requests_answered == pages - 1
    assert len(destination.arrived) == pages
